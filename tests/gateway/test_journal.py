"""The journal's process: what it answers is what the store in this process would, and whoever waits is always told."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import __version__
from render_platform.clock import SystemClock, SystemIds, uuid7
from render_platform.database import open_sqlite
from render_platform.errors import RecordError, Unavailable
from render_platform.events import storage_row
from render_platform.gateway import journal
from render_platform.gateway.backends import Usage
from render_platform.gateway.jobs import Acceptance, Job, Outcome, Request, acceptance_of
from render_platform.gateway.journal import Journal, Setup
from render_platform.gateway.journal_messages import Told, operation_of, told_of
from render_platform.gateway.leases import Lease
from render_platform.gateway.problems import Conflict
from render_platform.gateway.store import Accept, Do, Finish, Start
from render_platform.gateway.writer import LastWrite, WriterEnded
from render_platform.note import load_or_create_key
from tests.gateway.engines import backend, model_of, read_sql

MODEL = model_of([backend()])
NOW_US = SystemClock().now_us()


def new_job(**asked: Any) -> Job:
    clock, ids = SystemClock(), SystemIds()
    request = Request("key", asked.pop("customer_id", "alice"), "standard", MODEL, "chat", b'{"a":1}', **asked)
    now_us = clock.now_us()
    return Job(uuid7(now_us, ids), uuid7(now_us, ids), request, request.digest(), now_us, now_us + 60_000_000)


def ended(status: str = "success", **more: Any) -> Outcome:
    now_ns = SystemClock().now_us() * 1_000
    plain = Outcome(status, None, now_ns - 5_000_000, now_ns, gpu_time_ns=4_000_000, gpu_count=1, device="GPU-1")
    return replace(plain, **more)


@dataclass
class Stage:
    journal: Journal
    died: asyncio.Event
    folder: Path
    setup: Setup
    last: LastWrite

    def sql(self, query: str) -> list[Any]:
        return read_sql(Path(self.setup.database), query)

    async def accepted(self, running: bool = True, **asked: Any) -> Job:
        job = new_job(**asked)
        assert await self.journal.submit(Accept(job, running)) is None
        return job

    @property
    def process(self) -> Any:
        return vars(self.journal)["_process"]


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Stage]:
    database = open_sqlite(folder / "platform.db")
    gateway_id, epoch = Lease(database, SystemClock(), SystemIds(), folder / "gateway.id", 30).begin().epoch
    database.close()
    load_or_create_key(folder / "gateway.key", "example.com/gateway")
    setup = Setup(__version__, str(folder / "platform.db"), gateway_id, epoch, "", str(folder / "gateway.key"))
    died = asyncio.Event()
    with (folder / "gateway.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        last = LastWrite()
        made = Journal(setup, lock.fileno(), asyncio.get_running_loop(), died, last)
        await made.start()
    try:
        yield Stage(made, died, folder, setup, last)
    finally:
        await made.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_job_is_accepted_started_and_ended(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            first, job = await stage.accepted(), await stage.accepted(running=False, webhook="https://example.com/x")
            assert (first.seq, job.seq) == (1, 2)
            assert first.customer_ref == job.customer_ref != ""
            key = load_or_create_key(tmp_path / "gateway.key", "").verifier
            said = acceptance_of(job, stage.setup.gateway_id, stage.setup.epoch)
            assert Acceptance.open(job.acceptance, key) == said
            assert [await stage.journal.submit(Start(job, n)) for n in (1, 1, 2)] == [True, False, True]
            assert stage.sql("SELECT body FROM job_bodies ORDER BY job_id") == [(b'{"a":1}',)] * 2
            usage = Usage(3, None, "512x512", 20, 1, 2)
            outcome = ended(usage=usage, body=b"answer", energy_mj=7, meter="nvml")
            event = await stage.journal.submit(Finish(job, 2, outcome, NOW_US + 10**12))
            assert stage.sql("SELECT * FROM usage_events") == [(*storage_row(event).values(), "live", None)]
            assert (event.job_id, event.attempt, event.input_tokens, event.num_steps) == (job.job_id, 2, 3, 20)
            assert stage.sql("SELECT output FROM job_outputs") == [(b"answer",)]
            assert stage.sql("SELECT url FROM webhooks") == [("https://example.com/x",)]
            assert stage.sql("SELECT count(*) FROM job_bodies") == [(1,)]
            assert await stage.journal.submit(Finish(job, 2, outcome)) is None
            assert (stage.journal.operations, stage.journal.groups) == (7, 7)

    run(test)


def test_a_direct_job_keeps_no_body_and_needs_no_acceptance(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            job = await stage.accepted(direct=True)
            assert job.acceptance == ""
            assert stage.sql("SELECT count(*) FROM job_bodies") == [(0,)]

    run(test)


def test_what_is_refused_is_refused_as_in_this_process(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            first = await stage.accepted(idempotency_key="k")
            assert await stage.journal.submit(Accept(new_job(idempotency_key="k"), True)) == first.job_id
            other = new_job(idempotency_key="k", lane="low")
            with pytest.raises(Conflict, match="stands for another request"):
                await stage.journal.submit(Accept(other, True))
            with pytest.raises(RecordError, match=r"^gpu_time_ns: .* outside 0") as caught:
                await stage.journal.submit(Finish(first, 1, ended(gpu_time_ns=10**15)))
            assert caught.value.field == "gpu_time_ns"
            with pytest.raises(RecordError, match="cannot be recorded"):
                await stage.journal.submit(Finish(first, 1, ended(usage=Usage(2**70))))
            with pytest.raises(Unavailable):
                await stage.journal.submit(Do(lambda _: None))
            assert stage.sql("SELECT state FROM jobs") == [("running",)]
            assert await stage.journal.submit(Finish(first, 1, ended())) is not None
            assert not stage.died.is_set()

    run(test)


def test_what_one_turn_asks_for_is_one_transaction_and_a_bad_one_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            asked = [new_job() for _ in range(50)]
            twice = [*asked, asked[0]]
            found = await asyncio.gather(*(stage.journal.submit(Accept(job, True)) for job in asked))
            assert found == [None] * 50
            assert (stage.journal.groups, [job.seq for job in asked]) == (1, list(range(1, 51)))
            more = [new_job() for _ in range(3)]
            futures = [stage.journal.submit(Accept(job, True)) for job in (*more[:2], twice[-1], more[2])]
            results = await asyncio.gather(*futures, return_exceptions=True)
            assert [type(one).__name__ for one in results] == ["NoneType", "NoneType", "Unavailable", "NoneType"]
            assert stage.sql("SELECT count(*), max(seq) FROM jobs") == [(53, 53)]

    run(test)


def test_all_that_waits_is_one_group_however_large(tmp_path: Path) -> None:
    """More than a socket holds, asked for in turns of their own while nothing is written."""

    async def test() -> None:
        async with started(tmp_path) as stage:
            stage.process.send_signal(signal.SIGSTOP)
            futures = []
            for _ in range(200):
                job = new_job()
                job.request = replace(job.request, body=b"x" * 20_000)
                futures.append(stage.journal.submit(Accept(job, False)))
                await asyncio.sleep(0)
            stage.process.send_signal(signal.SIGCONT)
            assert await asyncio.gather(*futures) == [None] * 200
            assert stage.journal.groups <= 12

    run(test)


def test_a_value_of_another_type_is_refused_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            job = await stage.accepted()
            bad: Any = [ended(energy_mj=7.5), ended(device="\ud800")]
            for outcome in bad:
                good = stage.journal.submit(Accept(new_job(), True))
                with pytest.raises(RecordError, match="cannot be recorded"):
                    await stage.journal.submit(Finish(job, 1, outcome))
                assert await good is None
            assert stage.journal.operations == 3
            assert not stage.died.is_set()

    run(test)


def test_a_process_that_is_stuck_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "STOP_S", 0.3)

    async def test() -> None:
        async with started(tmp_path) as stage:
            stage.process.send_signal(signal.SIGSTOP)
            future = stage.journal.submit(Accept(new_job(), True))
            await stage.journal.stop()
            with pytest.raises(WriterEnded):
                await future
            stage.process.kill()

    run(test)


def test_it_imports_what_its_gateway_does_and_nothing_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit(9)")

    async def test() -> None:
        before = Path.cwd()
        os.chdir(tmp_path)
        try:
            async with started(tmp_path) as stage:
                assert (await stage.accepted()).seq == 1
        finally:
            os.chdir(before)

    run(test)


def test_another_version_of_it_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gateway.test_journal.__version__", "0.0.0")

    async def test() -> None:
        with pytest.raises(Unavailable, match="does not start"):
            async with started(tmp_path):
                pass

    run(test)


def test_a_result_that_nobody_waits_for_is_told_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            stage.journal.submit(Accept(new_job(), True), told.set_result).cancel()
            assert await told is None

    run(test)


def test_a_process_that_dies_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            stage.process.send_signal(signal.SIGSTOP)
            waiting = [stage.journal.submit(Accept(new_job(), True)) for _ in range(3)]
            await asyncio.sleep(0)
            stage.process.kill()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(one) for one in found] == [WriterEnded] * 3
            assert stage.died.is_set()
            with pytest.raises(Unavailable, match="has ended"):
                await stage.journal.submit(Accept(new_job(), True))

    run(test)


def test_signals_that_are_for_all_processes_do_not_end_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stage.process.send_signal(number)
            assert (await stage.accepted()).seq == 1

    run(test)


def locked(folder: Path) -> bool:
    with (folder / "gateway.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_it_holds_the_gateways_lock_until_what_was_sent_is_written(tmp_path: Path) -> None:
    """As after `kill -9` of the gateway: the socket is closed, and nobody reads the answer."""

    async def test() -> None:
        async with started(tmp_path) as stage:
            stage.process.send_signal(signal.SIGSTOP)
            future = stage.journal.submit(Accept(new_job(), True))
            stage.journal.hand_over()
            await asyncio.sleep(0.1)
            vars(stage.journal)["_transport"].abort()
            with pytest.raises(Unavailable):
                await future
            assert locked(tmp_path)
            stage.process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(stage.process.wait, 30)
            assert not locked(tmp_path)
            assert stage.sql("SELECT count(*) FROM jobs") == [(1,)]

    run(test)


def test_what_was_submitted_before_the_end_is_written_and_nothing_after(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as stage:
            futures = [stage.journal.submit(Accept(new_job(), True)) for _ in range(5)]
            await stage.journal.stop()
            assert [await future for future in futures] == [None] * 5
            assert stage.process.returncode == 0
            assert not stage.died.is_set()
            with pytest.raises(Unavailable):
                await stage.journal.submit(Accept(new_job(), True))
            assert stage.sql("SELECT count(*) FROM jobs") == [(5,)]

    run(test)


def test_a_process_that_cannot_begin_is_an_error_at_the_start(tmp_path: Path) -> None:
    async def test() -> None:
        setup = Setup(__version__, str(tmp_path / "platform.db"), "gw", 1, "", str(tmp_path / "missing.key"))
        loop = asyncio.get_running_loop()
        made = Journal(setup, os.open(tmp_path, os.O_RDONLY), loop, asyncio.Event(), LastWrite())
        with pytest.raises(Unavailable, match="journal"):
            await made.start()

    run(test)


TEXTS = st.text(max_size=5)
NUMBERS = st.integers(0, 2**63 - 1)


@given(st.data())
def test_every_part_of_an_operation_arrives(data: st.DataObject) -> None:
    request = Request(
        data.draw(TEXTS),
        data.draw(TEXTS),
        data.draw(TEXTS),
        MODEL,
        data.draw(TEXTS),
        data.draw(st.binary(max_size=9)),
        lane=data.draw(TEXTS),
        format=data.draw(st.none() | TEXTS),
        backend=data.draw(st.none() | TEXTS),
        webhook=data.draw(st.none() | TEXTS),
        idempotency_key=data.draw(st.none() | TEXTS),
    )
    ids = [data.draw(st.uuids()) for _ in range(2)]
    job = Job(ids[0], ids[1], request, data.draw(st.binary(max_size=9)), data.draw(NUMBERS), data.draw(NUMBERS))
    job.customer_ref, job.first_started_us = data.draw(TEXTS), data.draw(st.none() | NUMBERS)
    counts = [data.draw(st.none() | NUMBERS) for _ in range(4)]
    usage = Usage(counts[0], counts[1], data.draw(st.none() | TEXTS), counts[2], counts[3], data.draw(NUMBERS))
    outcome = Outcome(data.draw(TEXTS), data.draw(st.none() | TEXTS), data.draw(NUMBERS), data.draw(NUMBERS))
    outcome.gpu_time_ns, outcome.gpu_count = data.draw(NUMBERS), data.draw(NUMBERS)
    outcome.device, outcome.energy_mj = data.draw(st.none() | TEXTS), data.draw(st.none() | NUMBERS)
    outcome.meter, outcome.inference_time_us, outcome.usage = data.draw(TEXTS), data.draw(NUMBERS), usage
    outcome.body, outcome.content_type = data.draw(st.binary(max_size=9)), data.draw(TEXTS)
    for operation in (Accept(job, True), Start(job, 3), Finish(job, 2, outcome, data.draw(NUMBERS))):
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(told_of(operation)), type=Told)
        arrived = operation_of(sent)
        assert type(arrived) is type(operation)
        came = arrived.job
        assert (came.job_id, came.request_id, came.request_digest) == (*ids, job.request_digest)
        assert (came.accepted_us, came.deadline_us) == (job.accepted_us, job.deadline_us)
        assert (came.customer_ref, came.first_started_us) == (job.customer_ref, job.first_started_us)
        for name in ("issuer", "customer_id", "pricing_tier", "task", "lane", "webhook", "direct"):
            assert getattr(came.request, name) == getattr(request, name)
        for name in ("name", "family", "modality", "type"):
            assert getattr(came.request.model, name) == getattr(MODEL, name)
        if isinstance(arrived, Accept):
            for name in ("format", "backend", "idempotency_key", "body"):
                assert getattr(came.request, name) == getattr(request, name)
        if isinstance(arrived, Finish) and isinstance(operation, Finish):
            assert arrived.outcome == operation.outcome
            assert arrived.output_until_us == operation.output_until_us
