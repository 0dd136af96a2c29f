"""What the browser looks at: `up` over a state folder that has a history, on free ports, ended by its process id."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.commands import CHECKOUT, PROGRAM, clean_environment, run_command
from tests.gateway.servers import free_port

DAY = "2024-01-15"
HOURS = ("09:00", "10:00")
"""What the demo's trace is of."""
READY = "a sample job a second"
READY_S, STOP_S = 120, 30
TAIL_BYTES = 2_000


@dataclass(frozen=True)
class Program:
    """Where the parts answer, without a slash at the end, and the state folder that they share."""

    dagster: str
    gateway: str
    state: Path

    def logs(self) -> str:
        """The end of what each part said, and of what `up` itself said."""
        files = [self.state.with_suffix(".log"), *sorted((self.state / "logs").glob("*.log"))]
        return "\n".join(f"--- {file}\n{tail(file)}" for file in files if file.exists())


def tail(file: Path) -> str:
    return file.read_bytes()[-TAIL_BYTES:].decode(errors="replace")


@contextmanager
def running_up(state: Path) -> Iterator[Program]:
    """Replay the demo's trace into a new folder, then start everything over it."""
    outcome = run_command("demo", "--state", state, "--json")
    assert outcome.code == 0, outcome.said
    dagster_port, gateway_port = free_port(), free_port()
    log = state.with_suffix(".log")
    up = [*PROGRAM, "up", "--state", str(state), "--port", str(dagster_port), "--gateway-port", str(gateway_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            up, cwd=CHECKOUT, env=clean_environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_ready(process, log)
        yield Program(f"http://127.0.0.1:{dagster_port}", f"http://127.0.0.1:{gateway_port}", state)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # its guard ends its children
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `up` has said that its last part works."""
    until = time.monotonic() + READY_S
    while READY not in log.read_text(errors="replace"):
        assert process.poll() is None, f"`up` ended:\n{tail(log)}"
        assert time.monotonic() < until, f"`up` was not ready after {READY_S} s:\n{tail(log)}"
        time.sleep(0.2)
