"""What tests of verdicts break: a proxy in front of ClickHouse, objects of the CAS, DuckDB, the rows themselves."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import duckdb
import pyarrow as pa
from dagster_duckdb import DuckDBResource

from render_platform.audit_log import BatchLogger
from render_platform.cas import path_of
from render_platform.clock import DAY_US, HOUR_US, ManualClock, hour_of
from render_platform.config import load_settings
from render_platform.events import UsageEvent
from render_platform.hours import mark_dirty
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.factories import START_US, make_events
from tests.platforms import SeededIds
from tests.stories import deliver, finish_lane, logged, move_to, record

RAW, ROLLUP = "FROM usage_events", "usage_minute"
"""What a query that reads raw rows, or the rollup, has in its text."""
CAUSES = ("missing", "duplicated", "altered", "unexpected")
PATIENT_S = 60
"""How long a client waits for an answer, unless a test says otherwise."""
DAY_END = START_US - START_US % DAY_US + DAY_US
LAST_HOUR = DAY_END - HOUR_US
"""Of a day: once it is closed, the day may be rebuilt."""


class Proxy:
    """Stands before the embedded bridge, and lets a test decide what an answer comes to.

    `rules` are (text in the query, fault), the first that fits: `fail` is status 500; `nothing` is status 200 and no
    bytes; `header` is the begin of the answer as if it were the whole of it, which a careless reader takes for an
    empty table; `cut` breaks the connection within the answer; `stall` answers after the client has given up; `old`
    says that this is version 23.8. What fits no rule is passed on as it is.
    """

    def __init__(self) -> None:
        self._bridge = urlsplit(chdb_server.dsn_of("bridge"))
        self._port = 0
        self._let_go = threading.Event()
        self.rules: list[tuple[str, str]] = []
        self.timeout_s = PATIENT_S
        self.start()

    @property
    def dsn(self) -> str:
        user = f"{self._bridge.username}:{self._bridge.password}"
        return f"http://{user}@127.0.0.1:{self._port}?send_receive_timeout={self.timeout_s}&query_retries=0"

    def start(self) -> None:
        """Listen, at the same port each time."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy.answer(self)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._let_go.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.listens = True

    def stop(self) -> None:
        """Nobody listens at the port any more."""
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.listens = False

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        query = unquote_plus(request.path) + body.decode(errors="replace")
        fault = next((fault for text, fault in self.rules if text in query and "INSERT" not in query), "")
        if fault == "stall":
            self._let_go.wait(60)
            return
        status, headers, data = self._ask(request, body)
        if fault == "fail":
            status, data = 500, b"Code: 999. DB::Exception: the disk is gone"
        elif fault == "nothing":
            data = b""
        elif fault == "header":
            data = _ended_early(data)
        elif fault == "old":
            data = re.sub(rb"^\d+(\.\d+)+", b"23.8.16.40", data)
        request.send_response(status)
        for name, text in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                request.send_header(name, text)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def _ask(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        left_out = ("accept-encoding", "connection", "host")
        headers = {name: text for name, text in request.headers.items() if name.lower() not in left_out}
        with closing(http.client.HTTPConnection("127.0.0.1", self._bridge.port or 0, timeout=60)) as connection:
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()


def _ended_early(data: bytes) -> bytes:
    """Half of an Arrow file; of an Arrow stream, the schema without a row and without the mark of the end."""
    if data.startswith(b"ARROW1"):
        return data[: len(data) // 2]
    try:
        return bytes(pa.ipc.open_stream(data).schema.serialize())
    except pa.ArrowInvalid:
        return b""


@contextmanager
def proxy_before_bridge() -> Iterator[Proxy]:
    proxy = Proxy()
    try:
        yield proxy
    finally:
        if proxy.listens:
            proxy.stop()


class SwitchedDuckDB:
    """Opens DuckDB connections; while `fault` is `closed` they are of no use, while it is `refused` there are none."""

    fault = ""

    @contextmanager
    def __call__(self) -> Iterator[duckdb.DuckDBPyConnection]:
        if self.fault == "refused":
            raise duckdb.IOException("IO Error: cannot open the file")
        with duckdb.connect() as connection:
            if self.fault == "closed":
                connection.close()
            yield connection


class BrokenDuckDB(DuckDBResource):
    """The same for a Dagster run."""

    fault: str = ""

    @contextmanager
    def get_connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        switched = SwitchedDuckDB()
        switched.fault = self.fault
        with switched() as connection:
            yield connection


@dataclass
class Scene:
    """The last three hours of a day, the middle one to go wrong. The hours around it have lanes of their own."""

    state: Path
    proxy: Proxy
    database: str = field(default_factory=chdb_server.fresh_database)
    duckdb: SwitchedDuckDB = field(default_factory=SwitchedDuckDB)
    stage: str = "flush"
    """How far the middle hour comes on the slow path: `seal`, `store`, `log` (and no further), or `flush`."""
    broken: list[tuple[Path, bytes]] = field(default_factory=list)
    opened: int = 0

    FIRST, BAD, LAST = DAY_END - 3 * HOUR_US, DAY_END - 2 * HOUR_US, LAST_HOUR

    def __post_init__(self) -> None:
        self.good = {hour: make_events(12, seed, hour) for seed, hour in ((1, self.FIRST), (3, self.LAST))}
        self.bad = make_events(12, 2, self.BAD)

    def open(self, now_us: int) -> Platform:
        """The state opened by a process of its own, so to speak."""
        options: dict[str, Any] = {"clickhouse_dsn": self.proxy.dsn, "clickhouse_database": self.database}
        settings = load_settings(environ={}, state_dir=self.state, **options)
        self.opened += 1
        return Platform(settings, ManualClock(now_us), SeededIds(f"{self.database}/{self.opened}"), self.duckdb)

    def record_good_hours(self, platform: Platform) -> None:
        for hour, made in self.good.items():
            record(platform, made, f"trace/{hour}")
            finish_lane(platform, f"trace/{hour}", hour + HOUR_US)
            deliver(platform, made)
        platform.flush()

    def record_bad_hour(self, platform: Platform, now_us: int) -> None:
        """In the live lane, which then comes to `now_us`."""
        record(platform, self.bad)
        move_to(platform, now_us)
        self.bring(platform)

    def bring(self, platform: Platform) -> None:
        """Batches of the middle hour, as far as `stage` says."""
        platform.seal()
        if self.stage != "seal":
            platform.store()
        if self.stage == "log":
            BatchLogger(platform.database, platform.log).log_stored(mark_dirty)
        elif self.stage == "flush":
            platform.log_batches()

    def break_blob(self, platform: Platform, harm: Callable[[Path], object]) -> None:
        [entry] = [one for one in logged(platform, "usage_batch") if one.recorded_hour == self.BAD]
        path = platform.settings.blobs_dir / path_of(str(entry.subject_digest))
        self.broken.append((path, path.read_bytes()))
        harm(path)

    def mend(self) -> None:
        """Take away whatever is wrong with the environment; rows stay as they are."""
        self.proxy.rules.clear()
        self.proxy.timeout_s = PATIENT_S
        self.duckdb.fault = ""
        if not self.proxy.listens:
            self.proxy.start()
        for path, data in self.broken:
            path.write_bytes(data)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hour_later(event: UsageEvent) -> UsageEvent:
    names = ("gpu_started_at", "event_time", "recorded_at")
    return replace(event, **{name: getattr(event, name) + HOUR_US for name in names})


def said_of(report: bytes) -> dict[str, list[str]]:
    """Event ids by cause, of a whole report, read from its bytes; exact counts are checked against them."""
    findings = json.loads(report)["findings"]
    for finding in findings:
        assert finding["counts"] == {cause: len(finding[cause]) for cause in CAUSES}
    found = {cause: sorted(event_id for finding in findings for event_id in finding[cause]) for cause in CAUSES}
    return {cause: event_ids for cause, event_ids in found.items() if event_ids}


def ids_of(made: Sequence[UsageEvent]) -> list[str]:
    return sorted(str(event.event_id) for event in made)


def hours_of(made: Sequence[UsageEvent]) -> set[int]:
    return {hour_of(event.recorded_at) for event in made}
