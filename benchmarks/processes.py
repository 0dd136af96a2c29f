"""Servers under test: each in a process group of its own, on a free loopback port, ended by its id."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render_platform.errors import Unavailable

STOP_S = 30
TAIL_CHARACTERS = 600
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A started server; `log` holds what it printed."""

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def require_running(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise Unavailable(f"{self.name} ended with {code}: {tail(self.log)}", f"its log was {self.log}")

    def cpu_us(self) -> int:
        """CPU time of all processes of its group so far, user and system, in µs (in steps of 10 ms)."""
        return sum(_cpu_us(path, self.process.pid) for path in Path("/proc").glob("[0-9]*/stat"))


def _cpu_us(stat: Path, group: int) -> int:
    try:
        fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
    except OSError:  # that process has just ended
        return 0
    return (int(fields[11]) + int(fields[12])) * TICK_US if int(fields[2]) == group else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> str:
    """The end of a log, on one line."""
    return " ".join(log.read_text(errors="replace")[-TAIL_CHARACTERS:].split()) or "it printed nothing"


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without proxies, which would see loopback traffic, and without platform settings."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return {**{k: v for k, v in kept.items() if not k.startswith("RENDER_PLATFORM_")}, "NO_PROXY": "*", **more}


@contextmanager
def running(
    name: str, arguments: Sequence[str], port: int, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server for as long as the block lasts: SIGTERM at its end, SIGKILL after STOP_S. It may not be ready yet."""
    log = folder / f"{name.split()[0].lower()}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (our own list of arguments, no shell)
            list(arguments),
            env=clean_environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(name, port, log, process)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process.pid, signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        _signal_group(process.pid, signal.SIGKILL)  # also the children that a server left behind
        process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, number)


def run_tool(
    arguments: Sequence[str], timeout_s: int, env: Mapping[str, str] | None = None, good: tuple[int, ...] = (0,)
) -> str:
    """What a command printed to stdout; Unavailable with the end of what it said where it is missing or fails.

    `env` replaces the environment; None: this process's own. `good` are the exit codes that are no failure.
    """
    shown = " ".join(arguments[:4])
    try:
        done = subprocess.run(  # noqa: S603 (our own list of arguments, no shell)
            list(arguments), env=env, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise Unavailable(f"{arguments[0]} is not installed", "install it, or leave its subject out") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{shown} …` did not end within {timeout_s} s", "try again") from None
    if done.returncode not in good:
        said = " ".join((done.stderr or done.stdout)[-TAIL_CHARACTERS:].split())
        raise Unavailable(f"`{shown} …` failed with {done.returncode}: {said}", "run it by hand to see all of it")
    return done.stdout


def run_apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives, in a process of its own: its peak memory and what it opens are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
