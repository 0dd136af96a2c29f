"""The usage event: what it refuses, and its forms in SQL, Arrow and canonical JSON."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import canonical, merkle
from render_platform.errors import Finding, RecordError
from render_platform.events import (
    COLUMNS,
    EVENT_SCHEMA,
    MAX_GPU_TIME_NS,
    METERS,
    MODEL_TYPES,
    STATUSES,
    UsageEvent,
    canonical_rows,
    merkle_root,
    plain_rows,
    require_schema,
    storage_row,
    table_from_events,
    table_from_rows,
    total_gpu_time_ns,
    uuid_texts,
)
from tests.factories import START_US, make_event, make_events, make_table, replace_column
from tests.platforms import event_bytes, event_fields, tree_hash

INTEGERS = [field.name for field in EVENT_SCHEMA if pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type)]
TEXTS = [field.name for field in EVENT_SCHEMA if pa.types.is_string(field.type)]
UUIDS = ["event_id", "request_id", "job_id"]
BIG = st.integers(0, 2**63 - 1)
TOKENS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}", fullmatch=True)


@st.composite
def usage_events(draw: st.DrawFn) -> UsageEvent:
    """Any valid event: bounds of integers, every choice, the longest texts."""
    wall_us = draw(st.integers(0, MAX_GPU_TIME_NS // 1_000))
    gpus = draw(st.integers(0, 2**63 - 1))
    started = draw(st.integers(0, 2**62))
    free: dict[str, Any] = {
        name: draw(BIG) for name in ("attempt", "queue_time_us", "inference_time_us", "total_time_us", "batch_size")
    }
    optional = ("input_tokens", "output_tokens", "num_steps", "image_count", "energy_mj")
    ids: dict[str, Any] = {name: draw(st.uuids()) for name in UUIDS}
    free |= {name: draw(st.none() | BIG) for name in optional}
    words = ("source", "gateway_id", "pricing_tier", "model_family", "model_name", "modality", "task")
    texts: dict[str, Any] = {name: draw(TOKENS) for name in words}
    texts |= {name: draw(st.none() | TOKENS) for name in ("device_uuid", "error_code")}
    return UsageEvent(
        **ids,
        **free,
        **texts,
        nonce=draw(st.binary(min_size=16, max_size=16)),
        gpu_started_at=started,
        event_time=started + wall_us,
        recorded_at=draw(BIG),
        customer_ref=draw(st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
        input_dims=draw(st.none() | st.from_regex(r"[0-9]{1,6}(x[0-9]{1,6}){0,3}", fullmatch=True)),
        model_type=draw(st.sampled_from(MODEL_TYPES)),
        meter=draw(st.sampled_from(METERS)),
        status=draw(st.sampled_from(STATUSES)),
        gpu_count=gpus,
        gpu_time_ns=draw(st.integers(0, min(wall_us * 1_000 * gpus, MAX_GPU_TIME_NS))),
    )


@settings(max_examples=60)
@given(st.lists(usage_events(), max_size=4))
def test_all_forms_of_an_event_say_the_same(events: list[UsageEvent]) -> None:
    table = table_from_events(events)
    require_schema(table.schema)
    rows = [tuple(storage_row(event).values()) for event in events]
    assert plain_rows(table) == rows
    assert table_from_rows(rows).equals(table)
    assert canonical_rows(table) == [event_bytes(event) for event in events]
    assert canonical_rows(table) == [canonical.encode(event_fields(event)) for event in events]
    assert uuid_texts(table, "job_id") == [str(event.job_id) for event in events]


def test_a_table_in_chunks_and_slices_says_the_same() -> None:
    table = make_table(50, 1)
    expected = [event_bytes(event) for event in make_events(50, 1)]
    chunks = pa.concat_tables([table.slice(0, 7), table.slice(7, 1), table.slice(8)])
    assert canonical_rows(chunks) == expected
    assert plain_rows(chunks) == plain_rows(table)
    assert canonical_rows(table.slice(13, 20)) == expected[13:33]
    assert uuid_texts(table.slice(13, 20), "event_id") == uuid_texts(table, "event_id")[13:33]
    assert merkle_root(table) == tree_hash(expected) == merkle.root([merkle.leaf_hash(row) for row in expected])


def test_no_rows_are_rows_too() -> None:
    table = table_from_rows([])
    assert (table.num_rows, plain_rows(table), canonical_rows(table)) == (0, [], [])
    assert merkle_root(table) == merkle.EMPTY_ROOT
    assert uuid_texts(table, "event_id") == []


def test_sums_pass_63_bits() -> None:
    table = replace_column(make_table(4, 1), "gpu_time_ns", [2**63 - 1] * 4)
    assert total_gpu_time_ns(table) == 4 * (2**63 - 1)


@pytest.fixture
def event() -> UsageEvent:
    started = START_US - 10_000_000
    return make_event(
        random.Random(1), gpu_started_at=started, event_time=START_US, gpu_count=2, gpu_time_ns=5, recorded_at=START_US
    )


def refused(event: UsageEvent, **changes: Any) -> str:
    with pytest.raises(RecordError) as error:
        replace(event, **changes)
    assert error.value.exit_code == 2
    assert error.value.field in str(error.value)
    return error.value.field


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [-1, 2**63, 1.0, "1", True, b"1"], ids=repr)
def test_a_number_that_is_none_is_refused(event: UsageEvent, name: str, value: Any) -> None:
    assert refused(event, **{name: value}) == name


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "value", ["", " ", "a b", "\n", "ok\n", 'a"b', "a\\b", "é", "x\0", "-a", "a" * 201, 1, b"a"], ids=repr
)
def test_a_text_that_no_event_can_have_is_refused(event: UsageEvent, name: str, value: Any) -> None:
    assert refused(event, **{name: value}) == name


@pytest.mark.parametrize("name", UUIDS)
@pytest.mark.parametrize("value", ["018bd94a-299d-7da7-88a6-1e029a8a5b02", b"\0" * 16, 5], ids=repr)
def test_an_id_that_is_no_uuid_is_refused(event: UsageEvent, name: str, value: Any) -> None:
    assert refused(event, **{name: value}) == name


@pytest.mark.parametrize("field", [field.name for field in EVENT_SCHEMA])
def test_null_is_refused_exactly_where_it_may_not_stand(event: UsageEvent, field: str) -> None:
    if EVENT_SCHEMA.field(field).nullable:
        nothing: dict[str, Any] = {field: None}
        assert getattr(replace(event, **nothing), field) is None
    else:
        assert refused(event, **{field: None}) == field


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonce", b"\0" * 15),
        ("nonce", "0" * 16),
        ("customer_ref", "A" * 64),
        ("customer_ref", "a" * 63),
        ("customer_ref", "g" * 64),
        ("model_type", "LLM"),
        ("meter", "stopwatch"),
        ("status", "ok"),
        ("input_dims", "512x"),
        ("input_dims", "1x2x3x4x5"),
        ("input_dims", "1234567"),
        ("input_dims", "٥x٥"),
    ],
)
def test_other_values_out_of_range_are_refused(event: UsageEvent, name: str, value: Any) -> None:
    assert refused(event, **{name: value}) == name


def test_time_and_gpu_time_must_fit(event: UsageEvent) -> None:
    wall_ns = 10_000_000_000
    assert replace(event, gpu_time_ns=2 * wall_ns).gpu_time_ns == 2 * wall_ns
    assert refused(event, gpu_time_ns=2 * wall_ns + 1) == "gpu_time_ns"
    assert refused(event, gpu_count=0) == "gpu_time_ns"
    assert refused(event, event_time=event.gpu_started_at - 1) == "event_time"
    longest = replace(event, gpu_started_at=0, gpu_count=8, gpu_time_ns=MAX_GPU_TIME_NS)
    assert refused(longest, gpu_time_ns=MAX_GPU_TIME_NS + 1) == "gpu_time_ns"


def test_another_schema_is_refused() -> None:
    table = make_table(2, 1)
    first = table.schema.field(0)
    others = [
        table.drop_columns(["nonce"]),
        table.select(list(reversed(COLUMNS))),
        table.append_column("extra", pa.array([1, 2])),
        table.rename_columns([*COLUMNS[:-1], "version"]),
        table.cast(table.schema.set(6, pa.field("attempt", pa.int32(), False))),
        table.cast(table.schema.set(6, pa.field("attempt", pa.int64(), True))),
        table.set_column(0, pa.field(first.name, pa.binary(16), False), table.column(0).combine_chunks().storage),
    ]
    for other in others:
        for act in (lambda t: require_schema(t.schema), canonical_rows, merkle_root):
            with pytest.raises(Finding, match="schema"):
                act(other)


@pytest.mark.parametrize("text", ['a"', "a\\", "\n", "\0", "é", "\x7f\x80"], ids=repr)
def test_altered_text_is_compared_but_never_hashed(text: str) -> None:
    table = replace_column(make_table(2, 1), "task", ["fine", text])
    assert plain_rows(table)[1][COLUMNS.index("task")] == text
    with pytest.raises(Finding, match="task"):
        canonical_rows(table)
