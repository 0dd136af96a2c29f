"""`GET /usage`: what the calling customer has spent in a month; auditors may ask of any customer.

Read off the loop, a few at a time, and remembered for a minute: what it costs does not grow with how often it is asked.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Annotated, Any, cast

import msgspec
import sqlalchemy as sa
import structlog
from litestar import Router, get
from litestar.params import QueryParameter

from render_platform.charges.chain import month_bounds
from render_platform.charges.spend import Budgets, Spending, book_of
from render_platform.clickhouse import open_clickhouse
from render_platform.clock import US_PER_SECOND, iso
from render_platform.database import customers
from render_platform.errors import PlatformError, RecordError, UsageError
from render_platform.gateway.edge import AnyRequest, caller_of, gateway_of, require
from render_platform.gateway.evidence_routes import Turns, receipt_readers
from render_platform.gateway.identity import Principal
from render_platform.gateway.problems import NotFound, Refused
from render_platform.gateway.service import Gateway

REMEMBER_US = 60 * US_PER_SECOND
REMEMBERED = 1_000
_log = structlog.get_logger()
Month = Annotated[str | None, QueryParameter(max_length=7, description="Such as 2026-11; without it, this month")]
Ref = Annotated[
    str | None, QueryParameter(max_length=64, description="For auditors: whose usage; without it, the caller's own")
]


class SkuUsage(msgspec.Struct):
    """`quantity` is a whole number as text: nanoseconds of gpu_second, else the count. `amount` is Decimal text."""

    sku: str
    unit: str
    quantity: str
    events: int
    amount: str


class UsageView(msgspec.Struct):
    """A month of one customer. What is charged stands in the log; `estimated` is of days that are not charged yet, and
    null where it is not known. Energy is of `energy_known_events` of all `events`. A share of 1 is the whole budget."""

    customer_ref: str
    month: str
    currency: str
    charged: list[SkuUsage]
    charged_total: str
    charged_days: int
    estimated: list[SkuUsage] | None
    estimated_total: str | None
    estimate_unknown: str
    events: int
    energy_known_events: int
    joules: str | None
    co2_grams: str | None
    budget: str | None
    budget_currency: str | None
    budget_enforced: bool
    budget_share: str | None


class UsageDesk:
    """Spend by customer and month, remembered for a minute; the oldest answer goes when there are too many."""

    def __init__(self, gateway: Gateway) -> None:
        """UsageError where the price book is not one."""
        self._clock, self._database = gateway.clock, gateway.database
        self._known: dict[tuple[str, str], tuple[int, UsageView]] = {}
        self._spending = _spending(gateway)

    def remembered(self, ref: str, month: str) -> UsageView | None:
        until_us, view = self._known.get((ref, month), (0, None))
        return view if self._clock.now_us() < until_us else None

    def read(self, ref: str, month: str) -> UsageView:
        """In a thread: the log, SQL and ClickHouse."""
        found = self._spending.of(ref, month).as_json()
        if found["estimated"] is None:
            found["estimate_unknown"] = "the fast path cannot be read now"  # the reason is the operator's to know
        return msgspec.convert(found, UsageView)

    def remember(self, view: UsageView) -> None:
        self._known.pop((view.customer_ref, view.month), None)
        while len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[view.customer_ref, view.month] = self._clock.now_us() + REMEMBER_US, view

    def ref_of(self, caller: Principal) -> str | None:
        """None where the caller has had no job yet."""
        query = sa.select(customers.c.customer_ref).filter_by(issuer=caller.issuer, customer_id=caller.customer_id)
        with self._database.read() as connection:
            return connection.execute(query).scalar()


class BudgetGuard:
    """Refuses jobs of customers who have spent a budget that is enforced, by a figure of the last minute or so.

    Who is unknown to have spent it is let in: where spend cannot be read, everyone is.
    """

    def __init__(self, gateway: Gateway) -> None:
        """UsageError where the price book is not one."""
        self._clock, self._database = gateway.clock, gateway.database
        self._spending = _spending(gateway)
        self._spent: frozenset[tuple[str, str]] = frozenset()

    async def run(self) -> None:
        """For ever: look, off the loop, and wait a minute."""
        while True:
            await self.look()
            await asyncio.sleep(REMEMBER_US / US_PER_SECOND)

    async def look(self) -> None:
        try:
            self._spent = await asyncio.to_thread(self._read)
        except (PlatformError, ArithmeticError, OSError, sa.exc.SQLAlchemyError) as error:
            self._spent = frozenset()
            _log.warning("budgets_not_read", error=str(error))

    def require(self, caller: Principal) -> None:
        """Refused (402, `budget_exhausted`)."""
        if caller.key in self._spent:
            raise Refused(402, "budget_exhausted", "The month's budget is spent", "ask the operator to raise it")

    def _read(self) -> frozenset[tuple[str, str]]:
        limits = [one.customer_ref for one in Budgets(self._database, self._clock).all().values() if one.enforce]
        if not limits:
            return frozenset()
        found = self._spending.all(iso(self._clock.now_us())[:7], limits)
        over = [ref for ref, one in found.items() if one.share is not None and one.share >= 1]
        query = sa.select(customers.c.issuer, customers.c.customer_id).where(customers.c.customer_ref.in_(over))
        with self._database.read() as connection:
            return frozenset((row.issuer, row.customer_id) for row in connection.execute(query))


def _spending(gateway: Gateway) -> Spending:
    """ClickHouse is opened for each read: a connection that broke is not the next reader's."""
    settings = gateway.settings
    return Spending(
        gateway.database,
        gateway.cas,
        lambda: closing(open_clickhouse(settings.clickhouse_url, settings.clickhouse_database)),
        gateway.clock,
        book_of(settings),
        settings.co2_g_per_kwh,
    )


@get("/usage")
async def show_usage(request: AnyRequest, month: Month = None, customer_ref: Ref = None) -> UsageView:
    """What the caller has spent in a month: charged by the log, estimated since, energy and budget."""
    caller, desk = caller_of(request), _desk(request)
    month = month or iso(gateway_of(request).clock.now_us())[:7]
    try:
        month_bounds(month)
    except UsageError as error:
        raise RecordError("month", error.message, error.remedy) from None
    turns = cast(Turns, request.app.state["turns"])
    if customer_ref is None:
        ref = await turns.take(caller, lambda: desk.ref_of(caller))
    else:
        caller.require("auditor")
        require(customer_ref.isalnum() and len(customer_ref) == 64, "customer_ref", "is not a reference")
        ref = customer_ref
    if ref is None:
        raise NotFound("nothing of yours is metered yet", "send a job first")
    view = desk.remembered(ref, month)
    if view is None:
        view = await turns.take(caller, lambda: desk.read(ref, month))
        desk.remember(view)
    return view


def _desk(request: AnyRequest) -> UsageDesk:
    """Made on first use: most gateways are never asked."""
    state: Any = request.app.state
    if "usage_desk" not in state:
        state["usage_desk"] = UsageDesk(gateway_of(request))
    return cast(UsageDesk, state["usage_desk"])


SPEND_ROUTES = Router("/", route_handlers=[show_usage], before_request=receipt_readers)
