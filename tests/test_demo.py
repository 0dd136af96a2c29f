"""The main job, as a program: what it prints, what it leaves behind, and what it refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.commands import CHECKOUT, Outcome, own_clickhouse, run_command, run_inside, trace_rows, write_trace

TRACES = CHECKOUT.parent / "shared" / "traces"
PLACES = ("outbox", "cas", "clickhouse")
KEYS = {
    "events",
    "gpu_time_ns",
    "batches",
    "log_size",
    "root",
    "hours",
    "verified",
    "run_id",
    "resumed",
    "lost_on_purpose",
    "unfinished_traces",
    "trace",
    "bad_rows",
}


def check_story(story: dict[str, Any], events: int) -> None:
    assert set(story) == KEYS
    assert story["events"] == dict.fromkeys(PLACES, events)
    assert set(story["gpu_time_ns"]) == set(PLACES)
    assert len(set(story["gpu_time_ns"].values())) == 1
    assert min(story["gpu_time_ns"].values()) > 0
    assert story["verified"] is True
    assert story["trace"]["rows"] == events
    assert len(story["root"]) == len(story["trace"]["sha256"]) == 64
    assert story["hours"]
    assert {hour["after"] for hour in story["hours"]} == {"reconciled"}


def recorded(state: Path) -> dict[str, int]:
    """Rows of the tables that anything recorded would stand in."""
    with closing(sqlite3.connect(f"file:{state / 'platform.db'}?mode=ro", uri=True)) as connection:
        names = ("runs", "usage_events", "batches", "log_entries", "lanes", "customers")
        return {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}


def refused(outcome: Outcome) -> str:
    """The error line of a usage error: one line, then its remedy, and nothing on stdout."""
    assert outcome.code == 2, outcome.said
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    assert lines[errors[0] + 1].startswith("  → "), outcome.stderr
    assert len(lines) == errors[0] + 2, outcome.stderr
    return lines[errors[0]]


def test_twice_on_one_state(tmp_path: Path) -> None:
    """As a program of its own: stdout is one JSON object and nothing else; progress is on stderr."""
    state = tmp_path / "state"
    first = run_command("demo", "--state", state, "--json")
    assert first.code == 0, first.said
    check_story(first.json, 1_200)
    assert [hour["hour"] for hour in first.json["hours"]] == ["2024-01-15T09:00:00Z", "2024-01-15T10:00:00Z"]
    assert {hour["before"] for hour in first.json["hours"]} == {"discrepant"}
    assert 0 < first.json["lost_on_purpose"] < 1_200
    assert (first.json["resumed"], first.json["bad_rows"], first.json["trace"]["path"]) == (False, [], "generated")
    for stage in ("replay", "flush", "reconcile", "repair", "verify"):
        assert any(line.startswith(stage) for line in first.stderr.splitlines()), stage

    second = run_command("demo", "--state", state, "--json")
    assert second.code == 0, second.said
    check_story(second.json, 1_200)
    assert second.json["run_id"] != first.json["run_id"]
    assert second.json["resumed"] is False
    assert second.json["log_size"] > first.json["log_size"]
    assert second.json["gpu_time_ns"] == first.json["gpu_time_ns"], "a schedule is a function of its trace"
    assert {hour["before"] for hour in second.json["hours"]} == {"discrepant"}

    verified = run_command("verify", "--deep", "--state", state, "--json")
    assert (verified.code, verified.json["events"], verified.json["size"]) == (0, 2_400, second.json["log_size"])
    assert recorded(state)["usage_events"] == 2_400


@pytest.mark.parametrize(("name", "events"), [("conv", 19_366), ("code", 8_819)])
def test_a_real_trace_is_counted_alike_in_three_places(tmp_path: Path, name: str, events: int) -> None:
    trace = TRACES / f"AzureLLMInferenceTrace_{name}.csv"
    if not trace.exists():
        pytest.skip(f"REAL TRACE NOT TESTED: {trace} is missing")
    done = run_inside("demo", "--trace", trace, "--state", tmp_path / "state", "--json", env=own_clickhouse())
    assert done.code == 0, done.said
    check_story(done.json, events)
    assert [hour["hour"] for hour in done.json["hours"]] == ["2023-11-16T18:00:00Z", "2023-11-16T19:00:00Z"]
    assert {hour["before"] for hour in done.json["hours"]} == {"discrepant"}
    assert done.json["bad_rows"] == []
    assert recorded(tmp_path / "state")["usage_events"] == events


def test_a_person_reads_the_same_story(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "small.csv", trace_rows(60))
    done = run_inside("demo", "--trace", trace, "--state", tmp_path / "state", env=own_clickhouse())
    assert done.code == 0, done.said
    assert "\x1b" not in done.said, "no colours where nobody reads them"
    for wanted in ("60 jobs", "simulated device", "missing", "discrepant", "reconciled", "equal", "verified"):
        assert wanted in done.stdout, wanted
    assert "DIFFERENT" not in done.stdout
    for command in ("up --state", "verify --deep --state", "query --state"):
        assert f"render-platform {command}" in done.stdout


BAD_ROWS = {5: "not a time,1,1", 9: "2023-11-16 18:01:00.0000000,12", 14: "2023-11-16 18:01:40.0000000,-3,7"}


def with_bad_rows(path: Path) -> Path:
    rows = trace_rows(40)
    for line, text in sorted(BAD_ROWS.items()):
        rows.insert(line - 2, text)
    return write_trace(path, rows)


def test_bad_rows_are_reported_by_line_and_counted(tmp_path: Path) -> None:
    trace = with_bad_rows(tmp_path / "bad.csv")
    done = run_inside("demo", "--trace", trace, "--state", tmp_path / "state", "--json", env=own_clickhouse())
    assert done.code == 0, done.said
    check_story(done.json, 40)
    assert [bad["line"] for bad in done.json["bad_rows"]] == sorted(BAD_ROWS)
    reasons = [bad["reason"] for bad in done.json["bad_rows"]]
    assert "TIMESTAMP" in reasons[0]
    assert "2 columns" in reasons[1]
    assert "ContextTokens" in reasons[2]

    told = run_inside("demo", "--trace", trace, "--state", tmp_path / "other", env=own_clickhouse())
    assert told.code == 0, told.said
    for line in BAD_ROWS:
        assert f"line {line}: not read" in told.stdout
    assert "3 rows could not be read" in told.stdout


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        pytest.param(trace_rows(20, day="2022-12-31", hour=22), "2022-12-31T22:00:00Z", id="before-2023"),
        pytest.param([*trace_rows(5, day="2022-12-31"), *trace_rows(5)], "2022-12-31T18:00:00Z", id="partly-before"),
        pytest.param(trace_rows(20, day="2090-05-01"), "2090-05-01T18:00:00Z", id="in-the-future"),
        pytest.param(["x,1,1", "y,2,2"], "no row can be read", id="no-good-row"),
    ],
)
def test_a_trace_that_cannot_be_replayed_records_nothing(tmp_path: Path, rows: Sequence[str], wanted: str) -> None:
    trace, state = write_trace(tmp_path / "trace.csv", rows), tmp_path / "state"
    said = refused(run_inside("demo", "--trace", trace, "--state", state, env=own_clickhouse()))
    assert wanted in said
    assert set(recorded(state).values()) == {0}
    assert not (state / "log" / "checkpoint").exists()


def test_a_refused_trace_leaves_a_state_as_it_was(tmp_path: Path) -> None:
    state, env = tmp_path / "state", own_clickhouse()
    good, bad = write_trace(tmp_path / "good.csv", trace_rows(20)), write_trace(tmp_path / "bad.csv", ["x,1,1"])
    assert run_inside("demo", "--trace", good, "--state", state, env=env).code == 0
    before = recorded(state), (state / "log" / "checkpoint").read_bytes()
    refused(run_inside("demo", "--trace", bad, "--state", state, env=env))
    assert (recorded(state), (state / "log" / "checkpoint").read_bytes()) == before


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param(None, "cannot be read: No such file or directory", id="missing"),
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"time,tokens\n1,2\n", "time, tokens", id="unknown-columns"),
        pytest.param(b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows", id="header-only"),
        pytest.param(b"\x1f\x8b\x08\x00broken", "gzip", id="damaged-gzip"),
        pytest.param(b"\x00\xff\xfe\x00\x01", "", id="binary"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    trace = tmp_path / "trace.csv"
    if content is not None:
        trace.write_bytes(content)
    said = refused(run_inside("demo", "--trace", trace, "--state", tmp_path / "state", "--json", env=own_clickhouse()))
    assert str(trace) in said
    assert wanted in said


def test_evidence_that_does_not_verify_fails_the_demo(tmp_path: Path) -> None:
    """Exit 1: everything was counted and reconciled, and an attestation of an earlier run was changed meanwhile."""
    state, env = tmp_path / "state", own_clickhouse()
    trace = write_trace(tmp_path / "trace.csv", trace_rows(30))
    assert run_inside("demo", "--trace", trace, "--state", state, env=env).code == 0
    with closing(sqlite3.connect(state / "platform.db")) as connection:
        digest = connection.execute("SELECT attestation_digest FROM batches WHERE type = 'usage_batch'").fetchone()[0]
    blob = state / "blobs" / "sha256" / digest[:2] / digest[2:]
    blob.write_bytes(blob.read_bytes().replace(b"payload", b"pAyload", 1))
    again = run_inside("demo", "--trace", trace, "--state", state, "--json", env=env)
    assert again.code == 1
    assert again.json["verified"] is False
    assert again.json["events"] == dict.fromkeys(PLACES, 30)
    told = run_inside("demo", "--trace", trace, "--state", state, env=env)
    assert told.code == 1
    assert "NOT verified" in told.stdout
    assert digest[2:] in told.stdout


@pytest.mark.parametrize("below", ["", "state"])
def test_a_state_folder_that_is_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    outcome = run_inside("demo", "--state", file / below, env=own_clickhouse())
    assert outcome.code in (2, 3), outcome.said
    assert "error: " in outcome.stderr
    assert str(file) in outcome.stderr
