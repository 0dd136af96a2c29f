"""The price book: effective-dated prices in one versioned TOML file. docs/charges.md has an example.

- Prices are of periods: the last one that has begun at an event's `event_time` prices it.
- In a period, for each unit, the first rule whose patterns match tier, model and device class prices the event.
- `billed` says which share of the price each status pays; all four statuses must be there.
- Amounts are Decimal and exact; they are rounded once, at customer × month × SKU, by the book's `rounding`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, ROUND_UP, Context, Decimal
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from render_platform.canonical import digest_of
from render_platform.config import nearest
from render_platform.errors import RecordError, UsageError
from render_platform.events import STATUSES

UNITS = ("gpu_second", "output_token", "input_token", "image", "step")
"""In the order in which an event's lines stand."""
ROUNDINGS = {"half_up": ROUND_HALF_UP, "half_even": ROUND_HALF_EVEN, "down": ROUND_DOWN, "up": ROUND_UP}
PER = (1, 1_000, 1_000_000)
ANY_DEVICE = "any"
"""The class of a device that no pattern names, and of events without one."""
MAX_BYTES = 1024 * 1024
MAX_DOTS = 256
"""In one line: a key of many parts costs the parser their square, and a book may be somebody else's."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")
_PATTERN = re.compile(r"[A-Za-z0-9._:/@+*?-]{1,200}")
_CURRENCY = re.compile(r"[A-Z]{3}")
AMOUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BOOK = ("version", "currency", "minor_digits", "rounding", "device_classes", "prices")
_PERIOD = ("from", "billed", "rules")
_RULE = ("sku", "unit", "price", "per", "tier", "model", "device_class")


@dataclass(frozen=True, slots=True)
class Rule:
    """`price` is of `per` units, in the book's currency."""

    sku: str
    unit: str
    price: Decimal
    per: int = 1
    tier: str = "*"
    model: str = "*"
    device_class: str = "*"

    def matches(self, tier: str, model: str, device_class: str) -> bool:
        pairs = ((tier, self.tier), (model, self.model), (device_class, self.device_class))
        return all(fnmatchcase(name, pattern) for name, pattern in pairs)


@dataclass(frozen=True, slots=True)
class Period:
    """Prices from `from_us` on. `billed`: by status, the share of a price that is charged, 0 … 1."""

    from_us: int
    billed: Mapping[str, Decimal]
    rules: tuple[Rule, ...]

    def rules_for(self, tier: str, model: str, device_class: str) -> list[Rule]:
        """The rule of each unit that prices such an event, in the order of UNITS; none where nothing does."""
        first: dict[str, Rule] = {}
        for rule in self.rules:
            if rule.unit not in first and rule.matches(tier, model, device_class):
                first[rule.unit] = rule
        return [first[unit] for unit in UNITS if unit in first]


@dataclass(frozen=True, slots=True)
class PriceBook:
    """`data` is the file, byte for byte: what the log binds. `device_classes` are (pattern, class), in their order."""

    data: bytes
    version: int
    currency: str
    minor_digits: int
    rounding: str
    device_classes: tuple[tuple[str, str], ...]
    periods: tuple[Period, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    def device_class(self, device_uuid: str | None) -> str:
        if device_uuid is None:
            return ANY_DEVICE
        return next((name for pattern, name in self.device_classes if fnmatchcase(device_uuid, pattern)), ANY_DEVICE)

    def round(self, amount: Decimal) -> Decimal:
        """To whole minor units. Of a negative amount, `down` is towards zero and `up` away from it."""
        return amount.quantize(Decimal(1).scaleb(-self.minor_digits), ROUNDINGS[self.rounding], Context(prec=80))


def load_price_book(path: Path | None) -> PriceBook:
    """The book in a file, or without one the sample that comes with the package. UsageError where it is not one."""
    sample = files("render_platform.charges") / "prices.toml"
    try:
        with (sample if path is None else path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a price book that can be read") from error
    except ValueError as error:  # NUL
        raise UsageError(f"price_book {path} is not a path: {error}", "give a price book that can be read") from error
    try:
        return parse_price_book(data)
    except RecordError as error:
        raise UsageError(f"{path or sample}: {error.message}", error.remedy or "see docs/charges.md") from error


def parse_price_book(data: bytes) -> PriceBook:
    """The book that `data` is; RecordError names the field that is missing, unknown or wrong."""
    if len(data) > MAX_BYTES:
        raise RecordError("price book", f"has more than {MAX_BYTES} bytes", "leave out what is not used")
    if any(line.count(b".") > MAX_DOTS for line in data.split(b"\n")):
        raise RecordError("price book", f"has a line with more than {MAX_DOTS} dots", "put each rule on its own line")
    try:
        found = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number too long, nested too deeply
        raise RecordError("price book", f"is not TOML: {error}") from error
    _known(found, _BOOK, "")
    rounding = _text(found, "rounding", "", ROUNDINGS)
    classes = found.get("device_classes", {})
    if not isinstance(classes, dict) or not all(_is(_PATTERN, k) and _is(_NAME, v) for k, v in classes.items()):
        raise RecordError("device_classes", "is no table of patterns and names", 'e.g. "GPU-*" = "h100"')
    return PriceBook(
        data,
        _number(found, "version", "", 1, 2**31),
        _text(found, "currency", "", _CURRENCY),
        _number(found, "minor_digits", "", 0, 6),
        rounding,
        tuple(classes.items()),
        _periods(found),
    )


def _periods(found: Mapping[str, Any]) -> tuple[Period, ...]:
    tables = found.get("prices")
    if not isinstance(tables, list) or not tables:
        raise RecordError("prices", "is missing", "give at least one [[prices]] with `from`, `billed` and rules")
    periods = tuple(_period(table, f"prices[{number}].") for number, table in enumerate(tables))
    for number, (before, after) in enumerate(pairwise(periods), 1):
        if after.from_us <= before.from_us:
            raise RecordError(f"prices[{number}].from", "is not after the period before it", "put periods in order")
    units: dict[str, str] = {}
    for rule in (rule for period in periods for rule in period.rules):
        if units.setdefault(rule.sku, rule.unit) != rule.unit:
            raise RecordError("sku", f"{rule.sku} has the units {units[rule.sku]} and {rule.unit}", "give each its own")
    return periods


def _period(table: Any, where: str) -> Period:
    _known(table, _PERIOD, where)
    begin = table.get("from")
    if not isinstance(begin, datetime) or begin.tzinfo is None:
        raise RecordError(f"{where}from", f"{begin!r} is not a time with its zone", "e.g. 2026-01-01T00:00:00Z")
    billed = table.get("billed")
    if not isinstance(billed, dict) or set(billed) != set(STATUSES):
        raise RecordError(f"{where}billed", "does not name each status once", f"give a share for {', '.join(STATUSES)}")
    shares = {status: _decimal(billed, status, f"{where}billed.") for status in STATUSES}
    if over := [status for status in STATUSES if shares[status] > 1]:
        raise RecordError(f"{where}billed.{over[0]}", f"{shares[over[0]]} is more than the whole price", "give 0 … 1")
    rules = table.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecordError(f"{where}rules", "is missing", "give at least one [[prices.rules]]")
    return Period(
        (begin - _EPOCH) // timedelta(microseconds=1),
        shares,
        tuple(_rule(rule, f"{where}rules[{n}].") for n, rule in enumerate(rules)),
    )


def _rule(table: Any, where: str) -> Rule:
    _known(table, _RULE, where)
    per = table.get("per", 1)
    if type(per) is not int or per not in PER:
        raise RecordError(f"{where}per", f"{per!r} is not a number of units", f"use one of {', '.join(map(str, PER))}")
    names = [name for name in ("tier", "model", "device_class") if name in table]
    patterns = {name: _text(table, name, where, _PATTERN) for name in names}
    unit = _text(table, "unit", where, UNITS)
    return Rule(_text(table, "sku", where, _NAME), unit, _decimal(table, "price", where), per, **patterns)


def _known(table: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(table, dict):
        raise RecordError(where.rstrip(".") or "price book", "is not a table")
    for name in table:
        if name not in known:
            raise RecordError(f"{where}{name}", "is not a field of a price book", nearest(name, known))


def _number(table: Mapping[str, Any], name: str, where: str, low: int, high: int) -> int:
    value = table.get(name)
    if type(value) is not int or not low <= value < high:
        raise RecordError(f"{where}{name}", f"{value!r} is not a whole number from {low} on", f"below {high}")
    return value


def _text(table: Mapping[str, Any], name: str, where: str, good: re.Pattern[str] | Iterable[str]) -> str:
    value: Any = table.get(name)
    if isinstance(good, re.Pattern):
        if not _is(good, value):
            raise RecordError(f"{where}{name}", f"{value!r} is not a valid value", f"it has the form {good.pattern}")
    elif value not in (known := list(good)):
        raise RecordError(f"{where}{name}", f"{value!r} is not known", f"use one of {', '.join(known)}")
    return str(value)


def _decimal(table: Mapping[str, Any], name: str, where: str) -> Decimal:
    """Text, never a float: 0.1 has no exact binary form."""
    value = table.get(name)
    if not _is(AMOUNT, value):
        raise RecordError(f"{where}{name}", f"{value!r} is not an amount", 'write it as text, e.g. "0.0025"')
    return Decimal(str(value))


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
