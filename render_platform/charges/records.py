"""What the log binds of charges: the rated usage of a day, and the invoice of a month. Canonical JSON, docs/formats.md.

Quantities are integers in base units (ns of `gpu_second`, else the count); amounts are exact Decimal text in the
record's currency. Nothing in a record is ever edited: a later record of the same day or month says what changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, TypeVar

from render_platform import canonical
from render_platform.charges.price_book import PER, ROUNDINGS, UNITS
from render_platform.errors import Finding

VERSION = 1
DAY_KIND, INVOICE_KIND = "usage_charges", "invoice"


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
    price: str
    per: int
    billed: str
    model_name: str
    pricing_tier: str
    device_class: str
    status: str
    device_uuid: str | None
    events: int
    unmeasured: int
    quantity: int
    amount: str
    gpu_time_ns: int
    energy_known: int
    energy_mj: int


@dataclass(frozen=True, slots=True)
class Issued:
    """What a record charges of a customer's SKU: the month's `total` so far, `rounded`, less all issued `before`."""

    customer_ref: str
    sku: str
    total: str
    rounded: str
    before: str
    issued: str


@dataclass(frozen=True, slots=True)
class DayCharges:
    """The charges of a day of `recorded_at`. `batches` of the log, from `first_index` through `last_index`, were rated;
    `prior` is the digest of the month's record before this one."""

    day_us: int
    revision: int
    currency: str
    minor_digits: int
    rounding: str
    book_version: int
    book_digest: str
    batches: int
    first_index: int | None
    last_index: int | None
    prior: str | None
    events: int
    gpu_time_ns: int
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
    amount: str


@dataclass(frozen=True, slots=True)
class Invoice:
    """A month's lines, of all customers. `charges` are the digests of the day records it covers, in the log's order;
    `prior` is the invoice of the month that this one corrects."""

    month: str
    revision: int
    currency: str
    minor_digits: int
    charges: tuple[str, ...]
    prior: str | None
    lines: tuple[InvoiceLine, ...]
    total: str

    def to_bytes(self) -> bytes:
        return _encode(INVOICE_KIND, self)


_Record = TypeVar("_Record", DayCharges, Invoice)
_Part = TypeVar("_Part", Line, Issued, InvoiceLine)


def parse_day(data: bytes) -> DayCharges:
    """Finding where `data` is no day's record."""
    values = _decode(DAY_KIND, DayCharges, data)
    parts = {"lines": _parts(Line, values["lines"]), "issued": _parts(Issued, values["issued"])}
    return _made(DayCharges, {**values, **parts}, data)


def parse_invoice(data: bytes) -> Invoice:
    """Finding where `data` is no invoice."""
    values = _decode(INVOICE_KIND, Invoice, data)
    if not isinstance(values["charges"], list):
        raise Finding("charges of an invoice are not a list")
    parts = {"lines": _parts(InvoiceLine, values["lines"]), "charges": tuple(values["charges"])}
    return _made(Invoice, {**values, **parts}, data)


def exact_sum(amounts: Iterable[str | Decimal]) -> Decimal:
    """The exact sum; the context of `rating.EXACT` refuses what it would have to round."""
    return sum(map(Decimal, amounts), Decimal(0))


def _encode(kind: str, record: DayCharges | Invoice) -> bytes:
    plain = {f.name: _plain(getattr(record, f.name)) for f in fields(record)}
    return canonical.encode({"version": VERSION, "kind": kind, **plain})


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [one if isinstance(one, str) else {f.name: getattr(one, f.name) for f in fields(one)} for one in value]


def _decode(kind: str, record: type[_Record], data: bytes) -> dict[str, Any]:
    values = canonical.decode(data)
    if (values.pop("version", None), values.pop("kind", None)) != (VERSION, kind):
        raise Finding(f"is not the record of {kind} of version {VERSION}")
    if tuple(values) != tuple(f.name for f in fields(record)):
        raise Finding(f"does not have the fields of {kind}, in their order")
    return values


def _parts(part: type[_Part], items: Any) -> tuple[_Part, ...]:
    names = tuple(f.name for f in fields(part))
    if not isinstance(items, list) or not all(isinstance(item, dict) and tuple(item) == names for item in items):
        raise Finding(f"does not hold a list of {part.__name__}, with its fields in their order")
    for item in items:
        _check_types(part, item)
    return tuple(part(**item) for item in items)


def _made(record: type[_Record], values: Mapping[str, Any], data: bytes) -> _Record:
    _check_types(record, values)
    made = record(**values)
    if made.to_bytes() != data:
        raise Finding("is not in its canonical form")
    return made


_PLAIN = re.compile(r"-?[0-9]{1,60}(\.[0-9]{1,60})?")
_CHOICES: dict[str, tuple[object, ...]] = {"per": PER, "unit": ("", *UNITS), "rounding": tuple(ROUNDINGS)}
_AMOUNTS = {"price", "billed", "amount", "total", "rounded", "before", "issued"}


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    for field in fields(kind):
        value, wanted = values[field.name], str(field.type)
        if wanted.startswith("tuple") or (value is None and wanted.endswith("None")):
            continue
        if type(value) is not (int if wanted.startswith("int") else str):
            raise Finding(f"{field.name} does not have its type")
        if isinstance(value, int) and value < 0 and kind is not InvoiceLine:
            raise Finding(f"{field.name} is below zero")
        if field.name in _CHOICES and value not in _CHOICES[field.name]:
            raise Finding(f"{field.name} is not one that is known")
        if field.name in _AMOUNTS and not _PLAIN.fullmatch(str(value)):
            raise Finding(f"{field.name} is not an amount")
