"""ClickHouse's HTTP protocol as the embedded bridge speaks it: requests read, answers made; no I/O here.

What a server does and this does not is refused in words, never ignored: sessions, roles, quotas, external data,
ClickHouse's own compressed blocks, several statements in one request. Every function is bounded by what it is given,
and by MAX_BODY_BYTES where compression is undone.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import lz4.frame  # type: ignore[import-untyped]
from backports import zstd

from render_platform.errors import UsageError

MAX_BODY_BYTES = 256 << 20
"""Of one request, before and after its compression is undone."""
MAX_STATEMENT_BYTES = 1 << 20
MAX_FIELDS = 1_000
LIMITS = {"max_execution_time": 60, "max_result_bytes": 1 << 30, "max_memory_usage": 4 << 30}
"""Settings of every request, in seconds, bytes and bytes. It may ask for less, not for more."""

_NO_SETTINGS = {"query", "database", "default_format", "query_id", "buffer_size", "wait_end_of_query"}
_NO_SETTINGS |= {"client_protocol_version"}  # a client sees by the answer that it got the oldest one
_NOT_SUPPORTED = {"session_timeout", "session_check", "close_session", "role", "quota_key", "user", "password"}
_NOT_SUPPORTED |= {"compress", "decompress", "stacktrace"}

_SPACE = rb"--[^\n]*|#[^\n]*|/\*.*?\*/"
_QUOTED = rb"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|`(?:[^`\\]|\\.)*+`"""
# Each character fits one branch only, and `(?>` never goes back: no text takes more than a few passes over it.
_TOKEN = rb"(?>%s|%s|[^'\"`/;]|/(?!\*))" % (_SPACE, _QUOTED)
_INSERT = re.compile(
    rb"((?>\s|%s)*+INSERT\s%s*?)(?<=[\s)`\"])FORMAT\s+(\w+)[ \t\f]*;?\r?\n?" % (_SPACE, _TOKEN),
    re.IGNORECASE | re.DOTALL,
)
"""An insert up to where its rows begin: the statement, then the name of their format."""
_BOUNDARY = re.compile(
    rb"""multipart/form-data *; *boundary=("?)([\w'()+,./:=?-]{1,70})\1 *""", re.ASCII | re.IGNORECASE
)
_FIELD = re.compile(rb'content-disposition: *form-data; *name="([^"\r\n]{1,200})"(; *filename\*?=.*)?', re.IGNORECASE)
_ONE_STATEMENT = re.compile(rb"%s*+[;\s]*" % _TOKEN, re.DOTALL)
_READS = re.compile(rb"[\s(]*(?:SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK)\b", re.IGNORECASE)
_FORMAT = re.compile(rb"\sFORMAT\s+(\w+)[;\s]*$", re.IGNORECASE)

_CODES: dict[int, tuple[int, ...]] = {
    400: (6, 8, 15, 25, 26, 27, 36, 37, 38, 41, 44, 53, 62, 72, 117, 123, 167, 168, 223, 321, 376, 427, 441, 675, 676),
    403: (497, 516),
    404: (46, 47, 50, 56, 60, 63, 73, 78, 81, 115, 152, 336),
    408: (159,),
    413: (229,),
    501: (48,),
    503: (76, 209, 439),
}
_STATUS = {code: status for status, codes in _CODES.items() for code in codes}
"""As a server has it; 500 for all others."""

_OPENERS: dict[bytes, Callable[..., Any]] = {b"gzip": gzip.open, b"lz4": lz4.frame.open, b"zstd": zstd.open}
_COMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"lz4": lz4.frame.compress,
    b"zstd": zstd.compress,
    b"gzip": lambda body: gzip.compress(body, compresslevel=1),
}

Headers = Mapping[bytes, bytes]
"""Names in lower case."""


class Refused(UsageError):
    """A request that is answered with this HTTP status and this code of ClickHouse's."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked: a statement or, where `rows` are there, an insert without its FORMAT."""

    statement: bytes
    rows: memoryview | None
    format: str
    """Of the rows; otherwise of an answer whose statement names none."""
    database: str
    parameters: Mapping[str, str]
    settings: Mapping[str, str]
    """To be set in this order: `readonly` is last."""
    query_id: str
    encoding: bytes
    """How the answer is to be compressed; empty: not at all."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def password(headers: Headers) -> bytes:
    """What X-ClickHouse-Key or, without it, Basic authentication brings; empty where neither does."""
    if b"x-clickhouse-key" in headers:
        return headers[b"x-clickhouse-key"]
    scheme, _, text = headers.get(b"authorization", b"").partition(b" ")
    try:
        return base64.b64decode(text, validate=True).partition(b":")[2] if scheme.lower() == b"basic" else b""
    except binascii.Error:
        return b""


def read_request(method: str, url_query: bytes, headers: Headers, body: bytes | bytearray) -> Request:
    """Raises Refused for what cannot be read or is not supported. `method` is GET, which only reads, or POST."""
    body = _decompressed(body, headers.get(b"content-encoding", b"identity"))
    try:
        fields = dict(parse_qsl(url_query.decode("ascii"), True, errors="strict", max_num_fields=MAX_FIELDS))
        if headers.get(b"content-type", b"").startswith(b"multipart/form-data"):
            fields |= _form(headers[b"content-type"], body)
            body = b""
    except ValueError as error:
        raise Refused(400, 36, f"the request's fields cannot be read: {error}") from None
    query_id = fields.get("query_id", "")
    if not re.fullmatch(r"[\w.:-]{0,128}", query_id, re.ASCII):
        raise Refused(400, 36, "a query_id is up to 128 letters, digits, dots, colons and dashes")
    asked = fields.get("query", "").rstrip().encode()
    statement, rows, rows_format = _split(b"%s\n%s" % (asked, body) if asked else body)
    compressed = fields.get("enable_http_compression") == "1"
    return Request(
        statement,
        rows,
        rows_format or fields.get("default_format", "TabSeparated"),
        fields.get("database", ""),
        {name.removeprefix("param_"): text for name, text in fields.items() if name.startswith("param_")},
        _settings(fields, read_only=method == "GET"),
        query_id,
        _encoding(headers.get(b"accept-encoding", b"")) if compressed else b"",
    )


def failure(text: str, status: int = 0) -> Answer:
    """The engine's error as a server says it: the text from its code on, the code, and the status that goes with it."""
    text = text[max(text.find("Code: "), 0) :].strip()
    found = re.match(r"Code: (\d+)\.", text)
    code = int(found[1]) if found else 1001  # of an exception that is none of ClickHouse's
    headers = {"x-clickhouse-exception-code": str(code), "content-type": "text/plain; charset=UTF-8"}
    return Answer(status or _STATUS.get(code, 500), f"{text}\n".encode("utf-8", "replace"), headers)


def success(request: Request, body: bytes, timezone: str, summary: Mapping[str, int]) -> Answer:
    """`summary` counts what was read and written, by ClickHouse's names."""
    headers = {"content-type": "application/octet-stream", "x-clickhouse-timezone": timezone}
    headers["x-clickhouse-summary"] = json.dumps({name: str(number) for name, number in summary.items()})
    if request.query_id:
        headers["x-clickhouse-query-id"] = request.query_id
    if request.rows is None and (body or _READS.match(request.statement)):
        named = _FORMAT.search(request.statement)
        headers["x-clickhouse-format"] = named[1].decode() if named else request.format
    if request.encoding:
        headers["content-encoding"] = request.encoding.decode()
        body = _COMPRESSORS[request.encoding](body)
    return Answer(200, body, headers)


def _split(text: bytes | bytearray) -> tuple[bytes, memoryview | None, str]:
    """The statement, its rows and their format, if it is an insert that names one.

    The engine must never see rows behind a statement: it takes a blank line in them for the end of the rows, and runs
    what follows as SQL.
    """
    if found := _INSERT.match(text, 0, MAX_STATEMENT_BYTES):
        return bytes(found[1]), memoryview(text)[found.end() :], found[2].decode()
    if not text.strip():
        raise Refused(400, 62, "Empty query")
    if len(text) > MAX_STATEMENT_BYTES:
        raise Refused(413, 229, f"a statement has at most {MAX_STATEMENT_BYTES} bytes: insert rows with a FORMAT")
    if not _ONE_STATEMENT.fullmatch(text):
        raise Refused(400, 62, "Syntax error: a request is one statement, with its quotes closed")
    return bytes(text), None, ""


def _settings(fields: Mapping[str, str], read_only: bool) -> dict[str, str]:
    settings = {}
    for name, text in fields.items():
        if name == "session_id":
            raise Refused(501, 48, "the embedded bridge has no sessions: connect with autogenerate_session_id=False")
        if name in _NOT_SUPPORTED and text not in ("", "0"):
            raise Refused(501, 48, f"the embedded bridge does not support {name}")
        if name in _NO_SETTINGS or name in _NOT_SUPPORTED or name.startswith("param_"):
            continue
        if not re.fullmatch(r"[A-Za-z_]\w{0,127}", name, re.ASCII):
            raise Refused(404, 115, f"Unknown setting {name[:127]!r}")
        settings[name] = text
    for name, limit in LIMITS.items():
        if not re.fullmatch(r"\d{1,18}", text := settings.get(name, "0"), re.ASCII):
            raise Refused(400, 72, f"{name} is a whole number")
        settings[name] = str(min(int(text) or limit, limit))
    readonly = settings.pop("readonly", "0")
    return settings | {"readonly": "2" if read_only and readonly == "0" else readonly}


def _form(content_type: bytes, body: bytes | bytearray) -> dict[str, str]:
    """The fields of a form (RFC 7578): a client puts the query and its parameters in one where they are long."""
    found = _BOUNDARY.fullmatch(content_type)
    if found is None:
        raise ValueError("the form names no boundary")
    first, *parts = (b"\r\n" + body).split(b"\r\n--" + found[2], MAX_FIELDS + 2)
    if first or not parts or len(parts) > MAX_FIELDS + 1 or parts.pop() not in (b"--", b"--\r\n"):
        raise ValueError("the form is not whole, or has too many fields")
    fields = {}
    for part in parts:
        head, blank, text = part.partition(b"\r\n\r\n")
        empty, *lines = head.split(b"\r\n", 9)
        named = [field for field in map(_FIELD.fullmatch, lines) if field is not None]
        if empty or not blank or len(named) != 1:
            raise ValueError("a part of the form is not that of a field")
        if named[0][2] is not None:
            raise Refused(501, 48, "the embedded bridge does not support external data")
        fields[named[0][1].decode()] = text.decode()
    return fields


def _decompressed(body: bytes | bytearray, encoding: bytes) -> bytes | bytearray:
    if encoding == b"identity":
        return body
    if encoding not in _OPENERS:
        raise Refused(501, 48, "a body is compressed with gzip, lz4 or zstd, or not at all")
    try:
        with _OPENERS[encoding](io.BytesIO(body)) as file:
            found: bytes = file.read(MAX_BODY_BYTES + 1)
    except (OSError, EOFError, RuntimeError, zlib.error, zstd.ZstdError):
        raise Refused(400, 271, f"Cannot decompress: the body is not {encoding.decode()}, or not whole") from None
    if len(found) > MAX_BODY_BYTES:
        raise Refused(413, 307, f"a body has at most {MAX_BODY_BYTES} bytes: send smaller batches")
    return found


def _encoding(accepted: bytes) -> bytes:
    """The first of ours that is accepted without a condition."""
    names = {name.strip().lower() for name in accepted.split(b",")}
    return next((name for name in _COMPRESSORS if name in names), b"")
