"""Routes for auditors: the objects that the published log names, and the log's files. Receipts, for customers too.

Read-only. The list and the tiles end where the published checkpoint does. Objects are hashed before they leave: bytes
that are not those that the name promises are a 500, and are never sent. An ETag is the digest of the bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar, cast
from urllib.parse import unquote

import msgspec
import sqlalchemy as sa
from litestar import Response, Router, get, route
from litestar.params import FromPath, QueryParameter

from render_platform import tiles
from render_platform.canonical import digest_of
from render_platform.cas import path_of
from render_platform.clock import hour_of, iso, time_us
from render_platform.database import Database, jobs, log_entries, log_head
from render_platform.entries import TYPES, parse
from render_platform.errors import Finding, Missing, RecordError, Unavailable, UsageError
from render_platform.gateway.edge import AnyConnection, AnyRequest, admit, caller_of, gateway_of, identify, require
from render_platform.gateway.identity import Principal
from render_platform.gateway.problems import NotFound, RateLimited
from render_platform.gateway.service import Gateway
from render_platform.note import Checkpoint
from render_platform.objects import ObjectStore
from render_platform.outbox import located
from render_platform.receipts import NotPublished, UnknownEvent

MAX_PAGE = 500
AT_ONCE = 4
"""Reads of evidence at a time: each holds one object in memory, and one of the threads that other routes need too."""
MAX_ASKED, MAX_ASKED_EACH = 256, 32
"""Requests that wait or read: of all callers, and of each."""
IMMUTABLE = "private, max-age=31536000, immutable"
AGAIN = "private, no-cache"
"""Ask each time whether it has changed. `private`, because no cache may give it to another caller."""
OCTETS = "application/octet-stream"

T = TypeVar("T")
Hour = Annotated[str | None, QueryParameter(max_length=40, description="A time, ISO 8601; in UTC unless it says other")]
Kind = Annotated[str | None, QueryParameter(max_length=40, description="A type of entry, such as usage_batch")]
Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]
Opaque = Annotated[str | None, QueryParameter(max_length=200, description="The `next` of the page before")]
_CURSOR = re.compile(r"([0-9]{1,18}) (-|[0-9]{1,18}) ([0-9]{1,18}) ([0-2])", re.ASCII)


class ObjectView(msgspec.Struct):
    """An object that an entry names. `size` is null where the log does not bind it."""

    digest: str
    size: int | None
    part: str
    type: str
    batch_id: str
    hour: str | None
    index: int


class ObjectPage(msgspec.Struct):
    """Objects in the order of their hours, those of no hour first. `tree_size` is the same on all pages of a list."""

    tree_size: int
    objects: list[ObjectView]
    next: str | None = None


class ReceiptPending(msgspec.Struct):
    """Why there is no receipt yet."""

    status: str
    detail: str
    retry_after_s: int


class Turns:
    """Evidence is read in threads, a few at a time, in order; who asks for too much at once is refused."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._asked: Counter[tuple[str, str]] = Counter()

    async def take(self, caller: Principal, work: Callable[[], T]) -> T:
        if self._asked[caller.key] >= MAX_ASKED_EACH:
            raise RateLimited(1)
        if self._asked.total() >= MAX_ASKED:
            raise Unavailable("too much evidence is asked for at once", "try again in a second")
        self._asked[caller.key] += 1
        try:
            async with self._turns:
                return await asyncio.to_thread(work)
        finally:
            self._asked[caller.key] -= 1
            self._asked += Counter()  # forgets who asks for nothing now


async def _read(request: AnyRequest, work: Callable[[], T]) -> T:
    return await cast(Turns, request.app.state["turns"]).take(caller_of(request), work)


async def auditors_only(request: AnyConnection) -> None:
    """As `customers_only`, for those who may see every customer's rows."""
    admit(request, "auditor")


async def receipt_readers(request: AnyConnection) -> None:
    """An auditor, or a customer."""
    admit(request, "auditor" if "auditor" in identify(request).roles else "customer")


# The objects that the published log names.


class Position(NamedTuple):
    """An object's place in the list; `hour_us` is -1 for entries of no hour."""

    hour_us: int
    log_index: int
    part: int


class Query(NamedTuple):
    """Which entries: of a type, and of the hours that overlap [start, end)."""

    type: str | None = None
    start_us: int | None = None
    end_us: int | None = None


@get("/v1/objects")
async def list_objects(
    request: AnyRequest,
    hour_from: Hour = None,
    hour_to: Hour = None,
    type: Kind = None,
    limit: Limit = 100,
    cursor: Opaque = None,
) -> ObjectPage:
    """What the published log names in the CAS, by hour: [`hour_from`, `hour_to`). All of it without a range."""
    require(type is None or type in TYPES, "type", "is not a type of entry", f"use one of {', '.join(TYPES)}")
    start_us, end_us = _time("hour_from", hour_from), _time("hour_to", hour_to)
    query = Query(type, None if start_us is None else hour_of(start_us), end_us)
    gateway = gateway_of(request)
    return await _read(request, lambda: page_of(gateway.database, gateway.log_objects, query, limit, cursor))


def page_of(database: Database, log: ObjectStore, query: Query, limit: int, cursor: str | None) -> ObjectPage:
    """One page. Its entries are those below the tree size that was published at the first page: a list that is paged
    while the log grows is the list of that moment."""
    size, after = published_size(log), None
    if cursor is not None:
        pinned, after = _position(cursor)
        require(pinned <= size, "cursor", "is not one of this log")
        size = pinned
    found = list(_objects(_entries(database, query, size, after, limit + 2)))
    new = [(place, one) for place, one in found if after is None or place > after]
    more = _cursor(size, new[limit - 1][0]) if len(new) > limit else None
    return ObjectPage(size, [one for _, one in new[:limit]], more)


def _entries(database: Database, query: Query, size: int, after: Position | None, limit: int) -> list[Any]:
    """At most `limit` entries from the one at `after` on; two of them may add nothing to what follows `after`."""
    hour, index = log_entries.c.hour_us, log_entries.c.log_index
    chosen = sa.select(hour, index, log_entries.c.entry).where(index < size)
    if query.type is not None:
        chosen = chosen.where(log_entries.c.type == query.type)
    if query.start_us is not None:
        chosen = chosen.where(hour >= query.start_us)
    if query.end_us is not None:
        chosen = chosen.where(hour < query.end_us)
    if after is not None and after.hour_us < 0:
        chosen = chosen.where(hour.is_not(None) | (index >= after.log_index))
    elif after is not None:  # the first condition is for the index, which finds the hour by it
        chosen = chosen.where(hour >= after.hour_us, (hour > after.hour_us) | (index >= after.log_index))
    chosen = chosen.order_by(hour.asc().nulls_first(), index).limit(limit)
    with database.read() as connection:
        known = connection.execute(sa.select(log_head.c.size)).scalar() or 0
        if known < size:
            raise Unavailable(f"the log has {size} entries, its index {known}", "the operator has to recover the index")
        return list(connection.execute(chosen))


def _objects(rows: list[Any]) -> Iterator[tuple[Position, ObjectView]]:
    for row in rows:
        data = bytes(row.entry)
        entry = parse(data)
        hour = None if row.hour_us is None else iso(row.hour_us)
        parts = (
            ("entry", digest_of(data), len(data)),
            ("subject", entry.subject_digest, entry.subject_size),
            ("attestation", entry.attestation, None),
        )
        for number, (part, digest, size) in enumerate(parts):
            if digest is not None:
                place = Position(-1 if row.hour_us is None else row.hour_us, row.log_index, number)
                yield place, ObjectView(digest, size, part, entry.type, entry.batch_id, hour, row.log_index)


def published_size(log: ObjectStore) -> int:
    """How many entries the published checkpoint covers; 0 where none is. Auditors check its signature themselves."""
    try:
        text = log.read("checkpoint").decode(errors="replace")
    except Missing:
        return 0
    return Checkpoint.parse(text.partition("\n\n")[0] + "\n").size


def _cursor(size: int, at: Position) -> str:
    hour = "-" if at.hour_us < 0 else at.hour_us
    return base64.urlsafe_b64encode(f"{size} {hour} {at.log_index} {at.part}".encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[int, Position]:
    """The tree size and the place of a cursor; RecordError where it is none of ours."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise RecordError("cursor", "is not one", "give the `next` of the page before as it is")
    return int(match[1]), Position(-1 if match[2] == "-" else int(match[2]), int(match[3]), int(match[4]))


def _time(field: str, text: str | None) -> int | None:
    try:
        return None if text is None else time_us(text)
    except (ValueError, OverflowError):
        raise RecordError(field, "is not a time", "give it as 2024-01-15T09:00:00Z") from None


@route("/v1/objects/{digest:str}", http_method=["GET", "HEAD"], status_code=200)
async def show_object(request: AnyRequest, digest: FromPath[str]) -> Response[Any]:
    """An object's bytes, verified. It never changes."""
    cas = gateway_of(request).cas
    try:
        path_of(digest)
        data = await _read(request, lambda: cas.get(digest))
    except (UsageError, Missing):
        raise NotFound("there is no such object") from None
    return _answer(request, data, OCTETS, IMMUTABLE)


# The log's files, C2SP tlog-tiles with the prefix /audit.


@route("/audit/checkpoint", http_method=["GET", "HEAD"], status_code=200)
async def show_checkpoint(request: AnyRequest) -> Response[Any]:
    """The newest published checkpoint, as it was signed."""
    log = gateway_of(request).log_objects
    try:
        data = await _read(request, lambda: log.read("checkpoint"))
    except Missing:
        raise NotFound("nothing has been published yet") from None
    return _answer(request, data, "text/plain", AGAIN)


@route("/audit/tile/{tile:path}", http_method=["GET", "HEAD"], status_code=200)
async def show_tile(request: AnyRequest, tile: FromPath[str]) -> Response[Any]:  # noqa: ARG001 - read as it was sent
    """A tile `<L>/<N>[.p/<W>]`, or a bundle of entries `entries/<N>[.p/<W>]`, that the checkpoint covers."""
    log = gateway_of(request).log_objects
    asked = tiles.parse_path(unquote(request.scope["raw_path"].decode("latin-1")).removeprefix("/audit/"))
    if asked is None:
        raise NotFound("that is no path of a tile")
    try:
        data = await _read(request, lambda: tile_of(log, asked))
    except Missing:
        raise NotFound("there is no such tile") from None
    return _answer(request, data, OCTETS, IMMUTABLE)


def tile_of(log: ObjectStore, tile: tiles.Tile) -> bytes:
    """A tile's bytes, for a partial one that is gone out of the full one. Missing where the published checkpoint does
    not cover it; Finding where it is not whole."""
    level, _, width = tile
    path = tiles.path_of(tile)
    if tiles.needed_size(tile) > published_size(log):
        raise Missing(path)
    data = tiles.read_tile(log.read, path)
    whole = len(tiles.decode_bundle(data)) == width if level is None else len(data) == width * 32
    if not whole:
        raise Finding(f"log/{path}: does not hold what its name says", "restore it from a copy; do not edit evidence")
    return data


def _answer(request: AnyRequest, data: bytes, media_type: str, caching: str) -> Response[Any]:
    """The bytes, or 304 where the client has them. Either way they were read: a 304 says that they still stand."""
    etag = f'"{digest_of(data)}"'
    headers = {"ETag": etag, "Cache-Control": caching, "X-Content-Type-Options": "nosniff"}
    known = ",".join(request.headers.getall("if-none-match", []))
    if any(one.strip().removeprefix("W/") in (etag, "*") for one in known.split(",")):
        return Response(None, status_code=304, headers=headers)
    return Response(data, status_code=200, headers=headers, media_type=media_type)


# Receipts.


@get("/jobs/{job_id:uuid}/receipt")
async def show_receipt(request: AnyRequest, job_id: FromPath[uuid.UUID]) -> Response[str | ReceiptPending]:
    """The proof of what a job used, to keep: 200 once it is published, 202 until then.

    Auditors see every one, without what tells whose it is: that opens all of a customer's events.
    """
    gateway, caller = gateway_of(request), caller_of(request)

    def make() -> str:
        owned = _owns(gateway, caller, job_id)
        if not owned and "auditor" not in caller.roles:
            raise NotFound("there is no such job")
        return gateway.receipts.of_job(job_id, opened=owned)

    headers = {"Cache-Control": AGAIN}
    try:
        text = await _read(request, make)
    except UnknownEvent:
        raise NotFound("there is no such job") from None
    except NotPublished as waits:
        pending = ReceiptPending("pending", waits.message, waits.retry_after_s)
        return Response(pending, status_code=202, headers={**headers, "Retry-After": str(waits.retry_after_s)})
    except Missing as lost:  # the log names it: that is not the same as no receipt
        raise Finding(f"{lost.path}: the log names it, and it is missing", lost.remedy) from None
    return Response(text, status_code=200, headers=headers, media_type="text/plain")


def _owns(gateway: Gateway, caller: Principal, job_id: uuid.UUID) -> bool:
    """Whether the job is the caller's: one of the gateway's, or one that was reported to it."""
    ref = gateway.archive.ref_of(*caller.key)
    with gateway.database.read() as connection:
        owner = connection.execute(sa.select(jobs.c.customer_ref).filter_by(job_id=job_id.bytes)).scalar()
        owners = [owner, *(event.customer_ref for event in located(connection, (), [job_id.bytes]))]
    return ref is not None and ref in owners


EVIDENCE_ROUTES = [
    Router(
        "/",
        route_handlers=[list_objects, show_object, show_checkpoint, show_tile],
        before_request=auditors_only,
    ),
    Router("/", route_handlers=[show_receipt], before_request=receipt_readers),
]
