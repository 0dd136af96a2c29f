"""The OpenAI API: its clients work unchanged, streaming included; each request is a job, billed as any other."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import JSONBody
from litestar.response import Stream

from render_platform.gateway.edge import (
    AnyRequest,
    caller_of,
    customers_only,
    gateway_of,
    identify,
    request_id_of,
    require,
)
from render_platform.gateway.job_routes import answer_of, repeated, usage_headers
from render_platform.gateway.jobs import Outcome, Request
from render_platform.gateway.problems import Refused, openai_error, problem_of
from render_platform.gateway.submission import Asked, Watch, request_of, run_and_wait, until_ended

CHUNKS_AHEAD = 16
"""Pieces of a stream that wait for a slow client before the backend is held up."""
SLOWEST_S = 20.0
"""A client that takes nothing for so long has gone away: else it would hold a slot, and its backend take the blame."""
DONE = b"data: [DONE]\n\n"


class OpenAiRequest(msgspec.Struct):
    """What the gateway reads of a request; every other member goes to the backend as it came."""

    model: str
    stream: bool | None = None


class ChatRequest(OpenAiRequest, kw_only=True):
    messages: list[dict[str, Any]]


class CompletionRequest(OpenAiRequest, kw_only=True):
    prompt: str | list[Any]


class EmbeddingRequest(OpenAiRequest, kw_only=True):
    input: str | list[Any]


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: AnyRequest, data: JSONBody[ChatRequest]) -> Response[Any]:
    """A chat completion, streamed where `stream` is true."""
    return await _complete(request, data, "chat")


@post("/v1/completions", status_code=200)
async def completions(request: AnyRequest, data: JSONBody[CompletionRequest]) -> Response[Any]:
    """A completion, streamed where `stream` is true."""
    return await _complete(request, data, "completion")


@post("/v1/embeddings", status_code=200)
async def embeddings(request: AnyRequest, data: JSONBody[EmbeddingRequest]) -> Response[Any]:
    """Embeddings of one text or of several."""
    require(not data.stream, "stream", "embeddings are not streamed", "leave it out")
    return await _complete(request, data, "embedding")


async def _complete(request: AnyRequest, data: OpenAiRequest, task: str) -> Response[Any]:
    caller = caller_of(request)
    asked = Asked(data.model, task, await request.body())
    if data.stream:
        stream = _Streamed()
        wanted = request_of(request, caller, asked, direct=True, chunk=stream.put)
        return await stream.answer(request, wanted)
    waited = await run_and_wait(request, request_of(request, caller, asked, direct=True))
    if waited.outcome is None:
        return await repeated(request, waited.job_id)
    if waited.outcome.status != "success" and waited.outcome.body:
        return _refusal(request, waited.job_id, waited.outcome)
    return answer_of(request, waited.job_id, waited.outcome)


def _refusal(request: AnyRequest, job_id: uuid.UUID, outcome: Outcome) -> Response[Any]:
    """A backend's own 4xx goes back as it came: it is in the shape that the client reads."""
    with contextlib.suppress(msgspec.DecodeError):
        if isinstance(msgspec.json.decode(outcome.body), dict):
            headers = usage_headers(job_id, outcome.gpu_seconds, outcome.device)
            return Response(
                outcome.body, status_code=outcome.http_status, headers=headers, media_type="application/json"
            )
    return answer_of(request, job_id, outcome)


class _Streamed:
    """Hands a backend's pieces to the client as they come, a bounded number ahead."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._room = asyncio.Semaphore(CHUNKS_AHEAD)
        self._news = asyncio.Event()
        self._give_up: Callable[[], object] = lambda: None

    async def put(self, piece: bytes) -> None:
        try:
            async with asyncio.timeout(SLOWEST_S):
                await self._room.acquire()
        except TimeoutError:
            self._give_up()
            await asyncio.sleep(SLOWEST_S)  # which that cancels: this is the job's own task
            raise
        self._pieces.append(piece)
        self._news.set()

    async def answer(self, request: AnyRequest, wanted: Request) -> Response[Any]:
        """The stream, once its first piece is here; before that, a failure is an answer like any other."""
        engine = gateway_of(request).engine
        job, new = await engine.submit(wanted, request_id_of(request))
        if isinstance(job, uuid.UUID):
            return await repeated(request, job)
        if not new or job.done is None:
            await until_ended(job, None)
            return await repeated(request, job.job_id)
        job.done.add_done_callback(lambda _: self._news.set())
        # Kept to the end of the stream: a client that goes away has cancelled, whatever the stream waits for then.
        self._give_up = lambda: engine.cancel(job, "client_gone")
        watch = Watch(request, self._give_up)
        try:
            first = await self._next(job.done)
        except asyncio.CancelledError:
            engine.cancel(job, "client_gone")
            raise
        if first is None:
            watch.stop()
            outcome = job.done.result()
            return _refusal(request, job.job_id, outcome) if outcome.body else answer_of(request, job.job_id, outcome)
        headers = {"x-job-id": str(job.job_id), "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        pieces = self._all(request, job.done, first)
        return Stream(pieces, media_type="text/event-stream", headers=headers, status_code=200)

    async def _all(self, request: AnyRequest, done: asyncio.Future[Outcome], first: bytes) -> AsyncIterator[bytes]:
        """Every piece; the GPU seconds, which are known only now, as a comment before the end."""
        piece: bytes | None = first
        while piece is not None and piece != DONE:
            yield piece
            piece = await self._next(done)
        outcome = await asyncio.shield(done)
        if outcome.status != "success":
            yield b"data: " + msgspec.json.encode(_failure(request, outcome)) + b"\n\n"
        yield f": x-gpu-seconds={outcome.gpu_seconds} x-gpu-device={outcome.device}\n\n".encode()
        yield DONE

    async def _next(self, done: asyncio.Future[Outcome]) -> bytes | None:
        """The next piece; None where the job ended without one."""
        while not self._pieces:
            if done.done():
                return None
            self._news.clear()
            await self._news.wait()
        self._room.release()
        return self._pieces.popleft()


def _failure(request: AnyRequest, outcome: Outcome) -> dict[str, Any]:
    error = Refused(outcome.http_status, str(outcome.error_code), outcome.message or "The job failed")
    return openai_error(problem_of(error, request.url.path, str(request_id_of(request)))[0])


@get("/v1/models")
async def openai_models(request: AnyRequest) -> dict[str, Any]:
    """The models that OpenAI's clients can ask for."""
    identify(request)
    names = [name for name, model in gateway_of(request).catalogue.models.items() if model.type == "llm"]
    return {"object": "list", "data": [_model(name) for name in names]}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "render-platform"}


_FOR_CUSTOMERS = Router("/", route_handlers=[chat_completions, completions, embeddings], before_request=customers_only)
OPENAI_ROUTES = Router("/", route_handlers=[_FOR_CUSTOMERS, openai_models])
