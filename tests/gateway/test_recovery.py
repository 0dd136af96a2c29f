"""What a gateway that died left: it is run, or ended visibly, once; and what its clients were told stands."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import US_PER_SECOND
from render_platform.gateway.archive import PAGE, counts
from render_platform.gateway.catalogue import Catalogue, ModelSpec
from render_platform.gateway.fleet import never_ran
from render_platform.gateway.jobs import Job
from render_platform.gateway.store import Accept, Finish, JobStore
from render_platform.gateway.writer import WriterEnded
from render_platform.outbox import Outbox
from tests.gateway.engines import LEASE_S, Rig, backend, check_books, fails, hangs, make_engine, takes
from tests.gateway.virtual_time import S, now_ns, pause, run, until, virtual_loop
from tests.platforms import lose_database


async def recover(rig: Rig, *models: ModelSpec) -> list[Job]:
    """As Gateway.start does it; gives the jobs in the order in which they were found."""
    catalogue = Catalogue(
        backends={name: one.spec for name, one in rig.backends.items()},
        models={model.name: model for model in models or (rig.model,)},
    )
    found = list(rig.archive.unfinished(catalogue, rig.lease.mine()))
    for one in found:
        if one.lost:
            await rig.engine.finish(one.job, never_ran("error", one.lost, "it was lost", 502, now_ns()))
        else:
            rig.engine.enqueue(one.job, again=one.job.attempt > 0)
    return [one.job for one in found]


async def submit_later(rig: Rig, **asked: Any) -> Job:
    """In a millisecond of its own: ids are ordered by it."""
    await asyncio.sleep(0.002)
    return await rig.submit(**asked)


def test_what_was_left_runs_again_or_ends_visibly(tmp_path: Path) -> None:
    async def before() -> list[uuid.UUID]:
        async with make_engine(tmp_path, backend(capacity=3, usual=hangs())) as rig:
            rig.backends["b"].script += [takes(1), hangs(), fails()]
            ended = await rig.submit()
            running, again = await rig.submit(idempotency_key="k"), await submit_later(rig)
            await rig.ended(ended)
            direct = await submit_later(rig, direct=True)
            late = await submit_later(rig, lane="high", webhook="https://a.example/")
            queued = [await submit_later(rig, lane=lane) for lane in ("low", "normal")]
            queued.append(await submit_later(rig, direct=True))
            await pause()
            assert [job.state for job in (running, again, direct, late)] == ["running"] * 3 + ["queued"]
            return [job.job_id for job in (running, again, direct, late, *queued)]

    async def after(left: list[uuid.UUID]) -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            jobs = await recover(rig)
            assert [job.job_id for job in jobs] == left  # in the order of acceptance
            again, new = await rig.engine.submit(rig.request(idempotency_key="k"), rig.new_id())
            assert (again, new) == (jobs[0], False)
            await rig.idle()
            ran = {attempt.attempt_id for attempt in rig.backends["b"].attempts}
            running, retried, direct, late, low, normal, queued = (job.job_id for job in jobs)
            begun = ((running, 2), (retried, 3), (late, 1), (normal, 1), (low, 1))
            assert ran == {f"{job.hex}-{attempt}" for job, attempt in begun}
            lost = rig.sql("SELECT job_id, attempt FROM usage_events WHERE error_code = 'gateway_restarted'")
            assert sorted(lost) == sorted([(direct.bytes, 1), (queued.bytes, 0)])
            assert rig.sql("SELECT job_id FROM webhooks") == [(late.bytes,)]
            assert rig.events("count(*)") == [(8,)]
            check_books(rig)

    left = run(before)
    run(lambda: after(left))


def test_a_job_that_was_begun_too_often_ends(tmp_path: Path) -> None:
    async def crash(_: int) -> None:
        async with make_engine(tmp_path, backend(usual=hangs()), max_attempts=2) as rig:
            if not await recover(rig):
                await rig.submit()
            await pause()

    async def last() -> None:
        async with make_engine(tmp_path, max_attempts=2) as rig:
            (job,) = await recover(rig)
            assert rig.events("job_id, attempt, status, error_code, gpu_time_ns") == [
                (job.job_id.bytes, 2, "error", "gateway_restarted", 0)
            ]
            assert rig.backends["b"].attempts == []
            check_books(rig)

    for n in range(2):
        run(lambda n=n: crash(n))  # type: ignore[misc]
    run(last)


def test_a_model_or_a_backend_that_is_gone_ends_its_jobs(tmp_path: Path) -> None:
    async def before() -> None:
        async with make_engine(tmp_path, backend("b", usual=hangs()), backend("c", usual=hangs())) as rig:
            for asked in ({}, {"backend": "c"}, {"backend": "b"}):
                await rig.submit(**asked)

    async def after(gone: bool) -> None:
        async with make_engine(tmp_path, backend("b")) as rig:
            other = ModelSpec(name="n", family="f", modality="text", type="llm", tasks=["chat"], backends={"b": "n"})
            await recover(rig, other) if gone else await recover(rig)
            await rig.idle()
            check_books(rig)
            assert rig.events("error_code, model_name, model_family") == (
                [("model_withdrawn", "m", "f")] if not gone else [("model_withdrawn", "m", "withdrawn")] * 3
            ) + ([(None, "m", "f")] * 2 if not gone else [])

    for gone in (False, True):
        lose_database(tmp_path)
        run(before)
        run(lambda gone=gone: after(gone))  # type: ignore[misc]


def test_more_than_a_page_is_found_in_order_and_each_once(tmp_path: Path) -> None:
    total = 2 * PAGE + 3

    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=100)) as rig:
            jobs = []
            for _ in range(total):
                request = rig.request()
                now_us, ids = rig.clock.now_us(), (rig.new_id(), rig.new_id())
                job = Job(*ids, request, request.digest(), now_us, now_us + 60 * US_PER_SECOND)
                jobs.append(job)
                virtual_loop().ns += 1_000_000
            await asyncio.gather(*(rig.writer.submit(Accept(job, running=False)) for job in jobs))
            assert counts(rig.database)["queued"] == total
            virtual_loop().ns = 0
            found = await recover(rig)
            assert [job.job_id for job in found] == [job.job_id for job in jobs]
            await rig.idle()
            assert len(rig.backends["b"].attempts) == total
            assert counts(rig.database)["finished"] == total
            check_books(rig)

    run(test)


def test_time_passes_for_jobs_while_no_gateway_runs(tmp_path: Path) -> None:
    async def before() -> None:
        async with make_engine(tmp_path, backend(capacity=1, usual=hangs())) as rig:
            for ttl_s in (100, 100, 3_000):
                await submit_later(rig, ttl_s=ttl_s)

    async def after() -> None:
        virtual_loop().ns = 1_000 * S
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            jobs = await recover(rig)
            await rig.idle()
            assert [(job.state, job.attempt) for job in jobs[1:]] == [("timeout", 0), ("success", 1)]
            assert jobs[0].state == "timeout"
            assert len(rig.backends["b"].attempts) == 1
            assert rig.events("sum(gpu_time_ns)") == [(S,)]
            check_books(rig)

    run(before)
    run(after)


def test_a_worker_of_a_former_epoch_that_wakes_up_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=hangs())) as rig:
            stale = await rig.submit()
            async with make_engine(tmp_path, backend(usual=takes(5))) as successor:
                (job,) = await recover(successor)
                await until(lambda: job.attempt == 2)
                end = never_ran("success", "", "", 200, now_ns())
                with pytest.raises(WriterEnded):
                    await rig.writer.submit(Finish(stale, stale.attempt, end))
                await successor.ended(job)
                assert successor.events("attempt, status") == [(2, "success")]
                check_books(successor)

    run(test)


def test_each_start_is_an_epoch_of_the_same_gateway(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            gateway_id = rig.store.gateway_id
            rig.sql("UPDATE gateways SET fast_path_dropped = 7")
            for epoch in (2, 3):
                assert rig.lease.begin() == ((gateway_id, epoch), 7)
                store = JobStore(Outbox(rig.database, rig.engine.ids), rig.clock, rig.engine.ids, gateway_id, epoch)
                assert store.accepted == 0
            assert rig.sql("SELECT lease_until_us FROM gateways") == [(rig.clock.now_us() + LEASE_S * US_PER_SECOND,)]

    run(test)


def test_outputs_are_kept_for_their_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            job, other = await rig.submit(), await rig.submit(customer_id="bob")
            await rig.ended(job, other)
            await asyncio.sleep(59)
            assert rig.archive.output(job.job_id) == (b'{"ok":1}', "application/json")
            await asyncio.sleep(2)
            assert rig.archive.output(job.job_id) is None
            assert rig.archive.ref_of("key", "alice") == job.customer_ref
            assert rig.archive.ref_of("key", "nobody") is None
            (row,) = rig.archive.jobs_of(job.customer_ref, 10, None)
            assert row == rig.archive.read(job.job_id)
            assert (row["state"], row["gpu_time_ns"]) == ("success", S // 2)
            assert rig.archive.read(uuid.UUID(int=1)) is None

    run(test)


CHILD = """
import random, sys
from pathlib import Path
from tests.gateway.engines import backend, fails, make_engine, takes
from tests.gateway.test_recovery import recover
from tests.gateway.virtual_time import pause, run

rng = random.Random(int(sys.argv[2]))

async def serve():
    async with make_engine(Path(sys.argv[1]), backend(capacity=3)) as rig:
        rig.backends["b"].usual = lambda attempt: rng.choice([takes(0.01), takes(0.05), fails(after_s=0.01)])(attempt)
        await recover(rig)
        while True:
            job = await rig.submit(direct=rng.random() < 0.3, customer_id=f"c{rng.randrange(5)}")
            print(job.job_id, flush=True)
            for _ in range(rng.randrange(3)):
                await pause()

run(serve)
"""


@pytest.mark.parametrize("_n", range(2))
def test_a_gateway_that_is_killed_at_any_instant_loses_nothing(tmp_path: Path, rng: random.Random, _n: int) -> None:
    accepted: list[str] = []
    for _ in range(3):
        child = [sys.executable, "-c", CHILD, str(tmp_path), str(rng.randrange(2**32))]
        with subprocess.Popen(child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            wanted = rng.randrange(1, 120)
            for line in process.stdout:
                accepted.append(line.strip())
                wanted -= 1
                if not wanted:
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL

    async def last() -> None:
        async with make_engine(tmp_path, backend(capacity=3)) as rig:
            standing = {uuid.UUID(bytes=row[0]) for row in rig.sql("SELECT job_id FROM jobs")}
            assert {uuid.UUID(text) for text in accepted} <= standing
            await recover(rig)
            await rig.idle()
            total = rig.sql("SELECT count(*) FROM jobs")[0][0]
            assert total >= len(accepted)
            assert rig.events("count(*)") == [(total,)]
            check_books(rig)

    run(last)
