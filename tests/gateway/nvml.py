"""A driver for tests: `nvml_shim.c`, compiled here, under the unmodified pynvml and nvtx, in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

_CHECKOUT = Path(__file__).parents[2]
_SOURCE = Path(__file__).with_name("nvml_shim.c")
_LIBRARY = "libnvidia-ml.so.1"
_PRELUDE = """
import json, os, pathlib
from render_platform.gateway.meters import open_meter, nvtx_range
def readings(**values):
    pathlib.Path(os.environ["NVML_SHIM"]).write_text("".join(f"{name} {value}\\n" for name, value in values.items()))
def say(*values):
    print(json.dumps(values))
"""


@functools.cache
def shim(*flags: str) -> Path:
    """The folder of the compiled shim; skips the test where it cannot be compiled."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("NVML NOT TESTED: gcc is not installed, the shim cannot be compiled")
    folder = Path(tempfile.mkdtemp(prefix="render-platform-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", str(folder / _LIBRARY), str(_SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def broken_library(folder: Path) -> Path:
    """A folder whose driver library cannot be loaded, whatever the machine has."""
    (folder / _LIBRARY).write_text("no library")
    return folder


def said_by(script: str, library: Path, scratch: Path, *, traced: bool = False) -> list[Any]:
    """What `script` says, call by call, in a process that finds the driver in the folder `library`.

    The script has `open_meter`, `nvtx_range`, `readings(name=value, …)`, which sets what the shim reads from then on
    (see nvml_shim.c), and `say`. `traced`: the shim is attached as an NVTX tool, and writes to `scratch`/ranges.
    """
    environment = {
        "LD_LIBRARY_PATH": str(library),
        "NVML_SHIM": str(scratch / "readings"),
        "NVTX_SHIM": str(scratch / "ranges"),
    }
    if traced:
        environment["NVTX_INJECTION64_PATH"] = str(library / _LIBRARY)
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script],
        env={**os.environ, **environment},
        cwd=_CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
