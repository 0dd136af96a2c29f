"""GPU time of jobs that share devices: intervals in, integer nanoseconds out that add up to the busy time
exactly.

In each stretch of time between two boundaries, the k intervals active on a device get length // k each. The
rest, at most k - 1 ns, goes to the one that began last (then the greatest event key), so that no long job
collects the rests of all others. Intervals are first cut at window boundaries: the shares of a window add up
to that window's busy time too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from render_platform.clock import WINDOW_US
from render_platform.errors import RecordError

WINDOW_NS = WINDOW_US * 1_000
_INT64 = 2**63

_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """`event` (the caller's key, 63 bits) held `device` in [start_ns, end_ns), nanoseconds since 1970 or
    any zero.
    """

    device: str
    event: int
    start_ns: int
    end_ns: int

    def __post_init__(self) -> None:
        """RecordError where the interval ends before it begins, or a number does not fit 63 bits."""
        if self.end_ns < self.start_ns:
            raise RecordError("end_ns", f"{self.end_ns} is before start_ns {self.start_ns}")
        if self.start_ns < 0 or self.end_ns >= _INT64:
            raise RecordError("start_ns", "start and end must be at least 0 and below 2^63 ns")
        if not 0 <= self.event < _INT64:
            raise RecordError("event", f"{self.event} must be at least 0 and below 2^63")


@dataclass(frozen=True, slots=True)
class Slice:
    """What `event` is charged for its interval on `device` within one window: 0 ≤ gpu_time_ns ≤ end_ns -
    start_ns.
    """

    device: str
    event: int
    start_ns: int
    end_ns: int
    gpu_time_ns: int


def slices(intervals: Iterable[Interval], window_ns: int = WINDOW_NS) -> list[Slice]:
    """Each interval, cut at multiples of `window_ns`, with its share. A pure function of the set of
    intervals.

    For each device and window the shares add up to the busy time exactly. Zero-length intervals have no
    slice.
    """
    return [
        Slice(piece.device, piece.event, piece.start_ns, piece.end_ns, share)
        for pieces in _by_device(intervals, window_ns)
        for piece, share in zip(pieces, _shares(pieces), strict=True)
    ]


def attribute(intervals: Iterable[Interval], window_ns: int = WINDOW_NS) -> dict[int, int]:
    """The GPU time in ns of each event, over all its devices: the sum of its `slices`. O(n log n).

    Every event of `intervals` has an entry, 0 where its intervals have no length. Events that overlap
    themselves on a device are counted as that many jobs.
    """
    kept = list(intervals)
    total = dict.fromkeys((interval.event for interval in kept), 0)
    for pieces in _by_device(kept, window_ns):
        for piece, share in zip(pieces, _shares(pieces), strict=True):
            total[piece.event] += share
    return total


def busy_ns(intervals: Iterable[Interval]) -> dict[str, int]:
    """How long each device was held by anything at all (the union of its intervals), in ns."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for interval in intervals:
        spans[interval.device].append((interval.start_ns, interval.end_ns))
    busy = dict.fromkeys(spans, 0)
    for device, pairs in spans.items():
        reached = 0
        for start, end in sorted(pairs):
            busy[device] += max(0, end - max(start, reached))
            reached = max(reached, end)
    return busy


def _by_device(intervals: Iterable[Interval], window_ns: int) -> list[list[Interval]]:
    """The cut intervals of each device, devices by name, intervals by (start, event, end)."""
    if window_ns <= 0:
        raise RecordError("window_ns", f"{window_ns} is not a length of time")
    devices: dict[str, list[Interval]] = defaultdict(list)
    for interval in intervals:
        devices[interval.device].extend(_cut(interval, window_ns))
    for pieces in devices.values():
        pieces.sort(key=lambda piece: (piece.start_ns, piece.event, piece.end_ns))
    return [devices[name] for name in sorted(devices)]


def _cut(interval: Interval, window_ns: int) -> Iterator[Interval]:
    start, end = interval.start_ns, interval.end_ns
    if start < end <= start - start % window_ns + window_ns:
        yield interval
        return
    while start < end:
        stop = min(end, start - start % window_ns + window_ns)
        yield Interval(interval.device, interval.event, start, stop)
        start = stop


def _shares(pieces: Sequence[Interval]) -> list[int]:
    """The share of each piece of one device; `pieces` have a length and are sorted by (start, event, end).

    A share is a difference of prefix sums, which stay below 2^63 because they never pass the time that they
    cover.
    """
    starts = np.fromiter((piece.start_ns for piece in pieces), np.int64, len(pieces))
    ends = np.fromiter((piece.end_ns for piece in pieces), np.int64, len(pieces))
    times = np.unique(np.concatenate([starts, ends]))
    first, last = np.searchsorted(times, starts), np.searchsorted(times, ends)
    changes = np.bincount(first, minlength=len(times)) - np.bincount(last, minlength=len(times))
    active = np.cumsum(changes)[:-1]
    each, rest = np.divmod(np.diff(times), np.maximum(active, 1))
    prefix = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.where(active > 0, each, 0))])
    shares = prefix[last] - prefix[first]
    np.add.at(shares, _began_last(first, last, active), rest[active > 0])
    return [int(share) for share in shares.tolist()]


def _began_last(first: _Ints, last: _Ints, active: _Ints) -> list[int]:
    """For each busy stretch of time, in order, the index of the active interval that began last."""
    begins, ends = first.tolist(), last.tolist()
    stack: list[int] = []
    owners: list[int] = []
    following = 0
    for stretch in np.flatnonzero(active > 0).tolist():
        while following < len(begins) and begins[following] <= stretch:
            stack.append(following)
            following += 1
        while ends[stack[-1]] <= stretch:
            stack.pop()
        owners.append(stack[-1])
    return owners


def conservation(table: pa.Table) -> list[str]:
    """What is wrong in a table of EVENT_SCHEMA; nothing, if each device's GPU ns are at most its busy ns.

    Holds for any subset of a device's events: at each instant the shares of those that run add up to at most one.
    Events of several GPUs name one device only and are bounded one by one, by wall time × gpu_count. What others report
    is theirs to answer for (`meter` external): one reporter's devices must not hold up everyone's bills.
    """
    ours = pc.and_(pc.equal(table.column("gpu_count"), 1), pc.not_equal(table.column("meter"), "external"))
    single = table.filter(ours)
    starts = single.column("gpu_started_at").cast(pa.int64()).to_pylist()
    ends = single.column("event_time").cast(pa.int64()).to_pylist()
    devices = single.column("device_uuid").to_pylist()
    billed: dict[str, int] = defaultdict(int)
    intervals = []
    for number, (device, start, end, gpu_time_ns) in enumerate(
        zip(devices, starts, ends, single.column("gpu_time_ns").to_pylist(), strict=True)
    ):
        name = device or "a device without a name"
        intervals.append(Interval(name, number, start * 1_000, end * 1_000))
        billed[name] += gpu_time_ns
    busy = busy_ns(intervals)
    return [
        f"{name} was billed {billed[name]} ns and was busy for {busy[name]} ns"
        for name in sorted(billed)
        if billed[name] > busy[name]
    ]
