"""What a client is told when something cannot be done: RFC 9457 problem documents, and OpenAI's shape on its routes.

One table maps the error tree to HTTP. Nothing here shows a secret or a trace: what is unexpected is named by its
request id, and its details go to the log.
"""

from __future__ import annotations

import http
import re
from typing import Any

import msgspec

from render_platform.errors import Finding, Missing, PlatformError, RecordError, Unavailable, UsageError
from render_platform.gateway.identity import Forbidden
from render_platform.gateway.tokens import Unauthorized

PROBLEM_JSON = "application/problem+json"


class QueueFull(UsageError):
    """As many jobs wait for the model as may."""

    retry_after_s = 1


class RateLimited(UsageError):
    """The customer's bucket is empty; `retry_after_s` is when it holds a token again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests", f"wait {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NoBackend(Unavailable):
    """No backend of the model is trusted now."""

    def __init__(self, model: str, retry_after_s: int) -> None:
        super().__init__(f"no backend of {model} answers", "try again later")
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    """The gateway is stopping."""

    retry_after_s = 5


class NotFound(UsageError):
    """There is no such thing, or it is another customer's: the same answer for both."""


class Refused(UsageError):
    """The request is one that HTTP has a status for: `status` and `code` say which."""

    def __init__(self, status: int, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.status, self.code = status, code


class Conflict(UsageError):
    """An idempotency key or an event id stands for something else already; `status` is 422 or 409."""

    def __init__(self, message: str, remedy: str, status: int = 422) -> None:
        super().__init__(message, remedy)
        self.status = status


class Problem(msgspec.Struct, omit_defaults=True):
    """An RFC 9457 problem document, with `code` and `request_id` of ours."""

    type: str
    title: str
    status: int
    detail: str = ""
    instance: str = ""
    code: str = ""
    request_id: str = ""
    field: str = ""


_TABLE: tuple[tuple[type[PlatformError], int, str, str], ...] = (
    (Unauthorized, 401, "unauthorized", "Not authenticated"),
    (Forbidden, 403, "forbidden", "Not allowed"),
    (NotFound, 404, "not_found", "Not found"),
    (QueueFull, 429, "queue_full", "The queue is full"),
    (RateLimited, 429, "rate_limited", "Too many requests"),
    (Draining, 503, "stopping", "The gateway is stopping"),
    (NoBackend, 503, "no_backend", "No backend answers"),
    (RecordError, 422, "invalid_field", "A field is not valid"),
    (UsageError, 400, "bad_request", "The request cannot be done"),
    (Missing, 404, "not_found", "Not found"),
    (Unavailable, 503, "unavailable", "A part of the platform is unavailable"),
    (Finding, 500, "evidence_damaged", "Stored evidence is not what its name says"),
    (PlatformError, 500, "internal_error", "The gateway failed"),
)
_FIELD = re.compile(r"((?:\[\d+\]\.)?[a-z][a-z_.]*): ")
"""What is said of one field begins with its name."""
_STATUSES = frozenset(http.HTTPStatus)
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem_of(error: PlatformError, instance: str, request_id: str) -> tuple[Problem, dict[str, str]]:
    """The document, and headers that go with it (`Retry-After`, `WWW-Authenticate`)."""
    status, code, title = next((s, c, t) for kind, s, c, t in _TABLE if isinstance(error, kind))
    if isinstance(error, Refused):
        status, code, title = error.status, error.code, _phrase(error.status)
    elif isinstance(error, Conflict):
        status, code, title = error.status, "conflict", "It stands for something else already"
    problem = Problem(
        type=f"urn:render-platform:problem:{code}",
        title=title,
        status=status,
        detail=str(error),
        instance=instance,
        code=code,
        request_id=request_id,
        field=_field_of(error),
    )
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="render-platform"'
    if status in (429, 503):
        headers["Retry-After"] = str(getattr(error, "retry_after_s", 1))
    return problem, headers


def _phrase(status: int) -> str:
    """A title that says the same for every problem of its kind, as RFC 9457 wants it."""
    return http.HTTPStatus(status).phrase if status in _STATUSES else "The request was refused"


def _field_of(error: PlatformError) -> str:
    found = _FIELD.match(error.message) if isinstance(error, NotFound | Conflict | Forbidden) else None
    return found[1] if found else str(getattr(error, "field", ""))


def is_openai(path: str) -> bool:
    """Whether a path is one of OpenAI's API, whose clients read its shape of errors."""
    return path.startswith("/v1/") and not path.startswith("/v1/objects")


def openai_error(problem: Problem) -> dict[str, Any]:
    """The same in the shape that OpenAI's clients read."""
    kind = _OPENAI_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    detail = problem.detail or problem.title
    return {"error": {"message": detail, "type": kind, "param": problem.field or None, "code": problem.code}}
