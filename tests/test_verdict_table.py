"""Every combination of what can be true of both sides, the rollup and the windows, against one rule written apart.

The events of an hour are two batches, one in its first half and one in its second. Each side has the whole of them, the
first batch, or nothing; or it cannot be read, in each way that reading goes wrong. `reconciled` comes out only where
all was read, all is closed and all is equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from render_platform.cas import path_of
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clock import HOUR_US
from render_platform.events import UsageEvent, table_from_events
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.chdb_server import open_raw
from tests.fault_cases import RAW, ROLLUP, Proxy, alter, ids_of, proxy_before_bridge
from tests.stories import DEADLINE_US, HOUR, NOWHERE, keyed_event, logged, move_to, open_story, record

_rng = random.Random(20231116)
EARLY = [keyed_event(_rng, window=2) for _ in range(6)]
LATE = [keyed_event(_rng, window=9) for _ in range(6)]
BOTH = EARLY + LATE
ROWS = {"full": BOTH, "partial": EARLY, "empty": []}

SLOW = ("full", "partial", "empty", "late batch unlogged", "object missing", "object altered", "object of other rows")
FAST = ("full", "partial", "empty", "fails", "answers nothing", "answers no rows", "is cut")
ROLL = ("equal", "empty", "differs", "fails", "answers nothing", "answers no rows")
WINDOWS = ("closed", "half closed", "open", "uncovered")
CLOSED_US = {"closed": HOUR_US, "half closed": HOUR_US // 2, "open": 0}
FAULTS = {"fails": "fail", "answers nothing": "nothing", "answers no rows": "header", "is cut": "cut"}


class Case(NamedTuple):
    slow: str
    fast: str
    roll: str
    windows: str


CASES = [Case(*one) for one in product(SLOW, FAST, ROLL, WINDOWS)]


# The rule.


def expected(case: Case) -> str:
    """By what is true, in the order of precedence, of the part of the hour that is closed."""
    closed = closed_events(case)
    if closed is None:
        return "pending"
    if case.slow.startswith("object") or case.fast in FAULTS or case.roll in FAULTS:
        return "unavailable"
    true = [event for event in slow_rows(case) if event in closed]
    fast = [event for event in ROWS[case.fast] if event in closed]
    rolled = {"equal": fast, "empty": [], "differs": [*fast, *EARLY]}[case.roll]
    if not same(true, fast) or not same(fast, rolled):
        return "discrepant"
    return "reconciled" if len(closed) == len(BOTH) else "pending"


def closed_events(case: Case) -> list[UsageEvent] | None:
    """The events of closed windows, were they recorded; None where no window is closed."""
    if case.windows in ("open", "uncovered"):
        return None
    return EARLY if case.windows == "half closed" or case.slow == "late batch unlogged" else BOTH


def slow_rows(case: Case) -> list[UsageEvent]:
    return ROWS.get(case.slow, BOTH)


def same(left: list[UsageEvent], right: list[UsageEvent]) -> bool:
    return ids_of(left) == ids_of(right)


# The state that a case describes.


@dataclass
class Stage:
    """Both sides, opened once for each of their states."""

    slow: dict[tuple[str, str], Platform]
    fast: dict[tuple[str, str], ClickHouse]
    proxy: Proxy

    def set(self, case: Case) -> Platform:
        """The platform, on the case's ClickHouse, and the proxy's rules for reads that go wrong."""
        platform = self.slow[case.slow, case.windows]
        content = ("full" if case.fast in FAULTS else case.fast, "equal" if case.roll in FAULTS else case.roll)
        wrong = [(ROLLUP, case.roll), (RAW, case.fast)]
        self.proxy.rules[:] = [(text, FAULTS[how]) for text, how in wrong if how in FAULTS]
        platform.clickhouse = self.fast[content]
        return platform


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    with ExitStack() as stack:
        proxy = stack.enter_context(proxy_before_bridge())
        fast = {
            (rows, roll): stack.enter_context(closing(make_fast(proxy, rows, roll)))
            for rows, roll in product(ROWS, ("equal", "empty", "differs"))
        }
        slow = {
            (kind, windows): make_slow(folder / f"{number}", kind, windows)
            for number, (kind, windows) in enumerate(product(SLOW, WINDOWS))
        }
        yield Stage(slow, fast, proxy)
        for platform in slow.values():
            platform.database.close()


def make_fast(proxy: Proxy, rows: str, roll: str) -> ClickHouse:
    name = chdb_server.fresh_database()
    clickhouse = open_clickhouse(proxy.dsn, name)
    clickhouse.insert_events(table_from_events(ROWS[rows]), "rows")
    with closing(open_raw(chdb_server.dsn_of("bridge"), name)) as client:
        if roll == "empty":
            client.command("TRUNCATE TABLE usage_minute")
        elif roll == "differs":  # six events more than there are, and no row of them
            clickhouse.insert_events(table_from_events(EARLY), "more")
            client.command("TRUNCATE TABLE usage_events")
            client.command("DROP TABLE usage_minute_view")
            clickhouse.insert_events(table_from_events(ROWS[rows]), "rows again")
    return clickhouse


def make_slow(state: Path, kind: str, windows: str) -> Platform:
    """One batch of each half of the hour, as far as the slow path has it; the clock says what is closed."""
    platform = open_story(state, "unused", dsn=NOWHERE, now_us=HOUR)
    with platform.database.write() as connection:
        platform.outbox.open_lane(connection, "live", HOUR + (HOUR_US if windows == "uncovered" else 0))
    if windows == "uncovered":
        return platform
    made = slow_rows(Case(kind, "", "", windows))
    record(platform, [event for event in made if event in EARLY])
    platform.flush()
    record(platform, [event for event in made if event in LATE])
    move_to(platform, HOUR + CLOSED_US[windows] + DEADLINE_US)
    platform.seal()
    platform.store()
    if kind != "late batch unlogged":
        platform.log_batches()
    spoil(platform, kind)
    return platform


def spoil(platform: Platform, kind: str) -> None:
    """Of two batches, the first cannot be read any more."""
    if not kind.startswith("object"):
        return
    names = [path_of(str(entry.subject_digest)) for entry in logged(platform, "usage_batch")]
    first, second = (platform.settings.blobs_dir / name for name in names)
    if kind == "object missing":
        first.unlink()
    elif kind == "object altered":
        alter(first)
    else:
        first.write_bytes(second.read_bytes())


# The table.


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("slow", SLOW)
def test_the_verdict_is_the_rule_s(stage: Stage, slow: str, windows: str) -> None:
    wrong = []
    for case in CASES:
        if (case.slow, case.windows) == (slow, windows):
            report = stage.set(case).reconcile(HOUR)
            if report.status != expected(case):
                wrong.append(f"{case.fast} / {case.roll}: {report.summary()}, and not {expected(case)}")
    assert not wrong, "\n".join([f"slow side {slow}, {windows}:", *wrong])


def test_reconciled_is_said_of_nothing_else() -> None:
    """The rule itself, said the other way round: four of 1,176 combinations, each of them whole, closed and equal."""
    assert len(set(CASES)) == len(SLOW) * len(FAST) * len(ROLL) * len(WINDOWS) == 1_176
    good = {case for case in CASES if expected(case) == "reconciled"}
    assert good == {
        Case("full", "full", "equal", "closed"),
        Case("partial", "partial", "equal", "closed"),
        Case("empty", "empty", "equal", "closed"),
        Case("empty", "empty", "empty", "closed"),
    }
