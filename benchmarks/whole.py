"""What a flush costs beside the bare limit of the same work, how it grows, and on which stores.

    python -m benchmarks.whole                       one million and ten million events
    python -m benchmarks.whole --events 50000        a small one: 50,000 and 500,000
    python -m benchmarks.whole --write               and put the table into docs/benchmarks.md

A flush is timed from rows in the outbox to the signed checkpoint. Its bare limit is what nobody can leave out, in the
same process over the same rows: SQL read batch by batch, Parquet, SHA-256, a synced file. What a flush does beyond it:
rows are moved into batches by commits, canonical bytes, Merkle roots and attestations are made, all is read back,
entries are chained and signed. PostgreSQL and SeaweedFS are started by the run; where they cannot be, the row says so.
Every case is a process of its own, so that its peak memory is its own. Exit codes: 0 measured, 1 a finding.
"""

from __future__ import annotations

import hashlib
import os
import platform as python
import resource
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
import sqlalchemy as sa

from benchmarks.audit_subjects import FIRST_HOUR_US, as_events, make_table, timed
from benchmarks.machine import CHECKOUT, describe_machine, own_version
from benchmarks.processes import run_apart
from benchmarks.report import aim_line, aligned_table, replace_section
from render_platform import batches, database
from render_platform.clock import HOUR_US, US_PER_SECOND, ManualClock, SystemClock, iso
from render_platform.config import load_settings
from render_platform.errors import Finding, PlatformError
from render_platform.events import COLUMNS, table_from_rows
from render_platform.objects import sync_folder
from render_platform.outbox import LIVE
from render_platform.pipeline import Platform, open_platform
from tests import postgres
from tests.conformance import s3_server

BEGIN, END = "<!-- whole -->", "<!-- /whole -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PACKAGES = ("pyarrow", "sqlalchemy", "pysqlite3", "psycopg", "s3fs")
HOUR_ROWS, COMMIT_ROWS = 50_000, 5_000
"""Events of an hour, which are one batch; of a commit into the outbox."""
AIM, GROWTH_AIM = 0.5, 1.0
HEADER = (
    *("database", "objects", "events", "recorded µs", "flush s", "µs an event"),
    *("bare limit s", "bare / flush", "peak MiB"),
)


class Case(msgspec.Struct, frozen=True):
    database: str
    objects: str
    events: int


class Row(msgspec.Struct, frozen=True):
    """`failure` says why there is nothing. Times in µs for all events, `bytes` of all Parquet objects."""

    case: Case
    record_us: int = 0
    flush_us: int = 0
    bare_us: int = 0
    rss_mib: int = 0
    bytes: int = 0
    failure: str = ""

    @property
    def us_an_event(self) -> float:
        return self.flush_us / self.case.events


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    machine: dict[str, str]
    versions: dict[str, str]
    rows: list[Row]


def run(events: int, cache: Path, seed: int) -> Report:
    cache.mkdir(parents=True, exist_ok=True)
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    machine = describe_machine(cache)
    cases = [
        Case("SQLite", "folder", events),
        Case("SQLite", "S3", events),
        Case("PostgreSQL", "folder", events),
        Case("PostgreSQL", "S3", events),
        Case("SQLite", "folder", 10 * events),
    ]
    rows = []
    for case in cases:
        click.echo(f"{case.events:,} events, {case.database}, {case.objects}", err=True)
        rows.append(run_apart(measure, case, cache, seed))
    names = {name: version(name) for name in PACKAGES}
    return Report(
        measured_at, machine, {"render-platform": own_version(), "Python": python.python_version()} | names, rows
    )


def measure(case: Case, cache: Path, seed: int) -> Row:
    work = Path(tempfile.mkdtemp(prefix="whole-", dir=cache))
    try:
        with ExitStack() as servers:
            return _measure(case, work, seed, _settings(case, work, servers))
    except pytest.skip.Exception as reason:
        return Row(case, failure=str(reason))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _settings(case: Case, work: Path, servers: ExitStack) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if case.database == "PostgreSQL":
        server = postgres.Server()
        servers.callback(server.stop)
        settings["database_url"] = f"{server.url}postgres"
    if case.objects == "S3":
        patch = servers.enter_context(pytest.MonkeyPatch.context())
        s3_server.use_credentials(patch)
        (work / "s3").mkdir()
        settings["objects_endpoint"] = servers.enter_context(s3_server.start_seaweed(work / "s3")).endpoint
        settings["objects_url"] = "s3://plain/bench"
    return settings


def _measure(case: Case, work: Path, seed: int, settings: dict[str, Any]) -> Row:
    hours = -(-case.events // HOUR_ROWS)
    clock = ManualClock(FIRST_HOUR_US + (hours + 1) * HOUR_US)
    chosen = load_settings(environ={}, state_dir=work / "state", batch_rows=HOUR_ROWS, **settings)
    with open_platform(chosen, clock, create=True) as platform:
        record_us = _record(platform, case.events, np.random.default_rng(seed))
        with timed() as flush:
            state = platform.flush()
        if state.checkpoint is None or state.logged < hours or platform.outbox.totals().events != case.events:
            raise Finding(f"{case}: the flush published {state.logged} entries of {hours} hours")
        bare_us, size = _bare(platform, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Row(case, record_us, flush.us, bare_us, peak, size)


def _record(platform: Platform, count: int, rng: np.random.Generator) -> int:
    """Into the outbox, an hour at a time; how long the commits took."""
    spent = 0
    for number, start in enumerate(range(0, count, HOUR_ROWS)):
        made = as_events(make_table(min(HOUR_ROWS, count - start), FIRST_HOUR_US + number * HOUR_US, rng))
        made.sort(key=lambda event: event.recorded_at)
        begun = time.perf_counter_ns()
        for first in range(0, len(made), COMMIT_ROWS):
            with platform.database.write() as connection:
                platform.outbox.record(connection, LIVE, made[first : first + COMMIT_ROWS])
        spent += time.perf_counter_ns() - begun
    return spent // 1_000


def _bare(platform: Platform, work: Path) -> tuple[int, int]:
    """The same batches: read from SQL, written as Parquet, hashed and synced. µs, and bytes."""
    table = database.usage_events
    folder, size = work / "bare", 0
    folder.mkdir()
    with platform.database.read() as connection:
        named = sa.select(database.batches.c.batch_id).filter_by(type="usage_batch")
        ids = connection.execute(named.order_by(database.batches.c.ordinal)).scalars().all()
    columns = sa.select(*(table.c[name] for name in COLUMNS))
    with timed() as clock:
        for number, batch_id in enumerate(ids):
            with platform.database.read() as connection:
                rows = connection.execute(columns.where(table.c.batch_id == batch_id).order_by(table.c.event_id)).all()
            data = batches.encode(table_from_rows(rows))
            hashlib.sha256(data).digest()
            with (folder / str(number)).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)
            size += len(data)
    return clock.us, size


def render(report: Report) -> str:
    """The Markdown of a report."""
    first, *others, last = [row for row in report.rows if not row.failure]
    said = (
        f"Measured {report.measured_at}, in one run, each case in a process of its own with servers of its own: "
        f"{HOUR_ROWS:,} events an hour, one batch each, recorded in commits of {COMMIT_ROWS:,}. Parquet takes "
        f"{first.bytes / first.case.events:.0f} bytes an event."
    )
    growth = last.us_an_event / first.us_an_event
    ratios = [
        aim_line("bare limit / flush, SQLite and a folder", first.bare_us / first.flush_us, AIM, at_most=False),
        aim_line(f"µs an event at {last.case.events:,} / at {first.case.events:,}", growth, GROWTH_AIM, at_most=True),
        *(
            f"flush on {row.case.database} and {row.case.objects} / on SQLite and a folder:"
            f" {row.flush_us / first.flush_us:.2f}"
            for row in others
        ),
    ]
    parts = {
        "Ratios": ratios,
        "Machine": [f"{name}: {value}" for name, value in report.machine.items()],
        "Versions": [", ".join(f"{name} {value}" for name, value in report.versions.items())],
    }
    bullets = (f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in parts.items())
    return "\n\n".join([said, aligned_table([HEADER, *map(_cells, report.rows)], 2), *bullets])


def _cells(row: Row) -> tuple[str, ...]:
    case = row.case
    where = (case.database, case.objects, f"{case.events:,}")
    if row.failure:
        return (*where, f"not measured: {row.failure}", *("" for _ in HEADER[4:]))
    bare_s, flush_s = row.bare_us / US_PER_SECOND, row.flush_us / US_PER_SECOND
    record = f"{row.record_us / case.events:.1f}"
    return (
        *(*where, record, f"{flush_s:.2f}", f"{row.us_an_event:.2f}"),
        *(f"{bare_s:.2f}", f"{bare_s / flush_s:.2f}", f"{row.rss_mib:,}"),
    )


@click.command()
@click.option("--events", type=click.IntRange(1_000, 10_000_000), default=1_000_000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="Scratch [.bench].")
@click.option("--json", "as_json", is_flag=True, help="Print every case as one JSON object.")
@click.option("--write", "keep", is_flag=True, help="Also put the table into docs/benchmarks.md.")
def main(events: int, seed: int, cache: Path, as_json: bool, keep: bool) -> None:
    """Measure flushes; see the module for what beside what."""
    try:
        report = run(events, cache.absolute(), seed)
    except PlatformError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if keep:
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text() if DOCUMENT.exists() else "", section, BEGIN, END))
        click.echo(f"written to {DOCUMENT}", err=True)
    sys.exit(1 if any(row.failure for row in report.rows) else 0)


if __name__ == "__main__":
    main()
