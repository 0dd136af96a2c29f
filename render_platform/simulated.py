"""A simulated fleet of GPUs: the schedule of a trace's jobs, a pure function of the trace. No device was
measured.

Costs are declared here, in integer microseconds of run time; GPU time comes from the same splitter as real
meters'.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from heapq import heapify, heapreplace

from render_platform.metering import Interval, attribute
from render_platform.traces import Trace, TraceJob

SLOTS = 16
"""Jobs that a device runs at the same time."""
MAX_DEVICES = 1_024

FIXED_US = 20_000
INPUT_TOKEN_US = 60
OUTPUT_TOKEN_US = 12_000
IMAGE_STEP_US = 45_000
DEFAULT_STEPS = 30
DEFAULT_IMAGES = 1

CLIENT_SHARES = (30, 20, 14, 10, 8, 6, 5, 4, 2, 1)
"""Percent of the jobs of a trace without clients that go to `client-00` … `client-09`."""
_CLIENTS = tuple(f"client-{number:02d}" for number, share in enumerate(CLIENT_SHARES) for _ in range(share))
_TIERS = ("standard", "standard", "standard", "premium", "premium", "batch")


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """One job as it ran. Times are microseconds UTC; `batch_size` is the jobs on the device when it began,
    with it.
    """

    job: TraceJob
    client: str
    pricing_tier: str
    device_uuid: str
    started_us: int
    finished_us: int
    gpu_time_ns: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Placed:
    job: TraceJob
    device: str
    start_us: int
    end_us: int
    batch_size: int


def simulate(trace: Trace) -> list[SimulatedRun]:
    """Every job of the trace, run once, by (finished_us, row). The same trace gives the same runs, always.

    Jobs are taken in order of arrival and go to the slot that is free first. A job without a client gets one
    of ten, drawn from (trace digest, row) with the skew of `CLIENT_SHARES`; the tier follows from the client
    alone.
    """
    placed = _schedule(trace.jobs, device_count(trace.jobs))
    spans = (Interval(p.device, p.job.row, p.start_us * 1_000, p.end_us * 1_000) for p in placed)
    gpu_time_ns = attribute(spans)
    tiers: dict[str, str] = {}
    runs = []
    for p in sorted(placed, key=lambda p: (p.end_us, p.job.row)):
        client = p.job.client or assigned_client(trace.digest, p.job.row)
        tier = tiers.get(client) or tiers.setdefault(client, pricing_tier(client))
        ns = gpu_time_ns[p.job.row]
        runs.append(SimulatedRun(p.job, client, tier, p.device, p.start_us, p.end_us, ns, p.batch_size))
    return runs


def cost_us(job: TraceJob) -> int:
    """The declared run time of a job, at least 1 µs: the trace's own where it has one."""
    if job.exec_time_us is not None:
        return max(1, job.exec_time_us)
    if job.modality == "image":
        steps = DEFAULT_STEPS if job.num_steps is None else job.num_steps
        images = DEFAULT_IMAGES if job.image_count is None else job.image_count
        return FIXED_US + steps * images * IMAGE_STEP_US
    return FIXED_US + (job.input_tokens or 0) * INPUT_TOKEN_US + (job.output_tokens or 0) * OUTPUT_TOKEN_US


def device_count(jobs: list[TraceJob]) -> int:
    """The fewest devices, 2 to MAX_DEVICES, whose slots are at most half used over the span of the
    arrivals.
    """
    if not jobs:
        return 2
    span_us = max(job.arrival_us for job in jobs) - min(job.arrival_us for job in jobs) + 1
    work_us = sum(cost_us(job) for job in jobs)
    return min(MAX_DEVICES, max(2, -(-2 * work_us // (span_us * SLOTS))))


def _schedule(jobs: list[TraceJob], devices: int) -> list[_Placed]:
    """`jobs` are in order of arrival, so starts never go back, and a slot that is busy at a start began
    before it.
    """
    names = [f"GPU-sim-{number:02d}" for number in range(devices)]
    free_us = [[0] * SLOTS for _ in range(devices)]
    heap = [(0, slot, device) for slot in range(SLOTS) for device in range(devices)]
    heapify(heap)
    placed = []
    for job in jobs:
        free, slot, device = heap[0]
        start = max(job.arrival_us, free)
        end = start + cost_us(job)
        batch_size = 1 + sum(busy_until > start for busy_until in free_us[device])
        free_us[device][slot] = end
        heapreplace(heap, (end, slot, device))
        placed.append(_Placed(job, names[device], start, end, batch_size))
    return placed


def assigned_client(trace_digest: str, row: int) -> str:
    """The stand-in client of a row whose trace names none."""
    drawn = hashlib.sha256(f"render-platform/client/{trace_digest}/{row}".encode()).digest()
    return _CLIENTS[int.from_bytes(drawn[:8], "big") % len(_CLIENTS)]


def pricing_tier(client: str) -> str:
    """Of six clients about three are `standard`, two `premium`, one `batch`."""
    drawn = hashlib.sha256(f"render-platform/tier/{client}".encode()).digest()
    return _TIERS[int.from_bytes(drawn[:8], "big") % len(_TIERS)]
