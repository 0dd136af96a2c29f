"""The simulated backend: declared costs really slept, and answers that are what they claim to be."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
import zlib
from typing import Any

import pytest

from render_platform.gateway.backends import Answer, BackendFailure
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.simulated_backend import DEFAULT_TOKENS, MAX_IMAGES, SimulatedBackend
from render_platform.simulated import FIXED_US, IMAGE_STEP_US, INPUT_TOKEN_US, OUTPUT_TOKEN_US
from tests.gateway.attempts import Client, busy_ns, make_attempt, make_model
from tests.gateway.servers import on_loop

PAINTER = make_model(name="flux", modality="image", type="rectified_flow")
CHAT = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8}


def ask(task: str, body: dict[str, Any], speed: float = 100.0, **more: Any) -> Answer:
    backend = SimulatedBackend(BackendSpec(kind="simulated", name="sim", speed=speed))
    return asyncio.run(backend.run(make_attempt("m", task, body, **more)))


@pytest.mark.parametrize(
    ("task", "body", "cost_us"),
    [
        ("chat", CHAT, FIXED_US + 3 * INPUT_TOKEN_US + 8 * OUTPUT_TOKEN_US),
        ("completion", {"prompt": "a b"}, FIXED_US + 2 * INPUT_TOKEN_US + DEFAULT_TOKENS * OUTPUT_TOKEN_US),
        ("embedding", {"input": ["a b", "c"]}, FIXED_US + 3 * INPUT_TOKEN_US),
        ("text2image", {"num_inference_steps": 4, "n": 2}, FIXED_US + 8 * IMAGE_STEP_US),
    ],
)
def test_it_takes_the_declared_cost_by_its_speed(task: str, body: dict[str, Any], cost_us: int) -> None:
    model = PAINTER if task == "text2image" else make_model()
    for speed in (5.0, 20.0):
        begun_ns = time.time_ns()
        answer = ask(task, body, speed, model=model)
        wall_ns = time.time_ns() - begun_ns
        assert cost_us * 1_000 / speed <= busy_ns(answer.spans) <= wall_ns
        assert busy_ns(answer.spans) < cost_us * 1_000 / speed + 50_000_000


def test_a_chat_is_shaped_as_openai_shapes_it_and_always_the_same() -> None:
    first, second = ask("chat", CHAT), ask("chat", CHAT)
    said = json.loads(first.body)
    (choice,) = said["choices"]
    assert said["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 8
    assert choice["finish_reason"] == "length"
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert (first.usage.input_tokens, first.usage.output_tokens) == (3, 8)
    assert json.loads(second.body)["choices"] == said["choices"]
    assert json.loads(ask("chat", {**CHAT, "seed": 2}).body)["choices"] != said["choices"]
    other = json.loads(ask("completion", {"prompt": "a"}).body)
    assert (other["object"], other["choices"][0]["finish_reason"]) == ("text_completion", "stop")


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_says_what_the_whole_answer_says(asked: bool) -> None:
    client = Client()
    options = {"stream": True, "stream_options": {"include_usage": asked}}
    answer = ask("chat", {**CHAT, **options}, client=client)
    whole = ask("chat", {**CHAT, **options})
    assert client.texts() == json.loads(whole.body)["choices"][0]["message"]["content"]
    assert client.chunks[-1] == b"data: [DONE]\n\n"
    chunks = [json.loads(chunk[6:]) for chunk in client.chunks[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[8]["choices"][0]["finish_reason"] == "length"
    assert [chunk["usage"] for chunk in chunks[9:]] == [json.loads(whole.body)["usage"]] * asked
    assert answer.usage.output_tokens == 8


def test_embeddings_have_length_one_and_equal_texts_have_equal_ones() -> None:
    said = json.loads(ask("embedding", {"input": ["a b", "c", "a b"]}).body)
    first, second, third = (one["embedding"] for one in said["data"])
    assert first == third != second
    assert sum(number * number for number in first) == pytest.approx(1, abs=1e-4)
    assert said["usage"]["prompt_tokens"] == 5
    alone = json.loads(ask("embedding", {"input": "c"}).body)
    assert alone["data"][0]["embedding"] == second


def png_pixels(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and raw rows of a PNG whose checksums hold."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    return width, height, zlib.decompress(chunks[b"IDAT"])


def test_pictures_are_pictures() -> None:
    said = json.loads(ask("text2image", {"prompt": "a", "n": 2, "steps": 1}, model=PAINTER).body)
    first, second = (png_pixels(base64.b64decode(one["b64_json"])) for one in said["images"])
    assert first[:2] == (8, 8)
    assert len(first[2]) == 8 * (1 + 8 * 3)
    assert first != second
    raw = ask("text2image", {"steps": 1}, model=PAINTER, format="png")
    assert raw.content_type == "image/png"
    png_pixels(raw.body)
    jpeg = ask("text2image", {"steps": 1}, model=PAINTER, format="jpeg")
    assert jpeg.content_type == "image/jpeg"
    assert (jpeg.body[:2], jpeg.body[-2:]) == (b"\xff\xd8", b"\xff\xd9")


def test_what_a_picture_asked_for_is_its_usage() -> None:
    body = {"num_inference_steps": 3, "num_images": 2, "width": 512, "height": 768}
    usage = ask("text2image", body, 1_000.0, model=PAINTER).usage
    assert (usage.num_steps, usage.image_count, usage.input_dims) == (3, 2, "512x768")
    usage = ask("text2image", {"size": "1024x1024"}, 1_000.0, model=PAINTER).usage
    assert (usage.num_steps, usage.image_count, usage.input_dims) == (30, 1, "1024x1024")


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("chat", {}),
        ("chat", {"messages": "hello"}),
        ("chat", {**CHAT, "max_tokens": 0}),
        ("completion", {"prompt": 1}),
        ("text2image", {"n": MAX_IMAGES + 1}),
        ("text2image", {"n": 0}),
    ],
)
def test_what_it_cannot_read_is_refused(task: str, body: dict[str, Any]) -> None:
    with pytest.raises(BackendFailure) as failure:
        ask(task, body, model=PAINTER)
    assert failure.value.refused is not None
    assert failure.value.refused[0] == 400
    assert json.loads(failure.value.refused[1])["error"]["message"]


def test_progress_is_told_a_bounded_number_of_times() -> None:
    told: list[tuple[int, int]] = []
    ask("chat", {**CHAT, "max_tokens": 100}, 1_000.0, progress=lambda done, of: told.append((done, of)))
    assert told == [(5 * number, 100) for number in range(1, 21)]
    told.clear()
    ask("text2image", {"steps": 2}, 1_000.0, model=PAINTER, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


@on_loop
async def test_it_says_how_many_ran_with_it_and_what_was_used_when_it_ran_out_of_time() -> None:
    backend = SimulatedBackend(BackendSpec(kind="simulated", name="sim", speed=10.0))
    answers = await asyncio.gather(*(backend.run(make_attempt("m", "chat", CHAT)) for _ in range(3)))
    assert sorted(answer.usage.batch_size for answer in answers) == [1, 2, 3]
    with pytest.raises(BackendFailure) as failure:
        await backend.run(make_attempt("m", "chat", {**CHAT, "max_tokens": 9_000}, timeout_s=0.05))
    assert 50_000_000 <= busy_ns(failure.value.spans) < 100_000_000
    assert (await backend.run(make_attempt("m", "chat", CHAT))).usage.batch_size == 1, "its slot is free again"
