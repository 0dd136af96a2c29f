"""The live ledger of a device, against `metering` and against an oracle that walks every instant in fractions.

Jobs come and go in any order, on a clock that may stand still; each has the spans that its backend reports at its end.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.errors import RecordError
from render_platform.gateway.ledger import DeviceLedger
from render_platform.metering import Interval, attribute, busy_ns

UNIT = 1_000_003
"""Times are drawn in units of this many ns, a prime: shares have remainders, and are large against them."""
NOW = 1_763_000_000_000_000_000

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Job:
    """In units: runs in [begin, end]; `spans` as reported, in any order, overlapping, outside, or inverted."""

    key: int
    begin: int
    end: int
    spans: tuple[tuple[int, int], ...]

    def instants(self) -> set[int]:
        """The units of time in which it truly held the device."""
        return {t for a, b in self.spans for t in range(max(a, self.begin), min(b, self.end))}

    def scaled(self) -> Spans:
        return [(a * UNIT, b * UNIT) for a, b in self.spans]


def _ascending(span: tuple[int, int]) -> tuple[int, int]:
    return min(span), max(span)


@st.composite
def schedules(draw: st.DrawFn, most: int = 7, wall_clock: bool = False) -> list[Job]:
    jobs = []
    for key in range(draw(st.integers(1, most))):
        begin = draw(st.integers(0, 12))
        end = begin + draw(st.integers(0, 25))
        edge = st.integers(begin - 3, end + 3)
        span = st.one_of(st.just((begin, end)), st.tuples(edge, edge).map(_ascending), st.tuples(edge, edge))
        spans = [(begin, end)] if wall_clock else draw(st.lists(span, max_size=3))
        jobs.append(Job(key, begin, end, tuple(spans)))
    return draw(st.permutations(jobs))


def steps(jobs: Sequence[Job]) -> list[tuple[int, int, int, Job]]:
    """(time, place among what happens at once, 0 for begin and 1 for end, job), in order."""
    both = [(job.begin, place, 0, job) for place, job in enumerate(jobs)]
    both += [(job.end, place, 1, job) for place, job in enumerate(jobs)]
    return sorted(both, key=lambda step: step[:3])


def play(ledger: DeviceLedger, jobs: Sequence[Job]) -> dict[int, int]:
    """The final ns of each job."""
    charged = {}
    for at, _, ends, job in steps(jobs):
        if ends:
            charged[job.key] = ledger.end(job.key, job.scaled(), at * UNIT)
        else:
            ledger.begin(job.key, at * UNIT)
    return charged


def held(jobs: Sequence[Job]) -> int:
    """The union of the true spans, in ns."""
    return UNIT * len(set[int]().union(*(job.instants() for job in jobs)))


def as_intervals(jobs: Sequence[Job]) -> list[Interval]:
    """The true holdings, instant by instant, as `metering` takes them."""
    return [Interval("GPU-0", job.key, t * UNIT, (t + 1) * UNIT) for job in jobs for t in job.instants()]


def oracle(jobs: Sequence[Job], slots: int | None) -> dict[int, Fraction]:
    """The rule, instant by instant: 1 / (those charged there before + those that may yet be, itself among them)."""
    running: set[Job] = set()
    charged_at: dict[int, int] = {}
    shares = {}
    for _, _, ends, job in steps(jobs):
        if not ends:
            running.add(job)
            continue
        total = Fraction(0)
        for t in job.instants():
            before = charged_at.get(t, 0)
            possible = sum(other.begin <= t for other in running)
            if slots is not None:
                possible = max(1, min(possible, slots - before))
            total += Fraction(1, before + possible) if slots is None or before < slots else 0
            charged_at[t] = before + 1
        shares[job.key] = total * UNIT
        running.remove(job)
    return shares


def rounding(jobs: Sequence[Job]) -> int:
    """What rounding can come to: each of the edges cuts one stretch, and each job rounds once in it."""
    edges = {edge for job in jobs for span in job.spans for edge in span} | {e for j in jobs for e in (j.begin, j.end)}
    return len(edges) * len(jobs)


@given(schedules(most=12, wall_clock=True), st.sampled_from([1, 2, 3, 5, 2_048]))
def test_wall_clock_shares_add_up_to_the_busy_time_exactly_and_are_equal_shares(jobs: list[Job], keep: int) -> None:
    ledger = DeviceLedger(most_stretches=keep)
    charged = play(ledger, jobs)
    intervals = [Interval("GPU-0", job.key, job.begin * UNIT, job.end * UNIT) for job in jobs]
    assert sum(charged.values()) == ledger.attributed_ns == ledger.busy_ns == busy_ns(intervals)["GPU-0"]
    assert ledger.unattributed_ns == ledger.running == 0
    for key, share in attribute(intervals).items():
        assert abs(charged[key] - share) <= rounding(jobs)


@given(schedules(), st.sampled_from([None, 1, 2, 4]), st.sampled_from([1, 2, 4, 2_048]))
def test_no_set_of_jobs_is_charged_more_than_the_union_of_its_spans(
    jobs: list[Job], slots: int | None, keep: int
) -> None:
    """By Hall's theorem each ns can then be given to at most one of its holders so that all shares come out.

    So every window of time, of 300 s or any other length, holds at most its own length of charges.
    """
    charged = play(DeviceLedger(slots, keep), jobs)
    for size in range(1, len(jobs) + 1):
        for some in combinations(jobs, size):
            assert sum(charged[job.key] for job in some) <= held(some)
    assert min(charged.values()) >= 0


@given(schedules(), st.sampled_from([None, 1, 3]))
def test_what_is_not_attributed_is_counted(jobs: list[Job], slots: int | None) -> None:
    ledger = DeviceLedger(slots)
    charged = play(ledger, jobs)
    assert ledger.busy_ns == held(jobs)
    assert ledger.attributed_ns == sum(charged.values())
    assert ledger.busy_ns == ledger.attributed_ns + ledger.unattributed_ns
    assert ledger.unattributed_ns >= 0


@given(schedules(), st.sampled_from([1, 2, 4]))
def test_time_settled_early_is_busy_time(jobs: list[Job], keep: int) -> None:
    ledger = DeviceLedger(most_stretches=keep)
    play(ledger, jobs)
    span = UNIT * (max(job.end for job in jobs) - min(job.begin for job in jobs))
    assert ledger.attributed_ns <= held(jobs) <= ledger.busy_ns <= span


@given(schedules(), st.sampled_from([None, 1, 2, 4]))
def test_shares_are_those_of_the_oracle(jobs: list[Job], slots: int | None) -> None:
    charged = play(DeviceLedger(slots), jobs)
    for key, share in oracle(jobs, slots).items():
        assert abs(charged[key] - share) <= rounding(jobs)


@given(schedules())
def test_nobody_pays_more_than_an_equal_share_among_those_that_held_the_device(jobs: list[Job]) -> None:
    fair = attribute(as_intervals(jobs))
    for key, ns in play(DeviceLedger(), jobs).items():
        assert ns <= fair.get(key, 0) + 2 * rounding(jobs)


def test_a_batch_of_eight_is_not_billed_eight_times() -> None:
    ledger = DeviceLedger()
    for key in range(8):
        ledger.begin(key, 1_000)
    assert [ledger.end(key, [(1_000, 9_003)], 9_003) for key in range(8)] == [1_000] * 5 + [1_001] * 3


def test_a_job_that_may_have_held_the_device_keeps_its_part_until_it_says_that_it_did_not() -> None:
    ledger = DeviceLedger()
    for key in range(3):
        ledger.begin(key, 0)
    assert ledger.end(0, [(0, 600)], 600) == 200
    assert (ledger.busy_ns, ledger.unattributed_ns, ledger.running) == (600, 400, 2)
    ledger.abandon(1, 600)
    assert ledger.end(2, [(0, 600)], 600) == 300
    assert (ledger.busy_ns, ledger.attributed_ns, ledger.unattributed_ns) == (600, 500, 100)


def test_jobs_that_wait_behind_the_slots_of_a_backend_take_nothing_from_those_it_works_on() -> None:
    ledger = DeviceLedger(slots=1)
    for key in range(16):
        ledger.begin(key, 0)
    spans = [(key * 100, key * 100 + 100) for key in range(16)]
    assert [ledger.end(key, [span], span[1]) for key, span in enumerate(spans)] == [100] * 16
    assert ledger.unattributed_ns == 0


def test_spans_are_clipped_to_the_job_and_united() -> None:
    ledger = DeviceLedger()
    ledger.begin(1, 100)
    assert ledger.end(1, [(150, 160), (0, 120), (155, 170), (190, 180), (195, 10**30)], 200) == 20 + 20 + 5


def test_a_job_without_spans_and_one_that_never_held_the_device_cost_nothing() -> None:
    ledger = DeviceLedger()
    ledger.begin(1, 0)
    ledger.begin(2, 0)
    ledger.abandon(2, 50)
    assert ledger.end(1, [], 100) == 0
    assert (ledger.busy_ns, ledger.attributed_ns) == (0, 0)


def test_a_clock_that_goes_back_stands_still() -> None:
    ledger = DeviceLedger()
    ledger.begin(1, 1_000)
    ledger.begin(2, 400)
    assert ledger.end(2, [(400, 1_000)], 900) == 0
    assert ledger.end(1, [(900, 1_200)], 1_200) == 200
    assert ledger.busy_ns == 200


def _begin_twice(ledger: DeviceLedger) -> None:
    ledger.begin(1, 0)


def _end_unknown(ledger: DeviceLedger) -> None:
    ledger.end(2, [], 5)


def _end_twice(ledger: DeviceLedger) -> None:
    ledger.end(1, [(0, 5)], 5)
    ledger.end(1, [(0, 5)], 5)


@pytest.mark.parametrize("misuse", [_begin_twice, _end_unknown, _end_twice])
def test_a_job_begins_once_and_ends_once(misuse: Callable[[DeviceLedger], None]) -> None:
    ledger = DeviceLedger()
    ledger.begin(1, 0)
    with pytest.raises(RecordError):
        misuse(ledger)
    assert ledger.attributed_ns <= 5


@pytest.mark.parametrize(("slots", "keep"), [(0, 1), (-1, 1), (None, 0)])
def test_a_ledger_without_room_is_refused(slots: int | None, keep: int) -> None:
    with pytest.raises(RecordError):
        DeviceLedger(slots, keep)


def test_a_job_that_runs_for_a_day_is_charged_exactly_and_takes_no_more_memory_or_time() -> None:
    ledger = DeviceLedger()
    ledger.begin(-1, NOW)
    total, at = 0, NOW
    tracemalloc.start()
    for key in range(30_000):
        ledger.begin(key, at)
        at += 2_000_000_000 + key
        total += ledger.end(key, [(0, at)], at)
        at += 880_000_000
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    tracemalloc.stop()
    began = time.process_time()
    total += ledger.end(-1, [(0, at)], at)
    assert time.process_time() - began < 0.1
    assert ledger.attributed_ns == total == ledger.busy_ns == at - NOW


def test_what_a_long_job_did_not_hold_later_costs_it_nothing_of_what_was_settled_early() -> None:
    ledger = DeviceLedger(most_stretches=1)
    ledger.begin(-1, 0)
    others = 0
    for at in range(0, 100, 10):
        ledger.begin(at, at)
        others += ledger.end(at, [(at, at + 10)], at + 10)
    assert others == 50
    assert ledger.end(-1, [(0, 100), (150, 160), (190, 200)], 200) == 50 + 10 + 10
    assert ledger.busy_ns == ledger.attributed_ns == 120


def test_time_that_nobody_held_is_never_busy_however_many_jobs_were_abandoned() -> None:
    ledger = DeviceLedger()
    ledger.begin(-1, 0)
    for key in range(3_000):
        ledger.begin(key, 10 * key)
        ledger.abandon(key - 1, 10 * key + 5)
    assert ledger.busy_ns == ledger.attributed_ns == 0


def test_twenty_thousand_ends_at_sixteen_at_once_take_less_than_two_seconds(rng: random.Random) -> None:
    ledger = DeviceLedger()
    running: dict[int, int] = {}
    at, began = NOW, time.process_time()
    for key in range(20_000):
        at += rng.randrange(100_000)
        ledger.begin(key, at)
        running[key] = at
        if len(running) == 16:
            at += rng.randrange(100_000)
            ended = rng.choice(list(running))
            ledger.end(ended, [(running.pop(ended), at)], at)
    assert time.process_time() - began < 2
    for key, begin in running.items():
        ledger.end(key, [(begin, at)], at)
    assert ledger.busy_ns == ledger.attributed_ns
