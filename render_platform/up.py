"""`up`: everything on this machine from one terminal, as child processes that start, are watched and stop together.

- The parts start in stages, each stage when the former is ready. One that ends by itself ends all, with exit code 3.
- SIGINT, SIGTERM or SIGHUP stops them in the reverse order, each in a time of its own; a second one kills what is left.
- All children are in one process group, which no terminal's Ctrl-C reaches. A guard leads it. It waits for the end of
  `up`, even by SIGKILL, and then ends the group: no child, and nothing that a child started, goes on without `up`.
- One `up` a state folder. The guard holds the lock as well, so that the next `up` never meets what is still ending.
- What a part says is in <state>/logs/<part>.log, made empty at the start, and whenever it grows too long.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click

from render_platform.clickhouse_connection import FolderLock
from render_platform.config import Settings
from render_platform.errors import Unavailable

STOP_S = 15
DRAIN_S = 5
POLL_S = 0.1
MAX_LOG_BYTES = 16 * 1024 * 1024
TAIL_LINES, TAIL_BYTES = 15, 4_096
LOOPBACK = "127.0.0.1"

GUARD = """
import os, signal, sys, time
def lives_here(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, _, group = file.read().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return state != "Z" and int(group) == os.getpgrp()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read()  # ends when the other end is gone, whatever became of its process
os.killpg(0, signal.SIGTERM)
until = time.monotonic() + 5
while time.monotonic() < until and sum(lives_here(name) for name in os.listdir("/proc") if name.isdigit()) > 1:
    time.sleep(0.1)
os.killpg(0, signal.SIGKILL)
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One child. `ready` gives what to print of it, or None until it works. Seconds are the most that each may take."""

    name: str
    argv: Sequence[str]
    ready: Callable[[], str | None]
    stop_s: float = 2.0
    ready_s: float = 60.0


class _Running(NamedTuple):
    part: Part
    process: subprocess.Popen[bytes]
    log: Path


def run(settings: Settings, checkout: Path, *, config: Path | None = None, load: bool = True) -> int:
    """Run everything over a state folder until a signal (0), or until a part ends by itself (3).

    `checkout` holds the Dagster layer. `load` sends a sample job a second, but to the built-in simulated backends only.
    Unavailable where the folder is in use or a port is taken.
    """
    with only_one(settings.dagster_home / "up.lock") as lock:
        _require_free("dagster", settings.dagster_port, "--port")
        _require_free("gateway", settings.gateway_port, "--gateway-port")
        gateway_port = _bind(settings.gateway_port)
        logs = settings.state_dir / "logs"
        click.echo(f"state: {settings.state_dir}   logs: {logs}   stop: Ctrl-C")
        environment = make_environment(settings, gateway_port, config)
        crew = Crew(logs, checkout, environment, held=[lock])
        return crew.run(make_stages(settings, checkout, gateway_port, load))


def make_environment(settings: Settings, gateway_port: int, config: Path | None) -> dict[str, str]:
    """What all parts are told: options of the command line go before the file and the variables."""
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(settings.dagster_home),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "RENDER_PLATFORM_STATE_DIR": str(settings.state_dir),
        "RENDER_PLATFORM_DAGSTER_PORT": str(settings.dagster_port),
        "RENDER_PLATFORM_GATEWAY_PORT": str(gateway_port),
        "RENDER_PLATFORM_DRAIN_S": str(min(settings.drain_s, DRAIN_S)),
    }
    file = config or Path(environment.get("RENDER_PLATFORM_CONFIG", ""))
    if file != Path():
        environment["RENDER_PLATFORM_CONFIG"] = str(file.resolve())  # the children run in another folder
    return environment


def make_stages(settings: Settings, checkout: Path, gateway_port: int, load: bool) -> list[list[Part]]:
    """In the order of their start. The bridge comes first, because the first to open its folder owns it."""
    python = sys.executable
    gateway_url = f"http://{LOOPBACK}:{gateway_port}"
    dagster_url = f"http://{LOOPBACK}:{settings.dagster_port}"
    serve = ["serve", "--state", str(settings.state_dir), "--host", LOOPBACK, "--port", str(gateway_port)]
    dev = ["dev", "-w", str(checkout / "workspace.yaml"), "-h", LOOPBACK, "-p", str(settings.dagster_port)]
    dagster = Part("dagster", [python, "-m", "dagster", *dev], lambda: answers(dagster_url, "/server_info"), 4, 120)
    gateway = Part("gateway", [python, "-m", "render_platform.cli", *serve], lambda: answers(gateway_url, "/health"), 8)
    stages = [[dagster, gateway]]
    if settings.clickhouse_url.startswith("chdb://"):
        folder = Path(settings.clickhouse_url.removeprefix("chdb://")).resolve()
        own = [python, "-m", "render_platform.bridge", "--folder", str(folder), "--port", "0"]
        stages.insert(0, [Part("bridge", own, lambda: _bridge_url(folder))])
    if load and not settings.catalogue:  # backends of a file's may cost money
        stages.append([Part("load", [python, "-m", __name__, gateway_url], lambda: "a sample job a second", 1)])
    return stages


class Crew:
    """Runs parts. `held` are descriptors that stay open until the last child is gone."""

    def __init__(self, logs: Path, folder: Path, environment: Mapping[str, str], held: Sequence[int] = ()) -> None:
        self._logs, self._folder, self._environment, self._held = logs, folder, environment, held
        self._running: list[_Running] = []
        self._asked = 0
        self._failed = False

    def run(self, stages: Iterable[Sequence[Part]]) -> int:
        """Start the stages, watch, stop in the reverse order; 0 where a signal asked for the end, else 3."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._listening(), self._guarded() as group:
            try:
                well = all(self._start(stage, group) for stage in stages)
                while well and self._goes_on():
                    time.sleep(POLL_S)
            finally:
                self._stop()
        return 3 if self._failed else 0

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Count signals. A caught one begins as the default in a child, even where a shell's `&` made us ignore it."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._asked += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # nohup is respected
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _guarded(self) -> Iterator[int]:
        """The group of all children, which ends here. Nothing but this process holds the other end of its input."""
        guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            pass_fds=self._held,
        )
        try:
            yield guard.pid
        finally:
            os.killpg(guard.pid, signal.SIGKILL)  # nobody has reaped the guard: the group is still its own
            guard.communicate()
            for running in self._running:
                running.process.wait()

    def _start(self, stage: Sequence[Part], group: int) -> bool:
        """Start the parts of a stage together; True once all are ready."""
        begun = time.monotonic()
        waiting = [self._spawn(part, group) for part in stage]
        while waiting and self._goes_on():
            waiting = [running for running in waiting if not _said_ready(running.part)]
            for running in waiting:
                if time.monotonic() - begun > running.part.ready_s:
                    self._fail(running, f"was not ready after {running.part.ready_s:.0f} s")
            time.sleep(POLL_S)
        return not waiting

    def _spawn(self, part: Part, group: int) -> _Running:
        log = self._logs / f"{part.name}.log"
        log.write_bytes(b"")
        with log.open("ab") as output:  # each write goes to its end: it can be cut under the writer
            process = subprocess.Popen(  # noqa: S603
                part.argv,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=group,
            )
        self._running.append(_Running(part, process, log))
        return self._running[-1]

    def _goes_on(self) -> bool:
        """False where the end has come: a signal asked for it, a part ended, or one did not start."""
        for running in self._running:
            if running.process.poll() is not None and not self._asked:
                code = running.process.returncode
                self._fail(
                    running, f"ended by itself, {f'killed by signal {-code}' if code < 0 else f'exit code {code}'}"
                )
            if running.log.stat().st_size > MAX_LOG_BYTES:
                os.truncate(running.log, 0)
        return not self._asked and not self._failed

    def _fail(self, running: _Running, what: str) -> None:
        self._failed = True
        click.echo(f"error: {running.part.name} {what}; the end of {running.log}:", err=True)
        with running.log.open("rb") as log:
            log.seek(max(0, running.log.stat().st_size - TAIL_BYTES))
            for line in log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]:
                click.echo(f"  {line}", err=True)

    def _stop(self) -> None:
        """End the parts, the last one first. What is still there at its time, or at another signal, is killed."""
        deadline, asked = time.monotonic() + STOP_S, self._asked
        for part, process, _ in reversed(self._running):
            process.terminate()
            until = min(deadline, time.monotonic() + part.stop_s)
            while process.poll() is None and time.monotonic() < until and self._asked == asked:
                time.sleep(POLL_S / 2)
            if process.poll() is None:
                click.echo(f"{part.name} did not stop in time, and is killed", err=True)  # with its group, at the end


def _said_ready(part: Part) -> bool:
    said = part.ready()
    if said is not None:
        click.echo(f"{part.name:8} {said}")
    return said is not None


def answers(url: str, path: str) -> str | None:
    """`url` where `path` of it is answered with 200."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=1)
    try:
        connection.request("GET", path)
        return url if connection.getresponse().status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _bridge_url(folder: Path) -> str | None:
    """Where the bridge answers, without its token."""
    try:
        port = urlsplit(FolderLock.url_file(folder).read_text()).port
    except FileNotFoundError:
        return None
    return answers(f"http://{LOOPBACK}:{port}", "/ping")


@contextmanager
def only_one(path: Path) -> Iterator[int]:
    """The lock of a state folder's `up`, as a descriptor. It is the kernel's, and ends with those who hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable("`up` runs over this state folder already", "use that one, or end it first") from None
        yield file.fileno()


def _require_free(name: str, port: int, option: str) -> None:
    try:
        _bind(port)
    except OSError as error:
        remedy = f"give another one with {option}"
        raise Unavailable(f"port {port}, {name}'s, is taken: {error.strerror}", remedy) from None


def _bind(port: int) -> int:
    """The port, or a free one for 0; OSError where something has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))
        return int(probe.getsockname()[1])


def send_load(url: str, pause_s: float = 1.0) -> None:
    """Send chats and images in turn, for ever, and print what came of each."""
    for number in count():
        words = "tell me more " * (1 + number % 7)
        if number % 2:
            said = _post(url, "/image/flux/flux-dev/text2image", prompt=words, steps=10 + number % 20, size="1024x1024")
        else:
            said = _post(url, "/v1/chat/completions", model="llama-8b", messages=[{"role": "user", "content": words}])
        click.echo(f"job {number}: {said}")
        time.sleep(pause_s)


def _post(url: str, path: str, **body: Any) -> str:
    """The status of the answer, or why there is none."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    try:
        headers = {"content-type": "application/json", "prefer": "respond-async"}
        connection.request("POST", path, json.dumps(body), headers)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


if __name__ == "__main__":
    send_load(sys.argv[1])
