"""What the serving component records, and the billing flush that seals it."""

from __future__ import annotations

import dagster as dg

from assets import views
from resources.platform import PlatformResource

gpu_jobs = dg.AssetSpec(
    "gpu_jobs",
    group_name="serving",
    description=(
        "Finished GPU jobs. One row is one job's usage event in the outbox, committed with the job's end. A "
        "materialization says how many jobs a gateway committed in a range of recorded_at, by model and status."
    ),
    kinds={"sqlite"},
    owners=["team:serving"],
    metadata={"dagster/column_schema": views.event_columns()},
)
"""Written by the serving component with the end of each job, and reported by it; never computed by Dagster."""


@dg.asset(
    deps=["gpu_jobs"],
    group_name="billing",
    kinds={"sqlite"},
    owners=["team:billing"],
    description=(
        "Batches of usage events of one hour, closed for good. One row is one batch with its Merkle root; a "
        "materialization counts those that this flush sealed."
    ),
    metadata={"dagster/column_schema": views.batch_columns()},
)
def sealed_batches(platform: PlatformResource) -> dg.MaterializeResult[None]:
    with platform.open() as open_platform:
        stages = views.Stages(open_platform.clock)
        sealed = open_platform.seal()
        stages.ended("seal")
        backlog = open_platform.outbox.backlog()
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": len(sealed),
            "batches sealed": len(sealed),
            "batch ids": sealed[:50],
            "events still unsealed": backlog.rows,
            **stages.metadata,
        }
    )
