"""The page at `/`: what the gateway does now, and one job on its way to its receipt. And the JSON that it shows.

The page is three files of `static/`, the same for everybody: no other host, no inline script, no secret. What it shows
is `/overview` and `/overview/jobs/{id}`: everything for auditors and operators (and for this machine, where no caller
needs a credential); for a customer its own jobs, and no counts. It asks for a key after a 401, keeps it in memory only
and sends it as a header.

For tests, `data-testid` names: `count-accepted`, `count-queued`, `count-running`, `count-finished`, `count-outbox`,
`count-sealed`, `count-published`, `fast-written`, `fast-dropped` (each with the bare number as `data-value`, empty
where it is unknown, and then the text is "unknown"), `last-job` (the id of the job that is followed), `follow-newest`,
`stage-accepted`, `stage-queued`, `stage-running`, `stage-finished`, `stage-fast_path`, `stage-sealed`, `stage-stored`,
`stage-logged`, `stage-published` (each with one `stage-state`: done, waiting, unknown or skipped), `receipt-link`,
`receipt-verify`, `receipt-verdict`, `log-key`, `verdict-last-hour`, `queue-table`, `backends-table`, `link-dagster`,
`link-dagster-assets`, `link-dagster-reconciliation`, `link-dagster-runs`, `link-dagster-automation`, `key-form`,
`key-input`, `banner`.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from litestar import Response, Router, get
from litestar.params import FromPath
from litestar.types import ControllerRouterHandler

from render_platform import tiles
from render_platform.canonical import digest_of
from render_platform.clickhouse import ClickHouse, open_clickhouse
from render_platform.clickhouse_connection import FolderLock
from render_platform.clock import hour_of
from render_platform.config import Settings
from render_platform.errors import Missing, PlatformError, Unavailable
from render_platform.events import event_ids
from render_platform.gateway.edge import AnyConnection, AnyRequest, admit, caller_of, identify
from render_platform.gateway.identity import Principal
from render_platform.gateway.overview import (
    BackendView,
    FastPathCounts,
    Found,
    JobPath,
    Live,
    OverviewView,
    Reader,
    Times,
    path_of,
)
from render_platform.gateway.problems import NotFound
from render_platform.gateway.scheduling import LANES
from render_platform.gateway.service import Gateway
from render_platform.gateway.views import QueueView

STATIC = Path(__file__).with_name("static")
FILES = {"page.css": "text/css", "page.js": "text/javascript", "receipt.js": "text/javascript"}
"""What the page needs, and of which type it is."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
SEES_ALL = ("auditor", "operator")
"""Roles that see every customer's jobs, and the counts."""
KEPT_S = 1.0
"""How long a document answers others who ask for it."""
PATIENCE_S = 1.0
"""How long ClickHouse, or the object store, is waited for."""
MAX_KEPT = 256
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

T = TypeVar("T")


class Asker:
    """Questions to what may be slow, one at a time, in a thread that nobody has to wait for at the end.

    What is not answered in time is None. It goes on meanwhile, and nothing more is asked until it has ended.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._turn = asyncio.Semaphore()

    async def ask(self, question: Callable[[], T]) -> T | None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T | None] = loop.create_future()

        def tell(found: T | None) -> None:
            self._turn.release()
            if not answer.done():
                answer.set_result(found)

        def run() -> None:
            found = None
            try:
                with suppress(PlatformError):  # it could not be read: unknown
                    found = question()
            finally:
                with suppress(RuntimeError):  # the gateway has ended, and its loop with it
                    loop.call_soon_threadsafe(tell, found)

        try:
            async with asyncio.timeout(self._patience_s):
                await self._turn.acquire()
                threading.Thread(target=run, name="page", daemon=True).start()
                return await answer
        except TimeoutError:
            return None


class FastPathReader:
    """ClickHouse, where another process serves it: a server, or the bridge. Opened when it is first asked.

    An embedded folder that nobody serves is left alone: to look at a page must not make this process its owner.
    """

    def __init__(self, settings: Settings) -> None:
        self._url, self._database = settings.clickhouse_url, settings.clickhouse_database
        self._clickhouse: ClickHouse | None = None
        self._used = threading.Lock()

    def rows_of_hour(self, hour_us: int) -> int:
        return self._ask(lambda clickhouse: clickhouse.hourly_totals(hour_us).events)

    def holds(self, event_id: bytes, recorded_at: int, customer_ref: str, model: str) -> bool:
        """Whether the event stands there. Its time and its key are the order of the rows: few are read."""
        key = [(customer_ref, model)]
        return self._ask(lambda one: event_id in event_ids(one.rows(recorded_at, recorded_at + 1, key)).to_pylist())

    def _ask(self, question: Callable[[ClickHouse], T]) -> T:
        with self._used:
            try:
                self._clickhouse = self._clickhouse or self._open()
                return question(self._clickhouse)
            except Unavailable:
                self._let_go()
                raise

    def _open(self) -> ClickHouse:
        folder = Path(self._url.removeprefix("chdb://")).resolve()
        if self._url.startswith("chdb://") and not FolderLock.url_file(folder).exists():
            raise Unavailable("nobody serves the embedded ClickHouse", "start it with `render-platform up`")
        return open_clickhouse(self._url, self._database)

    def _let_go(self) -> None:
        if self._clickhouse is not None:
            self._clickhouse.close()
            self._clickhouse = None

    def close(self) -> None:
        """What is still being asked keeps its connection: it ends with the process."""
        if self._used.acquire(blocking=False):
            self._let_go()
            self._used.release()


class Overview:
    """Puts the documents together, each once for all who ask for it within a second. For the gateway's loop."""

    def __init__(self, gateway: Gateway, fast_path: FastPathReader | None = None) -> None:
        self._gateway = gateway
        self._since_us = gateway.clock.now_us()
        self._reader = Reader(gateway.database, gateway.settings, gateway.gateway_id, gateway.epoch)
        self._fast_path = fast_path or FastPathReader(gateway.settings)
        self._to_clickhouse, self._to_store = Asker(), Asker()
        self._sql_turn = asyncio.Semaphore()
        self._kept: dict[Hashable, tuple[asyncio.Task[Any], float]] = {}

    def close(self) -> None:
        self._fast_path.close()

    async def counts(self, caller: Principal) -> OverviewView:
        if sees_all(caller):
            return await self._once("counts", self._everything)
        return await self._once(("counts", caller.key), lambda: self._own(caller))

    async def path_of(self, caller: Principal, job_id: uuid.UUID) -> JobPath:
        """NotFound where there is no such job, and where it is another customer's."""
        found = await self._once(("row", job_id), lambda: self._sql(lambda: self._reader.find(job_id)))
        if found is None or not (sees_all(caller) or found.row.customer_ref == await self._ref_of(caller)):
            raise NotFound("there is no such job")
        return await self._once(("path", job_id), lambda: self._path(job_id, found))

    async def _once(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `make` gives, or gave less than a second ago. Who goes away does not end it for the others."""
        now_s = asyncio.get_running_loop().time()
        task, made_s = self._kept.get(key, (None, 0.0))
        if task is None or (task.done() and now_s - made_s >= KEPT_S):
            if len(self._kept) >= MAX_KEPT:
                fresh = {k: v for k, v in self._kept.items() if not v[0].done() or now_s - v[1] < KEPT_S}
                self._kept = fresh
            task = asyncio.create_task(make())
            self._kept[key] = task, now_s
        found: T = await asyncio.shield(task)
        return found

    async def _sql(self, work: Callable[[], T]) -> T:
        async with self._sql_turn:  # one thread: other routes need the others
            return await asyncio.to_thread(work)

    async def _ref_of(self, caller: Principal) -> str | None:
        return await self._once(
            ("ref", caller.key), lambda: self._sql(lambda: self._gateway.archive.ref_of(*caller.key))
        )

    async def _own(self, caller: Principal) -> OverviewView:
        ref = await self._ref_of(caller)
        last_job = None if ref is None else await self._sql(lambda: self._reader.last_job(ref))
        return self._view(last_job, sees_all=False)

    def _view(self, last_job: str | None, *, sees_all: bool) -> OverviewView:
        gateway = self._gateway
        return OverviewView(
            gateway.clock.now_us(), self._since_us, gateway.gateway_id, gateway.epoch, sees_all, last_job
        )

    async def _everything(self) -> OverviewView:
        gateway = self._gateway
        hour_us = hour_of(gateway.clock.now_us())
        figures, last_job, rows = await asyncio.gather(
            self._sql(self._reader.figures),
            self._sql(self._reader.last_job),
            self._to_clickhouse.ask(lambda: self._fast_path.rows_of_hour(hour_us)),
        )
        view, publisher = self._view(last_job, sees_all=True), gateway.publisher
        view.jobs, view.events, view.verdicts = figures
        for (_, status), count in gateway.ended.items():
            figures.jobs.ended[status] = figures.jobs.ended.get(status, 0) + count
        view.fast_path = FastPathCounts(
            publisher.delivered, publisher.dropped, publisher.waiting, publisher.last_error, rows
        )
        view.queue, view.backends = queue_of(gateway), backends_of(gateway)
        view.dagster = dagster_url(gateway.settings)
        return view

    async def _path(self, job_id: uuid.UUID, found: Found) -> JobPath:
        row, engine = found.row, self._gateway.engine
        job = engine.find(job_id)
        live = Live() if job is None else Live(engine.get_queue_position(job), job.first_started_us)
        in_clickhouse = None
        if row.event_id is not None:
            asked = bytes(row.event_id), row.recorded_at, row.customer_ref, row.model_name
            in_clickhouse = await self._to_clickhouse.ask(lambda: self._fast_path.holds(*asked))
        times = Times()
        if row.blob_digest is not None:
            times = await self._to_store.ask(lambda: self._times(found)) or times
        return path_of(found, live, in_clickhouse, times)

    def _times(self, found: Found) -> Times:
        """When the batch, its entry, and the entries of the checkpoint were written."""
        cas, log, row = self._gateway.cas, self._gateway.log_objects, found.row
        stored_us = _if_there(lambda: cas.stat(row.blob_digest).modified_us)
        if row.entry is None:
            return Times(stored_us)
        logged_us = _if_there(lambda: cas.stat(digest_of(bytes(row.entry))).modified_us)
        if found.checkpoint is None:
            return Times(stored_us, logged_us)
        bundle, last = divmod(found.checkpoint.size - 1, tiles.TILE_WIDTH)
        path = tiles.path_of((None, bundle, last + 1))
        return Times(stored_us, logged_us, _if_there(lambda: log.stat(path).modified_us))


def _if_there(read: Callable[[], int]) -> int | None:
    """A partial bundle may be gone once the full one stands."""
    with suppress(Missing):
        return read()
    return None


def sees_all(caller: Principal) -> bool:
    return not caller.roles.isdisjoint(SEES_ALL)


def queue_of(gateway: Gateway) -> list[QueueView]:
    """By model, from memory; one pass over the jobs that have not ended."""
    running = Counter(job.model.name for job in gateway.engine.jobs.values() if job.state == "running")
    waiting: Counter[tuple[str, str]] = Counter()
    for (name, _), queue in gateway.engine.waiting().items():
        waiting.update({(name, lane): queue.waiting(lane) for lane in LANES})
    return [
        QueueView(
            model=name,
            waiting={lane: waiting[name, lane] for lane in LANES},
            running=running[name],
            capacity=sum(server.spec.capacity for server in gateway.fleet.of(model, None)),
        )
        for name, model in gateway.catalogue.models.items()
    ]


def backends_of(gateway: Gateway) -> list[BackendView]:
    now_us = gateway.clock.now_us()
    return [
        BackendView(name, server.breaker.state(now_us), server.running, server.spec.capacity)
        for name, server in gateway.fleet.servers.items()
    ]


def dagster_url(settings: Settings) -> str:
    """Where people open Dagster."""
    return settings.dagster_url or f"http://127.0.0.1:{settings.dagster_port}"


# Routes.


@get("/", include_in_schema=False)
async def show_page() -> Response[bytes]:
    """The page itself: public, as nothing of this gateway's is in it."""
    page = (STATIC / "page.html").read_bytes()
    return Response(page, media_type="text/html", headers=HEADERS)


@get("/page/{name:str}", include_in_schema=False)
async def show_file(name: FromPath[str]) -> Response[bytes]:
    """The page's script or its style."""
    if name not in FILES:
        raise NotFound("there is no such file")
    return Response((STATIC / name).read_bytes(), media_type=FILES[name], headers=HEADERS)


async def overview_readers(request: AnyConnection) -> None:
    """As `customers_only`, for those who see everything and for customers. No cache may keep what they see."""
    roles = identify(request).roles
    admit(request, next((role for role in SEES_ALL if role in roles), "customer"))
    request.scope["state"]["extra"]["cache-control"] = "no-store"


@get("/overview")
async def show_overview(request: AnyRequest) -> OverviewView:
    """Counts of now, the queue, the backends, the last verdicts; for a customer the id of its last job alone.

    What could not be read is null, never 0. It is read once a second at most, however many ask.
    """
    return await _overview(request).counts(caller_of(request))


@get("/overview/jobs/{job_id:uuid}")
async def show_job_path(request: AnyRequest, job_id: FromPath[uuid.UUID]) -> JobPath:
    """A job's way through every stage, from its acceptance to a published checkpoint."""
    return await _overview(request).path_of(caller_of(request), job_id)


def _overview(request: AnyRequest) -> Overview:
    return cast(Overview, request.app.state["overview"])


PAGE_ROUTES: list[ControllerRouterHandler] = [
    show_page,
    show_file,
    Router("/", route_handlers=[show_overview, show_job_path], before_request=overview_readers),
]
