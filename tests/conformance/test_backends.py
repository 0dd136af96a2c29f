"""What every Backend does. A new implementation is added to BACKENDS and passes, or is not one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from render_platform.gateway.backends import Attempt, Backend, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.openai_backend import OpenAiBackend
from render_platform.gateway.simulated_backend import SimulatedBackend
from render_platform.gateway.triton import TritonBackend
from tests.gateway.attempts import Client, make_attempt, make_model
from tests.gateway.fake_openai import fake_openai
from tests.gateway.servers import LlamaServer, TritonServer, llama_server, on_loop, triton_server

__all__ = ["llama_server", "triton_server"]

CAPACITY = 4
DONE = b"data: [DONE]\n\n"
METERS = ("backend", "simulated", "wall_clock")


@dataclass
class Case:
    """A backend that is started, and attempts of known kinds for it."""

    backend: Backend
    quick: Callable[..., Attempt]
    endless: Callable[..., Attempt]
    wrong: Callable[..., Attempt]
    """What the client got wrong."""
    streams: bool = True


Open = Callable[[], AbstractAsyncContextManager[Case]]


@asynccontextmanager
async def started(backend: Backend) -> AsyncIterator[Backend]:
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def attempts(served_as: str, task: str, body: dict[str, Any], **settings: Any) -> Callable[..., Attempt]:
    return lambda **more: make_attempt(served_as, task, {**body, **more.pop("body", {})}, **{**settings, **more})


def spec(kind: Any, **settings: Any) -> BackendSpec:
    return BackendSpec(kind=kind, name=kind, capacity=CAPACITY, **settings)


def chat(served_as: str, tokens: int = 4, **more: Any) -> Callable[..., Attempt]:
    messages = [{"role": "user", "content": "w1 w2"}]
    return attempts(served_as, "chat", {"messages": messages, "max_tokens": tokens, "ignore_eos": True, **more})


@asynccontextmanager
async def simulated() -> AsyncIterator[Case]:
    async with started(SimulatedBackend(spec("simulated", speed=10.0))) as backend:
        yield Case(backend, chat("m"), chat("m", 30_000), attempts("m", "chat", {"messages": 1}))


@asynccontextmanager
async def pictures() -> AsyncIterator[Case]:
    model = make_model(modality="image")
    async with started(SimulatedBackend(spec("simulated", speed=1_000.0))) as backend:
        yield Case(
            backend,
            attempts("m", "text2image", {"steps": 4}, model=model),
            attempts("m", "text2image", {"steps": 900_000}, model=model),
            attempts("m", "text2image", {"n": 1_000}, model=model),
            streams=False,
        )


@asynccontextmanager
async def openai() -> AsyncIterator[Case]:
    async with fake_openai() as fake, started(OpenAiBackend(spec("openai", url=fake.url))) as backend:
        yield Case(backend, chat("ok"), chat("never"), chat("422"))


def llama(server: LlamaServer) -> Open:
    @asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        async with started(OpenAiBackend(spec("openai", url=server.url))) as backend:
            name = server.model
            yield Case(backend, chat(name), chat(name, 16_000), attempts(name, "chat", {"messages": 1}))

    return case


def triton(server: TritonServer, spans_port: int) -> Open:
    @asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        fields = {"prompt": "a", "values": [1, 2], "sleep_ms": 1}
        model = make_model(inputs=server.inputs)

        def of(**more: Any) -> Callable[..., Attempt]:
            return attempts(server.model, "text2image", {**fields, **more}, model=model)

        async with started(TritonBackend(spec("triton", url=server.url, spans_port=spans_port))) as backend:
            yield Case(backend, of(), of(sleep_ms=1_500), of(values="many"), streams=False)

    return case


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], Open]] = {
    "simulated": lambda request: simulated,
    "simulated pictures": lambda request: pictures,
    "openai": lambda request: openai,
    "llama.cpp": lambda request: llama(request.getfixturevalue("llama_server")),
    "triton with spans": lambda request: triton(
        request.getfixturevalue("triton_server"), request.getfixturevalue("triton_server").spans_port
    ),
    "triton with statistics": lambda request: triton(request.getfixturevalue("triton_server"), 0),
}


@pytest.fixture(params=sorted(BACKENDS))
def open_case(request: pytest.FixtureRequest) -> Open:
    return BACKENDS[request.param](request)


def check_that(open_case: Open, story: Callable[[Case], Awaitable[None]]) -> None:
    @on_loop
    async def run() -> None:
        async with open_case() as case:
            await story(case)

    run()


def test_it_answers_in_json_and_its_spans_lie_inside_the_attempt(open_case: Open) -> None:
    async def story(case: Case) -> None:
        begun_ns = time.time_ns()
        answer = await case.backend.run(case.quick())
        ended_ns = time.time_ns()
        assert answer.content_type == "application/json"
        assert isinstance(json.loads(answer.body), dict)
        for start, end in answer.spans or []:
            assert begun_ns <= start < end <= ended_ns
        assert answer.spans != [], "no figure is None, never nothing"
        assert case.backend.meter in METERS

    check_that(open_case, story)


def test_as_many_as_its_capacity_run_at_once_and_each_gets_its_own_answer(open_case: Open) -> None:
    async def story(case: Case) -> None:
        found = await asyncio.gather(*(case.backend.run(case.quick()) for _ in range(CAPACITY)))
        assert all(json.loads(answer.body) for answer in found)
        await case.backend.check()

    check_that(open_case, story)


def test_a_stream_ends_in_done_which_comes_alone(open_case: Open) -> None:
    async def story(case: Case) -> None:
        client = Client()
        answer = await case.backend.run(case.quick(client=client, body={"stream": True}))
        assert client.chunks[-1] == DONE
        assert b"[DONE]" not in b"".join(client.chunks[:-1])
        assert b'"usage":{' not in client.got.replace(b" ", b""), "nobody asked for it"
        assert client.texts()
        assert answer.body == b""
        assert (answer.usage.output_tokens or 0) > 0
        whole = await case.backend.run(case.quick(body={"stream": True}))
        assert json.loads(whole.body)["choices"][0]["message"]["content"], "nobody listens: it comes whole"

    async def unless_it_cannot(case: Case) -> None:
        if case.streams:
            await story(case)

    check_that(open_case, unless_it_cannot)


def test_cancelled_it_stops_at_once_and_goes_on_working(open_case: Open) -> None:
    async def story(case: Case) -> None:
        run = asyncio.create_task(case.backend.run(case.endless()))
        await asyncio.sleep(0.1)
        begun_s = time.monotonic()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert time.monotonic() - begun_s < 0.2
        assert (await case.backend.run(case.quick())).body

    check_that(open_case, story)


def test_too_late_is_a_failure_of_its_own_that_no_other_attempt_mends(open_case: Open) -> None:
    async def story(case: Case) -> None:
        begun_s = time.monotonic()
        with pytest.raises(BackendFailure) as failure:
            await case.backend.run(case.endless(timeout_s=0.1))
        assert time.monotonic() - begun_s < 1
        assert (failure.value.code, failure.value.retriable) == ("backend_timeout", False)
        assert failure.value.refused is None

    check_that(open_case, story)


def test_what_the_client_got_wrong_goes_back_to_it_and_costs_nothing(open_case: Open) -> None:
    async def story(case: Case) -> None:
        with pytest.raises(BackendFailure) as failure:
            await case.backend.run(case.wrong())
        assert (failure.value.code, failure.value.retriable, failure.value.spans) == ("backend_refused", False, [])
        assert failure.value.refused is not None
        status, body = failure.value.refused
        assert 400 <= status < 500
        assert isinstance(json.loads(body), dict)
        assert (await case.backend.run(case.quick())).body

    check_that(open_case, story)


def test_closing_it_twice_is_harmless(open_case: Open) -> None:
    async def story(case: Case) -> None:
        await case.backend.close()

    check_that(open_case, story)
