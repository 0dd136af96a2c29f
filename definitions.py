"""The one Definitions of the code location. Loading it makes no network call and reads no environment."""

import dagster as dg
from dagster_duckdb import DuckDBResource

from assets import ASSETS, CHECKS
from assets.jobs import JOBS
from resources.platform import PlatformResource
from sensors import SCHEDULES, SENSORS

duckdb = DuckDBResource(database=":memory:")

defs = dg.Definitions(
    assets=ASSETS,
    asset_checks=CHECKS,
    jobs=JOBS,
    sensors=SENSORS,
    schedules=SCHEDULES,
    resources={"platform": PlatformResource(duckdb=duckdb)},
    executor=dg.in_process_executor,
)


def ranges() -> dg.Definitions:
    """The same assets for `dg launch -m definitions -a ranges --partition-range`: a range is one run, however long.

    That command refuses assets whose backfills are several runs, as those of `defs` are.
    """
    one_run = dg.BackfillPolicy.single_run()
    assets = [
        asset.with_attributes(backfill_policy=one_run)
        if isinstance(asset, dg.AssetsDefinition) and asset.partitions_def
        else asset
        for asset in ASSETS
    ]
    return dg.Definitions(assets=assets, resources=defs.resources, executor=defs.executor)
