"""The tools of others, installed once into RENDER_TEST_CACHE (see tests/gateway/servers.py) at pinned versions.

Where one cannot be had, its tests are skipped and the reason is printed. RENDER_TEST_SERVERS=no leaves all out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.servers import CannotInstall, environment, install

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("RENDER_TEST_CACHE") or Path.home() / ".cache/render-platform-tests")
GO_SOURCES = Path("/usr/share/gocode")
GO_PACKAGES = ("golang-go", "golang-golang-x-mod-dev")
SIGSTORE = (
    "@sigstore/verify@3.1.1",
    "@sigstore/core@3.2.1",
    "@sigstore/bundle@4.0.0",
    "@sigstore/protobuf-specs@0.5.2",
)
DSSE = ("securesystemslib==1.6.0", "cryptography==50.0.2")
RUN_S = 60


@dataclass(frozen=True)
class Verdict:
    """What a verifier said: whether it accepted, and its words."""

    accepted: bool
    said: str


def ask(command: Sequence[str], request: Any) -> Verdict:
    """Run a verifier that reads a JSON request; one that neither accepts nor refuses is a broken test."""
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode in (0, 1), done.stderr
    return Verdict(done.returncode == 0, done.stdout if done.returncode == 0 else done.stderr)


def installed(make: Callable[[], list[str]]) -> list[str]:
    """The command that `make` gives; its tests are skipped where it raises CannotInstall."""
    if os.environ.get("RENDER_TEST_SERVERS") == "no":
        pytest.skip("OTHERS' TOOLS NOT RUN: RENDER_TEST_SERVERS=no")
    try:
        return make()
    except CannotInstall as error:
        pytest.skip(f"OTHERS' TOOLS NOT RUN: {error}")


def go_program() -> list[str]:
    """The Go verifier, built from Debian's packages of Go and of its module library."""
    source = HERE / "sumdb.go"
    program = CACHE / f"sumdb-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    with _locked("go"):
        if not program.exists():
            _install_debian(GO_PACKAGES, GO_SOURCES / "src/golang.org/x/mod/sumdb/tlog/tlog.go")
            scratch = program.with_suffix(".new")
            settings = ["GO111MODULE=off", "GOFLAGS=", "GOPROXY=off", "CGO_ENABLED=0"]
            places = [f"GOPATH={GO_SOURCES}", f"GOCACHE={CACHE / 'go-build'}"]
            install(["env", *settings, *places, "go", "build", "-o", str(scratch), str(source)])
            scratch.rename(program)
    return [str(program)]


def sigstore_program() -> list[str]:
    """sigstore's own verifier on Node.js, without the install scripts of any package."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise CannotInstall("Node.js is not installed")
    home = CACHE / SIGSTORE[0].replace("/", "-").removeprefix("@")
    with _locked("sigstore"):
        if not (home / "ready").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
            install(["npm", "install", "--prefix", str(home), *quiet, *SIGSTORE])
            (home / "ready").touch()
    return ["node", str(HERE / "sigstore.cjs"), str(home / "node_modules/@sigstore/verify/dist/tlog/index.js")]


def dsse_program() -> list[str]:
    """securesystemslib, in an environment of its own."""
    return [str(environment("securesystemslib", DSSE) / "bin/python"), "-I", str(HERE / "dsse_verifier.py")]


def _install_debian(packages: Sequence[str], wanted: Path) -> None:
    if shutil.which("go") and wanted.exists():
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise CannotInstall(f"`apt-get install {' '.join(packages)}` needs Debian and root")
    options = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300"]
    install([*options, "update"])
    install([*options, "--no-install-recommends", "install", *packages])
    if not (shutil.which("go") and wanted.exists()):
        raise CannotInstall(f"{wanted} is not in Debian's packages {' '.join(packages)}")


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Two test processes never install the same thing at once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
