"""Attempts as the engine makes them, and the client at the other end of a stream."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

from render_platform.gateway.backends import Attempt
from render_platform.gateway.catalogue import ModelSpec

_numbers = itertools.count(1)


@dataclass
class Client:
    """Gets a stream, chunk by chunk, as the backend hands it over."""

    chunks: list[bytes] = field(default_factory=list)

    async def take(self, chunk: bytes) -> None:
        self.chunks.append(chunk)

    @property
    def got(self) -> bytes:
        return b"".join(self.chunks)

    def texts(self) -> str:
        """The text that a chat's chunks add up to."""
        events = [line[6:] for line in self.got.split(b"\n") if line.startswith(b"data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)


def make_model(**settings: Any) -> ModelSpec:
    plain = {"name": "m", "family": "f", "modality": "text", "type": "llm", "tasks": ["chat"], "backends": {}}
    return ModelSpec(**{**plain, **settings})


def make_attempt(
    served_as: str,
    task: str,
    body: dict[str, Any] | bytes,
    *,
    client: Client | None = None,
    model: ModelSpec | None = None,
    **settings: Any,
) -> Attempt:
    """An attempt with an id of its own; one with a client may be streamed."""
    values: dict[str, Any] = {
        "attempt_id": f"attempt-{next(_numbers)}",
        "model": model or make_model(),
        "served_as": served_as,
        "task": task,
        "body": body if isinstance(body, bytes) else json.dumps(body).encode(),
        "format": None,
        "timeout_s": 30.0,
        "now_ns": time.time_ns,
        "chunk": client.take if client else None,
    }
    return Attempt(**{**values, **settings})


def busy_ns(spans: list[tuple[int, int]] | None) -> int:
    assert spans is not None
    return sum(end - start for start, end in spans)
