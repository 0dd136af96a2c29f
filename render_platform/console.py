"""What the commands print for a person: tables, progress bars, and the demo's story; and what they keep for him."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from render_platform.bundle import BundleVerification
from render_platform.cas import Collection
from render_platform.clock import iso
from render_platform.demo import Story
from render_platform.errors import Finding, UsageError
from render_platform.evidence import Verification
from render_platform.note import MAX_NOTE_CHARACTERS, Checkpoint, claimed_checkpoint
from render_platform.objects import sync_folder
from render_platform.reconciliation import CAUSES, HourReport
from render_platform.recovery import Recovered

LABELS = {
    "replay": "replay: outbox and ClickHouse",
    "flush": "flush: seal, store, sign",
    "reconcile": "reconcile hours",
    "repair": "repair hours",
    "verify": "verify",
    "log": "verify the log's entries",
    "tiles": "verify the log's tiles",
    "blobs": "verify objects",
    "events": "look for events that stand twice",
    "charges": "rate charges again",
    "read": "read the trace",
    "entries": "find the entries of the hours",
    "members": "write the bundle",
    "plan": "look at what the database lacks",
    "recover": "replay the log's entries",
    "clickhouse": "fill ClickHouse",
    "compare": "compare the hours",
}
COLOURS = {"reconciled": "green", "discrepant": "red", "pending": "yellow", "unavailable": "magenta"}
REPAIR_WAYS = {"insert": "insert", "rollup": "rebuild the rollup", "rebuild": "rebuild the day", "nothing": "nothing"}
MAX_LISTED = 20
EXAMPLE_QUERY = "SELECT model_name, sum(gpu_time_ns) FROM usage_events GROUP BY ALL"


def escape(text: str) -> str:
    """Text that others may have chosen: no markup of ours, and nothing that a terminal would obey."""
    return escape_markup("".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text))


def person() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage, on stderr; a stage that begins ends the one before. Without a terminal, a line a stage."""
    console = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                for earlier in bars.values():
                    _complete(progress, earlier)
                bars[stage] = progress.add_task(LABELS.get(stage, stage), total=total)
                if not console.is_terminal:
                    console.print(f"{LABELS.get(stage, stage)} …")
            progress.update(bars[stage], completed=done, total=total)

        yield advance
        for bar in bars.values():
            _complete(progress, bar)


def _complete(progress: Progress, bar: TaskID) -> None:
    progress.update(bar, completed=progress.tasks[bar].total)


def tell_story(console: Console, story: Story, state: str) -> None:
    trace, run = story.trace, story.run
    console.print(f"\n[bold]Trace[/]  {escape(trace.path)}: {len(trace.jobs):,} jobs, GPU time from a simulated device")
    for bad in trace.bad_rows[:MAX_LISTED]:
        console.print(f"  [yellow]line {bad.line}: not read:[/] {escape(bad.reason)}")
    if trace.bad_rows:
        console.print(f"  [yellow]{_many(len(trace.bad_rows), 'row')} could not be read[/]")
    console.print(f"[bold]Run[/]    {run.run_id}" + (" (resumed)" if run.resumed else ""))
    console.print(
        f"[bold]Loss[/]   {_many(story.lost_on_purpose, 'event')} of trace/{escape(story.lossy_customer)} "
        "kept from ClickHouse on purpose; reconciliation found:"
    )
    for hour in story.hours:
        for customer, count in sorted(hour.missing.items()):
            if count:
                console.print(
                    f"         {iso(hour.hour_us)[:13]}h  {_many(count, 'event')} of {escape(customer)} missing"
                )
    console.print(_hours(story))
    for path in story.unfinished if story.pending else ():
        console.print(f"  [yellow]pending:[/] a run of {escape(path)} was stopped; finish it, then run this again")
    console.print(_counts(story))
    console.print(f"\n[bold]Checkpoint[/]\n{_checkpoint(story.verification)}")
    verdict = "[green]verified[/]" if story.verification.verified else "[red]NOT verified[/]"
    console.print(f"[bold]Evidence[/] {verdict}: {_evidence(story.verification)}")
    print_problems(console, story.verification)
    console.print(
        f"\n[bold]Next[/]   render-platform up --state {state}      these runs, in the Dagster UI"
        f"\n       render-platform verify --deep --state {state}"
        f"\n       render-platform query --state {state} '{EXAMPLE_QUERY}'\n"
    )


def _hours(story: Story) -> Table:
    table = Table(title="Hours", title_justify="left")
    for name in ("hour (UTC)", "events", "missing", "before repair", "after repair"):
        table.add_column(name, justify="right" if name in ("events", "missing") else "left")
    for hour in story.hours:
        missing = f"{sum(hour.missing.values()):,}"
        table.add_row(
            f"{iso(hour.hour_us)[:13]}h", f"{hour.events:,}", missing, _coloured(hour.before), _coloured(hour.after)
        )
    return table


def _counts(story: Story) -> Table:
    table = Table(title="This run, counted in three places", title_justify="left")
    for name in ("", "outbox", "CAS", "ClickHouse", ""):
        table.add_column(name, justify="right")
    for name, counted in (("events", story.events), ("GPU ns", story.gpu_time_ns)):
        equal = "[green]equal[/]" if counted.equal else "[red]DIFFERENT[/]"
        table.add_row(name, *(f"{value:,}" for value in counted), equal)
    return table


def print_verification(console: Console, outcome: Verification) -> None:
    console.print(f"[bold]Checkpoint[/]\n{_checkpoint(outcome)}")
    print_problems(console, outcome)
    for note in outcome.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    problems = _many(len(outcome.problems), "problem")
    verdict = "[green]verified[/]" if outcome.verified else f"[red]NOT verified, {problems}[/]"
    console.print(f"{verdict}: read {_evidence(outcome)}")


def print_problems(console: Console, outcome: Verification) -> None:
    for problem in outcome.problems:
        console.print(f"[red]problem:[/] {escape(problem.where)}: {escape(problem.what)}")
        since = f"since {problem.since}; " if problem.since else ""
        if problem.doubt:
            console.print(f"         {since}in doubt: {escape(problem.doubt)}")


def print_bundle(console: Console, outcome: BundleVerification) -> None:
    """A bundle proves its lanes in its hours, from its part of the log: all three are said."""
    print_verification(console, outcome)
    claims = outcome.claims
    if claims:
        console.print(
            f"hours {iso(claims['start_us'])} … {iso(claims['end_us'])}, "
            f"lanes {escape(', '.join(outcome.lanes)) or 'none'}"
        )
    for doubt in outcome.doubts:
        console.print(f"[yellow]not provably complete:[/] {escape(doubt)}")
    console.print(f"[bold]{outcome.verdict.replace('_', ' ')}[/]")


def print_collection(done: Collection) -> None:
    click.echo(f"{_many(len(done.orphans), 'orphan')}, {len(done.removed)} removed")
    for orphan in done.orphans:
        click.echo(f"  {orphan.name}: {orphan.size} bytes")


def print_recovery(done: Recovered, plan: bool) -> None:
    """Every count that is not 0, in words."""
    if not done.entries:
        click.echo(f"nothing to recover: the database holds all {done.size} entries")
        return
    click.echo(f"{'to replay' if plan else 'replayed'}: entries {done.size_before} to {done.size - 1}")
    more = {name: value for name, value in vars(done).items() if name not in ("size", "size_before", "entries")}
    for name, value in {**done.entries, **more}.items():
        count = len(value) if isinstance(value, list) else value
        if count:
            click.echo(f"  {name.replace('_', ' ')}: {count}")


def print_drill(
    size: int, target: Path, found: Sequence[tuple[str, str, Any, Any]], waiting: Mapping[str, int]
) -> None:
    click.echo(f"rebuilt {_many(size, 'entry', 'entries')} in {target}: {'DIFFERENT' if found else 'equal'}")
    for store, hour, here, rebuilt in found:
        click.echo(f"  {store} {hour}: here {here}, rebuilt {rebuilt}")
    for hour, events in waiting.items():
        click.echo(f"  {hour}: {_many(events, 'event')} here not published yet")


def print_reports(console: Console, reports: list[HourReport]) -> None:
    table = Table()
    for name in ("hour (UTC)", "status", "revision", "events", "ClickHouse", *CAUSES):
        table.add_column(name, justify="left" if name in ("hour (UTC)", "status") else "right")
    for report in reports:
        table.add_row(
            f"{iso(report.hour_us)[:13]}h",
            _coloured(report.status),
            str(report.revision),
            f"{report.total('events'):,}",
            f"{report.total('fast_events'):,}",
            *(f"{report.count(cause):,}" for cause in CAUSES),
        )
    console.print(table)
    for report in reports:
        if report.error:
            console.print(f"{iso(report.hour_us)[:13]}h: {escape(report.error)}")


def print_repairs(console: Console, rows: Sequence[Mapping[str, Any]], hours: int, plan: bool) -> None:
    """What was done, or would be, an hour a line; `hours` were looked at."""
    table = Table()
    for name in ("hour (UTC)", *(("to do", "events", "status") if plan else ("done", "events", "before", "after"))):
        table.add_column(name, justify="right" if name == "events" else "left")
    for row in rows:
        statuses = [row["before"]] if plan else [row["before"], row["after"]]
        shown = (_coloured(status) if status else "" for status in statuses)
        table.add_row(f"{row['hour'][:13]}h", REPAIR_WAYS[row["way"]], f"{row['events']:,}", *shown)
    if rows:
        console.print(table)
    for row in rows:
        if row["why"]:
            console.print(f"{row['hour'][:13]}h: {escape(row['why'])}")
    touched = sum(row["way"] != "nothing" for row in rows)
    console.print(f"{_many(hours, 'hour')} looked at, {touched} {'to repair' if plan else 'repaired'}")


def _coloured(status: str) -> str:
    return f"[{COLOURS[status]}]{status}[/]"


def _checkpoint(outcome: Verification) -> str:
    at = outcome.checkpoint
    return f"  {escape(at.origin)}\n  size {at.size:,}\n  root {at.root.hex()}" if at else "  none that can be read"


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _evidence(outcome: Verification) -> str:
    depth = f"{_many(outcome.deep_records, 'row')} re-read" if outcome.deep else "rows not re-read (--deep does)"
    return (
        f"{_many(outcome.entries, 'entry', 'entries')}, {_many(outcome.batches, 'batch', 'batches')} of "
        f"{_many(outcome.records, 'event')}, {_many(outcome.blobs, 'object')} rehashed, {depth}"
    )


# What is kept.


def remembered(file: Path) -> Checkpoint:
    """The checkpoint in a file of the user's, whoever signed it: whoever can write the file could also remove it."""
    with file.open("rb") as opened:
        data = opened.read(4 * MAX_NOTE_CHARACTERS)
    try:
        return claimed_checkpoint(data)
    except Finding as error:
        what = f"{file} is no checkpoint that was remembered: {error.message}"
        raise UsageError(what, "restore it from a copy; without it, a log that was cut short would verify") from error


def remember(file: Path, note: bytes) -> None:
    """Put `note` in the file's place, whole and durable, unless another process has remembered a larger one."""
    if file.exists() and remembered(file).size > claimed_checkpoint(note).size:
        return
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("xb") as opened:
            opened.write(note)
            opened.flush()
            os.fsync(opened.fileno())
        # A crash before this: the checkpoint that was remembered before stands. After it: the new one.
        scratch.replace(file)
        sync_folder(file.parent)
    finally:
        scratch.unlink(missing_ok=True)
