"""The outbox: usage events, durable in SQL with the end of their job, waiting to be sealed.

A *lane* is a stream of events with a clock of its own: `live`, and one for each trace run. Within a lane `recorded_at`
is given inside the writing transaction and never goes back: its *frontier* is the last one given, and no later row is
recorded before it. SQLite's writers come one after another, so commits are in the order of `recorded_at`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from render_platform.batches import decode
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, Ids, hour_of
from render_platform.database import (
    UNPUBLISHED,
    Database,
    Prepared,
    batches,
    customers,
    idempotency_keys,
    job_outputs,
    jobs,
    lanes,
    metadata,
    usage_events,
    webhooks,
)
from render_platform.errors import Finding, Missing, RecordError, UsageError
from render_platform.events import COLUMNS, Totals, UsageEvent, event_ids, storage_row, table_from_rows

_VERIFY = "run `render-platform verify`"
KEYS_REMEMBERED_S = 5
"""For how long a gateway may still take a key that was deleted."""
LIVE = "live"
"""The lane of what happens now; its clock is the machine's."""
CUSTOMER_CONTEXT = b"render-platform/customer/v1\n"
_INSERT = Prepared(usage_events.insert(), *COLUMNS, "lane")
_LANE = Prepared(sa.select(lanes.c.state, lanes.c.frontier_us).where(lanes.c.lane == sa.bindparam("of")))
_ADVANCE = Prepared(lanes.update().where(lanes.c.lane == sa.bindparam("of")).values(frontier_us=sa.bindparam("to")))
_REF = Prepared(
    sa.select(customers.c.customer_ref).where(
        customers.c.issuer == sa.bindparam("issuer"), customers.c.customer_id == sa.bindparam("id")
    )
)
EVENT_COLUMNS = [usage_events.c[name] for name in COLUMNS]
PRUNED_AT_ONCE, PRUNING_PAUSE_S = 250, 0.1
"""A pause as long as SQLite lets a writer sleep at most before it looks again: so that others come in between."""
pruned_events = sa.Table(  # never pruned: of which batch an event is whose row is no longer here
    "pruned_events",
    metadata,
    sa.Column("event_id", sa.LargeBinary, primary_key=True),
    sa.Column("job_id", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("customer_ref", sa.Text, nullable=False),
    sa.Column("ordinal", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)
PLACES = (
    (usage_events, usage_events.c.batch_id == batches.c.batch_id),
    (pruned_events, pruned_events.c.ordinal == batches.c.ordinal),
)
"""Where an event is known, and which batch it is of."""
_LATER = jobs.alias()
_NEEDED = sa.exists().where(
    jobs.c.job_id == usage_events.c.job_id,
    sa.or_(
        jobs.c.state.in_(("queued", "running")),
        sa.exists().where(job_outputs.c.job_id == jobs.c.job_id),
        sa.exists().where(webhooks.c.job_id == jobs.c.job_id, webhooks.c.next_us.is_not(None)),
        ~sa.exists().where(
            *(_LATER.c[name] == jobs.c[name] for name in ("gateway_id", "epoch")), _LATER.c.seq > jobs.c.seq
        ),
    ),
)
"""Of an event's job: something still asks for its row."""


class Backlog(NamedTuple):
    """What waits to reach a published checkpoint: unsealed rows, batches on their way, age of the oldest row."""

    rows: int
    batches: int
    oldest_recorded_at: int | None


class Opening(NamedTuple):
    """What a `customer_ref` is the hash of."""

    customer_id: str
    salt: bytes


def customer_ref(salt: bytes, customer_id: str) -> str:
    """The reference that stands for a customer everywhere outside SQL; meaningless once the salt is erased."""
    return hashlib.sha256(CUSTOMER_CONTEXT + salt + customer_id.encode()).hexdigest()


class Outbox:
    def __init__(self, database: Database, ids: Ids, sleep: Callable[[float], None] = time.sleep) -> None:
        self._database = database
        self._ids = ids
        self._sleep = sleep

    def customer_ref(self, connection: sa.Connection, issuer: str, customer_id: str) -> str:
        """The customer's reference, with a salt made on first sight; inside the caller's transaction."""
        known = _REF.first(connection, issuer=issuer, id=customer_id)
        if known is not None:
            return str(known[0])
        salt = self._ids.random(32)
        ref = customer_ref(salt, customer_id)
        connection.execute(
            customers.insert().values(customer_ref=ref, issuer=issuer, customer_id=customer_id, salt=salt)
        )
        return ref

    def record(self, connection: sa.Connection, lane: str, events: Sequence[UsageEvent]) -> list[UsageEvent]:
        """Insert `events` into a lane, inside the caller's transaction; gives them as recorded.

        Each event's `recorded_at` is the clock's reading, taken inside this transaction; it is raised to the lane's
        frontier where it lies before it. An event or job id that stands already is a RecordError, and nothing is kept.
        A crash before the caller's commit: no event and no end of a job. After it: both.
        """
        if not events:
            return []
        frontier = self._frontier_of(connection, lane, min(event.recorded_at for event in events))
        stamped = []
        for event in events:
            frontier = max(frontier, event.recorded_at)
            stamped.append(event if event.recorded_at == frontier else replace(event, recorded_at=frontier))
        try:
            _INSERT.run(connection, [{**storage_row(event), "lane": lane} for event in stamped])
        except sa.exc.IntegrityError as error:
            raise RecordError("event_id or job_id", "stands in the outbox already") from error
        _ADVANCE.run(connection, [{"of": lane, "to": frontier}])
        return stamped

    def open_lane(self, connection: sa.Connection, lane: str, start_us: int, end_us: int | None = None) -> int:
        """Begin a lane with the hour of `start_us`; `end_us`, where it is known, is the end of its last hour."""
        connection.execute(
            lanes.insert().values(
                lane=lane,
                state="open",
                start_us=hour_of(start_us),
                end_us=end_us,
                frontier_us=start_us,
                next_watermark_us=hour_of(start_us),
            )
        )
        return start_us

    def _frontier_of(self, connection: sa.Connection, lane: str, start_us: int) -> int:
        row = _LANE.first(connection, of=lane)
        if row is None:
            return self.open_lane(connection, lane, start_us)
        state, frontier_us = row
        if state != "open":
            raise UsageError(f"the lane {lane} is finished", "record into a lane that is open")
        return int(frontier_us)

    def frontier(self, connection: sa.Connection, lane: str) -> int:
        """The last `recorded_at` given in the lane."""
        return int(connection.execute(sa.select(lanes.c.frontier_us).filter_by(lane=lane)).scalar_one())

    def finish_lane(self, connection: sa.Connection, lane: str, until_us: int) -> None:
        """No event will be recorded into `lane` again; its clock has come to `until_us`."""
        later = sa.case((lanes.c.frontier_us < until_us, until_us), else_=lanes.c.frontier_us)
        connection.execute(lanes.update().where(lanes.c.lane == lane).values(state="finished", frontier_us=later))

    def hour_is_due(self, now_us: int) -> bool:
        """Whether an hour of the live lane is over and not declared yet: an idle platform's hours close too."""
        query = sa.select(lanes.c.next_watermark_us).where(lanes.c.lane == LIVE, lanes.c.state == "open")
        with self._database.read() as connection:
            watermark = connection.execute(query).scalar()
        return watermark is not None and int(watermark) + HOUR_US <= now_us

    def backlog(self) -> Backlog:
        with self._database.read() as connection:
            rows, oldest = connection.execute(
                sa.select(sa.func.count(), sa.func.min(usage_events.c.recorded_at)).where(
                    usage_events.c.batch_id.is_(None)
                )
            ).one()
            waiting = connection.execute(
                sa.select(sa.func.count(), sa.func.min(batches.c.first_recorded_at)).where(
                    batches.c.state.in_(UNPUBLISHED)
                )
            ).one()
        ages = [age for age in (oldest, waiting[1]) if age is not None]
        return Backlog(rows, waiting[0], min(ages, default=None))

    def totals(self, source: str | None = None) -> Totals:
        """Events and exact GPU ns: of all that was recorded, or of the rows of one source that are kept.

        Summed in halves: the whole may pass 63 bits.
        """
        event, batch = usage_events.c, batches.c
        kept = sa.func.count(), event.gpu_time_ns
        with self._database.read() as connection:
            if source is not None:
                return _summed(connection, *kept, event.source == source)
            filling = sa.select(batch.batch_id).filter_by(state="filling")
            loose = [_summed(connection, *kept, of) for of in (event.batch_id.is_(None), event.batch_id.in_(filling))]
            ns = sa.cast(batch.gpu_time_ns, sa.BigInteger)
            held = _summed(
                connection, sa.func.sum(batch.records), ns, batch.type == "usage_batch", batch.state != "filling"
            )
        return Totals(*map(sum, zip(held, *loose, strict=True)))

    def progress(self) -> dict[str, int]:
        """How many events are sealed into batches, and how many are under a published checkpoint."""
        usage = sa.select(batches.c.state, sa.func.sum(batches.c.records)).where(batches.c.type == "usage_batch")
        with self._database.read() as connection:
            found: dict[str, int] = {row[0]: int(row[1]) for row in connection.execute(usage.group_by(batches.c.state))}
        sealed = sum(records for state, records in found.items() if state not in ("filling", "closed"))
        return {"sealed": sealed, "published": found.get("published", 0)}

    def live_totals(self, start_us: int, end_us: int) -> dict[tuple[str, str, str], Totals]:
        """The live lane's events recorded in [start_us, end_us), by gateway, model and status.

        Rows that wait are found by their time; sealed ones, whose number only grows, through the batches of that time.
        """
        event, batch = usage_events.c, batches.c
        of = event.gateway_id, event.model_name, event.status
        of_then = sa.select(batch.batch_id).where(
            batch.lane == LIVE,
            batch.hour_us.between(hour_of(start_us), end_us),
            batch.first_recorded_at.is_(None) | (batch.first_recorded_at < end_us),  # null until it is closed
            batch.last_recorded_at.is_(None) | (batch.last_recorded_at >= start_us),
        )
        totals: dict[tuple[str, str, str], Totals] = {}
        with self._database.read() as connection:
            for place in (event.batch_id.is_(None), event.batch_id.in_(of_then)):
                query = sa.select(
                    *of,
                    sa.func.count(),
                    sa.func.sum(event.gpu_time_ns // 2**32),
                    sa.func.sum(event.gpu_time_ns % 2**32),
                ).where(event.lane == LIVE, event.recorded_at >= start_us, event.recorded_at < end_us, place)
                for gateway, model, status, count, high, low in connection.execute(query.group_by(*of)):
                    known = totals.get((gateway, model, status), Totals(0, 0))
                    ns = known.gpu_time_ns + (int(high) << 32) + int(low)
                    totals[gateway, model, status] = Totals(known.events + count, ns)
        return totals

    def prune(self, cas: Cas, lane: str, before_us: int) -> int:
        """Delete published rows of a lane from before a time, with their jobs; gives how many.

        The evidence has them, and `pruned_events` says where. A batch's rows go once its object reads back with these
        very rows; where it does not, Finding or Missing once the others are gone. Of each epoch the last job stays:
        numbers count on from it. So does a job with an output or a webhook to deliver. A crash: the next call goes on.
        """
        batch, pruned, wrong = batches.c, 0, list[Finding | Missing]()
        own = sa.select(sa.literal(1)).where(usage_events.c.batch_id == batch.batch_id, ~_NEEDED)
        old = (batch.state == "published", batch.lane == lane, batch.last_recorded_at < before_us, own.exists())
        with self._database.read() as connection:
            found = connection.execute(sa.select(batches).where(*old).order_by(batch.ordinal)).all()
        for one in found:
            try:
                self._require_stored(cas, one)
            except (Finding, Missing) as error:
                wrong.append(error)
                continue
            while count := self._prune_some(one):
                pruned += count
                self._sleep(PRUNING_PAUSE_S)
        if wrong:
            raise wrong[0]
        return pruned

    def _require_stored(self, cas: Cas, batch: Any) -> None:
        with self._database.read() as connection:
            rows = rows_of_batch(connection, batch.batch_id)
        stored = decode(cas.get(batch.blob_digest))
        if not stored.filter(pc.is_in(event_ids(stored), value_set=event_ids(rows))).equals(rows):
            raise Finding(f"{batch.batch_id}: its object does not hold the rows that SQL has", _VERIFY)

    def _prune_some(self, batch: Any) -> int:
        """One transaction, that others do not wait for long."""
        event = usage_events.c
        query = sa.select(event.event_id, event.job_id, event.customer_ref, sa.literal(batch.ordinal).label("ordinal"))
        query = query.where(event.batch_id == batch.batch_id, ~_NEEDED).limit(PRUNED_AT_ONCE)
        with self._database.write() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
            if rows:
                connection.execute(pruned_events.insert(), rows)
                for table in (webhooks, jobs, usage_events):
                    connection.execute(table.delete().where(table.c.job_id.in_([row["job_id"] for row in rows])))
        return len(rows)

    def names(self) -> dict[str, str]:
        """`customer_ref` → `issuer/customer_id`, for people who may see it."""
        with self._database.read() as connection:
            return {r.customer_ref: f"{r.issuer}/{r.customer_id}" for r in connection.execute(sa.select(customers))}


def _summed(connection: sa.Connection, count: Any, ns: Any, *where: Any) -> Totals:
    found, highs, lows = connection.execute(
        sa.select(count, sa.func.sum(ns // 2**32), sa.func.sum(ns % 2**32)).where(*where)
    ).one()
    return Totals(int(found or 0), (int(highs or 0) << 32) + int(lows or 0))


def located(connection: sa.Connection, ids: Iterable[bytes], job_ids: Iterable[bytes] = ()) -> list[Any]:
    """(event_id, customer_ref, log_index) of events by their ids or their jobs', whether or not their rows are kept."""
    found: list[Any] = []
    for table, same in PLACES:
        query = sa.select(table.c.event_id, table.c.customer_ref, batches.c.log_index).select_from(table)
        wanted = table.c.event_id.in_(ids) | table.c.job_id.in_(job_ids)
        found += connection.execute(query.outerjoin(batches, same).where(wanted)).all()
    return found


def rows_of_batch(connection: sa.Connection, batch_id: str) -> pa.Table:
    """The rows of a batch as a table of EVENT_SCHEMA, sorted by `event_id`: the order of leaves and of Parquet."""
    found: Sequence[Any] = connection.execute(
        sa.select(*EVENT_COLUMNS).where(usage_events.c.batch_id == batch_id).order_by(usage_events.c.event_id)
    ).all()
    return table_from_rows(found)


# Who stands behind a reference, and the erasure of it. The order of an erasure is in `receipts.Erasure`.


def opening_of(connection: sa.Connection, ref: str) -> Opening | None:
    """What `ref` is the hash of; None where the customer was erased."""
    row = connection.execute(sa.select(customers).filter_by(customer_ref=ref)).one_or_none()
    return None if row is None else Opening(str(row.customer_id), bytes(row.salt))


def ref_to_erase(connection: sa.Connection, issuer: str, customer_id: str) -> str | None:
    """The customer's reference; None where there is none. UsageError while a job of the customer has not ended."""
    query = sa.select(customers.c.customer_ref).filter_by(issuer=issuer, customer_id=customer_id)
    ref = connection.execute(query).scalar()
    running = sa.select(jobs.c.job_id).where(jobs.c.customer_ref == ref, jobs.c.state.in_(("queued", "running")))
    if ref is not None and connection.execute(running.limit(1)).scalar() is not None:
        raise UsageError("a job of this customer has not ended", "cancel it, or let it end, and erase then")
    return None if ref is None else str(ref)


def withdraw_keys(connection: sa.Connection, issuer: str, customer_id: str) -> int:
    """Delete every row but the mapping itself that has this issuer and id: API keys, settings. Gives how many."""
    named = {"issuer": issuer, "customer_id": customer_id}
    tables = _tables_with(connection, *named)
    return sum(connection.execute(table.delete().filter_by(**named)).rowcount for table in tables)


def forget_customer(connection: sa.Connection, issuer: str, customer_id: str, ref: str | None) -> None:
    """Delete all that names the customer, inside the caller's transaction; harmless to repeat.

    That is: salt and mapping of `ref`; every row elsewhere that has this issuer and id (API keys, settings); the id in
    the lists of meters' keys; and what the customer chose or got (idempotency keys, webhooks, outputs). `wipe` then
    takes it out of SQLite's files.
    """
    withdraw_keys(connection, issuer, customer_id)
    _leave_meters(connection, issuer, customer_id)
    if ref is None:
        return
    mine = sa.select(jobs.c.job_id).filter_by(customer_ref=ref)
    for of_jobs in (job_outputs, webhooks):
        connection.execute(of_jobs.delete().where(of_jobs.c.job_id.in_(mine)))
    connection.execute(
        jobs.update().where(jobs.c.customer_ref == ref, jobs.c.webhook.is_not(None)).values(webhook=None)
    )
    connection.execute(idempotency_keys.delete().filter_by(customer_ref=ref))
    connection.execute(customers.delete().filter_by(customer_ref=ref))


def _tables_with(connection: sa.Connection, *columns: str) -> list[sa.TableClause]:
    """Every table of the database that has these columns, but the customers' own; whichever module declares it."""
    inspector = sa.inspect(connection)
    names = [name for name in inspector.get_table_names() if name != customers.name]
    return [
        sa.table(name, *map(sa.column, columns))
        for name in names
        if {column["name"] for column in inspector.get_columns(name)}.issuperset(columns)
    ]


def _leave_meters(connection: sa.Connection, issuer: str, customer_id: str) -> None:
    """Take the id out of the customers that the issuer's keys of meters may report about."""
    for table in _tables_with(connection, "key_id", "issuer", "customers"):
        query = sa.select(table.c.key_id, table.c.customers).where(
            table.c.issuer == issuer, table.c.customers.contains(customer_id, autoescape=True)
        )
        for key_id, text in connection.execute(query).all():
            left = ",".join(one for one in text.split(",") if one != customer_id) or None
            connection.execute(table.update().filter_by(key_id=key_id).values(customers=left))
