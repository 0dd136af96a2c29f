"""Rating: from usage and a price book to a day's charges and a month's invoice. Pure, and exact.

Amounts are Decimal and never rounded, but once: the month's total of a customer's SKU. What a record issues is that
rounded total less all that was issued before. So the order of days, their splitting and their repetition change
nothing of what a month comes to, and a correction is a record like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal, DivisionByZero, Inexact, InvalidOperation, Overflow, localcontext
from sys import intern
from typing import Any, NamedTuple

import pyarrow as pa

from render_platform.charges.price_book import UNITS, PriceBook, Rule
from render_platform.charges.records import DayCharges, Invoice, InvoiceLine, Issued, Line, exact_sum
from render_platform.errors import UsageError
from render_platform.slow_path import CLICKHOUSE, DUCKDB, Statement, Words

EXACT = Context(prec=120, traps=[Inexact, InvalidOperation, DivisionByZero, Overflow])
"""Refuses to round: what does not fit raises."""
BASE_UNITS = {"gpu_second": 1_000_000_000}
"""Integers of `quantity` in one unit; of all others 1."""
MAX_NAMED = 5
_WHOLE = pa.decimal128(38, 0)
_COLUMNS = {"output_token": "output_tokens", "input_token": "input_tokens", "image": "image_count", "step": "num_steps"}
USAGE_SCHEMA = pa.schema(
    [
        pa.field("period", pa.int64()),
        *(pa.field(n, pa.string()) for n in ("customer_ref", "pricing_tier", "model_name", "device_uuid", "status")),
        pa.field("events", pa.int64()),
        *(pa.field(f"{unit}_known", pa.int64()) for unit in (*UNITS, "energy")),
        *(pa.field(unit, _WHOLE) for unit in (*UNITS, "energy")),
    ]
)
"""Usage of one day, summed: `period` counts the book's periods from 0; −1: before the first."""
Key = tuple[str, str]
"""customer_ref and SKU: what is rounded, a month."""


def usage_of(book: PriceBook) -> Statement:
    """What gives USAGE_SCHEMA of batches, one row or more a key."""
    return Statement(usage_sql(book), usage_sql(book, CLICKHOUSE), USAGE_SCHEMA)


def usage_sql(book: PriceBook, words: Words = DUCKDB) -> str:
    at = words.micros.format("event_time")
    cases = " ".join(f"WHEN {at} < {period.from_us:d} THEN {n - 1}" for n, period in enumerate(book.periods))
    columns = [("gpu_second", "gpu_time_ns"), *_COLUMNS.items(), ("energy", "energy_mj")]
    known = ", ".join(f"count({column}) AS {unit}_known" for unit, column in columns)
    sums = ", ".join(f"{words.total.format(f'coalesce({column}, 0)')} AS {unit}" for unit, column in columns)
    period = f"CAST(CASE {cases} ELSE {len(book.periods) - 1} END AS BIGINT) AS period"
    names = "customer_ref, pricing_tier, model_name, device_uuid, status"
    return f"SELECT {period}, {names}, count(*) AS events, {known}, {sums} FROM {words.batches} GROUP BY ALL"  # noqa: S608


@dataclass(slots=True)
class _Sum:
    rule: Rule
    billed: Decimal
    devices: set[str | None] = field(default_factory=set)
    events: int = 0
    known: int = 0
    quantity: int = 0
    gpu_time_ns: int = 0
    energy_known: int = 0
    energy_mj: int = 0

    def add(self, row: Mapping[str, Any], *, first: bool) -> None:
        self.devices.add(row["device_uuid"])
        self.events += row["events"]
        self.known += row[f"{self.rule.unit}_known"]
        self.quantity += int(row[self.rule.unit])
        if first:
            self.gpu_time_ns += int(row["gpu_second"])
            self.energy_known += row["energy_known"]
            self.energy_mj += int(row["energy"])


def rate(book: PriceBook, usage: Iterable[Mapping[str, Any]]) -> tuple[Line, ...]:
    """The lines of rows of USAGE_SCHEMA, in order. UsageError naming what no rule of the book prices."""
    sums: dict[tuple[str, ...], _Sum] = {}
    rules: dict[tuple[Any, ...], list[Rule]] = {}
    unpriced: set[str] = set()
    for row in usage:
        device_class = book.device_class(row["device_uuid"])
        kind = (row["period"], row["pricing_tier"], row["model_name"], device_class)
        if kind not in rules:
            period = book.periods[kind[0]] if kind[0] >= 0 else None
            rules[kind] = period.rules_for(*kind[1:]) if period else []
        if not rules[kind]:
            unpriced.add(f"model {kind[2]}, tier {kind[1]}, device class {device_class}, period {kind[0]}")
            continue
        for rule in rules[kind]:
            billed = book.periods[kind[0]].billed[row["status"]]
            names = (row["customer_ref"], rule.sku, rule.unit, plain(rule.price), str(rule.per), plain(billed))
            key = (*names, row["model_name"], row["pricing_tier"], device_class, row["status"])
            sums.setdefault(key, _Sum(rule, billed)).add(row, first=rule is rules[kind][0])
    if unpriced:
        named = "; ".join(sorted(unpriced)[:MAX_NAMED])
        raise UsageError(f"no rule of the price book prices {named}", "add a rule (price 0 where it is free)")
    with localcontext(EXACT):
        return tuple(_line(key, one) for key, one in sorted(sums.items()))


def _line(key: tuple[str, ...], one: _Sum) -> Line:
    rule = one.rule
    amount = _amount(one.quantity, rule.unit, rule.price, rule.per, one.billed)
    customer_ref, sku, unit, price, _per, billed, model, tier, device_class, status = key
    return Line(
        customer_ref=customer_ref,
        sku=sku,
        unit=unit,
        price=price,
        per=rule.per,
        billed=billed,
        model_name=model,
        pricing_tier=tier,
        device_class=device_class,
        status=status,
        device_uuid=next(iter(one.devices)) if len(one.devices) == 1 else None,
        events=one.events,
        unmeasured=one.events - one.known if one.billed else 0,
        quantity=one.quantity,
        amount=plain(amount),
        gpu_time_ns=one.gpu_time_ns,
        energy_known=one.energy_known,
        energy_mj=one.energy_mj,
    )


def _amount(quantity: int, unit: str, price: Decimal, per: int, billed: Decimal) -> Decimal:
    """Divided by powers of ten only: the result is finite, and exact in the context EXACT."""
    return quantity * price * billed / (BASE_UNITS.get(unit, 1) * per)


def wrong_lines(lines: Iterable[Line]) -> list[Line]:
    """Those whose amount is not what their own figures come to."""
    with localcontext(EXACT):
        return [
            one
            for one in lines
            if _amount(one.quantity, one.unit, Decimal(one.price), one.per, Decimal(one.billed)) != Decimal(one.amount)
        ]


def plain(amount: Decimal) -> str:
    """Decimal text without an exponent or zeros at its end: the one text of an amount."""
    with localcontext(EXACT):
        return f"{amount.normalize():f}" if amount else "0"


@dataclass(slots=True)
class Used:
    """What the lines of one customer's SKU come to."""

    unit: str = ""
    lines: int = 0
    quantity: int = 0
    events: int = 0
    amount: Decimal = Decimal(0)

    def add(self, line: Line, sign: int) -> None:
        self.unit = line.unit
        self.lines += sign
        self.quantity += sign * line.quantity
        self.events += sign * line.events
        self.amount += sign * Decimal(line.amount)


class DayLine(NamedTuple):
    """What a day's lines of one SKU come to."""

    sku: str
    unit: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Day:
    """What is kept of a day's record: `lines` are one a SKU, of all customers."""

    day_us: int
    revision: int
    currency: str
    minor_digits: int
    book_version: int
    book_digest: str
    batches: int
    events: int
    lines: tuple[DayLine, ...]

    @property
    def amount(self) -> Decimal:
        """Exact, before any rounding."""
        return exact_sum(line.amount for line in self.lines)


def day_of(record: DayCharges) -> Day:
    sums: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    with localcontext(EXACT):
        for line in record.lines:
            sums[line.sku, line.unit] += Decimal(line.amount)
    lines = tuple(DayLine(intern(sku), intern(unit), sums[sku, unit]) for sku, unit in sorted(sums))
    of_record = (record.day_us, record.revision, record.currency, record.minor_digits)
    return Day(*of_record, record.book_version, record.book_digest, record.batches, record.events, lines)


@dataclass(slots=True)
class MonthState:
    """A month's records, followed in the order of the log and added up: its size is that of its customers and SKUs."""

    latest: dict[int, Day] = field(default_factory=dict)
    used: dict[Key, Used] = field(default_factory=dict)
    """By the latest record of each day."""
    issued: dict[Key, Decimal] = field(default_factory=dict)
    """By all records."""
    unfit: set[Key] = field(default_factory=set)
    """Whose newest record does not issue what `used` comes to."""
    records: list[str] = field(default_factory=list)
    """Digests of the day records, in order."""
    invoiced: dict[Key, InvoiceLine] = field(default_factory=dict)
    """What all invoices so far come to."""
    invoices: list[str] = field(default_factory=list)
    covered: dict[Key, Decimal] = field(default_factory=dict)
    """What was issued before the newest invoice."""

    def add_day(self, digest: str, record: DayCharges, former: DayCharges | None) -> None:
        """`former`: the day's record before this one."""
        with localcontext(EXACT):
            for line in former.lines if former else ():
                self._count(line, -1)
            for line in record.lines:
                self._count(line, 1)
            for part in record.issued:
                self._issue(part)
        self.latest[record.day_us] = day_of(record)
        self.records.append(digest)

    def _count(self, line: Line, sign: int) -> None:
        key = line.customer_ref, line.sku
        one = self.used.get(key)
        if one is None:
            key = intern(line.customer_ref), intern(line.sku)  # what is kept of a record is no copy of its text
            one = self.used[key] = Used()
        one.add(line, sign)
        if not one.lines:
            del self.used[key]
        self.unfit.add(key)

    def _issue(self, part: Issued) -> None:
        key = intern(part.customer_ref), intern(part.sku)
        self.issued[key] = self.issued.get(key, Decimal(0)) + Decimal(part.issued)
        if (Decimal(part.total), Decimal(part.rounded)) == (self.total(key), self.issued[key]):
            self.unfit.discard(key)
        else:
            self.unfit.add(key)

    def total(self, key: Key) -> Decimal:
        """Exact, of the latest record of each day."""
        return self.used[key].amount if key in self.used else Decimal(0)

    def add_invoice(self, digest: str, invoice: Invoice) -> None:
        self.invoices.append(digest)
        self.covered = dict(self.issued)
        for line in invoice.lines:
            key = line.customer_ref, line.sku
            self.invoiced[key] = _combined(line, self.invoiced.get(key), 1)


class Batches(NamedTuple):
    """The day's batches in the log: how many, and the indexes of the first and the last."""

    number: int
    first_index: int | None
    last_index: int | None


def build_day(
    day_us: int,
    book: PriceBook,
    batches: Batches,
    usage: Sequence[Mapping[str, Any]],
    month: MonthState,
    former: DayCharges | None,
) -> DayCharges:
    """A day's record, after those that `month` holds; `former` is the newest of this day.

    UsageError where the book does not fit these.
    """
    lines = rate(book, usage)
    _require_fit(book, lines, month)
    return DayCharges(
        day_us,
        former.revision + 1 if former else 1,
        book.currency,
        book.minor_digits,
        book.rounding,
        book.version,
        book.digest,
        *batches,
        prior=month.records[-1] if month.records else None,
        events=sum(row["events"] for row in usage),
        gpu_time_ns=sum(line.gpu_time_ns for line in lines),
        lines=lines,
        issued=_issue(book, lines, former.lines if former else (), month),
    )


def _require_fit(book: PriceBook, lines: Sequence[Line], month: MonthState) -> None:
    """One currency a month, one unit a SKU, and no older prices over newer ones."""
    units = {line.sku: line.unit for line in lines}
    for other in month.latest.values():
        if (other.currency, other.minor_digits) != (book.currency, book.minor_digits):
            raise UsageError(f"the month is charged in {other.currency}", "change currencies at the begin of a month")
        if other.book_version > book.version:
            what = f"the month is charged with version {other.book_version} of the price book, this is {book.version}"
            raise UsageError(what, "name the newest file in the setting price_book")
        for line in other.lines:
            if units.setdefault(line.sku, line.unit) != line.unit:
                what = f"the SKU {line.sku} has the units {line.unit} and {units[line.sku]} in one month"
                raise UsageError(what, "give what is counted otherwise a SKU of its own")


def _issue(book: PriceBook, lines: Sequence[Line], former: Sequence[Line], month: MonthState) -> tuple[Issued, ...]:
    """The month's new rounded totals less what was issued, of each customer's SKU that the day has, or had."""
    change: dict[Key, Decimal] = defaultdict(Decimal)
    issued = []
    zero = book.round(Decimal(0))
    with localcontext(EXACT):
        for line in former:
            change[line.customer_ref, line.sku] -= Decimal(line.amount)
        for line in lines:
            change[line.customer_ref, line.sku] += Decimal(line.amount)
        for key in sorted(change):
            total = month.total(key) + change[key]
            rounded, already = book.round(total), month.issued.get(key, zero)
            issued.append(Issued(*key, plain(total), *(f"{one:f}" for one in (rounded, already, rounded - already))))
    return tuple(issued)


def build_invoice(month: str, state: MonthState) -> Invoice | None:
    """What is to be billed of a month beyond its invoices so far; None where that is nothing and there is one."""
    usage = _billable(state)
    nothing = [(*key, "", 0, 0, "0") for key in state.invoiced.keys() - usage.keys()]
    usage |= {(one[0], one[1]): InvoiceLine(*one) for one in nothing}
    lines = [_combined(usage[key], state.invoiced.get(key), -1) for key in sorted(usage)]
    lines = [line for line in lines if line.quantity or line.events or Decimal(line.amount)]
    if state.invoices and not lines:
        return None
    some = next(iter(state.latest.values()), None)
    if some is None:
        return None
    with localcontext(EXACT):
        total = exact_sum(line.amount for line in lines)
    prior = state.invoices[-1] if state.invoices else None
    revision, digits = len(state.invoices) + 1, some.minor_digits
    return Invoice(
        month, revision, some.currency, digits, tuple(state.records), prior, tuple(lines), f"{total:.{digits}f}"
    )


def _billable(state: MonthState) -> dict[Key, InvoiceLine]:
    """By customer and SKU: what was used, by the latest records, and all that was issued for it."""
    units = {sku: one.unit for (_, sku), one in state.used.items()}
    units |= {line.sku: line.unit for line in state.invoiced.values()}
    found: dict[Key, InvoiceLine] = {}
    for key in state.used.keys() | state.issued.keys():
        used = state.used.get(key) or Used(units.get(key[1], ""))
        found[key] = InvoiceLine(*key, used.unit, used.quantity, used.events, f"{state.issued.get(key, Decimal(0)):f}")
    return found


def _combined(one: InvoiceLine, other: InvoiceLine | None, sign: int) -> InvoiceLine:
    if other is None:
        return one
    with localcontext(EXACT):
        amount = Decimal(one.amount) + sign * Decimal(other.amount)
    quantity, events = one.quantity + sign * other.quantity, one.events + sign * other.events
    return InvoiceLine(one.customer_ref, one.sku, one.unit or other.unit, quantity, events, f"{amount:f}")
