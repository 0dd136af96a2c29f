"""What a seed decides: the clock, the ids, which write fails and how, who dies, and who comes in between.

Every write asks `World.write`, every read `World.read`. A write that is struck has no effect and says so, has its
effect and says that it failed, takes long, or is the last thing that its process does, before or after the effect.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from render_platform.clock import HOUR_US, US_PER_SECOND

LOST, KEPT, STALL, KILL, KILL_AFTER, POWER, POWER_AFTER, MEANWHILE = (
    "not done and reported as failed",
    "done and reported as failed",
    "stalls",
    "the process dies before it",
    "the process dies after it",
    "the power goes before it",
    "the power goes after it",
    "another process comes before it",
)
STRIKES = (LOST, KEPT, STALL, KILL, KILL_AFTER, POWER, POWER_AFTER)
MAX_CALLS = 8_000
"""Reads and writes of a seed. Beyond it something goes round in a circle."""
START_US = 1_700_175_600_000_000 - 20 * 60 * US_PER_SECOND
"""2023-11-16T22:40:00Z: an hour, and later a day, ends in most seeds."""

Result = TypeVar("Result")


class Violation(AssertionError):
    """What must never happen has happened."""


class Crash(BaseException):
    """The end of a process. No `except` of the library is meant to see it."""


@dataclass
class Process:
    """One life of a process. What a dead one still tries (in `finally`) has no effect."""

    name: str
    dead: bool = False


class SeededIds:
    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)

    def random(self, size: int) -> bytes:
        return self._rng.randbytes(size)


class World:
    """`now_us` is the machine's clock. `calm` is set once everything is mended."""

    def __init__(self, seed: int, say: Callable[[str], object] | None = None) -> None:
        self.seed = seed
        self.story, self.content, self._strikes, self.chance = (
            random.Random(f"{seed}/{name}") for name in ("story", "content", "strikes", "chance")
        )
        self.ids = SeededIds(f"{seed}/ids")
        self.us = START_US + self.story.randrange(15 * 60 * US_PER_SECOND)
        self.calm = False
        self.process = Process("nobody")
        self.lives = [self.process]
        self.faults = self.calls = 0
        self.writing = self.locked = 0
        """How many SQL transactions that write, and folders' locks, are held: others would wait for their end."""
        self.on_power: Callable[[], None] = lambda: None
        self.meanwhile: Callable[[], None] = lambda: None
        self.kinds = [kind for kind in STRIKES if self.story.random() < 0.6] or [KILL]
        self._gaps = {
            "strike": self.story.choice((8, 15, 30, 80)),
            "read": self.story.choice((15, 60, 200, 10**9)),
            "other": self.story.choice((3, 6, 12, 50)),
        }
        self._next = {name: self._gap(name) for name in self._gaps}
        self._trace = hashlib.blake2b(digest_size=16)
        self._say = say

    # The trace.

    def note(self, text: str) -> None:
        self._trace.update(text.encode() + b"\n")
        if self._say is not None:
            self._say(f"{self.us - START_US:>13,} µs  {self.process.name:<3} {text}")

    @property
    def trace(self) -> str:
        """The digest of everything that has happened."""
        return self._trace.hexdigest()

    # The clock: a Clock, and what moves it.

    def now_us(self) -> int:
        return self.us

    def pass_time(self, us: int) -> None:
        self.us += us

    # Processes.

    def born(self, name: str) -> Process:
        process = Process(name)
        self.lives.append(process)
        return process

    def require_life(self) -> None:
        if self.process.dead:
            raise Crash
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise Violation(f"{self.process.name} does not come to an end")

    def _die(self, *, power: bool) -> None:
        self.process.dead = True
        if power:
            for process in self.lives:
                process.dead = True
            self.on_power()
        raise Crash

    def cut_power(self) -> None:
        """Between two steps: nobody is at work."""
        for process in self.lives:
            process.dead = True
        self.on_power()

    # Writes and reads.

    def write(self, what: str, do: Callable[[], Result], error: Callable[[str], Exception]) -> Result:
        """`do` is the write's effect; `error(kind)` what a caller gets of one that failed."""
        self.require_life()
        kind = self._strike()
        if kind is None:
            self.note(what)
            return do()
        self.note(f"{what}: {kind}")
        if kind == MEANWHILE:
            self.meanwhile()
            self.require_life()  # the power may have gone
            return do()
        self.faults += 1
        if kind == STALL:
            self.pass_time(self._strikes.randrange(1, 90 * US_PER_SECOND))
        elif kind == LOST:
            raise error(kind)
        elif kind in (KILL, POWER):
            self._die(power=kind == POWER)
        result = do()
        if kind == KEPT:
            raise error(kind)
        if kind in (KILL_AFTER, POWER_AFTER):
            self._die(power=kind == POWER_AFTER)
        return result

    def _strike(self) -> str | None:
        if self._comes("strike"):
            return self._strikes.choice(self.kinds)
        return MEANWHILE if self._comes("other") and not (self.writing or self.locked) else None

    def _comes(self, name: str) -> bool:
        """Whether it is this kind of fault's turn."""
        if self.calm:
            return False
        self._next[name] -= 1
        if self._next[name] > 0:
            return False
        self._next[name] = self._gap(name)
        return True

    def _gap(self, name: str) -> int:
        return 1 + int(self._strikes.expovariate(1 / self._gaps[name]))

    def read(self, what: str, error: Callable[[str], Exception]) -> None:
        """Before a read: it may fail."""
        self.require_life()
        if self._comes("read"):
            self.faults += 1
            self.note(f"{what}: is not answered")
            raise error("is not answered")


def to_next_hour(us: int) -> int:
    return us - us % HOUR_US + HOUR_US
