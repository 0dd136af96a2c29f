"""What clients send and see, as msgspec structs: the OpenAPI document is made from them."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec

from render_platform.clock import iso
from render_platform.gateway.engine import Engine
from render_platform.gateway.jobs import FINISHED, Job

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Ttl = Annotated[int, msgspec.Meta(ge=1, le=604_800, description="Seconds until the job is given up")]


class QueueRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A job to be queued. `input` goes to the backend as it is."""

    model: Name
    input: dict[str, Any]
    task: Name | None = None
    format: Name | None = None
    backend: Name | None = None
    priority: Name | None = None
    ttl: Ttl | None = None
    webhook: Annotated[str, msgspec.Meta(max_length=2_048)] | None = None
    idempotency_key: Name | None = None


class Usage(msgspec.Struct):
    """What the job used. GPU time is exact; `gpu_seconds` is the same, to read."""

    gpu_seconds: str
    gpu_time_ns: int
    gpu_device: str | None
    meter: str
    event_id: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    energy_mj: int | None = None


class JobView(msgspec.Struct, omit_defaults=True):
    """A job as its customer sees it. `acceptance` is signed: keep it."""

    id: str
    state: str
    model: str
    task: str
    priority: str
    accepted_at: str
    deadline: str
    attempt: int
    links: dict[str, str]
    position: int | None = None
    eta_seconds: int | None = None
    finished_at: str | None = None
    error_code: str | None = None
    usage: Usage | None = None
    acceptance: str | None = None


class JobPage(msgspec.Struct):
    jobs: list[JobView]
    next: str | None = None


class QueueView(msgspec.Struct):
    """How many jobs wait and run for each model."""

    model: str
    waiting: dict[str, int]
    running: int
    capacity: int


class ModelView(msgspec.Struct):
    name: str
    family: str
    modality: str
    type: str
    tasks: list[str]
    formats: list[str]
    aliases: list[str]
    backends: list[str]
    available: bool


class Health(msgspec.Struct):
    status: str


class Readiness(msgspec.Struct):
    """Whether the gateway takes work, and what stands in the way."""

    status: str
    gateway: str
    epoch: int
    meter: str
    backends: dict[str, str]
    fast_path: dict[str, Any]
    problems: list[str]


def links_of(job_id: str, *, output: bool = False) -> dict[str, str]:
    links = {"self": f"/jobs/{job_id}", "events": f"/jobs/{job_id}/events", "cancel": f"/jobs/{job_id}/cancel"}
    return {**links, "output": f"/jobs/{job_id}/output"} if output else links


def view_of(job: Job, engine: Engine) -> JobView:
    """A job that has not ended, as it is in memory."""
    job_id, position = str(job.job_id), engine.get_queue_position(job)
    eta_us = engine.eta_us(job, position)
    waits = job.state in ("queued", "starting", "waiting")
    return JobView(
        id=job_id,
        state="queued" if waits else "running",
        model=job.model.name,
        task=job.request.task,
        priority=job.request.lane,
        accepted_at=iso(job.accepted_us),
        deadline=iso(job.deadline_us),
        attempt=job.attempt,
        links=links_of(job_id),
        position=position,
        eta_seconds=None if eta_us is None else -(-eta_us // 1_000_000),
    )


def view_of_row(row: dict[str, Any]) -> JobView:
    """A job as SQL holds it."""
    job_id = str(uuid.UUID(bytes=row["job_id"]))
    ended = row["state"] in FINISHED
    return JobView(
        id=job_id,
        state=row["state"],
        model=row["model_name"],
        task=row["task"],
        priority=row["lane"],
        accepted_at=iso(row["accepted_us"]),
        deadline=iso(row["deadline_us"]),
        attempt=row["attempt"],
        links=links_of(job_id, output=row["content_type"] is not None),
        finished_at=iso(row["finished_us"]) if ended else None,
        error_code=row["error_code"],
        usage=_usage(row) if row["event_id"] is not None else None,
    )


def _usage(row: dict[str, Any]) -> Usage:
    nanoseconds = row["gpu_time_ns"]
    return Usage(
        gpu_seconds=f"{nanoseconds // 1_000_000_000}.{nanoseconds % 1_000_000_000:09d}",
        gpu_time_ns=nanoseconds,
        gpu_device=row["device_uuid"],
        meter=row["meter"],
        event_id=str(uuid.UUID(bytes=row["event_id"])),
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        energy_mj=row["energy_mj"],
    )
