"""GPU time of jobs that share one device, shared out while others still run: each end gives its job's final ns.

`metering.attribute` knows all intervals. Here a job is billed when it ends, and those that still run are *possible*
holders only: some backends report the true intervals at the end. Time is cut into stretches. In each stretch that an
ending job held, it is charged an equal share among the jobs charged there before, itself, and those that may yet come:
never more, up to 1 ns a stretch, than its equal share among the jobs that truly held it.

- Each ns is charged at most once, and only to jobs that held the device then: the shares of *any* set of jobs are
  together at most the union of their spans. So no window of time is ever charged more than it is long.
- With wall-clock meters ([begin, end) of each job) the shares add up to the busy time exactly, remainders included.
- What a possible holder did not claim after others had been charged less for its sake stays unattributed.

One ledger a billing unit: for a job on `gpu_count` devices the caller multiplies. Not thread-safe; no I/O.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from render_platform.errors import RecordError

MOST_STRETCHES = 2_048
"""Stretches kept apart, some 400 kB; beyond them the oldest are settled early (see `DeviceLedger.end`)."""

_START = attrgetter("start")


@dataclass(slots=True)
class _Stretch:
    """[start, end) ns; `left` ns of it are not charged yet; `claims` jobs were charged."""

    start: int
    end: int
    left: int
    claims: int = 0


class DeviceLedger:
    """Who is charged for the time of one device. Times are ns of one clock; one that goes back stands still here.

    `slots` is the most jobs that can hold the device at one instant (instances × batch size, parallel sequences), where
    the backend says so: requests that wait in the backend then take nothing from those it works on. None: unknown, and
    every job that runs may hold it.
    """

    def __init__(self, slots: int | None = None, most_stretches: int = MOST_STRETCHES) -> None:
        """RecordError where a number is below 1."""
        if most_stretches < 1 or (slots is not None and slots < 1):
            raise RecordError("slots", "slots and most_stretches must be at least 1")
        self.busy_ns = 0
        """The union of the true spans of the jobs that have ended, and all time that was settled early."""
        self.attributed_ns = 0
        self._slots = slots
        self._most_stretches = most_stretches
        self._now = 0
        self._begins: dict[int, int] = {}  # of the running jobs; times never go back, so in their order
        self._settled: dict[int, int] = {}  # ns put by for running jobs, of stretches that are gone
        self._stretches: list[_Stretch] = []  # without gaps, from the begin of the oldest running job to _now

    @property
    def unattributed_ns(self) -> int:
        """Busy time that nobody is charged for; while jobs run, they may still claim some of it."""
        return self.busy_ns - self.attributed_ns

    @property
    def running(self) -> int:
        return len(self._begins)

    def begin(self, key: int, at_ns: int) -> None:
        """From now on the job may hold the device. RecordError where `key` runs already."""
        if key in self._begins:
            raise RecordError("key", f"{key} runs on this device already")
        self._advance(at_ns)
        self._begins[key] = self._now

    def end(self, key: int, spans: Iterable[tuple[int, int]], at_ns: int) -> int:
        """The job's GPU time in ns: final. `spans` are the (start, end) that it truly held the device, none for never.

        They are clipped to the job's [begin, at] and united; one that ends before it begins is empty. RecordError where
        `key` does not run. O(boundaries since the job's begin), at most `most_stretches` of them: what is older has
        been settled as though all jobs that ran then held the device, and a job forfeits of it what it did not hold.
        """
        if key not in self._begins:
            raise RecordError("key", f"{key} does not run on this device")
        self._advance(at_ns)
        begin = self._begins[key]
        held = _union(spans, begin, self._now)
        charged = self._claim(held) + self._settle_up(key, begin, held)
        del self._begins[key]
        self.attributed_ns += charged
        self._forget()
        self._bound()
        return charged

    def abandon(self, key: int, at_ns: int) -> None:
        """The job ended and never held the device."""
        self.end(key, (), at_ns)

    def _advance(self, at_ns: int) -> None:
        if at_ns > self._now:
            if self._begins:
                self._stretches.append(_Stretch(self._now, at_ns, at_ns - self._now))
            self._now = at_ns

    def _claim(self, held: list[tuple[int, int]]) -> int:
        """Charge the stretches inside `held` to a job that runs still; gives the ns."""
        begins = list(self._begins.values())
        charged = candidates = 0
        for start, end in held:
            first, last = self._cut(start), self._cut(end)
            for stretch in islice(self._stretches, first, last):
                while candidates < len(begins) and begins[candidates] <= stretch.start:
                    candidates += 1
                if not stretch.claims:
                    self.busy_ns += stretch.end - stretch.start
                charged += self._charge(stretch, candidates)
        return charged

    def _charge(self, stretch: _Stretch, candidates: int) -> int:
        """Charge one of the `candidates`, jobs that run and ran in this stretch; gives the ns."""
        if self._slots is not None:
            candidates = max(1, min(candidates, self._slots - stretch.claims))
        equal_share = -((stretch.start - stretch.end) // (stretch.claims + candidates))  # rounded up
        charged = min(stretch.left // candidates, equal_share)
        stretch.left -= charged
        stretch.claims += 1
        return charged

    def _cut(self, at_ns: int) -> int:
        """The index of the first stretch that begins at `at_ns` or later; one that holds it inside is cut in two.

        Both parts keep their claims. What was charged is divided by length, so neither is charged more than its length.
        """
        index = bisect_left(self._stretches, at_ns, key=_START)
        if index and at_ns < self._stretches[index - 1].end:
            whole = self._stretches[index - 1]
            length, first = whole.end - whole.start, at_ns - whole.start
            left = first - (length - whole.left) * first // length
            self._stretches.insert(index, _Stretch(at_ns, whole.end, whole.left - left, whole.claims))
            whole.end, whole.left = at_ns, left
        return index

    def _forget(self) -> None:
        """Drop what nobody that runs can claim."""
        oldest = next(iter(self._begins.values()), self._now)
        del self._stretches[: bisect_left(self._stretches, oldest, key=_START)]

    def _bound(self) -> None:
        """Where there are too many stretches, settle the oldest: charge each to all jobs that ran then, and put it by.

        That each ns is charged at most once stays true, whatever those jobs turn out to have held.
        """
        if len(self._stretches) <= self._most_stretches:
            return
        settled = self._stretches[: len(self._stretches) - self._most_stretches // 2]
        del self._stretches[: len(settled)]
        for stretch in settled:
            if not stretch.claims:
                self.busy_ns += stretch.end - stretch.start
            candidates = [key for key, begin in self._begins.items() if begin <= stretch.start]
            for waiting, key in enumerate(candidates):
                charged = self._charge(stretch, len(candidates) - waiting)
                self._settled[key] = self._settled.get(key, 0) + charged

    def _settle_up(self, key: int, begin: int, held: list[tuple[int, int]]) -> int:
        """What was put by for the job, less what it did not hold of that time: all of it may lie there."""
        horizon = self._stretches[0].start if self._stretches else self._now
        missed = horizon - begin - sum(max(0, min(end, horizon) - start) for start, end in held)
        return max(0, self._settled.pop(key, 0) - max(0, missed))


def _union(spans: Iterable[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The spans inside [begin, end], sorted, without length 0 and without overlap."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted((max(start, begin), min(stop, end)) for start, stop in spans):
        if start >= stop:
            continue
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return united
