"""The simulated schedule: deterministic, never early, bounded a device, and exact in GPU time."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform.events import MAX_GPU_TIME_NS
from render_platform.metering import Interval, busy_ns
from render_platform.simulated import (
    CLIENT_SHARES,
    SLOTS,
    SimulatedRun,
    assigned_client,
    cost_us,
    device_count,
    simulate,
)
from render_platform.trace_formats import MAX_EXEC_US, MAX_IMAGES, MAX_STEPS, MAX_TOKENS
from render_platform.traces import Trace, TraceJob, generated_trace, read_trace

REAL = Path(__file__).parents[1].parent / "shared" / "traces"


@pytest.fixture(scope="module", params=["generated", "conv", "code"])
def trace(request: pytest.FixtureRequest) -> Trace:
    if request.param == "generated":
        return generated_trace()
    path = REAL / f"AzureLLMInferenceTrace_{request.param}.csv"
    if not path.exists():
        pytest.skip(f"REAL TRACE NOT TESTED: {path} is missing")
    return read_trace(path)


@pytest.fixture(scope="module")
def runs(trace: Trace) -> list[SimulatedRun]:
    return simulate(trace)


def test_every_job_runs_once_for_its_cost_and_not_before_it_arrives(trace: Trace, runs: list[SimulatedRun]) -> None:
    assert sorted(run.job.row for run in runs) == sorted(job.row for job in trace.jobs)
    for run in runs:
        assert run.started_us >= run.job.arrival_us
        assert run.finished_us - run.started_us == cost_us(run.job) > 0
        assert 0 < run.gpu_time_ns <= (run.finished_us - run.started_us) * 1_000
    order = [(run.finished_us, run.job.row) for run in runs]
    assert order == sorted(order)


def test_gpu_time_adds_up_to_the_busy_time_of_each_device(runs: list[SimulatedRun]) -> None:
    total: dict[str, int] = defaultdict(int)
    for run in runs:
        total[run.device_uuid] += run.gpu_time_ns
    spans = [Interval(r.device_uuid, r.job.row, r.started_us * 1_000, r.finished_us * 1_000) for r in runs]
    assert total == busy_ns(spans)


def test_no_device_runs_more_than_its_slots_and_batch_size_says_how_many(runs: list[SimulatedRun]) -> None:
    ends: dict[str, list[int]] = defaultdict(list)
    sizes = Counter[int]()
    for run in sorted(runs, key=lambda run: (run.started_us, run.job.arrival_us, run.job.row)):
        active = [end for end in ends[run.device_uuid] if end > run.started_us]
        ends[run.device_uuid] = [*active, run.finished_us]
        assert len(active) + 1 == run.batch_size <= SLOTS
        sizes[run.batch_size] += 1
    assert len(sizes) > 1


def test_the_fleet_is_at_most_half_loaded(trace: Trace, runs: list[SimulatedRun]) -> None:
    devices = len({run.device_uuid for run in runs})
    arrivals = [job.arrival_us for job in trace.jobs]
    work = sum(cost_us(job) for job in trace.jobs)
    assert devices == device_count(trace.jobs) >= 2
    assert 2 * work <= (max(arrivals) - min(arrivals) + 1) * devices * SLOTS


def test_the_fleet_is_the_smallest_that_is_at_most_half_loaded() -> None:
    jobs = [TraceJob(row, row + 1, row * 62_000, "c", 230, 600) for row in range(1, 2_001)]
    work, span = 2_000 * 7_233_800, 1_999 * 62_000 + 1
    devices = device_count(jobs)
    assert 2 * work <= span * devices * SLOTS
    assert 2 * work > span * (devices - 1) * SLOTS
    assert devices > 2


def test_the_same_trace_gives_the_same_runs(trace: Trace, runs: list[SimulatedRun]) -> None:
    assert simulate(replace(trace, jobs=list(trace.jobs))) == runs


def test_clients_are_the_traces_own_or_assigned_with_a_skew(trace: Trace, runs: list[SimulatedRun]) -> None:
    if trace.jobs[0].client:
        assert all(run.client == run.job.client for run in runs)
        return
    counts = Counter(run.client for run in runs)
    assert set(counts) == {f"client-{number:02d}" for number in range(10)}
    for number, share in enumerate(CLIENT_SHARES):
        expected = share * len(runs) // 100
        assert abs(counts[f"client-{number:02d}"] - expected) < expected // 5 + 50
    assert all(run.client == assigned_client(trace.digest, run.job.row) for run in runs)


def test_a_client_has_one_tier_and_all_tiers_occur(runs: list[SimulatedRun]) -> None:
    tiers: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        tiers[run.client].add(run.pricing_tier)
    assert all(len(found) == 1 for found in tiers.values())
    assert {tier for found in tiers.values() for tier in found} == {"standard", "premium", "batch"}


def test_costs_are_the_declared_ones() -> None:
    job = TraceJob(1, 2, 0)
    assert cost_us(replace(job, input_tokens=100, output_tokens=10)) == 20_000 + 6_000 + 120_000
    assert cost_us(replace(job, modality="image", num_steps=4, image_count=2)) == 20_000 + 8 * 45_000
    assert cost_us(replace(job, modality="image")) == 20_000 + 30 * 45_000
    assert cost_us(replace(job, modality="image", exec_time_us=5, num_steps=4)) == 5
    assert cost_us(replace(job, exec_time_us=0)) == 1


def test_no_readable_job_can_pass_the_bound_of_a_usage_event() -> None:
    job = TraceJob(1, 2, 0, input_tokens=MAX_TOKENS, output_tokens=MAX_TOKENS)
    image = TraceJob(1, 2, 0, image_count=MAX_IMAGES, num_steps=MAX_STEPS, modality="image")
    longest = max(cost_us(job), cost_us(image), cost_us(replace(job, exec_time_us=MAX_EXEC_US)))
    assert longest * 1_000 <= MAX_GPU_TIME_NS


def test_a_burst_waits_for_a_slot_when_the_fleet_is_at_its_largest() -> None:
    jobs = [TraceJob(row, row + 1, 1_000, output_tokens=1) for row in range(1, 40_001)]
    runs = simulate(replace(generated_trace(), jobs=jobs))
    assert max(run.started_us for run in runs) > 1_000
    assert max(run.batch_size for run in runs) == SLOTS


def test_an_empty_trace_has_no_runs() -> None:
    assert simulate(replace(generated_trace(), jobs=[])) == []


def test_a_hundred_thousand_jobs_take_less_than_ten_seconds() -> None:
    jobs = [TraceJob(row, row + 1, row * 62_000, "c", 230, 600) for row in range(1, 100_001)]
    began = time.perf_counter()
    simulate(replace(generated_trace(), jobs=jobs))
    assert time.perf_counter() - began < 10
