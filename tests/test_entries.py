"""Audit entries: what they may say, and what a reader refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.canonical import digest_of
from render_platform.clock import HOUR_US
from render_platform.entries import FIELDS, FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, RecordError
from render_platform.tiles import MAX_ENTRY_BYTES
from tests.factories import START_US
from tests.platforms import scalar_json

DIGESTS = [hashlib.sha256(name).hexdigest() for name in (b"a", b"b", b"c")]
BATCH = AuditEntry(
    type="usage_batch",
    batch_id="2023-11-16T18-00000",
    previous=FIRST_PREVIOUS,
    lane="live",
    recorded_hour=START_US,
    batch_seq=0,
    first_recorded_at=START_US,
    last_recorded_at=START_US + 5,
    complete_until=START_US + 5,
    subject_digest=DIGESTS[0],
    subject_size=1_234,
    records=2,
    gpu_time_ns=2**70,
    merkle_root=DIGESTS[1],
    attestation=DIGESTS[2],
)


def fields_of(entry: AuditEntry) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(entry.to_bytes())
    return found


def test_the_fields_stand_in_their_order() -> None:
    assert tuple(fields_of(BATCH)) == FIELDS
    assert FIELDS[:4] == ("version", "type", "batch_id", "previous")
    assert scalar_json(fields_of(BATCH)).encode() == BATCH.to_bytes()


@given(
    records=st.integers(0, 2**40),
    gpu_time_ns=st.integers(0, 2**127),
    batch_id=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50),
    hour=st.none() | st.integers(0, 500_000).map(lambda n: n * HOUR_US),
)
def test_an_entry_is_read_back_as_it_was_written(
    records: int, gpu_time_ns: int, batch_id: str, hour: int | None
) -> None:
    entry = replace(BATCH, records=records, gpu_time_ns=gpu_time_ns, batch_id=batch_id, recorded_hour=hour)
    assert parse(entry.to_bytes()) == entry
    assert digest_of(entry.to_bytes()) == hashlib.sha256(entry.to_bytes()).hexdigest()


def test_the_blobs_are_what_the_entry_binds() -> None:
    assert BATCH.blobs == (DIGESTS[0], DIGESTS[2])
    assert replace(BATCH, attestation=None).blobs == (DIGESTS[0],)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "usage-batch"),
        ("type", ""),
        ("version", 2),
        ("version", "1"),
        ("previous", None),
        ("previous", "0" * 63),
        ("previous", "A" * 64),
        ("subject_digest", "g" * 64),
        ("merkle_root", b"0" * 64),
        ("attestation", ""),
        ("recorded_hour", START_US + 1),
    ],
)
def test_an_invalid_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RecordError) as error:
        replace(BATCH, **{field: value})
    assert error.value.field == field


def test_an_entry_holds_digests_and_never_payloads() -> None:
    room = MAX_ENTRY_BYTES - len(replace(BATCH, batch_id="").to_bytes())
    assert len(replace(BATCH, batch_id="x" * room).to_bytes()) == MAX_ENTRY_BYTES
    with pytest.raises(Finding, match="65536 bytes"):
        replace(BATCH, batch_id="x" * (room + 1)).to_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "unknown"),
        ("type", ["usage_batch"]),
        ("type", None),
        ("version", 2),
        ("version", True),
        ("version", None),
        ("batch_id", 5),
        ("batch_id", None),
        ("batch_id", ["a"]),
        ("previous", None),
        ("previous", 0),
        ("lane", 5),
        ("lane", ["live"]),
        ("recorded_hour", "x"),
        ("recorded_hour", "%.0s"),
        ("recorded_hour", -HOUR_US),
        ("recorded_hour", False),
        ("recorded_hour", START_US + 1),
        ("batch_seq", "0"),
        ("batch_seq", -1),
        ("batch_seq", True),
        ("first_recorded_at", "5"),
        ("last_recorded_at", {"a": 1}),
        ("complete_until", "5"),
        ("complete_until", []),
        ("complete_until", -1),
        ("subject_digest", 5),
        ("subject_size", "1234"),
        ("subject_size", -1),
        ("records", -1),
        ("records", "2"),
        ("records", None),
        ("records", True),
        ("gpu_time_ns", -1),
        ("gpu_time_ns", None),
        ("merkle_root", "x"),
        ("attestation", False),
        ("acceptances", None),
        ("acceptances", {}),
        ("acceptances", [5]),
        ("acceptances", ["a"]),
    ],
)
def test_a_reader_refuses_a_field_of_another_type(field: str, value: Any) -> None:
    data = scalar_json({**fields_of(BATCH), field: value}).encode()
    with pytest.raises(Finding):
        parse(data)


@pytest.mark.parametrize("field", FIELDS)
def test_a_reader_refuses_an_entry_without_one_of_its_fields(field: str) -> None:
    fields = fields_of(BATCH)
    del fields[field]
    with pytest.raises(Finding):
        parse(scalar_json(fields).encode())


def test_a_reader_refuses_other_fields_and_another_order() -> None:
    fields = fields_of(BATCH)
    for other in ({**fields, "extra": 1}, dict(reversed(fields.items())), {"extra": 1, **fields}):
        with pytest.raises(Finding):
            parse(scalar_json(other).encode())
    for data in (BATCH.to_bytes() + b"\n", BATCH.to_bytes()[:-1], b"", b"\xff"):
        with pytest.raises(Finding):
            parse(data)
