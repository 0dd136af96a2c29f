"""A job's way through the engine: accepted durably, queued, run in its slot, ended once, metered exactly."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from render_platform.events import UsageEvent
from render_platform.gateway.backends import Answer, Usage
from render_platform.gateway.jobs import MAX_HELD_BYTES, Job
from render_platform.gateway.problems import Conflict, Draining, QueueFull
from tests.gateway.engines import backend, check_books, gated, hangs, make_engine, reports, takes
from tests.gateway.virtual_time import S, pause, run, until, virtual_loop


def test_a_job_is_durable_when_submit_returns_and_not_before(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            submitting = asyncio.ensure_future(rig.submit(idempotency_key="k"))
            await asyncio.sleep(0)
            assert not rig.engine.jobs
            job = await submitting
            row = rig.sql("SELECT job_id, gateway_id, epoch, seq, state, attempt, request_digest FROM jobs")
            gateway = rig.store.gateway_id
            assert row == [(job.job_id.bytes, gateway, 1, 1, "running", 1, job.request.digest())]
            assert rig.sql("SELECT body FROM job_bodies") == [(job.request.body,)]
            assert rig.sql("SELECT job_id FROM idempotency_keys") == [(job.job_id.bytes,)]
            assert (job.seq, rig.store.accepted) == (1, 1)
            assert rig.sql("SELECT customer_ref FROM jobs") == [(job.customer_ref,)]
            await rig.idle()
            check_books(rig)

    run(test)


def test_an_end_and_its_event_say_what_was_done(tmp_path: Path) -> None:
    async def test() -> None:
        usage = Usage(input_tokens=3, output_tokens=0, num_steps=None, batch_size=2)
        async with make_engine(tmp_path, backend(device="GPU-0", gpu_count=2)) as rig:
            rig.backends["b"].script += [takes(2, usage=usage), takes(3)]
            rig.backends["b"].script.append(takes(1, b"done"))
            first, second, third = [await rig.submit() for _ in range(3)]
            await rig.ended(first, second, third)
            event = {e.job_id: e for _, e in rig.told}[first.job_id]
            assert (event.input_tokens, event.output_tokens, event.num_steps, event.batch_size) == (3, 0, None, 2)
            assert (event.gpu_time_ns, event.gpu_count, event.device_uuid) == (2 * S // 2 * 2, 2, "GPU-0")
            assert (event.status, event.error_code, event.meter) == ("success", None, "wall_clock")
            assert (event.inference_time_us, event.queue_time_us, event.total_time_us) == (2_000_000, 0, 2_000_000)
            waited = {e.job_id: e for _, e in rig.told}[third.job_id]
            assert waited.queue_time_us == 2_000_000
            assert rig.archive.output(third.job_id) == (b"done", "application/json")
            assert third.outcome is not None
            assert third.outcome.body == b""  # memory keeps no outputs
            assert [name for name, _ in third.history] == ["queued", "started", "complete"]
            check_books(rig)

    run(test)


def test_a_full_house_makes_jobs_wait_and_a_full_queue_refuses(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1), max_queue=2) as rig:
            running, *waiting = [await rig.submit() for _ in range(3)]
            assert [job.state for job in (running, *waiting)] == ["running", "queued", "queued"]
            assert [rig.engine.get_queue_position(job) for job in (running, *waiting)] == [None, 0, 1]
            with pytest.raises(QueueFull):
                await rig.submit()
            assert rig.sql("SELECT count(*) FROM jobs") == [(3,)]
            position = rig.engine.get_queue_position(waiting[1])
            assert rig.engine.eta_us(waiting[1], position) is None  # no job has run yet
            await rig.ended(running)
            assert rig.engine.eta_us(waiting[1], rig.engine.get_queue_position(waiting[1])) == 1_000_000
            await rig.submit()
            await rig.idle()
            assert rig.sql("SELECT DISTINCT state FROM jobs") == [("success",)]
            check_books(rig)

    run(test)


def test_jobs_being_accepted_count_against_the_queue(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, max_queue=5) as rig:
            asked = await asyncio.gather(*(rig.submit() for _ in range(9)), return_exceptions=True)
            assert Counter(type(one).__name__ for one in asked) == {"Job": 5, "QueueFull": 4}
            await rig.idle()
            check_books(rig)

    run(test)


def test_requests_that_fill_the_memory_of_waiting_jobs_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            job = await rig.submit()
            held, rig.engine.jobs.held_bytes = rig.engine.jobs.held_bytes, MAX_HELD_BYTES
            assert held == len(job.request.body) > 0
            with pytest.raises(QueueFull, match="memory"):
                await rig.submit()
            rig.engine.jobs.held_bytes = held
            await rig.idle()
            assert rig.engine.jobs.held_bytes == 0

    run(test)


def test_many_at_once_share_commits_and_have_contiguous_numbers(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=200)) as rig:
            jobs = await asyncio.gather(*(rig.submit(customer_id=f"c{n % 7}") for n in range(200)))
            assert sorted(job.seq for job in jobs) == list(range(1, 201))
            await rig.ended(*jobs)
            assert rig.writer.operations == 400
            assert rig.writer.groups < 40
            check_books(rig)

    run(test)


def test_the_same_key_stands_for_the_same_job(tmp_path: Path) -> None:
    async def test() -> uuid.UUID:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            request = rig.request(idempotency_key="k")
            submitting = (rig.engine.submit(request, rig.new_id()) for _ in range(2))  # in one group
            (job, new), again = await asyncio.gather(*submitting)
            assert isinstance(job, Job)
            assert (new, again) == (True, (job, False))
            assert await rig.engine.submit(request, rig.new_id()) == (job, False)
            with pytest.raises(Conflict) as caught:
                await rig.submit(idempotency_key="k", body=b"{}")
            assert caught.value.status == 422
            await rig.submit(idempotency_key="k", customer_id="bob", body=b"{}")
            await rig.idle()
            assert await rig.engine.submit(request, rig.new_id()) == (job, False)  # ended, and remembered
            assert rig.servers["b"].running == 0
            assert rig.sql("SELECT seq FROM jobs ORDER BY 1") == [(1,), (2,)]
            check_books(rig)
            return job.job_id

    async def other_process(job_id: uuid.UUID) -> None:
        async with make_engine(tmp_path) as rig:
            request = rig.request(idempotency_key="k")
            assert await rig.engine.submit(request, rig.new_id()) == (job_id, False)
            with pytest.raises(Conflict):
                await rig.submit(idempotency_key="k", body=b"{}")
            job = await rig.submit()
            assert (rig.store.epoch, job.seq) == (2, 1)
            await rig.idle()
            check_books(rig)

    first = run(test)
    run(lambda: other_process(first))


def test_a_job_expires_in_the_queue_when_its_time_is_up_and_not_sooner(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1), ttl_s=50) as rig:
            rig.backends["b"].script.append(takes(40))
            running = await rig.submit()
            short, capped, long = [await rig.submit(ttl_s=ttl) for ttl in (30, 999, 45)]
            assert capped.deadline_us == capped.accepted_us + 50_000_000
            await asyncio.sleep(29.99)
            assert short.outcome is None
            await asyncio.sleep(0.02)
            assert short.outcome is not None
            assert (short.outcome.status, short.outcome.error_code, short.outcome.http_status) == (
                "timeout",
                "expired",
                504,
            )
            await rig.ended(running, long, capped)
            assert [job.state for job in (long, capped)] == ["success", "success"]
            assert rig.events("status, gpu_time_ns, gpu_count")[0] == ("timeout", 0, 0)
            check_books(rig)

    run(test)


def test_an_attempt_has_what_is_left_of_the_deadline_and_at_most_the_backends_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1, timeout_s=60)) as rig:
            rig.backends["b"].usual = takes(40)
            jobs = [await rig.submit(ttl_s=100) for _ in range(3)]
            await rig.ended(*jobs)
            assert [attempt.timeout_s for attempt in rig.backends["b"].attempts] == [60, 60, 20]
            assert [job.state for job in jobs] == ["success", "success", "timeout"]
            assert rig.events("status, error_code, gpu_time_ns")[2] == ("timeout", "backend_timeout", 20 * S)
            check_books(rig)

    run(test)


def test_expiry_and_a_free_slot_at_the_same_instant_give_one_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            for n in range(6):  # the slot becomes free just before, at, and just after the other's time
                rig.backends["b"].script.append(takes(10 + (n - 3) / 1_000_000))
                first, second = await rig.submit(), await rig.submit(ttl_s=10)
                await rig.ended(first, second)
                assert (first.state, second.state) == ("success", "timeout")
            spans = sum(end - start for start, end in rig.backends["b"].busy)
            assert rig.events("count(*), sum(gpu_time_ns)") == [(12, spans)]
            check_books(rig)

    run(test)


def test_a_client_that_goes_away_while_its_job_is_accepted_has_cancelled_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1, usual=takes(500))) as rig:
            asking = [asyncio.ensure_future(rig.ask()) for _ in range(3)]
            queueing = asyncio.ensure_future(rig.submit())
            await asyncio.sleep(0)
            for one in (*asking, queueing):
                one.cancel()
            await asyncio.wait([*asking, queueing])
            await until(lambda: rig.store.accepted == 4)
            await pause()
            await rig.idle()
            found = Counter(rig.sql("SELECT direct, state, error_code FROM jobs"))
            assert found == {(1, "cancelled", "client_gone"): 3, (0, "success", None): 1}
            assert len(rig.backends["b"].attempts) == 1  # nobody waits for the others
            check_books(rig)

    run(test)


def test_draining_accepts_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            await rig.engine.drain(1)
            with pytest.raises(Draining):
                await rig.submit()

    run(test)


# Metering.


@pytest.mark.parametrize("_n", range(4))
def test_jobs_on_one_device_add_up_to_its_busy_time_exactly(tmp_path: Path, rng: random.Random, _n: int) -> None:
    async def test() -> None:
        usual = [backend(name, 5, device="GPU-0") for name in ("b", "c")]
        async with make_engine(tmp_path, *usual) as rig:
            for one in usual:
                one.usual = lambda attempt: takes(rng.randrange(1, 5 * S) / S)(attempt)
            jobs = []
            for _ in range(60):
                jobs.append(await rig.submit())
                await asyncio.sleep(rng.choice((0, 0, rng.randrange(S) / S, 20 * (rng.random() < 0.1))))
                if rng.random() < 0.2:
                    rig.engine.cancel(rng.choice(jobs), "cancelled_by_client")
            await rig.idle()
            spans = sorted(span for one in usual for span in one.busy)
            assert rig.events("sum(gpu_time_ns)") == [(union_ns(spans),)]
            check_books(rig)

    run(test)


def union_ns(spans: list[tuple[int, int]]) -> int:
    """By marking each elementary interval between two boundaries."""
    edges = sorted({edge for span in spans for edge in span})
    pairs = itertools.pairwise(edges)
    return sum(b - a for a, b in pairs if any(start <= a and b <= end for start, end in spans))


def test_spans_are_clipped_to_the_attempt_and_united(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(device="GPU-0")) as rig:
            for spans in ([(-5 * S, S), (2 * S, 99 * S)], [(S, 2 * S), (S, 2 * S)], [], [(2 * S, S)]):
                rig.backends["b"].script.append(reports(3, *spans))
                await rig.ended(await rig.submit())
            found = rig.events("gpu_time_ns, event_time - gpu_started_at, meter")
            assert found == [(2 * S, 3_000_000, "backend"), (S, 1_000_000, "backend")] + [(0, 0, "backend")] * 2
            check_books(rig)

    run(test)


@pytest.mark.parametrize(
    ("meter", "usage"),
    [("guess", Usage()), ("backend", Usage(input_tokens=-1)), ("backend", Usage(input_dims="a lot"))],
)
def test_usage_that_cannot_be_billed_ends_the_job_visibly(tmp_path: Path, meter: str, usage: Usage) -> None:
    async def test() -> None:
        async def answer(attempt: Any) -> Answer:
            await asyncio.sleep(1)
            return Answer(b"{}", usage=usage, spans=[(0, 2**62)])

        async with make_engine(tmp_path, backend(usual=answer)) as rig:
            rig.backends["b"].meter = meter
            job = await rig.submit()
            await rig.ended(job)
            assert rig.events("status, error_code, gpu_time_ns") == [("error", "usage_refused", 0)]
            assert rig.archive.output(job.job_id) is None
            check_books(rig)

    run(test)


# Taking turns.


def test_models_that_share_a_backend_take_turns_and_a_pinned_job_waits_for_its_own(tmp_path: Path) -> None:
    async def test() -> None:
        one, two = backend("b", 1), backend("c", 1)
        async with make_engine(tmp_path, one, two) as rig:
            gate = asyncio.Event()
            one.script.append(gated(gate, takes(1)))
            blocking = await rig.submit(backend="b")
            pinned = [await rig.submit(backend="b") for _ in range(2)]
            free = await rig.submit()
            await pause()
            assert two.attempts[0].attempt_id == f"{free.job_id.hex}-1"
            waiting = await rig.submit()
            await rig.ended(free, waiting)
            assert [job.state for job in pinned] == ["queued", "queued"]
            gate.set()
            await rig.ended(blocking, *pinned)
            assert len(one.attempts) == 3
            check_books(rig)

    run(test)


def test_what_is_told_after_the_end_is_the_committed_event(tmp_path: Path) -> None:
    async def test() -> list[UsageEvent]:
        async with make_engine(tmp_path) as rig:
            outcome = await rig.ask()
            assert (outcome.status, outcome.body) == ("success", b'{"ok":1}')
            assert rig.engine.jobs == {}
            assert rig.sql("SELECT count(*) FROM job_bodies") == [(0,)]
            assert rig.sql("SELECT count(*) FROM job_outputs") == [(0,)]  # nobody asks for it again
            await rig.ask(idempotency_key="k")
            assert rig.sql("SELECT output FROM job_outputs") == [(b'{"ok":1}',)]
            assert rig.events("event_id") == [(event.event_id.bytes,) for _, event in rig.told]
            check_books(rig)
            return [event for _, event in rig.told]

    assert len(run(test)) == 2


def test_a_slow_backend_holds_up_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend("b", 1, hangs()), backend("c", 1)) as rig:
            slow = await rig.submit(backend="b")
            others = [await rig.submit(backend="c") for _ in range(5)]
            await rig.ended(*others)
            assert virtual_loop().ns == 5 * S
            rig.engine.cancel(slow, "cancelled_by_client")
            await pause()
            await rig.ended(slow)
            check_books(rig)

    run(test)
