"""Reconciliation, decided purely: every combination of what two sides and the rollup can say of one key."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import combinations_with_replacement, permutations
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import canonical
from render_platform.clickhouse_schema import ROLLUP_SCHEMA, WINDOW_SCHEMA
from render_platform.clock import HOUR_US, WINDOW_US
from render_platform.events import UsageEvent, table_from_events
from render_platform.reconciliation import (
    CAUSES,
    MAX_LISTED,
    PRECEDENCE,
    HourReport,
    KeyFigures,
    RowDiff,
    build_report,
    compare,
    diff_rows,
    judge,
    unavailable_report,
    worst,
)
from tests import factories
from tests.stories import HOUR, Key, key_of, keyed_event

PPM = 1_000
CLOSED = HOUR + HOUR_US
DIGEST = "ab" * 32


# Independent sums: what each side's store would answer.


def sums(made: Sequence[UsageEvent]) -> pa.Table:
    found: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for event in made:
        high, low = divmod(event.event_id.int, 2**64)
        one = found[key_of(event)]
        one[0] += 1
        one[1] += event.gpu_time_ns
        one[2] = (one[2] + low) % 2**64
        one[3] = (one[3] + high) % 2**64
        one[4] = (one[4] + low % 2**32 * event.gpu_time_ns) % 2**64
    rows = [(*key, n, Decimal(ns), *rest) for key, (n, ns, *rest) in found.items()]
    return pa.Table.from_pylist([dict(zip(WINDOW_SCHEMA.names, row, strict=True)) for row in rows], WINDOW_SCHEMA)


def rollup(made: Sequence[UsageEvent]) -> pa.Table:
    return sums(made).select(ROLLUP_SCHEMA.names)


def reconciled(
    slow: Sequence[UsageEvent],
    fast: Sequence[UsageEvent],
    rolled: Sequence[UsageEvent] | None = None,
    closed: int = CLOSED,
    revision: int = 1,
) -> HourReport:
    """The report over all rows, as the pipeline makes it: row diffs only of keys whose sums differ."""
    figures = compare(sums(slow), sums(fast), rollup(fast if rolled is None else rolled))
    differing = {one.key for one in figures if not one.rows_equal}
    diffs = diff_rows(
        table_from_events([event for event in slow if key_of(event) in differing]),
        table_from_events([event for event in fast if key_of(event) in differing]),
    )
    return build_report(HOUR, revision, PPM, [DIGEST], closed, figures, diffs)


def some(n: int, seed: int = 0, **where: Any) -> list[UsageEvent]:
    rng = random.Random(seed)
    return [keyed_event(rng, **where) for _ in range(n)]


def ids(made: Sequence[UsageEvent]) -> list[str]:
    return sorted(str(event.event_id) for event in made)


def listed(report: HourReport) -> dict[str, list[str]]:
    """Event ids by cause, of the whole report."""
    found = {cause: sorted(i for v in report.findings for i in getattr(v.diff, cause)) for cause in CAUSES}
    return {cause: event_ids for cause, event_ids in found.items() if event_ids}


# One key.


@pytest.mark.parametrize("slow", [0, 1, 5])
@pytest.mark.parametrize("fast", [0, 1, 5])
@pytest.mark.parametrize("rolled", [0, 1, 5])
def test_every_combination_of_sides_and_rollup(slow: int, fast: int, rolled: int) -> None:
    """Rows are prefixes of the same five: a shorter fast side lacks rows, a longer one has unexpected ones."""
    made = some(5)
    report = reconciled(made[:slow], made[:fast], made[:rolled])
    good = slow == fast == rolled
    assert report.status == ("reconciled" if good else "discrepant")
    expected = {"missing": ids(made[fast:slow]), "unexpected": ids(made[slow:fast])}
    assert listed(report) == {cause: event_ids for cause, event_ids in expected.items() if event_ids}
    assert report.final
    assert [v.figures.rollup_equal for v in report.findings] == ([] if good else [fast == rolled])
    if slow or fast or rolled:
        [one] = compare(sums(made[:slow]), sums(made[:fast]), rollup(made[:rolled]))
        assert one.key == key_of(made[0])
        assert (one.events, one.gpu_time_ns) == (slow, sum(event.gpu_time_ns for event in made[:slow]))
        assert (one.fast_events, one.fast_gpu_time_ns) == (fast, sum(event.gpu_time_ns for event in made[:fast]))
        assert one.rows_equal == (slow == fast)


def test_both_empty_is_reconciled_and_says_nothing() -> None:
    report = reconciled([], [])
    assert (report.status, report.findings, report.total("events")) == ("reconciled", (), 0)
    assert [window.keys for window in report.windows] == [0] * 12


@pytest.mark.parametrize(("events", "status"), [(1_000, "reconciled"), (999, "discrepant")])
def test_the_threshold_is_exact_and_what_it_forgives_is_listed(events: int, status: str) -> None:
    made = some(events)
    report = reconciled(made, made[1:])
    assert report.status == status
    assert listed(report) == {"missing": ids(made[:1])}
    assert report.missing == (str(made[0].event_id),)
    assert report.windows[0].status == status


@pytest.mark.parametrize("ppm", [0, 1, 999, 1_000, 1_001, 333_333, 333_334, 1_000_000])
@pytest.mark.parametrize("missing", [0, 1, 2, 3])
@pytest.mark.parametrize("events", [1, 3, 999, 1_000, 1_001, 2_000, 3_000_000])
def test_the_threshold_in_whole_numbers(ppm: int, missing: int, events: int) -> None:
    figures = KeyFigures((0, "c", "m"), events, 0, events - missing, 0, rows_equal=not missing, rollup_equal=True)
    verdict = judge(figures, RowDiff(missing=tuple(f"{n}" for n in range(missing))), ppm)
    forgiven = Decimal(missing) / Decimal(1) <= Decimal(events) * Decimal(ppm) / Decimal(1_000_000)
    assert verdict.status == ("reconciled" if forgiven else "discrepant")


@pytest.mark.parametrize("cause", ["duplicated", "altered", "unexpected"])
def test_any_other_cause_is_discrepant_whatever_the_threshold(cause: str) -> None:
    figures = KeyFigures((0, "c", "m"), 10**9, 0, 10**9, 0, rows_equal=False, rollup_equal=True)
    assert judge(figures, RowDiff(**{cause: ("x",)}), 1_000_000).status == "discrepant"
    assert judge(figures, RowDiff(**{cause: ("x",), "missing": ("y",)}), 1_000_000).status == "discrepant"


def test_a_rollup_that_differs_is_discrepant_whatever_the_threshold() -> None:
    figures = KeyFigures((0, "c", "m"), 10**9, 0, 10**9, 0, rows_equal=True, rollup_equal=False)
    assert judge(figures, RowDiff(), 1_000_000).status == "discrepant"


def test_a_rollup_with_equal_events_and_other_ns_is_discrepant() -> None:
    made = some(5)
    other = replace(made[0], gpu_time_ns=made[0].gpu_time_ns - 1)
    report = reconciled(made, made, [other, *made[1:]])
    assert report.status == "discrepant"
    assert listed(report) == {}
    assert not report.findings[0].figures.rollup_equal


def test_duplicated_rows() -> None:
    made = some(5)
    report = reconciled(made, [*made, made[0], made[3], made[3]])
    assert report.status == "discrepant"
    assert listed(report) == {"duplicated": ids([made[0], made[3]])}


def test_a_duplicate_does_not_hide_a_missing_row() -> None:
    made = some(2_000)
    report = reconciled(made, [made[0], *made[:1], *made[2:]])
    assert report.findings[0].figures.events == report.findings[0].figures.fast_events
    assert report.status == "discrepant"
    assert listed(report) == {"missing": ids(made[1:2]), "duplicated": ids(made[:1])}


def test_a_duplicate_whose_copy_was_altered_is_both() -> None:
    made = some(5)
    report = reconciled(made, [*made, replace(made[2], gpu_time_ns=made[2].gpu_time_ns - 1)])
    assert listed(report) == {"duplicated": ids(made[2:3]), "altered": ids(made[2:3])}


def test_swapped_amounts_are_seen_although_every_total_is_equal() -> None:
    a, b = sorted(some(2, seed=3), key=lambda event: event.gpu_time_ns)
    b = replace(b, gpu_time_ns=a.gpu_time_ns + 7, gpu_started_at=b.event_time - 40_000_000)
    a = replace(a, gpu_started_at=a.event_time - 40_000_000)
    swapped = [replace(a, gpu_time_ns=b.gpu_time_ns), replace(b, gpu_time_ns=a.gpu_time_ns)]
    [one] = compare(sums([a, b]), sums(swapped), rollup(swapped))
    assert (one.events, one.gpu_time_ns) == (one.fast_events, one.fast_gpu_time_ns)
    assert not one.rows_equal
    assert listed(reconciled([a, b], swapped)) == {"altered": ids([a, b])}


def test_a_swapped_id_is_seen() -> None:
    a, b = some(2)
    stranger = replace(a, event_id=some(1, seed=9)[0].event_id)
    report = reconciled([a, b], [stranger, b])
    assert listed(report) == {"missing": ids([a]), "unexpected": ids([stranger])}
    assert report.status == "discrepant"


@pytest.mark.parametrize("change", ["customer_ref", "model_name", "window"])
def test_a_moved_row_is_altered_where_it_belongs_and_unexpected_where_it_is(change: str) -> None:
    """Never `missing`: repair would insert a second row of the same id."""
    made = some(2_000)
    changes: dict[str, dict[str, Any]] = {
        "customer_ref": {"customer_ref": factories.CUSTOMERS[4]},
        "model_name": {"model_name": "llama-3-70b"},
        "window": {"recorded_at": made[0].recorded_at + WINDOW_US},
    }
    moved = replace(made[0], **changes[change])
    report = reconciled(made, [moved, *made[1:]])
    assert report.status == "discrepant"
    by_key = {verdict.figures.key: verdict for verdict in report.findings}
    assert by_key.keys() == {key_of(made[0]), key_of(moved)}
    assert by_key[key_of(made[0])].diff == RowDiff(altered=(str(made[0].event_id),))
    assert by_key[key_of(moved)].diff == RowDiff(unexpected=(str(made[0].event_id),))
    assert all(verdict.status == "discrepant" for verdict in report.findings)
    assert report.missing == ()


def test_a_copy_under_another_customer_is_unexpected_there() -> None:
    made = some(5)
    copy = replace(made[0], customer_ref=factories.CUSTOMERS[4])
    report = reconciled(made, [*made, copy])
    [verdict] = report.findings
    assert verdict.figures.key == key_of(copy)
    assert verdict.diff == RowDiff(unexpected=(str(copy.event_id),))


@pytest.mark.parametrize("column", ["input_tokens", "pricing_tier", "status", "device_uuid", "nonce", "event_time"])
def test_columns_that_no_sum_holds_are_seen_by_the_row_diff_and_not_by_the_sums(column: str) -> None:
    """The limit of the sums: count, GPU ns and ids bound to them. Rows are compared in full once a key differs."""
    made = some(1_000)
    other: dict[str, Any] = {
        "input_tokens": 1,
        "pricing_tier": "free" if made[0].pricing_tier != "free" else "standard",
        "status": "error" if made[0].status != "error" else "success",
        "device_uuid": "GPU-9",
        "nonce": b"\0" * 16,
        "event_time": made[0].event_time + 1,
    }
    altered = [replace(made[0], **{column: other[column]}), *made[1:]]
    assert reconciled(made, altered).status == "reconciled"
    assert listed(reconciled(made, altered)) == {}
    assert diff_rows(table_from_events(made), table_from_events(altered)) == {
        key_of(made[0]): RowDiff(altered=(str(made[0].event_id),))
    }
    with_another_fault = reconciled(made, altered[:-1])
    assert with_another_fault.status == "discrepant"
    assert listed(with_another_fault) == {"altered": ids(made[:1]), "missing": ids(made[-1:])}


# Windows, hours, precedence.


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


def test_lists_are_bounded_and_counts_exact() -> None:
    missing = tuple(f"{n:036d}" for n in range(MAX_LISTED + 5))
    figures = KeyFigures((HOUR // WINDOW_US, "c", "m"), 2 * MAX_LISTED, 1, MAX_LISTED - 5, 1, False, True)
    record = judge(figures, RowDiff(missing=missing), PPM).record()
    assert len(record["missing"]) == MAX_LISTED
    assert record["counts"]["missing"] == MAX_LISTED + 5


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


@settings(max_examples=80, deadline=None)
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
