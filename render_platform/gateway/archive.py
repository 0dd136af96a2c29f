"""Jobs as SQL holds them: for those who ask after the fact, and for the next start.

Which gateway works on them, `leases` says: what an epoch left unfinished is read here by who has taken it over.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from render_platform.clock import Clock
from render_platform.database import (
    Database,
    customers,
    gateways,
    job_bodies,
    job_outputs,
    jobs,
    usage_events,
)
from render_platform.gateway.catalogue import Catalogue, ModelSpec
from render_platform.gateway.ingest import ingested
from render_platform.gateway.jobs import FINISHED, Job, Request
from render_platform.gateway.leases import UNFINISHED, Epoch
from render_platform.outbox import pruned_events

PAGE = 100


@dataclass(frozen=True, slots=True)
class Recovered:
    """A job that an epoch left; `lost` says why it cannot run again, as an error code."""

    job: Job
    lost: str


class Archive:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def unfinished(self, catalogue: Catalogue, epochs: Collection[Epoch]) -> Iterator[Recovered]:
        """What `epochs` left, in the order of acceptance to the millisecond; in pages: memory stays bounded."""
        after = b""
        while True:
            query = (
                sa.select(jobs, customers.c.issuer, customers.c.customer_id, job_bodies.c.body)
                .join(customers, customers.c.customer_ref == jobs.c.customer_ref)
                .outerjoin(job_bodies, job_bodies.c.job_id == jobs.c.job_id)
                .where(jobs.c.state.in_(UNFINISHED), jobs.c.job_id > after)
                .where(sa.tuple_(jobs.c.gateway_id, jobs.c.epoch).in_(list(epochs)))
                .order_by(jobs.c.job_id)
                .limit(PAGE)
            )
            with self._database.read() as connection:
                rows = connection.execute(query).all()
            yield from (_recovered(row, catalogue) for row in rows)
            if len(rows) < PAGE:
                return
            after = rows[-1].job_id

    def read(self, job_id: uuid.UUID) -> dict[str, Any] | None:
        """A job's row with its usage, whether or not it has ended; None where there is none."""
        with self._database.read() as connection:
            row = connection.execute(_VIEW.where(jobs.c.job_id == job_id.bytes)).mappings().one_or_none()
        return None if row is None else dict(row)

    def jobs_of(self, customer_ref: str, limit: int, before: uuid.UUID | None) -> list[dict[str, Any]]:
        """A customer's jobs, newest first; `before` is the last of the page before."""
        query = _VIEW.where(jobs.c.customer_ref == customer_ref).order_by(jobs.c.job_id.desc()).limit(limit)
        if before is not None:
            query = query.where(jobs.c.job_id < before.bytes)
        with self._database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def ref_of(self, issuer: str, customer_id: str) -> str | None:
        query = sa.select(customers.c.customer_ref).filter_by(issuer=issuer, customer_id=customer_id)
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
        return None if found is None else str(found)

    def pruned_owner(self, job_id: uuid.UUID) -> str | None:
        """Whose job it was, where its row is no longer kept and its receipt still is; else None."""
        query = sa.select(pruned_events.c.customer_ref).filter_by(job_id=job_id.bytes)
        reported = sa.select(ingested.c.event_id).filter_by(event_id=job_id.bytes)  # no job of ours: it had no record
        with self._database.read() as connection:
            found = connection.execute(query.where(~reported.exists())).scalar()
        return None if found is None else str(found)

    def output(self, job_id: uuid.UUID) -> tuple[bytes, str] | None:
        """The job's output and its content type, while it is kept."""
        query = sa.select(job_outputs.c.output, job_outputs.c.content_type).where(
            job_outputs.c.job_id == job_id.bytes, job_outputs.c.expires_us > self._clock.now_us()
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (bytes(row.output), str(row.content_type))


def counts(database: Database) -> dict[str, int]:
    """Jobs whose rows are kept, by state: `accepted` is all of them."""
    with database.read() as connection:
        rows = connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
    found: dict[str, int] = {row[0]: row[1] for row in rows}
    return {
        "accepted": sum(found.values()),
        "queued": found.get("queued", 0),
        "running": found.get("running", 0),
        "finished": sum(found.get(state, 0) for state in FINISHED),
        "failed": sum(found.get(state, 0) for state in FINISHED if state != "success"),
    }


def fast_path_dropped(database: Database) -> int:
    """Events that gateways did not bring to ClickHouse, as of their last renewal, some seconds ago."""
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.sum(gateways.c.fast_path_dropped))).scalar() or 0)


def _recovered(row: Any, catalogue: Catalogue) -> Recovered:
    model = catalogue.resolve(row.model_name)
    lost = ""
    if model is None:
        lost = "model_withdrawn"
    elif row.body is None:
        lost = "gateway_restarted"  # its client went with the connection
    elif row.state == "running" and row.attempt >= model.max_attempts:
        lost = "gateway_restarted"
    elif row.backend is not None and row.backend not in model.backends:
        lost = "model_withdrawn"
    request = Request(
        issuer=row.issuer,
        customer_id=row.customer_id,
        pricing_tier=row.pricing_tier,
        model=model or _withdrawn(row.model_name),
        task=row.task,
        body=row.body or b"",
        lane=row.lane,
        format=row.format,
        backend=row.backend,
        webhook=row.webhook,
        direct=row.direct,
    )
    job = Job(
        job_id=uuid.UUID(bytes=row.job_id),
        request_id=uuid.UUID(bytes=row.request_id),
        request=request,
        request_digest=row.request_digest,
        accepted_us=row.accepted_us,
        deadline_us=row.deadline_us,
        customer_ref=row.customer_ref,
        seq=row.seq,
        state=row.state,
        attempt=row.attempt,
    )
    return Recovered(job, lost)


def _withdrawn(name: str) -> ModelSpec:
    """A model that the catalogue no longer has: enough to say how its job ended."""
    return ModelSpec(name=name, family="withdrawn", modality="unknown", type="other", tasks=[], backends={})


_USAGE = ("gpu_time_ns", "gpu_count", "device_uuid", "meter", "input_tokens", "output_tokens", "event_id", "energy_mj")
_VIEW = sa.select(
    jobs, *(usage_events.c[name] for name in _USAGE), job_outputs.c.content_type, job_outputs.c.expires_us
).select_from(
    jobs.outerjoin(usage_events, usage_events.c.job_id == jobs.c.job_id).outerjoin(
        job_outputs, job_outputs.c.job_id == jobs.c.job_id
    )
)
