"""A gateway on a disk that is full: it says that it is not ready, and why, until a write has succeeded."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.gateway.http import eventually
from tests.gateway.processes import running_gateway
from tests.gateway.test_commands import CHAT, ask

DISK = "16m"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `state` is a small disk of its own."""
    state = tmp_path / "state"
    state.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "none", state], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"FULL DISK NOT TESTED: nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", state], check=True)


def fill(disk: Path) -> Path:
    """The file that takes all that is left."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4_096))
    return path


def failing(address: str) -> bool:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return b"render_platform_write_failing 1.0" in answer.read()


def test_a_full_disk_is_told_until_there_is_room(folder: Path) -> None:
    with running_gateway(folder, "") as (_, address):
        assert (ask(address, "/ready")[0], failing(address)) == (200, False)
        filler = fill(folder / "state")
        code, problem = ask(address, "/v1/chat/completions", CHAT)
        assert (code, "disk is full" in str(problem)) == (503, True)
        code, said = ask(address, "/ready")
        assert (code, said["status"], failing(address)) == (503, "unready", True)
        assert ["disk is full" in one for one in said["problems"]] == [True]
        filler.unlink()
        eventually(lambda: ask(address, "/ready")[0] == 200)  # the lease is renewed: nobody need send a job
        assert failing(address) is False
        assert ask(address, "/v1/chat/completions", CHAT)[0] == 200


def test_a_disk_that_fills_up_is_seen_without_any_job(folder: Path) -> None:
    with running_gateway(folder, "") as (_, address):
        fill(folder / "state")
        begun = time.monotonic()
        eventually(lambda: ask(address, "/ready")[0] == 503)
        assert time.monotonic() - begun < 15
