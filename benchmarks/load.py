"""Requests and loads: the one request of a subject, asked once and checked, N times, or for seconds by wrk."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.processes import Server, run_tool
from render_platform.errors import Finding, Unavailable

SCRIPT = Path(__file__).with_name("load.lua")
ASK_S = 30
READY_S = 180
SHOWN_BYTES = 200


@dataclass(frozen=True)
class Request:
    """A JSON POST; right is an answer of `status` whose JSON `has_shape` accepts."""

    path: str
    body: Mapping[str, Any]
    status: int
    has_shape: Callable[[Any], bool]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> bytes:
        return msgspec.json.encode(self.body)

    @property
    def all_headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **self.headers}


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What wrk counted. `answers` are whole answers, `bad_status` those of 400 and above; times in µs."""

    answers: int
    duration_us: int
    p50_us: int
    p99_us: int
    bad_status: int
    socket_errors: int
    timeouts: int

    @property
    def good(self) -> int:
        return self.answers - self.bad_status

    @property
    def errors(self) -> int:
        return self.bad_status + self.socket_errors + self.timeouts

    @property
    def per_second(self) -> float:
        """Good answers a second."""
        return self.good * 1_000_000 / self.duration_us


def parse_load(output: str) -> Load:
    """The line of JSON that load.lua prints after wrk's own report; Unavailable where there is none, or no answer."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    try:
        load = msgspec.json.decode(lines[-1], type=Load)
    except (IndexError, msgspec.DecodeError) as error:
        raise Unavailable("wrk printed no figures", "run it by hand with benchmarks/load.lua") from error
    if load.duration_us <= 0:
        raise Unavailable("wrk measured no time", "give it at least one second")
    return load


def apply_load(server: Server, request: Request, connections: int, seconds: int) -> Load:
    """One wrk thread in a closed loop: each connection sends its next request when the last was answered."""
    body = server.log.with_suffix(".body")
    body.write_bytes(request.bytes)
    headers = [text for name, value in request.all_headers.items() for text in ("-H", f"{name}: {value}")]
    numbers = ["-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--timeout", f"{ASK_S}s"]
    url = server.url + request.path
    output = run_tool(["wrk", *numbers, *headers, "-s", str(SCRIPT), url, "--", str(body)], seconds + 60)
    server.require_running()
    return parse_load(output)


def wait_for_first_answer(server: Server, request: Request) -> None:
    """Asks the load's own request until the server answers it; then the answer must be right, else Finding."""
    give_up = time.monotonic() + READY_S
    while True:
        server.require_running()
        try:
            with closing(_connect(server)) as connection:
                status, body = _ask(connection, request)
        except OSError as error:  # nothing listens yet
            status, body = 503, str(error).encode()
        if status != 503:
            break
        if time.monotonic() > give_up:
            raise Unavailable(f"{server.name} was not ready within {READY_S} s: {_shown(body)}", f"see {server.log}")
        time.sleep(0.1)
    if not _is_right(request, status, body):
        raise Finding(f"{server.name} answered {status}: {_shown(body)}", f"a right answer is {request.status}")


def count_right_answers(server: Server, request: Request, connections: int, count: int) -> int:
    """Asks exactly `count` times over `connections` kept-alive connections, and waits for each answer."""

    def share(number: int) -> int:
        with closing(_connect(server)) as connection:
            return sum(_is_right(request, *_ask(connection, request)) for _ in range(number, count, connections))

    try:
        with ThreadPoolExecutor(connections) as pool:
            return sum(pool.map(share, range(connections)))
    except OSError as error:
        raise Unavailable(f"{server.name} left a request without an answer: {error}", f"see {server.log}") from error


def _connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=ASK_S)


def _ask(connection: http.client.HTTPConnection, request: Request) -> tuple[int, bytes]:
    """Status and body; OSError where the connection failed, or what came was no HTTP."""
    try:
        connection.request("POST", request.path, request.bytes, request.all_headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"no HTTP answer: {error}") from error


def _is_right(request: Request, status: int, body: bytes) -> bool:
    try:
        return status == request.status and request.has_shape(json.loads(body))
    except (ValueError, LookupError, TypeError):
        return False


def _shown(body: bytes) -> str:
    return " ".join(body[:SHOWN_BYTES].decode(errors="replace").split())
