"""Audit log, its verification, and reconciliation of the slow path with the fast one."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import plots, views
from assets.checks import ERROR
from assets.daily import day_of_batches
from assets.jobs import BACKFILL, DAYS, HOURS, SEQUENCER, day_of_key, hour_of_key
from render_platform.clock import HOUR_US, iso
from render_platform.errors import Finding, PlatformError, Unavailable
from render_platform.evidence import Verification
from render_platform.pipeline import Platform
from render_platform.reconciliation import HourReport
from resources.platform import PlatformResource


@dg.asset(
    deps=["cas_batches"],
    group_name="compliance",
    kinds={"json"},
    owners=["team:compliance"],
    pool=SEQUENCER,
    description="The signed, hash-chained log. One row is one entry; a checkpoint signs the Merkle root over all.",
    metadata={"dagster/column_schema": views.entry_columns()},
    check_specs=[
        dg.AssetCheckSpec(
            "chain_and_signature",
            asset="audit_log",
            blocking=True,
            description=(
                "The checkpoint's signature holds, and the newest entries chain and are the ones it covers. If not: "
                "append nothing by hand; run `render-platform verify`, and where the database was restored from a "
                "copy, `render-platform recover`."
            ),
        )
    ],
)
def audit_log(platform: PlatformResource) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    with platform.open() as open_platform:
        stages = views.Stages(open_platform.clock)
        state = open_platform.log_batches()
        stages.ended("log and publish")
        yield dg.MaterializeResult(
            metadata={
                "dagster/row_count": state.checkpoint.size if state.checkpoint else 0,
                "entries added": state.logged,
                **views.checkpoint(state.checkpoint),
                "at the gateway": dg.MetadataValue.md(
                    views.link(open_platform.settings, "audit/checkpoint", "the checkpoint, for auditors")
                ),
                **stages.metadata,
            }
        )
        said, checked = "", 0
        try:
            checked = open_platform.log.check_tail()
        except (Finding, Unavailable) as error:
            said = str(error)
    yield dg.AssetCheckResult(
        check_name="chain_and_signature",
        passed=not said,
        severity=ERROR,
        description=said or "the newest entries chain, and are those that the checkpoint covers",
        metadata={"entries checked": checked},
    )


@dg.asset(
    deps=["audit_log"],
    partitions_def=DAYS,
    backfill_policy=BACKFILL,
    group_name="compliance",
    kinds={"parquet", "json"},
    owners=["team:compliance"],
    output_required=False,
    description=(
        "A day's batches, re-read row by row, against the log and its checkpoint. One row is one usage event, as its "
        "batch holds it; a day whose evidence does not verify is not materialized."
    ),
    metadata={"dagster/column_schema": views.event_columns()},
    check_specs=[
        dg.AssetCheckSpec(
            "billed_once",
            asset="audit_verification",
            blocking=True,
            description=(
                "No event and no job stands in two batches of the days that were read last. If one does: bill neither; "
                "run `render-platform verify --deep` to see all of them, and correct the later batch's charges."
            ),
        )
    ],
)
def audit_verification(
    context: dg.AssetExecutionContext, platform: PlatformResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    keys = context.partition_keys
    start, end = day_of_key(keys[0])[0], day_of_key(keys[-1])[1]
    with platform.open() as open_platform:
        stages = views.Stages(open_platform.clock)
        outcome = open_platform.verify(deep=True, start_us=start, end_us=end, only_range=True)
        stages.ended("verify")
        yield billed_once(outcome)
        if not outcome.verified:
            found = [f"`{p.where}`: {p.what}, since {p.since or '?'}; in doubt: {p.doubt}" for p in outcome.problems]
            raise dg.Failure("the evidence does not verify", metadata={"problems": views.problems(found)})
        for key in keys:
            context.add_asset_metadata(_reread(outcome, range(*day_of_key(key))), partition_key=key)
        if len(keys) > 1:  # what stands in the result is copied into the event of every partition of a range
            yield dg.MaterializeResult()
            return
        with platform.duckdb.get_connection() as connection:
            used = day_of_batches(open_platform, connection, start, end)
        stages.ended("add up")
        yield dg.MaterializeResult(
            metadata={
                **views.checkpoint(outcome.checkpoint),
                "top customers": views.customers(used.by_customer),
                "GPU seconds by model": plots.svg(plots.gpu_seconds_by_model(used.by_model)),
                **stages.metadata,
            }
        )


def _reread(outcome: Verification, day: range) -> dict[str, Any]:
    read = [figures for hour, figures in outcome.hours.items() if hour in day]
    return {
        "dagster/partition_row_count": sum(figures.records for figures in read),
        "batches re-read": sum(figures.batches for figures in read),
        "events re-read": sum(figures.records for figures in read),
        "GPU seconds": views.gpu_seconds(sum(figures.gpu_time_ns for figures in read)),
        "entries": outcome.entries,
    }


def billed_once(outcome: Verification) -> dg.AssetCheckResult:
    """Of rows that could not be read nobody knows: any problem fails it."""
    said = ("stands twice", "bill the same batch")
    twice = [f"{p.where}: {p.what}" for p in outcome.problems if any(words in p.what for words in said)]
    unknown = "" if outcome.verified else f"unknown: the evidence has {len(outcome.problems)} problems"
    return dg.AssetCheckResult(
        check_name="billed_once",
        passed=outcome.verified,
        severity=ERROR,
        description="; ".join(twice[:5]) or unknown or "every event and every job is billed once",
        metadata={"events read": outcome.deep_records},
    )


@dg.asset(
    deps=["audit_log", "inference_events"],
    partitions_def=HOURS,
    backfill_policy=BACKFILL,
    group_name="compliance",
    kinds={"duckdb", "clickhouse"},
    owners=["team:compliance"],
    output_required=False,
    description=(
        "The hour's verdict: DuckDB over the logged batches against ClickHouse, by customer and model. One row is one "
        "window of five minutes; the row count is of the events that were compared."
    ),
    metadata={"dagster/column_schema": views.window_columns()},
    check_specs=[
        dg.AssetCheckSpec(
            "threshold",
            asset="reconciliation",
            description=(
                "Every hour reported so far is reconciled. If one is discrepant: materialize fast_path_repair for it. "
                "If one is out of date, or not reported: launch reconcile for it, and see why its last runs failed."
            ),
        )
    ],
)
def reconciliation(
    context: dg.AssetExecutionContext, platform: PlatformResource
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Each hour is materialized when it was read, one that was not is not; of a run that is killed, those before it."""
    keys = context.partition_keys
    unread = []
    with platform.open() as open_platform:
        for key in keys:
            stages = views.Stages(open_platform.clock)
            last = open_platform.hours.last_report(hour_of_key(key))
            try:
                report = open_platform.reconcile(hour_of_key(key))
            except PlatformError as error:  # the log or SQL; what either side cannot give is in the report
                unread.append(f"{key}: {error}")
                continue
            stages.ended("reconcile")
            changed = views.change(report, last, open_platform.cas.get)
            metadata = {**views.verdict(report), "changed": changed, **stages.metadata}
            if report.status == "unavailable":
                unread.append(report.summary())
            elif len(keys) == 1:  # what comes after it in the same run needs a result; tables are for one hour alone
                context.log.info(report.summary())
                yield dg.MaterializeResult(metadata={**metadata, **_of_one_hour(open_platform, report)})
            else:
                said = report.summary()
                context.log_event(
                    dg.AssetMaterialization("reconciliation", description=said, metadata=metadata, partition=key)
                )
        yield _threshold(open_platform.hours.unreconciled(open_platform.reconciler.kept_from()))
    if unread:
        raise dg.Failure(
            f"{len(unread)} of {len(keys)} hours could not be read: {unread[0]}",
            metadata={"hours": views.problems(unread)},
        )


def _of_one_hour(platform: Platform, report: HourReport) -> dict[str, Any]:
    """Tables; and of an hour that is over, once and not every five minutes, who used it, a plot, and its objects."""
    tables: dict[str, Any] = {"windows": views.windows(report), "findings": views.findings(report)}
    if not report.final:
        return tables
    try:
        used: Any = views.customers_of(platform.clickhouse.customer_usage(report.hour_us, report.hour_us + HOUR_US))
    except Unavailable as error:  # it was read a moment ago, and the verdict stands
        used = f"unknown: {error}"
    last = platform.hours.last_report(report.hour_us)
    named = [(f"report, revision {last.revision}", last.digest, None)] if last else []
    figures = [(iso(one.start_us)[11:16], one.events, one.fast_events) for one in report.windows]
    return {
        **tables,
        "top customers": used,
        "objects": views.objects(platform.settings, [*named, *(("batch", digest, None) for digest in report.batches)]),
        "events by window": plots.svg(plots.windows(figures)),
    }


def _threshold(bad: list[tuple[str, str]]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="threshold",
        passed=not bad,
        severity=ERROR,
        description="; ".join(f"{name} is {status}" for name, status in bad[:10]) or "every report is reconciled",
        metadata={"hours": [name for name, _ in bad[:50]]},
    )
