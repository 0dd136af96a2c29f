"""The gateway's fast path: committed events to ClickHouse within a second, from a thread of its own.

No request waits for it. What waits is bounded by number and by age; what does not fit, or is too old, or does not
arrive, is dropped and counted, and reconciliation finds it. Nothing is kept for the next start.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

from render_platform.clickhouse import ClickHouse
from render_platform.clickhouse_connection import INSERT_S
from render_platform.clock import US_PER_SECOND, Clock
from render_platform.errors import PlatformError
from render_platform.events import UsageEvent, table_from_events
from render_platform.fast_path import FastPath

MAX_WAITING = 50_000
MAX_BATCH = 10_000
EVERY_S = 0.5
RECONNECT_S = 5.0

_log = structlog.get_logger()


class Publisher:
    """`offer` is for any thread and never blocks; `delivered` and `dropped` count since the start."""

    def __init__(self, open_clickhouse: Callable[[], ClickHouse], clock: Clock, deadline_s: int) -> None:
        self._open, self._clock, self._deadline_s = open_clickhouse, clock, deadline_s
        self._waiting: deque[UsageEvent] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fast-path", daemon=True)
        self._clickhouse: ClickHouse | None = None
        self.delivered = 0
        self.dropped = 0
        self.last_error = ""

    def start(self) -> None:
        self._thread.start()

    def offer(self, event: UsageEvent) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(event)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def stop(self, timeout_s: float) -> None:
        """Send what waits, for at most `timeout_s`; what is left then is dropped."""
        self._stopping.set()
        self._thread.join(timeout_s)
        self.dropped += len(self._waiting)
        self._waiting.clear()

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            if not self._send_all():
                self._stopping.wait(RECONNECT_S)
        self._send_all()
        self._close()

    def _send_all(self) -> bool:
        """Send what waits; False where ClickHouse cannot be used now: it is opened anew the next time.

        What comes meanwhile waits for the next turn: an insert costs some 10 ms however few rows it has.
        """
        for _ in range(-(-len(self._waiting) // MAX_BATCH)):
            batch = self._take()
            if not batch:
                break
            try:
                self._clickhouse = self._clickhouse or self._open()
            except PlatformError as error:
                self._waiting.extendleft(reversed(batch))
                self._say(str(error))
                return False
            path = FastPath(self._clickhouse, self._clock, self._deadline_s)
            self.delivered += path.publish(table_from_events(batch))
            self.dropped += path.dropped
            if path.dropped:
                self._say(path.last_error)
                self._close()
                return False
        return True

    def _take(self) -> list[UsageEvent]:
        """The next batch, without what is older than the deadline: its window may be judged already."""
        young_s = self._deadline_s - min(INSERT_S, self._deadline_s // 2)  # what it sends has arrived, or never will
        oldest_us = self._clock.now_us() - young_s * US_PER_SECOND
        while self._waiting and self._waiting[0].recorded_at < oldest_us:
            self._waiting.popleft()
            self.dropped += 1
        return [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]

    def _close(self) -> None:
        if self._clickhouse is not None:
            self._clickhouse.close()
            self._clickhouse = None

    def _say(self, error: str) -> None:
        if error != self.last_error:
            _log.warning("fast_path_unavailable", error=error)
        self.last_error = error
