"""What auditors read over HTTP: who may, what is in the list, and bytes that are verified."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import SystemClock, iso
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.gateway.evidence_routes import Query, page_of
from render_platform.objects import ObjectStore
from render_platform.pipeline import Platform
from tests.factories import START_US
from tests.gateway.http import Client, Reply, Running, running
from tests.gateway.test_access import new_key
from tests.platforms import make_platform, read_log, read_published, record_random

HOUR_US = 3_600_000_000
PER_BATCH = 3
EVERYTHING = Query()


@contextmanager
def platform_of(state: Path, **options: Any) -> Iterator[Platform]:
    """The platform over a gateway's state, as a sequencer in another process would have it."""
    platform = make_platform(state, SystemClock(), uuid.uuid4().hex, **options)
    try:
        yield platform
    finally:
        platform.close()


def flush(state: Path) -> None:
    with platform_of(state) as platform:
        platform.flush()


@dataclass
class Audit:
    """A gateway over a published log, and its callers. `job` is alice's, and published."""

    at: Running
    alice: Client
    bob: Client
    meter: Client
    auditor: Client
    job: str

    @property
    def callers(self) -> dict[str, Client]:
        named = {"alice": self.alice, "bob": self.bob, "meter": self.meter, "auditor": self.auditor}
        return {"nobody": self.at.client(), **named}

    def routes(self) -> dict[str, str]:
        """An address of each route that there is something at."""
        listed = self.auditor.get("/v1/objects").json
        width = listed["tree_size"]
        return {
            "list": "/v1/objects",
            "object": f"/v1/objects/{listed['objects'][0]['digest']}",
            "checkpoint": "/audit/checkpoint",
            "tile": f"/audit/tile/0/000.p/{width}",
            "entries": f"/audit/tile/entries/000.p/{width}",
            "receipt": f"/jobs/{self.job}/receipt",
        }


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audit]:
    state = tmp_path_factory.mktemp("audit") / "state"
    with running(state) as at:
        names = (("alice", "customer"), ("bob", "customer"), ("rack", "meter"), ("Audits & Co", "auditor"))
        made = [new_key(at, name, role) for name, role in names]
    with running(state) as at:  # a gateway that began without keys is open
        alice, bob, meter, auditor = map(at.client, made)
        job = alice.queue()["id"]
        alice.ended(job)
        flush(state)
        yield Audit(at, alice, bob, meter, auditor, job)


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[tuple[Platform, ObjectStore]]:
    """A platform without a gateway, with some batches in two hours."""
    platform = make_platform(tmp_path / "state", batch_rows=PER_BATCH)
    for hour in (1, 0, 1):
        add(platform, START_US + hour * HOUR_US)
    yield platform, platform.log_objects
    platform.close()


def add(platform: Platform, start_us: int) -> None:
    """Two more batches in a lane of their own, and an entry of no hour."""
    seed = platform.outbox.totals().events
    platform.log.append(AuditEntry("erasure", f"{seed:064x}", FIRST_PREVIOUS), lambda *_: None)
    record_random(platform, 2 * PER_BATCH, seed, f"trace/{seed}", start_us)
    platform.flush()


def all_pages(platform: Platform, query: Query = EVERYTHING, limit: int = 2, between: Any = None) -> list[Any]:
    """The list, page by page; `between` is called after each."""
    found: list[Any] = []
    cursor = None
    while True:
        page = page_of(platform.database, platform.log_objects, query, limit, cursor)
        assert len(page.objects) == limit or page.next is None
        assert len(found) < 1_000, "it does not end"
        found += page.objects
        cursor = page.next
        if cursor is None:
            return found
        if between is not None:
            between()


def named_by(state: Path, vkey: str) -> list[tuple[str, str, int]]:
    """(digest, part, index) of what the published entries name, from the log's files alone."""
    found = []
    for index, raw in enumerate(read_log(state, read_published(state, vkey).size)):
        entry = json.loads(raw)
        found.append((hashlib.sha256(raw).hexdigest(), "entry", index))
        found += [(entry["subject_digest"], "subject", index)] if entry["subject_digest"] else []
        found += [(entry["attestation"], "attestation", index)] if entry["attestation"] else []
    return sorted(found)


def told(objects: list[Any]) -> list[tuple[str, str, int]]:
    return sorted((one.digest, one.part, one.index) for one in objects)


# Who may.

RIGHTS = {
    "nobody": (401, 401),
    "alice": (403, 200),
    "bob": (403, 404),
    "meter": (403, 403),
    "auditor": (200, 200),
}
"""The answer of each route of evidence, and that of the receipt of alice's job."""


@pytest.mark.parametrize("caller", RIGHTS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_rights(audit: Audit, caller: str, method: str) -> None:
    evidence, receipt = RIGHTS[caller]
    client = audit.callers[caller]
    for name, path in audit.routes().items():
        if method == "HEAD" and name in ("list", "receipt"):
            continue
        reply = client.ask(method, path)
        assert reply.status == (receipt if name == "receipt" else evidence), (name, reply)
        assert ("ratelimit" in reply.headers) == (reply.status in (200, 404))
        if method == "HEAD":
            assert reply.body == b""


def test_nothing_can_be_written(audit: Audit) -> None:
    for path in audit.routes().values():
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert audit.auditor.ask(method, path).status == 405


def test_an_auditor_takes_from_a_bucket_of_its_own(audit: Audit) -> None:
    slow = audit.at.client(new_key(audit.at, "slow", "auditor", rate_per_s=1, burst=1))
    assert [slow.get("/audit/checkpoint").status for _ in range(2)] == [200, 429]
    assert audit.auditor.get("/audit/checkpoint").status == 200


def test_without_keys_this_machine_is_the_auditor(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        assert client.get("/v1/objects").json == {"tree_size": 0, "objects": [], "next": None}
        assert client.get("/audit/checkpoint").status == client.get("/audit/tile/0/000.p/1").status == 404
        job = client.queue()["id"]
        client.ended(job)
        flush(tmp_path / "state")
        assert client.get("/v1/objects").json["tree_size"] == 1
        assert client.get(f"/jobs/{job}/receipt").status == 200
        assert client.get("/audit/checkpoint", origin="http://elsewhere.example").status == 403


# The list.


def test_the_list_is_what_the_published_log_names(logged: tuple[Platform, ObjectStore]) -> None:
    platform, _ = logged
    state, vkey = platform.settings.state_dir, platform.log_signer.verifier.vkey
    for limit in (1, 2, 3, 5, 500):
        assert told(all_pages(platform, limit=limit)) == named_by(state, vkey)
    for one in all_pages(platform):
        if one.size is not None:
            assert len(platform.cas.get(one.digest)) == one.size
    places = [(one.hour or "", one.index) for one in all_pages(platform)]
    assert places == sorted(places)
    assert places[0][0] == "", "entries of no hour are told too"


def test_a_list_that_is_paged_while_the_log_grows_is_that_of_its_begin(logged: tuple[Platform, ObjectStore]) -> None:
    platform, _ = logged
    state, vkey = platform.settings.state_dir, platform.log_signer.verifier.vkey
    before = named_by(state, vkey)
    moments = iter((START_US, START_US + HOUR_US, START_US - HOUR_US, START_US + 9 * HOUR_US))

    def grow() -> None:
        if (at := next(moments, None)) is not None:
            add(platform, at)

    assert told(all_pages(platform, between=grow)) == before
    assert told(all_pages(platform)) == named_by(state, vkey) != before


def test_hours_and_types_are_chosen(logged: tuple[Platform, ObjectStore]) -> None:
    platform, _ = logged
    everything = all_pages(platform)
    first, second = iso(START_US), iso(START_US + HOUR_US)
    chosen: list[tuple[Query, Callable[[Any], bool]]] = [
        (Query(start_us=START_US, end_us=START_US + 1), lambda one: one.hour == first),
        (Query(start_us=START_US + HOUR_US), lambda one: (one.hour or "") >= second),
        (Query(end_us=START_US + HOUR_US), lambda one: one.hour is not None and one.hour < second),
        (Query(type="usage_batch"), lambda one: one.type == "usage_batch"),
        (Query(type="repair"), lambda one: False),
    ]
    for query, holds in chosen:
        wanted = told([one for one in everything if holds(one)])
        assert told(all_pages(platform, query)) == wanted
        assert bool(wanted) == (query.type != "repair")


def test_what_is_logged_and_not_published_is_not_told(logged: tuple[Platform, ObjectStore]) -> None:
    platform, log = logged
    checkpoint = log.read("checkpoint")
    before = told(all_pages(platform))
    add(platform, START_US)
    assert told(all_pages(platform)) != before
    log.replace("checkpoint", checkpoint, log.read("checkpoint"))  # as it stood before the last publication
    assert told(all_pages(platform)) == before


def test_an_index_that_is_behind_the_log_is_not_taken_for_all_of_it(audit: Audit, tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        (tmp_path / "state/log/checkpoint").write_bytes(audit.auditor.get("/audit/checkpoint").body)
        reply = at.client().get("/v1/objects")
        assert (reply.status, code_of(reply)) == (503, "unavailable")


UNFIT = """limit=0 limit=501 limit=x cursor= cursor=!! cursor=MSAyIDMgNA cursor=OTk5OTk5OTk5IDAgMCAw type=batch
hour_from=now hour_from=2024-01-15T09:00:00+00:00 hour_to=0001-13-01"""


@pytest.mark.parametrize("asked", UNFIT.split())
def test_what_cannot_be_asked_is_named(audit: Audit, asked: str) -> None:
    reply = audit.auditor.get(f"/v1/objects?{asked}")
    assert (reply.status, code_of(reply)) == (422, "invalid_field")
    assert asked.partition("=")[0] in reply.body.decode()


def code_of(reply: Reply) -> str:
    assert reply.headers["content-type"] == "application/problem+json"
    code: str = reply.json["code"]
    return code


# Bytes.


def test_objects_are_the_bytes_that_their_digests_promise(audit: Audit) -> None:
    for one in audit.auditor.get("/v1/objects?limit=500").json["objects"]:
        path = f"/v1/objects/{one['digest']}"
        reply, head = audit.auditor.get(path), audit.auditor.ask("HEAD", path)
        assert hashlib.sha256(reply.body).hexdigest() == one["digest"]
        assert one["size"] in (None, len(reply.body))
        assert int(head.headers["content-length"]) == len(reply.body)
        for found in (reply, head):
            assert found.headers["etag"] == f'"{one["digest"]}"'
            assert found.headers["cache-control"] == "private, max-age=31536000, immutable"
            assert found.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("name", ["object", "checkpoint", "tile", "entries"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_that_has_the_bytes_is_told_so(audit: Audit, name: str, method: str) -> None:
    path = audit.routes()[name]
    etag = audit.auditor.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        reply = audit.auditor.ask(method, path, if_none_match=known)
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", etag)
    for other in ('"other"', etag.strip('"'), etag.upper()):
        assert audit.auditor.ask(method, path, if_none_match=other).status == 200


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_damaged_bytes_are_never_sent(audit: Audit, damage: Callable[[bytes], bytes]) -> None:
    width = audit.auditor.get("/v1/objects").json["tree_size"]
    for name in ("object", "tile", "entries"):
        path = audit.routes()[name]
        file = audit.at.state / "log" / path.removeprefix("/audit/")
        if name == "object":
            digest = path.rpartition("/")[2]
            file = audit.at.state / "blobs/sha256" / digest[:2] / digest[2:]
        good = file.read_bytes()
        file.write_bytes(damage(good))
        try:
            reply, known = audit.auditor.get(path), audit.auditor.get(path, if_none_match="*")
        finally:
            file.write_bytes(good)
        assert (reply.status, code_of(reply)) == (500, "evidence_damaged"), (name, width)
        assert known.status == 500
        assert good not in reply.body
        assert audit.auditor.get(path).body == good


@pytest.mark.parametrize("digest", ["0" * 64, "A" * 64, "0" * 63, "..", "%2e%2e%2fplatform.db", "sha256"])
def test_an_object_that_is_not_there(audit: Audit, digest: str) -> None:
    for method in ("GET", "HEAD"):
        assert audit.auditor.ask(method, f"/v1/objects/{digest}").status == 404


def test_the_files_of_the_log_are_those_on_disk(audit: Audit) -> None:
    routes = audit.routes()
    for name, kind, caching in (
        ("checkpoint", "text/plain; charset=utf-8", "private, no-cache"),
        ("tile", "application/octet-stream", "private, max-age=31536000, immutable"),
        ("entries", "application/octet-stream", "private, max-age=31536000, immutable"),
    ):
        reply = audit.auditor.get(routes[name])
        assert reply.body == (audit.at.state / "log" / routes[name].removeprefix("/audit/")).read_bytes()
        assert (reply.headers["content-type"], reply.headers["cache-control"]) == (kind, caching)


NO_TILES = """
tile tile/ tile/0 tile/00/000.p/1 tile/0/00 tile/0/0000 tile/0/000.p tile/0/000.p/0 tile/0/000.p/01 tile/0/000.p/256
tile/64/000 tile/-1/000 tile/0/x000/000 tile/0/000.p/1/ tile/0/../0/000.p/1 tile/0//000.p/1 tile/../checkpoint keys
tile/%2e%2e/checkpoint tile/..%2fcheckpoint tile/%2e%2e/%2e%2e/platform.db tile/../../keys/checkpoint.key
../keys/checkpoint.key tile/0/000.p/1%00 tile/0/000.p/1%0a tile/0/%d9%a0%d9%a0%d9%a0 tile//etc/passwd
tile/%2fetc%2fpasswd
"""


@pytest.mark.parametrize("path", NO_TILES.split())
def test_no_other_path_is_a_file_of_the_log(audit: Audit, path: str) -> None:
    assert audit.auditor.get("/audit/tile/0/000.p/1").status == 200
    reply = audit.auditor.get(f"/audit/{path}")
    assert (reply.status, reply.json["code"]) == (404, "not_found")


def test_tiles_beyond_the_checkpoint_are_not_shown(tmp_path: Path) -> None:
    with platform_of(tmp_path / "state") as platform:
        add(platform, START_US)
        covered = set(platform.log_objects.names())
        checkpoint = platform.log_objects.read("checkpoint")
        add(platform, START_US)
        beyond = set(platform.log_objects.names()) - covered
        platform.log_objects.replace("checkpoint", checkpoint, platform.log_objects.read("checkpoint"))
    assert beyond
    with running(tmp_path / "state") as at:
        assert {at.client().get(f"/audit/{path}").status for path in covered} == {200}
        assert {at.client().get(f"/audit/{path}").status for path in beyond} == {404}
