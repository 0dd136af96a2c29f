"""Real inference servers on free loopback ports: Triton with a Python model, llama.cpp with random weights.

Each has an environment of its own below RENDER_TEST_CACHE (default: ~/.cache/render-platform-tests), installed once
under a lock, and is started once a test process, for all tests. Where one cannot be installed, its tests are skipped
with the reason. RENDER_TEST_SERVERS=no leaves them out. A server is ended by its process group.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from tests.gateway import server_programs as programs

TRITON = ("nvidia-pytriton==0.7.0",)
LLAMA = ("xllamacpp==2026.10.11549", "gguf==0.19.0")
INSTALL_S = 900
READY_S = 60

P = ParamSpec("P")
S = TypeVar("S")


class CannotInstall(Exception):
    """A server that is not to be had here, and why."""


def on_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an asynchronous test on a loop of its own, for at most two minutes."""

    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await test(*arguments, **named)

        asyncio.run(bounded())

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(name: str, requirements: Sequence[str]) -> Path:
    """A virtual environment with `requirements`, made on first use; CannotInstall says why there is none."""
    cache = Path(os.environ.get("RENDER_TEST_CACHE") or Path.home() / ".cache/render-platform-tests")
    version = requirements[0].rpartition("=")[2]
    folder = cache / f"{name}-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            install([sys.executable, "-m", "venv", str(folder)])
            install([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *requirements])
            (folder / "ready").touch()
    return folder


def install(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(f"{command[-1]}: {error}") from error
    if done.returncode:
        raise CannotInstall(f"{command[-1]}: {done.stderr.strip()[-300:]}")


@contextlib.contextmanager
def running(command: Sequence[str], env: dict[str, str], log: Path, ready_url: str) -> Iterator[None]:
    """A server, from when it answers at `ready_url`, to the end of its process group."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(ready_url, process, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        assert process.poll() is None, f"the server ended: {log.read_text(errors='replace')[-2000:]}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready in {READY_S} s: {log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True)
class TritonServer:
    """Triton on the CPU. `batched` is `model` with dynamic batches of up to eight, which compute together."""

    url: str
    spans_port: int
    """Where it posts its spans: give it to the one backend that shall receive them; 0: it does not trace."""
    model: str = "work"
    batched: str = "work_batched"
    inputs: dict[str, str] = field(default_factory=lambda: {"prompt": "BYTES", "values": "INT64", "sleep_ms": "INT32"})
    """Answers `total` (the sum of `values`) and `echo` (the prompt) after `sleep_ms`; negative ones fail."""


@contextlib.contextmanager
def start_triton(folder: Path, traced: bool = True) -> Iterator[TritonServer]:
    """A Triton whose files are in `folder`."""
    home = environment("triton", TRITON)
    packages = home / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    server = packages / "pytriton/tritonserver"
    shutil.copytree(server / "backends/python", folder / "backends/python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for stub in (server / "python_backend_stubs" / version).iterdir():
        shutil.copy2(stub, folder / "backends/python")
    for model, config in (("work", programs.TRITON_CONFIG), ("work_batched", programs.TRITON_BATCHED_CONFIG)):
        (folder / "models" / model / "1").mkdir(parents=True)
        (folder / "models" / model / "1/model.py").write_text(programs.TRITON_MODEL)
        (folder / "models" / model / "config.pbtxt").write_text(config)
    port, spans_port = free_port(), free_port() if traced else 0
    command = [
        str(server / "bin/tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    settings = [
        "mode=opentelemetry",
        "rate=1",
        "level=TIMESTAMPS",
        f"opentelemetry,url=http://127.0.0.1:{spans_port}/v1/traces",
        "opentelemetry,bsp_schedule_delay=2",
    ]
    if traced:
        command += [f"--trace-config={setting}" for setting in settings]
    env = {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{packages / 'nvidia_pytriton.libs'}",
        "PYTHONPATH": str(packages),
    }
    url = f"http://127.0.0.1:{port}"
    with running(command, env, folder / "triton.log", f"{url}/v2/health/ready"):
        yield TritonServer(url, spans_port)


@dataclass(frozen=True)
class LlamaServer:
    """llama.cpp's server with a model of random weights: gibberish, but real usage, timings and streams."""

    url: str
    model: str = "tiny"
    slots: int = 4

    def busy_slots(self) -> int:
        """How many requests it works on now."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/slots", timeout=5) as answer:
            return int(answer.read().count(b'"is_processing":true'))


@contextlib.contextmanager
def start_llama(folder: Path) -> Iterator[LlamaServer]:
    home = environment("llama", LLAMA)
    port = free_port()
    program = folder / "llama_server.py"
    program.write_text(programs.LLAMA_SERVER)
    command = [str(home / "bin/python"), str(program), str(folder / "tiny.gguf"), str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, {"PATH": os.environ["PATH"]}, folder / "llama.log", f"{url}/health"):
        yield LlamaServer(f"{url}/v1")


_started = contextlib.ExitStack()
atexit.register(_started.close)


def started(start: Callable[[Path], contextlib.AbstractContextManager[S]]) -> S:
    """A server that runs until this process ends; its test is skipped where there is none."""
    if os.environ.get("RENDER_TEST_SERVERS") == "no":
        pytest.skip("REAL SERVER NOT RUN: RENDER_TEST_SERVERS=no")
    folder = Path(_started.enter_context(tempfile.TemporaryDirectory(prefix="render-platform-server-")))
    try:
        return _started.enter_context(start(folder))
    except CannotInstall as error:
        pytest.skip(f"REAL SERVER NOT RUN: it cannot be installed here: {error}")


@functools.cache
def _triton() -> TritonServer:
    return started(start_triton)


@functools.cache
def _llama() -> LlamaServer:
    return started(start_llama)


@pytest.fixture(scope="session")
def triton_server() -> TritonServer:
    return _triton()


@pytest.fixture(scope="session")
def llama_server() -> LlamaServer:
    return _llama()
