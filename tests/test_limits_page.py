"""docs/limits.md is held against the code: each value, every number that can be set, every constant MAX_…"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest

from render_platform.config import Settings
from tests.test_docs import CHECKOUT, code, resolve, table

PAGE = CHECKOUT / "docs/limits.md"
BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SECONDS = {"ms": Fraction(1, 1_000), "s": Fraction(1), "h": Fraction(3_600), "days": Fraction(86_400)}
UNITS_OF_NAMES = {"_NS": Fraction(1, 10**9), "_US": Fraction(1, 10**6), "_MS": Fraction(1, 1_000)}
NO_LIMITS = {"clickhouse.MAX_US", "receipt_verifier.MAX_TIME_S", "tiles.MAX_INDEX"}
"""The last number that a format has: no resource is bounded by it."""


def value_of(name: str) -> Any:
    """A constant, an item of a dict, or the default of a field."""
    whole = name if name.startswith(("assets.", "sensors.")) else f"render_platform.{name}"
    if item := re.fullmatch(r'(.+)\["(\w+)"\]', whole):
        return resolve(item[1])[item[2]]
    path, _, last = whole.rpartition(".")
    holder = resolve(path)
    if isinstance(holder, type) and issubclass(holder, msgspec.Struct):
        return {field.name: field.default for field in msgspec.structs.fields(holder)}[last]
    if dataclasses.is_dataclass(holder):
        return {field.name: field.default for field in dataclasses.fields(holder)}[last]
    return getattr(holder, last)


def said(bound: str, name: str) -> Fraction:
    """What the page says, in the constant's own unit."""
    found = re.fullmatch(r"([\d,]+)(?: (\w+))?", bound)
    assert found, f"{bound!r}: not a number and a unit"
    number, unit = Fraction(found[1].replace(",", "")), str(found[2] or "")
    if not unit or unit in BYTES:
        return number * BYTES.get(unit, 1)
    return number * SECONDS[unit] / UNITS_OF_NAMES.get(name[-3:], Fraction(1))


def limits() -> Iterator[tuple[str, str]]:
    """(bound, constant) of each."""
    for _, bounds, names, then in table(PAGE, "what", "bound", "where", "at the bound"):
        parts, constants = bounds.split("; "), [code(name) for name in names.split(", ")]
        assert len(parts) == len(constants), names
        assert then or len(constants) == 1, names
        yield from zip(parts, constants, strict=True)


def constants() -> Iterator[str]:
    """Each MAX_… of the sources, by the name that the page gives it."""
    for folder in ("render_platform", "assets", "sensors", "resources"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            yield from named_in(path)


def named_in(path: Path) -> Iterator[str]:
    module = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removeprefix("render_platform.")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [one for target in targets for one in getattr(target, "elts", [target])]
            yield from (f"{module}.{one.id}" for one in names if isinstance(one, ast.Name) and one.id[:4] == "MAX_")


@pytest.mark.parametrize(("bound", "name"), list(limits()), ids=lambda text: text)
def test_a_limit_is_what_the_page_says(bound: str, name: str) -> None:
    assert Fraction(value_of(name)) == said(bound, name)


def test_a_limit_stands_once() -> None:
    names = [name for _, name in limits()]
    assert sorted(names) == sorted(set(names))


def test_every_constant_that_is_a_limit_stands_on_the_page() -> None:
    found = set(constants())
    assert len(found) > 100
    assert found >= NO_LIMITS
    assert found - {name for _, name in limits()} == NO_LIMITS


def test_every_number_that_can_be_set_has_a_range_and_stands_on_the_page() -> None:
    """The ranges of configuration.md are tried in tests/test_docs.py."""
    ranges = {
        code(name).removeprefix("RENDER_PLATFORM_").lower(): bounds
        for name, _, bounds, _ in table(CHECKOUT / "docs/configuration.md", "variable", "default", "range", "meaning")
    }
    numbers = {field.name: field.default for field in dataclasses.fields(Settings) if field.type == "int"}
    header = ("setting", "default", "range", "what it bounds, and what happens there")
    shown = [(code(name), default, bounds) for name, default, bounds, _ in table(PAGE, *header)]
    assert shown == [(name, str(default), ranges[name]) for name, default in numbers.items()]
    assert all(bounds for _, _, bounds in shown)
