"""CAS writes: sealed batches become content-addressed Parquet with a signed attestation."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg

from assets import views
from render_platform.errors import Finding, Unavailable
from render_platform.metering import conservation
from resources.platform import PlatformResource


@dg.asset(
    deps=["sealed_batches"],
    group_name="storage",
    kinds={"parquet"},
    owners=["team:billing"],
    description="Batches as Parquet, named by their SHA-256. One row is one usage event; nothing is ever rewritten.",
    metadata={"dagster/column_schema": views.event_columns()},
    check_specs=[
        dg.AssetCheckSpec(
            "digests",
            asset="cas_batches",
            blocking=True,
            description="What was just stored reads back under its digest, with the rows that were sealed.",
        ),
        dg.AssetCheckSpec(
            "conservation",
            asset="cas_batches",
            blocking=True,
            description="No device was billed for more GPU time than the union of its jobs' run times.",
        ),
    ],
)
def cas_batches(platform: PlatformResource) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    with platform.open() as open_platform:
        open_platform.store()
        stored = open_platform.stored_unlogged()
        columns = ["batch_id", "records", "gpu_time_ns", "blob_digest", "blob_size"]
        yield dg.MaterializeResult(
            metadata={
                "dagster/row_count": sum(batch["records"] for batch in stored),
                "batches": views.table(stored, columns),
            }
        )
        try:
            broken = [f"{b['batch_id']}: {p}" for b in stored for p in conservation(open_platform.read_batch(b))]
        except (Finding, Unavailable) as error:
            yield dg.AssetCheckResult(check_name="digests", passed=False, description=str(error))
            yield dg.AssetCheckResult(check_name="conservation", passed=False, description="a batch is not readable")
            return
        yield dg.AssetCheckResult(check_name="digests", passed=True, metadata={"batches read": len(stored)})
        yield dg.AssetCheckResult(
            check_name="conservation",
            passed=not broken,
            description="; ".join(broken[:5]) or "attributed GPU time is within elapsed time on every device",
        )
