"""Charges against those who err, and against a platform that forges: what must be refused, found, or made good."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from render_platform.charges.chain import batches_named, connected, month_bounds, read_usage
from render_platform.charges.charging import Charging
from render_platform.charges.price_book import UNITS, PriceBook, parse_price_book
from render_platform.charges.rating import build_day
from render_platform.charges.records import DayCharges, parse_invoice
from render_platform.charges.spend import Budget, Budgets, SkuSpend, Spend, Spending
from render_platform.clickhouse import ClickHouse
from render_platform.clock import HOUR_US
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import UsageError
from render_platform.pipeline import Platform
from tests.factories import START_US
from tests.platforms import record_random
from tests.test_charging import BOOK, CLOSED, DAY, MONTH, SECOND, add_late, finish, open_at, verified


@pytest.fixture(scope="module")
def two_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("attacked") / "state"
    platform = open_at(state, START_US, 0)
    record_random(platform, 30, 1)
    record_random(platform, 20, 2, start_us=SECOND + 3 * HOUR_US)
    platform.clock.move_to(CLOSED)  # type: ignore[attr-defined]
    platform.flush()
    platform.close()
    return state


@pytest.fixture
def platform(two_days: Path, tmp_path: Path) -> Iterator[Platform]:
    platform = open_at(Path(shutil.copytree(two_days, tmp_path / "state")), CLOSED, 1)
    yield platform
    platform.close()


def forge(platform: Platform, record: DayCharges, name: str, kind: str = "") -> None:
    """Log a record as the platform would, whatever it says."""
    data = record.to_bytes()
    draft = AuditEntry(
        kind or ("correction" if record.revision > 1 else "charges"),
        name,
        FIRST_PREVIOUS,
        recorded_hour=record.day_us,
        batch_seq=record.revision,
        subject_digest=platform.cas.put(data),
        subject_size=len(data),
        records=record.events,
        gpu_time_ns=record.gpu_time_ns,
    )
    platform.log.append(draft, lambda *_: None)
    platform.log.publish()


def rated(platform: Platform, day_us: int, batches: bool = True) -> DayCharges:
    """The first day's usage, as the record of some day."""
    charging = Charging(platform, BOOK)
    found = charging._batches(DAY) if batches else []
    with connected() as connection:
        usage = read_usage(platform.slow, found, BOOK, connection)
    month = charging.month(MONTH)
    return build_day(day_us, BOOK, batches_named(found), usage, month.state, month.day(day_us, platform.cas))


def dearer(version: int) -> PriceBook:
    data = BOOK.data.replace(b"version = 1", f"version = {version}".encode()).replace(b'"0.0008"', b'"0.0009"')
    return parse_price_book(data)


@pytest.mark.parametrize(
    "month", ["2024-1", "２０２４-01", "9999-12", "2024-13", "2024-00", "0001-01", "2024-01-01", ""]
)
def test_what_is_no_month_is_refused(month: str) -> None:
    with pytest.raises(UsageError, match="is not a month"):
        month_bounds(month)


def test_a_day_that_is_charged_again_under_another_hour_is_found(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    forge(platform, rated(platform, DAY + 13 * HOUR_US), "day/2023-11-16T13")
    assert [problem.where for problem in verified(platform).problems] == ["day/2023-11-16T13"]


@pytest.mark.parametrize(
    ("name", "kind"), [("day/2023-11-16/3", ""), ("day/2023-11-17/2", ""), ("day/2023-11-16/2", "charges")]
)
def test_a_record_under_a_name_that_is_not_its_own_is_found(platform: Platform, name: str, kind: str) -> None:
    Charging(platform, BOOK).charge(DAY)
    forge(platform, rated(platform, DAY), name, kind)
    assert [problem.where for problem in verified(platform).problems] == [name]


def test_a_correction_that_rates_fewer_batches_is_found(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    forge(platform, rated(platform, DAY, batches=False), "day/2023-11-16/2")
    assert "rates 0 batches" in verified(platform).problems[0].what


@pytest.mark.parametrize(
    "change", [{"per": 0}, {"unit": "hour"}, {"quantity": -1}, {"amount": f"{'9' * 60}.{'9' * 60}"}]
)
def test_a_line_that_nobody_could_rate_is_found_and_hides_nothing(platform: Platform, change: dict[str, Any]) -> None:
    charging = Charging(platform, BOOK)
    charging.charge(DAY)
    record = rated(platform, DAY)
    lines = (replace(record.lines[0], **change), replace(record.lines[1], amount="1" * 59), *record.lines[2:])
    forge(platform, replace(record, lines=lines), "day/2023-11-16/2")
    assert "day/2023-11-16/2" in [problem.where for problem in verified(platform).problems]


def test_a_second_price_book_of_a_version_is_found(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    other = dearer(1)
    data = AuditEntry(
        "correction",
        "price-book/1",
        FIRST_PREVIOUS,
        subject_digest=platform.cas.put(other.data),
        subject_size=len(other.data),
        batch_seq=1,
    )
    platform.log.append(data, lambda *_: None)
    platform.log.publish()
    assert [problem.where for problem in verified(platform).problems] == ["price-book/1"]


def test_an_older_book_never_prices_over_a_newer_one(platform: Platform) -> None:
    Charging(platform, dearer(5)).charge(DAY)
    for day in (DAY, SECOND):
        with pytest.raises(UsageError, match="charged with version 5 of the price book, this is 1"):
            Charging(platform, BOOK).charge(day)


def test_a_sku_has_one_unit_in_a_month(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    text = BOOK.data.decode().replace("version = 1", "version = 2")
    steps = text.replace('sku = "gpu-second"\nunit = "gpu_second"', 'sku = "gpu-second"\nunit = "step"')
    with pytest.raises(UsageError, match="the SKU gpu-second has the units gpu_second and step"):
        Charging(platform, parse_price_book(steps.encode())).charge(SECOND)


def test_a_late_event_of_a_month_in_another_currency_is_still_charged(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    euros = parse_price_book(BOOK.data.replace(b"version = 1", b"version = 2").replace(b"USD", b"EUR"))
    add_late(platform, "trace/late", 5, 9)
    late = Charging(platform, euros).charge(DAY).record
    assert (late.revision, late.events, late.currency, late.book_version) == (2, 35, "USD", 1)
    assert verified(platform).problems == []


def test_a_lane_that_ended_in_mid_hour_is_charged_all_the_same(tmp_path: Path) -> None:
    """As a recovery leaves it: the lane is finished, its frontier stands before its hour's end, and it holds events."""
    platform = open_at(tmp_path / "state", START_US, 0)
    with platform.database.write() as connection:
        platform.outbox.open_lane(connection, "trace/a", START_US)
    record_random(platform, 7, 3, lane="trace/a", span_us=HOUR_US // 2)
    platform.clock.move_to(CLOSED)  # type: ignore[attr-defined]
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace/a", START_US + HOUR_US // 2)
    platform.flush()
    charging = Charging(platform, BOOK)
    for day in charging.due():
        charging.charge(day)
    assert charging.due() == []
    assert charging.month(MONTH).days[0].record.events == 7
    platform.close()


def test_what_a_crash_left_unpublished_is_published_by_the_repeat(platform: Platform) -> None:
    publish = platform.log.publish
    setattr(platform.log, "publish", lambda: None)  # noqa: B010  the crash is between commit and publication
    Charging(platform, BOOK).charge(DAY)
    assert verified(platform).charges == 0
    setattr(platform.log, "publish", publish)  # noqa: B010
    assert Charging(platform, BOOK).charge(DAY).changed is False
    assert verified(platform).charges == 2, "the price book and the day"


def test_a_correction_without_an_amount_leaves_nothing_to_invoice(platform: Platform) -> None:
    charging = Charging(platform, BOOK)
    for day in (DAY, SECOND):
        charging.charge(day)
    finish(platform, "live")
    platform.clock.move_to(month_bounds(MONTH)[1] + HOUR_US)  # type: ignore[attr-defined]
    assert charging.owes(MONTH)
    charging.invoice(MONTH)
    assert not charging.owes(MONTH)


def test_an_invoice_that_leaves_out_a_record_is_found(platform: Platform) -> None:
    charging = Charging(platform, BOOK)
    for day in (DAY, SECOND):
        charging.charge(day)
    finish(platform, "live")
    platform.clock.move_to(month_bounds(MONTH)[1] + HOUR_US)  # type: ignore[attr-defined]
    put = platform.cas.put

    def less(data: bytes) -> bytes:
        invoice = parse_invoice(data)
        return replace(invoice, charges=invoice.charges[:1]).to_bytes()

    setattr(platform.cas, "put", lambda data: put(less(data) if b'"kind":"invoice"' in data else data))  # noqa: B010
    charging.invoice(MONTH)
    assert charging.check(MONTH) == [f"invoice {MONTH}/1: it does not cover the records before it"]


class Rows:
    """A ClickHouse that gives these rows, of the customers that it is asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def query(self, _sql: str, **values: Any) -> pa.Table:
        return pa.Table.from_pylist([row for row in self._rows if row["customer_ref"] in values["customers"]])


def test_one_customers_unpriced_model_leaves_the_others_estimates_known(platform: Platform) -> None:
    ours, other = "a" * 64, "b" * 64
    book = parse_price_book(BOOK.data.replace(b'price = "0.0008"', b'price = "0.0008"\nmodel = "known"'))
    units = (*UNITS, "energy")
    row = {"period": 0, "pricing_tier": "standard", "device_uuid": None, "status": "success", "events": 1}
    row |= {f"{unit}_known": 1 for unit in units} | dict.fromkeys(units, "500000000000000")
    rows = [row | {"customer_ref": ours, "model_name": "known"}, row | {"customer_ref": other, "model_name": "new"}]
    opener = lambda: nullcontext(cast(ClickHouse, Rows(rows)))  # noqa: E731
    found = Spending(platform.database, platform.cas, opener, platform.clock, book).all(MONTH, [ours, other])
    assert (found[ours].spent, found[ours].unknown) == (Decimal("400.00"), "")
    assert found[other].estimated is None
    assert "no rule of the price book prices model new" in found[other].unknown


@pytest.mark.parametrize(("amount", "spent", "whole"), [("100000", "99995.01", False), ("100", "100.00", True)])
def test_a_budget_is_spent_when_all_of_it_is(amount: str, spent: str, whole: bool) -> None:
    sku = SkuSpend("a", "gpu_second", 1, 1, Decimal(spent))
    budget = Budget("r", Decimal(amount), "USD", True)
    share = Spend("r", MONTH, "USD", (sku,), 1, (), "", 1, 0, 0, 0, budget).share
    assert share is not None
    assert (share >= 1) == whole


@pytest.mark.parametrize("amount", ["0." + "0" * 27 + "1", "1_000", " 5 ", "1e3", "-1", "NaN", "٣"])
def test_what_is_no_amount_is_no_budget(platform: Platform, amount: str) -> None:
    with pytest.raises(UsageError, match="is not an amount"):
        Budgets(platform.database, platform.clock).set("a" * 64, amount, "USD", enforce=True)
