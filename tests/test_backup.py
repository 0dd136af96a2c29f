"""deploy/backup.py: a copy that was made while events came is restored, goes on, verifies. As docs/backup.md says."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import ManualClock
from render_platform.pipeline import open_platform
from tests.chdb_server import dsn_of, fresh_database
from tests.commands import clean_environment, run_inside
from tests.deployment import CHECKOUT, DEPLOY
from tests.factories import START_US
from tests.gateway.http import CHAT, CHAT_PATH, Running, eventually, running
from tests.platforms import connect, make_platform, record_random


def run_backup(state: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "backup.py"), str(folder)],
        env=clean_environment({"RENDER_PLATFORM_STATE_DIR": str(state)}),
        capture_output=True,
        text=True,
        timeout=120,
    )


def back_up(state: Path, folder: Path) -> str:
    done = run_backup(state, folder)
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


def test_partial_tiles_leave_the_copy_as_they_leave_the_log(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "copy")
    assert len(list((tmp_path / "copy/log/tile").rglob("*.p/*"))) >= 2
    for partials in (state / "log/tile").rglob("*.p"):
        partials.with_suffix("").touch()  # as a full one: what it holds is not looked at
    assert "2 new tiles, 0 new objects" in back_up(state, tmp_path / "copy")
    assert not list((tmp_path / "copy/log/tile").rglob("*.p/*"))
    assert "0 new tiles" in back_up(state, tmp_path / "copy"), "those that the log keeps for a day are not copied again"


def test_one_backup_at_a_time_writes_to_a_folder(state: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    folder = os.open(tmp_path / "copy", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another backup" in run_backup(state, tmp_path / "copy").stderr
    os.close(folder)
    back_up(state, tmp_path / "copy")


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


# The page, command by command.


def lines_of(heading: str) -> str:
    """The commands of a section of docs/backup.md."""
    _, _, section = (CHECKOUT / "docs/backup.md").read_text().partition(heading)
    return section.split("```")[1]


def run_as_told(commands: str, places: dict[str, object], env: dict[str, str]) -> str:
    """With the test's places in those of the page."""
    for name, value in places.items():
        commands, count = re.subn(rf"(?<![\w/]){re.escape(name)}(?!\w)", str(value), commands)
        assert count, f"the page does not name {name}"
    commands = commands.replace(" && ", "\n")  # else bash goes on after a failure on the left
    told = clean_environment({"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **env})
    done = subprocess.run(
        ["bash", "-euxc", commands], cwd=CHECKOUT, env=told, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def more_than(ended: list[str], count: int) -> bool:
    return len(ended) > count


@contextmanager
def used(at: Running) -> Iterator[list[str]]:
    """Jobs come, and are flushed, until the block ends; the ids of those that have ended."""
    ended: list[str] = []
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            ended.append(at.client().post(CHAT_PATH, CHAT).headers["x-job-id"])

    def flush() -> None:
        with open_platform(at.gateway.settings) as platform:
            while not stop.is_set():
                platform.flush()

    with ThreadPoolExecutor(3) as workers:
        running = [workers.submit(work) for work in (send, send, flush)]
        try:
            yield ended
        finally:
            stop.set()
        for one in running:
            one.result()


def test_the_page_is_done_as_it_says_while_a_gateway_is_used(tmp_path: Path) -> None:
    """Every job that had ended before the copy began is billed in what is restored, and nothing is twice."""
    copy, keys, restored = tmp_path / "backup", tmp_path / "keys", tmp_path / "restored"
    live: dict[str, Any] = {"clickhouse_dsn": dsn_of("bridge"), "clickhouse_database": fresh_database()}
    by = {".venv/bin/python": sys.executable, "/var/lib/render-platform/state": tmp_path / "state"}
    with running(tmp_path / "state", **live) as at, used(at) as ended:
        eventually((tmp_path / "state/log/checkpoint").exists)
        for wanted in (20, 60):
            eventually(partial(more_than, ended, wanted))
            before = set(ended)
            run_as_told(lines_of("# Backing up"), {**by, "/backup/render-platform": copy}, {})
        eventually(partial(more_than, ended, len(before)))
    shutil.copytree(tmp_path / "state/keys", keys)
    env = {f"RENDER_PLATFORM_{name.upper()}": value for name, value in live.items()}
    at_live = {**env, "RENDER_PLATFORM_STATE_DIR": str(tmp_path / "state")}
    vkey, attestation = (run_inside("vkey", *role, env=at_live).stdout.strip() for role in ((), ("--attestation",)))

    restored.mkdir()
    places = {"/backup/render-platform": copy, "STATE": restored, "KEYS": keys, "VKEY": vkey}
    anew = {"RENDER_PLATFORM_STATE_DIR": str(restored), "RENDER_PLATFORM_CLICKHOUSE_DATABASE": fresh_database()}
    run_as_told(lines_of("## Restore"), places, {**env, **anew})
    with closing(connect(restored)) as connection:
        billed = [str(uuid.UUID(bytes=row[0])) for row in connection.execute("SELECT job_id FROM usage_events")]
    assert before <= set(billed)
    assert len(billed) == len(set(billed))

    places = {"/backup/render-platform": copy, "TARGET": tmp_path / "drill"}
    run_as_told(lines_of("## Drill"), {**places, "VKEY": vkey, "ATTESTATION_VKEY": attestation}, at_live)
