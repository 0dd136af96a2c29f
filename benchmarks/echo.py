"""The two bare servers that the rest is compared with, each in one process on uvicorn, uvloop and httptools.

`echo` is an OpenAI-shaped backend that costs next to nothing: it reads the body and answers fixed bytes.
`accept` validates a small job and answers 202 without keeping it: the limit for a durable accept in this framework.

    python -m benchmarks.echo echo --port 8100
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec
import uvicorn
from litestar import Litestar, post

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MODEL = "echo-1"
TEXT = "The quick brown fox jumps over the lazy dog."

COMPLETION = msgspec.json.encode(
    {
        "id": "chatcmpl-0001",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 10, "total_tokens": 22},
    }
)
MODELS = msgspec.json.encode(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "echo"}]}
)
ANSWERS = {
    ("POST", "/v1/chat/completions"): (200, COMPLETION),
    ("GET", "/v1/models"): (200, MODELS),
}
NOT_FOUND = (404, b'{"error":{"message":"no such path","type":"invalid_request_error"}}')


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application: the fixed answer of a method and path, after the whole body was read."""
    while (await receive()).get("more_body"):
        pass
    status, body = ANSWERS.get((scope["method"], scope["path"]), NOT_FOUND)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Message(msgspec.Struct):
    role: str
    content: str


class Job(msgspec.Struct):
    """What a client asks for; a field of another type is answered 400."""

    model: str
    task: str
    input: dict[str, Any]


class Accepted(msgspec.Struct):
    id: uuid.UUID
    status: str = "queued"


@post("/queue", status_code=202)
async def _accept(data: Job) -> Accepted:  # noqa: ARG001 (its validation is what is measured)
    return Accepted(uuid.uuid4())


def accept() -> Litestar:
    return Litestar([_accept], openapi_config=None)


@click.command()
@click.argument("kind", type=click.Choice(["echo", "accept"]))
@click.option("--port", type=click.IntRange(1, 65_535), required=True)
def main(kind: str, port: int) -> None:
    """Serve one of the two on 127.0.0.1 until a signal ends it."""
    application: Any = echo if kind == "echo" else accept()
    uvicorn.run(
        application,
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
