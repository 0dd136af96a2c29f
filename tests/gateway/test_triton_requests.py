"""Requests for Triton: what becomes a tensor, what goes on as it is, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.errors import RecordError
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton_requests import DATATYPES, FORBIDDEN, check_request, inference_body
from render_platform.gateway.usage import usage_of_request
from tests.gateway.attempts import make_model

MODEL = make_model(name="flux", modality="image", inputs={"prompt": "BYTES", "steps": "INT32", "scale": "FP32"})
GOOD = {"prompt": "a cat", "steps": 4, "scale": 7.5}
TRITON, OPENAI = BackendSpec(kind="triton"), BackendSpec(kind="openai")

NUMBERS = {
    **{f"INT{bits}": st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": st.floats(-1e4, 1e4) | st.integers(-9, 9) for bits in (16, 32, 64)},
    "BOOL": st.booleans(),
    "BYTES": st.text(),
}


def made(fields: Any, ranks: dict[str, int] | None = None) -> Any:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return json.loads(inference_body(MODEL, body, "our-id", ranks or {}))


def test_fields_become_tensors_in_the_models_order() -> None:
    assert made({"scale": 7.5, "model": "flux", "steps": [4, 5], "prompt": "a cat"}) == {
        "id": "our-id",
        "inputs": [
            {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a cat"]},
            {"name": "steps", "datatype": "INT32", "shape": [2], "data": [4, 5]},
            {"name": "scale", "datatype": "FP32", "shape": [1], "data": [7.5]},
        ],
    }


def test_a_model_that_batches_gets_one_element_of_a_batch() -> None:
    shapes = [tensor["shape"] for tensor in made({**GOOD, "steps": [1, 2, 3]}, {"prompt": 2, "steps": 2})["inputs"]]
    assert shapes == [[1, 1], [1, 3], [1]]


@given(st.data())
def test_every_value_of_a_datatype_arrives_as_it_was(data: st.DataObject) -> None:
    assert set(NUMBERS) == set(DATATYPES)
    datatype = data.draw(st.sampled_from(DATATYPES))
    value = data.draw(NUMBERS[datatype] | st.lists(NUMBERS[datatype], max_size=4))
    body = json.dumps({"x": value}).encode()
    (tensor,) = json.loads(inference_body(make_model(inputs={"x": datatype}), body, "", {}))["inputs"]
    assert tensor["data"] == (value if isinstance(value, list) else [value])
    assert tensor["shape"] == [len(tensor["data"])]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "a", "steps": 4}, "scale"),
        ({**GOOD, "step": 4}, "step"),
        ({**GOOD, "x" * 1_000: 4}, "x" * 100),
        ({**GOOD, "prompt": None}, "prompt"),
        ({**GOOD, "prompt": {"a": 1}}, "prompt"),
        ({**GOOD, "steps": [[4]]}, "steps"),
        ({**GOOD, "steps": True}, "steps"),
        ({**GOOD, "steps": 4.5}, "steps"),
        ({**GOOD, "steps": 2**31}, "steps"),
        ({**GOOD, "steps": ["4"]}, "steps"),
        ({**GOOD, "scale": "7"}, "scale"),
        ({**GOOD, "scale": 10**400}, "scale"),
        (b"[1]", "body"),
        (b"{", "body"),
        (b'{"prompt": "\xff"}', "body"),
        (b'{"prompt": ' + b"[" * 100_000, "body"),
        ({"inputs": [{"name": "a"}]}, "body"),
        ({"inputs": [], "model_name": "other"}, "body"),
    ],
)
def test_what_is_wrong_is_named(fields: Any, field: str) -> None:
    with pytest.raises(RecordError) as refused:
        made(fields)
    assert refused.value.field == field
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(RecordError):
        check_request(TRITON, MODEL, body)
    check_request(OPENAI, MODEL, body)


def test_the_check_passes_what_the_backend_takes() -> None:
    check_request(TRITON, MODEL, json.dumps(GOOD).encode())
    check_request(TRITON, MODEL, b'{"inputs": []}')


def test_a_kserve_request_keeps_its_data_byte_for_byte() -> None:
    data = b"[ 1.50,  [2e0], 12345678901234567890123 ]"
    body = b'{"id": "theirs", "inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": ' + data + b"}]}"
    sent = inference_body(MODEL, body, "our-id", {})
    assert data in sent
    assert b"theirs" not in sent
    assert json.loads(sent)["id"] == "our-id"


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_what_reaches_beyond_the_request_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match=name):
        made({"inputs": [], "parameters": {"custom": 1, name: 1}})
    assert made({"inputs": [], "parameters": {"custom": 1}})["parameters"] == {"custom": 1}


def test_neither_binary_data_nor_the_servers_memory_can_be_named() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    for parameter in ("binary_data_size", "shared_memory_region", "shared_memory_offset"):
        with pytest.raises(RecordError, match=parameter):
            made({"inputs": [{**tensor, "parameters": {parameter: 1}}]})
        with pytest.raises(RecordError, match=parameter):
            made({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {parameter: 1}}]})
    assert made({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"classification": 2}}]})


def test_a_key_that_stands_twice_means_one_thing_only() -> None:
    body = (
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1],'
        b' "parameters": {"shared_memory_region": "theirs"}, "parameters": {}}], "inputs": [], "inputs": []}'
    )
    assert b"shared_memory" not in inference_body(MODEL, body, "", {})
    twice = body.replace(b', "inputs": [], "inputs": []', b"")
    assert b"shared_memory" not in inference_body(MODEL, twice, "", {})


@given(st.dictionaries(st.sampled_from(["steps", "n", "width", "size"]), st.integers() | st.text() | st.none()))
def test_usage_is_a_small_number_or_unknown(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    usage = usage_of_request(MODEL, body)
    for number in (usage.num_steps, usage.image_count):
        assert number is None or 0 <= number < 1_000_000
    assert usage_of_request(make_model(), body).num_steps is None, "no pictures: nothing to count"
