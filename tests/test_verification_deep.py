"""More of test_verification.py: verification deep."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from render_platform import tiles
from render_platform.canonical import digest_of
from render_platform.clock import DAY_US, HOUR_US
from render_platform.entries import parse
from render_platform.events import table_from_events
from render_platform.verification import verify
from tests.factories import make_events
from tests.stories import (
    HOUR,
    HandMade,
    about,
    named,
    rows_of_hour,
    said,
)
from tests.test_verification import (
    made,  # noqa: F401  fixtures
    simple,
)


def test_a_batch_left_out_is_found_by_the_watermark(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    left_out = replace(first, records=7, gpu_time_ns=9)
    mark = made.watermark(HOUR, first, left_out)
    assert named(made.verify()) == {f"entry of {mark.batch_id}"}


def test_a_missing_watermark_is_found(made: HandMade) -> None:
    made.watermark(HOUR)
    mark = made.watermark(HOUR + 2 * HOUR_US)
    outcome = made.verify()
    assert named(outcome) == {f"entry of {mark.batch_id}"}
    assert "2023-11-16T19:00:00Z is missing" in said(outcome)


def test_a_first_hour_that_was_never_declared_is_found(made: HandMade) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1))
    made.watermark(HOUR + HOUR_US)
    outcome = made.verify()
    assert not outcome.verified, f"{batch.batch_id}'s hour was passed over"


def test_watermarks_of_lanes_are_apart(made: HandMade) -> None:
    live = made.batch(HOUR, 0, rows_of_hour(5, 1))
    trace = made.batch(HOUR, 1, rows_of_hour(6, 2), lane="trace/1")
    made.watermark(HOUR, live)
    made.watermark(HOUR, trace, lane="trace/1")
    made.watermark(HOUR + HOUR_US)
    assert made.verify(deep=True).verified


@pytest.mark.parametrize("seqs", [(0, 2), (1,), (0, 1, 1), (1, 0), (0, None)])
def test_batch_numbers_with_a_gap_are_found(made: HandMade, seqs: tuple[int | None, ...]) -> None:
    entries = [made.batch(HOUR, 0, rows_of_hour(3, n), batch_seq=seq) for n, seq in enumerate(seqs)]
    made.watermark(HOUR, *entries)
    outcome = made.verify()
    assert "batch_seq is" in said(outcome)
    assert named(outcome) <= {f"entry of {entry.batch_id}" for entry in entries}


@pytest.mark.parametrize("hours_later", [1, 2, 3])
def test_a_batch_of_an_hour_that_was_declared_complete_is_found(made: HandMade, hours_later: int) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    made.watermark(HOUR, first)
    for n in range(1, hours_later):
        made.watermark(HOUR + n * HOUR_US)
    late = made.batch(HOUR, 1, rows_of_hour(5, 2), complete_until=HOUR + hours_later * HOUR_US)
    outcome = made.verify()
    assert named(outcome) == {f"entry of {late.batch_id}"}
    assert "declared complete" in said(outcome)


def test_a_declaration_before_the_hour_is_over_is_found(made: HandMade) -> None:
    mark = made.watermark(HOUR, complete_until=HOUR + HOUR_US - 1)
    assert "not over" in about(made.verify(), f"entry of {mark.batch_id}")[0].what


def test_completeness_that_goes_back_is_found(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1), complete_until=HOUR + 9)
    second = made.batch(HOUR, 1, rows_of_hour(5, 2), complete_until=HOUR + 8)
    made.watermark(HOUR, first, second)
    assert "goes back" in about(made.verify(), f"entry of {second.batch_id}")[0].what


# What the batches hold, read again.


def test_deep_reads_the_rows_of_the_hours_that_were_asked_for(made: HandMade) -> None:
    simple(made, 4)
    liar = made.batch(HOUR + 4 * HOUR_US, 0, rows_of_hour(5, 9, HOUR + 4 * HOUR_US), merkle_root="ab" * 32)
    made.publish()

    def deep(start: int, end: int) -> tuple[int, int, bool]:
        outcome = verify(made.evidence(), deep=True, start_us=HOUR + start * HOUR_US, end_us=HOUR + end * HOUR_US)
        return outcome.deep_batches, outcome.deep_records, outcome.verified

    assert deep(0, 4) == (4, 20, True)
    assert deep(1, 3) == (2, 10, True)
    assert deep(0, 0) == (0, 0, True)
    assert deep(0, 5) == (4, 20, False)
    assert liar.batch_id
    shallow = made.verify()
    assert (shallow.deep_batches, shallow.deep_records, shallow.verified) == (0, 0, True)


def test_deep_over_everything_reads_every_batch_whatever_its_hour_says(made: HandMade) -> None:
    rows = rows_of_hour(5, 1)
    made.batch(HOUR, 0, rows, recorded_hour=2_400_000 * HOUR_US, merkle_root="ab" * 32)
    assert not made.verify(deep=True).verified


def test_without_an_attestation_key_the_outcome_says_what_was_not_checked(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    outcome = verify(replace(made.evidence(), attestation_keys=[]))
    assert outcome.verified
    assert len(outcome.notes) == 1
    assert "attestation" in outcome.notes[0]
    assert made.verify().notes == []


@pytest.mark.parametrize(
    "lie",
    [
        {"merkle_root": "ab" * 32},
        {"records": 6},
        {"gpu_time_ns": 1},
        {"merkle_root": None},
        {"recorded_hour": HOUR + HOUR_US},
        {"first_recorded_at": HOUR},
        {"last_recorded_at": HOUR + HOUR_US - 1},
    ],
    ids=str,
)
def test_deep_finds_rows_that_are_not_what_the_entry_says(made: HandMade, lie: dict[str, Any]) -> None:
    rows = rows_of_hour(5, 1)
    batch = made.batch(HOUR, 0, rows, **lie)
    made.watermark(batch.recorded_hour or 0, batch)
    outcome = made.verify(deep=True)
    assert not outcome.verified
    digest = str(batch.subject_digest)
    places = {f"blobs/sha256/{digest[:2]}/{digest[2:]}", f"entry of {batch.batch_id}"}
    attested = str(batch.attestation)
    places.add(f"blobs/sha256/{attested[:2]}/{attested[2:]}")
    assert named(outcome) <= places


@pytest.mark.parametrize(
    "lie", [{"subject_digest": None, "subject_size": None}, {"attestation": None}, {"subject_size": 1}], ids=str
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_batch_entry_that_binds_no_batch_or_no_attestation_is_found(
    made: HandMade, lie: dict[str, Any], deep: bool
) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1), **lie)
    made.watermark(HOUR, batch)
    assert not made.verify(deep=deep).verified


def test_an_event_in_two_batches_is_found_deep(made: HandMade) -> None:
    rows = rows_of_hour(6, 1)
    first, second = made.batch(HOUR, 0, rows.slice(0, 4)), made.batch(HOUR, 1, rows.slice(3, 3))
    made.watermark(HOUR, first, second)
    assert made.verify().verified
    outcome = made.verify(deep=True)
    assert len(outcome.problems) == 1
    twice = str(sorted(make_events(6, 1), key=lambda event: event.event_id)[3].event_id)
    assert f"an event stands twice: {twice}; {first.batch_id} holds it too" in outcome.problems[0].what


def test_one_batch_billed_by_two_entries_is_found_deep(made: HandMade) -> None:
    rows = rows_of_hour(6, 1)
    first, second = made.batch(HOUR, 0, rows), made.batch(HOUR, 1, rows)
    assert first.subject_digest == second.subject_digest
    made.watermark(HOUR, first, second)
    assert "two entries bill the same batch" in said(made.verify())
    outcome = made.verify(deep=True)
    assert not outcome.verified, f"{outcome.records} records are said to be there, and {rows.num_rows} are"


@pytest.mark.parametrize("lie", [{"merkle_root": "ab" * 32}, {"records": 60}, {"subject_size": 1}], ids=str)
def test_each_of_two_entries_of_one_batch_is_checked(made: HandMade, lie: dict[str, Any]) -> None:
    rows = rows_of_hour(6, 1)
    liar = made.batch(HOUR, 0, rows, **lie)
    second = made.batch(HOUR, 1, rows)
    made.watermark(HOUR, liar, second)
    assert not made.verify(deep=True).verified


@pytest.mark.parametrize("order", ["reversed", "doubled"])
def test_rows_out_of_order_or_twice_in_a_batch_are_found_deep(made: HandMade, order: str) -> None:
    rows = rows_of_hour(4, 1)
    table = rows.take([3, 2, 1, 0]) if order == "reversed" else pa.concat_tables([rows, rows.slice(3)])
    batch = made.batch(HOUR, 0, table)
    made.watermark(HOUR, batch)
    assert made.verify().verified
    outcome = made.verify(deep=True)
    assert "stands twice, or out of order" in said(outcome)


def test_a_batch_of_another_schema_is_found_deep(made: HandMade) -> None:
    rows = table_from_events(make_events(4, 1))
    sink = io.BytesIO()
    pq.write_table(rows.drop_columns(["energy_mj"]), sink)
    data = sink.getvalue()
    batch = made.batch(HOUR, 0, rows, subject_digest=made.cas.put(data), subject_size=len(data))
    made.watermark(HOUR, batch)
    assert "schema" in said(made.verify(deep=True))


@pytest.mark.parametrize("lie", [{"records": 6}, {"gpu_time_ns": 1}], ids=str)
def test_an_entry_that_does_not_say_what_was_attested_is_found_without_reading_rows(
    made: HandMade, lie: dict[str, Any]
) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1), **lie)
    made.watermark(HOUR, batch)
    outcome = made.verify()
    attested = str(batch.attestation)
    assert named(outcome) == {f"blobs/sha256/{attested[:2]}/{attested[2:]}"}
    assert "do not say the same" in said(outcome)


def test_an_attestation_of_another_batch_is_found(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    second = made.batch(HOUR, 1, rows_of_hour(5, 2), attestation=first.attestation)
    made.watermark(HOUR, first, second)
    assert "another batch" in said(made.verify()) or "not say the same" in said(made.verify())


def test_a_report_whose_size_the_entry_gets_wrong_is_found(made: HandMade) -> None:
    made.entry("reconciliation", recorded_hour=HOUR, subject_digest=made.cas.put(b"{}"), subject_size=3)
    assert not made.verify().verified


# Verification itself must not fall over whatever an entry holds.


@pytest.mark.parametrize(
    "values",
    [
        {"complete_until": "soon"},
        {"complete_until": []},
        {"complete_until": -1},
        {"lane": ["live"]},
        {"lane": {"a": 1}},
        {"recorded_hour": 10**25 * HOUR_US},
        {"recorded_hour": -DAY_US * 10**6},
        {"batch_id": None},
        {"batch_id": ["x"]},
        {"subject_size": "x"},
        {"acceptances": ([], 1, None)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["watermark", "usage_batch"])
def test_entries_with_values_of_another_type_are_named_and_stop_nothing(
    made: HandMade, kind: str, values: dict[str, Any]
) -> None:
    """Whoever alters a bundle chooses what is parsed: nothing that it holds may end the verification."""
    simple(made, 2)
    made.publish()
    first: dict[str, Any] = {
        "type": kind,
        "lane": "trace/x",
        "recorded_hour": HOUR,
        "batch_id": "x",
        "complete_until": HOUR + HOUR_US,
    }
    bundle = tiles.entries_path(0, 4)
    entries = tiles.decode_bundle(made.log.read(bundle))
    strange = parse(entries[0])
    template = replace(strange, previous=parse(entries[2]).previous, **(first | values))
    follower = replace(strange, previous=digest_of(template.to_bytes()), **first)
    made.log.files[bundle] = tiles.encode_bundle([*entries[:2], template.to_bytes(), follower.to_bytes()])
    for deep in (False, True):
        outcome = verify(made.evidence(), deep=deep)
        assert not outcome.verified
        assert about(outcome, f"log/{bundle}")


def test_an_entry_nested_deeply_stops_nothing(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    bundle = tiles.entries_path(0, 2)
    entries = tiles.decode_bundle(made.log.read(bundle))
    for depth in (100, 400, 900, 980, 20_000):
        nested = entries[0].replace(b'"acceptances":[]', b'"acceptances":[' + b"[" * depth + b"]" * depth + b"]")
        assert len(nested) > len(entries[0])
        made.log.files[bundle] = tiles.encode_bundle([nested, entries[1]])
        assert about(verify(made.evidence()), f"log/{bundle}")
