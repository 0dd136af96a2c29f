"""The OpenAI client works unchanged: whole and streamed, and what goes wrong is one of its own exceptions."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from render_platform.gateway.identity import Terms
from render_platform.gateway.simulated_answers import words
from tests.gateway.http import CHAT, HUGGING_FACE, Running, running

MESSAGES: Any = CHAT["messages"]
MODEL = "llama-8b"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("openai") / "state") as made:
        yield made


def make_client(at: Running, key: str = "not-needed-here") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{at.url}/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def client(at: Running) -> Iterator[openai.OpenAI]:
    with make_client(at) as made:
        yield made


def last_event(at: Running) -> dict[str, Any]:
    names = ("status", "error_code", "task", "input_tokens", "output_tokens", "gpu_time_ns", "job_id")
    [row] = at.sql(f"SELECT {', '.join(names)} FROM usage_events ORDER BY recorded_at DESC LIMIT 1")
    return dict(zip(names, row, strict=True))


def test_a_chat(at: Running, client: openai.OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=7)
    answer = reply.parse()
    assert len((answer.choices[0].message.content or "").split()) == 7
    assert answer.usage is not None
    event = last_event(at)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 7)
    assert (event["task"], event["input_tokens"], event["output_tokens"]) == ("chat", 2, 7)
    assert reply.headers["x-gpu-seconds"] == f"{event['gpu_time_ns'] // 10**9}.{event['gpu_time_ns'] % 10**9:09d}"
    assert answer._request_id == reply.headers["x-request-id"]
    assert client.chat.completions.create(model=HUGGING_FACE, messages=MESSAGES).model == MODEL


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_streamed_chat_is_the_chat_piece_by_piece(at: Running, client: openai.OpenAI, with_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    pieces, usages = [], []
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, max_tokens=9, **options):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usages += [chunk.usage] if chunk.usage else []
    assert [piece for piece in pieces if piece] == words(hashlib.sha256(at.stage.attempts[-1].body).digest(), 9)
    event = last_event(at)
    assert (event["status"], event["input_tokens"], event["output_tokens"]) == ("success", 2, 9)
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(2, 9)] * with_usage


def test_a_stream_says_before_its_end_what_was_used(at: Running) -> None:
    body = json.dumps({"model": MODEL, "stream": True, **CHAT}).encode()
    reply = at.client().post("/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *_, comment, done, nothing = reply.body.decode().split("\n\n")
    event = last_event(at)
    used = f"{event['gpu_time_ns'] // 10**9}.{event['gpu_time_ns'] % 10**9:09d}"
    assert comment == f": x-gpu-seconds={used} x-gpu-device=GPU-sim-00"
    assert (done, nothing) == ("data: [DONE]", "")
    assert uuid.UUID(reply.headers["x-job-id"]).bytes == event["job_id"]


@pytest.mark.parametrize("stream", [None, False])
def test_stream_may_be_null_as_the_api_says(at: Running, stream: bool | None) -> None:
    reply = at.client().post("/v1/chat/completions", {"model": MODEL, "stream": stream, **CHAT})
    assert reply.json["choices"][0]["message"]["content"]


def test_completions(at: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="once upon a time", max_tokens=3)
    assert len(answer.choices[0].text.split()) == 3
    assert (last_event(at)["task"], last_event(at)["input_tokens"]) == ("completion", 4)


def test_embeddings(at: Running, client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["one", "two three", "one"])
    vectors = [item.embedding for item in answer.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert math.hypot(*vectors[0]) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens == last_event(at)["input_tokens"] == 4
    assert last_event(at)["output_tokens"] is None


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["llama-8b", "solo"]


# What goes wrong.


def test_an_unknown_model_is_not_found(at: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (caught.value.code, caught.value.param, caught.value.type) == ("not_found", "model", "not_found_error")
    assert caught.value.request_id is not None


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "flux-dev"}, "task"),  # a model that does not chat
        ({"messages": "hello"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 0}, None),  # said by the backend
        ({"messages": []}, None),
    ],
)
def test_what_is_wrong_with_a_request_is_a_bad_request(client: openai.OpenAI, changes: Any, param: str | None) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, **changes}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_streamed_embeddings_are_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        client.embeddings.create(model=MODEL, input="x", extra_body={"stream": True})


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_of_the_backend_comes_through_as_it_is(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match="no such voice") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream, extra_body={"do": "refuse"})
    assert caught.value.response.headers["x-gpu-seconds"] == "0.000000000"


@pytest.mark.parametrize("stream", [True, False])
def test_a_broken_backend_is_a_server_error(at: Running, client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream, extra_body={"do": "fail"})
    assert (caught.value.status_code, caught.value.code) == (502, "backend_error")
    assert last_event(at)["status"] == "error"


def test_a_stream_that_breaks_off_is_an_error_after_its_pieces(at: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, extra_body={"do": "crack"})
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["and ", "and "]
    with pytest.raises(openai.APIError, match="it broke off") as caught:
        next(stream)
    assert caught.value.code == "backend_disconnected"
    event = last_event(at)
    assert (event["status"], event["error_code"]) == ("error", "backend_disconnected")
    assert event["gpu_time_ns"] > 0


def test_a_stream_with_an_idempotency_key_is_not_run_twice(at: Running, client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "stream": True, "extra_headers": {"Idempotency-Key": "once"}}
    assert list(client.chat.completions.create(**asked))
    before = at.counts()["jobs"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.status_code, caught.value.code) == (410, "output_gone")
    assert at.counts()["jobs"] == before


def test_keys_and_limits(tmp_path: Any) -> None:
    with running(tmp_path / "state") as at:
        key = at.call(lambda: at.gateway.keys.create("acme", ["customer"], Terms(rate_per_s=1, burst=2)))
    with running(tmp_path / "state") as at:
        for wrong in (key[:-1] + ("a" if key[-1] != "a" else "b"), "sk-foreign", "eyJhbGciOiJub25lIn0.e30."):
            with make_client(at, wrong) as client, pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert (refused.value.code, refused.value.type) == ("unauthorized", "authentication_error")
            assert wrong not in refused.value.message
        with make_client(at, key) as client:
            for _ in range(2):
                assert client.completions.create(model=MODEL, prompt="x").choices
            with pytest.raises(openai.RateLimitError) as limited:
                client.completions.create(model=MODEL, prompt="x")
        headers = limited.value.response.headers
        assert (limited.value.code, headers["retry-after"]) == ("rate_limited", "1")
        assert headers["ratelimit-policy"] == '"default";q=2;w=2'
        assert headers["ratelimit"] == '"default";r=0;t=2'
        assert limited.value.type == "rate_limit_error"
