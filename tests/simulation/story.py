"""A seed's story: two processes of a platform that a scheduler moves, and what they were told.

`Story.play` lets faults strike; `Story.mend` then takes every fault away, and lets the platform come to rest. What it
must be by then, checks.py says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any
from uuid import UUID

from render_platform.cas import NamedDigests, collect_orphans
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND
from render_platform.errors import SequencerStopped
from render_platform.events import UsageEvent, table_from_events
from render_platform.fast_path import FastPath
from render_platform.outbox import LIVE
from render_platform.pipeline import Platform
from render_platform.recovery import Recovery
from tests.factories import make_event
from tests.simulation.sql import SLOTS, Template
from tests.simulation.stage import Stage, Verdict
from tests.simulation.world import START_US, Violation, World, to_next_hour

CUSTOMERS = tuple(f"secret-name-of-{number}" for number in range(3))
STEPS = (3, 9)
LANES = (LIVE, LIVE, LIVE, "trace/1")
COLLECTED_US = 3 * DAY_US
FIRST_END_US = to_next_hour(START_US)
"""An hour later the day ends."""


class Story(Stage):
    def __init__(self, world: World, template: Template, duckdb: Callable[[], Any]) -> None:
        super().__init__(world, template, duckdb)
        self.restores = self.fast is None and world.story.random() < 0.2
        self._copied: set[UUID] | None = None
        self._failed: list[UsageEvent] = []
        self._waiting = False
        world.meanwhile = self._meanwhile

    def _meanwhile(self) -> None:
        other = next(slot for slot in SLOTS if slot != self.world.process.name)
        if self.two_writers and self.world.process.name in SLOTS:
            meanwhile, self.world.meanwhile = self.world.meanwhile, lambda: None
            try:
                does = self.world.story.randrange(4)
                if does:
                    self._accept(other)
                if does != 1:
                    self._flush_now(other)
            finally:
                self.world.meanwhile = meanwhile

    # What they do.

    def play(self) -> None:
        """Random steps; in a story of a restore they stand around the steps that make it one."""
        some = self.world.story.randrange
        if self.restores:
            self._steps(some(3), self._accept, self._flush_now, self._copy, self._accept)
            self._steps(some(3), self._flush_now, self._restore)
            self._steps(some(4))
        elif self.fast is not None:
            self._steps(some(3), self._accept, self._flush_now, self._end_hour, self._flush_now, self._flush_now)
            self._steps(some(2), self._flush_now, self._reconcile, self._reconcile, self._reconcile)
            self._steps(some(3))
        else:
            self._steps(some(*STEPS))

    def _steps(self, count: int, *then: Callable[[str], object]) -> None:
        rng = self.world.story
        for act in [*[None] * count, *then]:
            slot = "B" if self.two_writers and rng.random() < 0.3 else "A"
            (act or self._choose(rng))(slot)

    def _choose(self, rng: random.Random) -> Callable[[str], object]:
        acts: list[tuple[float, Callable[[str], object]]] = [
            (5, self._accept),
            (7 if self._waiting else 1, self._slow_path),
            (3, self._move_clock),
            (1, self.kill),
            (1, self.cut_power),
            (0.4, self._collect),
            (0.4, self._prune),
        ]
        if self._failed:
            acts.append((2, self._accept_again))
        if self.fast is not None:
            acts += [(2, self._reconcile), (1, self._repair), (0.5, self._double)]
        if self.behind:
            acts.append((3, self.recover))
        return rng.choices([act for _, act in acts], [weight for weight, _ in acts])[0]

    def _make_events(self) -> list[UsageEvent]:
        rng = self.world.content
        now = self.world.now_us()
        return [make_event(rng, recorded_at=now) for _ in range(rng.randrange(1, 4))]

    def _accept(self, slot: str) -> None:
        self._record(slot, self._make_events())

    def _accept_again(self, slot: str) -> None:
        """A client sends again what was reported as failed."""
        self._record(slot, [self._failed.pop()])

    def _record(self, slot: str, made: list[UsageEvent]) -> None:
        lane = self.world.story.choice(LANES) if self.fast is None else LIVE
        customer = self.world.story.choice(CUSTOMERS)
        done: list[UsageEvent] = []

        def act(platform: Platform) -> None:
            with platform.database.write() as connection:
                ref = platform.outbox.customer_ref(connection, "issuer", customer)
                recorded = platform.outbox.record(connection, lane, [replace(one, customer_ref=ref) for one in made])
            done.extend(recorded)
            if self.fast is not None:
                self._publish(recorded)

        known = any(one.event_id in self.told.doubtful for one in made)
        self.step(slot, f"accept {len(made)} into {lane}", act, may_refuse=known)
        self.told.accepted |= {one.event_id: one for one in done}
        self._waiting = True
        if not done and not known:
            self._find_out(made)

    def _find_out(self, made: list[UsageEvent]) -> None:
        """Whether a commit that was reported as failed stands: all of it or nothing."""
        held = self.held()
        stands = {one.event_id for one in made if one.event_id in held}
        if stands not in (set(), {one.event_id for one in made}):
            raise Violation("half a transaction stands")
        for one in made:
            if stands:
                recorded_at, ref = held[one.event_id]
                self.told.doubtful[one.event_id] = replace(one, recorded_at=recorded_at, customer_ref=ref)
        self._failed += made[: self.world.story.randrange(2)]

    def _publish(self, recorded: list[UsageEvent]) -> None:
        """The fast path: best effort, and not everything is even tried."""
        fast = self.fast
        if fast is not None and self.world.chance.random() < 0.9:
            FastPath(fast, self.world).publish(table_from_events(recorded))

    @staticmethod
    def _flush(platform: Platform) -> object:
        return platform.flush()

    def _flush_now(self, slot: str) -> None:
        self.step(slot, "flush", self._flush)

    def _slow_path(self, slot: str) -> None:
        self._waiting = False
        name = self.world.story.choice(("flush", "flush", "flush", "seal", "store", "log_batches"))
        self.step(slot, name, lambda platform: getattr(platform, name)())

    def _move_clock(self, _slot: str) -> None:
        rng = self.world.story
        way = rng.randrange(6)
        if way == 0:
            self.world.pass_time(-rng.randrange(30 * 60 * US_PER_SECOND))
        elif way == 1 and self.fast is None:
            self.world.us = max(self.world.us, to_next_hour(self.world.us) + rng.randrange(120 * US_PER_SECOND))
        else:
            self.world.pass_time(rng.randrange(4 * 60 * US_PER_SECOND))
        self.world.note("the clock was moved")

    def _end_hour(self, _slot: str) -> None:
        self.world.us = max(self.world.us, FIRST_END_US + 90 * US_PER_SECOND)
        self.world.note("the hour is over")

    def _collect(self, slot: str) -> None:
        """Three days later, as it were: nobody is between a put and its commit any more."""
        world = self.world

        class Later:
            def now_us(self) -> int:
                return world.us + COLLECTED_US

        def act(platform: Platform) -> None:
            platform.log.publish()
            named = NamedDigests(platform.database)
            with self.alone():
                collect_orphans(platform.blobs, named, Later(), plan=False, older_than_us=2 * DAY_US)

        self.step(slot, "collect orphans", act)

    def _prune(self, slot: str) -> None:
        self.step(slot, "prune", lambda p: p.outbox.prune(p.cas, LIVE, self.world.us - 60 * US_PER_SECOND))

    # The fast path against the slow one.

    def _hour(self) -> int:
        """One that is over, where there is one."""
        held = sorted({at - at % HOUR_US for at, _ in self.held().values()})
        held = [hour for hour in held if hour + HOUR_US < self.world.us] or held
        return self.world.story.choice(held) if held else self.world.us - self.world.us % HOUR_US

    def _reconcile(self, slot: str) -> None:
        hour = self._hour()

        def act(platform: Platform) -> None:
            before = self.world.faults
            found = platform.reconcile(hour)
            known, struck = len(self.slow_ids(hour)), self.world.faults > before
            said = hour, found.status, found.final, found.total("events")
            self.told.verdicts.append(Verdict(*said, known, self.equal(hour), struck))

        self.step(slot, "reconcile", act)

    def slow_ids(self, hour_us: int) -> list[bytes]:
        """The events of an hour, by what was told."""
        known = self.told.accepted | self.told.doubtful
        return sorted(one.event_id.bytes for one in known.values() if one.recorded_at // HOUR_US == hour_us // HOUR_US)

    def equal(self, hour_us: int) -> bool:
        """Whether both sides hold the same of an hour, by what was told and by the fast rows."""
        slow = self.slow_ids(hour_us)
        sides = [self.fast.raw, *self.fast.rolled.values()] if self.fast else []
        return all(
            slow == sorted(row["event_id"] for row in side if row["recorded_at"] // HOUR_US == hour_us // HOUR_US)
            for side in sides
        )

    def _repair(self, slot: str) -> None:
        hour = self._hour()
        self.step(slot, "repair", lambda platform: platform.repair(hour))

    def _double(self, _slot: str) -> None:
        """Somebody inserts an hour's rows a second time."""
        if self.fast is not None and self.fast.raw:
            row = self.world.chance.choice(self.fast.raw)
            for kept in (self.fast.raw, *self.fast.rolled.values()):
                kept.append(row)
            self.world.note("a fast row was doubled")

    # Restores.

    def _copy(self, _slot: str) -> None:
        self.template.copy()
        self._copied = set(self.held())
        self.world.note("the database was copied")

    def _restore(self, _slot: str) -> None:
        """The database is lost, and its copy put into its place. The stores are as they are, but for the files of a
        head that was never published: an operator deletes them (docs/restore.md)."""
        size = self.published_size()
        self.remove_beyond(size)
        self.disk.sync_all()
        logged = self.logged(size)
        self.world.cut_power()
        self.template.put(self.template.folder / "copy.db")
        kept = logged | (self._copied or set())
        self.told.lost |= {one for one in self.told.accepted | self.told.doubtful if one not in kept}
        self.behind = self._is_behind()
        self._copied, self.restored = None, True
        self.world.note(f"an older database was restored; the log has {size}")

    def _is_behind(self) -> bool:
        with closing(self.template.connect()) as connection:
            found: int = connection.execute("SELECT size FROM log_head").fetchone()[0]
        return found < self.published_size()

    def recover(self, slot: str) -> None:
        def act(platform: Platform) -> None:
            Recovery(platform.database, platform.cas, platform.log_objects, [platform.log_signer.verifier]).run()
            self.behind = False

        self.step(slot, "recover", act)

    # The end.

    def mend(self) -> None:
        """Nothing fails any more: the platform comes to rest, and stays so after the power has gone once more."""
        self.world.calm = True
        for slot in list(self.running):
            self.kill(slot)
        if self.behind and self._is_behind():  # a recovery may have come to its end, and said that it failed
            if self.step("A", "flush of an older copy", self._refused) != "refused":
                raise Violation("an older database wrote on")
            self.recover("A")
        self.step("A", "flush", self._flush)
        if self.fast is not None:
            self._settle_hours()
        self.cut_power("A")
        if self.world.story.random() < 0.3:
            before = self.objects()
            self._flush_now("A")
            if self.objects() != before:
                raise Violation("a flush of what is at rest changes it")

    def _refused(self, platform: Platform) -> str:
        try:
            platform.log_batches()
        except SequencerStopped:
            return "refused"
        return "accepted"

    def _settle_hours(self) -> None:
        """The day ends; each hour is reconciled, and repaired where it is not equal."""
        self.world.us = max(self.world.us, FIRST_END_US + HOUR_US + 120 * US_PER_SECOND)
        self.step("A", "flush", self._flush)

        def act(platform: Platform) -> None:
            for hour in platform.hours.known():
                if platform.hours.closed_until(hour) < hour + HOUR_US:
                    continue
                outcome = platform.repair(hour)
                if not (outcome.after.status == "reconciled" and self.equal(hour)) and not outcome.refused:
                    raise Violation(f"not repaired: {outcome.after.summary()}")
                again = platform.reconcile(hour) if self.world.story.random() < 0.3 else outcome.after
                if again.to_bytes() != replace(outcome.after, revision=again.revision).to_bytes():
                    raise Violation(f"a second look says something else: {again.summary()}")

        self.step("A", "repair all", act)
