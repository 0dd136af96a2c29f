"""Commands run as their users run them: in this process where that is the same, in a process of their own otherwise."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from click.testing import CliRunner

from render_platform.cli import main
from tests import chdb_server

CHECKOUT = Path(__file__).parents[1]
PROGRAM = (sys.executable, "-m", "render_platform.cli")
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.stdout, parse_constant=_no_constant)


def _no_constant(text: str) -> Any:
    raise AssertionError(f"{text} is not JSON")


def run_inside(*arguments: object, env: Mapping[str, str] | None = None) -> Outcome:
    """In this process. What would have been a traceback stands in `stderr` as one."""
    texts = [str(argument) for argument in arguments]
    with restored_process():
        result = CliRunner(env=dict(env or {})).invoke(main, texts, prog_name="render-platform")
    stderr = result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(result.exception))
    return _checked(texts, Outcome(result.exit_code, result.stdout, stderr))


def run_command(*arguments: object, env: Mapping[str, str] | None = None) -> Outcome:
    """In a process of its own, as a shell does."""
    texts = [str(argument) for argument in arguments]
    done = subprocess.run(
        [*PROGRAM, *texts], env=clean_environment(env), cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    return _checked(texts, Outcome(done.returncode, done.stdout, done.stderr))


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would set up a platform, or Dagster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RENDER_PLATFORM_", "DAGSTER_"))}
    return {**kept, "DAGSTER_DISABLE_TELEMETRY": "yes", **(more or {})}


@contextmanager
def restored_process() -> Iterator[None]:
    """A command may set variables, and where logs go: neither stays."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        structlog.reset_defaults()


def _checked(arguments: Sequence[str], outcome: Outcome) -> Outcome:
    """No command ever shows a traceback, or a private key."""
    assert "Traceback" not in outcome.said, outcome.said
    assert "PRIVATE+KEY" not in outcome.said, "a private key was printed"
    if "--state" in arguments:
        for secret in secrets_of(Path(arguments[arguments.index("--state") + 1])):
            assert secret not in outcome.said, "private key material was printed"
    return outcome


def secrets_of(state: Path) -> list[str]:
    """The private part of each key file of a state folder, as it is written."""
    files = (state / "keys").glob("*.key") if (state / "keys").is_dir() else ()
    return [file.read_text().strip().split("+", 4)[4] for file in files]


def own_clickhouse() -> dict[str, str]:
    """Settings of a database that no other test has, in the one chdb folder of this process."""
    return {
        "RENDER_PLATFORM_CLICKHOUSE_DSN": chdb_server.shared_dsn(),
        "RENDER_PLATFORM_CLICKHOUSE_DATABASE": chdb_server.fresh_database(),
    }


@dataclass(frozen=True)
class Finished:
    """A finished demo: its state folder, the settings that find its ClickHouse, and what it said."""

    state: Path
    env: Mapping[str, str]
    story: dict[str, Any]

    def copy(self, to: Path) -> Path:
        """A state folder that a test may spoil."""
        shutil.copytree(self.state, to)
        return to


@functools.cache
def finished_demo() -> Finished:
    """One demo of the generated trace, for everything that only reads, or spoils a copy."""
    folder = Path(tempfile.mkdtemp(prefix="render-platform-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    env = own_clickhouse()
    outcome = run_inside("demo", "--state", folder / "state", "--json", env=env)
    assert outcome.code == 0, outcome.said
    return Finished(folder / "state", env, outcome.json)


def write_trace(path: Path, rows: Sequence[str], header: str = AZURE_HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def trace_rows(count: int, day: str = "2023-11-16", hour: int = 18) -> list[str]:
    """Rows of one hour, twenty seconds apart."""
    return [f"{day} {hour:02d}:{n // 3:02d}:{n % 3 * 20:02d}.0000000,{100 + n},{10 + n % 7}" for n in range(count)]
