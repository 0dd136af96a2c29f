"""How fast evidence is verified, added to and proven, beside plain reading, another Merkle tree and a naive design.

    python -m benchmarks.audit                      one run over a million events
    python -m benchmarks.audit --events 20000       a small one
    python -m benchmarks.audit --write              and put the table into docs/benchmarks.md

pymerkle is installed into the cache folder; without it its rows say why. Exit codes: 0 measured, 1 a finding (evidence
that does not verify, trees that differ, a part that could not be measured).
"""

from __future__ import annotations

import platform
import random
import shutil
import statistics
import sys
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import click
import msgspec
import numpy as np

from benchmarks.audit_subjects import (
    DEEP,
    DIGESTS,
    EVIDENCE,
    NAIVE,
    PLAIN,
    PYMERKLE,
    WHOLE,
    Plan,
    Row,
    Writer,
    draw,
    files_of,
    load_pymerkle,
    measure_ours,
    measure_pymerkle,
    read_all,
    write_in_turns,
    write_through_the_outbox,
)
from benchmarks.machine import CHECKOUT, describe_machine, own_version
from benchmarks.report import aim_line, aligned_table, bullets, replace_section, spread
from render_platform.clock import US_PER_SECOND, SystemClock, iso
from render_platform.errors import Finding, PlatformError

BEGIN, END = "<!-- audit -->", "<!-- /audit -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PACKAGES = ("cryptography", "pyarrow", "sqlalchemy", "numpy")
PARTS = {"verify": "events", "append": "entries", "prove": "proofs", "write": "events"}
HEADER = ("", "what", "counted", "each second", "µs each")


class Aim(msgspec.Struct, frozen=True):
    """The rate of `name` over that of `under`; `least` is what was hoped for, 0 where nothing was."""

    name: str
    under: str
    least: float = 0.0


AIMS = (Aim(DIGESTS, PLAIN, 0.70), Aim(DEEP, PLAIN), Aim(EVIDENCE, NAIVE, 100), Aim(WHOLE, NAIVE))


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    plan: Plan
    files: int
    stored_bytes: int
    machine: dict[str, str]
    versions: dict[str, str]
    rows: list[Row]


def run(plan: Plan, cache: Path, seed: int) -> Report:
    """Everything in one run, in a scratch folder below `cache`; Finding where what is measured is not right."""
    cache.mkdir(parents=True, exist_ok=True)
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    machine = describe_machine(cache)
    work = Path(tempfile.mkdtemp(prefix="audit-", dir=cache))
    try:
        rng = np.random.default_rng(seed)
        writer = Writer(work / "verified")
        with closing(writer.database):
            _say(f"writing {plan.events:,} events in batches of {plan.batch_rows:,}, and {plan.documents:,} one by one")
            rows = write_in_turns(writer, work / "naive", plan, rng)
            _say("verifying them")
            rows += read_all(writer, plan)
        _say(f"appending and proving {plan.entries:,} entries")
        rows += measure_trees(work, cache, plan, random.Random(seed))  # noqa: S311 (a benchmark's data)
        _say(f"the whole path of {plan.recorded:,} events")
        rows.append(write_through_the_outbox(work / "whole", plan, rng))
        files = files_of(writer)
        size = sum(path.stat().st_size for path in files)
        return Report(measured_at, plan, len(files), size, machine, collect_versions(), rows)
    finally:
        shutil.rmtree(work)


def measure_trees(work: Path, cache: Path, plan: Plan, rng: random.Random) -> list[Row]:
    """Ours and pymerkle's over the same data; Finding where their roots differ."""
    data, indexes = draw(plan, rng)
    rows, root = measure_ours(work / "log", data, indexes)
    try:
        module = load_pymerkle(cache)
    except PlatformError as error:
        return [*rows, Row("append", "pymerkle", failure=str(error)), Row("prove", "pymerkle", failure=str(error))]
    others, roots = measure_pymerkle(module, work / "pymerkle", data, indexes)
    if set(roots) != {root}:
        raise Finding("pymerkle's trees have another root than ours")
    return [*rows, *others]


def collect_versions() -> dict[str, str]:
    own = {"render-platform": own_version(), "Python": platform.python_version()}
    return {**own, **{name: version(name) for name in PACKAGES}, "pymerkle": PYMERKLE[0].partition("==")[2]}


def ratio(rows: list[Row], aim: Aim) -> float | None:
    """The medians' ratio; None where one of them was not measured."""
    rates = {row.name: statistics.median(row.per_second) for row in rows if row.us}
    return rates[aim.name] / rates[aim.under] if {aim.name, aim.under} <= rates.keys() else None


def render(report: Report) -> str:
    """The Markdown of a report: table, ratios against their aims, machine and versions."""
    plan = report.plan
    said = (
        f"Measured {report.measured_at}, in one run: {plan.events:,} events in batches of {plan.batch_rows:,} "
        f"({report.files:,} files, {report.stored_bytes / 1e6:,.0f} MB, in the page cache), {plan.rounds} rounds of "
        "reading, the deep one once; figures are medians (smallest–largest). Plain reading uses one thread. Appends "
        "and proofs are one by one; each proof of ours reads the log's files anew and is checked, pymerkle's are not. "
        "Events of the naive design and of the first row of batches begin in memory; the second row makes each durable "
        "first."
    )
    table = [HEADER, *(_cells(row) for row in sorted(report.rows, key=lambda row: list(PARTS).index(row.part)))]
    ratios = [_aim(report.rows, aim) for aim in AIMS]
    machine = [f"{name}: {value}" for name, value in report.machine.items()]
    versions = [", ".join(f"{name} {value}" for name, value in report.versions.items())]
    lists = map(bullets, ("Ratios", "Machine", "Versions"), (ratios, machine, versions))
    return "\n\n".join([said, aligned_table(table, 2), *lists])


def _cells(row: Row) -> tuple[str, ...]:
    if not row.us:
        return (row.part, row.name, f"not measured: {row.failure}", "", "")
    rates, each = row.per_second, [one / row.count for one in row.us]
    return (row.part, row.name, f"{row.count:,} {PARTS[row.part]}", spread(rates, ",.0f"), spread(each, ",.2f"))


def _aim(rows: list[Row], aim: Aim) -> str:
    name, found = f"{aim.name} / {aim.under}", ratio(rows, aim)
    if aim.least and found is not None:
        return aim_line(name, found, aim.least, at_most=False)
    return f"{name}: {'not measured' if found is None else f'{found:,.2f}'}"


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--events", type=click.IntRange(1, 100_000_000), default=1_000_000, show_default=True)
@click.option("--batch-rows", type=click.IntRange(1, 50_000), default=50_000, show_default=True)
@click.option(
    "--entries", type=click.IntRange(2, 1_000_000), default=5_000, show_default=True, help="Appended, proven."
)
@click.option("--documents", type=click.IntRange(1), default=5_000, show_default=True, help="Signed one by one.")
@click.option("--recorded", type=click.IntRange(1), default=100_000, show_default=True, help="Through the outbox.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="pymerkle, scratch [.bench]."
)
@click.option("--json", "as_json", is_flag=True, help="Print every round as one JSON object.")
@click.option("--write", is_flag=True, help="Also put the table into docs/benchmarks.md.")
def main(
    events: int,
    batch_rows: int,
    entries: int,
    documents: int,
    recorded: int,
    rounds: int,
    seed: int,
    cache: Path,
    as_json: bool,
    write: bool,
) -> None:
    """Measure verification, appends, proofs and writing; see the module for what beside what."""
    try:
        report = run(Plan(events, batch_rows, entries, documents, recorded, rounds), cache.absolute(), seed)
    except PlatformError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if write:
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text() if DOCUMENT.exists() else "", section, BEGIN, END))
        _say(f"written to {DOCUMENT}")
    sys.exit(1 if any(row.failure for row in report.rows) else 0)


if __name__ == "__main__":
    main()
