"""Random but valid usage events, reproducible from a seed."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pyarrow as pa

from render_platform import events
from render_platform.clock import HOUR_US, uuid7_from_random
from render_platform.events import UsageEvent

START_US = 1_700_157_600_000_000
"""2023-11-16T18:00:00Z: the first instant of an hour."""

CUSTOMERS = tuple(hashlib.sha256(f"customer {n}".encode()).hexdigest() for n in range(5))
MODELS = (
    ("flux", "flux-1-dev", "rectified_flow", "image"),
    ("flux", "flux-1-schnell", "rectified_flow", "image"),
    ("llama", "llama-3-70b", "llm", "text"),
    ("whisper", "whisper-large-v3", "other", "audio"),
)
_ERRORS = {"success": None, "error": "backend_error", "timeout": "deadline", "cancelled": "client_gone"}


def make_event(rng: random.Random, **overrides: Any) -> UsageEvent:
    """A valid event; its times follow `recorded_at`, and a given `gpu_time_ns` fits the wall time."""
    values = _identity(rng) | _work(rng) | _times(rng, overrides) | overrides
    return UsageEvent(**values)


def make_events(n: int, seed: int = 0, start_us: int = START_US, span_us: int = HOUR_US) -> list[UsageEvent]:
    """`n` valid events recorded in [start_us, start_us + span_us), ordered by event_id."""
    rng = random.Random(seed)
    made = [make_event(rng, recorded_at=start_us + rng.randrange(span_us)) for _ in range(n)]
    return sorted(made, key=lambda event: event.event_id)


def make_table(n: int, seed: int = 0, start_us: int = START_US, span_us: int = HOUR_US) -> pa.Table:
    """`make_events` as a table of EVENT_SCHEMA."""
    return events.table_from_events(make_events(n, seed, start_us, span_us))


def replace_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in one plain column: for values that no valid event can have."""
    index = table.column_names.index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, pa.array(values, field.type))


def _times(rng: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    recorded = given.get("recorded_at", START_US + rng.randrange(HOUR_US))
    ended = given.get("event_time", recorded - rng.randrange(2_000_000))
    gpus = given.get("gpu_count", rng.choice((1, 1, 1, 2, 8)))
    wanted_us = -(-given.get("gpu_time_ns", 0) // (1_000 * gpus))
    started = given.get("gpu_started_at", ended - wanted_us - rng.randrange(1_000, 30_000_000))
    busy = rng.randrange((ended - started) * 1_000 * gpus + 1) if ended >= started else 0
    wall, queued = max(ended - started, 0), rng.randrange(5_000_000)
    return {
        "gpu_started_at": started,
        "event_time": ended,
        "recorded_at": recorded,
        "queue_time_us": queued,
        "inference_time_us": wall,
        "total_time_us": queued + wall,
        "gpu_time_ns": min(busy, events.MAX_GPU_TIME_NS),
        "gpu_count": gpus,
        "event_id": uuid7_from_random(ended, rng.randbytes(10)),
    }


def _identity(rng: random.Random) -> dict[str, Any]:
    return {
        "nonce": rng.randbytes(16),
        "source": "gateway:test",
        "gateway_id": "gateway-1",
        "request_id": uuid7_from_random(START_US, rng.randbytes(10)),
        "job_id": uuid7_from_random(START_US, rng.randbytes(10)),
        "attempt": rng.choice((1, 1, 1, 2)),
        "customer_ref": rng.choice(CUSTOMERS),
        "pricing_tier": rng.choice(("free", "standard", "enterprise")),
    }


def _work(rng: random.Random) -> dict[str, Any]:
    family, model, kind, modality = rng.choice(MODELS)
    status = rng.choices(tuple(_ERRORS), (90, 4, 3, 3))[0]
    llm, image = kind == "llm", kind == "rectified_flow"
    return {
        "model_family": family,
        "model_name": model,
        "model_type": kind,
        "modality": modality,
        "task": f"{modality}-generation",
        "input_tokens": rng.randrange(1, 8_000) if llm else None,
        "output_tokens": rng.randrange(4_000) if llm else None,
        "input_dims": rng.choice(("512x512", "1024x1024")) if image else None,
        "num_steps": rng.randrange(1, 50) if image else None,
        "image_count": rng.randrange(1, 5) if image else None,
        "device_uuid": rng.choice((None, "GPU-0", "GPU-1")),
        "batch_size": rng.choice((1, 2, 8)),
        "energy_mj": rng.choice((None, rng.randrange(10**7))),
        "meter": rng.choice(events.METERS),
        "status": status,
        "error_code": _ERRORS[status],
    }
