"""The seam between the engine and inference servers: what a backend is given, what it gives back, how it fails.

A backend runs one attempt at a time per call of `run`, many calls at once. It keeps no queue and retries nothing: the
engine does both. When the task that awaits `run` is cancelled, the backend ends the work at the server (it closes the
connection) before CancelledError leaves `run`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from render_platform.gateway.catalogue import BackendSpec, ModelSpec

MAX_ANSWER_BYTES = 64 * 1024 * 1024

Span = tuple[int, int]
"""[start, end) of work on the device, nanoseconds since 1970, on this machine's clock (see `Attempt.now_ns`)."""
Chunk = Callable[[bytes], Awaitable[None]]
"""Takes the next bytes of a streamed answer, as they go to the client."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a job. `body` is the client's JSON object, checked to be one."""

    attempt_id: str  # ours, unique an attempt: what a server's spans are matched by; never the client's
    model: ModelSpec
    served_as: str  # the model's name at this backend
    task: str
    body: bytes
    format: str | None
    timeout_s: float  # what is left of the job's own deadline, at most the backend's time-out
    now_ns: Callable[[], int]
    chunk: Chunk | None = None  # None: the answer is wanted whole
    progress: Callable[[int, int], None] | None = None  # (done, of): steps, tokens, whatever the backend counts
    traceparent: str | None = None


@dataclass(slots=True)
class Usage:
    """What the work was, as far as the backend says so. None is unknown, never zero."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    input_dims: str | None = None
    num_steps: int | None = None
    image_count: int | None = None
    batch_size: int = 1


@dataclass(slots=True)
class Answer:
    """A finished attempt. `spans` are the backend's own figures; None: it has none, and the wall clock counts."""

    body: bytes
    content_type: str = "application/json"
    usage: Usage = field(default_factory=Usage)
    spans: list[Span] | None = None


class BackendFailure(Exception):
    """An attempt that failed.

    `code` is one of ours, in snake_case (it stands in the usage event); `retriable` says whether the same attempt may
    succeed elsewhere or later; `refused` carries the status and body of a 4xx that the request itself caused, which
    goes back to the client. `spans` and `usage`: what the device did all the same, as far as the backend said so.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retriable: bool,
        refused: tuple[int, bytes] | None = None,
        spans: list[Span] | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retriable = retriable
        self.refused = refused
        self.spans = spans
        self.usage = usage or Usage()


class Backend(Protocol):
    """One inference server."""

    spec: BackendSpec

    @property
    def meter(self) -> str:
        """Where its spans come from: `backend`, `simulated`, or `wall_clock` where it gives none."""
        ...

    async def start(self) -> None:
        """Open connections and check what must hold; Unavailable or UsageError with a remedy where it does not."""
        ...

    async def run(self, attempt: Attempt) -> Answer:
        """Do the work; BackendFailure where it cannot be done. A streamed answer's body is empty."""
        ...

    async def check(self) -> None:
        """Whether the server answers now; BackendFailure where it does not."""
        ...

    async def close(self) -> None: ...
