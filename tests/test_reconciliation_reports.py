"""More of test_reconciliation.py: reconciliation reports."""

from __future__ import annotations

import json
import random
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, permutations
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import canonical
from render_platform.clock import WINDOW_US
from render_platform.events import UsageEvent
from render_platform.reconciliation import (
    CAUSES,
    MAX_LISTED,
    PRECEDENCE,
    KeyFigures,
    compare,
    diff_rows,
    judge,
    unavailable_report,
    worst,
)
from tests import checksums, factories
from tests.stories import HOUR, Key, key_of, keyed_event
from tests.test_reconciliation import DIGEST, PPM, ids, reconciled, rollup, some, sums


def test_the_precedence_of_statuses() -> None:
    assert PRECEDENCE == ("discrepant", "unavailable", "pending", "reconciled")
    for n in (1, 2, 3, 4):
        for chosen in combinations_with_replacement(range(4), n):
            for order in set(permutations(chosen)):
                assert worst(PRECEDENCE[at] for at in order) == PRECEDENCE[min(chosen)]
    assert worst([]) == "pending"


def test_a_report_has_twelve_windows_and_the_worst_wins() -> None:
    good, bad = some(5, window=2), some(5, seed=1, window=7)
    report = reconciled([*good, *bad], good)
    assert [window.start_us for window in report.windows] == [HOUR + n * WINDOW_US for n in range(12)]
    assert [n for n, window in enumerate(report.windows) if window.status == "discrepant"] == [7]
    assert report.status == "discrepant"
    assert (report.windows[2].events, report.windows[7].events) == (5, 5)
    assert (report.windows[2].fast_events, report.windows[7].fast_events) == (5, 0)
    assert report.total("gpu_time_ns") == sum(event.gpu_time_ns for event in [*good, *bad])


def test_a_window_is_as_bad_as_its_worst_key() -> None:
    good, bad = some(5), some(5, seed=1, customer=2)
    report = reconciled([*good, *bad], [*good, *bad[1:]])
    assert (report.windows[0].keys, report.windows[0].status) == (2, "discrepant")
    assert [verdict.figures.key for verdict in report.findings] == [key_of(bad[0])]


@pytest.mark.parametrize("closed_windows", range(13))
def test_windows_that_are_not_closed_are_pending(closed_windows: int) -> None:
    for rest in {0, 1, WINDOW_US - 1} if closed_windows < 12 else {0}:
        report = reconciled([], [], closed=HOUR + closed_windows * WINDOW_US + rest)
        assert [window.status for window in report.windows] == (
            ["reconciled"] * closed_windows + ["pending"] * (12 - closed_windows)
        )
        assert report.status == ("reconciled" if closed_windows == 12 else "pending")
        assert report.final == (closed_windows == 12)


def test_a_discrepant_window_wins_over_pending_ones_and_is_not_final() -> None:
    made = some(5)
    report = reconciled(made, [], closed=HOUR + WINDOW_US)
    assert report.status == "discrepant"
    assert not report.final


@pytest.mark.parametrize("closed_windows", range(13))
def test_a_side_that_could_not_be_read_is_never_reconciled(closed_windows: int) -> None:
    report = unavailable_report(HOUR, 3, PPM, HOUR + closed_windows * WINDOW_US, "it is down")
    assert {window.status for window in report.windows} <= {"unavailable", "pending"}
    assert sum(window.status == "unavailable" for window in report.windows) == closed_windows
    assert report.status == ("unavailable" if closed_windows else "pending")
    assert not report.final
    assert "it is down" in report.summary()


def test_the_summary_counts_every_cause() -> None:
    made = some(6)
    report = reconciled(made, [made[0], made[0], *made[2:], *some(1, seed=4)])
    assert report.summary() == "2023-11-16T18h discrepant: 6 events, 1 missing, 1 duplicated, 1 unexpected"
    assert reconciled(made, made).summary() == "2023-11-16T18h reconciled: 6 events"


# Bytes.


def test_the_bytes_say_everything_and_no_time_of_writing() -> None:
    made = some(5)
    report = reconciled(made, made[1:])
    found = json.loads(report.to_bytes())
    assert canonical.decode(report.to_bytes()) == found
    assert list(found) == [
        "version",
        "hour",
        "revision",
        "threshold_ppm",
        "status",
        "batches",
        "windows",
        "findings",
    ]
    assert found["batches"] == [DIGEST]
    assert found["findings"][0]["counts"] == {"missing": 1, "duplicated": 0, "altered": 0, "unexpected": 0}
    assert found["findings"][0]["missing"] == ids(made[:1])
    assert found["findings"][0]["gpu_time_ns"] == sum(event.gpu_time_ns for event in made)
    assert reconciled(made, made[1:], revision=2).to_bytes() != report.to_bytes()


def test_lists_are_bounded_the_lowest_first_and_counts_exact() -> None:
    more = MAX_LISTED + 5
    key = (HOUR // WINDOW_US, factories.CUSTOMERS[0], "flux-1-dev")
    rows = checksums.row_values(some(1)).take(pa.array([0] * more))
    numbers = list(range(more))
    random.Random(1).shuffle(numbers)
    rows = rows.set_column(0, "event_id", pa.array([n.to_bytes(16, "big") for n in numbers], pa.binary(16)))
    diffs = diff_rows([rows], [], [key])
    assert diffs[key].count("missing") == more
    assert diffs[key].missing == tuple(str(uuid.UUID(int=n)) for n in range(MAX_LISTED))
    assert [diffs[key].count(cause) for cause in CAUSES[1:]] == [0, 0, 0]
    figures = KeyFigures(key, 2 * more, 1, more, 1, False, True)
    record = judge(figures, diffs[key], 499_999).record()
    assert record["status"] == "discrepant", "it is the count that decides, not the list"
    assert len(record["missing"]) == MAX_LISTED
    assert record["counts"] == {"missing": more, "duplicated": 0, "altered": 0, "unexpected": 0}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), shuffle=st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_of_rows(seed: int, shuffle: random.Random) -> None:
    slow, fast, _ = build(seed, 30, [(seed + n, kind) for n, kind in enumerate(FAULTS)])
    expected = reconciled(slow, fast).to_bytes()
    for rows in (slow, fast):
        shuffle.shuffle(rows)
    assert reconciled(slow, fast).to_bytes() == expected


# Random rows, random faults: what is found is what was done.

FAULTS = ("drop", "duplicate", "alter_ns", "swap_ns", "swap_ids", "alter_customer", "alter_model", "add")


@dataclass
class Expected:
    """Event ids by key and cause, as the faults were injected."""

    causes: dict[Key, dict[str, set[str]]] = field(default_factory=dict)

    def add(self, cause: str, key: Key, event: UsageEvent) -> None:
        self.causes.setdefault(key, {}).setdefault(cause, set()).add(str(event.event_id))

    def status(self, key: Key, events: int) -> str:
        found = self.causes.get(key, {})
        forgiven = found.keys() <= {"missing"} and 1_000 * len(found.get("missing", ())) <= events
        return "reconciled" if forgiven else "discrepant"


def build(seed: int, n: int, faults: Sequence[tuple[int, str]]) -> tuple[list[UsageEvent], list[UsageEvent], Expected]:
    """Slow rows, fast rows with faults, and what must be found. A row has one fault at most."""
    rng = random.Random(seed)
    slow = [keyed_event(rng, rng.randrange(2), rng.randrange(2), rng.randrange(2)) for _ in range(n)]
    fast: dict[int, list[UsageEvent]] = {at: [event] for at, event in enumerate(slow)}
    untouched, expected = list(range(n)), Expected()
    for number, kind in faults:
        choose = random.Random(f"fault {number}")  # never the sequence that made the rows
        if kind == "add":
            stranger = keyed_event(choose, choose.randrange(2), choose.randrange(3), choose.randrange(2))
            fast[len(fast)] = [stranger]
            expected.add("unexpected", key_of(stranger), stranger)
        elif kind in ("swap_ns", "swap_ids"):
            _swap(kind, choose, slow, fast, untouched, expected)
        elif untouched:
            at = untouched.pop(choose.randrange(len(untouched)))
            fast[at] = _faulty(kind, choose, slow[at], expected)
    return slow, [event for rows in fast.values() for event in rows], expected


def _faulty(kind: str, choose: random.Random, event: UsageEvent, expected: Expected) -> list[UsageEvent]:
    key = key_of(event)
    if kind == "drop":
        expected.add("missing", key, event)
        return []
    if kind == "duplicate":
        expected.add("duplicated", key, event)
        return [event] * choose.choice((2, 3))
    expected.add("altered", key, event)
    if kind == "alter_ns":
        ns = event.gpu_time_ns
        return [replace(event, gpu_time_ns=ns - 1 if ns else 1)]
    changed: dict[str, Any] = (
        {"customer_ref": factories.CUSTOMERS[4]} if kind == "alter_customer" else {"model_name": "another"}
    )
    moved = replace(event, **changed)
    expected.add("unexpected", key_of(moved), moved)
    return [moved]


def _swap(
    kind: str,
    choose: random.Random,
    slow: list[UsageEvent],
    fast: dict[int, list[UsageEvent]],
    untouched: list[int],
    expected: Expected,
) -> None:
    """Two rows of one key exchange their amounts or their ids; their totals stay equal."""
    pairs = [(a, b) for a in untouched for b in untouched if a < b and key_of(slow[a]) == key_of(slow[b])]
    if not pairs:
        return
    a, b = choose.choice(pairs)
    one, two = slow[a], slow[b]
    if kind == "swap_ids":
        fast[a], fast[b] = [replace(one, event_id=two.event_id)], [replace(two, event_id=one.event_id)]
    else:
        wide: dict[str, Any] = {"gpu_started_at": min(one.gpu_started_at, two.gpu_started_at) - 300_000_000}
        if one.gpu_time_ns == two.gpu_time_ns:
            return
        slow[a], slow[b] = one, two = replace(one, **wide), replace(two, **wide)
        fast[a] = [replace(one, gpu_time_ns=two.gpu_time_ns)]
        fast[b] = [replace(two, gpu_time_ns=one.gpu_time_ns)]
    for at in (a, b):
        untouched.remove(at)
        expected.add("altered", key_of(slow[at]), slow[at])


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    n=st.integers(0, 40),
    faults=st.lists(st.tuples(st.integers(0, 10**9), st.sampled_from(FAULTS)), max_size=8),
)
def test_exactly_the_injected_faults_are_found(seed: int, n: int, faults: list[tuple[int, str]]) -> None:
    slow, fast, expected = build(seed, n, faults)
    report = reconciled(slow, fast)
    found = {
        verdict.figures.key: {c: set(getattr(verdict.diff, c)) for c in CAUSES if getattr(verdict.diff, c)}
        for verdict in report.findings
    }
    assert found == expected.causes
    events: dict[Key, int] = defaultdict(int)
    for event in slow:
        events[key_of(event)] += 1
    for verdict in report.findings:
        assert verdict.status == expected.status(verdict.figures.key, events[verdict.figures.key])
    assert report.status == ("discrepant" if expected.causes else "reconciled")
    assert report.total("events") == len(slow)
    assert report.total("fast_events") == len(fast)
    figures = compare(sums(slow), sums(fast), rollup(fast))
    assert {one.key for one in figures} == {key_of(event) for event in [*slow, *fast]}
    assert {one.key for one in figures if not one.rows_equal} == expected.causes.keys()


def test_one_missing_row_of_a_thousand_reconciles_among_random_faults_elsewhere() -> None:
    big = some(1_000, seed=5, customer=3)
    slow, fast, expected = build(8, 20, [(1, "drop")])
    report = reconciled([*slow, *big], [*fast, *big[:-1]])
    statuses = {verdict.figures.key: verdict.status for verdict in report.findings}
    assert statuses[key_of(big[0])] == "reconciled"
    assert [statuses[key] for key in expected.causes] == ["discrepant"]
