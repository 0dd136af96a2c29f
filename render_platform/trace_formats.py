"""The trace formats that are known: columns, by name, and how each becomes a field of a job.

Another format is one more entry of `FORMATS`. Numbers go from text to integers, never through floats.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from render_platform.clock import US_PER_SECOND

MAX_TOKENS = 10_000_000
MAX_STEPS = 1_000
MAX_IMAGES = 1_000
MAX_EXEC_US = 180_000 * US_PER_SECOND

RELATIVE_START_US = 1_735_689_600 * US_PER_SECOND
"""2025-01-01T00:00:00Z: where a trace begins whose timestamps count from its own start."""
_FIRST_US, _LAST_US = 946_684_800 * US_PER_SECOND, 4_102_444_800 * US_PER_SECOND
_MAX_RELATIVE_MS = 10 * 366 * 86_400 * 1_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_DATETIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[ T]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|\+00:00)?"
)
_DECIMAL = re.compile(r"[0-9]{1,20}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Column:
    """Fills `field` of a job from the first of `names` that the file has; `parse` raises ValueError with a
    reason.
    """

    field: str
    names: tuple[str, ...]
    parse: Callable[[Any], Any]
    required: bool = True


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """How the columns of one kind of file become jobs, and what all its jobs have in common."""

    name: str
    kind: Literal["csv", "jsonl"]
    columns: tuple[Column, ...]
    model_family: str
    model_name: str
    model_type: str
    modality: str
    task: str
    source: str

    def matches(self, found: list[str]) -> bool:
        return all(not c.required or any(name in found for name in c.names) for c in self.columns)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _integer(value: object, most: int) -> int:
    """A JSON integer or ASCII digits, 0 to `most`."""
    if value is None or value == "":
        raise ValueError("is missing")
    number: object = value
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        number = int(value) if len(value) <= 20 else most + 1
    if type(number) is not int or number < 0:
        raise ValueError(f"{shown(value)} is not a whole number of at least 0")
    if number > most:
        raise ValueError(f"{shown(value)} is out of range, 0 to {most}")
    return number


def _json_integer(value: object, most: int) -> int:
    if isinstance(value, str):
        raise ValueError(f"{shown(value)} is text, not a number")
    return _integer(value, most)


def _tokens(value: object) -> int:
    return _integer(value, MAX_TOKENS)


def _json_tokens(value: object) -> int:
    return _json_integer(value, MAX_TOKENS)


def _decimal(value: str) -> Decimal:
    if not _DECIMAL.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a decimal number of at least 0")
    return Decimal(value)


def _optional_whole(most: int) -> Callable[[str], int | None]:
    """A number such as `30` or `30.0`, as tables with gaps are often written; empty is None."""

    def parse(value: str) -> int | None:
        if value == "":
            return None
        number = _decimal(value)
        if number > most:
            raise ValueError(f"{shown(value)} is out of range, 0 to {most}")
        if number != int(number):
            raise ValueError(f"{shown(value)} is not a whole number")
        return int(number)

    return parse


def _optional_seconds(value: str) -> int | None:
    """Seconds to microseconds, cut below one microsecond; empty is None."""
    if value == "":
        return None
    microseconds = _decimal(value) * US_PER_SECOND
    if microseconds > MAX_EXEC_US:
        raise ValueError(f"{shown(value)} is out of range, 0 to {MAX_EXEC_US // US_PER_SECOND} s")
    return int(microseconds)


def _timestamp(value: str) -> int:
    """`2023-11-16 18:15:46.6805900` in UTC, cut below one microsecond."""
    match = _DATETIME.fullmatch(value)
    if not match:
        raise ValueError(f"{shown(value)} is not a time such as 2023-11-16 18:15:46.680590" if value else "is missing")
    *whole, fraction = match.groups()
    year, month, day, hour, minute, second = map(int, whole)
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as error:
        raise ValueError(f"{shown(value)} is not a time: {error}") from None
    return _plausible((moment - _EPOCH) // timedelta(microseconds=1) + int((fraction or "0").ljust(6, "0")[:6]))


def _plausible(us: int) -> int:
    if not _FIRST_US <= us < _LAST_US:
        raise ValueError("is out of range: not in the years 2000 to 2099")
    return us


def _milliseconds(value: object) -> int:
    """Milliseconds since 1970, or from the trace's own start where there are less than ten years of them."""
    ms = _integer(value, _LAST_US)
    return _plausible(RELATIVE_START_US + ms * 1_000 if ms < _MAX_RELATIVE_MS else ms * 1_000)


def _json_milliseconds(value: object) -> int:
    return _milliseconds(_json_integer(value, _LAST_US))


def _client(value: str) -> str:
    if not _CLIENT.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a client id of at most 64 letters, digits and ._:@+-")
    return value


def _image_status(value: str) -> str:
    if value == "PENDING":
        raise ValueError("not finished (PENDING)")
    status = {"SUCCEED": "success", "FAILED": "error"}.get(value)
    if status is None:
        raise ValueError(f"{shown(value)} is none of SUCCEED, FAILED, PENDING")
    return status


AZURE_LLM = TraceFormat(
    "azure_llm",
    "csv",
    (
        Column("arrival_us", ("TIMESTAMP",), _timestamp),
        Column("input_tokens", ("ContextTokens",), _tokens),
        Column("output_tokens", ("GeneratedTokens",), _tokens),
    ),
    *("llm", "azure-llm", "llm", "text", "text_generation"),
    "Azure public dataset: LLM inference requests; times in UTC",
)
SERVEGEN = TraceFormat(
    "servegen",
    "csv",
    (
        Column("arrival_us", ("timestamp_ms",), _milliseconds),
        Column("client", ("client_id",), _client),
        Column("input_tokens", ("input_tokens",), _tokens),
        Column("output_tokens", ("output_tokens",), _tokens),
    ),
    *("deepseek", "deepseek-r1", "llm", "text", "text_generation"),
    "ServeGen: output_tokens include reason_tokens; times count from 2025-01-01T00:00:00Z",
)
IMAGE_LOG = TraceFormat(
    "image_log",
    "csv",
    (
        Column("arrival_us", ("gmt_create", "create_time", "created_at", "timestamp"), _timestamp),
        Column("client", ("groupId", "group_id", "group", "client_id"), _client),
        Column("status", ("predict_status",), _image_status),
        Column("exec_time_us", ("exec_time_seconds",), _optional_seconds),
        Column("image_count", ("num_images_per_prompt",), _optional_whole(MAX_IMAGES), required=False),
        Column("num_steps", ("num_inference_steps",), _optional_whole(MAX_STEPS), required=False),
    ),
    *("stable-diffusion", "stable-diffusion", "other", "image", "image_generation"),
    "Image generation requests with their own run times; times taken as UTC",
)
JSON_LLM = TraceFormat(
    "json_llm",
    "jsonl",
    (
        Column("arrival_us", ("timestamp",), _json_milliseconds),
        Column("input_tokens", ("input_length",), _json_tokens),
        Column("output_tokens", ("output_length",), _json_tokens),
    ),
    *("llm", "json-llm", "llm", "text", "text_generation"),
    "JSON lines of LLM requests; short timestamps count from 2025-01-01T00:00:00Z",
)
FORMATS: tuple[TraceFormat, ...] = (AZURE_LLM, SERVEGEN, IMAGE_LOG, JSON_LLM)

_MADE_UP = "generated from a seed; no real request"
GENERATED: tuple[TraceFormat, ...] = (
    TraceFormat("generated", "csv", (), "llama", "llama-8b", "llm", "text", "text_generation", _MADE_UP),
    TraceFormat("generated", "csv", (), "flux", "flux-dev", "rectified_flow", "image", "text_to_image", _MADE_UP),
)
