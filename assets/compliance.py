"""Audit log, its verification, and reconciliation of the slow path with the fast one."""

from collections.abc import Iterator

import dagster as dg

from assets import views
from assets.jobs import BACKFILL, DAYS, HOURS, SEQUENCER, day_of_key, hour_of_key
from render_platform.errors import Finding, PlatformError, Unavailable
from resources.platform import PlatformResource


@dg.asset(
    deps=["cas_batches"],
    group_name="compliance",
    kinds={"json"},
    owners=["team:compliance"],
    pool=SEQUENCER,
    description="The signed, hash-chained log. One row is one entry; a checkpoint signs the Merkle root over all.",
    check_specs=[
        dg.AssetCheckSpec(
            "chain_and_signature",
            asset="audit_log",
            blocking=True,
            description="The checkpoint's signature holds, and the newest entries chain and are the ones it covers.",
        )
    ],
)
def audit_log(platform: PlatformResource) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    with platform.open() as open_platform:
        state = open_platform.log_batches()
        yield dg.MaterializeResult(metadata={"entries added": state.logged, **views.checkpoint(state.checkpoint)})
        try:
            checked = open_platform.log.check_tail()
        except (Finding, Unavailable) as error:
            yield dg.AssetCheckResult(check_name="chain_and_signature", passed=False, description=str(error))
        else:
            yield dg.AssetCheckResult(
                check_name="chain_and_signature", passed=True, metadata={"entries checked": checked}
            )


@dg.asset(
    deps=["audit_log"],
    partitions_def=DAYS,
    backfill_policy=BACKFILL,
    group_name="compliance",
    kinds={"parquet", "json"},
    owners=["team:compliance"],
    description="A day's batches, re-read row by row, against the log and its checkpoint. One row is one day.",
)
def audit_verification(context: dg.AssetExecutionContext, platform: PlatformResource) -> None:
    keys = context.partition_keys
    start, end = day_of_key(keys[0])[0], day_of_key(keys[-1])[1]
    with platform.open() as open_platform:
        outcome = open_platform.verify(deep=True, start_us=start, end_us=end, only_range=True)
    for key in keys:
        hours = range(*day_of_key(key))
        read = [figures for hour, figures in outcome.hours.items() if hour in hours]
        metadata = {
            "dagster/partition_row_count": sum(figures.records for figures in read),
            "batches re-read": sum(figures.batches for figures in read),
            "events re-read": sum(figures.records for figures in read),
            "GPU seconds": views.gpu_seconds(sum(figures.gpu_time_ns for figures in read)),
            "entries": outcome.entries,
        }
        if len(keys) == 1:  # the checkpoint's text would be copied into the event of every partition of a range
            metadata |= views.checkpoint(outcome.checkpoint)
        context.add_asset_metadata(metadata, partition_key=key)
    if not outcome.verified:
        found = outcome.problems[:50]
        problems = "\n".join(f"- `{p.where}`: {p.what}, since {p.since or '?'}; in doubt: {p.doubt}" for p in found)
        raise dg.Failure("the evidence does not verify", metadata={"problems": dg.MetadataValue.md(problems)})


@dg.asset(
    deps=["audit_log", "inference_events"],
    partitions_def=HOURS,
    backfill_policy=BACKFILL,
    group_name="compliance",
    kinds={"duckdb", "clickhouse"},
    owners=["team:compliance"],
    output_required=False,
    description="The hour's verdict, by five minutes, customer and model: DuckDB over the log against ClickHouse.",
    check_specs=[
        dg.AssetCheckSpec(
            "threshold",
            asset="reconciliation",
            description=(
                "Every hour reported so far is reconciled. If not: materialize fast_path_repair for the hours named."
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
            last = open_platform.hours.last_report(hour_of_key(key))
            try:
                report = open_platform.reconcile(hour_of_key(key))
            except PlatformError as error:  # the log or SQL; what either side cannot give is in the report
                unread.append(f"{key}: {error}")
                continue
            metadata = {**views.verdict(report), "changed": views.change(report, last, open_platform.cas.get)}
            if report.status == "unavailable":
                unread.append(report.summary())
            elif len(keys) == 1:  # what comes after it in the same run needs a result; tables are for one hour alone
                tables = {"windows": views.windows(report), "findings": views.findings(report)}
                context.log.info(report.summary())
                yield dg.MaterializeResult(metadata={**metadata, **tables})
            else:
                said = report.summary()
                context.log_event(
                    dg.AssetMaterialization("reconciliation", description=said, metadata=metadata, partition=key)
                )
        yield _threshold(open_platform.hours.unreconciled(open_platform.reconciler.kept_from()))
    if unread:
        raise dg.Failure(
            f"{len(unread)} of {len(keys)} hours could not be read: {unread[0]}",
            metadata={"hours": dg.MetadataValue.md("\n".join(f"- {text}" for text in unread[:50]))},
        )


def _threshold(bad: list[tuple[str, str]]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="threshold",
        passed=not bad,
        description="; ".join(f"{name} is {status}" for name, status in bad[:10]) or "every report is reconciled",
        metadata={"hours": [name for name, _ in bad[:50]]},
    )
