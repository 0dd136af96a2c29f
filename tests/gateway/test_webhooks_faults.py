"""Webhooks where many are due at once, and where processes, receivers and the database fail."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from aiohttp import web

from render_platform.errors import Unavailable
from render_platform.gateway.store import Operation
from render_platform.gateway.webhooks import (
    AT_ONCE,
    AT_ONCE_A_CUSTOMER,
    ensure_secret,
)
from render_platform.gateway.writer import Writer
from tests.factories import START_US
from tests.gateway.servers import on_loop
from tests.gateway.test_outbound_http import NAME, Site
from tests.gateway.test_webhooks import answers, check_signature, message_id, until, worlds

# Many at once.


@on_loop
async def test_a_receiver_that_hangs_holds_up_neither_the_others_nor_too_many_slots(tmp_path: Path) -> None:
    held, release = 0, asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        nonlocal held
        held += 1
        await release.wait()
        return web.Response()

    async with Site(hang).open() as slow, worlds(tmp_path, fast := answers(200)) as world:
        world.allowed |= {f"{NAME}:{slow.port}"}
        world.deliveries = world.with_outbound("127.0.0.1")
        stuck = [await world.finish(slow.url(), customer="slow") for _ in range(AT_ONCE + 4)]
        quick = [await world.finish(fast.url(), customer=f"c{n % 3}") for n in range(AT_ONCE * 2)]
        async with world.running():
            await until(lambda: all(world.row(job_id).next_us is None for job_id in quick))
            assert held == AT_ONCE_A_CUSTOMER
            release.set()
            await until(lambda: all(world.row(job_id).next_us is None for job_id in stuck))
        assert (held, len(fast.seen)) == (AT_ONCE + 4, AT_ONCE * 2), "each of them once"


@on_loop
async def test_no_more_than_the_bound_are_under_way(tmp_path: Path) -> None:
    now, most = 0, 0

    async def count(_: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return web.Response()

    async with worlds(tmp_path, site := Site(count)) as world:
        jobs = [await world.finish(site.url(), customer=f"c{n}") for n in range(AT_ONCE * 3)]
        async with world.running():
            await until(lambda: all(world.row(job_id).next_us is None for job_id in jobs))
        assert most == AT_ONCE
        assert len(site.seen) == len(jobs)


# Crashes and faults.

CHILD = """
import asyncio, sys
from pathlib import Path
from tests.gateway.test_webhooks import World

async def deliver():
    world = World(Path(sys.argv[1]), [int(sys.argv[2])], "child")
    await world.deliveries.run()

asyncio.run(deliver())
"""


@on_loop
async def test_a_process_killed_between_the_post_and_its_record_delivers_the_same_message_again(tmp_path: Path) -> None:
    child: subprocess.Popen[bytes] | None = None

    async def kill(_: web.Request) -> web.StreamResponse:
        if child is not None and child.poll() is None:  # the message has arrived; nobody will hear of it
            os.kill(child.pid, signal.SIGKILL)
        return web.Response()

    async with worlds(tmp_path, site := Site(kill)) as world:
        job_id = await world.finish(site.url())
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(site.port)]
        child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        assert await asyncio.to_thread(child.wait, 60) == -signal.SIGKILL
        assert len(site.seen) == 1
        assert (world.row(job_id).attempts, world.row(job_id).next_us) == (0, START_US)
        async with world.running():
            await until(lambda: world.row(job_id).next_us is None)
        assert len(site.seen) == 2
        with world.database.write() as connection:
            secret = ensure_secret(connection, world.ids, "key", "acme")
    assert site.seen[0][1] == site.seen[1][1]
    assert message_id(site.seen[0]) == message_id(site.seen[1]) == f"msg_{job_id}"
    for request, body in site.seen:
        check_signature(secret, request.headers, body)


class Broken:
    """A writer whose database is full."""

    def submit(self, _: Operation) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(Unavailable("the disk is full"))
        return future


@on_loop
async def test_what_cannot_be_recorded_is_not_posted_again_and_again(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        with world.database.write() as connection:
            ensure_secret(connection, world.ids, "key", "acme")
        job_id = await world.finish(site.url())
        good, world.writer = world.writer, cast("Writer[Operation]", Broken())
        world.deliveries = world.with_outbound("127.0.0.1")
        async with world.running():
            await until(lambda: len(site.seen) == 1)
            for _ in range(10):
                await world.move(1)
                await asyncio.sleep(0.01)
        assert len(site.seen) == 1
        assert world.row(job_id).next_us == START_US
        world.writer = good
        world.deliveries = world.with_outbound("127.0.0.1")
        async with world.running():
            await until(lambda: world.row(job_id).next_us is None)


@on_loop
async def test_a_database_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    async with worlds(tmp_path, site := answers(200)) as world:
        job_id = await world.finish(site.url())
        with world.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE webhooks RENAME TO away"))
        async with world.running():
            await world.move(1)
            await asyncio.sleep(0.05)
            with world.database.write() as connection:
                connection.execute(sa.text("ALTER TABLE away RENAME TO webhooks"))
            await world.move(1)
            await until(lambda: world.row(job_id).next_us is None)
