"""The journal as a process of its own: jobs are accepted, started and ended in SQL beside the loop.

    gateway: submit ─▶ frame ═══ socket ═══▶ child: groups frames ─▶ JobStore, one transaction ─▶ frame ═══▶ gateway

The child does what `writer.Writer` does with jobs, through the same `Transactions` and `JobStore`; operations go there
as values, and what the commit decided comes back. Replies come in the order of the operations.

- The child ends when the gateway closes the socket, or dies: what was sent before is written, as it would have been.
- It holds the gateway's lock: no other gateway begins over this state folder while it may still write.
- Where it ends first, nothing can be written any more: everyone who waits is told, `died` is set, the gateway stops.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from render_platform.clock import SystemClock, SystemIds
from render_platform.config import configure_logs
from render_platform.database import Database, open_sqlite
from render_platform.errors import RecordError, Unavailable
from render_platform.gateway.acceptance import acceptance_of
from render_platform.gateway.jobs import Job
from render_platform.gateway.journal_messages import Reply, Told, operation_of, reply_to, result_of, told_of
from render_platform.gateway.store import Do, JobStore, Operation
from render_platform.gateway.writer import MAX_GROUP, Transactions, Waiter, gone, resolve
from render_platform.keyring import open_signers
from render_platform.outbox import Outbox

READ_BYTES = 256 * 1024
START_S, STOP_S = 60.0, 30.0
_LENGTH = struct.Struct(">Q")
_log = structlog.get_logger()


class Setup(msgspec.Struct, array_like=True):
    """What the child is told first."""

    database: str
    gateway_id: str
    epoch: int
    signer: str
    key: str


_encode = msgspec.msgpack.Encoder().encode
_setup: Any = msgspec.msgpack.Decoder(Setup)
_told: Any = msgspec.msgpack.Decoder(list[Told])
_replies: Any = msgspec.msgpack.Decoder(tuple[int, list[Reply]])


def _frame(value: Any) -> bytes:
    data = _encode(value)
    return _LENGTH.pack(len(data)) + data


class _Frames:
    """What was received, cut into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> Iterator[bytes]:
        self._data += data
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                return
            frame = bytes(memoryview(self._data)[_LENGTH.size : end])
            del self._data[:end]
            yield frame


# In the gateway.


class _Asked(NamedTuple):
    job: Job
    waiter: Waiter


class Journal(asyncio.Protocol):
    """Submits operations on jobs to the child; belongs to one loop. For `Do` there is `writer.Writer`."""

    def __init__(self, setup: Setup, lock: int, loop: asyncio.AbstractEventLoop, died: asyncio.Event) -> None:
        """`lock` is the gateway's own, as a file descriptor."""
        self._initial, self._lock, self._loop, self.died = setup, lock, loop, died
        self._asked: list[msgspec.Raw] = []
        self._waiting: deque[_Asked] = deque()
        self._frames = _Frames()
        self._transport: asyncio.WriteTransport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._over = False
        self.groups = 0
        self.operations = 0

    async def start(self) -> None:
        """Unavailable where the child does not come up."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            descriptors = (theirs.fileno(), self._lock)
            self._process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)  # noqa: S603
        await self._loop.create_unix_connection(lambda: self, sock=ours)
        self._write(self._initial)
        try:
            async with asyncio.timeout(START_S):
                await self._ready
        except (TimeoutError, Unavailable):
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            raise Unavailable("the journal's process does not start", "see its errors above") from None

    def submit(self, operation: Operation, abandoned: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        """As Writer.submit; a `Do` is not for it."""
        future = self._loop.create_future()
        if self._over or isinstance(operation, Do):
            future.set_exception(gone())
            return future
        try:
            told = msgspec.Raw(_encode(told_of(operation)))
        except OverflowError:
            future.set_exception(RecordError("usage", "holds a number beyond 64 bits", "see the backend's answer"))
            return future
        if not self._asked:
            self._loop.call_soon(self.hand_over)
        self._asked.append(told)
        self._waiting.append(_Asked(operation.job, (future, abandoned)))
        return future

    def hand_over(self) -> None:
        """Send what was submitted since the last turn of the loop; each turn ends with it by itself."""
        asked, self._asked = self._asked, []
        if asked:
            self._write(asked)

    def _write(self, value: Any) -> None:
        if self._transport is not None:
            self._transport.write(_frame(value))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for frame in self._frames.take(data):
            groups, replies = _replies.decode(frame)
            if not self._ready.done():
                self._ready.set_result(None)
            self.groups += groups
            self.operations += len(replies)
            asked = [self._waiting.popleft() for _ in replies]
            resolve([(one.waiter, result_of(one.job, reply)) for one, reply in zip(asked, replies, strict=True)])

    def connection_lost(self, _: Exception | None) -> None:
        if not self._over or self._waiting:
            self.died.set()
        self._over, self._transport, self._asked = True, None, []
        waiting, self._waiting = self._waiting, deque()
        resolve([(one.waiter, gone()) for one in waiting])
        if not self._ready.done():
            self._ready.set_exception(Unavailable("the journal's process has ended", "see its errors above"))
        self._closed.set_result(None)

    async def stop(self) -> None:
        """What was submitted before is written; then the child ends."""
        self.hand_over()
        self._over = True
        if self._transport is not None:
            self._transport.write_eof()
            await self._closed
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, STOP_S)
            except subprocess.TimeoutExpired:  # it keeps the lock: no other gateway begins before it has written
                _log.warning("journal_still_writes", process=self._process.pid)


# In the child.


class _Inbox:
    """What the gateway sends. `over`: it has closed the socket, or is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._frames = connection, _Frames()
        self.over = False

    def frames(self, *, wait: bool) -> Iterator[bytes]:
        """The frames that are whole now; with `wait`, something has come first."""
        try:
            data = self._connection.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # it was killed
            data = b""
        self.over = not data
        yield from self._frames.take(data)


def _write_until_closed(connection: socket.socket) -> None:
    """Write what comes, a group a transaction, until the gateway closes the socket."""
    inbox = _Inbox(connection)
    setup: Setup | None = None
    while setup is None:
        setup = next((_setup.decode(frame) for frame in inbox.frames(wait=True)), None)
        if inbox.over:
            return
    database = open_sqlite(Path(setup.database))
    transactions = Transactions(database, _store(database, setup))
    _send(connection, (0, []))
    waiting: deque[Operation] = deque()
    while waiting or not inbox.over:
        waiting += _received(inbox, wait=not waiting)
        group = [waiting.popleft() for _ in range(min(MAX_GROUP, len(waiting)))]
        if group:
            before = transactions.groups
            replies = [reply_to(*one) for one in zip(group, transactions.write(group), strict=True)]
            _send(connection, (transactions.groups - before, replies))
    database.close()


def _store(database: Database, setup: Setup) -> JobStore:
    ids, signer = SystemIds(), open_signers(setup.signer, Path(setup.key))[0]

    def sign(job: Job) -> None:
        if not job.request.direct:
            job.acceptance = acceptance_of(job, setup.gateway_id, setup.epoch).to_note(signer)

    return JobStore(Outbox(database, ids), SystemClock(), ids, setup.gateway_id, setup.epoch, sign)


def _received(inbox: _Inbox, *, wait: bool) -> list[Operation]:
    return [operation_of(one) for frame in inbox.frames(wait=wait) for one in _told.decode(frame)]


def _send(connection: socket.socket, value: Any) -> None:
    """A gateway that is gone is told nothing; what it had sent is written all the same."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(_frame(value))


def main() -> None:
    """The gateway decides when it ends, by closing the socket: signals that are for both are its own affair."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    configure_logs()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.setblocking(True)
        _write_until_closed(connection)


if __name__ == "__main__":
    main()
