"""`serve`, `status` and `key`, as an operator uses them."""

from __future__ import annotations

import json
import signal
import socket
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command, run_inside
from tests.gateway.processes import running_gateway
from tests.platforms import make_platform, record_random

NUMBERS = ("accepted", "queued", "running", "finished", "failed", "events", "sealed", "published", "fast_path_dropped")
AFTER_OPENING = ("there are no API keys", "meter", "issuer a")
"""What is wrong is seen when the state is open, which the end of the process closes."""
CHAT = {"model": "llama-8b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def ask(address: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def status(state: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(run_inside("status", "--state", str(state), "--json").stdout)
    return found


def test_a_gateway_from_its_start_to_its_end(tmp_path: Path) -> None:
    """Without a file it serves two models on simulated devices; what it did can be read while it runs and after."""
    state = tmp_path / "state"
    with running_gateway(tmp_path, "drain_s = 5") as (process, address):
        code, answer = ask(address, "/v1/chat/completions", CHAT)
        assert (code, answer["usage"]["completion_tokens"]) == (200, 2)
        while_it_runs = status(state)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert tuple(while_it_runs) == NUMBERS
    after = status(state)
    assert {name: after[name] for name in NUMBERS[:6]} == {
        "accepted": 1,
        "queued": 0,
        "running": 0,
        "finished": 1,
        "failed": 0,
        "events": 1,
    }
    assert after["fast_path_dropped"] == 1, "nobody listens where its ClickHouse should be: that is counted, and kept"
    flushed = run_command("flush", "--state", str(state), "--json")
    assert json.loads(flushed.stdout) == {"entries_added": 1, "tree_size": 1}
    counted = run_command("query", "SELECT count(*) AS n FROM usage_events", "--state", str(state), "--json")
    assert json.loads(counted.stdout) == [{"n": 1}]
    assert {name: status(state)[name] for name in ("events", "sealed", "published")} == dict.fromkeys(
        ("events", "sealed", "published"), 1
    )
    assert "nanobind" not in (tmp_path / "errors.log").read_text()


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_command("serve", "--state", str(tmp_path / "state"), "--port", port)
    assert done.code == 3
    assert f"127.0.0.1:{port} cannot be had" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_gateway_on_a_state_folder_is_refused(tmp_path: Path) -> None:
    with running_gateway(tmp_path, "") as _:
        second = run_command("serve", "--state", str(tmp_path / "state"), "--port", "0")
    assert second.code == 3
    assert "another gateway serves" in second.stderr


def test_a_database_that_is_older_than_its_log_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """It is found out when the gateway starts: nobody is shown how the server came to say so."""
    state = tmp_path / "state"
    with closing(make_platform(state)) as platform:
        record_random(platform, 3, 1)
        platform.flush()
    for file in state.glob("platform.db*"):
        file.unlink()
    done = run_command("serve", "--state", str(state), "--port", "0")
    assert (done.code, done.stdout) == (3, "")
    said, remedy = done.stderr.splitlines()
    assert said.startswith("error: the published log has ")
    assert remedy.strip() == "→ the database is an older copy: run `render-platform recover` first"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[backends.a]\nkind = "tritn"', "kind"),
        ('[backends.a]\nkind = "triton"\nurl = "http://x:1"\ncapacty = 3', "did you mean capacity?"),
        ('[backends.a]\nkind = "triton"', "backends.a.url"),
        ('[models.m]\nfamily = "f"\nmodality = "t"\ntype = "llm"\ntasks = ["c"]\nbackends = { b = "m" }', "names b"),
        ("rate_per_s = 0", "rate_per_s"),
        ("rate_pers = 1", "did you mean rate_per_s?"),
        ('gateway_host = "0.0.0.0"', "there are no API keys"),
        ('meter = "nvlm"', "meter"),
        ('[issuers.a]\nissuer = "x"\naudience = "y"\njwks_file = "/nowhere"', "issuer a"),
        ('[backends.a]\nkind = "openai"\nurl = "http://u:secret@x:1/v1"', "backends.a.url"),
    ],
)
def test_a_configuration_that_cannot_be_served_says_why(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    run = run_command if named in AFTER_OPENING else run_inside
    done = run("serve", "--state", str(tmp_path / "state"), "--config", str(file), "--port", "0")
    assert done.code in (2, 3)
    assert named in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_are_shown_once_and_can_be_revoked(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    key = run_inside("key", "create", "acme", "--tier", "premium", *state).stdout.strip()
    listed = json.loads(run_inside("key", "list", "--json", *state).stdout)
    assert [(row["customer"], row["tier"], row["revoked"]) for row in listed] == [("acme", "premium", None)]
    assert key not in run_inside("key", "list", *state).stdout
    with running_gateway(tmp_path, "") as (_, address):
        assert ask(address, "/v1/chat/completions", CHAT)[0] == 401
        assert ask(address, "/v1/chat/completions", CHAT, key)[0] == 200
    assert run_inside("key", "revoke", listed[0]["key_id"], *state).code == 0
    with running_gateway(tmp_path, "") as (_, address):
        assert ask(address, "/v1/chat/completions", CHAT, key)[0] == 401
    database = (tmp_path / "state/platform.db").read_bytes() + (tmp_path / "errors.log").read_bytes()
    assert key.split("_", 2)[2].encode() not in database


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "create", "acme", "--role", "king"),
        ("key", "create", "acme", "--role", "meter"),
        ("key", "create", "acme", "--priority", "urgent"),
        ("key", "revoke", "0000"),
        ("status",),
        ("vkey", "--gateway"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_inside(*arguments, "--state", str(tmp_path / "none"))
    assert done.code == 2
    assert done.stderr.startswith("error: ")
    assert "→" in done.stderr
