"""A DAGSTER_HOME made once: Dagster takes longer to make its tables than most tests take."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from render_platform.config import load_settings
from resources.local import LocalDagster
from tests.commands import restored_process


@functools.cache
def _empty_home() -> Path:
    """What the product makes where nothing has run."""
    state = Path(tempfile.mkdtemp(prefix="render-platform-home-"))
    atexit.register(shutil.rmtree, state, ignore_errors=True)
    with restored_process():
        settings = load_settings(environ={}, state_dir=state)
        LocalDagster(settings).close()
    return settings.dagster_home


def give_home(path: Path) -> None:
    """A copy of it at `path`, where there is none yet."""
    if not path.exists():
        shutil.copytree(_empty_home(), path)
