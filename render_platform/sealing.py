"""Sealing: unsealed rows become batches of one lane and one hour, closed hours get their watermark, batches are stored.

    filling ──▶ closed ──▶ sealed ──▶ stored ──▶ logged ──▶ published

`filling` takes rows, a few thousand a transaction, so that other writers never wait long. `closed` fixes the set of
rows. `sealed` adds the Merkle root over them. Each step re-reads its state: any of them may be run again, at any time.

With each batch and watermark of the live lane it is also fixed which jobs the gateways have accepted by then, and how
many of them have no event in a batch yet (docs/formats.md, "Acceptance ranges"): counted in the same transactions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from render_platform import __version__
from render_platform import batches as batch_bytes
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, Clock, hour_of, iso
from render_platform.database import (
    Database,
    acceptances,
    batch_acceptances,
    batches,
    gateways,
    jobs,
    lanes,
    usage_events,
)
from render_platform.entries import MAX_ACCEPTANCES
from render_platform.errors import Finding
from render_platform.events import merkle_root
from render_platform.note import Signer
from render_platform.outbox import LIVE, rows_of_batch

UNSEALED = usage_events.c.batch_id.is_(None)


Then = Callable[[str, pa.Table], None]
"""Told of a batch that is sealed: its id, and the rows that its root was made of."""


class Sealer:
    def __init__(self, database: Database, clock: Clock, *, batch_rows: int, rows_a_transaction: int) -> None:
        self._database = database
        self._clock = clock
        self._batch_rows = batch_rows
        self._rows_a_transaction = rows_a_transaction

    def seal(self, then: Then = lambda *_: None) -> list[str]:
        """Seal every row that is recorded, declare every hour that is over; gives the ids sealed by this call.

        `then(batch_id, rows)` follows each batch: what it raises ends the call, and leaves the batch sealed.
        """
        with self._database.write() as connection:
            self._advance_live_frontier(connection)
            names = connection.execute(sa.select(lanes.c.lane).order_by(lanes.c.lane)).scalars().all()
        sealed: list[str] = []
        for lane in names:
            while self._fill(lane):
                sealed += self._root_closed(lane, then)
            sealed += self._root_closed(lane, then)
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
            if lane == LIVE:
                _begin_counting(connection)
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
        if batch.lane == LIVE:
            _count_ended(connection, chosen)
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
                gpu_time_ns=str(int(gpu_time_ns)),
                complete_until=complete_until(connection, batch.lane),
            )
        )
        if batch.lane == LIVE:
            _declare_acceptances(connection, batch.ordinal)

    def _root_closed(self, lane: str, then: Then) -> list[str]:
        """`closed` → `sealed`. The rows are fixed by now, so that reading them needs no lock."""
        with self._database.read() as connection:
            closed = connection.execute(sa.select(batches).filter_by(lane=lane, state="closed")).all()
        sealed = []
        for batch in closed:
            with self._database.read() as connection:
                rows = rows_of_batch(connection, batch.batch_id)
            root = merkle_root(rows)
            # A crash before this commit: still `closed`, and the root is made again from the same rows.
            with self._database.write() as connection:
                changed = connection.execute(
                    batches.update()
                    .where(batches.c.ordinal == batch.ordinal, batches.c.state == "closed")
                    .values(state="sealed", merkle_root=root.hex())
                )
            if changed.rowcount:
                sealed.append(batch.batch_id)
                then(batch.batch_id, rows)
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
            declared = connection.execute(
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
            if lane == LIVE and declared.inserted_primary_key is not None:
                _declare_acceptances(connection, declared.inserted_primary_key[0])
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


# Acceptances: which jobs were accepted, and which of them have ended, as the entries of the live lane say it.


def _begin_counting(connection: sa.Connection) -> None:
    """A row for each epoch that has begun, from a gateway's first. Of a gateway whose jobs were sealed before there was
    any row, the epochs until now stay uncounted: nobody can say any more which entry each of its jobs belongs to."""
    for gateway in connection.execute(sa.select(gateways.c.gateway_id, gateways.c.epoch)).all():
        newest = sa.select(sa.func.max(acceptances.c.epoch)).filter_by(gateway_id=gateway.gateway_id)
        known = connection.execute(newest).scalar()
        state, first = "counting", (known or 0) + 1
        if known is None and _sealed_before(connection, gateway.gateway_id):
            state, first = "uncounted", gateway.epoch
        begun = [
            {"gateway_id": gateway.gateway_id, "epoch": epoch, "state": state, "sealed": 0, "open": 0, "oldest": 1}
            for epoch in range(first, gateway.epoch + 1)
        ]
        if begun:
            connection.execute(acceptances.insert(), begun)


def _sealed_before(connection: sa.Connection, gateway_id: str) -> bool:
    own = sa.select(usage_events.c.event_id).where(
        usage_events.c.source == f"gateway/{gateway_id}", usage_events.c.batch_id.is_not(None)
    )
    return connection.execute(own.limit(1)).scalar() is not None


def _count_ended(connection: sa.Connection, chosen: sa.Select[Any]) -> None:
    """Before the `chosen` events move into a batch: how many jobs of each epoch have ended with them."""
    found = connection.execute(
        sa.select(jobs.c.gateway_id, jobs.c.epoch, sa.func.count().label("ended"))
        .join(usage_events, usage_events.c.job_id == jobs.c.job_id)
        .where(usage_events.c.event_id.in_(chosen))
        .group_by(jobs.c.gateway_id, jobs.c.epoch)
    )
    for gateway_id, epoch, ended in found.all():
        connection.execute(
            acceptances.update()
            .where(acceptances.c.gateway_id == gateway_id, acceptances.c.epoch == epoch)
            .where(acceptances.c.state != "uncounted")
            .values(sealed=acceptances.c.sealed + ended, state="counting")
        )


def _declare_acceptances(connection: sa.Connection, ordinal: int) -> None:
    """Fix what the entry of this batch or watermark will say: every epoch of which something has changed.

    One transaction fixes the rows and these figures: no accept and no end can come in between. An entry holds
    MAX_ACCEPTANCES of them; what is left over stays `counting`, and stands in the entries after it.
    """
    query = sa.select(acceptances, gateways.c.epoch.label("current"))
    query = query.join(gateways, gateways.c.gateway_id == acceptances.c.gateway_id).where(
        acceptances.c.state == "counting"
    )
    epochs = connection.execute(query.order_by(acceptances.c.gateway_id, acceptances.c.epoch)).all()
    waiting = _unfinished(connection) if epochs else {}
    said: list[dict[str, Any]] = []
    for known in epochs:
        now = _standing(connection, known, waiting)
        if now != (known.through, known.open, known.oldest):
            if len(said) == MAX_ACCEPTANCES:
                break
            first = {"gateway": known.gateway_id, "epoch": known.epoch, "from": (known.through or 0) + 1}
            said.append({**first, "through": now[0], "open": now[1], "oldest": now[2]})
        over = known.epoch < known.current and not now[1]
        connection.execute(
            acceptances.update()
            .where(acceptances.c.gateway_id == known.gateway_id, acceptances.c.epoch == known.epoch)
            .values(through=now[0], open=now[1], oldest=now[2], state="settled" if over else "counting")
        )
    if said:
        connection.execute(batch_acceptances.insert().values(ordinal=ordinal, acceptances=json.dumps(said)))


_Waiting = dict[tuple[str, int], tuple[int, int]]
"""By gateway and epoch: how many jobs have not ended, and the lowest number among them."""


def _unfinished(connection: sa.Connection) -> _Waiting:
    """The states stand in the statement as text, so that the index of unfinished jobs serves."""
    states = sa.or_(jobs.c.state == sa.literal_column("'queued'"), jobs.c.state == sa.literal_column("'running'"))
    found = connection.execute(
        sa.select(jobs.c.gateway_id, jobs.c.epoch, sa.func.count(), sa.func.min(jobs.c.seq))
        .where(states)
        .group_by(jobs.c.gateway_id, jobs.c.epoch)
    )
    return {(row[0], row[1]): (row[2], row[3]) for row in found}


def _standing(connection: sa.Connection, known: Any, waiting: _Waiting) -> tuple[int, int, int]:
    """An epoch's (through, open, oldest) now. `oldest` moves up only where the jobs that wait are all that is open.

    What has ended and is unsealed, what SQL has lost and what ended without an event is open too, and holds it back.
    """
    epoch = {"gateway_id": known.gateway_id, "epoch": known.epoch}
    last = connection.execute(sa.select(sa.func.max(jobs.c.seq)).filter_by(**epoch)).scalar()
    through = max(last or 0, known.through or 0)
    still_open = through - known.sealed
    if not still_open:
        return through, 0, through + 1
    count, lowest = waiting.get((known.gateway_id, known.epoch), (0, 0))
    return through, still_open, lowest if count == still_open else known.oldest


class Delivery:
    """Sealed batches into the CAS: sealed → stored."""

    def __init__(self, database: Database, cas: Cas, signer: Signer) -> None:
        self._database = database
        self._cas = cas
        self._signer = signer

    def store_sealed(self) -> list[str]:
        """Store every sealed batch and its attestation; gives the batch ids. Watermarks have nothing to store.

        Finding where the rows in SQL are not those that were sealed.
        """
        query = sa.select(batches).filter_by(state="sealed", type="usage_batch").order_by(batches.c.ordinal)
        with self._database.read() as connection:
            waiting = connection.execute(query).all()
        for batch in waiting:
            with self._database.read() as connection:
                rows = rows_of_batch(connection, batch.batch_id)
            if merkle_root(rows).hex() != batch.merkle_root or rows.num_rows != batch.records:
                changed = f"the rows of batch {batch.batch_id} are not those that were sealed"
                raise Finding(changed, "restore the database")
            self.store(batch.batch_id, rows)
        return [batch.batch_id for batch in waiting]

    def store(self, batch_id: str, rows: pa.Table) -> None:
        """Store one sealed batch, of which `rows` are known to be those that its root was made of."""
        data = batch_bytes.encode(rows)
        # A crash from here to the commit leaves objects that nothing names; the next call makes the same ones.
        digest = self._cas.put(data)
        envelope = batch_bytes.attest(batch_id, digest, rows, self._signer, f"render-platform/{__version__}")
        attestation_digest = self._cas.put(envelope)
        stored = {"blob_digest": digest, "blob_size": len(data), "attestation_digest": attestation_digest}
        # After this commit the digest is fixed: the batch is never encoded again.
        with self._database.write() as connection:
            connection.execute(
                batches.update().filter_by(batch_id=batch_id, state="sealed").values(state="stored", **stored)
            )
