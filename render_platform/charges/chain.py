"""The chain of charges in a log, read from entries and objects alone: months, their records, and rating again.

Whoever holds the log can do this: it needs no SQL. `charging` does the same with the log of a state folder.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from tempfile import TemporaryDirectory
from typing import Any, Generic, NamedTuple, TypeVar

import duckdb

from render_platform.canonical import digest_of
from render_platform.cas import Cas
from render_platform.charges.price_book import PriceBook, parse_price_book
from render_platform.charges.rating import (
    Batches,
    Day,
    MonthState,
    build_day,
    build_invoice,
    usage_of,
    wrong_lines,
)
from render_platform.charges.records import DayCharges, Invoice, parse_day, parse_invoice
from render_platform.clock import DAY_US, US_PER_SECOND, iso
from render_platform.entries import AuditEntry
from render_platform.errors import Finding, Missing, Unavailable, UsageError
from render_platform.evidence import Progress, Verification
from render_platform.slow_path import SlowPath, require_count

TYPES = ("charges", "correction")
BOOK, DAY, INVOICE = "price-book/", "day/", "invoice/"
Connect = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
_MONTH = re.compile(r"(19[7-9][0-9]|[2-8][0-9]{3})-(0[1-9]|1[0-2])")
_Record = TypeVar("_Record", Day, DayCharges, Invoice)


class Numbered(NamedTuple):
    """An entry and its index in the log."""

    at: int
    entry: AuditEntry


@dataclass(frozen=True, slots=True)
class Logged(Generic[_Record]):
    """A record, the digest of its bytes, and where it stands in the log. `changed`: it was logged just now."""

    record: _Record
    digest: str
    log_index: int
    changed: bool = False


@dataclass(slots=True)
class Month:
    """What the log says of a month, in its order; `state` is what its records come to.

    Of a day's record it keeps sums alone: who needs its lines reads it again. After an error in `add` it is of no use.
    """

    days: list[Logged[Day]] = field(default_factory=list)
    invoices: list[Logged[Invoice]] = field(default_factory=list)
    state: MonthState = field(default_factory=MonthState)
    problems: list[str] = field(default_factory=list)
    """Lines that are not quantity × price."""

    def add(self, numbered: Numbered, record: DayCharges | Invoice, cas: Cas) -> DayCharges | None:
        """The next entry and its record. Gives the day's record that it replaces."""
        index, digest = numbered.at, str(numbered.entry.subject_digest)
        if isinstance(record, Invoice):
            self.invoices.append(Logged(record, digest, index))
            self.state.add_invoice(digest, record)
            return None
        former = self.day(record.day_us, cas)
        try:
            wrong = wrong_lines(record.lines)
            self.state.add_day(digest, record, former)
        except ArithmeticError as error:
            name = numbered.entry.batch_id
            raise Finding(f"{name}: its amounts cannot be added up: {type(error).__name__}") from error
        at = iso(record.day_us)[:10]
        self.problems += [f"{at}: {one.sku} of {one.customer_ref[:12]} is not quantity × price" for one in wrong]
        self.days.append(Logged(self.state.latest[record.day_us], digest, index))
        return former

    def newest(self, day_us: int) -> Logged[Day] | None:
        return next((one for one in reversed(self.days) if one.record.day_us == day_us), None)

    def day(self, day_us: int, cas: Cas) -> DayCharges | None:
        """The day's newest record, read again."""
        found = self.newest(day_us)
        return None if found is None else parse_day(cas.get(found.digest))


def read_record(entry: AuditEntry, cas: Cas) -> DayCharges | Invoice:
    """What an entry names. Finding where the object is no such record, or says another day than its entry."""
    data = cas.get(str(entry.subject_digest))
    if entry.batch_id.startswith(DAY):
        record = parse_day(data)
        said = (record.day_us, record.revision, record.events, record.gpu_time_ns)
        if said != (entry.recorded_hour, entry.batch_seq, entry.records, entry.gpu_time_ns) or record.day_us % DAY_US:
            raise Finding(f"{entry.batch_id}: the record does not say what its entry says")
        _require_name(entry, f"{DAY}{iso(record.day_us)[:10]}", record.revision)
        return record
    invoice = parse_invoice(data)
    if (invoice.month, invoice.revision) != (month_of(entry.recorded_hour or 0), entry.batch_seq):
        raise Finding(f"{entry.batch_id}: the invoice does not say what its entry says")
    _require_name(entry, f"{INVOICE}{invoice.month}", invoice.revision)
    return invoice


def name_of(name: str, revision: int) -> str:
    """The `batch_id` of a day's or a month's record."""
    return name if revision == 1 else f"{name}/{revision}"


def _require_name(entry: AuditEntry, name: str, revision: int) -> None:
    if (entry.type, entry.batch_id) != (TYPES[revision > 1], name_of(name, revision)):
        raise Finding(f"{entry.batch_id} is no {entry.type} of that name and revision")


def month_of(at_us: int) -> str:
    return iso(at_us)[:7]


def month_bounds(month: str) -> tuple[int, int]:
    """Begin and end of a month; UsageError where it is none."""
    if not _MONTH.fullmatch(month):
        raise UsageError(f"{month!r} is not a month", "give it as 2026-11")
    begin = datetime(int(month[:4]), int(month[5:]), 1, tzinfo=UTC)
    end = begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)
    return int(begin.timestamp()) * US_PER_SECOND, int(end.timestamp()) * US_PER_SECOND


@contextmanager
def connected(connect: Connect = duckdb.connect) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB, its errors translated; what it spills is nobody else's to read."""
    try:
        with TemporaryDirectory(prefix="render-platform-") as folder, connect() as connection:
            connection.execute(f"SET temp_directory = '{folder}'")
            yield connection
    except (duckdb.Error, OSError) as error:
        raise Unavailable(f"DuckDB failed: {error}", "see the message") from error


def read_usage(
    slow: SlowPath, found: Sequence[Numbered], book: PriceBook, connection: duckdb.DuckDBPyConnection
) -> list[dict[str, Any]]:
    """Rows of USAGE_SCHEMA of the batches, digests checked. Finding where they hold more or fewer than the log says."""
    entries = [entry for _, entry in found]
    rows = [row for table in slow.read(entries, usage_of(book), connection) for row in table.to_pylist()]
    require_count(sum(row["events"] for row in rows), entries)
    return rows


def batches_named(found: Sequence[Numbered]) -> Batches:
    return Batches(len(found), found[0].at if found else None, found[-1].at if found else None)


def problems_of(month: Month) -> Iterator[str]:
    """What is wrong with the sums: lines against amounts, what was issued against lines, invoices against both."""
    yield from month.problems
    state = month.state
    for key in sorted(state.unfit):
        issued = state.issued.get(key, 0)
        yield f"{key[1]} of {key[0][:12]}: the records issue {issued}, the month's lines come to {state.total(key)}"
    try:
        yield from _invoice_problems(month)
    except ArithmeticError as error:  # of a record that nobody could have made: amounts of too many digits
        yield f"its amounts cannot be added up: {type(error).__name__}"


def _invoice_problems(month: Month) -> Iterator[str]:
    """Only as far as the newest invoice covers the records."""
    if not month.invoices:
        return
    state, newest = month.state, month.invoices[-1]
    before = [one.digest for one in month.days if one.log_index < newest.log_index]
    if list(newest.record.charges) != before:
        yield f"invoice {newest.record.month}/{newest.record.revision}: it does not cover the records before it"
    for invoice in (one.record for one in month.invoices):
        if sum((Decimal(line.amount) for line in invoice.lines), Decimal(0)) != Decimal(invoice.total):
            yield f"invoice {invoice.month}/{invoice.revision}: its lines do not add up to its total"
    for key in sorted(state.covered.keys() | state.invoiced.keys()):
        issued, line = state.covered.get(key, Decimal(0)), state.invoiced.get(key)
        if issued != Decimal(line.amount if line else 0):
            yield f"{key[1]} of {key[0][:12]}: issued {issued}, invoiced {line.amount if line else 0}"


class Rerating:
    """Every record of charges in a log, made again from its price book and batches, and compared byte for byte."""

    def __init__(self, cas: Cas, connect: Connect = duckdb.connect) -> None:
        self._cas, self._connect = cas, connect
        self._slow = SlowPath(cas, lambda _hour: [])
        self._books: dict[str, PriceBook] = {}
        self._batches: dict[int, list[Numbered]] = defaultdict(list)
        self._months: dict[str, Month] = defaultdict(Month)
        self.records = 0

    def run(self, entries: Iterable[tuple[int, AuditEntry]]) -> Iterator[tuple[str, str]]:
        """Gives the name of each record that does not hold, and why. `entries`: the whole log, in its order."""
        with connected(self._connect) as connection:
            for index, entry in entries:
                try:
                    self._follow(Numbered(index, entry), connection)
                except (Finding, Missing, UsageError) as error:
                    yield entry.batch_id, error.message
                except ArithmeticError as error:
                    yield entry.batch_id, f"its amounts cannot be added up: {type(error).__name__}"
        for name, month in sorted(self._months.items()):
            for problem in problems_of(month):
                yield f"the charges of {name}", problem

    def _follow(self, numbered: Numbered, connection: duckdb.DuckDBPyConnection) -> None:
        entry = numbered.entry
        if entry.type == "usage_batch":
            self._batches[(entry.recorded_hour or 0) // DAY_US].append(numbered)
        if entry.type not in TYPES:
            return
        self.records += 1
        if entry.batch_id.startswith(BOOK):
            self._add_book(entry)
            return
        month = self._months[month_of(entry.recorded_hour or 0)]
        record = read_record(entry, self._cas)
        try:
            again = self._again(record, month, connection)
            same = again is not None and digest_of(again.to_bytes()) == entry.subject_digest
        finally:
            month.add(numbered, record, self._cas)  # what follows was made after this one, right or wrong
        if not same:
            raise Finding("made again from its batches and price book, it says something else")

    def _add_book(self, entry: AuditEntry) -> None:
        book = parse_price_book(self._cas.get(str(entry.subject_digest)))
        if (entry.type, entry.batch_id) != (TYPES[0], f"{BOOK}{book.version}"):
            raise Finding(f"the price book is of version {book.version}, and logged as {entry.type}")
        self._books[book.digest] = book

    def _again(
        self, record: DayCharges | Invoice, month: Month, connection: duckdb.DuckDBPyConnection
    ) -> DayCharges | Invoice | None:
        if isinstance(record, Invoice):
            return build_invoice(record.month, month.state)
        book = self._books.get(record.book_digest)
        if book is None:
            raise Finding("its price book does not stand in the log before it")
        last = -1 if record.last_index is None else record.last_index
        former = month.day(record.day_us, self._cas)
        if former is not None and record.batches < former.batches:
            raise Finding(f"it rates {record.batches} batches, the day's record before it {former.batches}")
        found = [one for one in self._batches[record.day_us // DAY_US] if one.at <= last]
        usage = read_usage(self._slow, found, book, connection)
        return build_day(record.day_us, book, batches_named(found), usage, month.state, former)


def rerate(outcome: Verification, cas: Cas, progress: Progress = lambda *_: None) -> None:
    """Rate again what the log's entries charge, and add what does not hold to the outcome of their verification."""
    rerating = Rerating(cas)
    total = sum(logged.entry.type in TYPES for logged in outcome.logged)

    def entries() -> Iterator[Numbered]:
        for logged in outcome.logged:
            yield Numbered(logged.at, logged.entry)
            if logged.entry.type in TYPES:
                progress("charges", rerating.records, total)

    for where, problem in rerating.run(entries()):
        outcome.add(where, problem, None, f"what {where} charges")
    outcome.charges = rerating.records
