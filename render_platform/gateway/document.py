"""The OpenAPI document: what the framework reads off the routes, and here what it cannot see of them.

Every answer that a client may get is in it: refusals as problems (OpenAI's shape on its routes), outputs of any type,
streams of events. The page that shows it takes its script from this gateway, so that it needs no internet.
"""

from __future__ import annotations

import http
from collections.abc import Iterator, Mapping

import msgspec
import pyarrow as pa
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPI,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
)
from litestar.types.internal_types import PathParameterDefinition

from render_platform import __version__
from render_platform.events import EVENT_SCHEMA
from render_platform.gateway import ingest
from render_platform.gateway.problems import PROBLEM_JSON, Problem, is_openai

ASSETS = "/schema-assets"
SSE = "text/event-stream"
OPEN = ("/health", "/ready", "/metrics")
"""Paths that need no credential."""
FREE = ("/models", "/models/aliases", "/v1/models")
"""Paths that take nothing from the caller's bucket, and need no role."""
GENERATE = ("/{modality}/{family}/{model}/{task}", "/{modality}/{family}/{owner}/{model}/{task}")
STREAMED = ("/v1/chat/completions", "/v1/completions")
OBJECT, CHECKPOINT, TILE = "/v1/objects/{digest}", "/audit/checkpoint", "/audit/tile/{tile}"
STORED = (OBJECT, CHECKPOINT, TILE)
"""Stored bytes as they are, with an ETag."""
RECEIPT = "/jobs/{job_id}/receipt"
USAGE = "/usage"
SUBMISSIONS = (*GENERATE, "/queue", *STREAMED, "/v1/embeddings")

_TEXT = Schema(type=OpenAPIType.STRING)
_PARTS = {
    "digest": Schema(type=OpenAPIType.STRING, pattern="^[0-9a-f]{64}$"),
    "tile": Schema(
        type=OpenAPIType.STRING, min_length=5, max_length=47, description="<L>/<N>, entries/<N>: tlog-tiles"
    ),
}
"""What those parts of a path are. Anything else is a 404."""
_ANYTHING = {"*/*": OpenAPIMediaType(schema=Schema())}
_OBJECT = {"application/json": OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT))}
_EVENT = Schema(type=OpenAPIType.OBJECT, properties={"id": _TEXT, "event": _TEXT, "data": _TEXT})
_STREAM = {SSE: OpenAPIMediaType(schema=_EVENT)}
_BYTES = {"application/octet-stream": OpenAPIMediaType(schema=Schema())}
_PLAIN = {"text/plain": OpenAPIMediaType(schema=_TEXT)}
_CACHED = {"ETag": "The digest of the bytes", "Cache-Control": "How long they may be kept"}
_USED = {"x-gpu-seconds": "GPU time, exact", "x-gpu-device": "The device that worked", "x-job-id": "The job"}


def openapi_config() -> OpenAPIConfig:
    page = SwaggerRenderPlugin(
        js_url=f"{ASSETS}/swagger-ui-bundle.js",
        css_url=f"{ASSETS}/swagger-ui.css",
        standalone_preset_js_url=f"{ASSETS}/swagger-ui-standalone-preset.js",
        favicon=f"<link rel='icon' href='{ASSETS}/favicon-32x32.png'>",
        path="/",
    )
    schemes: dict[str, SecurityScheme | Reference] = {
        "bearer": SecurityScheme(type="http", scheme="bearer", description="An API key, or a JWT of a known issuer"),
        "api_key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
    }
    return OpenAPIConfig(
        title="render-platform gateway",
        version=__version__,
        description="Accepts, queues, forwards, meters and bills GPU jobs.",
        path="/schema",
        render_plugins=[page, JsonRenderPlugin()],
        components=Components(security_schemes=schemes),
        security=[{"bearer": []}, {"api_key": []}],
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
    )


def _operation_id(handler: HTTPRouteHandler, method: str, path: list[str | PathParameterDefinition]) -> str:
    owned = any(isinstance(part, PathParameterDefinition) and part.name == "owner" for part in path)
    return handler.handler_name + ("_of_owner" if owned else "") + ("_head" if method == "HEAD" else "")


def complete(document: OpenAPI) -> None:
    """Add what the routes do not say of themselves, in place."""
    document.components.schemas.update(
        {"Problem": _problem(), "OpenAiError": _openai_error(), "CloudEvent": _cloud_event()}
    )
    queued = document.components.schemas["QueueRequest"]
    if isinstance(queued, Schema):
        queued.additional_properties = False  # as the type says, which the framework leaves out
    for path, item in (document.paths or {}).items():
        for method in ("get", "head", "post", "delete"):
            operation = getattr(item, method)
            if operation is not None:
                _complete(operation, method, path)


def _complete(operation: Operation, method: str, path: str) -> None:
    if path == "/api/v1/events":
        operation.request_body = _events_body()
    if path in OPEN:
        operation.security = [{}]
    responses = operation.responses or {}
    responses.pop("400", None)  # the framework's own shape, which nobody gets
    responses.update(
        {str(status): _refusal(status, path) for status in sorted(set(_refusals(operation, method, path)))}
    )
    responses.update(_answers(method, path))
    operation.responses = responses
    operation.parameters = [*filter(_is_real, operation.parameters or []), *_headers(method, path)]
    for parameter in operation.parameters:
        if isinstance(parameter, Parameter) and parameter.name in _PARTS:
            parameter.schema = _PARTS[parameter.name]


def _is_real(parameter: Parameter | Reference) -> bool:
    """Not a part of the other path of a route that has two."""
    return not (isinstance(parameter, Parameter) and (parameter.name, parameter.param_in) == ("owner", "query"))


def _refusals(operation: Operation, method: str, path: str) -> Iterator[int]:
    """Statuses of the problems that the route may answer with."""
    yield from (414, 431)
    if path not in OPEN:
        yield from (401, 503)
    if path not in (*OPEN, *FREE):
        yield from (403, 429)
    if "{job_id}" in path or path in (*STORED, USAGE):
        yield 404
    if path in (*STORED, RECEIPT, USAGE, "/v1/objects"):
        yield 500  # evidence that does not hold
    if any(isinstance(one, Parameter) and one.param_in == "query" for one in operation.parameters or []):
        yield 422
    if operation.request_body:
        yield from (400, 413, 415, 422)
    if path == "/api/v1/events":
        yield 409
    if "{job_id}" in path and path != RECEIPT:
        yield 410
    if method == "post" and path in SUBMISSIONS:
        yield from (400, 402, 404, 410, 499, 502, 504)


def _answers(method: str, path: str) -> dict[str, OpenAPIResponse]:
    """What a route gives besides what its return type says."""
    job = _response("The job as it stands", _json("JobView"), **{"Location": "The job's URL"})
    output = _response("The job's output", _ANYTHING, **_USED)
    found: dict[str, OpenAPIResponse] = {}
    if method == "post" and path in (*GENERATE, "/queue"):
        found = {"200": output, "202": job}
    elif path in STREAMED:
        found = {"200": _response("Whole, or streamed where `stream` is true", {**_OBJECT, **_STREAM}), "202": job}
    elif path == "/v1/embeddings":
        found = {"200": _response("The embeddings", _OBJECT, **_USED), "202": job}
    elif path == "/jobs/{job_id}/output":
        found = {"200": output, "202": job}
    elif path == "/jobs/{job_id}/events":
        found = {"200": _response("The events", _STREAM), "204": OpenAPIResponse("The last event was seen")}
    elif path in (*STORED, RECEIPT):
        found = _evidence(path)
    elif path == "/ready":
        found = {"503": _response("It does not take work", _json("Readiness"))}
    elif path == "/jobs/{job_id}" and method == "get":
        found = {"303": job}
    elif path.startswith("/jobs/{job_id}"):
        found = {"202": job}
    return found


def _evidence(path: str) -> dict[str, OpenAPIResponse]:
    if path == RECEIPT:
        pending = _response("It is not published yet", _json("ReceiptPending"), **{"Retry-After": "Seconds"})
        return {"200": _response("The receipt", _PLAIN), "202": pending}
    stored = _response("The bytes", _PLAIN if path == CHECKPOINT else _BYTES, **_CACHED)
    return {"200": stored, "304": OpenAPIResponse("The client has them")}


def _headers(method: str, path: str) -> list[Parameter]:
    found = {}
    if method == "post" and path in SUBMISSIONS:
        found["Idempotency-Key"] = "The same key and request give the first result; another request is refused"
    if path in GENERATE:
        found["Prefer"] = "respond-async, wait=N"
    if path == "/jobs/{job_id}/events":
        found["Last-Event-ID"] = "The last event that was seen"
    if path in STORED:
        found["If-None-Match"] = "ETags of what the client has"
    return [Parameter(name, "header", schema=_TEXT, description=text) for name, text in found.items()]


def _response(text: str, content: Mapping[str, OpenAPIMediaType], **headers: str) -> OpenAPIResponse:
    shown: dict[str, OpenAPIHeader | Reference]
    shown = {name: OpenAPIHeader(schema=_TEXT, description=said) for name, said in headers.items()}
    return OpenAPIResponse(text, content=dict(content), headers=shown or None)


def _json(name: str, media_type: str = "application/json") -> dict[str, OpenAPIMediaType]:
    return {media_type: OpenAPIMediaType(schema=Reference(f"#/components/schemas/{name}"))}


def _refusal(status: int, path: str) -> OpenAPIResponse:
    content = _json("OpenAiError") if is_openai(path) else _json("Problem", PROBLEM_JSON)
    text = "The job was cancelled" if status == 499 else http.HTTPStatus(status).phrase
    headers = {"Retry-After": "Seconds"} if status in (429, 503) else {}
    return _response(text, content, **headers)


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return Schema(type=OpenAPIType.OBJECT, required=list(required), properties=dict(properties))


def _problem() -> Schema:
    number = Schema(type=OpenAPIType.INTEGER)
    fields = {one.name: number if one.type in (int, "int") else _TEXT for one in msgspec.structs.fields(Problem)}
    made = _object(("type", "title", "status", "detail", "instance", "code", "request_id"), **fields)
    made.description = "RFC 9457; `field` names the field or member that is not valid"
    return made


def _openai_error() -> Schema:
    maybe = Schema(type=[OpenAPIType.STRING, OpenAPIType.NULL])
    error = _object(("message", "type"), message=_TEXT, type=_TEXT, param=maybe, code=maybe)
    return _object(("error",), error=error)


def _cloud_event() -> Schema:
    short = Schema(type=OpenAPIType.STRING, min_length=1, max_length=ingest.MAX_CHARACTERS)
    data = _object(ingest.REQUIRED, **{name: _member(column) for name, column in ingest.MEMBERS.items()})
    data.additional_properties = False
    made = _object(
        ("specversion", "type", "source", "id", "subject", "data"),
        specversion=Schema(const="1.0"),
        type=Schema(const=ingest.TYPE),
        source=short,
        id=short,
        subject=short,
        time=Schema(type=OpenAPIType.STRING),
        data=data,
    )
    made.description = "CloudEvents 1.0: usage of `subject`, a customer; `time` (RFC 3339) is the end of the GPU work"
    return made


def _member(column: str) -> Schema:
    if pa.types.is_integer(EVENT_SCHEMA.field(column).type):
        return Schema(type=OpenAPIType.INTEGER, minimum=0)
    return Schema(type=OpenAPIType.STRING, min_length=1, max_length=ingest.MAX_CHARACTERS)


def _events_body() -> RequestBody:
    one = Reference("#/components/schemas/CloudEvent")
    many = Schema(type=OpenAPIType.ARRAY, items=one, max_items=ingest.MAX_EVENTS)
    content = {ingest.ONE: OpenAPIMediaType(schema=one), ingest.BATCH: OpenAPIMediaType(schema=many)}
    return RequestBody(content, required=True)
