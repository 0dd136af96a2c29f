"""Spend of a customer: charged by the log, estimated from ClickHouse, unknown where it is not known; budgets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import cast

import pytest

from render_platform.cas import Cas
from render_platform.charges.charging import Charging
from render_platform.charges.commands import spending_of
from render_platform.charges.price_book import PriceBook, load_price_book, parse_price_book
from render_platform.charges.records import DayCharges
from render_platform.charges.spend import Budget, Budgets, Spend, Spending, book_of
from render_platform.clickhouse import ClickHouse
from render_platform.clock import DAY_US, HOUR_US
from render_platform.config import load_settings
from render_platform.errors import Unavailable, UsageError
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from tests.chdb_server import fresh_database
from tests.factories import CUSTOMERS, START_US, make_events
from tests.stories import deliver, move_to, open_story, record

DAY = START_US - START_US % DAY_US
MONTH = "2023-11"
BOOK = load_price_book(None)
TOKENS = b"""
[[prices.rules]]
sku = "output"
unit = "output_token"
price = "0.61"
per = 1_000
model = "llama-*"
"""


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """Two days of events, on both paths; the first one is closed, the second is going on."""
    made = open_story(tmp_path / "state", fresh_database(), now_us=START_US, co2_g_per_kwh=400)
    first = record(made, with_energy(make_events(40, 1)))
    move_to(made, DAY + DAY_US + 4 * HOUR_US)
    second = record(made, with_energy(make_events(25, 2, DAY + DAY_US + 2 * HOUR_US)))
    deliver(made, first)
    deliver(made, second)
    made.flush()
    yield made
    made.close()


def with_energy(events: list[UsageEvent]) -> list[UsageEvent]:
    """Every second event has a reading of its device."""
    return [replace(event, energy_mj=number * 1_000 if number % 2 else None) for number, event in enumerate(events)]


def own(platform: Platform, customer: str, book: PriceBook = BOOK) -> Spend:
    return spending_of(platform, book).of(customer, MONTH)


def amounts(record: DayCharges, customer: str) -> dict[str, Decimal]:
    """Exact, by SKU, added up here."""
    found: dict[str, Decimal] = defaultdict(Decimal)
    for line in record.lines:
        if line.customer_ref == customer:
            found[line.sku] += Decimal(line.amount)
    return dict(found)


def cents(amount: Decimal) -> Decimal:
    return (amount + Decimal("0.005")).quantize(Decimal("0.01"), "ROUND_FLOOR")


@pytest.mark.parametrize("book", [BOOK, parse_price_book(BOOK.data.replace(b"version = 1", b"version = 7") + TOKENS)])
def test_what_is_charged_is_exact_and_the_rest_an_estimate(platform: Platform, book: PriceBook) -> None:
    charging = Charging(platform, book)
    before = {customer: own(platform, customer, book) for customer in CUSTOMERS}
    assert all(one.charged == () and one.charged_days == 0 for one in before.values())
    first = charging.charge(DAY).record
    after = {customer: own(platform, customer, book) for customer in CUSTOMERS}
    move_to(platform, DAY + 2 * DAY_US + HOUR_US)
    platform.flush()
    second = charging.charge(DAY + DAY_US).record
    for customer, one in after.items():
        assert {sku.sku: sku.amount for sku in one.charged} == {
            issued.sku: Decimal(issued.issued) for issued in first.issued if issued.customer_ref == customer
        }
        assert one.estimated is not None
        wanted = {sku: cents(amount) for sku, amount in amounts(second, customer).items()}
        assert {sku.sku: sku.amount for sku in one.estimated} == wanted, "what the next record says, rounded alone"
        assert (one.charged_days, one.events) == (1, before[customer].events)
        done = own(platform, customer, book)
        assert (done.estimated, done.charged_days, done.events) == ((), 2, one.events)
        total = {sku: cents(Decimal(amounts(first, customer).get(sku, 0)) + amount) for sku, amount in wanted.items()}
        assert sum(sku.amount for sku in done.charged) == sum(
            Decimal(i.issued) for r in (first, second) for i in r.issued if i.customer_ref == customer
        )
        assert total.keys() <= {sku.sku for sku in done.charged}


def test_each_event_counts_once_and_energy_has_its_events(platform: Platform) -> None:
    """Whether it is read from records or from ClickHouse."""
    stored = platform.query("SELECT customer_ref, count(*) AS n, count(energy_mj) AS k, sum(energy_mj) AS mj "
                            "FROM usage_events GROUP BY customer_ref").to_pylist()  # fmt: skip
    for charged in (False, True):
        if charged:
            Charging(platform, BOOK).charge(DAY)
        for row in stored:
            one = own(platform, row["customer_ref"])
            assert (one.events, one.energy_known, one.energy_mj) == (row["n"], row["k"], int(row["mj"] or 0))
            said = one.as_json()
            joules = None if said["joules"] is None else Decimal(said["joules"])
            assert joules == (Decimal(int(row["mj"])) / 1_000 if row["k"] else None)


def test_grams_are_of_the_factor_and_missing_stays_missing(platform: Platform) -> None:
    one = replace(own(platform, CUSTOMERS[0]), energy_known=2, energy_mj=9_000_000_000)
    assert one.co2_g == Decimal(1_000), "2.5 kWh at 400 g"
    assert replace(one, co2_g_per_kwh=0).co2_g is None
    assert replace(one, energy_known=0, energy_mj=0).co2_g is None
    assert replace(one, energy_known=0, energy_mj=0).as_json()["joules"] is None


def test_without_clickhouse_the_estimate_is_unknown_and_never_zero(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)

    def down() -> nullcontext[ClickHouse]:
        raise Unavailable("ClickHouse failed: it is down")

    spending = Spending(platform.database, platform.cas, down, platform.clock, BOOK)
    one, known = spending.of(CUSTOMERS[0], MONTH), own(platform, CUSTOMERS[0])
    assert (one.estimated, one.unknown) == (None, "ClickHouse failed: it is down")
    assert one.charged == known.charged != ()
    assert one.spent == sum(sku.amount for sku in one.charged)
    said = one.as_json()
    assert (said["estimated"], said["estimated_total"]) == (None, None)


def test_what_the_book_does_not_price_is_unknown(platform: Platform) -> None:
    only_premium = BOOK.data[: BOOK.data.index(b'[[prices.rules]]\nsku = "batch')]
    one = own(platform, CUSTOMERS[0], parse_price_book(only_premium))
    assert one.estimated is None
    assert "no rule of the price book prices" in one.unknown


def test_a_month_in_another_currency_is_not_added_to(platform: Platform) -> None:
    Charging(platform, BOOK).charge(DAY)
    one = own(platform, CUSTOMERS[0], parse_price_book(BOOK.data.replace(b'"USD"', b'"EUR"')))
    assert (one.currency, one.estimated) == ("USD", None)
    assert "EUR" in one.unknown


class Reads:
    """A store that counts its reads, and fails one of them."""

    def __init__(self, cas: Cas, fail_at: int = 0) -> None:
        self._cas, self._fail_at = cas, fail_at
        self.count = 0

    def get(self, digest: str) -> bytes:
        self.count += 1
        if self.count == self._fail_at:
            raise Unavailable("the disk is away", "wait")
        return self._cas.get(digest)


def reader(platform: Platform, reads: Reads) -> Spending:
    opener = lambda: nullcontext(platform.clickhouse)  # noqa: E731
    return Spending(platform.database, cast(Cas, reads), opener, platform.clock, BOOK)


def dearer() -> PriceBook:
    return parse_price_book(BOOK.data.replace(b"version = 1", b"version = 2").replace(b'"0.0008"', b'"0.08"'))


def test_who_has_read_a_month_reads_what_is_new_alone(platform: Platform) -> None:
    reads = Reads(platform.cas)
    spending = reader(platform, reads)
    Charging(platform, BOOK).charge(DAY)
    first = spending.all(MONTH, CUSTOMERS)
    assert (spending.all(MONTH, CUSTOMERS), reads.count) == (first, 1)
    Charging(platform, dearer()).charge(DAY)
    second = spending.all(MONTH, CUSTOMERS)
    assert reads.count == 3, "the correction, and the record that it corrects"
    for customer in CUSTOMERS:
        one, other = first[customer], second[customer]
        assert (one.events, one.energy_known, one.energy_mj) == (other.events, other.energy_known, other.energy_mj)
        assert [(s.sku, s.quantity, s.events) for s in one.charged] == [
            (s.sku, s.quantity, s.events) for s in other.charged
        ]


def test_what_is_free_is_charged_and_comes_to_no_cents(platform: Platform) -> None:
    free = parse_price_book(BOOK.data.replace(b'"0.0008"', b'"0"'))
    Charging(platform, free).charge(DAY)
    charged = [sku for customer in CUSTOMERS for sku in own(platform, customer, free).as_json()["charged"]]
    assert {sku["amount"] for sku in charged} == {"0.00"}


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_read_that_failed_leaves_no_half_of_a_month(platform: Platform, fail_at: int) -> None:
    Charging(platform, BOOK).charge(DAY)
    Charging(platform, dearer()).charge(DAY)
    spending = reader(platform, Reads(platform.cas, fail_at))
    with pytest.raises(Unavailable, match="the disk is away"):
        spending.all(MONTH, CUSTOMERS)
    assert spending.all(MONTH, CUSTOMERS) == reader(platform, Reads(platform.cas)).all(MONTH, CUSTOMERS)


def test_a_correction_is_seen_by_who_has_read_the_month_before(platform: Platform) -> None:
    spending = spending_of(platform, BOOK)
    Charging(platform, BOOK).charge(DAY)
    before = {customer: spending.of(customer, MONTH).charged for customer in CUSTOMERS}
    Charging(platform, dearer()).charge(DAY)
    after = {customer: spending.of(customer, MONTH).charged for customer in CUSTOMERS}
    assert all(sum(s.amount for s in after[c]) > sum(s.amount for s in before[c]) for c in CUSTOMERS if before[c])


def test_a_month_that_nobody_used_is_empty_and_known(platform: Platform) -> None:
    one = spending_of(platform, BOOK).of(CUSTOMERS[0], "2023-10")
    assert (len(one.charged), one.estimated, int(one.spent), one.events) == (0, (), 0, 0)
    with pytest.raises(UsageError, match="is not a month"):
        spending_of(platform, BOOK).of(CUSTOMERS[0], "2023-13")


def test_budgets_are_set_replaced_and_removed(platform: Platform) -> None:
    budgets = Budgets(platform.database, platform.clock)
    budgets.set(CUSTOMERS[0], "10", "USD", enforce=False)
    budgets.set(CUSTOMERS[0], "99.50", "USD", enforce=True)
    assert budgets.all() == {CUSTOMERS[0]: Budget(CUSTOMERS[0], Decimal("99.50"), "USD", True)}
    assert own(platform, CUSTOMERS[0]).as_json()["budget"] == "99.50"
    assert (budgets.remove(CUSTOMERS[0]), budgets.remove(CUSTOMERS[0]), budgets.all()) == (True, False, {})


@pytest.mark.parametrize("amount", ["", "ten", "-1", "NaN", "Infinity", "1e15"])
def test_a_budget_is_an_amount(platform: Platform, amount: str) -> None:
    budgets = Budgets(platform.database, platform.clock)
    with pytest.raises(UsageError, match="is not an amount"):
        budgets.set(CUSTOMERS[0], amount, "USD", enforce=False)
    assert budgets.all() == {}


def test_the_share_of_a_budget(platform: Platform) -> None:
    one = replace(own(platform, CUSTOMERS[0]), charged=(), estimated=None)
    assert one.share is None
    spent = own(platform, CUSTOMERS[0])
    budget = Budget(CUSTOMERS[0], spent.spent * 2, "USD", False)
    assert replace(spent, budget=budget).share == Decimal("0.5")
    assert replace(spent, budget=budget._replace(amount=Decimal(0))).share == 1
    assert replace(one, budget=budget._replace(amount=Decimal(0))).share == 0
    assert replace(spent, budget=budget._replace(currency="EUR")).share is None


def test_the_book_is_the_configured_one(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_bytes(BOOK.data.replace(b"version = 1", b"version = 3"))
    assert book_of(load_settings({}, price_book=file)).version == 3
    assert book_of(load_settings({})).digest == BOOK.digest
