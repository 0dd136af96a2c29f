"""More of test_witness.py: a witness's state, and its server."""

from __future__ import annotations

import http.client
import json
import random
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from render_platform import merkle
from render_platform.clock import ManualClock, SystemClock
from render_platform.config import MAX_WITNESSES, load_settings
from render_platform.errors import Unavailable, UsageError
from render_platform.note import MAX_SIGNATURES, WitnessKey
from render_platform.objects import FolderObjects
from render_platform.witness import (
    MAX_BODY_BYTES,
    Answer,
    Witness,
    Witnesses,
    WitnessServer,
    WitnessState,
    make_witness,
    open_witness,
    parse_members,
)
from tests.test_witness import (
    KEY,
    LOG,
    NO_LOGS,
    ORIGIN,
    STRANGER,
    WITNESS,
    check_cosigned,
    leaves,
    submission,
    witness_in,
)

# Its state.


def test_what_was_cosigned_is_on_disk_before_the_answer(tmp_path: Path) -> None:
    witness = witness_in(tmp_path)
    witness.add_checkpoint(submission(0, leaves(5)))
    stored = json.loads((tmp_path / "state.json").read_bytes())
    assert stored == {"logs": [{"origin": ORIGIN, "size": 5, "root": merkle.root(leaves(5)).hex()}]}
    again = witness_in(tmp_path)
    assert again.add_checkpoint(submission(0, leaves(6))).body == "5\n"
    check_cosigned(again.add_checkpoint(submission(5, leaves(6))), leaves(6))


def test_a_state_that_cannot_be_written_cosigns_nothing(tmp_path: Path) -> None:
    class Broken(FolderObjects):
        def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
            raise Unavailable("the disk is full")

    (tmp_path / "state.json").write_bytes(NO_LOGS)
    witness = Witness({ORIGIN: [LOG.verifier]}, WITNESS, WitnessState(Broken(tmp_path), NO_LOGS), ManualClock(1))
    for _ in range(2):
        with pytest.raises(Unavailable, match="disk is full"):
            witness.add_checkpoint(submission(0, leaves(5)))
    with running(witness) as server:
        assert post(server, submission(0, leaves(5)))[0] == 503


def test_two_witnesses_over_one_state_cannot_both_go_on(tmp_path: Path) -> None:
    one, two = witness_in(tmp_path), witness_in(tmp_path)
    one.add_checkpoint(submission(0, leaves(5)))
    with pytest.raises(Unavailable, match="another writer"):
        two.add_checkpoint(submission(0, leaves(8, fork_at=2)))


def test_a_witness_is_made_once_and_opened_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with pytest.raises(UsageError, match="no witness here"):
        opened(folder)
    key = make_witness(folder, "example.com/w")
    assert stat.S_IMODE((folder / "witness.key").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="or was one"):
        make_witness(folder, "example.com/w")
    with open_witness(folder, [LOG.verifier, STRANGER.verifier], ManualClock(10**12)) as witness:
        assert witness.key == key
        assert witness.add_checkpoint(submission(0, leaves(2), by=STRANGER)).status == 200
        with pytest.raises(Unavailable, match="runs already"):
            opened(folder)
    opened(folder)


@pytest.mark.parametrize("lost", ["state.json", "witness.key"])
def test_a_witness_that_lost_something_does_not_start(tmp_path: Path, lost: str) -> None:
    make_witness(tmp_path, "example.com/w")
    with open_witness(tmp_path, [LOG.verifier], ManualClock(10**12)) as witness:
        witness.add_checkpoint(submission(0, leaves(2)))
    (tmp_path / lost).unlink()
    with pytest.raises(UsageError, match="lost its state" if lost == "state.json" else "is not there"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="or was one" if lost == "state.json" else "lost its key"):
        make_witness(tmp_path, "example.com/w")


def test_a_witness_whose_making_was_cut_off_is_made(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(NO_LOGS)  # the crash came before its key
    make_witness(tmp_path, "example.com/w")
    opened(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"logs":[{}]}', b'{"logs":[{"origin":"a","size":-1,"root":""}]}'])
def test_a_damaged_state_is_not_an_empty_one(tmp_path: Path, data: bytes) -> None:
    make_witness(tmp_path, "example.com/w")
    (tmp_path / "state.json").write_bytes(data)
    with pytest.raises(Unavailable, match="cannot be read"):
        opened(tmp_path)


def opened(folder: Path) -> None:
    with open_witness(folder, [LOG.verifier], ManualClock(10**12)):
        pass


# Its server.


@contextmanager
def running(witness: Witness) -> Iterator[WitnessServer]:
    with WitnessServer(witness, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def post(server: WitnessServer, body: bytes, path: str = "/add-checkpoint", **headers: str) -> tuple[int, bytes, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)) as connection:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["content-type"]


def test_over_http(tmp_path: Path) -> None:
    with (
        running(witness_in(tmp_path)) as server,
        closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as kept,
    ):
        for size in (3, 8):
            kept.request("POST", "/add-checkpoint", submission(0 if size == 3 else 3, leaves(size)))
            answer = kept.getresponse()
            check_cosigned(Answer(answer.status, answer.read().decode(), answer.headers["content-type"]), leaves(size))
        assert post(server, submission(0, leaves(9))) == (409, b"8\n", "text/x.tlog.size")
        assert post(server, b"", "/metrics")[0] == 404
        assert post(server, b"x" * (MAX_BODY_BYTES + 1))[0] == 413
        assert [post(server, b"", **{"content-length": bad})[0] for bad in ("-1", "9" * 5000, "x")] == [413] * 3
        kept.request("GET", "/add-checkpoint")
        assert kept.getresponse().status == 501


def test_more_connections_than_it_takes_are_closed_and_the_rest_goes_on(tmp_path: Path) -> None:
    with running(witness_in(tmp_path)) as server:
        idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(32)]
        extra = socket.create_connection(("127.0.0.1", server.server_port))
        extra.settimeout(20)
        assert extra.recv(1) == b"", "the thirty-third is closed at once"
        for one in (*idle, extra):
            one.close()
        server._free.acquire(timeout=20)  # one of them is free again
        server._free.release()
        assert post(server, submission(0, leaves(3)))[0] == 200


def test_requests_at_once_are_decided_one_after_another(tmp_path: Path) -> None:
    """Ten that all begin where the witness is: one is cosigned, the others are told its size."""
    witness = witness_in(tmp_path)
    witness.add_checkpoint(submission(0, leaves(3)))
    bodies = [submission(3, leaves(size)) for size in range(4, 14)]
    random.Random(1).shuffle(bodies)
    with running(witness) as server, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: post(server, body), bodies))
    assert sorted(answer[0] for answer in answers) == [200] + [409] * 9
    assert len({answer[1] for answer in answers if answer[0] == 409}) == 1


# Configuration.


def test_members_as_a_setting_names_them() -> None:
    assert parse_members("") == []
    text = f"http://127.0.0.1:9/ {KEY.vkey},https://w.example/prefix  {WitnessKey.of('w2', bytes(32)).vkey}"
    assert [one.url for one in parse_members(text)] == [
        "http://127.0.0.1:9/add-checkpoint",
        "https://w.example/prefix/add-checkpoint",
    ]
    for wrong in (
        "x",
        "https://a",
        f"http://a.example {KEY.vkey}",
        f"ftp://a {KEY.vkey}",
        f"http://u:p@a {KEY.vkey}",
        f"https://a {KEY.vkey}," * 2,
    ):
        with pytest.raises(UsageError):
            parse_members(wrong)
    with pytest.raises(UsageError, match="not an Ed25519 witness key"):
        parse_members(f"https://a {WITNESS.verifier.vkey}")
    many = [f"https://a {WitnessKey.of(f'w{number}', bytes(32)).vkey}" for number in range(MAX_WITNESSES + 1)]
    assert len(parse_members(",".join(many[1:]))) == MAX_WITNESSES < MAX_SIGNATURES
    with pytest.raises(UsageError, match="witnesses names 91"):
        parse_members(",".join(many))
    assert load_settings({}, witness_quorum=MAX_WITNESSES).witness_quorum == MAX_WITNESSES
    with pytest.raises(UsageError, match="witness_quorum is 91"):
        load_settings({}, witness_quorum=MAX_WITNESSES + 1)
    for quorum, policy in ((2, "hold"), (-1, "hold"), (1, "maybe")):
        with pytest.raises(UsageError, match="quorum or policy"):
            Witnesses(parse_members(f"https://a {KEY.vkey}"), quorum, policy, 1, SystemClock())
