"""The usage event: one row on both paths. `EVENT_SCHEMA` is the source; SQL, ClickHouse and JSON derive from it.

Integers with units in their names; no floats; no text that a customer chose. Unknown is null, never zero.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from render_platform import merkle
from render_platform.errors import Finding, RecordError

SCHEMA_VERSION = 1
MAX_GPU_TIME_NS = 180_000_000_000_000
"""50 hours of GPU time for one job: 50,000 such rows still add up inside 63 bits."""

MODEL_TYPES = ("llm", "rectified_flow", "other")
METERS = ("nvml", "cupti", "backend", "wall_clock", "external", "simulated")
STATUSES = ("success", "error", "timeout", "cancelled")
_CHOICES = {"model_type": MODEL_TYPES, "meter": METERS, "status": STATUSES}

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_DIMS = re.compile(r"[0-9]{1,6}(x[0-9]{1,6}){0,3}")
_REF = re.compile(r"[0-9a-f]{64}")

TIME = pa.timestamp("us", "UTC")
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Key = tuple[int, str, str]
"""What is reconciled: window (five minutes, counted from 1970), customer_ref, model_name."""


def _text(name: str, *, nullable: bool = False, repeats: bool = True) -> pa.Field:
    return pa.field(name, pa.string(), nullable, {"repeats": "yes"} if repeats else None)


def _count(name: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.int64(), nullable)


EVENT_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.uuid(), False),
        pa.field("nonce", pa.binary(16), False),
        _text("source"),
        _text("gateway_id"),
        pa.field("request_id", pa.uuid(), False),
        pa.field("job_id", pa.uuid(), False),
        _count("attempt"),
        pa.field("gpu_started_at", TIME, False),
        pa.field("event_time", TIME, False),
        pa.field("recorded_at", TIME, False),
        _text("customer_ref"),
        _text("pricing_tier"),
        _text("model_family"),
        _text("model_name"),
        _text("model_type"),
        _text("modality"),
        _text("task"),
        _count("input_tokens", nullable=True),
        _count("output_tokens", nullable=True),
        _text("input_dims", nullable=True),
        _count("num_steps", nullable=True),
        _count("image_count", nullable=True),
        _count("queue_time_us"),
        _count("inference_time_us"),
        _count("total_time_us"),
        _count("gpu_time_ns"),
        _count("gpu_count"),
        _text("device_uuid", nullable=True),
        _count("batch_size"),
        _count("energy_mj", nullable=True),
        _text("meter"),
        _text("status"),
        _text("error_code", nullable=True),
        _count("schema_version"),
    ]
)
COLUMNS: tuple[str, ...] = tuple(EVENT_SCHEMA.names)


class Totals(NamedTuple):
    """Events and exact GPU ns, as one place holds them."""

    events: int
    gpu_time_ns: int


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One finished job. Times are microseconds UTC; `recorded_at` is given by the outbox, inside its transaction."""

    event_id: uuid.UUID
    nonce: bytes
    source: str
    gateway_id: str
    request_id: uuid.UUID
    job_id: uuid.UUID
    attempt: int
    gpu_started_at: int
    event_time: int
    recorded_at: int
    customer_ref: str
    pricing_tier: str
    model_family: str
    model_name: str
    model_type: str
    modality: str
    task: str
    input_tokens: int | None
    output_tokens: int | None
    input_dims: str | None
    num_steps: int | None
    image_count: int | None
    queue_time_us: int
    inference_time_us: int
    total_time_us: int
    gpu_time_ns: int
    gpu_count: int
    device_uuid: str | None
    batch_size: int
    energy_mj: int | None
    meter: str
    status: str
    error_code: str | None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def recorded(cls, row: Sequence[Any]) -> UsageEvent:
        """The event that a row in COLUMNS order, as stored in SQL, is: it was checked when it was made."""
        event = object.__new__(cls)
        for name, value in zip(COLUMNS, row, strict=True):
            object.__setattr__(event, name, uuid.UUID(bytes=value) if name in _UUIDS else value)
        return event

    def __post_init__(self) -> None:
        """Refuse a record that could not be billed; RecordError names the field."""
        values = _values_of(self)
        if not _plainly_good(values):
            _refuse(values)
        if self.event_time < self.gpu_started_at:
            raise RecordError("event_time", "is before gpu_started_at")
        wall_ns = (self.event_time - self.gpu_started_at) * 1_000
        if not 0 <= self.gpu_time_ns <= min(wall_ns * self.gpu_count, MAX_GPU_TIME_NS):
            raise RecordError(
                "gpu_time_ns", f"{self.gpu_time_ns} is outside 0 … wall time × gpu_count, at most 50 hours"
            )


def _refuse(values: Sequence[Any]) -> None:
    """RecordError naming the first field that is not good, if there is one."""
    for (name, nullable, good), value in zip(_CHECKS, values, strict=True):
        if value is None:
            if not nullable:
                raise RecordError(name, "is missing")
        elif not good(value):
            raise RecordError(name, f"{value!r} is not a valid value", "see docs/formats.md for its type")


def _plainly_good(values: Sequence[Any]) -> bool:
    """Whether every field is good, asked of all numbers and of all ids at once; False may also mean: look closer."""
    numbers = [value for value in _NUMBERS_OF(values) if value is not None]
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= 2**63:
        return False
    if {*map(type, _UUIDS_OF(values))} != {uuid.UUID} or None in _NEEDED_OF(values):
        return False
    texts = _TEXTS_OF(values)
    return {*map(type, texts)} <= {str, type(None)} and _good_nonce(values[_NONCE]) and _good_texts(texts)


@lru_cache(4_096)
def _good_texts(values: tuple[Any, ...]) -> bool:
    """Asked once for the texts that come again with each job of a customer and a model."""
    return all(value is None or good(value) for value, good in zip(values, _TEXT_CHECKS, strict=True))


def _checker(field: pa.Field) -> Callable[[Any], bool]:
    """Whether a value that is not null is one of this field. Made once a field: events are checked on the hot path."""
    if pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type):
        return lambda value: type(value) is int and 0 <= value < 2**63
    if field.name in _CHOICES:
        choices = frozenset(_CHOICES[field.name])
        return lambda value: isinstance(value, str) and value in choices
    if pa.types.is_string(field.type):
        matches = {"customer_ref": _REF, "input_dims": _DIMS}.get(field.name, _TOKEN).fullmatch
        return lambda value: isinstance(value, str) and matches(value) is not None
    if pa.types.is_fixed_size_binary(field.type):
        width = field.type.byte_width
        return lambda value: isinstance(value, bytes) and len(value) == width
    return lambda value: isinstance(value, uuid.UUID)


_CHECKS = [(field.name, field.nullable, _checker(field)) for field in EVENT_SCHEMA]
_values_of = attrgetter(*COLUMNS)
_UUIDS = tuple(field.name for field in EVENT_SCHEMA if field.type == pa.uuid())
_NUMBERS = tuple(f.name for f in EVENT_SCHEMA if pa.types.is_int64(f.type) or pa.types.is_timestamp(f.type))
_NUMBERS_OF, _UUIDS_OF = (itemgetter(*map(COLUMNS.index, names)) for names in (_NUMBERS, _UUIDS))
_NEEDED_OF = itemgetter(*(at for at, (_, nullable, _) in enumerate(_CHECKS) if not nullable))
_NONCE = COLUMNS.index("nonce")
_good_nonce = _CHECKS[_NONCE][2]
_TEXTS = [at for at, (name, _, _) in enumerate(_CHECKS) if name not in (*_NUMBERS, *_UUIDS, "nonce")]
_TEXTS_OF = itemgetter(*_TEXTS)
_TEXT_CHECKS = [_CHECKS[at][2] for at in _TEXTS]


def storage_row(event: UsageEvent) -> dict[str, Any]:
    """The event as SQL and Arrow store it: UUIDs as 16 bytes."""
    row = dict(zip(COLUMNS, _values_of(event), strict=True))
    for name in _UUIDS:
        row[name] = row[name].bytes
    return row


def table_from_rows(rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Rows in `COLUMNS` order, as stored in SQL, to a table of EVENT_SCHEMA in the same order."""
    columns = zip(*rows, strict=True) if rows else ([] for _ in COLUMNS)
    return pa.table([_array(f, list(c)) for f, c in zip(EVENT_SCHEMA, columns, strict=True)], schema=EVENT_SCHEMA)


def table_from_events(events: Iterable[UsageEvent]) -> pa.Table:
    return table_from_rows([tuple(storage_row(event).values()) for event in events])


def _array(field: pa.Field, values: list[Any]) -> pa.Array:
    if field.type == pa.uuid():
        return pa.ExtensionArray.from_storage(field.type, pa.array(values, pa.binary(16)))
    if pa.types.is_timestamp(field.type):
        return pa.array(values, pa.int64()).cast(field.type)
    return pa.array(values, field.type)


def plain_rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """Rows as stored in SQL: the inverse of table_from_rows. Takes any text, so that altered rows can be compared."""
    return list(zip(*(_plain(column) for column in table.combine_chunks().columns), strict=True))


def _plain(column: pa.ChunkedArray) -> list[Any]:
    array = column.combine_chunks()
    if array.type == pa.uuid():
        array = array.storage
    values: list[Any] = (array.cast(pa.int64()) if pa.types.is_timestamp(array.type) else array).to_pylist()
    return values


def canonical_rows(table: pa.Table) -> list[bytes]:
    """The canonical bytes (see canonical.py) of each row of a table of EVENT_SCHEMA, in its order.

    Columns are turned to text as a whole, which is some twenty times faster than a row at a time.
    Raises Finding where the schema or a text is not one that an event can have.
    """
    whole, ends = _canonical_text(table)
    return [bytes(whole[begin:end]) for begin, end in pairwise(ends)]


def _canonical_text(table: pa.Table, before: str = "") -> tuple[memoryview, list[int]]:
    """The canonical bytes of all rows, each after `before`, and where each one begins; at last, where the last ends."""
    require_schema(table.schema)
    if not table.num_rows:
        return memoryview(b""), [0]
    literal, pieces = before + "{", []
    for field, column in zip(EVENT_SCHEMA, table.combine_chunks().columns, strict=True):
        text = _json_text(field, column.combine_chunks())
        literal += f'"{field.name}":' if literal.endswith("{") else f',"{field.name}":'
        if isinstance(text, str):
            literal += text
        else:
            pieces += [literal, text]
            literal = ""
    joined = pc.binary_join_element_wise(*pieces, literal + "}", "").cast(pa.large_binary())
    _, ends, data = joined.buffers()
    at = np.frombuffer(ends, np.int64)[joined.offset : joined.offset + len(joined) + 1].tolist()
    return memoryview(data), at


def _json_text(field: pa.Field, column: pa.Array) -> pa.Array | str:
    """Each row's value, or the one that all of them have. What repeats is turned to text once a value."""
    if field.type == pa.uuid():
        return _texts(_uuid_digits(column), '"')
    if pa.types.is_fixed_size_binary(field.type):
        return _texts(_hex_digits(_fixed_bytes(column, field.type.byte_width)), '"')
    if not pa.types.is_string(field.type):
        numbers = column.cast(pa.int64())
        least, most = pc.min_max(numbers).as_py().values()
        if least == most and numbers.null_count in (0, len(numbers)):
            return "null" if least is None else str(least)
        return pc.fill_null(numbers.cast(pa.string()), "null")
    known = column.dictionary_encode()
    if pc.any(pc.match_substring_regex(known.dictionary, r'["\\\x00-\x1f]|[^\x00-\x7f]')).as_py():
        raise Finding(f"{field.name} holds a character that no event can have")
    texts = pc.binary_join_element_wise('"', known.dictionary, '"', "")
    if len(texts) == 1 and not known.indices.null_count:
        return str(texts[0])
    return pc.fill_null(texts.take(known.indices), "null") if len(texts) else "null"


def _fixed_bytes(column: pa.Array, width: int) -> _Bytes:
    data = np.frombuffer(column.buffers()[1], np.uint8)
    return data[column.offset * width :][: len(column) * width].reshape(len(column), width)


def _hex_digits(data: _Bytes) -> _Bytes:
    return np.frombuffer(data.tobytes().hex().encode(), np.uint8).reshape(data.shape[0], data.shape[1] * 2)


def _uuid_digits(column: pa.ExtensionArray) -> _Bytes:
    """The usual text of UUIDs, 36 characters a row."""
    digits = _hex_digits(_fixed_bytes(column.storage, 16))
    text = np.full((len(digits), 36), ord("-"), np.uint8)
    for at, (start, end) in enumerate(pairwise((0, 8, 12, 16, 20, 32))):
        text[:, start + at : end + at] = digits[:, start:end]
    return text


def _texts(characters: _Bytes, quote: str = "") -> pa.Array:
    """Rows of as many ASCII characters each as strings, each between `quote`s."""
    rows, width = characters.shape
    data = characters
    if quote:
        data = np.full((rows, width + 2), ord(quote), np.uint8)
        data[:, 1:-1] = characters
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(data.shape[1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.string(), rows, buffers)


def uuid_texts(table: pa.Table, name: str) -> list[str]:
    """A column of UUIDs in their usual text form."""
    if not table.num_rows:
        return []
    texts: list[str] = _texts(_uuid_digits(table.column(name).combine_chunks())).to_pylist()
    return texts


def require_schema(schema: pa.Schema) -> None:
    """Raise Finding unless `schema` is exactly EVENT_SCHEMA (names, order, types, nullability)."""
    if not schema.equals(EVENT_SCHEMA):
        raise Finding("the rows do not have the schema of a usage event", "see docs/formats.md for the columns")


def event_ids(table: pa.Table) -> pa.Array:
    """The event ids, 16 bytes each."""
    return table.column("event_id").combine_chunks().storage


def merkle_root(table: pa.Table) -> bytes:
    """The RFC 6962 root over the canonical bytes of the rows, in their order."""
    whole, ends = _canonical_text(table, merkle.LEAF)
    sha256 = hashlib.sha256
    return merkle.root([sha256(whole[begin:end]).digest() for begin, end in pairwise(ends)])


def total_gpu_time_ns(table: pa.Table) -> int:
    """The exact sum, in Python integers: no overflow whatever the rows."""
    return sum(table.column("gpu_time_ns").to_pylist())


if tuple(field.name for field in fields(UsageEvent)) != COLUMNS:
    raise RuntimeError("UsageEvent and EVENT_SCHEMA name different fields")
