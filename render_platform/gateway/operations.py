"""Routes for operators and programs: models, health, readiness, metrics, usage from elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

from litestar import Response, get, post
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from render_platform.gateway.edge import BUCKETS_S, AnyRequest, Durations, caller_of, gateway_of, identify, meters_only
from render_platform.gateway.ingest import authorise, parse
from render_platform.gateway.scheduling import LANES
from render_platform.gateway.service import Gateway
from render_platform.gateway.store import Do
from render_platform.gateway.views import Health, ModelView, Readiness

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NS_PER_SECOND = 1_000_000_000


@get("/models")
async def list_models(request: AnyRequest) -> list[ModelView]:
    """Every model, where it runs, and whether one of its backends is trusted now."""
    identify(request)
    gateway = gateway_of(request)
    now_us = gateway.clock.now_us()
    return [
        ModelView(
            name=name,
            family=model.family,
            modality=model.modality,
            type=model.type,
            tasks=model.tasks,
            formats=model.formats,
            aliases=model.aliases,
            backends=list(model.backends),
            available=gateway.fleet.retry_after_us(model, None, now_us) is None,
        )
        for name, model in gateway.catalogue.models.items()
    ]


@get("/models/aliases")
async def list_aliases(request: AnyRequest) -> dict[str, str]:
    """Other names of models, such as their Hugging Face ids."""
    identify(request)
    return gateway_of(request).catalogue.aliases()


@get("/health")
async def health() -> Health:
    """The process answers."""
    return Health("ok")


@get("/ready")
async def ready(request: AnyRequest) -> Response[Readiness]:
    """200 where the gateway takes work, 503 where it does not, and why. The fast path only informs."""
    gateway = gateway_of(request)
    now_us = gateway.clock.now_us()
    states: dict[str, str] = {name: server.breaker.state(now_us) for name, server in gateway.fleet.servers.items()}
    problems = ["stopping"] if gateway.engine.draining else []
    if gateway.died.is_set():
        problems.append("the database writer has ended")
    if failure := gateway.writer.last.failure:  # until a write succeeds, such as the lease's next renewal
        problems.append(f"the last write failed: {failure}")
    if states and all(state == "open" for state in states.values()):
        problems.append("no backend answers")
    view = Readiness(
        status="unready" if problems else "ready",
        gateway=gateway.gateway_id,
        epoch=gateway.epoch,
        meter=gateway.meter.describe(),
        backends=states,
        fast_path=_fast_path(gateway),
        problems=problems,
    )
    return Response(view, status_code=503 if problems else 200)


def _fast_path(gateway: Gateway) -> dict[str, Any]:
    publisher = gateway.publisher
    return {
        "delivered": publisher.delivered,
        "dropped": publisher.dropped,
        "waiting": publisher.waiting,
        "last_error": publisher.last_error,
    }


@post("/api/v1/events", status_code=204, before_request=meters_only)
async def ingest_events(request: AnyRequest) -> None:
    """Usage from elsewhere as CloudEvents, one or a batch. 204 means that all of them are durable."""
    gateway, caller = gateway_of(request), caller_of(request)
    events = await asyncio.to_thread(parse, await request.body(), request.headers.get("content-type", ""))
    authorise(caller, events)
    recorded = await gateway.writer.submit(Do(lambda connection: gateway.ingest.record(connection, caller, events)))
    for event in recorded:
        gateway.publisher.offer(event)


@get("/metrics", media_type=METRICS_TYPE)
async def metrics(request: AnyRequest) -> Response[bytes]:
    """What Prometheus reads: base units, no customer and no secret in a label."""
    registry = CollectorRegistry()
    registry.register(_Metrics(gateway_of(request), request.app.state["durations"]))
    return Response(generate_latest(registry), media_type=METRICS_TYPE)


class _Metrics:
    """The gateway's own numbers, read when they are asked for."""

    def __init__(self, gateway: Gateway, durations: Durations) -> None:
        self._gateway, self._durations = gateway, durations

    def collect(self) -> Iterator[Metric]:
        yield from self._jobs()
        yield from self._backends()
        yield from self._fast_path()
        yield self._requests()

    def _jobs(self) -> Iterator[Metric]:
        gateway = self._gateway
        yield _counter("jobs_accepted", "Jobs accepted in this epoch", [((), gateway.engine.accepted)])
        ended = gateway.ended.items()
        yield _counter("jobs_ended", "Jobs whose end is committed", ended, ("model", "status"))
        seconds = [((name,), ns / NS_PER_SECOND) for name, ns in gateway.gpu_time_ns.items()]
        yield _counter("gpu_seconds", "GPU time attributed to jobs", seconds, ("model",))
        yield _counter("job_retries", "Attempts that were followed by another", [((), gateway.engine.retried)])
        waiting = [
            ((name, lane), queue.waiting(lane))
            for (name, _), queue in gateway.engine.waiting().items()
            for lane in LANES
        ]
        yield _gauge("jobs_waiting", "Jobs that wait for a slot", waiting, ("model", "lane"))

    def _backends(self) -> Iterator[Metric]:
        now_us = self._gateway.clock.now_us()
        servers = self._gateway.fleet.servers.items()
        yield _gauge("backend_running", "Jobs that run", [((n,), s.running) for n, s in servers], ("backend",))
        states = [((name, server.breaker.state(now_us)), 1) for name, server in servers]
        yield _gauge("backend_breaker", "1 for the state of the breaker", states, ("backend", "state"))

    def _fast_path(self) -> Iterator[Metric]:
        publisher, writers = self._gateway.publisher, self._gateway.writers
        yield _counter("fast_path_delivered", "Events that ClickHouse acknowledged", [((), publisher.delivered)])
        yield _counter("fast_path_dropped", "Events that did not reach ClickHouse", [((), publisher.dropped)])
        yield _counter("commits", "Transactions of the gateway's writers", [((), sum(one.groups for one in writers))])
        failing = [((), int(bool(self._gateway.writer.last.failure)))]
        yield _gauge("write_failing", "1 where the last write to the database failed", failing)
        yield _counter("writes", "Operations in them", [((), sum(one.operations for one in writers))])

    def _requests(self) -> Metric:
        family = HistogramMetricFamily("render_platform_http_request_duration_seconds", "Requests", labels=["status"])
        for kind, counts in self._durations.counts.items():
            total, buckets = 0, []
            for bound, count in zip((*BUCKETS_S, float("inf")), counts, strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
            family.add_metric([kind], buckets, self._durations.sums_s[kind])
        return family


Samples = Iterable[tuple[tuple[str, ...], float]]


def _counter(name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(f"render_platform_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(f"render_platform_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


OPERATION_ROUTES = [list_models, list_aliases, health, ready, ingest_events, metrics]
