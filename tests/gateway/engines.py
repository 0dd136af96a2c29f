"""Engines for tests: scripted backends, a database that fails as it is told, and the real rest of a gateway."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from render_platform.clock import SystemIds, uuid7
from render_platform.database import Database
from render_platform.errors import Unavailable
from render_platform.events import UsageEvent
from render_platform.gateway.archive import Archive
from render_platform.gateway.backends import Answer, Attempt, BackendFailure, Span, Usage
from render_platform.gateway.catalogue import BackendSpec, ModelSpec
from render_platform.gateway.engine import Engine
from render_platform.gateway.fleet import Device, Fleet, Server
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.leases import Lease
from render_platform.gateway.meters import WallClockMeter
from render_platform.gateway.store import Do, JobStore, Operation
from render_platform.gateway.writer import Writer
from render_platform.outbox import Outbox
from tests.gateway.virtual_time import LoopClock, now_ns, virtual_loop
from tests.platforms import connect, open_database_of
from tests.postgres import CHOSEN

LEASE_S = 30
Behaviour = Callable[[Attempt], Awaitable[Answer]]


# Backends.


def takes(seconds: float = 0, body: bytes = b'{"ok":1}', usage: Usage | None = None) -> Behaviour:
    async def work(_: Attempt) -> Answer:
        await asyncio.sleep(seconds)
        return Answer(body, usage=usage or Usage())

    return work


def reports(seconds: float, *spans: Span) -> Behaviour:
    """Spans in ns after the attempt's begin."""

    async def work(attempt: Attempt) -> Answer:
        begun_ns = attempt.now_ns()
        await asyncio.sleep(seconds)
        return Answer(b"{}", spans=[(begun_ns + start, begun_ns + end) for start, end in spans])

    return work


def fails(code: str = "backend_unreachable", *, after_s: float = 0, retriable: bool = True, **more: Any) -> Behaviour:
    async def work(_: Attempt) -> Answer:
        await asyncio.sleep(after_s)
        raise BackendFailure(code, f"it is {code}", retriable=retriable, **more)

    return work


def hangs(at_end: Callable[[], Awaitable[Answer]] | None = None) -> Behaviour:
    """Works until it is cancelled; then does `at_end`, where it is given: the answer came at the same instant."""

    async def work(_: Attempt) -> Answer:
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if at_end is None:
                raise
            return await at_end()

    return work


def gated(gate: asyncio.Event, then: Behaviour) -> Behaviour:
    async def work(attempt: Attempt) -> Answer:
        await gate.wait()
        return await then(attempt)

    return work


class FakeBackend:
    """Does for each attempt what its script says next, and `usual` when that is over."""

    def __init__(self, spec: BackendSpec, usual: Behaviour | None = None, meter: str = "backend") -> None:
        self.spec, self.usual, self.meter = spec, usual or takes(1), meter
        self.script: deque[Behaviour] = deque()
        self.attempts: list[Attempt] = []
        self.running = self.most = 0
        self.busy: list[Span] = []

    async def start(self) -> None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, attempt: Attempt) -> Answer:
        self.attempts.append(attempt)
        self.running += 1
        self.most = max(self.most, self.running)
        begun_ns = attempt.now_ns()
        try:
            return await (self.script.popleft() if self.script else self.usual)(attempt)
        finally:
            self.running -= 1
            self.busy.append((begun_ns, attempt.now_ns()))


def backend(name: str = "b", capacity: int = 2, usual: Behaviour | None = None, **more: Any) -> FakeBackend:
    return FakeBackend(BackendSpec(kind="simulated", name=name, capacity=capacity, **more), usual)


# Databases that fail.


class FaultyDatabase(Database):
    """Fails as it is told, a fault a writing transaction: None goes well; `begin` is never begun; the commit of `lost`
    fails and undoes it; the commit of `kept` stands, and is reported as failed. `unreadable` reads fail, too.
    """

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self.faults: deque[str | None] = deque()
        self.always: str | None = None
        self.unreadable = 0

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        fault = self.faults.popleft() if self.faults else self.always
        error = Unavailable("the disk is not there", "plug it in")
        if fault == "begin":
            raise error
        with super().write() as connection:
            yield connection
            if fault == "lost":
                raise error
        if fault == "kept":
            raise error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        if self.unreadable:
            self.unreadable -= 1
            raise Unavailable("the disk is not there", "plug it in")
        with super().read() as connection:
            yield connection


def open_faulty(path: Path, wait_s: float = 30) -> FaultyDatabase:
    """`wait_s`: how long a transaction waits for another process's."""
    found = open_database_of(path.parent)
    found.close()

    @sa.event.listens_for(found.engine, "connect")
    def _wait(connection: Any, _record: Any) -> None:
        own = f"SET lock_timeout = {int(wait_s * 1_000)}" if CHOSEN else f"PRAGMA busy_timeout = {int(wait_s * 1_000)}"
        with closing(connection.cursor()) as cursor:
            cursor.execute(own)
        connection.commit()

    return FaultyDatabase(found.engine)


class WatchedWriter(Writer[Operation]):
    """Time waits for its commits."""

    def submit(self, operation: Operation, abandoned: Callable[[Any], None] | None = None) -> asyncio.Future[Any]:
        return virtual_loop().wait_for(super().submit(operation, abandoned))


@contextmanager
def held_writer(rig: Rig) -> Iterator[None]:
    """No commit is made meanwhile, and what waits then is one group."""
    held, gate = threading.Event(), threading.Event()

    def hold(_: sa.Connection) -> None:
        held.set()
        gate.wait()

    rig.writer.submit(Do(hold))
    rig.writer.hand_over()
    held.wait()
    try:
        yield
    finally:
        gate.set()


# The whole.


@dataclass
class Rig:
    """An engine and all around it; `told` is what went to the fast path."""

    path: Path
    database: FaultyDatabase
    store: JobStore
    writer: WatchedWriter
    engine: Engine
    archive: Archive
    lease: Lease
    clock: LoopClock
    model: ModelSpec
    backends: dict[str, FakeBackend]
    told: list[tuple[Job, UsageEvent]] = field(default_factory=list)

    def request(self, **more: Any) -> Request:
        plain = Request("key", "alice", "standard", self.model, "chat", b'{"prompt":"x"}')
        return replace(plain, **more)

    async def submit(self, **more: Any) -> Job:
        """A job that is new."""
        job, new = await self.engine.submit(self.request(**more), self.new_id())
        assert isinstance(job, Job)
        assert new
        return job

    async def ask(self, **more: Any) -> Outcome:
        """What a client is told that waits on the connection."""
        job = await self.submit(direct=True, **more)
        assert job.done is not None
        return await job.done

    def new_id(self) -> uuid.UUID:
        return uuid7(self.clock.now_us(), SystemIds())

    async def ended(self, *jobs: Job) -> None:
        for job in jobs:
            woken = asyncio.Event()
            job.watchers.append(woken)
            while job.outcome is None:
                await woken.wait()
                woken.clear()

    async def idle(self) -> None:
        while self.engine.jobs:
            await self.ended(*self.engine.jobs.values())

    def sql(self, query: str, *values: Any) -> list[Any]:
        return read_sql(self.path, query, *values)

    def events(self, what: str = "*") -> list[Any]:
        order = "" if "(" in what else " ORDER BY rowid"  # an aggregate is one row
        return self.sql(f"SELECT {what} FROM usage_events{order}")

    @property
    def servers(self) -> Mapping[str, Server]:
        return self.engine.fleet.servers


def read_sql(path: Path, query: str, *values: Any) -> list[Any]:
    """Through a connection of its own: it sees what is committed, and nothing else."""
    with closing(connect(path.parent)) as connection:
        found: list[Any] = connection.execute(query, values).fetchall()
        connection.commit()
        return found


def model_of(backends: Sequence[FakeBackend], **more: Any) -> ModelSpec:
    served = {one.spec.name: "served" for one in backends}
    plain = {"name": "m", "family": "f", "modality": "text", "type": "llm", "tasks": ["chat"], "backends": served}
    return ModelSpec(**{**plain, **more})


@asynccontextmanager
async def make_engine(
    tmp_path: Path, *backends: FakeBackend, outbox: type[Outbox] = Outbox, wait_s: float = 30, **model: Any
) -> AsyncIterator[Rig]:
    """An engine of a new epoch over the database in `tmp_path`. At the end it stops as a gateway does, at once."""
    path = tmp_path / "platform.db"
    database, clock, ids = open_faulty(path, wait_s), LoopClock(), SystemIds()
    archive, lease = Archive(database, clock), Lease(database, clock, ids, tmp_path / "gateway.id", LEASE_S)
    gateway_id, epoch = lease.begin().epoch
    store = JobStore(outbox(database, ids), clock, ids, gateway_id, epoch)
    writer = WatchedWriter(database, store, virtual_loop())
    backends = backends or (backend(),)
    devices: dict[str, Device] = {}
    servers = []
    for one in backends:
        name = one.spec.device or f"backend/{one.spec.name}"
        servers.append(Server(one, devices.setdefault(name, Device(name, WallClockMeter("a test")))))
    told: list[tuple[Job, UsageEvent]] = []
    engine = Engine(
        Fleet(servers), writer, clock, ids, now_ns=now_ns, output_ttl_s=60, on_end=lambda job, e: told.append((job, e))
    )
    by_name = {one.spec.name: one for one in backends}
    writer.start()
    try:
        model_spec = model_of(backends, **model)
        yield Rig(path, database, store, writer, engine, archive, lease, clock, model_spec, by_name, told)
    finally:
        await engine.drain(0)
        await writer.stop()
        database.close()


def check_books(rig: Rig) -> None:
    """What must hold whenever nothing runs: jobs, events and slots agree, and nothing is lost or told twice."""
    rows = rig.sql("SELECT job_id, state, attempt, error_code FROM jobs WHERE state NOT IN ('queued', 'running')")
    events = rig.events("job_id, status, attempt, error_code")
    assert sorted(events) == sorted(rows)
    last = rig.sql("SELECT epoch, count(*), min(seq), max(seq) FROM jobs GROUP BY epoch")
    assert all((low, high) == (1, count) for _, count, low, high in last)
    kept = rig.sql("SELECT job_id FROM job_bodies EXCEPT SELECT job_id FROM jobs WHERE state IN ('queued', 'running')")
    assert kept == []
    told = Counter(event.event_id.bytes for _, event in rig.told)
    assert all(count == 1 for count in told.values())
    assert told.keys() <= {row[0] for row in rig.events("event_id")}
    live = rig.engine.jobs.values()
    assert rig.engine.jobs.held_bytes == sum(len(job.request.body) for job in live)
    for server in rig.servers.values():
        assert (server.running, server.device.ledger.running) == (0, 0)
        assert rig.backends[server.spec.name].most <= server.spec.capacity
