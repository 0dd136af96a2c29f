"""Several gateways on one PostgreSQL: who works on what, who takes over, and what holds for a customer across them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.clock import ManualClock
from render_platform.config import load_settings
from render_platform.database import Database, gateways, jobs, open_database, usage_events
from render_platform.errors import UsageError
from render_platform.gateway.app import serve
from render_platform.gateway.identity import ApiKeys, Terms
from render_platform.gateway.leases import Lease
from render_platform.gateway.service import Gateway
from tests import postgres
from tests.factories import START_US
from tests.gateway.http import CHAT, Client, Running, eventually, running
from tests.gateway.processes import running_gateway
from tests.platforms import SeededIds
from tests.receivers import Receiver

LEASE_S = 3
CUSTOMER = ("api-key", "alice")


@pytest.fixture
def url() -> str:
    return postgres.make_database(f"g_{uuid.uuid4().hex}")


def catalogue_of(device: str, speed: float = 1000.0) -> dict[str, Any]:
    """One model, on one device that takes one job at a time."""
    backend = {"kind": "simulated", "capacity": 1, "device": device, "speed": speed}
    model = {"family": "llama", "modality": "text", "type": "llm", "tasks": ["chat"], "backends": {"sim": "m"}}
    return {"backends": {"sim": backend}, "models": {"llama-8b": {**model, "max_attempts": 5}}}


@contextmanager
def here(folder: Path, url: str, device: str, **options: Any) -> Iterator[Running]:
    """A gateway in this process."""
    settings = {"database_url": url, "clickhouse_dsn": "http://127.0.0.1:9", "gateway_lease_s": LEASE_S, **options}
    with running(folder, catalogue=catalogue_of(device), **settings) as at:
        yield at


@contextmanager
def apart(folder: Path, url: str, device: str, speed: float) -> Iterator[tuple[Any, Client]]:
    """A gateway in a process of its own, with its journal in another."""
    folder.mkdir(exist_ok=True)
    tables = catalogue_of(device, speed)
    lines = ["[backends.sim]", *_toml(tables["backends"]["sim"]), "[models.llama-8b]"]
    lines += _toml({**tables["models"]["llama-8b"], "backends": ""})
    catalogue = "\n".join(lines).replace('backends = ""', 'backends = { sim = "m" }') + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RENDER_PLATFORM_DATABASE_URL", url)
        patch.setenv("RENDER_PLATFORM_GATEWAY_LEASE_S", str(LEASE_S))
        with running_gateway(folder, catalogue) as (process, address):
            yield process, Client(int(address.rpartition(":")[2]))


def _toml(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]


def rows(url: str, query: sa.Select[Any]) -> list[Any]:
    with closing(open_database(url)) as database, database.read() as connection:
        return list(connection.execute(query).all())


def check_books(url: str, accepted: int) -> None:
    """Every job has ended, with one event."""
    found = rows(url, sa.select(jobs.c.job_id, jobs.c.state))
    assert len(found) == accepted
    assert {row.state for row in found} == {"success"}
    events = rows(url, sa.select(usage_events.c.job_id))
    assert sorted(row.job_id for row in events) == sorted(row.job_id for row in found)
    check_numbers(url)


def check_numbers(url: str) -> None:
    """Each epoch's jobs are numbered from 1 without a gap."""
    of = sa.select(jobs.c.gateway_id, jobs.c.epoch, sa.func.max(jobs.c.seq), sa.func.count())
    assert all(last == count for _, _, last, count in rows(url, of.group_by(jobs.c.gateway_id, jobs.c.epoch)))


def unfinished(url: str) -> int:
    return len(rows(url, sa.select(jobs.c.job_id).where(jobs.c.state.in_(["queued", "running"]))))


def ended(url: str) -> None:
    until = time.monotonic() + 60
    while left := unfinished(url):
        assert time.monotonic() < until, f"{left} jobs have not ended"
        time.sleep(0.1)


# Taking over.


def test_the_jobs_of_a_killed_gateway_are_taken_over_after_its_lease(url: str, tmp_path: Path) -> None:
    with apart(tmp_path / "a", url, "GPU-a", speed=0.02) as (dead, client), here(tmp_path / "b", url, "GPU-b") as other:
        accepted = [client.queue()["id"] for _ in range(5)]
        eventually(lambda: rows(url, sa.select(jobs.c.attempt).where(jobs.c.state == "running")))
        dead.kill()
        ended(url)
        check_books(url, 5)
        assert other.client().get(f"/jobs/{accepted[0]}").json["state"] == "success"
        assert {row.gateway_id for row in rows(url, sa.select(usage_events.c.gateway_id))} == {other.gateway.gateway_id}


def test_a_frozen_gateway_that_wakes_up_changes_nothing_and_ends(url: str, tmp_path: Path) -> None:
    with apart(tmp_path / "a", url, "GPU-a", speed=0.05) as (frozen, client), here(tmp_path / "b", url, "GPU-b"):
        for _ in range(3):
            client.queue()
        eventually(lambda: rows(url, sa.select(jobs.c.attempt).where(jobs.c.state == "running")))
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            ended(url)
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        assert frozen.wait(30) == 3
        check_books(url, 3)
        said = (tmp_path / "a/errors.log").read_text()
        assert "gateway_stops" in said


def test_a_gateway_that_ends_in_order_leaves_its_jobs_at_once(url: str, tmp_path: Path) -> None:
    with here(tmp_path / "b", url, "GPU-b", gateway_lease_s=LEASE_S) as other:
        with here(tmp_path / "a", url, "GPU-a", gateway_lease_s=600) as leaving:
            leaving.client().queue(input={**CHAT, "do": "hold"})
            assert leaving.stage.working.wait(20)
            leaving.client().queue()
            leaving.stage._released.clear()  # it is never let go on: the gateway stops while it runs
        assert unfinished(url) == 2
        assert other.stage.working.wait(30)
        other.stage.release()
        ended(url)
        check_books(url, 2)


def test_a_gateway_without_its_database_for_a_lease_runs_nothing_any_more(url: str, tmp_path: Path) -> None:
    with here(tmp_path / "a", url, "GPU-a") as at:
        at.client().queue(input={**CHAT, "do": "hold"})
        assert at.stage.working.wait(20)
        with closing(open_database(url)) as database, database.write():  # nobody else can write meanwhile
            assert at.stage.left.wait(20), "the attempt goes on"
            eventually(at.gateway.died.is_set)
    assert rows(url, sa.select(jobs.c.state, jobs.c.attempt)) == [("running", 1)]


def test_a_gateway_whose_lease_runs_out_while_it_starts_ends_in_order(tmp_path: Path) -> None:
    async def run() -> int:
        gateway = Gateway(load_settings({}, state_dir=tmp_path / "state", gateway_port=0))
        start = gateway.start

        async def die() -> None:
            await start()
            gateway.died.set()

        gateway.start = die  # type: ignore[method-assign]
        return await serve(gateway, lambda url: pytest.fail(f"{url} is told as ready"))

    assert asyncio.run(run()) == 3


# What may not be two's.


def test_a_device_is_one_gateways(url: str, tmp_path: Path) -> None:
    with here(tmp_path / "a", url, "GPU-a"), closing(open_database(url)) as database:
        lease = Lease(database, ManualClock(START_US), SeededIds(1), tmp_path / "gateway.id", LEASE_S)
        with pytest.raises(UsageError, match="GPU-a is used by gw-"):
            lease.begin({"GPU-a", "GPU-c"})
        assert lease.begin({"GPU-c"}).epoch.number == 1
    with here(tmp_path / "d", url, "GPU-a"):  # its gateway has ended
        pass


# What a customer sees.


@pytest.fixture
def two(url: str, tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(here(tmp_path / "a", url, "GPU-a")),
            stack.enter_context(here(tmp_path / "b", url, "GPU-b")),
        )


def test_a_job_is_seen_watched_and_cancelled_through_any_gateway(two: tuple[Running, Running]) -> None:
    mine, other = two
    job = mine.client().queue(input={**CHAT, "do": "hold"})["id"]
    assert mine.stage.working.wait(20)
    assert other.client().get(f"/jobs/{job}").json["state"] == "running"
    events = other.client().events(job)
    assert next(events).name == "started"
    cancelled = other.client().post(f"/jobs/{job}/cancel").json
    assert (cancelled["state"], cancelled["error_code"]) == ("cancelled", "cancelled_by_client")
    assert mine.stage.left.wait(20)
    last = list(events)[-1]
    assert (last.name, last.data["code"]) == ("error", "cancelled_by_client")


def test_an_idempotency_key_stands_for_one_job_everywhere(two: tuple[Running, Running]) -> None:
    mine, other = two
    job = mine.client().queue(idempotency_key="once")["id"]
    mine.client().ended(job)
    again = other.client().post("/queue", {"model": "llama-8b", "input": CHAT, "idempotency_key": "once"})
    assert (again.status, again.headers["x-job-id"]) == (200, job)


def test_keys_and_limits_hold_across_gateways(url: str, tmp_path: Path) -> None:
    clock = ManualClock(START_US)
    with closing(open_database(url)) as database:
        keys = ApiKeys(database, clock, SeededIds(2))
        key = keys.create("alice", {"customer"}, terms=Terms(rate_per_s=1, burst=8))
    with here(tmp_path / "a", url, "GPU-a") as one, here(tmp_path / "b", url, "GPU-b") as other:
        eventually(lambda: (one.gateway.buckets.sharing, other.gateway.buckets.sharing) == (2, 2))
        taken = 0
        for at in (one, other):
            replies = [at.client(key).get("/jobs").status for _ in range(8)]
            assert set(replies) == {200, 429}
            taken += replies.count(200)
        assert 8 <= taken <= 10, taken  # a second or two may pass meanwhile
        (held,) = [held for held in keys_of(url) if held.key_id]
        with closing(open_database(url)) as database:
            ApiKeys(database, clock, SeededIds(3)).revoke(held.key_id)
        eventually(lambda: one.client(key).get("/jobs").status == other.client(key).get("/jobs").status == 401)


def keys_of(url: str) -> Any:
    with closing(open_database(url)) as database:
        return ApiKeys(database, ManualClock(START_US), SeededIds(4)).list()


def test_a_webhook_is_delivered_by_one_of_them(url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        allow = {"webhook_allow": receiver.url.split("/")[2]}
        one, other = (stack.enter_context(here(tmp_path / name, url, f"GPU-{name}", **allow)) for name in "ab")
        ids = [at.client().queue(webhook=receiver.url)["id"] for at in (one, other) for _ in range(5)]
        until = time.monotonic() + 20
        while len(receiver.requests) < 10 and time.monotonic() < until:
            for at in (one, other):
                at.call(at.gateway.deliveries.wake)
            time.sleep(0.05)
        threading.Event().wait(0.5)
        assert sorted(one["data"]["id"] for one in receiver.documents) == sorted(ids)


# The lease alone, with a clock.


class Hand:
    """A clock that is moved by hand, in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lease_of(database: Database, folder: Path, name: str, hand: Hand) -> Lease:
    path = folder / f"{name}.id"
    return Lease(database, ManualClock(START_US), SeededIds(name), path, 600, steady_s=hand)


def leave_a_job(database: Database, gateway_id: str) -> None:
    """One that a gateway accepted in its first epoch, and whose lease has run out."""
    ids: dict[str, Any] = dict.fromkeys(("job_id", "request_id", "request_digest"), b"x" * 16)
    named = ("customer_ref", "pricing_tier", "lane", "model_name", "task", "state")
    text: dict[str, Any] = dict.fromkeys(named, "queued")
    numbers = dict.fromkeys(("epoch", "seq", "accepted_us", "deadline_us", "attempt"), 1)
    with database.write() as connection:
        connection.execute(jobs.insert().values(gateway_id=gateway_id, direct=False, **ids, **text, **numbers))
        connection.execute(gateways.update().filter_by(gateway_id=gateway_id).values(lease_until_us=0))


def test_nobody_takes_over_before_it_has_held_its_own_lease_for_one(url: str, tmp_path: Path) -> None:
    hand = Hand()
    with closing(open_database(url)) as database:
        dead, taker = (lease_of(database, tmp_path, name, hand) for name in ("dead", "taker"))
        (gateway_id, _), _ = dead.begin()
        taker.begin()
        leave_a_job(database, gateway_id)
        for now_s, takes in ((599.0, False), (600.0, True)):
            hand.now_s = now_s
            taker.renewed(now_s)
            with database.write() as connection:
                taker.take_over(connection)
            assert bool(taker.mine()) == takes
        assert (dead.lasts_s, taker.lasts_s) == (0, 600)
        back = lease_of(database, tmp_path, "dead", hand)  # the dead one's next start takes nothing back
        assert back.begin().epoch == (gateway_id, 2)
        assert back.mine() == []
        hand.now_s = 1_200.5  # the taker was away for more than its lease
        taker.renewed(1_200.5)
        with database.write() as connection:
            connection.execute(gateways.update().filter_by(gateway_id=gateway_id).values(lease_until_us=0))
            taker.take_over(connection)
        assert taker.lasts_s == 600
        assert rows(url, sa.text("SELECT count(*) FROM takeovers")) == [(1,)]  # type: ignore[arg-type]


def test_a_name_that_the_database_does_not_know_is_told(url: str, tmp_path: Path) -> None:
    (tmp_path / "x.id").write_text("gw-unknown\n")
    with closing(open_database(url)) as database, pytest.raises(UsageError, match="does not know gw-unknown"):
        lease_of(database, tmp_path, "x", Hand()).begin()


def test_what_was_taken_over_is_the_takers_after_its_crash(url: str, tmp_path: Path) -> None:
    """The process dies before the commit of the takeover, or between it and the first of the jobs."""
    hand = Hand()
    with closing(open_database(url)) as database:
        (gateway_id, _), _ = lease_of(database, tmp_path, "dead", hand).begin()
        taker = lease_of(database, tmp_path, "taker", hand)
        taker.begin()
        leave_a_job(database, gateway_id)
        hand.now_s = 600.0
        taker.renewed(600.0)

        def die_before_the_commit() -> None:
            with database.write() as connection:
                taker.take_over(connection)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            die_before_the_commit()
        assert taker.mine() == []
        with database.write() as connection:
            taker.take_over(connection)
        again = lease_of(database, tmp_path, "taker", hand)
        assert again.begin().epoch.number == 2
        assert again.mine() == [(gateway_id, 1)]
