"""A year of hours, recorded and delivered, then reconciled in one backfill: the time, memory and disk that it takes.

    python -m benchmarks.year                       8,760 hours of 1,000 events each
    python -m benchmarks.year --hours 744           a month
    python -m benchmarks.year --write               and put the figures into docs/benchmarks.md

Writing goes through the real interfaces: outbox, seal, store, log; ClickHouse inserts. The backfill is runs of 744
partitions of the asset `reconciliation`, one after the other, in a process of its own, on the state folder's Dagster
instance; ClickHouse is embedded in that process. Then the same hours again, where nothing has changed.
Exit codes: 0 measured, 1 a finding (an hour that is not reconciled, an entry too many).
"""

from __future__ import annotations

import multiprocessing
import platform as machine
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import click
import msgspec
import numpy as np
import sqlalchemy as sa

from benchmarks.audit_subjects import make_table, timed
from benchmarks.machine import CHECKOUT, describe_machine, own_version
from benchmarks.report import replace_section
from render_platform.clock import HOUR_US, US_PER_SECOND, Clock, SystemClock, iso, time_us
from render_platform.config import Settings, load_settings
from render_platform.database import log_entries
from render_platform.errors import Finding, PlatformError
from render_platform.events import UsageEvent, plain_rows, table_from_events
from render_platform.fast_path import FastPath
from render_platform.pipeline import Platform, open_platform

BEGIN, END = "<!-- year -->", "<!-- /year -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PACKAGES = ("dagster", "duckdb", "chdb", "pyarrow", "sqlalchemy")
FIRST_US = time_us("2023-01-01T00:00:00Z")
LANE = "trace/year"
FLUSH_HOURS = 24
PASSES = ("first", "again")
HEADER = (
    "backfill",
    "minutes",
    "CPU minutes",
    "hours/s",
    "ms an hour",
    "peak RSS MB",
    "Dagster MB",
    "bytes a partition",
)
RULE = "| " + " | ".join(["-" * len(HEADER[0]), *("-" * (len(name) - 1) + ":" for name in HEADER[1:])]) + " |"


class Pass(msgspec.Struct, frozen=True):
    """One backfill over all hours: µs of wall clock and of CPU, the process's peak RSS so far, what it left behind.

    `run_bytes` are the bytes that Dagster's instance grew by; `entries` how many reports the log holds after it.
    """

    wall_us: int
    cpu_us: int
    peak_bytes: int
    run_bytes: int
    entries: int


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    hours: int
    events_per_hour: int
    write_us: int
    evidence_bytes: int
    clickhouse_bytes: int
    state_bytes: int
    passes: list[Pass]
    machine: dict[str, str]
    versions: dict[str, str]


def run(hours: int, events_per_hour: int, passes_wanted: int, folder: Path, seed: int) -> Report:
    """Everything, in `folder`; Finding where an hour is not reconciled in the end."""
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    described = describe_machine(folder)
    settings = load_settings(environ={}, state_dir=folder / "state")
    with timed() as writing:
        write(settings, hours, events_per_hour, np.random.default_rng(seed))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        passes = [apart.submit(backfill, settings.state_dir, hours).result() for _ in range(passes_wanted)]
    if [one.entries for one in passes] != [hours] * passes_wanted:
        raise Finding(f"{hours} hours were reported in {[one.entries for one in passes]} entries")
    versions = {"render-platform": own_version(), "Python": machine.python_version()}
    return Report(
        measured_at,
        hours,
        events_per_hour,
        writing.us,
        size_of(settings.state_dir / "blobs") + size_of(settings.state_dir / "log"),
        size_of(settings.state_dir / "clickhouse"),
        size_of(settings.state_dir),
        passes,
        described,
        {**versions, **{name: version(name) for name in PACKAGES}},
    )


def write(settings: Settings, hours: int, events_per_hour: int, rng: np.random.Generator) -> None:
    """The hours, recorded, delivered to ClickHouse, flushed a day at a time; their lane is finished."""
    clock: Clock = SystemClock()
    end_us = FIRST_US + hours * HOUR_US
    with open_platform(settings, clock, create=True) as platform:
        fast = FastPath(platform.clickhouse, clock)
        with platform.database.write() as connection:
            platform.outbox.open_lane(connection, LANE, FIRST_US, end_us)
        waiting: list[UsageEvent] = []
        for number, hour_us in enumerate(range(FIRST_US, end_us, HOUR_US), 1):
            rows = plain_rows(make_table(events_per_hour, hour_us, rng).sort_by("recorded_at"))
            with platform.database.write() as connection:
                waiting += platform.outbox.record(connection, LANE, [UsageEvent.recorded(row) for row in rows])
            if number % FLUSH_HOURS == 0 or number == hours:
                fast.publish(table_from_events(waiting))
                waiting = []
                platform.flush()
                _say(f"{number:,} of {hours:,} hours written")
        if fast.dropped:
            raise Finding(f"ClickHouse did not take {fast.dropped} events: {fast.last_error}")
        with platform.database.write() as connection:
            deadline_us = settings.fast_path_deadline_s * US_PER_SECOND
            platform.outbox.finish_lane(connection, LANE, end_us + deadline_us)
        platform.flush()


def backfill(state: Path, hours: int) -> Pass:
    """Reconcile all hours in runs of the Dagster asset, in this process; Finding where one is not reconciled."""
    from resources.local import LocalDagster  # here: the process that writes needs no Dagster

    settings = load_settings(environ={}, state_dir=state)
    before, cpu_us = size_of(settings.dagster_home), _cpu_us()
    with timed() as clock:
        dagster = LocalDagster(settings)
        dagster.reconcile(range(FIRST_US, FIRST_US + hours * HOUR_US, HOUR_US))
        dagster.close()
    spent_us, peak = _cpu_us() - cpu_us, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open_platform(settings) as platform:
        bad = platform.hours.unreconciled()
        if bad:
            raise Finding(f"{len(bad)} hours are not reconciled, first {bad[0]}")
        entries = _count_reports(platform)
    return Pass(clock.us, spent_us, peak, size_of(settings.dagster_home) - before, entries)


def _count_reports(platform: Platform) -> int:
    query = sa.select(sa.func.count()).select_from(log_entries).where(log_entries.c.type == "reconciliation")
    with platform.database.read() as connection:
        return int(connection.execute(query).scalar_one())


def _cpu_us() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int((used.ru_utime + used.ru_stime) * US_PER_SECOND)


def size_of(folder: Path) -> int:
    """Bytes of the files below, as their lengths say."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def render(report: Report) -> str:
    """The Markdown of a report."""
    events = report.hours * report.events_per_hour
    lines = [
        f"Measured {report.measured_at}, in one run: {report.hours:,} hours of {report.events_per_hour:,} events each "
        f"({events:,} events, of 500 customers), recorded, sealed, stored, logged and delivered in "
        f"{report.write_us / 60e6:,.1f} minutes. Then `reconciliation` over all of them, in Dagster runs of up to 744 "
        "partitions, one after the other, in one process that holds the embedded ClickHouse too.",
        "\n".join(
            [_line(HEADER), RULE, *(_row(*one, report.hours) for one in zip(PASSES, report.passes, strict=False))]
        ),
        f"The state folder then holds {report.state_bytes / 1e6:,.0f} MB: {report.evidence_bytes / 1e6:,.0f} MB of "
        f"evidence, {report.clickhouse_bytes / 1e6:,.0f} MB of ClickHouse. "
        f"The log holds {report.passes[-1].entries:,} reports, one an hour.",
        "Machine:\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.machine.items()),
        "Versions:\n\n- " + ", ".join(f"{name} {value}" for name, value in report.versions.items()),
    ]
    return "\n\n".join(lines)


def _row(name: str, one: Pass, hours: int) -> str:
    figures = (
        f"{one.wall_us / 60e6:,.1f}",
        f"{one.cpu_us / 60e6:,.1f}",
        f"{hours * 1e6 / one.wall_us:,.1f}",
        f"{one.wall_us / 1e3 / hours:,.1f}",
        f"{one.peak_bytes / 1e6:,.0f}",
        f"{one.run_bytes / 1e6:,.0f}",
        f"{one.run_bytes // hours:,}",
    )
    return _line([name, *figures])


def _line(cells: Sequence[str]) -> str:
    first, *others = [f"{cell:{'>' if n else '<'}{len(HEADER[n])}}" for n, cell in enumerate(cells)]
    return "| " + " | ".join([first, *others]) + " |"


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--hours", type=click.IntRange(1, 8_760), default=8_760, show_default=True)
@click.option("--events-per-hour", type=click.IntRange(1, 50_000), default=1_000, show_default=True)
@click.option("--passes", type=click.IntRange(1, 2), default=2, show_default=True, help="2: the same hours again.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="Scratch [.bench].")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--write", "into_docs", is_flag=True, help="Also put the figures into docs/benchmarks.md.")
def main(hours: int, events_per_hour: int, passes: int, seed: int, cache: Path, as_json: bool, into_docs: bool) -> None:
    """Write a year of hours and backfill its reconciliation; see the module."""
    cache = cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="year-", dir=cache))
    try:
        report = run(hours, events_per_hour, passes, folder, seed)
    except PlatformError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    finally:
        shutil.rmtree(folder)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if into_docs:
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text() if DOCUMENT.exists() else "", section, BEGIN, END))
        _say(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
