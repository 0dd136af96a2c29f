"""ClickHouse: what the serving component writes best effort, and its repair from the slow path."""

from collections.abc import Iterator
from typing import NoReturn

import dagster as dg

from assets import views
from assets.jobs import BACKFILL, HOURS, SEQUENCER, hour_of_key
from render_platform.errors import PlatformError
from resources.platform import PlatformResource

inference_events = dg.AssetSpec(
    "inference_events",
    deps=["gpu_jobs"],
    group_name="fast_path",
    kinds={"clickhouse"},
    owners=["team:serving"],
    description="Usage events in ClickHouse, best effort, within a second. One row is one event; dashboards read it.",
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
    description="Inserts the hour's missing events into ClickHouse, logs the repair, and reconciles the hour again.",
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
            metadata={"hours": dg.MetadataValue.md("\n".join(f"- {text}" for text in refused[:50]))},
        )
    yield from ()


@dg.asset_check(
    asset="inference_events",
    name="duplicates",
    pool=SEQUENCER,
    description="No event stands twice in ClickHouse. If one does: the day's partition has to be rebuilt.",
)
def duplicates(platform: PlatformResource) -> dg.AssetCheckResult:
    with platform.open() as open_platform:
        twice = open_platform.clickhouse.duplicates()
    return dg.AssetCheckResult(passed=twice == 0, metadata={"rows too many": twice})
