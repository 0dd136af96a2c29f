"""Receipts over HTTP: for whom, when, what is said where there is none. How many read at once; docs/spec/http.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform.errors import Unavailable
from render_platform.gateway.evidence_routes import AT_ONCE, MAX_ASKED, MAX_ASKED_EACH, Turns
from render_platform.gateway.identity import ANONYMOUS, Principal
from render_platform.gateway.problems import RateLimited
from render_platform.receipt_verifier import verify_receipt
from tests.gateway.http import Reply, occupied
from tests.gateway.servers import on_loop
from tests.gateway.test_evidence_routes import Audit, audit, flush, platform_of
from tests.gateway.test_operations import usage

__all__ = ["audit"]

ROUTES = (
    "/v1/objects",
    "/v1/objects/{digest}",
    "/audit/checkpoint",
    "/audit/tile/{tile}",
    "/audit/tile/{tile}?entries",
    "/jobs/{job_id}/receipt",
)
"""As the document calls what Audit.routes names."""


def test_a_receipt_comes_once_its_batch_is_published(audit: Audit) -> None:
    assert audit.alice.get(f"/jobs/{uuid.uuid4()}/receipt").status == 404
    with occupied(audit.at, by=audit.alice) as job:
        waits(audit.alice.get(f"/jobs/{job}/receipt"))
        assert audit.bob.get(f"/jobs/{job}/receipt").status == 404
    waits(audit.alice.get(f"/jobs/{job}/receipt"))
    flush(audit.at.state)
    reply = audit.alice.get(f"/jobs/{job}/receipt")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert reply.headers["cache-control"] == "private, no-cache"
    shown = audit.auditor.get(f"/jobs/{job}/receipt").body
    with platform_of(audit.at.state) as platform:
        proven = verify_receipt(reply.body, [platform.log_signer.verifier.vkey])
        seen = verify_receipt(shown, [platform.log_signer.verifier.vkey])
    assert (seen.event, seen.customer_id) == (proven.event, None)  # the salt would open all of alice's events
    event = audit.alice.get(f"/jobs/{job}").json["usage"]["event_id"]
    assert (proven.event["job_id"], proven.event["event_id"]) == (job, event)
    assert proven.customer_id == "alice"


def waits(reply: Reply) -> None:
    assert reply.status == 202
    assert int(reply.headers["retry-after"]) == reply.json["retry_after_s"] > 0
    assert (reply.json["status"], reply.headers["content-type"]) == ("pending", "application/json")


def test_a_foreign_receipt_and_a_missing_one_get_the_same_answer(audit: Audit) -> None:
    answers = [audit.bob.get(f"/jobs/{job}/receipt").json for job in (audit.job, uuid.uuid4())]
    for answer in answers:
        del answer["request_id"], answer["instance"]
    assert answers[0] == answers[1]
    assert answers[0]["status"] == 404


def test_usage_that_was_reported_has_a_receipt_for_its_customer(audit: Audit) -> None:
    reply = audit.meter.post("/api/v1/events", usage(subject="alice"), content_type="application/cloudevents+json")
    assert reply.status == 204
    flush(audit.at.state)
    [[raw]] = audit.at.sql("SELECT job_id FROM usage_events WHERE gateway_id = 'ingest'")
    job = uuid.UUID(bytes=raw)
    statuses = {name: client.get(f"/jobs/{job}/receipt").status for name, client in audit.callers.items()}
    assert statuses == {"nobody": 401, "alice": 200, "bob": 404, "meter": 403, "auditor": 200}


def test_a_batch_that_is_lost_or_damaged_is_not_a_receipt_that_is_not_there(audit: Audit) -> None:
    good = audit.alice.get(f"/jobs/{audit.job}/receipt").body
    listed = audit.auditor.get("/v1/objects?type=usage_batch&limit=500").json["objects"]
    digests = [one["digest"] for one in listed if one["part"] == "subject"]
    files = [audit.at.state / "blobs/sha256" / digest[:2] / digest[2:] for digest in digests]
    kept = [file.read_bytes() for file in files]
    try:
        for missing in (False, True):
            for file in files:
                file.unlink() if missing else file.write_bytes(b"PAR1")
            reply = audit.alice.get(f"/jobs/{audit.job}/receipt")
            assert (reply.status, reply.json["code"]) == (500, "evidence_damaged")
    finally:
        for file, data in zip(files, kept, strict=True):
            file.write_bytes(data)
    assert audit.alice.get(f"/jobs/{audit.job}/receipt").body == good


# What reads at once.


@on_loop
async def test_evidence_is_read_a_few_at_a_time_and_holds_up_nobody() -> None:
    turns, running_now, most = Turns(), 0, 0
    release, lock, loop_thread = threading.Event(), threading.Lock(), threading.get_ident()

    def work() -> int:
        nonlocal running_now, most
        assert threading.get_ident() != loop_thread
        with lock:
            running_now += 1
            most = max(most, running_now)
        release.wait(20)
        with lock:
            running_now -= 1
        return 1

    def caller(name: str) -> Principal:
        return replace(ANONYMOUS, customer_id=name)

    asked = [asyncio.create_task(turns.take(caller("one"), work)) for _ in range(MAX_ASKED_EACH)]
    await asyncio.sleep(0)  # the loop is free while they read
    with pytest.raises(RateLimited):
        await turns.take(caller("one"), work)
    others = MAX_ASKED - MAX_ASKED_EACH
    asked += [asyncio.create_task(turns.take(caller(f"other {n}"), work)) for n in range(others)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await turns.take(caller("another"), work)
    release.set()
    assert sum(await asyncio.gather(*asked)) == MAX_ASKED
    assert most <= AT_ONCE
    assert await turns.take(caller("one"), work) == 1, "who has been answered may ask again"


# The page.

PAGE = Path(__file__).parents[2] / "docs/spec/http.md"
CACHING = {"immutable": "private, max-age=31536000, immutable", "revalidate": "private, no-cache", "none": None}


def test_the_example_of_the_page_runs(audit: Audit, tmp_path: Path) -> None:
    script = PAGE.read_text().split("```sh\n")[1].split("```")[0]
    with platform_of(audit.at.state) as platform:
        vkey = platform.log_signer.verifier.vkey
    given = {"STATE": str(audit.at.state), "GATEWAY": audit.at.url, "JOB": audit.job, "VKEY": vkey}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **given, "PATH": path, "PYTHONPATH": str(PAGE.parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "object: OK" in done.stdout
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "checkpoint",
        "entries",
        "list",
        "object",
        "receipt",
        "tile",
    ]


def test_the_routes_of_the_page(audit: Audit) -> None:
    rows = re.findall(r"^\| `GET (\S+)` \| (.+) \| `(.+)` \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    paths = {route.partition("?")[0]: path for route, path in zip(ROUTES, audit.routes().values(), strict=True)}
    assert {route for route, *_ in rows} == set(paths)
    for route, _, kind, caching in rows:
        reply = audit.auditor.get(paths[route])
        found = (reply.status, reply.headers["content-type"], reply.headers.get("cache-control"))
        assert found == (200, kind, CACHING[caching])
        assert ("etag" in reply.headers) == (audit.auditor.ask("HEAD", paths[route]).status == 200)


def test_the_list_of_the_page(audit: Audit) -> None:
    shown = json.loads(PAGE.read_text().split("```json\n")[1].split("```")[0])
    reply = audit.auditor.get("/v1/objects?limit=1").json
    assert list(shown) == list(reply)
    assert [list(one) for one in shown["objects"]] == [list(one) for one in reply["objects"]]
    named = re.findall(r"^\| `(\w+)` \| [^`|]", PAGE.read_text(), re.MULTILINE)
    assert set(named) == {*shown, *shown["objects"][0]} - {"objects"}
    assert audit.auditor.get(f"/v1/objects?cursor={shown['next']}").status == 200
