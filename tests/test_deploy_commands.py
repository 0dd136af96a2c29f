"""The units' commands run: in the order of their start, with the delivered environment, until their signal to stop."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from render_platform.clickhouse_connection import FolderLock
from render_platform.up import answers
from tests.commands import clean_environment
from tests.deployment import CHECKOUT, CONTAINED, DEPLOY, HOME, PARTS, environment_file, service
from tests.gateway.http import CHAT, CHAT_PATH, Client

READY_S = 120


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture
def told(tmp_path: Path) -> dict[str, str]:
    """What systemd would tell the units: the delivered file, with this test's folders and ports."""
    gateway, dagster = map(str, free_ports(2))
    delivered = environment_file(DEPLOY / "render-platform.env")
    places = {"/var/lib/render-platform": str(tmp_path), "/etc/render-platform": str(DEPLOY)}
    for name, value in delivered.items():
        for installed, here in places.items():
            value = value.replace(installed, here)
        delivered[name] = value
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ports = {"RENDER_PLATFORM_GATEWAY_PORT": gateway, "RENDER_PLATFORM_DAGSTER_PORT": dagster}
    return {**clean_environment(), **delivered, **ports, "PATH": path}


def command(part: str, told: dict[str, str], key: str = "ExecStart") -> list[str]:
    """With this checkout in the place of the installed one, and variables as systemd fills them in."""
    line = service(part).one("Service", key).replace(f"{HOME}/.venv/bin", str(Path(sys.executable).parent))
    line = re.sub(r"\$\{(\w+)\}", lambda match: told[match[1]], line.replace(HOME, str(CHECKOUT)))
    return shlex.split(line)


class Started:
    """A part as systemd starts it; `stop` asks the main process alone, and gives its exit code."""

    def __init__(self, part: str, told: dict[str, str], log: Path) -> None:
        self._part, self._log = part, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command(part, told), cwd=CHECKOUT, env=told, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self, ready: Callable[[], object]) -> None:
        until = time.monotonic() + READY_S
        while not ready():
            assert self._process.poll() is None, f"{self._part} ended: {self.said()}"
            assert time.monotonic() < until, f"{self._part} was not ready: {self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def stop(self) -> int:
        self._process.send_signal(signal.Signals[service(self._part).one("Service", "KillSignal")])
        return self._process.wait(int(service(self._part).one("Service", "TimeoutStopSec")))

    def kill(self) -> None:
        """What is left of its session, as systemd's KillMode=mixed does it."""
        if self._process.poll() is None or service(self._part).one("Service", "KillMode") == "mixed":
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
        self._process.wait()


@contextmanager
def started(part: str, told: dict[str, str], folder: Path) -> Iterator[Started]:
    one = Started(part, told, folder / f"{part}.log")
    try:
        yield one
    finally:
        one.kill()


def healthy(told: dict[str, str]) -> bool:
    done = subprocess.run(["render-platform", "doctor"], env=told, cwd=CHECKOUT, capture_output=True, text=True)
    return done.returncode == 0 and "off" not in re.findall(r"\w+", done.stdout)


def start_all(stack: ExitStack, told: dict[str, str], folder: Path) -> dict[str, Started]:
    """In the order that the units have; all are ready."""
    gateway, dagster = (f"http://127.0.0.1:{told[f'RENDER_PLATFORM_{name}_PORT']}" for name in ("GATEWAY", "DAGSTER"))
    ready: dict[str, Callable[[], object]] = {
        "gateway": lambda: answers(gateway, "/ready"),
        "dagster-webserver": lambda: answers(dagster, "/server_info"),
        "dagster-daemon": lambda: healthy(told),
    }
    subprocess.run(command("prepare", told), cwd=CHECKOUT, env=told, check=True, timeout=READY_S)
    for key in ("ExecCondition", "ExecStartPre"):
        told_all = {"RENDER_PLATFORM_CLICKHOUSE_DSN": "", **told}
        subprocess.run(command("clickhouse", told_all, key), check=True, timeout=READY_S)
    parts = {"clickhouse": stack.enter_context(started("clickhouse", told, folder))}
    subprocess.run(command("clickhouse", told, "ExecStartPost"), check=True, timeout=READY_S)
    for part in CONTAINED:  # systemd starts one when the process of the one before runs
        parts[part] = stack.enter_context(started(part, told, folder))
    for part in CONTAINED:
        parts[part].wait(ready[part])
    return parts


def stop_all(parts: dict[str, Started], told: dict[str, str]) -> None:
    codes = {part: parts[part].stop() for part in reversed(PARTS)}
    assert set(codes.values()) == {0}, codes
    assert not answers(f"http://127.0.0.1:{told['RENDER_PLATFORM_GATEWAY_PORT']}", "/health")
    assert not FolderLock.url_file(Path(told["RENDER_PLATFORM_STATE_DIR"]) / "clickhouse").exists()


def test_the_parts_start_in_order_work_stop_when_they_are_asked_and_are_upgraded(
    told: dict[str, str], tmp_path: Path
) -> None:
    """The second start is that of docs/upgrade.md: its commands run between, over what the first has left."""
    state = Path(told["RENDER_PLATFORM_STATE_DIR"])
    subprocess.run(command("prepare", told), cwd=CHECKOUT, env=told, check=True, timeout=READY_S)
    assert (state / "dagster/dagster.yaml").read_text() == (DEPLOY / "dagster.yaml").read_text()
    assert state.stat().st_mode & 0o077 == 0
    FolderLock.url_file(state / "clickhouse").write_text("http://127.0.0.1:1")  # of one that was killed
    client = Client(int(told["RENDER_PLATFORM_GATEWAY_PORT"]))
    with ExitStack() as stack:
        parts = start_all(stack, told, tmp_path)
        assert client.post(CHAT_PATH, CHAT).status == 200
        run_upgrade("migrate --check", told)
        stop_all(parts, told)
        run_upgrade("dagster instance migrate", told)
        run_upgrade("migrate", told)
        parts = start_all(stack, told, tmp_path)
        assert client.post(CHAT_PATH, CHAT).status == 200
        for words in ("flush", "verify"):
            run_upgrade(words, told)
        stop_all(parts, told)


def run_upgrade(words: str, told: dict[str, str]) -> None:
    """A command of the page."""
    line = words if words.startswith("dagster ") else f"render-platform {words}"
    assert f"`{line}`" in (CHECKOUT / "docs/upgrade.md").read_text()
    done = subprocess.run(line.split(), env=told, cwd=CHECKOUT, capture_output=True, text=True, timeout=READY_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_usage_ends_with_the_code_that_is_not_tried_again(told: dict[str, str], tmp_path: Path) -> None:
    """A gateway that listens elsewhere without API keys: systemd leaves it, a container waits for the first key."""
    code = service("gateway").one("Service", "RestartPreventExitStatus")
    elsewhere = {**told, "RENDER_PLATFORM_GATEWAY_HOST": "0.0.0.0"}
    done = subprocess.run(
        command("gateway", told), cwd=CHECKOUT, env=elsewhere, capture_output=True, text=True, timeout=60
    )
    assert str(done.returncode) == code, done.stderr
    assert "key" in done.stderr
    made = subprocess.run(["render-platform", "key", "create", "acme"], env=elsewhere, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    with started("gateway", elsewhere, tmp_path) as gateway:
        url = f"http://127.0.0.1:{told['RENDER_PLATFORM_GATEWAY_PORT']}"
        gateway.wait(lambda: answers(url, "/ready"))
        assert gateway.stop() == 0
