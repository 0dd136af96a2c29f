"""Alerts: recorded first, said once on each channel while a trouble lasts, at least once whatever crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform.clock import US_PER_SECOND, ManualClock, SystemClock
from render_platform.database import Database, open_sqlite
from render_platform.errors import RecordError, Unavailable
from render_platform.operations.alert_channels import Alert
from render_platform.operations.alerts import DOUBLINGS, FIRST_WAIT_S, KEEP_US, Alerts, Undelivered
from tests.commands import CHECKOUT
from tests.factories import START_US
from tests.platforms import run_together
from tests.receivers import Receiver
from tests.test_alert_channels import ALERT, SECRET, receiver, webhook  # noqa: F401  a fixture

REPEAT_S = 3_600


class Noted:
    """A channel that keeps what it takes; it takes nothing while it is down."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.down = False
        self.taken: list[Alert] = []

    def send(self, alert: Alert) -> str:
        if self.down:
            raise Unavailable(f"{self.name} is down", "mend it")
        self.taken.append(alert)
        return "taken"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_sqlite(tmp_path / "platform.db")
    yield opened
    opened.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START_US)


def pass_s(clock: ManualClock, seconds: int) -> None:
    clock.move_to(clock.now_us() + seconds * US_PER_SECOND)


def rows(database: Database) -> int:
    with database.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM alerts_sent").scalar_one())


def test_the_same_is_said_again_after_a_while_and_another_severity_at_once(
    database: Database, clock: ManualClock
) -> None:
    channel = Noted("webhook")
    alerts = Alerts(database, [channel], clock, REPEAT_S)
    said = []
    for seconds, severity in [(0, "warning"), (10, "warning"), (10, "error"), (3_599, "error"), (1, "error")]:
        pass_s(clock, seconds)
        alerts.notify(replace(ALERT, severity=severity))
        said.append(len(channel.taken))
    assert said == [1, 1, 2, 2, 3]
    alerts.notify(replace(ALERT, key="other"))
    assert len(channel.taken) == 4, "another key is another trouble"


def test_resolved_is_said_once_and_only_where_something_was(database: Database, clock: ManualClock) -> None:
    channel = Noted("webhook")
    alerts = Alerts(database, [channel], clock, REPEAT_S)
    resolved = replace(ALERT, severity="resolved")
    alerts.notify(resolved)
    alerts.notify(ALERT)
    alerts.notify(resolved)
    alerts.notify(resolved)
    alerts.notify(ALERT)
    assert [alert.severity for alert in channel.taken] == ["error", "resolved", "error"]
    alerts.notify(resolved)
    assert rows(database) == 0, "nothing is kept of what is well"


def test_a_channel_that_fails_stops_no_other_and_gets_it_later(database: Database, clock: ManualClock) -> None:
    good, bad = Noted("webhook"), Noted("slack")
    bad.down = True
    alerts = Alerts(database, [bad, good], clock, REPEAT_S)
    with pytest.raises(Undelivered, match="1 for slack: slack is down"):
        alerts.notify(ALERT)
    with pytest.raises(Undelivered):
        alerts.notify()
    bad.down = False
    with pytest.raises(Undelivered):
        alerts.notify(ALERT)
    assert (good.taken, bad.taken) == ([ALERT], []), "not before it is tried again"
    pass_s(clock, FIRST_WAIT_S)
    alerts.notify()
    assert (good.taken, bad.taken) == ([ALERT], [ALERT])


def test_attempts_become_rare_and_stay_possible(database: Database, clock: ManualClock) -> None:
    class Counted(Noted):
        tried = 0

        def send(self, alert: Alert) -> str:
            self.tried += 1
            return super().send(alert)

    channel = Counted("email")
    channel.down = True
    alerts = Alerts(database, [channel], clock, REPEAT_S)
    for minute in range(0, 24 * 60, 4):
        clock.move_to(START_US + minute * 60 * US_PER_SECOND)
        with pytest.raises(Undelivered):
            alerts.notify(ALERT)
    hours = 24 * 3_600 / (FIRST_WAIT_S * 2**DOUBLINGS)
    assert hours <= channel.tried <= hours + DOUBLINGS + 1


def test_what_nobody_touches_is_dropped(database: Database, clock: ManualClock) -> None:
    alerts = Alerts(database, [Noted("webhook")], clock, REPEAT_S)
    for number in range(50):
        alerts.notify(replace(ALERT, key=f"run/{number}"))
    clock.move_to(clock.now_us() + KEEP_US + 1)
    alerts.notify(replace(ALERT, key="new"))
    assert rows(database) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["warning", "error", "resolved"]),
        st.integers(0, 2 * REPEAT_S),
        st.sets(st.sampled_from(["webhook", "slack"])),
    ),
    max_size=8,
)


@given(STEPS)
@settings(max_examples=30)
def test_each_channel_ends_up_knowing_what_is_so(steps: list[tuple[str, int, set[str]]]) -> None:
    """Whatever fails in between: the last thing said is the last that happened. Where nothing fails, nothing is said
    twice in a row within the time for repeats."""
    with TemporaryDirectory() as folder, closing(open_sqlite(Path(folder) / "platform.db")) as database:
        check_channels(database, steps)


def check_channels(database: Database, steps: list[tuple[str, int, set[str]]]) -> None:
    clock = ManualClock(START_US)
    channels = [Noted("webhook"), Noted("slack")]
    alerts = Alerts(database, channels, clock, REPEAT_S)
    state = "resolved"
    for severity, seconds, down in steps:
        pass_s(clock, seconds)
        for channel in channels:
            channel.down = channel.name in down
        state = severity
        try:
            alerts.notify(replace(ALERT, severity=severity, at_us=clock.now_us()))
        except Undelivered:
            assert down
    for channel in channels:
        channel.down = False
    for _ in range(3):
        pass_s(clock, FIRST_WAIT_S * 2**DOUBLINGS)
        alerts.notify()
    for channel in channels:
        assert (channel.taken[-1].severity if channel.taken else "resolved") == state
        if any(channel.name in down for _, _, down in steps):
            continue  # what it was asked to take, it may have taken: it is told again
        for before, after in pairwise(channel.taken):
            far = after.at_us - before.at_us >= REPEAT_S * US_PER_SECOND
            assert before.severity != after.severity or (far and after.severity != "resolved")


# Processes.

NOTIFY = """
import sys
from dataclasses import replace
from pathlib import Path
from render_platform.config import load_settings
from render_platform.operations.alerts import Alert, open_alerts
folder = Path(sys.argv[1])
settings = load_settings(environ={}, state_dir=folder, alert_webhook=(folder / "url").read_text())
with open_alerts(settings) as alerts:
    print("ready", flush=True)
    sys.stdin.readline()
    for key in ("a", "b", "c"):
        alerts.notify(Alert(key, "error", "title", "text", "link", 1))
"""


def prepared(folder: Path, receiver: Receiver) -> Path:
    open_sqlite(folder / "platform.db").close()
    (folder / "url").write_text(f"{receiver.url}/{SECRET}")
    return folder


def test_of_processes_at_once_one_says_it(tmp_path: Path, receiver: Receiver) -> None:
    run_together(NOTIFY, prepared(tmp_path, receiver), "abc")
    assert sorted(document["key"] for document in receiver.documents) == ["a", "b", "c"]


def test_a_process_killed_after_sending_lets_it_be_sent_once_more(tmp_path: Path, receiver: Receiver) -> None:
    command = [sys.executable, "-c", NOTIFY, str(prepared(tmp_path, receiver))]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        receiver.on_request = lambda: os.kill(child.pid, signal.SIGKILL)
        child.communicate(b"go\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    receiver.on_request = lambda: None
    opened, clock = open_sqlite(tmp_path / "platform.db"), ManualClock(SystemClock().now_us())
    alerts = Alerts(opened, [webhook(receiver.url)], clock, REPEAT_S)
    alerts.notify()
    assert len(receiver.requests) == 1, "it may still be at it"
    pass_s(clock, FIRST_WAIT_S)
    alerts.notify()
    alerts.notify()
    opened.close()
    first, second = receiver.documents
    assert first == second, "under the same id: a receiver can tell"


def test_a_process_killed_before_sending_loses_nothing(database: Database, clock: ManualClock) -> None:
    class Deadly(Noted):
        def send(self, alert: Alert) -> str:
            raise SystemExit(9)

    with pytest.raises(SystemExit):
        Alerts(database, [Deadly("webhook")], clock, REPEAT_S).notify(ALERT, replace(ALERT, key="second"))
    pass_s(clock, FIRST_WAIT_S)
    channel = Noted("webhook")
    Alerts(database, [channel], clock, REPEAT_S).notify()
    assert {alert.key for alert in channel.taken} == {"k/1", "second"}


def test_without_sql_it_is_no_undelivered_alert(tmp_path: Path, clock: ManualClock) -> None:
    """Callers tell the two apart: this one was not recorded."""
    opened = open_sqlite(tmp_path / "platform.db")
    with opened.write() as connection:
        connection.exec_driver_sql("DROP TABLE alerts_sent")
    with pytest.raises(Unavailable, match="the database cannot be used") as raised:
        Alerts(opened, [Noted("webhook")], clock, REPEAT_S).notify(ALERT)
    assert not isinstance(raised.value, Undelivered)
    opened.close()


def test_a_severity_that_is_none_is_refused() -> None:
    with pytest.raises(RecordError, match="use one of"):
        replace(ALERT, severity="panic")
