"""ClickHouse: what the serving component writes best effort, and its repair from the slow path."""

from collections.abc import Iterator
from typing import NoReturn

import dagster as dg

from assets import views
from assets.checks import Look, result_of
from assets.jobs import BACKFILL, HOURS, SEQUENCER, hour_of_key
from render_platform.errors import PlatformError
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

inference_events = dg.AssetSpec(
    "inference_events",
    deps=["gpu_jobs"],
    group_name="fast_path",
    kinds={"clickhouse"},
    owners=["team:serving"],
    description=(
        "Usage events in ClickHouse, best effort, within a second, by the serving component. One row is one event; "
        "dashboards read it. The check fast_path_freshness observes how many rows there are, and how new they are."
    ),
    metadata={"dagster/column_schema": views.event_columns()},
)


@dg.asset(
    deps=["reconciliation"],
    partitions_def=HOURS,
    backfill_policy=BACKFILL,
    group_name="fast_path",
    kinds={"clickhouse"},
    owners=["team:compliance"],
    pool=SEQUENCER,
    output_required=False,
    description=(
        "Makes ClickHouse hold the hour as the batches have it, logs that, and reconciles the hour again. One row is "
        "one hour's repair; an hour that needs none is materialized too, and nothing is inserted."
    ),
    metadata={"dagster/column_schema": views.repair_columns()},
)
def fast_path_repair(context: dg.AssetExecutionContext, platform: PlatformResource) -> Iterator[NoReturn]:
    """Each hour is materialized when it was repaired; one that is refused does not stop the others."""
    refused = []
    with platform.open() as open_platform:
        for key in context.partition_keys:
            try:
                outcome = open_platform.repair(hour_of_key(key))
            except PlatformError as error:
                refused.append(f"{key}: {error}")
                continue
            refused += [f"{key}: {outcome.refused}"] if outcome.refused else []
            said, metadata = outcome.after.summary(), views.repair(outcome)
            context.log_event(
                dg.AssetMaterialization("fast_path_repair", description=said, metadata=metadata, partition=key)
            )
    if refused:
        raise dg.Failure(
            f"{len(refused)} of {len(context.partition_keys)} hours were not repaired: {refused[0]}",
            metadata={"hours": views.problems(refused)},
        )
    yield from ()


@dg.asset_check(
    asset="inference_events",
    name="duplicates",
    pool=SEQUENCER,
    description=(
        "No event stands twice in ClickHouse, over all that it keeps. If one does: reconcile the hours, which names "
        "them, and materialize fast_path_repair for one: it rebuilds the day. Reads every id: once a day is enough."
    ),
)
def duplicates(platform: PlatformResource) -> dg.AssetCheckResult:
    def look(opened: Platform) -> Look:
        twice = opened.clickhouse.duplicates()
        return Look(twice == 0, f"{twice} rows stand beside an earlier one of their event", {"rows too many": twice})

    return result_of(platform, look)
