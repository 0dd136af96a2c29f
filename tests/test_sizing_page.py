"""docs/sizing.md: each figure follows from the measured units on the same page."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/sizing.md").read_text()
DAY_S, YEARS, BATCH = 86_400, 7, 50_000


def number(label: str) -> Decimal:
    """The figure in the row that begins with `label`."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {label} |")]
    return Decimal(row.split("|")[2].strip().replace(",", ""))


DAY = Decimal(10_000 * DAY_S)
ALL = DAY * 365 * YEARS
BATCHES = ALL / BATCH
WORKED_OUT = {
    "events a day": DAY,
    "events in 7 years, 10⁹": ALL / 10**9,
    "batches of 50,000 a day": DAY / BATCH,
    "entries of the log in 7 years, millions": BATCHES / 10**6,
    "objects in 7 years, millions": BATCHES * number("objects a batch") / 10**6,
    "evidence a day, GB": DAY * number("evidence, bytes an event") / 10**9,
    "evidence in 7 years, TB": ALL * number("evidence, bytes an event") / 10**12,
    "storage of it in the last month, dollars": ALL
    * number("evidence, bytes an event")
    / 10**12
    * number("object storage, dollars a TB and month"),
    "writes of objects a month, dollars": DAY
    / BATCH
    * 30
    * number("objects a batch")
    / 10**6
    * number("a million writes of objects, dollars"),
    "SQL at 30 days, TB": DAY * 30 * number("SQL, bytes an event and its job, while kept") / 10**12,
    "SQL that is never pruned, GB a day": DAY * number("SQL, bytes an event, for good") / 10**9,
    "ClickHouse at 90 days, TB": DAY * 90 * number("ClickHouse, bytes an event") / 10**12,
    "partitions of hours in 7 years": Decimal(24 * 365 * YEARS),
    "Dagster's storage of them, GB an asset": 24 * 365 * YEARS * number("Dagster, bytes an hour's partition") / 10**9,
    "cores for forwarding and billing": 10_000 * number("gateway, µs of CPU a request, forwarded and billed") / 10**6,
    "seconds to reconcile an hour": 36_000_000 * number("a reconciled event, µs") / 10**6,
    "hours to verify a day deeply, one core": DAY / number("deep verification, events a second") / 3_600,
    "days to verify 7 years deeply, one core": ALL / number("deep verification, events a second") / DAY_S,
    "hours to hash 7 years, where the disk keeps up": ALL / number("verification of digests, events a second") / 3_600,
}


@pytest.mark.parametrize("label", WORKED_OUT)
def test_a_figure_follows_from_the_units(label: str) -> None:
    told = number(label)
    assert told == round(WORKED_OUT[label], max(0, -int(told.as_tuple().exponent)))


def test_every_figure_is_worked_out() -> None:
    table = PAGE.split("| at 10,000/s | figure |\n|---|---:|\n")[1].split("\n\n")[0]
    assert {line.split("|")[1].strip() for line in table.splitlines()} == WORKED_OUT.keys()
