"""Waits and plans of capacity: published values, a simulated queue, and hours worked out by hand."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.clock import HOUR_US
from render_platform.errors import UsageError
from render_platform.operations.capacity import (
    CapacityPlan,
    Cell,
    Figures,
    Limits,
    Little,
    TypePlan,
    counted,
    percent,
    plan_of,
    seconds,
)
from render_platform.operations.queueing import (
    UNBOUNDED,
    Load,
    erlang_c,
    mg1_wait_s,
    mgc_wait_s,
    mm1_wait_s,
    mmc_wait_s,
    waits_of,
)
from tests.factories import START_US

MINUTE, HOUR, DAY = 60.0, 3_600.0, 86_400.0
DEVICE_HOUR_NS = HOUR_US * 1_000
"""All of the time of one device."""


def exponential(arrivals_per_s: float, service_s: float, servers: int = 1) -> Load:
    return Load(arrivals_per_s, service_s, 2 * service_s**2, servers)


def constant(arrivals_per_s: float, service_s: float, servers: int = 1) -> Load:
    return Load(arrivals_per_s, service_s, service_s**2, servers)


# Published values.


@pytest.mark.parametrize(
    ("load", "wait_s"),
    [  # R. Bronson, Operations Research (Schaum), 1982: problems 23.3, 23.14 and 23.16
        (exponential(24 / HOUR, HOUR / 30), HOUR / 6 - HOUR / 30),
        (exponential(30 / HOUR, 1.5 * MINUTE), 4.5 * MINUTE),
        (exponential(1 / MINUTE, 45), 2.25 * MINUTE),
        # F. S. Hillier, G. J. Lieberman, Introduction to Operations Research: the County Hospital, one doctor
        (exponential(2 / HOUR, HOUR / 3), HOUR * 2 / 3),
    ],
)
def test_mm1_gives_what_textbooks_give(load: Load, wait_s: float) -> None:
    assert mm1_wait_s(load) == pytest.approx(wait_s)
    assert [mg1_wait_s(load), mmc_wait_s(load), mgc_wait_s(load)] == pytest.approx([wait_s] * 3), "special cases all"


@pytest.mark.parametrize(
    ("load", "wait_s", "tolerance"),
    [  # Bronson, problem 24.6: three servers, a year of 365 days, the answer in three digits
        (exponential(300 / (365 * DAY), 2 * DAY, 3), 0.001175 * 365 * DAY, 1e-3),
        # Hillier and Lieberman: the County Hospital, two doctors
        (exponential(2 / HOUR, HOUR / 3, 2), HOUR / 24, 1e-12),
        # B. Render, R. M. Stair, M. E. Hanna, Quantitative Analysis for Management: two employees at a desk, 20 people
        # an hour, two minutes each: 3/80 of an hour in the system
        (exponential(20 / HOUR, 2 * MINUTE, 2), HOUR * 3 / 80 - 2 * MINUTE, 1e-9),
        # The worked example of Erlang C for call centres: 360 calls in half an hour, 4 minutes each, 55 agents: 8 s
        (exponential(360 / (30 * MINUTE), 4 * MINUTE, 55), 8.18, 1e-3),
    ],
)
def test_mmc_gives_what_textbooks_give(load: Load, wait_s: float, tolerance: float) -> None:
    assert mmc_wait_s(load) == pytest.approx(wait_s, rel=tolerance)
    assert mgc_wait_s(load) == pytest.approx(wait_s, rel=tolerance)


@pytest.mark.parametrize(
    ("offered", "servers", "waiting"),
    [(1, 2, Fraction(1, 3)), (2, 3, Fraction(4, 9)), (10, 14, 0.1741), (48, 55, 0.239), (0.5, 1, 0.5)],
)
def test_erlang_c_gives_the_values_of_its_tables(offered: float, servers: int, waiting: float | Fraction) -> None:
    assert erlang_c(exponential(offered, 1.0, servers)) == pytest.approx(float(waiting), abs=5e-4)


def test_constant_service_waits_half_as_long() -> None:
    """Render, Stair and Hanna, Garcia-Golding Recycling: 8 trucks an hour, 12 an hour compacted at a constant rate wait
    for 1/12 of an hour; A. O. Allen, Probability, Statistics and Queueing Theory: M/D/1 is half of M/M/1."""
    load = constant(8 / HOUR, HOUR / 12)
    assert mg1_wait_s(load) == pytest.approx(HOUR / 12)
    assert mg1_wait_s(load) == pytest.approx(mm1_wait_s(load) / 2)


@pytest.mark.parametrize("stages", [1, 2, 3, 10])
def test_erlang_service_waits_as_its_closed_form_says(stages: int) -> None:
    """M/E_k/1 waits (1 + 1/k) / 2 as long as M/M/1 (Hillier and Lieberman)."""
    load = Load(0.6, 1.0, 1 + 1 / stages)
    assert mg1_wait_s(load) == pytest.approx(mm1_wait_s(load) * (1 + 1 / stages) / 2)


# What holds of all.

LOADS = st.builds(
    lambda utilisation, service_s, variation, servers: Load(
        utilisation * servers / service_s, service_s, (1 + variation) * service_s**2, servers
    ),
    st.floats(0, 2),
    st.floats(1e-6, 1e5),
    st.floats(0, 50),
    st.integers(1, 200),
)


@given(LOADS)
def test_a_wait_is_never_negative_and_without_bound_exactly_from_full_use_on(load: Load) -> None:
    for wait_s in waits_of(load):
        assert wait_s >= 0
        assert (wait_s == UNBOUNDED) == (load.utilisation >= 1)
    assert 0 <= erlang_c(load) <= 1


@given(LOADS, st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_more_work_waits_longer_and_more_servers_wait_less(load: Load, utilisation: float, more: float) -> None:
    for wait in (mm1_wait_s, mg1_wait_s, mmc_wait_s, mgc_wait_s):
        assert wait(load.at(utilisation)) <= wait(load.at(utilisation + more)) * (1 + 1e-9)
    at = load.at(utilisation)
    assert at.utilisation == pytest.approx(utilisation)
    assert mmc_wait_s(at) <= mm1_wait_s(at) * (1 + 1e-9), "one queue for all never waits longer than one each"


def test_no_jobs_and_no_service_wait_for_nothing() -> None:
    assert set(waits_of(Load(0.0, 1.0, 1.0, 3))) == set(waits_of(Load(5.0, 0.0, 0.0, 3))) == {0.0}


# A simulated queue: first come first served, as the events happen.


class Simulated(NamedTuple):
    load: Load
    wait_s: float
    in_system: float
    """Time average of the jobs there, counted as they come and go."""
    time_s: float
    """Mean from arrival to end."""
    arrivals_per_s: float


SERVICES: dict[str, tuple[Callable[[random.Random], float], float]] = {
    "exponential": (lambda rng: rng.expovariate(1.0), 2.0),
    "constant": (lambda _: 1.0, 1.0),
    "bimodal": (lambda rng: 0.5 if rng.random() < 0.9 else 5.5, 0.9 * 0.25 + 0.1 * 30.25),
}
"""A service time with a mean of one second, and its second moment."""


def simulate(service: str, servers: int, utilisation: float, jobs: int, seed: int) -> Simulated:
    draw, second_moment = SERVICES[service]
    rng = random.Random(f"{service} {servers} {seed}")
    load = Load(utilisation * servers, 1.0, second_moment, servers)
    free_at, now, waited, spent = [0.0] * servers, 0.0, 0.0, 0.0
    changes: list[tuple[float, int]] = []
    for _ in range(jobs):
        now += rng.expovariate(load.arrivals_per_s)
        start = max(now, free_at[0])
        end = start + draw(rng)
        heapq.heapreplace(free_at, end)
        waited, spent = waited + start - now, spent + end - now
        changes += [(now, 1), (end, -1)]
    changes.sort()
    area, there, before = 0.0, 0, 0.0
    for at, change in changes:
        area, there, before = area + there * (at - before), there + change, at
    assert there == 0
    return Simulated(load, waited / jobs, area / before, spent / jobs, jobs / before)


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("service", SERVICES)
def test_a_simulated_queue_waits_as_the_formulas_say(service: str, servers: int) -> None:
    """M/G/1 and M/M/c are exact; M/G/c is an approximation where times are not exponential and servers are several."""
    found = simulate(service, servers, 0.7, 300_000, seed=1)
    exact = servers == 1 or service == "exponential"
    assert found.wait_s == pytest.approx(mgc_wait_s(found.load), rel=0.03 if exact else 0.12)
    if servers == 1:
        assert found.wait_s == pytest.approx(mg1_wait_s(found.load), rel=0.03)
    if service == "exponential":
        assert found.wait_s == pytest.approx(mmc_wait_s(found.load), rel=0.03)
    else:
        assert abs(found.wait_s / mmc_wait_s(found.load) - 1) > 0.25, "M/M/c alone would be wrong"


@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("service", SERVICES)
def test_littles_law_on_a_simulated_queue(service: str, servers: int) -> None:
    found = simulate(service, servers, 0.8, 20_000, seed=2)
    little = Little(found.in_system, found.arrivals_per_s * found.time_s)
    assert little.in_system == pytest.approx(little.expected, rel=1e-6)
    assert little.holds
    assert not Little(little.in_system * 1.2, little.expected).holds


# Plans, worked out by hand.


def cell(model_type: str, device: str | None, jobs: int, service_s: int, *, gpus: int = 1, idle: int = 0) -> Cell:
    """`jobs` of `service_s` each, that waited for 2 s each and left when they had run."""
    ns, us = service_s * 10**9, (2 + service_s) * 10**6
    return Cell(
        model_type, device, gpus, idle, Figures(jobs, jobs * ns, jobs * ns**2, jobs * 2 * 10**6, jobs * us, jobs * us)
    )


def planned(*cells: Cell, span_us: int = HOUR_US, limits: Limits | None = None) -> CapacityPlan:
    return plan_of(cells, START_US, span_us, limits or Limits())


def only(plan: CapacityPlan) -> TypePlan:
    [found] = plan.types
    return found


def test_a_plan_of_two_devices() -> None:
    """300 jobs of 18 s on two devices: 5,400 of 7,200 s, three quarters."""
    found = only(planned(cell("other", "GPU-0", 200, 18), cell("other", "GPU-1", 100, 18, idle=3)))
    assert (found.jobs, found.idle_jobs, found.devices, found.shared_with) == (300, 3, 2, ())
    assert found.arrivals_per_s == pytest.approx(300 / 3_600)
    assert found.service_rate_per_s == pytest.approx(1 / 18)
    assert found.utilisation == pytest.approx(0.75)
    assert found.utilisation == pytest.approx(found.arrivals_per_s / (2 / 18)), "ρ = λ / cμ"
    assert (found.target_percent, found.devices_needed, found.limit_percent) == (70, 3, 70)
    assert found.little == pytest.approx(Little(300 * 20 / 3_600, 300 * 20 / 3_600))
    assert found.measured_wait_s == 2
    assert found.waits is not None
    assert found.waits.mm1_s == pytest.approx(0.75 * 18 / 0.25)
    assert found.waits.mg1_s == pytest.approx(found.waits.mm1_s / 2), "constant times"
    assert found.waits.mmc_s == pytest.approx(18 * 0.75**2 / (1 - 0.75**2)), "M/M/2 in closed form"
    assert found.advice() == (
        "other kept 2 GPUs busy for 75% of the time, above 70 %: add 1 GPU for other; 3 GPUs stay at or below 70 %"
    )


@pytest.mark.parametrize(
    ("model_type", "busy", "limit", "needed"),
    [  # busy parts in a thousand of ten devices
        ("other", 7_000, None, 10),
        ("other", 7_001, 70, 11),
        ("llm", 5_000, None, 10),
        ("llm", 5_001, None, 11),
        ("llm", 7_001, 70, 15),
        ("rectified_flow", 8_500, 70, 13),
        ("rectified_flow", 8_501, 85, 13),
        ("rectified_flow", 12_000, 85, 18),
    ],
)
def test_limits_are_passed_above_them_and_targets_are_kept(
    model_type: str, busy: int, limit: int | None, needed: int
) -> None:
    each = busy * DEVICE_HOUR_NS // 10_000
    figures = Figures(1, each, each**2, 0, 0, 0)
    plan = planned(*(Cell(model_type, f"GPU-{number}", 1, 0, figures) for number in range(10)))
    found = only(plan)
    assert (found.limit_percent, found.devices_needed) == (limit, needed)
    assert plan.failing == (limit == 85)
    assert bool(found.advice()) == (limit is not None)
    if busy >= 10_000:
        assert found.waits is not None
        assert set(found.waits) == {UNBOUNDED}
        assert "grows without bound: add 8 GPUs" in found.advice()


def test_types_on_the_same_devices_wait_in_the_same_queue() -> None:
    plan = planned(cell("llm", "GPU-0", 90, 10), cell("other", "GPU-0", 90, 20), cell("other", "GPU-1", 9, 40))
    llm, other = plan.types
    assert (llm.model_type, llm.shared_with, llm.devices) == ("llm", ("other",), 1)
    assert llm.utilisation == pytest.approx((900 + 1_800) / 3_600), "of its device, whoever used it"
    assert llm.service_rate_per_s == pytest.approx(1 / 10)
    assert llm.load == Load(180 / 3_600, 15.0, (100 + 400) / 2, 1)
    assert (llm.devices_needed, llm.limit_percent) == (2, 70)
    assert "add 1 GPU for llm (also used by other: add them once)" in llm.advice()
    assert (other.devices, other.shared_with) == (2, ("llm",))
    assert other.utilisation == pytest.approx((900 + 1_800 + 360) / 7_200)


def test_jobs_that_name_no_device_are_planned_for_and_never_called_idle_time() -> None:
    found = only(planned(cell("llm", None, 360, 10)))
    assert (found.devices, found.jobs_without_device, found.utilisation, found.waits) == (0, 360, None, None)
    assert found.devices_needed == 2, "one device, busy all of the time, at half of it"
    assert found.service_rate_per_s == pytest.approx(0.1)
    both = only(planned(cell("llm", None, 360, 10), cell("llm", "GPU-0", 36, 10)))
    assert both.utilisation == pytest.approx(0.1)
    assert both.devices_needed == 3


def test_jobs_that_took_no_gpu_time_give_no_rate() -> None:
    plan = planned(Cell("llm", None, 0, 7, Figures()))
    found = only(plan)
    assert (found.jobs, found.idle_jobs, found.service_rate_per_s, found.utilisation) == (0, 7, None, None)
    assert (found.little, found.measured_wait_s, found.devices_needed) == (None, None, 0)
    assert plan.summary() == "2023-11-16T18:00:00Z: nothing ran"
    assert planned().summary() == "2023-11-16T18:00:00Z: nothing ran"


def test_a_device_of_several_gpus_is_one_server() -> None:
    plan = planned(cell("other", "node-0", 150, 20, gpus=8))
    assert only(plan).utilisation == pytest.approx(3_000 / 3_600)
    assert "kept 1 device of 8 GPUs busy" in only(plan).advice()
    assert plan.summary() == ("2023-11-16T18:00:00Z: other 1 device of 8 GPUs busy 83.3%, 2 devices of 8 GPUs needed")


def test_the_part_of_an_hour_that_has_passed() -> None:
    found = only(planned(cell("other", "GPU-0", 30, 10), span_us=600 * 10**6))
    assert (found.arrivals_per_s, found.utilisation) == (0.05, 0.5)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 3 * DEVICE_HOUR_NS)), min_size=1, max_size=5))
def test_the_devices_needed_are_the_fewest_that_keep_to_the_target(cells: list[tuple[int, int]]) -> None:
    found = only(
        planned(
            *(Cell("other", f"GPU-{n}", 1, 0, Figures(jobs, ns, ns, 0, 0, 0)) for n, (jobs, ns) in enumerate(cells))
        )
    )
    busy = sum(ns for _, ns in cells)
    assert Fraction(busy, found.devices_needed * DEVICE_HOUR_NS) <= Fraction(7, 10)
    assert found.devices_needed == 1 or Fraction(busy, (found.devices_needed - 1) * DEVICE_HOUR_NS) > Fraction(7, 10)


@pytest.mark.parametrize("wrong", [{"target_percent": 71}, {"warn_percent": 90}, {"error_percent": 101}])
def test_limits_that_contradict_each_other_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="contradict"):
        Limits(**wrong)


def test_how_figures_are_told() -> None:
    assert [seconds(value) for value in (None, math.inf, 0.0, 0.0314, 12.5)] == [
        *("unknown", "unbounded", "0.0 ms", "31.4 ms", "12.50 s")
    ]
    assert [percent(None), percent(0.7)] == ["unknown", "70.0%"]
    assert [counted(1, 1), counted(2, 1), counted(1, 8)] == ["1 GPU", "2 GPUs", "1 device of 8 GPUs"]
