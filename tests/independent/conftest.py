"""One log for all verifiers of others: writing it takes ten seconds."""

from __future__ import annotations

import random

import pytest

from tests.conftest import SEED
from tests.independent.logs import WrittenLog, write_log


@pytest.fixture(scope="session")
def written_log(tmp_path_factory: pytest.TempPathFactory) -> WrittenLog:
    return write_log(tmp_path_factory.mktemp("independent") / "state", random.Random(SEED))
