"""Webhooks on the end of a job, as Standard Webhooks: signed, tried again for twenty hours, delivered at least once.

The row of a webhook is made in the transaction that ends its job. Each attempt posts first and records what came of it
after: a crash in between means that the same message goes out again. Its `webhook-id` and its body are the same then,
apart from an output that is no longer kept, so a receiver that remembers ids acts once.

A customer signs up for nothing: its secret is made when it is first needed, here or by the operator who hands it out
(`ensure_secret`), and stays the same until the operator sets another.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import sqlalchemy as sa
import structlog

from render_platform.clock import US_PER_SECOND, Clock, Ids, iso
from render_platform.database import Database, customers, job_outputs, jobs, usage_events, webhooks
from render_platform.errors import PlatformError, RecordError, Unavailable, UsageError
from render_platform.gateway.identity import Customers, Terms, customer_settings
from render_platform.gateway.outbound import (
    AddressRefused,
    Outbound,
    deliverable,
    is_public,
    parse_url,
    webhook_headers,
    webhook_key,
)
from render_platform.gateway.store import Do, Operation
from render_platform.gateway.views import links_of
from render_platform.gateway.writer import Writer

RETRY_AFTER_S = (5, 30, 120, 600, 1_800, 7_200, 18_000, 36_000)
"""The wait after each attempt that failed, and up to a tenth more; after one more failure it is given up."""
GONE = 410
"""The receiver wants no more of it."""
REFUSED = 0
"""Stands for an answer where the URL is not one that may be reached."""
AT_ONCE, AT_ONCE_A_CUSTOMER = 16, 4
TIMEOUT_S = 15.0
LOOK_AGAIN_S = 60.0
CLAIM_S = 60
"""How long a delivery is one gateway's, where several share a database: longer than it may take."""
PAUSE_S = 5.0
"""How long to leave a row, or the database, alone after SQL could not be read or written."""
SECRET_BYTES = 32

_log = structlog.get_logger()


def ensure_secret(connection: sa.Connection, ids: Ids, issuer: str, customer_id: str) -> str:
    """The customer's webhook secret, made on first use; inside the caller's transaction.

    A crash before the commit: none was made, and nothing was signed with it. After it: it stands.
    """
    one = {"issuer": issuer, "customer_id": customer_id}
    row = connection.execute(sa.select(customer_settings).filter_by(**one)).one_or_none()
    if row is not None and row.webhook_secret is not None:
        return str(row.webhook_secret)
    secret = f"whsec_{base64.b64encode(ids.random(SECRET_BYTES)).decode()}"
    if row is None:
        connection.execute(customer_settings.insert(), one | asdict(Terms()) | {"webhook_secret": secret})
    else:
        connection.execute(customer_settings.update().filter_by(**one).values(webhook_secret=secret))
    return secret


class Deliveries:
    """Delivers what is due. `wake` and `run` belong to one loop; `allow_private` is as Outbound's."""

    def __init__(
        self,
        database: Database,
        writer: Writer[Operation],
        outbound: Outbound,
        customers: Customers,
        clock: Clock,
        ids: Ids,
        allow_private: frozenset[str] = frozenset(),
    ) -> None:
        self._database, self._writer, self._outbound = database, writer, outbound
        self._shared = database.engine.dialect.name == "postgresql"  # other gateways see the same rows as due
        self._shared = database.engine.dialect.name == "postgresql"  # other gateways see the same rows as due
        self._customers, self._clock, self._ids = customers, clock, ids
        self._allow_private = allow_private
        self._woken = asyncio.Event()
        self._under_way: dict[bytes, str] = {}

    def check_url(self, url: str) -> None:
        """RecordError, for the field `webhook`, unless it may be posted to as far as the URL alone says."""
        try:
            target = parse_url(url, self._allow_private)
            with contextlib.suppress(ValueError):  # a name: every delivery resolves it
                if not (target.private or is_public(ipaddress.ip_address(target.host))):
                    raise AddressRefused("the address is not public", "use a host that the Internet can reach")
        except AddressRefused as error:
            raise RecordError("webhook", error.message, error.remedy) from None

    def wake(self) -> None:
        """Something may be due: a job with a webhook has ended. Cheap; from the loop."""
        self._woken.set()

    async def run(self) -> None:
        """Deliver until cancelled. What is under way then is cut off, and delivered by the next run."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._woken.clear()
                wait_s = await self._start_due(tasks)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._woken.wait()

    async def _start_due(self, tasks: asyncio.TaskGroup) -> float:
        """Start what is due and may start now; how long to wait at most before looking again."""
        free, now_us = AT_ONCE - len(self._under_way), self._clock.now_us()
        if not free:
            return LOOK_AGAIN_S  # the end of a delivery wakes
        full = [ref for ref, count in Counter(self._under_way.values()).items() if count >= AT_ONCE_A_CUSTOMER]
        try:
            rows = await asyncio.to_thread(self._waiting, list(self._under_way), full, free)
        except Unavailable as error:
            _log.error("webhooks_unreadable", error=str(error))
            return PAUSE_S
        for row in rows:
            if row.next_us > now_us:
                wait_s: float = min(LOOK_AGAIN_S, (row.next_us - now_us) / US_PER_SECOND)
                return wait_s
            if list(self._under_way.values()).count(row.customer_ref) < AT_ONCE_A_CUSTOMER:
                self._under_way[row.job_id] = row.customer_ref
                tasks.create_task(self._deliver(row))
        return 0.0 if rows else LOOK_AGAIN_S

    def _waiting(self, under_way: Collection[bytes], full: Collection[str], limit: int) -> Sequence[Any]:
        """Rows in the order of their time, but for those under way and those of customers with enough of them."""
        query = _ROWS.where(webhooks.c.job_id.not_in(under_way), jobs.c.customer_ref.not_in(full)).limit(limit)
        with self._database.read() as connection:
            return connection.execute(query).all()

    async def _deliver(self, row: Any) -> None:
        try:
            if self._shared and not await self._writer.submit(Do(partial(_claim, row=row, until_us=self._claim_us()))):
                return
            outcome = await self._attempt(row)
            change = webhooks.update().filter_by(job_id=row.job_id).values(attempts=row.attempts + 1, **outcome)
            # A crash before this commit: it was posted perhaps, and is posted again. After it: its next time stands.
            await self._writer.submit(Do(lambda connection: connection.execute(change)))
        except PlatformError as error:
            _log.error("webhook_not_recorded", job_id=str(uuid.UUID(bytes=row.job_id)), error=str(error))
            await asyncio.sleep(PAUSE_S)
        finally:
            del self._under_way[row.job_id]
            self._woken.set()

    def _claim_us(self) -> int:
        return self._clock.now_us() + CLAIM_S * US_PER_SECOND

    async def _attempt(self, row: Any) -> dict[str, Any]:
        """Post once; the columns that say what came of it. Unavailable where the secret cannot be had."""
        if row.issuer is None:
            return self._give_up(row, REFUSED, "the customer was erased")
        secret = await self._secret(row.issuer, row.customer_id)
        message_id, payload = f"msg_{uuid.UUID(bytes=row.job_id)}", payload_of(row)
        try:
            signed = webhook_headers(webhook_key(secret), message_id, self._clock.now_us() // US_PER_SECOND, payload)
            headers = {"Content-Type": "application/json", **signed}
            status = await self._outbound.post(row.url, payload, headers, TIMEOUT_S)
        except UsageError as error:
            return self._give_up(row, REFUSED, str(error))
        except Unavailable as error:
            return self._failed(row, {}, str(error))
        if deliverable(status):
            return {"next_us": None, "status": status}
        if status == GONE:
            return self._give_up(row, status, "the receiver wants no more of it")
        return self._failed(row, {"status": status}, f"the receiver answered {status}")

    async def _secret(self, issuer: str, customer_id: str) -> str:
        secret = await asyncio.to_thread(self._customers.webhook_secret, issuer, customer_id)
        if secret is None:
            make = partial(ensure_secret, ids=self._ids, issuer=issuer, customer_id=customer_id)
            secret = await self._writer.submit(Do(make))
        return str(secret)

    def _failed(self, row: Any, answer: dict[str, int], why: str) -> dict[str, Any]:
        """`answer` is empty where there was none: the last one stays."""
        if row.attempts >= len(RETRY_AFTER_S):
            return self._give_up(row, answer.get("status", row.status), why)
        wait_us = RETRY_AFTER_S[row.attempts] * US_PER_SECOND
        jitter_us = wait_us // 10 * int.from_bytes(self._ids.random(2), "big") // 2**16
        return {"next_us": self._clock.now_us() + wait_us + jitter_us, **answer}

    @staticmethod
    def _give_up(row: Any, status: int | None, why: str) -> dict[str, Any]:
        job_id = str(uuid.UUID(bytes=row.job_id))
        _log.warning("webhook_given_up", job_id=job_id, attempts=row.attempts + 1, status=status, error=why)
        return {"next_us": None, "status": status}


def _claim(connection: sa.Connection, row: Any, until_us: int) -> bool:
    """Whether this gateway may deliver what several see as due; if it dies then, it is due again at `until_us`."""
    mine = webhooks.update().filter_by(job_id=row.job_id, next_us=row.next_us).values(next_us=until_us)
    return connection.execute(mine).rowcount == 1


def payload_of(row: Any) -> bytes:
    """The message, of a row of `_ROWS`: JSON, the same for each attempt but for an output that is no longer kept."""
    job_id, used_ns = str(uuid.UUID(bytes=row.job_id)), row.gpu_time_ns
    data = {
        "id": job_id,
        "state": row.state,
        "model": row.model_name,
        "task": row.task,
        "gpu_seconds": None if used_ns is None else f"{used_ns // 10**9}.{used_ns % 10**9:09d}",
        "gpu_time_ns": used_ns,
        "error": None if row.error_code is None else {"code": row.error_code},
        "output": links_of(job_id, output=True)["output"] if row.kept else None,
    }
    message = {"type": "job.finished", "timestamp": iso(row.finished_us), "data": data}
    return json.dumps(message, separators=(",", ":")).encode()


_ROWS = (
    sa.select(
        *(webhooks.c.job_id, webhooks.c.url, webhooks.c.attempts, webhooks.c.next_us, webhooks.c.status),
        *(jobs.c.customer_ref, jobs.c.state, jobs.c.model_name, jobs.c.task, jobs.c.error_code, jobs.c.finished_us),
        *(usage_events.c.gpu_time_ns, customers.c.issuer, customers.c.customer_id),
        job_outputs.c.job_id.is_not(None).label("kept"),
    )
    .select_from(
        webhooks.join(jobs, jobs.c.job_id == webhooks.c.job_id)
        .outerjoin(usage_events, usage_events.c.job_id == webhooks.c.job_id)  # pruned some day
        .outerjoin(customers, customers.c.customer_ref == jobs.c.customer_ref)  # erased some day
        .outerjoin(job_outputs, job_outputs.c.job_id == webhooks.c.job_id)
    )
    .where(webhooks.c.next_us.is_not(None))
    .order_by(webhooks.c.next_us)
)
