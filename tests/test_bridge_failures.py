"""More of test_bridge.py: who owns the folder, how a bridge ends, and what must not end it."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from render_platform.bridge import MAX_CONNECTIONS, MAX_HELD_BYTES, STOP_LIMIT_S, Bridge, Message, Receive
from render_platform.bridge_protocol import MAX_BODY_BYTES
from render_platform.clickhouse import open_clickhouse
from render_platform.clickhouse_connection import FolderLock
from render_platform.errors import Unavailable, UsageError
from tests import chdb_server, factories
from tests.chdb_server import BridgeProcess, bridge_over, open_raw
from tests.test_bridge import ask, bridge, client  # noqa: F401  fixtures

FOREVER = "SELECT count() FROM numbers(1000000000000000)"


@contextmanager
def running(bridge: BridgeProcess, statement: str) -> Iterator[Callable[[], BaseException | None]]:
    """Runs a statement that takes long; what it yields waits for its end and returns its error."""
    with ThreadPoolExecutor(1) as pool, closing(open_raw(bridge.dsn)) as own, closing(open_raw(bridge.dsn)) as other:
        future = pool.submit(own.command, statement)
        while not int(other.command("SELECT count() FROM system.processes WHERE query LIKE '%numbers(10000%'")) > 1:
            pass  # this question is the other one
        yield lambda: future.exception(timeout=60)


def test_others_are_led_to_the_bridge(bridge: BridgeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is not for loopback
    name, table = chdb_server.fresh_database(), factories.make_table(5)
    (link := tmp_path / "link").symlink_to(bridge.folder)
    with (
        closing(open_clickhouse(f"chdb://{bridge.folder}", name)) as one,
        closing(open_clickhouse(f"chdb://{link}", name)) as other,
    ):
        one.insert_events(table, "a")
        assert other.totals()[0] == 5


def test_a_folder_has_one_bridge(bridge: BridgeProcess) -> None:
    url = bridge.dsn
    with pytest.raises(Unavailable, match="another process owns the embedded database"):
        Bridge(bridge.folder, 0)
    assert bridge.dsn == url


def test_a_folder_that_this_process_has_open_gets_no_bridge() -> None:
    path = chdb_server.shared_clickhouse_path()
    first, second = chdb_server.open_fresh(), chdb_server.open_fresh()
    for opened in (first, second):  # the last of them lets go
        with pytest.raises(AssertionError, match="another process owns the embedded database"), bridge_over(path):
            pass
        opened.close()


def test_a_place_that_cannot_be_used_is_unavailable(bridge: BridgeProcess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Unavailable, match="can be written"):
        Bridge(tmp_path / "file", 0)
    with pytest.raises(Unavailable, match="choose another"):
        Bridge(tmp_path / "folder", urlsplit(bridge.url).port or 0)
    for port in (-1, 65_536):
        with pytest.raises(UsageError):
            Bridge(tmp_path / "folder", port)
    with bridge_over(tmp_path / "folder"):
        pass  # none of them kept the lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_its_rows_stay(tmp_path: Path, number: int) -> None:
    dsn = f"chdb://{tmp_path / 'clickhouse'}"
    with bridge_over(tmp_path / "clickhouse") as first, closing(open_clickhouse(dsn, "t")) as opened:
        opened.insert_events(factories.make_table(7), "a")
        assert first.end(number) == (0, "")
        assert not FolderLock.url_file(first.folder).exists()
        with pytest.raises(Unavailable, match="still runs") as caught:
            opened.totals()
        assert (urlsplit(opened._dsn).password or "-") not in str(caught.value)
    with bridge_over(tmp_path / "clickhouse"), closing(open_clickhouse(dsn, "t")) as opened:
        assert opened.totals()[0] == 7


def test_a_signal_ends_what_runs(tmp_path: Path) -> None:
    with bridge_over(tmp_path / "clickhouse") as own, running(own, FOREVER) as error:
        began = time.monotonic()
        status, said = own.end()
        assert (status, "Traceback" in said) == (0, False)
        assert time.monotonic() - began < STOP_LIMIT_S + 10
        assert isinstance(error(), DatabaseError)


def test_what_a_killed_bridge_left_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "clickhouse"
    with bridge_over(folder) as killed:
        stale = killed.dsn
        killed.end(signal.SIGKILL)
        assert FolderLock.url_file(folder).read_text() == stale
    with bridge_over(folder) as second, closing(open_clickhouse(f"chdb://{folder}", "t")) as opened:
        assert second.dsn != stale
        opened.make_ready()
        assert opened.totals() == (0, 0)
        second.end(signal.SIGKILL)
    lock = FolderLock.take(folder)
    assert lock is not None
    assert not FolderLock.url_file(folder).exists()  # nobody is led to what is dead, or to who has its port now
    lock.release()


@pytest.mark.parametrize("kill_round", range(3))
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, kill_round: int) -> None:
    folder = tmp_path / "clickhouse"
    parts = [factories.make_table(40, seed) for seed in range(200)]
    acknowledged: list[int] = []
    with bridge_over(folder) as killed:
        opened = open_clickhouse(f"chdb://{folder}", "t")
        enough = threading.Event()

        def write() -> None:
            for number, part in enumerate(parts):
                opened.insert_events(part, f"{number}")
                acknowledged.append(number)
                if number == 10 + 7 * kill_round:
                    enough.set()

        with ThreadPoolExecutor(1) as pool, closing(opened):
            written = pool.submit(write)
            enough.wait(60)
            killed.end(signal.SIGKILL)
            assert isinstance(written.exception(timeout=60), Unavailable)
    with bridge_over(folder), closing(open_clickhouse(f"chdb://{folder}", "t")) as again:
        found = set(again.rows(0, 2**60).column("event_id").to_pylist())
        assert all(set(parts[number].column("event_id").to_pylist()) <= found for number in acknowledged)
        for number in (*acknowledged, acknowledged[-1] + 1):  # the one that was on its way, too
            again.insert_events(parts[number], f"{number}")
        rows = 40 * (len(acknowledged) + 1)
        rolled_up = again.rollup_aggregates(0, 2**60 - 2**60 % 60_000_000).column("events").to_pylist()
        assert (again.totals()[0], sum(rolled_up)) == (rows, rows)


def exchange(bridge: BridgeProcess, data: bytes, wait: bool = True) -> bytes:
    """What comes back for these bytes until the bridge ends the connection; without `wait` it ends here, at once."""
    with socket.create_connection(("127.0.0.1", urlsplit(bridge.url).port or 0), timeout=30) as connection:
        connection.sendall(data)
        if not wait:
            return b""
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def head(bridge: BridgeProcess, length: str, *, path: str = "/") -> bytes:
    token = urlsplit(bridge.dsn).password
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"X-ClickHouse-Key: {token}", length, "", ""]
    return "\r\n".join(lines).encode()


GARBAGE = [
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"GET /?" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: 1\r\n" % n for n in range(100_000)),
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_its_own_connection_alone(bridge: BridgeProcess, data: bytes) -> None:
    with suppress(OSError):  # it may stop reading before all is sent
        assert exchange(bridge, data).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    exchange(bridge, data[: len(data) // 2], wait=False)
    assert ask(bridge, "SELECT 1")[:2] == (200, b"1\n")


def test_a_body_that_is_cut_off_inserts_nothing(bridge: BridgeProcess, client: Any) -> None:
    rows = f"INSERT INTO {client.database}.t (n) FORMAT CSV\n1\n2\n".encode()
    exchange(bridge, head(bridge, f"Content-Length: {len(rows) + 1}") + rows, wait=False)
    exchange(bridge, head(bridge, "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n" % (len(rows), rows), wait=False)
    assert ask(bridge, gzip.compress(rows)[:-1], content_encoding="gzip")[0] == 400
    assert client.command("SELECT count() FROM t") == 0
    whole = head(bridge, "Transfer-Encoding: chunked\r\nConnection: close") + b"%x\r\n%s\r\n0\r\n\r\n" % (
        len(rows),
        rows,
    )
    assert exchange(bridge, whole).startswith(b"HTTP/1.1 200")
    assert client.command("SELECT count() FROM t") == 2


def test_wrong_requests_are_answered_and_others_too(bridge: BridgeProcess, client: Any) -> None:
    into = f"INSERT INTO {client.database}.t FORMAT"
    for body, status, headers in (
        (f"{into} Arrow\nnot an arrow file", 400, {}),
        (f"{into} Native\n\xff\xff", 500, {}),
        (f"{into} Nope\n1", 404, {}),
        ("SELECT 1 FORMAT Nope", 404, {}),
        ("SELECT " + "1," * 200_000 + "1", 400, {}),  # longer than the engine's max_query_size
        ("SELECT '" + "x" * 2_000_000 + "'", 413, {}),
        ("not gzip", 400, {"content_encoding": "gzip"}),
        ("SELECT 1", 501, {"content_encoding": "br"}),
        ("", 400, {}),
    ):
        found, text, answered = ask(bridge, body, **headers)
        assert (found, text[:6]) == (status, b"Code: "), (body[:40], text[:200])
        assert answered["x-clickhouse-exception-code"]
    assert client.command("SELECT count() FROM t") == 0


def test_a_body_that_is_too_long_is_refused(bridge: BridgeProcess) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(bridge.url).port or 0), timeout=60) as connection:
        connection.sendall(head(bridge, f"Content-Length: {MAX_BODY_BYTES + 1}"))
        connection.sendall(b"INSERT INTO nowhere FORMAT CSV\n".ljust(1 << 20) + b"x")
        piece = bytes(1 << 20)
        for _ in range((MAX_BODY_BYTES >> 20) - 1):
            connection.sendall(piece)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(bridge, "SELECT 1")[0] == 200


def test_bodies_are_bounded_together() -> None:
    """Five that are on their way at once hold more than is allowed; when they are done, others are answered."""
    piece = {"type": "http.request", "body": bytes(1 << 24), "more_body": True}
    pieces, answers = MAX_BODY_BYTES >> 24, []
    with closing(Bridge(chdb_server.shared_clickhouse_path(), 0)) as held:
        token = f"{held._token}".encode()
        headers = [(b"host", b"127.0.0.1"), (b"x-clickhouse-key", token)]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}

        async def send(message: Message) -> None:
            answers.append(message.get("status"))

        async def post_all() -> None:
            def one() -> Receive:
                count = itertools.count(1)

                async def receive() -> Message:
                    await asyncio.sleep(0)
                    return piece if next(count) < pieces else {"type": "http.disconnect"}

                return receive

            await asyncio.gather(*(held(scope, one(), send) for _ in range(MAX_HELD_BYTES // MAX_BODY_BYTES + 1)))

        asyncio.run(post_all())
        assert 503 in answers
        answers.clear()

        async def receive_one() -> Message:
            return {"type": "http.request", "body": b"SELECT 1", "more_body": False}

        asyncio.run(held(scope, receive_one, send))
        assert answers[0] == 200


def test_slow_bodies_hold_nobody_up(bridge: BridgeProcess, client: Any) -> None:
    """Many that have sent half of an insert: others are answered, and each is done once its rest has come."""
    rows = f"INSERT INTO {client.database}.t (n) FORMAT CSV\n1\n".encode()
    with ExitStack() as slow:
        address = ("127.0.0.1", urlsplit(bridge.url).port or 0)
        sent = [slow.enter_context(socket.create_connection(address, timeout=30)) for _ in range(20)]
        for connection in sent:
            connection.sendall(head(bridge, f"Content-Length: {len(rows)}") + rows[:-3])
        assert client.command("SELECT count() FROM t") == 0
        for connection in sent:
            connection.sendall(rows[-3:])
        assert all(connection.recv(100).startswith(b"HTTP/1.1 200") for connection in sent)
    assert client.command("SELECT count() FROM t") == 20


def test_a_hundred_clients_at_once(bridge: BridgeProcess, client: Any) -> None:
    def use(number: int) -> int:
        with closing(open_raw(bridge.dsn, client.database)) as own:
            own.raw_insert("t", ["n"], b"%d\n" % number, fmt="CSV")
            return int(own.command(f"SELECT count() FROM t WHERE n = {number}"))

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(use, range(100))) == [1] * 100


def test_too_many_connections_are_told_so(bridge: BridgeProcess) -> None:
    with ExitStack() as idle:
        for _ in range(MAX_CONNECTIONS):
            idle.enter_context(socket.create_connection(("127.0.0.1", urlsplit(bridge.url).port or 0)))
        assert ask(bridge, "SELECT 1")[0] == 503
    assert ask(bridge, "SELECT 1")[0] == 200


def test_a_query_is_bounded_in_time_and_memory(client: Any) -> None:
    for statement, setting, code in (
        (FOREVER, {"max_execution_time": 1}, 159),
        ("SELECT groupArray(number) FROM numbers(100000000)", {"max_memory_usage": 50_000_000}, 241),
        ("SELECT toString(number) FROM numbers(1000000)", {"max_result_bytes": 1_000_000}, 396),
    ):
        with pytest.raises(DatabaseError) as caught:
            client.query(statement, settings=setting)
        assert caught.value.code == code


def test_a_client_that_does_not_wait_harms_nobody(bridge: BridgeProcess) -> None:
    query = b"SELECT sleepEachRow(0.1) FROM numbers(10) SETTINGS max_block_size = 1"
    for _ in range(8):
        exchange(bridge, head(bridge, f"Content-Length: {len(query)}") + query, wait=False)
    began = time.monotonic()
    assert ask(bridge, "SELECT 1")[:2] == (200, b"1\n")
    assert time.monotonic() - began < 10
