"""Every run prints the seed of its randomness; RENDER_TEST_SEED=<seed> repeats it.

What tests write lies in memory where that has room: they sync so much that a disk takes longer than their work. A
TMPDIR that is set is obeyed. The folder of a run that failed stays until the next run begins.
"""

from __future__ import annotations

import atexit
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from render_platform.pipeline import Platform
from tests import postgres
from tests.platforms import make_platform

SEED = int(os.environ.get("RENDER_TEST_SEED") or secrets.randbelow(2**32))
MEMORY = Path("/dev/shm")
PREFIX = "render-platform-tests-"
ROOM_BYTES = 6 * 1024**3
"""A run of all tests takes about a quarter of it."""

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
    if "TMPDIR" not in os.environ and MEMORY.is_dir():
        use_memory()


def use_memory() -> None:
    """Temporary files lie in a folder of this process's own, removed at its very end; those left by others go now."""
    for path in MEMORY.glob(f"{PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(PREFIX)).exists():
            shutil.rmtree(path, ignore_errors=True)
    found = os.statvfs(MEMORY)
    if found.f_bavail * found.f_frsize >= ROOM_BYTES and not found.f_flag & os.ST_NOEXEC:
        folder = MEMORY / f"{PREFIX}{os.getpid()}"
        folder.mkdir(mode=0o711)  # a server that runs as somebody else may be started in it
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        atexit.register(remove_memory)


def remove_memory() -> None:
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        atexit.unregister(remove_memory)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if postgres.CHOSEN and (nextitem is None or nextitem.path != item.path):
        postgres.drop_all()


def pytest_report_header() -> list[str]:
    return [f"seed: {SEED} (RENDER_TEST_SEED={SEED} repeats this run)", f"files: {tempfile.gettempdir()}"]


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
