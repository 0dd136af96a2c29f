"""Every route does what it is for, over real HTTP; what is billed is what SQL says."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from render_platform.errors import Finding
from render_platform.gateway.identity import Terms
from render_platform.gateway.jobs import Acceptance
from render_platform.note import load_or_create_key
from tests.gateway.http import CHAT, CHAT_PATH, HUGGING_FACE, IMAGE_PATH, Client, Running, eventually, occupied, running

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("routes") / "state") as made:
        yield made


@pytest.fixture
def client(at: Running) -> Client:
    return at.client()


def event_of(at: Running, job_id: str) -> dict[str, Any]:
    names = ("request_id", "gpu_time_ns", "device_uuid", "status", "error_code", "meter", "model_name")
    [row] = at.sql(f"SELECT {', '.join(names)} FROM usage_events WHERE job_id = ?", uuid.UUID(job_id).bytes)
    return dict(zip(names, row, strict=True))


def seconds(ns: int) -> str:
    return f"{ns // 10**9}.{ns % 10**9:09d}"


# Running a job.


def test_an_answer_says_what_it_used_and_the_event_says_the_same(at: Running, client: Client) -> None:
    wanted = str(uuid.uuid4())
    reply = client.post(CHAT_PATH, CHAT, x_request_id=wanted)
    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"]
    assert reply.headers["x-request-id"] == wanted
    event = event_of(at, reply.headers["x-job-id"])
    assert event["gpu_time_ns"] > 0
    assert reply.headers["x-gpu-seconds"] == seconds(event["gpu_time_ns"])
    assert reply.headers["x-gpu-device"] == event["device_uuid"] == "GPU-sim-00"
    assert uuid.UUID(bytes=event["request_id"]) == uuid.UUID(wanted)
    assert (event["status"], event["meter"]) == ("success", "simulated")


def test_a_request_without_a_good_id_gets_one(client: Client) -> None:
    one, other = (client.post(CHAT_PATH, CHAT, x_request_id="mine").headers["x-request-id"] for _ in range(2))
    assert uuid.UUID(one) != uuid.UUID(other)


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_the_format_decides_what_comes_back(client: Client, form: str, magic: bytes) -> None:
    reply = client.post(f"{IMAGE_PATH}?format={form}", {"prompt": "a lighthouse", "num_inference_steps": 2})
    assert (reply.status, reply.headers["content-type"]) == (200, f"image/{form}")
    assert reply.body.startswith(magic)


def test_a_backend_that_is_asked_for_is_the_one_that_works(at: Running, client: Client) -> None:
    for backend, device in (("narrow", "GPU-sim-01"), ("wide", "GPU-sim-00")):
        reply = client.post(f"{IMAGE_PATH}?backend={backend}", {"prompt": "a lighthouse"})
        assert reply.headers["x-gpu-device"] == device


@pytest.mark.parametrize("name", [HUGGING_FACE, HUGGING_FACE.replace("/", "%2F"), "llama-8b"])
def test_a_model_is_found_by_each_of_its_names_in_the_path(client: Client, name: str) -> None:
    reply = client.post(f"/text/llama/{name}/chat", CHAT)
    assert (reply.status, reply.json["model"]) == (200, "llama-8b")


def test_a_model_is_found_by_its_hugging_face_id_everywhere_else(client: Client) -> None:
    assert client.queue(model=HUGGING_FACE)["model"] == "llama-8b"
    assert client.post("/v1/chat/completions", {"model": HUGGING_FACE, **CHAT}).json["model"] == "llama-8b"


def test_respond_async_gives_a_job_at_once(client: Client) -> None:
    reply = client.post(CHAT_PATH, CHAT, **ASYNC)
    assert reply.status == 202
    assert reply.headers["preference-applied"] == "respond-async"
    assert reply.headers["location"] == f"/jobs/{reply.json['id']}"
    assert client.ended(reply.json["id"])["state"] == "success"


def test_wait_gives_the_output_where_it_comes_in_time(at: Running, client: Client) -> None:
    assert client.post(CHAT_PATH, CHAT, prefer="wait=10, respond-async").json["choices"]
    with occupied(at):
        reply = client.post("/text/llama/solo/chat", CHAT, prefer="wait=1")
        assert (reply.status, reply.json["state"], reply.json["position"]) == (202, "queued", 0)


def test_what_a_backend_refuses_is_told_and_costs_nothing(at: Running, client: Client) -> None:
    reply = client.post(CHAT_PATH, {**CHAT, "do": "refuse"})
    assert (reply.status, reply.json["code"], reply.headers["x-gpu-seconds"]) == (404, "backend_refused", "0.000000000")
    assert "no such voice" in reply.json["detail"]
    assert event_of(at, reply.headers["x-job-id"])["status"] == "error"


def test_a_backend_that_breaks_is_a_502_with_the_job_to_look_at(at: Running, client: Client) -> None:
    reply = client.post(CHAT_PATH, {**CHAT, "do": "fail"})
    assert (reply.status, reply.json["code"]) == (502, "backend_error")
    assert reply.headers["x-job-id"] in reply.json["detail"]
    assert event_of(at, reply.headers["x-job-id"])["error_code"] == "backend_error"


# Parameters.


def test_a_higher_lane_is_served_first(tmp_path: Any) -> None:
    with running(tmp_path / "state") as at:
        high = Terms(priority_max="high")
        client = at.client(at.call(lambda: at.gateway.keys.create("acme", ["customer"], high)))
        with occupied(at):
            later = client.queue(model="solo", priority="low")
            sooner = client.queue(model="solo", priority="high")
            assert client.get(f"/jobs/{later['id']}").json["priority"] == "low"
        for job in (later, sooner):
            client.ended(job["id"])
        ran = [attempt.attempt_id.split("-")[0] for attempt in at.stage.attempts[1:]]
    assert ran == [uuid.UUID(sooner["id"]).hex, uuid.UUID(later["id"]).hex]


def test_a_job_that_finds_no_slot_in_its_time_is_given_up(at: Running, client: Client) -> None:
    with occupied(at):
        job = client.queue(model="solo", ttl=1)
        [*_, last] = client.events(job["id"])
    assert (last.name, last.data["status"], last.data["code"]) == ("error", "timeout", "expired")
    assert event_of(at, job["id"])["gpu_time_ns"] == 0


class Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted to it in its server's `got`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.put((self.path, dict(self.headers.items()), body))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("wish", [None, "fail"])
def test_a_webhook_tells_of_the_end_of_a_job_and_is_signed(tmp_path: Any, wish: str | None) -> None:
    server: Any = HTTPServer(("127.0.0.1", 0), Receiver)
    server.got = queue.Queue()
    threading.Thread(target=server.serve_forever).start()
    host = f"127.0.0.1:{server.server_port}"
    try:
        with running(tmp_path / "state", webhook_allow=host) as at:
            job = at.client().queue(webhook=f"http://{host}/done?x=1", input={**CHAT, "do": wish})
            path, headers, body = server.got.get(timeout=20)
            [(secret,)] = at.sql("SELECT webhook_secret FROM customer_settings")
            eventually(lambda: at.sql("SELECT status FROM webhooks WHERE next_us IS NULL") == [(204,)])
    finally:
        server.shutdown()
        server.server_close()
    headers = {name.lower(): value for name, value in headers.items()}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    assert (path, headers["webhook-id"]) == ("/done?x=1", f"msg_{job['id']}")
    message = json.loads(body)
    assert (message["type"], message["data"]["id"]) == ("job.finished", job["id"])
    assert message["data"]["state"] == ("error" if wish else "success")


def test_an_idempotency_key_gives_the_first_result_again(at: Running, client: Client) -> None:
    before = at.counts()["jobs"]
    first = client.post(CHAT_PATH, CHAT, idempotency_key="first")
    for again in (
        client.post(CHAT_PATH, CHAT, idempotency_key="first"),
        client.post(CHAT_PATH, CHAT, idempotency_key='"first"'),  # quoted, as the draft standard has it
        client.post(f"{CHAT_PATH}?idempotency_key=first", CHAT),
        client.post(f"{CHAT_PATH}?idempotency_key=first", CHAT, idempotency_key="first"),
    ):
        assert (again.status, again.body) == (200, first.body)
        for name in ("x-job-id", "x-gpu-seconds", "x-gpu-device"):
            assert again.headers[name] == first.headers[name]
    assert at.counts()["jobs"] == before + 1


def test_an_idempotency_key_gives_a_failure_again_too(at: Running, client: Client) -> None:
    for wish, status in (("fail", 502), ("refuse", 400)):
        [first, again] = [client.post(CHAT_PATH, {**CHAT, "do": wish}, idempotency_key=wish) for _ in range(2)]
        assert (again.status, again.json["code"]) == (status, first.json["code"])


def test_two_requests_with_one_key_at_once_are_one_job(at: Running, client: Client) -> None:
    before = at.counts()["jobs"]
    with ThreadPoolExecutor(2) as pool:
        body = {**CHAT, "do": "hold"}
        asked = [pool.submit(client.post, CHAT_PATH, body, idempotency_key="twice") for _ in range(2)]
        assert at.stage.working.wait(10)
        jobs = at.gateway.engine.jobs  # one, and the second request waits for it
        eventually(lambda: at.call(lambda: [len(job.watchers) for job in jobs.values()] == [1]))
        at.stage.release()
        one, other = (future.result() for future in asked)
    assert (one.status, one.body) == (other.status, other.body)
    assert at.counts()["jobs"] == before + 1


# Queued jobs.


def test_an_acceptance_is_signed_and_says_what_was_accepted(at: Running, client: Client) -> None:
    reply = client.post("/queue", {"model": "flux-dev", "input": {"prompt": "é"}, "format": "png", "ttl": 60})
    job = reply.json
    assert reply.status == 202
    assert reply.headers["location"] == f"/jobs/{job['id']}"
    assert reply.headers["link"] == f'</jobs/{job["id"]}>; rel="monitor"'
    acceptance = Acceptance.open(job["acceptance"], at.gateway.signer.verifier)
    asked = "render-platform/request/v1\nflux-dev\ntext2image\npng\n\nnormal\n60\n\n" + '{"prompt":"é"}'
    assert acceptance.request_digest == hashlib.sha256(asked.encode()).hexdigest()
    assert (acceptance.job_id, acceptance.gateway) == (job["id"], at.gateway.gateway_id)
    stranger = load_or_create_key(at.gateway.settings.keys_dir / "other.key", at.gateway.signer.name)
    with pytest.raises(Finding):
        Acceptance.open(job["acceptance"], stranger.verifier)
    client.ended(job["id"])


def test_acceptances_are_numbered_without_a_gap(at: Running, client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: client.queue(), range(60)))
    seqs = sorted(Acceptance.open(job["acceptance"], at.gateway.signer.verifier).seq for job in jobs)
    assert seqs == list(range(seqs[0], seqs[0] + 60))
    for job in jobs:
        client.ended(job["id"])
    numbered = [row[0] for row in at.sql("SELECT seq FROM jobs ORDER BY seq")]
    assert numbered == list(range(1, len(numbered) + 1))


def test_the_queue_says_who_waits_and_runs(at: Running, client: Client) -> None:
    with occupied(at):
        jobs = [client.queue(model="solo", priority=lane) for lane in ("normal", "low")]
        [solo] = [one for one in client.get("/queue").json if one["model"] == "solo"]
        assert solo == {"model": "solo", "waiting": {"high": 0, "normal": 1, "low": 1}, "running": 1, "capacity": 1}
    for job in jobs:
        client.ended(job["id"])


def test_a_job_from_its_acceptance_to_its_output(at: Running, client: Client) -> None:
    with occupied(at) as first:
        job = client.queue(model="solo")
        for job_id, state, position in ((job["id"], "queued", 0), (first, "running", None)):
            reply = client.get(f"/jobs/{job_id}")
            assert (reply.status, reply.json["state"], reply.json.get("position")) == (200, state, position)
        waiting = client.get(f"/jobs/{job['id']}/output")
        assert (waiting.status, waiting.headers["location"]) == (202, f"/jobs/{job['id']}")
    ended = client.ended(job["id"])
    done = client.get(f"/jobs/{job['id']}")
    assert (done.status, done.headers["location"]) == (303, f"/jobs/{job['id']}/output")
    output = client.get(done.headers["location"])
    assert (output.status, output.headers["content-type"]) == (200, "application/json")
    assert output.json["usage"]["completion_tokens"] == ended["usage"]["output_tokens"]
    assert output.headers["x-gpu-seconds"] == ended["usage"]["gpu_seconds"]
    event = event_of(at, job["id"])
    assert ended["usage"]["gpu_time_ns"] == event["gpu_time_ns"]
    assert ended["usage"]["gpu_seconds"] == seconds(event["gpu_time_ns"])


def test_an_output_is_gone_when_its_time_is_over(tmp_path: Any) -> None:
    with running(tmp_path / "state", output_ttl_s=0) as at:
        client = at.client()
        job_id = client.queue()["id"]
        assert client.ended(job_id)["state"] == "success"
        gone = client.get(f"/jobs/{job_id}/output")
    assert (gone.status, gone.json["code"]) == (410, "output_gone")


def test_a_job_that_failed_has_no_output(client: Client) -> None:
    job = client.queue(input={**CHAT, "do": "fail"})
    ended = client.ended(job["id"])
    assert (ended["state"], ended["error_code"]) == ("error", "backend_error")
    assert client.get(f"/jobs/{job['id']}").status == 200
    gone = client.get(f"/jobs/{job['id']}/output")
    assert (gone.status, gone.json["code"]) == (410, "backend_error")


def test_jobs_are_listed_in_pages_newest_first(tmp_path: Any) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        assert client.get("/jobs").json == {"jobs": [], "next": None}
        for job_id in [client.queue()["id"] for _ in range(7)]:
            client.ended(job_id)
        found: list[str] = []
        before = ""
        for _ in range(4):
            page = client.get(f"/jobs?limit=2{before}").json
            found += [job["id"] for job in page["jobs"]]
            before = f"&before={page['next']}"
        assert page["next"] is None
        stored = [str(uuid.UUID(bytes=row[0])) for row in at.sql("SELECT job_id FROM jobs ORDER BY job_id DESC")]
    assert found == stored


# Cancelling.


@pytest.mark.parametrize("method", ["DELETE", "POST"])
def test_a_job_can_be_cancelled_in_every_state(at: Running, client: Client, method: str) -> None:
    def cancel(job_id: str) -> tuple[int, str, str | None]:
        reply = client.ask(method, f"/jobs/{job_id}" + ("/cancel" if method == "POST" else ""))
        return reply.status, reply.json["state"], reply.json.get("error_code")

    cancelled = (200, "cancelled", "cancelled_by_client")
    with occupied(at) as held:
        queued = client.queue(model="solo")["id"]
        assert cancel(queued) == cancelled
        assert cancel(queued) == cancelled
        assert event_of(at, queued)["gpu_time_ns"] == 0
        at.stage.left.clear()
        assert cancel(held) == cancelled
        assert at.stage.left.is_set(), "the backend was not told"
        assert event_of(at, held)["gpu_time_ns"] > 0
    done = client.queue()["id"]
    client.ended(done)
    assert cancel(done) == (200, "success", None)
    assert event_of(at, done)["status"] == "success"


def test_a_client_whose_job_is_cancelled_by_another_is_told(at: Running, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, CHAT_PATH, {**CHAT, "do": "hold"})
        assert at.stage.working.wait(10)
        [job, *_] = client.get("/jobs?limit=1").json["jobs"]
        assert client.ask("DELETE", f"/jobs/{job['id']}").json["state"] == "cancelled"
        reply = waiting.result()
    at.stage.release()
    assert (reply.status, reply.json["code"]) == (499, "cancelled_by_client")
    assert json.loads(reply.body)["request_id"] == reply.headers["x-request-id"]
