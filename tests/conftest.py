"""Every run prints the seed of its randomness; RENDER_TEST_SEED=<seed> repeats it."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from render_platform.pipeline import Platform
from tests.platforms import make_platform

SEED = int(os.environ.get("RENDER_TEST_SEED") or secrets.randbelow(2**32))

settings.register_profile(
    "render-platform",
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("render-platform")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"seed: {SEED} (RENDER_TEST_SEED={SEED} repeats this run)"


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """What the shell sets must not reach a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RENDER_PLATFORM_")]:
            patch.delenv(name)
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness that the seed and the test's name give, whatever else runs."""
    return random.Random(f"{SEED}/{request.node.nodeid}")


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """A new platform with small batches: five rows each, three a transaction."""
    made = make_platform(tmp_path / "state", batch_rows=5, seal_rows_a_transaction=3)
    yield made
    made.close()
