"""Random loads: customers that come, cancel and go away; backends that fail, refuse, hang and break; a database that
fails; a stop in the middle, and another start. Whatever happens, every accepted job has one end and one event, no
backend runs more than it may, and the time of a device is charged at most once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from render_platform.errors import Unavailable
from render_platform.gateway.backends import Answer, Attempt
from render_platform.gateway.jobs import Job, Outcome
from render_platform.gateway.problems import NoBackend, QueueFull
from tests.gateway.engines import (
    Behaviour,
    FakeBackend,
    Rig,
    backend,
    check_books,
    fails,
    hangs,
    make_engine,
    reports,
    takes,
)
from tests.gateway.test_recovery import recover
from tests.gateway.virtual_time import S, run, virtual_loop

ENDED = ("success", "error", "timeout", "cancelled")


def make_backends(rng: random.Random) -> list[FakeBackend]:
    """Three; two of them on one device."""
    made = [
        backend("a", rng.randrange(1, 4), device="GPU-0", timeout_s=20),
        backend("b", rng.randrange(1, 4), device="GPU-0", timeout_s=20),
        backend("c", rng.randrange(1, 4), timeout_s=20, gpu_count=2),
    ]
    for one in made:
        one.usual = lambda attempt: behaviour(rng)(attempt)
    return made


def behaviour(rng: random.Random) -> Behaviour:
    seconds = rng.randrange(0, 3 * S) / S
    spans = [(rng.randrange(-S, 2 * S), rng.randrange(4 * S)) for _ in range(rng.randrange(3))]
    return rng.choice(
        [
            *[takes(seconds)] * 8,
            *[reports(seconds, *spans)] * 3,
            *[fails(after_s=seconds)] * 2,
            fails("backend_error", retriable=False, after_s=seconds),
            fails("backend_refused", retriable=False, refused=(400, b"")),
            hangs(),
            hangs(late_answer),
        ]
    )


async def late_answer() -> Answer:
    await asyncio.sleep(0.5)
    return Answer(b"late")


class Load:
    """Clients of one engine. `jobs` were accepted; `told` is what direct clients heard."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.rig, self.rng = rig, rng
        self.jobs: list[Job] = []
        self.told: list[tuple[Job, Outcome]] = []
        self.refused: Counter[str] = Counter()

    async def run(self, clients: int, jobs_each: int) -> None:
        working = [asyncio.ensure_future(self._client(jobs_each)) for _ in range(clients)]
        watching = asyncio.ensure_future(self._watch())
        await asyncio.gather(*working)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    async def _client(self, jobs: int) -> None:
        rng = self.rng
        for n in range(jobs):
            await asyncio.sleep(rng.choice((0, rng.randrange(S) / S)))
            asked: dict[str, Any] = {
                "customer_id": f"c{rng.randrange(4)}",
                "lane": rng.choice(("high", "normal", "low")),
                "direct": rng.random() < 0.4,
                "backend": rng.choice((None, None, None, "a", "c")),
                "ttl_s": rng.choice((None, None, 1, 3, 10)),
                "idempotency_key": None if rng.random() < 0.8 else f"{id(self)}/{n}/{rng.random()}",
            }
            try:
                job = await self.rig.submit(**asked)
            except (QueueFull, NoBackend, Unavailable) as error:
                self.refused[type(error).__name__] += 1
                continue
            self.jobs.append(job)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.randrange(2 * S) / S)
                self.rig.engine.cancel(rng.choice(self.jobs), "cancelled_by_client")
            if job.done is not None and rng.random() < 0.5:
                self.told.append((job, await job.done))

    async def _watch(self) -> None:
        """What holds at any instant."""
        engine = self.rig.engine
        while True:
            await asyncio.sleep(0.05)
            for server in self.rig.servers.values():
                assert self.rig.backends[server.spec.name].running <= server.running <= server.spec.capacity
            for job in self.jobs:
                assert engine.get_queue_position(job) is None or job.state == "queued"
                assert (job.outcome is None) == (job.job_id in engine.jobs) == (job.state not in ENDED)
            queued = sum(job.state == "queued" for job in engine.jobs.values())
            assert sum(len(queue) for queue in engine.waiting().values()) <= queued

    async def check_all_ended(self) -> None:
        rig = self.rig
        await rig.idle()
        assert rig.engine.waiting() == {}
        assert all(job.outcome is not None for job in self.jobs)
        rows = dict(rig.sql("SELECT job_id, state FROM jobs"))
        assert all(rows[job.job_id.bytes] == job.state for job in self.jobs)
        assert all(job.outcome is not None and job.outcome.status == told.status for job, told in self.told)
        assert set(rows.values()) <= set(ENDED)
        check_books(rig)


def check_conservation(rig: Rig, *backends: FakeBackend) -> None:
    """What is charged for a device is at most the time in which anything ran on it; see the ledger's own tests."""
    for device, count in (("GPU-0", 1), ("backend/c", 2)):
        charged = rig.sql("SELECT coalesce(sum(gpu_time_ns), 0) FROM usage_events WHERE device_uuid = ?", device)[0][0]
        sharing = [one for one in backends if device in (one.spec.device, f"backend/{one.spec.name}")]
        spans = sorted(span for one in sharing for span in one.busy)
        covered, until = 0, 0
        for start, end in spans:
            covered += max(0, end - max(start, until))
            until = max(until, end)
        assert 0 < charged <= covered * count


@pytest.mark.parametrize("_n", range(6))
def test_any_load_ends_in_order(tmp_path: Path, rng: random.Random, _n: int) -> None:
    async def test() -> None:
        backends = make_backends(rng)
        async with make_engine(tmp_path, *backends, max_queue=rng.choice((5, 1_000))) as rig:
            load = Load(rig, rng)
            await load.run(clients=12, jobs_each=15)
            await load.check_all_ended()
            assert rig.sql("SELECT count(*) FROM jobs") == [(len(load.jobs),)]
            assert len(rig.told) == len(load.jobs)
            assert len(load.jobs) + load.refused.total() == 12 * 15
            check_conservation(rig, *backends)

    run(test)


@pytest.mark.parametrize("_n", range(4))
def test_any_load_over_a_database_that_fails_now_and_then(tmp_path: Path, rng: random.Random, _n: int) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, *make_backends(rng)) as rig:
            rig.database.faults += [rng.choice((None, None, None, "begin", "lost", "kept")) for _ in range(2_000)]
            load = Load(rig, rng)
            await load.run(clients=12, jobs_each=15)
            await load.check_all_ended()
            assert rig.sql("SELECT count(*) FROM jobs") == [(len(load.jobs),)]  # a client that was refused has no job
            assert len(rig.told) == len(load.jobs)

    run(test)


@pytest.mark.parametrize("_n", range(4))
def test_any_load_that_is_stopped_goes_on_at_the_next_start(tmp_path: Path, rng: random.Random, _n: int) -> None:
    async def first() -> tuple[list[Job], int]:
        async with make_engine(tmp_path, *make_backends(rng)) as rig:
            load = Load(rig, rng)
            loading = asyncio.ensure_future(load.run(clients=12, jobs_each=15))
            await asyncio.sleep(rng.randrange(1, 20))
            await rig.engine.drain(rng.choice((0, 1, 5)))
            loading.cancel()
            return load.jobs, virtual_loop().ns

    async def second(before: list[Job], ns: int) -> None:
        virtual_loop().ns = ns + rng.randrange(20 * S)
        async with make_engine(tmp_path, *make_backends(rng)) as rig:
            await recover(rig)
            load = Load(rig, rng)
            await load.run(clients=3, jobs_each=5)
            await load.check_all_ended()
            ended: dict[bytes, str] = dict(rig.sql("SELECT job_id, state FROM jobs"))
            assert all(job.outcome is None or ended[job.job_id.bytes] == job.state for job in before)
            assert {job.job_id.bytes for job in before} <= ended.keys()

    left, ns = run(first)
    run(lambda: second(left, ns))


def test_attempts_have_ids_of_their_own(tmp_path: Path, rng: random.Random) -> None:
    seen: list[Attempt] = []

    async def test() -> None:
        backends = make_backends(rng)
        async with make_engine(tmp_path, *backends) as rig:
            await Load(rig, rng).run(clients=5, jobs_each=10)
            await rig.idle()
            seen.extend(attempt for one in backends for attempt in one.attempts)

    run(test)
    assert len({attempt.attempt_id for attempt in seen}) == len(seen) > 0
