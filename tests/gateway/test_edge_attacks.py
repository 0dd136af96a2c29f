"""What an attack on the gateway's edge found, and must not find again; and the ways past the framework, compared."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from litestar.types import HTTPScope

from render_platform.gateway import app, edge
from render_platform.gateway.app import JOINED_BYTES
from render_platform.gateway.edge import Durations, Edge, JsonRequest
from render_platform.gateway.shortcut import PATHS
from tests.commands import PROGRAM, clean_environment, run_command
from tests.gateway.http import CHAT, WAIT_S, Client, Running, eventually, running
from tests.gateway.processes import running_gateway
from tests.gateway.servers import on_loop
from tests.gateway.test_attacks import head, raw
from tests.test_recovery import backup, restore

JOB = json.dumps({"model": "llama-8b", "input": CHAT}).encode()
BODY_BYTES = 1_000  # of each slow body


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("edge")) as started:
        yield started


def slow(at: Running, path: str = "/queue") -> socket.socket:
    """A request whose body has begun, and does not go on."""
    return raw(at, head(at, path, BODY_BYTES) + b" ")


class Piece(bytes):
    """Counts the bytes that are copied where pieces are put together two by two."""

    copied = 0

    def __add__(self, other: Any) -> Piece:
        Piece.copied += len(self) + len(other)
        return Piece(bytes(self) + bytes(other))

    def __radd__(self, other: Any) -> Piece:
        if isinstance(other, bytearray):  # which grows in place
            return NotImplemented
        return Piece(other) + self


@pytest.mark.parametrize("came_whole", [True, False])
@on_loop
async def test_a_body_in_thousands_of_pieces_is_read_whole_at_a_cost_in_proportion(came_whole: bool) -> None:
    pieces = [Piece(b'{"a":"')] + [Piece(b"%04d" % n) for n in range(5_000)] + [Piece(b'"}')]
    left = iter(pieces)

    async def receive() -> Any:
        piece = next(left)
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    gateway = SimpleNamespace(settings=SimpleNamespace(max_body_bytes=1_000_000), reading_bytes=0)
    scope = {"type": "http", "headers": [], "state": {"gateway": gateway, edge.CAME_WHOLE: came_whole, "extra": {}}}
    Piece.copied = 0
    assert await JsonRequest(cast(HTTPScope, scope), receive).body() == b"".join(pieces)
    assert Piece.copied <= 2 * sum(map(len, pieces)), "it was copied again for each piece"
    assert gateway.reading_bytes == 0


def test_bodies_on_their_way_are_bounded_together_and_the_budget_is_given_back(at: Running) -> None:
    budget = 2 * BODY_BYTES + BODY_BYTES // 2
    with mock.patch.object(edge, "MAX_READING_BYTES", budget), contextlib.ExitStack() as left:
        first, second = (left.enter_context(closing(slow(at))) for _ in range(2))
        eventually(lambda: at.gateway.reading_bytes == 2 * BODY_BYTES)
        for path in ("/queue", "/v1/chat/completions", "/text/llama/llama-8b/chat"):
            with closing(slow(at, path)) as refused:
                answer = refused.recv(65_536)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b'"code":"too_many_bodies"' in answer
        chunked = head(at, "/queue", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        with closing(raw(at, chunked)) as refused:  # may be as long as any
            assert b'"code":"too_many_bodies"' in refused.recv(65_536)
        assert at.gateway.reading_bytes == 2 * BODY_BYTES, "who was refused gives nothing back"
        with closing(raw(at, head(at, "/queue", len(JOB)) + JOB)) as whole:  # is not on its way
            assert whole.recv(12) == b"HTTP/1.1 202"

        first.sendall(JOB.ljust(BODY_BYTES - 1))
        assert first.recv(12) == b"HTTP/1.1 202"
        eventually(lambda: at.gateway.reading_bytes == BODY_BYTES)
        second.close()
        eventually(lambda: at.gateway.reading_bytes == 0)
        with mock.patch.object(edge, "BODY_S", 0.05), closing(slow(at)) as late:
            assert late.recv(65_536).startswith(b"HTTP/1.1 408 ")
        assert at.gateway.reading_bytes == 0


SMUGGLED = b"POST /queue HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


@pytest.mark.parametrize("upgrade", [b"x", b"h2c", b"websocket"])
@pytest.mark.parametrize("framing", [b"Content-Length: %d", b"Content-Length: 0%d", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_an_upgrade_with_a_body_is_refused_and_its_body_is_no_request(
    at: Running, upgrade: bytes, framing: bytes, pieces: int
) -> None:
    before = at.sql("SELECT count(*) FROM jobs")
    body = SMUGGLED % (len(JOB), JOB)
    framed = framing % len(body) if b"%d" in framing else framing
    lines = (b"POST /queue HTTP/1.1", b"Host: localhost", b"Connection: Upgrade", b"Upgrade: " + upgrade, framed)
    sent, answer = b"\r\n".join((*lines, b"", b"")), b""
    with closing(raw(at, sent + body if pieces == 1 else sent)) as connection, contextlib.suppress(ConnectionError):
        if pieces == 2:
            answer = connection.recv(65_536)
            connection.sendall(body)
        while piece := connection.recv(65_536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert at.sql("SELECT count(*) FROM jobs") == before


H2C = b"h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
WEBSOCKET = b"websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET, b"x\r\n"])
@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n", b"Content-Length: 00\r\n"])
def test_an_upgrade_without_a_body_holds_no_connection(at: Running, upgrade: bytes, length: bytes) -> None:
    """The connection can be used again, and is not kept for a head that does not come."""
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + length + b"\r\n"
    with mock.patch.object(app, "HEAD_S", 0.5), closing(raw(at, ask)) as connection:
        for again in (ask, b"GET /health HTTP/1.1\r\nHost"):
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
            connection.sendall(again)
        assert connection.recv(1) == b""


def serve_once(folder: Path) -> None:
    with running_gateway(folder, "drain_s = 5") as (process, address):
        client = Client(int(address.rpartition(":")[2]))
        assert client.ended(client.queue()["id"])["state"] == "success"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def test_a_gateway_does_not_start_on_a_database_that_is_behind_its_log(tmp_path: Path) -> None:
    state = tmp_path / "state"
    serve_once(tmp_path)
    backup(state)
    serve_once(tmp_path)
    assert run_command("flush", "--state", state).code == 0
    restore(state)
    command = (*PROGRAM, "serve", "--state", str(state), "--config", str(tmp_path / "catalogue.toml"), "--port", "0")
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "http://" not in done.stdout
    assert "render-platform recover" in done.stderr
    assert run_command("recover", "--state", state).code == 0
    serve_once(tmp_path)
    assert run_command("flush", "--state", state).code == 0
    assert run_command("verify", "--state", state).code == 0


class Kept:  # a transport that keeps what is written, and a loop whose next turn comes when it is told
    def __init__(self) -> None:
        self.writes, self.turns = list[bytes](), list[Any]()
        self.write, self.call_soon = self.writes.append, self.turns.append

    def close(self) -> None:
        self.writes.append(b"closed")

    def turn(self) -> None:
        while self.turns:
            self.turns.pop(0)()


SIZES = st.sampled_from([0, 1, 2, 500, JOINED_BYTES - 1, JOINED_BYTES, JOINED_BYTES + 1, 3 * JOINED_BYTES])


@given(st.lists(st.one_of(SIZES, st.none()), max_size=60))
def test_joined_writes_keep_their_order_and_closing_writes_what_is_held(steps: list[int | None]) -> None:
    """A number writes so many bytes; None lets the loop turn."""
    kept, sent = Kept(), b""
    joining = app._Joining(cast(Any, kept), cast(Any, kept))
    for number, size in enumerate(steps):
        if size is None:
            kept.turn()
            assert b"".join(kept.writes) == sent, "a turn later nothing is held"
        else:
            data = bytes([number % 251]) * size
            sent += data
            joining.write(data)
    joining.close()
    kept.turn()  # what was to come writes nothing after the end
    assert b"".join(kept.writes) == sent + b"closed"
    assert b"" not in kept.writes


@pytest.mark.parametrize("end", ["abort", "reset", "close"])
@on_loop
async def test_a_connection_lost_with_bytes_held_raises_nothing(end: str) -> None:
    loop, failures = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    ours, theirs = socket.socketpair()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    joining = app._Joining(transport, loop)
    joining.write(b"held")
    theirs.close() if end == "reset" else getattr(transport, end)()  # behind its back: what is held is nobody's
    for _ in range(5):
        await asyncio.sleep(0)
        joining.write(b"more")
    joining.close()
    theirs.close()
    await asyncio.sleep(0)
    assert failures == []


@on_loop
async def test_answers_of_all_sizes_arrive_whole() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        parts, size = (int(text) for text in scope["path"].strip("/").split("/"))
        headers = [(b"content-length", b"%d" % (parts * size))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(parts):
            body = bytes([65 + number % 26]) * size
            await send({"type": "http.response.body", "body": body, "more_body": number + 1 < parts})

    server = uvicorn.Server(uvicorn.Config(answer, port=0, http=app._Protocol, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    client = Client(server.servers[0].sockets[0].getsockname()[1])
    for parts in (1, 3):
        for size in (0, 1, JOINED_BYTES - 1, JOINED_BYTES, JOINED_BYTES + 1, 5 * 1024 * 1024):
            reply = await asyncio.to_thread(client.get, f"/{parts}/{size}")
            assert reply.status == 200
            assert reply.body == b"".join(bytes([65 + number]) * size for number in range(parts))
    server.should_exit = True
    await serving


LLAMA: dict[str, Any] = {"model": "llama-8b"}
GOOD = ({**LLAMA, "input": CHAT}, {**LLAMA, **CHAT}, {**LLAMA, "prompt": "a"}, {**LLAMA, "input": "a"})
ID = str(uuid.UUID(int=9))
VARIES = re.compile(
    rf"(?!{ID})[0-9a-f]{{8}}-[0-9a-f-]{{27}}|[0-9a-f]{{24}}|2\d{{3}}-[-\d]+T[\d:.]+Z|\d+\.\d{{9}}"
    r'|"created":\d+|"acceptance":"(\\.|[^"\\])+"'
)
"""Ids, times, GPU seconds and acceptances."""
CASES: dict[str, tuple[set[int], Any, dict[str, str]]] = {
    "good": ({200, 202}, {}, {}),
    "streamed": ({200, 400, 422}, {"stream": True}, {}),
    "no such model": ({404}, {"model": "nobody"}, {}),
    "model of another type": ({400, 422}, {"model": 1}, {}),
    "unknown field": ({200, 422}, {"nobody": 1}, {}),
    "not JSON": ({400, 422}, b"{'a': 1}", {}),
    "null": ({400, 422}, b"null", {}),
    "empty": ({400, 422}, b"", {}),
    "wrong content type": ({415}, {}, {"content-type": "text/plain"}),
    "bad idempotency key": ({400, 422}, {}, {"idempotency-key": "a b"}),
    "declared too large": ({413}, {}, {"content-length": str(99_999_999)}),
    "too large": ({413}, b" " * 11_000_000, {}),
    "unauthorized": ({401}, {}, {"authorization": "Bearer nobody"}),
    "forbidden": ({403}, {}, {}),
    "rate-limited": ({429}, {}, {}),
    "stopping": ({503}, {}, {}),
    "defect": ({500}, {}, {}),
    "refused by its backend": ({404, 422}, {"do": "refuse"}, {}),
    "broken backend": ({502, 422}, {"do": "fail"}, {}),
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Edge, Edge]]:
    """A gateway with keys; its edge with the shortcuts, and without."""
    folder = tmp_path_factory.mktemp("ways")
    with running(folder) as before:
        before.call(lambda: before.gateway.keys.create("first", ["customer"]))
    with running(folder) as started:
        made = app.create_app(started.gateway)
        yield started, made, Edge(made._app, started.gateway, Durations(), {})


async def ask(way: Edge, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], str]:
    size, sent, ended = len(body) // 3 + 1, list[Any](), asyncio.Event()
    pieces = iter([body[n : n + size] for n in range(0, len(body), size)] + [b""])

    async def receive() -> Any:
        if (piece := next(pieces, None)) is not None:
            return {"type": "http.request", "body": piece, "more_body": piece != b""}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            ended.set()

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "state": {}}
    scope |= {"query_string": b"", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    await way(cast(Any, scope), receive, send)
    text = b"".join(message.get("body", b"") for message in sent).decode()
    told = sorted((name.decode().lower(), value.decode()) for name, value in sent[0]["headers"])
    assert ("x-request-id", ID) in told
    told = [one for one in told if one != ("content-length", str(len(text.encode())))]
    return sent[0]["status"], [(name, VARIES.sub("", value)) for name, value in told], VARIES.sub("", text)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_a_shortcut_answers_as_the_framework_does(ways: tuple[Running, Edge, Edge], path: str, case: str) -> None:
    at, (statuses, body, more), gateway = ways[0], CASES[case], ways[0].gateway
    if isinstance(body, dict):
        body = json.dumps(GOOD[PATHS.index(path)] | body).encode()

    async def both() -> list[Any]:
        answers = []
        for way in ways[1:]:
            name = str(uuid.uuid4())
            key = gateway.keys.create(name, ["auditor" if case == "forbidden" else "customer"])
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "x-request-id": ID} | more
            if case == "rate-limited":
                bucket = gateway.buckets.bucket(f"key\n{name}", now := gateway.clock.now_us() + 1_000_000, 100, 1_000)
                while bucket.take(now):
                    pass
            answers.append(await ask(way, path, body, headers))
        return answers

    broken = mock.patch.object(gateway.engine, "submit", side_effect=ZeroDivisionError)
    with broken if case == "defect" else mock.patch.object(gateway.engine, "draining", case == "stopping"):
        ours, theirs = asyncio.run_coroutine_threadsafe(both(), at.loop).result(WAIT_S)
    assert ours == theirs
    assert ours[0] in statuses
    assert case != "defect" or path != "/queue" or f'"request_id":"{ID}"' in ours[2]
