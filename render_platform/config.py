"""Configuration: one typed object, made in one place, from defaults, RENDER_PLATFORM_* variables and options."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import structlog

from render_platform.errors import UsageError

_PREFIX = "RENDER_PLATFORM_"


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a platform keeps its state, and its limits. Every field can be set as RENDER_PLATFORM_<FIELD>."""

    state_dir: Path = field(default=Path("state"))
    clickhouse_dsn: str = field(default="", repr=False)  # may hold a password
    """Empty: the embedded engine in the state folder."""
    clickhouse_database: str = "render_platform"
    retention_days: int = 0
    """Days of `recorded_at` that ClickHouse keeps; 0 keeps all. Leave it 0 where old traces are replayed."""
    batch_rows: int = 50_000
    seal_rows_a_transaction: int = 5_000
    fast_path_deadline_s: int = 60
    threshold_ppm: int = 1_000
    """Missing events that a reconciled key may have, a million of its authoritative events: 0.1 %."""
    backlog_rows: int = 5_000
    backlog_age_s: int = 20
    dagster_port: int = 3000

    def __post_init__(self) -> None:
        bounds = {
            "retention_days": (0, 36_500),
            "batch_rows": (1, 50_000),
            "seal_rows_a_transaction": (1, 50_000),
            "fast_path_deadline_s": (0, 86_400),
            "threshold_ppm": (0, 1_000_000),
            "backlog_rows": (1, 10_000_000),
            "backlog_age_s": (1, 86_400),
            "dagster_port": (1, 65_535),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}", f"set it to {low} … {high}")

    @property
    def database_path(self) -> Path:
        return self.state_dir / "platform.db"

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / "keys"

    @property
    def blobs_dir(self) -> Path:
        return self.state_dir / "blobs"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "log"

    @property
    def dagster_home(self) -> Path:
        return self.state_dir / "dagster"

    @property
    def clickhouse_url(self) -> str:
        return self.clickhouse_dsn or f"chdb://{self.state_dir / 'clickhouse'}"


def load_settings(environ: Mapping[str, str] | None = None, **options: Any) -> Settings:
    """Defaults, overridden by the environment, overridden by `options` that are not None.

    Raises UsageError naming a variable that is unknown or whose value cannot be read.
    """
    environ = os.environ if environ is None else environ
    known = {f.name: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        name = variable.removeprefix(_PREFIX).lower()
        if name not in known:
            raise UsageError(f"{variable} is not a setting", f"settings are {', '.join(sorted(known))}")
        values[name] = _parse(variable, text, known[name].type)
    values.update({name: value for name, value in options.items() if value is not None})
    settings = Settings(**values)
    try:
        return replace(settings, state_dir=settings.state_dir.expanduser().resolve())
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"state_dir {settings.state_dir} is not a path: {error}", "give --state a folder") from error


def configure_logs() -> None:
    """Structured logs, one JSON object a line, to stderr: what a command prints stays for its reader."""
    driver = logging.getLogger("clickhouse_connect")  # says on stderr what its errors say again
    driver.addHandler(logging.NullHandler())
    driver.propagate = False
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _parse(variable: str, text: str, kind: Any) -> Any:
    if kind == "Path":
        return Path(text)
    if kind != "int":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable} is {text!r}", "set it to a whole number") from None
