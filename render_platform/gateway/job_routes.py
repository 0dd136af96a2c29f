"""Routes of jobs: submit, watch, cancel, read.

A customer sees its own jobs; a foreign id and a missing one get the same answer.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, delete, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import Stream

from render_platform.gateway.edge import AnyRequest, caller_of, customers_only, gateway_of, request_id_of
from render_platform.gateway.identity import Principal
from render_platform.gateway.jobs import FINISHED, MAX_EVENTS, STOPPING, Job, Outcome
from render_platform.gateway.leases import ask_to_cancel
from render_platform.gateway.problems import Draining, NotFound, Refused
from render_platform.gateway.scheduling import LANES
from render_platform.gateway.store import Do
from render_platform.gateway.submission import Asked, find_model, request_of, run_and_wait, until_ended
from render_platform.gateway.views import JobPage, JobView, QueueRequest, QueueView, view_of, view_of_row

MAX_WAIT_S = 60
MAX_PAGE = 500
KEEP_ALIVE_S = 15.0
LOOK_AGAIN_S = 2.0
"""How often a waiting client is told of its position, at most."""

END_ID = MAX_EVENTS + 1
"""The id of a job's last event, wherever it is told from: a client that has it has everything."""

JobId = FromPath[uuid.UUID]
Text = Annotated[str | None, QueryParameter(max_length=2_048)]
Ttl = Annotated[int | None, QueryParameter(ge=1, le=604_800)]
Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]
_STATUSES = {"timeout": 504, "cancelled": 499}
"""499 as gRPC's mapping has it: clients that try 408, 409 and 5xx again leave it alone."""
_WAIT = re.compile(r"(?:^|,)\s*wait=(\d{1,6})\s*(?:,|$)")


@post(
    [
        "/{modality:str}/{family:str}/{model:str}/{task:str}",
        "/{modality:str}/{family:str}/{owner:str}/{model:str}/{task:str}",
    ],
    status_code=200,
)
async def generate(
    request: AnyRequest,
    modality: FromPath[str],
    family: FromPath[str],
    model: FromPath[str],
    task: FromPath[str],
    data: JSONBody[dict[str, Any]],  # noqa: ARG001 - names the body's type; its bytes go on as they came
    owner: FromPath[str] = "",
    format: Text = None,
    backend: Text = None,
    priority: Text = None,
    ttl: Ttl = None,
    webhook: Text = None,
    idempotency_key: Text = None,
) -> Response[Any]:
    """Run a job: the answer is its output. 202 with `Prefer: respond-async`, or `wait=N` and no end in N seconds."""
    caller = caller_of(request)
    spec = find_model(gateway_of(request), f"{owner}/{model}" if owner else model)
    if (spec.modality, spec.family) != (modality, family):
        raise NotFound(f"model: {spec.name} is not there", f"use /{spec.modality}/{spec.family}/{spec.name}")
    asked = Asked(spec.name, task, await request.body(), format, backend, priority, ttl, webhook, idempotency_key)
    later, wait_s = _preference(request)
    if later or wait_s is not None:
        return await _submit(request, caller, asked, wait_s or 0)
    waited = await run_and_wait(request, request_of(request, caller, asked, direct=True))
    if waited.outcome is None:
        return await repeated(request, waited.job_id)
    return answer_of(request, waited.job_id, waited.outcome)


def _preference(request: AnyRequest) -> tuple[bool, int | None]:
    """RFC 7240: whether the answer may come later, and how many seconds to wait for it first."""
    prefer = ",".join(request.headers.getall("prefer", [])).lower()
    found = _WAIT.search(prefer)
    return "respond-async" in prefer, min(int(found[1]), MAX_WAIT_S) if found else None


@post("/queue", status_code=202)
async def enqueue(request: AnyRequest, data: JSONBody[QueueRequest]) -> Response[Any]:
    """Queue a job. 202 means that it is durable; the body holds its signed acceptance."""
    asked = Asked(
        data.model,
        data.task,
        msgspec.json.encode(data.input),
        data.format,
        data.backend,
        data.priority,
        data.ttl,
        data.webhook,
        data.idempotency_key,
    )
    return await _submit(request, caller_of(request), asked, 0)


async def _submit(request: AnyRequest, caller: Principal, asked: Asked, wait_s: int) -> Response[Any]:
    gateway = gateway_of(request)
    job, _ = await gateway.engine.submit(request_of(request, caller, asked, direct=False), request_id_of(request))
    if isinstance(job, uuid.UUID):
        return await repeated(request, job)
    if wait_s:
        await until_ended(job, wait_s)
    if job.outcome is not None:
        return await repeated(request, job.job_id)
    view = view_of(job, gateway.engine)
    view.acceptance = gateway.acceptance(job)
    headers = {
        "Location": view.links["self"],
        "Link": f'<{view.links["self"]}>; rel="monitor"',
        "Preference-Applied": "respond-async",
    }
    return Response(view, status_code=202, headers=headers)


async def repeated(request: AnyRequest, job_id: uuid.UUID) -> Response[Any]:
    """The first result of a job that was asked for again, or that ended while its client waited."""
    archive = gateway_of(request).archive
    row = await asyncio.to_thread(archive.read, job_id)
    if row is None:  # the key outlives the job's row
        raise _pruned(job_id)
    if row["state"] not in FINISHED:
        return Response(view_of_row(row), status_code=202, headers={"Location": f"/jobs/{job_id}"})
    output = await asyncio.to_thread(archive.output, job_id)
    if row["state"] != "success":
        status = 400 if output else _STATUSES.get(row["state"], 502)  # an output: what its backend refused it with
        raise _failure(job_id, status, row["error_code"], output[0] if output else b"", "")
    if output is None:
        raise Refused(410, "output_gone", "The output is no longer kept", f"see /jobs/{job_id}")
    usage = view_of_row(row).usage
    headers = usage_headers(job_id, usage.gpu_seconds if usage else "0", row["device_uuid"])
    return Response(output[0], media_type=output[1], headers=headers, status_code=200)


def answer_of(request: AnyRequest, job_id: uuid.UUID, outcome: Outcome) -> Response[Any]:
    """The output of a job that its client waited for; Refused where it failed."""
    headers = usage_headers(job_id, outcome.gpu_seconds, outcome.device)
    request.scope["state"]["extra"].update(headers)
    if outcome.status == "success":
        return Response(outcome.body, media_type=outcome.content_type, status_code=200)
    if outcome.error_code == STOPPING:
        raise Draining("the gateway is stopping", "try again in a few seconds")
    status = _STATUSES.get(outcome.status, outcome.http_status)
    raise _failure(job_id, status, str(outcome.error_code), outcome.body, outcome.message)


def _failure(job_id: uuid.UUID, status: int, code: str, body: bytes, message: str) -> Refused:
    """How a job that failed is told of, now or when it is asked for again."""
    said = body.decode(errors="replace")[:1_000] or message or "the job failed"
    return Refused(status, code, said, f"see /jobs/{job_id}")


INERT = {"content-security-policy": "sandbox", "x-content-type-options": "nosniff"}
"""With each output: whatever it says that it is, a browser runs nothing of it here, where the page may hold a key."""


def usage_headers(job_id: uuid.UUID, gpu_seconds: str, device: str | None) -> dict[str, str]:
    return {"x-gpu-seconds": gpu_seconds, "x-gpu-device": device or "none", "x-job-id": str(job_id), **INERT}


@get("/queue")
async def show_queue(request: AnyRequest) -> list[QueueView]:
    """How many jobs wait and run, a model."""
    gateway = gateway_of(request)
    views = []
    waiting = gateway.engine.waiting()
    for name, model in gateway.catalogue.models.items():
        queues = [queue for (queued, _), queue in waiting.items() if queued == name]
        servers = gateway.fleet.of(model, None)
        views.append(
            QueueView(
                model=name,
                waiting={lane: sum(queue.waiting(lane) for queue in queues) for lane in LANES},
                running=sum(job.model.name == name and job.state == "running" for job in gateway.engine.jobs.values()),
                capacity=sum(server.spec.capacity for server in servers),
            )
        )
    return views


@get("/jobs")
async def list_jobs(request: AnyRequest, limit: Limit = 50, before: FromQuery[uuid.UUID | None] = None) -> JobPage:
    """Your jobs, newest first; `next` is the `before` of the page that follows."""
    archive = gateway_of(request).archive
    ref = await asyncio.to_thread(archive.ref_of, *caller_of(request).key)
    rows = await asyncio.to_thread(archive.jobs_of, ref, limit, before) if ref else []
    views = [view_of_row(row) for row in rows]
    return JobPage(jobs=views, next=views[-1].id if len(views) == limit else None)


@get("/jobs/{job_id:uuid}")
async def show_job(request: AnyRequest, job_id: JobId) -> Response[JobView]:
    """A job: 200, or 303 to its output where it is complete and kept."""
    view = await _view(request, job_id)
    if view.state == "success" and "output" in view.links:
        return Response(view, status_code=303, headers={"Location": view.links["output"]})
    return Response(view, status_code=200)


@get("/jobs/{job_id:uuid}/output")
async def show_output(request: AnyRequest, job_id: JobId) -> Response[bytes]:
    """What the job gave, while it is kept; 202 while it has not ended."""
    view = await _view(request, job_id)
    if view.state in FINISHED and view.state != "success":
        raise Refused(410, str(view.error_code), "a job that failed has no output", f"see /jobs/{job_id}")
    return await repeated(request, job_id)


@delete("/jobs/{job_id:uuid}", status_code=200)
async def delete_job(request: AnyRequest, job_id: JobId) -> Response[JobView]:
    """Cancel a job, in whatever state it is; the same as POST /jobs/{id}/cancel."""
    return await _cancel(request, job_id)


@post("/jobs/{job_id:uuid}/cancel", status_code=200)
async def cancel_job(request: AnyRequest, job_id: JobId) -> Response[JobView]:
    """Cancel a job. What it used until its backend stopped is metered; a job that has ended stays as it is."""
    return await _cancel(request, job_id)


async def _cancel(request: AnyRequest, job_id: uuid.UUID) -> Response[JobView]:
    engine = gateway_of(request).engine
    await _view(request, job_id)
    job = engine.find(job_id)
    if job is not None and job.outcome is None:
        engine.cancel(job, "cancelled_by_client")
        await until_ended(job, MAX_WAIT_S)
    elif job is None and gateway_of(request).lease.shared:
        await _cancel_elsewhere(request, job_id)
    view = await _view(request, job_id)
    return Response(view, status_code=200 if view.state in FINISHED else 202)


async def _cancel_elsewhere(request: AnyRequest, job_id: uuid.UUID) -> None:
    """Ask the gateway that works on the job; it looks every second or so."""
    gateway = gateway_of(request)
    await gateway.writer.submit(Do(partial(ask_to_cancel, job_id=job_id)))
    for _ in range(MAX_WAIT_S):
        if (await _view(request, job_id)).state in FINISHED:
            return
        await asyncio.sleep(1)


async def _view(request: AnyRequest, job_id: uuid.UUID) -> JobView:
    """The job, of this caller; NotFound where it is another's, or none."""
    gateway, caller = gateway_of(request), caller_of(request)
    job = gateway.engine.find(job_id)
    if job is not None and job.customer == caller.key and job.outcome is None:
        return view_of(job, gateway.engine)
    ref = await asyncio.to_thread(gateway.archive.ref_of, *caller.key)
    row = await asyncio.to_thread(gateway.archive.read, job_id)
    if row is None and ref is not None and await asyncio.to_thread(gateway.archive.pruned_owner, job_id) == ref:
        raise _pruned(job_id)
    if row is None or row["customer_ref"] != ref:
        raise NotFound("there is no such job")
    return view_of_row(row)


def _pruned(job_id: uuid.UUID) -> Refused:
    return Refused(410, "job_gone", "The job's record is no longer kept", f"its receipt is at /jobs/{job_id}/receipt")


@get("/jobs/{job_id:uuid}/events", media_type="text/event-stream")
async def job_events(request: AnyRequest, job_id: JobId) -> Response[Any]:
    """Server-sent events: queued, position, started, progress, retry, complete, error.

    `Last-Event-ID` resumes; 204 after the last event, so that browsers do not connect again.
    """
    view = await _view(request, job_id)
    last = request.headers.get("last-event-id", "")
    after = int(last) if re.fullmatch(r"[0-9]{1,9}", last) else 0
    if view.state in FINISHED and after >= END_ID:
        return Response(None, status_code=204)
    job = gateway_of(request).engine.find(job_id)
    if job is not None:
        events = _events(request, job, after)
    else:
        events = _ended_events(view) if view.state in FINISHED else _events_elsewhere(request, view)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(events, media_type="text/event-stream", headers=headers)


async def _ended_events(view: JobView) -> AsyncIterator[bytes]:
    """The end of a job that is no longer in memory, as it would have been told there."""
    if view.state == "success":
        usage = view.usage
        data = {"gpu_seconds": usage and usage.gpu_seconds, "gpu_device": usage and usage.gpu_device}
        yield _event("complete", data, END_ID)
    elif view.state in FINISHED:
        yield _event("error", {"status": view.state, "code": view.error_code, "message": ""}, END_ID)


async def _events_elsewhere(request: AnyRequest, view: JobView) -> AsyncIterator[bytes]:
    """Of a job that another gateway works on: its states as SQL has them."""
    told, quiet_s = "", 0.0
    while view.state not in FINISHED and not gateway_of(request).drained:
        if view.state != told:
            told, quiet_s = view.state, 0.0
            yield _event({"running": "started"}.get(told, told), {}, None)
        elif quiet_s >= KEEP_ALIVE_S:
            quiet_s = 0.0
            yield b": still here\n\n"
        await asyncio.sleep(LOOK_AGAIN_S)
        quiet_s += LOOK_AGAIN_S
        job = gateway_of(request).engine.find(uuid.UUID(view.id))
        if job is not None:  # taken over by this gateway
            async for event in _events(request, job, 0):
                yield event
            return
        view = await _view(request, uuid.UUID(view.id))
    async for event in _ended_events(view):
        yield event


async def _events(request: AnyRequest, job: Job, after: int) -> AsyncIterator[bytes]:
    """What was told after event `after`, and what is told from now on, until the end."""
    engine = gateway_of(request).engine
    if after > len(job.history):
        after = 0  # a number that was given before the gateway was started again
    wake, position, quiet_s = asyncio.Event(), -1, 0.0
    job.watchers.append(wake)
    try:
        while True:
            wake.clear()
            for number, name, data in job.told_after(after):
                yield _event(name, data, END_ID if name in ("complete", "error") else number)
                after = number
            if job.outcome is not None or gateway_of(request).drained:
                return
            now = engine.get_queue_position(job)
            if now is not None and now != position:
                position, quiet_s = now, 0.0
                yield _event("position", {"position": now, "eta_us": engine.eta_us(job, now)}, None)
            elif quiet_s >= KEEP_ALIVE_S:
                quiet_s = 0.0
                yield b": still here\n\n"
            try:
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await wake.wait()
            except TimeoutError:
                quiet_s += LOOK_AGAIN_S
    finally:
        job.watchers.remove(wake)


def _event(name: str, data: Any, number: int | None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {name}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


JOB_ROUTES = Router(
    "/",
    route_handlers=[
        generate,
        enqueue,
        show_queue,
        list_jobs,
        show_job,
        show_output,
        delete_job,
        cancel_job,
        job_events,
    ],
    before_request=customers_only,
)
