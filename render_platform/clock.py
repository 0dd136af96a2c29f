"""Time and ids, injected everywhere: nothing else in the library asks the machine for either."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Protocol

US_PER_SECOND = 1_000_000
WINDOW_US = 300 * US_PER_SECOND
HOUR_US = 3_600 * US_PER_SECOND
DAY_US = 24 * HOUR_US


class Clock(Protocol):
    def now_us(self) -> int:
        """Microseconds since 1970-01-01 UTC."""


class SystemClock:
    def now_us(self) -> int:
        return time.time_ns() // 1_000


@dataclass
class ManualClock:
    """A clock that stands still until it is moved; it never goes back."""

    us: int

    def now_us(self) -> int:
        return self.us

    def move_to(self, us: int) -> None:
        self.us = max(self.us, us)


class Ids(Protocol):
    def random(self, size: int) -> bytes: ...


class SystemIds:
    """The machine's randomness, fetched ahead in one call for many ids: a call costs more than its bytes do.

    For any number of threads. Not for a process that forks and goes on in both: they would draw the same bytes.
    """

    _AHEAD = 4_096

    def __init__(self) -> None:
        self._bytes = b""
        self._at = 0
        self._lock = threading.Lock()

    def random(self, size: int) -> bytes:
        if size > self._AHEAD:
            return os.urandom(size)
        with self._lock:
            if self._at + size > len(self._bytes):
                self._bytes, self._at = os.urandom(self._AHEAD), 0
            self._at += size
            return self._bytes[self._at - size : self._at]


def random_below(ids: Ids, bound: int) -> int:
    """0 … bound - 1; as good as even for bounds far below 2^64."""
    return int.from_bytes(ids.random(8), "big") % bound


def uuid7(us: int, ids: Ids) -> uuid.UUID:
    """A UUIDv7 (RFC 9562) of the millisecond that holds `us`."""
    return uuid7_from_random(us, ids.random(10))


def uuid7_from_random(us: int, random: bytes) -> uuid.UUID:
    """A UUIDv7 of the millisecond that holds `us` and of ten random bytes."""
    value = int.from_bytes((us // 1_000).to_bytes(6, "big") + random, "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    return uuid.UUID(int=value & ~(0x3 << 62) | (0x2 << 62))


def hour_of(us: int) -> int:
    return us - us % HOUR_US


def hours_between(start_us: int, end_us: int) -> Iterator[int]:
    """The begin of each hour that overlaps [start, end)."""
    yield from range(hour_of(start_us), end_us, HOUR_US)


def time_us(text: str) -> int:
    """The inverse of `iso`, for times in whole seconds or finer. ValueError where `text` is no time in UTC."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def iso(us: int) -> str:
    """`2023-11-16T18:15:46Z`; with microseconds only where there are any."""
    seconds, rest = divmod(us, US_PER_SECOND)
    text = _second(seconds)
    return f"{text}.{rest:06d}Z" if rest else f"{text}Z"


@lru_cache(64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def unless_silent(work: Generator[Any, Any, Any], most_s: float) -> Generator[Any, Any, Any]:
    """Work that asks its driver to wait, by `yield`, and is told what is ready: TimeoutError where nothing has been for
    `most_s`."""
    until_s, ready = time.monotonic() + most_s, None
    try:
        while True:
            ready = yield work.send(ready)
            if ready:
                until_s = time.monotonic() + most_s
            elif time.monotonic() > until_s:
                raise TimeoutError
    except StopIteration as ended:
        return ended.value
