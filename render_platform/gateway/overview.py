"""What the page at `/` shows, as it is read from SQL: counts of now, and one job's way through every stage.

What could not be read, or is not recorded, is None: unknown is never 0. Reads go by an index; what only grows is added
up from read to read. An id or a salt of a customer is in none of them. Times are microseconds UTC.
"""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec
import sqlalchemy as sa

from render_platform.canonical import digest_of
from render_platform.clock import iso
from render_platform.config import Settings
from render_platform.database import (
    UNPUBLISHED,
    Database,
    batches,
    checkpoints,
    jobs,
    log_entries,
    usage_events,
)
from render_platform.errors import PlatformError
from render_platform.gateway.views import QueueView
from render_platform.hours import reports
from render_platform.keyring import open_signers

MAX_OUTBOX = 100_000
"""So many unsealed events are counted; more are not told apart."""
SHOWN_OF_REF = 8
"""Digits of a customer's reference that are shown: enough to tell two jobs apart, too few to look one up."""
_SEALED = ("sealed", "stored", "logged", "published")
"""States of a batch whose rows and root are fixed."""


class JobCounts(msgspec.Struct):
    """Of all time. `ended` counts by status what has ended since this gateway started."""

    accepted: int
    queued: int
    running: int
    finished: int
    ended: dict[str, int]


class EventCounts(msgspec.Struct):
    """Usage events of all lanes. `outbox` is at least so many where `outbox_capped`; `log_size` counts entries."""

    outbox: int
    outbox_capped: bool
    sealed: int
    published: int
    log_size: int


class FastPathCounts(msgspec.Struct):
    """Since this gateway started. `rows_this_hour` is what ClickHouse says; null where it did not answer in time."""

    written: int
    dropped: int
    waiting: int
    last_error: str
    rows_this_hour: int | None


class Verdict(msgspec.Struct):
    """The last report of an hour; `out_of_date` where a batch came after it."""

    hour: str
    status: str
    revision: int
    digest: str
    out_of_date: bool


class Verdicts(msgspec.Struct):
    """The newest hour that has a report, and how many hours have which status."""

    last: Verdict | None
    hours: dict[str, int]


class BackendView(msgspec.Struct):
    """A backend. `breaker` closed: it is trusted; open: it failed, and is left alone; half_open: it is being tried."""

    name: str
    breaker: str
    running: int
    slots: int


class OverviewView(msgspec.Struct):
    """What goes on now. For a customer only what is its own: the rest is null."""

    at_us: int
    since_us: int
    gateway: str
    epoch: int
    sees_all: bool
    last_job: str | None
    jobs: JobCounts | None = None
    events: EventCounts | None = None
    fast_path: FastPathCounts | None = None
    verdicts: Verdicts | None = None
    queue: list[QueueView] | None = None
    backends: list[BackendView] | None = None
    dagster: str | None = None


class StageView(msgspec.Struct):
    """A stage. `unknown`: what knows it did not answer in time. `skipped`: the job ended without it.

    `at_us` is null where no time is recorded. `sealed` has the time before which all is in a batch: it was then.
    """

    name: str
    state: Literal["done", "waiting", "unknown", "skipped"] = "waiting"
    at_us: int | None = None
    id: str | None = None
    digest: str | None = None
    detail: str | None = None


class JobPath(msgspec.Struct):
    """A job and its stages, in their order. `receipt` is where its receipt is, once there is one.

    `log_keys` are the log's public keys as this gateway knows them: a customer's own copy is worth more.
    """

    job_id: str
    model: str
    status: str
    customer: str
    gpu_seconds: str | None
    stages: list[StageView]
    receipt: str | None
    log_keys: list[str]


class Figures(NamedTuple):
    """What SQL says, in one snapshot; `jobs` without what the gateway itself has counted."""

    jobs: JobCounts
    events: EventCounts
    verdicts: Verdicts


class Live(NamedTuple):
    """What memory says of a job that has not ended."""

    position: int | None = None
    started_us: int | None = None


class Times(NamedTuple):
    """When objects were written, by their store's clock."""

    stored_us: int | None = None
    logged_us: int | None = None
    published_us: int | None = None


class Found(NamedTuple):
    """A job, its event, batch and entry in one row; and the first checkpoint that covers the entry."""

    row: Any
    checkpoint: Any
    log_keys: list[str]


class Reader:
    """Reads for one gateway's epoch. For one thread at a time."""

    def __init__(self, database: Database, settings: Settings, gateway_id: str, epoch: int) -> None:
        self._database, self._settings = database, settings
        self._gateway_id, self._epoch = gateway_id, epoch
        self._accepted_before: int | None = None
        self._below, self._published = 0, 0
        """Of the batches with a lower ordinal all are published, and hold so many events."""

    def figures(self) -> Figures:
        with self._database.read() as connection:
            return Figures(self._jobs(connection), self._events(connection), _verdicts(connection))

    def _jobs(self, connection: sa.Connection) -> JobCounts:
        """The states stand in the statement as text, so that the index of unfinished jobs serves."""
        unfinished = sa.or_(*(jobs.c.state == sa.literal_column(f"'{state}'") for state in ("queued", "running")))
        counted = sa.select(jobs.c.state, sa.func.count()).where(unfinished).group_by(jobs.c.state)
        found: dict[str, int] = {row[0]: row[1] for row in connection.execute(counted)}
        accepted, queued, running = self._accepted(connection), found.get("queued", 0), found.get("running", 0)
        return JobCounts(accepted, queued, running, accepted - queued - running, {})

    def _accepted(self, connection: sa.Connection) -> int:
        """Jobs are numbered from 1 in each epoch, without a gap; epochs that are over accept nothing more."""

        def last_of(epoch: int) -> int:
            of = sa.select(sa.func.max(jobs.c.seq)).filter_by(gateway_id=self._gateway_id, epoch=epoch)
            return connection.execute(of).scalar() or 0

        if self._accepted_before is None:
            self._accepted_before = sum(last_of(epoch) for epoch in range(1, self._epoch))
        return self._accepted_before + last_of(self._epoch)

    def _events(self, connection: sa.Connection) -> EventCounts:
        unsealed = sa.select(sa.literal(1)).where(usage_events.c.batch_id.is_(None)).limit(MAX_OUTBOX + 1)
        outbox = connection.execute(sa.select(sa.func.count()).select_from(unsealed.subquery())).scalar_one()
        by_state = self._sealed(connection)
        log_size = connection.execute(sa.select(sa.func.max(checkpoints.c.size))).scalar() or 0
        return EventCounts(
            outbox=min(outbox, MAX_OUTBOX),
            outbox_capped=outbox > MAX_OUTBOX,
            sealed=sum(by_state[state] for state in _SEALED),
            published=by_state["published"],
            log_size=log_size,
        )

    def _sealed(self, connection: sa.Connection) -> Counter[str]:
        """Events in batches by the batch's state. What is published stays so: of it only what is new is added."""
        usage, ordinal = batches.c.type == "usage_batch", batches.c.ordinal
        records = sa.func.coalesce(sa.func.sum(batches.c.records), 0)
        waiting = sa.select(sa.func.min(ordinal)).where(batches.c.state.in_(UNPUBLISHED))
        below = connection.execute(waiting).scalar()
        if below is None:
            below = (connection.execute(sa.select(sa.func.max(ordinal))).scalar() or 0) + 1
        new = sa.select(records).where(usage, ordinal >= self._below, ordinal < below)
        self._published += int(connection.execute(new).scalar_one())
        self._below = max(self._below, below)
        found = Counter({"published": self._published})
        # Added up here: grouped in SQL, the index of states would be read from end to end.
        for state, count in connection.execute(
            sa.select(batches.c.state, batches.c.records).where(usage, ordinal >= self._below)
        ):
            found[state] += count
        return found

    def last_job(self, customer_ref: str | None = None) -> str | None:
        """The job that was accepted last, to the millisecond: of a customer, or of all."""
        query = sa.select(jobs.c.job_id).order_by(jobs.c.job_id.desc()).limit(1)
        if customer_ref is not None:
            query = query.where(jobs.c.customer_ref == customer_ref)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        return None if found is None else str(uuid.UUID(bytes=found))

    def find(self, job_id: uuid.UUID) -> Found | None:
        with self._database.read() as connection:
            row = connection.execute(_PATH.where(jobs.c.job_id == job_id.bytes)).one_or_none()
            if row is None:
                return None
            checkpoint = None
            if row.batch_state == "published":
                covering = sa.select(checkpoints.c.size, checkpoints.c.root).where(checkpoints.c.size > row.log_index)
                checkpoint = connection.execute(covering.order_by(checkpoints.c.size).limit(1)).one_or_none()
        return Found(row, checkpoint, self._log_keys() if checkpoint is not None else [])

    def _log_keys(self) -> list[str]:
        """Of the folder's own key. One that is kept elsewhere is none of the gateway's business."""
        path = self._settings.keys_dir / "checkpoint.key"
        with suppress(PlatformError):
            if not self._settings.checkpoint_signer:
                return [signer.verifier.vkey for signer in open_signers("", path)]
        return []


def _verdicts(connection: sa.Connection) -> Verdicts:
    """A row an hour: some thousands a year."""
    counted = sa.select(reports.c.status, sa.func.count()).group_by(reports.c.status)
    hours: dict[str, int] = {row[0]: row[1] for row in connection.execute(counted)}
    row = connection.execute(sa.select(reports).order_by(reports.c.hour_us.desc()).limit(1)).one_or_none()
    last = None
    if row is not None:
        last = Verdict(iso(row.hour_us), row.status, row.revision, row.digest, bool(row.dirty))
    return Verdicts(last, hours)


_PATH = sa.select(
    *(jobs.c[name] for name in ("job_id", "gateway_id", "epoch", "seq", "customer_ref", "model_name", "state")),
    *(jobs.c[name] for name in ("attempt", "accepted_us", "finished_us", "error_code")),
    *(usage_events.c[name] for name in ("event_id", "recorded_at", "gpu_time_ns", "device_uuid", "meter")),
    usage_events.c.queue_time_us,
    *(batches.c[name] for name in ("batch_id", "records", "merkle_root", "complete_until", "blob_digest")),
    *(batches.c.state.label("batch_state"), batches.c.blob_size, batches.c.log_index),
    log_entries.c.entry,
).select_from(
    jobs.outerjoin(usage_events, usage_events.c.job_id == jobs.c.job_id)
    .outerjoin(batches, batches.c.batch_id == usage_events.c.batch_id)
    .outerjoin(log_entries, log_entries.c.log_index == batches.c.log_index)
)


# A job's stages.


def path_of(found: Found, live: Live, in_clickhouse: bool | None, times: Times) -> JobPath:
    """`in_clickhouse` is None where it did not answer."""
    row, job_id = found.row, str(uuid.UUID(bytes=found.row.job_id))
    return JobPath(
        job_id=job_id,
        model=row.model_name,
        status=row.state,
        customer=f"{row.customer_ref[:SHOWN_OF_REF]}…",
        gpu_seconds=_seconds(row),
        stages=[
            _accepted(row),
            _queued(row, live),
            _running(row, live),
            _finished(row),
            _fast_path(row, in_clickhouse),
            _sealed(row),
            _stored(row, times),
            _logged(row, times),
            _published(found, times),
        ],
        receipt=None if found.checkpoint is None else f"/jobs/{job_id}/receipt",
        log_keys=found.log_keys,
    )


def _seconds(row: Any) -> str | None:
    """Exact: nine digits."""
    if row.event_id is None:
        return None
    return f"{row.gpu_time_ns // 1_000_000_000}.{row.gpu_time_ns % 1_000_000_000:09d}"


def _accepted(row: Any) -> StageView:
    detail = f"number {row.seq:,} of epoch {row.epoch} of {row.gateway_id}"
    return StageView("accepted", "done", row.accepted_us, detail=detail)


def _queued(row: Any, live: Live) -> StageView:
    detail = None if live.position is None else f"{live.position:,} before it"
    if row.event_id is not None:
        detail = f"waited {row.queue_time_us // 1_000:,} ms"
    return StageView("queued", "done", row.accepted_us, detail=detail)


def _running(row: Any, live: Live) -> StageView:
    if row.event_id is not None and not row.attempt:
        return StageView("running", "skipped", detail="it never ran")
    if not row.attempt:
        return StageView("running")
    started_us = live.started_us if row.event_id is None else row.accepted_us + row.queue_time_us
    return StageView("running", "done", started_us, row.device_uuid, detail=f"attempt {row.attempt}")


def _finished(row: Any) -> StageView:
    if row.event_id is None:
        return StageView("finished")
    error = f" ({row.error_code})" if row.error_code else ""
    detail = f"{row.state}{error}, {_seconds(row)} GPU seconds by {row.meter}"
    return StageView("finished", "done", row.finished_us, str(uuid.UUID(bytes=row.event_id)), detail=detail)


def _fast_path(row: Any, in_clickhouse: bool | None) -> StageView:
    if row.event_id is None:
        return StageView("fast_path")
    if in_clickhouse:
        return StageView("fast_path", "done", detail="the row has the event's id")
    if in_clickhouse is None:
        return StageView("fast_path", "unknown", detail="ClickHouse did not answer in time, or none is served")
    return StageView("fast_path", detail="not there: after its deadline, reconciliation lists it and repair inserts it")


def _sealed(row: Any) -> StageView:
    if row.batch_state not in _SEALED:
        return StageView("sealed")
    detail = f"with {row.records - 1:,} others; the digest is the Merkle root of all"
    return StageView("sealed", "done", row.complete_until, row.batch_id, row.merkle_root, detail)


def _stored(row: Any, times: Times) -> StageView:
    if row.blob_digest is None:
        return StageView("stored")
    detail = f"{row.blob_size:,} bytes of Parquet"
    return StageView("stored", "done", times.stored_us, digest=row.blob_digest, detail=detail)


def _logged(row: Any, times: Times) -> StageView:
    if row.entry is None:
        return StageView("logged")
    return StageView("logged", "done", times.logged_us, f"entry {row.log_index}", digest_of(bytes(row.entry)))


def _published(found: Found, times: Times) -> StageView:
    if found.checkpoint is None:
        return StageView("published")
    size, root = found.checkpoint.size, bytes(found.checkpoint.root).hex()
    detail = "the first checkpoint that covers it; the digest is its root"
    return StageView("published", "done", times.published_us, f"size {size}", root, detail)
