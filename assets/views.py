"""Metadata that a person reads, made from what the library returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from render_platform.clock import WINDOW_US, iso
from render_platform.errors import PlatformError
from render_platform.events import EVENT_SCHEMA
from render_platform.hours import LastReport
from render_platform.note import Checkpoint
from render_platform.reconciler import RepairOutcome
from render_platform.reconciliation import CAUSES, HourReport

MAX_ROWS = 200


def event_columns() -> dg.TableSchema:
    """The columns of a usage event, for Dagster's column panel."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(f.name, str(f.type), constraints=dg.TableColumnConstraints(nullable=f.nullable))
            for f in EVENT_SCHEMA
        ]
    )


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dg.TableMetadataValue:
    records = [dg.TableRecord({name: _cell(row[name]) for name in columns}) for row in list(rows)[:MAX_ROWS]]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=[dg.TableColumn(n) for n in columns]))


def gpu_seconds(gpu_time_ns: int) -> str:
    """Exact decimal seconds, for reading; only nanoseconds are stored."""
    seconds, rest = divmod(gpu_time_ns, 1_000_000_000)
    return f"{seconds:,}.{rest:09d}".rstrip("0").rstrip(".")


def verdict(report: HourReport) -> dict[str, Any]:
    """A few figures: they stand in the event of each partition of a range."""
    return {
        "status": report.status,
        "revision": report.revision,
        "dagster/partition_row_count": report.total("events"),
        "fast events": report.total("fast_events"),
        "GPU seconds": gpu_seconds(report.total("gpu_time_ns")),
        "missing": report.count("missing"),
        **({"error": report.error} if report.error else {}),
    }


def windows(report: HourReport) -> dg.TableMetadataValue:
    rows = [
        {
            "window": iso(window.start_us)[11:16],
            "status": window.status,
            "events": window.events,
            "fast events": window.fast_events,
            "GPU seconds": gpu_seconds(window.gpu_time_ns),
            "keys": window.keys,
        }
        for window in report.windows
    ]
    return table(rows, list(rows[0]))


def findings(report: HourReport) -> dg.TableMetadataValue:
    columns = ["window", "customer", "model", "status", "events", *CAUSES, "rollup"]
    rows = [
        {
            "window": iso(verdict.figures.key[0] * WINDOW_US)[11:16],
            "customer": verdict.figures.key[1][:12],
            "model": verdict.figures.key[2],
            "status": verdict.status,
            "events": verdict.figures.events,
            **{cause: verdict.diff.count(cause) for cause in CAUSES},
            "rollup": "equal" if verdict.figures.rollup_equal else "differs",
        }
        for verdict in report.findings
    ]
    return table(rows, columns)


def change(report: HourReport, last: LastReport | None, read: Callable[[str], bytes]) -> str:
    """What a report says beside `last`, the hour's report before it, whose bytes `read` gives by their digest."""
    if not report.final:
        return "not reported yet" if last is None else f"revision {last.revision} stands"
    if last is None:
        return "first report"
    if report.revision == last.revision:
        return f"unchanged since revision {last.revision}"
    revisions = f"revision {last.revision} → {report.revision}"
    try:
        before = _figures(json.loads(read(last.digest)))
    except PlatformError as error:
        return f"{revisions}; the former cannot be read: {error.message}"
    after = _figures(json.loads(report.to_bytes()))
    told = [f"{name} {before[name]} → {after[name]}" for name in after if before[name] != after[name]]
    return f"{revisions}: {', '.join(told) or 'other findings'}"


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a report, in a few figures."""
    names = {
        "events": "events",
        "fast events": "fast_events",
        "GPU ns": "gpu_time_ns",
        "fast GPU ns": "fast_gpu_time_ns",
    }
    return {
        "status": record["status"],
        "batches": len(record["batches"]),
        **{name: sum(window[of] for window in record["windows"]) for name, of in names.items()},
        **{cause: sum(finding["counts"][cause] for finding in record["findings"]) for cause in CAUSES},
    }


def repair(outcome: RepairOutcome) -> dict[str, Any]:
    return {
        "way": outcome.way,
        "inserted": outcome.inserted,
        "status before": outcome.before.status,
        "status after": outcome.after.status,
    }


def checkpoint(at: Checkpoint | None) -> dict[str, Any]:
    if at is None:
        return {"tree size": 0}
    return {"tree size": at.size, "root": at.root.hex(), "checkpoint": dg.MetadataValue.md(f"```\n{at.text()}```")}


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, int) and abs(value) > 2**53 else value
