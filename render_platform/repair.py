"""Repair of the fast path: rows that are missing are inserted again from the authoritative batches, and a rollup that
lost what its raw rows hold is made again from them.

planned ──▶ logged, or abandoned. The plan, with its event ids, is in SQL before the first row is inserted, and
ClickHouse is looked at again after that: of two repairs at once, the later one sees what the other inserted, or shares
its plan and its tokens. A repair that crashed is finished by running it again, and inserts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import Clock, Ids, iso, uuid7
from render_platform.database import Database, repairs
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.events import event_ids, total_gpu_time_ns, uuid_texts

CHUNK_ROWS = 10_000


class FastRows(Protocol):
    def insert_events(self, table: pa.Table, token: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    repair_id: str
    hour_us: int
    event_ids: tuple[bytes, ...]
    resumed: bool = field(default=False, compare=False)

    @property
    def event_texts(self) -> list[str]:
        return [str(UUID(bytes=event_id)) for event_id in self.event_ids]


class Repairs:
    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

    def plan(self, hour_us: int, event_ids: Sequence[str], *, rollup: bool = False) -> Plan | None:
        """What to insert. A plan that an earlier run left unfinished comes first.

        None where nothing is missing, unless the hour's rollup has to be rebuilt: such a plan may name no event.
        """
        with self._database.write() as connection:
            row = connection.execute(
                sa.select(repairs).filter_by(hour_us=hour_us, state="planned").limit(1)
            ).one_or_none()
            if row is not None:
                return Plan(row.repair_id, hour_us, tuple(_split(row.event_ids)), resumed=True)
            if not event_ids and not rollup:
                return None
            packed = b"".join(sorted(bytes.fromhex(event_id.replace("-", "")) for event_id in event_ids))
            repair_id = str(uuid7(self._clock.now_us(), self._ids))
            # A crash before this commit: nothing was planned. After it: the next repair of the hour finishes this one.
            connection.execute(
                repairs.insert().values(repair_id=repair_id, hour_us=hour_us, state="planned", event_ids=packed)
            )
        return Plan(repair_id, hour_us, tuple(_split(packed)))

    def insert(self, plan: Plan, rows: pa.Table, fast: FastRows, missing: Collection[str]) -> pa.Table:
        """Insert those of the plan's rows that are still `missing`; gives the rows that this call inserted.

        Chunks are of the plan's rows sorted by id, the same on every attempt, each under its own token. A chunk that
        stands in part came otherwise: what is left of it has a token of its own.
        """
        wanted = pa.array([UUID(event_id).bytes for event_id in missing], pa.binary(16))
        inserted = [rows.slice(0, 0)]
        for number, start in enumerate(range(0, rows.num_rows, CHUNK_ROWS)):
            chunk = rows.slice(start, CHUNK_ROWS)
            left = chunk.filter(pc.is_in(event_ids(chunk), value_set=wanted))
            token = f"{plan.repair_id}:{number}"
            if left.num_rows:
                fast.insert_events(left, token if left.num_rows == chunk.num_rows else f"{token}:{left.num_rows}")
            inserted.append(left)
        return pa.concat_tables(inserted)

    def record(self, plan: Plan, rows: pa.Table, rollup: bool, put: Callable[[bytes], str]) -> AuditEntry:
        """The repair's record as a blob, and the draft of the entry that binds it."""
        data = canonical.encode(
            {
                "version": 1,
                "repair_id": plan.repair_id,
                "hour": plan.hour_us,
                "records": rows.num_rows,
                "gpu_time_ns": total_gpu_time_ns(rows),
                "rollup_rebuilt": rollup,
                "event_ids": uuid_texts(rows, "event_id"),
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

    def abandon(self, plan: Plan) -> None:
        """The plan was made from an old look, or ClickHouse did not keep its rows: the next repair makes a new one."""
        with self._database.write() as connection:
            _set_state(connection, plan, "abandoned")

    @staticmethod
    def mark_logged(connection: sa.Connection, plan: Plan) -> None:
        _set_state(connection, plan, "logged")


def _set_state(connection: sa.Connection, plan: Plan, state: str) -> None:
    connection.execute(repairs.update().where(repairs.c.repair_id == plan.repair_id).values(state=state))


def _split(packed: bytes) -> Iterator[bytes]:
    yield from (packed[start : start + 16] for start in range(0, len(packed), 16))
