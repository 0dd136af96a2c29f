"""What is measured: six servers, the request of each, how each is started, and what ours must have billed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import echo
from benchmarks.load import Request
from benchmarks.peers import LiteLLM, Peer, Portkey
from benchmarks.processes import Server, clean_environment, free_port, run_tool, running
from render_platform.errors import Unavailable

STATUS_S = 120
MESSAGES = [{"role": "user", "content": "Say something short about foxes and dogs."}]
CHAT = {"model": echo.MODEL, "messages": MESSAGES, "max_tokens": 16}
JOB = {"model": echo.MODEL, "task": "chat", "input": {"messages": MESSAGES, "max_tokens": 16}}

CHAT_PATH = "/v1/chat/completions"
QUEUE_PATH = "/queue"

ROOM = 1_000_000
"""Jobs that may wait, and requests that the one customer may make: accepts are measured, not refusals."""


class Counts(msgspec.Struct, frozen=True):
    """How far the jobs of a state folder are, by `render-platform status --json`."""

    accepted: int
    finished: int
    events: int


@dataclass(frozen=True)
class Subject:
    """`start` is given the round's folder, where a server keeps its files, and may be called again on the same one.

    `counts` reads what the platform kept in that folder, once stopped. `bills`: each good answer is one usage event.
    """

    letter: str
    name: str
    request: Request
    start: Callable[[Path], AbstractContextManager[Server]]
    install: Callable[[], None] = lambda: None
    counts: Callable[[Path], Counts] | None = None
    bills: bool = False


def is_completion(answer: Any) -> bool:
    """The echo backend's text and usage, whatever else a gateway added."""
    usage = answer["usage"]
    said = answer["choices"][0]["message"]["content"]
    return said == echo.TEXT and (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 10)


def is_accepted(answer: Any) -> bool:
    return bool(answer.get("id"))


def start_bare(python: str, kind: str, folder: Path) -> AbstractContextManager[Server]:
    """`echo` or `accept` of benchmarks/echo.py."""
    port = free_port()
    return running(f"{kind} (bare)", [python, echo.__file__, kind, "--port", str(port)], port, folder)


def make_config(backend: str, capacity: int) -> str:
    """The gateway's TOML file: one backend of the given settings, one model on it."""
    return f"""
rate_per_s = {ROOM}
burst = {ROOM}

[backends.only]
{backend}
capacity = {capacity}

[models."{echo.MODEL}"]
family = "echo"
modality = "text"
type = "llm"
tasks = ["chat"]
max_queue = {ROOM}
backends = {{ only = "{echo.MODEL}" }}
"""


def make_subjects(python: str, program: str, cache: Path, echo_server: Server) -> list[Subject]:
    """All six, by letter. `program` is the render-platform command of (c) and (d)."""
    backend_url = f"{echo_server.url}/v1"
    chat = Request(CHAT_PATH, CHAT, 200, is_completion)
    job = Request(QUEUE_PATH, JOB, 202, is_accepted)
    ours = _Gateway(program)
    simulated = make_config('kind = "simulated"', 1)  # accepting is measured, not running: one job runs at a time
    forwarding = make_config(f'kind = "openai"\nurl = "{backend_url}"', 64)
    return [
        Subject("a", "bare echo backend", chat, lambda _: _already(echo_server)),
        Subject("b", "bare Litestar accept (202)", job, lambda folder: start_bare(python, "accept", folder)),
        Subject("c", "render-platform, durable accept", job, ours.starter(simulated), counts=ours.counts),
        Subject(
            "d", "render-platform, forward and bill", chat, ours.starter(forwarding), counts=ours.counts, bills=True
        ),
        _peer("e", LiteLLM(cache, backend_url)),
        _peer("f", Portkey(cache, backend_url)),
    ]


def _peer(letter: str, peer: Peer) -> Subject:
    request = Request(CHAT_PATH, CHAT, 200, is_completion, peer.headers)
    return Subject(letter, f"{peer.name} {peer.version}", request, peer.start, peer.install)


@contextmanager
def _already(server: Server) -> Iterator[Server]:
    yield server


@dataclass(frozen=True)
class _Gateway:
    """Our own serving component, with its state in the round's folder."""

    program: str

    def starter(self, config: str) -> Callable[[Path], AbstractContextManager[Server]]:
        def start(folder: Path) -> AbstractContextManager[Server]:
            port = free_port()
            file = folder / "gateway.toml"
            file.write_text(config)
            options = ["--state", str(folder / "state"), "--port", str(port), "--config", str(file)]
            return running("render-platform", [self.program, "serve", *options], port, folder)

        return start

    def counts(self, folder: Path) -> Counts:
        command = [self.program, "status", "--json", "--state", str(folder / "state")]
        return parse_counts(run_tool(command, STATUS_S, clean_environment({})))


def parse_counts(output: str) -> Counts:
    """The three counts of the status object; Unavailable where one of them is missing."""
    try:
        return msgspec.json.decode(output, type=Counts)
    except msgspec.DecodeError as error:
        raise Unavailable(f"`status --json` holds no counts: {error}", "see benchmarks/subjects.py") from error
