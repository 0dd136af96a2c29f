"""The Triton backend against a real Triton: what is billed is what Triton itself says it computed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.backends import Attempt, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton import TritonBackend
from render_platform.metering import Interval, attribute
from tests.gateway.attempts import busy_ns, make_attempt, make_model
from tests.gateway.servers import TritonServer, free_port, on_loop, start_triton, started, triton_server

__all__ = ["triton_server"]

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def opened(server: TritonServer, *, spans: bool, **settings: Any) -> AsyncIterator[TritonBackend]:
    port = server.spans_port if spans else 0
    values = {"kind": "triton", "name": "gpu", "url": server.url, "spans_port": port, "capacity": 8, **settings}
    backend = TritonBackend(BackendSpec(**values))
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


def work(server: TritonServer, sleep_ms: int = 5, *, served_as: str | None = None, **settings: Any) -> Attempt:
    body = settings.pop("body", {"prompt": "hello", "values": [1, 2, 3], "sleep_ms": sleep_ms})
    model = make_model(inputs=server.inputs, modality="image")
    return make_attempt(served_as or server.model, "text2image", body, model=model, **settings)


async def trace(server: TritonServer, rate: str, level: str) -> None:
    """Set how Triton traces the model, as its operator or a restart may."""
    body = {"trace_rate": rate, "trace_level": [level]}
    url = f"{server.url}/v2/models/{server.model}/trace/setting"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        assert answer.status == 200


async def statistics(server: TritonServer, model: str) -> tuple[int, int]:
    """Triton's own count of requests of a model, and the nanoseconds that they computed."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v2/models/{model}/stats") as answer:
        (found,) = (await answer.json())["model_stats"]
    parts = found["inference_stats"]
    return parts["success"]["count"], sum(parts[f"compute_{part}"]["ns"] for part in ("input", "infer", "output"))


async def growth(server: TritonServer, model: str, backend: TritonBackend, attempts: list[Attempt]) -> list[list[Any]]:
    """Run attempts at once; their spans, checked to add up to what the statistics have grown by."""
    before, before_ns = await statistics(server, model)
    answers = await asyncio.gather(*(backend.run(attempt) for attempt in attempts))
    after, after_ns = await statistics(server, model)
    assert after - before == len(attempts)
    billed_ns = sum(busy_ns(answer.spans) for answer in answers)
    assert billed_ns == pytest.approx(after_ns - before_ns, rel=0.05)
    return [answer.spans or [] for answer in answers]


# What it computes.


@pytest.mark.parametrize("spans", [True, False])
def test_one_after_another_each_is_billed_what_triton_computed(triton_server: TritonServer, spans: bool) -> None:
    @on_loop
    async def story() -> None:
        async with opened(triton_server, spans=spans) as backend:
            for sleep_ms in (1, 20, 50, 5):
                begun_ns = time.time_ns()
                (found,) = await growth(triton_server, "work", backend, [work(triton_server, sleep_ms)])
                ((start, end),) = found
                assert begun_ns <= start < end <= time.time_ns()
                assert end - start >= sleep_ms * 1_000_000

    story()


@on_loop
async def test_eight_at_once_are_billed_from_their_own_spans(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=True) as backend:
        attempts = [work(triton_server, 5 * number, traceparent=TRACE) for number in range(1, 9)]
        found = await growth(triton_server, "work", backend, attempts)
    for number, ((start, end),) in enumerate(found, 1):
        assert end - start >= 5_000_000 * number, "each its own, although the client's trace is the same"
    alone = attribute(Interval("gpu", number, *spans[0]) for number, spans in enumerate(found))
    assert sum(alone.values()) == pytest.approx(sum(busy_ns(spans) for spans in found), rel=0.05), "one after another"


@on_loop
async def test_a_batch_of_eight_shares_one_interval(triton_server: TritonServer) -> None:
    server = triton_server
    async with opened(server, spans=True) as backend:
        attempts = [work(server, 50, served_as=server.batched) for _ in range(8)]
        found = await growth(server, server.batched, backend, attempts)
    shares = attribute(Interval("gpu", number, *spans[0]) for number, spans in enumerate(found))
    whole_ns = sum(busy_ns(spans) for spans in found)
    assert 50_000_000 <= sum(shares.values()) < whole_ns / 2, "not eight times the work"


@on_loop
async def test_statistics_bill_nobody_for_anothers_time(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=False) as backend:
        assert (await backend.run(work(triton_server))).spans is not None
        attempts = [work(triton_server, 10) for _ in range(4)]
        answers = await asyncio.gather(*(backend.run(attempt) for attempt in attempts))
        assert [answer.spans for answer in answers] == [None] * 4, "nobody knows whose time it was"
        later = [(await backend.run(work(triton_server))).spans for _ in range(5)]
        assert any(later), "once all four are counted, nothing is in doubt"

        async with opened(triton_server, spans=False) as stranger:
            theirs = asyncio.create_task(stranger.run(work(triton_server, 100)))
            await asyncio.sleep(0.05)
            mine = await backend.run(work(triton_server, 1))
            await theirs
        assert mine.spans is None, "another gateway's request was counted meanwhile"


@on_loop
async def test_after_a_request_without_an_answer_the_statistics_are_left_alone(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=False) as backend:
        with pytest.raises(BackendFailure) as failure:
            await backend.run(work(triton_server, 300, timeout_s=0.1))
        assert (failure.value.code, failure.value.retriable) == ("backend_timeout", False)
        late = await backend.run(work(triton_server, 1))
    assert late.spans is None, "Triton counts the one that was given up as well, and nobody knows when"


@on_loop
async def test_cancelled_it_returns_at_once_although_triton_goes_on(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=True) as backend:
        run = asyncio.create_task(backend.run(work(triton_server, 400)))
        await asyncio.sleep(0.1)
        run.cancel()
        begun_s = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert time.monotonic() - begun_s < 0.2
        answer = await backend.run(work(triton_server, 1))
    assert busy_ns(answer.spans) < 100_000_000, "the cancelled request's time is not the next one's"


# What it answers.


@on_loop
async def test_fields_become_tensors_and_the_answer_is_tritons_own(triton_server: TritonServer) -> None:
    body = {"prompt": "grüße", "values": [4, 5], "sleep_ms": 0, "model": "ours"}
    async with opened(triton_server, spans=True) as backend:
        attempt = work(triton_server, body=body)
        said = json.loads((await backend.run(attempt)).body)
        outputs = {output["name"]: output["data"] for output in said["outputs"]}
        batched = await backend.run(work(triton_server, body=body, served_as=triton_server.batched))
    assert outputs == {"total": [9], "echo": ["grüße"]}
    assert said["id"] == attempt.attempt_id
    assert json.loads(batched.body)["outputs"][0]["shape"] == [1, 1], "one element of a batch"


@on_loop
async def test_a_kserve_request_goes_on_under_our_id(triton_server: TritonServer) -> None:
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]},
        {"name": "values", "datatype": "INT64", "shape": [3], "data": [1, 2, 3]},
        {"name": "sleep_ms", "datatype": "INT32", "shape": [1], "data": [1]},
    ]
    body = {"id": "the-client's", "inputs": inputs, "outputs": [{"name": "total"}]}
    async with opened(triton_server, spans=True) as backend:
        attempt = work(triton_server, body=body)
        answer = await backend.run(attempt)
    said = json.loads(answer.body)
    assert said["id"] == attempt.attempt_id
    assert [output["name"] for output in said["outputs"]] == ["total"]
    assert answer.spans is not None


@on_loop
async def test_what_the_request_caused_goes_back_and_what_the_model_did_is_an_error(
    triton_server: TritonServer,
) -> None:
    refused = []
    wrong_shape = {"inputs": [{"name": "values", "datatype": "INT64", "shape": [1], "data": [1]}]}
    async with opened(triton_server, spans=True) as backend:
        for body in ({"prompt": "a"}, wrong_shape):
            with pytest.raises(BackendFailure) as failure:
                await backend.run(work(triton_server, body=body))
            refused.append(failure.value)
        with pytest.raises(BackendFailure) as broken:
            await backend.run(work(triton_server, -20))
        with pytest.raises(BackendFailure) as unknown:
            await backend.run(work(triton_server, served_as="nobody/../else"))
    assert [one.refused[0] if one.refused else None for one in refused] == [422, 400]
    assert json.loads(refused[0].refused[1])["field"] == "values" if refused[0].refused else False
    assert (broken.value.code, broken.value.retriable, broken.value.refused) == ("backend_error", True, None)
    assert "model.py" not in broken.value.message
    assert busy_ns(broken.value.spans) >= 20_000_000, "the GPU worked for it all the same"
    assert (unknown.value.code, unknown.value.spans) == ("backend_misconfigured", [])


# How its spans come here.


@on_loop
async def test_a_server_that_traces_some_requests_is_told_to_trace_all(triton_server: TritonServer) -> None:
    await trace(triton_server, "1000", "OFF")
    async with opened(triton_server, spans=True) as backend:
        assert (await backend.run(work(triton_server))).spans is not None
        await trace(triton_server, "1000", "OFF")
        answer = await backend.run(work(triton_server))
        assert answer.spans is None, "missing is missing; the answer stands"
        assert (await backend.run(work(triton_server))).spans is not None


@on_loop
async def test_an_answer_is_not_lost_to_the_wait_for_its_span(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=True) as backend:
        await backend.run(work(triton_server))
        await trace(triton_server, "1", "OFF")
        begun_s = time.monotonic()
        answer = await backend.run(work(triton_server, 50, timeout_s=0.3))
        assert time.monotonic() - begun_s < 0.3
        assert (answer.spans, b"total" in answer.body) == (None, True)
        await trace(triton_server, "1", "TIMESTAMPS")


@on_loop
async def test_a_port_that_is_taken_is_named(triton_server: TritonServer) -> None:
    async with opened(triton_server, spans=True):
        second = TritonBackend(
            BackendSpec(kind="triton", name="two", url=triton_server.url, spans_port=triton_server.spans_port)
        )
        with pytest.raises(UsageError, match="spans_port"):
            await second.start()
        await second.close()


def test_a_server_that_sends_no_spans_is_refused_with_the_remedy(tmp_path: Path) -> None:
    @on_loop
    async def story(server: TritonServer) -> None:
        backend = TritonBackend(BackendSpec(kind="triton", name="gpu", url=server.url, spans_port=free_port()))
        with pytest.raises(UsageError, match=r"mode=opentelemetry.*bsp_schedule_delay"):
            await backend.start()
        await backend.close()

    story(started(lambda folder: start_triton(folder, traced=False)))


@on_loop
async def test_a_server_that_is_not_there_yet_is_unavailable_and_later_metered() -> None:
    backend = TritonBackend(
        BackendSpec(kind="triton", name="gpu", url=f"http://127.0.0.1:{free_port()}", spans_port=free_port())
    )
    with pytest.raises(Unavailable, match="start the server"):
        await backend.start()
    with pytest.raises(BackendFailure) as failure:
        await backend.run(make_attempt("m", "text2image", {}))
    assert (failure.value.code, failure.value.retriable, failure.value.spans) == ("backend_unreachable", True, [])
    await backend.close()
