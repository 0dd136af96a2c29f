"""The gateway as an ASGI application, and its server."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import swagger_ui
import uvicorn
from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.static_files import create_static_files_router
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from render_platform.errors import PlatformError, Unavailable
from render_platform.gateway import edge
from render_platform.gateway.document import ASSETS, complete, openapi_config
from render_platform.gateway.edge import Durations, Edge
from render_platform.gateway.evidence_routes import EVIDENCE_ROUTES, Turns
from render_platform.gateway.job_routes import JOB_ROUTES
from render_platform.gateway.openai_routes import OPENAI_ROUTES
from render_platform.gateway.operations import OPERATION_ROUTES
from render_platform.gateway.page import PAGE_ROUTES, Overview
from render_platform.gateway.service import Gateway
from render_platform.gateway.shortcut import shortcuts
from render_platform.gateway.spend_routes import SPEND_ROUTES, BudgetGuard


def create_app(gateway: Gateway) -> Edge:
    """The application over a gateway that was started, and that stops with the application's lifespan."""
    durations, overview, guard = Durations(), Overview(gateway), BudgetGuard(gateway)
    gateway.may_submit = guard.require

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        looking = asyncio.create_task(guard.run())
        try:
            yield
        finally:
            looking.cancel()
            overview.close()
            await gateway.stop()

    app = Litestar(
        [JOB_ROUTES, OPENAI_ROUTES, *OPERATION_ROUTES, *EVIDENCE_ROUTES, SPEND_ROUTES, *PAGE_ROUTES, _assets()],
        request_class=edge.JsonRequest,
        lifespan=[lifespan],
        state=State({"gateway": gateway, "durations": durations, "turns": Turns(), "overview": overview}),
        openapi_config=openapi_config(),
        exception_handlers={
            HTTPException: edge.on_http_exception,
            PlatformError: edge.on_platform_error,
            Exception: edge.on_defect,
        },
        request_max_body_size=gateway.settings.max_body_bytes,
        logging_config=None,
    )
    complete(app.openapi_schema)
    return Edge(app, gateway, durations, shortcuts(app))


def _assets() -> Router:
    folder = Path(swagger_ui.__file__).with_name("static")
    return create_static_files_router(path=ASSETS, directories=[folder], include_in_schema=False)


HEAD_S = 20.0
"""How long a client may take to send the head of a request, and a new connection to begin with one."""
IDLE_S = 75
"""How long a connection is kept for its next request."""
BACKLOG = 2_048
"""Connections that the kernel holds until they are taken."""
MAX_HEAD_BYTES = 512 * 1024
"""More of a head is not kept. One of less is refused by `edge`, once it is whole; the last piece may hold body too."""


JOINED_BYTES = 64 * 1024


class _Joining:
    """A connection's transport that writes what comes at once as one: an answer's head and body are one system call."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._held or len(data) > JOINED_BYTES:
            self._flush(data)
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self, data: bytes = b"") -> None:
        held, self._held = self._held, b""
        if held and len(data) > JOINED_BYTES:
            self._transport.write(held)
            held = b""
        if held or data:
            self._transport.write(held + data)


class _Protocol(HttpToolsProtocol):
    """One connection, closed where a request's head does not come, or does not end."""

    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Joining(transport, self.loop)))
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._late is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._wait_no_more()
        if self.parser.should_upgrade() and self._has_body():
            # Its body would be taken for the other protocol's, and what follows for a request of its own.
            self.send_400_response("An upgrade has no body.")
            return
        super().on_headers_complete()

    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")
            for name, value in self.headers
        )

    def on_message_complete(self) -> None:
        if self.transport.is_closing():  # it was refused at its head
            return
        self.scope["state"][edge.CAME_WHOLE] = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._wait_no_more()
        self._head_bytes = 0
        self._late = self.loop.call_later(HEAD_S, self._close)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else uvicorn's own timer follows the answer
            self.transport.close()


class GatewayServer(uvicorn.Server):
    """Ends by SIGINT and SIGTERM with an exit code of its own, where uvicorn's would die of the signal in the end."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What keeps the gateway from starting is raised as it is: from within the application, it would be logged."""
        await self._gateway.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Jobs first: until they have ended, new ones are told to come again; then connections."""
        await self._gateway.drain()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def server_config(gateway: Gateway) -> uvicorn.Config:
    """How an open gateway is served, on the loop that it was made on."""
    settings = gateway.settings
    return uvicorn.Config(
        create_app(gateway),
        host=settings.gateway_host,
        port=settings.gateway_port,
        http=_Protocol,
        ws="none",
        loop="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.drain_s + 5,
        timeout_keep_alive=IDLE_S,
        backlog=BACKLOG,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Unavailable where the address cannot be had."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise Unavailable(f"{host}:{port} cannot be had: {error.strerror}", "give another --port or --host") from None
    return listening


async def serve(gateway: Gateway, ready: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. `ready` is told the URL once requests are taken.

    UsageError, Unavailable or SequencerStopped where the gateway cannot start.
    """
    listening = _listen(gateway.settings.gateway_host, gateway.settings.gateway_port)
    port = listening.getsockname()[1]  # asked now: a gateway that is to end while it starts has closed it later
    server = GatewayServer(server_config(gateway), gateway)
    loop = asyncio.get_running_loop()
    serving = loop.create_task(server.serve([listening]))
    watching = loop.create_task(_stop_when_broken(gateway, server))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started and not server.should_exit:
        ready(f"http://{gateway.settings.gateway_host}:{port}")
    await serving
    watching.cancel()
    return 3 if gateway.died.is_set() or not server.started else 0


async def _stop_when_broken(gateway: Gateway, server: uvicorn.Server) -> None:
    """Without its writer the gateway can keep no promise: it stops, and says so by its exit code."""
    await gateway.died.wait()
    server.should_exit = True
