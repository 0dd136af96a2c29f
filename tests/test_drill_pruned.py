"""The drill after a pruning: what SQL still has to know of a pruned batch is compared."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from render_platform.clock import DAY_US
from tests.factories import START_US
from tests.platforms import connect, record_random
from tests.test_restore_drill import drill, open_live, send


@pytest.mark.parametrize(
    "spoil",
    [
        "DELETE FROM pruned_events WHERE event_id != (SELECT min(event_id) FROM pruned_events)",
        "DELETE FROM pruned_events WHERE event_id = (SELECT min(event_id) FROM pruned_events)",
    ],
    ids=["all but one", "one"],
)
def test_events_that_pruning_should_remember_are_missed(tmp_path: Path, spoil: str) -> None:
    state = tmp_path / "state"
    with closing(open_live(state)) as platform:
        send(platform, record_random(platform, 4, 1))
        platform.flush()
        platform.outbox.prune(platform.cas, "live", START_US + DAY_US)
        with closing(connect(state)) as connection:
            connection.execute(spoil)
            connection.commit()
        _, _, found = drill(platform, tmp_path / "drill")
    assert [one[0] for one in found] == ["sql"], "their receipts cannot be made any more"
