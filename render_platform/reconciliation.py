"""Reconciliation, decided purely: two sides' figures in, a verdict a window and key out. No clock, no I/O.

A status is one of four, of a key, a window, an hour; the worst wins:

- `discrepant`: missing above the threshold, or anything duplicated, altered or unexpected, or the rollup differs;
- `unavailable`: a side could not be read: unknown is not zero;
- `pending`: the window is not closed yet;
- `reconciled`: both sides are complete and equal, but for a few missing rows, which are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa

from render_platform import canonical
from render_platform.clock import HOUR_US, WINDOW_US, iso
from render_platform.errors import Unavailable
from render_platform.events import Key

PRECEDENCE = ("discrepant", "unavailable", "pending", "reconciled")
CAUSES = ("missing", "duplicated", "altered", "unexpected")
MAX_LISTED = 10_000
"""Event ids that a report lists for one cause of one key; counts are always exact."""
MAX_LISTED_IN_ALL = 1_000_000
"""Event ids that a report lists at most for one cause, the earliest keys' first."""
DIFF_MEMORY = "512MB"
"""What DuckDB may use to compare rows; beyond it, it writes to a temporary folder."""

_KEY = ("window", "customer_ref", "model_name")
_NUMBERED = pa.schema([("key", pa.int32()), ("window", pa.int64()), *((name, pa.string()) for name in _KEY[1:])])

_COMPARE = """
    SELECT "window", customer_ref, model_name,
           coalesce(s.events, 0) AS events, coalesce(s.gpu_time_ns, 0) AS gpu_time_ns,
           coalesce(f.events, 0) AS fast_events, coalesce(f.gpu_time_ns, 0) AS fast_gpu_time_ns,
           (s.events, s.gpu_time_ns, s.id_sum, s.id_high_sum, s.row_sum)
             IS NOT DISTINCT FROM (f.events, f.gpu_time_ns, f.id_sum, f.id_high_sum, f.row_sum) AS rows_equal,
           (f.events, f.gpu_time_ns, f.minute_sum)
             IS NOT DISTINCT FROM (r.events, r.gpu_time_ns, r.minute_sum) AS rollup_equal
    FROM slow AS s
    FULL JOIN fast AS f USING ("window", customer_ref, model_name)
    FULL JOIN rollup AS r USING ("window", customer_ref, model_name)
    ORDER BY ALL
"""
# Only the two sides' rows of an event decide. A row that was moved to another key is altered where it belongs and
# unexpected where it is; never missing, or a repair would insert it a second time.
_DIFF = """
    CREATE TABLE unlike AS
    SELECT event_id, min(key) FILTER (NOT fast) AS home, min(row_value) FILTER (NOT fast) AS truth,
           count(*) FILTER (fast) AS copies,
           min(row_value) FILTER (fast) AS least, max(row_value) FILTER (fast) AS most
    FROM sides GROUP BY event_id HAVING home IS NULL OR copies <> 1 OR least <> truth;

    CREATE TABLE found AS
    SELECT home AS key, 'missing' AS cause, event_id FROM unlike WHERE home IS NOT NULL AND copies = 0
    UNION ALL
    SELECT home, 'duplicated', event_id FROM unlike WHERE home IS NOT NULL AND copies > 1
    UNION ALL
    SELECT home, 'altered', event_id FROM unlike WHERE least <> truth OR most <> truth
    UNION ALL
    SELECT DISTINCT key, 'unexpected', event_id FROM sides JOIN unlike USING (event_id)
    WHERE fast AND key IS DISTINCT FROM home;

    DROP TABLE sides; DROP TABLE unlike;
"""
_LISTED = f"""
    SELECT key, event_id::VARCHAR FROM found WHERE cause = $cause AND key BETWEEN $first AND $last
    ORDER BY key, event_id LIMIT {MAX_LISTED}
"""  # noqa: S608


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
    """Event ids by cause, the lowest where not all are listed; `unlisted` counts the others, in the order of CAUSES.

    `missing` stand on the slow path only, `unexpected` on the fast path only.
    """

    missing: tuple[str, ...] = ()
    duplicated: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unlisted: tuple[int, ...] = (0, 0, 0, 0)

    def count(self, cause: str) -> int:
        """Events with one cause: exact."""
        return len(getattr(self, cause)) + self.unlisted[CAUSES.index(cause)]


NO_DIFF = RowDiff()


@dataclass(frozen=True, slots=True)
class KeyVerdict:
    figures: KeyFigures
    diff: RowDiff
    status: str

    def record(self) -> dict[str, Any]:
        window, customer_ref, model_name = self.figures.key
        listed = {cause: list(getattr(self.diff, cause)) for cause in CAUSES}
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
            "counts": {cause: self.diff.count(cause) for cause in CAUSES},
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
        return sum(verdict.diff.count(cause) for verdict in self.findings)

    @property
    def rollup_equal(self) -> bool:
        return all(verdict.figures.rollup_equal for verdict in self.findings)

    @property
    def missing(self) -> tuple[str, ...]:
        """The event ids that are listed as missing."""
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

    def told(self) -> dict[str, Any]:
        """What dashboards read of a report, provisional ones too; see clickhouse.ReportRow."""
        sums = ("events", "fast_events", "gpu_time_ns", "fast_gpu_time_ns")
        return {
            "hour_us": self.hour_us,
            "revision": self.revision,
            "status": self.status,
            "final": self.final,
            "windows_pending": sum(window.status == "pending" for window in self.windows),
            **{name: self.total(name) for name in sums},
            **{cause: self.count(cause) for cause in CAUSES},
            "digest": canonical.digest_of(self.to_bytes()),
            "error": self.error,
        }

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


def compare(
    slow: pa.Table, fast: pa.Table, rollup: pa.Table, connection: duckdb.DuckDBPyConnection | None = None
) -> list[KeyFigures]:
    """Full outer join of both sides (SLOW_SCHEMA, WINDOW_SCHEMA) and the rollup, by window, customer and model.

    `connection` saves the time of opening one: a third of what a small hour takes.
    """
    with _translated(), nullcontext(connection) if connection else duckdb.connect() as joining:
        for name, table in (("slow", slow), ("fast", fast), ("rollup", rollup)):
            joining.register(name, table)
        rows = joining.execute(_COMPARE).fetchall()
        for name in ("slow", "fast", "rollup"):
            joining.unregister(name)
    return [KeyFigures(row[:3], int(row[3]), int(row[4]), int(row[5]), int(row[6]), row[7], row[8]) for row in rows]


def diff_rows(slow: Iterable[pa.Table], fast: Iterable[pa.Table], keys: Sequence[Key]) -> dict[Key, RowDiff]:
    """What differs in the rows of some keys, by the key of the authoritative row, of the fast one where there is none.

    Both sides are streams of ROW_VALUES_SCHEMA; rows of other keys are passed over. Memory is bounded: the rows go
    through DuckDB, which spills. Unavailable where that fails; what reading a side raises is raised as it is.
    """
    with TemporaryDirectory(prefix="render-platform-") as folder, _translated():
        options: dict[str, Any] = {"memory_limit": DIFF_MEMORY, "temp_directory": folder}
        with duckdb.connect(
            f"{folder}/sides.duckdb", config=options | {"preserve_insertion_order": False}
        ) as connection:
            connection.execute("SET enable_progress_bar = false")  # it would be drawn over what a command prints
            connection.execute("CREATE TABLE sides (event_id UUID, key INTEGER, row_value UBIGINT, fast BOOLEAN)")
            numbered = [{"key": at, **dict(zip(_KEY, key, strict=True))} for at, key in enumerate(keys)]
            connection.register("keys", pa.Table.from_pylist(numbered, _NUMBERED))
            for tables, is_fast in ((slow, False), (fast, True)):
                for table in tables:
                    _load(connection, table, is_fast)
            connection.execute(_DIFF)
            return _found(connection, keys)


def _load(connection: duckdb.DuckDBPyConnection, table: pa.Table, fast: bool) -> None:
    connection.register("incoming", table)
    connection.execute(
        "INSERT INTO sides SELECT event_id::UUID, key, row_value, $fast FROM incoming JOIN keys USING "
        '("window", customer_ref, model_name)',
        {"fast": fast},
    )
    connection.unregister("incoming")


def _found(connection: duckdb.DuckDBPyConnection, keys: Sequence[Key]) -> dict[Key, RowDiff]:
    listed: dict[int, dict[str, tuple[str, ...]]] = {}
    rest: dict[int, dict[str, int]] = {}
    for cause in CAUSES:
        grouped = "SELECT key, count(*) FROM found WHERE cause = $cause GROUP BY key ORDER BY key"
        counts: dict[int, int] = dict(connection.execute(grouped, {"cause": cause}).fetchall())
        ids = _lowest(connection, cause, counts)
        for key, count in counts.items():
            listed.setdefault(key, {})[cause] = tuple(ids.get(key, ()))
            rest.setdefault(key, {})[cause] = count - len(ids.get(key, ()))
    return {
        keys[at]: RowDiff(**listed[at], unlisted=tuple(rest[at].get(cause, 0) for cause in CAUSES))
        for at in sorted(listed)
    }


def _lowest(connection: duckdb.DuckDBPyConnection, cause: str, counts: dict[int, int]) -> dict[int, list[str]]:
    """The ids to list of each key. Keys are asked for together while all of their ids are listed, so that no query
    sorts more than MAX_LISTED rows."""
    found: dict[int, list[str]] = {}
    room = MAX_LISTED_IN_ALL
    pack: list[int] = []
    size = 0
    for key, count in [*counts.items(), (-1, MAX_LISTED)]:  # the last one closes the last pack
        if pack and size + count > MAX_LISTED:
            values = {"cause": cause, "first": pack[0], "last": pack[-1]}
            for at, event_id in connection.execute(_LISTED, values).fetchmany(room):
                found.setdefault(at, []).append(event_id)
                room -= 1
            pack, size = [], 0
        if room <= 0:
            break
        pack.append(key)
        size += count
    return found


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise Unavailable(f"DuckDB could not compare both sides: {error}", "see the message") from error


def judge(figures: KeyFigures, diff: RowDiff, threshold_ppm: int) -> KeyVerdict:
    """The verdict on one key. Missing rows within the threshold reconcile, and are still listed."""
    if diff == NO_DIFF and figures.rollup_equal:
        return KeyVerdict(figures, diff, "reconciled")
    anything_else = any(diff.count(cause) for cause in CAUSES[1:]) or not figures.rollup_equal
    within = diff.count("missing") * 1_000_000 <= figures.events * threshold_ppm
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
    verdicts = [judge(f, diffs.get(f.key, NO_DIFF), threshold_ppm) for f in figures]
    windows = [_window(start, closed_until, verdicts) for start in range(hour_us, hour_us + HOUR_US, WINDOW_US)]
    findings = [v for v in verdicts if v.diff != NO_DIFF or v.status != "reconciled"]
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
