"""Reconciliation, decided purely: two sides' figures in, a verdict a window and key out. No clock, no I/O.

A status is one of four, of a key, a window, an hour; the worst wins:

- `discrepant`: missing above the threshold, or anything duplicated, altered or unexpected, or the rollup differs;
- `unavailable`: a side could not be read: unknown is not zero;
- `pending`: the window is not closed yet;
- `reconciled`: both sides are complete and equal, but for a few missing rows, which are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from render_platform import canonical
from render_platform.clock import HOUR_US, WINDOW_US, iso
from render_platform.events import Key, plain_rows, uuid_texts

PRECEDENCE = ("discrepant", "unavailable", "pending", "reconciled")
CAUSES = ("missing", "duplicated", "altered", "unexpected")
KeyedRow = tuple[Key, tuple[Any, ...]]
MAX_LISTED = 10_000
"""Event ids that a report lists for one cause of one key; counts are always exact."""

_COMPARE = """
    SELECT "window", customer_ref, model_name,
           coalesce(s.events, 0) AS events, coalesce(s.gpu_time_ns, 0) AS gpu_time_ns,
           coalesce(f.events, 0) AS fast_events, coalesce(f.gpu_time_ns, 0) AS fast_gpu_time_ns,
           (s.events, s.gpu_time_ns, s.id_sum, s.id_high_sum, s.bound_sum)
             IS NOT DISTINCT FROM (f.events, f.gpu_time_ns, f.id_sum, f.id_high_sum, f.bound_sum) AS rows_equal,
           (f.events, f.gpu_time_ns) IS NOT DISTINCT FROM (r.events, r.gpu_time_ns) AS rollup_equal
    FROM slow AS s
    FULL JOIN fast AS f USING ("window", customer_ref, model_name)
    FULL JOIN rollup AS r USING ("window", customer_ref, model_name)
    ORDER BY ALL
"""


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """What both sides say of one window, customer and model. GPU time in exact ns."""

    key: Key
    events: int
    gpu_time_ns: int
    fast_events: int
    fast_gpu_time_ns: int
    rows_equal: bool
    rollup_equal: bool


@dataclass(frozen=True, slots=True)
class RowDiff:
    """Event ids by cause. `missing` stand on the slow path only, `unexpected` on the fast path only."""

    missing: tuple[str, ...] = ()
    duplicated: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyVerdict:
    figures: KeyFigures
    diff: RowDiff
    status: str

    def record(self) -> dict[str, Any]:
        window, customer_ref, model_name = self.figures.key
        listed = {cause: list(getattr(self.diff, cause)[:MAX_LISTED]) for cause in CAUSES}
        return {
            "window_start": window * WINDOW_US,
            "customer_ref": customer_ref,
            "model_name": model_name,
            "status": self.status,
            "events": self.figures.events,
            "gpu_time_ns": self.figures.gpu_time_ns,
            "fast_events": self.figures.fast_events,
            "fast_gpu_time_ns": self.figures.fast_gpu_time_ns,
            "rollup_equal": self.figures.rollup_equal,
            "counts": {cause: len(getattr(self.diff, cause)) for cause in CAUSES},
            **listed,
        }


@dataclass(frozen=True, slots=True)
class WindowVerdict:
    start_us: int
    status: str
    keys: int = 0
    events: int = 0
    gpu_time_ns: int = 0
    fast_events: int = 0
    fast_gpu_time_ns: int = 0


@dataclass(frozen=True, slots=True)
class HourReport:
    """An hour's verdict: a pure function of batch digests, fast rows, what was closed, and the revision."""

    hour_us: int
    revision: int
    threshold_ppm: int
    batches: tuple[str, ...]
    windows: tuple[WindowVerdict, ...]
    findings: tuple[KeyVerdict, ...] = field(default=())
    error: str = ""

    @property
    def status(self) -> str:
        return worst(window.status for window in self.windows)

    @property
    def final(self) -> bool:
        """Every window closed and both sides read: a report that may be logged."""
        return all(window.status in ("reconciled", "discrepant") for window in self.windows)

    def total(self, name: str) -> int:
        return sum(getattr(window, name) for window in self.windows)

    def count(self, cause: str) -> int:
        """Events with one cause, over all keys."""
        return sum(len(getattr(verdict.diff, cause)) for verdict in self.findings)

    @property
    def rollup_equal(self) -> bool:
        return all(verdict.figures.rollup_equal for verdict in self.findings)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted(event_id for verdict in self.findings for event_id in verdict.diff.missing))

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same facts give the same bytes, live or in a backfill."""
        return canonical.encode(
            {
                "version": 1,
                "hour": self.hour_us,
                "revision": self.revision,
                "threshold_ppm": self.threshold_ppm,
                "status": self.status,
                "batches": list(self.batches),
                "windows": [
                    {name: getattr(window, name) for name in WindowVerdict.__slots__} for window in self.windows
                ],
                "findings": [verdict.record() for verdict in self.findings],
            }
        )

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{iso(self.hour_us)[:13]}h {self.status}: {self.total('events')} events"]
        parts += [f"{self.count(cause)} {cause}" for cause in CAUSES if self.count(cause)]
        parts += [self.error] if self.error else []
        return ", ".join(parts)


def worst(statuses: Iterable[str]) -> str:
    """The status that wins. Of nothing at all nothing is known: `pending`."""
    found = set(statuses)
    return next((status for status in PRECEDENCE if status in found), "pending")


def compare(slow: pa.Table, fast: pa.Table, rollup: pa.Table) -> list[KeyFigures]:
    """Full outer join of both sides and the rollup, by window, customer and model."""
    with duckdb.connect() as connection:
        for name, table in (("slow", slow), ("fast", fast), ("rollup", rollup)):
            connection.register(name, table)
        rows = connection.execute(_COMPARE).fetchall()
    return [KeyFigures(row[:3], int(row[3]), int(row[4]), int(row[5]), int(row[6]), row[7], row[8]) for row in rows]


def diff_rows(slow: pa.Table, fast: pa.Table) -> dict[Key, RowDiff]:
    """What differs, by the key of the authoritative row (of the fast one where there is none), in full rows."""
    slow_rows, fast_rows = _by_id(slow), _by_id(fast)
    found: dict[Key, dict[str, list[str]]] = {}
    for event_id in sorted(slow_rows.keys() | fast_rows.keys()):
        for cause, key in _causes(slow_rows.get(event_id, []), fast_rows.get(event_id, [])):
            found.setdefault(key, {}).setdefault(cause, []).append(event_id)
    return {key: RowDiff(**{c: tuple(ids) for c, ids in causes.items()}) for key, causes in found.items()}


def _causes(slow: list[KeyedRow], fast: list[KeyedRow]) -> list[tuple[str, Key]]:
    if not slow:
        return [("unexpected", key) for key in dict.fromkeys(key for key, _ in fast)]
    key, row = slow[0]
    if not fast:
        return [("missing", key)]
    causes = [("duplicated", key)] if len(fast) > 1 else []
    causes += [("altered", key)] if any(data != row for _, data in fast) else []
    # A row that was moved to another key is altered where it belongs and unexpected where it is; never missing, or a
    # repair would insert it a second time.
    causes += [("unexpected", other) for other in dict.fromkeys(other for other, _ in fast) if other != key]
    return causes


def _by_id(table: pa.Table) -> dict[str, list[KeyedRow]]:
    windows = [at // WINDOW_US for at in table.column("recorded_at").cast(pa.int64()).to_pylist()]
    keys = zip(windows, table.column("customer_ref").to_pylist(), table.column("model_name").to_pylist(), strict=True)
    found: dict[str, list[KeyedRow]] = {}
    for event_id, key, row in zip(uuid_texts(table, "event_id"), keys, plain_rows(table), strict=True):
        found.setdefault(event_id, []).append((key, row))
    return found


def judge(figures: KeyFigures, diff: RowDiff, threshold_ppm: int) -> KeyVerdict:
    """The verdict on one key. Missing rows within the threshold reconcile, and are still listed."""
    anything_else = diff.duplicated or diff.altered or diff.unexpected or not figures.rollup_equal
    within = len(diff.missing) * 1_000_000 <= figures.events * threshold_ppm
    return KeyVerdict(figures, diff, "reconciled" if within and not anything_else else "discrepant")


def build_report(
    hour_us: int,
    revision: int,
    threshold_ppm: int,
    batches: Sequence[str],
    closed_until: int,
    figures: Sequence[KeyFigures],
    diffs: dict[Key, RowDiff],
) -> HourReport:
    """The report of an hour whose sides were both read up to `closed_until`."""
    verdicts = [judge(f, diffs.get(f.key, RowDiff()), threshold_ppm) for f in figures]
    windows = [_window(start, closed_until, verdicts) for start in range(hour_us, hour_us + HOUR_US, WINDOW_US)]
    findings = [v for v in verdicts if v.diff != RowDiff() or v.status != "reconciled"]
    return HourReport(hour_us, revision, threshold_ppm, tuple(batches), tuple(windows), tuple(findings))


def unavailable_report(hour_us: int, revision: int, threshold_ppm: int, closed_until: int, error: str) -> HourReport:
    """The report of an hour of which a side could not be read: its closed windows are unavailable."""
    windows = [
        WindowVerdict(start, "unavailable" if start + WINDOW_US <= closed_until else "pending")
        for start in range(hour_us, hour_us + HOUR_US, WINDOW_US)
    ]
    return HourReport(hour_us, revision, threshold_ppm, (), tuple(windows), (), error)


def _window(start: int, closed_until: int, verdicts: Sequence[KeyVerdict]) -> WindowVerdict:
    if start + WINDOW_US > closed_until:
        return WindowVerdict(start, "pending")
    inside = [verdict for verdict in verdicts if verdict.figures.key[0] * WINDOW_US == start]
    return WindowVerdict(
        start,
        worst(verdict.status for verdict in inside) if inside else "reconciled",
        len(inside),
        sum(v.figures.events for v in inside),
        sum(v.figures.gpu_time_ns for v in inside),
        sum(v.figures.fast_events for v in inside),
        sum(v.figures.fast_gpu_time_ns for v in inside),
    )
