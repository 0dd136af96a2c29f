"""Metadata that a person reads, made from what the library returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from render_platform.clock import WINDOW_US, iso
from render_platform.events import EVENT_SCHEMA
from render_platform.note import Checkpoint
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
            **{cause: len(getattr(verdict.diff, cause)) for cause in CAUSES},
            "rollup": "equal" if verdict.figures.rollup_equal else "differs",
        }
        for verdict in report.findings
    ]
    return table(rows, columns)


def checkpoint(at: Checkpoint | None) -> dict[str, Any]:
    if at is None:
        return {"tree size": 0}
    return {"tree size": at.size, "root": at.root.hex(), "checkpoint": dg.MetadataValue.md(f"```\n{at.text()}```")}


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, int) and abs(value) > 2**53 else value
