"""What the gateway and its journal's process tell each other, as plain values: operations on jobs, and their results.

Arrays in MessagePack: the field's place is its name, which is all that two processes of one version need. Ids are 16
bytes, times µs UTC or ns as their names say.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from render_platform.errors import PlatformError, RecordError, Unavailable, UsageError
from render_platform.events import UsageEvent, storage_row
from render_platform.gateway.backends import Usage
from render_platform.gateway.catalogue import ModelSpec
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.problems import Conflict
from render_platform.gateway.store import Accept, Finish, Operation, Start
from render_platform.gateway.writer import WriterEnded


class _Job(msgspec.Struct, array_like=True, gc=False):
    """A job, as far as the store asks. Ids are 16 bytes; times µs UTC."""

    job_id: bytes
    request_id: bytes
    digest: bytes
    accepted_us: int
    deadline_us: int
    issuer: str
    customer_id: str
    tier: str
    model: tuple[str, str, str, str]
    task: str
    lane: str
    direct: bool
    webhook: str | None
    customer_ref: str
    first_started_us: int | None


class _Accept(msgspec.Struct, array_like=True, tag=1, gc=False):
    job: _Job
    running: bool
    format: str | None
    backend: str | None
    key: str | None
    body: bytes


class _Start(msgspec.Struct, array_like=True, tag=2, gc=False):
    job: _Job
    attempt: int


class _Finish(msgspec.Struct, array_like=True, tag=3, gc=False):
    job: _Job
    attempt: int
    until_us: int | None
    status: str
    error_code: str | None
    started_ns: int
    ended_ns: int
    gpu_time_ns: int
    gpu_count: int
    device: str | None
    energy_mj: int | None
    meter: str
    inference_time_us: int
    usage: tuple[int | None, int | None, str | None, int | None, int | None, int]
    body: bytes
    content_type: str


class _Accepted(msgspec.Struct, array_like=True, tag=1, gc=False):
    seq: int
    customer_ref: str
    acceptance: str


class _Stands(msgspec.Struct, array_like=True, tag=2, gc=False):
    """The job that an idempotency key stands for."""

    job_id: bytes


class _Begun(msgspec.Struct, array_like=True, tag=3, gc=False):
    begun: bool


class _Ended(msgspec.Struct, array_like=True, tag=4, gc=False):
    """The recorded event as SQL has it; None: the job had ended before."""

    row: list[Any] | None


class _Refused(msgspec.Struct, array_like=True, tag=5, gc=False):
    kind: str
    message: str
    remedy: str


Told = _Accept | _Start | _Finish
Reply = _Accepted | _Stands | _Begun | _Ended | _Refused


# In the gateway.


def told_of(operation: Accept | Start | Finish) -> Told:
    job = operation.job
    request, model = job.request, job.request.model
    told = _Job(
        job.job_id.bytes,
        job.request_id.bytes,
        job.request_digest,
        job.accepted_us,
        job.deadline_us,
        request.issuer,
        request.customer_id,
        request.pricing_tier,
        (model.name, model.family, model.modality, model.type),
        request.task,
        request.lane,
        request.direct,
        request.webhook,
        job.customer_ref,
        job.first_started_us,
    )
    if isinstance(operation, Accept):
        body = b"" if request.direct else request.body
        return _Accept(told, operation.running, request.format, request.backend, request.idempotency_key, body)
    if isinstance(operation, Start):
        return _Start(told, operation.attempt)
    outcome, usage, until_us = operation.outcome, operation.outcome.usage, operation.output_until_us
    return _Finish(
        told,
        operation.attempt,
        until_us,
        outcome.status,
        outcome.error_code,
        outcome.started_ns,
        outcome.ended_ns,
        outcome.gpu_time_ns,
        outcome.gpu_count,
        outcome.device,
        outcome.energy_mj,
        outcome.meter,
        outcome.inference_time_us,
        (
            usage.input_tokens,
            usage.output_tokens,
            usage.input_dims,
            usage.num_steps,
            usage.image_count,
            usage.batch_size,
        ),
        b"" if until_us is None else outcome.body,
        outcome.content_type,
    )


def result_of(job: Job, reply: Reply) -> Any:
    """What the operation's future is given; a job that was accepted knows its number first."""
    if isinstance(reply, _Accepted):
        job.seq, job.customer_ref, job.acceptance = reply.seq, reply.customer_ref, reply.acceptance
        return None
    if isinstance(reply, _Ended):
        return None if reply.row is None else UsageEvent.recorded(reply.row)
    if isinstance(reply, _Begun):
        return reply.begun
    if isinstance(reply, _Stands):
        return uuid.UUID(bytes=reply.job_id)
    if reply.kind == "Conflict":
        return Conflict(reply.message, reply.remedy)
    if reply.kind.startswith("RecordError:"):
        return RecordError(reply.kind.partition(":")[2], reply.message, reply.remedy)
    if reply.kind == WriterEnded.__name__:
        return WriterEnded(reply.message, reply.remedy)
    return (UsageError if reply.kind == "UsageError" else Unavailable)(reply.message, reply.remedy)


# In the process.


def operation_of(told: Told) -> Accept | Start | Finish:
    if isinstance(told, _Accept):
        return Accept(_job_of(told.job, told), told.running)
    if isinstance(told, _Start):
        return Start(_job_of(told.job), told.attempt)
    outcome = Outcome(
        told.status,
        told.error_code,
        told.started_ns,
        told.ended_ns,
        told.gpu_time_ns,
        told.gpu_count,
        told.device,
        told.energy_mj,
        told.meter,
        told.inference_time_us,
        Usage(*told.usage),
        told.body,
        told.content_type,
    )
    return Finish(_job_of(told.job), told.attempt, outcome, told.until_us)


def _job_of(told: _Job, accept: _Accept | None = None) -> Job:
    name, family, modality, kind = told.model
    request = Request(
        issuer=told.issuer,
        customer_id=told.customer_id,
        pricing_tier=told.tier,
        model=ModelSpec(name=name, family=family, modality=modality, type=kind, tasks=[], backends={}),  # type: ignore[arg-type]
        task=told.task,
        body=accept.body if accept else b"",
        lane=told.lane,
        format=accept.format if accept else None,
        backend=accept.backend if accept else None,
        webhook=told.webhook,
        idempotency_key=accept.key if accept else None,
        direct=told.direct,
    )
    ids = uuid.UUID(bytes=told.job_id), uuid.UUID(bytes=told.request_id)
    job = Job(*ids, request, told.digest, told.accepted_us, told.deadline_us, customer_ref=told.customer_ref)
    job.first_started_us = told.first_started_us
    return job


def reply_to(operation: Operation, result: Any) -> Reply:
    if isinstance(result, PlatformError):
        return refusal(result)
    if isinstance(operation, Accept):
        job = operation.job
        return _Accepted(job.seq, job.customer_ref, job.acceptance) if result is None else _Stands(result.bytes)
    if isinstance(operation, Start):
        return _Begun(result)
    return _Ended(None if result is None else list(storage_row(result).values()))


def refusal(error: PlatformError) -> Reply:
    """An error as a reply. The field of a RecordError goes apart from what is said of it."""
    if isinstance(error, RecordError):
        return _Refused(f"RecordError:{error.field}", error.message.removeprefix(f"{error.field}: "), error.remedy)
    return _Refused(type(error).__name__, error.message, error.remedy)
