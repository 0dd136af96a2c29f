"""Canonical bytes against vectors and against an encoder written anew; and all that a reader must refuse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import canonical, merkle
from render_platform.entries import AuditEntry, parse
from render_platform.errors import Finding
from render_platform.events import UsageEvent, canonical_rows, table_from_events
from tests.platforms import scalar_json

VECTORS = json.loads((Path(__file__).parent / "vectors" / "canonical.json").read_text(encoding="utf-8"))
UUIDS = ("event_id", "request_id", "job_id")


def event_of(fields: dict[str, Any]) -> UsageEvent:
    """An event as its vector writes it: UUIDs as text, bytes as hex."""
    return UsageEvent(
        **{**fields, "nonce": bytes.fromhex(fields["nonce"]), **{name: UUID(fields[name]) for name in UUIDS}}
    )


def check_vector(vector: dict[str, Any], data: bytes) -> None:
    assert data.decode() == vector["canonical"]
    assert data == scalar_json(vector["fields"]).encode()
    assert hashlib.sha256(data).hexdigest() == vector["sha256"]
    assert hashlib.sha256(b"\x00" + data).hexdigest() == vector["leaf_hash"] == merkle.leaf_hash(data).hex()
    assert canonical.decode(data) == vector["fields"]
    assert canonical.encode(vector["fields"]) == data


@pytest.mark.parametrize("vector", VECTORS["events"], ids=lambda vector: vector["what"])
def test_event_vectors(vector: dict[str, Any]) -> None:
    (data,) = canonical_rows(table_from_events([event_of(vector["fields"])]))
    check_vector(vector, data)


@pytest.mark.parametrize("vector", VECTORS["entries"], ids=lambda vector: vector["what"])
def test_entry_vectors(vector: dict[str, Any]) -> None:
    fields = vector["fields"]
    entry = AuditEntry(**{**fields, "acceptances": tuple(fields["acceptances"])})
    check_vector(vector, entry.to_bytes())
    assert parse(vector["canonical"].encode()) == entry


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["what"])
def test_refused_vectors(vector: dict[str, Any]) -> None:
    with pytest.raises(Finding):
        canonical.decode(bytes.fromhex(vector["bytes_hex"]))


def test_the_vectors_cover_what_matters() -> None:
    """A vector that was dropped by mistake is missed here."""
    assert len(VECTORS["events"]) >= 5
    assert {vector["fields"]["type"] for vector in VECTORS["entries"]} >= {"usage_batch", "watermark", "repair"}
    assert max(vector["fields"]["gpu_time_ns"] for vector in VECTORS["entries"]) > 2**64


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**127), 2**127) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(min_codepoint=1, max_codepoint=127)), VALUES, max_size=5))
def test_encoding_equals_an_independent_encoder_and_is_read_back(value: dict[str, Any]) -> None:
    data = canonical.encode(value)
    assert data == scalar_json(value).encode()
    assert canonical.decode(data) == value
    assert list(canonical.decode(data)) == list(value), "in their order"


@given(st.integers(-(2**200), 2**200))
def test_integers_of_any_size_survive(number: int) -> None:
    assert canonical.encode({"n": number}) == b'{"n":%d}' % number
    assert canonical.decode(b'{"n":%d}' % number) == {"n": number}


GOOD = b'{"a":1,"b":"A\xc3\xa9\\n\\u001f\\"\\\\","c":[null,true,{"d":-5}]}'


def test_the_good_example_is_good() -> None:
    assert canonical.decode(GOOD) == {"a": 1, "b": 'Aé\n\x1f"\\', "c": [None, True, {"d": -5}]}


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":-0}',
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":"\\u0000"}',
        b'{"a":"\x00"}',
        b'{"\\u0000":1}',
        b'{"\xc3\xa9":1}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\udc00\\ud800"}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xff"}',
        b'{"a":"\xc0\xaf"}',
        b'{"a": 1}',
        b'{"a":1 }',
        b' {"a":1}',
        b'{"a":1}\n',
        b'{"a":1}\r\n',
        b'{"a":"\\u0041"}',
        b'{"a":"\\/"}',
        b'{"a":"\\u000a"}',
        b'{"a":"\\u001F"}',
        b'{"a":"\\u00e9"}',
        b'{"a":"\n"}',
        b'{"a":1,}',
        b"{'a':1}",
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32"),
        b"",
        b"[]",
        b"1",
        b"null",
        b'"a"',
        b'{"a":1}{"a":1}',
        b'{"a":' + b"9" * 5_000 + b"}",
    ],
    ids=repr,
)
def test_a_reader_refuses(data: bytes) -> None:
    with pytest.raises(Finding):
        canonical.decode(data)


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def test_any_depth_of_nesting_is_read_or_refused() -> None:
    """Around the interpreter's recursion limit too, where reading, checking and writing fail at different depths."""
    for depth in [1, 100, *range(800, 1_010), 10_000, 100_000]:
        for data in (nested(depth), b'{"a":' * depth + b"1" + b"}" * depth):
            try:
                assert canonical.encode(canonical.decode(data)) == data
            except Finding:
                assert depth > 100, "no entry is nested as deep as this, and shallow ones are read"


@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_an_altered_byte_never_reads_as_the_same_object(position: int, byte: int) -> None:
    data = GOOD[:position] + bytes([byte]) + GOOD[position + 1 :]
    try:
        value = canonical.decode(data)
    except Finding:
        return
    assert (value == canonical.decode(GOOD)) == (data == GOOD)


@pytest.mark.parametrize(
    "value",
    [1.5, float("nan"), "\0", "\ud800", b"bytes", {1: 2}, {"é": 1}, {1, 2}, object(), ["ok", [2.0]], {"a\0": 1}],
    ids=repr,
)
def test_a_writer_refuses(value: Any) -> None:
    with pytest.raises(Finding, match=r"\$\.a"):
        canonical.encode({"a": value})
