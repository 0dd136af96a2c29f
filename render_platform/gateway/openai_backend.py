"""A server that speaks the OpenAI API: vLLM, llama.cpp, or one that is paid for.

- The body goes on as the client wrote it, value by value; `model` becomes the server's own name for it, and a key that
  stands twice is sent once, as it was read.
- A stream is passed on event by event; the server is always asked for usage, and the client gets that chunk only if it
  asked too. `[DONE]` comes alone, after everything else. Once an event was passed on, no failure is retriable.
- GPU time is what llama.cpp's `timings` say (prompt and prediction), as one span that ends when they came. Other
  servers say nothing of the kind: `spans` is None, and the wall clock counts.
- Cancelled, the connection is closed: llama.cpp and vLLM stop there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from typing import Annotated

import msgspec
from aiohttp import ClientResponse

from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.backend_http import BackendClient
from render_platform.gateway.backends import MAX_ANSWER_BYTES, Answer, Attempt, BackendFailure, Chunk, Span, Usage
from render_platform.gateway.catalogue import OPENAI_TASKS, BackendSpec
from render_platform.gateway.sse import DONE, Figures, Relay, figures_decoder

_MAX_MS = 86_400_000
_TRUE = msgspec.Raw(b"true")
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Timings(msgspec.Struct):
    """llama.cpp's, in milliseconds; Decimal, because what is billed is never a float."""

    prompt_ms: Decimal
    predicted_ms: Decimal


_usage = msgspec.json.Decoder(_Usage | None)
_timings = msgspec.json.Decoder(_Timings | None)


class OpenAiBackend:
    meter = "backend"

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec
        self._client = BackendClient(spec)

    async def start(self) -> None:
        """UsageError where the key's variable is empty; Unavailable where the server does not answer yet."""
        variable = self.spec.api_key_env
        key = os.environ.get(variable, "") if variable else ""
        if variable and not (key.isascii() and key.isprintable() and key.strip()):
            raise UsageError(f"{variable}, the key of {self.spec.name}, is empty or not a key", f"set {variable}")
        self._client.open({"Authorization": f"Bearer {key}"} if key else None)
        try:
            await self.check()
        except BackendFailure as failure:
            raise Unavailable(failure.message, f"start the server at {self.spec.url}") from failure

    async def run(self, attempt: Attempt) -> Answer:
        begun_ns = attempt.now_ns()
        path = OPENAI_TASKS.get(attempt.task)
        if path is None:
            message = f"{self.spec.name} knows no task {attempt.task}"
            raise BackendFailure("backend_misconfigured", message, retriable=True, spans=[])
        chunk = attempt.chunk if attempt.task != "embedding" else None
        body, relay = prepare(attempt.body, attempt.served_as, chunk is not None)
        headers = {"traceparent": attempt.traceparent} if attempt.traceparent else None
        answer, ended_ns = b"", None
        try:
            async with self._client.within(attempt.timeout_s):
                if relay is not None and chunk is not None:
                    exchange = self._client.exchange("POST", path, body, headers, streamed=True)
                    ended_ns = await self._stream(exchange, relay, chunk, attempt.now_ns)
                else:
                    answer = await self._client.fetch("POST", path, body, headers)
        except BackendFailure as failure:
            if relay is not None and relay.begun:
                failure.retriable = False
            raise
        figures = relay.figures if relay is not None else self._client.decode(figures_decoder, answer)
        spans = spans_of(figures, begun_ns, attempt.now_ns() if ended_ns is None else ended_ns)
        return Answer(answer, usage=usage_of(figures), spans=spans)

    async def check(self) -> None:
        await self._client.check("models")

    async def close(self) -> None:
        await self._client.close()

    async def _stream(
        self,
        exchange: AbstractAsyncContextManager[ClientResponse],
        relay: Relay,
        chunk: Chunk,
        now_ns: Callable[[], int],
    ) -> int:
        """Pass the stream on; gives the time at which its last event came."""
        size = 0
        async with exchange as response:
            if response.content_type != "text/event-stream":
                raise self._client.malformed("the answer is no stream of events")
            async for data in response.content.iter_any():
                size += len(data)
                if size > MAX_ANSWER_BYTES:
                    raise self._client.malformed(f"the stream has more than {MAX_ANSWER_BYTES} bytes")
                if ready := self._feed(relay, data):
                    await chunk(ready)
                if relay.failed:
                    message = f"{self.spec.name} broke off its stream with an error"
                    raise BackendFailure("backend_error", message, retriable=True)
                if relay.done:
                    ended_ns = now_ns()
                    await chunk(DONE)
                    return ended_ns
        raise BackendFailure("backend_disconnected", f"{self.spec.name} ended its stream early", retriable=True)

    def _feed(self, relay: Relay, data: bytes) -> bytes:
        try:
            return relay.feed(data)
        except ValueError:
            raise self._client.malformed("the stream is not one of events with JSON") from None


def prepare(body: bytes, served_as: str, streamed: bool) -> tuple[bytes, Relay | None]:
    """The body that the server gets, and, where the answer is to be streamed, what passes it on.

    Whether it is streamed is the client's wish, in the body; `streamed` False: there is nobody to stream it to.
    """
    try:
        fields = _fields.decode(body)
    except (ValueError, RecursionError):
        refused = (400, b'{"error":{"message":"the body is not a JSON object","type":"invalid_request_error"}}')
        raise BackendFailure("backend_refused", "not JSON", retriable=False, refused=refused, spans=[]) from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(served_as))
    asked = fields.pop("stream", None) == _TRUE
    options = fields.pop("stream_options", None)
    if not (asked and streamed):
        return msgspec.json.encode(fields), None
    wishes = _options(options)
    relay = Relay(keep_usage=wishes.get("include_usage") == _TRUE)
    fields["stream"] = _TRUE
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode({**wishes, "include_usage": _TRUE}))
    return msgspec.json.encode(fields), relay


def usage_of(figures: Figures) -> Usage:
    """The tokens that an answer counts; None where it does not say, or says nonsense."""
    try:
        found = _usage.decode(figures.usage)
    except (ValueError, RecursionError):
        found = None
    return Usage() if found is None else Usage(input_tokens=found.prompt_tokens, output_tokens=found.completion_tokens)


def spans_of(figures: Figures, begun_ns: int, ended_ns: int) -> list[Span] | None:
    """What llama.cpp says it worked, up to `ended_ns` and never longer than the attempt; None where it says nothing."""
    try:
        found = _timings.decode(figures.timings)
    except (ValueError, RecursionError):
        return None
    if found is None or not all(ms.is_finite() and 0 <= ms <= _MAX_MS for ms in (found.prompt_ms, found.predicted_ms)):
        return None
    busy_ns = int((found.prompt_ms + found.predicted_ms) * 1_000_000)
    start_ns = max(begun_ns, ended_ns - busy_ns)
    return [(start_ns, ended_ns)] if start_ns < ended_ns else None


def _options(raw: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    """A request's `stream_options`; none where they are no object: the client then asked for nothing."""
    try:
        return _fields.decode(raw) if raw is not None else {}
    except (ValueError, RecursionError):
        return {}
