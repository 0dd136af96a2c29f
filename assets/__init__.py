"""The assets: short bodies that call the library. One module a group; `views` makes their metadata."""

import warnings

import dagster as dg

warnings.filterwarnings("ignore", category=dg.BetaWarning)  # backfill policies; before the modules that use them

from assets.billing import gpu_jobs, sealed_batches  # noqa: E402
from assets.capacity import capacity_plan  # noqa: E402
from assets.charges import invoices, usage_charges  # noqa: E402
from assets.checks import fast_path_freshness, flush_freshness, reconciliation_freshness  # noqa: E402
from assets.compliance import audit_log, audit_verification, reconciliation  # noqa: E402
from assets.daily import daily_report  # noqa: E402
from assets.fast_path import duplicates, fast_path_repair, inference_events  # noqa: E402
from assets.storage import cas_batches  # noqa: E402

ASSETS: list[dg.AssetsDefinition | dg.AssetSpec] = [
    gpu_jobs,
    inference_events,
    sealed_batches,
    cas_batches,
    audit_log,
    audit_verification,
    reconciliation,
    fast_path_repair,
    usage_charges,
    invoices,
    daily_report,
    capacity_plan,
]
CHECKS = [duplicates, flush_freshness, fast_path_freshness, reconciliation_freshness]
