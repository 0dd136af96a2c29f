"""How long a request computed, from Triton's own spans; and what every such meter does.

Spans and statistics (`triton_statistics`) both measure COMPUTE_START … COMPUTE_END: the copy in, the inference and the
copy out; not the time in the queue. Spans (`spans_port`) are exact for any number of requests at once. Triton exports
them after a delay, which the answer waits for: start it with `bsp_schedule_delay=2` (milliseconds).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol
from urllib.parse import quote

import msgspec
import structlog

from render_platform.errors import UsageError
from render_platform.gateway.backend_http import BackendClient
from render_platform.gateway.backends import Attempt, BackendFailure, Span
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton_spans import SpanBook, SpanReceiver

MAX_EXPORT_DELAY_MS = 1_000
SPAN_GRACE_S = 0.5
"""How long a span is waited for beyond the server's export delay."""
RETRY_S = 10.0
"""How long a model that is not traced is left alone."""
READ_S = 1.0

_log = structlog.get_logger()


def model_path(served_as: str) -> str:
    return "v2/models/" + quote(served_as, safe="")


Reading = Callable[[float], Awaitable[list[Span] | None]]
"""After the answer: the intervals on the server's clock, waited for at most that many seconds; None: no figure."""


class TritonMeter(Protocol):
    async def start(self) -> None: ...

    def measure(self, attempt: Attempt) -> AbstractAsyncContextManager[Reading]:
        """Around one request."""

    async def close(self) -> None: ...


class _Trace(msgspec.Struct):
    trace_mode: str = ""
    trace_level: list[str] = []
    trace_rate: int = 0
    trace_count: int = 0
    bsp_schedule_delay: int = 5_000


_trace = msgspec.json.Decoder(_Trace, strict=False)  # Triton writes numbers as text
_TRACE_ALL = b'{"trace_level":["TIMESTAMPS"],"trace_rate":"1","trace_count":"-1"}'


class SpanMeter:
    """Triton's spans, matched by our attempt id."""

    def __init__(self, spec: BackendSpec, client: BackendClient) -> None:
        self._spec, self._client = spec, client
        self._book = SpanBook()
        self._receiver = SpanReceiver(spec.spans_port, self._book)
        self._waits: dict[str, tuple[float, float]] = {}
        """Each model: how long a span of it is waited for (0: it is not traced), and until when that is believed."""

    async def start(self) -> None:
        """UsageError where the port is taken, or the server does not trace and cannot be told to."""
        await self._receiver.start()
        await self._require_tracing("v2/trace/setting")

    async def close(self) -> None:
        await self._receiver.close()

    @asynccontextmanager
    async def measure(self, attempt: Attempt) -> AsyncIterator[Reading]:
        wait_s = await self._wait_of(attempt.served_as)
        with self._book.awaiting(attempt.attempt_id) as future:

            async def read(at_most_s: float) -> list[Span] | None:
                if not wait_s:
                    return None
                try:
                    return await asyncio.wait_for(future, min(wait_s, at_most_s))
                except TimeoutError:
                    # The server may have been started anew, with other settings: they are read again.
                    self._waits.pop(attempt.served_as, None)
                    _log.warning("span_missing", backend=self._spec.name, model=attempt.served_as)
                    return None

            yield read

    async def _wait_of(self, served_as: str) -> float:
        now_s = asyncio.get_running_loop().time()
        wait_s, until_s = self._waits.get(served_as, (0.0, 0.0))
        if now_s < until_s:
            return wait_s
        try:
            async with self._client.within(READ_S):
                wait_s, until_s = await self._require_tracing(model_path(served_as) + "/trace/setting"), math.inf
        except (BackendFailure, UsageError) as error:
            _log.warning("not_traced", backend=self._spec.name, model=served_as, error=str(error))
            wait_s, until_s = 0.0, now_s + RETRY_S
        self._waits[served_as] = wait_s, until_s
        return wait_s

    async def _require_tracing(self, path: str) -> float:
        """Have every request traced, and give the seconds that a span takes at most."""
        found = self._client.decode(_trace, await self._client.fetch("GET", path))
        if found.trace_mode != "opentelemetry" or found.bsp_schedule_delay > MAX_EXPORT_DELAY_MS:
            raise UsageError(f"{self._spec.name} does not send its spans here in time", self._remedy())
        if not _is_full(found):
            found = self._client.decode(_trace, await self._client.fetch("POST", path, _TRACE_ALL))
        if not _is_full(found):
            raise UsageError(f"{self._spec.name} does not trace each request", self._remedy())
        return found.bsp_schedule_delay / 1_000 + SPAN_GRACE_S

    def _remedy(self) -> str:
        to = f"http://127.0.0.1:{self._spec.spans_port}/v1/traces"
        settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS")
        more = (f"opentelemetry,url={to}", "opentelemetry,bsp_schedule_delay=2")
        return "start tritonserver with " + " ".join(f"--trace-config {setting}" for setting in (*settings, *more))


def _is_full(trace: _Trace) -> bool:
    return trace.trace_rate == 1 and trace.trace_count == -1 and "TIMESTAMPS" in trace.trace_level
