"""Shared-device attribution, against a slow oracle that walks every stretch of time."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.errors import RecordError
from render_platform.metering import WINDOW_NS, Interval, attribute, busy_ns, slices


def _interval(device: int, event: int, start: int, length: int) -> Interval:
    return Interval(f"GPU-{device}", event, start, start + length)


_any_length = st.one_of(st.integers(0, 12), st.integers(0, 3_000))
INTERVALS = st.lists(
    st.builds(_interval, st.integers(0, 2), st.integers(0, 12), st.integers(0, 40), _any_length), max_size=25
)


def oracle(intervals: list[Interval], window_ns: int) -> tuple[dict[int, int], dict[int, Fraction], int]:
    """Per event: exact ns by the documented rule, and its ideal share; and the number of stretches."""
    exact: dict[int, int] = {interval.event: 0 for interval in intervals}
    ideal: dict[int, Fraction] = {event: Fraction(0) for event in exact}
    stretches = 0
    for device in {interval.device for interval in intervals}:
        mine = [i for i in intervals if i.device == device and i.start_ns < i.end_ns]
        cuts = {t for i in mine for t in range(0, i.end_ns, window_ns) if i.start_ns < t}
        edges = sorted(cuts | {i.start_ns for i in mine} | {i.end_ns for i in mine})
        for begin, end in pairwise(edges):
            active = [i for i in mine if i.start_ns <= begin and end <= i.end_ns]
            stretches += 1
            for i in active:
                exact[i.event] += (end - begin) // len(active)
                ideal[i.event] += Fraction(end - begin, len(active))
            if active:
                cut_start = begin - begin % window_ns
                last = max(active, key=lambda i: (max(i.start_ns, cut_start), i.event, i.end_ns))
                exact[last.event] += (end - begin) % len(active)
    return exact, ideal, stretches


@given(INTERVALS, st.sampled_from([7, 100, 10_000]))
def test_attribution_equals_the_oracle_and_is_near_the_ideal_share(intervals: list[Interval], window_ns: int) -> None:
    exact, ideal, stretches = oracle(intervals, window_ns)
    got = attribute(intervals, window_ns)
    assert got == exact
    for event, ns in got.items():
        assert abs(ns - ideal[event]) <= stretches * len(intervals)


@given(INTERVALS, st.sampled_from([7, 100, WINDOW_NS]))
def test_time_is_conserved_on_each_device_and_in_each_window(intervals: list[Interval], window_ns: int) -> None:
    by_device: dict[str, int] = dict.fromkeys(busy_ns(intervals), 0)
    by_window: dict[tuple[str, int], int] = defaultdict(int)
    for part in slices(intervals, window_ns):
        assert part.start_ns // window_ns == (part.end_ns - 1) // window_ns
        assert 0 <= part.gpu_time_ns <= part.end_ns - part.start_ns
        by_device[part.device] += part.gpu_time_ns
        by_window[part.device, part.start_ns // window_ns] += part.gpu_time_ns
    assert by_device == busy_ns(intervals)
    assert all(total <= window_ns for total in by_window.values())
    assert sum(attribute(intervals, window_ns).values()) == sum(by_device.values())


@given(INTERVALS, st.randoms(use_true_random=False))
def test_the_order_of_the_intervals_changes_nothing(intervals: list[Interval], rng: random.Random) -> None:
    shuffled = list(intervals)
    rng.shuffle(shuffled)
    assert attribute(shuffled) == attribute(intervals)
    assert slices(shuffled, 50) == slices(intervals, 50)


@given(INTERVALS)
def test_busy_time_is_the_union_of_the_intervals(intervals: list[Interval]) -> None:
    instants: dict[str, set[int]] = {interval.device: set() for interval in intervals}
    for interval in intervals:
        instants[interval.device].update(range(interval.start_ns, interval.end_ns))
    assert busy_ns(intervals) == {device: len(held) for device, held in instants.items()}


def test_a_batch_of_eight_is_not_billed_eight_times() -> None:
    batch = [Interval("GPU-0", event, 1_000, 9_003) for event in range(8)]
    assert attribute(batch) == {**dict.fromkeys(range(7), 1_000), 7: 1_003}


def test_equal_intervals_get_equal_shares_within_the_remainder_of_each_stretch() -> None:
    same = [Interval("GPU-0", event, 0, 1_000_003) for event in range(10)]
    shares = list(attribute(same).values())
    assert max(shares) - min(shares) < 10
    assert sum(shares) == 1_000_003


def test_one_event_on_two_devices_is_charged_for_both() -> None:
    assert attribute([Interval("GPU-0", 1, 0, 10), Interval("GPU-1", 1, 5, 25)]) == {1: 30}


def test_zero_length_intervals_get_nothing_and_change_nothing() -> None:
    busy = [Interval("GPU-0", 1, 0, 10), Interval("GPU-0", 2, 0, 10)]
    points = [Interval("GPU-0", 3, 3, 3), Interval("GPU-9", 4, 0, 0), Interval("GPU-0", 5, 10, 10)]
    assert attribute(busy + points) == {**attribute(busy), 3: 0, 4: 0, 5: 0}
    assert attribute([]) == {}
    assert busy_ns(points) == {"GPU-0": 0, "GPU-9": 0}


def test_present_day_nanoseconds_do_not_overflow() -> None:
    now = 1_763_000_000_000_000_000
    many = [Interval("GPU-0", event, now + event, now + WINDOW_NS * 3) for event in range(200)]
    assert sum(attribute(many).values()) == busy_ns(many)["GPU-0"] == WINDOW_NS * 3


@pytest.mark.parametrize(("event", "start", "end"), [(1, 5, 4), (1, -1, 4), (1, 0, 2**63), (-1, 0, 1), (2**63, 0, 1)])
def test_an_impossible_interval_is_refused(event: int, start: int, end: int) -> None:
    with pytest.raises(RecordError):
        Interval("GPU-0", event, start, end)


def test_a_window_without_length_is_refused() -> None:
    with pytest.raises(RecordError):
        attribute([Interval("GPU-0", 1, 0, 1)], 0)


def test_twenty_thousand_intervals_take_less_than_two_seconds() -> None:
    rng = random.Random(5)
    starts = [rng.randrange(10**12) for _ in range(20_000)]
    length = 16 * 10**12 // 20_000
    intervals = [Interval("GPU-0", event, start, start + length) for event, start in enumerate(starts)]
    began = time.perf_counter()
    shares = attribute(intervals)
    assert time.perf_counter() - began < 2
    assert sum(shares.values()) == busy_ns(intervals)["GPU-0"]
