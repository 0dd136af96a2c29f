"""Repair of the fast path: rows that are missing are inserted again from the authoritative batches.

planned ──▶ logged. The plan, with its event ids, is in SQL before the first row is inserted; chunks go in under tokens
`repair_id:chunk`, so that a repair that crashed is finished by running it again, and inserts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import pyarrow as pa
import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import Clock, Ids, iso, uuid7
from render_platform.database import Database, repairs
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.events import total_gpu_time_ns

CHUNK_ROWS = 10_000


class FastRows(Protocol):
    def insert_events(self, table: pa.Table, token: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    repair_id: str
    hour_us: int
    event_ids: tuple[bytes, ...]


class Repairs:
    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

    def plan(self, hour_us: int, event_ids: Sequence[str]) -> Plan | None:
        """What to insert. A plan that an earlier run left unfinished comes first; None where nothing is missing."""
        with self._database.write() as connection:
            row = connection.execute(
                sa.select(repairs).filter_by(hour_us=hour_us, state="planned").limit(1)
            ).one_or_none()
            if row is not None:
                return Plan(row.repair_id, hour_us, tuple(_split(row.event_ids)))
            if not event_ids:
                return None
            packed = b"".join(sorted(bytes.fromhex(event_id.replace("-", "")) for event_id in event_ids))
            repair_id = str(uuid7(self._clock.now_us(), self._ids))
            # A crash before this commit: nothing was planned. After it: the next repair of the hour finishes this one.
            connection.execute(
                repairs.insert().values(repair_id=repair_id, hour_us=hour_us, state="planned", event_ids=packed)
            )
        return Plan(repair_id, hour_us, tuple(_split(packed)))

    def insert(self, plan: Plan, rows: pa.Table, fast: FastRows) -> None:
        """Insert the plan's rows, sorted by id, in chunks that are the same on every attempt."""
        for number, start in enumerate(range(0, rows.num_rows, CHUNK_ROWS)):
            fast.insert_events(rows.slice(start, CHUNK_ROWS), f"{plan.repair_id}:{number}")

    def record(self, plan: Plan, rows: pa.Table, put: Callable[[bytes], str]) -> AuditEntry:
        """The repair's record as a blob, and the draft of the entry that binds it."""
        data = canonical.encode(
            {
                "version": 1,
                "repair_id": plan.repair_id,
                "hour": plan.hour_us,
                "records": rows.num_rows,
                "gpu_time_ns": total_gpu_time_ns(rows),
                "event_ids": [str(UUID(bytes=event_id)) for event_id in plan.event_ids],
            }
        )
        return AuditEntry(
            type="repair",
            batch_id=f"{iso(plan.hour_us)[:13]}/{plan.repair_id}",
            previous=FIRST_PREVIOUS,
            recorded_hour=plan.hour_us,
            subject_digest=put(data),
            subject_size=len(data),
            records=rows.num_rows,
            gpu_time_ns=total_gpu_time_ns(rows),
        )

    @staticmethod
    def mark_logged(connection: sa.Connection, plan: Plan) -> None:
        connection.execute(repairs.update().where(repairs.c.repair_id == plan.repair_id).values(state="logged"))


def _split(packed: bytes) -> Iterator[bytes]:
    yield from (packed[start : start + 16] for start in range(0, len(packed), 16))
