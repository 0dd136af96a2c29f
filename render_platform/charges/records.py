"""What the log binds of charges: the rated usage of a day, and the invoice of a month. Canonical JSON, docs/formats.md.

Quantities are integers in base units (ns of `gpu_second`, else the count); amounts are exact Decimal text in the
record's currency. Nothing in a record is ever edited: a later record of the same day or month says what changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, TypeVar

import msgspec

from render_platform import canonical
from render_platform.charges.price_book import PER, ROUNDINGS, UNITS
from render_platform.errors import Finding

VERSION = 1
DAY_KIND, INVOICE_KIND = "usage_charges", "invoice"
Count = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[str, msgspec.Meta(pattern=r"\A-?[0-9]{1,60}(\.[0-9]{1,60})?\Z")]
"""Decimal text. Parsing holds a record to these types, to the last line."""


@dataclass(frozen=True, slots=True)
class Line:
    """Usage of one customer that one rule priced: `amount` = quantity × price / per × billed, not rounded.

    `unmeasured` of its `events` have no figure for the unit: they are not in `quantity`, and are not zero either. GPU
    time and energy stand on an event's first line alone, so that sums over lines count each event once; `energy_mj`
    is of the `energy_known` events that have a reading. `device_uuid`: where all ran on one.
    """

    customer_ref: str
    sku: str
    unit: str
    price: Amount
    per: int
    billed: Amount
    model_name: str
    pricing_tier: str
    device_class: str
    status: str
    device_uuid: str | None
    events: Count
    unmeasured: Count
    quantity: Count
    amount: Amount
    gpu_time_ns: Count
    energy_known: Count
    energy_mj: Count


@dataclass(frozen=True, slots=True)
class Issued:
    """What a record charges of a customer's SKU: the month's `total` so far, `rounded`, less all issued `before`."""

    customer_ref: str
    sku: str
    total: Amount
    rounded: Amount
    before: Amount
    issued: Amount


@dataclass(frozen=True, slots=True)
class DayCharges:
    """The charges of a day of `recorded_at`. `batches` of the log, from `first_index` through `last_index`, were rated;
    `prior` is the digest of the month's record before this one."""

    day_us: Count
    revision: Count
    currency: str
    minor_digits: Count
    rounding: str
    book_version: Count
    book_digest: str
    batches: Count
    first_index: Count | None
    last_index: Count | None
    prior: str | None
    events: Count
    gpu_time_ns: Count
    lines: tuple[Line, ...]
    issued: tuple[Issued, ...]

    def to_bytes(self) -> bytes:
        return _encode(DAY_KIND, self)

    @property
    def amount(self) -> Decimal:
        """Exact, before any rounding."""
        return exact_sum(line.amount for line in self.lines)


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """What an invoice bills of a SKU; of a correction, what changed. `amount` is whole minor units."""

    customer_ref: str
    sku: str
    unit: str
    quantity: int
    events: int
    amount: Amount


@dataclass(frozen=True, slots=True)
class Invoice:
    """A month's lines, of all customers. `charges` are the digests of the day records it covers, in the log's order;
    `prior` is the invoice of the month that this one corrects."""

    month: str
    revision: Count
    currency: str
    minor_digits: Count
    charges: tuple[str, ...]
    prior: str | None
    lines: tuple[InvoiceLine, ...]
    total: Amount

    def to_bytes(self) -> bytes:
        return _encode(INVOICE_KIND, self)


_Record = TypeVar("_Record", DayCharges, Invoice)


def parse_day(data: bytes) -> DayCharges:
    """Finding where `data` is no day's record."""
    record = _parse(DAY_KIND, DayCharges, data)
    _require_known("unit", {line.unit for line in record.lines}, ("", *UNITS))
    _require_known("per", {line.per for line in record.lines}, PER)
    _require_known("rounding", {record.rounding}, ROUNDINGS)
    return record


def parse_invoice(data: bytes) -> Invoice:
    """Finding where `data` is no invoice."""
    record = _parse(INVOICE_KIND, Invoice, data)
    _require_known("unit", {line.unit for line in record.lines}, ("", *UNITS))
    return record


def exact_sum(amounts: Iterable[str | Decimal]) -> Decimal:
    """The exact sum; the context of `rating.EXACT` refuses what it would have to round."""
    return sum(map(Decimal, amounts), Decimal(0))


def _head(kind: str) -> bytes:
    return b'{"version":%d,"kind":"%s",' % (VERSION, kind.encode())


def _encode(kind: str, record: DayCharges | Invoice) -> bytes:
    """The bytes of `canonical.encode`, many times as fast: fields in their order, text escaped as it escapes it."""
    data = _head(kind) + msgspec.json.encode(record)[1:]
    if rb"\u0000" in data:  # NUL, which canonical bytes refuse; or text that reads like it
        canonical.decode(data)
    return data


def _parse(kind: str, record: type[_Record], data: bytes) -> _Record:
    """Fields that are unknown, missing, twice or out of order, and any other spelling, give other bytes again."""
    if not data.startswith(_head(kind)):
        raise Finding(f"is not the record of {kind} of version {VERSION}")
    try:
        made = msgspec.json.decode(data, type=record)
    except (ValueError, RecursionError) as error:
        raise Finding(f"does not hold the fields of {kind}, with their types: {error}") from error
    if made.to_bytes() != data:
        raise Finding("is not in its canonical form")
    return made


def _require_known(name: str, found: Collection[object], known: Collection[object]) -> None:
    if any(one not in known for one in found):
        raise Finding(f"{name} is not one that is known")
