"""deploy/backup.py: a copy that was made while events came is restored, goes on, and verifies."""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from render_platform.clock import ManualClock
from tests.commands import clean_environment, run_inside
from tests.deployment import DEPLOY
from tests.factories import START_US
from tests.platforms import make_platform, record_random


def back_up(state: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "backup.py"), str(folder)],
        env=clean_environment({"RENDER_PLATFORM_STATE_DIR": str(state)}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state whose log grows by a few batches, and events that wait."""
    with closing(make_platform(tmp_path / "state", ManualClock(START_US))) as platform:
        record_random(platform, 20, 1)
        platform.flush()
        record_random(platform, 5, 2)
    return tmp_path / "state"


def events(state: Path) -> int:
    outcome = run_inside("status", "--state", state, "--json")
    assert outcome.code == 0, outcome.said
    found: int = outcome.json["events"]
    return found


def restore(backup: Path, keys: Path, to: Path) -> None:
    """As docs/backup.md says; flushed at the time of the events, for which no hours have passed since."""
    shutil.copytree(backup, to)
    shutil.copytree(keys, to / "keys")
    to.chmod(0o700)
    assert run_inside("recover", "--state", to).code == 0
    with closing(make_platform(to, ManualClock(START_US + 10_000_000), seed=str(to))) as platform:
        platform.flush()
    outcome = run_inside("verify", "--deep", "--state", to)
    assert outcome.code == 0, outcome.said


def test_a_backup_is_private_holds_no_key_and_only_adds(state: Path, tmp_path: Path) -> None:
    assert "new objects" in back_up(state, tmp_path / "copy")
    assert "0 new tiles, 0 new objects" in back_up(state, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"platform.db", "log", "blobs"}
    assert not list((tmp_path / "copy").rglob("*.new"))
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (tmp_path / "copy").rglob("*"))


def test_a_restored_backup_goes_on(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "copy")
    restore(tmp_path / "copy", state / "keys", tmp_path / "restored")
    assert events(tmp_path / "restored") == 25


def test_an_old_database_with_a_newer_log_is_recovered(state: Path, tmp_path: Path) -> None:
    """The database is copied first, so that this is what a backup of a busy state is."""
    back_up(state, tmp_path / "copy")
    with closing(make_platform(state, ManualClock(START_US + 5_000_000), seed=3)) as platform:
        platform.flush()
    shutil.copytree(state / "blobs", tmp_path / "copy/blobs", dirs_exist_ok=True)
    shutil.copytree(state / "log", tmp_path / "copy/log", dirs_exist_ok=True)
    restore(tmp_path / "copy", state / "keys", tmp_path / "restored")
    assert events(tmp_path / "restored") == 25


def test_a_backup_while_the_log_grows_verifies(state: Path, tmp_path: Path) -> None:
    """With so many objects that entries are logged while they are copied: another order of copying is found out."""
    for number in range(5_000):
        name = hashlib.sha256(str(number).encode()).hexdigest()
        orphan = state / "blobs/sha256" / name[:2] / name[2:]
        orphan.parent.mkdir(parents=True, exist_ok=True)
        orphan.write_text(str(number))
    stop = threading.Event()

    def work() -> None:
        with closing(make_platform(state, ManualClock(START_US + 9_000_000), seed=4)) as platform:
            for number in range(1_000):
                record_random(platform, 3, 100 + number)
                platform.flush()
                if stop.is_set():
                    return

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(3):
            back_up(state, tmp_path / f"copy{number}")
    finally:
        stop.set()
        worker.join()
    for number in range(3):
        restore(tmp_path / f"copy{number}", state / "keys", tmp_path / f"restored{number}")
