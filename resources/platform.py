"""The platform as a Dagster resource: settings are read when a step opens it, never while loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster_duckdb import DuckDBResource
from pydantic import Field

from render_platform.config import Settings, configure_logs, load_settings
from render_platform.pipeline import Platform, open_platform


class PlatformResource(dg.ConfigurableResource[Platform]):
    """Opens the platform over its state folder. Nothing in memory is shared between steps: each re-reads its state."""

    state_dir: str = Field(default="", description="The state folder; empty: RENDER_PLATFORM_STATE_DIR, or ./state")
    duckdb: dg.ResourceDependency[DuckDBResource]

    def settings(self) -> Settings:
        return load_settings(state_dir=Path(self.state_dir) if self.state_dir else None)

    @contextmanager
    def open(self) -> Iterator[Platform]:
        """UsageError where the folder holds no state yet."""
        configure_logs()
        with open_platform(self.settings(), duckdb_connect=self.duckdb.get_connection) as platform:
            yield platform
