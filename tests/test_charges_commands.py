"""The commands of finance, as they are typed: charge, invoice, usage, budget, prices, focus."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from render_platform.charges.price_book import load_price_book
from render_platform.cli import main
from render_platform.clock import DAY_US, HOUR_US
from render_platform.events import UsageEvent
from tests import chdb_server
from tests.commands import restored_process
from tests.factories import CUSTOMERS, START_US, make_events
from tests.platforms import record
from tests.stories import deliver, open_story

DAY = START_US - START_US % DAY_US
MONTH = "2023-11"


class Shell:
    """Commands over one state folder, its clock the machine's: the month is over."""

    def __init__(self, state: Path, database: str) -> None:
        self.state = state
        self._env = {"CLICKHOUSE_DSN": chdb_server.shared_dsn(), "CLICKHOUSE_DATABASE": database}

    def run(self, *arguments: object, code: int = 0, stateless: bool = False, **more: str) -> str:
        env = {f"RENDER_PLATFORM_{name}": value for name, value in (self._env | more).items()}
        state = () if stateless else ("--state", self.state)
        with restored_process():
            done = CliRunner().invoke(main, [str(one) for one in (*arguments, *state)], env=env)
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return str(done.output)

    def json(self, *arguments: object, **more: Any) -> Any:
        return json.loads(self.run(*arguments, "--json", **more))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Two closed days of events of two months ago, on both paths; alice is one of the customers."""
    database = chdb_server.fresh_database()
    platform = open_story(tmp_path / "state", database, now_us=START_US)
    with platform.database.write() as connection:
        alice = platform.outbox.customer_ref(connection, "key", "alice")
    days = (make_events(30, 1, DAY, HOUR_US), make_events(20, 2, DAY + DAY_US, HOUR_US))
    made = [record(platform, "trace/t", [_of(event, alice) for event in day]) for day in days]
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace/t", DAY + 2 * DAY_US)
    deliver(platform, [event for day in made for event in day])
    platform.flush()
    platform.close()
    return Shell(tmp_path / "state", database)


def _of(event: UsageEvent, alice: str) -> UsageEvent:
    return replace(event, customer_ref=alice) if event.customer_ref == CUSTOMERS[0] else event


def test_days_are_charged_and_invoiced(shell: Shell, tmp_path: Path) -> None:
    due = shell.json("charge")
    assert [(row["day"], row["revision"], row["changed"]) for row in due] == [
        ("2023-11-16", 1, True),
        ("2023-11-17", 1, True),
    ]
    assert "every closed day is charged" in shell.run("charge")
    assert "stands, revision 1: 30 events" in shell.run("charge", "--day", "2023-11-16")
    assert len(shell.json("charge", "--from", "2023-11-16", "--to", "2023-11-18")) == 2

    (preview,) = shell.json("invoice", "--month", MONTH)["invoices"]
    assert (preview["issued"], preview["digest"]) == (False, None)
    assert "not issued" in shell.run("invoice", "--month", MONTH)
    found = shell.json("invoice", "--month", MONTH, "--issue")
    (issued,) = found["invoices"]
    assert (issued["issued"], issued["total"], found["problems"]) == (True, preview["total"], [])
    assert shell.json("invoice", "--month", MONTH, "--issue") == found, "harmless to repeat"

    own = shell.json("invoice", "--month", MONTH, "--customer", "alice")["invoices"][0]["lines"]
    assert {line["customer_ref"] for line in own} < {line["customer_ref"] for line in issued["lines"]}

    for name in ("focus.csv", "focus.parquet"):
        shell.run("focus", "--month", MONTH, "--output", tmp_path / name, BILLING_ACCOUNT="acme")
    rows = list(csv.DictReader((tmp_path / "focus.csv").read_text().splitlines()))
    assert sum(Decimal(row["BilledCost"]) for row in rows) == Decimal(issued["total"])
    assert {row["BillingAccountId"] for row in rows} == {"acme"}
    assert {row["InvoiceId"] for row in rows} == {"2023-11/1"}
    assert pq.read_table(tmp_path / "focus.parquet").num_rows == len(rows)


def test_what_cannot_be_charged_says_why(shell: Shell) -> None:
    (row,) = shell.json("charge", "--day", "2023-11-20", code=3)
    assert "nothing recorded into 2023-11-20" in row["error"]
    assert "not charged" in shell.run("charge", "--day", "2023-11-20", code=3)
    shell.run("invoice", "--month", MONTH, "--issue", code=3)
    shell.run("invoice", "--month", "2023-13", code=2)
    assert "has no charges" in shell.run("invoice", "--month", "2023-10")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--day", "2023-11-16", "--from", "2023-11-16"),
        ("--from", "2023-11-16"),
        ("--from", "2023-11-17", "--to", "2023-11-16"),
        ("--from", "2023-11-16T03:00", "--to", "2023-11-17"),
        ("--from", "1970-01-01", "--to", "2023-11-17"),
    ],
)
def test_a_range_is_whole_days_in_order(shell: Shell, arguments: tuple[str, ...]) -> None:
    shell.run("charge", *arguments, code=2)


def test_usage_is_of_one_or_all(shell: Shell) -> None:
    before = shell.json("usage", "--customer", "alice", "--month", MONTH)[0]
    assert (before["charged"], before["charged_days"]) == ([], 0)
    assert Decimal(before["estimated_total"]) > 0
    shell.run("charge")
    (own,) = shell.json("usage", "--customer", "key/alice", "--month", MONTH)
    assert (own["estimated"], own["charged_days"], own["events"]) == ([], 2, before["events"])
    everyone = shell.json("usage", "--month", MONTH)
    assert sum(one["events"] for one in everyone) == 50
    assert own in everyone
    assert shell.json("usage", "--ref", own["customer_ref"], "--month", MONTH) == [own]
    said = shell.run("usage", "--customer", "alice", "--month", MONTH, CO2_G_PER_KWH="400")
    assert "charged" in said
    assert "g CO₂" in said
    assert "nobody has used anything" in shell.run("usage")
    shell.run("usage", "--customer", "bob", code=2)


def test_usage_that_is_not_known_is_an_exit_of_3(shell: Shell) -> None:
    down = "http://127.0.0.1:9"
    (own,) = shell.json("usage", "--customer", "alice", "--month", MONTH, code=3, CLICKHOUSE_DSN=down)
    assert (own["estimated"], own["estimated_total"]) == (None, None)
    said = shell.run("usage", "--customer", "alice", "--month", MONTH, code=3, CLICKHOUSE_DSN=down)
    assert "not known" in said


def test_budgets(shell: Shell) -> None:
    (made,) = shell.json("budget", "set", "alice", "0.50", "--enforce")
    assert (made["amount"], made["currency"], made["enforce"]) == ("0.50", "USD", True)
    shell.run("budget", "set", "newcomer", "20")
    shell.run("budget", "set", "google/someone", "20")
    assert len(shell.json("budget", "list")) == 3
    shell.run("charge")
    assert "0.50 USD:" in shell.run("usage", "--customer", "alice", "--month", MONTH)
    shell.run("budget", "remove", "alice")
    shell.run("budget", "remove", "alice", code=2)
    shell.run("budget", "set", "alice", "a lot", code=2)
    assert {row["amount"] for row in shell.json("budget", "list")} == {"20"}


def test_a_budget_in_another_currency_says_that_it_is_not_compared(shell: Shell, tmp_path: Path) -> None:
    """A budget is in the price book's currency; the book's may be another one later."""
    assert "of the price book's USD" in shell.run("budget", "set", "alice", "5 EUR", code=2)
    said = "not compared: the budget is in USD, charges are in EUR"
    assert "not compared" not in shell.run("budget", "set", "alice", "5")
    book = tmp_path / "euros.toml"
    book.write_bytes(load_price_book(None).data.replace(b'"USD"', b'"EUR"'))
    assert said in shell.run("budget", "list", PRICE_BOOK=str(book))
    assert shell.json("budget", "list", PRICE_BOOK=str(book))[0]["not_compared"] in said
    assert said in shell.run("usage", "--customer", "alice", "--month", MONTH, PRICE_BOOK=str(book))
    assert "not compared" not in shell.run("usage", "--customer", "alice", "--month", MONTH)
    assert "not compared" not in shell.run("budget", "set", "alice", "5", PRICE_BOOK=str(book))


def test_prices_are_shown_and_checked(shell: Shell, tmp_path: Path) -> None:
    book = load_price_book(None)
    assert shell.json("prices", stateless=True)["digest"] == book.digest
    assert "gpu-second" in shell.run("prices", stateless=True)
    file = tmp_path / "prices.toml"
    file.write_bytes(book.data.replace(b"version = 1", b"version = 2"))
    assert shell.json("prices", "--check", file, stateless=True)["version"] == 2
    assert shell.json("prices", stateless=True, PRICE_BOOK=str(file))["version"] == 2
    file.write_bytes(book.data.replace(b'"0.0008"', b"0.0008"))
    assert "rules[2].price" in shell.run("prices", "--check", file, stateless=True, code=2)


def test_a_format_is_known_by_its_name(shell: Shell, tmp_path: Path) -> None:
    assert "neither .csv nor .parquet" in shell.run("focus", "--month", MONTH, "--output", tmp_path / "x.xlsx", code=2)
    assert not (tmp_path / "x.xlsx").exists()
    found = shell.json("focus", "--month", MONTH, "--output", tmp_path / "x.csv")
    assert (found["rows"], found["version"]) == (0, "1.2")
