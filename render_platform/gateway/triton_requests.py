"""A client's request as KServe v2 inference: pure, so that a request is judged before it is accepted.

A body with a list `inputs` is a KServe request already: its data goes on byte for byte, under our id. Any other is an
object whose fields become the input tensors that the model's `inputs` declare: a scalar is a tensor of one element, a
list one of as many. Nothing is guessed, and nothing is left out: a missing, unknown or ill-typed field is named.

What a KServe request may not carry: binary data and shared memory (answers are JSON, and a region of the server's
memory is not the client's to name), and what would reach beyond the request: priority, time-out, sequences. It is
written anew from what was checked, so that a key that stands twice cannot mean one thing here and another there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from render_platform.errors import RecordError
from render_platform.gateway.catalogue import BackendSpec, ModelSpec

_INTEGERS = {f"{sign}INT{bits}": bits for sign in ("", "U") for bits in (8, 16, 32, 64)}
_FLOATS = ("FP16", "FP32", "FP64")
DATATYPES = ("BYTES", "BOOL", *_INTEGERS, *_FLOATS)
"""Datatypes that an element of JSON can be; BYTES is text."""
IGNORED = frozenset({"model"})
"""Fields that say where a request goes: they are no tensors, unless the model declares them."""
FORBIDDEN = frozenset({"priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
MAX_NAMED = 100
"""Characters of a client's own name that an error repeats."""
_TENSOR_PARAMETERS = frozenset({"classification"})

_T = TypeVar("_T")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_values = msgspec.json.Decoder(dict[str, Any])


class _Input(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    parameters: dict[str, Any] = {}


class _Inference(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    inputs: list[_Input]
    outputs: list[_Output] = []
    parameters: dict[str, Any] = {}
    id: str = ""
    model: str | None = None


_inference = msgspec.json.Decoder(_Inference)


def check_request(spec: BackendSpec, model: ModelSpec, body: bytes) -> None:
    """RecordError, naming the field, where a Triton backend could not be given `body`; other kinds take any object."""
    if spec.kind == "triton":
        inference_body(model, body, "", {})


def inference_body(model: ModelSpec, body: bytes, request_id: str, ranks: Mapping[str, int]) -> bytes:
    """The KServe request for `body`, its id `request_id`; `ranks` is the rank of each input, where it is known."""
    inputs = _decode(_fields, body).get("inputs", msgspec.Raw())
    if bytes(memoryview(inputs)[:1]) != b"[" or "inputs" in model.inputs:
        return msgspec.json.encode({"id": request_id, "inputs": tensors_of(model, body, ranks)})
    inference = _decode(_inference, body)
    _check_parameters(inference)
    inference.id, inference.model = request_id, None
    return msgspec.json.encode(inference)


def tensors_of(model: ModelSpec, body: bytes, ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """The input tensors of an object of fields, in the order in which the model declares them."""
    values = _decode(_values, body)
    for field in values:
        if field not in model.inputs and field not in IGNORED:
            remedy = f"its inputs are {', '.join(model.inputs)}"
            raise RecordError(field[:MAX_NAMED], f"{model.name} has no such input", remedy)
    return [_tensor(values, field, datatype, ranks.get(field, 1)) for field, datatype in model.inputs.items()]


def _tensor(values: Mapping[str, Any], field: str, datatype: str, rank: int) -> dict[str, Any]:
    if field not in values:
        raise RecordError(field, "is missing")
    value = values[field]
    data = value if isinstance(value, list) else [value]
    for element in data:
        if not _fits(element, datatype):
            what = "a nested list" if isinstance(element, list) else "a value"
            raise RecordError(field, f"holds {what} that is no {datatype}", "give a scalar, or a flat list of them")
    # A model that batches has the batch in front: this request is one element of it.
    shape = [1] * max(0, rank - 1) + [len(data)]
    return {"name": field, "datatype": datatype, "shape": shape, "data": data}


def _fits(value: Any, datatype: str) -> bool:
    if datatype in _INTEGERS:
        bits = _INTEGERS[datatype]
        low, high = (0, 2**bits) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return type(value) is int and low <= value < high
    if datatype in _FLOATS:
        return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    return {"BOOL": bool, "BYTES": str}.get(datatype) is type(value)


def _check_parameters(inference: _Inference) -> None:
    for name in sorted(FORBIDDEN.intersection(inference.parameters)):
        raise RecordError(f"parameters.{name}", "is not the client's to set", "leave it out")
    tensors: list[_Input | _Output] = [*inference.inputs, *inference.outputs]
    for tensor in tensors:
        for name in tensor.parameters:
            if name not in _TENSOR_PARAMETERS:
                where = f"{tensor.name}.parameters.{name}"[:MAX_NAMED]
                raise RecordError(where, "is not taken", "send and ask for plain JSON data")


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise RecordError("body", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("body", "is not JSON") from error
