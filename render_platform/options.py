"""What all commands share: options, exit codes, and how errors and JSON are printed."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from render_platform.clock import time_us
from render_platform.config import configure_logs
from render_platform.errors import PlatformError

state_option = click.option(
    "--state", type=click.Path(path_type=Path), help="The state folder [default: RENDER_PLATFORM_STATE_DIR or ./state]."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object or array, for programs.")


class Time(click.ParamType[int]):
    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return time_us(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2023-11-16T18:00Z", param, ctx)


class Group(click.Group):
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


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=plain))


def plain(value: Any) -> Any:
    """Exact and readable: whole decimals as integers, bytes as hex, times in ISO 8601."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, datetime | date) else str(value)
