"""How long the verdict on an hour takes, beside the two bare engines and beside a table comparer.

    python -m benchmarks.reconcile                       an hour of ten million events
    python -m benchmarks.reconcile --events 200000       a small one
    python -m benchmarks.reconcile --write               and put the table into docs/benchmarks.md

(a) our verdict on an hour that is equal in both stores: both read, every digest checked, compared, report built and
logged; (b) the same aggregates asked of each engine alone, the Parquet files unchecked; (c) counts and sums only.
Then an hour with faults: (d) our verdict, which names each event; (e) datacompy, installed into the cache folder, on
the two tables as files. Exit codes: 0 measured, 1 a finding (a verdict that is not what was put there).
"""

from __future__ import annotations

import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.audit_subjects import FIRST_HOUR_US, make_table
from benchmarks.machine import CHECKOUT, describe_machine, own_version
from benchmarks.processes import run_apart, run_tool
from benchmarks.report import aim_line, aligned_table, replace_section
from render_platform import batches, database
from render_platform.cas import path_of
from render_platform.clock import HOUR_US, US_PER_SECOND, WINDOW_US, ManualClock, SystemClock, iso
from render_platform.config import load_settings
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, PlatformError
from render_platform.events import total_gpu_time_ns
from render_platform.pipeline import Platform, open_platform
from render_platform.slow_path import AGGREGATES

BEGIN, END = "<!-- reconcile -->", "<!-- /reconcile -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PACKAGES = ("duckdb", "chdb", "clickhouse-connect", "pyarrow")
DATACOMPY = "1.1.0"
INSTALL_S, COMPARE_S = 900, 3_600
GOOD_HOUR, BAD_HOUR = FIRST_HOUR_US, FIRST_HOUR_US + HOUR_US
ONE_IN = 1_000
"""Of the bad hour's rows so many are missing, and so many altered."""

OURS = "(a) our verdict: both sides, digests checked, report logged"
SLOW, FAST = "(b) DuckDB alone: the same sums, files unchecked", "(b) ClickHouse alone: the same sums"
PLAIN_SLOW, PLAIN_FAST = "(c) DuckDB: count and sum only", "(c) ClickHouse: count and sum only"
OURS_BAD = "(d) our verdict, each event named"
PEERS = {"pandas": "(e) datacompy, PandasCompare", "polars": "(e) datacompy, PolarsCompare"}
HEADER = ("what", "events", "seconds", "µs an event")
PLAIN_SQL = f"""SELECT epoch_us(recorded_at) // {WINDOW_US}, customer_ref, model_name, count(*), sum(gpu_time_ns)
FROM read_parquet($files) GROUP BY ALL"""  # noqa: S608
PLAIN_QUERY = f"""SELECT intDiv(toUnixTimestamp64Micro(recorded_at), {WINDOW_US}) AS w, customer_ref, model_name,
count(), toString(sum(toInt128(gpu_time_ns))) FROM usage_events
WHERE toStartOfHour(recorded_at) = toDateTime({{at:Int64}}, 'UTC') GROUP BY w, customer_ref, model_name"""  # noqa: S608
COMPARE = """
import resource, sys, time
import datacompy
if sys.argv[3] == "pandas":
    import pandas as frames
    comparer = datacompy.PandasCompare
else:
    import polars as frames
    comparer = datacompy.PolarsCompare
begun = time.perf_counter_ns()
tables = [frames.read_parquet(path) for path in sys.argv[1:3]]
compared = comparer(*tables, join_columns="event_id")
compared.report()
unequal = len(compared.all_mismatch())
print(time.perf_counter_ns() - begun, len(compared.df1_unq_rows), unequal, len(compared.df2_unq_rows))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class Plan(msgspec.Struct, frozen=True):
    """Events of the good hour and of the bad one; rows a batch."""

    events: int
    compared: int
    batch_rows: int
    rounds: int


class Row(msgspec.Struct, frozen=True):
    """One thing measured over `events`, in each round's `us`. `failure` says why there is none."""

    name: str
    events: int = 0
    us: list[int] = []
    rss_mib: int = 0
    failure: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(self.us) / US_PER_SECOND


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    plan: Plan
    machine: dict[str, str]
    versions: dict[str, str]
    rows: list[Row]


def run(plan: Plan, cache: Path, seed: int) -> Report:
    """Everything in one run. What opens ClickHouse does so in a process of its own: one process owns its folder."""
    cache.mkdir(parents=True, exist_ok=True)
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    machine = describe_machine(cache)
    work = Path(tempfile.mkdtemp(prefix="reconcile-", dir=cache))
    try:
        _say(f"writing {plan.events:,} and {plan.compared:,} events into both stores")
        run_apart(write, work, plan, seed)
        _say("reconciling")
        rows: list[Row] = run_apart(measure, work, plan)
        _say("comparing with datacompy")
        rows += [measure_peer(work, cache, plan, kind) for kind in PEERS]
        return Report(measured_at, plan, machine, collect_versions(), rows)
    finally:
        shutil.rmtree(work)


# Both stores, filled.


def open_bench(work: Path) -> Any:
    dsn = f"chdb://{work / 'clickhouse'}"
    settings = load_settings(environ={}, state_dir=work / "state", clickhouse_dsn=dsn, retention_days=0)
    return open_platform(settings, ManualClock(GOOD_HOUR + 10 * HOUR_US), create=True)


def write(work: Path, plan: Plan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with open_bench(work) as opened:
        lane = {"lane": "trace/bench", "state": "finished", "start_us": GOOD_HOUR, "end_us": BAD_HOUR + HOUR_US}
        times = {"frontier_us": BAD_HOUR + 2 * HOUR_US, "next_watermark_us": BAD_HOUR + HOUR_US}
        with opened.database.write() as connection:
            connection.execute(database.lanes.insert().values(**lane, **times))
        for number, table in enumerate(make_hour(GOOD_HOUR, plan.events, plan.batch_rows, rng)):
            _store(opened, GOOD_HOUR, number, table)
            opened.clickhouse.insert_events(table, f"good {number}")
        for number, table in enumerate(make_hour(BAD_HOUR, plan.compared, plan.batch_rows, rng)):
            _store(opened, BAD_HOUR, number, table)
            opened.clickhouse.insert_events(with_faults(table), f"bad {number}")
        opened.log.publish()


def make_hour(hour_us: int, count: int, batch_rows: int, rng: np.random.Generator) -> Iterator[pa.Table]:
    """Batches in the order of time, each of a like share of the hour. Ids are new in each, the rest repeats."""
    sizes = [min(batch_rows, count - start) for start in range(0, count, batch_rows)]
    model = make_table(sizes[0], hour_us, rng)
    models = pa.array([f"model-{n}" for n in range(4)])
    for number, size in enumerate(sizes):
        begin, end = (hour_us + HOUR_US * at // len(sizes) for at in (number, number + 1))
        columns = {"recorded_at": pa.array(np.sort(rng.integers(begin, end, size))).cast(pa.timestamp("us", "UTC"))}
        columns["model_name"] = models.take(pa.array(rng.integers(0, 4, size)))
        columns["nonce"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), size, [None, pa.py_buffer(rng.bytes(16 * size))]
        )
        columns["event_id"] = pa.ExtensionArray.from_storage(pa.uuid(), _ids(begin, end, size, rng))
        table = model.slice(0, size)
        for at, field in enumerate(table.schema):
            if field.name in columns:
                table = table.set_column(at, field, columns[field.name])
        yield table


def _ids(begin: int, end: int, size: int, rng: np.random.Generator) -> pa.Array:
    """UUIDv7 of the time, in order."""
    data = np.frombuffer(rng.bytes(16 * size), np.uint8).reshape(size, 16).copy()
    ms = np.sort(rng.integers(begin // 1_000, end // 1_000, size)).astype(">u8")
    data[:, :6] = ms.view(np.uint8).reshape(size, 8)[:, 2:]
    data[:, 6], data[:, 8] = data[:, 6] & 15 | 0x70, data[:, 8] & 63 | 0x80
    data = data[np.lexsort(data.T[::-1])]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), size, [None, pa.py_buffer(np.ascontiguousarray(data))])


def with_faults(table: pa.Table) -> pa.Table:
    """Every ONE_INth row missing, and one beside each altered in a column that no total shows."""
    at = np.arange(table.num_rows) % ONE_IN
    tiers = np.where(at == 1, "free", np.array(table.column("pricing_tier").to_pylist()))
    place = table.schema.get_field_index("pricing_tier")
    return table.set_column(place, table.schema.field(place), pa.array(tiers)).filter(pa.array(at != 0))


def _store(opened: Platform, hour_us: int, number: int, table: pa.Table) -> None:
    data = batches.encode(table)
    times = table.column("recorded_at").cast(pa.int64())
    entry = AuditEntry(
        type="usage_batch", batch_id=f"{iso(hour_us)[:13]}-{number:05d}", previous=FIRST_PREVIOUS, lane="trace/bench",
        recorded_hour=hour_us, batch_seq=number, first_recorded_at=times[0].as_py(), last_recorded_at=times[-1].as_py(),
        subject_digest=opened.cas.put(data), subject_size=len(data), records=table.num_rows,
        gpu_time_ns=total_gpu_time_ns(table),
    )  # fmt: skip
    opened.log.append(entry, lambda _connection, _index: None)


# What is measured.


def measure(work: Path, plan: Plan) -> list[Row]:
    with open_bench(work) as opened:
        state = work / "state" / "blobs"
        entries = opened.slow.hour(GOOD_HOUR)
        files = [str(state / path_of(str(entry.subject_digest))) for entry in entries]
        bare = {
            SLOW: lambda: _ask_duckdb(AGGREGATES, files),
            FAST: lambda: opened.clickhouse.window_aggregates(GOOD_HOUR, GOOD_HOUR + HOUR_US),
            PLAIN_SLOW: lambda: _ask_duckdb(PLAIN_SQL, files),
            PLAIN_FAST: lambda: opened.clickhouse.query(PLAIN_QUERY, at=GOOD_HOUR // US_PER_SECOND),
        }
        subjects = {OURS: lambda: _judge(opened, GOOD_HOUR, "reconciled", plan.events), **bare}
        us: dict[str, list[int]] = {name: [] for name in subjects}
        peak = 0
        for _ in range(plan.rounds):
            for name, act in subjects.items():
                us[name].append(_timed(act))
                peak = peak or _peak_mib()  # after our verdict alone, ClickHouse's engine in this process included
        rows = [Row(name, plan.events, each, peak if name == OURS else 0) for name, each in us.items()]
        bad = [_timed(lambda: _judge(opened, BAD_HOUR, "discrepant", plan.compared)) for _ in range(plan.rounds)]
        rows.append(Row(OURS_BAD, plan.compared, bad, _peak_mib()))
        export(opened, work)
        return rows


def _ask_duckdb(sql: str, files: list[str]) -> pa.Table:
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        return connection.sql(sql, params={"files": files}).to_arrow_table()


def _judge(opened: Platform, hour_us: int, status: str, events: int) -> None:
    report = opened.reconcile(hour_us)
    if (report.status, report.total("events")) != (status, events):
        raise Finding(f"the verdict is not what was put there: {report.summary()}")
    if hour_us == BAD_HOUR:
        named = [sum(len(getattr(one.diff, cause)) for one in report.findings) for cause in ("missing", "altered")]
        if named != [report.count("missing"), report.count("altered")] or min(named) < events // ONE_IN:
            raise Finding(f"not every fault is named: {report.summary()}")


def export(opened: Platform, work: Path) -> None:
    """The bad hour's two tables as Parquet files, ids and nonces as text: what a comparer of tables takes."""
    slow = pa.concat_tables(opened.slow.tables([BAD_HOUR]))
    fast = opened.clickhouse.rows(BAD_HOUR, BAD_HOUR + HOUR_US)
    with duckdb.connect() as connection:
        for name, table in (("slow", slow), ("fast", fast)):
            connection.register("rows", table)
            text = ", ".join(f"{column}::VARCHAR AS {column}" for column in ("event_id", "request_id", "job_id"))
            found = connection.sql(f"SELECT * REPLACE ({text}, hex(nonce) AS nonce) FROM rows").to_arrow_table()  # noqa: S608
            pq.write_table(found, work / f"{name}.parquet")


def measure_peer(work: Path, cache: Path, plan: Plan, kind: str) -> Row:
    try:
        home = cache / f"datacompy-{DATACOMPY}"
        if not (home / ".installed").is_file():
            shutil.rmtree(home, ignore_errors=True)
            run_tool([sys.executable, "-m", "venv", str(home)], INSTALL_S)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            run_tool([*pip, f"datacompy=={DATACOMPY}"], INSTALL_S)
            (home / ".installed").touch()
        tables = [str(work / f"{name}.parquet") for name in ("slow", "fast")]
        said = run_tool([str(home / "bin" / "python"), "-c", COMPARE, *tables, kind], COMPARE_S).split()
        ns, missing, altered, unexpected, rss_kib = map(int, said[-5:])
    except (PlatformError, ValueError) as error:
        return Row(PEERS[kind], failure=str(error))
    faults = -(-plan.compared // ONE_IN)
    if unexpected or not (faults - 1 <= min(missing, altered) and max(missing, altered) <= faults):
        return Row(PEERS[kind], failure=f"it found {missing} missing, {altered} altered, {unexpected} unexpected")
    return Row(PEERS[kind], plan.compared, [ns // 1_000], rss_kib // 1024)


def _timed(act: Callable[[], object]) -> int:
    begun = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - begun) // 1_000


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def collect_versions() -> dict[str, str]:
    own = {"render-platform": own_version(), "Python": platform.python_version()}
    return {**own, **{name: version(name) for name in PACKAGES}, "datacompy": DATACOMPY}


# How it is shown.


def render(report: Report) -> str:
    """The Markdown of a report: table, ratios against their aims, memory, machine and versions."""
    plan, rows = report.plan, {row.name: row for row in report.rows}
    said = (
        f"Measured {report.measured_at}, in one run: {plan.rounds} rounds, medians (smallest–largest); batches of "
        f"{plan.batch_rows:,} events in a folder, ClickHouse embedded in the same process, all in the page cache. "
        f"In the hour of (d) and (e) one row in {ONE_IN:,} is missing from ClickHouse and one in {ONE_IN:,} has "
        "another pricing tier there; (e) reads the two tables from files, gives its report and the unequal rows, once."
    )
    bare = rows[SLOW].seconds + rows[FAST].seconds
    ratios = [aim_line(f"{OURS} / sum of (b)", rows[OURS].seconds / bare, 1.5, at_most=True)]
    ratios += [f"{OURS} / sum of (c): {rows[OURS].seconds / (rows[PLAIN_SLOW].seconds + rows[PLAIN_FAST].seconds):.2f}"]
    for peer in (rows[name] for name in PEERS.values() if rows[name].us):
        ratios.append(aim_line(f"{peer.name} / (d)", peer.seconds / rows[OURS_BAD].seconds, 5, at_most=False))
    memory = [f"{row.name}: {row.rss_mib:,} MiB" for row in report.rows if row.rss_mib]
    versions = [", ".join(f"{name} {value}" for name, value in report.versions.items())]
    machine = [f"{name}: {value}" for name, value in report.machine.items()]
    parts = {"Ratios": ratios, "Peak memory of the process": memory, "Machine": machine, "Versions": versions}
    bullets = (f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in parts.items())
    return "\n\n".join([said, aligned_table([HEADER, *map(_cells, report.rows)], 1), *bullets])


def _cells(row: Row) -> tuple[str, ...]:
    if not row.us:
        return (row.name, f"not measured: {row.failure}", "", "")
    seconds = [us / US_PER_SECOND for us in row.us]
    spread = f" ({min(seconds):.2f}–{max(seconds):.2f})" if len(seconds) > 1 else ""
    each = statistics.median(row.us) / max(1, row.events)
    return (row.name, f"{row.events:,}", f"{statistics.median(seconds):.2f}{spread}", f"{each:.3f}")


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--events", type=click.IntRange(1_000, 100_000_000), default=10_000_000, show_default=True)
@click.option(
    "--compared", type=click.IntRange(1_000, 10_000_000), default=1_000_000, show_default=True, help="(d), (e)"
)
@click.option("--batch-rows", type=click.IntRange(1, 50_000), default=50_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="datacompy, scratch [.bench]."
)
@click.option("--json", "as_json", is_flag=True, help="Print every round as one JSON object.")
@click.option("--write", "keep", is_flag=True, help="Also put the table into docs/benchmarks.md.")
def main(
    events: int, compared: int, batch_rows: int, rounds: int, seed: int, cache: Path, as_json: bool, keep: bool
) -> None:
    """Measure the verdict on an hour; see the module for what beside what."""
    try:
        report = run(Plan(events, compared, batch_rows, rounds), cache.absolute(), seed)
    except PlatformError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if keep:
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text() if DOCUMENT.exists() else "", section, BEGIN, END))
        _say(f"written to {DOCUMENT}")
    sys.exit(1 if any(row.failure for row in report.rows) else 0)


if __name__ == "__main__":
    main()
