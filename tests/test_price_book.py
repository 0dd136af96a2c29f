"""The price book: what is refused, by its field; which rule prices what; and how amounts are rounded."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from render_platform.charges.price_book import ANY_DEVICE, load_price_book, parse_price_book
from render_platform.errors import RecordError, UsageError

GOOD = """
version = 3
currency = "EUR"
minor_digits = 2
rounding = "half_even"
[device_classes]
"GPU-8*" = "h100"
"GPU-*" = "a100"
[[prices]]
from = 2023-01-01T00:00:00Z
billed = { success = "1", error = "0", timeout = "0.5", cancelled = "1" }
[[prices.rules]]
sku = "llm-out"
unit = "output_token"
price = "0.60"
per = 1_000_000
model = "llama-*"
[[prices.rules]]
sku = "llm-in"
unit = "input_token"
price = "0.15"
per = 1_000_000
model = "llama-*"
[[prices.rules]]
sku = "free"
unit = "gpu_second"
price = "0"
tier = "free"
[[prices.rules]]
sku = "gpu-h100"
unit = "gpu_second"
price = "0.002"
device_class = "h100"
[[prices]]
from = 2024-01-01T00:00:00Z
billed = { success = "1", error = "0", timeout = "0", cancelled = "1" }
[[prices.rules]]
sku = "gpu-h100"
unit = "gpu_second"
price = "0.003"
"""


def test_the_sample_of_the_package_is_a_book() -> None:
    book = load_price_book(None)
    assert [rule.sku for rule in book.periods[0].rules_for("anything", "any-model", ANY_DEVICE)] == ["gpu-second"]


def test_the_first_rule_of_each_unit_prices_an_event() -> None:
    first, second = parse_price_book(GOOD.encode()).periods
    assert [rule.sku for rule in first.rules_for("free", "llama-8b", "h100")] == ["free", "llm-out", "llm-in"]
    assert [rule.sku for rule in first.rules_for("standard", "flux", "h100")] == ["gpu-h100"]
    assert first.rules_for("standard", "flux", "a100") == []
    assert [rule.price for rule in second.rules_for("free", "flux", "a100")] == [Decimal("0.003")]


def test_the_first_pattern_gives_the_class_of_a_device() -> None:
    book = parse_price_book(GOOD.encode())
    found = [book.device_class(device) for device in ("GPU-8a", "GPU-1", "SIM-1", None)]
    assert found == ["h100", "a100", ANY_DEVICE, ANY_DEVICE]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("half_up", ("0.13", "0.12", "-0.13")),
        ("half_even", ("0.12", "0.12", "-0.12")),
        ("down", ("0.12", "0.12", "-0.12")),
        ("up", ("0.13", "0.13", "-0.13")),
    ],
)
def test_each_rounding_has_its_name(rounding: str, expected: tuple[str, ...]) -> None:
    book = parse_price_book(GOOD.replace("half_even", rounding).encode())
    assert tuple(str(book.round(Decimal(text))) for text in ("0.125", "0.1201", "-0.125")) == expected


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("version = 3", "", "version"),
        ("version = 3", "version = 0", "version"),
        ("version = 3", 'version = "3"', "version"),
        ("version = 3", "version = true", "version"),
        ('currency = "EUR"', 'currency = "euro"', "currency"),
        ("minor_digits = 2", "minor_digits = 7", "minor_digits"),
        ('rounding = "half_even"', 'rounding = "nearest"', "rounding"),
        ('rounding = "half_even"', "rounding = 1", "rounding"),
        ('"GPU-8*" = "h100"', '"GPU-8*" = 8', "device_classes"),
        ("2024-01-01T00:00:00Z", "2023-01-01T00:00:00Z", "prices[1].from"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00", "prices[1].from"),
        ("2024-01-01T00:00:00Z", '"2024"', "prices[1].from"),
        ('timeout = "0.5", ', "", "prices[0].billed"),
        ('timeout = "0.5"', 'timeout = "1.5"', "prices[0].billed.timeout"),
        ('timeout = "0.5"', "timeout = 0.5", "prices[0].billed.timeout"),
        ('sku = "llm-out"', "", "prices[0].rules[0].sku"),
        ('sku = "llm-out"', 'sku = "-"', "prices[0].rules[0].sku"),
        ('unit = "output_token"', 'unit = "word"', "prices[0].rules[0].unit"),
        ('price = "0.60"', "price = 0.60", "prices[0].rules[0].price"),
        ('price = "0.60"', 'price = "-1"', "prices[0].rules[0].price"),
        ('price = "0.60"', 'price = "1e9"', "prices[0].rules[0].price"),
        ('price = "0.60"', 'price = "NaN"', "prices[0].rules[0].price"),
        ("per = 1_000_000\nmodel", "per = 7\nmodel", "prices[0].rules[0].per"),
        ('tier = "free"', 'teir = "free"', "prices[0].rules[2].teir"),
        ('tier = "free"', 'tier = "fr[e]e"', "prices[0].rules[2].tier"),
        ('sku = "free"', 'sku = "llm-in"', "sku"),
        ("[[prices]]", "[prices]", "price book"),
        ("version = 3", "version = 3\nvertion = 4", "vertion"),
    ],
)
def test_a_field_that_is_wrong_is_named(old: str, new: str, field: str) -> None:
    assert old in GOOD
    with pytest.raises(RecordError) as caught:
        parse_price_book(GOOD.replace(old, new, 1 if "[[prices]]" not in old else -1).encode())
    assert caught.value.field == field


def test_a_period_without_rules_is_refused() -> None:
    with pytest.raises(RecordError, match=r"prices\[0\].rules"):
        parse_price_book(GOOD[: GOOD.index("[[prices.rules]]")].encode())


def test_no_book_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_price_book(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not TOML"):
        load_price_book(tmp_path / "bad.toml")
