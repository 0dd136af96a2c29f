"""Sealing: unsealed rows become batches of one lane and one hour, and closed hours get their watermark.

    filling ──▶ closed ──▶ sealed ──▶ stored ──▶ logged ──▶ published

`filling` takes rows, a few thousand a transaction, so that other writers never wait long. `closed` fixes the set of
rows. `sealed` adds the Merkle root over them. Each step re-reads its state: any of them may be run again, at any time.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from render_platform.clock import HOUR_US, Clock, hour_of, iso
from render_platform.database import Database, batches, lanes, usage_events
from render_platform.events import merkle_root
from render_platform.outbox import LIVE, rows_of_batch

UNSEALED = usage_events.c.batch_id.is_(None)


class Sealer:
    def __init__(self, database: Database, clock: Clock, *, batch_rows: int, rows_a_transaction: int) -> None:
        self._database = database
        self._clock = clock
        self._batch_rows = batch_rows
        self._rows_a_transaction = rows_a_transaction

    def seal(self) -> list[str]:
        """Seal every row that is recorded, declare every hour that is over; gives the ids sealed by this call."""
        with self._database.write() as connection:
            self._advance_live_frontier(connection)
            names = connection.execute(sa.select(lanes.c.lane).order_by(lanes.c.lane)).scalars().all()
        sealed: list[str] = []
        for lane in names:
            while self._fill(lane):
                sealed += self._root_closed(lane)
            sealed += self._root_closed(lane)
        return sealed

    def _advance_live_frontier(self, connection: sa.Connection) -> None:
        """An idle platform's clock still moves: without this no hour after the last event would ever close."""
        now = self._clock.now_us()
        connection.execute(
            lanes.update().where(lanes.c.lane == LIVE, lanes.c.frontier_us < now).values(frontier_us=now)
        )

    def _fill(self, lane: str) -> bool:
        """One transaction: declare hours that are over, then move some rows into the batch being filled.

        A crash before the commit: as before. After it: the batch is still `filling`, and the next call goes on.
        """
        with self._database.write() as connection:
            batch = self._filling(connection, lane)
            if batch is None:
                self._declare_hours(connection, lane)
                batch = self._open_batch(connection, lane)
            if batch is None:
                return False
            room = max(0, self._batch_rows - self._size(connection, batch.batch_id))
            moved = self._move_rows(connection, batch, min(room, self._rows_a_transaction))
            if moved == room or moved < self._rows_a_transaction:
                self._close(connection, batch)
        return True

    def _filling(self, connection: sa.Connection, lane: str) -> Any:
        return connection.execute(sa.select(batches).filter_by(lane=lane, state="filling")).one_or_none()

    def _open_batch(self, connection: sa.Connection, lane: str) -> Any:
        oldest = _oldest_unsealed(connection, lane)
        if oldest is None:
            return None
        hour = hour_of(oldest)
        last = connection.execute(sa.select(sa.func.max(batches.c.batch_seq)).where(batches.c.hour_us == hour)).scalar()
        seq = 0 if last is None else last + 1
        batch_id = f"{iso(hour)[:13]}-{seq:05d}"
        connection.execute(
            batches.insert().values(
                batch_id=batch_id, type="usage_batch", lane=lane, hour_us=hour, batch_seq=seq, state="filling"
            )
        )
        return self._filling(connection, lane)

    def _move_rows(self, connection: sa.Connection, batch: Any, limit: int) -> int:
        chosen = (
            sa.select(usage_events.c.event_id)
            .where(UNSEALED, usage_events.c.lane == batch.lane)
            .where(usage_events.c.recorded_at >= batch.hour_us)
            .where(usage_events.c.recorded_at < batch.hour_us + HOUR_US)
            .order_by(usage_events.c.recorded_at, usage_events.c.event_id)
            .limit(limit)
        )
        update = usage_events.update().where(usage_events.c.event_id.in_(chosen)).values(batch_id=batch.batch_id)
        return int(connection.execute(update).rowcount)

    def _size(self, connection: sa.Connection, batch_id: str) -> int:
        count = sa.select(sa.func.count()).where(usage_events.c.batch_id == batch_id)
        return int(connection.execute(count).scalar_one())

    def _close(self, connection: sa.Connection, batch: Any) -> None:
        records, first, last, gpu_time_ns = connection.execute(
            sa.select(
                sa.func.count(),
                sa.func.min(usage_events.c.recorded_at),
                sa.func.max(usage_events.c.recorded_at),
                sa.func.sum(usage_events.c.gpu_time_ns),  # at most 50,000 rows of at most 1.8e14: inside 63 bits
            ).where(usage_events.c.batch_id == batch.batch_id)
        ).one()
        connection.execute(
            batches.update()
            .where(batches.c.ordinal == batch.ordinal, batches.c.state == "filling")
            .values(
                state="closed",
                records=records,
                first_recorded_at=first,
                last_recorded_at=last,
                gpu_time_ns=str(gpu_time_ns),
                complete_until=complete_until(connection, batch.lane),
            )
        )

    def _root_closed(self, lane: str) -> list[str]:
        """`closed` → `sealed`. The rows are fixed by now, so that reading them needs no lock."""
        with self._database.read() as connection:
            closed = connection.execute(sa.select(batches).filter_by(lane=lane, state="closed")).all()
        sealed = []
        for batch in closed:
            with self._database.read() as connection:
                root = merkle_root(rows_of_batch(connection, batch.batch_id))
            # A crash before this commit: still `closed`, and the root is made again from the same rows.
            with self._database.write() as connection:
                changed = connection.execute(
                    batches.update()
                    .where(batches.c.ordinal == batch.ordinal, batches.c.state == "closed")
                    .values(state="sealed", merkle_root=root.hex())
                )
            sealed += [batch.batch_id] if changed.rowcount else []
        return sealed

    def _declare_hours(self, connection: sa.Connection, lane: str) -> None:
        """A watermark for each hour that no further row of the lane can fall into: with its totals, empty or not."""
        until = complete_until(connection, lane)
        begin = hour = int(connection.execute(sa.select(lanes.c.next_watermark_us).filter_by(lane=lane)).scalar_one())
        while hour + HOUR_US <= until:
            rows = connection.execute(
                sa.select(batches.c.records, batches.c.gpu_time_ns).filter_by(
                    lane=lane, hour_us=hour, type="usage_batch"
                )
            ).all()
            connection.execute(
                batches.insert().values(
                    batch_id=f"watermark/{lane}/{iso(hour)[:13]}",
                    type="watermark",
                    lane=lane,
                    hour_us=hour,
                    state="sealed",
                    records=sum(row.records for row in rows),
                    gpu_time_ns=str(sum(int(row.gpu_time_ns) for row in rows)),
                    complete_until=until,
                )
            )
            hour += HOUR_US
        if hour != begin:
            connection.execute(lanes.update().where(lanes.c.lane == lane).values(next_watermark_us=hour))


def _oldest_unsealed(connection: sa.Connection, lane: str) -> int | None:
    query = sa.select(sa.func.min(usage_events.c.recorded_at)).where(UNSEALED, usage_events.c.lane == lane)
    oldest = connection.execute(query).scalar()
    return None if oldest is None else int(oldest)


def complete_until(connection: sa.Connection, lane: str) -> int:
    """The time before which every row of the lane is in a batch that is closed or older (exclusive)."""
    frontier = int(connection.execute(sa.select(lanes.c.frontier_us).filter_by(lane=lane)).scalar_one())
    oldest = _oldest_unsealed(connection, lane)
    return frontier if oldest is None else min(frontier, oldest)
