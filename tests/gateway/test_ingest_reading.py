"""CloudEvents as they are read: strictly, each fault named with its place, and nothing that cannot be answered."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from render_platform.clock import iso
from render_platform.errors import PlatformError, RecordError
from render_platform.gateway.ingest import BATCH, MAX_EVENTS, MEMBERS, ONE, TYPE, event_id_of, parse
from render_platform.gateway.problems import Refused, problem_of
from tests.factories import START_US

USED = {
    "model": "flux-dev",
    "model_family": "flux",
    "model_type": "rectified_flow",
    "modality": "image",
    "task": "text2image",
    "gpu_time_ns": 1_500_000_000,
}


def event(id: str = "1", **changes: Any) -> dict[str, Any]:
    """A CloudEvent as its JSON says it; members of `data` may be changed by their names."""
    data = USED | {name: changes.pop(name) for name in list(changes) if name in MEMBERS}
    sent = {"specversion": "1.0", "type": TYPE, "source": "edge/a", "id": id, "subject": "acme", "data": data}
    return sent | {"time": iso(START_US)} | changes


def read(*sent: Any) -> list[Any]:
    return parse(json.dumps(sent).encode(), BATCH)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"type": "com.example.other"}, "type"),
        ({"id": None}, "id"),
        ({"id": ""}, "id"),
        ({"id": "a\u0000"}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"id": "x" * 201}, "id"),
        ({"source": 1}, "source"),
        ({"source": "/edge"}, "source"),
        ({"source": "https://edge.example/?a"}, "source"),
        ({"subject": None}, "subject"),
        ({"subject": "a\nb"}, "subject"),
        ({"time": "yesterday"}, "time"),
        ({"time": START_US}, "time"),
        ({"time": "2023-11-16T18:00:00"}, "time"),
        ({"time": "2023-11-16T18:00:60Z"}, "time"),
        ({"time": "2023-02-30T18:00:00Z"}, "time"),
        ({"time": "1969-12-31T23:59:59Z"}, "time"),
        ({"time": "٢٠٢٣-11-16T18:00:00Z"}, "time"),
        ({"data": None}, "data"),
        ({"data": [1]}, "data"),
        ({"data": "{}"}, "data"),
        ({"datacontenttype": "text/xml"}, "data"),
        ({"data_base64": "e30="}, "data"),
        ({"data": {}}, "data.model"),
        ({"data": USED | {"gpu_seconds": 1}}, "data.gpu_seconds"),
        ({"model": None}, "data.model"),
        ({"model": "a b"}, "data.model"),
        ({"model_type": "diffusion"}, "data.model_type"),
        ({"input_dims": "wide"}, "data.input_dims"),
        ({"gpu_time_ns": "1"}, "data.gpu_time_ns"),
        ({"gpu_time_ns": 1.0}, "data.gpu_time_ns"),
        ({"gpu_time_ns": True}, "data.gpu_time_ns"),
        ({"gpu_time_ns": -1}, "data.gpu_time_ns"),
        ({"gpu_time_ns": 2**53}, "data.gpu_time_ns"),
        ({"queue_time_us": 2**53}, "data.queue_time_us"),
        ({"queue_time_us": False}, "data.queue_time_us"),
        ({"gpu_time_ns": 180_000_000_000_001, "gpu_count": 99}, "data.gpu_time_ns"),
        ({"gpu_count": 0}, "data.gpu_time_ns"),
        ({"gpu_started_at": "2023-11-16T17:59:59Z"}, "data.gpu_time_ns"),
        ({"gpu_started_at": iso(START_US + 1)}, "data.gpu_started_at"),
        ({"gpu_started_at": "1969-12-31T23:59:59Z", "time": None}, "data.gpu_started_at"),
        ({"meter": "nvml"}, None),
    ],
)
def test_a_fault_is_named_with_its_place_in_the_batch(changes: dict[str, Any], field: str | None) -> None:
    if field is None:  # an extension attribute, although its name is a column's
        assert len(read(event(**changes))) == 1
        return
    with pytest.raises(RecordError) as caught:
        read(event("0"), event("1"), event(**changes))
    assert caught.value.field == f"[2].{field}"
    with pytest.raises(RecordError) as caught:
        parse(json.dumps(event(**changes)).encode(), ONE)
    assert caught.value.field == field
    problem, _ = problem_of(caught.value, "/api/v1/events", "")
    assert (problem.status, problem.field) == (422, field)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"\xff", "body"),
        (b'\xef\xbb\xbf{"a":1}', "body"),
        (b"{", "body"),
        (b"NaN", "body"),
        (json.dumps(event(extension=float("nan"))).encode(), "body"),
        (b"[" * 100_000, "body"),
        (b'{"id":' + b"9" * 5_000 + b"}", "body"),
        (b"[]", "body"),
        (b'{"id":"1","id":"1"}', "id"),
        (b'{"x":"1","x":"2"}', "x"),
        (b'{"\\ud800":1,"\\ud800":1}', "body"),
        (json.dumps(event()).encode().replace(b'"task"', b'"model"'), "data.model"),
        (json.dumps(event()).encode().replace(b'"task"', b'"\\ud800":0,"task"'), "data"),
        (json.dumps(event()).encode().replace(b'"task"', b'"' + b"t" * 10**6 + b'":0,"task"'), "data"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes, field: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse(body, ONE)
    assert caught.value.field == field
    assert len(str(caught.value).encode()) < 1_000


def test_an_unknown_member_names_the_nearest() -> None:
    with pytest.raises(RecordError, match=r"\[0\]\.data\.gpu_time: is not known \(did you mean gpu_time_ns\?\)"):
        read(event(data=USED | {"gpu_time": 1}))


def test_content_types_and_the_size_of_a_batch() -> None:
    one = json.dumps(event()).encode()
    for good in (ONE, ONE.upper(), f'{ONE}; charset="UTF-8"', f" {ONE};charset=utf-8"):
        assert len(parse(one, good)) == 1
    for bad in ("", "application/json", "application/cloudevents+xml", f"{ONE}; charset=latin-1", f"{ONE}, {ONE}"):
        with pytest.raises(Refused) as caught:
            parse(one, bad)
        assert caught.value.status == 415
    assert parse(b"[]", BATCH) == []
    assert len(read(*(event(str(n)) for n in range(MAX_EVENTS)))) == MAX_EVENTS
    for body in (one, json.dumps([event()] * (MAX_EVENTS + 1)).encode()):
        with pytest.raises(RecordError, match="body: is not an array"):
            parse(body, BATCH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(iso(START_US)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
DATA = st.fixed_dictionaries({}, optional=dict.fromkeys([*MEMBERS, "other", "gpu_seconds"], JSON))
MESSAGE = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("specversion", "type", "id", "source", "subject", "time", "traceparent"), JSON)
)


@settings(max_examples=400)
@given(
    body=st.one_of(
        st.binary(),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.tuples(MESSAGE, DATA).map(lambda two: json.dumps([event() | two[0] | {"data": USED | two[1]}]).encode()),
    ),
    kind=st.sampled_from([ONE, BATCH]) | st.text(max_size=40),
)
@example(body=b'[{"\\ud800":' + b"[" * 900 + b"]" * 900 + b"}]", kind=BATCH)
def test_any_body_gives_events_or_a_problem_that_can_be_sent(body: bytes, kind: str) -> None:
    try:
        found = parse(body, kind)
    except PlatformError as error:
        problem, _ = problem_of(error, "/api/v1/events", "")
        assert 400 <= problem.status < 500
        assert len((problem.detail + problem.field).encode()) < 3_000
        return
    for one in found:
        assert one.event(START_US * 2).gpu_time_ns == one.data["gpu_time_ns"]


@given(
    start_ns=st.integers(0, 5_000_000),
    length_ns=st.integers(0, 5_000_000),
    gpus=st.integers(1, 3),
    extra_ns=st.integers(-3_000, 3_000),
)
def test_gpu_time_within_the_run_time_is_always_taken_and_above_it_never(
    start_ns: int, length_ns: int, gpus: int, extra_ns: int
) -> None:
    def shown(ns: int) -> str:
        return f"2023-11-16T18:00:00.{ns:09d}Z"

    used = max(0, length_ns * gpus + extra_ns)
    span = {"gpu_started_at": shown(start_ns), "time": shown(start_ns + length_ns)}
    try:
        read(event(**span, gpu_count=gpus, gpu_time_ns=used))
        refused = ""
    except RecordError as error:
        refused = error.field
    assert refused in ("", "[0].data.gpu_time_ns")
    if used <= length_ns * gpus:
        assert not refused, "times are kept in whole microseconds, which must refuse nothing that is right"
    if used >= (length_ns + 2_000) * gpus:
        assert refused, "nor let through more than their own grain"


# The id of an event.


def test_the_id_is_the_documented_one_and_cannot_be_made_by_other_names() -> None:
    digest = hashlib.sha256(b"\x00\x00\x00\x06edge/a" + "Zoë".encode()).hexdigest()
    got = event_id_of("edge/a", "Zoë")
    assert (got.version, got.variant) == (8, uuid.RFC_4122)
    assert got.hex[:12] + got.hex[13:16] + got.hex[17:] == digest[:12] + digest[13:16] + digest[17:32]
    assert event_id_of("ab", "c") != event_id_of("a", "bc")
