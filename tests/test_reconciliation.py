"""Reconciliation, decided purely: every combination of what two sides and the rollup can say of one key."""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from render_platform.clickhouse_schema import ROLLUP_SCHEMA, WINDOW_SCHEMA
from render_platform.clock import HOUR_US, US_PER_SECOND, WINDOW_US
from render_platform.errors import Missing
from render_platform.events import UsageEvent
from render_platform.reconciliation import (
    CAUSES,
    HourReport,
    KeyFigures,
    RowDiff,
    build_report,
    compare,
    diff_rows,
    judge,
)
from tests import checksums, factories
from tests.stories import HOUR, Key, key_of, keyed_event

PPM = 1_000
CLOSED = HOUR + HOUR_US
DIGEST = "ab" * 32


# Independent sums: what each side's store would answer.


def sums(made: Sequence[UsageEvent]) -> pa.Table:
    minutes = minute_sums(made)
    found = checksums.sums_of_events(made)
    rows = [(*key, n, Decimal(ns), *rest, minutes[key]) for key, (n, ns, *rest) in found.items()]
    return pa.Table.from_pylist([dict(zip(WINDOW_SCHEMA.names, row, strict=True)) for row in rows], WINDOW_SCHEMA)


def minute_sums(made: Sequence[UsageEvent]) -> dict[Key, int]:
    """A number of what a rollup by minute holds of each key."""
    minutes: dict[tuple[Key, int], list[UsageEvent]] = defaultdict(list)
    for event in made:
        minutes[key_of(event), event.recorded_at // (60 * US_PER_SECOND)].append(event)
    found: dict[Key, int] = defaultdict(int)
    for (key, minute), inside in minutes.items():
        ns = [event.gpu_time_ns for event in inside]
        tokens = [event.input_tokens for event in inside if event.input_tokens is not None]
        held = (minute, len(ns), sum(ns), min(ns), max(ns), len(tokens), sum(tokens))
        found[key] = (found[key] + zlib.crc32(repr(held).encode())) % 2**64
    return found


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
    diffs = diffed(slow, fast, [one.key for one in figures if not one.rows_equal])
    return build_report(HOUR, revision, PPM, [DIGEST], closed, figures, diffs)


def diffed(slow: Sequence[UsageEvent], fast: Sequence[UsageEvent], keys: Sequence[Key]) -> dict[Key, RowDiff]:
    """Each side in two parts, as streams come."""
    parts = [[checksums.row_values(side[at::2]) for at in (0, 1)] for side in (slow, fast)]
    return diff_rows(iter(parts[0]), iter(parts[1]), keys)


def diff_of(ids_by_cause: dict[str, tuple[str, ...]]) -> RowDiff:
    missing, duplicated, altered, unexpected = (ids_by_cause.get(cause, ()) for cause in CAUSES)
    return RowDiff(missing, duplicated, altered, unexpected)


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
    assert judge(figures, diff_of({cause: ("x",)}), 1_000_000).status == "discrepant"
    assert judge(figures, diff_of({cause: ("x",), "missing": ("y",)}), 1_000_000).status == "discrepant"


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
def test_an_altered_row_is_found_whatever_the_column(column: str) -> None:
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
    report = reconciled(made, altered)
    assert report.status == "discrepant"
    assert listed(report) == {"altered": ids(made[:1])}
    with_another_fault = reconciled(made, altered[:-1])
    assert listed(with_another_fault) == {"altered": ids(made[:1]), "missing": ids(made[-1:])}


def test_rows_of_other_keys_are_passed_over() -> None:
    here, there = some(3), some(3, seed=1, customer=2)
    assert diffed([*here, *there], [], [key_of(here[0])]) == {key_of(here[0]): RowDiff(missing=tuple(ids(here)))}
    assert diffed(here, [], []) == {}


def test_what_reading_a_side_raises_is_raised_as_it_is() -> None:
    def broken() -> Iterator[pa.Table]:
        yield checksums.row_values(some(2))
        raise Missing("sha256/aa/bb")

    key = key_of(some(1)[0])
    nothing: list[pa.Table] = []
    for slow, fast in ((broken(), nothing), (nothing, broken())):
        with pytest.raises(Missing, match="sha256/aa/bb"):
            diff_rows(slow, fast, [key])


def test_a_rollup_that_differs_in_a_minimum_is_discrepant() -> None:
    made = some(20)
    rolled = sorted(made, key=lambda event: event.gpu_time_ns)
    low, middle = rolled[0], rolled[10]
    moved = replace(low, gpu_started_at=low.gpu_started_at - 1_000_000, gpu_time_ns=low.gpu_time_ns + 1)
    wide = replace(middle, gpu_time_ns=middle.gpu_time_ns - 1)
    assert sum(event.gpu_time_ns for event in (low, middle)) == moved.gpu_time_ns + wide.gpu_time_ns
    others = [event for event in made if event not in (low, middle)]
    report = reconciled(made, made, [*others, moved, wide])
    assert (report.status, report.rollup_equal, listed(report)) == ("discrepant", False, {})


# Windows, hours, precedence.
