"""Charges: each closed day's usage, rated and logged, and each finished month's invoice."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from decimal import Decimal, localcontext
from typing import Any

import dagster as dg
import sqlalchemy as sa

from assets import plots, views
from assets.jobs import BACKFILL, DAYS, MONTHS, SEQUENCER, day_of_key
from render_platform.charges.chain import Logged, Month, month_of
from render_platform.charges.charging import Charging
from render_platform.charges.rating import EXACT, plain
from render_platform.charges.records import DayCharges, Invoice, InvoiceLine, Line
from render_platform.charges.spend import book_of
from render_platform.clock import HOUR_US, iso
from render_platform.database import log_entries
from render_platform.entries import parse
from render_platform.errors import Finding, PlatformError
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

CHARGE_COLUMNS = ["SKU", "unit", "events", "unmeasured", "quantity", "amount"]
REPAIR = "run `render-platform verify --deep`: it names the record and the batch; do not invoice before"


def _sum_of_lines(asset: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        "sum_of_lines",
        asset=asset,
        blocking=True,
        description=f"Lines are quantity × price, and add up to what was issued and invoiced. If not: {REPAIR}.",
    )


@dg.asset(
    deps=["audit_log"],
    partitions_def=DAYS,
    backfill_policy=BACKFILL,
    group_name="billing",
    kinds={"json"},
    owners=["team:finance"],
    pool=SEQUENCER,
    output_required=False,
    description=(
        "A closed day's usage at the price book's prices, logged as one signed record. One row is one charge of a "
        "customer: SKU, price, model, tier, device class and status. What changes later is a correction, never an edit."
    ),
    metadata={"dagster/column_schema": views.fields_of(Line)},
    check_specs=[
        _sum_of_lines("usage_charges"),
        dg.AssetCheckSpec(
            "conserved",
            asset="usage_charges",
            blocking=True,
            description=f"The charges hold the GPU time of the day's log entries, to the ns. If not: {REPAIR}.",
        ),
        dg.AssetCheckSpec(
            "unmeasured",
            asset="usage_charges",
            description=(
                "Each billed event has a figure for what it is billed by. If not: a backend does not say its tokens, "
                "images or steps; see docs/charges.md."
            ),
        ),
    ],
)
def usage_charges(
    context: dg.AssetExecutionContext, platform: PlatformResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Each day is materialized when it was charged; one that is refused does not stop the others."""
    keys, refused, charged = context.partition_keys, [], list[Logged[DayCharges]]()
    with platform.open() as open_platform:
        charging = _charging(open_platform, platform)
        for key in keys:
            if len(keys) > 1 and not any(map(open_platform.hours.covered, range(*day_of_key(key), HOUR_US))):
                context.log.info(f"{key}: nothing recorded into this day")
                continue
            try:
                logged = charging.charge(day_of_key(key)[0])
            except PlatformError as error:
                refused.append(f"{key}: {error}")
                continue
            charged.append(logged)
            metadata = _day_figures(logged)
            if len(keys) == 1:  # tables and plots are for one day alone
                yield dg.MaterializeResult(metadata=metadata | _day_details(open_platform, charging, logged))
            else:
                context.log_event(dg.AssetMaterialization("usage_charges", metadata=metadata, partition=key))
        if charged:
            yield from _day_checks(open_platform, charging, charged)
    _fail(refused, len(keys), "days were not charged")


@dg.asset(
    deps=["usage_charges"],
    partitions_def=MONTHS,
    backfill_policy=BACKFILL,
    group_name="billing",
    kinds={"json"},
    owners=["team:finance"],
    pool=SEQUENCER,
    output_required=False,
    description=(
        "A finished month's invoice, logged. One row is one line: what a customer owes for a SKU, rounded once. A "
        "later one of the same month bills only what changed since."
    ),
    metadata={"dagster/column_schema": views.fields_of(InvoiceLine)},
    check_specs=[_sum_of_lines("invoices")],
)
def invoices(
    context: dg.AssetExecutionContext, platform: PlatformResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Each month is materialized when it was invoiced; one that is refused does not stop the others."""
    keys, refused, months = context.partition_keys, [], []
    with platform.open() as open_platform:
        charging = _charging(open_platform, platform)
        for key in keys:
            try:
                logged = charging.invoice(key[:7])
            except PlatformError as error:
                refused.append(f"{key[:7]}: {error}")
                continue
            months.append(key[:7])
            metadata = _invoice_figures(logged)
            if len(keys) == 1:
                details = {"lines": _invoice_lines(logged.record), **_checkpoint(open_platform)}
                yield dg.MaterializeResult(metadata=metadata | details)
            else:
                context.log_event(dg.AssetMaterialization("invoices", metadata=metadata, partition=key))
        if months:
            yield _sums(charging, months)
    _fail(refused, len(keys), "months were not invoiced")


def _charging(open_platform: Platform, platform: PlatformResource) -> Charging:
    return Charging(open_platform, book_of(open_platform.settings), platform.duckdb.get_connection)


def _fail(refused: list[str], asked: int, what: str) -> None:
    if refused:
        raise dg.Failure(
            f"{len(refused)} of {asked} {what}: {refused[0]}",
            metadata={"refused": dg.MetadataValue.md("\n".join(f"- {text}" for text in refused[:50]))},
        )


# Metadata.


def _day_figures(logged: Logged[DayCharges]) -> dict[str, Any]:
    """A few figures: they stand in the event of each partition of a range."""
    record = logged.record
    return {
        "amount": f"{plain(record.amount)} {record.currency}",
        "dagster/partition_row_count": len(record.lines),
        "events": record.events,
        "GPU seconds": views.gpu_seconds(record.gpu_time_ns),
        "revision": record.revision,
        "changed": logged.changed,
        "record": logged.digest,
        "log index": logged.log_index,
        "batches": f"{record.batches}, entries {record.first_index} … {record.last_index}",
        "price book": f"version {record.book_version}, {record.book_digest}",
    }


def _day_details(open_platform: Platform, charging: Charging, logged: Logged[DayCharges]) -> dict[str, Any]:
    month = charging.month(month_of(logged.record.day_us))
    return {
        "by SKU": _by_sku(logged.record),
        "top customers": _top_customers(logged.record),
        "the month": plots.svg(_plot(month)),
        **_checkpoint(open_platform),
    }


def _checkpoint(open_platform: Platform) -> dict[str, Any]:
    return views.checkpoint(open_platform.log.published())


def _by_sku(record: DayCharges) -> dg.TableMetadataValue:
    rows: dict[str, dict[str, Any]] = {}
    with localcontext(EXACT):
        for line in record.lines:
            row = rows.setdefault(line.sku, {**dict.fromkeys(CHARGE_COLUMNS, 0), "amount": Decimal(0)})
            row |= {"SKU": line.sku, "unit": line.unit, "amount": row["amount"] + Decimal(line.amount)}
            row |= {name: row[name] + getattr(line, name) for name in ("events", "unmeasured", "quantity")}
    shown = [{**row, "amount": plain(row["amount"])} for _, row in sorted(rows.items())]
    return views.table(shown, CHARGE_COLUMNS)


def _top_customers(record: DayCharges) -> dg.TableMetadataValue:
    totals: dict[str, Decimal] = defaultdict(Decimal)
    with localcontext(EXACT):
        for line in record.lines:
            totals[line.customer_ref] += Decimal(line.amount)
    top = sorted(totals, key=lambda ref: (-totals[ref], ref))[:10]
    return views.table([{"customer": ref, "amount": plain(totals[ref])} for ref in top], ["customer", "amount"])


def _plot(month: Month) -> Any:
    """The month's amounts by day, one colour a SKU."""
    by_sku: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for record in month.state.latest.values():
        for line in record.lines:
            by_sku[line.sku][int(iso(record.day_us)[8:10])] += float(line.amount)
    first = next(iter(month.state.latest.values()))
    figure, axes = plots.new_axes(f"Charges of {month_of(first.day_us)}", "day", first.currency)
    days = sorted({day for amounts in by_sku.values() for day in amounts})
    bottom = dict.fromkeys(days, 0.0)
    for sku in sorted(by_sku):
        axes.bar(days, [by_sku[sku][day] for day in days], bottom=list(bottom.values()), label=sku)
        bottom = {day: bottom[day] + by_sku[sku][day] for day in days}
    if by_sku:
        axes.legend(frameon=False)
    return figure


def _invoice_figures(logged: Logged[Invoice]) -> dict[str, Any]:
    record = logged.record
    return {
        "total": f"{record.total} {record.currency}",
        "dagster/partition_row_count": len(record.lines),
        "revision": record.revision,
        "changed": logged.changed,
        "record": logged.digest,
        "log index": logged.log_index,
        "day records": len(record.charges),
    }


def _invoice_lines(record: Invoice) -> dg.TableMetadataValue:
    columns = ["customer", "SKU", "unit", "events", "quantity", "amount"]
    rows = [(one.customer_ref, one.sku, one.unit, one.events, one.quantity, one.amount) for one in record.lines]
    return views.table([dict(zip(columns, row, strict=True)) for row in rows], columns)


# Checks.


def _day_checks(
    open_platform: Platform, charging: Charging, charged: Iterable[Logged[DayCharges]]
) -> Iterator[dg.AssetCheckResult]:
    records = [logged.record for logged in charged]
    yield _sums(charging, sorted({month_of(record.day_us) for record in records}))
    wrong = [text for record in records if (text := _lost(open_platform, record))]
    yield dg.AssetCheckResult(
        check_name="conserved",
        passed=not wrong,
        description="; ".join(wrong[:10]) or "the charges hold the GPU time of the day's log entries, to the ns",
        metadata={"GPU seconds": views.gpu_seconds(sum(record.gpu_time_ns for record in records))},
    )
    missing: dict[str, int] = defaultdict(int)
    for line in (line for record in records for line in record.lines if line.unmeasured):
        missing[f"{line.unit} of {line.model_name}"] += line.unmeasured
    yield dg.AssetCheckResult(
        check_name="unmeasured",
        passed=not missing,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{missing[name]} events without {name}" for name in sorted(missing)[:10])
        or "every billed event has its figures",
        metadata={"events": sum(missing.values())},
    )


def _sums(charging: Charging, months: Iterable[str]) -> dg.AssetCheckResult:
    try:
        problems = [f"{month}: {problem}" for month in months for problem in charging.check(month)]
    except Finding as error:  # a record that is not what its entry names
        problems = [str(error)]
    said = "; ".join(problems[:10]) or "lines add up to what was issued and invoiced"
    return dg.AssetCheckResult(check_name="sum_of_lines", passed=not problems, description=said)


def _lost(open_platform: Platform, record: DayCharges) -> str:
    """How the record's GPU time differs from that of the entries that it says it charges; empty where it does not."""
    start_us, end_us = day_of_key(iso(record.day_us)[:10])
    index, hour = log_entries.c.log_index, log_entries.c.hour_us
    last = -1 if record.last_index is None else record.last_index
    query = sa.select(log_entries.c.entry).where(
        log_entries.c.type == "usage_batch", hour >= start_us, hour < end_us, index <= last
    )
    with open_platform.database.read() as connection:
        logged_ns = sum(parse(bytes(entry)).gpu_time_ns for entry in connection.execute(query).scalars())
    charged_ns = sum(line.gpu_time_ns for line in record.lines)
    if logged_ns == charged_ns:
        return ""
    return f"{iso(record.day_us)[:10]}: {charged_ns} ns are charged, {logged_ns} ns are logged"
