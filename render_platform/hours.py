"""Hours: which windows are closed, which hours there are, and what was last reported of each.

A window is closed when no lane can still record into it, every row before its end is under a published checkpoint, and
the fast path's deadline has passed. An hour that no lane covers is never closed: unknown is not zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa

from render_platform.clock import HOUR_US, US_PER_SECOND, Clock, hour_of, iso
from render_platform.database import (
    UNPUBLISHED,
    Database,
    batches,
    checkpoints,
    lanes,
    log_entries,
    metadata,
    usage_events,
)
from render_platform.outbox import LIVE

reports = sa.Table(
    "reports",
    metadata,
    sa.Column("hour_us", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("dirty", sa.Boolean, nullable=False),  # a batch was logged into the hour after the report
)


class LastReport(NamedTuple):
    revision: int
    digest: str
    status: str
    dirty: bool


class _Look(NamedTuple):
    """What decides which windows are closed: every lane, and by hour the oldest time that is not published yet."""

    lanes: list[Any]
    waiting: dict[int, int]


class Hours:
    def __init__(self, database: Database, clock: Clock, fast_path_deadline_s: int) -> None:
        self._database = database
        self._clock = clock
        self._deadline_us = fast_path_deadline_s * US_PER_SECOND

    def closed_until(self, hour_us: int) -> int:
        """The time up to which the windows of this hour are closed; `hour_us` itself where none is."""
        return self._closed_until(hour_us, self._look(hour_us))

    def _look(self, hour_us: int | None = None) -> _Look:
        """For one hour, or for all of them at the cost of a few."""
        with self._database.read() as connection:
            return _Look(_lanes(connection), _oldest_waiting(connection, hour_us))

    def _closed_until(self, hour_us: int, look: _Look) -> int:
        covering = _covering(look.lanes, hour_us)
        if not covering:
            return hour_us
        limits = [self._lane_limit(lane) for lane in covering if lane.state == "open"]
        limits += [look.waiting[hour_us]] if hour_us in look.waiting else []
        return max(hour_us, min([hour_us + HOUR_US, *limits]))

    def _lane_limit(self, lane: Any) -> int:
        """A trace's lane has no clock but its frontier."""
        clock = self._clock.now_us() if lane.lane == LIVE else lane.frontier_us
        return min(int(lane.frontier_us), int(clock) - self._deadline_us)

    def known(self, start_us: int | None = None, end_us: int | None = None) -> list[int]:
        """The hours that hold events or were declared empty, sealed or not, in order."""
        sealed = sa.select(batches.c.hour_us)
        unsealed = sa.select(usage_events.c.recorded_at).where(usage_events.c.batch_id.is_(None))
        with self._database.read() as connection:
            found = {int(hour) for hour in connection.execute(sealed).scalars()}
            found |= {hour_of(int(at)) for at in connection.execute(unsealed).scalars()}
        low = hour_of(start_us) if start_us is not None else 0
        return sorted(hour for hour in found if hour >= low and (end_us is None or hour < end_us))

    def due(self) -> list[int]:
        """Known hours that are closed, and have no report or one that is out of date."""
        with self._database.read() as connection:
            current = set(connection.execute(sa.select(reports.c.hour_us).where(~reports.c.dirty)).scalars())
        look = self._look()
        return [h for h in self.known() if h not in current and self._closed_until(h, look) == h + HOUR_US]

    def unreconciled(self, since_us: int = 0) -> list[tuple[str, str]]:
        """Hours from `since_us` on of which all is not known to be well: name, and status or what their report lacks.

        Hours that are not closed yet and were never reported are left out: nothing is known of them, good or bad.
        """
        with self._database.read() as connection:
            found = {row.hour_us: row for row in connection.execute(sa.select(reports)).all()}
        look = self._look()
        bad = {h: found[h].status for h in found if found[h].status != "reconciled"}
        bad |= {h: "out of date" for h in found if found[h].dirty or self._closed_until(h, look) < h + HOUR_US}
        bad |= {h: "not reported" for h in self.due() if h not in found}
        return [(iso(hour), bad[hour]) for hour in sorted(bad) if hour >= since_us]

    def covered(self, at_us: int) -> bool:
        """Whether any lane records, or recorded, into the hour of `at_us`."""
        hour_us = hour_of(at_us)
        with self._database.read() as connection:
            return bool(_covering(_lanes(connection), hour_us))

    def last_report(self, hour_us: int) -> LastReport | None:
        with self._database.read() as connection:
            row = connection.execute(sa.select(reports).filter_by(hour_us=hour_us)).one_or_none()
        return None if row is None else LastReport(row.revision, row.digest, row.status, row.dirty)


def mark_dirty(connection: sa.Connection, hour_us: int) -> None:
    """In the transaction that logs a batch: what was reported of its hour is out of date."""
    connection.execute(reports.update().where(reports.c.hour_us == hour_us).values(dirty=True))


def mark_reported(
    connection: sa.Connection, hour_us: int, revision: int, digest: str, status: str, batches_read: int
) -> None:
    """In the transaction that logs a report: it is the hour's last; out of date if a batch was logged meanwhile."""
    connection.execute(reports.delete().where(reports.c.hour_us == hour_us))
    connection.execute(
        reports.insert().values(
            hour_us=hour_us,
            revision=revision,
            digest=digest,
            status=status,
            dirty=_logged_batches(connection, hour_us) != batches_read,
        )
    )


def mark_unchanged(connection: sa.Connection, hour_us: int, batches_read: int) -> None:
    """The hour was reconciled again and says what its last report says."""
    dirty = _logged_batches(connection, hour_us) != batches_read
    connection.execute(reports.update().where(reports.c.hour_us == hour_us).values(dirty=dirty))


def _logged_batches(connection: sa.Connection, hour_us: int) -> int:
    count = sa.select(sa.func.count()).where(log_entries.c.hour_us == hour_us, log_entries.c.type == "usage_batch")
    return int(connection.execute(count).scalar_one())


def entries_of_hour(connection: sa.Connection, hour_us: int, kind: str) -> list[bytes]:
    """The published entries of one hour, as they were logged, in the order of the log."""
    size = sa.select(sa.func.coalesce(sa.func.max(checkpoints.c.size), 0)).scalar_subquery()
    found = connection.execute(
        sa.select(log_entries.c.entry)
        .where(log_entries.c.hour_us == hour_us, log_entries.c.type == kind, log_entries.c.log_index < size)
        .order_by(log_entries.c.log_index)
    ).scalars()
    return [bytes(entry) for entry in found]


def _lanes(connection: sa.Connection) -> list[Any]:
    return list(connection.execute(sa.select(lanes)).all())


def _covering(found: list[Any], hour_us: int) -> list[Any]:
    """The lanes that record into the hour, or have come past its end."""
    return [
        lane
        for lane in found
        if lane.start_us <= hour_us
        and (lane.end_us is None or hour_us < lane.end_us)
        and (lane.state == "open" or lane.frontier_us >= hour_us + HOUR_US)
    ]


def _oldest_waiting(connection: sa.Connection, hour_us: int | None) -> dict[int, int]:
    """By hour, the oldest time that is not under a published checkpoint; of one hour, or of all."""
    at, hour = usage_events.c.recorded_at, usage_events.c.recorded_at - usage_events.c.recorded_at % HOUR_US
    unsealed = sa.select(hour, sa.func.min(at)).where(usage_events.c.batch_id.is_(None)).group_by(hour)
    on_its_way = sa.select(batches.c.hour_us, batches.c.first_recorded_at).where(
        batches.c.type == "usage_batch", batches.c.state.in_(UNPUBLISHED)
    )
    if hour_us is not None:
        unsealed = unsealed.where(at >= hour_us, at < hour_us + HOUR_US)
        on_its_way = on_its_way.where(batches.c.hour_us == hour_us)
    found: dict[int, int] = {}
    for query in (unsealed, on_its_way):
        for start_us, first_us in connection.execute(query):
            first_us = start_us if first_us is None else first_us
            found[int(start_us)] = min(int(first_us), found.get(int(start_us), int(first_us)))
    return found
