"""`doctor`: what is whole is good, what is not is named with a remedy, and one failure hides no other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from render_platform.clickhouse import open_clickhouse
from render_platform.clock import HOUR_US, ManualClock, SystemClock
from render_platform.config import load_settings
from render_platform.operations.doctor import Diagnosis, Doctor, exit_code
from tests import chdb_server
from tests.commands import run_inside
from tests.factories import START_US
from tests.gateway.http import running
from tests.platforms import SeededIds, connect, make_platform, record_random

PARTS = ["state folder", "disk", "store of blobs", "store of log", "database", "clock", "log", "ClickHouse"]
SERVED = ["gateway", "Dagster", "Dagster store"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state with a published log."""
    state = tmp_path_factory.mktemp("whole") / "state"
    with closing(make_platform(state, ManualClock(START_US))) as platform:
        record_random(platform, 5, 1)
        platform.flush()
    return state


@pytest.fixture
def state(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture(scope="module")
def clickhouse() -> dict[str, Any]:
    """A database that is prepared."""
    name = chdb_server.fresh_database()
    options = {"clickhouse_dsn": chdb_server.shared_dsn(), "clickhouse_database": name}
    open_clickhouse(options["clickhouse_dsn"], name, 0).close()
    return options


def examine(state: Path, clock: Any = None, **options: Any) -> dict[str, Diagnosis]:
    ports = {"gateway_port": free_port(), "dagster_port": free_port()}
    settings = load_settings(environ={}, state_dir=state, **{**ports, **options})
    found = list(Doctor(settings, clock or SystemClock(), SeededIds("doctor")).examine())
    assert all(one.remedy for one in found if one.status != "good")
    assert all(one.says and one.ms >= 0 for one in found)
    return {one.part: one for one in found}


def statuses(found: dict[str, Diagnosis]) -> dict[str, str]:
    return {part: one.status for part, one in found.items()}


def test_a_whole_state_is_good(state: Path, clickhouse: dict[str, Any]) -> None:
    found = examine(state, **clickhouse)
    assert statuses(found) == {**dict.fromkeys(PARTS, "good"), **dict.fromkeys(SERVED, "off")}
    assert exit_code(list(found.values())) == 0
    assert not list((state / "blobs").rglob("probe/*")), "the probes are gone"


def test_without_a_state_it_says_so_and_makes_none(tmp_path: Path) -> None:
    found = examine(tmp_path / "none")
    assert statuses(found) == {"state folder": "off", "disk": "good", **dict.fromkeys(SERVED, "off")}
    assert not (tmp_path / "none").exists()


def readable_key(state: Path) -> None:
    next((state / "keys").glob("*.key")).chmod(0o644)


def garbage_database(state: Path) -> None:
    (state / "platform.db").write_bytes(b"no database" * 1_000)


def altered_entry(state: Path) -> None:
    with closing(connect(state)) as connection:
        connection.execute("UPDATE log_entries SET entry = x'7b7d' WHERE log_index = 0")
        connection.commit()


def lost_checkpoint(state: Path) -> None:
    (state / "log/checkpoint").unlink()


def file_for_a_folder(state: Path) -> None:
    shutil.rmtree(state / "blobs")
    (state / "blobs").write_text("no folder")


@pytest.mark.parametrize(
    ("spoil", "part", "status", "says"),
    [
        (readable_key, "state folder", "bad", "others may read"),
        (garbage_database, "database", "unavailable", "the database cannot be used"),
        (altered_entry, "log", "bad", "entry"),
        (lost_checkpoint, "log", "unavailable", "checkpoint"),
        (file_for_a_folder, "store of blobs", "unavailable", "blobs"),
    ],
)
def test_what_is_wrong_is_named_and_hides_nothing(
    state: Path, clickhouse: dict[str, Any], spoil: Callable[[Path], None], part: str, status: str, says: str
) -> None:
    spoil(state)
    found = examine(state, **clickhouse)
    assert found[part].status == status
    assert says in found[part].says
    assert [*found] == [*PARTS, *SERVED], "every other part was looked at"
    assert found["ClickHouse"].status == "good"
    assert exit_code(list(found.values())) == {"bad": 1, "unavailable": 3}[status]


def test_a_clock_that_was_set_back_is_found(state: Path, clickhouse: dict[str, Any]) -> None:
    found = examine(state, ManualClock(START_US - HOUR_US), **clickhouse)
    assert found["clock"].status == "bad"
    assert "behind what was recorded last" in found["clock"].says
    assert found["ClickHouse"].status == "bad", "the server has the real time"
    assert "apart" in found["ClickHouse"].says


def test_what_waits_for_long_is_a_warning(state: Path, clickhouse: dict[str, Any]) -> None:
    with closing(make_platform(state, ManualClock(START_US + HOUR_US), "2")) as platform:
        record_random(platform, 3, 2, start_us=START_US + HOUR_US, span_us=1)
    found = examine(state, ManualClock(START_US + 2 * HOUR_US), **clickhouse)["log"]
    assert (found.status, "3 events" in found.says) == ("warning", True)


def test_clickhouse_that_is_away_or_older(state: Path) -> None:
    away = examine(state, clickhouse_dsn=f"http://127.0.0.1:{free_port()}")["ClickHouse"]
    older = examine(state)["ClickHouse"]
    assert (away.status, older.status, older.remedy) == ("unavailable", "warning", "run `render-platform migrate`")


def test_a_bucket_that_cannot_be_reached(state: Path, clickhouse: dict[str, Any]) -> None:
    address = {"objects_url": "s3://bucket/x", "objects_endpoint": f"http://127.0.0.1:{free_port()}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
        found = examine(state, **address, **clickhouse)
    assert [found[f"store of {name}"].status for name in ("blobs", "log")] == ["unavailable", "unavailable"]
    assert "SECRET" not in str(found)


# What is served.


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_gateway_that_takes_work_is_good(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        found = examine(at.state, gateway_port=at.port)
    assert found["gateway"].status == "good"
    assert "takes work" in found["gateway"].says
    assert found["database"].status == "good", "beside the gateway that writes"


def daemons(*healthy: bool) -> bytes:
    of = [{"daemonType": f"D{n}", "required": True, "healthy": one} for n, one in enumerate(healthy)]
    return json.dumps({"data": {"instance": {"daemonHealth": {"allDaemonStatuses": of}}}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "gateway", "dagster"),
    [
        (200, b"<html>", "bad", "bad"),
        (200, b"[]", "bad", "bad"),
        (503, b'{"problems": ["stopping"]}', "unavailable", "bad"),
        (200, daemons(True, True), "bad", "good"),
        (200, daemons(True, False), "bad", "bad"),
        (500, b'{"data": null}', "bad", "bad"),
    ],
)
def test_what_answers_is_told_apart(tmp_path: Path, status: int, body: bytes, gateway: str, dagster: str) -> None:
    with answering(status, body) as port:
        found = examine(tmp_path / "none", gateway_port=port, dagster_port=port)
    assert (found["gateway"].status, found["Dagster"].status) == (gateway, dagster)


def test_a_password_in_the_address_of_dagster_is_not_shown(tmp_path: Path) -> None:
    found = examine(tmp_path / "none", dagster_url=f"http://me:SECRET@127.0.0.1:{free_port()}/x")
    assert "SECRET" not in str(found)


# The command.


def test_the_command_says_it_to_people_and_programs(state: Path, clickhouse: dict[str, Any]) -> None:
    env = {f"RENDER_PLATFORM_{name.upper()}": str(value) for name, value in clickhouse.items()}
    env |= {"RENDER_PLATFORM_GATEWAY_PORT": str(free_port()), "RENDER_PLATFORM_DAGSTER_PORT": str(free_port())}
    told = run_inside("doctor", "--state", state, env=env)
    assert told.code == 0
    assert [line[:14].strip() for line in told.stdout.splitlines() if "→" not in line] == [*PARTS, *SERVED]
    readable_key(state)
    found = run_inside("doctor", "--state", state, "--json", env=env)
    assert found.code == 1
    assert [one["status"] for one in found.json][:2] == ["bad", "good"]
    assert run_inside("doctor", "--state", state, env={"RENDER_PLATFORM_GATEWAY_PRT": "1"}).code == 2


@pytest.mark.parametrize("url", ["http://ops:hunter2@dagster.example", "dagster.example", "http://127.0.0.1:x"])
def test_an_address_that_is_none_is_said_without_what_is_secret_in_it(tmp_path: Path, url: str) -> None:
    found = examine(tmp_path / "none", dagster_url=url)["Dagster"]
    assert (found.status, "hunter2" in str(found)) == ("bad", False)


@contextmanager
def saying(line: bytes) -> Iterator[int]:
    """A server that answers whatever comes with one line; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(line)

        thread = threading.Thread(target=answer)
        thread.start()
        yield int(listening.getsockname()[1])
        thread.join()


def test_what_speaks_another_protocol_is_something_else(tmp_path: Path) -> None:
    with saying(b"SSH-2.0-OpenSSH_9\r\n") as port:
        found = examine(tmp_path / "none", gateway_port=port)["gateway"]
    assert (found.status, "something else" in found.says) == ("bad", True)


def test_no_proxy_is_asked_for_what_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with saying(b'HTTP/1.0 200 OK\r\n\r\n{"problems":[],"gateway":"g"}') as port:
        assert examine(tmp_path / "none", gateway_port=port)["gateway"].status == "good"


@pytest.mark.skipif(os.geteuid() != 0, reason="FOREIGN FOLDER NOT TESTED: only root can become somebody else")
def test_who_may_not_enter_the_state_folder_is_told_so(state: Path) -> None:
    for folder in state.parents:  # up to the folder itself anybody may go
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    state.chmod(0o700)
    os.seteuid(65_534)
    try:
        found = examine(state)
    finally:
        os.seteuid(0)
    assert found["state folder"].status == "unavailable"
    assert "Permission denied" in found["state folder"].says
