"""Whatever a client sends, it is told what is wrong in one shape, and nothing of it stands. Against a real process."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from render_platform.gateway.ingest import BATCH, ONE
from tests.commands import PROGRAM, clean_environment, run_command
from tests.gateway.http import CHAT, CHAT_PATH, IMAGE_PATH, Client, Reply, Served, eventually
from tests.gateway.test_operations import usage

CONFIG = """
[backends.wide]
kind = "simulated"
capacity = 64
device = "GPU-sim-00"
speed = 1000.0
[models.llama-8b]
family = "llama"
modality = "text"
type = "llm"
tasks = ["chat", "embedding"]
backends = { wide = "llama-8b" }
[models.flux-dev]
family = "flux"
modality = "image"
type = "rectified_flow"
tasks = ["text2image"]
formats = ["png"]
backends = { wide = "flux-dev" }
"""
NOBODY = str(uuid.UUID(int=7))
EVENTS = "/api/v1/events"
V1 = "/v1/chat/completions"


@dataclass
class Process(Served):
    key: str
    meter: str
    job: str = ""
    event: dict[str, Any] = field(default_factory=usage)
    """A job, and an event, that stand: nothing may change them."""


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("bad")
    state, log = folder / "state", folder / "log"
    (folder / "config.toml").write_text(CONFIG)
    key = run_command("key", "create", "acme", "--state", state).stdout.strip()
    meter = ("--role", "meter", "--role", "customer", "--source", "rack-7", "--customer", "acme")
    other = run_command("key", "create", "rack", *meter, "--state", state).stdout.strip()
    command = [*PROGRAM, "serve", "--state", state, "--config", folder / "config.toml", "--port", "0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=stderr, env=clean_environment(), text=True
        )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found, log.read_text()
        made = Process(int(found[1]), state, key, other)
        client = made.client(key)
        made.job = client.queue(idempotency_key="standing")["id"]
        client.ended(made.job)
        assert made.client(made.meter).post(EVENTS, made.event, content_type=ONE).status == 204
        yield made
        check_log(made, log.read_text())
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close() if process.stdout else None


def check_log(at: Process, log: str) -> None:
    """No failure of ours, and no secret."""
    metrics = at.client().get("/metrics").body.decode()
    assert 'status="4xx"' in metrics
    assert 'status="5xx"' not in metrics
    assert "defect" not in log
    for secret in (at.key, at.meter, at.key[20:], at.meter[20:], "Bearer"):
        assert secret not in log


class Case(NamedTuple):
    """What is sent, and what is said of it."""

    name: str
    method: str
    path: str
    body: Any
    status: int
    code: str = "invalid_field"
    field: str = ""
    headers: tuple[tuple[str, str], ...] = ()


def queue(name: str, field: str, status: int = 422, code: str = "invalid_field", **changes: Any) -> Case:
    """A submission with one thing wrong; a value of ... is a field that is left out."""
    asked = {"model": "llama-8b", "input": CHAT, **changes}
    body = {name: value for name, value in asked.items() if value is not ...}
    return Case(f"queue: {name}", "POST", "/queue", body, status, code, field)


def asked(name: str, query: str, field: str, status: int = 422, path: str = CHAT_PATH, **more: Any) -> Case:
    return Case(f"parameter: {name}", "POST", f"{path}?{query}", CHAT, status, field=field, **more)


def raw(name: str, body: bytes, path: str = "/queue", status: int = 422, **more: Any) -> Case:
    status = 400 if path.startswith("/v1/") and status == 422 else status
    return Case(f"body: {name} {path}", "POST", path, body, status, **{"field": "body", **more})


def event(name: str, field: str, **changes: Any) -> Case:
    return Case(f"event: {name}", "POST", EVENTS, usage(**changes), 422, field=field, headers=CLOUD)


CLOUD = (("content-type", ONE),)
MANY = (("content-type", BATCH),)
DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES = {
    "nothing": b"",
    "not JSON": b"{model: 1}",
    "half of it": b'{"model": "llama-8b", "input": {',
    "an array": b"[1]",
    "null": b"null",
    "a number": b"7",
    "NaN": b'{"model": "llama-8b", "input": {"x": NaN}, "messages": [{"x": NaN}]}',
    "Infinity": b'{"model": "llama-8b", "input": {"x": -Infinity}, "messages": [Infinity]}',
    "bad UTF-8": b'{"model": "llama-8b", "input": {"x": "\xff"}, "messages": [{"x": "\xff"}]}',
    "half a surrogate": b'{"model": "llama-8b", "input": {"x": "\\ud800"}, "messages": [{"x": "\\ud800"}]}',
    "UTF-16": '{"model": "llama-8b"}'.encode("utf-16"),
    "a number of 10,000 digits": b'{"model": "llama-8b", "input": {"x": ' + b"9" * 10_000 + b'}, "messages": []}',
    "too deep": b'{"model": "llama-8b", "input": {"x": ' + DEEP + b'}, "messages": ' + DEEP + b"}",
}
TOO_LARGE = b'{"model": "llama-8b", "input": {"x": "' + b"x" * 11_000_000 + b'"}}'
LARGE = "body_too_large"
NOT_JSON: dict[str, Any] = {"code": "unsupported_media_type", "status": 415, "field": ""}
MISSING: dict[str, Any] = {"code": "not_found", "status": 404}
CASES = [
    *(raw(name, body, path) for name, body in BODIES.items() for path in ("/queue", CHAT_PATH, V1)),
    *(raw("11 MB", TOO_LARGE, path, 413, code=LARGE, field="") for path in ("/queue", IMAGE_PATH, V1)),
    raw("11 MB of events", TOO_LARGE, EVENTS, 413, code=LARGE, field="", headers=CLOUD),
    *(
        raw(
            kind or "no type",
            json.dumps({"model": "llama-8b", "input": {}, **CHAT}).encode(),
            path,
            **NOT_JSON,
            headers=h,
        )
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
        for path, h in ((path, (("content-type", kind),)) for path in ("/queue", CHAT_PATH, V1, EVENTS))
    ),
    queue("no model", "model", model=...),
    queue("no input", "input", input=...),
    queue("model of another type", "model", model=7),
    queue("empty model", "model", model=""),
    queue("endless model", "model", model="m" * 201),
    queue("unknown model", "model", 404, "not_found", model="gpt-9"),
    queue("input of another type", "input", input="hello"),
    queue("unknown member", "colour", colour="red"),
    queue("unknown task", "task", task="paint"),
    queue("task of 10 MB", "task", task="x" * 10_000_000),
    queue("unknown format", "format", model="flux-dev", format="gif"),
    queue("format of a model without any", "format", format="png"),
    queue("unknown backend", "backend", backend="elsewhere"),
    queue("unknown priority", "priority", priority="urgent"),
    queue("priority above the customer's", "priority", 403, "forbidden", priority="high"),
    *(queue(f"ttl {ttl!r}", "ttl", ttl=ttl) for ttl in (0, -1, 3_601, 10**9, 10**30, 1.5, "60", True)),
    *(
        queue(f"webhook {url}", "webhook", webhook=url)
        for url in (
            "http://127.0.0.1/",
            "http://10.0.0.1/x",
            "http://[::1]/",
            "http://169.254.169.254/latest",
            "ftp://a.b/",
        )
    ),
    *(queue(f"webhook {url}", "webhook", webhook=url) for url in ("", "nonsense", "http://u:p@a.example/", 7)),
    queue("endless webhook", "webhook", webhook="https://a.example/" + "x" * 2_048),
    queue("key that stands for another request", "idempotency_key", 422, "conflict", idempotency_key="standing", ttl=5),
    *(queue(f"key {key[:5]!r}", "idempotency_key", idempotency_key=key) for key in ("", "a b", "é", "x" * 201)),
    asked("unknown format", "format=gif", "format", path=IMAGE_PATH),
    asked("unknown backend", "backend=elsewhere", "backend"),
    asked("unknown priority", "priority=urgent", "priority"),
    asked("priority above the customer's", "priority=high", "priority", 403, code="forbidden"),
    *(asked(f"ttl {ttl}", f"ttl={ttl}", "ttl") for ttl in ("0", "-1", "99999", "9" * 30, "9" * 5_000, "x", "1.5", "")),
    asked("webhook", "webhook=http://192.168.0.1/", "webhook"),
    asked("endless webhook", "webhook=http://a.example/" + "x" * 2_100, "webhook"),
    asked("key", "idempotency_key=a%20b", "idempotency_key"),
    asked("two keys", "idempotency_key=a", "idempotency_key", headers=(("idempotency-key", "b"),)),
    Case(
        "key of another request",
        "POST",
        CHAT_PATH,
        CHAT,
        422,
        "conflict",
        "idempotency_key",
        (("idempotency-key", "standing"),),
    ),
    Case("unknown model", "POST", "/text/llama/gpt-9/chat", CHAT, field="model", **MISSING),
    Case("unknown owner", "POST", "/text/llama/acme/llama-8b/chat", CHAT, field="model", **MISSING),
    Case("model of another family", "POST", "/text/gpt/llama-8b/chat", CHAT, field="model", **MISSING),
    Case("strange path", "POST", "/%00/%ff/llama-8b/chat", CHAT, field="model", **MISSING),
    Case("unknown task", "POST", "/text/llama/llama-8b/paint", CHAT, 422, field="task"),
    Case("chat with a painter", "POST", V1, {"model": "flux-dev", **CHAT}, 400, field="task"),
    Case("no messages", "POST", V1, {"model": "llama-8b"}, 400, field="messages"),
    Case("no model", "POST", V1, CHAT, 400, field="model"),
    Case("unknown model", "POST", V1, {"model": "gpt-9", **CHAT}, field="model", **MISSING),
    Case(
        "a prompt of another type", "POST", "/v1/completions", {"model": "llama-8b", "prompt": 7}, 400, field="prompt"
    ),
    Case("no input", "POST", "/v1/embeddings", {"model": "llama-8b"}, 400, field="input"),
    *(
        Case(f"limit {n}", "GET", f"/jobs?limit={n}", None, 422, field="limit")
        for n in ("0", "-1", "501", "x", "9" * 99, "")
    ),
    *(Case(f"before {n}", "GET", f"/jobs?before={n}", None, 422, field="before") for n in ("x", "7", NOBODY[:-1], "")),
    *(Case(f"job {n}", "GET", f"/jobs/{n}", None, **MISSING) for n in ("x", NOBODY, NOBODY[:-1], "%00", "..%2f..")),
    *(Case(f"no job's {n}", "GET", f"/jobs/{NOBODY}/{n}", None, **MISSING) for n in ("output", "events")),
    Case("no job", "DELETE", f"/jobs/{NOBODY}", None, **MISSING),
    Case("no job", "POST", f"/jobs/{NOBODY}/cancel", None, **MISSING),
    *(Case("unknown path", method, "/nowhere", None, **MISSING) for method in ("GET", "POST", "DELETE")),
    *(Case("unknown path", "POST", path, {}, **MISSING) for path in ("/v1/nothing", "/a/b/c/d/e/f")),
    *(
        Case("wrong method", method, path, None, 405, "method_not_allowed")
        for method, path in (
            ("PUT", "/queue"),
            ("DELETE", "/queue"),
            ("GET", V1),
            ("POST", "/jobs"),
            ("GET", EVENTS),
            ("HEAD", "/jobs"),
            ("POST", "/"),
        )
    ),
    Case(
        "200 headers",
        "GET",
        "/jobs",
        None,
        431,
        "headers_too_large",
        headers=tuple((f"x-{n}", "x") for n in range(200)),
    ),
    Case("64 KB of headers", "GET", "/v1/models", None, 431, "headers_too_large", headers=(("x-large", "x" * 65_536),)),
    Case("a URL of 60 KB", "GET", "/jobs?before=" + "x" * 60_000, None, 414, "url_too_long"),
    Case("a path of 60 KB", "GET", "/jobs/" + "x" * 60_000, None, 414, "url_too_long"),
    Case("event, not an object", "POST", EVENTS, [], 422, field="body", headers=CLOUD),
    Case("events, not an array", "POST", EVENTS, {}, 422, field="body", headers=MANY),
    Case("1,001 events", "POST", EVENTS, [usage()] * 1_001, 422, field="body", headers=MANY),
    Case(
        "the last of three",
        "POST",
        EVENTS,
        [usage(), usage(), usage(subject=7)],
        422,
        field="[2].subject",
        headers=MANY,
    ),
    Case("event of JSON", "POST", EVENTS, usage(), **NOT_JSON),
    raw("bad UTF-8", b'{"specversion": "\xff"}', EVENTS, headers=CLOUD),
    raw("too deep", DEEP, EVENTS, headers=CLOUD),
    raw(
        "twice the same member",
        b'{"specversion": "1.0", "specversion": "1.0"}',
        EVENTS,
        field="specversion",
        headers=CLOUD,
    ),
    event("of another version", "specversion", specversion="0.3"),
    event("of another type", "type", type="x"),
    event("without a subject", "subject", subject=None),
    event("with a strange time", "time", time="yesterday"),
    event("from the future", "time", time="2999-01-01T00:00:00Z"),
    event("without data", "data", data=None),
    event("with too little data", "data.model_family", data={"model": "m"}),
    event("with unknown data", "data.colour", data={**usage()["data"], "colour": 1}),
    event("with negative time", "data.gpu_time_ns", data={**usage()["data"], "gpu_time_ns": -1}),
    event("with a year of time", "data.gpu_time_ns", data={**usage()["data"], "gpu_time_ns": 10**17}),
    Case("event from elsewhere", "POST", EVENTS, usage(source="rack-8"), 403, "forbidden", "source", CLOUD),
    Case("event of the gateway's own", "POST", EVENTS, usage(source="gateway/x"), 403, "forbidden", "source", CLOUD),
    Case("event about another customer", "POST", EVENTS, usage(subject="other"), 403, "forbidden", "source", CLOUD),
]


def check_problem(reply: Reply, case: Case) -> None:
    path = case.path.partition("?")[0]
    assert reply.status == case.status, reply.body[:500]
    request_id = reply.headers["x-request-id"]
    if case.method == "HEAD":
        return
    if path.startswith("/v1/"):
        assert reply.headers["content-type"] == "application/json"
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"] or "", error["code"]) == (case.field, case.code)
        assert error["message"]
        assert error["type"]
    else:
        assert reply.headers["content-type"] == "application/problem+json"
        problem = reply.json
        assert problem.pop("field", "") == case.field
        assert problem["type"] == f"urn:render-platform:problem:{case.code}"
        assert (problem["status"], problem["code"], problem["request_id"]) == (case.status, case.code, request_id)
        assert problem["instance"] == path[:8_192]
        assert problem["title"]
        assert problem["detail"]
        assert set(problem) == {"type", "title", "status", "detail", "instance", "code", "request_id"}
    assert len(reply.body) < 20_000


def send(client: Client, case: Case) -> Reply:
    return client.ask(case.method, case.path, case.body, **dict(case.headers))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.path[:40]} {case.name}")
def test_it_is_told_what_is_wrong_and_nothing_stands(at: Process, case: Case) -> None:
    key = at.meter if case.path == EVENTS else at.key
    before = at.counts()
    reply = send(at.client(key), case)
    check_problem(reply, case)
    if case.status == 405:
        assert {"GET", "POST"} & set(reply.headers["allow"].split(", "))
    assert key[20:].encode() not in reply.body
    assert key[20:] not in str(reply.headers)
    assert at.counts() == before


@pytest.mark.parametrize("path", ["/queue", CHAT_PATH, V1, EVENTS])
def test_a_body_that_is_cut_off_leaves_nothing(at: Process, path: str) -> None:
    before, refused = at.counts(), refusals(at)
    with closing(socket.create_connection(("127.0.0.1", at.port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {at.meter}\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + b'{"model": "llama-8b", ')
    eventually(lambda: refusals(at) > refused)  # and no failure of ours: see check_log
    assert at.counts() == before


def refusals(at: Process) -> float:
    families = text_string_to_metric_families(at.client().get("/metrics").body.decode())
    samples = (sample for family in families for sample in family.samples if sample.name.endswith("_seconds_count"))
    return sum(sample.value for sample in samples if sample.labels["status"] == "4xx")
