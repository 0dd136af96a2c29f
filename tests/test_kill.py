"""The demo, killed with SIGKILL at ten random instants and run again on the same state: nothing lost, nothing twice.

What is checked afterwards is read with sqlite3, pyarrow and hashlib, not with the library that wrote it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tests.commands import CHECKOUT, PROGRAM, Outcome, clean_environment, run_command
from tests.platforms import check_chain, read_blob, read_log, read_published, tree_hash

EVENTS = 1_200
KILLS = 10
ATTEMPTS = 25
STAGES = ("start", "read", "replay", "flush", "reconcile", "repair", "verify")


class Instant(NamedTuple):
    """So long after the demo has said that it is in this stage, or a later one."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Baseline:
    """A demo that nobody stops: what it said, and when each stage began."""

    story: dict[str, Any]
    begins: dict[str, float]
    seconds: float

    def instant(self, at: float) -> Instant:
        stage = max((name for name, begin in self.begins.items() if begin <= at), key=self.begins.__getitem__)
        return Instant(stage, at - self.begins[stage])


@contextmanager
def started(state: Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The demo in a process group of its own; what is left of it is killed at the end."""
    with said.with_suffix(".json").open("wb") as out, said.open("wb") as err:
        process = subprocess.Popen(
            [*PROGRAM, "demo", "--state", str(state), "--json"],
            stdout=out,
            stderr=err,
            env=clean_environment(),
            cwd=CHECKOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stages_said(said: Path) -> list[str]:
    lines = said.read_text(errors="replace").splitlines()
    return ["start", *(name for line in lines for name in STAGES if line.startswith(name))]


def wait_for(process: subprocess.Popen[bytes], said: Path, stage: str) -> bool:
    """Until the stage, or a later one, was said; False where the demo ended before."""
    while max(map(STAGES.index, stages_said(said))) < STAGES.index(stage):
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def measure(folder: Path) -> Baseline:
    said, begins = folder / "baseline.txt", {"start": 0.0}
    began = time.monotonic()
    with started(folder / "fresh", said) as process:
        while process.poll() is None:
            for stage in stages_said(said):
                begins.setdefault(stage, time.monotonic() - began)
            time.sleep(0.005)
        seconds = time.monotonic() - began
        assert process.returncode == 0, said.read_text()
    return Baseline(json.loads(said.with_suffix(".json").read_text()), begins, seconds)


def instants(rng: random.Random, baseline: Baseline) -> list[Instant]:
    """One in each tenth of the demo, from the end of its imports on, in order: so each stage is met unfinished."""
    low = 0.6 * baseline.begins["replay"]
    tenth = (baseline.seconds - low) / KILLS
    return [baseline.instant(low + tenth * (number + rng.random())) for number in range(KILLS)]


def run_and_kill(state: Path, said: Path, instant: Instant) -> tuple[bool, str]:
    """Whether it was really killed (False: it had finished), and the stage it was in."""
    with started(state, said) as process:
        if wait_for(process, said, instant.stage):
            time.sleep(instant.seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code in (0, -signal.SIGKILL), said.read_text()
    return code != 0, stages_said(said)[-1]


class Batched(NamedTuple):
    """An event as a Parquet batch holds it."""

    event_id: bytes
    job_id: bytes
    source: str
    gpu_time_ns: int


def batched_rows(state: Path, digest: str) -> list[Batched]:
    table = pq.read_table(pa.BufferReader(read_blob(state, digest)), columns=list(Batched._fields))
    ids = [table.column(name).combine_chunks().storage.to_pylist() for name in ("event_id", "job_id")]
    others = [table.column(name).to_pylist() for name in ("source", "gpu_time_ns")]
    return [Batched(*values) for values in zip(*ids, *others, strict=True)]


def recorded_rows(state: Path) -> tuple[list[Batched], list[tuple[str, str]]]:
    """The outbox's rows, and (lane, state) of each run."""
    with closing(sqlite3.connect(f"file:{state / 'platform.db'}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT DISTINCT state FROM batches").fetchall() == [("published",)]
        rows = connection.execute("SELECT event_id, job_id, source, gpu_time_ns FROM usage_events").fetchall()
        runs = connection.execute("SELECT lane, state FROM runs").fetchall()
    return [Batched(*row) for row in rows], runs


def logged_entries(state: Path) -> list[dict[str, Any]]:
    """Every entry of the published log, its chain, its root and its signature checked."""
    vkey = run_command("vkey", "--state", state).stdout.strip()
    published = read_published(state, vkey)
    raw = read_log(state, published.size)
    assert tree_hash(raw) == published.root
    check_chain(raw)
    entries = [json.loads(entry) for entry in raw]
    assert len({(entry["type"], entry["batch_id"]) for entry in entries}) == len(entries), "an entry was logged twice"
    return entries


def check_state(state: Path, baseline: Baseline) -> None:
    rows, runs = recorded_rows(state)
    assert {run_state for _, run_state in runs} == {"finished"}
    assert len(rows) == EVENTS * len(runs)
    for name in ("event_id", "job_id"):
        assert len({getattr(row, name) for row in rows}) == len(rows), f"{name} stands twice"
    entries = logged_entries(state)
    batches = [entry for entry in entries if entry["type"] == "usage_batch"]
    in_batches = [batched_rows(state, entry["subject_digest"]) for entry in batches]
    for entry, batch in zip(batches, in_batches, strict=True):
        assert entry["records"] == len(batch)
        assert entry["gpu_time_ns"] == sum(row.gpu_time_ns for row in batch)
    assert sorted(row for batch in in_batches for row in batch) == sorted(rows)
    gpu_time_ns = baseline.story["gpu_time_ns"]["outbox"]
    for lane, _ in runs:
        of_run = [row for row in rows if row.source == lane]
        assert (len(of_run), sum(row.gpu_time_ns for row in of_run)) == (EVENTS, gpu_time_ns)


def check_commands(state: Path, runs: int) -> None:
    verified = run_command("verify", "--deep", "--state", state, "--json")
    assert (verified.code, verified.json["problems"]) == (0, [])
    assert verified.json["events"] == verified.json["rows_read"] == EVENTS * runs
    reconciled = run_command("reconcile", "--state", state, "--json")
    assert reconciled.code == 0, reconciled.said
    windows = [window for report in reconciled.json for window in report["windows"]]
    assert sum(window["events"] for window in windows) == EVENTS * runs
    assert sum(window["fast_events"] for window in windows) == EVENTS * runs


def unended_dagster_runs(state: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{state / 'dagster/history/runs.db'}?mode=ro", uri=True)) as connection:
        return connection.execute(
            "SELECT pipeline_name, status FROM runs WHERE status NOT IN ('SUCCESS', 'FAILURE', 'CANCELED')"
        ).fetchall()


def test_killed_at_ten_random_instants_and_run_again(tmp_path: Path, rng: random.Random) -> None:
    baseline = measure(tmp_path)
    assert baseline.story["events"] == {"outbox": EVENTS, "cas": EVENTS, "clickhouse": EVENTS}
    state, finished = tmp_path / "state", 0
    killed: list[str] = []
    planned = instants(rng, baseline)
    for attempt in range(ATTEMPTS):
        if len(killed) == KILLS:
            break
        instant = planned[attempt] if attempt < KILLS else rng.choice(planned)
        was_killed, stage = run_and_kill(state, tmp_path / f"attempt-{attempt}.txt", instant)
        killed += [stage] if was_killed else []
        finished += 0 if was_killed else 1
    print(f"killed in {dict(Counter(killed))}; {finished} finished before; a whole demo took {baseline.seconds:.1f} s")
    assert len(killed) == KILLS
    assert len(set(killed)) >= 3, f"the instants hit too little of the demo: {killed}"

    last: Outcome = run_command("demo", "--state", state, "--json")
    assert last.code == 0, last.said
    for places in (last.json["events"], last.json["gpu_time_ns"]):
        assert len(set(places.values())) == 1
    assert last.json["gpu_time_ns"] == baseline.story["gpu_time_ns"]
    _, runs = recorded_rows(state)
    # A kill after a run was marked finished, and before the program ended, leaves a finished run too.
    assert finished + 1 <= len(runs) <= finished + 1 + KILLS
    check_state(state, baseline)
    check_commands(state, len(runs))


def test_no_dagster_run_of_a_killed_demo_looks_as_if_it_still_ran(tmp_path: Path) -> None:
    """A run that nobody ends stays "in progress" for ever, and the backlog's sensor would wait for it for ever."""
    state, said = tmp_path / "state", tmp_path / "said.txt"
    with started(state, said) as process:
        deadline = time.monotonic() + 60
        while not (killed := flush_is_running(state)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert killed, "the demo ended before a flush was seen"
    assert unended_dagster_runs(state) == [("flush", "STARTED")]
    again = run_command("demo", "--state", state)
    assert again.code == 0, again.said
    assert unended_dagster_runs(state) == []


def flush_is_running(state: Path) -> bool:
    try:
        return ("flush", "STARTED") in unended_dagster_runs(state)
    except sqlite3.OperationalError:  # not made yet, or being made
        return False
