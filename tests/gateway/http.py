"""A gateway over real HTTP in this process, a small client of it, and a backend that does what a request says.

The gateway runs on a loop of its own in a thread, on a free loopback port, over a state folder of its own.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import uvicorn

from render_platform.gateway.app import server_config
from render_platform.gateway.backends import Answer, Attempt, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.service import KINDS, Gateway
from render_platform.gateway.simulated_backend import SimulatedBackend
from tests.platforms import connect, settings_of

T = TypeVar("T")
WAIT_S = 20.0
JSON = {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "hello there"}]}
CHAT_PATH = "/text/llama/llama-8b/chat"
IMAGE_PATH = "/image/flux/flux-dev/text2image"
HUGGING_FACE = "meta-llama/Llama-3.1-8B-Instruct"
CATALOGUE: dict[str, Any] = {
    "backends": {
        "wide": {"kind": "simulated", "capacity": 64, "device": "GPU-sim-00", "speed": 1000.0},
        "narrow": {"kind": "simulated", "capacity": 1, "device": "GPU-sim-01", "speed": 1000.0},
    },
    "models": {
        "llama-8b": {
            "family": "llama",
            "modality": "text",
            "type": "llm",
            "tasks": ["chat", "completion", "embedding"],
            "aliases": [HUGGING_FACE],
            "backends": {"wide": "llama-8b"},
        },
        "flux-dev": {
            "family": "flux",
            "modality": "image",
            "type": "rectified_flow",
            "tasks": ["text2image"],
            "aliases": ["black-forest-labs/FLUX.1-dev"],
            "formats": ["png", "jpeg"],
            "backends": {"wide": "flux-dev", "narrow": "flux-dev"},
        },
        "solo": {
            "family": "llama",
            "modality": "text",
            "type": "llm",
            "tasks": ["chat"],
            "backends": {"narrow": "solo"},
            "max_queue": 2,
        },
    },
}
TABLES = ("jobs", "job_bodies", "job_outputs", "idempotency_keys", "ingested", "usage_events", "webhooks", "customers")


@dataclass
class Stage:
    """What the backends do and have done. `do` in a request's body says what is to happen; without it, they simulate.

    hold: report `working`, and simulate once `release` is called; `left` is set when the client's job was cancelled.
    steps: tell of two steps, and hold after them. fail: break, with no hope. stop: break, and hope to be tried again.
    refuse: say that the request is wrong. trickle: stream one piece after another until cancelled. crack: break after
    two pieces.
    """

    working: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    attempts: list[Attempt] = field(default_factory=list)
    _released: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    def backend(self, spec: BackendSpec) -> Scripted:
        return Scripted(spec, self)

    def release(self) -> None:
        """Let everything that is held go on."""
        for loop, event in self._released:
            loop.call_soon_threadsafe(event.set)
        self._released.clear()
        self.working.clear()

    async def held(self) -> None:
        event = asyncio.Event()
        self._released.append((asyncio.get_running_loop(), event))
        self.working.set()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise


class Scripted(SimulatedBackend):
    def __init__(self, spec: BackendSpec, stage: Stage) -> None:
        super().__init__(spec)
        self._stage = stage

    async def run(self, attempt: Attempt) -> Answer:
        self._stage.attempts.append(attempt)
        wish = json.loads(attempt.body).get("do")
        if wish is not None:
            await self._do(wish, attempt)
        return await super().run(attempt)

    async def _do(self, wish: str, attempt: Attempt) -> None:
        if wish in ("fail", "stop"):
            raise BackendFailure("backend_error", "it broke", retriable=wish == "stop", spans=[])
        if wish == "refuse":
            body = b'{"error":{"message":"no such voice","type":"invalid_request_error"}}'
            raise BackendFailure("backend_refused", "no", retriable=False, refused=(404, body), spans=[])
        if wish in ("trickle", "crack"):
            await self._trickle(attempt, 2 if wish == "crack" else sys.maxsize)
        if wish == "steps" and attempt.progress is not None:
            attempt.progress(1, 2)
            attempt.progress(2, 2)
        if wish in ("hold", "steps"):
            await self._stage.held()

    async def _trickle(self, attempt: Attempt, pieces: int) -> None:
        piece = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"and "}}]}\n\n'
        try:
            for _ in range(pieces):
                assert attempt.chunk is not None
                await attempt.chunk(piece)
                self._stage.working.set()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._stage.left.set()
            raise
        raise BackendFailure("backend_disconnected", "it broke off", retriable=False)


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Event(NamedTuple):
    """A server-sent event; `id` is None where it has none, `name` is "comment" for a comment."""

    id: int | None
    name: str
    data: Any


class Headers(dict[str, str]):
    """Names in any case."""

    def __init__(self, items: list[tuple[str, str]]) -> None:
        super().__init__((name.lower(), value) for name, value in items)

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


@dataclass
class Client:
    """A client with a credential, or with none. A new connection a request."""

    port: int
    key: str = ""

    def open(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        credential = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        connection.request(method, path, body, {**credential, **headers})
        return connection, connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One exchange. A body that is not bytes is sent as JSON; headers have - for _."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            named = {"content-type": "application/json", **named}
        connection, response = self.open(method, path, body, named)
        with closing(connection):
            return Reply(response.status, Headers(response.getheaders()), response.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)

    def queue(self, **asked: Any) -> dict[str, Any]:
        """A job, accepted."""
        reply = self.post("/queue", {"model": "llama-8b", "input": CHAT, **asked})
        assert reply.status == 202, reply
        found: dict[str, Any] = reply.json
        return found

    def events(self, job_id: str, after: int | None = None) -> Generator[Event, None, None]:
        """A job's events as they come. Closing the iterator closes the connection."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        connection, response = self.open("GET", f"/jobs/{job_id}/events", None, headers)
        with closing(connection), closing(response):
            assert response.status == 200, response.read()
            yield from parse_events(response)

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job as it stands after its end."""
        for _ in self.events(job_id):
            pass
        found: dict[str, Any] = self.get(f"/jobs/{job_id}").json
        return found

    @contextmanager
    def begun(self, path: str, body: Any, **headers: str) -> Iterator[None]:
        """A request that nobody reads the answer of: the client goes away at the end of the block."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with closing(connection):
            connection.request("POST", path, json.dumps(body), {**JSON, **headers})
            yield


def parse_events(response: http.client.HTTPResponse) -> Iterator[Event]:
    fields: dict[str, str] = {}
    while line := response.readline().decode():
        name, _, value = line.rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif line.startswith(": "):
            yield Event(None, "comment", value)
        elif fields:
            number = int(fields["id"]) if "id" in fields else None
            yield Event(number, fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}


@dataclass
class Served:
    """A gateway that takes requests, and its state folder."""

    port: int
    state: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "") -> Client:
        return Client(self.port, key)

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with closing(connect(self.state)) as connection:
            return [tuple(row) for row in connection.execute(query, values)]

    def counts(self) -> dict[str, int]:
        """Rows of every table that a request may leave something in."""
        return {table: self.sql(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


@dataclass
class Running(Served):
    """One in this process."""

    gateway: Gateway
    stage: Stage
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], T]) -> T:
        """What `function` gives on the gateway's own loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(WAIT_S)


def eventually(holds: Callable[[], object]) -> None:
    """Wait until `holds`: for what the other end of a connection does without saying so."""
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.005)


@contextmanager
def occupied(at: Running, by: Client | None = None, **asked: Any) -> Iterator[str]:
    """The id of a job that holds the one slot of `narrow`, until the block ends."""
    client = by or at.client()
    job = client.queue(model="solo", input={**CHAT, "do": "hold"}, **asked)
    assert at.stage.working.wait(WAIT_S)
    try:
        yield job["id"]
    finally:
        at.stage.release()
        client.ended(job["id"])


@contextmanager
def running(folder: Path, *, catalogue: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    """A gateway over `folder`, which may have been used before; ended when the block is left."""
    stage, ready, made = Stage(), threading.Event(), list[tuple[Gateway, uvicorn.Server, asyncio.AbstractEventLoop]]()
    settings = settings_of(folder, gateway_port=0, drain_s=1, catalogue=catalogue or CATALOGUE, **options)

    async def serve() -> None:
        gateway = Gateway(settings, kinds={**KINDS, "simulated": stage.backend})
        await gateway.start()
        server = uvicorn.Server(server_config(gateway))
        serving = asyncio.create_task(server.serve())
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        made.append((gateway, server, asyncio.get_running_loop()))
        ready.set()
        await serving

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    try:
        assert ready.wait(WAIT_S), "the gateway did not start"
        gateway, server, loop = made[0]
        assert server.started, "the gateway ended at once"
        yield Running(server.servers[0].sockets[0].getsockname()[1], folder, gateway, stage, loop)
    finally:
        stage.release()
        for _, server, _ in made:
            server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the gateway did not end"
