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
