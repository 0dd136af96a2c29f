"""A week of `make up`, compressed: what Dagster's storage, the database, ClickHouse and memory have become each day.

    python -m benchmarks.week                       seven days of a job a second
    python -m benchmarks.week --days 2 --rate 6     two days of a job in ten seconds
    python -m benchmarks.week --write               and put the figures into docs/benchmarks.md

The clock is injected: a simulated minute takes as long as its work. Events go through the real interfaces, outbox, fast
path, flush each minute, reconciliation of the current hour each five, in one process that holds ClickHouse too. Two
things are compressed. A flush a minute stands for the two or three that the backlog's sensor asks for. And of the runs
and reports that Dagster would record, about `--runs` a day are real; the rest are the same library calls without one.
The figures say what a run takes, how far housekeeping holds the total, and what that makes at the true number of runs.
Each midnight housekeeping deletes what is older than `--retention` days (of SQL: at least two): from Dagster's storage
by the time at which that day began, from SQL by the injected clock. Partial tiles go at once.
Exit codes: 0 measured, 1 a finding (an hour that is not reconciled, an event lost).
"""

from __future__ import annotations

import platform as machine
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import dagster as dg
import msgspec
import numpy as np
from dagster._core.events import StepMaterializationData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID

from benchmarks.audit_subjects import make_table, timed
from benchmarks.machine import CHECKOUT, describe_machine, own_version
from benchmarks.report import replace_section
from benchmarks.year import size_of
from render_platform.clock import DAY_US, US_PER_SECOND, ManualClock, SystemClock, hour_of, iso, time_us
from render_platform.config import Settings, load_settings
from render_platform.errors import Finding, PlatformError
from render_platform.events import Totals, UsageEvent, plain_rows, table_from_events
from render_platform.fast_path import FastPath
from render_platform.gateway.reporter import report_metadata
from render_platform.pipeline import Platform, open_platform
from render_platform.tiles import PARTIALS_KEPT_US, prune_partials
from resources.local import LocalDagster
from sensors.housekeeping import prune

BEGIN, END = "<!-- week -->", "<!-- /week -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PACKAGES = ("dagster", "duckdb", "chdb", "pyarrow", "sqlalchemy")
FIRST_US = time_us("2024-01-01T00:00:00Z")
LANE = "trace/week"
"""Its clock is its own: runs have the machine's, and would declare the hours of `live` up to now complete."""
MINUTE_US = 60 * US_PER_SECOND
RECONCILE_MINUTES = 5
RUNS_A_DAY = 24 * 60 * 3 + 24 * 12
"""What `make up` makes under load: a flush in each 20 s or so, and a reconciliation in each five minutes."""
REPORTS_A_DAY = 24 * 60 * 2
HEADER = ("day", "events", "runs kept", "Dagster MB", "platform.db MB", "evidence MB", "ClickHouse MB", "RSS MB")
RULE = "| " + " | ".join("-" * (len(name) - 1) + ":" for name in HEADER) + " |"


class Day(msgspec.Struct, frozen=True):
    """How things stand after a day's housekeeping: numbers so far, and bytes of files and of memory."""

    events: int
    runs_kept: int
    dagster_bytes: int
    database_bytes: int
    evidence_bytes: int
    clickhouse_bytes: int
    rss_bytes: int


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    rate: int
    runs_a_day: int
    retention_days: int
    wall_us: int
    run_bytes: int
    days: list[Day]
    machine: dict[str, str]
    versions: dict[str, str]


class Week:
    """One state folder, its clock, and Dagster's instance in it."""

    def __init__(self, settings: Settings, platform: Platform, clock: ManualClock, rate: int, seed: int) -> None:
        self._settings, self._platform, self._clock, self._rate = settings, platform, clock, rate
        self._rng = np.random.default_rng(seed)
        self._fast = FastPath(platform.clickhouse, clock)
        self._dagster = LocalDagster(settings)
        self._instance = dg.DagsterInstance.from_config(str(settings.dagster_home))
        self._midnights: list[datetime] = []
        self.events = 0
        with platform.database.write() as connection:
            platform.outbox.open_lane(connection, LANE, FIRST_US)

    def close(self) -> None:
        self._instance.dispose()
        self._dagster.close()

    def live_a_day(self, number: int, runs: int, retention_days: int) -> Day:
        """A simulated day, minute by minute, and the housekeeping after it."""
        self._midnights.append(datetime.now(UTC))
        begin_us = FIRST_US + number * DAY_US
        real = runs / RUNS_A_DAY
        for minute_us in range(begin_us, begin_us + DAY_US, MINUTE_US):
            self._clock.move_to(minute_us + MINUTE_US)
            self._record(minute_us)
            self._flush(self._rng.random() < real * 3)
            if (minute_us // MINUTE_US + 1) % RECONCILE_MINUTES == 0:
                self._reconcile(minute_us, self._rng.random() < real)
            if self._rng.random() < real * REPORTS_A_DAY / (24 * 60):
                self._report(minute_us)
        if number >= retention_days:
            prune(self._instance, self._midnights[number - retention_days + 1])
        self._prune_evident(begin_us + (1 - max(2, retention_days)) * DAY_US)
        return self._measure()

    def _prune_evident(self, before_us: int) -> None:
        """What housekeeping does for `live` and the log, as if a day had gone by since files were written."""
        self._platform.outbox.prune(self._platform.cas, LANE, before_us)
        checkpoint = self._platform.log.published()
        if checkpoint is not None:
            tomorrow = ManualClock(SystemClock().now_us() + PARTIALS_KEPT_US)
            prune_partials(self._platform.log_objects, checkpoint.size, tomorrow)

    def _record(self, minute_us: int) -> None:
        """The minute's jobs, evenly, each on a device of its own: no job takes half a minute, so no two overlap."""
        rows = plain_rows(make_table(self._rate, hour_of(minute_us), self._rng))
        made = [UsageEvent.recorded(row) for row in rows]
        moved = [
            replace(_moved(event, minute_us + place * MINUTE_US // self._rate), device_uuid=f"GPU-{place}")
            for place, event in enumerate(made)
        ]
        with self._platform.database.write() as connection:
            recorded = self._platform.outbox.record(connection, LANE, moved)
        self._fast.publish(table_from_events(recorded))
        self.events += len(recorded)

    def _flush(self, as_run: bool) -> None:
        if as_run:
            self._dagster.flush()
        else:
            self._platform.flush()

    def _reconcile(self, minute_us: int, as_run: bool) -> None:
        due = [hour for hour in self._platform.hours.due() if hour != hour_of(minute_us)]
        hours = [*due, hour_of(minute_us)]
        if as_run:
            self._dagster.reconcile(hours)
        else:
            for hour in hours:
                self._platform.reconcile(hour)

    def _report(self, minute_us: int) -> None:
        """What the webserver stores of a gateway's report."""
        figures = {("a model", "success"): Totals(self._rate, self._rate * US_PER_SECOND)}
        metadata = report_metadata("gateway", minute_us, minute_us + MINUTE_US, figures, f"gateway/1/{minute_us}")
        made = StepMaterializationData(dg.AssetMaterialization("gpu_jobs", metadata=metadata))
        event = dg.DagsterEvent("ASSET_MATERIALIZATION", RUNLESS_JOB_NAME, event_specific_data=made)
        self._instance.report_dagster_event(event, RUNLESS_RUN_ID)

    def _measure(self) -> Day:
        state = self._settings.state_dir
        return Day(
            self.events,
            self._instance.get_runs_count(),
            size_of(self._settings.dagster_home),
            self._database_bytes(),
            size_of(self._settings.blobs_dir) + size_of(self._settings.log_dir),
            size_of(state / "clickhouse"),
            _rss(),
        )

    def _database_bytes(self) -> int:
        """What the database holds. Its journal of writes, of 32 MiB at most, is beside it."""
        with self._platform.database.read() as connection:
            pages, size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
            )
        return int(pages) * int(size)

    def finish(self) -> None:
        """The lane ends, the last hours are reported; Finding where an event or a verdict is missing."""
        end_us = self._clock.now_us()
        with self._platform.database.write() as connection:
            deadline_us = self._settings.fast_path_deadline_s * US_PER_SECOND
            self._platform.outbox.finish_lane(connection, LANE, end_us + deadline_us)
        self._platform.flush()
        for hour in self._platform.hours.due():
            self._platform.reconcile(hour)
        bad = self._platform.hours.unreconciled()
        if bad or self._fast.dropped:
            raise Finding(f"{len(bad)} hours are not reconciled, first {bad[:1]}; {self._fast.dropped} dropped")
        published = self._platform.outbox.progress()["published"]
        if published != self.events:
            raise Finding(f"{self.events} events were recorded and {published} published")


def run(days: int, rate: int, runs: int, retention_days: int, folder: Path, seed: int) -> Report:
    """Everything, in `folder`."""
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    described = describe_machine(folder)
    settings = load_settings(environ={}, state_dir=folder / "state")
    with timed() as wall, _week(settings, rate, seed) as week:
        found = []
        for number in range(days):
            found.append(week.live_a_day(number, runs, retention_days))
            _say(f"day {number + 1} of {days}: {_line(_cells(number + 1, found[-1]))}")
        week.finish()
    first = found[0]
    versions = {"render-platform": own_version(), "Python": machine.python_version()}
    return Report(
        measured_at,
        rate,
        runs,
        retention_days,
        wall.us,
        first.dagster_bytes // max(1, first.runs_kept),
        found,
        described,
        {**versions, **{name: version(name) for name in PACKAGES}},
    )


@contextmanager
def _week(settings: Settings, rate: int, seed: int) -> Iterator[Week]:
    clock = ManualClock(FIRST_US)
    with open_platform(settings, clock, create=True) as platform:
        week = Week(settings, platform, clock, rate, seed)
        try:
            yield week
        finally:
            week.close()


def _moved(event: UsageEvent, at_us: int) -> UsageEvent:
    """The same work, recorded then."""
    shift_us = at_us - event.recorded_at
    return replace(
        event,
        recorded_at=at_us,
        event_time=event.event_time + shift_us,
        gpu_started_at=event.gpu_started_at + shift_us,
    )


def _rss() -> int:
    """Bytes of memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096


def render(report: Report) -> str:
    """The Markdown of a report."""
    kept = report.run_bytes * RUNS_A_DAY
    per_event = _per_event(report.days[max(2, report.retention_days) :])
    lines = [
        f"Measured {report.measured_at}: {len(report.days)} simulated days of {report.rate} jobs a minute, in "
        f"{report.wall_us / 60e6:,.1f} minutes, in one process that holds the embedded ClickHouse and Dagster too. "
        f"About {report.runs_a_day} runs a day are Dagster's, the rest the same library calls; housekeeping keeps "
        f"{report.retention_days} days.",
        "\n".join([_line(HEADER), RULE, *(_line(_cells(n, day)) for n, day in enumerate(report.days, 1))]),
        f"A run takes {report.run_bytes / 1e3:,.0f} KB of Dagster's storage until housekeeping deletes it, files and "
        f"all. `make up` under load makes about {RUNS_A_DAY:,} runs a day, {kept / 1e9:,.1f} GB, and holds "
        f"`dagster_retention_days` of them: {kept * 7 / 1e9:,.1f} GB at 7, {kept * 30 / 1e9:,.0f} GB at 30. The "
        f"database keeps the rows of {max(2, report.retention_days)} days, and grows by {per_event:,} bytes an event "
        "after that: where each event is, and the log.",
        "Machine:\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.machine.items()),
        "Versions:\n\n- " + ", ".join(f"{name} {value}" for name, value in report.versions.items()),
    ]
    return "\n\n".join(lines)


def _per_event(days: Sequence[Day]) -> int:
    """Bytes by which the database grew with each event over these days; 0 where that is not known."""
    events = days[-1].events - days[0].events if days else 0
    return (days[-1].database_bytes - days[0].database_bytes) // events if events else 0


def _cells(number: int, day: Day) -> list[str]:
    sizes = day.dagster_bytes, day.database_bytes, day.evidence_bytes, day.clickhouse_bytes, day.rss_bytes
    return [str(number), f"{day.events:,}", f"{day.runs_kept:,}", *(f"{size / 1e6:,.1f}" for size in sizes)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(f"{cell:>{len(HEADER[n])}}" for n, cell in enumerate(cells)) + " |"


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--days", type=click.IntRange(1, 31), default=7, show_default=True)
@click.option("--rate", type=click.IntRange(1, 60), default=60, show_default=True, help="Jobs a minute.")
@click.option("--runs", type=click.IntRange(1, RUNS_A_DAY // 3), default=96, show_default=True, help="Runs a day.")
@click.option("--retention", type=click.IntRange(1, 31), default=2, show_default=True, help="Days of runs kept.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="Scratch [.bench].")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--write", "into_docs", is_flag=True, help="Also put the figures into docs/benchmarks.md.")
def main(
    days: int, rate: int, runs: int, retention: int, seed: int, cache: Path, as_json: bool, into_docs: bool
) -> None:
    """Live through some days of load, compressed; see the module."""
    cache = cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="week-", dir=cache))
    try:
        report = run(days, rate, runs, retention, folder, seed)
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
