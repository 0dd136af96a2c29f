"""The writer: one commit for many, a bad operation alone, and the truth about a commit that failed; and the engine,
when its database fails at any point: nothing is lost, nothing happens twice, and everyone is told.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.errors import PlatformError, RecordError, Unavailable
from render_platform.gateway.ingest import ingested
from render_platform.gateway.store import Accept, Do
from render_platform.gateway.writer import MAX_GROUP, Transactions, WriterEnded
from tests.gateway.engines import (
    Rig,
    backend,
    check_books,
    fails,
    held_writer,
    make_engine,
    open_faulty,
    takes,
)
from tests.gateway.virtual_time import S, pause, run, until, virtual_loop
from tests.platforms import connect
from tests.postgres import CHOSEN


def insert(number: int) -> Do:
    values = {"event_id": number.to_bytes(16, "big"), "content_digest": b"x"}
    statement = ingested.insert().values(**values).execution_options(preserve_rowcount=True)
    return Do(lambda connection: connection.execute(statement).rowcount)


def raises(error: BaseException) -> Do:
    def do(connection: sa.Connection) -> None:
        insert(99).run(connection)
        raise error

    return Do(do)


def numbers(rig: Rig) -> list[int]:
    return [int.from_bytes(row[0], "big") for row in rig.sql("SELECT event_id FROM ingested ORDER BY 1")]


def test_what_comes_during_a_commit_shares_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            for size, groups in ((50, 1), (MAX_GROUP, 1), (MAX_GROUP + 1, 2)):
                before = rig.writer.groups, rig.writer.operations
                with held_writer(rig):
                    futures = [rig.writer.submit(insert(before[1] + n)) for n in range(size)]
                    await pause()
                    assert not any(future.done() for future in futures)
                    known = numbers(rig)
                assert await futures[0] == 1
                assert numbers(rig)[len(known)] == before[1]  # durable when it is answered
                assert [await future for future in futures] == [1] * size
                assert rig.writer.groups - before[0] == groups + 1
                assert rig.writer.operations - before[1] == size + 1

    run(test)


def test_a_bad_operation_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            first = await rig.submit()
            with held_writer(rig):
                bad = [insert(1), raises(RecordError("a", "is bad")), insert(1), insert(2)]
                futures = [rig.writer.submit(one) for one in bad]
                again = rig.writer.submit(Accept(first, running=True))
                submitting = [asyncio.ensure_future(rig.submit()) for _ in range(3)]
                await pause()
            found = await asyncio.gather(*futures, again, return_exceptions=True)
            assert [type(one) for one in found] == [int, RecordError, Unavailable, int, Unavailable]
            assert numbers(rig) == [1, 2]
            jobs = [await one for one in submitting]
            assert [job.seq for job in jobs] == [2, 3, 4]
            await rig.idle()
            check_books(rig)

    run(test)


def test_a_database_that_is_locked_refuses_and_nothing_stands(tmp_path: Path) -> None:
    async def test() -> None:
        one = backend(capacity=2)
        async with make_engine(tmp_path, one, wait_s=0.05, max_queue=2) as rig:
            with closing(connect(rig.path.parent)) as other:
                other.execute("BEGIN IMMEDIATE")
                for _ in range(3):  # slots and places are given back each time
                    asked = await asyncio.gather(rig.submit(), rig.submit(), return_exceptions=True)
                    assert [type(error) for error in asked] == [Unavailable, Unavailable]
                other.execute("ROLLBACK")
            assert (rig.servers["b"].running, rig.engine.jobs) == (0, {})
            assert rig.sql("SELECT count(*) FROM jobs") == [(0,)]
            jobs = await asyncio.gather(rig.submit(), rig.submit())
            assert sorted(job.seq for job in jobs) == [1, 2]
            await rig.idle()
            check_books(rig)

    run(test)


@pytest.mark.parametrize("fault", ["begin", "lost", "kept"])
@pytest.mark.parametrize("unreadable", [0, 2])
def test_unavailable_means_that_it_does_not_stand(tmp_path: Path, fault: str, unreadable: int) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            with held_writer(rig):
                asking = [asyncio.ensure_future(rig.submit(idempotency_key=key)) for key in (None, "k")]
                await pause()
                rig.database.faults.append(fault)
                rig.database.unreadable = 0 if fault == "begin" else unreadable
            asked = await asyncio.gather(*asking, return_exceptions=True)
            stand = rig.sql("SELECT count(*) FROM jobs")[0][0]
            assert stand == (2 if fault == "kept" else 0) == sum(not isinstance(one, PlatformError) for one in asked)
            job = await rig.submit()
            assert job.seq == stand + 1
            await rig.idle()
            assert rig.database.unreadable == 0
            check_books(rig)

    run(test)


class Doing:
    """Runs operations; of a commit that failed it says that it does not stand."""

    def apply(self, connection: sa.Connection, operations: Sequence[Do]) -> list[Any]:
        return [one.run(connection) for one in operations]

    def committed(self) -> None:
        pass

    def stands(self, connection: sa.Connection) -> bool:
        return False


def test_why_the_last_write_failed_is_known_until_one_stands(tmp_path: Path) -> None:
    with closing(open_faulty(tmp_path / "platform.db")) as database:
        made, found = Transactions(database, Doing()), []
        for number, fault in enumerate(("begin", None, "lost", "begin", None)):
            database.faults.append(fault)
            made.write([insert(number)])
            found.append(made.last.failure)
        assert found == ["the disk is not there", "", "the disk is not there", "the disk is not there", ""]
        assert isinstance(made.write([insert(1)])[0], Unavailable)
        assert made.last.failure == "", "an operation that the database refuses is no failure of the database"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_dies_says_so_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(usual=takes(5)), wait_s=0.1) as rig:
            job = await rig.submit(direct=True)
            with held_writer(rig):
                waiting = [rig.writer.submit(one) for one in (insert(1), raises(ZeroDivisionError()), insert(2))]
                asked = asyncio.ensure_future(rig.submit())
                await pause()
            found = await asyncio.gather(*waiting, asked, return_exceptions=True)
            assert [type(one) for one in found] == [WriterEnded] * 4
            assert rig.writer.died.is_set()
            with pytest.raises(Unavailable, match="has ended"):
                await rig.submit()
            assert numbers(rig) == []
            await asyncio.sleep(6)
            assert job.state == "ending"
            await rig.engine.drain(3)  # what could not be written is left to the next start
            assert rig.sql("SELECT state, attempt FROM jobs") == [("running", 1)]

    run(test)


def test_what_was_submitted_before_the_end_is_written_and_nothing_after(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            before = [rig.writer.submit(insert(n)) for n in range(3)]
            await rig.writer.stop()
            assert [await future for future in before] == [1, 1, 1]
            with pytest.raises(Unavailable):
                await rig.writer.submit(insert(4))
            assert numbers(rig) == [0, 1, 2]
            assert not rig.writer.died.is_set()

    run(test)


# The engine, when its database fails.


@pytest.mark.parametrize("fault", ["begin", "lost", "kept"])
@pytest.mark.parametrize("at", range(7))
def test_a_fault_at_any_commit_loses_nothing_and_doubles_nothing(tmp_path: Path, at: int, fault: str) -> None:
    """Three clients wait: one's job runs at once, two are queued, one is tried again. Seven commits at least."""

    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            rig.backends["b"].script += [takes(1), fails(after_s=1), takes(1), takes(1)]
            rig.database.faults += [None] * at + [fault]
            asked = []
            for key in (None, "k", None):
                asked.append(asyncio.ensure_future(rig.ask(idempotency_key=key)))
                await pause()
                await until(lambda: not virtual_loop().under_way)
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert not rig.engine.jobs
            refused = sum(isinstance(one, Unavailable) for one in found)
            told = Counter(getattr(one, "status", "refused") for one in found)
            assert told == Counter(success=3 - refused, refused=refused)
            assert rig.events("count(*)") == rig.sql("SELECT count(*) FROM jobs") == [(3 - refused,)]
            assert len(rig.told) == 3 - refused  # the fast path, once each
            assert not (refused and fault == "kept")
            assert len(rig.backends["b"].attempts) == rig.sql("SELECT coalesce(sum(attempt), 0) FROM jobs")[0][0]
            assert not rig.database.faults
            check_books(rig)

    run(test)


@pytest.mark.parametrize("fault", ["begin", "lost"])
def test_an_end_is_written_when_the_database_is_back(tmp_path: Path, fault: str) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=1)) as rig:
            first, second = await rig.submit(), await rig.submit()
            rig.database.always = fault
            await asyncio.sleep(100)
            assert (first.state, second.state) == ("ending", "starting")
            assert not rig.engine.cancel(first, "cancelled_by_client")
            assert rig.events() == []
            with pytest.raises(Unavailable):
                await rig.submit()
            rig.database.always = None
            await rig.ended(first, second)
            assert rig.events("status, gpu_time_ns") == [("success", S)] * 2
            assert virtual_loop().ns < 105 * S
            check_books(rig)

    run(test)


def test_a_job_whose_time_is_up_or_that_is_cancelled_when_the_database_is_back_does_not_run(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path, backend(capacity=2)) as rig:
            running = [await rig.submit() for _ in range(2)]
            late, cancelled = await rig.submit(ttl_s=50), await rig.submit()
            rig.database.always = "begin"
            await asyncio.sleep(100)
            assert rig.engine.cancel(cancelled, "cancelled_by_client")
            rig.database.always = None
            await rig.ended(*running, late, cancelled)
            assert [job.state for job in (late, cancelled)] == ["timeout", "cancelled"]
            assert sorted(rig.events("status, error_code, gpu_time_ns"))[0::3] == [
                ("cancelled", "cancelled_by_client", 0),
                ("timeout", "expired", 0),
            ]
            assert len(rig.backends["b"].attempts) == 2
            check_books(rig)

    run(test)


REFUSE = "CREATE TRIGGER refuse BEFORE INSERT ON usage_events BEGIN SELECT RAISE(ABORT, 'no'); END"
ALLOW = "DROP TRIGGER refuse"
if CHOSEN:
    REFUSE = "ALTER TABLE usage_events ADD CONSTRAINT refuse CHECK (false) NOT VALID"
    ALLOW = "ALTER TABLE usage_events DROP CONSTRAINT refuse"


def test_a_failing_database_is_not_asked_without_a_pause(tmp_path: Path) -> None:
    """Not even where what replaces a bill that was refused is refused itself."""

    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            rig.sql(REFUSE)
            job = await rig.submit()
            await asyncio.sleep(1)
            begun_s = time.monotonic()
            await asyncio.sleep(10)
            assert time.monotonic() - begun_s < 5
            assert job.outcome is None
            assert rig.sql("SELECT state FROM jobs") == [("running",)]
            rig.sql(ALLOW)
            await rig.ended(job)
            assert rig.events("error_code") == [("usage_refused",)]
            check_books(rig)

    run(test)


def test_a_loop_that_has_ended_stops_no_commit(tmp_path: Path) -> None:
    gate = threading.Event()
    writers: list[Any] = []

    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            rig.writer.submit(Do(lambda _: gate.set()))
            rig.writer.submit(insert(7))
            writers.append(rig)

    run(test)
    assert gate.wait(10)
    assert numbers(writers[0]) == [7]
