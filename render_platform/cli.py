"""The command line. Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 a part is unavailable."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from render_platform import __version__, bridge, console
from render_platform import up as everything
from render_platform.charges.commands import CHARGE_COMMANDS
from render_platform.clickhouse import open_clickhouse, pending_migrations
from render_platform.clock import DAY_US, hours_between, iso
from render_platform.config import load_settings
from render_platform.demo import Demo
from render_platform.errors import Finding, SequencerStopped, Unavailable, UsageError
from render_platform.evidence_commands import COMMANDS
from render_platform.gateway.commands import config_option, key, serve, status
from render_platform.note import load_key
from render_platform.operations.commands import alert, doctor
from render_platform.options import Group, Time, json_option, plain, print_json, state_option
from render_platform.pipeline import Platform, open_platform
from render_platform.reconciliation import HourReport, worst
from render_platform.traces import generated_trace, read_trace

MAX_RANGE_US = 3_660 * DAY_US
STATUS_EXIT = {"reconciled": 0, "discrepant": 1, "unavailable": 3, "pending": 3}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Meters GPU inference, keeps every bill, and proves it years later.

    Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 a part is unavailable, or an hour is not closed yet.
    """


@main.command()
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="A trace file; without one, a small one.")
@state_option
@json_option
def demo(trace_path: Path | None, state: Path | None, as_json: bool) -> None:
    """Run the main job: replay a trace through both paths, lose, find, repair and verify."""
    settings = load_settings(state_dir=state)
    with console.progress_bars() as progress:
        trace = read_trace(trace_path, lambda rows: progress("read", rows, rows)) if trace_path else generated_trace()
        with open_platform(settings, create=True) as platform:
            stages = _dagster("resources.local").LocalDagster(settings)
            try:
                story = Demo(platform, stages, progress).run(trace)
            finally:
                stages.close()
    if as_json:
        print_json(story.as_json())
    else:
        console.tell_story(console.person(), story, os.path.relpath(settings.state_dir))
    sys.exit(0 if story.good else 1)


@main.command()
@state_option
@config_option
@click.option("--port", type=click.IntRange(1, 65_535), help="The Dagster UI's port [default: 3000].")
@click.option("--gateway-port", type=click.IntRange(1, 65_535), help="The gateway's port [default: 8080].")
@click.option("--no-load", is_flag=True, help="Send no sample jobs; otherwise one a second.")
def up(state: Path | None, config: Path | None, port: int | None, gateway_port: int | None, no_load: bool) -> None:
    """Start gateway, ClickHouse bridge, Dagster's UI and daemon, and a sample load, on this machine only."""
    settings = load_settings(config=config, state_dir=state, dagster_port=port, gateway_port=gateway_port)
    with open_platform(settings, create=True):
        pass
    dagster = _dagster("resources.local").LocalDagster(settings)  # ends what a killed process left in progress
    dagster.begin_up()
    dagster.close()
    sys.exit(everything.run(settings, _checkout(), config=config, load=not no_load))


@main.command()
@state_option
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="The port; 0 is a free one.")
def clickhouse(state: Path | None, port: int) -> None:
    """Start the embedded ClickHouse bridge: one process owns the folder, others reach it by its URL file."""
    settings = load_settings(state_dir=state)
    if not settings.clickhouse_url.startswith("chdb://"):
        raise UsageError(
            "clickhouse_dsn names a server", "unset RENDER_PLATFORM_CLICKHOUSE_DSN to use the embedded one"
        )
    folder = Path(settings.clickhouse_url.removeprefix("chdb://"))
    bridge.serve(folder, port, lambda url: click.echo(f"embedded ClickHouse bridge: {url}   stop: Ctrl-C"))


@main.command()
@click.option("--check", is_flag=True, help="Change nothing: say what is pending, and exit 1 where something is.")
@state_option
@json_option
def migrate(check: bool, state: Path | None, as_json: bool) -> None:
    """Bring ClickHouse's tables to this version. Whatever writes to ClickHouse does so too."""
    settings = load_settings(state_dir=state)
    if not settings.clickhouse_dsn and not settings.has_state:
        raise UsageError(f"{settings.state_dir} holds no platform state", "give --state DIR, or name a server")
    found = pending_migrations(settings.clickhouse_url, settings.clickhouse_database)
    if not check:
        open_clickhouse(settings.clickhouse_url, settings.clickhouse_database, settings.retention_days).close()
    if as_json:
        print_json({"applied": not check, "migrations": [{"number": one.number, "name": one.name} for one in found]})
    else:
        for one in found:
            click.echo(f"{'pending' if check else 'done'}: {one.number} {one.name}")
        click.echo(f"{len(found)} migrations {'pending' if check else 'done'}")
    sys.exit(1 if check and found else 0)


def _range_options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--to", "end", type=Time(), help="The time before which the last hour begins.")(command)
    return click.option("--from", "start", type=Time(), help="The first hour, such as 2023-11-16T18:00Z.")(command)


def _hours_of(platform: Platform, start: int | None, end: int | None) -> list[int]:
    """Every hour of a whole range; otherwise those that hold events or were declared empty."""
    if start is not None and end is not None:
        if start >= end:
            raise UsageError("--from is not before --to", "give a range that holds at least one hour")
        if end - start > MAX_RANGE_US:
            raise UsageError("--from and --to are more than ten years apart", "give a shorter range")
        return list(hours_between(start, end))
    hours = platform.hours.known(start, end)
    if not hours and (start is not None or end is not None):
        raise UsageError("no hour of this range holds events", "give a range that the state folder covers")
    return hours


@main.command()
@state_option
@_range_options
@json_option
def reconcile(state: Path | None, start: int | None, end: int | None, as_json: bool) -> None:
    """Reconcile hours of the slow path with ClickHouse: every hour that holds events, or those of a range."""
    with console.progress_bars() as progress, open_platform(load_settings(state_dir=state)) as platform:
        hours, unseen = _hours_of(platform, start, end), ""
        if start is None and end is None:
            elsewhere, unseen = _unrecorded(platform)
            hours = sorted({*(hour for hour in hours if not platform.reconciler.expired(hour)), *elsewhere})
        reports = []
        for done, hour in enumerate(hours):
            progress("reconcile", done, len(hours))
            reports.append(platform.reconcile(hour))
    if as_json:
        print_json([_report_json(report) for report in reports])
    elif reports:
        console.print_reports(console.person(), reports)
    else:
        click.echo("no hour holds events yet")
    if unseen:
        click.echo(f"not known: whether ClickHouse holds other hours: {unseen}", err=True)
    code = STATUS_EXIT[worst(report.status for report in reports)] if reports else 0
    sys.exit(code or (3 if unseen else 0))


def _unrecorded(platform: Platform) -> tuple[list[int], str]:
    """Hours of which only ClickHouse holds rows; and why that is not known, where it is not."""
    try:
        return platform.reconciler.unrecorded(), ""
    except Unavailable as error:
        return [], str(error)


@main.command()
@state_option
@_range_options
@click.option("--plan", is_flag=True, help="Change nothing: say what would be done, and exit 1 where something would.")
@json_option
def repair(state: Path | None, start: int | None, end: int | None, plan: bool, as_json: bool) -> None:
    """Make ClickHouse hold what the slow path has: insert what is missing, rebuild days in which more differs."""
    found: list[tuple[dict[str, Any], int]] = []
    with console.progress_bars() as progress, open_platform(load_settings(state_dir=state)) as platform:
        hours = _hours_of(platform, start, end)
        if start is None or end is None:
            hours = [hour for hour in hours if not platform.reconciler.expired(hour)]
        for done, hour in enumerate(hours):
            progress("repair", done, len(hours))
            found.append(_planned(platform, hour) if plan else _repaired(platform, hour))
    good = {"way": "nothing", "why": "", "after": "reconciled"}
    rows = [row for row, _ in found if any(row.get(name, value) != value for name, value in good.items())]
    if as_json:
        print_json(rows)
    else:
        console.print_repairs(console.person(), rows, len(hours), plan)
    codes = {code for _, code in found}
    sys.exit(1 if 1 in codes else max(codes, default=0))


def _planned(platform: Platform, hour_us: int) -> tuple[dict[str, Any], int]:
    """What a repair of an hour would do, and the exit code that stands for it."""
    plan = platform.reconciler.plan(hour_us)
    row = {"hour": iso(hour_us), "way": plan.way, "events": plan.insert, "before": plan.report.status}
    code = 1 if plan.way != "nothing" else 3 if plan.refused else 0
    return {**row, "unfinished": plan.unfinished, "why": plan.refused}, code


def _repaired(platform: Platform, hour_us: int) -> tuple[dict[str, Any], int]:
    """What the repair of an hour did, and the exit code that stands for it."""
    try:
        outcome = platform.repair(hour_us)
    except SequencerStopped:  # no other hour can be logged either
        raise
    except (Unavailable, Finding) as error:
        row = {"hour": iso(hour_us), "way": "nothing", "events": 0, "before": "", "after": "unavailable"}
        return {**row, "why": str(error)}, error.exit_code
    row = {"hour": iso(hour_us), "way": outcome.way, "events": outcome.inserted, "before": outcome.before.status}
    code = 3 if outcome.refused else STATUS_EXIT[outcome.after.status]
    return {**row, "after": outcome.after.status, "why": outcome.refused}, code


def _report_json(report: HourReport) -> dict[str, Any]:
    return {**json.loads(report.to_bytes()), "hour": iso(report.hour_us), "error": report.error}


@main.command()
@state_option
@click.option("--attestation", "role", flag_value="attestation", help="The key of the batches' attestations.")
@click.option("--gateway", "role", flag_value="gateway", help="The key of the gateway's acceptances.")
def vkey(state: Path | None, role: str | None) -> None:
    """Print the log's verifier key: what an auditor pins. Or that of another role."""
    with open_platform(load_settings(state_dir=state)) as platform:
        signer = platform.attestation_signer if role == "attestation" else platform.log_signer
        if role == "gateway":
            signer = load_key(platform.settings.keys_dir / "gateway.key")
        click.echo(signer.verifier.vkey)


@main.command()
@state_option
@json_option
def flush(state: Path | None, as_json: bool) -> None:
    """Seal, store and log what waits in the outbox, as Dagster's job of that name does."""
    with open_platform(load_settings(state_dir=state)) as platform:
        found = platform.flush()
    size = found.checkpoint.size if found.checkpoint else 0
    if as_json:
        print_json({"entries_added": found.logged, "tree_size": size})
    else:
        click.echo(f"{found.logged} entries added; the log holds {size}")


@main.command()
@click.argument("sql")
@state_option
@json_option
def query(sql: str, state: Path | None, as_json: bool) -> None:
    """Run one SELECT with DuckDB over `usage_events`: the rows of every published batch, digests checked."""
    with open_platform(load_settings(state_dir=state)) as platform:
        table = platform.query(sql)
    rows = [{name: _finite(value) for name, value in row.items()} for row in table.to_pylist()]
    if as_json:
        print_json(rows)
        return
    click.echo("\t".join(table.column_names))
    for row in rows:
        click.echo("\t".join(str(plain(value)) for value in row.values()))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are shown as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _checkout() -> Path:
    """The folder that holds the Dagster layer: the checkout that this package was installed from, or this folder."""
    for folder in (Path(__file__).parents[1], Path.cwd()):
        if (folder / "workspace.yaml").exists():
            return folder
    raise UsageError("the Dagster layer is not here", "run this in a checkout of render-platform")


def _dagster(module: str) -> Any:
    """A module of the Dagster layer: found at run time, because the library never imports it."""
    folder = str(_checkout())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed", "install requirements.txt: `make demo` does") from error


main.add_command(serve)
main.add_command(status)
main.add_command(key)
main.add_command(alert)
main.add_command(doctor)
for command in (*COMMANDS, *CHARGE_COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
