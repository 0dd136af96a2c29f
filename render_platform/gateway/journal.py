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
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from render_platform import __version__
from render_platform.clock import SystemClock, SystemIds
from render_platform.config import configure_logs
from render_platform.database import Database, open_database
from render_platform.errors import RecordError, Unavailable
from render_platform.gateway.jobs import Job, signing
from render_platform.gateway.journal_messages import (
    Reply,
    Told,
    operation_of,
    refusal,
    reply_to,
    result_of,
    told_of,
)
from render_platform.gateway.store import Do, JobStore, Operation
from render_platform.gateway.writer import MAX_GROUP, LastWrite, Transactions, Waiter, gone, resolve
from render_platform.keyring import open_signers
from render_platform.outbox import Outbox

READ_BYTES = 256 * 1024
START_S, STOP_S = 60.0, 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LENGTH = struct.Struct(">Q")
_log = structlog.get_logger()


class Setup(msgspec.Struct, array_like=True):
    """What the child is told first."""

    version: str
    database: str  # may hold a password: it goes through the socket, and nowhere else
    gateway_id: str
    epoch: int
    signer: str
    key: str


_encode = msgspec.msgpack.Encoder().encode
_setup: Any = msgspec.msgpack.Decoder(Setup)
_several: Any = msgspec.msgpack.Decoder(list[msgspec.Raw])
_told: Any = msgspec.msgpack.Decoder(Told)
_replies: Any = msgspec.msgpack.Decoder(tuple[int, int, str | None, list[Reply]])


def _spawn(connection: int, lock: int) -> subprocess.Popen[bytes]:
    """The child, which imports what this process would: not what stands in the folder that it was started in.

    Signals for both wait until it has said that they are not for it.
    """
    command = [sys.executable, "-P", "-m", __name__, str(connection)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(  # noqa: S603 (our own program)
            command, pass_fds=(connection, lock), stdin=subprocess.DEVNULL, env=environment
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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

    def __init__(
        self, setup: Setup, lock: int, loop: asyncio.AbstractEventLoop, died: asyncio.Event, last: LastWrite
    ) -> None:
        """`lock` is the gateway's own, as a file descriptor; `last` is its writer's as well."""
        self._initial, self._lock, self._loop, self.died, self._last = setup, lock, loop, died, last
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
        """Unavailable where the child does not come up; it is gone then, whatever ended the start."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _spawn(theirs.fileno(), self._lock)
            await self._loop.create_unix_connection(lambda: self, sock=ours)
            self._write(self._initial)
            async with asyncio.timeout(START_S):
                await asyncio.shield(self._ready)
        except BaseException as error:  # also where this is cancelled
            ours.close()
            self._abort()
            if isinstance(error, TimeoutError | Unavailable | OSError):
                raise Unavailable("the journal's process does not start", "see its errors above") from error
            raise

    def _abort(self) -> None:
        self._over = True
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def submit(self, operation: Operation, abandoned: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        """As Writer.submit; a `Do` is not for it."""
        future = self._loop.create_future()
        if self._over or isinstance(operation, Do):
            future.set_exception(gone())
            return future
        try:
            told = msgspec.Raw(_encode(told_of(operation)))
        except (OverflowError, TypeError, ValueError) as error:
            future.set_exception(RecordError("job", f"holds what cannot be recorded: {error}", "see the message"))
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
            groups, operations, failure, replies = _replies.decode(frame)
            if not self._ready.done():
                self._ready.set_result(None)
            if failure is not None:
                self._last.failure = failure
            self.groups += groups
            self.operations += operations
            for reply in replies:
                result = result_of(self._waiting[0].job, reply)
                resolve([(self._waiting.popleft().waiter, result)])

    def connection_lost(self, _: Exception | None) -> None:
        if not self._over or self._waiting:
            self.died.set()
        self._over, self._transport, self._asked = True, None, []
        waiting, self._waiting = self._waiting, deque()
        resolve([(one.waiter, gone()) for one in waiting])
        if not self._ready.done():
            self._ready.set_exception(Unavailable("the journal's process has ended", "see its errors above"))
            self._ready.exception()  # whoever still waits is told; nobody need be
        if not self._closed.done():
            self._closed.set_result(None)

    async def stop(self) -> None:
        """What was submitted before is written, and the child ends; one that still writes after STOP_S is left to it,
        and keeps the lock: no other gateway begins before it is done."""
        self.hand_over()
        self._over = True
        if self._process is None or self._process.poll() is not None:
            return
        try:
            async with asyncio.timeout(STOP_S):
                if self._transport is not None:
                    self._transport.write_eof()
                    await asyncio.shield(self._closed)
            await asyncio.to_thread(self._process.wait, STOP_S)
        except (TimeoutError, subprocess.TimeoutExpired):
            _log.warning("journal_still_writes", process=self._process.pid)
            if self._transport is not None:
                self._transport.abort()


# In the child.


def _receive(connection: socket.socket, inbox: queue.SimpleQueue[bytes | None]) -> None:
    """Frames as they come, while a commit is under way too: the socket holds little. None: the gateway is gone."""
    frames = _Frames()
    with suppress(OSError):  # it was killed
        while data := connection.recv(READ_BYTES):
            for frame in frames.take(data):
                inbox.put(frame)
    inbox.put(None)


def _write_until_closed(connection: socket.socket) -> None:
    """Write what comes, a group a transaction, until the gateway closes the socket."""
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), name="inbox", daemon=True).start()
    frame = inbox.get()
    if frame is None:
        return
    setup = _setup.decode(frame)
    if setup.version != __version__:
        raise SystemExit(f"this journal is of version {__version__}, its gateway of {setup.version}")
    database = open_database(setup.database)
    transactions = Transactions(database, _store(database, setup))
    _send(connection, (0, 0, None, []))
    waiting: deque[Operation | RecordError] = deque()
    over = False
    while waiting or not over:
        while not over and len(waiting) < MAX_GROUP and not (waiting and inbox.empty()):
            frame = inbox.get()
            over = frame is None
            waiting += [_operation(raw) for raw in _several.decode(frame)] if frame else []
        group = [waiting.popleft() for _ in range(min(MAX_GROUP, len(waiting)))]
        if group:
            _send(connection, _written(transactions, group))
    database.close()


def _operation(raw: msgspec.Raw) -> Operation | RecordError:
    """What was asked for; a value of another type than its field's fails alone."""
    try:
        return operation_of(_told.decode(raw))
    except (msgspec.MsgspecError, ValueError) as error:
        return RecordError("job", f"holds what cannot be recorded: {error}", "see the message")


def _written(
    transactions: Transactions[Operation], group: list[Operation | RecordError]
) -> tuple[int, int, str | None, list[Reply]]:
    """A group's transactions, the operations in them, why the last write failed (None: nothing was), a reply each."""
    groups, operations = transactions.groups, transactions.operations
    good = [one for one in group if not isinstance(one, RecordError)]
    results = iter(zip(good, transactions.write(good) if good else [], strict=True))
    replies = [refusal(one) if isinstance(one, RecordError) else reply_to(*next(results)) for one in group]
    failure = transactions.last.failure if good else None
    return transactions.groups - groups, transactions.operations - operations, failure, replies


def _store(database: Database, setup: Setup) -> JobStore:
    ids, signer = SystemIds(), open_signers(setup.signer, Path(setup.key))[0]
    sign = signing(signer, setup.gateway_id, setup.epoch)
    return JobStore(Outbox(database, ids), SystemClock(), ids, setup.gateway_id, setup.epoch, sign)


def _send(connection: socket.socket, value: Any) -> None:
    """A gateway that is gone is told nothing; what it had sent is written all the same."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(_frame(value))


def main() -> None:
    """The gateway decides when it ends, by closing the socket: signals that are for both are its own affair."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    configure_logs()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.setblocking(True)
        _write_until_closed(connection)


if __name__ == "__main__":
    main()
