"""The command line. Exit codes: 0 good, 1 a finding, 2 wrong usage, 3 a part is unavailable."""

from __future__ import annotations

import fcntl
import importlib
import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from render_platform import __version__, console
from render_platform.clock import DAY_US, hours_between, iso, time_us
from render_platform.config import Settings, configure_logs, load_settings
from render_platform.demo import Demo
from render_platform.errors import PlatformError, Unavailable, UsageError
from render_platform.evidence import Evidence, Verification
from render_platform.note import Verifier
from render_platform.objects import FolderObjects
from render_platform.pipeline import open_platform
from render_platform.reconciliation import HourReport, worst
from render_platform.traces import generated_trace, read_trace
from render_platform.verification import verify

MAX_RANGE_US = 3_660 * DAY_US
STATUS_EXIT = {"reconciled": 0, "discrepant": 1, "unavailable": 3, "pending": 3}

state_option = click.option(
    "--state", type=click.Path(path_type=Path), help="The state folder [default: RENDER_PLATFORM_STATE_DIR or ./state]."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object or array, for programs.")


class _Time(click.ParamType[int]):
    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return time_us(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2023-11-16T18:00Z", param, ctx)


class _Group(click.Group):
    """Errors of the platform become one line with a remedy, and their exit code; never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        configure_logs()
        try:
            return super().invoke(ctx)
        except PlatformError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.remedy:
                click.echo(f"  → {error.remedy}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            click.echo(f"error: {error.filename or 'the system'}: {error.strerror or error}", err=True)
            click.echo("  → check that the path exists, is readable and writable, and has space", err=True)
            ctx.exit(3)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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
        _print_json(story.as_json())
    else:
        console.tell_story(console.person(), story, os.path.relpath(settings.state_dir))
    sys.exit(0 if story.good else 1)


@main.command()
@state_option
@click.option("--port", type=click.IntRange(1, 65_535), help="The UI's port [default: 3000].")
def up(state: Path | None, port: int | None) -> None:
    """Start the Dagster UI and its daemon over the state folder, on this machine only."""
    settings = load_settings(state_dir=state, dagster_port=port)
    with open_platform(settings, create=True):
        pass
    local = _dagster("resources.local")
    local.LocalDagster(settings).close()  # ends what a killed process left in progress
    home = settings.dagster_home
    _hold_up_lock(home / "up.lock")
    _require_free_port(settings.dagster_port)
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "RENDER_PLATFORM_STATE_DIR": str(settings.state_dir),
        "PYTHONWARNINGS": "ignore",
    }
    click.echo(f"Dagster: http://127.0.0.1:{settings.dagster_port}   state: {settings.state_dir}   stop: Ctrl-C")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` makes its children ignore them
        signal.signal(number, signal.SIG_DFL)
    arguments = ["dev", "-w", str(_checkout() / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(settings.dagster_port)]
    os.chdir(_checkout())
    os.execve(sys.executable, [sys.executable, "-m", "dagster", *arguments], environment)  # noqa: S606


def _hold_up_lock(path: Path) -> None:
    """One `up` a state folder: two daemons would disturb each other. The lock lives on in the process that follows."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Unavailable("`up` runs over this state folder already", "use that one, or end it first") from None
    os.set_inheritable(handle, True)


def _require_free_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Unavailable(f"port {port} is taken: {error.strerror}", "give another one with --port") from None


@main.command("verify")
@state_option
@click.option("--deep", is_flag=True, help="Also re-read the rows of every batch.")
@click.option(
    "--key",
    "vkeys",
    multiple=True,
    metavar="VKEY",
    help="Trust this key, not the folder's own: the log's; again for the attestations'.",
)
@json_option
def verify_command(state: Path | None, deep: bool, vkeys: Sequence[str], as_json: bool) -> None:
    """Verify the evidence in the state folder, offline: log, chain, objects, batches."""
    settings = load_settings(state_dir=state)
    with console.progress_bars() as progress:
        outcome = _verify(settings, deep, vkeys, progress)
    if as_json:
        _print_json(outcome.as_json())
    else:
        console.print_verification(console.person(), outcome)
    sys.exit(0 if outcome.verified else 1)


def _verify(
    settings: Settings, deep: bool, vkeys: Sequence[str], progress: Callable[[str, int, int], None]
) -> Verification:
    if not vkeys:
        with open_platform(settings) as platform:
            outcome = platform.verify(deep=deep, progress=progress)
        outcome.note("the keys came from the state folder itself; pin yours with --key (see `vkey`)")
        return outcome
    if not settings.log_dir.is_dir():
        raise UsageError(f"{settings.state_dir} holds no log", "give --state the folder that holds blobs/ and log/")
    keys = [Verifier.parse(vkey) for vkey in vkeys]
    attesting = [key for key in keys if key.name.endswith("/attestation")]
    signing = [key for key in keys if key not in attesting]  # a role signs what is its own, and nothing else
    if not signing:
        raise UsageError("no --key is a log's key", "give what `render-platform vkey` prints")
    evidence = Evidence(FolderObjects(settings.log_dir), FolderObjects(settings.blobs_dir), signing, attesting)
    outcome = verify(evidence, deep=deep, progress=progress)
    outcome.note("unwitnessed: no earlier checkpoint is known here; a log that was cut short would verify")
    return outcome


@main.command()
@state_option
@click.option("--from", "start", type=_Time(), help="The first hour, such as 2023-11-16T18:00Z.")
@click.option("--to", "end", type=_Time(), help="The time before which the last hour begins.")
@json_option
def reconcile(state: Path | None, start: int | None, end: int | None, as_json: bool) -> None:
    """Reconcile hours of the slow path with ClickHouse: every hour that holds events, or those of a range."""
    if start is not None and end is not None and start >= end:
        raise UsageError("--from is not before --to", "give a range that holds at least one hour")
    with console.progress_bars() as progress, open_platform(load_settings(state_dir=state)) as platform:
        if start is not None and end is not None and end - start > MAX_RANGE_US:
            raise UsageError("--from and --to are more than ten years apart", "reconcile a shorter range")
        whole = start is not None and end is not None
        hours = list(hours_between(start or 0, end or 0)) if whole else platform.hours.known(start, end)
        if not hours and (start is not None or end is not None):
            raise UsageError("no hour of this range holds events", "give a range that the state folder covers")
        reports = []
        for done, hour in enumerate(hours):
            progress("reconcile", done, len(hours))
            reports.append(platform.reconcile(hour))
    if as_json:
        _print_json([_report_json(report) for report in reports])
    elif reports:
        console.print_reports(console.person(), reports)
    else:
        click.echo("no hour holds events yet")
    sys.exit(STATUS_EXIT[worst(report.status for report in reports)] if reports else 0)


def _report_json(report: HourReport) -> dict[str, Any]:
    return {**json.loads(report.to_bytes()), "hour": iso(report.hour_us), "error": report.error}


@main.command()
@state_option
@click.option("--attestation", is_flag=True, help="The key of the batches' attestations instead of the log's.")
def vkey(state: Path | None, attestation: bool) -> None:
    """Print the log's verifier key: what an auditor pins."""
    with open_platform(load_settings(state_dir=state)) as platform:
        signer = platform.attestation_signer if attestation else platform.log_signer
        click.echo(signer.verifier.vkey)


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
        _print_json(rows)
        return
    click.echo("\t".join(table.column_names))
    for row in rows:
        click.echo("\t".join(str(_plain(value)) for value in row.values()))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are shown as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    """Exact and readable: whole decimals as integers, bytes as hex, times in ISO 8601."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, datetime | date) else str(value)


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


if __name__ == "__main__":
    main()
