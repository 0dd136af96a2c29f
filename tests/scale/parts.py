"""The parts of a platform as an operator runs them, a process each, that can be killed, frozen and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from tests import postgres
from tests.conformance import s3_server
from tests.gateway.servers import free_port

BRIDGE_PASSWORD = "bridge-password-4711"
LEASE_S = 15
PATIENCE_S = 60.0

FLUSHER = """
import sys, time
from pathlib import Path
from render_platform.config import configure_logs, load_settings
from render_platform.errors import Unavailable
from render_platform.pipeline import open_platform

configure_logs()
settings = load_settings(state_dir=Path(sys.argv[1]))
print("ready", flush=True)
while True:
    try:
        with open_platform(settings) as platform:
            while True:
                platform.flush()
                time.sleep(0.3)
    except Unavailable as error:  # anything else ends it, and is seen
        print("unavailable:", error.message, file=sys.stderr, flush=True)
        time.sleep(0.5)
"""


class Part:
    """One process; `ready` waits until it answers."""

    def __init__(
        self, name: str, command: Sequence[object], folder: Path, ready: Callable[[], bool], env: Mapping[str, str] = {}
    ) -> None:
        self.name, self._command, self._ready = name, [str(one) for one in command], ready
        self._env = {**os.environ, **env}
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self.starts = 0
        self.wanted = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Part:
        """Start it, again where it ends at once because another part is away, and wait until it answers."""
        until = time.monotonic() + PATIENCE_S
        self._begin()
        while not self._ready():
            if time.monotonic() > until:
                raise AssertionError(f"{self.name} is not ready: {self.log.read_text(errors='replace')[-3_000:]}")
            time.sleep(0.2)
            if self.process.poll() is not None:
                self._begin()
        self.wanted = True
        return self

    def look_after(self) -> None:
        """As a supervisor does: start it again where it has ended by itself."""
        if self.wanted and self.process.poll() is not None:
            self._begin()

    def _begin(self) -> None:
        self.starts += 1
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def signal(self, number: int) -> None:
        """To the whole group: a gateway's journal, a database's workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.wanted = False
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, code: int = 0) -> None:
        self.wanted = False
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == code, self.log.read_text(errors="replace")[-3_000:]


def answers(url: str) -> Callable[[], bool]:
    def ask() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(url, timeout=2, trust_env=False).status_code == 200
        return False

    return ask


def make_postgres(folder: Path) -> tuple[Part, str]:
    bin_ = postgres.programs()
    folder.mkdir(parents=True)
    data, port, become = folder / "data", free_port(), list[str]()
    data.mkdir(0o700)
    if os.geteuid() == 0:
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for path in (data, *(parent for parent in folder.parents if parent != Path("/"))):
            if path == data:
                subprocess.run(["chown", "postgres:postgres", str(data)], check=True)
            else:
                path.chmod(path.stat().st_mode | 0o011)
        folder.chmod(0o755)
    made = [bin_ / "initdb", "-D", data, "-U", "ci", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
    subprocess.run([*become, *map(str, made)], check=True, capture_output=True, cwd=folder)
    command = [*become, bin_ / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", ""]
    command += ["-c", "max_connections=200", "-c", "shared_buffers=128MB"]
    ready = [str(bin_ / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
    part = Part("postgresql", command, folder, lambda: subprocess.run(ready, check=False).returncode == 0)
    return part, f"postgresql://ci@127.0.0.1:{port}/postgres"


def make_seaweed(folder: Path) -> tuple[Part, str]:
    folder.mkdir(parents=True)
    command, env, endpoint = s3_server.seaweed_command(folder)
    return Part("seaweedfs", command, folder, answers(f"{endpoint}/healthz"), env), endpoint


def make_bridge(folder: Path) -> tuple[Part, str]:
    port = free_port()
    command = [sys.executable, "-m", "render_platform.bridge", "--folder", str(folder / "clickhouse"), "--port", port]
    part = Part(
        "bridge", command, folder, answers(f"http://127.0.0.1:{port}/ping"), {"BRIDGE_PASSWORD": BRIDGE_PASSWORD}
    )
    return part, f"http://bridge:{BRIDGE_PASSWORD}@127.0.0.1:{port}"


def make_gateway(name: str, state: Path, env: Mapping[str, str]) -> tuple[Part, str]:
    """A gateway with a device of its own, which takes four jobs at once."""
    port = free_port()
    backend = {"kind": "simulated", "capacity": 4, "device": f"GPU-{name}", "speed": 20.0}
    model = {"family": "llama", "modality": "text", "type": "llm", "tasks": ["chat"], "max_attempts": 9}
    lines = ["rate_per_s = 100000", "burst = 100000", "drain_s = 5", f"gateway_lease_s = {LEASE_S}"]
    lines += ["[backends.sim]", *(f"{key} = {json.dumps(value)}" for key, value in backend.items())]
    lines += ["[models.llama-8b]", *(f"{key} = {json.dumps(value)}" for key, value in model.items())]
    lines += ['backends = { sim = "llama-8b" }']
    state.mkdir(parents=True, exist_ok=True)
    config = state / "gateway.toml"
    config.write_text("\n".join(lines) + "\n")
    command = [
        sys.executable,
        "-m",
        "render_platform.cli",
        "serve",
        "--state",
        state,
        "--config",
        config,
        "--port",
        port,
    ]
    url = f"http://127.0.0.1:{port}"
    return Part(name, command, state, answers(f"{url}/ready"), env), url


def make_flusher(name: str, state: Path, env: Mapping[str, str]) -> Part:
    state.mkdir(parents=True, exist_ok=True)
    made: list[Part] = []

    def ready() -> bool:
        return made[0].log.read_text().count("ready\n") >= made[0].starts

    made.append(Part(name, [sys.executable, "-c", FLUSHER, str(state)], state, ready, env))
    return made[0]
