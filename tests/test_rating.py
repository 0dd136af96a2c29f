"""Rating against an oracle of fractions, and its laws: order, splitting, repetition, corrections, no cent lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import canonical
from render_platform.charges.price_book import UNITS, PriceBook, parse_price_book
from render_platform.charges.rating import USAGE_SCHEMA, Batches, MonthState, build_day, build_invoice, rate, usage_sql
from render_platform.charges.records import DayCharges, Line, parse_day, parse_invoice
from render_platform.clock import DAY_US, time_us
from render_platform.errors import Finding, UsageError
from tests.factories import CUSTOMERS, make_table

MONTH_US = time_us("2023-11-01T00:00:00Z")
NONE = Batches(1, 0, 0)
COLUMNS = {"gpu_second": 10**9, "output_token": 1, "input_token": 1, "image": 1, "step": 1}


def make_book(price: str = "0.0037", version: int = 1, rounding: str = "half_up") -> PriceBook:
    return parse_price_book(
        f"""
version = {version}
currency = "USD"
minor_digits = 2
rounding = "{rounding}"
[[prices]]
from = 2000-01-01T00:00:00Z
billed = {{ success = "1", error = "0", timeout = "0.25", cancelled = "1" }}
[[prices.rules]]
sku = "tokens-out"
unit = "output_token"
price = "{price}"
per = 1_000
model = "llama*"
[[prices.rules]]
sku = "tokens-in"
unit = "input_token"
price = "0.0011"
per = 1_000
model = "llama*"
[[prices.rules]]
sku = "images"
unit = "image"
price = "0.0204"
model = "flux*"
[[prices.rules]]
sku = "gpu"
unit = "gpu_second"
price = "{price}"
tier = "premium"
[[prices.rules]]
sku = "gpu-std"
unit = "gpu_second"
price = "0.0019"
""".encode()
    )


@st.composite
def usage_row(draw: st.DrawFn) -> dict[str, Any]:
    events = draw(st.integers(1, 50))
    row: dict[str, Any] = {
        "period": 0,
        "customer_ref": draw(st.sampled_from(CUSTOMERS[:3])),
        "pricing_tier": draw(st.sampled_from(("standard", "premium"))),
        "model_name": draw(st.sampled_from(("llama-8b", "flux-dev", "whisper"))),
        "device_uuid": draw(st.sampled_from(("GPU-1", "GPU-2", None))),
        "status": draw(st.sampled_from(("success", "error", "timeout", "cancelled"))),
        "events": events,
    }
    for unit in (*UNITS, "energy"):
        known = events if unit == "gpu_second" else draw(st.integers(0, events))
        row[f"{unit}_known"] = known
        row[unit] = Decimal(draw(st.integers(0, 10**15)) if known else 0)
    return row


days = st.dictionaries(st.integers(0, 29), st.lists(usage_row(), min_size=1, max_size=6), min_size=1, max_size=5)


@dataclass(slots=True)
class Ledger(MonthState):
    """A month that keeps its records."""

    days: dict[int, DayCharges] = field(default_factory=dict)


def charge(book: PriceBook, state: Ledger, day: int, usage: Sequence[dict[str, Any]]) -> DayCharges:
    former = state.days.get(day)
    record = build_day(MONTH_US + day * DAY_US, book, NONE, usage, state, former)
    assert parse_day(record.to_bytes()) == record
    state.add_day(f"{len(state.records):064d}", record, former)
    assert state.unfit == set(), "each record issues what the lines come to"
    state.days[day] = record
    return record


def charged(book: PriceBook, month: dict[int, list[dict[str, Any]]], order: Sequence[int]) -> Ledger:
    state = Ledger()
    for day in order:
        charge(book, state, day, month[day])
    return state


def totals(state: MonthState) -> dict[tuple[str, str], Decimal]:
    return {key: amount for key, amount in state.issued.items() if amount}


def oracle(price: str, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Decimal]:
    """What the rows cost, by fractions and a hand-written list of rules, rounded half up at the end."""
    sums: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    billed = {"success": Fraction(1), "error": Fraction(0), "timeout": Fraction(1, 4), "cancelled": Fraction(1)}
    for row in rows:
        gpu = ("gpu", price) if row["pricing_tier"] == "premium" else ("gpu-std", "0.0019")
        rules = [("gpu_second", *gpu, 1)]
        if row["model_name"].startswith("llama"):
            rules += [("output_token", "tokens-out", price, 1000), ("input_token", "tokens-in", "0.0011", 1000)]
        if row["model_name"].startswith("flux"):
            rules.append(("image", "images", "0.0204", 1))
        for unit, sku, each, per in rules:
            amount = Fraction(int(row[unit])) * Fraction(each) / (COLUMNS[unit] * per) * billed[row["status"]]
            sums[row["customer_ref"], sku] += amount
    cents = {key: int((amount * 100 + Fraction(1, 2)) // 1) for key, amount in sums.items()}
    return {key: Decimal(n) / 100 for key, n in cents.items() if n}


@given(days)
def test_a_month_comes_to_what_fractions_say(month: dict[int, list[dict[str, Any]]]) -> None:
    rows = [row for usage in month.values() for row in usage]
    assert totals(charged(make_book(), month, sorted(month))) == oracle("0.0037", rows)


@given(days, st.randoms(use_true_random=False))
def test_the_order_of_days_and_their_repetition_change_nothing(month: dict[int, Any], rng: Any) -> None:
    order = sorted(month)
    shuffled = order + rng.sample(order, rng.randint(0, len(order)))
    rng.shuffle(shuffled)
    assert totals(charged(make_book(), month, order)) == totals(charged(make_book(), month, shuffled))


@given(days, st.data())
def test_splitting_a_day_changes_nothing(month: dict[int, list[dict[str, Any]]], data: st.DataObject) -> None:
    day = data.draw(st.sampled_from(sorted(month)))
    at = data.draw(st.integers(0, len(month[day])))
    rest = {other: usage for other, usage in month.items() if other != day}
    split = rest | {day: month[day][:at], 30: month[day][at:]}
    whole = charged(make_book(), month, sorted(month))
    assert totals(whole) == totals(charged(make_book(), split, sorted(split)))


@given(days, st.data())
def test_corrections_add_up_to_the_month_as_it_should_have_been(month: dict[int, Any], data: st.DataObject) -> None:
    """Late rows come into days that were charged; invoices and their corrections follow."""
    late = {day: data.draw(st.lists(usage_row(), max_size=3)) for day in month}
    state = charged(make_book(), month, sorted(month))
    invoices = [build_invoice("2023-11", state)]
    state.add_invoice("i1", invoices[0])  # type: ignore[arg-type]
    full = {day: month[day] + late[day] for day in month}
    for day in full:
        charge(make_book(), state, day, full[day])
    correction = build_invoice("2023-11", state)
    assert (correction is None) == (not any(late.values()))
    if correction is not None:
        assert parse_invoice(correction.to_bytes()) == correction
        state.add_invoice("i2", correction)
        assert build_invoice("2023-11", state) is None
    assert totals(state) == totals(charged(make_book(), full, sorted(full)))
    billed = {key: Decimal(line.amount) for key, line in state.invoiced.items() if Decimal(line.amount)}
    assert billed == totals(state)
    used = sum(row["events"] for usage in full.values() for row in usage)
    gpu = sum(line.events for line in state.invoiced.values() if line.unit == "gpu_second")
    assert gpu == used


@given(days, st.sampled_from(("half_up", "half_even", "down", "up")))
def test_a_re_rated_month_equals_one_rated_afresh(month: dict[int, Any], rounding: str) -> None:
    state = charged(make_book(), month, sorted(month))
    book = make_book("0.0041", version=2, rounding=rounding)
    for day in sorted(month):
        charge(book, state, day, month[day])
    assert totals(state) == totals(charged(book, month, sorted(month)))


@given(days)
def test_each_event_and_each_ns_stands_once(month: dict[int, list[dict[str, Any]]]) -> None:
    state = charged(make_book(), month, sorted(month))
    for day, usage in month.items():
        record = state.days[day]
        ns, energy = sum(int(row["gpu_second"]) for row in usage), sum(int(row["energy"]) for row in usage)
        assert (record.gpu_time_ns, sum(line.gpu_time_ns for line in record.lines)) == (ns, ns)
        assert sum(line.energy_mj for line in record.lines) == energy
        assert record.events == sum(row["events"] for row in usage)


def test_what_is_not_measured_is_counted_and_not_billed_as_nothing() -> None:
    row = dict.fromkeys(USAGE_SCHEMA.names, 0) | {
        "customer_ref": CUSTOMERS[0], "pricing_tier": "standard", "model_name": "llama-8b", "device_uuid": None,
        "status": "success", "events": 10, "gpu_second_known": 10, "output_token_known": 7, "output_token": 700,
    }  # fmt: skip
    lines = {line.sku: line for line in rate(make_book(), [row])}
    assert (lines["tokens-out"].unmeasured, lines["tokens-in"].unmeasured, lines["gpu-std"].unmeasured) == (3, 10, 0)
    failed = {line.sku: line for line in rate(make_book(), [row | {"status": "error"}])}
    assert {line.unmeasured for line in failed.values()} == {0}, "an error is not billed: nothing is missing"


def test_what_no_rule_prices_is_named_and_refused() -> None:
    text = make_book().data.decode().replace('sku = "gpu-std"', 'sku = "gpu-std"\nmodel = "llama*"')
    row = dict.fromkeys(USAGE_SCHEMA.names, 0) | {
        "customer_ref": CUSTOMERS[0], "pricing_tier": "free", "model_name": "whisper", "device_uuid": "X", "events": 1,
        "status": "success",
    }  # fmt: skip
    with pytest.raises(UsageError, match="model whisper, tier free, device class any"):
        rate(parse_price_book(text.encode()), [row])
    with pytest.raises(UsageError, match="period -1"):
        rate(make_book(), [row | {"period": -1}])


def test_one_month_has_one_currency() -> None:
    state = charged(make_book(), {0: []}, [0])
    other = parse_price_book(make_book(version=2).data.replace(b"USD", b"EUR"))
    with pytest.raises(UsageError, match="charged in USD"):
        build_day(MONTH_US + DAY_US, other, NONE, [], state, None)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1_000), st.integers(1, 200))
def test_duckdb_sums_what_the_rows_hold(tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int) -> None:
    import pyarrow.parquet as pq

    table = make_table(rows, seed)
    file = tmp_path_factory.mktemp("usage") / "rows.parquet"
    pq.write_table(table, file)
    book = make_book()
    with duckdb.connect() as connection:
        found = connection.sql(usage_sql(book), params={"files": [str(file)]}).to_arrow_table().cast(USAGE_SCHEMA)
    expected: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * 13)
    names = ("gpu_time_ns", "output_tokens", "input_tokens", "image_count", "num_steps", "energy_mj")
    for row in table.to_pylist():
        one = expected[tuple(row[n] for n in ("customer_ref", "pricing_tier", "model_name", "device_uuid", "status"))]
        one[0] += 1
        for at, name in enumerate(names):
            one[1 + at] += row[name] is not None
            one[7 + at] += row[name] or 0
    units = (*UNITS, "energy")
    read = {
        (r["customer_ref"], r["pricing_tier"], r["model_name"], r["device_uuid"], r["status"]): [
            r["events"],
            *(r[f"{unit}_known"] for unit in units),
            *(int(r[unit]) for unit in units),
        ]
        for r in found.to_pylist()
    }
    assert read == dict(expected)


def test_the_price_of_the_period_of_event_time_holds() -> None:
    text = make_book().data.decode()
    later = text[text.index("[[prices]]") :].replace("2000-01-01", "2023-11-16")
    book = parse_price_book((text + later).encode())
    sql = usage_sql(book)
    boundary = book.periods[1].from_us
    assert f"WHEN epoch_us(event_time) < {boundary} THEN 0 ELSE 1 END" in sql


@given(st.text(), st.integers(0, 2**130))
def test_a_record_has_the_canonical_bytes_of_what_it_says(text: str, number: int) -> None:
    line = Line(text, text, "image", "1", 1, "1", text, text, text, text, None, 1, 0, number, "1", 0, 0, number)
    record = replace(charge(make_book(), Ledger(), 0, []), currency=text, events=number, lines=(line,))
    try:
        wanted = canonical.encode({"version": 1, "kind": "usage_charges", **asdict(record)})
    except Finding:
        with pytest.raises(Finding):
            record.to_bytes()
        return
    assert record.to_bytes() == wanted
    assert parse_day(wanted) == record


def test_a_record_that_was_changed_is_refused() -> None:
    row = dict.fromkeys(USAGE_SCHEMA.names, 0) | {
        "customer_ref": CUSTOMERS[0], "pricing_tier": "standard", "model_name": "flux", "device_uuid": None,
        "status": "success", "events": 1, "gpu_second_known": 1, "gpu_second": 10**9,
    }  # fmt: skip
    data = charge(make_book(), Ledger(), 0, [row]).to_bytes()
    for old, new in (
        (b'"quantity":0,', b'"quantity":-1,'),
        (b'"quantity":0,', b'"quantity":0.0,'),
        (b'"quantity":0,', b'"quantity":true,'),
        (b'"quantity":0,', b'"quantity":0,"quantity":0,'),
        (b'"quantity":0,', b'"quantity":0,"other":0,'),
        (b'"quantity":0,', b'"quantity": 0,'),
        (b'"unit":"image"', b'"unit":"day"'),
        (b'"per":1,', b'"per":7,'),
        (b'"rounding":"half_up"', b'"rounding":"odd"'),
        (b'"amount":"0"', b'"amount":"0\\n"'),
        (b'"amount":"0"', b'"amount":"1e3"'),
        (b'"model_name":"flux"', b'"model_name":"\\u0066lux"'),
        (b'"model_name":"flux"', b'"model_name":"flux\\u0000"'),
        (b'"model_name":"flux"', b'"model_name":"flux\xff"'),
    ):
        assert old in data
        with pytest.raises(Finding):
            parse_day(data.replace(old, new, 1))
    data = charge(make_book(), Ledger(), 0, []).to_bytes()
    for bad in (
        data.replace(b'"revision":1', b'"revision":"1"'),
        data.replace(b'"kind":"usage_charges"', b'"kind":"invoice"'),
        data.replace(b'"events":0,', b""),
        data.replace(b'"lines":[]', b'"lines":[{}]'),
        data + b" ",
    ):
        with pytest.raises(Finding):
            parse_day(bad)


def test_half_up_is_the_oracles() -> None:
    assert make_book().round(Decimal("0.005")) == Decimal("0.005").quantize(Decimal("0.01"), ROUND_HALF_UP)
