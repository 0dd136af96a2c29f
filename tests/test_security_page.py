"""docs/security.md: every claim names a module that is there and a test that shows it."""

from __future__ import annotations

import re

import pytest

from tests.test_docs import CHECKOUT, require_test, resolve, table

PAGE = CHECKOUT / "docs/security.md"
ROWS = table(PAGE, "attack", "what stops it", "shown by")
MODULES = {path.stem for path in (CHECKOUT / "render_platform").glob("[a-z]*")}
PARTS = [
    "Gateway",
    "Backends",
    "Outbox and SQL",
    "CAS and S3",
    "Log and keys",
    "Witnesses",
    "ClickHouse and the bridge",
    "Dagster",
    "Commands, bundles, receipts",
    "Supply chain",
]


def test_the_page_is_short_and_each_part_says_what_is_left_open() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 200
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(parts) == PARTS
    assert [name for name, part in parts.items() if "\nLeft open: " not in part] == []
    assert [name for name, part in parts.items() if "| attack |" not in part] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_what_stops_an_attack_is_there_and_shown(row: list[str]) -> None:
    _, stops, shown = row
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", stops):
        if name.partition(".")[0] in MODULES:
            resolve(f"render_platform.{name}")
    tests = re.findall(r"`(tests/[^`]+)`", shown)
    assert tests
    for test in tests:
        require_test(test)
