"""Grouped writes: one transaction serves all operations of the same few milliseconds.

Operations wait in a queue while a commit is under way, and the next commit takes them all. None is answered before its
commit: what is awaited here is durable when it returns. A crash before the commit: none of the group happened, and
nobody was told otherwise. After it: all of them did, and a client that was not told finds out by its idempotency key.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
import structlog

from render_platform.database import Database
from render_platform.errors import PlatformError, Unavailable

MAX_GROUP = 1_000
ASK_AGAIN_S, MOST_ASKS = 0.2, 300
"""How often, and how many times, the database is asked whether a commit stands that failed."""
LINGER_S = 0.0003

Op = TypeVar("Op", contravariant=True)
Waiter = tuple[asyncio.Future[Any], Callable[[Any], None] | None]
"""Who waits for an operation, and who is told where nobody waits any more."""
_log = structlog.get_logger()


class WriterEnded(Unavailable):
    """Nothing can be written any more. Whether what was asked for stands, the next start finds out."""


class Applier(Protocol[Op]):
    """What turns operations into SQL."""

    def apply(self, connection: sa.Connection, operations: Sequence[Op]) -> list[Any]:
        """Do all of `operations`; give one result each, where an error is a result and has changed nothing.

        What it raises undoes the whole group. State of its own that depends on the commit is set in `committed`.
        """
        ...

    def committed(self) -> None: ...

    def stands(self, connection: sa.Connection) -> bool:
        """Whether what `apply` did last is in SQL, where its commit failed and may be there all the same."""
        ...


@dataclass(slots=True)
class LastWrite:
    """Of a gateway's writers: why the last transaction that one of them tried failed; empty where it stands."""

    failure: str = ""


class Transactions(Generic[Op]):
    """Groups of operations, a transaction each, on the caller's thread."""

    def __init__(self, database: Database, applier: Applier[Op]) -> None:
        self._database, self._applier = database, applier
        self.last = LastWrite()
        self.groups = 0
        self.operations = 0

    def write(self, operations: list[Op]) -> list[Any]:
        """A group that fails as a whole is tried one by one, so that a bad operation fails alone."""
        results: list[Any] | None = None
        try:
            with self._database.write() as connection:
                results = self._applier.apply(connection, operations)
        except (sa.exc.SQLAlchemyError, PlatformError) as error:
            _log.warning("write_failed", operations=len(operations), error=type(error).__name__)
            if results is None or not self._stands():
                if isinstance(error, Unavailable):
                    self.last.failure = error.message
                if isinstance(error, Unavailable) or len(operations) == 1:
                    return [_as_platform_error(error)] * len(operations)
                return [result for operation in operations for result in self.write([operation])]
        self._applier.committed()
        self.last.failure = ""
        self.groups += 1
        self.operations += len(operations)
        return results

    def _stands(self) -> bool:
        """Whether a commit that failed is in SQL: a disk or a connection may fail after it. Nothing is written before
        that is known; where it cannot be known, the writer dies, and the next start finds what stands."""
        for _ in range(MOST_ASKS):
            try:
                with self._database.settled() as connection:
                    return self._applier.stands(connection)
            except Unavailable:
                time.sleep(ASK_AGAIN_S)
        raise Unavailable("nobody can tell whether a commit stands", "check the disk, and start the gateway again")


class Submits(Protocol[Op]):
    """What takes operations of one loop and answers each after its commit."""

    def submit(self, operation: Op, abandoned: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        """See Writer.submit."""
        ...


class Writer(Generic[Op]):
    """One thread that writes; any number of tasks of one loop that wait for it."""

    def __init__(
        self,
        database: Database,
        applier: Applier[Op],
        loop: asyncio.AbstractEventLoop,
        died: asyncio.Event | None = None,
    ) -> None:
        """`died` is set where nothing can be written any more."""
        self._transactions, self._loop = Transactions(database, applier), loop
        self._asked: list[tuple[Op, Waiter]] = []
        """What this turn of the loop has asked for; handed over as one, so that the writer wakes once."""
        self._queue: queue.SimpleQueue[list[tuple[Op, Waiter]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._group: list[tuple[Op, Waiter]] = []
        self._over = False
        self.died = died or asyncio.Event()

    @property
    def last(self) -> LastWrite:
        return self._transactions.last

    @property
    def groups(self) -> int:
        return self._transactions.groups

    @property
    def operations(self) -> int:
        return self._transactions.operations

    def start(self) -> None:
        self._thread.start()

    def submit(self, operation: Op, abandoned: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        """The operation's result, after its commit. Cancelling the future does not take the operation back:
        `abandoned` is called with its result then, an error too.

        Unavailable: the operation is not in SQL, unless the writer has died meanwhile: then nobody knows.
        """
        future = self._loop.create_future()
        if self._over:
            future.set_exception(gone())
        else:
            if not self._asked:
                self._loop.call_soon(self.hand_over)
            self._asked.append((operation, (future, abandoned)))
        return future

    def hand_over(self) -> None:
        """Give the writer what was submitted since the last turn of the loop; each turn ends with it by itself."""
        asked, self._asked = self._asked, []
        for start in range(0, len(asked), MAX_GROUP):
            self._queue.put(asked[start : start + MAX_GROUP])

    async def stop(self) -> None:
        """Write what was submitted before, and end the thread."""
        self._over = True
        self.hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._write_until_stopped()
        except BaseException:  # a defect of ours: nothing can be written any more, and whoever owns this must know
            self._loop.call_soon_threadsafe(self._die)
            raise

    def _die(self) -> None:
        self._over = True
        self.died.set()
        self.hand_over()
        waiting = self._group
        while not self._queue.empty():
            waiting += self._queue.get_nowait() or []
        resolve([(waiter, gone()) for _, waiter in waiting])

    def _write_until_stopped(self) -> None:
        crowded = False
        while (group := self._queue.get()) is not None:
            if crowded:  # others come as often as commits do: a moment's wait makes one commit of several
                time.sleep(LINGER_S)
            more: list[tuple[Op, Waiter]] | None = group
            self._group = group
            while len(group) < MAX_GROUP and not self._queue.empty():
                more = self._queue.get_nowait()
                group += more or []
            crowded = len(group) > 1
            results = self._transactions.write([operation for operation, _ in group])
            self._tell(list(zip((waiter for _, waiter in group), results, strict=True)))
            if more is None:
                return

    def _tell(self, told: list[tuple[Waiter, Any]]) -> None:
        try:
            self._loop.call_soon_threadsafe(resolve, told)
        except RuntimeError:  # the loop has ended: nobody waits any more
            _log.warning("writer_without_a_loop", operations=len(told))


def _as_platform_error(error: Exception) -> PlatformError:
    if isinstance(error, PlatformError):
        return error
    return Unavailable(f"the database refused a write: {type(error).__name__}", "see the log of the gateway")


def gone() -> WriterEnded:
    return WriterEnded("the database writer has ended", "start the gateway again")


def resolve(told: list[tuple[Waiter, Any]]) -> None:
    for (future, abandoned), result in told:
        if future.done():  # cancelled while it waited
            if abandoned is not None:
                abandoned(result)
        elif isinstance(result, PlatformError):
            future.set_exception(result)
        else:
            future.set_result(result)
