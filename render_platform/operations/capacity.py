"""How busy the GPUs were in an hour, how long jobs wait for one, and how many are needed: a plan a model type.

The figures are ClickHouse's, of the events recorded in the hour. They are estimates, for people: nothing is billed from
them. What a plan takes for granted:

- A *device* is what events name in `device_uuid`; it has `gpu_count` GPUs, which work on a job together. The devices
  that there are, are those that were named in the hour: one that did nothing is not known.
- The *service time* of a job is how long it keeps its device busy: `gpu_time_ns / gpu_count`. Jobs that share a device
  share its time, so that the sum over a device is the time that it was busy, at most the hour.
- Jobs that took no GPU time (cancelled while they waited, refused by the backend) are counted apart.
- Arrivals are counted where they end: a job belongs to the hour in which its event was recorded.
- Types that run on the same devices wait in the same queue: utilisation and waits are those of all jobs on the devices
  that the type ran on.

Unknown is not zero: an hour that cannot be read raises Unavailable; a rate of no jobs, and the utilisation of devices
that nobody named, are None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from render_platform.clickhouse import ClickHouse
from render_platform.clock import HOUR_US, US_PER_SECOND, iso
from render_platform.entries import parse
from render_platform.errors import Unavailable, UsageError
from render_platform.hours import entries_of_hour
from render_platform.operations.queueing import UNBOUNDED, Load, Waits, waits_of
from render_platform.pipeline import Platform

LITTLE_TOLERANCE = 0.1
"""How far L and λW may be apart, of λW: jobs that are in the system at the hour's edges are only partly in it."""
_NS_PER_SECOND = 1_000_000_000

# Int128: the squares of 10 million jobs of 50 hours add up to less than 2^118. A job is in the system from its queue to
# its end; `in_system_us` is how much of that lies in the hour.
CAPACITY_QUERY = """SELECT model_type, device_uuid, toInt64(max(gpu_count)) AS gpus,
    toInt64(countIf(not ran)) AS idle, toInt64(countIf(ran)) AS jobs,
    toString(sumIf(service, ran)) AS service_ns, toString(sumIf(service * service, ran)) AS service_ns2,
    toString(sumIf(toInt128(queue_time_us), ran)) AS queue_us,
    toString(sumIf(toInt128(total_time_us), ran)) AS total_us,
    toString(sumIf(greatest(toInt128(0), least(ended, toInt128({end:Int64})) -
        greatest(ended - toInt128(queue_time_us) - inference_time_us, toInt128({start:Int64}))), ran)) AS in_system_us
FROM (SELECT model_type, device_uuid, gpu_count, gpu_time_ns > 0 AS ran, queue_time_us, total_time_us,
        inference_time_us, toInt128(intDiv(gpu_time_ns, greatest(gpu_count, 1))) AS service,
        toInt128(toUnixTimestamp64Micro(event_time)) AS ended
    FROM usage_events WHERE recorded_at >= fromUnixTimestamp64Micro({start:Int64}, 'UTC')
        AND recorded_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC'))
GROUP BY model_type, device_uuid ORDER BY model_type, device_uuid"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Shares of the time that GPUs may be busy, in percent. UsageError unless targets ≤ warn ≤ error."""

    target_percent: int = 70
    llm_target_percent: int = 50
    """Lower: tokens come one by one, and whoever reads them notices each that is late."""
    warn_percent: int = 70
    error_percent: int = 85

    def __post_init__(self) -> None:
        targets = (self.target_percent, self.llm_target_percent)
        if not 1 <= min(targets) <= max(targets) <= self.warn_percent <= self.error_percent <= 100:
            raise UsageError("the limits of utilisation contradict each other", "set 1 ≤ targets ≤ warn ≤ error ≤ 100")

    def target_of(self, model_type: str) -> int:
        return self.llm_target_percent if model_type == "llm" else self.target_percent


class Figures(NamedTuple):
    """Exact sums over the jobs that took GPU time."""

    jobs: int = 0
    service_ns: int = 0
    service_ns2: int = 0
    """Of the squares."""
    queue_us: int = 0
    total_us: int = 0
    in_system_us: int = 0


class Cell(NamedTuple):
    """One model type on one device; None where no device was told. `idle` jobs took no GPU time."""

    model_type: str
    device: str | None
    gpus: int
    idle: int
    figures: Figures


class Little(NamedTuple):
    """Little's law, L = λW, from two sides.

    `in_system` (L): the mean number of jobs in the system, by the times at which each was there: from `event_time` less
    `queue_time_us` and `inference_time_us` to `event_time`, as far as that lies in the hour. `expected` (λW): jobs
    recorded a second × the mean of their `total_time_us`, which the gateway measured on its own.
    """

    in_system: float
    expected: float

    @property
    def holds(self) -> bool:
        return abs(self.in_system - self.expected) <= LITTLE_TOLERANCE * self.expected


@dataclass(frozen=True, slots=True)
class TypePlan:
    """The hour of one model type. Rates are a second; `service_rate_per_s` (μ) is of one device that never rests."""

    model_type: str
    jobs: int
    idle_jobs: int
    jobs_without_device: int
    arrivals_per_s: float
    service_rate_per_s: float | None
    devices: int
    gpus_a_device: int
    shared_with: tuple[str, ...]
    """Other types that ran on these devices."""
    load: Load | None
    """Of all jobs on these devices; None where no device is known."""
    waits: Waits | None
    """By each formula, for that load."""
    measured_wait_s: float | None
    """Mean of `queue_time_us` of this type's jobs."""
    little: Little | None
    target_percent: int
    devices_needed: int
    """So that what ran on these devices, and what named none, keeps them busy for no more than the target."""
    limit_percent: int | None
    """The highest limit that utilisation is above: that of a warning or of an error; None where it is above neither."""

    @property
    def utilisation(self) -> float | None:
        """ρ: of the hour that passed, how much the devices were busy."""
        return None if self.load is None else self.load.utilisation

    def advice(self) -> str:
        """What to do where a limit was passed; empty where none was."""
        if self.load is None or self.limit_percent is None:
            return ""
        have, need = (counted(number, self.gpus_a_device) for number in (self.devices, self.devices_needed))
        more = counted(self.devices_needed - self.devices, self.gpus_a_device)
        shared = f" (also used by {', '.join(self.shared_with)}: add them once)" if self.shared_with else ""
        waits = "; the queue grows without bound" if self.load.utilisation >= 1 else ""
        return (
            f"{self.model_type} kept {have} busy for {self.load.utilisation:.0%} of the time, above "
            f"{self.limit_percent} %{waits}: add {more} for {self.model_type}{shared}; {need} stay at or below "
            f"{self.target_percent} %"
        )


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """The hour, of which `span_us` had passed; a TypePlan for each model type that was recorded, by name."""

    hour_us: int
    span_us: int
    types: tuple[TypePlan, ...]
    limits: Limits

    @property
    def failing(self) -> bool:
        """Whether utilisation is above the limit of an error anywhere."""
        return any(plan.limit_percent == self.limits.error_percent for plan in self.types)

    def advice(self) -> list[str]:
        return [text for plan in self.types if (text := plan.advice())]

    def summary(self) -> str:
        """One line: how busy the GPUs of each type were."""
        told = [
            f"{plan.model_type} {counted(plan.devices, plan.gpus_a_device)} busy {percent(plan.utilisation)}, "
            f"{counted(plan.devices_needed, plan.gpus_a_device)} needed"
            for plan in self.types
            if plan.jobs
        ]
        return f"{iso(self.hour_us)}: {'; '.join(told) or 'nothing ran'}"


def plan_hour(platform: Platform, hour_us: int, limits: Limits | None = None) -> CapacityPlan:
    """The plan of one hour, as far as it has passed.

    Unavailable where ClickHouse cannot be read, no longer keeps the hour, or holds nothing of an hour of which the log
    has events; UsageError for an hour that has not begun.
    """
    span_us = min(HOUR_US, platform.clock.now_us() - hour_us)
    if span_us <= 0 or hour_us % HOUR_US:
        raise UsageError(f"{iso(hour_us)} is not an hour that has begun", "give the begin of an earlier one")
    if hour_us < platform.reconciler.kept_from():
        raise Unavailable(f"ClickHouse no longer keeps {iso(hour_us)}", "see retention_days")
    cells = read_cells(platform.clickhouse, hour_us, hour_us + span_us)
    if not cells:
        _require_nothing_logged(platform, hour_us)
    return plan_of(cells, hour_us, span_us, limits or Limits())


def _require_nothing_logged(platform: Platform, hour_us: int) -> None:
    """The fast path is best effort: that it holds nothing does not mean that nothing ran."""
    with platform.database.read() as connection:
        entries = entries_of_hour(connection, hour_us, "usage_batch")
    if events := sum(parse(entry).records for entry in entries):
        raise Unavailable(
            f"ClickHouse holds none of the {events} events of {iso(hour_us)}", "repair the hour, and ask again"
        )


def read_cells(clickhouse: ClickHouse, start_us: int, end_us: int) -> list[Cell]:
    """What was recorded in [start_us, end_us), by model type and device. Unavailable where it cannot be read."""
    rows = clickhouse.query(CAPACITY_QUERY, start=start_us, end=end_us).to_pylist()
    return [
        Cell(
            row["model_type"],
            row["device_uuid"],
            row["gpus"],
            row["idle"],
            Figures(*(int(row[name]) for name in Figures._fields)),
        )
        for row in rows
    ]


def plan_of(cells: Sequence[Cell], hour_us: int, span_us: int, limits: Limits) -> CapacityPlan:
    """The plan that follows from what was recorded in `span_us` of an hour."""
    types = sorted({cell.model_type for cell in cells})
    return CapacityPlan(hour_us, span_us, tuple(_plan_type(name, cells, span_us, limits) for name in types), limits)


def _plan_type(model_type: str, cells: Sequence[Cell], span_us: int, limits: Limits) -> TypePlan:
    own = [cell for cell in cells if cell.model_type == model_type]
    ran = [cell for cell in own if cell.figures.jobs]
    devices = {cell.device for cell in ran if cell.device is not None}
    on_them = [cell for cell in cells if cell.device in devices and cell.figures.jobs]
    nowhere = _total(cell.figures for cell in ran if cell.device is None)
    total, shared = _total(cell.figures for cell in ran), _total(cell.figures for cell in on_them)
    target, span_s = limits.target_of(model_type), span_us / US_PER_SECOND
    load = _load_of(shared, span_s, len(devices)) if devices else None
    return TypePlan(
        model_type=model_type,
        jobs=total.jobs,
        idle_jobs=sum(cell.idle for cell in own),
        jobs_without_device=nowhere.jobs,
        arrivals_per_s=total.jobs / span_s,
        service_rate_per_s=total.jobs * _NS_PER_SECOND / total.service_ns if total.service_ns else None,
        devices=len(devices),
        gpus_a_device=max((cell.gpus for cell in ran), default=1),
        shared_with=tuple(sorted({cell.model_type for cell in on_them} - {model_type})),
        load=load,
        waits=None if load is None else waits_of(load),
        measured_wait_s=total.queue_us / total.jobs / US_PER_SECOND if total.jobs else None,
        little=Little(total.in_system_us / span_us, total.total_us / span_us) if total.jobs else None,
        target_percent=target,
        devices_needed=_ceil(100 * (shared.service_ns + nowhere.service_ns), target * span_us * 1_000),
        limit_percent=_passed(shared.service_ns, len(devices) * span_us * 1_000, limits),
    )


def _load_of(figures: Figures, span_s: float, devices: int) -> Load:
    service_s = figures.service_ns / figures.jobs / _NS_PER_SECOND
    service_s2 = figures.service_ns2 / figures.jobs / _NS_PER_SECOND**2
    return Load(figures.jobs / span_s, service_s, service_s2, devices)


def _passed(busy_ns: int, available_ns: int, limits: Limits) -> int | None:
    """The highest limit that is passed, in integers: at the limit itself it is not."""
    found = (limit for limit in (limits.error_percent, limits.warn_percent) if 100 * busy_ns > limit * available_ns)
    return next(found, None)


def _total(figures: Iterable[Figures]) -> Figures:
    return Figures(*(sum(column) for column in zip(Figures(), *figures, strict=True)))


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def counted(devices: int, gpus_a_device: int) -> str:
    """`3 GPUs`, or `3 devices of 8 GPUs`."""
    noun = "GPU" if gpus_a_device == 1 else "device"
    of = "" if gpus_a_device == 1 else f" of {gpus_a_device} GPUs"
    return f"{devices:,} {noun}{'' if devices == 1 else 's'}{of}"


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def seconds(value: float | None) -> str:
    """`12.5 s`, `3.1 ms`, `unbounded`; `unknown` for None."""
    if value is None:
        return "unknown"
    if value == UNBOUNDED:
        return "unbounded"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1_000:,.1f} ms"
