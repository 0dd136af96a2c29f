"""A log and its witnesses: cosignatures, quorums, witnesses that fail, and histories that they have not seen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.audit_log import AuditLog
from render_platform.clock import ManualClock
from render_platform.database import log_entries
from render_platform.errors import SequencerStopped, Unavailable
from render_platform.merkle import consistency_proof
from render_platform.note import WitnessKey, cosignatures_of, read_checkpoint
from render_platform.witness import Member, Witnesses, make_witness, open_witness, parse_members
from tests.test_audit_log import append, check_log, open_log, signer_of
from tests.test_audit_log_stops import backup, restore
from tests.test_witness import KEY
from tests.test_witness_server import running

MINUTE_US = 60_000_000


@contextmanager
def witnesses_of(state: Path, count: int = 1) -> Iterator[list[Member]]:
    """Running witnesses of the log, with their own folders below `state`."""
    with ExitStack() as stack:
        members = []
        for number in range(count):
            folder = state / f"witness{number}"
            if not folder.exists():
                make_witness(folder, f"example.com/w{number}")
            witness = stack.enter_context(open_witness(folder, [signer_of(state).verifier], ManualClock(10**12)))
            members.append(Member(stack.enter_context(running(witness)).url + "/add-checkpoint", witness.key))
        yield members


def log_with(state: Path, members: list[Member], quorum: int = 1, policy: str = "hold", **options: Any) -> AuditLog:
    log = open_log(state)
    clock = options.get("clock", ManualClock(10**12))
    witnesses = Witnesses(members, quorum, policy, options.get("timeout_s", 5), clock)
    return AuditLog(log._database, log._cas, log._objects, signer_of(state), witnesses=witnesses)


def published(state: Path) -> str:
    return (state / "log" / "checkpoint").read_text()


def cosigned_by(state: Path, members: list[Member]) -> int:
    """How many witnesses have cosigned what stands; the log's own signature is good."""
    read_checkpoint(published(state).encode(), [signer_of(state).verifier])
    return len(cosignatures_of(published(state), [member.key for member in members]))


def grow(log: AuditLog, *names: str) -> None:
    append(log, *names)
    assert log.publish() is not None


def test_every_checkpoint_carries_its_cosignatures(tmp_path: Path) -> None:
    with witnesses_of(tmp_path, 3) as members:
        log, size = log_with(tmp_path, members, quorum=3), 0
        for upto in (1, 2, 7, 40):
            grow(log, *(f"n{n}" for n in range(size, upto)))
            assert cosigned_by(tmp_path, members) == 3
            size = upto
        with log._database.read() as connection:
            kept = connection.execute(sa.text("SELECT note FROM checkpoints WHERE size = 40")).scalar()
    assert kept == published(tmp_path)


def test_the_proofs_are_those_of_the_tree(tmp_path: Path) -> None:
    log, size = open_log(tmp_path), 0
    for upto in (1, 2, 3, 5, 8, 13, 255, 256, 257, 300, 513):
        grow(log, *(f"n{n}" for n in range(size, upto)))
        size = upto
        hashes = log._column(log_entries.c.leaf_hash, 0, size)
        for old in range(size + 1):
            assert log._proof(old, size) == consistency_proof(old, hashes), (old, size)


def test_a_witness_that_comes_late_or_missed_some_is_told_from_where_it_is(tmp_path: Path) -> None:
    grow(open_log(tmp_path), "a", "b", "c")
    with witnesses_of(tmp_path) as members:
        grow(log_with(tmp_path, members), "d")
        assert cosigned_by(tmp_path, members) == 1
    grow(open_log(tmp_path), "e", "f")
    with witnesses_of(tmp_path) as members:
        grow(log_with(tmp_path, members), "g")
        assert cosigned_by(tmp_path, members) == 1
    check_log_only(tmp_path, 7)


def check_log_only(state: Path, size: int) -> None:
    """`check_log` reads one signature line alone."""
    data = published(state)
    lines = data.splitlines(keepends=True)
    (state / "log" / "checkpoint").write_text("".join(lines[:5]))
    check_log(state, size)
    (state / "log" / "checkpoint").write_text(data)


def test_a_restart_collects_what_the_standing_checkpoint_lacks(tmp_path: Path) -> None:
    grow(open_log(tmp_path), "a")
    with witnesses_of(tmp_path) as members:
        log = log_with(tmp_path, members)
        assert log.publish() is not None
        assert cosigned_by(tmp_path, members) == 1
        before = published(tmp_path)
        assert log.publish() is not None
        assert log_with(tmp_path, members).publish() is not None
    assert published(tmp_path) == before, "it is asked for once"


# Below the quorum.


def nobody() -> Member:
    """A port where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return Member(f"http://127.0.0.1:{port}/add-checkpoint", WitnessKey.of("example.com/down", bytes(32)))


def test_below_the_quorum_a_checkpoint_is_held_back_or_not(tmp_path: Path) -> None:
    clock = ManualClock(10**12)
    with witnesses_of(tmp_path) as members:
        both = [*members, nobody()]
        held = log_with(tmp_path, both, quorum=2, clock=clock)
        append(held, "a")
        with pytest.raises(Unavailable, match="1 of 2 witnesses cosigned"):
            held.publish()
        assert not (tmp_path / "log" / "checkpoint").exists()
        grow(log_with(tmp_path, both, quorum=2, policy="publish"), "b")
        assert cosigned_by(tmp_path, both) == 1
        grow(log_with(tmp_path, both, quorum=1), "c")
        grow(log_with(tmp_path, both, quorum=0), "d")
        assert cosigned_by(tmp_path, both) == 1


def test_a_held_checkpoint_is_published_when_the_witness_is_back(tmp_path: Path) -> None:
    with witnesses_of(tmp_path) as members:
        pass
    clock = ManualClock(10**12)
    log = log_with(tmp_path, members, clock=clock)
    append(log, "a")
    with pytest.raises(Unavailable):
        log.publish()
    with witnesses_of(tmp_path) as again:
        log = log_with(tmp_path, again)
        assert log.publish() is not None
        assert cosigned_by(tmp_path, members) == 1


class Silent:
    """Takes connections and says nothing, or says it a byte at a time."""

    def __init__(self, drip: bytes = b"") -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.asked = 0
        self._drip = drip
        self._ended = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()
        self.member = Member(f"http://127.0.0.1:{self._socket.getsockname()[1]}/add-checkpoint", KEY)

    def _take(self) -> None:
        while not self._ended.is_set():
            try:
                taken, _ = self._socket.accept()
            except OSError:
                return
            self.asked += 1
            threading.Thread(target=self._answer, args=[taken], daemon=True).start()

    def _answer(self, taken: socket.socket) -> None:
        with taken:
            while not self._ended.wait(0.05):
                try:
                    taken.sendall(self._drip)
                except OSError:
                    return

    def close(self) -> None:
        self._ended.set()
        self._socket.close()


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\nx: y\r\n"], ids=["silent", "dripping"])
def test_a_witness_that_hangs_costs_one_time_out_a_minute(tmp_path: Path, drip: bytes) -> None:
    silent, clock = Silent(drip), ManualClock(10**12)
    with witnesses_of(tmp_path) as members:
        log = log_with(tmp_path, [silent.member, *members], clock=clock, timeout_s=1)
        started = time.monotonic()
        grow(log, "a")
        assert time.monotonic() - started < 5
        for name in "bcd":
            grow(log, name)
        assert silent.asked == 1
        clock.move_to(clock.now_us() + MINUTE_US)
        grow(log, "e")
        assert silent.asked == 2
        assert cosigned_by(tmp_path, members) == 1
    silent.close()


# Histories.


def stops(log: AuditLog, what: str) -> None:
    with pytest.raises(SequencerStopped, match=what) as stopped:
        log.publish()
    assert stopped.value.exit_code == 3
    assert stopped.value.remedy


def test_a_restart_that_finds_a_longer_cosigned_checkpoint_stops(tmp_path: Path) -> None:
    """Database and log were both restored from an older copy: only the witness remembers."""
    with witnesses_of(tmp_path) as members:
        log = log_with(tmp_path, members)
        grow(log, "a", "b")
        backup(tmp_path)
        shutil.copytree(tmp_path / "log", tmp_path / "older log")
        grow(log, "c", "d", "e")
        log._database.close()
        restore(tmp_path)
        shutil.rmtree(tmp_path / "log")
        shutil.copytree(tmp_path / "older log", tmp_path / "log")
        before = published(tmp_path)
        stops(log_with(tmp_path, members), "cosigned 5 entries, and this database has 2")
        again = log_with(tmp_path, members, policy="publish", quorum=0)
        append(again, "x")
        stops(again, "cosigned 5 entries, and this database has 3")
        append(again, "y", "z", "and more")
        stops(again, "another history")
        assert published(tmp_path) == before


def test_a_log_signed_again_with_a_stolen_key_is_found_by_the_witness(tmp_path: Path) -> None:
    """The thief has key and folders, and writes another log of the same name; before any rotation."""
    mine, thief = tmp_path / "mine", tmp_path / "thief"
    with witnesses_of(mine) as members:
        grow(log_with(mine, members), "a", "b", "c")
        shutil.copytree(mine / "keys", thief / "keys")
        forged = log_with(thief, members)
        append(forged, "a", "forged", "c", "d")
        stops(forged, "another history")
        assert not (thief / "log" / "checkpoint").exists()
        shutil.rmtree(thief / "log")
        alone = open_log(thief)
        assert alone.publish() is not None, "without a witness nothing tells it apart"
        assert cosigned_by(thief, members) == 0
        grow(log_with(mine, members), "d")


def test_a_witness_with_an_older_state_is_not_believed(tmp_path: Path) -> None:
    """Its folder was restored from a copy: it would cosign what it had refused before."""
    state_file = tmp_path / "witness0" / "state.json"
    with witnesses_of(tmp_path) as members:
        log = log_with(tmp_path, members)
        grow(log, "a", "b")
        older = state_file.read_bytes()
        grow(log, "c", "d")
    state_file.write_bytes(older)
    with witnesses_of(tmp_path) as members:
        log = log_with(tmp_path, members)
        append(log, "e")
        with pytest.raises(Unavailable, match="0 of 1"):
            log.publish()
        assert state_file.read_bytes() == older, "it was not asked again"


CHILD = """
import os, signal, sys
from pathlib import Path
from render_platform.clock import SystemClock
from render_platform.note import Verifier, load_key
from render_platform.objects import FolderObjects
from render_platform.witness import Witness, WitnessState, serve

class Objects(FolderObjects):
    def replace(self, path, data, expected):
        super().replace(path, data, expected)
        if sys.argv[3] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

folder, log = Path(sys.argv[1]), Verifier.parse(sys.argv[2])
state = WitnessState(Objects(folder), (folder / "state.json").read_bytes())
witness = Witness({log.name: [log]}, load_key(folder / "witness.key"), state, SystemClock())
serve(witness, 0, lambda url: print(url, flush=True))
print("ended", flush=True)
"""


def started(state: Path, how: str) -> tuple[subprocess.Popen[str], list[Member]]:
    """A witness in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(state / "w"), signer_of(state).verifier.vkey, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    key = (state / "w.vkey").read_text()
    return process, parse_members(f"{url} {key}")


def test_a_witness_killed_between_its_memory_and_its_answer(tmp_path: Path) -> None:
    (tmp_path / "w.vkey").write_text(make_witness(tmp_path / "w", "example.com/w").vkey)
    process, members = started(tmp_path, "killed")
    log = log_with(tmp_path, members)
    append(log, "a", "b")
    with pytest.raises(Unavailable, match="0 of 1"):
        log.publish()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    append(log, "c")
    process, members = started(tmp_path, "well")
    assert log_with(tmp_path, members).publish() is not None
    assert cosigned_by(tmp_path, members) == 1
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "ended\n"
    assert process.returncode == 0
