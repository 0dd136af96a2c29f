"""Triton's own spans of each request, received as OTLP over HTTP.

With `mode=opentelemetry` Triton posts JSON in which, for one request of ours:

    InferRequest                                the HTTP side
      <model>   triton.request_id = our id      one request; triton.trace_parent_id = 0: not part of an ensemble
        compute                                 COMPUTE_START … COMPUTE_END, nanoseconds since 1970, Triton's clock

A request inside an ensemble has a parent of its own kind; its computing counts for that parent. Spans come when they
have ended, so what is inside comes first, though maybe in an earlier post. A batch is computed once and each of its
requests shows the same interval: intervals are shared out later, and are not amounts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

from render_platform.errors import UsageError
from render_platform.gateway.backends import Span

MAX_PENDING = 10_000
"""Requests whose computing has come and whose own span has not."""
MAX_EXPORT_BYTES = 16 * 1024 * 1024
MAX_ID_CHARACTERS = 64
"""Of a span's id, which OTLP writes with 16."""
MAX_SPANS = 1_000
"""Intervals that are kept for one request: an ensemble computes some tens."""


class _Value(msgspec.Struct, rename="camel"):
    string_value: str = ""
    int_value: int = 0


class _Attribute(msgspec.Struct):
    key: str
    value: _Value = msgspec.field(default_factory=_Value)


class _Event(msgspec.Struct, rename="camel"):
    name: str
    time_unix_nano: int


class _Span(msgspec.Struct, rename="camel"):
    span_id: str
    parent_span_id: str = ""
    attributes: list[_Attribute] = []
    events: list[_Event] = []


class _Scope(msgspec.Struct):
    spans: list[_Span] = []


class _Resource(msgspec.Struct, rename="camel"):
    scope_spans: list[_Scope] = []


class _Export(msgspec.Struct, rename="camel"):
    resource_spans: list[_Resource] = []


_export = msgspec.json.Decoder(_Export, strict=False)  # OTLP writes 64-bit integers as text


class SpanBook:
    """Puts the spans of many posts together, and hands each awaited request its computing."""

    def __init__(self) -> None:
        self._awaited: dict[str, asyncio.Future[list[Span]]] = {}
        self._pending: dict[str, list[Span]] = {}

    @contextmanager
    def awaiting(self, request_id: str) -> Iterator[asyncio.Future[list[Span]]]:
        """A future of the request's intervals; set once the request's own span has come, maybe with none."""
        future = asyncio.get_running_loop().create_future()
        self._awaited[request_id] = future
        try:
            yield future
        finally:
            del self._awaited[request_id]

    def add(self, export: bytes) -> None:
        """Take one post. ValueError where it is no OTLP/JSON; nothing of it is kept then."""
        try:
            found = _export.decode(export)
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        for resource in found.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._take(span)

    def _take(self, span: _Span) -> None:
        times = {event.name: event.time_unix_nano for event in span.events}
        if "COMPUTE_START" in times and "COMPUTE_END" in times:
            self._keep(span.parent_span_id, [(times["COMPUTE_START"], times["COMPUTE_END"])])
        named = {attribute.key: attribute.value for attribute in span.attributes}
        if "triton.trace_parent_id" not in named:
            return
        computed = self._pending.pop(span.span_id, [])
        if named["triton.trace_parent_id"].int_value != 0:
            self._keep(span.parent_span_id, computed)
        elif (request_id := named.get("triton.request_id")) is not None:
            future = self._awaited.get(request_id.string_value)
            if future is not None and not future.done():
                future.set_result(computed)

    def _keep(self, parent: str, computed: list[Span]) -> None:
        if len(parent) > MAX_ID_CHARACTERS:
            return  # nobody's: no span has such an id
        kept = self._pending.setdefault(parent, [])
        kept += computed[: MAX_SPANS - len(kept)]
        if len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]


class SpanReceiver:
    """Listens on a loopback port for what Triton posts to /v1/traces."""

    def __init__(self, port: int, book: SpanBook) -> None:
        self._port, self._book = port, book
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """UsageError where the port is taken."""
        application = web.Application(client_max_size=MAX_EXPORT_BYTES)
        application.router.add_post("/v1/traces", self._receive)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        except OSError as error:
            await self.close()
            remedy = "give each backend a free port of its own"
            raise UsageError(f"spans_port {self._port}: {error.strerror}", remedy) from error

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _receive(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return _answer(415, {"message": "only OTLP/JSON is read"})
        try:
            self._book.add(await request.read())
        except ValueError as error:
            return _answer(400, {"message": str(error)})
        return _answer(200, {})


def _answer(status: int, body: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def fitted(spans: list[Span], begun_ns: int, ended_ns: int) -> list[Span] | None:
    """`spans` inside [begun, ended): where a server's clock is off they end with the attempt, their lengths kept.

    None where nothing is left: a missing reading is missing, never 0.
    """
    if not spans:
        return None
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    shift = 0 if begun_ns <= first and last <= ended_ns else ended_ns - last
    cut = ((max(begun_ns, start + shift), end + shift) for start, end in spans)
    return [(start, end) for start, end in cut if start < end] or None
