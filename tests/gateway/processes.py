"""A gateway in a process of its own, without a ClickHouse to talk to unless one is given."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOWHERE = "http://127.0.0.1:9"


def _all_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def running_gateway(
    folder: Path, catalogue: str, clickhouse: str = NOWHERE
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its host:port; its state is folder/state, its log folder/errors.log. Killed in the end."""
    config = folder / "catalogue.toml"
    config.write_text(catalogue)
    command = [sys.executable, "-m", "render_platform.cli", "serve", "--state", str(folder / "state")]
    with (folder / "errors.log").open("a") as errors:
        process = subprocess.Popen(
            [*command, "--config", str(config), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "RENDER_PLATFORM_CLICKHOUSE_DSN": clickhouse},
            preexec_fn=_all_files,
        )
    try:
        first = process.stdout.readline() if process.stdout else ""
        if "http://" not in first:
            raise AssertionError((folder / "errors.log").read_text()[-2_000:])
        yield process, first.split("http://")[1].split()[0]
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
