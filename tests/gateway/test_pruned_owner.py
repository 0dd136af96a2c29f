"""Whose a job was: said of what was pruned, and never of usage that was reported, which never had a record here."""

from __future__ import annotations

import uuid
from contextlib import closing
from pathlib import Path

from render_platform.clock import DAY_US, ManualClock
from render_platform.gateway.archive import Archive
from render_platform.gateway.ingest import Ingest
from tests.factories import START_US
from tests.gateway.test_ingest import METER
from tests.gateway.test_ingest_reading import event, read
from tests.platforms import LIVE, make_platform, record_random


def test_reported_usage_was_no_job_here(tmp_path: Path) -> None:
    with closing(make_platform(tmp_path / "state", ManualClock(START_US))) as platform:
        archive = Archive(platform.database, platform.clock)
        (own,) = record_random(platform, 1, 1)
        ingest = Ingest(platform.outbox, platform.ids, platform.clock)
        with platform.database.write() as connection:
            (reported,) = ingest.record(connection, METER, read(event()))

        def owners() -> list[str | None]:
            return [archive.pruned_owner(uuid.UUID(bytes=one.job_id.bytes)) for one in (own, reported)]

        assert owners() == [None, None], "nothing is pruned yet"
        platform.flush()
        assert platform.outbox.prune(platform.cas, LIVE, START_US + DAY_US) == 2
        assert owners() == [own.customer_ref, None]
