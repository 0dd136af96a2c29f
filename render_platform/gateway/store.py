"""The job store: accepting, starting and ending jobs in SQL, a group of operations a transaction.

    queued ──▶ running ──▶ success | error | timeout | cancelled
       └──────────────────▶ error | timeout | cancelled

A job's end and its usage event are one transaction, and the end is conditional: `attempt` must still be the job's, and
no end may stand. Whoever comes second (a late worker, a cancel at the same instant) changes nothing and learns so.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from render_platform.clock import Clock, Ids, uuid7
from render_platform.database import (
    Prepared,
    idempotency_keys,
    job_bodies,
    job_outputs,
    jobs,
    webhooks,
)
from render_platform.errors import PlatformError, UsageError
from render_platform.events import UsageEvent
from render_platform.gateway.jobs import Job, Outcome
from render_platform.gateway.leases import UNFINISHED, ended
from render_platform.gateway.problems import Conflict
from render_platform.gateway.writer import WriterEnded
from render_platform.outbox import LIVE, Outbox


@dataclass(frozen=True, slots=True)
class Accept:
    """→ None: accepted, with `seq` and `customer_ref` set; or the id of the job that the idempotency key stands for.

    `running`: a slot is free, and the first attempt begins with the commit.
    """

    job: Job
    running: bool


@dataclass(frozen=True, slots=True)
class Start:
    """→ whether attempt `attempt` of the job has begun; not where it has ended, or another attempt stands."""

    job: Job
    attempt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """→ the usage event as recorded, or None where the job had ended before."""

    job: Job
    attempt: int
    outcome: Outcome
    output_until_us: int | None = None  # how long the output is kept; None: not at all


@dataclass(frozen=True, slots=True)
class Do:
    """→ what `run` gives. For what is rarer than jobs: events from elsewhere, webhooks, the lease."""

    run: Callable[[sa.Connection], Any]


Operation = Accept | Start | Finish | Do


@dataclass(slots=True)
class _Pending:
    """What the store will know once the commit stands."""

    next_seq: int
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    accepted: list[tuple[Job, int, str]] = field(default_factory=list)
    mark: tuple[uuid.UUID, int | None] | None = None
    """A job and the attempt that it is at after the commit; None where it has ended then."""


class JobStore:
    """Applies operations for one gateway and epoch, until another works on its jobs (see `leases`)."""

    def __init__(
        self,
        outbox: Outbox,
        clock: Clock,
        ids: Ids,
        gateway_id: str,
        epoch: int,
        on_accept: Callable[[Job], None] = lambda _: None,
    ) -> None:
        """`on_accept` is called on the writer's thread, once a job's acceptance stands and before anybody is told."""
        self._outbox, self._clock, self._ids, self._on_accept = outbox, clock, ids, on_accept
        self.gateway_id, self.epoch = gateway_id, epoch
        self._next_seq = 1
        self._pending = _Pending(1)

    @property
    def accepted(self) -> int:
        """Jobs accepted in this epoch: the last `seq` given."""
        return self._next_seq - 1

    def apply(self, connection: sa.Connection, operations: Sequence[Operation]) -> list[Any]:
        if ended(connection, self.gateway_id, self.epoch):
            raise WriterEnded("another gateway works on this one's jobs", "its lease ran out: start it again")
        self._pending = _Pending(self._next_seq)
        results: dict[int, Any] = {}
        kinds: Sequence[tuple[type, Callable[..., list[Any]]]]
        kinds = ((Accept, self._accept), (Start, self._start), (Finish, self._finish), (Do, self._do))
        for kind, do in kinds:
            chosen = [at for at, one in enumerate(operations) if type(one) is kind]
            if chosen:
                results.update(zip(chosen, do(connection, [operations[at] for at in chosen]), strict=True))
        return [results[at] for at in range(len(operations))]

    def committed(self) -> None:
        self._next_seq = self._pending.next_seq
        for job, seq, ref in self._pending.accepted:
            job.seq, job.customer_ref = seq, ref
            self._on_accept(job)

    def stands(self, connection: sa.Connection) -> bool:
        """A transaction is all there or not at all: one of its changes tells. Without any it is as if it were not."""
        if self._pending.mark is None:
            return False
        job_id, attempt = self._pending.mark
        row = connection.execute(sa.select(jobs.c.state, jobs.c.attempt).filter_by(job_id=job_id.bytes)).one_or_none()
        if row is None or attempt is None:
            return row is not None and row.state not in UNFINISHED
        return bool(row.attempt == attempt)

    # Accepting.

    def _accept(self, connection: sa.Connection, accepts: Sequence[Accept]) -> list[Conflict | uuid.UUID | None]:
        results = [self._claim_key(connection, accept.job) for accept in accepts]
        new = [accept for accept, result in zip(accepts, results, strict=True) if result is None]
        rows = [self._row(connection, accept) for accept in new]
        _ACCEPT.run(connection, rows)
        bodies = [{"job_id": a.job.job_id.bytes, "body": a.job.request.body} for a in new if not a.job.request.direct]
        _KEEP_BODY.run(connection, bodies)
        return results

    def _row(self, connection: sa.Connection, accept: Accept) -> dict[str, Any]:
        job, request = accept.job, accept.job.request
        seq, ref = self._pending.next_seq, self._customer_ref(connection, job.customer)
        self._pending.next_seq += 1
        self._pending.accepted.append((job, seq, ref))
        self._pending.mark = job.job_id, int(accept.running)
        return {
            "job_id": job.job_id.bytes,
            "gateway_id": self.gateway_id,
            "epoch": self.epoch,
            "seq": seq,
            "request_id": job.request_id.bytes,
            "request_digest": job.request_digest,
            "customer_ref": ref,
            "pricing_tier": request.pricing_tier,
            "lane": request.lane,
            "model_name": request.model.name,
            "task": request.task,
            "format": request.format,
            "backend": request.backend,
            "webhook": request.webhook,
            "direct": request.direct,
            "state": "running" if accept.running else "queued",
            "attempt": 1 if accept.running else 0,
            "accepted_us": job.accepted_us,
            "deadline_us": job.deadline_us,
        }

    def _customer_ref(self, connection: sa.Connection, customer: tuple[str, str]) -> str:
        """Asked of SQL in each transaction: an erasure, also by another process, gives the customer a new one."""
        known = self._pending.refs.get(customer)
        if known is None:
            known = self._outbox.customer_ref(connection, *customer)
            self._pending.refs[customer] = known
        return known

    def _claim_key(self, connection: sa.Connection, job: Job) -> Conflict | uuid.UUID | None:
        """The job that the idempotency key stands for already, or a Conflict; None where it stands for this one now."""
        if job.request.idempotency_key is None:
            return None
        ref = self._customer_ref(connection, job.customer)
        named = {"customer_ref": ref, "key": job.request.idempotency_key}
        standing = connection.execute(sa.select(idempotency_keys).filter_by(**named)).one_or_none()
        if standing is None:
            values = {**named, "request_digest": job.request_digest, "job_id": job.job_id.bytes}
            connection.execute(idempotency_keys.insert().values(**values))
            return None
        if standing.request_digest != job.request_digest:
            return Conflict("idempotency_key: it stands for another request", "use a new key for a new request")
        return uuid.UUID(bytes=standing.job_id)

    # Starting and ending.

    def _start(self, connection: sa.Connection, starts: Sequence[Start]) -> list[bool]:
        rows = [{"id": s.job.job_id.bytes, "n": s.attempt, "before": s.attempt - 1} for s in starts]
        begun = _all_changed(_BEGIN.run(connection, rows), len(rows))
        if begun:
            self._pending.mark = starts[0].job.job_id, starts[0].attempt
        return [begun] * len(starts)

    def _finish(self, connection: sa.Connection, finishes: Sequence[Finish]) -> list[UsageEvent | None]:
        """The end first, then its event: where another end stands, there is no event."""
        now_us = self._clock.now_us()
        if not _all_changed(self._end(connection, finishes, now_us), len(finishes)):
            return [None]
        self._pending.mark = finishes[0].job.job_id, None
        events = [self.event(finish, now_us) for finish in finishes]
        return [*self._outbox.record(connection, LIVE, events)]

    @staticmethod
    def _end(connection: sa.Connection, finishes: Sequence[Finish], now_us: int) -> int:
        """How many of the jobs ended now."""
        ended = [
            {
                "id": f.job.job_id.bytes,
                "n": f.attempt,
                "to": f.outcome.status,
                "code": f.outcome.error_code,
                "us": now_us,
            }
            for f in finishes
        ]
        changed = _FINISH.run(connection, ended)
        if changed < len(finishes):
            return changed
        stored = [{"id": f.job.job_id.bytes} for f in finishes if not f.job.request.direct]
        _DROP_BODY.run(connection, stored)
        outputs = [
            {
                "job_id": f.job.job_id.bytes,
                "content_type": f.outcome.content_type,
                "output": f.outcome.body,
                "expires_us": f.output_until_us,
            }
            for f in finishes
            if f.output_until_us is not None
        ]
        _KEEP_OUTPUT.run(connection, outputs)
        hooks = [
            {"job_id": f.job.job_id.bytes, "url": f.job.request.webhook, "attempts": 0, "next_us": now_us}
            for f in finishes
            if f.job.request.webhook
        ]
        _CALL_BACK.run(connection, hooks)
        return changed

    def event(self, finish: Finish, now_us: int) -> UsageEvent:
        """The one usage event of a job: of the attempt that decided it."""
        job, outcome, usage, model = finish.job, finish.outcome, finish.outcome.usage, finish.job.model
        started_us, ended_us = outcome.started_ns // 1_000, -(-outcome.ended_ns // 1_000)
        first = job.first_started_us or now_us
        return UsageEvent(
            event_id=uuid7(now_us, self._ids),
            nonce=self._ids.random(16),
            source=f"gateway/{self.gateway_id}",
            gateway_id=self.gateway_id,
            request_id=job.request_id,
            job_id=job.job_id,
            attempt=finish.attempt,
            gpu_started_at=started_us,
            event_time=ended_us,
            recorded_at=now_us,
            customer_ref=job.customer_ref,
            pricing_tier=job.request.pricing_tier,
            model_family=model.family,
            model_name=model.name,
            model_type=model.type,
            modality=model.modality,
            task=job.request.task,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            input_dims=usage.input_dims,
            num_steps=usage.num_steps,
            image_count=usage.image_count,
            queue_time_us=max(0, first - job.accepted_us),
            inference_time_us=outcome.inference_time_us,
            total_time_us=max(0, now_us - job.accepted_us),
            gpu_time_ns=outcome.gpu_time_ns,
            gpu_count=outcome.gpu_count,
            device_uuid=outcome.device,
            batch_size=usage.batch_size,
            energy_mj=outcome.energy_mj,
            meter=outcome.meter,
            status=outcome.status,
            error_code=outcome.error_code,
        )

    @staticmethod
    def _do(connection: sa.Connection, others: Sequence[Do]) -> list[Any]:
        """Each in a savepoint of its own: what is refused undoes itself, and nobody else's."""
        results: list[Any] = []
        for other in others:
            try:
                with connection.begin_nested():
                    results.append(other.run(connection))
            except UsageError as error:
                results.append(error)
        return results


class _Crossed(PlatformError):
    """One of a group changed nothing: the group is undone, and the writer does each alone, which tells which one."""


def _all_changed(changed: int, wanted: int) -> bool:
    """Whether all of a group did what they say. Alone, an operation may find that it came too late."""
    if changed != wanted and wanted > 1:
        raise _Crossed("an operation came too late")
    return changed == wanted


_UNFINISHED_JOB = sa.and_(jobs.c.job_id == sa.bindparam("id"), sa.or_(*(jobs.c.state == state for state in UNFINISHED)))
_ACCEPT = Prepared(
    jobs.insert(), *(column.name for column in jobs.c if column.name not in ("finished_us", "error_code"))
)
_KEEP_BODY = Prepared(job_bodies.insert())
_BEGIN = Prepared(
    jobs.update()
    .where(_UNFINISHED_JOB, jobs.c.attempt == sa.bindparam("before"))
    .values(state="running", attempt=sa.bindparam("n"))
)
_FINISH = Prepared(
    jobs.update()
    .where(_UNFINISHED_JOB, jobs.c.attempt == sa.bindparam("n"))
    .values(state=sa.bindparam("to"), error_code=sa.bindparam("code"), finished_us=sa.bindparam("us"))
)
_DROP_BODY = Prepared(job_bodies.delete().where(job_bodies.c.job_id == sa.bindparam("id")))
_KEEP_OUTPUT = Prepared(job_outputs.insert())
_CALL_BACK = Prepared(webhooks.insert(), "job_id", "url", "attempts", "next_us")
