"""Which gateway works on which jobs: epochs, leases, and taking over what a dead one left.

A gateway has an id for good and an *epoch*, one more at each start; its jobs and their acceptances name both. While
it lives it renews a lease. An epoch is over once a *takeover* says who works on its jobs from then on: the same
gateway's next epoch, or another gateway that found the lease run out. Takeovers follow each other, so that each job has
one gateway at every moment: the last of its chain.

- What is over writes nothing any more: the first statement of each transaction asks (`ended`). A gateway that was
  frozen, or cut off from the database, and wakes up, can neither start nor end a job that another works on.
- A gateway that cannot renew its lease stops its own work before anybody else may take it over: `lasts_s`.
- Nobody takes over from others before it has held its own lease for a whole one: where the database was away, everybody
  finds their leases run out, and has that long to renew them.
- On PostgreSQL the time is the server's, one clock for all gateways. On SQLite there is one gateway (`gateway.lock`),
  which takes over everything at its start.
- A device is one gateway's at a time: two that shared one would each bill its time, as if the other were not there.

A crash before the commit of a takeover: nothing has changed. After it: the jobs are the taker's, and if it died, too,
are taken over from it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from render_platform.clock import US_PER_SECOND, Clock, Ids
from render_platform.database import Database, Prepared, gateways, jobs, metadata
from render_platform.errors import UsageError

UNFINISHED = ("queued", "running")
takeovers = sa.Table(
    "takeovers",
    metadata,
    sa.Column("gateway_id", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("by_gateway_id", sa.Text, nullable=False),
    sa.Column("by_epoch", sa.Integer, nullable=False),
)
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("gateway_id", sa.Text, nullable=False),
)
cancellations = sa.Table(  # of jobs that another gateway works on
    "cancellations",
    metadata,
    sa.Column("job_id", sa.LargeBinary, primary_key=True),
)


class Epoch(NamedTuple):
    gateway_id: str
    number: int


class Begun(NamedTuple):
    epoch: Epoch
    dropped: int
    """Events that this gateway had not brought to ClickHouse before."""


class Lease:
    """One gateway's, from its start on. `begin` first; `renew` and `take_over` inside transactions of its writer."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        ids: Ids,
        name_file: Path,
        lease_s: int,
        *,
        steady_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name_file` keeps the gateway's id, where the database is not of one gateway alone."""
        self._database, self._clock, self._ids, self._name_file = database, clock, ids, name_file
        self._lease_s, self._steady_s = lease_s, steady_s
        self.shared = database.engine.dialect.name == "postgresql"
        self._me = Epoch("", 0)
        self._since_s = self._until_s = steady_s()

    def begin(self, using: Collection[str] = ()) -> Begun:
        """A new epoch, with what former ones of this gateway left. UsageError where another uses a device of `using`.

        A crash after its commit: an epoch without jobs. The next start begins another.
        """
        begun_s = self._steady_s()
        with self._database.write() as connection:
            now_us = self._now_us(connection)
            found = self._row(connection)
            number = 1 if found is None else found.epoch + 1
            gateway_id = f"gw-{self._ids.random(6).hex()}" if found is None else found.gateway_id
            self._claim(connection, gateway_id, using, now_us)
            values = {"epoch": number, "lease_until_us": now_us + self._lease_s * US_PER_SECOND}
            if found is None:
                connection.execute(gateways.insert().values(gateway_id=gateway_id, **values))
            else:
                connection.execute(gateways.update().filter_by(gateway_id=gateway_id).values(**values))
            self._me = Epoch(gateway_id, number)
            self._take(connection, now_us, lambda owner: not self.shared or owner.gateway_id == gateway_id)
        if self.shared and found is None:  # a crash before this: nobody is that gateway any more, and it has no jobs
            self._name_file.write_text(gateway_id + "\n")
        self._since_s, self._until_s = begun_s, begun_s + self._lease_s
        return Begun(self._me, 0 if found is None else found.fast_path_dropped)

    def renew(self, connection: sa.Connection, dropped: int) -> int:
        """Say that this gateway lives, for one lease more; gives how many live. `renewed` once it is committed."""
        now_us = self._now_us(connection)
        values = {"lease_until_us": now_us + self._lease_s * US_PER_SECOND, "fast_path_dropped": dropped}
        connection.execute(gateways.update().filter_by(gateway_id=self._me.gateway_id).values(**values))
        living = sa.select(sa.func.count()).select_from(gateways).where(gateways.c.lease_until_us > now_us)
        return int(connection.execute(living).scalar_one()) if self.shared else 1

    def renewed(self, asked_s: float) -> None:
        """The lease was renewed by a transaction that began after `asked_s`."""
        if asked_s > self._until_s:  # others may have found it run out
            self._since_s = asked_s
        self._until_s = asked_s + self._lease_s

    def give_up(self, connection: sa.Connection) -> None:
        """The gateway ends in order: others need not wait for its lease to run out."""
        connection.execute(gateways.update().filter_by(gateway_id=self._me.gateway_id).values(lease_until_us=0))

    @property
    def lasts_s(self) -> float:
        """How long nobody can take over this gateway's jobs. Without others, for ever."""
        return self._until_s - self._steady_s() if self.shared else float("inf")

    def take_over(self, connection: sa.Connection) -> None:
        """Take the jobs of gateways whose lease has run out."""
        if self.shared and self._steady_s() >= self._since_s + self._lease_s:
            self._take(connection, self._now_us(connection), lambda _owner: True)

    def mine(self) -> list[Epoch]:
        """Epochs with unfinished jobs that this gateway works on: its own, and those that it has taken over."""
        with self._database.read() as connection:
            next_of = _chain(connection)
            return [one for one in _epochs(connection) if _owner(one, next_of) == self._me]

    def _take(self, connection: sa.Connection, now_us: int, may: Callable[[Epoch], bool]) -> None:
        living = {self._me}
        standing = set(_epochs(connection))
        for row in connection.execute(sa.select(gateways)).all():
            standing.add(Epoch(row.gateway_id, row.epoch))
            if self.shared and row.lease_until_us > now_us:
                living.add(Epoch(row.gateway_id, row.epoch))
        next_of = _chain(connection)
        for one in sorted(standing):
            owner = _owner(one, next_of)
            if owner not in living and may(owner):
                next_of[owner] = self._me
                values = {"by_gateway_id": self._me.gateway_id, "by_epoch": self._me.number}
                over = {"gateway_id": owner.gateway_id, "epoch": owner.number}
                connection.execute(takeovers.insert().values(**over, **values))

    def _claim(self, connection: sa.Connection, gateway_id: str, using: Collection[str], now_us: int) -> None:
        """The devices are this gateway's, and no others are."""
        query = sa.select(devices.c.device, gateways.c.gateway_id).join(
            gateways, gateways.c.gateway_id == devices.c.gateway_id
        )
        others = query.where(devices.c.device.in_(using), gateways.c.gateway_id != gateway_id)
        if self.shared and (taken := connection.execute(others.where(gateways.c.lease_until_us > now_us)).first()):
            raise UsageError(
                f"the device {taken.device} is used by {taken.gateway_id}",
                f"give each gateway devices of its own, or wait {self._lease_s} s if that one has ended",
            )
        connection.execute(devices.delete().where(devices.c.device.in_(using)))
        connection.execute(devices.delete().filter_by(gateway_id=gateway_id))
        if using:
            connection.execute(devices.insert(), [{"device": one, "gateway_id": gateway_id} for one in using])

    def _row(self, connection: sa.Connection) -> sa.Row[tuple[object, ...]] | None:
        query = sa.select(gateways).order_by(gateways.c.gateway_id)
        if not self.shared:
            return connection.execute(query).first()
        known = self._name_file.read_text().strip() if self._name_file.exists() else ""
        found = connection.execute(query.filter_by(gateway_id=known)).first()
        if known and found is None:
            raise UsageError(
                f"the database does not know {known}, the gateway of {self._name_file.parent}",
                f"give database_url as it was; if that database is gone for good, delete {self._name_file}",
            )
        return found

    def _now_us(self, connection: sa.Connection) -> int:
        if not self.shared:
            return self._clock.now_us()
        return int(connection.execute(_SERVER_US).scalar_one())


def ended(connection: sa.Connection, gateway_id: str, epoch: int) -> bool:
    """Whether the epoch is over: another works on its jobs."""
    return _ENDED.first(connection, gateway=gateway_id, number=epoch) is not None


def ask_to_cancel(connection: sa.Connection, job_id: uuid.UUID) -> None:
    """For the gateway that works on the job."""
    known = connection.execute(sa.select(cancellations).filter_by(job_id=job_id.bytes)).first()
    if known is None:
        connection.execute(cancellations.insert().values(job_id=job_id.bytes))


def cancelled_elsewhere(connection: sa.Connection, held: Collection[bytes]) -> Sequence[bytes]:
    """Which of the jobs that are held here another gateway was asked to cancel."""
    asked = connection.execute(sa.select(cancellations.c.job_id)).scalars().all()
    return [bytes(one) for one in asked if bytes(one) in held]


def forget_cancellations(connection: sa.Connection) -> None:
    """Those of jobs that have ended."""
    unfinished = sa.select(jobs.c.job_id).where(_IS_UNFINISHED)
    connection.execute(cancellations.delete().where(cancellations.c.job_id.not_in(unfinished)))


def _epochs(connection: sa.Connection) -> list[Epoch]:
    query = sa.select(jobs.c.gateway_id, jobs.c.epoch).where(_IS_UNFINISHED).distinct()
    return [Epoch(row.gateway_id, row.epoch) for row in connection.execute(query)]


def _chain(connection: sa.Connection) -> dict[Epoch, Epoch]:
    rows = connection.execute(sa.select(takeovers)).all()
    return {Epoch(row.gateway_id, row.epoch): Epoch(row.by_gateway_id, row.by_epoch) for row in rows}


def _owner(epoch: Epoch, next_of: dict[Epoch, Epoch]) -> Epoch:
    while epoch in next_of:  # an epoch takes over only from those that are over: there is no circle
        epoch = next_of[epoch]
    return epoch


_IS_UNFINISHED = sa.or_(*(jobs.c.state == state for state in UNFINISHED))
_ENDED = Prepared(
    sa.select(takeovers.c.epoch).where(
        takeovers.c.gateway_id == sa.bindparam("gateway"), takeovers.c.epoch == sa.bindparam("number")
    )
)
_SERVER_US = sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
