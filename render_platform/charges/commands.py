"""The commands of finance: charge, invoice, usage, budget, prices, focus."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from render_platform.charges import focus as export
from render_platform.charges.chain import Logged
from render_platform.charges.charging import Charging
from render_platform.charges.price_book import PriceBook, load_price_book
from render_platform.charges.rating import build_invoice, plain
from render_platform.charges.records import DayCharges, Invoice, parse_day
from render_platform.charges.spend import Budget, Budgets, Spend, Spending, book_of
from render_platform.clock import DAY_US, iso
from render_platform.config import load_settings
from render_platform.errors import PlatformError, UsageError
from render_platform.options import Time, json_option, print_json, state_option
from render_platform.pipeline import Platform, open_platform

MAX_DAYS = 3_660
API_KEY_ISSUER = "key"
_REF = re.compile(r"[0-9a-f]{64}")
_config = click.option("--config", type=click.Path(path_type=Path), help="A TOML file of settings.")
_month = click.option("--month", help="The month, such as 2026-11 [default: this one].")


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    return state_option(_config(json_option(command)))


@contextmanager
def _opened(state: Path | None, config: Path | None) -> Iterator[tuple[Platform, PriceBook]]:
    settings = load_settings(config=config, state_dir=state)
    book = book_of(settings)
    with open_platform(settings) as platform:
        yield platform, book


@click.command()
@click.option("--day", type=Time(), help="One day, such as 2026-11-23.")
@click.option("--from", "start", type=Time(), help="The first day.")
@click.option("--to", "end", type=Time(), help="The day before which the last one ends.")
@_shared
def charge(
    day: int | None, start: int | None, end: int | None, state: Path | None, config: Path | None, as_json: bool
) -> None:
    """Rate closed days and log their charges: every day that is due, or those given. Harmless to repeat."""
    rows, codes = [], {0}
    with _opened(state, config) as (platform, book):
        charging = Charging(platform, book)
        for day_us in charging.due() if day is None and start is None and end is None else _days(day, start, end):
            try:
                rows.append(_day_row(charging.charge(day_us)))
            except PlatformError as error:  # one day that is refused holds up no other
                rows.append({"day": iso(day_us)[:10], "error": str(error)})
                codes.add(error.exit_code)
    if as_json:
        print_json(rows)
    for row in () if as_json else rows:
        click.echo(f"{row['day']}  not charged: {row['error']}" if "error" in row else _day_text(row))
    if not rows and not as_json:
        click.echo("no day is due: every closed day is charged")
    sys.exit(1 if 1 in codes else max(codes))


def _days(day: int | None, start: int | None, end: int | None) -> Sequence[int]:
    if day is not None and start is None and end is None:
        start, end = day - day % DAY_US, day - day % DAY_US + DAY_US
    if day is not None and (start, end) != (day - day % DAY_US, day - day % DAY_US + DAY_US):
        raise UsageError("--day does not go with --from and --to", "give one day, or a range")
    if start is None or end is None or start >= end or start % DAY_US or end % DAY_US:
        raise UsageError("--from and --to are no days in order", "give both, such as 2026-11-01 and 2026-12-01")
    if end - start > MAX_DAYS * DAY_US:
        raise UsageError("--from and --to are more than ten years apart", "give a shorter range")
    return range(start, end, DAY_US)


def _day_row(logged: Logged[DayCharges]) -> dict[str, Any]:
    record = logged.record
    return {
        "day": iso(record.day_us)[:10],
        "revision": record.revision,
        "changed": logged.changed,
        "events": record.events,
        "amount": plain(record.amount),
        "currency": record.currency,
        "price_book": record.book_version,
        "digest": logged.digest,
        "log_index": logged.log_index,
    }


def _day_text(row: dict[str, Any]) -> str:
    said = "charged" if row["changed"] else "stands"
    return (
        f"{row['day']}  {said}, revision {row['revision']}: {row['events']} events, {row['amount']} {row['currency']}"
        f"  (entry {row['log_index']}, {row['digest'][:12]})"
    )


@click.command()
@click.option("--month", required=True, help="The month, such as 2026-11.")
@click.option("--customer", help="Only this customer's lines: an id, issuer/id, or a reference.")
@click.option("--issue", is_flag=True, help="Log the invoice, or the correction of what changed since the last one.")
@_shared
def invoice(
    month: str, customer: str | None, issue: bool, state: Path | None, config: Path | None, as_json: bool
) -> None:
    """Show the invoices of a month, and what is to be billed beyond them; with --issue, log it."""
    with _opened(state, config) as (platform, book):
        charging = Charging(platform, book)
        ref = None if customer is None else resolve(platform, customer)
        if issue:
            charging.invoice(month)
        known = charging.month(month)
        problems = charging.check(month)
        more = build_invoice(month, known.state)
    found = [(one.record, one.digest, one.log_index) for one in known.invoices]
    rows = [_invoice_row(one, ref, digest, index) for one, digest, index in found]
    if more is not None:
        rows.append(_invoice_row(more, ref, None, None))
    if as_json:
        print_json({"month": month, "invoices": rows, "problems": problems})
    else:
        _tell_invoices(month, rows)
        for problem in problems:
            click.echo(f"error: {problem}", err=True)
    sys.exit(1 if problems else 0)


def _invoice_row(one: Invoice, ref: str | None, digest: str | None, index: int | None) -> dict[str, Any]:
    """`total` is of all customers; without a digest, it is not issued."""
    lines = [asdict(line) for line in one.lines if ref in (None, line.customer_ref)]
    named = {"revision": one.revision, "issued": digest is not None, "digest": digest, "log_index": index}
    return {**named, "currency": one.currency, "total": one.total, "charges": list(one.charges), "lines": lines}


def _tell_invoices(month: str, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        where = f"entry {row['log_index']}, {row['digest'][:12]}" if row["issued"] else "not issued"
        click.echo(f"invoice {month}/{row['revision']}  {row['total']} {row['currency']}  ({where})")
        for line in row["lines"]:
            click.echo(
                f"  {line['customer_ref'][:12]}  {line['sku']:24} {line['events']:>9} events {line['amount']:>14}"
            )
    if not rows:
        click.echo(f"{month} has no charges")


@click.command()
@click.option("--customer", help="A customer's id, or issuer/id.")
@click.option("--ref", help="A customer's reference, 64 hex digits.")
@_month
@_shared
def usage(
    customer: str | None, ref: str | None, month: str | None, state: Path | None, config: Path | None, as_json: bool
) -> None:
    """What customers spent in a month: charged, estimated, energy, and budgets. Of one customer, or of all."""
    with _opened(state, config) as (platform, book):
        month = month or iso(platform.clock.now_us())[:7]
        spending = spending_of(platform, book)
        named = customer or ref
        refs = [resolve(platform, named)] if named else sorted({*platform.outbox.names(), *spending.customers(month)})
        found = list(spending.all(month, refs).values())
    found = [one for one in found if named or one.events or one.charged or one.budget or one.estimated is None]
    if as_json:
        print_json([one.as_json() for one in found])
    for one in () if as_json else found:
        _tell_spend(one)
    if not found and not as_json:
        click.echo(f"nobody has used anything in {month}")
    sys.exit(3 if any(one.estimated is None for one in found) else 0)


def _tell_spend(one: Spend) -> None:
    said = one.as_json()
    click.echo(f"{one.customer_ref}  {one.month}")
    for sku in one.charged:
        click.echo(f"  charged    {sku.sku:24} {sku.events:>9} events {sku.amount:>14f} {one.currency}")
    for sku in one.estimated or ():
        click.echo(f"  estimated  {sku.sku:24} {sku.events:>9} events {sku.amount:>14f} {one.currency}")
    if one.estimated is None:
        click.echo(f"  not known: what is not charged yet: {one.unknown}")
    energy = "not known" if said["joules"] is None else f"{said['joules']} J"
    carbon = "" if said["co2_grams"] is None else f", {said['co2_grams']} g CO₂"
    click.echo(f"  energy     {energy}{carbon}, of {one.energy_known} of {one.events} events")
    if one.budget is not None:
        of = f"  budget     {one.spent:f} {one.currency} of {one.budget.amount:f} {one.budget.currency}"
        click.echo(f"{of}: not compared: {one.not_compared}" if one.share is None else f"{of}: {one.share * 100:.1f} %")


def spending_of(platform: Platform, book: PriceBook) -> Spending:
    co2 = platform.settings.co2_g_per_kwh
    opener = lambda: nullcontext(platform.clickhouse)  # noqa: E731
    return Spending(platform.database, platform.cas, opener, platform.clock, book, co2)


def resolve(platform: Platform, text: str) -> str:
    """The reference of a customer: itself, `issuer/id`, or an id that one issuer alone has. UsageError otherwise."""
    if _REF.fullmatch(text):
        return text
    names = platform.outbox.names()
    found = [ref for ref, name in names.items() if text in (name, name.partition("/")[2])]
    if len(found) != 1:
        raise UsageError(f"{len(found)} customers are called {text!r}", "give issuer/id, or a reference with --ref")
    return found[0]


@click.group()
def budget() -> None:
    """Budgets of customers: an amount a month, with alerts at 80 % and 100 % of it."""


@budget.command("set")
@click.argument("customer")
@click.argument("amount")
@click.option("--enforce", is_flag=True, help="Refuse jobs of a customer who has spent it.")
@_shared
def set_budget(
    customer: str, amount: str, enforce: bool, state: Path | None, config: Path | None, as_json: bool
) -> None:
    """Give CUSTOMER (an id of an API key's holder, issuer/id, or a reference) AMOUNT a month."""
    with _opened(state, config) as (platform, book):
        ref = _known_or_new(platform, customer)
        made = Budgets(platform.database, platform.clock).set(ref, amount, book.currency, enforce=enforce)
    _tell_budgets([made], book, as_json)


@budget.command("remove")
@click.argument("customer")
@_shared
def remove_budget(customer: str, state: Path | None, config: Path | None, as_json: bool) -> None:
    """Take CUSTOMER's budget away."""
    with _opened(state, config) as (platform, book):
        removed = Budgets(platform.database, platform.clock).remove(resolve(platform, customer))
    if not removed:
        raise UsageError("the customer has no budget", "see `render-platform budget list`")
    _tell_budgets([], book, as_json)


@budget.command("list")
@_shared
def list_budgets(state: Path | None, config: Path | None, as_json: bool) -> None:
    """All budgets."""
    with _opened(state, config) as (platform, book):
        found = list(Budgets(platform.database, platform.clock).all().values())
    _tell_budgets(found, book, as_json)


def _known_or_new(platform: Platform, customer: str) -> str:
    """A customer gets a reference with the first job; a budget may come before it."""
    try:
        return resolve(platform, customer)
    except UsageError:
        issuer, _, name = customer.rpartition("/")
        if not name or any(customer == one.partition("/")[2] for one in platform.outbox.names().values()):
            raise
        with platform.database.write() as connection:
            return platform.outbox.customer_ref(connection, issuer or API_KEY_ISSUER, name)


def _tell_budgets(found: Sequence[Budget], book: PriceBook, as_json: bool) -> None:
    """`not_compared` is empty where days that are charged from now on count against the budget."""
    rows = [
        {**one._asdict(), "amount": f"{one.amount:f}", "not_compared": one.not_compared(book.currency)} for one in found
    ]
    if as_json:
        print_json(rows)
    for row in () if as_json else rows:
        enforced = ", enforced" if row["enforce"] else ""
        reason = f"; not compared: {row['not_compared']}" if row["not_compared"] else ""
        click.echo(f"{row['customer_ref']}  {row['amount']} {row['currency']} a month{enforced}{reason}")


@click.command()
@click.option("--check", "file", type=click.Path(path_type=Path), help="Check this file in place of the one in use.")
@_config
@json_option
def prices(file: Path | None, config: Path | None, as_json: bool) -> None:
    """Show the price book in use, or check a file: exit 0 where it is good, 2 where it is not."""
    book = load_price_book(file) if file is not None else book_of(load_settings(config=config))
    head = {"version": book.version, "currency": book.currency, "rounding": book.rounding, "digest": book.digest}
    rules = [
        {"from": iso(period.from_us), **asdict(rule), "price": plain(rule.price)}
        for period in book.periods
        for rule in period.rules
    ]
    if as_json:
        print_json({**head, "minor_digits": book.minor_digits, "rules": rules})
        return
    click.echo(f"price book {book.version}: {book.currency}, rounded {book.rounding}, {book.digest}")
    for rule in rules:
        match = f"tier {rule['tier']}, model {rule['model']}, device {rule['device_class']}"
        click.echo(f"  {rule['from'][:10]}  {rule['sku']:24} {rule['price']} per {rule['per']} {rule['unit']}  {match}")


@click.command()
@click.option("--month", required=True, help="The month, such as 2026-11.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file: .csv or .parquet.")
@_shared
def focus(month: str, output: Path, state: Path | None, config: Path | None, as_json: bool) -> None:
    """Export a month's charges in the format FOCUS 1.2, as CSV or Parquet."""
    writers = {".csv": export.to_csv, ".parquet": export.to_parquet}
    if output.suffix not in writers:
        raise UsageError(f"{output} is neither .csv nor .parquet", "name the file so that its format is known")
    with _opened(state, config) as (platform, book):
        known = Charging(platform, book).month(month)
        read = lambda digest: parse_day(platform.cas.get(digest))  # noqa: E731
        table = export.rows(known.days, known.invoices, read, platform.settings.billing_account)
    output.write_bytes(writers[output.suffix](table))
    if as_json:
        print_json({"month": month, "file": str(output), "rows": table.num_rows, "version": export.FOCUS_VERSION})
    else:
        click.echo(f"{output}: {table.num_rows} rows, FOCUS {export.FOCUS_VERSION}")


CHARGE_COMMANDS: tuple[click.Command, ...] = (charge, invoice, usage, budget, prices, focus)
