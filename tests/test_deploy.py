"""deploy/: one set of parts in three forms, which agree; settings, metrics, ports and sections that they name exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from render_platform import __version__
from render_platform.config import Settings, load_settings
from render_platform.errors import UsageError
from render_platform.events import STATUSES
from render_platform.gateway.catalogue import make_catalogue
from render_platform.gateway.limits import State
from render_platform.gateway.scheduling import LANES
from resources.local import DAGSTER_YAML
from tests.deployment import (
    CHECKOUT,
    CONTAINED,
    DEPLOY,
    HOME,
    KUBERNETES,
    PARTS,
    SYSTEMD,
    compose,
    dashboard,
    environment_file,
    grouped,
    load,
    pod,
    rules,
    selectors,
    service,
    shown,
    slug,
    unit,
)
from tests.gateway.http import CHAT, CHAT_PATH, occupied, running

SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""
SECRET = re.compile(r"password|secret|token|_key|dsn|smtp_url|alert_(webhook|slack)", re.IGNORECASE)
ENV_FILE = environment_file(DEPLOY / "render-platform.env")


def settings_of(environment: dict[str, str]) -> Settings:
    """What a part is told, with the file that is delivered; UsageError for a variable that is no setting."""
    told = {name: value for name, value in environment.items() if name != "RENDER_PLATFORM_CONFIG"}
    return load_settings(told, DEPLOY / "render-platform.toml")


def env_of(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"]}


def image_environment() -> dict[str, str]:
    """ENV of the Containerfile."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    return dict(word.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for word in line.split())


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(\d+)(s|m)", duration)
    assert match, duration
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


def command_in_words(part: str) -> list[str]:
    """ExecStart of a unit, without where it is installed."""
    words = service(part).one("Service", "ExecStart").split()
    assert words[0].startswith(f"{HOME}/.venv/bin/")
    return [Path(words[0]).name, *(word.replace("${RENDER_PLATFORM_DAGSTER_PORT}", "3000") for word in words[1:])]


# What all forms share.


def test_the_delivered_settings_are_settings_and_hold_no_secret() -> None:
    settings = settings_of({**ENV_FILE})
    assert str(settings.state_dir) == ENV_FILE["RENDER_PLATFORM_STATE_DIR"]
    assert ENV_FILE["DAGSTER_HOME"] == str(settings.dagster_home)
    assert make_catalogue(settings.catalogue).models
    assert not SECRET.search(" ".join([*ENV_FILE, *image_environment()]))


def test_the_example_of_a_catalogue_is_one(tmp_path: Path) -> None:
    _, _, example = (DEPLOY / "render-platform.toml").read_text().partition("of yours:\n#\n")
    (tmp_path / "example.toml").write_text(re.sub(r"^# ?", "", example, flags=re.MULTILINE))
    catalogue = make_catalogue(load_settings({}, tmp_path / "example.toml").catalogue)
    assert list(catalogue.models) == ["llama-8b"]


def test_the_example_of_secrets_names_settings() -> None:
    lines = re.findall(r"^(?:# )?([A-Z0-9_]+)=(.*)$", (DEPLOY / "secrets.env.example").read_text(), re.MULTILINE)
    assert len(lines) == 10
    told = {name: value for name, value in lines if name.startswith("RENDER_PLATFORM_")}
    assert settings_of(told).clickhouse_dsn.endswith("@clickhouse:8123")
    assert all(SECRET.search(name) or "PASSWORD@" in value for name, value in lines)


def test_dagster_gets_the_settings_that_up_gives_it() -> None:
    assert (DEPLOY / "dagster.yaml").read_text() == DAGSTER_YAML


def test_all_forms_start_the_same_commands() -> None:
    containers = {one["name"]: one["command"] for one in pod()["containers"]}
    assert list(containers) == list(CONTAINED)
    for part in CONTAINED:
        command = compose()["services"][part]["command"]
        assert [word.replace("0.0.0.0", "127.0.0.1") for word in command] == command_in_words(part) == containers[part]
    prepare = [pod()["initContainers"][0]["command"], compose()["services"]["prepare"]["command"]]
    assert prepare == [["deploy/prepare.sh"]] * 2
    assert service("prepare").one("Service", "ExecStart") == f"{HOME}/deploy/prepare.sh"


def test_a_gateway_has_longer_to_stop_than_it_drains() -> None:
    drain_s = settings_of({}).drain_s
    assert drain_s + 15 <= int(service("gateway").one("Service", "TimeoutStopSec"))
    assert drain_s + 15 <= seconds(compose()["services"]["gateway"]["stop_grace_period"])
    assert drain_s + 15 <= pod()["terminationGracePeriodSeconds"]


# systemd.


def test_a_service_is_confined_and_stops_in_order() -> None:
    assert unit(".target").words("Unit", "Wants") == {f"render-platform-{part}.service" for part in PARTS}
    for number, part in enumerate(PARTS):
        one = service(part)
        before = {f"render-platform-{former}.service" for former in ("prepare", *PARTS[: min(number, 2)])}
        assert before <= one.words("Unit", "After")
        assert one.one("Unit", "PartOf") == "render-platform.target"
        assert one.one("Service", "Restart") == ("always" if part in CONTAINED else "no")
        assert one.one("Service", "RestartPreventExitStatus") == "2"
        for key, value in (("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("KillSignal", "SIGTERM")):
            assert one.one("Service", key) == value
        state = f"/var/lib/{one.one('Service', 'StateDirectory')}/"
        assert ENV_FILE["RENDER_PLATFORM_STATE_DIR"].startswith(state)
        user = one.one("Service", "User")
        assert f"u {user} " in (SYSTEMD / "sysusers.conf").read_text()


def test_where_the_embedded_clickhouse_fails_all_parts_start_again() -> None:
    """While it is away another part may take its folder, and keep it: `up` ends all parts for the same reason."""
    [again] = service("clickhouse").all("Unit", "OnFailure")
    text = (SYSTEMD / again).read_text()
    assert "systemctl restart --no-block render-platform.target" in text
    assert not again.startswith("render-platform-"), "it is root's, and no part of what it stops"


@pytest.mark.parametrize(
    ("dsn", "code"), [("", 0), ("chdb:///elsewhere", 0), ("http://u:p@h:8123", 1), ("https://u:p@h:8443", 1)]
)
def test_the_embedded_clickhouse_is_left_out_where_a_server_is_named(dsn: str, code: int) -> None:
    line = service("clickhouse").one("Service", "ExecCondition").replace("${RENDER_PLATFORM_CLICKHOUSE_DSN}", dsn)
    assert subprocess.run(shlex.split(line), check=False).returncode == code


# Containers.


def test_the_image_runs_as_nobody_else_and_holds_what_is_pinned() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    [user] = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) == pod()["securityContext"]["runAsUser"] > 0
    assert "--require-hashes -r requirements.txt" in text
    copied = {word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()}
    assert all((CHECKOUT / name).exists() for name in copied)
    let_in = re.findall(r"^!(.*)$", (DEPLOY / "Containerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(let_in) == copied
    image = image_environment()
    assert image["PATH"].startswith(f"{HOME}/.venv/bin:")
    assert {name: image[name] for name in ("RENDER_PLATFORM_STATE_DIR", "DAGSTER_HOME")} == {
        name: ENV_FILE[name] for name in ("RENDER_PLATFORM_STATE_DIR", "DAGSTER_HOME")
    }


def test_compose_publishes_to_this_machine_only_and_mounts_what_there_is() -> None:
    found = compose()
    published = [port for one in found["services"].values() for port in one.get("ports", ())]
    assert published == ["127.0.0.1:8080:8080", "127.0.0.1:3000:3000"]
    for name, one in found["services"].items():
        assert "no-new-privileges:true" in one["security_opt"]
        assert one["env_file"] == ["secrets.env"]
        assert not SECRET.search(" ".join(one["environment"])), name
        for volume in one["volumes"]:
            source = volume.partition(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).exists(), volume
        if name != "clickhouse":
            assert one["read_only"]
            assert one["cap_drop"] == ["ALL"]
            settings = settings_of(one["environment"])
            assert (settings.gateway_port, settings.dagster_port) == (8080, 3000)
            assert (one["network_mode"] == "service:platform") if name != "platform" else "network_mode" not in one
    assert found["services"]["platform"]["healthcheck"]["test"] == ["CMD", "render-platform", "doctor"]
    assert "127.0.0.1:8080/ready" in str(found["services"]["gateway"]["healthcheck"]["test"])
    assert "secrets.env" in (CHECKOUT / ".gitignore").read_text()


def test_the_pod_is_one_and_its_parts_fit_together() -> None:
    stateful = load(KUBERNETES / "statefulset.yaml")
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    [claim] = stateful["spec"]["volumeClaimTemplates"]
    assert stateful["spec"]["replicas"] == 1
    assert stateful["spec"]["selector"]["matchLabels"] == labels
    known = {claim["metadata"]["name"], *(volume["name"] for volume in pod()["volumes"])}
    for one in (*pod()["initContainers"], *pod()["containers"]):
        assert one["image"] == f"render-platform:{__version__}"
        assert {mount["name"] for mount in one["volumeMounts"]} <= known
        assert one["securityContext"]["readOnlyRootFilesystem"]
        assert not one["securityContext"]["allowPrivilegeEscalation"]
        assert one["resources"]["limits"]["memory"]
        assert settings_of(env_of(one)).gateway_host == "0.0.0.0"
        assert not SECRET.search(" ".join(env_of(one)))
    for one in pod()["containers"]:
        ports = {port["name"]: port["containerPort"] for port in one.get("ports", ())}
        assert {"startupProbe", "livenessProbe"} <= one.keys()
        if one["name"] == "gateway":
            assert ports == {"gateway": settings_of(env_of(one)).gateway_port}
            assert one["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "gateway"}
            assert one["livenessProbe"]["httpGet"]["path"] == "/health"  # a backend that is down restarts nothing
    [port] = load(KUBERNETES / "service.yaml")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8080, "gateway")
    assert load(KUBERNETES / "service.yaml")["spec"]["selector"] == labels
    assert load(KUBERNETES / "network-policy.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    config = load(KUBERNETES / "config.yaml")
    assert config["data"]["render-platform.toml"] == (DEPLOY / "render-platform.toml").read_text()
    server = list(yaml.safe_load_all((KUBERNETES / "clickhouse.yaml").read_text()))
    assert server[0]["spec"]["selector"].items() <= server[1]["spec"]["template"]["metadata"]["labels"].items()
    assert pod()["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]


def test_what_kubernetes_would_say_of_the_service_is_kept_from_the_parts() -> None:
    """A service named render-platform gives its pods variables with the prefix of our settings."""
    with pytest.raises(UsageError, match="is not a setting"):
        settings_of({"RENDER_PLATFORM_SERVICE_HOST": "10.0.0.7"})
    assert pod()["enableServiceLinks"] is False
    assert pod()["automountServiceAccountToken"] is False


# Metrics.


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What a gateway that has worked gives: the name of each sample, with its labels."""
    with running(tmp_path_factory.mktemp("deploy") / "state") as at:
        client = at.client()
        assert client.post(CHAT_PATH, CHAT).status == 200
        with occupied(at):
            client.queue(model="solo")  # waits for the slot
            body = client.get("/metrics").body.decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from shown()
    yield from re.findall(r"label_values\((.*), ", json.dumps(dashboard()["templating"]))


def test_every_metric_and_label_is_one_that_the_gateway_gives(metrics: dict[str, set[str]]) -> None:
    recorded = {rule["record"]: grouped(rule["expr"]) for rule in rules() if "record" in rule}
    known = {**metrics, **recorded, "up": set()}
    values = {"status": {*STATUSES, "2xx", "5xx"}, "state": set(get_args(State)), "lane": set(LANES)}
    used = set()
    for expression in expressions():
        for selector in selectors(expression):
            assert selector.metric in known, f"{selector.metric} in {expression}"
            used.add(selector.metric)
            for label, kind, value in selector.matchers:
                assert label in known[selector.metric] | SCRAPED, f"{label} of {selector.metric}"
                if kind in ("=", "=~") and "$" not in value and label in values:
                    assert set(value.split("|")) <= values[label], f"{label} {value}"
        assert grouped(expression) <= {*SCRAPED, *set().union(*metrics.values())}, expression
    assert set(recorded) <= used, "a recorded rule that nothing reads"
    uncounted = {name for name in metrics if not name.endswith(("_sum", "_created"))} - used
    assert not uncounted, "a metric that nothing shows"


def test_every_alert_says_what_to_do() -> None:
    headings = re.findall(r"^#+ (.+)$", (CHECKOUT / "docs/runbook.md").read_text(), re.MULTILINE)
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 10
    for rule in alerts:
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor in {slug(heading) for heading in headings}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_prometheus_scrapes_the_gateway() -> None:
    [job] = load(DEPLOY / "prometheus/prometheus.yaml")["scrape_configs"]
    assert job["job_name"] in str(rules()[-1]) or any(f'job="{job["job_name"]}"' in one for one in expressions())
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{ENV_FILE['RENDER_PLATFORM_GATEWAY_PORT']}"]}]
    assert load(DEPLOY / "prometheus/prometheus.yaml")["rule_files"] == ["rules.yaml"]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    found = dashboard()
    assert found["schemaVersion"] >= 36
    assert len({panel["id"] for panel in found["panels"]}) == len({panel["title"] for panel in found["panels"]})
    variables = {one["name"]: one for one in found["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    cells: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) >= 1
        assert set(re.findall(r"\$\{?(\w+)", json.dumps(panel))) <= variables.keys()
        assert all("$instance" in target["expr"] for target in panel["targets"])
        at = panel["gridPos"]
        place = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not place & cells, f"{panel['title']} covers another"
        assert max(x for x, _ in place) < 24
        cells |= place
