"""What every request passes: limits on headers, a request id, the caller's identity and bucket, errors as problems.

A caller is known, and has paid for the request from its bucket, before anything of the request's body is read.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import structlog
from litestar import Request, Response
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from render_platform.clock import US_PER_SECOND
from render_platform.errors import PlatformError, RecordError
from render_platform.gateway.identity import Principal
from render_platform.gateway.limits import TokenBucket
from render_platform.gateway.problems import (
    PROBLEM_JSON,
    Problem,
    RateLimited,
    Refused,
    is_openai,
    openai_error,
    problem_of,
)
from render_platform.gateway.service import Gateway

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_READING_BYTES = 512 * 1024 * 1024
"""What bodies may hold of memory together, by their declared lengths, while they are on their way."""
BODY_S = 120.0
"""How long a client may take to send its body."""
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
CAME_WHOLE = "came_whole"
"""Set in a scope's state where all of the body had come before the request was looked at."""

AnyRequest = Request[Any, Any, Any]
AnyConnection = ASGIConnection[Any, Any, Any, Any]
_MEMBER = re.compile(r"Object (missing required|contains unknown) field `(.{1,200})`", re.DOTALL)
_HERE = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII)
"""A `Host` that names this machine, as a browser writes it."""
_log = structlog.get_logger()


class Durations:
    """How long requests took, by status class: a histogram in plain numbers, read by `/metrics`."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.sums_s: Counter[str] = Counter()

    def observe(self, status: int, seconds: float) -> None:
        kind = f"{status // 100}xx"
        counts = self.counts.get(kind)
        if counts is None:
            counts = self.counts[kind] = [0] * (len(BUCKETS_S) + 1)
        counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sums_s[kind] += seconds  # type: ignore[assignment]


class Edge:
    """The outermost ASGI application: everything that does not need to know the route."""

    def __init__(
        self, app: ASGIApp, gateway: Gateway, durations: Durations, shortcuts: Mapping[tuple[str, str], ASGIApp]
    ) -> None:
        """`shortcuts`: what answers a method and a path in the application's place."""
        self._app, self._gateway, self._durations, self._shortcuts = app, gateway, durations, shortcuts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500
        request_id = self._gateway.request_id(header(scope, b"x-request-id"))
        extra: dict[str, str] = {"x-request-id": str(request_id)}
        known = {"gateway": self._gateway, "request_id": request_id, "extra": extra}
        scope["state"] = {**scope.get("state", {}), **known}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(name.encode(), value.encode()) for name, value in extra.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        refused = _too_large(scope) or (_foreign(scope) if self._gateway.anonymous else None)
        if refused is None:
            app = self._shortcuts.get((scope["method"], scope["path"]), self._app)
            await app(scope, receive, send_with_headers)
        else:
            await _send_problem(refused, scope, str(request_id), send_with_headers)
        self._durations.observe(status, time.perf_counter() - begun)


def _too_large(scope: HTTPScope) -> Refused | None:
    headers = list(scope["headers"])
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        return Refused(414, "url_too_long", "The request's URL is too long", f"send at most {MAX_URL_BYTES:,} bytes")
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return Refused(431, "headers_too_large", "The request's headers are too large", "send fewer")
    return None


def _foreign(scope: HTTPScope) -> Refused | None:
    """Where no caller needs a credential, web pages must not be callers: a browser on this machine is what they have.

    A page whose own name was made to resolve to this machine is of the same origin: only its `Host` gives it away.
    """
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"localhost").decode("latin-1").lower()
    origin = headers.get(b"origin")
    if _HERE.fullmatch(host) and (origin is None or origin.decode("latin-1").lower() == f"http://{host}"):
        return None
    remedy = "use http://127.0.0.1, or make a key with `render-platform key create`"
    return Refused(403, "foreign_origin", "Without API keys only programs of this machine are answered", remedy)


async def _send_problem(error: PlatformError, scope: HTTPScope, request_id: str, send: Send) -> None:
    problem, _ = problem_of(error, _instance(scope), request_id)
    status, media_type, body = _encoded(scope, problem)
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _instance(scope: HTTPScope) -> str:
    """The path as it was sent: a reference by RFC 3986, as a problem's `instance` has to be."""
    return scope["raw_path"][:MAX_URL_BYTES].decode("latin-1")


def _encoded(scope: HTTPScope, problem: Problem) -> tuple[int, str, bytes]:
    """Status, media type and body of a problem: OpenAI's routes answer as OpenAI does."""
    if not is_openai(scope["path"]):
        return problem.status, PROBLEM_JSON, msgspec.json.encode(problem)
    status = 400 if problem.code == "invalid_field" else problem.status
    return status, "application/json", msgspec.json.encode(openai_error(problem))


class JsonRequest(AnyRequest):
    """A request whose body is read strictly."""

    _whole: bytes | None = None

    async def body(self) -> bytes:
        if self._whole is None:
            self._whole = await self._read()
        return self._whole

    async def _read(self) -> bytes:
        gateway = gateway_of(self)
        most = gateway.settings.max_body_bytes
        declared = int(header(self.scope, b"content-length") or most)
        if declared > most:
            raise RequestEntityTooLarge
        if self.scope["state"].get(CAME_WHOLE):  # as nearly all are: nothing waits, and nothing is held for long
            return await self._receive_all(most)
        if gateway.reading_bytes + declared > MAX_READING_BYTES:
            raise Refused(503, "too_many_bodies", "Too many bodies are on their way", "try again in a few seconds")
        gateway.reading_bytes += declared
        try:
            async with asyncio.timeout(BODY_S):
                return await self._receive_all(most)
        except TimeoutError:
            self.scope["state"]["extra"]["connection"] = "close"  # what it still sends is nobody's
            raise Refused(408, "body_too_slow", "The body did not come in time", "send it faster") from None
        finally:
            gateway.reading_bytes -= declared

    async def _receive_all(self, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while (message := await self.receive())["type"] == "http.request":
            parts.append(message["body"])
            size += len(message["body"])
            if size > most:
                raise RequestEntityTooLarge
            if not message.get("more_body"):
                return b"".join(parts)
        # The client went away in the middle of it: no failure of ours.
        raise Refused(400, "body_cut_off", "The body is not whole", "send all of it")

    async def json(self) -> Any:
        """The body as the type that its route declares; Refused (415) where it does not say that it is JSON.

        That it has to say so keeps web pages out: without asking first, a browser sends forms and plain text only.
        RecordError where it is not JSON in UTF-8, to its last member, or another type: "1" is no number here.
        """
        if (header(self.scope, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "unsupported_media_type", "The body is not JSON", "send Content-Type: application/json")
        body = await self.body()
        if not body:
            raise RecordError("body", "is missing", "send one JSON object")
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise RecordError("body", f"is not JSON in UTF-8: {said}", "send one JSON object") from None
        declared = self.route_handler.parsed_data_field
        try:
            return value if declared is None else msgspec.convert(value, declared.annotation)
        except msgspec.ValidationError as error:
            raise _mistyped(str(error)) from None


def _mistyped(said: str) -> RecordError:
    """What msgspec says of a value: what is wrong with it and, unless it is the whole, where it stands."""
    said, _, place = said.partition(" - at `$")
    place = place.rstrip("`").replace("[...]", "").lstrip(".")[:200]
    if found := _MEMBER.fullmatch(said):
        place = f"{place}.{found[2]}" if place else found[2]
        return RecordError(place, "is missing" if found[1] == "missing required" else "is not known")
    return RecordError(place or "body", said)


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, in lower case; None where there is none."""
    for known, value in scope["headers"]:
        if known == name:
            return value.decode("latin-1")
    return None


def gateway_of(request: AnyConnection) -> Gateway:
    return cast(Gateway, request.scope["state"]["gateway"])


def request_id_of(request: AnyConnection) -> uuid.UUID:
    return cast(uuid.UUID, request.scope["state"]["request_id"])


def identify(request: AnyConnection) -> Principal:
    """Whose request it is; Unauthorized."""
    key, bearer = header(request.scope, b"x-api-key"), header(request.scope, b"authorization")
    return gateway_of(request).identity.authenticate(bearer, key)


def caller_of(request: AnyRequest) -> Principal:
    """Who was let in before the body was read."""
    return cast(Principal, request.scope["state"]["caller"])


async def customers_only(request: AnyConnection) -> None:
    """Before a request's body is read: a customer, a token of theirs taken.

    Unauthorized, Forbidden, or RateLimited where there is none.
    """
    admit(request, "customer")


async def meters_only(request: AnyConnection) -> None:
    """The same for those who report usage."""
    admit(request, "meter")


def admit(request: AnyConnection, role: str) -> None:
    """A caller with this role, a token of theirs taken; Unauthorized, Forbidden, or RateLimited."""
    gateway, caller = gateway_of(request), identify(request)
    caller.require(role)
    request.scope["state"]["caller"] = caller
    settings, now_us = gateway.settings, gateway.clock.now_us()
    name = f"{caller.issuer}\n{caller.customer_id}"
    rate, burst = caller.rate_per_s or settings.rate_per_s, caller.burst or settings.burst
    bucket = gateway.buckets.bucket(name, now_us, rate, burst)
    allowed = bucket.take(now_us)
    request.scope["state"]["extra"].update(_rate_headers(bucket, now_us))
    if not allowed:
        raise RateLimited(-(-bucket.wait_us(now_us) // US_PER_SECOND))


def _rate_headers(bucket: TokenBucket, now_us: int) -> dict[str, str]:
    """IETF draft 11: the quota is the burst, and the window what it takes to fill it."""
    rate, burst = bucket.limits
    remaining = bucket.remaining(now_us)
    return {
        "RateLimit-Policy": f'"default";q={burst};w={-(-burst // rate)}',
        "RateLimit": f'"default";r={remaining};t={-(-(burst - remaining) // rate)}',
    }


def problem_response(request: AnyRequest, error: PlatformError) -> Response[Any]:
    problem, headers = problem_of(error, _instance(request.scope), str(request_id_of(request)))
    if problem.status >= 500:
        _log.warning("request_failed", request_id=problem.request_id, code=problem.code, error=str(error))
    status, media_type, body = _encoded(request.scope, problem)
    return Response(body, status_code=status, headers=headers, media_type=media_type)


def on_http_exception(request: AnyRequest, error: HTTPException) -> Response[Any]:
    """What the framework refuses: an unknown path, a parameter or a body of another type."""
    if error.status_code >= 500:
        return on_defect(request, error)
    response = problem_response(request, _translated(error))
    if error.headers and "allow" in error.headers:
        response.headers["Allow"] = error.headers["allow"]
    return response


def _translated(error: HTTPException) -> PlatformError:
    extra = error.extra if isinstance(error.extra, list) else []
    if error.status_code == 400 and extra and isinstance(extra[0], dict) and extra[0].get("key"):
        key, said = str(extra[0]["key"]), str(extra[0].get("message", "is not valid"))
        return RecordError("body", "is missing", "send one JSON object") if key == "data" else RecordError(key, said)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}
    code = codes.get(error.status_code, "bad_request")
    return Refused(error.status_code, code, error.detail.split("\n")[0][:300] or "it cannot be done")


def on_platform_error(request: AnyRequest, error: PlatformError) -> Response[Any]:
    return problem_response(request, error)


def on_defect(request: AnyRequest, error: Exception) -> Response[Any]:
    """A defect of ours: its details go to the log, under the request's id."""
    _log.error("defect", request_id=str(request_id_of(request)), kind=type(error).__name__, exc_info=error)
    return problem_response(request, PlatformError("the gateway failed", "tell its operator the request's id"))


def require(good: object, field: str, message: str, remedy: str = "") -> None:
    if not good:
        raise RecordError(field, message, remedy)
