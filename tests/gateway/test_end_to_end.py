"""From a client's request to a proven bill, with real servers: Triton and llama.cpp behind the gateway.

What is billed is what the server itself says it worked, within TOLERANCE; the same nanoseconds stand in the answer, in
SQL and in the published batch, and the evidence verifies.
"""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from render_platform.config import load_settings
from render_platform.pipeline import open_platform
from tests.gateway.http import JSON, Client, Running, eventually, running
from tests.gateway.servers import LlamaServer, TritonServer, llama_server, triton_server

__all__ = ["llama_server", "triton_server"]

TOLERANCE = 0.05
INFER = "/other/sums/adder/infer"
MESSAGES: Any = [{"role": "user", "content": "w1 w2 w3 w4"}]


@pytest.fixture(scope="module")
def at(
    triton_server: TritonServer, llama_server: LlamaServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    triton = {"kind": "triton", "url": triton_server.url, "spans_port": triton_server.spans_port, "capacity": 4}
    llama = {"kind": "openai", "url": llama_server.url, "capacity": llama_server.slots}
    plain = {"family": "sums", "modality": "other", "type": "other", "tasks": ["infer"], "inputs": triton_server.inputs}
    chat = {"family": "tiny", "modality": "text", "type": "llm", "tasks": ["chat", "completion", "embedding"]}
    catalogue = {
        "backends": {
            "triton": {**triton, "parallel": 1, "device": "GPU-triton"},
            "llama": {**llama, "device": "GPU-llama"},
        },
        "models": {
            "adder": {**plain, "backends": {"triton": triton_server.model}},
            "tiny": {**chat, "aliases": ["ggml-org/tiny"], "backends": {"llama": llama_server.model}},
        },
    }
    with running(tmp_path_factory.mktemp("end") / "state", catalogue=catalogue, report_every_s=3_600) as made:
        yield made


@pytest.fixture
def client(at: Running) -> Client:
    return at.client()


@pytest.fixture(scope="module")
def chat(at: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def billed(at: Running, job_id: str) -> dict[str, Any]:
    names = ("gpu_time_ns", "meter", "device_uuid", "status", "input_tokens", "output_tokens", "error_code")
    [row] = at.sql(f"SELECT {', '.join(names)} FROM usage_events WHERE job_id = ?", uuid.UUID(job_id).bytes)
    return dict(zip(names, row, strict=True))


def close_to(ns: float) -> Any:
    return pytest.approx(ns, rel=TOLERANCE)


def triton_worked_ns(server: TritonServer) -> int:
    """What Triton's own statistics add up to: the work of all its requests so far."""
    with urllib.request.urlopen(f"{server.url}/v2/models/{server.model}/stats", timeout=10) as answer:
        stats = json.load(answer)["model_stats"][0]["inference_stats"]
    return sum(int(stats[part]["ns"]) for part in ("compute_input", "compute_infer", "compute_output"))


def said_ns(timings: Any) -> float:
    """llama.cpp's own figure."""
    return float((timings["prompt_ms"] + timings["predicted_ms"]) * 1e6)


def test_triton_is_billed_as_triton_says(at: Running, client: Client, triton_server: TritonServer) -> None:
    before = triton_worked_ns(triton_server)
    reply = client.post(INFER, {"prompt": "hello", "values": [1, 2, 39], "sleep_ms": 120})
    assert reply.status == 200, reply.body
    answers = {output["name"]: output["data"] for output in reply.json["outputs"]}
    assert answers == {"total": [42], "echo": ["hello"]}
    event = billed(at, reply.headers["x-job-id"])
    assert event["gpu_time_ns"] == close_to(triton_worked_ns(triton_server) - before)
    assert reply.headers["x-gpu-seconds"] == f"0.{event['gpu_time_ns']:09d}"
    assert (event["meter"], event["device_uuid"], event["status"]) == ("backend", "GPU-triton", "success")


def test_queued_jobs_of_triton_are_billed_each_for_its_own(
    at: Running, client: Client, triton_server: TritonServer
) -> None:
    before = triton_worked_ns(triton_server)
    asked = {"prompt": "x", "values": [1], "sleep_ms": 60}
    jobs = [client.queue(model="adder", input=asked)["id"] for _ in range(6)]
    ended = [client.ended(job_id) for job_id in jobs]
    assert {job["state"] for job in ended} == {"success"}
    spent = [billed(at, job_id)["gpu_time_ns"] for job_id in jobs]
    assert sum(spent) == close_to(triton_worked_ns(triton_server) - before)
    assert min(spent) > 55e6, "each works for itself, and none at another's expense"


def test_what_triton_cannot_take_is_told_before_it_is_accepted(at: Running, client: Client) -> None:
    before = at.counts()
    for wrong, place in (({"values": "many"}, "values"), ({"colour": 1}, "colour")):
        reply = client.post(INFER, {"prompt": "x", "values": [1], "sleep_ms": 1, **wrong})
        assert (reply.status, reply.json["field"]) == (422, place)
    assert at.counts() == before


def test_a_triton_job_that_fails_is_a_failure_with_its_time(at: Running, client: Client) -> None:
    reply = client.post(INFER, {"prompt": "x", "values": [1], "sleep_ms": -50})
    assert (reply.status, reply.json["code"]) == (502, "backend_error")
    event = billed(at, reply.headers["x-job-id"])
    assert (event["status"], event["error_code"]) == ("error", "backend_error")
    assert event["gpu_time_ns"] == pytest.approx(50e6, rel=0.25)


def test_a_chat_is_billed_as_llama_says(at: Running, chat: openai.OpenAI) -> None:
    reply = chat.chat.completions.with_raw_response.create(model="ggml-org/tiny", messages=MESSAGES, max_tokens=64)
    answer = reply.parse()
    timings = json.loads(reply.content)["timings"]
    event = billed(at, reply.headers["x-job-id"])
    assert event["gpu_time_ns"] == close_to(said_ns(timings))
    used = answer.usage
    assert used is not None
    assert (event["input_tokens"], event["output_tokens"]) == (used.prompt_tokens, used.completion_tokens)
    assert (event["meter"], event["device_uuid"]) == ("backend", "GPU-llama")


def test_a_streamed_chat_is_billed_as_llama_says(at: Running, chat: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 64, "stream": True}
    asked["extra_body"] = {"ignore_eos": True}
    with chat.chat.completions.with_streaming_response.create(**asked, stream_options={"include_usage": True}) as reply:
        job_id = reply.headers["x-job-id"]
        lines = [line for line in reply.iter_lines() if line.startswith("data: {")]
        chunks = [json.loads(line[6:]) for line in lines]
    event = billed(at, job_id)
    assert event["gpu_time_ns"] == close_to(said_ns(chunks[-1]["timings"]))
    assert event["output_tokens"] == chunks[-1]["usage"]["completion_tokens"] == 64
    pieces = [choice.delta.content or "" for chunk in chat.chat.completions.create(**asked) for choice in chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    completion = chat.completions.create(model="tiny", prompt="w1 w2", max_tokens=8)
    assert completion.choices[0].text


def test_a_client_that_leaves_stops_llama_and_pays_for_what_was_used(
    at: Running, client: Client, llama_server: LlamaServer
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16_000, "stream": True, "ignore_eos": True}
    connection, response = client.open("POST", "/v1/chat/completions", json.dumps(body).encode(), JSON)
    job_id = response.headers["x-job-id"]
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    ended = client.ended(job_id)
    assert (ended["state"], ended["error_code"]) == ("cancelled", "client_gone")
    eventually(lambda: not llama_server.busy_slots())
    assert 0 < billed(at, job_id)["gpu_time_ns"] < 20e9


def test_every_bill_is_published_and_the_evidence_verifies(at: Running, client: Client) -> None:
    """The last of this module: it publishes what the others have spent."""
    client.post(INFER, {"prompt": "last", "values": [1], "sleep_ms": 1})
    spent = dict(at.sql("SELECT event_id, gpu_time_ns FROM usage_events"))
    assert at.counts()["jobs"] == len(spent)
    with open_platform(load_settings({}, state_dir=at.state)) as platform:
        state = platform.flush()
        assert state.checkpoint is not None
        rows = platform.query("SELECT event_id, gpu_time_ns, meter, source FROM usage_events").to_pylist()
        verification = platform.verify(deep=True)
    assert {uuid_of(row["event_id"]): row["gpu_time_ns"] for row in rows} == {
        uuid_of(event_id): ns for event_id, ns in spent.items()
    }
    assert {row["source"] for row in rows} == {f"gateway/{at.gateway.gateway_id}"}
    assert verification.verified, verification.problems
    assert verification.deep_records == verification.records == len(spent)
    assert verification.gpu_time_ns == sum(spent.values())


def uuid_of(value: Any) -> uuid.UUID:
    return uuid.UUID(bytes=bytes(value)) if isinstance(value, bytes) else uuid.UUID(str(value))
