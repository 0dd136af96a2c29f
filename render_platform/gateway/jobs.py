"""A job in memory: what was asked for, where it stands, what those who watch it are told, and its signed acceptance.

An acceptance is what a customer keeps, to convict a platform that never billed or never ran a job. The signature is the
gateway's own key's, on the canonical bytes of the acceptance as a C2SP signed note: the bytes, a newline, a blank line
and a signature line. Within an epoch `seq` counts every accepted job, so that a gap is found.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from render_platform import canonical
from render_platform.errors import Finding
from render_platform.gateway.backends import Chunk, Usage
from render_platform.gateway.catalogue import ModelSpec
from render_platform.note import Signer, Verifier, open_note, sign_note

FINISHED = ("success", "error", "timeout", "cancelled")
STOPPING = "gateway_stopping"
"""The error code of a job whose client waited for a slot when the gateway was told to stop."""
MAX_HELD_BYTES = 1024 * 1024 * 1024
"""What the requests of jobs that have not ended may hold of memory, before no more are accepted."""
MAX_EVENTS = 1_000
"""Events of one job that are kept for those who connect again; progress beyond it is left out."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, checked. `direct`: it waits on the connection, and nothing is kept for later."""

    issuer: str
    customer_id: str
    pricing_tier: str
    model: ModelSpec
    task: str
    body: bytes
    lane: str = "normal"
    format: str | None = None
    backend: str | None = None
    ttl_s: int | None = None
    webhook: str | None = None
    idempotency_key: str | None = None
    direct: bool = False
    chunk: Chunk | None = None
    traceparent: str | None = None

    def digest(self) -> bytes:
        """SHA-256 of everything that decides what the job is; see docs/formats.md."""
        asked = (self.model.name, self.task, self.format, self.backend, self.lane, self.ttl_s, self.webhook)
        head = "\n".join("" if value is None else str(value) for value in asked)
        return hashlib.sha256(b"render-platform/request/v1\n" + head.encode() + b"\n" + self.body).digest()


@dataclass(slots=True)
class Outcome:
    """How a job ended, and what it used. Nanoseconds since 1970; without GPU work both ends are the end."""

    status: str
    error_code: str | None
    started_ns: int
    ended_ns: int
    gpu_time_ns: int = 0
    gpu_count: int = 0
    device: str | None = None
    energy_mj: int | None = None
    meter: str = "wall_clock"
    inference_time_us: int = 0
    usage: Usage = field(default_factory=Usage)
    body: bytes = b""
    content_type: str = "application/json"
    http_status: int = 200
    message: str = ""

    @property
    def gpu_seconds(self) -> str:
        """Exact: nine digits."""
        return f"{self.gpu_time_ns // 1_000_000_000}.{self.gpu_time_ns % 1_000_000_000:09d}"


@dataclass(slots=True, eq=False)
class Job:
    """One job from its acceptance to its end. `outcome` is set when its end is committed, never before."""

    job_id: uuid.UUID
    request_id: uuid.UUID
    request: Request
    request_digest: bytes
    accepted_us: int
    deadline_us: int
    customer_ref: str = ""
    seq: int = 0
    acceptance: str = ""
    """Signed, between the commit and the answer that carries it."""
    state: str = "queued"
    attempt: int = 0
    first_started_us: int | None = None
    cancelled_by: str = ""
    """Why it is to end early, as an error code; empty: it goes on."""
    ran_on: str = ""
    """The backend of its last attempt in this process: another one is asked first."""
    task: asyncio.Task[None] | None = None
    outcome: Outcome | None = None
    watchers: list[asyncio.Event] = field(default_factory=list)
    done: asyncio.Future[Outcome] | None = None
    history: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def model(self) -> ModelSpec:
        return self.request.model

    @property
    def customer(self) -> tuple[str, str]:
        return self.request.issuer, self.request.customer_id

    def tell(self, name: str, **data: Any) -> None:
        """Add an event for those who watch; its number is its place, so that they can resume."""
        if len(self.history) < MAX_EVENTS or name in ("complete", "error"):
            self.history.append((name, data))
            for watcher in self.watchers:
                watcher.set()

    def told_after(self, number: int) -> Sequence[tuple[int, str, dict[str, Any]]]:
        return [(at + 1, *self.history[at]) for at in range(max(0, number), len(self.history))]


class LiveJobs(dict[uuid.UUID, Job]):
    """Jobs that have not ended, by their id, and how many bytes their requests hold."""

    held_bytes = 0

    def hold(self, job: Job) -> None:
        if job.job_id not in self:
            self.held_bytes += len(job.request.body)
            self[job.job_id] = job

    def let_go(self, job: Job) -> None:
        if self.pop(job.job_id, None) is not None:
            self.held_bytes -= len(job.request.body)


# Acceptances.

FIELDS = ("gateway", "epoch", "seq", "job_id", "request_digest", "time")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`time` is when the job was accepted, µs UTC; `request_digest` is 64 hex digits (see docs/formats.md)."""

    gateway: str
    epoch: int
    seq: int
    job_id: str
    request_digest: str
    time: int

    def to_note(self, signer: Signer) -> str:
        values = {name: getattr(self, name) for name in FIELDS}
        return sign_note(canonical.encode(values).decode() + "\n", [signer])

    @classmethod
    def open(cls, note: str, key: Verifier) -> Acceptance:
        """The acceptance that `note` holds, signed by `key`; Finding where it is not."""
        text, _ = open_note(note, [key])
        values = canonical.decode(text.removesuffix("\n").encode())
        if tuple(values) != FIELDS:
            raise Finding("the note is no acceptance: it has other fields")
        good = all(type(values[name]) is (int if name in ("epoch", "seq", "time") else str) for name in FIELDS)
        if not good:
            raise Finding("the note is no acceptance: a field has another type")
        return cls(**values)


def signing(signer: Signer, gateway_id: str, epoch: int) -> Callable[[Job], None]:
    """What signs a job's acceptance once that stands; one whose client waits on the connection needs none."""

    def sign(job: Job) -> None:
        if not job.request.direct:
            job.acceptance = acceptance_of(job, gateway_id, epoch).to_note(signer)

    return sign


def acceptance_of(job: Job, gateway_id: str, epoch: int) -> Acceptance:
    return Acceptance(gateway_id, epoch, job.seq, str(job.job_id), job.request_digest.hex(), job.accepted_us)
