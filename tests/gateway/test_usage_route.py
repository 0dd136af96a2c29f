"""`GET /usage`: a customer's own spend, an auditor's look at any, remembered for a minute, and documented."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from render_platform.charges.price_book import load_price_book
from render_platform.charges.spend import Budgets
from render_platform.clock import SystemClock, iso
from render_platform.gateway.identity import ANONYMOUS
from render_platform.gateway.problems import Refused
from render_platform.gateway.spend_routes import BudgetGuard
from tests import chdb_server
from tests.gateway.http import Client, Running, eventually, running
from tests.gateway.test_access import new_key

NOWHERE = "http://127.0.0.1:9"


@dataclass
class Desk:
    """A gateway whose fast path is real, and its callers; alice has had two jobs."""

    at: Running
    alice: Client
    bob: Client
    auditor: Client
    meter: Client

    @property
    def ref(self) -> str:
        return str(self.at.sql("SELECT customer_ref FROM customers WHERE customer_id = 'alice'")[0][0])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    state = tmp_path_factory.mktemp("usage") / "state"
    prices = state.with_name("prices.toml")  # so dear that a job of a millisecond costs something
    prices.write_bytes(load_price_book(None).data.replace(b'"0.0', b'"50000'))
    options: dict[str, Any] = {"price_book": prices, "clickhouse_dsn": chdb_server.shared_dsn()}
    options["clickhouse_database"] = chdb_server.fresh_database()
    with running(state) as at:  # before the first key, anyone is let in
        names = (("alice", "customer"), ("bob", "customer"), ("audits", "auditor"), ("rack", "meter"))
        keys = [new_key(at, name, role) for name, role in names]
    with running(state, **options) as at:
        found = Desk(at, *(at.client(key) for key in keys))
        for _ in range(2):
            found.alice.ended(found.alice.queue()["id"])
        eventually(lambda: at.gateway.publisher.delivered >= 2)
        yield found


def test_a_customer_sees_what_is_spent(desk: Desk) -> None:
    reply = desk.alice.get("/usage")
    assert reply.status == 200, reply
    said = reply.json
    assert (said["customer_ref"], said["month"]) == (desk.ref, iso(SystemClock().now_us())[:7])
    assert (said["events"], said["charged"], said["charged_days"]) == (2, [], 0)
    assert sum(int(sku["quantity"]) for sku in said["estimated"]) > 0
    assert Decimal(said["estimated_total"]) >= 0
    assert said["budget"] is None


def test_whose_usage_it_is(desk: Desk) -> None:
    assert desk.bob.get("/usage").status == 404, "nothing of his is metered yet"
    assert desk.bob.get(f"/usage?customer_ref={desk.ref}").status == 403
    assert desk.alice.get(f"/usage?customer_ref={desk.ref}").status == 403, (
        "even her own: the reference is an auditor's"
    )
    assert desk.auditor.get(f"/usage?customer_ref={desk.ref}").json["events"] == 2
    assert desk.meter.get("/usage").status == 403
    assert desk.at.client().get("/usage").status == 401


@pytest.mark.parametrize("query", ["month=2026-13", "month=x", "month=2026-110", "customer_ref=zz"])
def test_what_is_no_month_or_reference(desk: Desk, query: str) -> None:
    reply = desk.auditor.get(f"/usage?{query}")
    assert reply.status == 422, reply
    assert reply.json["field"] == query.partition("=")[0]


def test_an_answer_is_remembered_for_a_minute(desk: Desk) -> None:
    before = desk.alice.get("/usage?month=2026-01").json
    budgets = Budgets(desk.at.gateway.database, SystemClock())
    budgets.set(desk.ref, "5", "USD", enforce=False)
    try:
        assert desk.alice.get("/usage?month=2026-01").json == before
        assert desk.alice.get("/usage?month=2026-02").json["budget"] == "5"
    finally:
        budgets.remove(desk.ref)


def test_it_is_documented(desk: Desk) -> None:
    document = desk.at.client().get("/schema/openapi.json").json
    operation = document["paths"]["/usage"]["get"]
    assert {one["name"] for one in operation["parameters"]} >= {"month", "customer_ref"}
    assert {"200", "401", "403", "404", "422", "429"} <= set(operation["responses"])
    assert "UsageView" in str(operation["responses"]["200"])


def test_without_clickhouse_it_says_that_the_estimate_is_unknown(tmp_path: Path) -> None:
    with running(tmp_path / "state", clickhouse_dsn=NOWHERE) as at:
        anyone = at.client()
        anyone.ended(anyone.queue()["id"])
        said = anyone.get("/usage").json
        assert (said["estimated"], said["estimated_total"]) == (None, None)
        assert said["estimate_unknown"] == "the fast path cannot be read now"


def test_a_spent_budget_refuses_only_where_it_is_enforced(desk: Desk) -> None:
    gateway, ref = desk.at.gateway, desk.ref
    budgets, guard = Budgets(gateway.database, SystemClock()), BudgetGuard(gateway)
    alice, bob = (replace(ANONYMOUS, issuer="key", customer_id=name) for name in ("alice", "bob"))

    def refused(amount: Decimal, *, enforce: bool) -> bool:
        budgets.set(ref, f"{amount:f}", "USD", enforce=enforce)
        asyncio.run_coroutine_threadsafe(guard.look(), desk.at.loop).result(20)
        guard.require(bob)
        try:
            guard.require(alice)
        except Refused as error:
            return (error.status, error.code) == (402, "budget_exhausted")
        return False

    spent = Decimal(desk.alice.get("/usage").json["estimated_total"])
    assert spent > 1
    try:
        assert [refused(spent, enforce=False), refused(spent, enforce=True)] == [False, True]
        assert [refused(spent * 2, enforce=True), refused(spent / 2, enforce=True)] == [False, True]
    finally:
        budgets.remove(ref)


def test_spend_that_cannot_be_read_refuses_nobody(tmp_path: Path) -> None:
    with running(tmp_path / "state", clickhouse_dsn=NOWHERE) as at:
        anyone = at.client()
        anyone.ended(anyone.queue()["id"])
        (ref,) = at.sql("SELECT customer_ref FROM customers")[0]
        Budgets(at.gateway.database, SystemClock()).set(ref, "1", "USD", enforce=True)
        guard = BudgetGuard(at.gateway)
        asyncio.run_coroutine_threadsafe(guard.look(), at.loop).result(20)
        guard.require(ANONYMOUS)
