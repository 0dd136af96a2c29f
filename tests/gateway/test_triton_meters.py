"""Triton's figures, from a stand-in that counts late, and from spans in pieces, as the real one now and then does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from render_platform.gateway.backends import Answer, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton import TritonBackend
from render_platform.gateway.triton_spans import MAX_PENDING, SpanBook, SpanReceiver, fitted
from tests.gateway.attempts import busy_ns, make_attempt
from tests.gateway.servers import free_port, on_loop

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
COMPUTE_NS = 1_000


@dataclass
class FakeTriton:
    """Counts each request `late_by` readings after its answer, and computes COMPUTE_NS for it."""

    url: str = ""
    late_by: int = 0
    readable: bool = True
    status: int = 200
    failed: int = 0
    counted: int = 0
    waiting: list[int] = field(default_factory=list)
    readings: int = 0
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    counts: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: it answers requests, and questions about its statistics."""

    def __post_init__(self) -> None:
        self.answers.set()
        self.counts.set()

    async def infer(self, request: web.Request) -> web.StreamResponse:
        self.waiting += [self.late_by] if self.status == 200 else []
        await self.answers.wait()
        if self.status != 200:
            return web.json_response({"error": "no"}, status=self.status)
        return web.json_response({"outputs": []})

    async def stats(self, request: web.Request) -> web.StreamResponse:
        self.readings += 1
        await self.counts.wait()
        if not self.readable:
            return web.json_response({"error": "no statistics"}, status=400)
        self.counted += sum(not left for left in self.waiting)
        self.waiting = [left - 1 for left in self.waiting if left]
        part = {"count": self.counted, "ns": self.counted * COMPUTE_NS}
        none, failed = {"count": 0, "ns": 0}, {"count": self.failed, "ns": 0}
        inference = {
            "success": part,
            "fail": failed,
            "compute_input": none,
            "compute_infer": part,
            "compute_output": none,
        }
        version = {"execution_count": self.counted, "inference_stats": inference}
        old = {"execution_count": 7, "inference_stats": {name: {"count": 7, "ns": 70} for name in inference}}
        return web.json_response({"model_stats": [old, version]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"inputs": []})


@contextlib.asynccontextmanager
async def fake_triton(**settings: Any) -> AsyncIterator[tuple[FakeTriton, TritonBackend]]:
    fake = FakeTriton(**settings)
    application = web.Application()
    application.router.add_get("/v2/health/ready", fake.model)
    application.router.add_get("/v2/models/{name}", fake.model)
    application.router.add_get("/v2/models/{name}/stats", fake.stats)
    application.router.add_post("/v2/models/{name}/infer", fake.infer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    backend = TritonBackend(BackendSpec(kind="triton", name="gpu", url=fake.url))
    try:
        await backend.start()
        yield fake, backend
    finally:
        await backend.close()
        await runner.cleanup()


async def ask(backend: TritonBackend, **settings: Any) -> Answer:
    return await backend.run(make_attempt("m", "text2image", BODY, **settings))


@on_loop
async def test_one_reading_a_request_is_enough_while_nothing_else_runs() -> None:
    async with fake_triton() as (fake, backend):
        for _ in range(10):
            assert busy_ns((await ask(backend)).spans) == COMPUTE_NS
        assert fake.readings == 11


@on_loop
async def test_a_request_that_is_counted_late_is_waited_for() -> None:
    async with fake_triton(late_by=3) as (_, backend):
        for _ in range(3):
            assert busy_ns((await ask(backend)).spans) == COMPUTE_NS


@on_loop
async def test_a_request_that_is_counted_too_late_is_never_taken_for_the_next_one() -> None:
    async with fake_triton(late_by=8) as (fake, backend):
        assert (await ask(backend)).spans is None
        fake.late_by = 1_000
        assert (await ask(backend)).spans is None, "the first one's count may come in its place"


@on_loop
async def test_a_request_that_begins_before_the_last_one_is_accounted_for_is_not_taken_for_it() -> None:
    async with fake_triton() as (fake, backend):
        assert (await ask(backend)).spans is not None
        readings, fake.late_by = fake.readings, 1_000
        fake.counts.clear()
        first = asyncio.create_task(ask(backend))
        while fake.readings == readings:
            await asyncio.sleep(0.001)
        fake.late_by = 0
        second = asyncio.create_task(ask(backend))
        while len(fake.waiting) < 2:
            await asyncio.sleep(0.001)
        fake.counts.set()
        assert ((await first).spans, (await second).spans) == (None, None), "what was counted is the second one's"


@on_loop
async def test_a_request_that_ends_while_the_totals_are_read_is_not_taken_for_counted() -> None:
    async with fake_triton() as (fake, backend):
        fake.counts.clear()
        first = asyncio.create_task(ask(backend))
        while not fake.readings:
            await asyncio.sleep(0.001)
        fake.late_by = 3
        assert (await ask(backend)).spans is None
        fake.late_by = 0
        fake.counts.set()
        assert (await first).spans is None
        fake.late_by = 1_000
        assert (await ask(backend)).spans is None, "what was counted is the second one's"


@on_loop
async def test_a_request_that_was_given_up_is_not_taken_for_the_next_one() -> None:
    async with fake_triton(late_by=2) as (fake, backend):
        fake.answers.clear()
        with pytest.raises(BackendFailure):
            await ask(backend, timeout_s=0.05)
        fake.answers.set()
        fake.late_by = 1_000
        assert (await ask(backend)).spans is None, "what was counted is the first one's"


@on_loop
async def test_after_requests_that_overlapped_the_next_is_metered_once_all_of_them_are_counted() -> None:
    async with fake_triton() as (fake, backend):
        await ask(backend)
        fake.late_by = 1
        await asyncio.gather(*(ask(backend) for _ in range(4)))
        fake.late_by = 0
        assert (await ask(backend)).spans is None, "one of the four is not counted yet"
        for _ in range(3):
            assert busy_ns((await ask(backend)).spans) == COMPUTE_NS


@on_loop
async def test_a_refused_request_does_not_spoil_the_next_figure() -> None:
    async with fake_triton() as (fake, backend):
        await ask(backend)
        fake.status = 400
        with pytest.raises(BackendFailure):
            await ask(backend)
        fake.status, fake.failed = 200, 1
        assert busy_ns((await ask(backend)).spans) == COMPUTE_NS


@on_loop
async def test_nobody_reads_statistics_while_requests_overlap() -> None:
    async with fake_triton() as (fake, backend):
        found = await asyncio.gather(*(ask(backend) for _ in range(4)))
        assert [answer.spans for answer in found] == [None] * 4
        assert fake.readings == 1


@on_loop
async def test_statistics_that_cannot_be_read_cost_the_figure_and_not_the_answer() -> None:
    async with fake_triton(readable=False) as (_, backend):
        answer = await ask(backend)
        assert (answer.spans, json.loads(answer.body)) == (None, {"outputs": []})


# Spans.


def compute(parent: str, start: int, end: int) -> dict[str, Any]:
    times = {"COMPUTE_START": start, "COMPUTE_INPUT_END": start, "COMPUTE_END": end}
    events = [{"name": name, "timeUnixNano": str(at)} for name, at in times.items()]
    return {"spanId": f"c{start}", "parentSpanId": parent, "name": "compute", "events": events, "kind": 2}


def request(span: str, parent: str, request_id: str, inside: bool = False) -> dict[str, Any]:
    attributes = [
        {"key": "triton.model_name", "value": {"stringValue": "m"}},
        {"key": "triton.trace_parent_id", "value": {"intValue": "17" if inside else "0"}},
        {"key": "triton.request_id", "value": {"stringValue": request_id}},
    ]
    return {"spanId": span, "parentSpanId": parent, "name": "m", "attributes": attributes, "kind": 2}


def export(*spans: dict[str, Any]) -> bytes:
    return json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": spans}]}]}).encode()


ENSEMBLE = [
    compute("a", 10, 20),
    request("a", "top", "mine", inside=True),
    compute("b", 25, 40),
    request("b", "top", "", inside=True),
    compute("other", 1, 99),
    request("other", "http2", "theirs"),
    request("top", "http", "mine"),
    {"spanId": "http", "name": "InferRequest", "events": []},
]


@given(st.lists(st.integers(0, len(ENSEMBLE)), max_size=4))
def test_the_parts_of_an_ensemble_are_its_own_however_the_posts_are_cut(cuts: list[int]) -> None:
    @on_loop
    async def story() -> None:
        book = SpanBook()
        with book.awaiting("mine") as mine, book.awaiting("nobody") as nobody:
            edges = [0, *sorted(cuts), len(ENSEMBLE)]
            for begin, end in itertools.pairwise(edges):
                book.add(export(*ENSEMBLE[begin:end]))
            assert mine.result() == [(10, 20), (25, 40)]
            assert not nobody.done()

    story()


@on_loop
async def test_what_never_gets_a_request_of_its_own_is_not_kept_for_ever() -> None:
    book = SpanBook()
    book.add(export(compute("lost", 1, 2)))
    book.add(export(*(compute(f"p{number}", 1, 2) for number in range(MAX_PENDING))))
    with book.awaiting("a") as late, book.awaiting("b") as kept:
        book.add(export(request("lost", "http", "a"), request("p1", "http", "b")))
        assert (late.result(), kept.result()) == ([], [(1, 2)])


@on_loop
async def test_a_span_that_comes_after_it_was_given_up_harms_nobody() -> None:
    book = SpanBook()
    with book.awaiting("a") as future:
        future.cancel()
        book.add(export(compute("s", 1, 2), request("s", "http", "a")))
    book.add(export(compute("s", 1, 2), request("s", "http", "a")))


@on_loop
async def test_what_is_no_export_is_refused_and_the_receiver_goes_on() -> None:
    book, port = SpanBook(), free_port()
    receiver = SpanReceiver(port, book)
    await receiver.start()
    statuses = []
    posts: list[tuple[bytes, str]] = [
        (b"{", "application/json"),
        (b'{"resourceSpans": 1}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\n\x05hello", "application/x-protobuf"),
        (export(compute("s", 1, 2), request("s", "http", "a")), "application/json"),
    ]
    with book.awaiting("a") as future:
        async with aiohttp.ClientSession() as session:
            for body, kind in posts:
                url, headers = f"http://127.0.0.1:{port}/v1/traces", {"Content-Type": kind}
                async with session.post(url, data=body, headers=headers) as answer:
                    statuses.append(answer.status)
        assert future.result() == [(1, 2)]
    await receiver.close()
    assert statuses == [400, 400, 400, 415, 200]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=4), st.integers(-200, 200))
def test_spans_of_a_clock_that_is_off_keep_their_lengths_inside_the_attempt(
    parts: list[tuple[int, int]], offset: int
) -> None:
    spans = [(1_000 + offset + start, 1_000 + offset + start + length) for start, length in parts]
    found = fitted(spans, 1_000, 1_100)
    lengths = [length for _, length in parts if length]
    if not lengths:
        assert found is None
        return
    assert found is not None
    assert [end - start for start, end in found] == lengths
    assert all(1_000 <= start < end <= 1_100 for start, end in found)


def test_spans_longer_than_the_attempt_are_cut_to_it() -> None:
    assert fitted([(0, 500)], 1_000, 1_100) == [(1_000, 1_100)]
    assert fitted([(0, 10), (400, 500)], 1_000, 1_100) == [(1_000, 1_100)]
    assert fitted([], 1_000, 1_100) is None


@pytest.mark.parametrize("spans", [[(1_020, 1_030)], [(1_000, 1_100)]])
def test_spans_that_lie_inside_are_left_as_they_are(spans: list[tuple[int, int]]) -> None:
    assert fitted(spans, 1_000, 1_100) == spans
