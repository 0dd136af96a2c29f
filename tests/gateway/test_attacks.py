"""What a client must not be able to do to others, or a web page to the machine that it is shown on."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from render_platform.errors import UsageError
from render_platform.gateway import app, edge, openai_routes
from render_platform.gateway.catalogue import make_catalogue
from tests.gateway.http import CATALOGUE, CHAT, CHAT_PATH, WAIT_S, Client, Running, eventually, running
from tests.gateway.processes import running_gateway

SOON_S = 0.3


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that waits for slow clients for a moment only."""
    with (
        mock.patch.object(app, "HEAD_S", SOON_S),
        mock.patch.object(edge, "BODY_S", SOON_S),
        mock.patch.object(openai_routes, "SLOWEST_S", SOON_S),
        running(tmp_path_factory.mktemp("impatient")) as at,
    ):
        yield at


def raw(at: Running, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", at.port), WAIT_S)
    connection.sendall(sent)
    return connection


def head(at: Running, path: str, size: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{at.port}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {size}", "", "")).encode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example:8080"},
        {"Host": "127.0.0.1.rebound.example"},
        {"Host": "localhost.rebound.example"},
        {"Host": "[::1].rebound.example"},
        {"Host": ""},
        {"Origin": "http://rebound.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
    ],
)
def test_a_web_page_is_no_anonymous_caller(impatient: Running, headers: dict[str, str]) -> None:
    before = impatient.counts()
    for method, path, body in (("GET", "/jobs", None), ("POST", "/queue", {"model": "llama-8b", "input": CHAT})):
        reply = impatient.client().ask(method, path, body, **headers)
        assert (reply.status, reply.json["code"]) == (403, "foreign_origin")
    assert impatient.counts() == before


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]", "LOCALHOST"])
def test_programs_of_this_machine_and_the_own_api_page_are_callers(impatient: Running, host: str) -> None:
    host = f"{host}:{impatient.port}"
    assert impatient.client().get("/jobs", Host=host).status == 200
    assert impatient.client().get("/jobs", Host=host, Origin=f"http://{host}").status == 200


def test_with_keys_any_name_of_the_gateway_will_do(tmp_path: Path) -> None:
    with running(tmp_path) as at:
        key = at.call(lambda: at.gateway.keys.create("acme", ["customer"]))
    with running(tmp_path) as at:
        assert at.client(key).get("/jobs", Host="gpu.example", Origin="https://console.example").status == 200
        assert at.client().get("/jobs", Host="gpu.example").status == 401


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_a_connection_without_a_whole_head_is_closed(impatient: Running, begun: bytes) -> None:
    with closing(raw(impatient, begun)) as connection:
        assert connection.recv(1) == b""


def test_a_head_without_an_end_is_not_kept(impatient: Running) -> None:
    with (
        mock.patch.object(app, "HEAD_S", WAIT_S),
        closing(raw(impatient, b"GET / HTTP/1.1\r\nX: ")) as connection,
        pytest.raises(ConnectionError),
    ):
        connection.sendall(b"x" * 50_000_000)


def test_a_second_head_that_does_not_come_is_waited_for_no_longer(impatient: Running) -> None:
    whole = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{impatient.port}\r\n\r\n".encode()
    with closing(raw(impatient, whole)) as connection:
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65_536)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert connection.recv(1) == b""


def test_a_body_that_does_not_come_is_refused_and_its_connection_closed(impatient: Running) -> None:
    with closing(raw(impatient, head(impatient, CHAT_PATH, 1_000) + b'{"messages":')) as connection:
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in answer


def test_a_client_that_does_not_read_its_stream_loses_its_slot_and_its_backend_no_trust(impatient: Running) -> None:
    server = impatient.gateway.fleet.servers["wide"]
    body = json.dumps({"model": "llama-8b", "stream": True, "do": "trickle", **CHAT}).encode()
    connections = []
    for _ in range(12):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(head(impatient, "/v1/chat/completions", len(body)) + body)
        connections.append(connection)
    codes = "SELECT count(*) FROM usage_events WHERE status = 'cancelled' AND error_code = 'client_gone'"
    eventually(lambda: impatient.sql(codes) == [(12,)])
    eventually(lambda: server.running == 0)
    assert server.breaker.state(impatient.gateway.clock.now_us()) == "closed"
    for connection in connections:
        connection.close()


def test_a_backend_whose_longest_job_could_not_be_billed_is_refused() -> None:
    backends = {**CATALOGUE["backends"]}
    backends["wide"] = {**backends["wide"], "gpu_count": 8, "timeout_s": 22_500}
    make_catalogue({**CATALOGUE, "backends": backends})
    backends["wide"] = {**backends["wide"], "timeout_s": 22_501}
    with pytest.raises(UsageError, match="gpu_count"):
        make_catalogue({**CATALOGUE, "backends": backends})


SLOW = """
drain_s = 3
[backends.slow]
kind = "simulated"
capacity = 1
speed = 0.01
[models.slow]
family = "llama"
modality = "text"
type = "llm"
tasks = ["chat"]
backends = { slow = "slow" }
"""


def test_told_to_stop_it_sends_those_away_who_wait_for_a_slot_and_watchers_at_last(tmp_path: Path) -> None:
    with running_gateway(tmp_path, SLOW) as (process, address):
        client = Client(int(address.rpartition(":")[2]))
        asked = {"model": "slow", "input": {**CHAT, "max_tokens": 30_000}}
        first, second = (client.post("/queue", asked).json["id"] for _ in range(2))
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(client.post("/text/llama/slow/chat", CHAT).status))
        watching = threading.Thread(target=lambda: list(client.events(second)))
        for thread in (waiting, watching):
            thread.start()
        eventually(lambda: client.get("/queue").json[0]["waiting"]["normal"] == 2)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        eventually(lambda: client.get("/ready").status == 503)
        assert client.post("/queue", asked).json["code"] == "stopping"
        assert client.get(f"/jobs/{first}").json["state"] == "running"
        assert process.wait(WAIT_S) == 0
        for thread in (waiting, watching):
            thread.join(WAIT_S)
        assert statuses == [503]
        assert time.monotonic() - begun < 3 + 5
