"""CAS writes: sealed batches become content-addressed Parquet with a signed attestation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import views
from assets.checks import ERROR, overbilled
from render_platform.config import Settings
from render_platform.errors import Finding, Unavailable
from resources.platform import PlatformResource


@dg.asset(
    deps=["sealed_batches"],
    group_name="storage",
    kinds={"parquet"},
    owners=["team:billing"],
    description=(
        "Batches as Parquet, named by their SHA-256; nothing is ever rewritten. One row is one usage event; a "
        "materialization counts those of the batches that were not logged before it."
    ),
    metadata={"dagster/column_schema": views.event_columns()},
    check_specs=[
        dg.AssetCheckSpec(
            "digests",
            asset="cas_batches",
            blocking=True,
            description=(
                "What was just stored reads back under its digest, with the rows that were sealed. If not, nothing of "
                "it is logged: restore the object that is named from a copy, and launch the job flush."
            ),
        ),
        dg.AssetCheckSpec(
            "conservation",
            asset="cas_batches",
            blocking=True,
            description=(
                "No device was billed for more GPU time than its jobs ran, in any window of five minutes. If one was, "
                "nothing is logged: see that one meter alone reports the device that is named, then ask its owner."
            ),
        ),
    ],
)
def cas_batches(platform: PlatformResource) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    with platform.open() as open_platform:
        stages = views.Stages(open_platform.clock)
        open_platform.store()
        stages.ended("store")
        stored = open_platform.stored_unlogged()
        broken, error = [], ""
        try:
            broken = [f"{b['batch_id']}, {p}" for b in stored for p in overbilled(open_platform.read_batch(b))]
        except (Finding, Unavailable) as found:
            error = str(found)
        stages.ended("read back")
        yield dg.MaterializeResult(metadata={**_metadata(open_platform.settings, stored), **stages.metadata})
    yield dg.AssetCheckResult(
        check_name="digests",
        passed=not error,
        severity=ERROR,
        description=error or "every batch reads back as it was sealed",
        metadata={"batches stored": len(stored)},
    )
    yield dg.AssetCheckResult(
        check_name="conservation",
        passed=not (broken or error),
        severity=ERROR,
        description="; ".join(broken[:5])
        or ("a batch is not readable" if error else "attributed GPU time is within elapsed time on every device"),
    )


def _metadata(settings: Settings, stored: list[dict[str, Any]]) -> dict[str, Any]:
    objects = [(batch["batch_id"], batch["blob_digest"], batch["blob_size"]) for batch in stored]
    return {
        "dagster/row_count": sum(batch["records"] for batch in stored),
        "batches": views.table(stored, ["batch_id", "records", "gpu_time_ns", "blob_digest", "blob_size"]),
        "objects": views.objects(settings, objects),
        "bytes": sum(size for *_, size in objects),
        "GPU seconds": views.gpu_seconds(sum(int(batch["gpu_time_ns"]) for batch in stored)),
    }
