"""Submissions past the framework's layers: the same function, checks and answers, at a fraction of the cost.

The framework's own way through a route (arguments, signature models, two conversions of a response) takes as long as
all that the gateway does to accept a job durably, on the one thread that does everything. For a route whose handler
takes a request and its body, this is all that those layers do. The framework still declares it, documents it, and
answers its other methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar import Litestar, Response
from litestar.handlers import HTTPRouteHandler
from litestar.middleware._internal.exceptions import ExceptionHandlerMiddleware  # what the framework itself uses
from litestar.types import Receive, Scope, Send

from render_platform.gateway import edge
from render_platform.gateway.problems import PROBLEM_JSON

PATHS = ("/queue", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""The routes, all of them POST: handlers of a request and its JSON body, admitted before the body is read."""
_JSON = {None: b"application/json", "application/json": b"application/json", PROBLEM_JSON: PROBLEM_JSON.encode()}

Admission = Callable[[edge.AnyRequest], Awaitable[None]]


class Shortcut:
    """One route of an application, as an ASGI application of its own, with the application's answers to errors."""

    def __init__(self, app: Litestar, handler: HTTPRouteHandler, admit: Admission) -> None:
        self._app, self._handler, self._admit = app, handler, admit
        self._guarded = ExceptionHandlerMiddleware(self._answer, debug=None)
        self._guarded.exception_handlers = app.exception_handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["litestar_app"], scope["route_handler"] = self._app, self._handler
        await self._guarded(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = edge.JsonRequest(scope, receive, send)
        await self._admit(request)
        response: Response[Any] = await self._handler.fn(request, await request.json())
        await self._send(response, request)

    async def _send(self, response: Response[Any], request: edge.JsonRequest) -> None:
        kind = _JSON.get(response.media_type) if type(response) is Response else None
        if kind is None or response.cookies or response.background:
            whole = response.to_asgi_response(None, request, media_type=response.media_type)
            await whole(request.scope, request.receive, request.send)
            return
        content = response.content
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in response.headers.items()]
        await request.send({"type": "http.response.start", "status": response.status_code or 200, "headers": headers})
        await request.send({"type": "http.response.body", "body": body, "more_body": False})


def shortcuts(app: Litestar) -> dict[tuple[str, str], Shortcut]:
    """The shortcut of each path of PATHS, by method and path."""
    found: dict[tuple[str, str], Shortcut] = {}
    for path in PATHS:
        handler = app.route_handler_method_map[path]["POST"]
        admit = handler.resolve_before_request() if isinstance(handler, HTTPRouteHandler) else None
        if not isinstance(handler, HTTPRouteHandler) or admit is None:
            raise TypeError(f"{path} is no route that admits its callers first")
        found["POST", path] = Shortcut(app, handler, admit)
    return found
