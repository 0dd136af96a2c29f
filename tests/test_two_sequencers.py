"""Several sequencers on one state, in processes that are killed: one log, whatever they do. SQLite and PostgreSQL.

And a store that answers late: a read that gives what stood before never forks the log.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.audit_log import AuditLog, create_head
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, ManualClock
from render_platform.database import lanes, log_entries, open_database, open_postgres, usage_events
from render_platform.errors import Missing, RecordError, Unavailable, UsageError
from render_platform.objects import FolderObjects, ObjectStore
from render_platform.outbox import Outbox
from tests.factories import START_US, make_events
from tests.platforms import LIVE, SeededIds, check_evidence, make_platform, read_published, record_random, tree_hash
from tests.postgres import make_database
from tests.test_audit_log import append, check_log, open_log, patiently, signer_of

SEQUENCERS = 4
KILLS = 10


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    return make_database("t_" + re.sub(r"\W", "_", request.node.name)[-50:].lower())


def open_sequencer(where: str, state: Path) -> AuditLog:
    database = open_database(where)
    create_head(database)
    return AuditLog(database, Cas(FolderObjects(state / "blobs")), FolderObjects(state / "log"), signer_of(state))


# Many processes.


def sequence(where: str, state: Path, name: str) -> None:
    """Append and publish until the input ends or somebody kills this; says each entry that it was told is committed."""
    log = open_sequencer(where, state)
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    number = 0
    while not ended.is_set():
        number += 1
        entry = f"{name}/{number}"
        (index,) = patiently(partial(append, log, entry))
        os.write(1, f"{index} {entry}\n".encode())
        if number % 2 == 0:
            patiently(log.publish)


CHILD = "import sys; from pathlib import Path; from tests.test_two_sequencers import sequence; \
sequence(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"


def start(where: str, state: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, where, str(state), name]
    with (state / name).open("wb") as said:
        return subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=said, stderr=subprocess.PIPE
        )


class Watcher(threading.Thread):
    """Keeps every checkpoint that it ever sees, and whether one was smaller than the one before."""

    def __init__(self, state: Path) -> None:
        super().__init__(daemon=True)
        self._state, self._ended = state, threading.Event()
        self.seen: dict[int, set[bytes]] = {}
        self.went_back = False

    def run(self) -> None:
        vkey = signer_of(self._state).verifier.vkey
        while not self._ended.wait(0.001):
            with suppress(FileNotFoundError):
                published = read_published(self._state, vkey)
                self.went_back |= published.size < max(self.seen, default=0)
                self.seen.setdefault(published.size, set()).add(published.root)

    def end(self) -> None:
        self._ended.set()
        self.join()


def run_and_kill(where: str, state: Path, rng: random.Random) -> dict[int, set[bytes]]:
    """SEQUENCERS processes at a time; KILLS times one of them is killed and another started."""
    state.mkdir(exist_ok=True)
    signer_of(state)
    watcher = Watcher(state)
    watcher.start()
    running = [start(where, state, f"s{number}") for number in range(SEQUENCERS)]
    try:
        for number in range(SEQUENCERS, SEQUENCERS + KILLS):
            size = max(watcher.seen, default=0)
            deadline = time.monotonic() + 60
            while max(watcher.seen, default=0) < size + 6 and time.monotonic() < deadline:
                threading.Event().wait(rng.random() / 50)
            victim = running.pop(rng.randrange(SEQUENCERS))
            assert victim.poll() is None, victim.communicate()[1].decode()
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            running.append(start(where, state, f"s{number}"))
        for child in running:
            errors = child.communicate(timeout=120)[1]
            assert child.returncode == 0, errors.decode()
    finally:
        for child in running:
            child.kill()
            child.communicate()
        watcher.end()
    assert not watcher.went_back
    return watcher.seen


def check_one_log(where: str, state: Path, seen: dict[int, set[bytes]]) -> None:
    """One chain; every checkpoint ever seen is of it; every entry that anybody was told of stands at its index."""
    with closing(open_database(where)) as database:
        log = open_sequencer(where, state)
        final = log.publish()
        assert final is not None
        entries = check_log(state, final.size)
        assert seen
        for size, roots in seen.items():
            assert roots == {tree_hash(entries[:size])}
        with database.read() as connection:
            rows = connection.execute(sa.select(log_entries).order_by(log_entries.c.log_index)).all()
        assert [bytes(row.entry) for row in rows] == entries
        names = {row.log_index: row.batch_id for row in rows}
        told = [line.split() for path in state.glob("s*") for line in path.read_text().splitlines()]
        assert len(told) > KILLS
        assert {(int(index), name) for index, name in told} <= set(names.items())
        assert len(set(names.values())) == len(names)
        log._database.close()


def test_killed_sequencers_make_one_log_on_sqlite(tmp_path: Path, rng: random.Random) -> None:
    state, where = tmp_path / "state", str(tmp_path / "platform.db")
    check_one_log(where, state, run_and_kill(where, state, rng))


def test_killed_sequencers_make_one_log_on_postgresql(tmp_path: Path, dsn: str, rng: random.Random) -> None:
    check_one_log(dsn, tmp_path / "state", run_and_kill(dsn, tmp_path / "state", rng))


# PostgreSQL as SQLite: one writer at a time, reads that are snapshots.


def test_recorders_on_postgresql_lose_nothing_and_never_go_back(dsn: str) -> None:
    """Many at once, with clocks that differ: in the order of commits no time goes back, and each event stands once."""
    with closing(open_postgres(dsn)) as database:
        outbox, order, lock = Outbox(database, SeededIds()), [], threading.Lock()

        def work(number: int) -> None:
            for step in range(20):
                events = make_events(2, number * 1_000 + step, START_US + number * 7_000_000 + step, 1_000)
                with database.write() as connection, lock:
                    order.append(outbox.record(connection, LIVE, sorted(events, key=lambda one: one.recorded_at)))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        times = [event.recorded_at for group in order for event in group]
        with database.read() as connection:
            stored = connection.execute(sa.select(usage_events.c.recorded_at).order_by(usage_events.c.recorded_at))
            assert sorted(times) == [row[0] for row in stored]
            assert connection.execute(sa.select(lanes.c.frontier_us)).scalar_one() == max(times)
        assert len(times) == 240
        assert times == sorted(times)
        with pytest.raises(RecordError), database.write() as connection:
            outbox.record(connection, LIVE, [order[0][0]])


def test_a_read_on_postgresql_is_a_snapshot_that_blocks_nobody(dsn: str) -> None:
    count = sa.select(sa.func.count()).select_from(log_entries)
    values = {"type": "charges", "batch_id": "a", "entry": b"", "leaf_hash": b""}
    with closing(open_postgres(dsn)) as database:
        with database.read() as reading:
            assert reading.execute(count).scalar() == 0
            with database.write() as writing:
                writing.execute(log_entries.insert().values(log_index=0, **values))
            assert reading.execute(count).scalar() == 0
        with database.read() as reading:
            assert reading.execute(count).scalar() == 1
        with pytest.raises(Unavailable), database.read() as reading:
            reading.execute(log_entries.delete())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("secret", UsageError),
        ("postgresql://u:secret@h:port/x", UsageError),
        ("postgresql://u:secret@127.0.0.1:1/x", Unavailable),
    ],
)
def test_a_postgresql_that_cannot_be_opened_is_said_without_its_password(text: str, expected: type[Exception]) -> None:
    pytest.importorskip(
        "psycopg", reason="POSTGRESQL NOT TESTED: psycopg is not installed: pip install 'psycopg[binary]'"
    )
    with pytest.raises(expected) as raised:
        open_postgres(text)
    assert "secret" not in str(raised.value)


# Stores that answer late.


class LateObjects:
    """An ObjectStore of which some reads give what stood before the last write of that object, or nothing."""

    def __init__(self, objects: ObjectStore, is_late: Callable[[], bool]) -> None:
        self._objects, self._is_late = objects, is_late
        self._before: dict[str, bytes | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def create(self, path: str, data: bytes) -> bool:
        made = self._objects.create(path, data)
        if made:
            self._before[path] = None
        return made

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        self._objects.replace(path, data, expected)
        self._before[path] = expected

    def read(self, path: str) -> bytes:
        late = self._is_late()
        data = self._before.get(path, b"") if late else b""
        if data is None:
            raise Missing(path)
        return data or self._objects.read(path)


def append_and_publish(log: AuditLog, names: Iterator[str]) -> None:
    """What a sequencer does all day; where it is stopped it goes on with the next thing, as the next process would."""
    for step in range(9):
        with suppress(Unavailable):
            if step % 3 == 2:
                log.publish()
            else:
                append(log, next(names))


def check_after_lateness(state: Path, tried: int) -> None:
    """A store that answers in time again: what was committed is published, as one log."""
    log = open_log(state)
    final = log.publish()
    assert final is not None
    size = final.size
    entries = check_log(state, size)
    assert 0 < len(entries) <= tried
    append(log, "afterwards")
    log.publish()
    check_log(state, size + 1)
    log._database.close()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_store_that_reads_late_never_forks_the_log(tmp_path: Path, every: int, rng: random.Random) -> None:
    """Late at every read, or at random ones. It may stop the log, and does; it never forks it."""
    names = (f"n{number}" for number in range(100))
    log = open_log(tmp_path)
    append(log, "first")
    log.publish()
    log._database.close()
    objects, blobs = (
        LateObjects(FolderObjects(tmp_path / name), lambda: not rng.randrange(every)) for name in ("log", "blobs")
    )
    late = open_log(tmp_path, objects, blobs)
    append_and_publish(late, names)
    late._database.close()
    check_after_lateness(tmp_path, 9)


def test_one_late_read_anywhere_is_made_good(tmp_path: Path) -> None:
    at, count = 0, 0

    def is_late() -> bool:
        nonlocal count
        count += 1
        return count == at

    while count >= at:
        at, count = at + 1, 0
        state = tmp_path / f"{at}"
        objects, blobs = (LateObjects(FolderObjects(state / name), is_late) for name in ("log", "blobs"))
        log = open_log(state, objects, blobs)
        append_and_publish(log, (f"n{number}" for number in range(100)))
        log._database.close()
        check_after_lateness(state, 7)
    assert at > 20


def test_a_flush_over_a_store_that_reads_late_loses_nothing(tmp_path: Path, rng: random.Random) -> None:
    platform = make_platform(tmp_path / "state", ManualClock(START_US + 2 * HOUR_US), batch_rows=5)
    recorded = record_random(platform, 12, 1)
    log, blobs = (LateObjects(store, lambda: not rng.randrange(3)) for store in (platform.log_objects, platform.blobs))
    platform.cas = Cas(blobs)
    platform.log = AuditLog(platform.database, platform.cas, log, platform.log_signer)
    for _ in range(10):
        with suppress(Unavailable):
            platform.flush()
    platform.close()
    with closing(
        make_platform(tmp_path / "state", ManualClock(START_US + 2 * HOUR_US), "again", batch_rows=5)
    ) as again:
        again.flush()
        check_evidence(tmp_path / "state", again.log_signer.verifier.vkey, recorded)
