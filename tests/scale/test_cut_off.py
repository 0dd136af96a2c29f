"""PostgreSQL, S3 and ClickHouse behind proxies that delay, break off, cut and swallow, and each server killed behind
its proxy, while a gateway takes jobs and a flusher flushes. After each, all goes on within RECOVERY_S without a hand.

The bounds of SHORT stand for the real ones of docs/limits.md, so that a black hole is noticed in seconds.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from render_platform.config import load_settings
from render_platform.database import checkpoints, jobs, usage_events
from render_platform.note import load_or_create_key
from render_platform.pipeline import open_platform
from tests.conformance import s3_server
from tests.gateway.servers import CannotInstall
from tests.gateway.test_several_gateways import check_numbers
from tests.proxy import Proxy
from tests.scale.parts import Part, make_bridge, make_flusher, make_gateway, make_postgres, make_seaweed
from tests.scale.test_scale import Whole, check_books, check_log, rows, wait_for_ends, watch
from tests.scale.traffic import Told, drive

pytestmark = pytest.mark.skipif(
    not os.environ.get("RENDER_TEST_SCALE"), reason="CUTS OF THE NETWORK ARE NOT TESTED: run `make test-scale`"
)
RECOVERY_S = 60.0
SHORT = """
import faulthandler, signal
from render_platform import clickhouse_connection, database, s3
database.CONNECT_S, database.ANSWER_S, clickhouse_connection.ANSWER_S = 2, 3, 3
s3.Limits.__init__.__defaults__ = (2, 3, 6, 3)
faulthandler.register(signal.SIGUSR1)
"""


class Load:
    """Ten requests a second, as clients send them who go on until they are answered."""

    def __init__(self, url: str) -> None:
        self.told = Told()
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), f"a client still waits: {self.told.statuses}"

    def _run(self) -> None:
        seed = 0
        while not self._over.is_set():
            seed += 1
            asyncio.run(drive([self._url], 10, 1.0, seed, self.told))


def through(url: str, proxy: Proxy) -> str:
    return url.replace(f":{urlsplit(url).port}", f":{proxy.port}")


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Whole, dict[str, Proxy]]]:
    """The parts, and the proxy before each server."""
    s3_server.use_credentials(monkeypatch)
    try:
        store, endpoint = make_seaweed(tmp_path / "s3")
    except CannotInstall as error:
        pytest.skip(f"S3 NOT CUT OFF: SeaweedFS cannot be installed here: {error}")
    database, url = make_postgres(tmp_path / "pg")
    bridge, dsn = make_bridge(tmp_path / "ch")
    (tmp_path / "short").mkdir()
    (tmp_path / "short/sitecustomize.py").write_text(SHORT)
    servers = [(database, url), (store, endpoint), (bridge, dsn)]
    with ExitStack() as stack:
        proxies = {part.name: stack.enter_context(Proxy(urlsplit(at).port or 0)) for part, at in servers}
        for part, _ in servers:
            stack.callback(part.signal, signal.SIGKILL)
            part.start()
        s3_server.client(endpoint).create_bucket(Bucket="versioned")
        at = {part.name: through(at, proxies[part.name]) for part, at in servers}
        names = {"DATABASE_URL": at["postgresql"], "OBJECTS_URL": "s3://versioned/platform"}
        names |= {"OBJECTS_ENDPOINT": at["seaweedfs"], "CLICKHOUSE_DSN": at["bridge"]}
        env = {f"RENDER_PLATFORM_{name}": value for name, value in names.items()}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        settings = load_settings(state_dir=tmp_path / "control")
        with open_platform(settings) as platform:  # the log begins, and its keys are made
            platform.flush()
        load_or_create_key(settings.keys_dir / "gateway.key", "example.com/gateways")
        for name in ("g0", "f0"):
            shutil.copytree(settings.keys_dir, tmp_path / name / "keys")
        env |= {"PYTHONPATH": str(tmp_path / "short")}
        gateway, address = make_gateway("g0", tmp_path / "g0", env)
        parts = {part.name: part for part, _ in servers}
        parts |= {"g0": gateway, "f0": make_flusher("f0", tmp_path / "f0", env)}
        for name in ("g0", "f0"):
            stack.callback(parts[name].signal, signal.SIGKILL)
            parts[name].start()
        yield Whole(parts, [address], settings), proxies


Fault = tuple[str, float, Callable[[Part, Proxy], object], Callable[[Part, Proxy], object]]
FAULTS: list[Fault] = [
    ("delayed by 40 ms a piece", 1, lambda _, proxy: proxy.delay(40), lambda _, proxy: proxy.heal()),
    ("broken off after 300 bytes", 1, lambda _, proxy: proxy.cut_after(300), lambda _, proxy: proxy.heal()),
    ("cut", 1, lambda _, proxy: proxy.cut(), lambda _, proxy: proxy.heal()),
    ("swallowed", 3.5, lambda _, proxy: proxy.blackhole(), lambda _, proxy: proxy.heal()),
    ("killed", 1, lambda part, _: part.kill(), lambda part, _: part.start()),
]
"""What, for how many seconds, how, and how it is healed."""


def stacks(whole: Whole) -> str:
    """Where the gateway and the flusher stand, for whoever looks into it."""
    parts = [whole.parts[name] for name in ("g0", "f0")]
    for part in parts:
        part.process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    return "\n".join(part.log.read_text(errors="replace")[-4_000:] for part in parts)


def goes_on(whole: Whole, load: Load, where: str) -> float:
    """How long it took until jobs are taken, ended and published that came after the healing."""
    begun = time.monotonic()
    size = sa.select(sa.func.coalesce(sa.func.max(checkpoints.c.size), 0))
    taken, before = len(load.told.accepted), int(rows(whole, size)[0][0])
    while True:
        for name in ("g0", "f0"):
            whole.parts[name].look_after()
        after = int(rows(whole, size)[0][0])
        if len(load.told.accepted) >= taken + 5 and after >= before + 2:
            return time.monotonic() - begun
        if time.monotonic() > begun + RECOVERY_S:
            raise AssertionError(
                f"{where}: {len(load.told.accepted) - taken} taken, {after - before} published\n{stacks(whole)}"
            )
        time.sleep(0.2)


def test_each_server_is_cut_off_under_load(cut_off: tuple[Whole, dict[str, Proxy]], tmp_path: Path) -> None:
    whole, proxies = cut_off
    over, begun = threading.Event(), time.monotonic()
    watching = watch(whole, over)
    with Load(whole.urls[0]) as load:
        for name, proxy in proxies.items():
            for fault, for_s, harm, heal in FAULTS:
                harm(whole.parts[name], proxy)
                time.sleep(for_s)
                heal(whole.parts[name], proxy)
                took_s = goes_on(whole, load, f"{name} {fault}")
                print(f"{time.monotonic() - begun:6.1f} s  {name} {fault}: {took_s:.1f} s", flush=True)
    wait_for_ends(whole)
    over.set()
    watching.join()
    whole.parts["g0"].stop()
    whole.parts["f0"].kill()
    check_jobs(whole, load.told)
    print(f"{load.told.statuses}\n{check_books(whole, lossy=False)}")
    check_log(whole, tmp_path / "copy")


def check_jobs(whole: Whole, told: Told) -> None:
    """What was accepted has ended well, once, with one event; and each key stands for one job."""
    found = {str(uuid.UUID(bytes=row.job_id)): row.state for row in rows(whole, sa.select(jobs))}
    billed = Counter(str(uuid.UUID(bytes=row.job_id)) for row in rows(whole, sa.select(usage_events.c.job_id)))
    assert len(told.accepted) > 50
    assert {found.get(job) for job in {*told.accepted, *told.answered}} == {"success"}
    assert billed == dict.fromkeys(found, 1)
    assert all(len(stood_for) == 1 for stood_for in told.keys.values())
    check_numbers(whole.settings.database)
