"""Charges of a real platform: closed days, corrections, invoices, crashes at every write, and verification."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner

from render_platform.charges.chain import rerate
from render_platform.charges.charging import Charging
from render_platform.charges.price_book import load_price_book, parse_price_book
from render_platform.cli import main
from render_platform.clock import DAY_US, HOUR_US, ManualClock, time_us
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.evidence import Verification
from render_platform.pipeline import Platform
from tests.factories import START_US
from tests.faults.test_crash_slow_path import KINDS, Crash, Faults, failed_write, with_faults
from tests.platforms import make_platform, read_blob, record_random

DAY = START_US - START_US % DAY_US
SECOND = DAY + DAY_US
CLOSED = DAY + 2 * DAY_US + HOUR_US
MONTH = "2023-11"
AFTER_MONTH = time_us("2023-12-01T02:00:00Z")
BOOK = load_price_book(None)


def dearer(version: int = 2) -> bytes:
    return BOOK.data.replace(b"version = 1", f"version = {version}".encode()).replace(b'"0.0008"', b'"0.0009"')


def open_at(state: Path, now_us: int, seed: int | str) -> Platform:
    return make_platform(state, ManualClock(now_us), seed)


@pytest.fixture(scope="module")
def two_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days of events, sealed and published; the clock has passed both."""
    state = tmp_path_factory.mktemp("two-days") / "state"
    platform = open_at(state, START_US, 0)
    record_random(platform, 60, 1)
    record_random(platform, 40, 2, start_us=SECOND + 3 * HOUR_US)
    platform.clock.move_to(CLOSED)  # type: ignore[attr-defined]
    platform.flush()
    platform.close()
    return state


@pytest.fixture
def state(two_days: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_days, tmp_path / "state"))


def add_late(platform: Platform, lane: str, n: int, seed: int) -> None:
    """Events that come into the first day by another lane, after it was closed."""
    with platform.database.write() as connection:
        platform.outbox.open_lane(connection, lane, START_US, START_US + HOUR_US)
    record_random(platform, n, seed, lane=lane)
    finish(platform, lane)
    platform.flush()


def finish(platform: Platform, lane: str) -> None:
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, lane, CLOSED)


def verified(platform: Platform) -> Verification:
    outcome = platform.verify(deep=True)
    rerate(outcome, platform.cas)
    return outcome


def test_a_day_is_charged_once_and_every_event_stands_in_it(state: Path) -> None:
    platform = open_at(state, CLOSED, 1)
    charging = Charging(platform, BOOK)
    assert charging.due() == [DAY, SECOND]
    first = charging.charge(DAY)
    assert (first.changed, first.record.revision, first.record.events) == (True, 1, 60)
    assert first.record.gpu_time_ns == sum(line.gpu_time_ns for line in first.record.lines) > 0
    size = platform.log.publish()
    again = charging.charge(DAY)
    assert (again.changed, again.digest, platform.log.publish()) == (False, first.digest, size)
    assert charging.due() == [SECOND]
    charging.charge(SECOND)
    assert (charging.due(), charging.check(MONTH)) == ([], [])
    outcome = verified(platform)
    assert (outcome.problems, outcome.charges) == ([], 3), "a price book and two days"
    platform.close()


def test_what_is_not_closed_is_refused(tmp_path: Path) -> None:
    platform = open_at(tmp_path / "state", START_US, 0)
    with pytest.raises(Unavailable, match="nothing recorded into"):
        Charging(platform, BOOK).charge(DAY)
    record_random(platform, 5, 1)
    platform.flush()
    with pytest.raises(Unavailable, match="2023-11-16T18h is open"):
        Charging(platform, BOOK).charge(DAY)
    with pytest.raises(UsageError, match="first instant"):
        Charging(platform, BOOK).charge(START_US)
    assert Charging(platform, BOOK).due() == []
    platform.close()


def test_events_that_wait_keep_a_day_open(state: Path) -> None:
    platform = open_at(state, CLOSED, 1)
    with platform.database.write() as connection:
        platform.outbox.open_lane(connection, "trace/late", START_US, START_US + HOUR_US)
    record_random(platform, 5, 9, lane="trace/late")
    finish(platform, "trace/late")
    with pytest.raises(Unavailable, match="is open"):
        Charging(platform, BOOK).charge(DAY)
    platform.close()


def test_late_events_are_a_correction_and_the_invoice_follows(state: Path) -> None:
    platform = open_at(state, AFTER_MONTH, 1)
    charging = Charging(platform, BOOK)
    with pytest.raises(Unavailable, match="is not over"):
        charging.invoice(MONTH)
    finish(platform, "live")
    with pytest.raises(Unavailable, match="2 days of 2023-11 are not charged"):
        charging.invoice(MONTH)
    for day in charging.due():
        charging.charge(day)
    invoice = charging.invoice(MONTH)
    assert (invoice.changed, invoice.record.revision) == (True, 1)
    assert sum(Decimal(line.amount) for line in invoice.record.lines) == Decimal(invoice.record.total) > 0
    assert charging.invoice(MONTH).changed is False

    add_late(platform, "trace/late", 30, 5)
    assert charging.due() == [DAY]
    with pytest.raises(Unavailable, match="1 days of 2023-11 are not charged"):
        charging.invoice(MONTH)
    corrected = charging.charge(DAY)
    assert (corrected.record.revision, corrected.record.events) == (2, 90)
    second = charging.invoice(MONTH)
    assert (second.record.revision, second.record.prior) == (2, invoice.digest)
    together = Decimal(invoice.record.total) + Decimal(second.record.total)
    month = charging.month(MONTH)
    assert together == sum(month.state.issued.values())
    assert charging.check(MONTH) == []
    assert verified(platform).problems == []

    fresh = state.parent / "fresh"
    other = open_at(fresh, START_US, 0)  # the same events, charged when all of them are there
    record_random(other, 60, 1)
    record_random(other, 40, 2, start_us=SECOND + 3 * HOUR_US)
    other.clock.move_to(CLOSED)  # type: ignore[attr-defined]
    add_late(other, "trace/late", 30, 5)
    afresh = Charging(other, BOOK)
    for day in afresh.due():
        afresh.charge(day)
    assert dict(afresh.month(MONTH).state.issued) == dict(month.state.issued)
    other.close()
    platform.close()


def test_a_new_price_is_a_correction_too_and_a_book_is_one_version(state: Path) -> None:
    platform = open_at(state, CLOSED, 1)
    first = Charging(platform, BOOK).charge(DAY)
    same_prices = parse_price_book(BOOK.data.replace(b"version = 1", b"version = 2"))
    assert Charging(platform, same_prices).charge(DAY).changed is False
    with pytest.raises(UsageError, match="another price book of version 1"):
        Charging(platform, parse_price_book(dearer(version=1))).charge(DAY)
    assert Charging(platform, parse_price_book(dearer(3))).charge(DAY).record.revision == 2
    month = Charging(platform, BOOK).month(MONTH)
    assert month.days[1].record.amount > first.record.amount
    assert verified(platform).problems == []
    platform.close()


def test_what_the_book_does_not_price_leaves_nothing(state: Path) -> None:
    platform = open_at(state, CLOSED, 1)
    before = platform.log.publish()
    book = parse_price_book(BOOK.data.replace(b'price = "0.0008"', b'price = "0.0008"\nmodel = "none"'))
    with pytest.raises(UsageError, match="no rule of the price book prices model"):
        Charging(platform, book).charge(DAY)
    assert platform.log.publish() == before
    platform.close()


def charge_all(state: Path, faults: Faults, seed: str) -> bool:
    """Whether both days were charged before a crash. After an error the same platform tries once more."""
    platform = with_faults(open_at(state, CLOSED, seed), faults)
    charging = Charging(platform, BOOK)
    try:
        for day in (DAY, SECOND):
            charging.charge(day)
    except Crash:
        return False
    except Unavailable:
        for day in (DAY, SECOND):
            charging.charge(day)
    finally:
        platform.close()
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Crash, failed_write])
def test_a_failure_at_any_write_charges_once(two_days: Path, tmp_path: Path, kind: str, make: type[Crash]) -> None:
    expected = None
    for at in range(1, 100):
        state = Path(shutil.copytree(two_days, tmp_path / f"{at}"))
        faults = Faults(at, kind, make)
        if not charge_all(state, faults, f"{at}/0"):
            assert charge_all(state, Faults(), f"{at}/1")
        platform = open_at(state, CLOSED, f"{at}/2")
        month = Charging(platform, BOOK).month(MONTH)
        found = [(one.record.day_us, one.record.revision, one.digest) for one in month.days]
        expected = expected or found
        assert found == expected
        assert [day for day, *_ in found] == [DAY, SECOND]
        outcome = verified(platform)
        assert (outcome.problems, outcome.charges) == ([], 3), "all is published: a price book and two days"
        platform.close()
        shutil.rmtree(state)
        if not faults.injected:
            assert at > 15
            return
    pytest.fail("the writes did not come to an end")


def test_two_that_charge_at_once_keep_one_chain(state: Path) -> None:
    """The second one reads the month before the first one's record is logged, and logs its own after."""
    one, two = open_at(state, CLOSED, "one"), open_at(state, CLOSED, "two")
    first, second = Charging(one, BOOK), Charging(two, BOOK)
    stale = second.month(MONTH)
    first.charge(DAY)
    reads = iter([stale])
    real = second.month
    setattr(second, "month", lambda month: next(reads, None) or real(month))  # noqa: B010
    charged = second.charge(SECOND)
    assert charged.record.prior == first.month(MONTH).days[0].digest
    assert first.check(MONTH) == []
    assert verified(one).problems == []
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"issued":"', b'"issued":"1', "the records issue 1"),
        (b'"total":"', b'"total":"1', "the month's lines come to"),
        (b'"price":"0.0008"', b'"price":"0.0007"', "is not quantity × price"),
        (b'"events":60', b'"events":61', "does not say what its entry says"),
    ],
)
def test_a_record_that_is_logged_and_wrong_is_found(state: Path, old: bytes, new: bytes, problem: str) -> None:
    """A platform that logs charges which its batches and price book do not come to."""
    platform = open_at(state, CLOSED, 1)
    put = platform.cas.put
    setattr(platform.cas, "put", lambda data: put(data.replace(old, new, 1) if b"usage_charges" in data else data))  # noqa: B010
    Charging(platform, BOOK).charge(DAY)
    problems = verified(platform).problems
    assert any(one.where == "day/2023-11-16" for one in problems), problems
    try:
        said = Charging(platform, BOOK).check(MONTH)
    except Finding as error:
        said = [str(error)]
    assert any(problem in text for text in said), said
    platform.close()


def test_the_command_verifies_charges(state: Path) -> None:
    platform = open_at(state, CLOSED, 1)
    charged = Charging(platform, BOOK).charge(DAY)
    assert json.loads(read_blob(state, charged.digest))["kind"] == "usage_charges"
    platform.close()
    env = {"RENDER_PLATFORM_DATABASE_URL": platform.settings.database_url}
    result = CliRunner(env=env).invoke(main, ["verify", "--deep", "--json", "--state", str(state)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["charges_rated"] == 2
