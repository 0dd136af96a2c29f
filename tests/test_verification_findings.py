"""What verification says of what it finds: where, what, since when, and what it puts in doubt; and of how far it is."""

from __future__ import annotations

import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from dagster_duckdb import DuckDBResource

from assets.compliance import audit_log, audit_verification
from render_platform.clock import DAY_US, HOUR_US
from render_platform.console import person, print_verification
from render_platform.entries import AuditEntry
from render_platform.evidence import EventIds, Problem, Verification
from render_platform.verification import verify
from resources.platform import PlatformResource
from tests.factories import make_events, replace_column
from tests.platforms import make_platform, record_random
from tests.stories import HOUR, HandMade, about, named, rows_of_hour, said
from tests.test_verification import (
    made,  # noqa: F401  a fixture
    simple,
)

FIRST, SECOND = "2023-11-16T18:00:00Z", "2023-11-16T19:00:00Z"


def path_of(digest: str | None) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest[2:]}" if digest else ""


def entries_of(made: HandMade) -> list[AuditEntry]:
    """Two hours, each with a batch and a watermark; published after each."""
    found = []
    for n in range(2):
        batch = made.batch(HOUR + n * HOUR_US, 0, rows_of_hour(5, n, HOUR + n * HOUR_US))
        found += [batch, made.watermark(HOUR + n * HOUR_US, batch)]
        made.publish()
    return found


def harmed(made: HandMade, name: str) -> Problem:
    """The one problem that a flipped bit in `name` gives."""
    part, _, path = name.partition("/")
    files = made.log.files if part == "log" else made.blobs.files
    whole = files[path]
    files[path] = bytes([whole[0] ^ 1]) + whole[1:]
    (problem,) = verify(made.evidence()).problems
    files[path] = whole
    assert problem.where == name
    return problem


def test_an_object_s_problem_says_whose_hour_and_what_hangs_on_it(made: HandMade) -> None:
    batch = entries_of(made)[2]
    problem = harmed(made, path_of(batch.subject_digest))
    assert (problem.since, problem.doubt) == (
        SECOND,
        f"batch {batch.batch_id}: its 5 events, their charges and receipts",
    )
    problem = harmed(made, path_of(batch.attestation))
    assert problem.since == SECOND
    assert problem.doubt == f"what is attested of batch {batch.batch_id}: its devices, meters and times"
    stray = made.cas.put(b"an object that nothing names yet")
    problem = harmed(made, path_of(stray))
    assert (problem.since, problem.doubt) == ("", "nothing: no entry binds it")


def test_a_log_file_s_problem_says_which_entries_and_their_first_hour(made: HandMade) -> None:
    entries_of(made)
    problem = harmed(made, "log/tile/0/000.p/4")
    assert (problem.since, problem.doubt) == (FIRST, "proofs for entries 0 … 3")
    problem = harmed(made, "log/tile/entries/000.p/2")
    assert (problem.since, problem.doubt) == (FIRST, "entries 0 … 1, where no other file of the log holds them")


def test_a_log_that_left_its_past_says_since_which_hour(made: HandMade, tmp_path: Path) -> None:
    """The first publication is kept, and all after it is another story."""
    entries_of(made)
    (tmp_path / "other").mkdir()
    with closing(HandMade(tmp_path / "other")) as forked:
        first = forked.batch(HOUR, 0, rows_of_hour(5, 0))
        forked.watermark(HOUR, first)
        forked.publish()
        for n in range(1, 4):
            forked.watermark(HOUR + n * HOUR_US)
        forked.publish()
        assert forked.history[0] == made.history[0]
        (problem,) = about(verify(replace(forked.evidence(), history=made.history)), "log/checkpoint")
    assert "is not consistent with the one published at size 4" in problem.what
    assert (problem.since, problem.doubt.split(":")[0]) == (SECOND, "every entry from 2 on")


def test_an_entry_s_problem_says_its_hour_and_lane(made: HandMade) -> None:
    mark = made.watermark(HOUR, records=7)
    (problem,) = made.verify().problems
    assert (problem.where, problem.since) == (f"entry of {mark.batch_id}", FIRST)
    assert problem.doubt == f"that the log holds every batch of {FIRST} … in lane live"
    assert made.verify().as_json()["problems"] == [
        {"where": problem.where, "what": problem.what, "since": FIRST, "doubt": problem.doubt}
    ]
    console = person()
    with console.capture() as said_to_a_person:
        print_verification(console, made.verify())
    assert f"since {FIRST}; in doubt: {problem.doubt}" in said_to_a_person.get().replace("\n", "")


def test_without_any_hour_nothing_is_claimed_of_since_when(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    made.log.files["checkpoint"] = b"nothing"
    (problem, *_) = verify(made.evidence()).problems
    assert problem.since == ""
    assert problem.as_json()["since"] is None
    assert problem.doubt.startswith("everything")


# Only some hours.


def only(made: HandMade, start: int, end: int, **more: Any) -> Verification:
    made.publish()
    bounds: dict[str, Any] = {"start_us": HOUR + start * HOUR_US, "end_us": HOUR + end * HOUR_US}
    return verify(made.evidence(), deep=True, only_range=True, **bounds, **more)


def test_a_range_reads_its_own_objects_and_the_whole_log(made: HandMade) -> None:
    simple(made, 4)
    calls: list[tuple[str, int, int]] = []
    outcome = only(made, 1, 3, progress=lambda *call: calls.append(call))
    assert outcome.verified, said(outcome)
    assert (outcome.entries, outcome.batches, outcome.deep_records, outcome.blobs) == (8, 2, 10, 8)
    assert sorted(outcome.hours) == [HOUR + HOUR_US, HOUR + 2 * HOUR_US]
    assert calls[-1] == ("events", 10, 10)
    assert "only the objects of the hours asked for were read" in outcome.notes[0]


def test_what_is_wrong_in_the_range_is_found_and_what_is_wrong_elsewhere_is_for_others(made: HandMade) -> None:
    simple(made, 3)
    made.publish()
    subjects = [path for path, data in made.blobs.files.items() if data.startswith(b"PAR1")]
    for path in subjects:
        whole = made.blobs.files.pop(path)
        found = [named(only(made, hour, hour + 1)) for hour in range(3)]
        assert sorted(found, key=len) == [set(), set(), {f"blobs/{path}"}]
        made.blobs.files[path] = whole
    (bad,) = [name for name in made.log.files if "tile/0/" in name]
    made.log.files[bad] = bytes(len(made.log.files[bad]))
    assert [named(only(made, hour, hour + 1)) for hour in range(3)] == [{f"log/{bad}"}] * 3


def test_a_missing_object_of_the_range_is_named_once(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    for path in list(made.blobs.files):
        whole = made.blobs.files.pop(path)
        (problem,) = only(made, 0, 1).problems
        assert problem.where == f"blobs/{path}"
        assert problem.what.startswith("missing; the entry of ")
        made.blobs.files[path] = whole


# Events that stand twice, wherever they stand.


def test_an_event_in_batches_that_are_hours_apart_is_found(made: HandMade) -> None:
    simple(made, 3)
    rows = rows_of_hour(5, 0).slice(2, 1)
    later = HOUR + 3 * HOUR_US
    times = rows.schema.field("recorded_at")
    again = rows.set_column(
        rows.schema.get_field_index("recorded_at"), times, pa.array([later], pa.int64()).cast(times.type)
    )
    batch = made.batch(later, 0, again)
    assert made.verify().verified, "rows are not read"
    (problem,) = made.verify(deep=True).problems
    twice = sorted(make_events(5, 0), key=lambda event: event.event_id)[2].event_id
    assert problem.where == path_of(batch.subject_digest)
    assert problem.what == f"an event stands twice: {twice}; usage_batch/1 holds it too"


def test_many_that_stand_twice_are_counted_and_some_listed(made: HandMade) -> None:
    rows = rows_of_hour(20, 0)
    first = made.batch(HOUR, 0, rows)
    made.batch(HOUR, 1, replace_column(rows, "batch_size", [9] * 20), complete_until=first.complete_until)
    (problem,) = made.verify(deep=True).problems
    assert "and 17 more; usage_batch/1 holds it too" in problem.what


def test_ids_that_do_not_fit_into_memory_are_found_all_the_same() -> None:
    """Two million ids in 32 MB: DuckDB has to put some of them into files."""
    ids = EventIds()
    ids._rows.execute("SET memory_limit = '32MB'")
    rng = np.random.default_rng(1)
    first = rng.bytes(16)
    for batch in range(20):
        data = (first if batch in (0, 19) else rng.bytes(16)) + rng.bytes(16 * 49_999)
        plain = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 50_000, [None, pa.py_buffer(data)])
        column = pa.ExtensionArray.from_storage(pa.uuid(), plain)
        ids.add(pa.table({"event_id": column, "job_id": column}), batch)
    found, jobs = list(ids.twice("event_id")), list(ids.twice("job_id"))
    ids.close()
    assert (found, jobs) == ([(uuid.UUID(bytes=first), [0, 19])], [])


# The asset: days of a range in one run.


def test_each_day_of_a_range_has_figures_of_its_own(tmp_path: Path, platform_state: PlatformResource) -> None:
    days = dg.PartitionKeyRange("2023-11-16", "2023-11-18")
    result = dg.materialize(
        [audit_log, audit_verification],
        selection=[audit_verification],
        resources={"platform": platform_state},
        tags={
            "dagster/asset_partition_range_start": days.start,
            "dagster/asset_partition_range_end": days.end,
        },
    )
    assert result.success
    found: dict[Any, dict[str, Any]] = {}
    for event in result.get_asset_materialization_events():
        materialized = event.step_materialization_data.materialization
        found[materialized.partition] = {name: value.value for name, value in materialized.metadata.items()}
    assert {day: metadata["events re-read"] for day, metadata in found.items()} == {
        "2023-11-16": 5,
        "2023-11-17": 0,
        "2023-11-18": 7,
    }
    assert found["2023-11-18"]["dagster/partition_row_count"] == 7
    assert found["2023-11-16"]["entries"] == found["2023-11-18"]["entries"] > 40


@pytest.fixture
def platform_state(tmp_path: Path) -> PlatformResource:
    with closing(make_platform(tmp_path / "state")) as platform:
        record_random(platform, 5, 1)
        record_random(platform, 7, 2, start_us=HOUR + 2 * DAY_US - HOUR_US)
        platform.flush()
    return PlatformResource(state_dir=str(tmp_path / "state"), duckdb=DuckDBResource(database=":memory:"))


def test_an_entry_of_no_hour_is_about_nothing_that_a_range_could_leave_out(made: HandMade) -> None:
    simple(made, 1)
    subject = made.cas.put(b"a rotation")
    made.entry("key", subject_digest=subject, subject_size=10)
    made.publish()
    del made.blobs.files[path_of(subject).removeprefix("blobs/")]
    assert about(only(made, 0, 1), path_of(subject))
    assert about(only(made, 5, 6), path_of(subject))
