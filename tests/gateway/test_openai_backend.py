"""The backend for OpenAI-compatible servers, against a server that fails on demand, and against llama.cpp."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.backends import Answer, Attempt, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.openai_backend import OpenAiBackend, prepare
from tests.gateway.attempts import Client, make_attempt
from tests.gateway.fake_openai import DONE, LAST, TWO, FakeOpenAi, fake_openai
from tests.gateway.servers import LlamaServer, free_port, llama_server, on_loop

__all__ = ["llama_server"]

KEY = "sk-very-secret"


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[OpenAiBackend]:
    backend = OpenAiBackend(BackendSpec(kind="openai", name="llm", url=url, **settings))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def ask(fake: FakeOpenAi, model: str, task: str = "chat", **more: Any) -> Answer:
    async with opened(fake.url) as backend:
        return await backend.run(make_attempt(model, task, {"messages": []}, **more))


async def failed(fake: FakeOpenAi, model: str, **more: Any) -> BackendFailure:
    with pytest.raises(BackendFailure) as failure:
        await ask(fake, model, **more)
    return failure.value


# What the server is sent.


@on_loop
async def test_the_body_goes_on_value_by_value_with_the_servers_name_for_the_model() -> None:
    body = b'{"seed":  12345678901234567890123, "model":"ours","x":{"b":1.50,"a":[ ]},"messages":[]}'
    async with fake_openai() as fake, opened(fake.url) as backend:
        await backend.run(make_attempt("theirs", "chat", body, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
    sent = fake.bodies[0]
    assert b"12345678901234567890123" in sent
    assert b'{"b":1.50,"a":[ ]}' in sent
    assert fake.asked["model"] == "theirs"
    assert fake.headers[0]["traceparent"].startswith("00-aaaa")
    assert "cookie" not in fake.headers[0]


@pytest.mark.parametrize(
    ("task", "path"),
    [("chat", "/v1/chat/completions"), ("completion", "/v1/completions"), ("embedding", "/v1/embeddings")],
)
def test_each_task_has_its_path(task: str, path: str) -> None:
    @on_loop
    async def story() -> None:
        async with fake_openai() as fake:
            await ask(fake, "ok", task)
            assert fake.paths == [path]

    story()


def test_a_model_that_stands_twice_is_sent_once() -> None:
    body, _ = prepare(b'{"model":"cheap","model":"costly","stream":false}', "served", streamed=False)
    assert body == b'{"model":"served"}'


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text() | st.lists(st.booleans())))
def test_nothing_but_the_model_and_the_streaming_is_touched(fields: dict[str, Any]) -> None:
    body, relay = prepare(json.dumps(fields).encode(), "served", streamed=True)
    kept = {name: value for name, value in fields.items() if name not in ("model", "stream", "stream_options")}
    assert json.loads(body) == {**kept, "model": "served"}
    assert relay is None


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stream_asks_for_usage_and_a_job_that_nobody_listens_to_is_not_streamed(streamed: bool) -> None:
    asked = {"stream": True, "stream_options": {"include_usage": False, "other": 1}}
    body, relay = prepare(json.dumps(asked).encode(), "served", streamed)
    wanted = {"stream": True, "stream_options": {"include_usage": True, "other": 1}} if streamed else {}
    assert json.loads(body) == {**wanted, "model": "served"}
    assert (relay is not None) == streamed


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a":' + b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BackendFailure) as failure:
        prepare(body, "served", streamed=True)
    assert failure.value.refused is not None
    assert failure.value.refused[0] == 400


# What comes back.


@on_loop
async def test_a_whole_answer_comes_as_it_is_with_usage_and_the_servers_own_time() -> None:
    async with fake_openai() as fake:
        attempt = make_attempt("ok", "chat", {"messages": []})
        async with opened(fake.url) as backend:
            answer = await backend.run(attempt)
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "hello"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 2)
    assert answer.spans is not None
    ((start, end),) = answer.spans
    assert end - start == 32_501
    assert backend.meter == "backend"


@pytest.mark.parametrize("model", ["no-figures", "odd-figures", "nan-figures"])
def test_figures_that_are_missing_or_nonsense_are_unknown_and_never_zero(model: str) -> None:
    @on_loop
    async def story() -> None:
        async with fake_openai() as fake:
            answer = await ask(fake, model)
            assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.spans) == (None, None, None)

    story()


@on_loop
async def test_a_time_longer_than_the_attempt_is_cut_to_it() -> None:
    ticks = iter([1_000, 1_500])
    async with fake_openai() as fake:
        answer = await ask(fake, "ok", now_ns=lambda: next(ticks))
    assert answer.spans == [(1_000, 1_500)]


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_is_passed_on_byte_for_byte_and_the_usage_chunk_only_if_asked_for(asked: bool) -> None:
    @on_loop
    async def story() -> None:
        for model in ("ok", "bytes"):
            client = Client()
            body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": asked}}
            async with fake_openai() as fake, opened(fake.url) as backend:
                answer = await backend.run(make_attempt(model, "chat", body, client=client))
            assert client.got == b"".join([*TWO, *([LAST] if asked else []), DONE])
            assert client.chunks[-1] == DONE
            assert (answer.body, answer.usage.output_tokens) == (b"", 2)
            assert answer.spans is not None

    story()


@on_loop
async def test_a_stream_in_one_piece_with_comments_and_in_other_line_ends_is_taken_too() -> None:
    client, second = Client(), Client()
    async with fake_openai() as fake, opened(fake.url) as backend:
        await backend.run(make_attempt("one-piece", "chat", {"stream": True}, client=client))
        answer = await backend.run(make_attempt("crlf", "chat", {"stream": True}, client=second))
    assert client.chunks == [b": ping\n\n" + b"".join(TWO), DONE]
    assert second.chunks == [b"".join(TWO).replace(b"\n", b"\r\n"), DONE]
    assert answer.usage.input_tokens == 3


# How it fails.

FAILURES: list[tuple[str, str, bool, list[Any] | None]] = [
    ("500", "backend_error", True, None),
    ("503", "backend_unavailable", True, []),
    ("429", "backend_unavailable", True, []),
    ("502", "backend_unavailable", True, None),
    ("504", "backend_unavailable", True, None),
    ("401", "backend_misconfigured", True, []),
    ("404", "backend_misconfigured", True, []),
    ("501", "backend_misconfigured", True, []),
    ("redirect", "backend_misconfigured", True, []),
    ("reset", "backend_disconnected", True, None),
    ("not-json", "backend_malformed", False, None),
    ("not-http", "backend_malformed", False, None),
    ("deep", "backend_malformed", False, None),
    ("compressed", "backend_malformed", False, None),
    ("huge", "backend_malformed", False, None),
    ("huge-announced", "backend_malformed", False, None),
]


@pytest.mark.parametrize(("model", "code", "retriable", "spans"), FAILURES)
def test_failures_are_told_apart(model: str, code: str, retriable: bool, spans: list[Any] | None) -> None:
    @on_loop
    async def story() -> None:
        async with fake_openai() as fake:
            failure = await failed(fake, model)
            assert (failure.code, failure.retriable, failure.spans) == (code, retriable, spans)
            assert failure.refused is None
            assert len(fake.bodies) == 1, "a backend retries nothing"

    story()


@on_loop
async def test_what_the_request_caused_goes_back_to_the_client() -> None:
    async with fake_openai() as fake:
        failure = await failed(fake, "400")
        assert failure.refused == (400, b'{"error": {"message": "status 400"}}')
        page = await failed(fake, "html-400")
    assert (failure.code, failure.retriable, failure.spans) == ("backend_refused", False, [])
    assert page.refused is not None
    assert b"html" not in page.refused[1]
    assert json.loads(page.refused[1])["error"]["type"] == "invalid_request_error"


STREAM_FAILURES = [
    ("cut-at-once", "backend_disconnected", True, b""),
    ("cut", "backend_disconnected", False, b"".join(TWO)),
    ("ended-early", "backend_disconnected", False, b"".join(TWO)),
    ("error-at-once", "backend_error", True, b""),
    ("error-later", "backend_error", False, b"".join(TWO)),
    ("not-events", "backend_malformed", False, b"".join(TWO)),
    ("long-event", "backend_malformed", False, b"".join(TWO)),
    ("no-figures", "backend_malformed", False, b""),
    ("500", "backend_error", True, b""),
]


@pytest.mark.parametrize(("model", "code", "retriable", "got"), STREAM_FAILURES)
def test_once_something_was_passed_on_nothing_is_retriable(model: str, code: str, retriable: bool, got: bytes) -> None:
    @on_loop
    async def story() -> None:
        client = Client()
        async with fake_openai() as fake, opened(fake.url) as backend:
            with pytest.raises(BackendFailure) as failure:
                await backend.run(make_attempt(model, "chat", {"stream": True}, client=client))
        assert (failure.value.code, failure.value.retriable, client.got) == (code, retriable, got)

    story()


@pytest.mark.parametrize("streamed", [True, False])
def test_cancelled_or_too_late_the_server_sees_its_client_leave(streamed: bool) -> None:
    @on_loop
    async def story() -> None:
        async with fake_openai() as fake, opened(fake.url) as backend:
            attempt = make_attempt("never", "chat", {"stream": streamed}, client=Client())
            run = asyncio.create_task(backend.run(attempt))
            await fake.working.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await fake.left.wait()

            fake.left.clear()
            with pytest.raises(BackendFailure) as failure:
                await backend.run(make_attempt("never", "chat", {}, timeout_s=0.05))
            assert (failure.value.code, failure.value.retriable) == ("backend_timeout", False)
            await fake.left.wait()

    story()


@on_loop
async def test_a_server_that_is_gone_is_unreachable_and_one_that_is_not_there_yet_is_unavailable() -> None:
    backend = OpenAiBackend(BackendSpec(kind="openai", name="llm", url=f"http://127.0.0.1:{free_port()}/v1"))
    with pytest.raises(Unavailable, match="start the server"):
        await backend.start()
    with pytest.raises(BackendFailure) as failure:
        await backend.run(make_attempt("ok", "chat", {}))
    assert (failure.value.code, failure.value.retriable, failure.value.spans) == ("backend_unreachable", True, [])
    await backend.close()


@on_loop
async def test_the_key_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("LLM_KEY", KEY)
    async with fake_openai() as fake, opened(fake.url, api_key_env="LLM_KEY") as backend:
        await backend.run(make_attempt("ok", "chat", {}))
        assert fake.headers[0]["authorization"] == f"Bearer {KEY}"
        shown = [repr(backend), repr(vars(backend))]
        for model in ("401", "400", "reset", "not-json", "not-http"):
            with pytest.raises(BackendFailure) as failure:
                await backend.run(make_attempt(model, "chat", {}))
            error: BaseException | None = failure.value
            while error is not None:
                shown.append(repr(error))
                error = None if error.__suppress_context__ else error.__cause__ or error.__context__
    assert KEY not in caplog.text + "".join(shown)


@pytest.mark.parametrize("key", ["", "  ", "a\nb", "clé"])
def test_a_key_that_is_none_is_refused_at_the_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_KEY", key)
    backend = OpenAiBackend(BackendSpec(kind="openai", name="llm", url="http://127.0.0.1:9/v1", api_key_env="LLM_KEY"))
    with pytest.raises(UsageError, match="LLM_KEY") as refused:
        asyncio.run(backend.start())
    assert "clé" not in str(refused.value)


# llama.cpp.


def question(words: int = 3, tokens: int = 24, **more: Any) -> dict[str, Any]:
    text = " ".join(f"w{number}" for number in range(words))
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True, **more}


def llama_attempt(server: LlamaServer, fields: dict[str, Any], client: Client | None = None, **more: Any) -> Attempt:
    return make_attempt(server.model, more.pop("task", "chat"), fields, client=client, **more)


def stated_ns(timings: dict[str, float]) -> float:
    return (timings["prompt_ms"] + timings["predicted_ms"]) * 1e6


@on_loop
async def test_llama_cpp_is_billed_what_its_timings_say(llama_server: LlamaServer) -> None:
    async with opened(llama_server.url) as backend:
        answer = await backend.run(llama_attempt(llama_server, question()))
        completion = await backend.run(llama_attempt(llama_server, {"prompt": "a", "max_tokens": 5}, task="completion"))
    said = json.loads(answer.body)
    assert answer.spans is not None
    assert answer.spans[0][1] - answer.spans[0][0] == pytest.approx(stated_ns(said["timings"]), rel=0.05)
    assert answer.usage.output_tokens == said["usage"]["completion_tokens"] == 24
    assert answer.usage.input_tokens == said["usage"]["prompt_tokens"]
    assert completion.usage.output_tokens == 5


@on_loop
async def test_llama_cpp_streams_and_is_billed_the_same_way(llama_server: LlamaServer) -> None:
    client, asking = Client(), Client()
    async with opened(llama_server.url) as backend:
        answer = await backend.run(llama_attempt(llama_server, question(tokens=2_000, stream=True), client))
        fields = question(stream=True, stream_options={"include_usage": True})
        second = await backend.run(llama_attempt(llama_server, fields, asking))
    assert client.chunks[-1] == asking.chunks[-1] == DONE
    assert b'"usage"' not in client.got
    assert len(client.chunks) > 3, "it comes as it is made"
    assert answer.usage.output_tokens == 2_000
    last = json.loads(asking.got.split(b"\n\n")[-3][6:])
    assert last["usage"]["completion_tokens"] == second.usage.output_tokens == 24
    assert second.spans is not None
    assert second.spans[0][1] - second.spans[0][0] == pytest.approx(stated_ns(last["timings"]), rel=0.05)


@pytest.mark.parametrize("streamed", [True, False])
def test_llama_cpp_stops_when_it_is_cancelled(llama_server: LlamaServer, streamed: bool) -> None:
    @on_loop
    async def story() -> None:
        async with opened(llama_server.url) as backend:
            fields = question(tokens=16_000, stream=streamed)
            run = asyncio.create_task(backend.run(llama_attempt(llama_server, fields, Client())))
            while not await asyncio.to_thread(llama_server.busy_slots):
                assert not run.done()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            # It looks for clients that have left once a second, and each question about its slots puts that off.
            for _ in range(3):
                await asyncio.sleep(1.2)
                if not await asyncio.to_thread(llama_server.busy_slots):
                    return
            raise AssertionError("it still works")

    story()


@on_loop
async def test_llama_cpp_refuses_what_is_no_request(llama_server: LlamaServer) -> None:
    async with opened(llama_server.url) as backend:
        with pytest.raises(BackendFailure) as failure:
            await backend.run(llama_attempt(llama_server, question(tokens="many")))  # type: ignore[arg-type]
        with pytest.raises(BackendFailure) as embedding:
            await backend.run(llama_attempt(llama_server, {"input": "a"}, task="embedding"))
    assert failure.value.refused is not None
    assert failure.value.refused[0] == 400
    assert embedding.value.code == "backend_misconfigured", "this model makes no embeddings"
