"""What leaves SQL once it is old and proven: which rows, when not, and that everything is still known afterwards."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform.clock import DAY_US, HOUR_US, ManualClock
from render_platform.errors import Finding, Missing, Unavailable
from render_platform.events import UsageEvent
from render_platform.outbox import PRUNED_AT_ONCE, Outbox, located
from render_platform.pipeline import Platform
from render_platform.receipts import Receipts
from tests.factories import START_US, make_events
from tests.faults.test_crash_slow_path import KINDS, Crash, Faults, with_faults
from tests.gateway.http import running
from tests.gateway.test_evidence_routes import platform_of
from tests.platforms import LIVE, connect, make_platform, record, record_random

KEPT_DAYS = 2
LIMITS: dict[str, Any] = {"batch_rows": 5, "outbox_retention_days": KEPT_DAYS}
LATER_US = START_US + 2 * DAY_US + 6 * HOUR_US + HOUR_US // 2
OLD_US = LATER_US - KEPT_DAYS * DAY_US
"""What was recorded before it is pruned, where the clock stands at LATER_US."""


def reopened(platform: Platform, us: int = LATER_US) -> Platform:
    platform.close()
    return make_platform(platform.settings.state_dir, ManualClock(us), f"{us}", **LIMITS)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """Twelve old live events and three young ones, four old ones of a trace; all published, two more that wait."""
    made = make_platform(tmp_path / "state", ManualClock(START_US), **LIMITS)
    record_random(made, 12, 1)
    record_random(made, 4, 2, lane="trace/1")
    made.flush()
    made = reopened(made, OLD_US + HOUR_US)
    record_random(made, 3, 3, start_us=OLD_US + HOUR_US, span_us=HOUR_US // 4)
    made.flush()
    made = reopened(made)
    record_random(made, 2, 4, start_us=LATER_US)
    yield made
    made.close()


OLD = f"lane = 'live' AND recorded_at < {OLD_US}"


def rows(state: Path, table: str = "usage_events", where: str = "1 = 1") -> set[bytes]:
    with closing(connect(state)) as connection:
        return {row[0] for row in connection.execute(f"SELECT event_id FROM {table} WHERE {where}")}


def test_old_published_live_events_go_and_nothing_else(platform: Platform) -> None:
    state = platform.settings.state_dir
    before, old = rows(state), rows(state, where=OLD)
    totals, progress, backlog = platform.outbox.totals(), platform.outbox.progress(), platform.outbox.backlog()
    assert (len(before), len(old)) == (21, 12)
    assert platform.prune() == 12
    assert (rows(state), rows(state, "pruned_events")) == (before - old, old)
    assert (platform.outbox.totals(), platform.outbox.progress()) == (totals, progress)
    assert platform.outbox.backlog() == backlog
    assert platform.prune() == 0
    assert platform.verify(deep=True).batches == 5
    platform.flush()
    assert platform.outbox.totals() == totals


def test_a_receipt_of_a_pruned_event_is_the_same_text(platform: Platform) -> None:
    receipts = Receipts(platform.database, platform.cas, platform.log_objects)
    with closing(connect(platform.settings.state_dir)) as connection:
        found = connection.execute(f"SELECT event_id, job_id FROM usage_events WHERE recorded_at < {OLD_US}").fetchall()
    ids = [(uuid.UUID(bytes=event), uuid.UUID(bytes=job)) for event, job in found]
    before = [(receipts.of_event(event), receipts.of_job(job)) for event, job in ids]
    platform.prune()
    assert [(receipts.of_event(event), receipts.of_job(job)) for event, job in ids] == before
    assert all(one == two for one, two in before)


def test_a_batch_that_is_partly_young_stays_whole(tmp_path: Path) -> None:
    made = make_platform(tmp_path / "state", ManualClock(OLD_US), **LIMITS)
    record(made, LIVE, [replace(one, recorded_at=OLD_US + at) for at, one in enumerate(make_events(4, 1), -2)])
    made.flush()
    with closing(reopened(made)) as platform:
        assert platform.prune() == 0
    with closing(reopened(made, LATER_US + HOUR_US)) as platform:
        assert platform.prune() == 4


@pytest.mark.parametrize("stage", ["nothing", "seal", "store"])
def test_what_is_not_published_stays_however_old(tmp_path: Path, stage: str) -> None:
    made = make_platform(tmp_path / "state", ManualClock(START_US), **LIMITS)
    record_random(made, 7, 1)
    with closing(reopened(made)) as platform:
        for name in ("seal", "store")[: ("nothing", "seal", "store").index(stage)]:
            getattr(platform, name)()
        assert platform.prune() == 0
        platform.flush()
        assert platform.prune() == 7


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def alter(state: Path, sql: str) -> None:
    with closing(connect(state)) as connection:
        assert connection.execute(sql).rowcount == 1
        connection.commit()


OF_FIRST = "batch_id = (SELECT min(batch_id) FROM batches)"
OLDEST = f"event_id = (SELECT event_id FROM usage_events WHERE {OF_FIRST} ORDER BY event_id LIMIT 1)"


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda state, path: path.unlink(), Missing),
        (lambda state, path: flip(path), Finding),
        (
            lambda state, _: alter(state, f"UPDATE usage_events SET gpu_time_ns = 1 WHERE {OLDEST}"),
            Finding,
        ),
        (lambda state, _: alter(state, f"UPDATE usage_events SET job_id = nonce WHERE {OLDEST}"), Finding),
        (lambda state, _: alter(state, f"UPDATE usage_events SET event_id = nonce WHERE {OLDEST}"), Finding),
    ],
    ids=["object missing", "object altered", "row altered", "job altered", "id altered"],
)
def test_rows_stay_where_the_evidence_does_not_have_them(
    platform: Platform, spoil: Callable[[Path, Path], None], error: type[Exception]
) -> None:
    state = platform.settings.state_dir
    with closing(connect(state)) as connection:
        batch, digest = connection.execute("SELECT batch_id, blob_digest FROM batches ORDER BY batch_id").fetchone()
    spoil(state, state / "blobs/sha256" / digest[:2] / digest[2:])
    of_batch = f"batch_id = '{batch}'"
    before, others = rows(state, where=of_batch), rows(state, where=f"{OLD} AND NOT {of_batch}")
    with pytest.raises(error):
        platform.prune()
    assert rows(state, where=of_batch) == before
    assert rows(state, "pruned_events") == others, "one batch holds up no other"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dies", [True, False], ids=["crash", "error"])
def test_a_failure_at_any_commit_leaves_each_event_in_one_place(platform: Platform, kind: str, dies: bool) -> None:
    state = platform.settings.state_dir
    everything = rows(state)
    at = 1
    while True:
        make = Crash if dies else (lambda: Unavailable("the write failed", "run the command again"))
        faults = Faults(at=at, kind=kind, make=make)
        faulty = with_faults(make_platform(state, ManualClock(LATER_US), f"{kind}{dies}{at}", **LIMITS), faults)
        try:
            faulty.prune()
        except (Crash, Unavailable):
            pass
        finally:
            faulty.close()
        kept, pruned = rows(state), rows(state, "pruned_events")
        assert (kept | pruned, kept & pruned) == (everything, set())
        if not faults.injected:
            break
        at += 1
    assert at > 2
    assert len(rows(state, "pruned_events")) == 12


def test_a_large_batch_goes_in_parts(tmp_path: Path) -> None:
    made = make_platform(tmp_path / "state", ManualClock(START_US))
    record(made, LIVE, make_events(PRUNED_AT_ONCE + 5, 1))
    made.flush()
    made.close()
    options = {"outbox_retention_days": KEPT_DAYS}
    faults = Faults(at=2, kind="lost")
    faulty = with_faults(make_platform(tmp_path / "state", ManualClock(LATER_US), "2", **options), faults)
    with closing(faulty), pytest.raises(Crash):
        faulty.prune()
    assert len(rows(tmp_path / "state")) == 5
    with closing(make_platform(tmp_path / "state", ManualClock(LATER_US), "3", **options)) as platform:
        assert platform.prune() == 5


def test_others_write_between_the_parts(tmp_path: Path) -> None:
    """SQLite's lock is nobody's turn: without a pause the next part takes it before who waits has looked again."""
    made = make_platform(tmp_path / "state", ManualClock(START_US))
    record(made, LIVE, make_events(PRUNED_AT_ONCE + 5, 1))
    made.flush()
    kept: list[int] = []

    def pause(seconds: float) -> None:
        assert seconds >= 0.1, "so long SQLite's own wait sleeps at most"
        with made.database.write():  # nobody holds the lock
            kept.append(len(rows(tmp_path / "state")))

    with closing(made):
        Outbox(made.database, made.ids, pause).prune(made.cas, LIVE, START_US + DAY_US)
    assert kept == [5, 0]


@settings(max_examples=15)
@given(hours=st.lists(st.integers(0, 4 * 24), min_size=1, max_size=12), flushes=st.integers(1, 4), seed=st.integers(0))
def test_every_event_is_in_one_place_and_only_old_ones_are_gone(
    tmp_path_factory: pytest.TempPathFactory, hours: list[int], flushes: int, seed: int
) -> None:
    state, rng = tmp_path_factory.mktemp("pruned") / "state", random.Random(seed)
    events: list[UsageEvent] = []
    platform = make_platform(state, ManualClock(START_US), **LIMITS)
    for number, hour in enumerate(sorted(hours)):
        platform = reopened(platform, START_US + hour * HOUR_US)
        events += record_random(platform, rng.randrange(1, 5), number + seed, start_us=START_US + hour * HOUR_US)
        if rng.randrange(4) < flushes:
            platform.flush()
    with closing(reopened(platform, START_US + 4 * DAY_US)) as platform:
        platform.prune()
        kept, pruned = rows(state), rows(state, "pruned_events")
        assert (kept | pruned, kept & pruned) == ({event.event_id.bytes for event in events}, set())
        old = {e.event_id.bytes for e in events if e.recorded_at < START_US + 2 * DAY_US}
        assert pruned <= old
        platform.flush()
        platform.prune()
        assert rows(state) | rows(state, "pruned_events") == kept | pruned
        with platform.database.read() as connection:
            found = located(connection, [event.event_id.bytes for event in events])
        assert {one.event_id for one in found} == kept | pruned
        assert all(one.log_index is not None for one in found)


# With a gateway.


def test_jobs_go_with_their_events_and_are_said_to_be_gone(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        keyed = {"model": "llama-8b", "input": {"messages": [{"role": "user", "content": "hello"}]}}
        first = client.post("/queue", keyed, **{"Idempotency-Key": "k"})
        jobs = [first.json["id"], *(client.queue()["id"] for _ in range(2))]
        for job in jobs:
            client.ended(job)
        with platform_of(at.state) as platform:
            platform.flush()
        receipts = [client.get(f"/jobs/{job}/receipt").body for job in jobs]
        assert prune_later(at.state) == 0, "their outputs are still to be fetched"
        alter_all(at.state, "DELETE FROM job_outputs")
        assert prune_later(at.state) == 2, "numbers count on from the last job of the epoch"
        gone = [client.get(f"/jobs/{job}") for job in jobs]
        assert [reply.status for reply in gone] == [410, 410, 200]
        assert gone[0].json["code"] == "job_gone"
        assert f"/jobs/{jobs[0]}/receipt" in json.dumps(gone[0].json)
        assert [client.get(f"/jobs/{job}/receipt").body for job in jobs] == receipts
        assert client.get(f"/jobs/{jobs[0]}/output").status == 410
        assert client.get(f"/jobs/{uuid.uuid4()}").status == 404
        again = client.post("/queue", keyed, **{"Idempotency-Key": "k"})
        assert (again.status, again.json["code"]) == (410, "job_gone")
        [row] = [one["id"] for one in client.get("/jobs").json["jobs"]]
        assert row == jobs[2]
        client.ended(client.queue()["id"])
        with platform_of(at.state) as platform:
            platform.flush()
            platform.verify(deep=True)
            assert platform.outbox.totals().events == 4


def alter_all(state: Path, sql: str) -> None:
    with closing(connect(state)) as connection:
        connection.execute(sql)
        connection.commit()


def prune_later(state: Path) -> int:
    with platform_of(state) as platform:
        return platform.outbox.prune(platform.cas, LIVE, platform.clock.now_us() + DAY_US)


@pytest.mark.parametrize(
    "needs",
    [
        "UPDATE jobs SET state = 'running' WHERE seq = 1",
        "INSERT INTO webhooks SELECT job_id, 'http://x', 1, 1, NULL FROM jobs WHERE seq = 1",
        "INSERT INTO job_outputs SELECT job_id, 'a/b', job_id, 1 FROM jobs WHERE seq = 1",
    ],
    ids=["unfinished", "webhook", "output"],
)
def test_a_job_that_is_still_asked_for_stays(tmp_path: Path, needs: str) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        for _ in range(3):
            client.ended(client.queue()["id"])
        with platform_of(at.state) as platform:
            platform.flush()
    alter_all(at.state, "DELETE FROM job_outputs")
    alter_all(at.state, needs)
    assert prune_later(at.state) == 1
    alter_all(at.state, "UPDATE jobs SET state = 'success'")
    alter_all(at.state, "UPDATE webhooks SET next_us = NULL")
    alter_all(at.state, "DELETE FROM job_outputs")
    assert prune_later(at.state) == 1
    assert at.counts()["webhooks"] == 0 if "webhooks" in needs else True
