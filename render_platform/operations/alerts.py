"""Alerts: told once while a trouble lasts, on every configured channel, and never lost.

`Alerts.notify` records first and sends after. What is recorded waits in SQL, one row a key and channel, until that
channel has taken it: a channel that fails holds up no other, and is tried again, ever more rarely, by whoever notifies
next. The same key again is news after `alert_repeat_s`, or where its severity differs. `resolved` is sent only where
something was said before, and then the row is gone: no row means that all is well.

For any number of processes: whoever claims a row sends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from render_platform.clock import DAY_US, US_PER_SECOND, Clock, SystemClock
from render_platform.config import Settings
from render_platform.database import Database, metadata, open_database
from render_platform.errors import Unavailable, UsageError
from render_platform.operations.alert_channels import Alert as Alert
from render_platform.operations.alert_channels import Channel, open_channels

KEEP_US = 30 * DAY_US
"""A row that nobody has touched for so long is dropped, sent or not."""
FIRST_WAIT_S, DOUBLINGS = 60, 6
"""How long a row is left to whoever claimed it, and then after each failure: doubled, up to an hour and four minutes.

Longer than any channel takes."""
MAX_A_CALL = 20
"""Alerts that one call sends on one channel; the others wait for the next."""
BUDGET_US = 15 * US_PER_SECOND
"""After so long a call begins no second alert on a channel: a sensor's tick has 60 s."""

_log = structlog.get_logger()

alerts_sent = sa.Table(
    "alerts_sent",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("channel", sa.Text, primary_key=True),
    sa.Column("severity", sa.Text),  # as the channel last took it; null: it took none yet
    sa.Column("sent_us", sa.BigInteger),  # when it did
    sa.Column("waiting", sa.Text),  # the alert as JSON, until the channel has taken it
    sa.Column("attempts", sa.BigInteger, nullable=False),
    sa.Column("next_us", sa.BigInteger, nullable=False),  # nobody tries before: it was claimed, or has failed
    sa.Column("error", sa.Text),  # what the last attempt failed with
    sa.Column("touched_us", sa.BigInteger, nullable=False),
)


class Undelivered(Unavailable):
    """The alerts are recorded, and a channel has not taken all of them yet."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one alert on one channel: what the receiver said, or what is wrong and what to do."""

    channel: str
    sent: bool
    said: str
    remedy: str = ""


class Alerts:
    def __init__(self, database: Database, channels: Sequence[Channel], clock: Clock, repeat_s: int) -> None:
        self._database, self._channels, self._clock = database, channels, clock
        self._repeat_us = repeat_s * US_PER_SECOND

    def notify(self, *alerts: Alert) -> None:
        """Record what is news, then send all that waits. Without alerts: only what waits.

        Undelivered at the end, where a channel did not take something, now or earlier; all others were tried.
        Unavailable where SQL fails: of these alerts nothing may be recorded then.
        """
        if alerts and self._channels:
            self._record(alerts)
        self._deliver()

    def _record(self, alerts: Sequence[Alert]) -> None:
        now_us = self._clock.now_us()
        # A crash before this commit: nothing was said, and the caller, who kept its place, says it again. After it: the
        # alerts wait, and are sent by the next call of any process.
        with self._database.write() as connection:
            connection.execute(alerts_sent.delete().where(alerts_sent.c.touched_us < now_us - KEEP_US))
            for alert in alerts:
                for channel in self._channels:
                    row = _row(connection, alert.key, channel.name)
                    if is_news(row, alert, now_us, self._repeat_us):
                        _put(connection, alert, channel.name, row is None, now_us)

    def _deliver(self) -> None:
        until_us = self._clock.now_us() + BUDGET_US
        for channel in self._channels:
            for _ in range(MAX_A_CALL):
                if not self._send_one(channel) or self._clock.now_us() >= until_us:
                    break
        if failing := self._failing():
            raise Undelivered("alerts wait: " + "; ".join(failing), "run `render-platform alert test`")

    def _send_one(self, channel: Channel) -> bool:
        """Whether the channel took an alert that waited; False where there was none, or it failed."""
        waiting = self._claim(channel.name)
        if waiting is None:
            return False
        alert = Alert(**json.loads(waiting))
        outcome = attempt(channel, alert)
        # A crash before this commit: the channel may have taken the alert, and is given it again when the claim is
        # over, under the same id. At least once, never lost. After it: nothing is sent again.
        with self._database.write() as connection:
            one = alerts_sent.c.key == alert.key, alerts_sent.c.channel == channel.name
            same = alerts_sent.c.waiting == waiting  # or else something newer waits by now
            if not outcome.sent:
                connection.execute(alerts_sent.update().where(*one, same).values(error=outcome.said))
                return False
            taken = {"severity": alert.severity, "sent_us": self._clock.now_us(), "error": None}
            connection.execute(alerts_sent.update().where(*one).values(taken))
            if alert.severity == "resolved":
                connection.execute(alerts_sent.delete().where(*one, same))
            connection.execute(alerts_sent.update().where(*one, same).values(waiting=None, attempts=0))
        return True

    def _claim(self, channel: str) -> str | None:
        """The alert that has waited longest, as JSON; for FIRST_WAIT_S nobody else takes it. None: nothing to do."""
        now_us = self._clock.now_us()
        due = alerts_sent.c.channel == channel, alerts_sent.c.waiting.is_not(None), alerts_sent.c.next_us <= now_us
        with self._database.read() as connection:  # nearly always there is nothing, and no need to hold up writers
            if connection.execute(sa.select(sa.func.count()).where(*due)).scalar_one() == 0:
                return None
        # A crash after this commit: the claim runs out, and somebody else sends the alert.
        with self._database.write() as connection:
            oldest = sa.select(alerts_sent).where(*due).order_by(alerts_sent.c.touched_us, alerts_sent.c.key).limit(1)
            row = connection.execute(oldest).one_or_none()
            if row is None:
                return None
            wait_us = FIRST_WAIT_S * 2 ** min(row.attempts, DOUBLINGS) * US_PER_SECOND
            claimed = alerts_sent.update().where(alerts_sent.c.key == row.key, alerts_sent.c.channel == channel)
            connection.execute(claimed.values(attempts=row.attempts + 1, next_us=now_us + wait_us))
        return str(row.waiting)

    def _failing(self) -> list[str]:
        """One text a channel that has not taken something: how many alerts wait, and why."""
        names = [channel.name for channel in self._channels]
        failed = sa.select(alerts_sent.c.channel, sa.func.count(), sa.func.max(alerts_sent.c.error)).where(
            alerts_sent.c.waiting.is_not(None), alerts_sent.c.error.is_not(None), alerts_sent.c.channel.in_(names)
        )
        with self._database.read() as connection:
            rows = connection.execute(failed.group_by(alerts_sent.c.channel).order_by(alerts_sent.c.channel)).all()
        return [f"{count} for {channel}: {error}" for channel, count, error in rows]


def is_news(row: Any, alert: Alert, now_us: int, repeat_us: int) -> bool:
    """Whether a channel is to be told, by what its row (None: there is none) says that it knows or is about to."""
    if row is None:
        return alert.severity != "resolved"
    if row.waiting is not None:
        return bool(json.loads(row.waiting)["severity"] != alert.severity)
    return bool(row.severity != alert.severity or now_us - row.sent_us >= repeat_us)


def _row(connection: sa.Connection, key: str, channel: str) -> Any:
    return connection.execute(sa.select(alerts_sent).filter_by(key=key, channel=channel)).one_or_none()


def _put(connection: sa.Connection, alert: Alert, channel: str, new: bool, now_us: int) -> None:
    """Let an alert wait for a channel, in place of what waits there under its key."""
    values = {"waiting": json.dumps(asdict(alert)), "attempts": 0, "next_us": now_us, "error": None}
    values["touched_us"] = now_us
    if new:
        connection.execute(alerts_sent.insert().values(key=alert.key, channel=channel, **values))
    else:
        connection.execute(alerts_sent.update().filter_by(key=alert.key, channel=channel).values(values))


def attempt(channel: Channel, alert: Alert) -> Outcome:
    """Send an alert now, whatever was sent before. A failure is logged, and is no exception."""
    try:
        return Outcome(channel.name, True, channel.send(alert))
    except (Unavailable, UsageError) as error:
        _log.error("alert_not_sent", channel=channel.name, key=alert.key, error=error.message, remedy=error.remedy)
        return Outcome(channel.name, False, error.message, error.remedy)


def send_unrecorded(settings: Settings, alert: Alert) -> list[Outcome]:
    """Send to each configured channel without SQL: not de-duplicated. For when SQL is what has failed, and for tests
    by the operator. UsageError where no channel is configured."""
    channels = open_channels(settings)
    if not channels:
        raise UsageError("no alert channel is configured", REMEDY)
    return [attempt(channel, alert) for channel in channels]


REMEDY = "set RENDER_PLATFORM_ALERT_WEBHOOK, _ALERT_SLACK, or _ALERT_EMAIL with _SMTP_URL: docs/alerts.md"


@contextmanager
def open_alerts(settings: Settings, clock: Clock | None = None) -> Iterator[Alerts]:
    """Alerts over a state folder's database alone: they go out where the platform itself cannot be opened.

    UsageError where the folder holds no state; Unavailable where its database cannot be used.
    """
    if not settings.has_state:
        raise UsageError(f"{settings.state_dir} holds no platform state", "give --state DIR")
    database = open_database(settings.database)
    try:
        yield Alerts(database, open_channels(settings), clock or SystemClock(), settings.alert_repeat_s)
    finally:
        database.close()


def link(settings: Settings, path: str) -> str:
    """Where a person sees a path of the Dagster UI, such as `runs/<id>`."""
    base = settings.dagster_url.rstrip("/") or f"http://127.0.0.1:{settings.dagster_port}"
    return f"{base}/{path}"
