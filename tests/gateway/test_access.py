"""Who may do what, with real keys and tokens: a customer sees its own jobs, and takes from its own bucket."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from render_platform.gateway.identity import ANY, Terms
from tests.gateway.http import CATALOGUE, CHAT, CHAT_PATH, Client, Reply, Running, occupied, running
from tests.gateway.test_identity_tokens import EC, ED, OTHER_ED, RSA, jwk, make

ISSUER = {"issuer": "https://id.example", "audience": "render", "claim": "sub"}
HOUR_S = 3_600


@dataclass
class Callers:
    """A gateway with keys and an issuer. Two customers are called alice; they are not the same."""

    at: Running
    alice_by_token: Client
    alice_by_key: Client
    bob: Client

    @property
    def everyone(self) -> tuple[Client, ...]:
        return self.alice_by_token, self.alice_by_key, self.bob


def token(now: float | None = None, **changes: Any) -> str:
    return make(**{"sub": "alice", "exp": int(now or time.time()) + HOUR_S, **changes})


def new_key(at: Running, customer: str, *roles: str, **terms: Any) -> str:
    bound = {"sources": ["rack-7"], "customers": [ANY]} if "meter" in roles else {}
    return at.call(lambda: at.gateway.keys.create(customer, roles or ["customer"], Terms(**terms), **bound))


@pytest.fixture(scope="module")
def who(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    folder = tmp_path_factory.mktemp("access")
    keys = [jwk(ED, kid="ed"), jwk(RSA, kid="rsa"), jwk(EC, kid="ec")]
    (folder / "jwks.json").write_text(json.dumps({"keys": keys}))
    catalogue = {**CATALOGUE, "issuers": {"example": {**ISSUER, "jwks_file": str(folder / "jwks.json")}}}
    with running(folder / "state", catalogue=catalogue) as at:
        by_key, bob = (at.client(new_key(at, name)) for name in ("alice", "bob"))
        yield Callers(at, at.client(token()), by_key, bob)


def plain(reply: Reply) -> tuple[Any, ...]:
    """An answer without what differs from one request to the next."""
    told = {name: value for name, value in reply.json.items() if name not in ("request_id", "instance")}
    names = sorted(set(reply.headers) - {"date", "content-length"})
    return reply.status, told, names


# Jobs.


def test_tokens_of_each_kind_and_keys_in_both_headers_are_good(who: Callers) -> None:
    for alg, kid, key in (("EdDSA", "ed", ED), ("RS256", "rsa", RSA), ("ES256", "ec", EC)):
        client = who.at.client(token(alg=alg, kid=kid, key=key))
        assert client.post(CHAT_PATH, CHAT).status == 200
    assert who.at.client().post(CHAT_PATH, CHAT, x_api_key=who.bob.key).status == 200


def test_customers_see_their_own_jobs_and_nothing_of_others(who: Callers) -> None:
    jobs = {client.key: client.queue()["id"] for client in who.everyone}
    for client in who.everyone:
        client.ended(jobs[client.key])
        listed = [job["id"] for job in client.get("/jobs?limit=500").json["jobs"]]
        assert jobs[client.key] in listed
        assert not {job_id for key, job_id in jobs.items() if key != client.key} & set(listed)
        assert client.get(f"/jobs/{jobs[client.key]}/output").status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/output"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")],
)
def test_a_foreign_job_and_a_missing_one_get_the_same_answer(who: Callers, method: str, path: str) -> None:
    with occupied(who.at, by=who.alice_by_token) as running_job:
        ended = who.alice_by_token.queue()["id"]
        who.alice_by_token.ended(ended)
        queued = who.alice_by_token.queue(model="solo")["id"]
        for stranger in (who.alice_by_key, who.bob):
            missing = plain(stranger.ask(method, f"/jobs/{uuid.uuid4()}{path}"))
            assert missing[0] == 404
            for job_id in (running_job, ended, queued):
                assert plain(stranger.ask(method, f"/jobs/{job_id}{path}")) == missing
    for job_id in (queued, running_job):
        assert who.alice_by_token.ended(job_id)["state"] == "success", "a stranger cancelled it"


def test_an_idempotency_key_is_its_customers_own(who: Callers) -> None:
    ids = {client.queue(idempotency_key="mine")["id"] for client in who.everyone}
    assert len(ids) == 3
    assert who.bob.post("/queue", {"model": "llama-8b", "input": {}}, idempotency_key="mine").status == 422


def test_a_page_that_begins_at_a_foreign_job_shows_only_ones_own(who: Callers) -> None:
    foreign = who.bob.queue()["id"]
    page = who.alice_by_key.get(f"/jobs?before={foreign}&limit=500").json["jobs"]
    mine = {job["id"] for job in who.alice_by_key.get("/jobs?limit=500").json["jobs"]}
    assert {job["id"] for job in page} <= mine


# Credentials that are refused.


REFUSED = {
    "none": {},
    "expired": {"authorization": f"Bearer {token(exp=int(time.time()) - HOUR_S)}"},
    "not yet": {"authorization": f"Bearer {token(nbf=int(time.time()) + HOUR_S)}"},
    "of another issuer": {"authorization": f"Bearer {token(iss='https://elsewhere.example')}"},
    "for another audience": {"authorization": f"Bearer {token(aud='billing')}"},
    "signed by a stranger": {"authorization": f"Bearer {token(key=OTHER_ED)}"},
    "unsigned": {"authorization": f"Bearer {token(alg='none', key=None)}"},
    "garbled": {"authorization": f"Bearer {token()[:-4]}AAAA"},
    "half": {"authorization": f"Bearer {token()[:60]}"},
    "without a customer": {"authorization": f"Bearer {token(sub=...)}"},
    "a token as an API key": {"x-api-key": token()},
    "an unknown key": {"x-api-key": f"rp_{'0' * 16}_{'A' * 43}"},
    "a foreign key": {"authorization": "Bearer sk-proj-0123456789"},
    "another scheme": {"authorization": "Basic YWxpY2U6c2VjcmV0"},
    "nothing after the scheme": {"authorization": "Bearer "},
    "two that differ": {"authorization": f"Bearer {token()}", "x-api-key": f"rp_{'0' * 16}_{'A' * 43}"},
    "not text": {"authorization": "Bearer \xff\xfe"},
    "endless": {"authorization": "Bearer " + "eyJ" * 5_000},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_credential_that_is_not_good_opens_nothing(who: Callers, name: str) -> None:
    nobody, credential = who.at.client(), REFUSED[name]
    while who.at.sql("SELECT 1 FROM jobs WHERE state IN ('queued', 'running')"):
        time.sleep(0.02)  # jobs of other tests end meanwhile
    before = who.at.counts()
    for method, path in (
        ("POST", CHAT_PATH),
        ("POST", "/queue"),
        ("GET", "/jobs"),
        ("GET", "/models"),
        ("GET", "/queue"),
    ):
        reply = nobody.ask(method, path, CHAT if method == "POST" else None, **credential)
        assert (reply.status, reply.json["code"]) == (401, "unauthorized")
        assert reply.headers["www-authenticate"] == 'Bearer realm="render-platform"'
    reply = nobody.get("/v1/models", **credential)
    assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")
    for secret in filter(None, (value.split(" ")[-1] for value in credential.values())):
        assert secret.encode("latin-1") not in reply.body
    assert who.at.counts() == before
    assert "ratelimit" not in reply.headers
    assert nobody.get("/health", **credential).status == nobody.get("/ready", **credential).status == 200


def test_a_revoked_key_is_refused(who: Callers) -> None:
    client = who.at.client(new_key(who.at, "carol"))
    assert client.get("/jobs").status == 200
    who.at.call(lambda: who.at.gateway.keys.revoke(client.key[3:19]))
    assert client.get("/jobs").status == 401


def test_roles_open_what_they_are_for(who: Callers) -> None:
    meter, auditor = (who.at.client(new_key(who.at, role, role)) for role in ("meter", "auditor"))
    for client in (meter, auditor):
        for method, path in (("POST", CHAT_PATH), ("POST", "/queue"), ("GET", "/jobs"), ("POST", "/v1/embeddings")):
            reply = client.ask(method, path, CHAT if method == "POST" else None)
            assert reply.status == 403
        assert client.get("/models").status == 200
    reply = who.bob.post("/api/v1/events", {}, content_type="application/cloudevents+json")
    assert (reply.status, reply.json["code"]) == (403, "forbidden")


def test_a_body_is_not_read_before_its_sender_is_known(who: Callers) -> None:
    large = b'{"model": "llama-8b", "input": {"x": "' + b"x" * 11_000_000 + b'"}}'
    for body in (large, b"{not json", b"\xff"):
        assert who.at.client().post("/queue", body).status == 401
        assert who.at.client().post("/v1/chat/completions", body).status == 401
        assert who.at.client().post("/api/v1/events", body).status == 401


def test_a_customers_lane_is_bounded_by_its_terms(who: Callers) -> None:
    low, high = (who.at.client(new_key(who.at, f"has-{lane}", priority_max=lane)) for lane in ("low", "high"))
    assert low.queue()["priority"] == "low"
    assert high.queue()["priority"] == "normal"
    assert high.queue(priority="high")["priority"] == "high"
    refused = low.post("/queue", {"model": "llama-8b", "input": CHAT, "priority": "normal"})
    assert (refused.status, refused.json["field"]) == (403, "priority")


# Limits.


def test_requests_beyond_the_bucket_wait_and_others_do_not(who: Callers) -> None:
    terms = {"rate_per_s": 1, "burst": 3}
    keys = [who.at.client(new_key(who.at, "eager", **terms)) for _ in range(2)]
    replies = [keys[number % 2].post(CHAT_PATH, CHAT) for number in range(3)]
    left = [reply.headers["ratelimit"] for reply in replies]
    assert left == ['"default";r=2;t=1', '"default";r=1;t=2', '"default";r=0;t=3']
    before = who.at.counts()
    for reply in (keys[0].post(CHAT_PATH, CHAT), keys[1].get("/jobs"), keys[0].post("/queue", b"{not json")):
        assert (reply.status, reply.json["code"]) == (429, "rate_limited")
        assert reply.headers["retry-after"] == "1"
        assert reply.headers["ratelimit-policy"] == '"default";q=3;w=3'
        assert reply.headers["ratelimit"].startswith('"default";r=0;t=')
    assert who.at.counts() == before
    assert who.bob.post(CHAT_PATH, CHAT).status == 200
    time.sleep(1.01)  # as it was told
    assert keys[0].post(CHAT_PATH, CHAT).status == 200


def test_a_full_queue_says_so_and_takes_nothing(who: Callers) -> None:
    with occupied(who.at, by=who.bob):
        waiting = [who.bob.queue(model="solo")["id"] for _ in range(2)]
        before = who.at.counts()
        for path, body in (("/queue", {"model": "solo", "input": CHAT}), ("/text/llama/solo/chat", CHAT)):
            full = who.alice_by_key.post(path, body, idempotency_key=path[:5])
            assert (full.status, full.json["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
        chat = who.alice_by_key.post("/v1/chat/completions", {"model": "solo", **CHAT})
        assert (chat.status, chat.json["error"]["code"]) == (429, "queue_full")
        assert who.at.counts() == before
        assert who.alice_by_key.post(CHAT_PATH, CHAT).status == 200, "another model's queue is full"
    for job_id in waiting:
        assert who.bob.ended(job_id)["state"] == "success"


def test_a_credential_is_in_no_file_of_the_platform(who: Callers) -> None:
    stored = b"".join(path.read_bytes() for path in who.at.state.rglob("*") if path.is_file())
    for client in who.everyone:
        assert client.key[-40:].encode() not in stored
