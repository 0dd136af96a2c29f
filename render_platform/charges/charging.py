"""Charges in the log of a state folder: a closed day's, and a finished month's invoice.

The log is the only state: a month is read from its records, in their order. A day or a month is charged once; what
changed since is a correction, a record of its own. Two that charge at once: one of them looks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import duckdb
import sqlalchemy as sa

from render_platform.charges.chain import (
    BOOK,
    DAY,
    INVOICE,
    TYPES,
    Connect,
    Logged,
    Month,
    Numbered,
    batches_named,
    connected,
    month_bounds,
    month_of,
    name_of,
    problems_of,
    read_record,
    read_usage,
)
from render_platform.charges.price_book import PriceBook, parse_price_book
from render_platform.charges.rating import build_day, build_invoice
from render_platform.charges.records import DayCharges, Invoice
from render_platform.clock import DAY_US, HOUR_US, iso
from render_platform.database import batches, checkpoints, log_entries
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Unavailable, UsageError
from render_platform.pipeline import Platform

_ATTEMPTS = 5
_Record = TypeVar("_Record", DayCharges, Invoice)


class _Moved(Exception):
    """The month has another record since it was read."""


class Charging:
    def __init__(self, platform: Platform, book: PriceBook, connect: Connect = duckdb.connect) -> None:
        self._platform, self._connect = platform, connect
        self._read: dict[str, Month] = {}
        self.book = book

    def charge(self, day_us: int) -> Logged[DayCharges]:
        """Rate a closed day of `recorded_at`, and log it where that says something new; harmless to repeat.

        Unavailable until every hour of the day that a lane covers is closed. UsageError where the price book does not
        price an event, or the log knows other bytes under the book's version: nothing is logged then.
        """
        self._require_closed(day_us)
        for _ in range(_ATTEMPTS):
            month, found = self.month(month_of(day_us)), self._batches(day_us)
            book, former = self._book_of(month), month.day(day_us, self._platform.cas)
            with connected(self._connect) as connection:
                usage = read_usage(self._platform.slow, found, book, connection)
            record = build_day(day_us, book, batches_named(found), usage, month.state, former)
            last = month.newest(day_us)
            if former is not None and last is not None and _same(former, record):
                self._platform.log.publish()  # a crash may have left it unpublished
                return Logged(former, last.digest, last.log_index)
            self._log_book(book)
            logged = self._log(record, f"{DAY}{iso(day_us)[:10]}", day_us, month)
            if logged is not None:
                return logged
        raise Unavailable(f"{iso(day_us)[:10]} was charged by others at once", "run it again")

    def invoice(self, month: str) -> Logged[Invoice]:
        """The month's invoice; if it has one, the correction of what changed since. Harmless to repeat.

        Unavailable until the month is closed and each of its days is charged, with all of its batches.
        """
        start_us, end_us = month_bounds(month)
        self._require_charged(month, start_us, end_us)
        for _ in range(_ATTEMPTS):
            known = self.month(month)
            record = build_invoice(month, known.state)
            if record is None:
                if known.invoices:
                    self._platform.log.publish()
                    return known.invoices[-1]
                raise Unavailable(f"{month} has no charges", "charge its days: `render-platform charge`")
            logged = self._log(record, f"{INVOICE}{month}", start_us, known)
            if logged is not None:
                return logged
        raise Unavailable(f"{month} was invoiced by others at once", "run it again")

    def month(self, month: str) -> Month:
        """What the log says of a month, published or not. Finding where a record is not what its entry names.

        The last month is remembered, and grows: of records, the new ones alone are read.
        """
        found = self._read.pop(month, None) or Month()
        self._read.clear()
        for numbered in self._entries(TYPES, *month_bounds(month))[len(found.days) + len(found.invoices) :]:
            found.add(numbered, read_record(numbered.entry, self._platform.cas), self._platform.cas)
        self._read[month] = found  # not after an error: it may be half added
        return found

    def due(self) -> list[int]:
        """Closed days, in order, with events that no record charges yet."""
        last: dict[int, int] = {}
        for _, entry in self._entries(TYPES):
            if entry.batch_id.startswith(DAY):
                last[entry.recorded_hour or 0] = entry.records
        held = self._held()
        return [day for day in sorted(held) if held[day] != last.get(day) and not self._open_hours(day, day + DAY_US)]

    def owes(self, month: str) -> bool:
        """Whether an invoice of the month would say anything new."""
        return build_invoice(month, self.month(month).state) is not None

    def check(self, month: str) -> list[str]:
        """What is wrong with a month's sums: lines against what was issued, what was issued against invoices."""
        return list(problems_of(self.month(month)))

    # Inside.

    def _book_of(self, month: Month) -> PriceBook:
        """A month that began in another currency stays in it, with the book that priced it last."""
        last = month.days[-1].record if month.days else None
        if last is None or (last.currency, last.minor_digits) == (self.book.currency, self.book.minor_digits):
            return self.book
        return parse_price_book(self._platform.cas.get(last.book_digest))

    def _require_closed(self, day_us: int) -> None:
        if day_us % DAY_US:
            raise UsageError(f"{day_us} is not the first instant of a day", "give midnight, UTC")
        hours = self._platform.hours
        covered = any(hours.covered(hour) for hour in range(day_us, day_us + DAY_US, HOUR_US))
        if not covered and day_us not in self._held():  # a lane that a recovery ended holds events, and covers nothing
            raise Unavailable(f"nothing recorded into {iso(day_us)[:10]} yet", "charge a day that is over")
        if still_open := self._open_hours(day_us, day_us + DAY_US):
            name = f"{iso(still_open[0])[:13]}h"
            raise Unavailable(f"{iso(day_us)[:10]} is not closed: {name} is open", "charge it when the day is over")

    def _require_charged(self, month: str, start_us: int, end_us: int) -> None:
        if self._platform.clock.now_us() < end_us or self._open_hours(start_us, end_us):
            raise Unavailable(f"{month} is not over", "invoice it when its last day is closed")
        if waiting := [day for day in self.due() if start_us <= day < end_us]:
            raise Unavailable(f"{len(waiting)} days of {month} are not charged", "run `render-platform charge` first")

    def _open_hours(self, start_us: int, end_us: int) -> list[int]:
        hours = self._platform.hours
        covered = (hour for hour in range(start_us, end_us, HOUR_US) if hours.covered(hour))
        return [hour for hour in covered if hours.closed_until(hour) < hour + HOUR_US]

    def _held(self) -> dict[int, int]:
        """Events under published checkpoints, by day."""
        day = batches.c.hour_us - batches.c.hour_us % DAY_US
        query = sa.select(day, sa.func.sum(batches.c.records)).filter_by(type="usage_batch", state="published")
        with self._platform.database.read() as connection:
            return {int(row[0]): int(row[1]) for row in connection.execute(query.group_by(day))}

    def _batches(self, day_us: int) -> list[Numbered]:
        with self._platform.database.read() as connection:
            size = connection.execute(sa.select(sa.func.max(checkpoints.c.size))).scalar() or 0
        found = self._entries(("usage_batch",), day_us, day_us + DAY_US)
        return [one for one in found if one.at < size]

    def _entries(self, types: Sequence[str], start_us: int | None = None, end_us: int | None = None) -> list[Numbered]:
        query = sa.select(log_entries.c.log_index, log_entries.c.entry).where(log_entries.c.type.in_(types))
        if start_us is not None:
            query = query.where(log_entries.c.hour_us >= start_us, log_entries.c.hour_us < end_us)
        with self._platform.database.read() as connection:
            rows = connection.execute(query.order_by(log_entries.c.log_index)).all()
        return [Numbered(row.log_index, parse(bytes(row.entry))) for row in rows]

    def _log_book(self, book: PriceBook) -> None:
        """The book's bytes as an entry of their own, once a version."""
        platform = self._platform
        digest = platform.cas.put(book.data)
        draft = AuditEntry(
            "charges",
            f"{BOOK}{book.version}",
            FIRST_PREVIOUS,
            subject_digest=digest,
            subject_size=len(book.data),
            batch_seq=book.version,
        )
        index = platform.log.append(draft, lambda *_: None)
        query = sa.select(log_entries.c.entry).filter_by(log_index=index)
        with platform.database.read() as connection:
            standing = parse(bytes(connection.execute(query).scalar_one()))
        if standing.subject_digest != digest:
            what = f"the log knows another price book of version {book.version}"
            raise UsageError(what, "raise `version` with each change")

    def _log(self, record: _Record, name: str, at_us: int, month: Month) -> Logged[_Record] | None:
        """None where the month has another record since it was read: nothing was logged.

        A crash before the entry's commit: an object that nothing names. After it: the repeat finds the record, and
        logs nothing.
        """
        data = record.to_bytes()
        digest, seen = self._platform.cas.put(data), len(month.days) + len(month.invoices)
        start_us, end_us = month_bounds(month_of(at_us))
        of_month = sa.select(sa.func.count()).where(
            log_entries.c.type.in_(TYPES), log_entries.c.hour_us >= start_us, log_entries.c.hour_us < end_us
        )
        marked = False

        def mark(connection: sa.Connection, _index: int) -> None:
            nonlocal marked
            if connection.execute(of_month).scalar_one() != seen + 1:  # this one is among them
                raise _Moved
            marked = True

        draft = AuditEntry(
            TYPES[record.revision > 1],
            name_of(name, record.revision),
            FIRST_PREVIOUS,
            recorded_hour=at_us,
            batch_seq=record.revision,
            subject_digest=digest,
            subject_size=len(data),
            records=record.events if isinstance(record, DayCharges) else 0,
            gpu_time_ns=record.gpu_time_ns if isinstance(record, DayCharges) else 0,
        )
        try:
            index = self._platform.log.append(draft, mark)
        except _Moved:
            return None
        self._platform.log.publish()
        return Logged(record, digest, index, changed=True) if marked else None


def _same(last: DayCharges, record: DayCharges) -> bool:
    return (last.lines, last.events, last.batches) == (record.lines, record.events, record.batches)
