"""ClickHouse: what the serving component writes best effort, and its repair from the slow path."""

import dagster as dg

from assets import views
from assets.jobs import BACKFILL, HOURS, SEQUENCER, hour_of_key
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
    description="Inserts the hour's missing events into ClickHouse, logs the repair, and reconciles the hour again.",
)
def fast_path_repair(context: dg.AssetExecutionContext, platform: PlatformResource) -> None:
    with platform.open() as open_platform:
        for key in context.partition_keys:
            outcome = open_platform.repair(hour_of_key(key))
            context.log.info(f"{outcome.inserted} inserted; {outcome.after.summary()}")
            context.add_asset_metadata(
                {
                    "inserted": outcome.inserted,
                    "status before": outcome.before.status,
                    "status after": outcome.after.status,
                },
                partition_key=key,
            )


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
