"""`up`: parts that start in order, end together in the reverse order, and never outlive it, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from render_platform import up
from render_platform.config import load_settings
from render_platform.errors import Unavailable
from tests.commands import CHECKOUT, clean_environment

CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, name, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def stop(*_):
    with (folder / "order").open("a") as order:
        order.write(name + " ")
    sys.exit(0)
def pid_file(what, pid):
    (folder / f"{name}.new").write_text(str(pid))
    (folder / f"{name}.new").rename(folder / f"{name}.{what}")
print("interrupts:", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("the last words of", name)
if mode == "broken":
    sys.exit(7)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pid_file("grandchild", grandchild.pid)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else stop)
pid_file("pid", os.getpid())
while mode == "talkative":
    print("x" * 1_000_000)
    time.sleep(0.01)
while True:
    time.sleep(600)
"""
RUNNER = """
import json, sys
from functools import partial
from pathlib import Path
from render_platform.up import Crew, Part, only_one
folder, stages = Path(sys.argv[1]), json.loads(sys.argv[2])
def ready(name):
    return f"{name} is ready" if (folder / f"{name}.pid").exists() and not (folder / f"{name}.wait").exists() else None
def part(name, mode="polite", **times):
    return Part(name, [sys.executable, "-c", sys.argv[3], str(folder), name, mode], partial(ready, name), **times)
with only_one(folder / "up.lock") as lock:
    crew = Crew(folder / "logs", folder, {"PYTHONUNBUFFERED": "1"}, held=[lock])
    sys.exit(crew.run([[part(**one) for one in stage] for stage in stages]))
"""
THREE = [[{"name": "a"}], [{"name": "b"}, {"name": "c"}], [{"name": "d"}]]


@dataclass
class Terminal:
    folder: Path
    process: subprocess.Popen[str]

    def pid(self, name: str, what: str = "pid") -> int:
        path = self.folder / f"{name}.{what}"
        until(path.exists)
        return int(path.read_text())

    def pids(self, names: str) -> list[int]:
        return [self.pid(name, what) for name in names for what in ("pid", "grandchild")]

    def wait_ready(self, names: str) -> None:
        assert self.process.stdout is not None
        left = set(names)
        while left:
            line = self.process.stdout.readline()
            assert line, self.process.stderr and self.process.stderr.read()
            left.discard(line.split()[0])

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    @property
    def order(self) -> list[str]:
        path = self.folder / "order"
        return path.read_text().split() if path.exists() else []

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


@contextmanager
def terminal(
    folder: Path, stages: Sequence[Sequence[dict[str, Any]]], before: Callable[[], object] | None = None
) -> Iterator[Terminal]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder), json.dumps(stages), CHILD],
        cwd=CHECKOUT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )
    with process:
        try:
            yield Terminal(folder, process)
        finally:
            if process.poll() is None:
                process.kill()


def until(reached: Callable[[], bool], within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether it runs: one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_gone(pids: Sequence[int]) -> bool:
    return not any(map(lives, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_in_the_reverse_order(tmp_path: Path, number: signal.Signals) -> None:
    with terminal(tmp_path, THREE) as running:
        running.wait_ready("abcd")
        pids = running.pids("abcd")
        os.killpg(running.process.pid, number)  # as a terminal does: to the whole group
        assert running.end()[0] == 0
        assert running.order == ["d", "c", "b", "a"]
        assert all_gone(pids)


def test_a_stage_starts_when_the_former_is_ready(tmp_path: Path) -> None:
    (tmp_path / "b.wait").touch()
    with terminal(tmp_path, THREE) as running:
        running.wait_ready("ac")
        running.pid("b")
        time.sleep(0.3)
        assert not (tmp_path / "d.pid").exists()
        (tmp_path / "b.wait").unlink()
        running.wait_ready("bd")
        running.process.terminate()
        assert running.end()[0] == 0


def test_a_signal_while_parts_still_start(tmp_path: Path) -> None:
    (tmp_path / "b.wait").touch()
    with terminal(tmp_path, THREE) as running:
        running.wait_ready("ac")
        pids = running.pids("abc")
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == 0
        assert running.order == ["c", "b", "a"]
        assert all_gone(pids)


def test_a_part_that_is_killed_ends_all_and_is_named(tmp_path: Path) -> None:
    with terminal(tmp_path, THREE) as running:
        running.wait_ready("abcd")
        pids = running.pids("abcd")
        os.kill(running.pid("b"), signal.SIGKILL)
        code, said = running.end()
        assert code == 3
        assert "b ended by itself, killed by signal 9" in said
        assert "the last words of b" in said
        assert str(running.log("b")) in said
        assert running.order == ["d", "c", "a"]
        assert all_gone(pids), "its own children too"


def test_a_part_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "b.log").write_text("of yesterday")
    stages = [[{"name": "a"}], [{"name": "b", "mode": "broken"}], [{"name": "c"}]]
    with terminal(tmp_path, stages) as running:
        code, said = running.end()
    assert code == 3
    assert "b ended by itself, exit code 7" in said
    assert "the last words of b" in said
    assert "yesterday" not in said
    assert (running.order, running.log("c").exists()) == (["a"], False)


def test_a_part_that_does_not_become_ready(tmp_path: Path) -> None:
    (tmp_path / "b.wait").touch()
    with terminal(tmp_path, [[{"name": "a"}, {"name": "b", "ready_s": 1}]]) as running:
        code, said = running.end()
    assert (code, "b was not ready after 1 s" in said, running.order) == (3, True, ["b", "a"])


def test_a_part_that_does_not_stop_is_killed_in_its_time(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a"}], [{"name": "b", "mode": "stubborn", "stop_s": 1}]]) as running:
        running.wait_ready("ab")
        pids = running.pids("ab")
        begun = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        code, said = running.end()
        assert 1 <= time.monotonic() - begun < 4
        assert (code, "b did not stop in time" in said, running.order) == (0, True, ["a"])
        assert all_gone(pids)


def test_a_second_signal_ends_the_patience(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a", "mode": "stubborn", "stop_s": 14}]]) as running:
        running.wait_ready("a")
        pids = running.pids("a")
        begun = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == 0
        assert time.monotonic() - begun < 4
        assert all_gone(pids)


def test_nothing_outlives_an_up_that_was_killed(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a"}, {"name": "b", "mode": "stubborn"}]]) as running:
        running.wait_ready("ab")
        pids = running.pids("ab")
        running.process.kill()
        with terminal(tmp_path, [[{"name": "a"}]]) as early:
            code, said = early.end()
        assert (code != 0, "runs over this state folder already" in said) == (True, True), "while its children end"
        until(lambda: all_gone(pids), 10)
        assert running.order == ["a"], "it was asked before it was killed"
    with terminal(tmp_path, [[{"name": "a"}]]) as again:
        again.wait_ready("a")


def test_the_next_up_does_not_wait_where_the_parts_obeyed(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a"}]]) as running:
        running.wait_ready("a")
        running.process.kill()
        until(lambda: all_gone(running.pids("a")), 3)
        time.sleep(0.2)
    with terminal(tmp_path, [[{"name": "a"}]]) as again:
        again.wait_ready("a")


def test_a_guard_that_was_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a"}]]) as running:
        running.wait_ready("a")
        pids = running.pids("a")
        os.kill(os.getpgid(pids[0]), signal.SIGKILL)
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == 0
        assert all_gone(pids)


def test_a_script_s_ampersand_does_not_make_it_deaf(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a"}]], lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as running:
        running.wait_ready("a")
        running.process.send_signal(signal.SIGINT)
        assert running.end()[0] == 0
    assert "interrupts: True" in running.log("a").read_text()


def test_a_log_is_never_long(tmp_path: Path) -> None:
    with terminal(tmp_path, [[{"name": "a", "mode": "talkative"}]]) as running:
        running.wait_ready("a")
        log, sizes = running.log("a"), [0]
        while sizes[-1] >= max(sizes):
            sizes.append(log.stat().st_size)
            time.sleep(0.02)
        assert max(sizes) > 10_000_000
        running.process.terminate()
        assert running.end()[0] == 0
    assert log.stat().st_size < max(sizes)


# What `up` runs.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def names_of(state: Path, load: bool = True, **options: Any) -> list[list[str]]:
    settings = load_settings(environ={}, state_dir=state, **options)
    return [[part.name for part in stage] for stage in up.make_stages(settings, CHECKOUT, 8_080, load)]


def test_the_parts_of_a_platform(tmp_path: Path) -> None:
    assert names_of(tmp_path) == [["bridge"], ["dagster", "gateway"], ["load"]]
    assert names_of(tmp_path, load=False) == [["bridge"], ["dagster", "gateway"]]
    assert names_of(tmp_path, clickhouse_dsn="http://u:p@host:8123")[0] == ["dagster", "gateway"]
    own = {"backends": {"triton": {"kind": "triton"}}}
    assert ["load"] not in names_of(tmp_path, catalogue=own), "real backends may cost money"


def test_the_time_to_stop_is_enough_for_all(tmp_path: Path) -> None:
    stages = up.make_stages(load_settings(environ={}, state_dir=tmp_path), CHECKOUT, 8_080, True)
    assert sum(part.stop_s for stage in stages for part in stage) <= up.STOP_S


def test_what_the_parts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(environ={}, state_dir=tmp_path, dagster_port=3_333, drain_s=600)
    monkeypatch.chdir(tmp_path)
    told = up.make_environment(settings, 8_888, Path("platform.toml"))
    assert told["DAGSTER_HOME"] == str(settings.dagster_home)
    assert told["RENDER_PLATFORM_CONFIG"] == str(tmp_path / "platform.toml"), "they run in another folder"
    again = load_settings({k: v for k, v in told.items() if not k.endswith("CONFIG")})
    assert (again.state_dir, again.dagster_port, again.gateway_port) == (tmp_path, 3_333, 8_888)
    assert again.drain_s <= up.STOP_S
    assert "RENDER_PLATFORM_CONFIG" not in up.make_environment(settings, 8_888, None)


@pytest.mark.parametrize("option", ["dagster_port", "gateway_port"])
def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path, option: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        ports = {"dagster_port": free_port(), "gateway_port": free_port(), option: holder.getsockname()[1]}
        settings = load_settings(environ={}, state_dir=tmp_path / "state", **ports)
        with pytest.raises(Unavailable, match=str(ports[option])) as raised:
            up.run(settings, CHECKOUT)
    assert ("--gateway-port" if option == "gateway_port" else "--port") in raised.value.remedy
    assert not (tmp_path / "state" / "logs").exists()


def test_one_up_a_state_folder(tmp_path: Path) -> None:
    settings = load_settings(environ={}, state_dir=tmp_path, dagster_port=free_port(), gateway_port=free_port())
    with up.only_one(tmp_path / "dagster" / "up.lock"), pytest.raises(Unavailable, match="already"):
        up.run(settings, CHECKOUT)


# Whether a part answers, and the sample load.


@contextmanager
def http_server(status: int) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Answers all requests with a status, and gives those that it got."""
    got: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            got.append((self.path, json.loads(body or b"null")))
            self.send_response(status)
            self.end_headers()

        do_POST = do_GET
        log_message = lambda *_: None  # noqa: E731

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join()


def test_a_part_is_ready_when_it_answers_well() -> None:
    with http_server(200) as (url, _):
        assert up.answers(url, "/health") == url
    assert up.answers(url, "/health") is None, "nobody listens any more"
    with http_server(503) as (url, _):
        assert up.answers(url, "/health") is None


def test_the_sample_load_sends_chats_and_images_and_survives_a_gateway_that_goes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output, http_server(202) as (url, got):
        load = subprocess.Popen([sys.executable, "-um", "render_platform.up", url], cwd=CHECKOUT, stdout=output)
        until(lambda: len(got) >= 2)
    until(lambda: b"ConnectionRefusedError" in log.read_bytes())
    assert load.poll() is None
    load.terminate()
    load.wait(10)
    assert b"job 0: 202\njob 1: 202\n" in log.read_bytes()
    (chat, asked), (image, wanted) = got[:2]
    assert (chat, asked["model"]) == ("/v1/chat/completions", "llama-8b")
    assert (image, wanted["size"]) == ("/image/flux/flux-dev/text2image", "1024x1024")
