"""Where a seed plays: the stores, the database, two processes that live and die, and what the outside was told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from render_platform.audit_log import CHECKPOINT
from render_platform.clock import US_PER_SECOND
from render_platform.errors import Missing, PlatformError, RecordError, SequencerStopped, Unavailable
from render_platform.events import UsageEvent
from render_platform.note import claimed_checkpoint
from render_platform.objects import ObjectStore
from render_platform.outbox import Outbox
from render_platform.pipeline import Platform
from render_platform.tiles import needed_size, parse_path
from tests.simulation.bucket import Bucket
from tests.simulation.disk import Disk, DiskFolder
from tests.simulation.fast import FakeClickHouse
from tests.simulation.sql import Template
from tests.simulation.world import Crash, Process, Violation, World


class Verdict(NamedTuple):
    """What a reconciliation said of an hour, and what was so."""

    hour_us: int
    status: str
    final: bool
    events: int
    known: int
    """How many events it spoke of, and how many there were."""
    equal: bool
    struck: bool


@dataclass
class Told:
    """What the outside knows."""

    accepted: dict[UUID, UsageEvent] = field(default_factory=dict)
    """Events whose commit was reported as done, as recorded."""
    doubtful: dict[UUID, UsageEvent] = field(default_factory=dict)
    """Events whose commit was reported as failed, and that SQL holds all the same."""
    lost: set[UUID] = field(default_factory=set)
    """Events that a restored database had not, nor the log: the price of a restore."""
    checkpoints: list[bytes] = field(default_factory=list)
    """Each checkpoint that anybody could read, ever."""
    errors: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class Running:
    """One life of a process, and its platform once it is open."""

    process: Process
    slot: str
    platform: Platform | None = None


class Stage:
    """The seed has chosen what stands on it: a disk or a bucket, one writer or two, with a fast path or without."""

    def __init__(self, world: World, template: Template, duckdb: Callable[[], Any]) -> None:
        self.world, self.template, self._duckdb = world, template, duckdb
        self.told = Told()
        self.disk = Disk(world)
        rng = world.story
        self.buckets = [Bucket(world, name) for name in ("blobs", "log")] if rng.random() < 0.25 else []
        self.disk.on_change = self._see
        for bucket in self.buckets:
            bucket.on_change = self._see
        self.fast = FakeClickHouse(world) if rng.random() < 0.08 else None
        self.two_writers = rng.random() < 0.6
        self.restored = self.behind = False
        """Whether an older database was put into its place; and whether the log knows more than that one still."""
        self.running: dict[str, Running] = {}
        world.on_power = self._power_goes
        template.clear()
        template.world = world

    def _see(self, path: str, data: bytes) -> None:
        if path in (f"/log/{CHECKPOINT}", CHECKPOINT):
            self.told.checkpoints.append(data)

    def _power_goes(self) -> None:
        self.disk.lose_power(self.world.chance)

    # Processes.

    def stores(self) -> tuple[ObjectStore, ObjectStore]:
        if self.buckets:
            return self.buckets[0], self.buckets[1]
        return DiskFolder(self.disk, "/blobs", self.world.ids), DiskFolder(self.disk, "/log", self.world.ids)

    def platform(self, slot: str) -> Platform:
        """The process's platform; opened where it is not."""
        running = self.running[slot]
        if running.platform is None:
            database = self.template.databases[slot]
            opened = Platform(
                self.template.settings,
                self.world,
                self.world.ids,
                self._duckdb,
                database=database,
                stores=self.stores(),
            )
            opened.outbox = Outbox(database, self.world.ids, lambda s: self.world.pass_time(int(s * US_PER_SECOND)))
            if self.fast is not None:
                opened.__dict__["clickhouse"] = self.fast
            running.platform = opened
        return running.platform

    @contextmanager
    def _as(self, slot: str) -> Iterator[None]:
        """Work as this process, which is started where it does not live."""
        if slot not in self.running or self.running[slot].process.dead:
            self.running[slot] = Running(self.world.born(slot), slot)
        before, self.world.process = self.world.process, self.running[slot].process
        try:
            yield
        finally:
            self.world.process = before
            if self.running[slot].process.dead:
                self.template.databases[slot].close()

    def step(self, slot: str, name: str, act: Callable[[Platform], object], *, may_refuse: bool = False) -> object:
        """One thing that a process does. It may fail where a fault has struck; else it must not."""
        world = self.world
        faults = world.faults
        with self._as(slot):
            world.note(f"— {name}")
            try:
                return act(self.platform(slot))
            except Crash:
                world.note("dead")
            except PlatformError as error:
                self.told.errors.append(str(error))
                said = str(error).replace(str(self.template.folder), "")  # its name is another in each process
                world.note(f"{type(error).__name__}: {said}")
                if may_refuse and isinstance(error, RecordError):
                    return None
                if not isinstance(error, Unavailable):
                    raise Violation(f"{name}: {type(error).__name__}: {error}") from error
                if world.faults == faults and not (self.behind and isinstance(error, SequencerStopped)):
                    raise Violation(f"{name} failed, and nothing had struck: {error}") from error
        return None

    def held(self) -> dict[UUID, tuple[int, str]]:
        """The events that SQL holds, by id: when they were recorded, and whose they are."""
        with closing(self.template.connect()) as connection:
            rows = connection.execute("SELECT event_id, recorded_at, customer_ref FROM usage_events").fetchall()
        return {UUID(bytes=event_id): (at, ref) for event_id, at, ref in rows}

    def published_size(self) -> int:
        try:
            return claimed_checkpoint(self.reader(CHECKPOINT)).size
        except Missing:
            return 0

    def reader(self, path: str) -> bytes:
        """The log's files as they stand, read by nobody's process."""
        files = self.objects()
        if f"log/{path}" not in files:
            raise Missing(path)
        return files[f"log/{path}"]

    def remove_beyond(self, size: int) -> None:
        """Delete the log's files that its published checkpoint does not cover."""
        for name in self.objects():
            path = name.removeprefix("log/")
            tile = parse_path(path)
            if tile is not None and needed_size(tile) > size:
                if self.buckets:
                    del self.buckets[1].objects[path]
                else:
                    self.disk.remove(f"/log/{path}")

    def logged(self, size: int) -> set[UUID]:
        """The events under the first entries of the log."""
        with closing(self.template.connect()) as connection:
            rows = connection.execute(
                "SELECT event_id FROM usage_events JOIN batches USING (batch_id) WHERE log_index < ? UNION "
                "SELECT event_id FROM pruned_events JOIN batches USING (ordinal) WHERE log_index < ?",
                (size, size),
            ).fetchall()
        return {UUID(bytes=row[0]) for row in rows}

    def objects(self) -> dict[str, bytes]:
        """What the stores hold, by `blobs/` or `log/` and its name; no scratch files."""
        if self.buckets:
            return {f"{one.name}/{path}": at[0] for one in self.buckets for path, at in one.objects.items()}
        return {name: data for name, data in self.disk.files("").items() if "/.tmp/" not in name}

    def kill(self, slot: str) -> None:
        if slot in self.running:
            self.running[slot].process.dead = True
            self.template.databases[slot].close()
            self.world.note(f"{slot} is killed")

    def cut_power(self, _slot: str) -> None:
        self.world.cut_power()
        self.template.close()
        self.world.note("the power is cut")

    @contextmanager
    def alone(self) -> Iterator[None]:
        meanwhile, self.world.meanwhile = self.world.meanwhile, lambda: None
        try:
            yield
        finally:
            self.world.meanwhile = meanwhile
