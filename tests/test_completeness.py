"""Nothing left out: every accepted job is in the log, as open, billed or failed; and what is left out is found."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.audit_log import BatchLogger
from render_platform.clock import DAY_US, HOUR_US, ManualClock, uuid7
from render_platform.database import Database, acceptances, batch_acceptances, jobs, open_sqlite
from render_platform.entries import MAX_ACCEPTANCES
from render_platform.errors import Unavailable
from render_platform.evidence import Verification
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.leases import Lease
from render_platform.gateway.store import Accept, Finish, JobStore
from render_platform.sealing import Sealer
from tests.factories import START_US, make_events
from tests.gateway.engines import backend, model_of
from tests.platforms import connect, make_platform
from tests.stories import said

MODEL = model_of([backend()])
MINUTE = 60_000_000


class Shop:
    """A platform and its gateway, driven by hand: jobs are accepted, end in any order, and the gateway starts anew."""

    def __init__(self, state: Path, **options: Any) -> None:
        self.clock = ManualClock(START_US)
        options = {"batch_rows": 5, "seal_rows_a_transaction": 3, **options}
        self.platform = make_platform(state, self.clock, **options)
        self.open: list[Job] = []
        self.restart()

    def restart(self) -> None:
        """The jobs that are open are the next epoch's to end."""
        platform = self.platform
        name_file = platform.settings.state_dir / "gateway.id"
        lease = Lease(platform.database, self.clock, platform.ids, name_file, 30)
        self.gateway, self.epoch = lease.begin().epoch
        self.store = JobStore(platform.outbox, self.clock, platform.ids, self.gateway, self.epoch)

    def apply(self, operations: list[Any]) -> None:
        with self.platform.database.write() as connection:
            self.store.apply(connection, operations)
        self.store.committed()

    def accept(self, count: int = 1) -> list[Job]:
        now_us, ids = self.clock.us, self.platform.ids
        request = Request("key", "alice", "standard", MODEL, "chat", b"{}")
        made = [
            Job(uuid7(now_us, ids), uuid7(now_us, ids), request, request.digest(), now_us, now_us + 60 * MINUTE)
            for _ in range(count)
        ]
        self.apply([Accept(job, running=True) for job in made])
        self.open += made
        return made

    def end(self, *ended: Job, status: str = "success") -> None:
        started_ns = (self.clock.us - 5) * 1_000
        code = None if status == "success" else "backend_error"
        outcome = Outcome(status, code, started_ns, started_ns + 5_000, gpu_time_ns=4_000, gpu_count=1)
        self.apply([Finish(job, 1, outcome) for job in ended])
        self.open = [job for job in self.open if job not in ended]

    def flush(self, later_us: int = MINUTE) -> Verification:
        self.platform.flush()
        self.clock.move_to(self.clock.us + later_us)
        return self.verify()

    def verify(self) -> Verification:
        return self.platform.verify(deep=True)

    def said(self) -> list[dict[str, Any]]:
        """What the entries say of acceptances, in the order of the log, read from SQL with nothing of ours."""
        with closing(connect(self.platform.settings.state_dir)) as connection:
            rows = connection.execute("SELECT entry FROM log_entries ORDER BY log_index").fetchall()
        return [json.loads(row[0]) for row in rows]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.platform.close()


def check_counts(shop: Shop) -> None:
    """The ranges, from the entries and SQL alone: contiguous, and what they call open is what is in no batch so far."""
    with closing(connect(shop.platform.settings.state_dir)) as connection:
        query = """SELECT j.epoch, j.seq, u.batch_id FROM jobs j LEFT JOIN usage_events u ON u.job_id = j.job_id"""
        accepted = connection.execute(query).fetchall()
    where = {(epoch, seq): batch for epoch, seq, batch in accepted}
    through: Counter[int] = Counter()
    billed: set[str] = set()
    last: dict[int, dict[str, Any]] = {}
    for entry in shop.said():
        billed.add(entry["batch_id"])
        assert len(entry["acceptances"]) <= MAX_ACCEPTANCES
        for item in entry["acceptances"]:
            epoch = item["epoch"]
            assert item["from"] == through[epoch] + 1
            through[epoch] = item["through"]
            numbers = range(1, item["through"] + 1)
            still_open = [seq for seq in numbers if where[epoch, seq] not in billed]
            assert item["open"] == len(still_open)
            assert item["oldest"] <= min(still_open, default=item["through"] + 1)
            last[epoch] = item
    assert Counter(epoch for epoch, _ in where) == +through
    waiting = Counter(epoch for (epoch, _), batch in where.items() if batch is None)
    assert {epoch: item["open"] for epoch, item in last.items() if item["open"]} == waiting


# The truth verifies.


def test_an_entry_says_what_was_accepted_and_what_is_open(shop: Shop) -> None:
    first, second, third = shop.accept(3)
    shop.end(second)
    assert shop.flush().verified
    shop.end(first, status="error")
    fourth, *_ = shop.accept()
    shop.end(fourth)
    outcome = shop.flush()
    assert outcome.verified, said(outcome)
    found = [entry["acceptances"] for entry in shop.said() if entry["acceptances"]]
    common = {"gateway": shop.gateway, "epoch": 1}
    assert found == [
        [{**common, "from": 1, "through": 3, "open": 2, "oldest": 1}],
        [{**common, "from": 4, "through": 4, "open": 1, "oldest": 3}],
    ]
    assert outcome.notes == ["1 accepted jobs have not ended by 2023-11-16T18:01:00Z"]
    shop.end(third, status="cancelled")
    outcome = shop.flush()
    assert (outcome.verified, outcome.notes) == (True, [])
    check_counts(shop)


def test_any_order_of_accepting_ending_and_restarting_verifies(tmp_path: Path, rng: random.Random) -> None:
    for turn in range(6):
        shop = Shop(tmp_path / str(turn))
        for _ in range(25):
            step = rng.choice(("accept", "accept", "end", "end", "restart", "flush", "later", "ingest"))
            if step == "accept":
                shop.accept(rng.randrange(1, 9))
            elif step == "end" and shop.open:
                some = rng.sample(shop.open, rng.randrange(1, len(shop.open) + 1))
                shop.end(*some, status=rng.choice(("success", "error", "timeout", "cancelled")))
            elif step == "restart":
                shop.restart()
            elif step == "later":
                shop.clock.move_to(shop.clock.us + rng.randrange(3 * HOUR_US))
            elif step == "ingest":
                made = make_events(3, rng.randrange(2**32), shop.clock.us, 1)
                with shop.platform.database.write() as connection:
                    shop.platform.outbox.record(connection, "live", made)
            elif step == "flush":
                outcome = shop.flush()
                assert outcome.verified or outcome.checkpoint is None, said(outcome)
        shop.accept()
        shop.clock.move_to(shop.clock.us + HOUR_US)
        outcome = shop.flush()
        assert outcome.verified, said(outcome)
        check_counts(shop)
        shop.platform.close()


def test_idle_hours_say_what_was_accepted_meanwhile(shop: Shop) -> None:
    shop.end(*shop.accept(2))
    shop.flush(2 * HOUR_US)
    shop.accept(3)
    shop.restart()
    outcome = shop.flush()
    assert outcome.verified, said(outcome)
    told = [entry for entry in shop.said() if entry["acceptances"]]
    assert [entry["type"] for entry in told] == ["usage_batch", "watermark"]
    assert [(item["epoch"], item["through"], item["open"]) for item in told[1]["acceptances"]] == [(1, 5, 3), (2, 0, 0)]
    check_counts(shop)


class FailingDatabase(Database):
    """Its n-th writing transaction fails: undone, or (`kept`) reported as failed although it stands."""

    def __init__(self, engine: sa.Engine, at: int, kept: bool) -> None:
        super().__init__(engine)
        self.at, self.kept, self.writes = at, kept, 0

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        self.writes += 1
        failing = self.writes == self.at
        with super().write() as connection:
            yield connection
            if failing and not self.kept:
                raise Unavailable("lost")
        if failing:
            raise Unavailable("kept")


@pytest.mark.parametrize("kept", [False, True])
def test_a_crash_at_any_write_and_accepts_in_between_make_no_false_alarm(tmp_path: Path, kept: bool) -> None:
    at = writes = 0
    while at <= writes:
        at += 1
        shop = Shop(tmp_path / str(at))
        made = shop.accept(9)
        shop.end(*made[1:8])
        shop.restart()
        shop.end(*shop.accept(2))
        shop.clock.move_to(START_US + HOUR_US + MINUTE)
        engine = open_sqlite(tmp_path / str(at) / "platform.db").engine
        failing = FailingDatabase(engine, at, kept)
        sealer = Sealer(failing, shop.clock, batch_rows=5, rows_a_transaction=3)
        try:
            sealer.seal()
            shop.platform.store()
            BatchLogger(failing, shop.platform.log).log_stored(lambda *_: None)
        except Unavailable:
            shop.end(*shop.accept(2))
        writes = failing.writes
        failing.close()
        shop.end(made[0])
        outcome = shop.flush()
        assert outcome.verified, said(outcome)
        check_counts(shop)
        shop.platform.close()
    assert at > 6


def test_many_starts_are_spread_over_entries_and_none_is_too_long(tmp_path: Path) -> None:
    shop = Shop(tmp_path, batch_rows=1_000, seal_rows_a_transaction=1_000)
    for _ in range(2 * MAX_ACCEPTANCES + 50):
        shop.restart()
        shop.end(*shop.accept())
    for _ in range(3):
        outcome = shop.flush()
        assert outcome.verified, said(outcome)
        shop.end(*shop.accept())
    sizes = [len(entry["acceptances"]) for entry in shop.said()]
    assert sizes == [MAX_ACCEPTANCES, MAX_ACCEPTANCES, 51], "450 starts, and the epoch that the state began with"
    assert shop.flush().verified
    check_counts(shop)
    with shop.platform.database.read() as connection:
        counting = sa.select(sa.func.count()).select_from(acceptances).where(acceptances.c.state == "counting")
        assert connection.execute(counting).scalar() == 1, "what is over is looked at no more"
    shop.platform.close()


def test_a_log_from_before_jobs_were_counted_goes_on(tmp_path: Path) -> None:
    """As an older release left it: batches with rows of jobs, and nothing said of acceptances."""
    shop = Shop(tmp_path)
    made = shop.accept(4)
    shop.end(*made[:2])
    shop.platform.seal()
    with shop.platform.database.write() as connection:
        connection.execute(acceptances.delete())
        connection.execute(batch_acceptances.delete())
    outcome = shop.flush()
    assert (outcome.verified, outcome.notes) == (True, [])
    shop.end(made[2])
    assert shop.flush().verified
    shop.restart()
    shop.end(made[3], *shop.accept())
    outcome = shop.flush()
    assert outcome.verified, said(outcome)
    assert "are counted from its epoch 2 on" in outcome.notes[0]
    assert [item["epoch"] for entry in shop.said() for item in entry["acceptances"]] == [2]
    shop.platform.close()


# What is left out is found. The platform itself leaves it out, and signs.


def test_an_accepted_job_that_sql_has_lost_is_found(shop: Shop) -> None:
    made = shop.accept(5)
    shop.end(*made[:2], *made[3:])
    with shop.platform.database.write() as connection:
        connection.execute(jobs.delete().where(jobs.c.job_id == made[2].job_id.bytes))
    assert shop.flush(9 * DAY_US).verified, "it may still be waiting"
    shop.end(*shop.accept(3))
    outcome = shop.flush()
    (problem,) = outcome.problems
    assert (problem.where, problem.since) == (f"{shop.gateway} epoch 1", "2023-11-16T18:00:00Z")
    assert "was accepted, and is neither billed nor failed" in problem.what
    assert "1 of them have no event" in problem.doubt


def test_a_job_that_ended_without_an_event_stays_open_whatever_comes_after_it(shop: Shop) -> None:
    lost, *others = shop.accept(3)
    with shop.platform.database.write() as connection:
        connection.execute(jobs.update().where(jobs.c.job_id == lost.job_id.bytes).values(state="success"))
    for _ in range(3):
        shop.end(*others)
        others = shop.accept(2)
        assert shop.flush().verified
    last = shop.said()[-1]["acceptances"]
    assert [(item["through"], item["open"], item["oldest"]) for item in last] == [(9, 3, 1)]
