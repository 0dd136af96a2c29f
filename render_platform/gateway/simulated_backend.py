"""A backend without a GPU: it takes as long as the declared costs say, and says that it is simulated.

Costs are those of `render_platform.simulated`, divided by `speed`; jobs that run at once do not slow each other down,
as on a device with that many slots. Tokens of input are counted as words, and output is as long as `max_tokens` says,
or DEFAULT_TOKENS. What it answers is a pure function of the request, and valid: gibberish, vectors, tiny pictures.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import msgspec

from render_platform.clock import US_PER_SECOND
from render_platform.gateway import simulated_answers as answers
from render_platform.gateway.backends import Answer, Attempt, BackendFailure, Chunk, Usage
from render_platform.gateway.catalogue import OPENAI_TASKS, BackendSpec
from render_platform.gateway.sse import DONE, StreamOptions, event
from render_platform.gateway.usage import usage_of_request
from render_platform.simulated import (
    DEFAULT_IMAGES,
    DEFAULT_STEPS,
    FIXED_US,
    IMAGE_STEP_US,
    INPUT_TOKEN_US,
    OUTPUT_TOKEN_US,
)

DEFAULT_TOKENS = 16
MAX_TOKENS = 32_768
MAX_IMAGES = 64
PROGRESS_CALLS = 20
PICTURES = {"png": answers.png, "jpeg": answers.jpeg}

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Request(msgspec.Struct):
    """The parts of an OpenAI request that the simulation reads."""

    messages: list[_Message] = []
    prompt: str | list[str] = ""
    input: str | list[str] = ""
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def texts(self, task: str) -> list[str]:
        """What the model reads."""
        if task != "chat":
            given = self.input if task == "embedding" else self.prompt
            return [given] if isinstance(given, str) else given
        contents = [message.content or "" for message in self.messages]
        return [text if isinstance(text, str) else " ".join(part.text for part in text) for text in contents]


_request = msgspec.json.Decoder(_Request)


class SimulatedBackend:
    meter = "simulated"

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec
        self._running = 0

    async def start(self) -> None:
        """Nothing to open."""

    async def check(self) -> None:
        """Always well."""

    async def close(self) -> None:
        """Nothing to close."""

    async def run(self, attempt: Attempt) -> Answer:
        begun_ns = attempt.now_ns()
        self._running += 1
        batch_size = self._running
        try:
            async with asyncio.timeout(attempt.timeout_s):
                answer = await self._answer(attempt)
        except TimeoutError:
            message = f"{self.spec.name} did not answer within {attempt.timeout_s:.3f} s"
            spans = [(begun_ns, attempt.now_ns())]
            raise BackendFailure("backend_timeout", message, retriable=False, spans=spans) from None
        finally:
            self._running -= 1
        answer.usage.batch_size = batch_size
        answer.spans = [(begun_ns, attempt.now_ns())]
        return answer

    async def _answer(self, attempt: Attempt) -> Answer:
        if attempt.task not in OPENAI_TASKS:
            return await self._paint(attempt)
        try:
            asked = _request.decode(attempt.body)
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from error
        if attempt.task == "chat" and not asked.messages:
            raise _refused("messages are missing")
        if attempt.task == "embedding":
            return await self._embed(attempt, asked)
        chunk = attempt.chunk if asked.stream else None
        return await self._speak(attempt, asked, chunk)

    async def _embed(self, attempt: Attempt, asked: _Request) -> Answer:
        texts = asked.texts(attempt.task)
        read = _words_in(texts)
        await self._work(attempt, FIXED_US + read * INPUT_TOKEN_US)
        vectors = [answers.vector(text) for text in texts]
        data = [{"object": "embedding", "index": number, "embedding": one} for number, one in enumerate(vectors)]
        usage = {"prompt_tokens": read, "total_tokens": read}
        body = {"object": "list", "data": data, "model": attempt.model.name, "usage": usage}
        return Answer(msgspec.json.encode(body), usage=Usage(input_tokens=read))

    async def _speak(self, attempt: Attempt, asked: _Request, chunk: Chunk | None) -> Answer:
        read, given = _words_in(asked.texts(attempt.task)), asked.max_completion_tokens or asked.max_tokens
        tokens = answers.words(_digest(attempt), given or DEFAULT_TOKENS)
        finish = "length" if given else "stop"
        created = attempt.now_ns() // 1_000_000_000
        text = answers.Text(attempt.task, _digest(attempt), attempt.model.name, created, chunk is not None)
        lead_us = FIXED_US + read * INPUT_TOKEN_US
        async with aclosing(self._steps(attempt, lead_us, len(tokens), OUTPUT_TOKEN_US)) as steps:
            async for number in steps:
                if chunk is not None:
                    await chunk(event(text.piece(tokens[number])))
        usage = answers.usage(read, len(tokens))
        answer = Answer(b"", usage=Usage(input_tokens=read, output_tokens=len(tokens)))
        if chunk is None:
            answer.body = text.whole("".join(tokens), finish, usage)
            return answer
        await chunk(event(text.piece("", finish)))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            await chunk(event(text.usage(usage)))
        await chunk(DONE)
        return answer

    async def _paint(self, attempt: Attempt) -> Answer:
        usage = usage_of_request(attempt.model, attempt.body)
        steps = DEFAULT_STEPS if usage.num_steps is None else usage.num_steps
        images = DEFAULT_IMAGES if usage.image_count is None else usage.image_count
        if not 1 <= images <= MAX_IMAGES:
            raise _refused(f"the simulation makes 1 … {MAX_IMAGES} images a request")
        await self._work(attempt, FIXED_US, steps * images, IMAGE_STEP_US)
        usage.num_steps, usage.image_count = steps, images
        digest, form = _digest(attempt), attempt.format or ""
        if images == 1 and form in PICTURES:
            return Answer(PICTURES[form](digest), f"image/{form}", usage)
        make = PICTURES.get(form, answers.png)
        made = [make(hashlib.sha256(digest + bytes([number])).digest()) for number in range(images)]
        body = {"images": [{"b64_json": base64.b64encode(picture).decode()} for picture in made]}
        return Answer(msgspec.json.encode(body), usage=usage)

    async def _work(self, attempt: Attempt, lead_us: int, steps: int = 0, step_us: int = 0) -> None:
        async for _ in self._steps(attempt, lead_us, steps, step_us):
            pass

    async def _steps(self, attempt: Attempt, lead_us: int, steps: int, step_us: int) -> AsyncGenerator[int, None]:
        """Sleep through the work, and give the number of each step when it is done; tell of PROGRESS_CALLS of them."""
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        for number in range(-1, steps):  # -1: what comes before the first step
            due_us = lead_us + (number + 1) * step_us
            await asyncio.sleep(begun_s + due_us / US_PER_SECOND / self.spec.speed - now_s())
            if number < 0:
                continue
            done = number + 1
            if attempt.progress is not None and done * PROGRESS_CALLS // steps > number * PROGRESS_CALLS // steps:
                attempt.progress(done, steps)
            yield number


def _digest(attempt: Attempt) -> bytes:
    return hashlib.sha256(attempt.body).digest()


def _words_in(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _refused(message: str) -> BackendFailure:
    body = msgspec.json.encode({"error": {"message": message, "type": "invalid_request_error"}})
    return BackendFailure("backend_refused", "not a request", retriable=False, refused=(400, body), spans=[])
