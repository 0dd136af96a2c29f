"""The operator's commands: `alert test`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from render_platform.clock import SystemClock
from render_platform.config import load_settings
from render_platform.operations.alerts import Alert, link, send_unrecorded
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
