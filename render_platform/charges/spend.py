"""What a customer has spent in a month: charged by the log, estimated from ClickHouse where the log is not there yet.

- What is charged is read from the month's records: exact, and the same for whoever reads the log.
- Days without a record are priced with the book from ClickHouse's rows: an estimate, and said to be one. Where
  ClickHouse does not answer, or the book does not price a row, the estimate is unknown, never zero.
- Energy is of the events that have a reading; how many have none is said beside it.
- A budget is an amount a month, of one customer. What is unknown is never held against it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, Decimal, localcontext
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import sqlalchemy as sa

from render_platform.cas import Cas
from render_platform.charges.chain import TYPES, Month, Numbered, month_bounds, read_record
from render_platform.charges.price_book import AMOUNT, UNITS, PriceBook, load_price_book
from render_platform.charges.rating import EXACT, Used, rate
from render_platform.charges.records import DayCharges, Line
from render_platform.clickhouse import ClickHouse
from render_platform.clickhouse_schema import RANGE
from render_platform.clock import DAY_US, Clock
from render_platform.config import Settings
from render_platform.database import Database, log_entries, metadata
from render_platform.entries import parse
from render_platform.errors import Unavailable, UsageError

MJ_PER_KWH = 3_600_000_000
REMEMBERED = 3
"""Months whose sums are kept in memory."""
_COUNTS = {"output_token": "output_tokens", "input_token": "input_tokens", "image": "image_count", "step": "num_steps"}

budgets = sa.Table(
    "budgets",
    metadata,
    sa.Column("customer_ref", sa.Text, primary_key=True),
    sa.Column("amount", sa.Text, nullable=False),  # a month, Decimal text in `currency`
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("enforce", sa.Boolean, nullable=False),
    sa.Column("set_us", sa.BigInteger, nullable=False),
)


class Budget(NamedTuple):
    """`enforce`: jobs of a customer who has spent it are refused."""

    customer_ref: str
    amount: Decimal
    currency: str
    enforce: bool

    def not_compared(self, currency: str) -> str:
        """Why it is not compared with what is charged in a currency; empty where it is."""
        if self.currency == currency:
            return ""
        return f"the budget is in {self.currency}, charges are in {currency}"


@dataclass(frozen=True, slots=True)
class SkuSpend:
    """`quantity` in base units, of the events that have one; `amount` in whole minor units."""

    sku: str
    unit: str
    quantity: int
    events: int
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Spend:
    """One customer's month. `estimated` is None where it is unknown, and `unknown` says why."""

    customer_ref: str
    month: str
    currency: str
    charged: tuple[SkuSpend, ...]
    charged_days: int
    estimated: tuple[SkuSpend, ...] | None
    unknown: str
    events: int
    energy_known: int
    energy_mj: int
    co2_g_per_kwh: int
    budget: Budget | None

    @property
    def spent(self) -> Decimal:
        """What is known to be spent: charged, and estimated where that is known."""
        return sum((one.amount for one in (*self.charged, *(self.estimated or ()))), Decimal(0))

    @property
    def not_compared(self) -> str:
        """Why the budget says nothing of what is spent; empty where it does, or there is none."""
        return "" if self.budget is None else self.budget.not_compared(self.currency)

    @property
    def share(self) -> Decimal | None:
        """Of the budget, spent: 1 is all of it. None without a budget, or where that is in another currency."""
        if self.budget is None or self.not_compared:
            return None
        if not self.budget.amount:
            return Decimal(1) if self.spent else Decimal(0)
        return (self.spent / self.budget.amount).quantize(Decimal("0.0001"), ROUND_DOWN)  # 1 is all, and no less

    @property
    def co2_g(self) -> Decimal | None:
        """Grams for the energy that is known; None where no factor is set, or nothing is known."""
        if not self.co2_g_per_kwh or not self.energy_known:
            return None
        return (Decimal(self.energy_mj) * self.co2_g_per_kwh / MJ_PER_KWH).quantize(Decimal("0.001"))

    def as_json(self) -> dict[str, Any]:
        """Amounts are Decimal text; `estimated`, `joules` and `co2_grams` are null where they are not known."""
        budget = self.budget
        return {
            "customer_ref": self.customer_ref,
            "month": self.month,
            "currency": self.currency,
            "charged": [_sku_json(one) for one in self.charged],
            "charged_total": f"{sum((one.amount for one in self.charged), Decimal(0)):f}",
            "charged_days": self.charged_days,
            "estimated": None if self.estimated is None else [_sku_json(one) for one in self.estimated],
            "estimated_total": None
            if self.estimated is None
            else f"{sum((one.amount for one in self.estimated), Decimal(0)):f}",
            "estimate_unknown": self.unknown,
            "events": self.events,
            "energy_known_events": self.energy_known,
            "joules": f"{Decimal(self.energy_mj) / 1_000:f}" if self.energy_known else None,
            "co2_grams": None if self.co2_g is None else f"{self.co2_g:f}",
            "budget": None if budget is None else f"{budget.amount:f}",
            "budget_currency": None if budget is None else budget.currency,
            "budget_enforced": budget is not None and budget.enforce,
            "budget_share": None if self.share is None else f"{self.share:f}",
        }


def _sku_json(one: SkuSpend) -> dict[str, Any]:
    return {
        "sku": one.sku,
        "unit": one.unit,
        "quantity": str(one.quantity),
        "events": one.events,
        "amount": f"{one.amount:f}",
    }


def book_of(settings: Settings) -> PriceBook:
    """The configured price book, or the sample one."""
    return load_price_book(None if settings.price_book == Path() else settings.price_book)


class Budgets:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def set(self, customer_ref: str, amount: str, currency: str, *, enforce: bool) -> Budget:
        """In the place of an earlier one. A crash before the commit: that one stands; after it: this one."""
        if not AMOUNT.fullmatch(amount):
            raise UsageError(f"{amount!r} is not an amount", f"give it as 250 or 99.50, of the price book's {currency}")
        value = Decimal(amount)
        row = {"amount": f"{value:f}", "currency": currency, "enforce": enforce, "set_us": self._clock.now_us()}
        with self._database.write() as connection:
            connection.execute(budgets.delete().filter_by(customer_ref=customer_ref))
            connection.execute(budgets.insert().values(customer_ref=customer_ref, **row))
        return Budget(customer_ref, value, currency, enforce)

    def remove(self, customer_ref: str) -> bool:
        """Whether there was one."""
        with self._database.write() as connection:
            return bool(connection.execute(budgets.delete().filter_by(customer_ref=customer_ref)).rowcount)

    def all(self) -> dict[str, Budget]:
        with self._database.read() as connection:
            rows = connection.execute(sa.select(budgets).order_by(budgets.c.customer_ref)).all()
        return {r.customer_ref: Budget(r.customer_ref, Decimal(r.amount), r.currency, r.enforce) for r in rows}


@dataclass(slots=True)
class _Charged:
    """What is charged of one customer's month; or estimated."""

    skus: dict[str, SkuSpend] = field(default_factory=dict)
    events: int = 0
    energy_known: int = 0
    energy_mj: int = 0


@dataclass(slots=True)
class _Known:
    """A month's records, added up: grows with the log, and is as large as its customers and SKUs are many."""

    entries: int = 0
    month: Month = field(default_factory=Month)
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Of each customer: events, those with a reading of energy, and that, in mJ."""
    skus: set[str] = field(default_factory=set)

    def add(self, numbered: Numbered, cas: Cas) -> None:
        record = read_record(numbered.entry, cas)
        former = self.month.add(numbered, record, cas)
        if isinstance(record, DayCharges):
            self._count(former.lines if former else (), -1)
            self._count(record.lines, 1)
        self.entries += 1

    def _count(self, lines: Sequence[Line], sign: int) -> None:
        kinds: dict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: dict.fromkeys(UNITS, 0))
        for line in lines:
            kind = line.customer_ref, line.model_name, line.pricing_tier, line.device_class, line.status
            kinds[kind][line.unit] += line.events
            one = self.counts.setdefault(intern(line.customer_ref), [0, 0, 0])
            one[1] += sign * line.energy_known
            one[2] += sign * line.energy_mj
            self.skus.add(intern(line.sku))
        for (ref, *_), of_units in kinds.items():
            # Each event once: it has a line for each unit that its rules price, and the same units as its kind.
            self.counts[ref][0] += sign * max(of_units.values())

    def of(self, ref: str) -> _Charged:
        found = _Charged({}, *self.counts.get(ref, ()))
        for sku in self.skus:
            used, issued = self.month.state.used.get((ref, sku)), self.month.state.issued.get((ref, sku))
            if used is not None or issued is not None:
                unit, quantity, events = (used.unit, used.quantity, used.events) if used else ("", 0, 0)
                found.skus[sku] = SkuSpend(sku, unit, quantity, events, Decimal(0) if issued is None else issued)
        return found


Opener = Callable[[], AbstractContextManager[ClickHouse]]


class Spending:
    """Reads of spend, for any number of threads. `clickhouse` gives a connection for one read."""

    def __init__(
        self, database: Database, cas: Cas, clickhouse: Opener, clock: Clock, book: PriceBook, co2_g_per_kwh: int = 0
    ) -> None:
        self._database, self._cas, self._clickhouse, self._clock = database, cas, clickhouse, clock
        self.book, self._co2 = book, co2_g_per_kwh
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def of(self, customer_ref: str, month: str) -> Spend:
        return self.all(month, [customer_ref])[customer_ref]

    def all(self, month: str, customers: Iterable[str]) -> dict[str, Spend]:
        """The spend of each of these customers, at the cost of one read of the log and one of ClickHouse."""
        refs = list(dict.fromkeys(customers))
        with self._lock:
            known = self._read(month)
            days, charged = frozenset(known.month.state.latest), {ref: known.of(ref) for ref in refs}
            currency = next((day.currency for day in known.month.state.latest.values()), "")
        limits = Budgets(self._database, self._clock).all()
        estimates = self._estimates(month, days, currency, refs)
        return {
            ref: self._spend(ref, month, currency, len(days), charged[ref], estimates[ref], limits.get(ref))
            for ref in refs
        }

    def customers(self, month: str) -> list[str]:
        """Who is charged anything in the month."""
        with self._lock:
            return sorted({ref for ref, _ in self._read(month).month.state.issued})

    def _spend(
        self,
        ref: str,
        month: str,
        currency: str,
        days: int,
        charged: _Charged,
        estimate: _Charged | str,
        budget: Budget | None,
    ) -> Spend:
        more = estimate if isinstance(estimate, _Charged) else _Charged()
        return Spend(
            customer_ref=ref,
            month=month,
            currency=currency or self.book.currency,
            charged=tuple(charged.skus[sku] for sku in sorted(charged.skus)),
            charged_days=days,
            estimated=None if isinstance(estimate, str) else tuple(more.skus[sku] for sku in sorted(more.skus)),
            unknown=estimate if isinstance(estimate, str) else "",
            events=charged.events + more.events,
            energy_known=charged.energy_known + more.energy_known,
            energy_mj=charged.energy_mj + more.energy_mj,
            co2_g_per_kwh=self._co2,
            budget=budget,
        )

    def _read(self, month: str) -> _Known:
        """Under the lock. Of what was read before, sums alone are left: the new records are read, one at a time."""
        start_us, end_us = month_bounds(month)
        hour = log_entries.c.hour_us
        query = sa.select(log_entries.c.log_index, log_entries.c.entry).where(
            log_entries.c.type.in_(TYPES), hour >= start_us, hour < end_us
        )
        known = self._known.pop(month, None) or _Known()
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(log_entries.c.log_index)).all()
        for row in rows[known.entries :]:
            known.add(Numbered(row.log_index, parse(bytes(row.entry))), self._cas)
        self._known[month] = known  # not after an error: it may be half added
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return known

    def _estimates(
        self, month: str, days: frozenset[int], currency: str, refs: Sequence[str]
    ) -> dict[str, _Charged | str]:
        """Of each customer, what ClickHouse holds of the days without a record; or why that is not known."""
        spans = _uncharged(month, days, self._clock.now_us())
        if not spans or not refs:
            return {ref: _Charged() for ref in refs}
        if currency and currency != self.book.currency:
            other = f"the month is charged in {currency}, the price book is in {self.book.currency}"
            return dict.fromkeys(refs, other)
        usage: dict[str, list[dict[str, Any]]] = defaultdict(list)
        try:
            with self._clickhouse() as clickhouse:
                for start_us, end_us in spans:
                    values = {"start": start_us, "end": end_us, "customers": list(refs)}
                    for row in clickhouse.query(_usage_sql(self.book), **values).to_pylist():
                        usage[row["customer_ref"]].append(row)
        except Unavailable as error:
            return dict.fromkeys(refs, error.message)
        return {ref: self._estimate(usage[ref]) for ref in refs}

    def _estimate(self, rows: Sequence[Mapping[str, Any]]) -> _Charged | str:
        """What the book does not price makes one customer's estimate unknown, and nobody else's."""
        try:
            return _estimated(self.book, rows)
        except UsageError as error:
            return error.message


def _uncharged(month: str, days: frozenset[int], now_us: int) -> list[tuple[int, int]]:
    """The spans of a month, up to now, that no record is of."""
    start_us, end_us = month_bounds(month)
    spans: list[tuple[int, int]] = []
    for day in range(start_us, min(end_us, now_us + 1), DAY_US):
        if day in days:
            continue
        if spans and spans[-1][1] == day:
            spans[-1] = (spans[-1][0], day + DAY_US)
        else:
            spans.append((day, day + DAY_US))
    return spans


def _usage_sql(book: PriceBook) -> str:
    """ClickHouse's query that gives rows like those of USAGE_SCHEMA, for some customers."""
    conditions = "".join(
        f"event_time < fromUnixTimestamp64Micro(toInt64({period.from_us:d}), 'UTC'), {number - 1}, "
        for number, period in enumerate(book.periods)
    )
    columns = [("gpu_second", "gpu_time_ns"), *_COUNTS.items(), ("energy", "energy_mj")]
    known = ", ".join(f"toInt64(count({column})) AS {unit}_known" for unit, column in columns)
    sums = ", ".join(f"toString(sum(toInt128(ifNull({column}, 0)))) AS {unit}" for unit, column in columns)
    names = "toString(customer_ref) AS customer_ref, toString(pricing_tier) AS pricing_tier, "
    names += "toString(model_name) AS model_name, toString(device_uuid) AS device_uuid, toString(status) AS status"
    return f"""SELECT multiIf({conditions}{len(book.periods) - 1}) AS period, {names}, toInt64(count()) AS events,
        {known}, {sums} FROM usage_events WHERE {RANGE} AND customer_ref IN {{customers:Array(String)}}
        GROUP BY period, customer_ref, pricing_tier, model_name, device_uuid, status"""  # noqa: S608


def _estimated(book: PriceBook, rows: Sequence[Mapping[str, Any]]) -> _Charged:
    """Rounded for each SKU, as the month would be if this were all of it."""
    sums: dict[str, Used] = defaultdict(Used)
    with localcontext(EXACT):
        for line in rate(book, rows):
            sums[line.sku].add(line, 1)
        skus = {k: SkuSpend(k, one.unit, one.quantity, one.events, book.round(one.amount)) for k, one in sums.items()}
    return _Charged(
        skus,
        sum(int(row["events"]) for row in rows),
        sum(int(row["energy_known"]) for row in rows),
        sum(int(row["energy"]) for row in rows),
    )
