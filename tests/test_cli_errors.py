"""More of test_cli.py: cli errors."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import (
    PROGRAM,
    Finished,
    Outcome,
    clean_environment,
    run_command,
    run_inside,
    secrets_of,
)
from tests.test_cli import NOWHERE, READERS, demo, error_of, evidence, state, vkeys  # noqa: F401  fixtures


def test_reconcile_without_clickhouse(demo: Finished) -> None:
    outcome = run_inside("reconcile", "--state", demo.state, "--json", env=NOWHERE)
    assert outcome.code == 3
    assert {hour["status"] for hour in outcome.json} == {"unavailable"}
    assert all("ClickHouse" in hour["error"] for hour in outcome.json)
    told = run_inside("reconcile", "--state", demo.state, env=NOWHERE)
    assert told.code == 3
    assert "RENDER_PLATFORM_CLICKHOUSE_DSN" in told.stdout
    assert "hunter2secret" not in outcome.said + told.said


def test_demo_without_clickhouse(tmp_path: Path) -> None:
    outcome = run_inside("demo", "--state", tmp_path / "state", "--json", env=NOWHERE)
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "ClickHouse" in error_of(outcome)
    assert "hunter2secret" not in outcome.said


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("reconcile",)])
def test_what_reads_evidence_needs_no_clickhouse(demo: Finished, name: str) -> None:
    assert run_inside(*READERS[name], "--state", demo.state, env=NOWHERE).code == 0


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(50_000))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def overwritten_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for start in range(2 * 4_096, len(data), 4_096):
        data[start : start + 200] = random.Random(start).randbytes(200)
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [garbage, truncated, overwritten_pages, folder])
@pytest.mark.parametrize("name", [*READERS, "demo"])
def test_a_database_that_cannot_be_read(demo: Finished, state: Path, spoil: Callable[[Path], None], name: str) -> None:
    spoil(state / "platform.db")
    outcome = run_inside(*READERS.get(name, [name]), "--state", state, env=demo.env)
    assert outcome.code == 3, outcome.said
    assert "the database cannot be used" in error_of(outcome)


@pytest.mark.parametrize("key", ["checkpoint", "attestation"])
@pytest.mark.parametrize("name", [*READERS, "demo"])
def test_a_key_of_a_begun_log_is_missing(demo: Finished, state: Path, name: str, key: str) -> None:
    (state / "keys" / f"{key}.key").unlink()
    outcome = run_inside(*READERS.get(name, [name]), "--state", state, env=demo.env)
    assert outcome.code == 3, outcome.said
    assert f"{key}.key" in error_of(outcome)
    assert not (state / "keys" / f"{key}.key").exists(), "a log that has begun must not go on under a new key"


# Wrong usage.


@pytest.mark.parametrize("key", ["checkpoint", "attestation"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_key_that_others_can_reach(demo: Finished, state: Path, key: str, mode: int) -> None:
    (state / "keys" / f"{key}.key").chmod(mode)
    for name in [*READERS, "demo"]:
        outcome = run_inside(*READERS.get(name, [name]), "--state", state, env=demo.env)
        assert outcome.code == 2, outcome.said
        assert f"{key}.key" in error_of(outcome)
        assert "chmod 600" in outcome.stderr


def test_a_key_file_that_holds_no_key_is_not_printed(demo: Finished, state: Path) -> None:
    path = state / "keys" / "checkpoint.key"
    secret = path.read_text().strip().split("+", 4)[4]
    path.write_text(path.read_text().strip()[:-3] + "\n")
    path.chmod(0o600)
    outcome = run_inside("verify", "--state", state, env=demo.env)
    assert outcome.code == 2
    assert "checkpoint.key" in error_of(outcome)
    assert secret[:-3] not in outcome.said


@pytest.mark.parametrize("name", READERS)
def test_there_is_no_state(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "nowhere" / "state"
    outcome = run_inside(*READERS[name], "--state", missing)
    assert outcome.code == 2
    assert str(missing) in error_of(outcome)
    assert list(tmp_path.iterdir()) == [], "a command that reads makes nothing"


def test_pinned_keys_and_no_evidence(demo: Finished, tmp_path: Path) -> None:
    outcome = run_inside("verify", "--state", tmp_path, "--key", vkeys(demo.state)[0])
    assert outcome.code == 2
    assert str(tmp_path) in error_of(outcome)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="no-command"),
        pytest.param(["nonsense"], id="unknown-command"),
        *[pytest.param([*READERS.get(name, [name]), "--nonsense"], id=f"{name}-option") for name in READERS],
        pytest.param(["demo", "--nonsense"], id="demo-option"),
        pytest.param(["up", "--port", "0"], id="port-0"),
        pytest.param(["up", "--port", "seventy"], id="port-text"),
        pytest.param(["query"], id="query-without-sql"),
        pytest.param(["reconcile", "--from", "yesterday"], id="from-text"),
        pytest.param(["reconcile", "--to", "2023-13-01"], id="to-month-13"),
        pytest.param(["reconcile", "--from", ""], id="from-empty"),
        pytest.param(["reconcile", "--from", "2024-01-15T10:00+99:00"], id="from-offset"),
    ],
)
def test_wrong_words(demo: Finished, words: list[str]) -> None:
    outcome = run_inside(*words, env={**demo.env, "RENDER_PLATFORM_STATE_DIR": str(demo.state)})
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Usage: render-platform" in outcome.stderr


@pytest.mark.parametrize("end", ["2024-01-15T09:00Z", "2024-01-15T08:00Z"])
def test_a_range_without_an_hour(demo: Finished, end: str) -> None:
    outcome = run_inside("reconcile", "--state", demo.state, "--from", "2024-01-15T09:00Z", "--to", end, env=demo.env)
    assert outcome.code == 2
    assert "--from is not before --to" in error_of(outcome)


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param("SELEC 1", id="syntax"),
        pytest.param("SELECT nonsense FROM usage_events", id="column"),
        pytest.param("SELECT * FROM nonsense", id="table"),
        pytest.param("", id="empty"),
        pytest.param(";", id="semicolon"),
        pytest.param("DROP TABLE usage_events", id="drop"),
        pytest.param("CREATE TABLE mine AS SELECT 1", id="create"),
        pytest.param("SELECT 1; SELECT 2", id="two"),
        pytest.param("SELECT * FROM read_csv('/etc/passwd')", id="file"),
        pytest.param("COPY usage_events TO '/tmp/render-platform-copied.csv'", id="copy"),
        pytest.param("SET enable_external_access = true", id="setting"),
        pytest.param("INSTALL httpfs", id="extension"),
    ],
)
def test_query_runs_one_select_and_nothing_else(demo: Finished, sql: str) -> None:
    outcome = run_inside("query", sql, "--state", demo.state)
    assert outcome.code == 2, outcome.said
    assert outcome.stdout == ""
    error_of(outcome)
    assert not Path("/tmp/render-platform-copied.csv").exists()


@pytest.mark.parametrize(
    "variable",
    [
        ("RENDER_PLATFORM_NONSENSE", "1"),
        ("RENDER_PLATFORM_BATCH_ROWS", "many"),
        ("RENDER_PLATFORM_BATCH_ROWS", "0"),
        ("RENDER_PLATFORM_RETENTION_DAYS", "-1"),
        ("RENDER_PLATFORM_DAGSTER_PORT", "70000"),
    ],
    ids=lambda pair: "=".join(pair),
)
@pytest.mark.parametrize("name", [*READERS, "demo", "up"])
def test_a_setting_that_is_not_one(demo: Finished, tmp_path: Path, name: str, variable: tuple[str, str]) -> None:
    state = tmp_path / "new" if name in ("demo", "up") else demo.state
    outcome = run_inside(*READERS.get(name, [name]), "--state", state, env={**demo.env, variable[0]: variable[1]})
    assert outcome.code == 2
    assert variable[0].removeprefix("RENDER_PLATFORM_").lower() in error_of(outcome).lower()
    assert not (tmp_path / "new").exists()


def test_a_dsn_that_is_none_is_wrong_usage_and_stays_secret(demo: Finished) -> None:
    for dsn in ("nonsense", "ftp://reader:hunter2secret@host", "http://reader:hunter2secret@host:port"):
        outcome = run_inside(
            "reconcile", "--state", demo.state, env={**demo.env, "RENDER_PLATFORM_CLICKHOUSE_DSN": dsn}
        )
        assert outcome.code == 2, outcome.said
        assert "hunter2secret" not in outcome.said


# As programs: what only a process of its own shows.


def test_the_installed_program(demo: Finished) -> None:
    program = Path(PROGRAM[0]).parent / "render-platform"
    done = subprocess.run(
        [program, "verify", "--state", demo.state, "--json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Outcome(0, done.stdout, done.stderr).json["verified"] is True


def test_a_process_ends_with_its_exit_code(state: Path, tmp_path: Path) -> None:
    assert run_command("verify", "--state", tmp_path / "nowhere").code == 2
    (state / "keys" / "checkpoint.key").unlink()
    assert run_command("verify", "--state", state).code == 3
    shutil.copy(state / "keys" / "attestation.key", state / "keys" / "checkpoint.key")
    assert run_command("verify", "--state", state).code == 1


@contextmanager
def dagster_up(state: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*PROGRAM, "up", "--state", str(state), "--port", str(port)],
        env=clean_environment(),
        cwd=state.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_up_serves_the_ui_of_the_state(state: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with dagster_up(state, port) as process:
        deadline = time.monotonic() + 90
        while not answers(port) and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.2)
        assert answers(port)
        again = run_command("up", "--state", state, "--port", port)
        assert (again.code, "already" in again.stderr) == (3, True)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert f"http://127.0.0.1:{port}" in said
    assert not answers(port)
    for secret in secrets_of(state):
        assert secret not in said


def test_up_refuses_a_port_that_is_taken(state: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        done = run_command("up", "--state", state, "--port", holder.getsockname()[1])
    assert (done.code, "--port" in done.stderr) == (3, True)


def test_a_range_without_events_is_wrong_usage_and_not_good(state: Path) -> None:
    done = run_command("reconcile", "--state", state, "--from", "2030-01-01T00:00:00Z")
    assert (done.code, "no hour of this range" in done.stderr) == (2, True)


def test_a_trace_that_cannot_be_read_leaves_no_state(tmp_path: Path) -> None:
    done = run_command("demo", "--state", tmp_path / "new", "--trace", tmp_path / "none.csv")
    assert done.code == 2
    assert not (tmp_path / "new").exists()
