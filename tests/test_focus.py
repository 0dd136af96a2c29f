"""FOCUS 1.2 export: rows add up to invoices to the cent; the published rules and the public validator accept them."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.canonical import digest_of
from render_platform.charges import focus
from render_platform.charges.chain import Logged
from render_platform.charges.price_book import UNITS, parse_price_book
from render_platform.charges.rating import Batches, Day, MonthState, build_day, build_invoice, day_of
from render_platform.charges.records import DayCharges, Invoice
from render_platform.clock import DAY_US, time_us
from render_platform.errors import UsageError
from tests.focus_rules import COLUMNS, broken, corrects, is_value
from tests.gateway import servers

DAY = time_us("2026-11-23T00:00:00Z")
STATUSES = ("success", "error", "timeout", "cancelled")
TOML = """
version = 1
currency = "USD"
minor_digits = 2
rounding = "half_up"
device_classes = { "GPU-*" = "h100" }
[[prices]]
from = 2023-01-01T00:00:00Z
billed = { success = "1", error = "0", timeout = "0.5", cancelled = "1" }
[[prices.rules]]
sku = "premium-second"
unit = "gpu_second"
price = "0.00123"
tier = "premium"
[[prices.rules]]
sku = "second"
unit = "gpu_second"
price = "0.0008"
[[prices.rules]]
sku = "output"
unit = "output_token"
price = "0.61"
per = 1_000_000
"""
BOOK = parse_price_book(TOML.encode())
DEARER = parse_price_book(TOML.replace("version = 1", "version = 2").replace('"0.0008"', '"0.0009"').encode())
FORMER = {
    "InvoiceIssuerName": "InvoiceIssuer",
    "ProviderName": "Provider",
    "PublisherName": "Publisher",
    "ResourceId": "ResourceID",
}
VALIDATOR = ("focus-validator==1.0.0", "multimethod==1.12")


def usage(rng: random.Random, count: int) -> list[dict[str, Any]]:
    return [usage_row(rng) for _ in range(count)]


def usage_row(rng: random.Random, **given: Any) -> dict[str, Any]:
    events = rng.randrange(1, 5)
    counted = {f"{unit}_known": rng.randrange(events + 1) for unit in (*UNITS, "energy")} | {"gpu_second_known": events}
    amounts = {unit: rng.randrange(10**12) if counted[f"{unit}_known"] else 0 for unit in (*UNITS, "energy")}
    names = {
        "period": 0,
        "customer_ref": rng.choice(("aa", "bb")) * 32,
        "pricing_tier": rng.choice(("premium", "standard")),
        "model_name": rng.choice(("flux", "llama")),
        "device_uuid": rng.choice((None, "GPU-1", "GPU-2")),
        "status": rng.choice(STATUSES),
    }
    return {**names, "events": events, **counted, **amounts, **given}


@dataclass
class Ledger:
    """A month as the log would hold it: each record through the real rating, nothing else."""

    state: MonthState = field(default_factory=MonthState)
    records: dict[str, DayCharges] = field(default_factory=dict)
    days: list[Logged[Day]] = field(default_factory=list)
    invoices: list[Logged[Invoice]] = field(default_factory=list)

    def charge(self, day: int, rows: Sequence[dict[str, Any]], book: Any = BOOK) -> None:
        former = self.latest().get(DAY + day * DAY_US)
        record = build_day(DAY + day * DAY_US, book, Batches(1, 3, 4), rows, self.state, former)
        digest = digest_of(record.to_bytes())
        self.state.add_day(digest, record, former)
        self.days.append(Logged(day_of(record), digest, len(self.days) + len(self.invoices)))
        self.records[digest] = record

    def latest(self) -> dict[int, DayCharges]:
        return {one.record.day_us: self.records[one.digest] for one in self.days}

    def invoice(self) -> None:
        made = build_invoice("2026-11", self.state)
        if made is not None:
            digest = digest_of(made.to_bytes())
            self.invoices.append(Logged(made, digest, len(self.days) + len(self.invoices)))
            self.state.add_invoice(digest, made)

    def table(self) -> pa.Table:
        return focus.rows(self.days, self.invoices, self.records.__getitem__, "acme")

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.table().to_pylist()
        return found


def ledger(seed: int, steps: Sequence[str]) -> Ledger:
    """Steps are `0` … `3`, a day charged anew, with more; `d`, the first day at prices that hold from then on; `i`, an
    invoice."""
    rng, made, held = random.Random(seed), Ledger(), defaultdict[int, list[dict[str, Any]]](list)
    book = BOOK
    for step in steps:
        if step == "i":
            made.invoice()
        else:
            day = int(step) if step.isdigit() else 0
            held[day] += usage(rng, 3)
            book = DEARER if step == "d" else book
            made.charge(day, held[day], book)
    return made


def months() -> st.SearchStrategy[Ledger]:
    return st.builds(ledger, st.integers(0, 10_000), st.lists(st.sampled_from("0123di"), min_size=1, max_size=7))


def total(amounts: Mapping[tuple[str, Any], Decimal], customer: str) -> Decimal:
    return sum((amount for (owner, _), amount in amounts.items() if owner == customer), Decimal(0))


KINDS = {"Decimal": "decimal128(38, 24)", "Date/Time": "timestamp[us, tz=UTC]", "String": "string", "JSON": "string"}


def test_columns_are_those_of_the_specification() -> None:
    """All of its columns, of their data types, first; ours after them (attributes/column_handling.md)."""
    types = {field.name: str(field.type) for field in focus.SCHEMA}
    theirs, ours = list(types)[: len(COLUMNS)], list(types)[len(COLUMNS) :]
    assert theirs == sorted(column.name for column in COLUMNS)
    assert {name: types[name] for name in theirs} == {column.name: KINDS[column.kind] for column in COLUMNS}
    assert [column.level for column in COLUMNS].count("M") == 21
    assert len(theirs) == 57
    assert all(re.fullmatch(r"x_[A-Z][A-Za-z]+", name) for name in ours)


@given(months())
def test_each_row_keeps_the_published_rules(made: Ledger) -> None:
    assert broken(made.rows()) == []


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"SkuPriceDetails": '{"BilledShare": "1"}'}, "columns/skupricedetails.md"),
        ({"SkuPriceDetails": '{"x_Shares": ["1"]}'}, "attributes/key_value_format.md"),
        ({"PricingUnit": None}, "columns/pricingunit.md"),
        ({"PricingUnit": "1.5 tokens"}, "attributes/unit_format.md"),
        ({"ChargeFrequency": None}, "columns/chargefrequency.md"),
        ({"ServiceSubcategory": "Containers"}, "columns/servicesubcategory.md"),
        ({"InvoiceIssuerName": "Somebody"}, "columns/billedcost.md"),
        ({"ListCost": Decimal(-1)}, "columns/listcost.md"),
        ({"ContractedUnitPrice": Decimal(-1)}, "columns/contractedunitprice.md"),
        ({"ChargeClass": "Refund"}, "columns/chargeclass.md"),
        ({"BillingCurrency": "Dollars"}, "columns/billingcurrency.md"),
        ({"ResourceId": "GPU-9", "ResourceType": None}, "columns/resourcetype.md"),
        ({"RegionName": "not applicable"}, "attributes/null_handling.md"),
        ({"SkuId": "another"}, "columns/skupriceid.md"),
    ],
)
def test_a_row_that_breaks_a_rule_is_found(change: dict[str, Any], file: str) -> None:
    rows = ledger(1, "00").rows()
    charged = next(row for row in rows if row["BilledCost"])
    assert any(found.startswith(f"{file}: ") for found in broken([{**charged, **change}, *rows]))


@given(months())
def test_what_the_rules_leave_open(made: Ledger) -> None:
    """Ours: one currency, nothing prepaid, no names but ids, and nothing outside of its month."""
    for row in made.rows():
        assert row["ChargeCategory"] == "Usage"
        assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
        assert row["PricingCurrency"] == row["BillingCurrency"]
        assert row["PricingCurrencyEffectiveCost"] == row["EffectiveCost"]
        assert row["PricingCurrencyListUnitPrice"] == row["ListUnitPrice"]
        assert row["ResourceName"] is row["RegionId"] is row["CommitmentDiscountId"] is row["Tags"] is None


@given(months())
def test_billed_cost_comes_to_each_invoice_exactly(made: Ledger) -> None:
    """columns/billedcost.md: the sum for a given InvoiceId MUST match the sum of the payable amount of that invoice."""
    billed: dict[tuple[str, str | None], Decimal] = defaultdict(Decimal)
    for row in made.rows():
        billed[row["SubAccountId"], row["InvoiceId"]] += row["BilledCost"]
        assert row["BilledCost"] == row["EffectiveCost"] == round(row["BilledCost"], 2)
    wanted: dict[tuple[str, str | None], Decimal] = defaultdict(Decimal)
    for number, logged in enumerate(made.invoices, 1):
        for line in logged.record.lines:
            wanted[line.customer_ref, f"2026-11/{number}"] += Decimal(line.amount)
    for customer in {customer for customer, _ in made.state.issued}:
        issued = total(made.state.issued, customer)
        wanted[customer, None] = issued - total(wanted, customer)
    assert {k: v for k, v in billed.items() if v} == {k: v for k, v in wanted.items() if v}


@given(months())
def test_rows_count_each_event_and_amount_once(made: Ledger) -> None:
    rows, lines = made.rows(), [line for record in made.latest().values() for line in record.lines]
    assert sum(row["x_GpuSeconds"] for row in rows) * 10**9 == sum(line.gpu_time_ns for line in lines)
    assert sum(row["x_Joules"] or 0 for row in rows) * 1_000 == sum(line.energy_mj for line in lines)
    assert sum(row["x_Events"] for row in rows) == sum(line.events for line in lines)
    assert sum(row["ContractedCost"] for row in rows) == sum(Decimal(line.amount) for line in lines)


@given(months())
def test_only_what_follows_an_invoice_is_a_correction(made: Ledger) -> None:
    """columns/chargeclass.md: MUST NOT be null for a correction to a previously invoiced billing period, else null."""
    for row in made.rows():
        assert corrects(row) == (
            row["InvoiceId"] not in (None, "2026-11/1") or (row["InvoiceId"] is None and bool(made.invoices))
        )
        assert corrects(row) or (row["PricingQuantity"] >= 0 and row["x_Events"] > 0) or row["PricingQuantity"] == 0


def test_a_late_event_is_a_correction_of_what_it_adds() -> None:
    rng, made = random.Random(1), Ledger()
    first = usage_row(rng, customer_ref="aa" * 32, pricing_tier="standard", device_uuid="GPU-1", status="success")
    late = {**first, "events": 1, "gpu_second": 90 * 10**9, "gpu_second_known": 1, "energy_known": 0, "energy": 0}
    made.charge(0, [first])
    made.invoice()
    made.charge(0, [first, {**late, "output_token": 0, "output_token_known": 0}])
    row = next(r for r in made.rows() if r["ChargeClass"] == "Correction" and r["SkuId"] == "second")
    assert (row["ConsumedQuantity"], row["x_Events"], row["x_Joules"]) == (90, 1, None)
    assert row["ContractedCost"] == Decimal("0.072")
    assert row["BilledCost"] in (Decimal("0.07"), Decimal("0.08"))
    assert (row["x_Revision"], row["InvoiceId"], row["ResourceId"]) == (2, None, "GPU-1")


def test_what_only_rounding_changed_still_has_its_row() -> None:
    """Half a cent a day: taken back and given again, it moves a cent from one day to another."""
    made, rng = Ledger(), random.Random(3)
    names = {"customer_ref": "aa" * 32, "pricing_tier": "standard", "status": "success", "output_token_known": 0}
    half_cent = usage_row(rng, **names, gpu_second=6_250_000_000, output_token=0)
    for day, rows in ((0, [half_cent]), (1, [half_cent]), ("i", []), (0, []), (1, [half_cent] * 2), (0, [half_cent])):
        made.invoice() if day == "i" else made.charge(int(day), rows)
    rows = [row for row in made.rows() if row["SkuId"] == "second"]
    assert sum(row["BilledCost"] for row in rows) == sum(
        made.state.issued[k] for k in made.state.issued if k[1] == "second"
    )


def test_a_unit_is_priced_by_its_share_and_its_quantity() -> None:
    rng, made = random.Random(2), Ledger()
    made.charge(0, [usage_row(rng, status="timeout", output_token=3_000_000, output_token_known=1)])
    row = next(row for row in made.rows() if row["SkuId"] == "output")
    assert (row["PricingUnit"], row["PricingQuantity"], row["ConsumedQuantity"]) == ("1000000 Tokens", 3, 3_000_000)
    assert (row["ListUnitPrice"], row["ListCost"]) == (Decimal("0.305"), Decimal("0.915"))
    assert (row["SkuPriceId"], row["SkuMeter"]) == ("output/0.5", "Output Tokens")


def test_csv_is_plain_text_and_parquet_is_typed(tmp_path: Path) -> None:
    table = ledger(5, "01i0").table()
    kinds = {column.name: column.kind for column in COLUMNS}
    said = list(csv.DictReader(io.StringIO(focus.to_csv(table).decode(), newline="")))
    for text, row in zip(said, table.to_pylist(), strict=True):
        assert all((text[name] == "") == (value is None) for name, value in row.items())
        assert all(is_value(kinds.get(name, "String"), value) for name, value in text.items())
        assert all(Decimal(text[n]) == v and "E" not in text[n] for n, v in row.items() if isinstance(v, Decimal))
        assert text["ChargePeriodStart"] == row["ChargePeriodStart"].strftime("%Y-%m-%dT%H:%M:%SZ")
    file = tmp_path / "focus.parquet"
    file.write_bytes(focus.to_parquet(table))
    assert pq.read_table(file).equals(table)
    with duckdb.connect() as connection:
        found = connection.execute("SELECT sum(BilledCost), min(ChargePeriodStart) FROM read_parquet($1)", [str(file)])
        total_cost, start = found.fetchall()[0]
    assert total_cost == sum(row["BilledCost"] for row in table.to_pylist())
    assert isinstance(start, datetime)


def test_no_records_are_no_rows_and_still_all_columns() -> None:
    table = Ledger().table()
    assert (table.num_rows, table.schema) == (0, focus.SCHEMA)
    assert focus.to_csv(table).decode().strip() == ",".join(focus.SCHEMA.names)


def test_an_amount_that_does_not_fit_is_refused_and_never_rounded() -> None:
    made = Ledger()
    made.charge(0, usage(random.Random(4), 2))
    [(digest, record)] = made.records.items()
    made.records[digest] = replace(record, lines=(replace(record.lines[0], amount="0." + "1" * 25),))
    with pytest.raises(UsageError, match="fewer decimals"):
        made.table()


# The public validator.


def test_the_public_validator_accepts_the_csv(tmp_path: Path) -> None:
    """focus-validator 1.0.0 knows the rules of 1.0, and guesses types from the text; later ones need Python 3.12.

    A column without any value is a number to it: its rules of type are left out for those. Five of its rules are
    still of 0.5 and ask for names that 1.0 has changed: its copy of the file has those names.
    """
    made = ledger(7, "0123i01d")
    table = made.table()
    assert {row["ChargeClass"] for row in table.to_pylist()} == {None, "Correction"}
    never = [name for name in table.column_names if table.column(name).null_count == table.num_rows]
    accepted = validate(tmp_path, focus.to_csv(table), never)
    assert "Validation succeeded" in accepted, accepted
    harmed = focus.to_csv(table).replace(b"Usage-Based", b"Whenever").replace(b",USD,", b",Dollars,")
    refused = validate(tmp_path, harmed, never)
    assert "Validation failed" in refused
    assert "ChargeFrequency" in refused
    assert "BillingCurrency" in refused


def validate(folder: Path, data: bytes, never: Sequence[str]) -> str:
    try:
        home = servers.environment("focus-validator", VALIDATOR)
    except servers.CannotInstall as error:
        pytest.skip(f"FOCUS VALIDATOR NOT RUN: it cannot be installed here: {error}")
    package = next(home.glob("lib/python3*/site-packages")) / "focus_validator"
    untyped = {f"{FORMER.get(name, name).lower()}_{kind}" for name in never for kind in ("isstring", "isjsonobject")}
    checks = [rule.stem for rule in (package / "rules/version_sets/1.0").iterdir() if rule.stem.lower() in untyped]
    file, override = folder / "focus.csv", folder / "override.yaml"
    header, _, rest = data.decode().partition("\r\n")
    names = [FORMER.get(name, name) for name in header.split(",")]
    lines = [line for line in rest.split("\r\n") if line]
    file.write_text("\n".join([",".join([*names, "ChargeType"]), *(f"{line},Usage" for line in lines)]) + "\n")
    override.write_text(json.dumps({"overrides": checks}))
    command = [str(part) for part in (home / "bin/focus-validator", "--data-file", file, "--override-file", override)]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, timeout=120)
    said: str = done.stdout + done.stderr[-2000:]
    return said
