"""A PostgreSQL that is cut off, or says nothing: each wait for it has an end, and what it was asked may yet stand."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import sqlalchemy as sa

from render_platform import database as sql
from render_platform.database import Database, customers, open_database
from render_platform.errors import Unavailable
from render_platform.receipts import wipe
from tests import postgres
from tests.proxy import Proxy

SHORT_S = 1.5


@pytest.fixture
def url() -> str:
    return postgres.make_database(f"t_{uuid.uuid4().hex}")


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    with Proxy(sa.make_url(url).port or 0) as made:
        yield made


def behind(url: str, proxy: Proxy) -> str:
    return sa.make_url(url).set(port=proxy.port).render_as_string(hide_password=False)


def customer(number: int) -> dict[str, object]:
    return {"customer_ref": f"ref-{number}", "issuer": "key", "customer_id": f"id-{number}", "salt": bytes(32)}


def options(url: str) -> tuple[int, ...]:
    """Of the socket of a connection: what the kernel was told."""
    names = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
    with closing(open_database(url)) as database, database.read() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=socket.dup(driver.fileno())) as found:
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            return tuple(found.getsockopt(socket.IPPROTO_TCP, name) for name in names)


@contextmanager
def swallowed(database: Database, proxy: Proxy) -> Iterator[sa.Connection]:
    """A transaction of which nothing gets through any more."""
    with database.read() as connection:
        proxy.blackhole()
        yield connection


@contextmanager
def unanswered(database: Database, proxy: Proxy) -> Iterator[sa.Connection]:
    """A transaction whose commit arrives, and whose answer does not."""
    with database.write() as connection:
        yield connection
        proxy.cut_after(0)


def test_tcp_gives_up_a_peer_that_is_gone_before_a_lease_is_over(url: str) -> None:
    idle, every, count, unacknowledged_ms = options(url)
    assert idle + every * count == sql.PEER_S < 30
    assert unacknowledged_ms == sql.PEER_S * 1_000
    assert options(f"{url}?keepalives_idle=7&tcp_user_timeout=9000") == (7, every, count, 9_000), "the DSN's own count"


def test_a_server_that_says_nothing_is_given_up_and_asked_anew(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sql.BUSY_TIMEOUT_S < sql.ANSWER_S, "who waits for a lock hears nothing for so long"
    monkeypatch.setattr(sql, "ANSWER_S", SHORT_S)
    monkeypatch.setattr(sql, "CONNECT_S", 2)  # libpq's least
    with closing(open_database(behind(url, proxy))) as database:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"nothing for 1\.5 s"), swallowed(database, proxy) as connection:
            connection.execute(sa.select(customers)).all()
        assert SHORT_S < time.monotonic() - begun < SHORT_S + 2
        for _ in range(2):  # with a connection that was idle, and without any
            begun = time.monotonic()
            with pytest.raises(Unavailable, match="check the server"), database.write():
                pass
            assert time.monotonic() - begun < SHORT_S + 2 + 2
        proxy.heal()
        with database.write() as connection:
            connection.execute(customers.insert(), customer(1))
    with closing(open_database(url)) as database, database.read() as connection:
        assert connection.execute(sa.select(customers.c.customer_id)).scalars().all() == ["id-1"]


def test_a_statement_that_takes_long_is_no_silence_where_it_speaks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "ANSWER_S", SHORT_S)
    slow = "SELECT repeat('x', 1000000), pg_sleep(0.25) FROM generate_series(1, 8)"
    with closing(open_database(url)) as database:
        begun = time.monotonic()
        with database.read() as connection:
            assert len(connection.exec_driver_sql(slow).all()) == 8
        assert time.monotonic() - begun > SHORT_S
        with pytest.raises(Unavailable, match="said nothing"), database.read() as connection:
            connection.exec_driver_sql(f"SELECT pg_sleep({SHORT_S * 2})")


def test_wiping_takes_as_long_as_it_takes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large database's VACUUM says nothing for minutes: here it waits for a lock for longer than the bound."""
    monkeypatch.setattr(sql, "ANSWER_S", SHORT_S)
    with closing(open_database(url)) as database, ThreadPoolExecutor(1) as threads:
        with database.engine.connect() as held:
            held.exec_driver_sql("LOCK TABLE pg_statistic IN EXCLUSIVE MODE")
            wiping = threads.submit(wipe, database)
            time.sleep(SHORT_S * 2)
            assert not wiping.done()
        assert wiping.result(30) is None


def test_a_commit_whose_answer_is_lost_is_told_as_such_and_stands(url: str, proxy: Proxy) -> None:
    with closing(open_database(behind(url, proxy))) as database:
        for number in (1, 2):
            with pytest.raises(Unavailable), unanswered(database, proxy) as connection:
                connection.execute(customers.insert(), customer(number))
            proxy.heal()
        with database.settled() as connection:
            assert connection.execute(sa.select(customers.c.customer_id)).scalars().all() == ["id-1", "id-2"]
