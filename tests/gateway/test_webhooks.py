"""Webhooks against a real receiver: signed, tried again on a clock that is moved, given up in the end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web

from render_platform.clock import US_PER_SECOND, ManualClock
from render_platform.database import customers, open_sqlite, usage_events, webhooks
from render_platform.errors import RecordError
from render_platform.gateway.catalogue import ModelSpec
from render_platform.gateway.identity import Customers, Terms
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.outbound import Outbound
from render_platform.gateway.store import Accept, Finish, JobStore, Operation
from render_platform.gateway.webhooks import (
    RETRY_AFTER_S,
    Deliveries,
    ensure_secret,
)
from render_platform.gateway.writer import Writer
from render_platform.outbox import Outbox
from tests.factories import START_US
from tests.gateway.servers import on_loop
from tests.gateway.test_outbound import Names
from tests.gateway.test_outbound_http import NAME, Site
from tests.platforms import SeededIds

MODEL = ModelSpec(
    name="flux-dev", family="flux", modality="image", type="rectified_flow", tasks=["text2image"], backends={"b": "f"}
)


class World:
    """One gateway's database, writer and deliveries; `host` of the receiver's port resolves to loopback."""

    def __init__(self, state: Path, ports: Sequence[int], seed: str = "", answers: str = "127.0.0.1") -> None:
        self.database = open_sqlite(state / "platform.db")
        self.clock, self.ids = ManualClock(START_US), SeededIds(seed)
        self.customers = Customers(self.database)
        store = JobStore(Outbox(self.database, self.ids), self.clock, self.ids, "gw-1", 1 + len(seed))
        self.writer: Writer[Operation] = Writer(self.database, store, asyncio.get_running_loop())
        self.allowed = frozenset(f"{NAME}:{port}" for port in ports)
        self.deliveries = self.with_outbound(answers)
        self.writer.start()

    def with_outbound(self, answers: str) -> Deliveries:
        outbound = Outbound(Names(**{NAME.replace(".", "_"): [[answers]]}), self.allowed)
        parts = self.database, self.writer, outbound, self.customers, self.clock, self.ids
        return Deliveries(*parts, self.allowed)

    async def finish(
        self, url: str, status: str = "success", customer: str = "acme", kept: bool = True, direct: bool = False
    ) -> uuid.UUID:
        """A job with a webhook, from its acceptance to its end."""
        request = Request("key", customer, "standard", MODEL, "text2image", b"{}", webhook=url, direct=direct)
        job = Job(uuid.UUID(bytes=self.ids.random(16)), uuid.uuid4(), request, request.digest(), START_US, START_US + 1)
        await self.writer.submit(Accept(job, running=True))
        at_ns = START_US * 1_000
        code = None if status == "success" else "backend_error"
        outcome = Outcome(status, code, at_ns, at_ns + 2_000_000_000, gpu_time_ns=1_500_000_001, gpu_count=1)
        until_us = START_US + 60 * US_PER_SECOND if kept else None
        assert await self.writer.submit(Finish(job, 1, outcome, until_us)) is not None
        return job.job_id

    def row(self, job_id: uuid.UUID) -> Any:
        with self.database.read() as connection:
            return connection.execute(sa.select(webhooks).filter_by(job_id=job_id.bytes)).one()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.deliveries.run())
        try:
            yield
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def move(self, seconds: float) -> None:
        self.clock.move_to(self.clock.now_us() + int(seconds * US_PER_SECOND))
        self.deliveries.wake()

    async def close(self) -> None:
        await self.writer.stop()
        self.database.close()


async def until(true: Callable[[], bool]) -> None:
    """The test's own time-out ends it where it never comes."""
    while not true():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def worlds(state: Path, site: Site) -> AsyncIterator[World]:
    async with site.open():
        world = World(state, [site.port])
        try:
            yield world
        finally:
            await world.close()


def answers(*statuses: int) -> Site:
    """A receiver that answers these in turn, and the last one from then on."""
    left = list(statuses)

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=left.pop(0) if len(left) > 1 else left[0])

    return Site(answer)


def check_signature(secret: str, headers: Any, body: bytes) -> None:
    """As standardwebhooks.com tells receivers to."""
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    mac = hmac.new(base64.b64decode(secret.split("_", 1)[1]), signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()


@on_loop
async def test_a_webhook_says_how_the_job_ended_and_its_signature_verifies(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(204)) as world:
        world.customers.set(
            "key", "acme", Terms("enterprise"), secret := "whsec_" + base64.b64encode(b"k" * 24).decode()
        )
        async with world.running():
            job_id = await world.finish(site.url("/hook?token=1"))
            world.deliveries.wake()
            await until(lambda: world.row(job_id).next_us is None)
        assert (world.row(job_id).attempts, world.row(job_id).status) == (1, 204)
        ((request, body),) = site.seen
    assert request.path_qs == "/hook?token=1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == f"msg_{job_id}"
    assert request.headers["webhook-timestamp"] == str(START_US // US_PER_SECOND)
    check_signature(secret, request.headers, body)
    assert json.loads(body) == {
        "type": "job.finished",
        "timestamp": "2023-11-16T18:00:00Z",
        "data": {
            "id": str(job_id),
            "state": "success",
            "model": "flux-dev",
            "task": "text2image",
            "gpu_seconds": "1.500000001",
            "gpu_time_ns": 1_500_000_001,
            "error": None,
            "output": f"/jobs/{job_id}/output",
        },
    }


@on_loop
async def test_a_failed_job_says_so_and_what_is_gone_is_left_out(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        job_id = await world.finish(site.url(), "error", kept=False)
        with world.database.write() as connection:
            connection.execute(usage_events.delete())
        async with world.running():
            await until(lambda: world.row(job_id).next_us is None)
        data = json.loads(site.seen[0][1])["data"]
    assert (data["state"], data["error"], data["output"]) == ("error", {"code": "backend_error"}, None)
    assert (data["gpu_seconds"], data["gpu_time_ns"]) == (None, None)


@on_loop
async def test_a_secret_is_made_once_and_is_the_one_that_the_operator_hands_out(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        world.customers.set("key", "other", Terms("enterprise"))
        jobs = [await world.finish(site.url(), customer=name) for name in ("acme", "acme", "other")]
        async with world.running():
            await until(lambda: all(world.row(job_id).next_us is None for job_id in jobs))
        secrets = {}
        for name in ("acme", "other"):
            with world.database.write() as connection:
                secrets[name] = ensure_secret(connection, world.ids, "key", name)
        by_job = {f"msg_{job_id}": name for job_id, name in zip(jobs, ("acme", "acme", "other"), strict=True)}
        for request, body in site.seen:
            check_signature(secrets[by_job[request.headers["webhook-id"]]], request.headers, body)
    assert secrets["acme"] != secrets["other"]
    assert world.customers.terms("key", "other") == Terms("enterprise"), "terms stay"
    assert world.customers.terms("key", "acme") == Terms()


@on_loop
async def test_each_failure_waits_longer_until_it_is_given_up(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(500)) as world:
        job_id = await world.finish(site.url())
        spread = set()
        async with world.running():
            for number, wait_s in enumerate(RETRY_AFTER_S, start=1):
                await until(lambda number=number: world.row(job_id).attempts == number)  # type: ignore[misc]
                wait_us = world.row(job_id).next_us - world.clock.now_us()
                assert wait_s * US_PER_SECOND <= wait_us <= wait_s * US_PER_SECOND * 1.1
                spread.add(wait_us % US_PER_SECOND)
                await world.move(wait_us / US_PER_SECOND - 0.001)
                await asyncio.sleep(0.02)
                assert len(site.seen) == number, "not before its time"
                await world.move(0.001)
            await until(lambda: world.row(job_id).next_us is None)
            row = world.row(job_id)
            await world.move(10**6)
            await asyncio.sleep(0.02)
        assert (row.attempts, row.status) == (9, 500)
        assert len(spread) > 1, "receivers that fail together are not tried again together"
        assert len(site.seen) == 9
    ids, bodies, times = ({f(one) for one in site.seen} for f in (message_id, lambda one: one[1], sent_at))
    assert (len(ids), len(bodies), len(times)) == (1, 1, 9), "the same message, signed anew each time"


def message_id(one: tuple[web.Request, bytes]) -> str:
    return one[0].headers["webhook-id"]


def sent_at(one: tuple[web.Request, bytes]) -> str:
    return one[0].headers["webhook-timestamp"]


@on_loop
async def test_a_receiver_that_comes_back_gets_it_and_its_answers_are_kept(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(302, 429, 201)) as world:
        job_id = await world.finish(site.url())
        async with world.running():
            for number, status in enumerate((302, 429, 201), start=1):
                await until(lambda number=number: world.row(job_id).attempts == number)  # type: ignore[misc]
                assert world.row(job_id).status == status
                await world.move(200)
        assert world.row(job_id).next_us is None
        assert len(site.seen) == 3


@on_loop
async def test_gone_is_the_last_word(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(410)) as world:
        job_id = await world.finish(site.url())
        async with world.running():
            await until(lambda: world.row(job_id).next_us is None)
        assert (world.row(job_id).attempts, world.row(job_id).status) == (1, 410)


@on_loop
async def test_no_answer_is_tried_again_and_keeps_the_last_one(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(503)) as world:
        async with Site().open() as closed:
            port = closed.port
        world.allowed |= {f"{NAME}:{port}"}
        world.deliveries = world.with_outbound("127.0.0.1")
        job_id = await world.finish(f"http://{NAME}:{port}/")
        async with world.running():
            await until(lambda: world.row(job_id).attempts == 1)
            assert world.row(job_id).status is None
            with world.database.write() as connection:
                connection.execute(webhooks.update().values(url=site.url()))
            await world.move(10)
            await until(lambda: world.row(job_id).attempts == 2)
            with world.database.write() as connection:
                connection.execute(webhooks.update().values(url=f"http://{NAME}:{port}/"))
            await world.move(40)
            await until(lambda: world.row(job_id).attempts == 3)
        row = world.row(job_id)
        assert row.status == 503
        assert row.next_us > world.clock.now_us()


@on_loop
async def test_an_address_that_has_become_private_is_given_up_at_once(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        world.allowed = frozenset()
        world.deliveries = world.with_outbound("127.0.0.1")
        jobs = [await world.finish(url) for url in (site.url(), f"http://127.0.0.1:{site.port}/", "gopher://x/")]
        async with world.running():
            await until(lambda: all(world.row(job_id).next_us is None for job_id in jobs))
        assert [(world.row(job_id).attempts, world.row(job_id).status) for job_id in jobs] == [(1, 0)] * 3
        assert site.seen == []


@on_loop
async def test_an_erased_customer_is_told_nothing(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        job_id = await world.finish(site.url())
        with world.database.write() as connection:
            connection.execute(customers.delete())
        async with world.running():
            await until(lambda: world.row(job_id).next_us is None)
        assert world.row(job_id).status == 0
        assert site.seen == []


# What a customer may ask for.


@on_loop
async def test_a_url_is_judged_when_it_is_given(tmp_path: Path) -> None:
    world = World(tmp_path, [9_000])
    world.allowed |= {"127.0.0.1:9000"}
    world.deliveries = world.with_outbound("127.0.0.1")
    for good in ("https://hooks.example/a?b=1", "http://93.184.215.14:8443/", "http://127.0.0.1:9000/x"):
        world.deliveries.check_url(good)
    for bad in (
        "",
        "ftp://hooks.example/",
        "https://user@hooks.example/",
        "https://hooks.example:22/",
        "http://localhost/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/latest",
        "https://hooks.example/\n",
        "https://hooks.example/" + "a" * 2_048,
    ):
        with pytest.raises(RecordError) as caught:
            world.deliveries.check_url(bad)
        assert caught.value.field == "webhook"
    await world.close()
