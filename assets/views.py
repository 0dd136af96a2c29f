"""Metadata that a person reads, made from what the library returns."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

import dagster as dg
import pyarrow as pa

from render_platform.cas import path_of
from render_platform.clickhouse_schema import CustomerUsage
from render_platform.clock import WINDOW_US, Clock, iso
from render_platform.config import Settings
from render_platform.database import batches
from render_platform.entries import AuditEntry
from render_platform.errors import PlatformError
from render_platform.events import EVENT_SCHEMA
from render_platform.hours import LastReport
from render_platform.note import Checkpoint
from render_platform.reconciler import RepairOutcome
from render_platform.reconciliation import CAUSES, HourReport, WindowVerdict

MAX_ROWS = 200
MAX_LINKS = 20
TOP_CUSTOMERS = 10
_ANY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104  compared with, never bound


# The columns of what a row is, for Dagster's column panel.


def columns(*of: tuple[str, str, bool]) -> dg.TableSchema:
    """Name, type, and whether it may be null, of each column."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name, kind, constraints=dg.TableColumnConstraints(nullable=nullable))
            for name, kind, nullable in of
        ]
    )


def event_columns() -> dg.TableSchema:
    """The columns of a usage event."""
    return columns(*((f.name, "uuid" if f.type == pa.uuid() else str(f.type), f.nullable) for f in EVENT_SCHEMA))


def batch_columns() -> dg.TableSchema:
    """The columns of a batch in SQL."""
    return columns(*((c.name, str(c.type).lower(), bool(c.nullable)) for c in batches.columns))


def entry_columns() -> dg.TableSchema:
    """The fields of an entry of the log."""
    return fields_of(AuditEntry)


def window_columns() -> dg.TableSchema:
    """The fields of a window's verdict, as a report holds it."""
    return fields_of(WindowVerdict)


def repair_columns() -> dg.TableSchema:
    """What is said of the repair of an hour."""
    texts = ((name, "str", False) for name in ("hour", "way", "status before", "status after"))
    return columns(*texts, ("inserted", "int", False))


def fields_of(record: type) -> dg.TableSchema:
    """The fields of a frozen record; a type that is bounded is shown as what it bounds."""
    known = get_type_hints(record)
    kinds = {name: kind.__name__ for name, kind in known.items() if isinstance(kind, type)}
    found = ((field.name, kinds.get(field.name, str(field.type))) for field in dataclasses.fields(record))
    return columns(*((name, kind.removesuffix(" | None"), kind.endswith(" | None")) for name, kind in found))


# Values.


class Stages:
    """How long the stages of a body took: metadata in ms, by the clock of the platform."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._since_us = clock, clock.now_us()
        self.metadata: dict[str, int] = {}

    def ended(self, stage: str) -> None:
        now_us = self._clock.now_us()
        self.metadata[f"{stage} ms"] = (now_us - self._since_us) // 1_000
        self._since_us = now_us


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dg.TableMetadataValue:
    records = [dg.TableRecord({name: _cell(row[name]) for name in columns}) for row in list(rows)[:MAX_ROWS]]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=[dg.TableColumn(n) for n in columns]))


def gpu_seconds(gpu_time_ns: int) -> str:
    """Exact decimal seconds, for reading; only nanoseconds are stored."""
    seconds, rest = divmod(abs(gpu_time_ns), 1_000_000_000)
    return f"{'-' if gpu_time_ns < 0 else ''}{seconds:,}.{rest:09d}".rstrip("0").rstrip(".")


def problems(found: Sequence[str]) -> dg.MarkdownMetadataValue:
    """A list, cut where it is long."""
    return dg.MetadataValue.md("\n".join(f"- {text}" for text in found[:50]))


def objects(settings: Settings, named: Sequence[tuple[str, str, int | None]]) -> dg.MarkdownMetadataValue:
    """A line an object of (name, digest, bytes): a link to the gateway, which shows it to auditors, and its place."""
    lines = [
        f"- {name}: {link(settings, f'v1/objects/{digest}', digest)}, "
        f"{'' if size is None else f'{size:,} bytes, '}`{_place(settings, digest)}`"
        for name, digest, size in named[:MAX_LINKS]
    ]
    more = [f"- and {len(named) - MAX_LINKS} more"] if len(named) > MAX_LINKS else []
    return dg.MetadataValue.md("\n".join(lines + more) or "none")


def link(settings: Settings, path: str, text: str) -> str:
    """Markdown: to a path of the gateway; the text alone where nobody knows the gateway's port."""
    host = "127.0.0.1" if settings.gateway_host in _ANY_ADDRESS else settings.gateway_host
    host = f"[{host}]" if ":" in host else host
    return f"[{text}](http://{host}:{settings.gateway_port}/{path})" if settings.gateway_port else text


def _place(settings: Settings, digest: str) -> str:
    return f"{settings.objects_url or settings.state_dir}/blobs/{path_of(digest)}"


def customers(used: Iterable[tuple[str, int, int]]) -> dg.TableMetadataValue:
    """Who used most, of (customer, events, GPU ns): references, as everywhere outside SQL, cut to be read."""
    events: dict[str, int] = defaultdict(int)
    gpu_time_ns: dict[str, int] = defaultdict(int)
    for ref, count, ns in used:
        events[ref] += count
        gpu_time_ns[ref] += ns
    top = sorted(gpu_time_ns, key=lambda ref: (-gpu_time_ns[ref], ref))[:TOP_CUSTOMERS]
    rows = [{"customer": r[:12], "events": events[r], "GPU seconds": gpu_seconds(gpu_time_ns[r])} for r in top]
    return table(rows, ["customer", "events", "GPU seconds"])


def customers_of(usage: Iterable[CustomerUsage]) -> dg.TableMetadataValue:
    return customers((one.customer_ref, one.events, one.gpu_time_ns) for one in usage)


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
