"""Who is calling: keys that are found, revoked and never shown; tokens with our own terms; headers of any text."""

from __future__ import annotations

import base64
import hashlib
import json
import string
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform.clock import US_PER_SECOND, ManualClock, SystemIds
from render_platform.database import Database
from render_platform.errors import UsageError
from render_platform.gateway.identity import (
    ANONYMOUS,
    REMEMBERED,
    ROLES,
    ApiKeys,
    Customers,
    Forbidden,
    Identity,
    Issuer,
    Principal,
    Terms,
    Tokens,
    Unauthorized,
)
from tests.gateway.test_identity_tokens import jwk, token_of
from tests.platforms import connect, open_database_of

NOW_S = 1_700_157_600
SIGNER = Ed25519PrivateKey.generate()
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class World:
    """One database with keys, customers and one issuer; `statements` counts what reaches SQL."""

    def __init__(self, folder: Path) -> None:
        (folder / "jwks.json").write_text(json.dumps({"keys": [jwk(SIGNER)]}))
        self.path = folder / "platform.db"
        self.database: Database = open_database_of(folder)
        self.clock = ManualClock(NOW_S * US_PER_SECOND)
        self.keys = self.other_process()
        self.customers = Customers(self.database)
        self.tokens = Tokens([Issuer("example", "https://id.example", "render", "sub", folder / "jwks.json")])
        self.identity = Identity(self.keys, self.tokens, self.customers, self.clock)
        self.statements = 0
        sa.event.listen(self.database.engine, "before_cursor_execute", self._count)

    def other_process(self) -> ApiKeys:
        return ApiKeys(self.database, self.clock, SystemIds())

    def _count(self, *_: Any) -> None:
        self.statements += 1

    def pass_s(self, seconds: float) -> None:
        self.clock.move_to(self.clock.now_us() + int(seconds * US_PER_SECOND))

    def token(self, **claims: Any) -> str:
        good = {"iss": "https://id.example", "aud": "render", "sub": "acme", "exp": NOW_S + 600}
        return token_of('{"alg":"EdDSA"}', json.dumps(good | claims), SIGNER)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """For tests that change nothing."""
    made = World(tmp_path_factory.mktemp("identity"))
    yield made
    made.database.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.database.close()


def refused(identity: Identity, authorization: str | None, x_api_key: str | None = None) -> str:
    with pytest.raises(Unauthorized) as caught:
        identity.authenticate(authorization, x_api_key)
    return str(caught.value)


def test_a_key_is_its_holders_whichever_header_brings_it(world: World) -> None:
    terms = Terms("premium", "high", 50, 500)
    key = world.keys.create("acme", {"customer", "auditor"}, terms)
    expected = Principal("key", "acme", frozenset({"customer", "auditor"}), "premium", "high", 50, 500)
    for headers in ((f"Bearer {key}", None), (f"bearer   {key}", None), (None, key), (f"Bearer {key}", key)):
        assert world.identity.authenticate(*headers) == expected
    assert expected.key == ("key", "acme")


def test_only_the_hash_of_a_key_is_kept(world: World) -> None:
    key = world.keys.create("acme", {"customer"})
    with closing(connect(world.path.parent)) as connection:
        rows = connection.execute("SELECT * FROM api_keys").fetchall()
    assert hashlib.sha256(key.encode()).digest() in rows[0]
    secret = key[20:]
    assert secret not in repr(rows) + repr(world.keys.list()) + repr(world.identity.authenticate(None, key))
    for path in world.path.parent.iterdir():
        assert secret.encode() not in path.read_bytes()


def test_each_key_is_another(world: World) -> None:
    keys = {world.keys.create("acme", {"customer"}) for _ in range(50)}
    assert len(keys) == len({key.split("_")[1] for key in keys}) == 50


def test_a_key_that_is_not_exactly_it_is_refused(world: World) -> None:
    key, other = world.keys.create("acme", {"customer"}), world.keys.create("other", {"customer"})
    world.keys.find(key)
    key_id = key.split("_")[1]
    swapped = f"rp_{key_id}_{other[20:]}"
    last = string.ascii_letters[(string.ascii_letters.find(key[-1]) + 1) % 52]
    wrong = [key[:-1], key + "a", key[:-1] + last, key.upper(), key.swapcase(), key[:19], key[3:], swapped, f"{key}="]
    wrong += [
        f"rp_{'0' * 16}_{key[20:]}",
        f"RP{key[2:]}",
        f"rp-{key[3:]}",
        f" {key}"[:63],
        f"{key[:-1]}é",
        f"{key[:-1]}\n",
    ]
    for text in wrong:
        assert world.keys.find(text) is None, text
        shown = refused(world.identity, None, text) + refused(world.identity, f"Bearer {text}")
        assert key[20:30] not in shown


def test_malformed_keys_never_reach_sql(world: World) -> None:
    world.statements = 0
    for text in (
        "",
        "rp_",
        "rp_x_y",
        "a" * 63,
        "é" * 63,
        "\ud800" * 63,
        "rp_" + "g" * 16 + "_" + "a" * 43,
        "rp_" + "0" * 60,
    ):
        assert world.keys.find(text) is None
    assert world.statements == 0
    world.keys.find("rp_" + "0" * 16 + "_" + "a" * 43)
    assert world.statements > 0


def test_a_revoked_key_is_refused_at_once_here_and_within_five_seconds_elsewhere(world: World) -> None:
    key = world.keys.create("acme", {"customer"})
    elsewhere = world.other_process()
    assert world.keys.find(key) == elsewhere.find(key) is not None
    world.pass_s(2)
    world.keys.revoke(key.split("_")[1])
    assert world.keys.find(key) is None
    world.pass_s(2.999999)
    assert elsewhere.find(key) is not None, "it may be remembered for five seconds"
    world.pass_s(0.000001)
    assert elsewhere.find(key) is None
    assert "not valid" in refused(world.identity, None, key)


def test_a_clock_set_back_keeps_no_revoked_key_alive(world: World) -> None:
    key = world.keys.create("acme", {"customer"})
    elsewhere = world.other_process()
    elsewhere.find(key)
    world.keys.revoke(key.split("_")[1])
    world.clock.us -= 3_600 * US_PER_SECOND
    assert elsewhere.find(key) is None


def test_a_second_revocation_changes_nothing_and_an_unknown_one_is_refused(world: World) -> None:
    key_id = world.keys.create("acme", {"customer"}).split("_")[1]
    world.keys.revoke(key_id)
    before = world.keys.list()
    world.pass_s(60)
    world.keys.revoke(key_id)
    assert world.keys.list() == before
    assert (before[0].created_us, before[0].revoked_us) == (NOW_S * US_PER_SECOND, NOW_S * US_PER_SECOND)
    with pytest.raises(UsageError, match="no API key has this id"):
        world.keys.revoke("0" * 16)


def test_a_remembered_credential_costs_no_sql(world: World) -> None:
    key, token = world.keys.create("acme", {"customer"}), world.token()
    for _ in range(2):
        world.identity.authenticate(None, key)
        world.identity.authenticate(f"Bearer {token}", None)
        count, world.statements = world.statements, 0
    assert count == 0


def test_the_oldest_is_forgotten_when_too_many_are_remembered(world: World) -> None:
    first, *others = (f"Bearer {world.token(sub=str(number))}" for number in range(REMEMBERED + 1))
    for token in (first, *others[:-1], first):
        world.identity.authenticate(token, None)
    world.statements = 0
    world.identity.authenticate(first, None)
    assert world.statements == 0
    world.identity.authenticate(others[-1], None)
    world.identity.authenticate(others[1], None)
    one = world.statements
    world.identity.authenticate(first, None)
    assert world.statements == 2 * one > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"customer_id": ""}, "customer id"),
        ({"customer_id": "a\n"}, "customer id"),
        ({"customer_id": "a" * 201}, "customer id"),
        ({"roles": set()}, "role"),
        ({"roles": {"root"}}, "role"),
        ({"roles": {"customer,operator"}}, "role"),
        ({"sources": ["lab"]}, "go with the role meter"),
        ({"customers": ["acme"]}, "go with the role meter"),
        ({"roles": {"meter"}}, "go with the role meter"),
        ({"roles": {"meter"}, "sources": ["lab"]}, "go with the role meter"),
        ({"roles": {"meter"}, "customers": ["*"]}, "go with the role meter"),
        *[
            ({"roles": {"meter"}, "sources": [source], "customers": ["*"]}, "source")
            for source in ("gateway/1", "Gateway/1", "trace/x", "*", "a,b", "", "a b")
        ],
        ({"roles": {"meter"}, "sources": ["lab"], "customers": ["a,b"]}, "without a comma"),
    ],
)
def test_a_grant_that_means_nothing_is_refused(world: World, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        world.keys.create(**{"customer_id": "acme", "roles": {"customer"}} | arguments)
    assert world.keys.list() == []


@pytest.mark.parametrize(
    "terms",
    [{"pricing_tier": ""}, {"pricing_tier": "a b"}, {"priority_max": "urgent"}, {"rate_per_s": 0}, {"burst": -1}],
)
def test_terms_that_mean_nothing_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Terms(**terms)


def test_a_meter_reports_its_own_sources_and_customers_only(world: World) -> None:
    one = world.keys.find(world.keys.create("lab", {"meter"}, None, ["lab/1", "lab/2"], ["acme", "other"]))
    anyone = world.keys.find(world.keys.create("lab", {"meter"}, None, ["lab/1"], ["*"]))
    nobody = world.keys.find(world.keys.create("lab", ROLES - {"meter"}))
    assert one is not None
    assert anyone is not None
    assert nobody is not None
    assert one.may_report("lab/1", "acme")
    assert one.may_report("lab/2", "other")
    for source, customer in (("lab/3", "acme"), ("lab/1", "third"), ("lab", "acme"), ("*", "acme"), ("lab/1", "*")):
        assert not one.may_report(source, customer)
    assert anyone.may_report("lab/1", "third")
    assert not anyone.may_report("lab/2", "third")
    assert not nobody.may_report("lab/1", "acme")


@given(st.sampled_from(["gateway/", "trace/", "GATEWAY/", "Trace/"]), st.text(max_size=20))
def test_the_platforms_own_sources_are_never_reported(prefix: str, rest: str) -> None:
    source = prefix + rest
    forged = Principal(
        "key", "x", ROLES, **asdict(Terms()), sources=frozenset({source, "*"}), customers=frozenset({"*"})
    )
    assert not forged.may_report(source, "acme")
    assert not ANONYMOUS.may_report(source, "acme")
    assert not replace(ANONYMOUS, roles=ROLES - {"meter"}).may_report("lab", "acme")
    assert ANONYMOUS.may_report("lab", "acme")


def test_a_role_is_required(shared: World) -> None:
    customer = shared.identity.authenticate(f"Bearer {shared.token()}", None)
    customer.require("customer")
    for role in ROLES - {"customer"}:
        with pytest.raises(Forbidden, match=role):
            customer.require(role)


def test_a_tokens_customer_has_the_terms_of_our_table_and_no_others(world: World) -> None:
    boast = world.token(pricing_tier="free", priority_max="high", roles="operator", rate_per_s=9, sources="*")
    plain = Principal("example", "acme", frozenset({"customer"}), "standard", "normal", None, None)
    assert world.identity.authenticate(f"Bearer {boast}", None) == plain
    world.customers.set("example", "acme", Terms("gold", "high", 7, 70))
    world.customers.set("other", "acme", Terms("silver", "low"))
    assert world.identity.authenticate(f"Bearer {boast}", None) == plain, "remembered for five seconds"
    world.pass_s(5)
    found = world.identity.authenticate(f"Bearer {boast}", None)
    assert found == Principal("example", "acme", frozenset({"customer"}), "gold", "high", 7, 70)
    world.customers.set("example", "acme", Terms("bronze"))
    assert world.customers.terms("example", "acme") == Terms("bronze")
    assert world.customers.terms("example", "nobody") == Terms() == Terms("standard", "normal", None, None)


def test_a_remembered_token_is_refused_as_soon_as_it_has_expired(world: World) -> None:
    token = world.token(exp=NOW_S - 28)
    world.identity.authenticate(f"Bearer {token}", None)
    world.pass_s(1.999999)
    world.identity.authenticate(f"Bearer {token}", None)
    world.pass_s(0.000001)
    assert "expired" in refused(world.identity, f"Bearer {token}")


def test_keys_and_tokens_of_one_name_are_two_customers(world: World) -> None:
    by_key = world.identity.authenticate(None, world.keys.create("acme", {"customer"}))
    by_token = world.identity.authenticate(f"Bearer {world.token()}", None)
    assert by_key.key != by_token.key


def test_a_webhook_secret_is_kept_and_a_malformed_one_refused(world: World) -> None:
    assert world.customers.webhook_secret("key", "acme") is None
    world.customers.set("key", "acme", Terms(), SECRET)
    assert world.customers.webhook_secret("key", "acme") == SECRET
    with pytest.raises(UsageError) as caught:
        world.customers.set("key", "acme", Terms(), SECRET[6:])
    assert SECRET[6:] not in str(caught.value)
    assert world.customers.webhook_secret("key", "acme") == SECRET
    with pytest.raises(UsageError, match="customer id"):
        world.customers.set("key", "", Terms())


def test_without_a_credential_only_an_anonymous_platform_answers(shared: World) -> None:
    assert "no credential" in refused(shared.identity, None)
    local = Identity(shared.keys, shared.tokens, shared.customers, shared.clock, anonymous=True)
    found = local.authenticate(None, None)
    assert (found.key, found.roles) == (("anonymous", "local"), ROLES)
    for header in ("Bearer", "Bearer ", "Basic YTpi", f"Bearer {shared.token(aud='other')}", "Bearer rp_x"):
        refused(local, header)
    for key in ("rp_x", shared.token(), shared.token(aud="other")):
        refused(local, None, key)


def test_where_none_is_needed_what_is_no_credential_of_ours_stands_for_none(shared: World) -> None:
    """Many clients insist on sending some key."""
    local = Identity(shared.keys, shared.tokens, shared.customers, shared.clock, anonymous=True)
    for headers in (("Bearer none", None), (None, "sk-anything")):
        assert local.authenticate(*headers).key == ("anonymous", "local")
        refused(shared.identity, *headers)


def test_two_credentials_are_refused(world: World) -> None:
    one, two = (world.keys.create(name, {"customer"}) for name in ("acme", "other"))
    for headers in ((f"Bearer {one}", two), (f"Bearer {world.token()}", one), (f"Bearer {one}", ""), ("", one)):
        shown = refused(world.identity, *headers)
        assert one[20:] not in shown
    refused(world.identity, None, world.token())
    refused(world.identity, f"Bearer {one}, Bearer {two}")
