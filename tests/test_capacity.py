"""Waits and plans of capacity: published values, exact ones, a simulated queue, and hours worked out by hand."""

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


# Published values: what was asked and what was answered, and where that can be read.


@pytest.mark.parametrize(
    ("load", "wait_s"),
    [  # R. Bronson, Operations Research, Schaum, 1982: problems 23.3, 23.14 and 23.16, with their answers at
        # web.ist.utl.pt/mcasquilho/compute/or/Fx-queuevars.php
        (exponential(24 / HOUR, HOUR / 30), HOUR / 6 - HOUR / 30),
        (exponential(30 / HOUR, 1.5 * MINUTE), 4.5 * MINUTE),
        (exponential(1 / MINUTE, 45), 2.25 * MINUTE),
        # J. Heizer, B. Render, Operations Management, module D, Golden Muffler Shop: 2 cars an hour, 3 an hour served
        (exponential(2 / HOUR, HOUR / 3), HOUR * 2 / 3),
    ],
)
def test_mm1_gives_what_textbooks_give(load: Load, wait_s: float) -> None:
    assert mm1_wait_s(load) == pytest.approx(wait_s)
    assert [mg1_wait_s(load), mmc_wait_s(load), mgc_wait_s(load)] == pytest.approx([wait_s] * 3), "special cases all"


@pytest.mark.parametrize(
    ("load", "wait_s", "tolerance"),
    [  # Bronson, problem 24.6, same page: 300 a year of 365 days, two days each, three servers; four digits
        (exponential(300 / (365 * DAY), 2 * DAY, 3), 0.001175 * 365 * DAY, 5e-4),
        # Kelton, Smith, Sturrock, Simio and Simulation, 2014, problem 4.10.14 b: 2.4 a minute, four servers of 0.7:
        # rstudio-pubs-static.s3.amazonaws.com/310276_01b8eca22cdc48ca98898b874337bb9f.html
        (exponential(2.4 / MINUTE, MINUTE / 0.7, 4), 1.7576158 * MINUTE, 1e-7),
        # HP-12C Solutions Handbook, Queuing and Waiting Theory, example 1: 1.2 customers a minute, three tellers, two
        # minutes each; from table 12.2 of R. E. Trueman, An Introduction to Quantitative Methods for Decision Making
        (exponential(1.2 / MINUTE, 2 * MINUTE, 3), 1.079 * 2 * MINUTE, 5e-4),
    ],
)
def test_mmc_gives_what_textbooks_give(load: Load, wait_s: float, tolerance: float) -> None:
    assert mmc_wait_s(load) == pytest.approx(wait_s, rel=tolerance)
    assert mgc_wait_s(load) == pytest.approx(wait_s, rel=tolerance)


def test_mmc_and_littles_law_give_what_a_textbook_gives() -> None:
    """B. Render, R. M. Stair, M. E. Hanna, Quantitative Analysis for Management, alternative example 14.3 of the
    instructor's manual: 20 people an hour, two at a desk, two minutes each; three quarters of a person are there."""
    load = exponential(20 / HOUR, 2 * MINUTE, 2)
    assert load.arrivals_per_s * (mmc_wait_s(load) + load.service_s) == pytest.approx(3 / 4)


@pytest.mark.parametrize(("offered", "servers", "waiting"), [(3.87, 8, 0.05), (4.08, 10, 0.01)])
def test_erlang_c_gives_the_values_of_a_table(offered: float, servers: int, waiting: float) -> None:
    """Table C of scribd.com/document/831962299, and its example: the load in three digits of which so many wait."""
    least, most = (erlang_c(exponential(offered + half, 1.0, servers)) for half in (-0.005, 0.005))
    assert least < waiting < most


def test_constant_service_waits_as_published() -> None:
    """A car wash: 6 cars an hour, 6 minutes each, 0.45 cars waiting (code.policylink.org/comparte/24279479); by the
    formulas for M/D/1 at learn.saylor.org/mod/book/view.php?chapterid=49648&id=61376, section 4.5."""
    load = constant(6 / HOUR, 6 * MINUTE)
    assert load.arrivals_per_s * mg1_wait_s(load) == pytest.approx(0.45)
    assert mg1_wait_s(load) == pytest.approx(mm1_wait_s(load) / 2)


def test_mg1_gives_what_a_textbook_gives() -> None:
    """Simio and Simulation, problem 4.10.14 c, at 309871_0574d3bd19424d52b71dc80383b8b351.html of the same host: one a
    minute, times of a gamma distribution of shape 2 and scale 0.45 minutes; 6.075 minutes."""
    load = Load(1 / MINUTE, 2 * 0.45 * MINUTE, (2 + 2**2) * (0.45 * MINUTE) ** 2)
    assert mg1_wait_s(load) == pytest.approx(6.075 * MINUTE)
    assert mgc_wait_s(load) == pytest.approx(6.075 * MINUTE)


def test_littles_law_gives_what_its_author_gives() -> None:
    """J. D. C. Little, S. C. Graves, Little's Law, chapter 5 of Building Intuition, Springer, 2008: of 160 bottles, 8
    bought a month, one is in the cellar for 1.67 years (funcall.blogspot.com/2011/11/littles-law.html)."""
    months_us = round(1.67 * 12 * HOUR_US)  # an hour stands for a month
    figures = Figures(8, 8, 8, 0, total_us=8 * months_us, in_system_us=160 * HOUR_US)
    found = only(planned(Cell("other", "GPU-0", 1, 0, figures))).little
    assert found is not None
    assert found == pytest.approx((160, 160), rel=5e-3)
    assert found.holds


# Computed here, by the definitions and in fractions: nothing is rounded.


@pytest.mark.parametrize("servers", [1, 2, 3, 8, 14, 55])
@pytest.mark.parametrize("utilisation", [Fraction(percents, 100) for percents in (10, 50, 71, 87, 99)])
def test_erlang_c_is_its_definition(servers: int, utilisation: Fraction) -> None:
    offered = utilisation * servers
    busy = offered**servers / math.factorial(servers) / (1 - utilisation)
    waiting = busy / (sum(offered**n / Fraction(math.factorial(n)) for n in range(servers)) + busy)
    assert erlang_c(exponential(float(offered), 1.0, servers)) == pytest.approx(float(waiting), rel=1e-9)


@pytest.mark.parametrize("times", [{18: 1}, {1: 1, 3: 1}, {1: 9, 40: 1}, {2: 1, 5: 2, 11: 3}])
@pytest.mark.parametrize("utilisation", [Fraction(1, 10), Fraction(7, 10), Fraction(19, 20)])
def test_mg1_is_the_formula_in_its_other_form(times: dict[int, int], utilisation: Fraction) -> None:
    """Pollaczek and Khinchine by the variance: E[W] = ρτ / 2(1 − ρ) · (1 + σ²/τ²); R. B. Cooper, Introduction to
    Queueing Theory, 1981, page 189."""
    each = [time for time, jobs in times.items() for _ in range(jobs)]
    mean = Fraction(sum(each), len(each))
    variance = sum((time - mean) ** 2 for time in each) / len(each)
    wait = utilisation * mean / (2 * (1 - utilisation)) * (1 + variance / mean**2)
    load = Load(float(utilisation / mean), float(mean), sum(time**2 for time in each) / len(each))
    assert mg1_wait_s(load) == pytest.approx(float(wait))
    assert mgc_wait_s(load) == pytest.approx(float(wait))


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
