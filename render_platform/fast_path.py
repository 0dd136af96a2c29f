"""The fast path: committed rows to ClickHouse, at once and best effort.

- Only rows whose transaction has committed: what ClickHouse shows exists on the slow path too, or soon will.
- Nothing is kept for later and nothing is sent again after a restart: reconciliation finds what is missing.
- Whatever does not arrive is counted, in `dropped`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from render_platform.clock import US_PER_SECOND, Clock
from render_platform.errors import Unavailable
from render_platform.events import event_ids

CHUNK_ROWS = 10_000


_log = structlog.get_logger()


class EventSink(Protocol):
    """The part of ClickHouse that the fast path needs; its contract is there."""

    def insert_events(self, table: pa.Table, token: str) -> None: ...


class FastPath:
    """Publishes from one thread; its counts are since it was made."""

    def __init__(self, clickhouse: EventSink, clock: Clock, deadline_s: int = 60) -> None:
        self._clickhouse = clickhouse
        self._clock = clock
        self._deadline_us = deadline_s * US_PER_SECOND
        self.delivered = 0
        self.dropped = 0
        self.last_error = ""

    def publish(self, table: pa.Table) -> int:
        """Send committed rows of EVENT_SCHEMA; return how many ClickHouse has acknowledged.

        Never raises Unavailable. After the first chunk that fails, or after `deadline_s`, the rest is
        dropped; a chunk that failed counts as dropped although it may have arrived.
        """
        expires_us = self._clock.now_us() + self._deadline_us
        delivered = 0
        for chunk in _chunks(table):
            if not self._send(chunk, expires_us):
                break
            delivered += chunk.num_rows
        self.delivered += delivered
        if lost := table.num_rows - delivered:
            self._drop(lost)
        return delivered

    def _send(self, chunk: pa.Table, expires_us: int) -> bool:
        if self._clock.now_us() > expires_us:
            self.last_error = "the deadline of the fast path passed"
            return False
        try:
            self._clickhouse.insert_events(chunk, batch_token(chunk))
        except Unavailable as error:
            self.last_error = str(error)
            return False
        return True

    def _drop(self, rows: int) -> None:
        self.dropped += rows
        _log.warning("fast_path_dropped", rows=rows, dropped=self.dropped, error=self.last_error)


def batch_token(table: pa.Table) -> str:
    """The SHA-256, in hex, of the sorted event ids: the name of this set of rows.

    Send the rows ordered by event_id, so that the name stands for one order as well.
    """
    return hashlib.sha256(b"".join(sorted(event_ids(table).to_pylist()))).hexdigest()


def _chunks(table: pa.Table) -> Iterator[pa.Table]:
    """The rows by event_id, at most CHUNK_ROWS at a time."""
    order = pc.sort_indices(event_ids(table).cast(pa.binary()))
    ordered = table.take(order)
    for start in range(0, table.num_rows, CHUNK_ROWS):
        yield ordered.slice(start, CHUNK_ROWS)
