"""The page at `/` and what it shows: figures that equal SQL's, a job through every stage, unknown that is not zero."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from render_platform.clock import HOUR_US, iso
from render_platform.gateway import page as module
from render_platform.gateway.page import KEPT_S
from render_platform.hours import mark_reported
from tests.chdb_server import dsn_of, fresh_database
from tests.factories import START_US
from tests.gateway.http import CHAT, CHAT_PATH, Client, Running, eventually, occupied, running
from tests.gateway.processes import NOWHERE
from tests.gateway.test_access import new_key, plain
from tests.gateway.test_evidence_routes import flush, platform_of

STAGES = ["accepted", "queued", "running", "finished", "fast_path", "sealed", "stored", "logged", "published"]
DIGEST = re.compile(r"[0-9a-f]{64}")


@contextmanager
def with_clickhouse(state: Path) -> Iterator[Running]:
    """A gateway whose ClickHouse is another process."""
    with running(state, clickhouse_dsn=dsn_of("bridge"), clickhouse_database=fresh_database()) as at:
        yield at


def fresh(client: Client, path: str = "/overview") -> Any:
    """What is read now, and not what was kept: a second and a half later at the most."""
    time.sleep(KEPT_S + 0.1)
    reply = client.get(path)
    assert reply.status == 200, reply
    return reply.json


def states(path: dict[str, Any]) -> dict[str, str]:
    assert [stage["name"] for stage in path["stages"]] == STAGES
    return {stage["name"]: stage["state"] for stage in path["stages"]}


# Figures.


def test_the_figures_are_those_of_sql_over_two_starts(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state, clickhouse_dsn=NOWHERE) as at:
        client = at.client()
        for _ in range(3):
            client.ended(client.queue()["id"])
        client.post(CHAT_PATH, {**CHAT, "do": "fail"})
        flush(state)
    with running(state, clickhouse_dsn=NOWHERE) as at:
        client = at.client()
        client.ended(client.queue()["id"])
        first = fresh(client)
        client.post(CHAT_PATH, {**CHAT, "do": "fail"})
        with occupied(at):
            waiting = client.queue(model="solo")["id"]
            told = fresh(client)
            by_state = Counter(dict(at.sql("SELECT state, count(*) FROM jobs GROUP BY state")))
            jobs, events = told["jobs"], told["events"]
            assert (jobs["queued"], jobs["running"]) == (by_state["queued"], by_state["running"]) == (1, 1)
            assert jobs["accepted"] == sum(by_state.values()) == first["jobs"]["accepted"] + 3
            assert jobs["finished"] == by_state["success"] + by_state["error"] == 6
            assert jobs["ended"] == {"success": 1, "error": 1}, "of this start alone"
            [[unsealed]] = at.sql("SELECT count(*) FROM usage_events WHERE batch_id IS NULL")
            [[sealed]] = at.sql("SELECT count(*) FROM usage_events WHERE batch_id IS NOT NULL")
            assert (events["outbox"], events["sealed"], events["published"]) == (unsealed, sealed, sealed) == (2, 4, 4)
            [[newest]] = at.sql("SELECT max(job_id) FROM jobs")
            assert told["last_job"] == str(uuid.UUID(bytes=newest)) == waiting
            queue = {one["model"]: one for one in told["queue"]}
            assert (queue["solo"]["waiting"]["normal"], queue["solo"]["running"]) == (1, 1)
            assert {one["name"]: (one["breaker"], one["running"]) for one in told["backends"]} == {
                "wide": ("closed", 0),
                "narrow": ("closed", 1),
            }
        client.ended(waiting)
        for _ in range(2):  # what is published is added up from read to read
            flush(state)
            [[sealed]] = at.sql("SELECT sum(records) FROM batches WHERE type = 'usage_batch'")
            [[size]] = at.sql("SELECT size FROM log_head")
            told = fresh(client)["events"]
            assert (told["outbox"], told["sealed"], told["published"]) == (0, sealed, sealed)
            assert told["log_size"] == size
            client.post(CHAT_PATH, CHAT)


def test_the_last_verdict_and_the_hours_by_status(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state, clickhouse_dsn=NOWHERE) as at, platform_of(state) as platform:
        assert at.client().get("/overview").json["verdicts"] == {"last": None, "hours": {}}
        verdicts = ["reconciled", "discrepant", "reconciled"]
        with platform.database.write() as connection:
            for number, status in enumerate(verdicts):
                mark_reported(connection, START_US + number * HOUR_US, number + 1, f"{number:064x}", status, 0)
        told = fresh(at.client())["verdicts"]
        assert told["hours"] == {"reconciled": 2, "discrepant": 1}
        last = {"hour": iso(START_US + 2 * HOUR_US), "status": "reconciled", "revision": 3, "digest": f"{2:064x}"}
        assert told["last"] == {**last, "out_of_date": False}


def test_the_fast_path_is_counted_and_read_back(tmp_path: Path) -> None:
    with with_clickhouse(tmp_path / "state") as at:
        client = at.client()
        before = time.time_ns() // 1_000 // HOUR_US
        client.ended(client.queue()["id"])
        eventually(lambda: at.gateway.publisher.delivered)
        told = fresh(client)["fast_path"]
        assert {**told, "rows_this_hour": None} == {
            "written": 1,
            "dropped": 0,
            "waiting": 0,
            "last_error": "",
            "rows_this_hour": None,
        }
        assert told["rows_this_hour"] == 1 or time.time_ns() // 1_000 // HOUR_US > before


# A job's path.


def test_a_job_through_every_stage(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with with_clickhouse(state) as at, platform_of(state) as platform:
        client = at.client()
        with occupied(at) as held:
            waiting = client.queue(model="solo")["id"]
            running_now, queued = (fresh(client, f"/overview/jobs/{job}") for job in (held, waiting))
            assert [*states(running_now).values()] == ["done"] * 3 + ["waiting"] * 6
            assert [*states(queued).values()] == ["done"] * 2 + ["waiting"] * 7
            assert queued["stages"][1]["detail"] == "0 before it"
        client.ended(waiting)
        path = f"/overview/jobs/{waiting}"
        eventually(lambda: states(client.get(path).json)["fast_path"] == "done")
        reached = 5
        for step in (platform.seal, platform.store, platform.log_batches):
            assert [*states(fresh(client, path)).values()] == ["done"] * reached + ["waiting"] * (9 - reached)
            assert client.get(path).json["receipt"] is None
            step()
            reached += 1
        told = fresh(client, path)
        assert set(states(told).values()) == {"done"}
        assert told["receipt"] == f"/jobs/{waiting}/receipt"
        assert client.get(told["receipt"]).status == 200
        assert told["log_keys"] == [platform.log_signer.verifier.vkey]
        check_path(at, told)


def check_path(at: Running, told: dict[str, Any]) -> None:
    """Ids, digests and times of a published job, against SQL and the files."""
    stages = {stage["name"]: stage for stage in told["stages"]}
    columns = "j.seq, j.accepted_us, j.finished_us, e.event_id, e.gpu_time_ns, e.customer_ref, b.batch_id"
    columns += ", b.merkle_root, b.blob_digest, b.log_index, l.entry"
    query = f"""SELECT {columns} FROM jobs j JOIN usage_events e ON e.job_id = j.job_id
        JOIN batches b ON b.batch_id = e.batch_id JOIN log_entries l ON l.log_index = b.log_index WHERE j.job_id = ?"""
    row = dict(zip(re.findall(r"\.(\w+)", columns), *at.sql(query, uuid.UUID(told["job_id"]).bytes), strict=True))
    assert stages["accepted"]["detail"].startswith(f"number {row['seq']} of epoch 1 ")
    assert stages["accepted"]["at_us"] == row["accepted_us"]
    assert (stages["finished"]["at_us"], stages["finished"]["id"]) == (
        row["finished_us"],
        str(uuid.UUID(bytes=row["event_id"])),
    )
    assert told["gpu_seconds"] == f"{row['gpu_time_ns'] / 10**9:.9f}"
    assert (stages["sealed"]["id"], stages["sealed"]["digest"]) == (row["batch_id"], row["merkle_root"])
    assert stages["stored"]["digest"] == row["blob_digest"]
    assert stages["logged"]["id"] == f"entry {row['log_index']}"
    assert stages["logged"]["digest"] == hashlib.sha256(row["entry"]).hexdigest()
    [[size, root]] = at.sql("SELECT size, root FROM checkpoints WHERE size > ? ORDER BY size", row["log_index"])
    assert (stages["published"]["id"], stages["published"]["digest"]) == (f"size {size}", root.hex())
    times = [stages[name]["at_us"] for name in STAGES if name not in ("fast_path", "sealed")]
    assert times == sorted(times)
    assert stages["sealed"]["at_us"] >= row["finished_us"]
    assert told["customer"] == f"{row['customer_ref'][:8]}…"
    assert row["customer_ref"] not in json.dumps(told)


def test_a_job_that_never_ran_skips_that_stage(tmp_path: Path) -> None:
    with running(tmp_path / "state", clickhouse_dsn=NOWHERE) as at:
        client = at.client()
        with occupied(at):
            job = client.queue(model="solo")["id"]
            assert client.ask("DELETE", f"/jobs/{job}").json["state"] == "cancelled"
            told = client.get(f"/overview/jobs/{job}").json
            assert (told["status"], states(told)["running"], states(told)["finished"]) == (
                "cancelled",
                "skipped",
                "done",
            )


# Unknown is not zero.


def test_without_clickhouse_its_figures_are_unknown(tmp_path: Path) -> None:
    with running(tmp_path / "state", clickhouse_dsn=NOWHERE) as at:
        client = at.client()
        job = client.queue()["id"]
        client.ended(job)
        assert fresh(client)["fast_path"]["rows_this_hour"] is None
        assert states(fresh(client, f"/overview/jobs/{job}"))["fast_path"] == "unknown"


def test_a_clickhouse_that_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        dsn = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with running(tmp_path / "state", clickhouse_dsn=dsn) as at:
            for _ in range(2):
                begun = time.monotonic()
                assert fresh(at.client())["fast_path"]["rows_this_hour"] is None
                assert time.monotonic() - begun < KEPT_S + module.PATIENCE_S + 2
            silent.close()


def test_to_look_does_not_take_the_embedded_folder(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state) as at:
        assert fresh(at.client())["fast_path"]["rows_this_hour"] is None
        assert not (state / "clickhouse").exists()
        assert not (state / "clickhouse.lock").exists()


# Who may.


def test_rights(tmp_path: Path) -> None:
    state = tmp_path / "state"
    names = {"alice": "customer", "bob": "customer", "rack": "meter", "Audits": "auditor", "ops": "operator"}
    with running(state, clickhouse_dsn=NOWHERE) as at:
        keys = {name: new_key(at, name, role) for name, role in names.items()}
    with running(state, clickhouse_dsn=NOWHERE) as at:
        who = {name: at.client(key) for name, key in keys.items()} | {"nobody": at.client()}
        job, other = who["alice"].queue()["id"], who["bob"].queue()["id"]
        for client, ended in (("alice", job), ("bob", other)):
            who[client].ended(ended)
        expected = {"alice": (200, 200), "bob": (200, 404), "rack": (403, 403), "Audits": (200, 200)}
        expected |= {"ops": (200, 200), "nobody": (401, 401)}
        found = {name: tuple(who[name].get(p).status for p in ("/overview", f"/overview/jobs/{job}")) for name in who}
        assert found == expected
        missing = plain(who["bob"].get(f"/overview/jobs/{uuid.uuid4()}"))
        assert plain(who["bob"].get(f"/overview/jobs/{job}")) == missing
        for name in ("alice", "bob"):
            told = fresh(who[name])
            known = {field for field, value in told.items() if value is not None}
            assert known == {"at_us", "since_us", "gateway", "epoch", "sees_all", "last_job"}
            assert (told["sees_all"], told["last_job"]) == (False, job if name == "alice" else other)
        everything = b"".join(who["Audits"].get(path).body for path in ("/overview", f"/overview/jobs/{job}"))
        for ref, customer, salt in at.sql("SELECT customer_ref, customer_id, salt FROM customers"):
            for secret in (ref, customer, salt.hex()):
                assert secret.encode() not in everything
        reply = who["Audits"].get("/overview")
        assert reply.headers["cache-control"] == "no-store"
        assert who["nobody"].get("/").status == 200, "the page itself is for everybody"
        poor = at.client(new_key(at, "poor", "auditor", rate_per_s=1, burst=1))
        assert [poor.get("/overview").status for _ in range(2)] == [200, 429]


def test_a_customer_that_has_asked_for_nothing_has_no_job(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state, clickhouse_dsn=NOWHERE) as at:
        key = new_key(at, "carol")
    with running(state, clickhouse_dsn=NOWHERE) as at:
        assert at.client(key).get("/overview").json["last_job"] is None


# What it costs.


def test_many_who_look_cost_what_one_does(tmp_path: Path) -> None:
    with running(tmp_path / "state", clickhouse_dsn=NOWHERE) as at:
        client = at.client()
        job = client.queue()["id"]
        client.ended(job)
        asked: list[str] = []

        def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            asked.append(statement)

        sa.event.listen(at.gateway.database.engine, "before_cursor_execute", count)
        paths = ["/overview", f"/overview/jobs/{job}"] * 50
        begun = time.monotonic()
        with ThreadPoolExecutor(20) as pool:
            assert {reply.status for reply in pool.map(client.get, paths)} == {200}
        seconds = 1 + (time.monotonic() - begun) / KEPT_S
        assert 0 < len(asked) <= 20 * seconds, asked
