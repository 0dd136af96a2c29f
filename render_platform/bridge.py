"""The embedded bridge: one process that owns a chdb folder and answers ClickHouse's HTTP protocol on loopback.

Through it the gateway, Dagster runs and commands share the embedded engine with clickhouse-connect. It is no ClickHouse
server and says so (`Server: render-platform embedded bridge`). What holds:

- GET (read-only) and POST on `/`, as bridge_protocol.py tells; `/ping` says `Ok.`
- Only loopback, and only with the token that is made at start: `<folder>.url` (0600) holds the URL with it while the
  bridge runs. Who has the token may do all that the engine can, reading files included: it is the platform's own.
- Each request has an engine handle of its own: some run side by side, and nothing of one is left to the next.
- Bodies, results, memory, time and connections are bounded; what is refused or broken ends its own request alone.
  Not bounded: how long a connection says nothing. A process of this machine can use all connections up, no more.
- An insert that was answered with 200 survives `kill -9` of the bridge. One that was not may be there, in part or not
  at all: repeat it with its token.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from render_platform.bridge_protocol import (
    MAX_BODY_BYTES,
    Answer,
    Headers,
    Refused,
    Request,
    failure,
    password,
    read_request,
    success,
)
from render_platform.clickhouse_connection import BRIDGE_USER, OWNED, FolderLock
from render_platform.errors import PlatformError, Unavailable, UsageError

NAME = "render-platform embedded bridge"
HOST = "127.0.0.1"
MAX_HELD_BYTES = 1 << 30
"""Of all requests' bodies at one time; what would be more is answered with 503."""
MAX_HEADER_BYTES = 256 << 10
MAX_CONNECTIONS = 256
QUERIES_AT_ONCE = 4
TRANSFER_LIMIT_S = 60
STOP_LIMIT_S = 5
NS_PER_SECOND = 1_000_000_000
_CHUNK_BYTES = 1 << 20

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def serve(folder: Path, port: int, ready: Callable[[str], None]) -> None:
    """Own the folder and answer until SIGINT or SIGTERM; then finish or cancel what runs, close, and return.

    Port 0 is a free one. `ready` gets the URL, without the token, once requests are answered. Call it in the main
    thread. Raises Unavailable where the folder has an owner or the port is taken.
    """
    with closing(Bridge(folder, port)) as bridge:
        bridge.run(ready)


class Bridge:
    """An ASGI application over a chdb folder, which it owns until `close`."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder.resolve()
        self._token = _password()
        self._held = 0
        with ExitStack() as undo:
            undo.callback(_own(self._folder).release)
            self._socket = undo.enter_context(_listener(port))
            try:
                self._engine = self._open()  # kept open: the engine ends with its last handle
            except RuntimeError:
                raise Unavailable(f"the embedded ClickHouse did not open: most likely {OWNED[0]}", OWNED[1]) from None
            undo.callback(self._engine.close)
            self._timezone = self._engine.query("SELECT timezone()", "TabSeparatedRaw").bytes().decode().strip()
            self._workers = ThreadPoolExecutor(QUERIES_AT_ONCE, "query")
            undo.callback(self._end_queries)
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()

    def _open(self) -> Any:
        import chdb  # 0.9 s and 200 MB, which only the owner of a folder pays

        return chdb.connect(str(self._folder))  # type: ignore[no-untyped-call]

    def _end_queries(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._engine.query("KILL QUERY WHERE 1")
        self._workers.shutdown()

    def run(self, ready: Callable[[str], None]) -> None:
        """Answer until a signal. The URL file stands from the first answer to the last."""
        file = FolderLock.url_file(self._folder)

        def started() -> None:
            address = f"{HOST}:{self._socket.getsockname()[1]}"
            _write_url(file, f"http://{BRIDGE_USER}:{self._token}@{address}")
            ready(f"http://{address}")

        config = uvicorn.Config(
            self,
            http="h11",  # bounds what comes before a body; httptools does not
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[("server", NAME), ("x-clickhouse-server-display-name", NAME)],
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=TRANSFER_LIMIT_S,
            timeout_graceful_shutdown=STOP_LIMIT_S,
        )
        try:
            _Server(config, started).run([self._socket])
        finally:
            file.unlink(missing_ok=True)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except Refused as refused:
            answer = failure(f"Code: {refused.code}. DB::Exception: {refused.message}", refused.status)
        except TimeoutError:
            answer = failure("Code: 159. DB::Exception: the body did not arrive in time")
        except asyncio.CancelledError:  # by the server, as it ends
            answer = failure("Code: 394. DB::Exception: the embedded bridge ends", 503)
        except ConnectionResetError:  # the client went before its request was whole: nobody waits for an answer
            return
        start = [(name.encode(), text.encode()) for name, text in answer.headers.items()]
        start.append((b"content-length", b"%d" % len(answer.body)))
        with suppress(TimeoutError):  # a client that does not read is cut off
            async with asyncio.timeout(TRANSFER_LIMIT_S):
                await send({"type": "http.response.start", "status": answer.status, "headers": start})
                for at in range(0, len(answer.body), _CHUNK_BYTES):
                    chunk = answer.body[at : at + _CHUNK_BYTES]
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body"})

    async def _answer(self, scope: Message, receive: Receive) -> Answer:
        headers: Headers = dict(scope["headers"])
        method, path = scope["method"], scope["path"]
        if headers.get(b"host", b"").partition(b":")[0] not in (HOST.encode(), b"localhost"):
            raise Refused(403, 497, "only for this machine: the Host is not loopback")
        if method not in ("GET", "POST"):
            raise Refused(405, 48, "only GET and POST")
        if path == "/ping":
            return Answer(200, b"Ok.\n")
        if path != "/":
            raise Refused(404, 48, "there is nothing but / and /ping")
        if not hmac.compare_digest(password(headers), self._token.encode()):
            raise Refused(403, 516, "Authentication failed: the URL beside the folder has the password")
        async with self._body(receive) as body:

            def work() -> Answer:
                return self._run(read_request(method, scope["query_string"], headers, body))

            return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    @asynccontextmanager
    async def _body(self, receive: Receive) -> AsyncIterator[bytearray]:
        """The request's body, counted among what is held for as long as it is needed."""
        body = bytearray()
        try:
            async with asyncio.timeout(TRANSFER_LIMIT_S):
                while (message := await receive())["type"] != "http.disconnect":
                    body += message["body"]
                    self._held += len(message["body"])
                    if len(body) > MAX_BODY_BYTES:
                        raise Refused(413, 307, f"a body has at most {MAX_BODY_BYTES} bytes: send smaller batches")
                    if self._held > MAX_HELD_BYTES:
                        raise Refused(503, 202, "too many bytes are on their way: repeat this later")
                    if not message["more_body"]:
                        break
                else:
                    raise ConnectionResetError
            yield body
        finally:
            self._held -= len(body)

    def _run(self, request: Request) -> Answer:
        """In a worker's thread. The handle is not used again: what a failed query had written, its next would say."""
        handle = self._open()
        try:
            if request.database:
                handle.query(f"USE {_quoted(request.database, '`')}")
            handle.query("SET " + ", ".join(f"{name} = {_quoted(text)}" for name, text in request.settings.items()))
            if request.rows is not None:
                body, summary = b"", _insert(handle, request, request.rows)
            else:
                result = handle.query(request.statement, request.format, params=dict(request.parameters))
                body, summary = result.bytes(), _counts(result)
            return success(request, body, self._timezone, summary)
        except RuntimeError as error:  # chdb's own is one
            return failure(str(error))
        finally:
            handle.close()


class _Server(uvicorn.Server):
    """Calls `started` when it answers, and returns after a signal, where uvicorn's would raise the signal again."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def _insert(handle: Any, request: Request, rows: memoryview) -> dict[str, int]:
    inserter = handle.send_insert(request.statement.decode("utf-8", "replace"), request.format)
    for at in range(0, len(rows), _CHUNK_BYTES):
        inserter.append(rows[at : at + _CHUNK_BYTES])
    done = inserter.finish()  # a handle that is closed before this takes the insert back
    return {
        "written_rows": done.rows_written,
        "written_bytes": done.bytes_written,
        "elapsed_ns": round(done.elapsed * NS_PER_SECOND),
    }


def _counts(result: Any) -> dict[str, int]:
    return {
        "read_rows": result.storage_rows_read(),
        "read_bytes": result.storage_bytes_read(),
        "written_rows": result.rows_written(),
        "written_bytes": result.bytes_written(),
        "elapsed_ns": round(result.elapsed() * NS_PER_SECOND),
    }


def _quoted(text: str, mark: str = "'") -> str:
    return mark + text.replace("\\", "\\\\").replace(mark, f"\\{mark}") + mark


def _own(folder: Path) -> FolderLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock.take(folder)
    except OSError as error:
        raise Unavailable(f"{folder}: {error.strerror}", "check that the folder can be written") from error
    if lock is None:
        raise Unavailable(*OWNED)
    return lock


def _password() -> str:
    """BRIDGE_PASSWORD, for clients on the same machine that outlive the bridge; else a new one each time."""
    chosen = os.environ.get("BRIDGE_PASSWORD", "")
    if chosen and not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", chosen):
        raise UsageError("BRIDGE_PASSWORD is not one", "set 16 … 128 letters, digits, _ and -")
    return chosen or secrets.token_urlsafe(32)


def _listener(port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise UsageError(f"port is {port}", "set it to 0 … 65535")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise Unavailable(f"port {port} cannot be listened on: {error.strerror}", "choose another one") from error
    return listener


def _write_url(path: Path, url: str) -> None:
    """At once or not at all, and for this user only. It needs no fsync: after a crash it names nobody."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(url)
    temporary.replace(path)


def main() -> None:
    """`python -m render_platform.bridge --folder F`: prints the URL, without the token, when it answers."""
    parser = argparse.ArgumentParser(prog="render_platform.bridge", description="Serve a chdb folder on loopback.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0, help="0, the default, is a free one")
    options = parser.parse_args()
    try:
        serve(options.folder, options.port, lambda url: print(url, flush=True))  # noqa: T201  what it is asked for
    except PlatformError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
