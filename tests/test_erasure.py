"""Erasure: the salt is in no byte of the state any more, every proof stays valid, and a crash leaves all or nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.clock import HOUR_US
from render_platform.database import (
    customers,
    idempotency_keys,
    job_outputs,
    jobs,
    log_entries,
    metadata,
    usage_events,
    webhooks,
)
from render_platform.entries import AuditEntry
from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.identity import ApiKeys, Customers, Terms, api_keys
from render_platform.pipeline import Platform
from render_platform.receipt_verifier import verify_receipt
from render_platform.receipts import Erased, Erasure, Receipts, forget_erased
from tests.factories import START_US, make_events
from tests.platforms import LIVE, connect, files_with, make_platform, record
from tests.postgres import CHOSEN, sqlite_only

NAME = "Zoë of the Atelier"
Mark = Callable[[sa.Connection, int], None]


def erasure_of(platform: Platform) -> Erasure:
    return Erasure(platform.database, platform.log.append, platform.log.publish)


def ref_of(platform: Platform, name: str = NAME, issuer: str = "key") -> str:
    with platform.database.write() as connection:
        return platform.outbox.customer_ref(connection, issuer, name)


def salt_of(platform: Platform, ref: str) -> bytes:
    with platform.database.read() as connection:
        return bytes(connection.execute(sa.select(customers.c.salt).filter_by(customer_ref=ref)).scalar_one())


def used(platform: Platform, n: int = 3, name: str = NAME, start_us: int = START_US) -> list[uuid.UUID]:
    """The ids of `n` published events of a customer."""
    ref = ref_of(platform, name)
    events = [replace(e, customer_ref=ref) for e in make_events(n, f"{name}{start_us}", start_us)]  # type: ignore[arg-type]
    record(platform, LIVE, events)
    platform.flush()
    return [event.event_id for event in events]


def proven(platform: Platform, event_id: uuid.UUID) -> tuple[str, str | None]:
    text = Receipts(platform.database, platform.cas, platform.log_objects).of_event(event_id)
    found = verify_receipt(text, [platform.log_signer.verifier.vkey])
    return found.identity, found.customer_id


def rows(platform: Platform) -> dict[str, list[Any]]:
    """Everything that SQL holds, by table."""
    with platform.database.read() as connection:
        return {name: sorted(map(repr, connection.execute(sa.select(t)).all())) for name, t in metadata.tables.items()}


def add_job(platform: Platform, ref: str, state: str, seq: int = 1) -> bytes:
    job_id = uuid.uuid4().bytes
    row: dict[str, Any] = {c.name: b"" if isinstance(c.type, sa.LargeBinary) else "x" for c in jobs.c if not c.nullable}
    row |= {c.name: 0 for c in jobs.c if isinstance(c.type, sa.BigInteger | sa.Integer) and not c.nullable}
    row |= {
        "job_id": job_id,
        "customer_ref": ref,
        "state": state,
        "direct": False,
        "seq": seq,
        "webhook": "https://zoe",
    }
    with platform.database.write() as connection:
        connection.execute(jobs.insert().values(row))
    return job_id


# What an erasure does.


def test_the_identity_goes_and_every_proof_stays(platform: Platform) -> None:
    events, others = used(platform), used(platform, name="someone else", start_us=START_US + HOUR_US)
    ref, key = ref_of(platform), [platform.log_signer.verifier.vkey]
    before = Receipts(platform.database, platform.cas, platform.log_objects).of_event(events[0])
    size = platform.log.published()
    assert size is not None
    done = erasure_of(platform).erase("key", NAME)
    assert done == Erased(ref, size.size)
    for event_id in events:
        assert proven(platform, event_id) == ("identity erased", None)
    for event_id in others:
        assert proven(platform, event_id) == ("opened", "someone else")
    assert verify_receipt(before, key).customer_id == NAME, "a receipt made before still opens"
    outcome = platform.verify(deep=True)
    assert outcome.verified, outcome.problems
    with platform.database.read() as connection:
        refs = connection.execute(sa.select(usage_events.c.customer_ref).distinct()).scalars().all()
    assert ref in refs, "the reference stays everywhere"


def test_a_later_request_of_the_same_id_is_a_new_customer(platform: Platform) -> None:
    events = used(platform)
    old, old_salt = ref_of(platform), salt_of(platform, ref_of(platform))
    erasure_of(platform).erase("key", NAME)
    new = ref_of(platform)
    assert new != old
    assert salt_of(platform, new) != old_salt
    later = used(platform, start_us=START_US + HOUR_US)
    assert proven(platform, events[0]) == ("identity erased", None)
    assert proven(platform, later[0]) == ("opened", NAME)
    assert erasure_of(platform).erase("key", NAME).customer_ref == new
    assert proven(platform, later[0]) == ("identity erased", None)
    assert platform.verify(deep=True).verified


def test_the_entry_names_the_reference_and_never_the_id(platform: Platform) -> None:
    used(platform)
    done = erasure_of(platform).erase("key", NAME)
    with platform.database.read() as connection:
        entry = connection.execute(sa.select(log_entries.c.entry).filter_by(log_index=done.entry_index)).scalar_one()
    assert {k: v for k, v in json.loads(entry).items() if v and k not in ("version", "previous")} == {
        "type": "erasure",
        "batch_id": done.customer_ref,
    }
    state = platform.settings.state_dir
    assert files_with(state / "log", NAME.encode()) == files_with(state / "blobs", NAME.encode()) == []


@pytest.mark.parametrize("many", [1, 30, 300])
def test_the_salt_is_in_no_byte_of_the_state(tmp_path: Path, many: int) -> None:
    """With as many customers that SQLite has split pages, and left copies of rows where they stood before."""
    platform = make_platform(tmp_path / "state")
    names = [f"customer-{n}-{'x' * (n % 40)}" for n in range(many)]
    refs = [ref_of(platform, name) for name in names]
    salts = [salt_of(platform, ref) for ref in refs]
    used(platform, name=names[0])
    state = platform.settings.state_dir
    chosen = sorted({0, many // 30, many // 15, many // 2, many - 1})
    assert all(files_with(state, salts[n]) for n in chosen)
    for n in chosen:
        erasure_of(platform).erase("key", names[n])
        assert files_with(state, salts[n]) == []
        if n:
            assert files_with(state, names[n].encode()) == []
    left = [n for n in range(many) if n not in chosen]
    assert all(salt_of(platform, refs[n]) == salts[n] for n in left)
    assert [ref_of(platform, names[n]) for n in left] == [refs[n] for n in left]
    platform.close()
    assert all(files_with(state, salts[n]) == [] for n in chosen)


def test_all_that_names_the_customer_goes_and_nothing_of_others(platform: Platform) -> None:
    ref, other = ref_of(platform), ref_of(platform, "other")
    keys = ApiKeys(platform.database, platform.clock, platform.ids)
    meters: dict[str, Any] = {"roles": ["meter"], "sources": ["s"]}
    for name in (NAME, "other"):
        keys.create(name, ["customer"])
        Customers(platform.database).set("key", name, Terms())
    Customers(platform.database).set("another issuer", NAME, Terms())
    keys.create("meter", customers=[NAME, "other", f"{NAME} too"], **meters)
    keys.create("meter 2", customers=[NAME], **meters)
    ids = {ref: add_job(platform, ref, "success"), other: add_job(platform, other, "success", seq=2)}
    with platform.database.write() as connection:
        for one, job_id in ids.items():
            values = {"customer_ref": one, "key": "k", "request_digest": b"", "job_id": job_id}
            connection.execute(idempotency_keys.insert().values(values))
            connection.execute(webhooks.insert().values(job_id=job_id, url="https://zoe", attempts=0))
            output = {"content_type": "text", "output": b"", "expires_us": 0}
            connection.execute(job_outputs.insert().values(job_id=job_id, **output))
    erasure_of(platform).erase("key", NAME)
    with platform.database.read() as connection:
        for table in (webhooks, job_outputs, idempotency_keys):
            assert connection.execute(sa.select(table.c.job_id)).scalars().all() == [ids[other]], table.name
        hooks = connection.execute(sa.select(jobs.c.customer_ref, jobs.c.webhook)).all()
        assert dict(map(tuple, hooks)) == {ref: None, other: "https://zoe"}
        named = connection.execute(sa.select(api_keys.c.customer_id, api_keys.c.customers)).all()
        known = connection.execute(sa.select(customers.c.customer_id)).scalars().all()
    lists = {(customer_id, frozenset((text or "").split(","))) for customer_id, text in named}
    kept = {("meter", frozenset({"other", f"{NAME} too"})), ("meter 2", frozenset({""})), ("other", frozenset({""}))}
    assert lists == kept
    assert known == ["other"]
    with platform.database.read() as connection:
        settings = connection.exec_driver_sql("SELECT issuer, customer_id FROM customer_settings").all()
    assert sorted(map(tuple, settings)) == [("another issuer", NAME), ("key", "other")]


def test_keys_of_one_who_never_asked_for_anything_go_without_an_entry(platform: Platform) -> None:
    keys = ApiKeys(platform.database, platform.clock, platform.ids)
    keys.create(NAME, ["customer"])
    assert erasure_of(platform).erase("key", NAME) == Erased(None, None)
    assert list(keys.list()) == []
    assert platform.log.published() is None


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_that_has_not_ended_refuses(platform: Platform, state: str) -> None:
    used(platform)
    ref = ref_of(platform)
    add_job(platform, ref, state)
    before = rows(platform)
    with pytest.raises(UsageError, match="not ended"):
        erasure_of(platform).erase("key", NAME)
    assert rows(platform) == before
    with platform.database.write() as connection:
        connection.execute(jobs.update().values(state="cancelled"))
    assert erasure_of(platform).erase("key", NAME).customer_ref == ref


def test_a_job_that_comes_meanwhile_refuses_too(platform: Platform) -> None:
    used(platform)
    ref = ref_of(platform)

    def append(draft: AuditEntry, mark: Mark) -> int:
        add_job(platform, ref, "queued")
        return platform.log.append(draft, mark)

    with pytest.raises(UsageError, match="not ended"):
        Erasure(platform.database, append, platform.log.publish).erase("key", NAME)
    assert salt_of(platform, ref)
    platform.flush()
    assert platform.verify().verified


# Repeats, crashes, restored copies.


def test_repeats_are_harmless(platform: Platform) -> None:
    used(platform)
    erasure_of(platform).erase("key", NAME)
    before, published = rows(platform), platform.log.published()
    for name in (NAME, "nobody"):
        assert erasure_of(platform).erase("key", name) == Erased(None, None)
    assert (rows(platform), platform.log.published()) == (before, published)


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_before_the_commit_leaves_everything(platform: Platform) -> None:
    events, ref = used(platform), ref_of(platform)
    before = rows(platform)

    def append(draft: AuditEntry, mark: Mark) -> int:
        def crash(connection: sa.Connection, index: int) -> None:
            mark(connection, index)
            raise Crash

        return platform.log.append(draft, crash)

    with pytest.raises(Crash):
        Erasure(platform.database, append, platform.log.publish).erase("key", NAME)
    assert rows(platform) == before
    assert proven(platform, events[0]) == ("opened", NAME)
    assert erasure_of(platform).erase("key", NAME).customer_ref == ref
    assert proven(platform, events[0]) == ("identity erased", None)
    assert platform.verify(deep=True).verified


CHILD = """
import os, signal, sys
from pathlib import Path
from render_platform.receipts import Erasure
from tests.platforms import make_platform

platform = make_platform(Path(sys.argv[1]), seed="child")

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

Erasure(platform.database, platform.log.append, killed).erase("key", sys.argv[2])
"""


def test_killed_after_the_commit_the_repeat_finishes(tmp_path: Path) -> None:
    platform = make_platform(tmp_path / "state")
    events = used(platform)
    salt = salt_of(platform, ref_of(platform))
    platform.close()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "state"), NAME], cwd=Path(__file__).parents[1], timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert CHOSEN or (tmp_path / "state" / "platform.db-wal").stat().st_size
    platform = make_platform(tmp_path / "state", seed="again")
    assert proven(platform, events[0]) == ("not opened", None), "forgotten, and its entry not published yet"
    erasure_of(platform).erase("key", NAME)
    assert files_with(tmp_path / "state", salt) == []
    assert proven(platform, events[0]) == ("identity erased", None)
    assert platform.verify(deep=True).verified
    platform.close()


@pytest.mark.parametrize("how", ["erased again", "forgotten again"])
def test_a_restored_copy_forgets_again_without_a_second_entry(platform: Platform, how: str) -> None:
    events, ref = used(platform), ref_of(platform)
    salt = salt_of(platform, ref)
    erasure_of(platform).erase("key", NAME)
    with platform.database.write() as connection:
        restored = {"customer_ref": ref, "issuer": "key", "customer_id": NAME, "salt": salt}
        connection.execute(customers.insert().values(restored))
    size = platform.log.published()
    if how == "erased again":
        erasure_of(platform).erase("key", NAME)
    else:
        with platform.database.write() as connection:
            assert forget_erased(connection) == 1
            assert forget_erased(connection) == 0
    assert platform.log.published() == size
    assert proven(platform, events[0]) == ("identity erased", None)


@sqlite_only
def test_who_still_reads_the_old_pages_is_waited_for_and_named(platform: Platform) -> None:
    used(platform)
    salt = salt_of(platform, ref_of(platform))

    @sa.event.listens_for(platform.database.engine, "checkout")
    def _impatient(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA busy_timeout=50")

    reader = connect(platform.settings.state_dir)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM customers").fetchall()
    with pytest.raises(Unavailable, match="run the command again"):
        erasure_of(platform).erase("key", NAME)
    reader.close()
    erasure_of(platform).erase("key", NAME)
    assert files_with(platform.settings.state_dir, salt) == []
