"""The machine and the versions that figures were measured with: without them a figure says nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from benchmarks.processes import run_tool
from render_platform import __version__
from render_platform.errors import Unavailable

TOOL_S = 30
CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("uvicorn", "uvloop", "httptools", "litestar", "msgspec", "sqlalchemy")


def describe_machine(state: Path) -> dict[str, str]:
    """CPU, cores that this process may use, memory, kernel, the file system under `state`, and the load found."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{pages / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "file system of the state": run_tool(["stat", "-f", "-c", "%T", str(state)], TOOL_S).strip(),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def collect_versions(peers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of this checkout, Python, the load generator, the packages that serve, and the peers given."""
    return {
        "render-platform": own_version(),
        "Python": platform.python_version(),
        "wrk": wrk_version(),
        **({"Node.js": run_tool(["node", "--version"], TOOL_S).strip()} if shutil.which("node") else {}),
        **{name: version(name) for name in PACKAGES},
        **dict(peers),
    }


def wrk_version() -> str:
    """Unavailable where wrk is not installed."""
    said = run_tool(["wrk", "--version"], TOOL_S, good=(0, 1))
    found = re.match(r"wrk (\S+)", said)
    if not found:
        raise Unavailable("wrk does not say its version", "install wrk: `apt-get install wrk`")
    return found[1]


def own_version() -> str:
    """The project's version, with its commit where this is a checkout."""
    try:
        commit = run_tool(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], TOOL_S).strip()
    except Unavailable:  # not a git checkout
        return __version__
    return f"{__version__} ({commit})"


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()
