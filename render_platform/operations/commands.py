"""The operator's commands: `alert test` and `doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from render_platform.clock import SystemClock, SystemIds
from render_platform.config import load_settings
from render_platform.operations.alerts import Alert, link, send_unrecorded
from render_platform.operations.doctor import Doctor, exit_code
from render_platform.options import json_option, print_json, state_option


@click.group()
def alert() -> None:
    """Alerts: where they go, and whether they arrive."""


@alert.command("test")
@state_option
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of settings.")
@json_option
def alert_test(state: Path | None, config: Path | None, as_json: bool) -> None:
    """Send a test to each configured channel, and say what came of it.

    Exit codes: 0 each took it, 2 none is configured, 3 one did not take it.
    """
    settings = load_settings(config=config, state_dir=state)
    test = Alert(
        key="test",
        severity="warning",
        title="A test of this channel",
        text="Somebody ran `render-platform alert test`. Nothing is wrong, and nothing is to be done.",
        link=link(settings, "runs"),
        at_us=SystemClock().now_us(),
    )
    outcomes = send_unrecorded(settings, test)
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
    for outcome in () if as_json else outcomes:
        click.echo(f"{outcome.channel:8} {'sent' if outcome.sent else 'FAILED'}: {outcome.said}")
        if outcome.remedy:
            click.echo(f"  → {outcome.remedy}")
    sys.exit(0 if all(outcome.sent for outcome in outcomes) else 3)


@click.command()
@state_option
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of settings.")
@json_option
def doctor(state: Path | None, config: Path | None, as_json: bool) -> None:
    """Try each part that is configured, and say what is wrong with it and what to do.

    Exit codes: 0 nothing is wrong, 1 something is, 3 a part cannot be used.
    """
    settings = load_settings(config=config, state_dir=state)
    found = []
    for one in Doctor(settings, SystemClock(), SystemIds()).examine():
        found.append(one)
        if not as_json:
            click.echo(f"{one.part:14} {one.status:11} {one.says} ({one.ms} ms)")
            if one.remedy:
                click.echo(f"  → {one.remedy}")
    if as_json:
        print_json([asdict(one) for one in found])
    sys.exit(exit_code(found))
