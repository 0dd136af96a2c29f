"""What operators and programs use: models, health, readiness, metrics, usage from elsewhere, the API's page."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from prometheus_client.parser import text_string_to_metric_families

from render_platform.gateway.identity import ANY
from render_platform.gateway.ingest import BATCH, ONE, TYPE, event_id_of
from render_platform.gateway.problems import is_openai
from tests.gateway.http import CHAT, CHAT_PATH, HUGGING_FACE, Client, Reply, Running, running


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("operations") / "state") as made:
        yield made


@pytest.fixture
def client(at: Running) -> Client:
    return at.client()


def test_models_say_where_they_run_and_what_they_are_called(client: Client) -> None:
    found = {model["name"]: model for model in client.get("/models").json}
    assert found["flux-dev"] == {
        "name": "flux-dev",
        "family": "flux",
        "modality": "image",
        "type": "rectified_flow",
        "tasks": ["text2image"],
        "formats": ["png", "jpeg"],
        "aliases": ["black-forest-labs/FLUX.1-dev"],
        "backends": ["wide", "narrow"],
        "available": True,
    }
    assert client.get("/models/aliases").json[HUGGING_FACE] == "llama-8b"


def test_the_process_is_healthy_and_ready(at: Running, client: Client) -> None:
    assert client.get("/health").json == {"status": "ok"}
    reply = client.get("/ready")
    assert (reply.status, reply.json["status"], reply.json["problems"]) == (200, "ready", [])
    assert reply.json["backends"] == {"wide": "closed", "narrow": "closed"}
    assert (reply.json["gateway"], reply.json["epoch"]) == (at.gateway.gateway_id, 1)


def test_without_a_backend_it_is_not_ready_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        for model, path in (("llama-8b", CHAT_PATH), ("solo", "/text/llama/solo/chat")):
            replies = [client.post(path, {**CHAT, "do": "fail"}) for _ in range(11)]
            assert [reply.status for reply in replies] == [502] * 10 + [503]
            refused = replies[-1]
            assert (refused.json["code"], refused.json["status"]) == ("no_backend", 503)
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert model in refused.json["detail"]
        assert at.counts()["jobs"] == 20
        assert not any(model["available"] for model in client.get("/models").json)
        reply = client.get("/ready")
        assert (reply.status, reply.json["problems"]) == (503, ["no backend answers"])
        assert client.get("/health").status == 200


def test_a_gateway_that_stops_takes_nothing_more_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        at.call(lambda: setattr(at.gateway.engine, "draining", True))
        refused = client.post(CHAT_PATH, CHAT)
        assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (503, "stopping", "5")
        reply = client.get("/ready")
        assert (reply.status, reply.json["problems"]) == (503, ["stopping"])
        assert at.counts()["jobs"] == 0


# Metrics.


def test_metrics_are_what_prometheus_reads_and_name_nobody(at: Running, client: Client) -> None:
    job_id = client.post(CHAT_PATH, CHAT).headers["x-job-id"]
    client.get("/nowhere")
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    samples = [sample for family in families.values() for sample in family.samples]
    assert {name for sample in samples for name in sample.labels} <= {
        "model",
        "status",
        "lane",
        "backend",
        "state",
        "le",
    }
    [gpu] = [sample for sample in samples if sample.name == "render_platform_gpu_seconds_total"]
    spent = sum(row[0] for row in at.sql("SELECT gpu_time_ns FROM usage_events WHERE model_name = 'llama-8b'"))
    assert gpu.value == pytest.approx(spent / 1e9)
    [ref] = {row[0] for row in at.sql("SELECT customer_ref FROM customers")}
    for secret in (ref, "local", job_id):
        assert secret.encode() not in reply.body
    for family in families.values():
        assert family.documentation
        assert not re.search(r"_(us|ms|ns|microseconds|milliseconds|minutes)(_|$)", family.name)
    durations = families["render_platform_http_request_duration_seconds"]
    last = {(s.labels["status"], s.labels["le"]): s.value for s in durations.samples if s.name.endswith("_bucket")}
    counts = {s.labels["status"]: s.value for s in durations.samples if s.name.endswith("_count")}
    assert counts["2xx"] >= 1
    assert counts["4xx"] >= 1
    assert {kind: last[kind, "+Inf"] for kind in counts} == counts


# Usage from elsewhere.


def usage(**changes: Any) -> dict[str, Any]:
    data = {"model": "m", "model_family": "f", "model_type": "llm", "modality": "text", "task": "chat"}
    event = {
        "specversion": "1.0",
        "type": TYPE,
        "source": "rack-7",
        "id": str(uuid.uuid4()),
        "subject": "acme",
        "time": "2026-01-31T12:00:00.5Z",
        "data": {**data, "gpu_time_ns": 1_500_000_000},
    }
    return {**event, **changes}


def send(client: Client, body: Any) -> Reply:
    kind = BATCH if isinstance(body, list) else ONE
    return client.post("/api/v1/events", body, content_type=kind)


def test_usage_is_durable_when_it_is_acknowledged(at: Running, client: Client) -> None:
    event = usage()
    reply = send(client, event)
    assert (reply.status, reply.body) == (204, b"")
    key = event_id_of(event["source"], event["id"]).bytes
    query = "SELECT gpu_time_ns, meter, source FROM usage_events WHERE event_id = ?"
    assert at.sql(query, key) == [(1_500_000_000, "external", "rack-7")]


def test_usage_that_is_sent_again_counts_once(at: Running, client: Client) -> None:
    events = [usage() for _ in range(20)]
    before = at.counts()["usage_events"]
    assert [send(client, body).status for body in (events, events, events[7], [*events, usage()])] == [204] * 4
    assert at.counts()["usage_events"] == before + 21
    changed = {**events[3], "subject": "somebody"}
    conflict = send(client, [usage(), changed])
    assert (conflict.status, conflict.json["code"], conflict.json["field"]) == (409, "conflict", "[1].id")
    assert at.counts()["usage_events"] == before + 21, "a batch is recorded as a whole, or not at all"


def test_a_meter_reports_and_does_nothing_else(at: Running) -> None:
    keys = at.gateway.keys
    meter = at.client(at.call(lambda: keys.create("rack", ["meter"], sources=["rack-7"], customers=[ANY])))
    assert send(meter, usage()).status == 204
    for refused in (send(meter, usage(source="rack-8")), meter.post(CHAT_PATH, CHAT), meter.get("/jobs")):
        assert (refused.status, refused.json["code"]) == (403, "forbidden")
    customer = at.client(at.call(lambda: keys.create("acme", ["customer"])))
    assert send(customer, usage()).status == 403


# The API's page.


def test_the_page_of_the_api_needs_no_internet(at: Running, client: Client) -> None:
    page = client.get("/schema")
    assert page.headers["content-type"].startswith("text/html")
    html = page.body.decode()
    linked = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=['"]([^'"]+)""", html)
    assert len(linked) >= 4
    styles = b""
    for url in linked:
        assert url.startswith("/"), url
        reply = client.get(urljoin("/schema", url))
        assert reply.status == 200, url
        assert reply.body
        styles += reply.body if url.endswith(".css") else b""
    assert not re.search(rb"@import|url\(['\"]?(?:https?:)?//", styles)
    outside = re.findall(r"https?://[^\s\"'<>]+", html)
    assert not outside, "the page names another host"


def test_the_document_is_complete(client: Client) -> None:
    reply = client.get("/schema/openapi.json")
    assert reply.status == 200
    document = reply.json
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) == 31
    for (_, path), operation in operations.items():
        assert operation["description"]
        refusals = {status: one for status, one in operation["responses"].items() if status[0] in "45"}
        kinds = {kind for status, one in refusals.items() for kind in one["content"] if (path, status) != READY}
        assert kinds == {"application/json" if is_openai(path) else "application/problem+json"}
        assert ("401" in operation["responses"]) == (operation.get("security") != [{}])
    assert document["components"]["schemas"]["QueueRequest"]["additionalProperties"] is False
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api_key"}
    for name in set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document))):
        assert name in document["components"]["schemas"]


READY = ("/ready", "503")
"""What is not a problem document there: it says what stands in the way, in the shape of the answer that all is well."""
