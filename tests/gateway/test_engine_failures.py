"""What goes wrong around a job: it is cancelled at any instant, its backend fails or hangs, the gateway stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from render_platform.errors import Unavailable
from render_platform.gateway.backends import Answer, BackendFailure
from render_platform.gateway.jobs import Job
from render_platform.gateway.problems import NoBackend
from tests.gateway.engines import (
    Behaviour,
    Rig,
    backend,
    check_books,
    fails,
    gated,
    hangs,
    held_writer,
    make_engine,
    takes,
)
from tests.gateway.virtual_time import S, pause, run, until, virtual_loop


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Cancelling.


@pytest.mark.parametrize("count", range(12))
@pytest.mark.parametrize("first", ["cancel", "answer"])
def test_a_cancel_and_an_answer_cross_in_one_end(tmp_path: Path, count: int, first: str) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            gate = asyncio.Event()
            rig.backends["b"].script.append(gated(gate, takes()))
            job = await rig.submit()
            steps = [lambda: rig.engine.cancel(job, "cancelled_by_client"), gate.set]
            await turns(count if first == "cancel" else 3)
            done = [step() for step in (steps if first == "cancel" else steps[::-1])]
            cancelled = done[0] if first == "cancel" else done[1]
            assert not rig.engine.cancel(job, "client_gone")  # twice
            await rig.ended(job)
            assert job.state == ("cancelled" if cancelled else "success")
            assert not rig.engine.cancel(job, "client_gone")  # too late
            assert rig.events("count(*)") == [(1,)]
            check_books(rig)

    run(test)


def test_a_cancel_comes_too_late_once_the_end_is_on_its_way(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            gate = asyncio.Event()
            rig.backends["b"].script.append(gated(gate, takes()))
            job = await rig.submit()
            with held_writer(rig):
                gate.set()
                await pause()
                assert (job.state, job.outcome) == ("ending", None)
                assert not rig.engine.cancel(job, "cancelled_by_client")
            await rig.ended(job)
            assert rig.events("status, error_code") == [("success", None)]
            check_books(rig)

    run(test)


def test_a_job_cancelled_while_its_start_is_written_does_not_run(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            gate = asyncio.Event()
            rig.backends["b"].script.append(gated(gate, takes()))
            first, second = await rig.submit(), await rig.submit()
            with held_writer(rig):
                gate.set()
                await pause()
                assert second.state == "starting"
                assert rig.engine.cancel(second, "cancelled_by_client")
            await rig.ended(first, second)
            assert len(rig.backends["b"].attempts) == 1
            assert rig.events("status, gpu_time_ns, attempt") == [("success", 0, 1), ("cancelled", 0, 1)]
            check_books(rig)

    run(test)


def test_a_job_cancelled_in_the_queue_costs_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1), ttl_s=100) as rig:
            first, second, third = [await rig.submit() for _ in range(3)]
            assert rig.engine.cancel(second, "cancelled_by_client")
            assert rig.engine.get_queue_position(third) == 0
            await rig.ended(first, second, third)
            await asyncio.sleep(200)  # its timer is gone, too
            assert rig.events("status, gpu_time_ns, gpu_count, attempt")[0] == ("cancelled", 0, 0, 0)
            check_books(rig)

    run(test)


def test_what_a_cancelled_job_used_until_its_backend_stopped_is_metered(tmp_path: Path) -> None:
    async def test() -> None:
        async def closes() -> Answer:
            await asyncio.sleep(2)
            raise asyncio.CancelledError

        async with make_engine(tmp_path, backend(usual=hangs(closes))) as rig:
            job = await rig.submit()
            await asyncio.sleep(5)
            assert rig.engine.cancel(job, "client_gone")
            await rig.ended(job)
            assert rig.events("status, error_code, gpu_time_ns") == [("cancelled", "client_gone", 7 * S)]
            check_books(rig)

    run(test)


async def answers() -> Answer:
    return Answer(b"it came all the same")


async def breaks_off() -> Answer:
    raise BackendFailure("backend_disconnected", "closed", retriable=True)


@pytest.mark.parametrize(("at_end", "status"), [(answers, "success"), (breaks_off, "cancelled")])
def test_a_backend_that_ends_at_the_instant_of_the_cancel(tmp_path: Path, at_end: Any, status: str) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=hangs(at_end))) as rig:
            job = await rig.submit()
            await asyncio.sleep(5)
            assert rig.engine.cancel(job, "client_gone")
            await rig.ended(job)
            assert rig.events("status, gpu_time_ns") == [(status, 5 * S)]
            assert virtual_loop().ns < 5.01 * S  # nothing is tried again
            check_books(rig)

    run(test)


def test_a_job_cancelled_between_two_attempts_ends_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=fails(after_s=1))) as rig:
            job = await rig.submit()
            await until(lambda: job.state == "waiting")
            assert rig.engine.cancel(job, "cancelled_by_client")
            await rig.ended(job)
            assert rig.events("status, error_code, attempt") == [("cancelled", "cancelled_by_client", 1)]
            check_books(rig)

    run(test)


# Trying again.


def test_retriable_failures_are_tried_again_and_only_the_last_attempt_is_billed(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            rig.backends["b"].script += [fails(after_s=3), fails(after_s=2), takes(1)]
            job = await rig.submit()
            await rig.ended(job)
            assert rig.events("status, attempt, gpu_time_ns") == [("success", 3, S)]
            attempts = [f"{job.job_id.hex}-{n}" for n in (1, 2, 3)]
            assert [attempt.attempt_id for attempt in rig.backends["b"].attempts] == attempts
            (_, end1), (begin2, end2), (begin3, _) = rig.backends["b"].busy
            assert 0 <= begin2 - end1 <= 0.101 * S
            assert 0 <= begin3 - end2 <= 0.201 * S
            assert rig.engine.retried == 2
            assert [name for name, _ in job.history] == ["started", *["retry", "queued", "started"] * 2, "complete"]
            check_books(rig)

    run(test)


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [
        (fails(), 3),
        (fails("backend_malformed", retriable=False), 1),
        (fails("backend_refused", retriable=False, refused=(422, b"no")), 1),
        (fails("backend_timeout", retriable=False), 1),
    ],
)
def test_the_last_failure_is_the_jobs_end(tmp_path: Path, failure: Behaviour, attempts: int) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=failure)) as rig:
            outcome = await rig.ask()
            assert len(rig.backends["b"].attempts) == attempts
            assert rig.events("status, error_code, attempt") == [(outcome.status, outcome.error_code, attempts)]
            told = {"backend_refused": (422, b"no"), "backend_timeout": (504, b"")}
            assert (outcome.http_status, outcome.body) == told.get(str(outcome.error_code), (502, b""))
            check_books(rig)

    run(test)


def test_no_attempt_begins_after_the_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=fails(after_s=0.3)), max_attempts=20) as rig:
            jobs = [await rig.submit(ttl_s=2) for _ in range(2)]
            await rig.ended(*jobs)
            assert {job.state for job in jobs} <= {"error", "timeout"}  # an attempt may be cut short by it
            assert virtual_loop().ns <= 2.000_001 * S
            assert all(2 <= job.attempt < 8 for job in jobs)
            check_books(rig)

    run(test)


def test_a_job_that_is_tried_again_stands_before_those_that_came_later(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            rig.backends["b"].script.append(fails())
            jobs = [await rig.submit() for _ in range(3)]
            await rig.idle()
            order = [attempt.attempt_id[:-2] for attempt in rig.backends["b"].attempts]
            assert order == [jobs[n].job_id.hex for n in (0, 1, 0, 2)]
            check_books(rig)

    run(test)


def test_another_backend_takes_over_from_one_that_fails(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend("b", usual=fails()), backend("c"), max_attempts=2) as rig:
            for _ in range(30):
                job = await rig.submit()
                await rig.ended(job)
                assert job.state == "success"
            assert len(rig.backends["b"].attempts) < 30  # its breaker has opened
            check_books(rig)

    run(test)


# The breaker.


async def failed(rig: Rig, count: int, **more: Any) -> list[Job]:
    jobs = [await rig.submit(**more) for _ in range(count)]
    await rig.ended(*jobs)
    return jobs


def test_a_backend_that_fails_is_left_alone_and_tried_again_with_one_job_at_a_time(tmp_path: Path) -> None:
    async def test() -> None:
        one = backend(capacity=10, usual=fails("backend_error", after_s=1))
        async with make_engine(tmp_path, one, max_attempts=1) as rig:
            jobs = [await rig.submit() for _ in range(27)]
            await rig.ended(*jobs[:19])  # ten, and nine that began before the last of these failed
            with pytest.raises(NoBackend) as caught:
                await rig.submit()
            assert caught.value.retry_after_s == 59
            assert rig.sql("SELECT count(*) FROM jobs") == [(27,)]
            await asyncio.sleep(58)
            assert len(one.attempts) == 19
            await rig.ended(jobs[19])  # the probe: it fails, and the next waits for a minute more
            assert round(virtual_loop().ns / S, 2) == 62
            one.usual, one.most = takes(1), 0
            await rig.ended(*jobs[20:24])
            assert (round(virtual_loop().ns / S, 2), one.most) == (62 + 60 + 4, 1)
            await rig.ended(*jobs)
            assert (round(virtual_loop().ns / S, 2), one.most) == (62 + 60 + 6, 2)
            check_books(rig)

    run(test)


def test_a_cancelled_probe_lets_the_next_one_through(tmp_path: Path) -> None:
    async def test() -> None:
        one = backend(capacity=10, usual=fails("backend_error", retriable=False))
        async with make_engine(tmp_path, one) as rig:
            await failed(rig, 10)
            one.script.append(hangs())
            await asyncio.sleep(60)
            probe, waiting = await rig.submit(), await rig.submit()
            one.usual = takes(1)
            await pause()
            assert (probe.state, waiting.state) == ("running", "queued")
            rig.engine.cancel(probe, "cancelled_by_client")
            await rig.ended(probe, waiting)
            assert waiting.state == "success"
            check_books(rig)

    run(test)


def test_a_probe_that_cannot_be_accepted_lets_the_next_one_through(tmp_path: Path) -> None:
    async def test() -> None:
        one = backend(capacity=10, usual=fails("backend_error", retriable=False))
        async with make_engine(tmp_path, one) as rig:
            await failed(rig, 10)
            await asyncio.sleep(60)
            rig.database.faults.append("begin")
            with pytest.raises(Unavailable):
                await rig.submit()
            one.usual = takes(1)
            await rig.ended(await rig.submit())
            assert virtual_loop().ns <= 61.1 * S
            check_books(rig)

    run(test)


@pytest.mark.parametrize(
    ("usual", "ttl_s", "opens"),
    [
        (fails("backend_refused", retriable=False, refused=(400, b"")), None, False),
        (hangs(), 1, False),  # the customer's own wish
        (hangs(), None, True),
        (fails("backend_error", retriable=False, after_s=1), None, True),
    ],
)
def test_what_counts_against_a_backend(tmp_path: Path, usual: Behaviour, ttl_s: int | None, opens: bool) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=20, usual=usual, timeout_s=2)) as rig:
            await failed(rig, 20, ttl_s=ttl_s)
            rig.backends["b"].usual = takes(0)
            if opens:
                with pytest.raises(NoBackend):
                    await rig.submit()
            else:
                await rig.ended(await rig.submit())
            check_books(rig)

    run(test)


# Defects, and the end of the process.


def test_a_defect_in_a_backend_ends_the_job_visibly_and_is_reported(tmp_path: Path) -> None:
    async def broken(_: object) -> Answer:
        raise ValueError("a defect")

    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            rig.backends["b"].script.append(broken)
            jobs = [await rig.submit() for _ in range(2)]
            await rig.ended(*jobs)
            assert [job.state for job in jobs] == ["error", "success"]
            assert rig.events("status, error_code, gpu_time_ns")[0] == ("error", "internal_error", 0)
            assert [repr(error) for error in virtual_loop().errors] == ["ValueError('a defect')"]
            virtual_loop().errors.clear()
            check_books(rig)

    run(test)


def test_draining_waits_for_jobs_that_were_being_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            rig.backends["b"].script += [takes(3), takes(5)]
            first = await rig.submit()
            with held_writer(rig):
                late = asyncio.ensure_future(rig.submit())
                await pause()
                draining = asyncio.ensure_future(rig.engine.drain(10))
                await pause()
            await draining
            assert (first.state, (await late).state) == ("success", "success")
            assert virtual_loop().ns == 5 * S
            check_books(rig)

    run(test)


def test_draining_lets_running_jobs_end_and_leaves_the_others_to_the_next_start(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=4)) as rig:
            rig.backends["b"].script += [takes(3), hangs(), fails(after_s=1)]
            ended, hung, again = [await rig.submit() for _ in range(3)]
            with held_writer(rig):
                late = asyncio.ensure_future(rig.submit())
                await pause()
                draining = asyncio.ensure_future(rig.engine.drain(10))
                await pause()
            accepting = await late
            await draining
            assert virtual_loop().ns // S == 10
            assert [job.state for job in (ended, accepting)] == ["success", "success"]
            states = rig.sql("SELECT state, attempt, count(*) FROM jobs GROUP BY 1, 2 ORDER BY 1")
            assert states == [("running", 1, 2), ("success", 1, 2)]
            assert hung.outcome is again.outcome is None
            check_books(rig)

    run(test)
