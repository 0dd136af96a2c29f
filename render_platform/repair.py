"""Repair of the fast path: what is planned, inserted and recorded. `reconciler.Reconciler` decides what and when.

Two ways. Rows that are missing are *inserted* from the authoritative batches: planned ──▶ logged, or abandoned. A day
in which anything else differs is *rebuilt* from them, raw rows and rollups: rebuilding ──▶ rebuilt.

A plan is in SQL before ClickHouse is touched, and its last state is one commit with its entry in the log. What crashed
is finished by running it again, under the same id; nothing is inserted twice. Of two repairs of an hour at once, the
later one sees what the other inserted, or shares its plan and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import DAY_US, HOUR_US, Clock, Ids, iso, uuid7
from render_platform.database import Database, metadata
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Unavailable
from render_platform.events import Totals, event_ids, total_gpu_time_ns, uuid_texts

CHUNK_ROWS = 10_000
repairs = sa.Table(
    "repairs",
    metadata,
    sa.Column("repair_id", sa.Text, primary_key=True),
    sa.Column("hour_us", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # planned > logged | abandoned; of a day: rebuilding > rebuilt
    sa.Column("event_ids", sa.LargeBinary, nullable=False),  # 16 bytes each, sorted
)
PLANNED, REBUILDING = "planned", "rebuilding"
"""States of a repair that is not finished: an insert's, and a rebuild's. They end as `logged` and as `rebuilt`."""


class FastRows(Protocol):
    def insert_events(self, table: pa.Table, token: str) -> None: ...


class FastDay(Protocol):
    def window_aggregates(self, start_us: int, end_us: int) -> pa.Table: ...

    def rebuild_day(
        self, day_us: int, tables: Iterable[pa.Table], expected: Totals, ready: Callable[[], None] = ...
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Events of one hour to insert, by their ids, sorted."""

    repair_id: str
    hour_us: int
    event_ids: tuple[bytes, ...]
    resumed: bool = field(default=False, compare=False)

    @property
    def event_texts(self) -> list[str]:
        return [str(UUID(bytes=event_id)) for event_id in self.event_ids]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A day that was made again: of which hours and batches, and what ClickHouse held of it before and after."""

    repair_id: str
    day_us: int
    hours: Mapping[int, str | None]
    """The day's covered hours, and the digest of each one's last report, where there was one."""
    batches: Sequence[str]
    """Digests of the batches whose rows the day has now, in the order of the log within each hour."""
    before: Totals
    after: Totals


class Repairs:
    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

    def plan(self, hour_us: int, event_ids: Sequence[str], *, rollup: bool = False) -> Plan | None:
        """What to insert. A plan that an earlier run left unfinished comes first.

        None where nothing is missing, unless the hour's rollup has to be rebuilt: such a plan may name no event.
        """
        with self._database.write() as connection:
            row = _unfinished(connection, hour_us, PLANNED)
            if row is not None:
                return Plan(row.repair_id, hour_us, tuple(_split(row.event_ids)), resumed=True)
            if not event_ids and not rollup:
                return None
            packed = b"".join(sorted(bytes.fromhex(event_id.replace("-", "")) for event_id in event_ids))
            # A crash before this commit: nothing was planned. After it: the next repair of the hour finishes this one.
            return Plan(self._begin(connection, hour_us, PLANNED, packed), hour_us, tuple(_split(packed)))

    def unfinished(self, start_us: int, state: str) -> str:
        """The id of a repair that was begun and not finished, PLANNED of an hour or REBUILDING of a day; or nothing."""
        with self._database.read() as connection:
            row = _unfinished(connection, start_us, state)
        return "" if row is None else str(row.repair_id)

    def _begin(self, connection: sa.Connection, start_us: int, state: str, packed: bytes) -> str:
        repair_id = str(uuid7(self._clock.now_us(), self._ids))
        connection.execute(
            repairs.insert().values(repair_id=repair_id, hour_us=start_us, state=state, event_ids=packed)
        )
        return repair_id

    def insert(self, plan: Plan, rows: pa.Table, fast: FastRows, missing: Collection[str]) -> pa.Table:
        """Insert those of the plan's rows that are still `missing`; gives the rows that this call inserted.

        Chunks are of the plan's rows sorted by id, the same on every attempt, each under its own token. A chunk that
        stands in part came otherwise: what is left of it has a token of its own.
        """
        wanted = pa.array([UUID(event_id).bytes for event_id in missing], pa.binary(16))
        inserted = [rows.slice(0, 0)]
        for number, start in enumerate(range(0, rows.num_rows, CHUNK_ROWS)):
            chunk = rows.slice(start, CHUNK_ROWS)
            left = chunk.filter(pc.is_in(event_ids(chunk), value_set=wanted))
            token = f"{plan.repair_id}:{number}"
            if left.num_rows:
                fast.insert_events(left, token if left.num_rows == chunk.num_rows else f"{token}:{left.num_rows}")
            inserted.append(left)
        return pa.concat_tables(inserted)

    def require_kept(self, plan: Plan, missing: Collection[str]) -> None:
        """Unavailable where rows of the plan are `missing` after they were inserted; the plan is abandoned then."""
        if refused := set(plan.event_texts).intersection(missing):
            self.abandon(plan)
            raise Unavailable(
                f"ClickHouse did not keep {len(refused)} of the rows of repair {plan.repair_id}",
                "run the repair again: it takes a new id, and with it new tokens",
            )

    def rebuild(
        self,
        day_us: int,
        hours: Mapping[int, str | None],
        entries: Sequence[AuditEntry],
        tables: Iterable[pa.Table],
        fast: FastDay,
        ready: Callable[[], None],
    ) -> Rebuild:
        """Replace a day's rows, raw and in rollups, by `tables`: the rows of the batches of `entries`.

        A rebuild that an earlier run left unfinished is gone on with, under its id. `hours` as in Rebuild; `ready` is
        called right before anything changes, and stops it by what it raises.
        """
        with self._database.write() as connection:
            row = _unfinished(connection, day_us, REBUILDING)
            repair_id = str(row.repair_id) if row else self._begin(connection, day_us, REBUILDING, b"")
            # A crash before this commit: nothing was planned. After it: the next repair of an hour of the day finishes
            # it, whatever of the day stands in ClickHouse by then.
        before = _totals(fast, hours)
        after = Totals(sum(entry.records for entry in entries), sum(entry.gpu_time_ns for entry in entries))
        # A crash in it: the day stands as before, or is made again in part or whole, and is not logged.
        fast.rebuild_day(day_us, tables, after, ready)
        return Rebuild(repair_id, day_us, hours, [str(entry.subject_digest) for entry in entries], before, after)

    def record(self, plan: Plan, rows: pa.Table, rollup: bool, put: Callable[[bytes], str]) -> AuditEntry:
        """An insert's record as a blob, and the draft of the entry that binds it."""
        totals = Totals(rows.num_rows, total_gpu_time_ns(rows))
        record = {
            "version": 1,
            "repair_id": plan.repair_id,
            "hour": plan.hour_us,
            "records": totals.events,
            "gpu_time_ns": totals.gpu_time_ns,
            "rollup_rebuilt": rollup,
            "event_ids": uuid_texts(rows, "event_id"),
        }
        return _draft(f"{iso(plan.hour_us)[:13]}/{plan.repair_id}", plan.hour_us, totals, record, put)

    def record_rebuild(self, done: Rebuild, put: Callable[[bytes], str]) -> AuditEntry:
        """A rebuild's record as a blob, and the draft of the entry that binds it, under the day's first hour."""
        record = {
            "version": 2,
            "repair_id": done.repair_id,
            "kind": "rebuild",
            "day": done.day_us,
            "records": done.after.events,
            "gpu_time_ns": done.after.gpu_time_ns,
            "before": {"records": done.before.events, "gpu_time_ns": done.before.gpu_time_ns},
            "hours": [{"hour": hour, "report": digest} for hour, digest in done.hours.items()],
            "batches": list(done.batches),
        }
        return _draft(f"{iso(done.day_us)[:10]}/{done.repair_id}", done.day_us, done.after, record, put)

    def abandon(self, plan: Plan) -> None:
        """The plan was made from an old look, or ClickHouse did not keep its rows: the next repair makes a new one."""
        with self._database.write() as connection:
            _set_state(connection, plan.repair_id, "abandoned")

    @staticmethod
    def mark_logged(connection: sa.Connection, plan: Plan) -> None:
        _set_state(connection, plan.repair_id, "logged")

    @staticmethod
    def mark_rebuilt(connection: sa.Connection, done: Rebuild) -> None:
        """The rebuild stands, and an insert that was left unfinished in that day has nothing left to insert."""
        _set_state(connection, done.repair_id, "rebuilt")
        _abandon_inserts(connection, done.day_us)


def require_closed(
    day_us: int, covered: Sequence[int], still_open: Sequence[int], held: Iterable[int], closes_us: int | None
) -> None:
    """Unavailable unless the batches of a day's `covered` hours are all that the day will ever have.

    `still_open` are those of them that are not closed; `held` the hours of which there are rows anywhere; `closes_us`
    the time from which on nobody records into the day any more, None where that is past.
    """
    name = f"{iso(day_us)[:10]} cannot be rebuilt"
    if not covered:
        raise Unavailable(f"{name}: no lane ever recorded into it", "see who wrote its rows")
    if foreign := sorted(set(held).difference(covered)):
        what = f"no lane covers {iso(foreign[0])[:13]}h, and there are rows of it"
        raise Unavailable(f"{name}: {what}", "see who wrote them, and remove them")
    if closes_us is not None:
        raise Unavailable(f"{name} before {iso(closes_us)}", "rows may come into it until then")
    if still_open:
        what = f"{iso(still_open[0])[:13]}h is not closed"
        raise Unavailable(f"{name}: {what}", "run `render-platform flush`, and let the traces that record into it end")


def put_logged(connection: sa.Connection, record: Mapping[str, Any]) -> list[int]:
    """Put a repair that the log holds into SQL, by its record of either version; gives the hours that it changed."""
    rebuild = record["version"] > 1
    hours = [one["hour"] for one in record["hours"]] if rebuild else [record["hour"]]
    values = {
        "repair_id": record["repair_id"],
        "hour_us": record["day"] if rebuild else record["hour"],
        "state": "rebuilt" if rebuild else "logged",
        "event_ids": b"" if rebuild else b"".join(UUID(event_id).bytes for event_id in record["event_ids"]),
    }
    connection.execute(repairs.delete().filter_by(repair_id=values["repair_id"]))
    connection.execute(repairs.insert().values(**values))
    if rebuild:
        _abandon_inserts(connection, record["day"])
    return hours


def _draft(
    batch_id: str, hour_us: int, totals: Totals, record: Mapping[str, Any], put: Callable[[bytes], str]
) -> AuditEntry:
    data = canonical.encode(dict(record))
    return AuditEntry(
        type="repair",
        batch_id=batch_id,
        previous=FIRST_PREVIOUS,
        recorded_hour=hour_us,
        subject_digest=put(data),
        subject_size=len(data),
        records=totals.events,
        gpu_time_ns=totals.gpu_time_ns,
    )


def _totals(fast: FastDay, hours: Iterable[int]) -> Totals:
    """What ClickHouse holds of some hours, the keys of one in memory at a time."""
    events = gpu_time_ns = 0
    for hour in hours:
        found = fast.window_aggregates(hour, hour + HOUR_US)
        events += int(pc.sum(found.column("events")).as_py() or 0)
        gpu_time_ns += int(pc.sum(found.column("gpu_time_ns")).as_py() or 0)
    return Totals(events, gpu_time_ns)


def _unfinished(connection: sa.Connection, start_us: int, state: str) -> Any:
    return connection.execute(sa.select(repairs).filter_by(hour_us=start_us, state=state).limit(1)).one_or_none()


def _abandon_inserts(connection: sa.Connection, day_us: int) -> None:
    of_day = repairs.c.hour_us.between(day_us, day_us + DAY_US - 1)
    connection.execute(repairs.update().where(of_day, repairs.c.state == PLANNED).values(state="abandoned"))


def _set_state(connection: sa.Connection, repair_id: str, state: str) -> None:
    connection.execute(repairs.update().where(repairs.c.repair_id == repair_id).values(state=state))


def _split(packed: bytes) -> Iterator[bytes]:
    yield from (packed[start : start + 16] for start in range(0, len(packed), 16))
