"""From what a client sent to a job, and from a job's end to what the client is told."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from render_platform.errors import RecordError
from render_platform.gateway.backends import Chunk
from render_platform.gateway.catalogue import ModelSpec
from render_platform.gateway.edge import AnyRequest, gateway_of, header, request_id_of, require
from render_platform.gateway.identity import Forbidden, Principal
from render_platform.gateway.jobs import Job, Outcome, Request
from render_platform.gateway.problems import NotFound, Refused
from render_platform.gateway.scheduling import LANES
from render_platform.gateway.service import Gateway
from render_platform.gateway.triton_requests import check_request

WATCH_AFTER_S = 0.05
"""A client that waits longer is watched: should it go away, its job is cancelled."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_KEY = re.compile(r"[\x21-\x7e]{1,200}")


class Asked(NamedTuple):
    """The parameters of a submission, as they were sent."""

    model: str
    task: str | None
    body: bytes
    format: str | None = None
    backend: str | None = None
    priority: str | None = None
    ttl: int | None = None
    webhook: str | None = None
    idempotency_key: str | None = None


def request_of(
    request: AnyRequest, caller: Principal, asked: Asked, *, direct: bool, chunk: Chunk | None = None
) -> Request:
    """The request, checked field by field; RecordError, NotFound or Forbidden says what is wrong with it."""
    gateway = gateway_of(request)
    gateway.may_submit(caller)
    model = find_model(gateway, asked.model)
    task = asked.task or model.tasks[0]
    _one_of("task", task, model.tasks)
    lane = asked.priority or min("normal", caller.priority_max, key=lambda name: -LANES.index(name))
    _one_of("priority", lane, LANES)
    if LANES.index(lane) < LANES.index(caller.priority_max):
        raise Forbidden(f"priority: {lane} is above what you may use", f"use {caller.priority_max} or lower")
    if asked.format is not None:
        _one_of("format", asked.format, model.formats)
    if asked.backend is not None:
        _one_of("backend", asked.backend, model.backends)
    if asked.ttl is not None:
        require(1 <= asked.ttl <= model.ttl_s, "ttl", "is out of range", f"use 1 … {model.ttl_s} seconds")
    if asked.webhook is not None:
        gateway.deliveries.check_url(asked.webhook)
    for server in gateway.fleet.of(model, asked.backend):
        check_request(server.spec, model, asked.body)
    return Request(
        issuer=caller.issuer,
        customer_id=caller.customer_id,
        pricing_tier=caller.pricing_tier,
        model=model,
        task=task,
        body=asked.body,
        lane=lane,
        format=asked.format,
        backend=asked.backend,
        ttl_s=asked.ttl,
        webhook=asked.webhook,
        idempotency_key=_idempotency_key(request, asked),
        direct=direct,
        chunk=chunk,
        traceparent=_traceparent(request),
    )


def _one_of(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        remedy = f"use one of {', '.join(known)}" if known else "leave it out: the model has none"
        raise RecordError(field, f"{value[:100]!r} is not known", remedy)


def find_model(gateway: Gateway, name: str) -> ModelSpec:
    model = gateway.catalogue.resolve(name)
    if model is None:
        raise NotFound(f"model: {name[:100]!r} is not served here", "see /models")
    return model


def _idempotency_key(request: AnyRequest, asked: Asked) -> str | None:
    """The header's or the parameter's; the header may be quoted, as its draft standard wants it."""
    sent = header(request.scope, b"idempotency-key")
    if sent is not None and len(sent) > 1 and sent[0] == sent[-1] == '"':
        sent = sent[1:-1]
    same = sent is None or asked.idempotency_key in (None, sent)
    require(same, "idempotency_key", "the header and the parameter differ", "send one of them")
    key = sent if asked.idempotency_key is None else asked.idempotency_key
    good = key is None or _KEY.fullmatch(key)
    require(good, "idempotency_key", "is not 1 … 200 printable characters", "use a UUID")
    return key


def _traceparent(request: AnyRequest) -> str | None:
    """W3C trace context, where it is well formed; else it is left out, as that standard wants it."""
    text = header(request.scope, b"traceparent")
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


class Waited(NamedTuple):
    """A job that a client waited for: `outcome` is None where the idempotency key stands for one that ended before."""

    job_id: uuid.UUID
    outcome: Outcome | None


async def run_and_wait(request: AnyRequest, wanted: Request) -> Waited:
    """Submit a direct job and wait for its end. A client that goes away has cancelled it."""
    gateway = gateway_of(request)
    job, new = await gateway.engine.submit(wanted, request_id_of(request))
    if isinstance(job, uuid.UUID):
        return Waited(job, None)
    if not new:
        return await _wait_for_another(job)
    return Waited(job.job_id, await wait_for_end(request, job))


async def wait_for_end(request: AnyRequest, job: Job) -> Outcome:
    """The outcome of a direct job of this client's.

    A client that goes away has cancelled it; one that sent an idempotency key comes back for the output, which is kept.
    """
    if job.done is None:
        raise Refused(409, "not_direct", "The job does not wait on a connection")
    if job.request.idempotency_key is not None:
        return await job.done
    engine = gateway_of(request).engine
    watch = Watch(request, lambda: engine.cancel(job, "client_gone"))
    try:
        return await job.done
    except asyncio.CancelledError:
        engine.cancel(job, "client_gone")
        raise
    finally:
        watch.stop()


async def _wait_for_another(job: Job) -> Waited:
    """The idempotency key stands for a job that runs now: wait for it, and cancel nothing."""
    await until_ended(job, None)
    return Waited(job.job_id, None)


async def until_ended(job: Job, seconds: float | None) -> None:
    """Wait for the job's committed end, for at most `seconds`."""
    wake = asyncio.Event()
    job.watchers.append(wake)
    try:
        async with asyncio.timeout(seconds):
            while job.outcome is None:
                await wake.wait()
                wake.clear()
    except TimeoutError:
        pass
    finally:
        job.watchers.remove(wake)


class Watch:
    """Calls `gone` when the client closes its connection; begins after a moment, because most jobs are over by then."""

    def __init__(self, request: AnyRequest, gone: Callable[[], Any]) -> None:
        self._request, self._gone = request, gone
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone()
