"""The job store: contiguous numbers, one job a key, one end with its one event, all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.clock import ManualClock, uuid7
from render_platform.database import Database, metadata
from render_platform.errors import PlatformError, RecordError, Unavailable
from render_platform.events import UsageEvent
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.leases import Lease
from render_platform.gateway.problems import Conflict
from render_platform.gateway.store import Accept, Finish, JobStore, Operation, Start
from render_platform.outbox import Outbox, forget_customer
from tests.factories import START_US
from tests.gateway.engines import (
    backend,
    check_books,
    gated,
    hangs,
    held_writer,
    make_engine,
    model_of,
    read_sql,
    takes,
)
from tests.gateway.virtual_time import pause, run
from tests.platforms import SeededIds, open_database_of

MODEL = model_of([backend()])


class FailingOutbox(Outbox):
    """Inserts its events, and then fails, as often as it has errors."""

    errors: list[PlatformError]

    def record(self, connection: sa.Connection, lane: str, events: Sequence[UsageEvent]) -> list[UsageEvent]:
        recorded = super().record(connection, lane, events)
        if self.errors:
            raise self.errors.pop()
        return recorded


@dataclass
class Books:
    """A store and its database, written in transactions of the test's."""

    path: Path
    database: Database
    outbox: FailingOutbox
    clock: ManualClock
    ids: SeededIds
    store: JobStore

    def apply(self, *operations: Operation) -> list[Any]:
        with self.database.write() as connection:
            results = self.store.apply(connection, operations)
        self.store.committed()
        return results

    def job(self, **asked: Any) -> Job:
        request = Request("key", asked.pop("customer_id", "alice"), "standard", MODEL, "chat", b"{}", **asked)
        now_us = self.clock.now_us()
        deadline_us = now_us + 60_000_000
        ids = uuid7(now_us, self.ids), uuid7(now_us, self.ids)
        return Job(*ids, request, request.digest(), now_us, deadline_us)

    def accepted(self, running: bool = True, **asked: Any) -> Job:
        job = self.job(**asked)
        assert self.apply(Accept(job, running)) == [None]
        return job

    def sql(self, query: str) -> list[Any]:
        return read_sql(self.path, query)

    def dump(self) -> dict[str, list[Any]]:
        return {table: self.sql(f"SELECT * FROM {table} ORDER BY 1") for table in metadata.tables}


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    path, ids, clock = tmp_path / "platform.db", SeededIds(1), ManualClock(START_US)
    database = open_database_of(tmp_path)
    gateway_id, epoch = Lease(database, clock, ids, tmp_path / "gateway.id", 30).begin().epoch
    outbox = FailingOutbox(database, ids)
    outbox.errors = []
    yield Books(path, database, outbox, clock, ids, JobStore(outbox, clock, ids, gateway_id, epoch))
    database.close()


def outcome(status: str = "success", **more: Any) -> Outcome:
    code = None if status == "success" else "backend_error"
    started = (START_US - 5) * 1_000
    return Outcome(status, code, started, started + 5_000, **{"gpu_time_ns": 4_000, "gpu_count": 1, **more})


# Accepting.


def test_only_what_is_accepted_takes_a_number(books: Books) -> None:
    same = books.job(idempotency_key="k")
    asked = [same, books.job(idempotency_key="k"), books.job(idempotency_key="k", lane="low"), books.job()]
    first, again, other, plain = books.apply(*(Accept(job, running=False) for job in asked))
    assert (first, again, plain) == (None, same.job_id, None)
    assert isinstance(other, Conflict)
    assert [job.seq for job in asked] == [1, 0, 0, 2]
    assert books.sql("SELECT seq, job_id FROM jobs ORDER BY seq") == [
        (1, same.job_id.bytes),
        (2, asked[3].job_id.bytes),
    ]
    assert books.store.accepted == 2


def test_a_customer_who_was_erased_meanwhile_gets_a_new_reference(books: Books) -> None:
    job = books.accepted()
    books.apply(Finish(job, 1, outcome()))
    with books.database.write() as connection:
        forget_customer(connection, "key", "alice", job.customer_ref)
    later = books.accepted()
    assert later.customer_ref != job.customer_ref
    assert books.sql("SELECT customer_ref FROM customers") == [(later.customer_ref,)]


def test_a_group_that_was_undone_takes_no_numbers(books: Books) -> None:
    books.accepted()
    job, twin = books.job(), books.job()
    twin.job_id = job.job_id
    with pytest.raises(sa.exc.IntegrityError):
        books.apply(*(Accept(one, running=True) for one in (books.job(customer_id="bob"), job, twin)))
    assert (books.store.accepted, job.seq, job.customer_ref) == (1, 0, "")
    assert [books.accepted(customer_id="bob").seq, books.accepted(customer_id="bob").seq] == [2, 3]
    assert books.sql("SELECT count(DISTINCT customer_ref) FROM jobs") == [(2,)]
    assert books.sql("SELECT customer_id FROM customers ORDER BY 1") == [("alice",), ("bob",)]


def test_a_new_epoch_counts_anew_and_knows_its_customers(books: Books) -> None:
    first = books.accepted(idempotency_key="k")
    name_file = books.path.with_name("gateway.id")
    gateway_id, epoch = Lease(books.database, books.clock, books.ids, name_file, 30).begin().epoch
    assert (gateway_id, epoch) == (books.store.gateway_id, 2)
    books.store = JobStore(books.outbox, books.clock, books.ids, gateway_id, epoch)
    assert books.apply(Accept(books.job(idempotency_key="k"), running=True)) == [first.job_id]
    second = books.accepted()
    assert (second.seq, second.customer_ref) == (1, first.customer_ref)


def test_keys_belong_to_customers(books: Books) -> None:
    jobs = [books.accepted(idempotency_key="k", customer_id=name) for name in ("alice", "bob")]
    assert [job.seq for job in jobs] == [1, 2]
    assert books.sql("SELECT count(*), count(DISTINCT customer_ref) FROM idempotency_keys") == [(2, 2)]


@pytest.mark.parametrize(
    "change",
    [{"lane": "low"}, {"format": "png"}, {"backend": "b"}, {"ttl_s": 5}, {"webhook": "https://a.example/"}],
)
def test_all_that_decides_what_a_job_is_must_be_the_same(books: Books, change: dict[str, Any]) -> None:
    books.accepted(idempotency_key="k")
    (found,) = books.apply(Accept(books.job(idempotency_key="k", **change), running=True))
    assert isinstance(found, Conflict)
    assert found.status == 422


def test_a_direct_job_keeps_no_body(books: Books) -> None:
    books.accepted(direct=True)
    queued = books.accepted()
    assert books.sql("SELECT job_id FROM job_bodies") == [(queued.job_id.bytes,)]


# Starting and ending.


def test_attempts_begin_one_after_another_and_never_after_the_end(books: Books) -> None:
    job = books.accepted(running=False)
    assert [books.apply(Start(job, n)) for n in (2, 1, 1, 3, 2)] == [[False], [True], [False], [False], [True]]
    books.apply(Finish(job, 2, outcome()))
    before = books.dump()
    assert books.apply(Start(job, 3)) == [False]
    assert books.dump() == before


@pytest.mark.parametrize("attempt", [0, 1, 3])
def test_a_worker_that_wakes_up_late_changes_nothing(books: Books, attempt: int) -> None:
    job = books.accepted(webhook="https://a.example/")
    books.apply(Start(job, 2))
    before = books.dump()
    late = Finish(job, attempt, outcome(body=b"late"), START_US)
    assert books.apply(late) == [None]
    assert books.dump() == before
    (event,) = books.apply(Finish(job, 2, outcome(body=b"right"), START_US))
    assert event.attempt == 2
    before = books.dump()
    assert books.apply(Finish(job, 2, outcome("error"), START_US)) == [None]
    assert books.apply(late) == [None]
    assert books.dump() == before
    assert books.sql("SELECT output FROM job_outputs") == [(b"right",)]


def test_an_end_leaves_what_is_asked_for_later(books: Books) -> None:
    books.clock.move_to(START_US + 10)
    job = books.accepted(webhook="https://a.example/")
    kept, dropped = books.accepted(), books.accepted(direct=True)
    ends = [Finish(job, 1, outcome("error")), Finish(kept, 1, outcome(body=b"x", content_type="image/png"), 77)]
    events = books.apply(*ends, Finish(dropped, 1, outcome()))
    assert [event.job_id for event in events] == [job.job_id, kept.job_id, dropped.job_id]
    assert [event.customer_ref for event in events] == [job.customer_ref] * 3
    assert books.sql("SELECT job_id, next_us, attempts FROM webhooks") == [(job.job_id.bytes, START_US + 10, 0)]
    assert books.sql("SELECT * FROM job_outputs") == [(kept.job_id.bytes, "image/png", b"x", 77)]
    assert books.sql("SELECT count(*) FROM job_bodies") == [(0,)]
    assert books.sql("SELECT state, error_code, finished_us FROM jobs ORDER BY seq") == [
        ("error", "backend_error", START_US + 10),
        ("success", None, START_US + 10),
        ("success", None, START_US + 10),
    ]


@pytest.mark.parametrize("error", [Unavailable("the disk is full"), RecordError("event_id", "stands already")])
def test_an_end_and_its_event_are_one_transaction(books: Books, error: PlatformError) -> None:
    job = books.accepted(webhook="https://a.example/")
    before = books.dump()
    books.outbox.errors.append(error)
    with pytest.raises(type(error)):
        books.apply(Finish(job, 1, outcome(body=b"x"), START_US))
    assert books.dump() == before
    books.apply(Finish(job, 1, outcome(body=b"x"), START_US))
    assert books.sql("SELECT count(*) FROM usage_events") == books.sql("SELECT count(*) FROM webhooks") == [(1,)]


def test_an_event_that_cannot_be_billed_changes_nothing(books: Books) -> None:
    job = books.accepted()
    before = books.dump()
    with pytest.raises(RecordError, match="gpu_time_ns"):
        books.apply(Finish(job, 1, outcome(gpu_time_ns=5_001)))
    assert books.dump() == before


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["accept", "start", "finish", "nothing"])
def test_it_knows_whether_a_commit_stands(books: Books, kind: str, kept: bool) -> None:
    job = books.accepted(running=False)
    new = books.job()
    operations: dict[str, Operation] = {
        "accept": Accept(new, running=False),
        "start": Start(job, 1),
        "finish": Finish(job, 0, outcome("cancelled")),
        "nothing": Start(job, 5),
    }
    with contextlib.suppress(Unavailable), books.database.write() as connection:
        books.store.apply(connection, [operations[kind]])
        if not kept:
            raise Unavailable("the disk is full")
    with books.database.read() as connection:
        assert books.store.stands(connection) == (kept and kind != "nothing")


# As a gateway's writer does it.


def test_stale_and_doubled_ends_in_one_group_give_one_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=hangs())) as rig:
            for order in set(itertools.permutations((0, 1, 1, 2))):
                job = await rig.submit()
                with held_writer(rig):
                    futures = [rig.writer.submit(Finish(job, n, outcome())) for n in order]
                events = [await future for future in futures]
                assert [n for n, event in zip(order, events, strict=True) if event is not None] == [1]
                rig.engine.cancel(job, "cancelled_by_client")
                await rig.ended(job)
            check_books(rig)

    run(test)


def test_an_end_that_another_process_decided_is_told_as_such(tmp_path: Path) -> None:
    """By its rows, as a gateway would that took the jobs over; the client is not left waiting, nor told our outcome."""

    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            gate = asyncio.Event()
            rig.backends["b"].script.append(gated(gate, takes()))
            running, queued = await rig.submit(direct=True), await rig.submit(direct=True)
            await pause()
            rig.sql("UPDATE jobs SET state = 'error', error_code = 'gateway_restarted'")
            gate.set()
            await rig.ended(running, queued)
            for job in (running, queued):
                assert job.done is not None
                outcome = job.done.result()
                assert (outcome.status, outcome.error_code, outcome.gpu_time_ns) == ("error", "superseded", 0)
            assert (rig.events(), rig.told, len(rig.backends["b"].attempts)) == ([], [], 1)
            assert rig.servers["b"].running == 0

    run(test)


def test_ids_are_given_back_as_they_were(books: Books) -> None:
    job = books.accepted()
    (event,) = books.apply(Finish(job, 1, outcome()))
    (row,) = books.sql("SELECT event_id, nonce, job_id, request_id, recorded_at FROM usage_events")
    assert row == (event.event_id.bytes, event.nonce, job.job_id.bytes, job.request_id.bytes, START_US)
    assert uuid.UUID(bytes=row[0]).version == 7
