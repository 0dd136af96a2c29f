"""Usage that is reported again after a recovery and a pruning: recorded once for ever."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from render_platform.clock import DAY_US, HOUR_US, ManualClock
from render_platform.errors import RecordError
from render_platform.gateway.ingest import Ingest
from render_platform.pipeline import Platform
from tests.factories import START_US
from tests.gateway.test_ingest import METER
from tests.gateway.test_ingest_reading import event, read
from tests.platforms import make_platform, record_random
from tests.test_recovery import backup, recover, restore


def report(platform: Platform) -> int:
    with platform.database.write() as connection:
        ingest = Ingest(platform.outbox, platform.ids, platform.clock)
        return len(ingest.record(connection, METER, read(event())))


def test_what_a_backup_forgot_and_a_pruning_took_is_not_recorded_twice(tmp_path: Path) -> None:
    """The log gives the event back, but not that it was reported: its row refused it, and what stands for it does."""
    state = tmp_path / "state"
    with closing(make_platform(state, ManualClock(START_US))) as platform:
        record_random(platform, 3, 1)
        platform.flush()
        backup(state)
        assert report(platform) == 1
        platform.flush()
    restore(state)
    recover(state)
    later = ManualClock(START_US + 3 * DAY_US + HOUR_US)
    with closing(make_platform(state, later, "later", outbox_retention_days=2)) as platform:
        with pytest.raises(RecordError, match="stands in the outbox already"):
            report(platform)
        assert platform.prune() == 4
        with pytest.raises(RecordError, match="stands in the outbox already"):
            report(platform)
        assert platform.outbox.totals().events == 4
