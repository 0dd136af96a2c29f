"""What Dagster is told of the gateway's jobs: exact figures, ranges without holes, and no job held up by a failure."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from typing import Any

import pytest
import structlog
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from render_platform.clock import US_PER_SECOND, ManualClock
from render_platform.events import Totals, UsageEvent
from render_platform.gateway.reporter import MAX_MODELS, Reporter, report_metadata
from tests.commands import CHECKOUT
from tests.factories import START_US, make_event

Answer = Callable[[], Awaitable[web.Response]]


class Webserver:
    """Stands for Dagster's: keeps what it is sent and gives the answers that a test has prepared, then good ones."""

    def __init__(self) -> None:
        self.url = ""
        self.arrived: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.answers: list[Answer] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.arrived.put_nowait((request.path, (await request.json())["metadata"]))
        return await self.answers.pop(0)() if self.answers else web.json_response({})

    async def next(self) -> dict[str, Any]:
        path, metadata = await asyncio.wait_for(self.arrived.get(), 10)
        assert path == "/report_asset_materialization/gpu_jobs"
        return metadata


@asynccontextmanager
async def webserver() -> AsyncIterator[Webserver]:
    server, app = Webserver(), web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


def make_reporter(url: str, every_s: int = 3_600) -> Reporter:
    return Reporter(url, ManualClock(START_US), "gw-1", 3, every_s)


def ended(rng: random.Random, after_s: int, gpu_time_ns: int, **more: Any) -> UsageEvent:
    at = START_US + after_s * US_PER_SECOND
    return make_event(rng, recorded_at=at, gpu_time_ns=gpu_time_ns, gpu_count=1, device_uuid="GPU-0", **more)


async def run_and_stop(reporter: Reporter) -> float:
    """Start, and stop at once: what waits is sent in the last attempt. Gives its seconds."""
    task = asyncio.create_task(reporter.run())
    await asyncio.sleep(0)
    return await stop(task)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.01)


async def stop(task: asyncio.Task[None]) -> float:
    begun = time.monotonic()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return time.monotonic() - begun


def test_a_report_says_what_was_counted(rng: random.Random) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            reporter = make_reporter(dagster.url)
            events = [
                ended(rng, 1, 1_500_000_001, model_name="flux", status="success", error_code=None),
                ended(rng, 2, 2, model_name="flux", status="success", error_code=None),
                ended(rng, 3, 7, model_name="flux", status="error", error_code="backend_error"),
                ended(rng, 5, 10**9, model_name="llama", status="success", error_code=None),
            ]
            sums = [event.gpu_time_ns for event in events]
            for event in events:
                reporter.count(event)
            await run_and_stop(reporter)
            said = await dagster.next()
            assert said["jobs"] == 4
            assert Decimal(said["GPU seconds"]) * 10**9 == sum(sums)
            assert [(row["model"], row["status"], row["jobs"]) for row in said["models"]] == [
                ("flux", "error", 1),
                ("flux", "success", 2),
                ("llama", "success", 1),
            ]
            exact = [Decimal(row["GPU seconds"]) * 10**9 for row in said["models"]]
            assert exact == [sums[2], sums[0] + sums[1], sums[3]]
            assert (said["gateway"], said["epoch"], said["report id"]) == ("gw-1", 3, "gw-1/3/1")
            assert (said["from_us"], said["through_us"]) == (START_US, events[-1].recorded_at + 1)
            assert said["recorded"] == "2023-11-16T18:00:00Z to 2023-11-16T18:00:05.000001Z"
            assert (reporter.sent, reporter.failed, reporter.last_error) == (1, 0, "")

    asyncio.run(scenario())


def test_reports_follow_each_other_without_a_hole_and_only_where_there_is_something(rng: random.Random) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            reporter = make_reporter(dagster.url, every_s=1)
            reporter.count(ended(rng, 1, 5))
            task = asyncio.create_task(reporter.run())
            first = await dagster.next()
            await asyncio.sleep(1.2)  # an interval in which nothing ends
            reporter.count(ended(rng, 9, 6))
            second = await dagster.next()
            await until(lambda: reporter.sent == 2)
            await stop(task)
            assert second["from_us"] == first["through_us"]
            assert (first["jobs"], second["jobs"]) == (1, 1)
            assert len({first["report id"], second["report id"]}) == 2
            assert dagster.arrived.empty()

    asyncio.run(scenario())


def test_a_range_that_failed_is_not_sent_again(rng: random.Random) -> None:
    async def refuse() -> web.Response:
        return web.Response(status=503)

    async def scenario() -> None:
        async with webserver() as dagster:
            dagster.answers = [refuse]
            reporter = make_reporter(dagster.url, every_s=1)
            task = asyncio.create_task(reporter.run())
            reporter.count(ended(rng, 1, 5))
            lost = await dagster.next()
            reporter.count(ended(rng, 2, 6))
            arrived = await dagster.next()
            await until(lambda: reporter.sent == 1)
            await stop(task)
            assert (lost["jobs"], arrived["jobs"]) == (1, 1)
            assert arrived["from_us"] == lost["through_us"]
            assert (reporter.sent, reporter.failed, reporter.last_error) == (1, 1, "")

    asyncio.run(scenario())


def test_a_clock_that_was_set_back_leaves_no_event_outside_its_range(rng: random.Random) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            reporter = make_reporter(dagster.url)
            before = ended(rng, -30, 5)
            reporter.count(before)
            await run_and_stop(reporter)
            said = await dagster.next()
            assert said["from_us"] <= before.recorded_at < said["through_us"]
            reporter.count(ended(rng, -30, 5))  # recorded at the same microsecond, the lane's frontier
            await run_and_stop(reporter)
            again = await dagster.next()
            assert again["from_us"] <= before.recorded_at < again["through_us"]

    asyncio.run(scenario())


async def page() -> web.Response:
    return web.Response(text="<!doctype html>", content_type="text/html")


async def said_error() -> web.Response:
    return web.json_response({"error": "Not authorized"})


async def unauthorized() -> web.Response:
    return web.json_response({}, status=401)


async def elsewhere() -> web.Response:
    return web.Response(status=307, headers={"location": "/other"})


async def deep() -> web.Response:
    return web.Response(text="[" * 100_000, content_type="application/json")


async def a_number() -> web.Response:
    return web.json_response(7)


@pytest.mark.parametrize("answer", [page, said_error, unauthorized, elsewhere, deep, a_number])
def test_what_is_not_a_good_answer_is_a_failure(rng: random.Random, answer: Answer) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            dagster.answers = [answer]
            reporter = make_reporter(dagster.url)
            reporter.count(ended(rng, 1, 5))
            await run_and_stop(reporter)
            assert (reporter.sent, reporter.failed) == (0, 1)
            assert "Dagster" in reporter.last_error

    asyncio.run(scenario())


def test_failures_are_said_once_until_it_works_again(rng: random.Random) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            dagster.answers = [page, page, said_error]
            reporter = make_reporter(dagster.url)
            with structlog.testing.capture_logs() as logs:
                for _ in range(5):
                    reporter.count(ended(rng, 1, 5))
                    await run_and_stop(reporter)
            assert (reporter.sent, reporter.failed) == (2, 3)
            assert [log["state"] for log in logs] == ["failing", "arriving"]

    asyncio.run(scenario())


def test_without_dagster_nothing_but_a_count_happens(rng: random.Random) -> None:
    async def scenario() -> None:
        async with webserver() as dagster:
            url = dagster.url
        reporter = make_reporter(url, every_s=1)
        task = asyncio.create_task(reporter.run())
        reporter.count(ended(rng, 1, 5))
        await until(lambda: reporter.failed > 0)
        assert not task.done()
        assert "Dagster does not answer" in reporter.last_error
        assert url.rpartition(":")[2] not in reporter.last_error, "no part of the URL is said"
        await stop(task)

    asyncio.run(scenario())


@pytest.mark.parametrize("in_flight", [False, True])
def test_stopping_takes_a_second_at_most(rng: random.Random, in_flight: bool) -> None:
    released = asyncio.Event()

    async def hang() -> web.Response:
        await released.wait()
        return web.json_response({})

    async def scenario() -> None:
        async with webserver() as dagster:
            dagster.answers = [hang, hang]
            reporter = make_reporter(dagster.url, every_s=1)
            task = asyncio.create_task(reporter.run())
            await asyncio.sleep(0)
            reporter.count(ended(rng, 1, 5))
            if in_flight:
                await dagster.next()
                reporter.count(ended(rng, 2, 6))
            assert await stop(task) < 1.5
            assert (reporter.sent, reporter.failed) == (0, 2 if in_flight else 1)
            assert (await dagster.next())["jobs"] == 1, "the last attempt came"
            released.set()

    asyncio.run(scenario())


def test_proxies_of_the_environment_are_not_used(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)

    async def scenario() -> None:
        async with webserver() as dagster:
            reporter = make_reporter(dagster.url + "/")
            reporter.count(ended(rng, 1, 5))
            await run_and_stop(reporter)
            assert (await dagster.next())["jobs"] == 1

    asyncio.run(scenario())


def test_without_a_url_it_is_off(rng: random.Random) -> None:
    reporter = make_reporter("")
    reporter.count(ended(rng, 1, 5))
    asyncio.run(asyncio.wait_for(reporter.run(), 1))
    assert (reporter.sent, reporter.failed) == (0, 0)


statuses = st.sampled_from(["success", "error"])
figures_of_models = st.dictionaries(
    st.tuples(st.text(min_size=1, max_size=3), statuses),
    st.builds(Totals, st.integers(1, 10**6), st.integers(0, 2**80)),
    max_size=MAX_MODELS,
)


@given(figures=figures_of_models)
def test_seconds_are_exact_whatever_their_number(figures: dict[tuple[str, str], Totals]) -> None:
    said = report_metadata("gw", 0, 1, figures, "id")
    assert said["jobs"] == sum(totals.events for totals in figures.values())
    seconds = {(row["model"], row["status"]): Decimal(row["GPU seconds"]) for row in said["models"]}
    assert {key: value.scaleb(9) for key, value in seconds.items()} == {
        key: totals.gpu_time_ns for key, totals in figures.items()
    }
    assert Decimal(said["GPU seconds"]).scaleb(9) == sum(totals.gpu_time_ns for totals in figures.values())


def test_a_report_is_bounded() -> None:
    figures = {(f"model-{n}", "success"): Totals(1, 1) for n in range(3 * MAX_MODELS)}
    said = report_metadata("gw", 0, 1, figures, "id")
    assert (len(said["models"]), said["jobs"]) == (MAX_MODELS, 3 * MAX_MODELS)


def test_the_code_location_loads_without_an_http_client() -> None:
    script = "import sys, definitions; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, timeout=120).returncode == 0
