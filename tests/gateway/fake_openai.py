"""An OpenAI-compatible server that fails on demand: the model's name says how. It runs on the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from render_platform.gateway.backends import MAX_ANSWER_BYTES
from render_platform.gateway.sse import MAX_EVENT_BYTES

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TIMINGS = {"prompt_ms": 0.0125, "predicted_ms": 0.020001}
WHOLE: dict[str, Any] = {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}]}
DONE = b"data: [DONE]\n\n"


def chunk(text: str) -> bytes:
    said = {"id": "x", "choices": [{"index": 0, "delta": {"content": text}}], "usage": None}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


LAST = b"data: " + json.dumps({"id": "x", "choices": [], "usage": USAGE, "timings": TIMINGS}).encode() + b"\n\n"
TWO = [chunk("hel"), chunk("lo")]


@dataclass
class FakeOpenAi:
    """What it was sent, and whether a client went away while it worked."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    working: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def asked(self) -> dict[str, Any]:
        """The last body."""
        found: dict[str, Any] = json.loads(self.bodies[-1])
        return found

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(request.path)
        model = self.asked["model"]
        if model.isdigit():
            return web.json_response({"error": {"message": f"status {model}"}}, status=int(model))
        if model in STREAMS:
            return await _stream(request, STREAMS[model])
        if model in ANSWERS:
            return await ANSWERS[model](self, request)
        if self.asked.get("stream"):
            last = [LAST] if self.asked.get("stream_options", {}).get("include_usage") else []
            return await _stream(request, [*TWO, *last, DONE])
        return web.json_response({**WHOLE, "usage": USAGE, "timings": TIMINGS})


async def _stream(request: web.Request, parts: list[bytes]) -> web.StreamResponse:
    """The parts, each written on its own; an empty one cuts the connection."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        if not part:
            _cut(request)
            break
        await response.write(part)
        await asyncio.sleep(0)
    return response


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _never(fake: FakeOpenAi, request: web.Request) -> web.StreamResponse:
    """Works until the client has left; a stream has begun by then."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    try:
        if fake.asked.get("stream"):
            await response.prepare(request)
            await response.write(TWO[0])
        fake.working.set()
        await asyncio.Event().wait()
    finally:
        fake.left.set()
    return response


async def _models(request: web.Request) -> web.StreamResponse:
    return web.json_response({"object": "list", "data": []})


async def _reset(fake: FakeOpenAi, request: web.Request) -> web.StreamResponse:
    _cut(request)
    return web.Response()


async def _not_http(fake: FakeOpenAi, request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.write(b"SSH-2.0-hello\r\n\r\n")
        request.transport.close()
    return web.Response()


async def _huge(fake: FakeOpenAi, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    if fake.asked["model"] == "huge-announced":
        response.content_length = MAX_ANSWER_BYTES + 1
    await response.prepare(request)
    block = b" " * 1024 * 1024
    with contextlib.suppress(ConnectionError):
        for _ in range(MAX_ANSWER_BYTES // len(block) + 2):
            await response.write(block)
    return response


def _plain(text: str, status: int = 200, **headers: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def answer(fake: FakeOpenAi, request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status, headers={"Content-Type": "application/json", **named})

    return answer


ANSWERS: dict[str, Callable[[FakeOpenAi, web.Request], Awaitable[web.StreamResponse]]] = {
    "never": _never,
    "reset": _reset,
    "huge": _huge,
    "huge-announced": _huge,
    "not-json": _plain("<html>it works</html>"),
    "deep": _plain('{"choices": ' + "[" * 100_000),
    "html-400": _plain("<html>bad</html>", 400),
    "redirect": _plain("", 307, Location="/v1/elsewhere"),
    "not-http": _not_http,
    "compressed": _plain("x", Content_Encoding="gzip"),
    "no-figures": _plain(json.dumps(WHOLE)),
    "odd-figures": _plain(json.dumps({**WHOLE, "usage": {"prompt_tokens": -1}, "timings": [1]})),
    "nan-figures": _plain(json.dumps({**WHOLE, "usage": 7, "timings": {"prompt_ms": "NaN", "predicted_ms": 1}})),
}
STREAMS = {
    "cut": [*TWO, b""],
    "cut-at-once": [b""],
    "ended-early": TWO,
    "error-at-once": [b'data: {"error":{"message":"no"}}\n\n'],
    "error-later": [*TWO, b'data: {"error":{"message":"no"}}\n\n', DONE],
    "not-events": [*TWO, b'data: {"usage": nonsense}\n\n', DONE],
    "long-event": [*TWO, b"data: " + b"x" * (MAX_EVENT_BYTES + 10)],
    "one-piece": [b": ping\n\n" + b"".join(TWO) + LAST + DONE + b"data: more\n\n"],
    "crlf": [(b"".join(TWO) + LAST + DONE).replace(b"\n", b"\r\n")],
    "bytes": [bytes([byte]) for byte in b"".join(TWO) + LAST + DONE],
}


@contextlib.asynccontextmanager
async def fake_openai() -> AsyncIterator[FakeOpenAi]:
    fake = FakeOpenAi()
    application = web.Application()
    application.router.add_post("/v1/{task:.*}", fake.answer)
    application.router.add_get("/v1/models", _models)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield fake
    finally:
        await runner.cleanup()
