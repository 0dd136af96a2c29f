"""Every command: its help, its exit codes (0 good, 1 finding, 2 wrong usage, 3 unavailable), and what it never says."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click
import pytest

from render_platform.cli import main
from render_platform.note import Verifier
from tests.commands import (
    CHECKOUT,
    PROGRAM,
    Finished,
    Outcome,
    clean_environment,
    finished_demo,
    run_command,
    run_inside,
    secrets_of,
    write_trace,
)

NOWHERE = {"RENDER_PLATFORM_CLICKHOUSE_DSN": "http://reader:hunter2secret@127.0.0.1:9"}
READERS = {
    "verify": ["verify"],
    "verify --deep": ["verify", "--deep"],
    "reconcile": ["reconcile"],
    "vkey": ["vkey"],
    "query": ["query", "SELECT 1"],
}
"""Commands that read a state folder, as a name and their arguments."""


@pytest.fixture(scope="module")
def demo() -> Finished:
    return finished_demo()


@pytest.fixture
def state(demo: Finished, tmp_path: Path) -> Path:
    """A copy of a finished demo's state, to spoil."""
    return demo.copy(tmp_path / "state")


def error_of(outcome: Outcome) -> str:
    """The one error, which has a remedy below it."""
    lines = outcome.stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    assert any(line.startswith("  → ") for line in lines[errors[0] + 1 :]), outcome.stderr
    return lines[errors[0]]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << at % 8
    path.write_bytes(data)


# Help.


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command, groups walked into, with the words that run it."""
    waiting: list[tuple[str, click.Command]] = [("", main)]
    while waiting:
        words, command = waiting.pop()
        if isinstance(command, click.Group):
            waiting += [(f"{words} {name}".strip(), sub) for name, sub in command.commands.items()]
        yield words, command


@pytest.mark.parametrize(("words", "command"), list(commands()), ids=lambda value: value if value else "main")
def test_each_command_says_what_it_does(words: str, command: click.Command) -> None:
    for option in ("--help", "-h"):
        outcome = run_inside(*words.split(), option)
        assert outcome.code == 0
        assert outcome.stdout.startswith(f"Usage: render-platform {words}".rstrip())
        assert command.help
        assert " ".join(command.help.split())[:60] in " ".join(outcome.stdout.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{words} {parameter.name} has no help"


def test_each_command_is_documented() -> None:
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    names = [words for words, command in commands() if not isinstance(command, click.Group)]
    assert len(names) >= 6
    assert [words for words in names if f"render-platform {words}" not in text] == []


# Good.


@pytest.mark.parametrize("name", READERS)
def test_a_good_state(demo: Finished, name: str) -> None:
    outcome = run_inside(*READERS[name], "--state", demo.state, env=demo.env)
    assert outcome.code == 0, outcome.said
    assert outcome.stdout


@pytest.mark.parametrize("name", READERS)
def test_the_state_can_be_given_by_the_environment(demo: Finished, name: str) -> None:
    outcome = run_inside(*READERS[name], env={**demo.env, "RENDER_PLATFORM_STATE_DIR": str(demo.state)})
    assert outcome.code == 0, outcome.said


def test_verify_says_what_it_read(demo: Finished) -> None:
    outcome = run_inside("verify", "--deep", "--state", demo.state, "--json")
    found = outcome.json
    assert (found["verified"], found["deep"], found["problems"]) == (True, True, [])
    assert (found["size"], found["root"]) == (demo.story["log_size"], demo.story["root"])
    assert found["events"] == found["rows_read"] == demo.story["events"]["cas"]
    assert found["gpu_time_ns"] == demo.story["gpu_time_ns"]["cas"]
    assert any("--key" in note for note in found["notes"]), "keys of the folder itself prove less than pinned ones"


def test_reconcile_says_every_hour_or_those_of_a_range(demo: Finished) -> None:
    every = run_inside("reconcile", "--state", demo.state, "--json", env=demo.env)
    assert [(hour["hour"], hour["status"]) for hour in every.json] == [
        (hour["hour"], "reconciled") for hour in demo.story["hours"]
    ]
    one = run_inside(
        *("reconcile", "--state", demo.state, "--json"),
        *("--from", "2024-01-15T10:30Z", "--to", "2024-01-15T10:31Z"),
        env=demo.env,
    )
    assert (one.code, [hour["hour"] for hour in one.json]) == (0, ["2024-01-15T10:00:00Z"])


def test_an_hour_that_nothing_covers_is_unknown_and_not_reconciled(demo: Finished) -> None:
    hours = ("--from", "2020-01-01", "--to", "2020-01-01T01")
    outcome = run_inside("reconcile", "--state", demo.state, "--json", *hours, env=demo.env)
    assert (outcome.code, [hour["status"] for hour in outcome.json]) == (3, ["pending"])


def test_query(demo: Finished) -> None:
    counted = "SELECT count(*) AS events, sum(gpu_time_ns) AS ns FROM usage_events"
    rows = run_inside("query", counted, "--state", demo.state, "--json")
    assert (rows.code, rows.json) == (0, [{"events": 1_200, "ns": demo.story["gpu_time_ns"]["cas"]}])
    told = run_inside("query", counted, "--state", demo.state)
    assert told.stdout.splitlines() == ["events\tns", f"1200\t{demo.story['gpu_time_ns']['cas']}"]
    every = run_inside("query", "SELECT * FROM usage_events LIMIT 3", "--state", demo.state, "--json")
    assert (every.code, len(every.json)) == (0, 3)
    none = run_inside("query", "SELECT event_id FROM usage_events WHERE false", "--state", demo.state, "--json")
    assert (none.code, none.json) == (0, [])


def test_what_query_prints_as_json_is_json(demo: Finished) -> None:
    sql = "SELECT 'nan'::DOUBLE AS n, 'inf'::DOUBLE AS i, 1.5::DECIMAL(4, 2) AS d, NULL AS nothing"
    outcome = run_inside("query", sql, "--state", demo.state, "--json")
    assert outcome.code == 0
    assert (outcome.json[0]["d"], outcome.json[0]["nothing"]) == ("1.50", None)


def test_vkey_prints_a_key_that_parses(demo: Finished) -> None:
    log, attestation = (
        run_inside("vkey", *options, "--state", demo.state).stdout for options in ([], ["--attestation"])
    )
    assert log.count("\n") == attestation.count("\n") == 1
    name = Verifier.parse(log.strip()).name
    assert Verifier.parse(attestation.strip()).name == f"{name}/attestation"


# Verification with pinned keys, of a copy of the evidence alone.


def vkeys(state: Path) -> list[str]:
    return [run_inside("vkey", *options, "--state", state).stdout.strip() for options in ([], ["--attestation"])]


@pytest.fixture
def evidence(demo: Finished, tmp_path: Path) -> Path:
    for name in ("blobs", "log"):
        shutil.copytree(demo.state / name, tmp_path / "evidence" / name)
    return tmp_path / "evidence"


def test_verify_with_pinned_keys_needs_nothing_but_blobs_and_log(demo: Finished, evidence: Path) -> None:
    log, attestation = vkeys(demo.state)
    both = run_inside("verify", "--deep", "--state", evidence, "--key", log, "--key", attestation, "--json")
    assert (both.code, both.json["problems"]) == (0, [])
    assert not any("attestation" in note or "state folder" in note for note in both.json["notes"])
    assert both.json["rows_read"] == 1_200
    one = run_inside("verify", "--state", evidence, "--key", log, "--json")
    assert one.code == 0
    assert any("attestation" in note for note in one.json["notes"]), "what was not checked is said"
    assert sorted(path.name for path in evidence.iterdir()) == ["blobs", "log"], "an auditor's folder is left alone"


def test_verify_with_another_key_finds_that_it_did_not_sign(evidence: Path, tmp_path: Path) -> None:
    stranger = write_trace(tmp_path / "trace.csv", ["2023-11-16 18:00:00.0,1,1"])
    refused = run_inside("demo", "--trace", stranger, "--state", tmp_path / "other", env=NOWHERE)
    assert refused.code == 3  # the keys of a new platform stand nevertheless
    other = vkeys(tmp_path / "other")[0]
    outcome = run_inside("verify", "--state", evidence, "--key", other)
    assert outcome.code == 1
    assert "log/checkpoint: note: no known key has signed it" in outcome.stdout


def test_verify_with_the_key_of_the_same_name_and_another_id(demo: Finished, evidence: Path) -> None:
    name, key_id, key = vkeys(demo.state)[0].split("+", 2)
    for wrong in (f"{name}+{int(key_id, 16) ^ 1:08x}+{key}", "nonsense", f"{name}+{key_id}", ""):
        outcome = run_inside("verify", "--state", evidence, "--key", wrong)
        assert outcome.code == 2, wrong
        assert "key" in error_of(outcome)


# Findings.


def one_blob(state: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted((state / "blobs" / "sha256").rglob("*")) if path.is_file()])


def one_tile(state: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted((state / "log" / "tile" / "0").rglob("*")) if path.is_file()])


def one_bundle(state: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted((state / "log" / "tile" / "entries").rglob("*")) if path.is_file()])


def the_checkpoint(state: Path, rng: random.Random) -> Path:
    return state / "log" / "checkpoint"


@pytest.mark.parametrize("choose", [one_blob, one_tile, one_bundle, the_checkpoint])
@pytest.mark.parametrize("spoil", ["flip", "truncate", "remove"])
def test_verify_names_what_was_spoilt(
    state: Path, rng: random.Random, choose: Callable[[Path, random.Random], Path], spoil: str
) -> None:
    path = choose(state, rng)
    if spoil == "flip":
        flip(path, rng.randrange(path.stat().st_size))
    elif spoil == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    told = run_inside("verify", "--state", state)
    assert told.code == 1, told.said
    assert f"{path.relative_to(state)}" in told.stdout
    assert "verified:" not in told.stdout
    found = run_inside("verify", "--deep", "--state", state, "--json")
    assert (found.code, found.json["verified"]) == (1, False)
    assert str(path.relative_to(state)) in [problem["where"] for problem in found.json["problems"]]


def test_verify_names_a_file_that_does_not_belong(state: Path) -> None:
    (state / "blobs" / "sha256" / "notes.txt").write_text("mine")
    (state / "log" / "tile" / "extra").write_text("mine")
    outcome = run_inside("verify", "--state", state)
    assert outcome.code == 1
    assert "blobs/sha256/notes.txt" in outcome.stdout
    assert "log/tile/extra" in outcome.stdout


def batch_blob(state: Path) -> Path:
    """The Parquet file of one of its batches."""
    with closing(sqlite3.connect(f"file:{state / 'platform.db'}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT blob_digest FROM batches WHERE type = 'usage_batch'").fetchone()
    digest = str(found[0])
    return state / "blobs" / "sha256" / digest[:2] / digest[2:]


@pytest.mark.parametrize(("spoil", "code"), [("flip", 1), ("remove", 3)])
def test_query_never_answers_from_batches_that_are_not_what_was_logged(state: Path, spoil: str, code: int) -> None:
    path = batch_blob(state)
    if spoil == "flip":
        flip(path, 1_000)
    else:
        path.unlink()
    outcome = run_inside("query", "SELECT count(*) FROM usage_events", "--state", state)
    assert outcome.code == code, outcome.said
    assert outcome.stdout == ""
    assert path.name in error_of(outcome)


@pytest.mark.parametrize("spoil", ["flip", "remove"])
def test_reconcile_of_batches_that_cannot_be_read_is_unavailable(demo: Finished, state: Path, spoil: str) -> None:
    path = batch_blob(state)
    if spoil == "flip":
        flip(path, 1_000)
    else:
        path.unlink()
    outcome = run_inside("reconcile", "--state", state, "--json", env=demo.env)
    assert outcome.code == 3, outcome.said
    unavailable = [hour for hour in outcome.json if hour["status"] == "unavailable"]
    assert len(unavailable) == 1
    assert path.name in unavailable[0]["error"]
    assert len(unavailable[0]["error"].splitlines()) == 1


# Unavailable.


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
