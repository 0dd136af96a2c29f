"""Usage from elsewhere: recorded once whatever comes again, for whom it may be, and never by halves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import DAY_US, HOUR_US, ManualClock, iso, time_us
from render_platform.database import metadata
from render_platform.errors import RecordError
from render_platform.events import UsageEvent
from render_platform.gateway.identity import ANONYMOUS, Customers, Forbidden, Principal, Terms
from render_platform.gateway.ingest import MEMBERS, Ingest, event_id_of
from render_platform.gateway.problems import Conflict
from render_platform.gateway.store import Do, JobStore, Operation
from render_platform.gateway.writer import Writer
from render_platform.outbox import customer_ref
from tests.factories import START_US
from tests.gateway.test_ingest_reading import USED, event, read
from tests.platforms import check_evidence, connect, make_platform, run_together

METER = Principal(
    "key", "edge", frozenset({"meter"}), **asdict(Terms()), sources=frozenset({"edge/a"}), customers=frozenset({"*"})
)


class World:
    """A platform, its clock, and an ingest."""

    def __init__(self, state: Path, seed: str = "") -> None:
        self.clock = ManualClock(START_US)
        self.platform = make_platform(state, self.clock, seed, batch_rows=5)
        self.ingest = Ingest(self.platform.outbox, self.platform.ids, self.clock)

    def report(self, *sent: Any, by: Principal = METER) -> list[UsageEvent]:
        events = read(*sent)
        with self.platform.database.write() as connection:
            return self.ingest.record(connection, by, events)

    def dump(self) -> dict[str, list[Any]]:
        with closing(connect(self.platform.settings.state_dir)) as connection:
            return {
                table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in metadata.tables
            }


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.platform.close()


def test_what_is_recorded_is_what_was_sent_with_the_defaults_that_are_documented(world: World) -> None:
    (got,) = world.report(event())
    assert got.gpu_started_at == got.event_time - 1_500_000, "as long as its GPU time"
    expected = USED | {
        "source": "edge/a",
        "gateway_id": "ingest",
        "attempt": 1,
        "event_time": START_US,
        "recorded_at": START_US,
        "pricing_tier": "standard",
        "queue_time_us": 0,
        "inference_time_us": 1_500_000,
        "total_time_us": 1_500_000,
        "gpu_count": 1,
        "batch_size": 1,
        "meter": "external",
        "status": "success",
        "model_name": "flux-dev",
    }
    del expected["model"]
    assert expected.items() <= asdict(got).items()
    unknown = ("input_tokens", "output_tokens", "input_dims", "num_steps", "image_count", "device_uuid", "energy_mj")
    assert {getattr(got, name) for name in (*unknown, "error_code")} == {None}
    assert got.event_id == got.job_id == got.request_id == event_id_of("edge/a", "1")


def test_every_member_reaches_its_column(world: World) -> None:
    sent: dict[str, Any] = {
        "model_type": "llm",
        "gpu_started_at": "2023-11-16T17:59:50.0000019Z",
        "gpu_count": 2,
        "device_uuid": "GPU-7",
        "batch_size": 8,
        "energy_mj": 70_000,
        "status": "error",
        "error_code": "out_of_memory",
        "input_tokens": 0,
        "output_tokens": 9,
        "input_dims": "512x512",
        "num_steps": 20,
        "image_count": 1,
        "queue_time_us": 5,
        "inference_time_us": 6,
        "total_time_us": 7,
    }
    assert {*sent, *USED} == MEMBERS.keys()
    (got,) = world.report(event(**sent, time="2023-11-16T19:00:00.0000001+01:00"))
    expected = sent | {"gpu_started_at": START_US - 10_000_000 + 1, "event_time": START_US + 1}
    assert expected.items() <= asdict(got).items(), "the run time is widened, never narrowed"


# Recording: once, and not by halves.


def same_again() -> Iterator[dict[str, Any]]:
    """What says the same in other words."""
    yield dict(reversed(event().items()))
    yield event(time="2023-11-16t20:00:00.000+02:00", traceparent="00-1", dataschema="urn:x", device_uuid=None)
    yield event(data=dict(reversed((USED | {"energy_mj": None}).items())), datacontenttype="application/json")


def test_what_comes_again_with_the_same_content_changes_nothing_however_late(world: World) -> None:
    assert len(world.report(event())) == 1
    before = world.dump()
    for years, again in enumerate(same_again()):
        world.clock.move_to(START_US + years * 365 * DAY_US)
        assert world.report(again) == []
    assert world.dump() == before
    assert len(world.report(event("2"), event("1"), event("2"))) == 1, "also in a batch, with something new"


def test_an_event_without_a_time_is_the_same_when_it_comes_later(world: World) -> None:
    world.clock.move_to(START_US + 7)
    (got,) = world.report(event(time=None))
    assert got.event_time == START_US + 7
    world.clock.move_to(START_US + HOUR_US)
    assert world.report(event(time=None)) == []
    with pytest.raises(Conflict):
        world.report(event(time=iso(START_US + 7)))


OTHER: list[dict[str, Any]] = [
    {"subject": "other"},
    {"time": iso(START_US + 1)},
    {"gpu_time_ns": 1},
    {"gpu_count": 1},
    {"model": "flux-dev-2"},
    {"device_uuid": "GPU-0"},
    {"status": "error"},
]


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("together", [False, True])
def test_other_content_under_the_same_id_is_a_conflict_and_nothing_of_the_batch_stands(
    world: World, other: dict[str, Any], together: bool
) -> None:
    earlier = [event("it")] if together else []
    world.report(event("0"), *([] if together else [event("it")]))
    before = world.dump()
    with pytest.raises(Conflict, match=r"\.id: it of edge/a") as caught:
        world.report(*earlier, event("new", subject="a new customer"), event("it", **other))
    assert caught.value.status == 409
    assert world.dump() == before


def test_the_same_subject_of_another_issuer_is_another_customer(world: World) -> None:
    world.report(event())
    with pytest.raises(Conflict):
        world.report(event(), by=ANONYMOUS)


CHILD = """
import sys
from pathlib import Path
from tests.gateway.test_ingest import World, event

world = World(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(sum(len(world.report(*(event(f"{group}-{n}") for n in range(5)))) for group in range(20)))
"""


def test_two_processes_record_each_event_once(world: World) -> None:
    said = run_together(CHILD, world.platform.settings.state_dir, "ab")
    assert sum(map(int, said)) == 100
    assert world.platform.outbox.totals("edge/a") == (100, 100 * 1_500_000_000)


def test_a_transaction_that_fails_after_it_leaves_nothing_and_is_done_again(world: World) -> None:
    before = world.dump()

    def fail() -> None:
        with world.platform.database.write() as connection:
            world.ingest.record(connection, METER, read(event("1"), event("2")))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert world.dump() == before
    assert len(world.report(event("1"), event("2"))) == 2


def test_what_is_refused_in_a_group_of_writes_fails_alone(world: World) -> None:
    async def story() -> list[Any]:
        database, loop = world.platform.database, asyncio.get_running_loop()
        store = JobStore(world.platform.outbox, world.clock, world.platform.ids, "gw-1", 1)
        writer: Writer[Operation] = Writer(database, store, loop)
        groups = [read(event("1")), read(event("2"), event("1", gpu_time_ns=5)), read(event("3"))]
        waiting = [
            writer.submit(Do(lambda connection, group=group: world.ingest.record(connection, METER, group)))  # type: ignore[misc]
            for group in groups
        ]
        writer.start()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await writer.stop()
        return results

    first, second, third = asyncio.run(story())
    assert [len(first), len(third)] == [1, 1]
    assert isinstance(second, Conflict)
    assert world.platform.outbox.totals().events == 2


# Who may, for whom, and when.


@pytest.mark.parametrize(
    ("changes", "source", "subject"),
    [
        ({}, "edge/b", "acme"),
        ({"customers": frozenset({"acme"})}, "edge/a", "other"),
        ({"roles": frozenset({"customer", "operator"})}, "edge/a", "acme"),
        ({"sources": frozenset({"*"})}, "gateway/gw-1", "acme"),
        ({"sources": frozenset({"*"})}, "Trace/1", "acme"),
        ({"sources": None}, "edge/a", "acme"),
    ],
)
def test_one_event_that_may_not_be_reported_refuses_the_batch(
    world: World, changes: dict[str, Any], source: str, subject: str
) -> None:
    known = {name: getattr(METER, name) for name in METER.__slots__}
    before = world.dump()
    with pytest.raises(Forbidden, match=r"^\[[01]\]\.source"):
        world.report(event("ok"), event(source=source, subject=subject), by=Principal(**known | changes))
    assert world.dump() == before


def test_the_customer_and_the_tier_are_those_of_the_reporters_issuer(world: World) -> None:
    Customers(world.platform.database).set("key", "acme", Terms("enterprise"))
    Customers(world.platform.database).set("other-issuer", "Zoë", Terms("free"))
    one, two, three = world.report(event("1"), event("2"), event("3", subject="Zoë"))
    assert one.customer_ref == two.customer_ref != three.customer_ref
    assert (one.pricing_tier, two.pricing_tier, three.pricing_tier) == ("enterprise", "enterprise", "standard")
    salts = {row[2]: row[3] for row in world.dump()["customers"]}
    assert three.customer_ref == customer_ref(salts["Zoë"], "Zoë")
    assert len({one.nonce, two.nonce, three.nonce}) == 3


def test_a_time_far_ahead_is_refused_and_one_long_ago_is_not(world: World) -> None:
    with pytest.raises(RecordError, match=r"^\[1\]\.time: lies in the future"):
        world.report(event("1"), event("2", time=iso(START_US + 301_000_000)))
    with pytest.raises(RecordError, match=r"^\[0\]\.data\.gpu_started_at"):
        world.report(event("2", time=None, gpu_started_at=iso(START_US + 1_000_000)))
    assert world.platform.outbox.totals().events == 0
    assert len(world.report(event("1"), event("2", time=iso(START_US + 299_000_000)))) == 2
    (old,) = world.report(event("3", time="2001-01-01T00:00:00Z"))
    assert (old.event_time, old.recorded_at) == (time_us("2001-01-01T00:00:00Z"), START_US)


def test_recorded_at_never_goes_back(world: World) -> None:
    world.clock.move_to(START_US + 50)
    world.report(event("1"))
    world.ingest = Ingest(world.platform.outbox, world.platform.ids, ManualClock(START_US))
    (late,) = world.report(event("2"))
    assert late.recorded_at == START_US + 50


def test_what_was_reported_becomes_evidence(world: World) -> None:
    recorded = world.report(*(event(str(n), subject=f"customer {n % 3}") for n in range(12)))
    platform = world.platform
    world.clock.move_to(START_US + HOUR_US)
    platform.flush()
    check_evidence(platform.settings.state_dir, platform.log_signer.verifier.vkey, recorded)
