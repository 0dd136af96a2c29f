"""The gateway as a whole: its parts, put together over one state folder, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import itertools
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
import structlog

from render_platform import __version__
from render_platform.cas import Cas, check_stores, open_objects
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clock import Clock, Ids, SystemClock, SystemIds, uuid7
from render_platform.config import Settings
from render_platform.database import job_outputs, open_database
from render_platform.errors import Missing, PlatformError, SequencerStopped, Unavailable, UsageError
from render_platform.events import UsageEvent
from render_platform.gateway.archive import Archive, Recovered
from render_platform.gateway.backends import Backend
from render_platform.gateway.catalogue import BackendSpec, Catalogue, make_catalogue
from render_platform.gateway.engine import Engine
from render_platform.gateway.fleet import Device, Fleet, Server, never_ran
from render_platform.gateway.identity import ApiKeys, Customers, Identity, Principal
from render_platform.gateway.ingest import Ingest
from render_platform.gateway.jobs import STOPPING, Job, acceptance_of, signing
from render_platform.gateway.journal import Journal, Setup
from render_platform.gateway.leases import Lease, cancelled_elsewhere, forget_cancellations
from render_platform.gateway.limits import Buckets
from render_platform.gateway.meters import DeviceMeter, open_meter
from render_platform.gateway.openai_backend import OpenAiBackend
from render_platform.gateway.outbound import Outbound, SystemResolver
from render_platform.gateway.publisher import Publisher
from render_platform.gateway.reporter import Reporter
from render_platform.gateway.simulated_backend import SimulatedBackend
from render_platform.gateway.store import Do, JobStore, Operation
from render_platform.gateway.tokens import Issuer, Tokens
from render_platform.gateway.triton import TritonBackend
from render_platform.gateway.webhooks import Deliveries
from render_platform.gateway.writer import Writer, WriterEnded
from render_platform.note import claimed_checkpoint
from render_platform.outbox import Outbox
from render_platform.pipeline import RoleKeys
from render_platform.receipts import Receipts

BackendFactory = Callable[[BackendSpec], Backend]
KINDS: dict[str, BackendFactory] = {
    "openai": OpenAiBackend,
    "triton": TritonBackend,
    "simulated": SimulatedBackend,
}
EXPIRED_AT_ONCE = 100
RECOVERED_AT_ONCE = 100
RENEW_AGAIN_S = 1.0
HEED_S = 1.0
"""How often a gateway asks what others have left to it, and were told to cancel."""
_log = structlog.get_logger()


class Gateway:
    """Everything that the routes need. Made on the loop that it runs on; `start` before use, `stop` at the end."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        ids: Ids | None = None,
        kinds: dict[str, BackendFactory] | None = None,
        apart: bool = False,
    ) -> None:
        """`apart`: jobs are written by a process of their own (see `journal`), with its own clock and ids."""
        self.settings = settings
        self.clock, self.ids = clock or SystemClock(), ids or SystemIds()
        self.catalogue = make_catalogue(settings.catalogue)
        self._lock = _lock(settings.state_dir / "gateway.lock")
        self.database = open_database(settings.database)
        self.outbox = Outbox(self.database, self.ids)
        self.archive = Archive(self.database, self.clock)
        blobs, self.log_objects = open_objects(settings, self.ids)
        self.cas = Cas(blobs)
        self.receipts = Receipts(self.database, self.cas, self.log_objects)
        self.keys = ApiKeys(self.database, self.clock, self.ids)
        self.customers = Customers(self.database)
        self.anonymous = not self.catalogue.issuers and not self.keys.list()
        _require_loopback(settings.gateway_host, self.anonymous)
        self.identity = Identity(
            self.keys, Tokens(_issuers(self.catalogue)), self.customers, self.clock, self.anonymous
        )
        self.buckets = Buckets()
        self.may_submit: Callable[[Principal], None] = lambda _caller: None
        """Refuses a caller who may not give jobs now; see spend_routes.BudgetGuard."""
        self.meter = open_meter(settings.meter)
        self.fleet = _fleet(self.catalogue, self.meter, kinds or KINDS)
        self._begin_epoch()
        keys = RoleKeys(settings, self.database, self.cas)
        self._log_size = keys.log_size
        name = f"render-platform.local/{self.gateway_id}"
        self.signer = keys.signers("gateway", settings.gateway_signer, name, old=False)[0]
        sign = signing(self.signer, self.gateway_id, self.epoch)
        self.store = JobStore(self.outbox, self.clock, self.ids, self.gateway_id, self.epoch, sign)
        loop, self.died = asyncio.get_running_loop(), asyncio.Event()
        self.writer: Writer[Operation] = Writer(self.database, self.store, loop, self.died)
        shared = self._lock.fileno(), loop, self.died, self.writer.last
        self.journal = Journal(self._journal_setup(keys), *shared) if apart else None
        self.publisher = Publisher(self._open_clickhouse, self.clock, settings.fast_path_deadline_s)
        dagster = f"http://127.0.0.1:{settings.dagster_port}"
        self.reporter = Reporter(dagster, self.clock, self.gateway_id, self.epoch, settings.report_every_s)
        allowed = frozenset(filter(None, settings.webhook_allow.split(",")))
        outbound = Outbound(SystemResolver(), allowed)
        self.deliveries = Deliveries(
            self.database, self.writer, outbound, self.customers, self.clock, self.ids, allowed
        )
        self.ingest = Ingest(self.outbox, self.ids, self.clock)
        self.now_ns = _steady_ns()
        self.ended: Counter[tuple[str, str]] = Counter()
        """Jobs that ended since the start, by model and status."""
        self.gpu_time_ns: Counter[str] = Counter()
        self.engine = Engine(
            self.fleet,
            self.journal or self.writer,
            self.clock,
            self.ids,
            now_ns=self.now_ns,
            output_ttl_s=settings.output_ttl_s,
            on_end=self._ended,
            may_run=lambda: self.lease.lasts_s > 0,
        )
        self._background: list[asyncio.Task[None]] = []
        self.reading_bytes = 0
        self.drained = False
        """Nothing runs any more, and nothing will: watchers may go."""
        self.broken: list[str] = []
        """Background work that ended by a defect."""

    def _begin_epoch(self) -> None:
        settings = self.settings
        name_file = settings.state_dir / "gateway.id"
        self.lease = Lease(self.database, self.clock, self.ids, name_file, settings.gateway_lease_s)
        begun = self.lease.begin({server.device.name for server in self.fleet.servers.values()})
        (self.gateway_id, self.epoch), self._dropped_before = begun
        self._working_on = {begun.epoch}

    async def start(self) -> None:
        """Open backends, take over what a former epoch left, and begin. UsageError where a backend is misconfigured."""
        self.writer.start()
        self._go_on(self._keep_lease())  # first: a store that answers late must not cost the lease
        await asyncio.to_thread(self._check_evidence)
        if self.journal is not None:
            await self.journal.start()
        for server in self.fleet.servers.values():
            try:
                await server.backend.start()
            except Unavailable as error:
                _log.warning("backend_unavailable", backend=server.spec.name, error=str(error))
        await self._recover()
        self.publisher.start()
        for work in (self.reporter.run(), self.deliveries.run()):
            self._go_on(work)
        if self.lease.shared:
            self._go_on(self._heed_others())

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        self._background.append(asyncio.create_task(work))
        self._background[-1].add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        """Work that goes on for ever has ended: on purpose, or by a defect, which must be seen."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            name = str(task.get_coro())
            self.broken.append(name)
            _log.error("background_work_ended", work=name, exc_info=error)

    async def _recover(self) -> None:
        """Queued jobs that were taken over run; running ones run again, or end visibly where they cannot."""
        epochs = set(await asyncio.to_thread(self.lease.mine)) - self._working_on
        if not epochs:
            return
        found = self.archive.unfinished(self.catalogue, epochs)
        count = 0
        while batch := await asyncio.to_thread(lambda: list(itertools.islice(found, RECOVERED_AT_ONCE))):
            count += len(batch)
            await asyncio.gather(*(self._resume(recovered) for recovered in batch))
        self._working_on |= epochs
        _log.info("jobs_recovered", jobs=count, epochs=[f"{one.gateway_id}/{one.number}" for one in sorted(epochs)])

    async def _resume(self, recovered: Recovered) -> None:
        job = recovered.job
        if recovered.lost:
            text = "the gateway was restarted, and the job cannot be run again"
            await self.engine.finish(job, never_ran("error", recovered.lost, text, 502, self.now_ns()))
        else:
            self.engine.enqueue(job, again=job.attempt > 0)

    async def drain(self) -> None:
        """Take no more work, and let what runs end. Who waits on a connection for a slot is sent away at once."""
        self.engine.draining = True
        for job in list(self.engine.jobs.values()):
            if job.request.direct and job.state in ("queued", "waiting"):
                self.engine.cancel(job, STOPPING)
        await self.engine.drain(self.settings.drain_s)
        self.drained = True

    async def stop(self) -> None:
        """Let running jobs end, write what is left to write, and close everything."""
        await self.drain()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.to_thread(self.publisher.stop, 5.0)
        if self.journal is not None:
            await self.journal.stop()
        with contextlib.suppress(PlatformError):
            await self.writer.submit(Do(self._give_up))
        await self.writer.stop()
        for server in self.fleet.servers.values():
            await server.backend.close()
        self.meter.close()
        self.database.close()
        self._lock.close()

    @property
    def writers(self) -> list[Journal | Writer[Operation]]:
        return [self.writer, *([self.journal] if self.journal is not None else [])]

    def _journal_setup(self, keys: RoleKeys) -> Setup:
        settings, key = self.settings, str(keys.path("gateway"))
        return Setup(__version__, settings.database, self.gateway_id, self.epoch, settings.gateway_signer, key)

    def request_id(self, given: str | None) -> uuid.UUID:
        """The client's own id where it is a UUID, else a new one."""
        if given:
            with contextlib.suppress(ValueError):
                return uuid.UUID(given)
        return uuid7(self.clock.now_us(), self.ids)

    def _check_evidence(self) -> None:
        """UsageError for a store that cannot keep evidence; SequencerStopped for a database that is behind its log:
        numbers of acceptances would be given twice."""
        check_stores(self.settings, self.ids)
        try:
            published = claimed_checkpoint(self.log_objects.read("checkpoint")).size
        except Missing:
            return
        if published > self._log_size:
            raise SequencerStopped(
                f"the published log has {published} entries, this database {self._log_size}",
                "the database is an older copy: run `render-platform recover` first",
            )

    def acceptance(self, job: Job) -> str:
        """The job's signed acceptance. Signed with its commit, it is given once; after that it is signed again."""
        note, job.acceptance = job.acceptance, ""
        return note or acceptance_of(job, self.gateway_id, self.epoch).to_note(self.signer)

    def _open_clickhouse(self) -> ClickHouse:
        settings = self.settings
        return open_clickhouse(settings.clickhouse_url, settings.clickhouse_database, settings.retention_days)

    def _ended(self, job: Job, event: UsageEvent) -> None:
        """After the commit of a job's end."""
        self.ended[job.model.name, event.status] += 1
        self.gpu_time_ns[job.model.name] += event.gpu_time_ns
        self.publisher.offer(event)
        self.reporter.count(event)
        if job.request.webhook:
            self.deliveries.wake()

    async def _keep_lease(self) -> None:
        """Say that this gateway lives, take over from those who do not, and delete outputs whose time is over."""
        pause_s = self.settings.gateway_lease_s / 3
        wait_s = pause_s
        while True:
            await asyncio.sleep(min(wait_s, max(0.0, self.lease.lasts_s)))
            asked_s, wait_s = time.monotonic(), RENEW_AGAIN_S
            try:
                if self.lease.lasts_s <= 0:
                    raise WriterEnded("the gateway's lease has run out", "see why the database took no write")
                async with asyncio.timeout(self.lease.lasts_s if self.lease.shared else None):
                    self.buckets.sharing = await self.writer.submit(Do(self._renew))
                self.lease.renewed(asked_s)
                wait_s = pause_s
            except WriterEnded as error:
                return await self._stop_at_once(error)
            except (PlatformError, TimeoutError) as error:  # the writer has said so; the next renewal may do
                _log.warning("lease_not_renewed", error=str(error), lasts_s=self.lease.lasts_s)

    async def _stop_at_once(self, error: WriterEnded) -> None:
        """Others may work on this gateway's jobs from now on: what runs is cut off, and the process ends."""
        _log.error("gateway_stops", error=str(error))
        await self.engine.drain(0)
        self.drained = True
        self.died.set()

    def _renew(self, connection: sa.Connection) -> int:
        """How many gateways live."""
        living = self.lease.renew(connection, self._dropped_before + self.publisher.dropped)
        self.lease.take_over(connection)
        forget_cancellations(connection)
        now_us = self.clock.now_us()
        expired = sa.select(job_outputs.c.job_id).where(job_outputs.c.expires_us < now_us).limit(EXPIRED_AT_ONCE)
        connection.execute(job_outputs.delete().where(job_outputs.c.job_id.in_(expired)))
        return living

    def _give_up(self, connection: sa.Connection) -> None:
        self.lease.renew(connection, self._dropped_before + self.publisher.dropped)
        self.lease.give_up(connection)

    async def _heed_others(self) -> None:
        """Begin what was taken over from other gateways, and cancel here what they were asked to cancel."""
        while True:
            await asyncio.sleep(HEED_S)
            try:
                await self._recover()
                asked = await asyncio.to_thread(self._cancelled_elsewhere)
            except Unavailable as error:
                _log.warning("other_gateways_not_heeded", error=str(error))
                continue
            for job_id in asked:
                job = self.engine.find(uuid.UUID(bytes=job_id))
                if job is not None and job.outcome is None:
                    self.engine.cancel(job, "cancelled_by_client")

    def _cancelled_elsewhere(self) -> Sequence[bytes]:
        with self.database.read() as connection:
            return cancelled_elsewhere(connection, {job_id.bytes for job_id in self.engine.jobs})


def _lock(path: Path) -> IO[str]:
    """One gateway a state folder. The lock is the kernel's: it ends with its process, however that ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise Unavailable(f"another gateway serves {path.parent}", "use that one, or end it first") from None
    return handle


def _require_loopback(host: str, anonymous: bool) -> None:
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if anonymous and not loopback:
        raise UsageError(
            f"gateway_host is {host}, and there are no API keys and no issuers",
            "make a key with `render-platform key create`, or listen on 127.0.0.1",
        )


def _issuers(catalogue: Catalogue) -> list[Issuer]:
    return [
        Issuer(alias, spec.issuer, spec.audience, spec.claim, Path(spec.jwks_file))
        for alias, spec in catalogue.issuers.items()
    ]


def _fleet(catalogue: Catalogue, meter: DeviceMeter, kinds: Mapping[str, BackendFactory]) -> Fleet:
    """A server a backend. Backends that name one device share its ledger; others have a device of their own."""
    sharing: dict[str, list[BackendSpec]] = defaultdict(list)
    for name, spec in catalogue.backends.items():
        sharing[spec.device or f"backend/{name}"].append(spec)
    servers = []
    for device_name, specs in sharing.items():
        slots = sum(spec.parallel for spec in specs) if all(spec.parallel for spec in specs) else None
        device = Device(device_name, meter, slots)
        servers += [Server(kinds[spec.kind](spec), device) for spec in specs]
    return Fleet(servers)


def _steady_ns() -> Callable[[], int]:
    """Nanoseconds since 1970 that never go back: the clock at the start, and what a monotonic one adds to it."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: offset + time.monotonic_ns()
