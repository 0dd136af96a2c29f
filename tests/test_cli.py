"""Every command: its help, its exit codes (0 good, 1 finding, 2 wrong usage, 3 unavailable), and what it never says."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest

from render_platform.cli import main
from render_platform.note import Verifier
from tests.commands import (
    CHECKOUT,
    Finished,
    Outcome,
    finished_demo,
    run_inside,
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
