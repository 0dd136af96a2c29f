"""How many GPUs are needed: each hour's utilisation and waits by model type, from ClickHouse."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets import plots, views
from assets.jobs import BACKFILL, HOURS, hour_of_key
from render_platform.clock import iso
from render_platform.errors import PlatformError
from render_platform.operations.capacity import CapacityPlan, TypePlan, counted, percent, plan_hour, seconds
from render_platform.operations.queueing import Load, mgc_wait_s, mmc_wait_s
from resources.platform import PlatformResource

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = [step / 100 for step in range(2, 97, 2)]
"""The utilisations at which a curve is drawn: at 1 it has no end."""

COLUMNS = {
    "model type": ("string", "llm, rectified_flow or other"),
    "jobs": ("int", "Jobs that took GPU time and were recorded in the hour"),
    "λ, jobs/s": ("float", "Arrivals a second"),
    "μ, jobs/s": ("float", "Jobs a second that one GPU serves that never rests: 1 / mean GPU time"),
    "GPUs": ("int", "Devices named in the hour; one of several GPUs counts once"),
    "ρ": ("string", "Utilisation of these devices, by all that ran on them"),
    "target ρ": ("string", "What it should be at most"),
    "GPUs needed": ("int", "The fewest that keep to the target"),
    "wait": ("string", "Mean time in the queue, as measured"),
    "M/G/c": ("string", "The wait by theory: one queue before all GPUs, service times as they were"),
    "M/M/c": ("string", "The same for exponential service times (Erlang C)"),
    "M/G/1": ("string", "A queue a GPU, service times as they were (Pollaczek and Khinchine)"),
    "M/M/1": ("string", "A queue a GPU, exponential service times"),
    "L": ("float", "Mean number of jobs in the system, by the times at which each was there"),
    "λW": ("float", "Arrivals a second × mean time from request to answer; Little's law: L = λW"),
    "L = λW": ("string", "Whether both agree within 10 %"),
    "no device": ("int", "Jobs that named no device: they count for the GPUs needed, not for ρ"),
    "no GPU time": ("int", "Jobs that ended without any, and count for nothing here"),
    "shared with": ("string", "Other types on the same devices"),
}


@dg.asset(
    deps=["inference_events"],
    partitions_def=HOURS,
    backfill_policy=BACKFILL,
    group_name="operations",
    kinds={"clickhouse"},
    owners=["team:operations"],
    output_required=False,
    description=(
        "How busy the GPUs were in an hour, how long jobs waited for one, and how many are needed. One row is one "
        "model type. Estimates, from the fast path: docs/capacity.md has the formulas."
    ),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[dg.TableColumn(name, kind, description) for name, (kind, description) in COLUMNS.items()]
        )
    },
    check_specs=[
        dg.AssetCheckSpec(
            "utilisation",
            asset="capacity_plan",
            description=(
                "The GPUs of each model type were busy for at most 70 % of each hour of the run (a warning above it) "
                "and never above 85 % (an error; it stops nothing). If not: add the GPUs that the text names, or send "
                "less of that type to them."
            ),
        )
    ],
)
def capacity_plan(
    context: dg.AssetExecutionContext, platform: PlatformResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Each hour is materialized when it was read; one that was not does not stop the others."""
    keys = context.partition_keys
    plans, unread = [], []
    with platform.open() as open_platform:
        for key in keys:
            try:
                plan = plan_hour(open_platform, hour_of_key(key))
            except PlatformError as error:
                unread.append(f"{key}: {error}")
                continue
            plans.append(plan)
            context.log.info(plan.summary())
            if len(keys) == 1:  # what comes after it in the same run needs a result; plots are for one hour alone
                yield dg.MaterializeResult(metadata=figures_of(plan) | table_and_plot(plan))
            else:
                said = plan.summary()
                context.log_event(
                    dg.AssetMaterialization("capacity_plan", description=said, metadata=figures_of(plan), partition=key)
                )
    if plans:
        yield utilisation(plans)
    if unread:
        raise dg.Failure(
            f"{len(unread)} of {len(keys)} hours could not be read: {unread[0]}",
            metadata={"hours": dg.MetadataValue.md("\n".join(f"- {text}" for text in unread[:50]))},
        )


def utilisation(plans: list[CapacityPlan]) -> dg.AssetCheckResult:
    """The check: what to do for each type that passed a limit, the newest hour first."""
    texts = [f"{iso(plan.hour_us)}: {text}" for plan in reversed(plans) for text in plan.advice()]
    return dg.AssetCheckResult(
        check_name="utilisation",
        passed=not texts,
        severity=dg.AssetCheckSeverity.ERROR if any(p.failing for p in plans) else dg.AssetCheckSeverity.WARN,
        description="; ".join(texts[:10]) or plans[-1].summary(),
        metadata={"hours looked at": len(plans), "passed limits": len(texts)},
    )


def figures_of(plan: CapacityPlan) -> dict[str, Any]:
    """A few numbers: they stand in the event of each partition of a range, and Dagster draws them over time."""
    found: dict[str, Any] = {"summary": plan.summary(), "dagster/partition_row_count": len(plan.types)}
    for one in plan.types:
        found[f"{one.model_type}: jobs"] = one.jobs
        found[f"{one.model_type}: GPUs needed"] = one.devices_needed
        if one.utilisation is not None:
            found[f"{one.model_type}: utilisation in %"] = round(100 * one.utilisation, 2)
        if one.measured_wait_s is not None:
            found[f"{one.model_type}: mean wait in s"] = round(one.measured_wait_s, 6)
    return found


def table_and_plot(plan: CapacityPlan) -> dict[str, Any]:
    """Too large for the event of each partition of a range."""
    found: dict[str, Any] = {"plan": views.table([row_of(one) for one in plan.types], list(COLUMNS))}
    loads = {
        f"{one.model_type}: {counted(one.devices, one.gpus_a_device)}": (one.load, one.measured_wait_s or 0.0)
        for one in plan.types
        if one.load is not None and one.load.service_s
    }
    if loads:
        found["wait against utilisation"] = plots.svg(plot(loads, plan.limits.warn_percent))
    if advice := plan.advice():
        found["what to do"] = dg.MetadataValue.md("\n".join(f"- {text}" for text in advice))
    return found


def row_of(one: TypePlan) -> dict[str, Any]:
    rate, waits, little = one.service_rate_per_s, one.waits, one.little
    in_theory = (waits.mgc_s, waits.mmc_s, waits.mg1_s, waits.mm1_s) if waits else (None,) * 4
    law = (round(little.in_system, 3), round(little.expected, 3)) if little else ("unknown",) * 2
    values = [
        one.model_type,
        one.jobs,
        round(one.arrivals_per_s, 4),
        "unknown" if rate is None else round(rate, 4),
        one.devices,
        percent(one.utilisation),
        f"{one.target_percent} %",
        one.devices_needed,
        *map(seconds, (one.measured_wait_s, *in_theory)),
        *law,
        "unknown" if little is None else "holds" if little.holds else "differs",
        one.jobs_without_device,
        one.idle_jobs,
        ", ".join(one.shared_with),
    ]
    return dict(zip(COLUMNS, values, strict=True))


def plot(loads: Mapping[str, tuple[Load, float]], warn_percent: int) -> "Figure":
    """By title, the load on a type's GPUs and the wait in s that was measured: theory as curves, the hour as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.6 * len(loads), 3.4), layout="constrained")
    grid = figure.subplots(1, len(loads), squeeze=False)
    for axes, (title, (load, measured_s)) in zip(grid[0], loads.items(), strict=True):
        _draw(axes, load, measured_s)
        axes.set_title(title)
        axes.axvline(warn_percent, color=plots.INK, linewidth=0.8, linestyle="--")
    grid[0][0].set_ylabel("mean wait, s")
    grid[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    return figure


def _draw(axes: "Axes", load: Load, measured_s: float) -> None:
    at_x = [100 * share for share in DRAWN]
    for label, wait_s, style in (("M/G/c", mgc_wait_s, "-"), ("M/M/c", mmc_wait_s, ":")):
        axes.plot(at_x, [wait_s(load.at(share)) for share in DRAWN], style, label=label)
    here = 100 * load.utilisation
    axes.plot([here], [measured_s], "o", color="#d1495b", label="measured")
    axes.plot([here], [mgc_wait_s(load)], "x", color="#d1495b", label="by M/G/c")  # unbounded: not drawn
    axes.set_xlim(0, max(100.0, 1.05 * here))
    axes.set_ylim(0, 1.1 * max(measured_s, mgc_wait_s(load.at(min(max(load.utilisation, 0.9), 0.96)))))
    axes.set_xlabel("utilisation, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
