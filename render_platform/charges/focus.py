"""FOCUS 1.2 export of charges: records in, rows out; CSV and Parquet. See docs/charges.md.

- One row is one (day, customer, SKU, price) of what one invoice, or none yet, covers. Before the first invoice a day's
  revisions are one: its latest. After it a row says what a revision changed, and is a `Correction`.
- `BilledCost` of a customer's SKU on a day comes to exactly what its records issued: each row but the largest has its
  own amount rounded down to the minor unit, the largest has the rest. So a month's sum is its invoices', to the cent.
- `ContractedCost` and `ListCost` are exact. A share of the price that a status pays is part of the unit price.
- Prices are one list for all: list and contracted prices are equal. Text is our own: no customer-chosen text.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal, localcontext
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from render_platform.charges.chain import Logged, month_bounds, month_of
from render_platform.charges.rating import BASE_UNITS, EXACT, Day
from render_platform.charges.records import DayCharges, Invoice, Line
from render_platform.clock import DAY_US, US_PER_SECOND, iso
from render_platform.errors import UsageError

FOCUS_VERSION = "1.2"
PROVIDER = "render-platform"
SERVICE = "GPU inference"
_DECIMAL = pa.decimal128(38, 24)
"""Exact for every price of a sensible book; what has more digits is refused, never rounded."""
_TIME = pa.timestamp("us", tz="UTC")
_STRING = pa.string()
_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(
        (
            "BilledCost",
            "CommitmentDiscountQuantity",
            "ConsumedQuantity",
            "ContractedCost",
            "ContractedUnitPrice",
            "EffectiveCost",
            "ListCost",
            "ListUnitPrice",
            "PricingCurrencyContractedUnitPrice",
            "PricingCurrencyEffectiveCost",
            "PricingCurrencyListUnitPrice",
            "PricingQuantity",
            "x_GpuSeconds",
            "x_Joules",
        ),
        _DECIMAL,
    ),
    **dict.fromkeys(("BillingPeriodEnd", "BillingPeriodStart", "ChargePeriodEnd", "ChargePeriodStart"), _TIME),
    **dict.fromkeys(
        ("x_EnergyKnownEvents", "x_Events", "x_LogIndex", "x_PriceBookVersion", "x_Revision", "x_UnmeasuredEvents"),
        pa.int64(),
    ),
}
_COLUMNS = """
AvailabilityZone BilledCost BillingAccountId BillingAccountName BillingAccountType BillingCurrency BillingPeriodEnd
BillingPeriodStart CapacityReservationId CapacityReservationStatus ChargeCategory ChargeClass ChargeDescription
ChargeFrequency ChargePeriodEnd ChargePeriodStart CommitmentDiscountCategory CommitmentDiscountId
CommitmentDiscountName CommitmentDiscountQuantity CommitmentDiscountStatus CommitmentDiscountType
CommitmentDiscountUnit ConsumedQuantity ConsumedUnit ContractedCost ContractedUnitPrice EffectiveCost InvoiceId
InvoiceIssuerName ListCost ListUnitPrice PricingCategory PricingCurrency PricingCurrencyContractedUnitPrice
PricingCurrencyEffectiveCost PricingCurrencyListUnitPrice PricingQuantity PricingUnit ProviderName PublisherName
RegionId RegionName ResourceId ResourceName ResourceType ServiceCategory ServiceName ServiceSubcategory SkuId SkuMeter
SkuPriceDetails SkuPriceId SubAccountId SubAccountName SubAccountType Tags
x_DeviceClass x_EnergyKnownEvents x_Events x_GpuSeconds x_Joules x_LogIndex x_ModelName x_PriceBookDigest
x_PriceBookVersion x_PricingTier x_RecordDigest x_Revision x_UnmeasuredEvents
"""
_FIELDS = [pa.field(name, _TYPES.get(name, _STRING)) for name in _COLUMNS.split()]
SCHEMA = pa.schema(_FIELDS, {"focus_version": FOCUS_VERSION})
"""All columns of FOCUS 1.2, sorted by name as its text is, then ours, which begin with `x_`."""
_UNITS = {
    "gpu_second": "GPU-Seconds",
    "input_token": "Tokens",
    "output_token": "Tokens",
    "image": "Images",
    "step": "Steps",
}
_METERS = {
    "gpu_second": "GPU Time",
    "input_token": "Input Tokens",
    "output_token": "Output Tokens",
    "image": "Images",
    "step": "Steps",
}


class _Key(NamedTuple):
    """What one row is of, on one day."""

    customer_ref: str
    sku: str
    unit: str
    price: str
    per: int
    billed: str


@dataclass(slots=True)
class _Figures:
    """Of one key: sums of lines, or the difference of two such sums."""

    quantity: int = 0
    events: int = 0
    unmeasured: int = 0
    gpu_time_ns: int = 0
    energy_known: int = 0
    energy_mj: int = 0
    amount: Decimal = Decimal(0)
    devices: set[str | None] = field(default_factory=set)
    models: set[str | None] = field(default_factory=set)
    tiers: set[str | None] = field(default_factory=set)
    classes: set[str | None] = field(default_factory=set)

    def add(self, line: Line) -> None:
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(line, name))
        self.amount += Decimal(line.amount)
        self.devices.add(line.device_uuid)
        self.models.add(line.model_name)
        self.tiers.add(line.pricing_tier)
        self.classes.add(line.device_class)

    def less(self, before: _Figures) -> _Figures:
        """What changed; the names are those of both."""
        sums = {name: getattr(self, name) - getattr(before, name) for name in _SUMMED}
        names = {name: getattr(self, name) | getattr(before, name) for name in _NAMED}
        return _Figures(**sums, amount=self.amount - before.amount, **names)

    @property
    def changed(self) -> bool:
        return any(getattr(self, name) for name in (*_SUMMED, "amount"))


_SUMMED = ("quantity", "events", "unmeasured", "gpu_time_ns", "energy_known", "energy_mj")
_NAMED = ("devices", "models", "tiers", "classes")
_Groups = dict[_Key, _Figures]


def rows(
    days: Sequence[Logged[Day]], invoices: Sequence[Logged[Invoice]], read: Callable[[str], DayCharges], account: str
) -> pa.Table:
    """SCHEMA: the rows of one month's day records and invoices, both in the order of the log; `account` is whose.

    `read` gives a day's record by its digest; one is held at a time. UsageError where an amount has more decimals than
    the columns.
    """
    made = [SCHEMA.empty_table()]
    stood: dict[int, str] = {}
    with localcontext(EXACT):
        for part, number in _parts(days, invoices):
            invoice = invoices[number].record if number < len(invoices) else None
            for day_us, records in sorted(part.items()):
                before = _grouped(read(stood[day_us]).lines) if day_us in stood else {}
                made.append(_table(_rows_of_day(records, before, read, number > 0, invoice, account)))
                stood[day_us] = records[-1].digest
    return pa.concat_tables(made)


def _table(made: Iterable[dict[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(list(made), SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UsageError(f"a charge does not fit the columns: {error}", "use prices with fewer decimals") from error


def _parts(
    days: Sequence[Logged[Day]], invoices: Sequence[Logged[Invoice]]
) -> Iterator[tuple[dict[int, list[Logged[Day]]], int]]:
    """By day, the records that the invoice of a number is the first to cover; the last ones no invoice covers yet."""
    first: dict[str, int] = {}
    for number, invoice in enumerate(invoices):
        for digest in invoice.record.charges:
            first.setdefault(digest, number)
    for number in range(len(invoices) + 1):
        part: dict[int, list[Logged[Day]]] = defaultdict(list)
        for logged in days:
            if first.get(logged.digest, len(invoices)) == number:
                part[logged.record.day_us].append(logged)
        yield part, number


def _grouped(lines: Iterable[Line]) -> _Groups:
    groups: _Groups = defaultdict(_Figures)
    for line in lines:
        groups[_Key(line.customer_ref, line.sku, line.unit, line.price, line.per, line.billed)].add(line)
    return groups


def _rows_of_day(
    records: Sequence[Logged[Day]],
    before: _Groups,
    read: Callable[[str], DayCharges],
    correction: bool,
    invoice: Invoice | None,
    account: str,
) -> Iterator[dict[str, Any]]:
    """What a day's records change of `before`, as one: the last of them says what is so now."""
    last, nothing = records[-1], _Figures()
    after: _Groups = {}
    seen = set(before)
    issued: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for record in (read(one.digest) for one in records):
        after = _grouped(record.lines)
        seen |= after.keys()
        for one in record.issued:
            issued[one.customer_ref, one.sku] += Decimal(one.issued)
    for owner, keys in groupby(sorted(seen), lambda key: (key.customer_ref, key.sku)):
        changes = {key: after.get(key, nothing).less(before.get(key, nothing)) for key in keys}
        for key, billed in _billed(changes, issued[owner], last.record.minor_digits):
            yield {
                **_constants(account),
                **_period(last.record, correction, invoice),
                **_priced(key, changes[key], billed, last.record.currency),
                **_ours(changes[key], last),
            }


def _billed(changes: Mapping[_Key, _Figures], issued: Decimal, minor_digits: int) -> Iterator[tuple[_Key, Decimal]]:
    """The rows of one customer's SKU, the largest last, and what each bills; they come to `issued`."""
    order = sorted(changes, key=lambda key: (abs(changes[key].amount), key))
    rows_of = [key for key in order if changes[key].changed]
    if not rows_of and issued:  # what changed is the rounding alone: it needs a row to stand in
        rows_of = order[-1:]
    minor_unit, left = Decimal(1).scaleb(-minor_digits), issued
    for key in rows_of[:-1]:
        down = (changes[key].amount / minor_unit).to_integral_value(ROUND_FLOOR) * minor_unit
        left -= down
        yield key, down
    for key in rows_of[-1:]:
        yield key, left


def _constants(account: str) -> dict[str, Any]:
    return {
        "BillingAccountId": account,
        "BillingAccountName": account,
        "BillingAccountType": "Operator",
        "ChargeCategory": "Usage",
        "ChargeFrequency": "Usage-Based",
        "InvoiceIssuerName": PROVIDER,
        "PricingCategory": "Standard",
        "ProviderName": PROVIDER,
        "PublisherName": PROVIDER,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": SERVICE,
        "ServiceSubcategory": "Generative AI",
        "SubAccountType": "Customer",
    }


def _period(record: Day, correction: bool, invoice: Invoice | None) -> dict[str, Any]:
    start_us, end_us = month_bounds(month_of(record.day_us))
    return {
        "BillingPeriodEnd": _time(end_us),
        "BillingPeriodStart": _time(start_us),
        "ChargeClass": "Correction" if correction else None,
        "ChargePeriodEnd": _time(record.day_us + DAY_US),
        "ChargePeriodStart": _time(record.day_us),
        "InvoiceId": invoice and f"{invoice.month}/{invoice.revision}",
    }


def _priced(key: _Key, figures: _Figures, billed: Decimal, currency: str) -> dict[str, Any]:
    unit, price = _UNITS[key.unit], Decimal(key.price) * Decimal(key.billed)
    consumed = Decimal(figures.quantity) / BASE_UNITS.get(key.unit, 1)
    pricing_unit = unit if key.per == 1 else f"{key.per} {unit}"
    share = "" if Decimal(key.billed) == 1 else f", of which this status pays {key.billed}"
    device = _only(figures.devices)
    return {
        "BilledCost": billed,
        "BillingCurrency": currency,
        "ChargeDescription": f"{_METERS[key.unit]}, {key.sku}: {key.price} {currency} per {pricing_unit}{share}",
        "ConsumedQuantity": consumed,
        "ConsumedUnit": unit,
        "ContractedCost": figures.amount,
        "ContractedUnitPrice": price,
        "EffectiveCost": billed,
        "ListCost": figures.amount,
        "ListUnitPrice": price,
        "PricingCurrency": currency,
        "PricingCurrencyContractedUnitPrice": price,
        "PricingCurrencyEffectiveCost": billed,
        "PricingCurrencyListUnitPrice": price,
        "PricingQuantity": consumed / key.per,
        "PricingUnit": pricing_unit,
        "ResourceId": device,
        "ResourceType": device and "GPU",
        "SkuId": key.sku,
        "SkuMeter": _METERS[key.unit],
        "SkuPriceDetails": json.dumps({"x_BilledShare": key.billed}),
        "SkuPriceId": key.sku if Decimal(key.billed) == 1 else f"{key.sku}/{key.billed}",
        "SubAccountId": key.customer_ref,
        "SubAccountName": key.customer_ref,
    }


def _ours(figures: _Figures, logged: Logged[Day]) -> dict[str, Any]:
    """Energy is null where no event has a reading."""
    joules = Decimal(figures.energy_mj) / 1_000
    return {
        "x_DeviceClass": _only(figures.classes),
        "x_EnergyKnownEvents": figures.energy_known,
        "x_Events": figures.events,
        "x_GpuSeconds": Decimal(figures.gpu_time_ns) / BASE_UNITS["gpu_second"],
        "x_Joules": joules if figures.energy_known or figures.energy_mj else None,
        "x_LogIndex": logged.log_index,
        "x_ModelName": _only(figures.models),
        "x_PriceBookDigest": logged.record.book_digest,
        "x_PriceBookVersion": logged.record.book_version,
        "x_PricingTier": _only(figures.tiers),
        "x_RecordDigest": logged.digest,
        "x_Revision": logged.record.revision,
        "x_UnmeasuredEvents": figures.unmeasured,
    }


def _only(names: set[str | None]) -> str | None:
    """The one name of all; None where there are several, or none is known."""
    return next(iter(names)) if len(names) == 1 else None


def _time(us: int) -> datetime:
    return datetime.fromtimestamp(us // US_PER_SECOND, UTC)


def to_csv(table: pa.Table) -> bytes:
    """UTF-8 with a header and CRLF (RFC 4180). Null is empty, times are ISO 8601 in UTC, decimals have no exponent."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        writer.writerows(zip(*(map(_text, column.to_pylist()) for column in batch.columns), strict=True))
    return out.getvalue().encode()


def to_parquet(table: pa.Table) -> bytes:
    """Decimals as DECIMAL(38, 24), times as UTC microseconds."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return iso(int(value.timestamp()) * US_PER_SECOND)
    if isinstance(value, Decimal):  # with a point always: readers that guess a column's type take it for a decimal
        text = f"{value:f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text
    return "" if value is None else str(value)
