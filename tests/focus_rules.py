"""The requirements of FOCUS 1.2 that rows like ours can break, each with the file that it is from.

The files are of FOCUS_Spec at tag v1.2, below `specification/`: github.com/FinOps-Open-Cost-and-Usage-Spec/FOCUS_Spec.
docs/charges.md says what was read where.
Left out: what speaks of ChargeCategory other than Usage, of commitment discounts, of reserved capacity, and of tags,
beyond that their columns are null; what only a person can judge; and the metadata.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """`level` of presence: M mandatory, C conditional, R recommended. `kind`, the data type."""

    name: str
    level: str
    kind: str
    file: str


class Rule(NamedTuple):
    """What a requirement says of one row."""

    file: str
    says: str
    holds: Callable[[Row], bool]


class TableRule(NamedTuple):
    """What a requirement says of all rows together."""

    file: str
    says: str
    holds: Callable[[Sequence[Row]], bool]


_DECIMALS = """BilledCost M,CommitmentDiscountQuantity C,ConsumedQuantity C,ContractedCost M,ContractedUnitPrice C,
EffectiveCost M,ListCost M,ListUnitPrice C,PricingCurrencyContractedUnitPrice C,PricingCurrencyEffectiveCost C,
PricingCurrencyListUnitPrice C,PricingQuantity M"""
_TIMES = "BillingPeriodEnd M,BillingPeriodStart M,ChargePeriodEnd M,ChargePeriodStart M"
_OBJECTS = "SkuPriceDetails C,Tags C"
_STRINGS = """AvailabilityZone R,BillingAccountId M,BillingAccountName M,BillingAccountType C,BillingCurrency M,
CapacityReservationId C,CapacityReservationStatus C,ChargeCategory M,ChargeClass M,ChargeDescription M,
ChargeFrequency R,CommitmentDiscountCategory C,CommitmentDiscountId C,CommitmentDiscountName C,
CommitmentDiscountStatus C,CommitmentDiscountType C,CommitmentDiscountUnit C,ConsumedUnit C,InvoiceId R,
InvoiceIssuerName M,PricingCategory C,PricingCurrency C,PricingUnit M,ProviderName M,PublisherName M,RegionId C,
RegionName C,ResourceId C,ResourceName C,ResourceType C,ServiceCategory M,ServiceName M,ServiceSubcategory R,SkuId C,
SkuMeter C,SkuPriceId C,SubAccountId C,SubAccountName C,SubAccountType C"""
_FILES = {"InvoiceIssuerName": "invoiceissuer", "ProviderName": "provider", "PublisherName": "publisher"}


def file_of(column: str) -> str:
    return f"columns/{_FILES.get(column, column.lower())}.md"


def _columns(kind: str, names: str) -> list[Column]:
    said = (one.split() for one in names.split(","))
    return [Column(name, level, kind, file_of(name)) for name, level in said]


COLUMNS = [
    *_columns("Decimal", _DECIMALS),
    *_columns("Date/Time", _TIMES),
    *_columns("JSON", _OBJECTS),
    *_columns("String", _STRINGS),
]

_NEVER_NULL = """BilledCost BillingAccountId BillingCurrency BillingPeriodEnd BillingPeriodStart ChargeCategory
ChargeFrequency ChargePeriodEnd ChargePeriodStart ContractedCost EffectiveCost InvoiceIssuerName ListCost
PricingCurrency PricingCurrencyEffectiveCost ProviderName PublisherName ServiceCategory ServiceName
ServiceSubcategory"""
_OF_USAGE = """ConsumedQuantity ContractedUnitPrice ListUnitPrice PricingCategory PricingCurrencyContractedUnitPrice
PricingCurrencyListUnitPrice PricingQuantity SkuId SkuPriceId"""
_WITH = {  # null where the other is, and only there
    "BillingAccountType": "BillingAccountId",
    "CommitmentDiscountCategory": "CommitmentDiscountId",
    "CommitmentDiscountType": "CommitmentDiscountId",
    "CommitmentDiscountUnit": "CommitmentDiscountQuantity",
    "ConsumedUnit": "ConsumedQuantity",
    "PricingUnit": "PricingQuantity",
    "RegionName": "RegionId",
    "ResourceType": "ResourceId",
    "SubAccountName": "SubAccountId",
    "SubAccountType": "SubAccountId",
}
_NULL_WITH = {  # null where the other is; elsewhere it may be
    "CapacityReservationStatus": "CapacityReservationId",
    "CommitmentDiscountName": "CommitmentDiscountId",
    "CommitmentDiscountStatus": "CommitmentDiscountId",
    "ResourceName": "ResourceId",
    "SkuMeter": "SkuId",
    "SkuPriceDetails": "SkuPriceId",
}
_ALLOWED = {
    "ChargeCategory": ("Usage", "Purchase", "Tax", "Credit", "Adjustment"),
    "ChargeFrequency": ("One-Time", "Recurring", "Usage-Based"),
    "PricingCategory": ("Standard", "Dynamic", "Committed", "Other", None),
}
_PARENTS = {  # of the 1.2 list, the part that is of this category
    "AI and Machine Learning": (
        *("Bots", "Generative AI", "Machine Learning", "Natural Language Processing"),
        "Other (AI and Machine Learning)",
    )
}
_DETAILS = """CoreCount DiskIops DiskSpace DiskType GpuCount InstanceType InstanceSeries MemorySize NetworkBandwidth
NetworkIops OperatingSystem Redundancy StorageClass"""
_UNIT_PRICES = """ContractedUnitPrice ListUnitPrice PricingCurrencyContractedUnitPrice
PricingCurrencyListUnitPrice"""
_UNIT = re.compile(r"([1-9][0-9]* )?[A-Z][A-Za-z]*(-(Years|Months|Days|Hours|Minutes|Seconds)|(?<=s))")
"""`Tokens`, `1000 Tokens`, `GB-Hours`; those with a slash we have none of."""
_PLACEHOLDERS = {"", "n/a", "na", "none", "null", "not applicable", "unknown"}
_CURRENCY = re.compile("[A-Z]{3}")


def corrects(row: Row) -> bool:
    return bool(row["ChargeClass"] == "Correction")


def _is_null_with(column: str, other: str) -> Rule:
    says = f"{column} MUST be null when {other} is null"
    return Rule(file_of(column), says, lambda row: row[column] is None or row[other] is not None)


def _not_null(column: str) -> Rule:
    return Rule(file_of(column), f"{column} MUST NOT be null", lambda row: row[column] is not None)


def _of_usage(column: str) -> Rule:
    says = f"{column} MUST NOT be null when ChargeCategory is Usage and ChargeClass is not Correction"
    return Rule(file_of(column), says, lambda row: corrects(row) or row[column] is not None)


def _is_with(column: str, other: str) -> Rule:
    says = f"{column} MUST be null when {other} is null, and MUST NOT be where it is not"
    return Rule(file_of(column), says, lambda row: (row[column] is None) == (row[other] is None))


def _is_allowed(column: str) -> Rule:
    says = f"{column} MUST be one of the allowed values"
    return Rule(file_of(column), says, lambda row: row[column] in _ALLOWED[column])


def _is_priced(cost: str, price: str) -> Rule:
    says = f"the product of {price} and PricingQuantity MUST match the {cost} when ChargeClass is not Correction"
    return Rule(file_of(cost), says, lambda row: corrects(row) or row[price] * row["PricingQuantity"] == row[cost])


def _is_not_negative(price: str) -> Rule:
    says = f"{price} MUST be a non-negative decimal value when it is not null"
    return Rule(file_of(price), says, lambda row: row[price] is None or row[price] >= 0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("keys MUST be unique")
    return dict(pairs)


def details_of(row: Row) -> dict[str, Any]:
    """The properties of SkuPriceDetails. ValueError where a key is there twice."""
    found: dict[str, Any] = json.loads(row["SkuPriceDetails"] or "{}", object_pairs_hook=_unique)
    return found


def _texts(row: Row) -> Iterable[str]:
    return (value for value in row.values() if isinstance(value, str))


RULES = [
    *map(_not_null, _NEVER_NULL.split()),
    *map(_of_usage, _OF_USAGE.split()),
    *(_is_with(*names) for names in _WITH.items()),
    *(_is_null_with(*names) for names in _NULL_WITH.items()),
    *map(_is_allowed, _ALLOWED),
    *map(_is_not_negative, _UNIT_PRICES.split()),
    _is_priced("ListCost", "ListUnitPrice"),
    _is_priced("ContractedCost", "ContractedUnitPrice"),
    Rule(
        file_of("BilledCost"),
        "MUST be 0 for charges where payments are received by a third party",
        lambda row: row["ProviderName"] == row["InvoiceIssuerName"] or row["BilledCost"] == 0,
    ),
    Rule(
        file_of("BillingAccountName"),
        "MUST NOT be null when the provider supports a display name: it does",
        lambda row: row["BillingAccountName"] is not None,
    ),
    Rule(
        file_of("BillingCurrency"),
        "MUST be expressed in national currency, attributes/currency_format.md: three letters, ISO 4217",
        lambda row: _CURRENCY.fullmatch(row["BillingCurrency"]) is not None,
    ),
    Rule(
        file_of("PricingCurrency"),
        "MUST conform to CurrencyFormat; ours is national",
        lambda row: _CURRENCY.fullmatch(row["PricingCurrency"]) is not None,
    ),
    Rule(
        file_of("ChargeClass"),
        "MUST be Correction when ChargeClass is not null",
        lambda row: row["ChargeClass"] in (None, "Correction"),
    ),
    Rule(file_of("ChargeDescription"), "SHOULD NOT be null", lambda row: row["ChargeDescription"] is not None),
    Rule(
        file_of("PricingCategory"),
        "MUST be Standard when pricing is predetermined at the agreed upon rate",
        lambda row: row["PricingCategory"] == "Standard",
    ),
    Rule(
        file_of("ServiceSubcategory"),
        "MUST be one of the allowed values, and have the parent ServiceCategory that they give",
        lambda row: row["ServiceSubcategory"] in _PARENTS[row["ServiceCategory"]],
    ),
    Rule(
        file_of("SkuPriceDetails"),
        'property key MUST begin with the string "x_" unless it is a FOCUS-defined property',
        lambda row: all(key.startswith("x_") or key in _DETAILS.split() for key in details_of(row)),
    ),
    Rule(
        file_of("SkuPriceDetails"),
        "property keys SHOULD conform to PascalCase",
        lambda row: all(re.fullmatch("(x_)?([A-Z][a-z]+)+", key) for key in details_of(row)),
    ),
    Rule(
        "attributes/key_value_format.md",
        "keys MUST be unique, values MUST be number, string, true, false or null",
        lambda row: all(not isinstance(value, (dict, list)) for value in details_of(row).values()),
    ),
    Rule(
        "attributes/unit_format.md",
        "units SHOULD have one of its formats; a quantity MUST be a whole number; new nouns MUST be capitalized",
        lambda row: all(_UNIT.fullmatch(row[name]) for name in ("PricingUnit", "ConsumedUnit") if row[name]),
    ),
    Rule(
        "attributes/null_handling.md",
        "MUST NOT use empty strings or placeholder values to represent a null",
        lambda row: not _PLACEHOLDERS & {text.lower() for text in _texts(row)},
    ),
    Rule(
        "attributes/string_handling.md",
        "strings consisting solely of spaces SHOULD NOT be used",
        lambda row: all(text.strip() for text in _texts(row)),
    ),
]


def _one_each(key: str, *values: str) -> Callable[[Sequence[Row]], bool]:
    """Whether each `key` has one combination of `values` in all rows."""

    def holds(rows: Sequence[Row]) -> bool:
        found = defaultdict(set)
        for row in rows:
            found[row[key]].add(tuple(row[name] for name in values))
        return all(len(one) == 1 for name, one in found.items() if name is not None)

    return holds


TABLE_RULES = [
    TableRule(file_of("SkuPriceId"), "MUST have one and only one parent SkuId", _one_each("SkuPriceId", "SkuId")),
    TableRule(
        file_of("SkuPriceDetails"),
        "MUST be associated with a given SkuPriceId; SHOULD remain consistent over time",
        _one_each("SkuPriceId", "SkuPriceDetails"),
    ),
    TableRule(
        file_of("SkuMeter"), "SHOULD remain consistent over time for a given SkuId", _one_each("SkuId", "SkuMeter")
    ),
    TableRule(
        file_of("ServiceName"),
        "MUST have one and only one ServiceCategory, SHOULD have one and only one ServiceSubcategory",
        _one_each("ServiceName", "ServiceCategory", "ServiceSubcategory"),
    ),
    TableRule(
        file_of("InvoiceId"),
        "MUST be associated with the related charge and BillingAccountId",
        _one_each("InvoiceId", "BillingAccountId"),
    ),
]


def broken(rows: Sequence[Row]) -> list[str]:
    """Each requirement that does not hold, with its file and, of one row, that row."""
    of_rows = [f"{rule.file}: {rule.says}: {row}" for row in rows for rule in RULES if not rule.holds(row)]
    return of_rows + [f"{rule.file}: {rule.says}" for rule in TABLE_RULES if not rule.holds(rows)]


# Of the text of a CSV file.

NUMERIC = re.compile(r"-?[0-9]+(\.[0-9]+)?(E-?[0-9]+)?")
"""attributes/numeric_format.md: no sign but a minus, no separator but one point, no symbol."""
DATE_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
"""attributes/datetime_format.md: extended ISO 8601 in UTC, `YYYY-MM-DDTHH:mm:ssZ`."""
FORMATS = {"Decimal": NUMERIC, "Date/Time": DATE_TIME}


def is_value(kind: str, text: str) -> bool:
    """Whether the text is null or a value of a column's data type."""
    return text == "" or kind not in FORMATS or FORMATS[kind].fullmatch(text) is not None
