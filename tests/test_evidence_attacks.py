"""What an attack on the evidence found stays closed: each of these tests does what the attack did."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from render_platform import batches, events
from render_platform.cas import collect_orphans
from render_platform.clock import HOUR_US, SystemClock
from render_platform.database import customers, gateways
from render_platform.entries import END_OF_TIME_US, FIRST_PREVIOUS, MAX_ACCEPTANCES, Acceptances, AuditEntry
from render_platform.errors import Finding
from render_platform.events import UsageEvent
from render_platform.gateway.identity import ApiKeys, Customers, Terms, api_keys
from render_platform.keyring import Keyring, Pinned, Rotation, countersign, key_entry, propose
from render_platform.note import FileSigner, Verifier
from render_platform.objects import LOCK, SCRATCH, FolderObjects
from render_platform.outbox import KEYS_REMEMBERED_S
from render_platform.pipeline import Platform
from render_platform.receipts import Erased, Erasure
from render_platform.recovery import LOST_EPOCHS, Recovered, Recovery
from tests.factories import make_events, make_table, replace_column
from tests.platforms import make_platform
from tests.stories import HOUR, HandMade, said, signer
from tests.test_completeness import Shop
from tests.test_recovery import backup, restore

G, NAME = "gw-1", "Zoë of the Atelier"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[HandMade]:
    with closing(HandMade(tmp_path)) as opened:
        yield opened


def said_of(epoch: int, first: int, through: int, still_open: int = 0, gateway: str = G) -> dict[str, Any]:
    """An acceptance range; what is open is the newest."""
    numbers = {"from": first, "through": through, "open": still_open, "oldest": through + 1 - still_open}
    return {"gateway": gateway, "epoch": epoch, **numbers}


# An entry that no reader would take is never signed.


@pytest.mark.parametrize(
    "wrong",
    [
        {"acceptances": ({**said_of(1, 1, 3), "open": -1},)},
        {"acceptances": (said_of(2, 1, 1), said_of(1, 1, 1))},
        {"acceptances": tuple(said_of(epoch, 1, 1) for epoch in range(1, MAX_ACCEPTANCES + 2))},
        {"records": -1},
        {"complete_until": END_OF_TIME_US},
    ],
    ids=["open below zero", "out of order", "too many", "records below zero", "after the end of time"],
)
def test_an_entry_that_cannot_be_read_is_refused_and_the_log_goes_on(made: HandMade, wrong: dict[str, Any]) -> None:
    first = made.batch(HOUR, 0, make_table(5))
    standing, marked = set(made.cas.digests()), []
    draft = AuditEntry(
        **({"type": "watermark", "batch_id": "poison", "previous": FIRST_PREVIOUS, "lane": "live"} | wrong)
    )
    with pytest.raises(Finding):
        made.audit_log.append(draft, lambda _connection, index: marked.append(index))
    assert marked == []
    assert set(made.cas.digests()) == standing
    assert made.publish().size == 1
    made.watermark(HOUR, first)
    outcome = made.verify(deep=True)
    assert outcome.verified, said(outcome)
    assert outcome.entries == 2


# A job that is billed twice is found, under whatever event ids.


def batch_of(made: HandMade, seq: int, *some: UsageEvent) -> AuditEntry:
    table = events.table_from_events(sorted(some, key=lambda event: event.event_id))
    return made.batch(HOUR, seq, table, complete_until=HOUR + HOUR_US - 10 + seq)


def test_a_job_billed_under_three_event_ids_is_found(made: HandMade) -> None:
    found = make_events(6)
    job = found[0].job_id
    first, second, third = (batch_of(made, seq, replace(found[seq], job_id=job), found[seq + 3]) for seq in range(3))
    made.watermark(HOUR, first, second, third)
    assert made.verify().verified, "rows are not read"
    (problem,) = made.verify(deep=True).problems
    assert str(third.subject_digest)[2:] in problem.where
    assert problem.what == f"a job stands twice: {job}; {first.batch_id}, {second.batch_id} holds it too"


def test_a_job_billed_twice_in_one_batch_is_found(made: HandMade) -> None:
    one, two, other = make_events(3)
    made.watermark(HOUR, batch_of(made, 0, one, replace(two, job_id=one.job_id), other))
    (problem,) = made.verify(deep=True).problems
    assert problem.what.startswith(f"a job stands twice: {one.job_id};")


def test_an_event_that_stands_twice_is_one_problem(made: HandMade) -> None:
    one, two, other = make_events(3)
    made.watermark(HOUR, batch_of(made, 0, one, two), batch_of(made, 1, two, other))
    (problem,) = made.verify(deep=True).problems
    assert problem.what.startswith(f"an event stands twice: {two.event_id};")


# Acceptance ranges where none belong, and ranges that put off what they have to answer for.


def entry_of(*items: dict[str, Any], kind: str = "usage_batch", lane: str | None = "live", rows: int = 0) -> AuditEntry:
    return AuditEntry(kind, "x", FIRST_PREVIOUS, lane=lane, complete_until=HOUR, records=rows, acceptances=items)


def follow(followed: Acceptances, entry: AuditEntry) -> list[str]:
    return list(followed.follow(entry, entry.records if entry.type == "usage_batch" else None))


@pytest.mark.parametrize(
    ("kind", "lane"), [("charges", None), ("charges", "live"), ("usage_batch", "trace/1"), ("watermark", "trace/1")]
)
def test_ranges_elsewhere_than_where_gateways_record_are_problems(kind: str, lane: str | None) -> None:
    followed = Acceptances()
    assert follow(followed, entry_of(said_of(1, 1, 2), rows=2)) == []
    assert follow(followed, entry_of(said_of(1, 3, 3, 1), kind=kind, lane=lane)) == [
        f"acceptances stand in a {kind} of the lane {lane}"
    ]


def test_ranges_in_another_lane_do_not_move_the_balance_there() -> None:
    followed = Acceptances()
    assert follow(followed, entry_of(said_of(1, 1, 2), rows=2)) == []
    follow(followed, entry_of(said_of(1, 3, 3, 1), lane="trace/1"))
    assert follow(followed, entry_of(rows=1)) == ["1 rows bill jobs of gateways, and 0 accepted jobs have ended"]


def test_a_gateway_that_comes_later_is_counted_from_its_first_epoch() -> None:
    """Only a log from before jobs were counted may begin with a later one."""
    followed = Acceptances()
    assert follow(followed, entry_of(rows=3)) == []
    assert follow(followed, entry_of(said_of(4, 1, 1), rows=1)) == []
    assert followed.begun_late == {G: 4}, "the log is older than the counting"
    assert follow(followed, entry_of(said_of(7, 1, 1, gateway="gw-2"), rows=1)) == [
        "gw-2 epoch 7: the acceptances of epoch 1 come next, and are left out"
    ]
    assert followed.begun_late == {G: 4}
    assert follow(followed, entry_of(said_of(1, 1, 1, gateway="gw-3"), rows=1)) == []


@pytest.mark.parametrize("bills", [True, False])
def test_full_entries_cannot_put_off_the_balance_for_ever(bills: bool) -> None:
    """Each says the same 200 ranges again, of which nothing has changed."""
    followed = Acceptances()
    full = [said_of(epoch, 1, 1) for epoch in range(1, MAX_ACCEPTANCES + 1)]
    idle = [said_of(epoch, 2, 1) for epoch in range(1, MAX_ACCEPTANCES + 1)]
    found = follow(followed, entry_of(*full, rows=MAX_ACCEPTANCES + (5 if bills else -5)))
    for _ in range(3):
        found += follow(followed, entry_of(*idle))
    rows = MAX_ACCEPTANCES + 5
    assert found == [
        f"{rows} rows bill jobs of gateways, and {MAX_ACCEPTANCES} accepted jobs have ended"
        if bills
        else f"{MAX_ACCEPTANCES} accepted jobs are said to have ended, and {MAX_ACCEPTANCES - 5} rows say how"
    ]


# A batch is bounded before it is unpacked.


def damaged(data: bytes) -> bytes:
    """Its pages cannot be read; its footer is as it was."""
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:4] + b"\xff" * (end - 4) + data[end:]


def test_a_batch_of_too_many_rows_is_refused_before_it_is_read() -> None:
    some = make_table(50)
    most = pa.concat_tables([some] * (batches.MAX_ROWS // 50)).combine_chunks()
    assert batches.MAX_ROWS == 50_000
    assert batches.decode(batches.encode(most)).num_rows == batches.MAX_ROWS
    for change in (bytes, damaged):
        with pytest.raises(Finding, match="holds more than a batch may"):
            batches.decode(change(batches.encode(pa.concat_tables([most, some.slice(0, 1)]))))


def test_a_batch_that_unpacks_into_too_much_is_refused_before_it_is_read() -> None:
    """A few rows, spread over row groups, each of which is small enough."""
    text = "x" * (batches.MAX_UNPACKED_BYTES // 4)
    row = replace_column(make_table(1), "model_name", [text])
    packed = [pa.BufferOutputStream() for _ in range(2)]
    for groups, sink in zip((3, 5), packed, strict=True):
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(sink, row.schema, version="2.6", **options) as writer:
            for _ in range(groups):
                writer.write_table(row)
    good, bomb = (bytes(sink.getvalue()) for sink in packed)
    assert batches.decode(good).num_rows == 3
    assert len(bomb) < batches.MAX_UNPACKED_BYTES // 1_000
    for data in (bomb, damaged(bomb)):
        with pytest.raises(Finding, match="holds more than a batch may"):
            batches.decode(data)


def test_a_batch_of_one_long_text_many_times_is_refused_while_it_is_read() -> None:
    """A dictionary holds the text once: neither file nor footer is large."""
    rows = make_table(1).take(pa.array([0] * 8_000))
    rows = replace_column(rows, "model_name", ["x" * 40_000] * 8_000)
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows, sink, compression="zstd", version="2.6", row_group_size=8_000, dictionary_pagesize_limit=1 << 30
    )
    data = bytes(sink.getvalue())
    assert len(data) < 1_000_000
    with pytest.raises(Finding, match="holds more than a batch may"):
        batches.decode(data)


# An erasure withdraws keys first, and leaves no copy in the database's files.


def keys_of(platform: Platform) -> list[str]:
    with platform.database.read() as connection:
        return [str(name) for name in connection.execute(sa.select(api_keys.c.customer_id)).scalars()]


def eraser(platform: Platform, sleep: Callable[[float], None]) -> Erasure:
    return Erasure(platform.database, platform.log.append, platform.log.publish, sleep)


def files_with(state: Path, name: str) -> list[str]:
    return [path.name for path in sorted(state.glob("platform.db*")) if name.encode() in path.read_bytes()]


def test_an_erasure_withdraws_keys_before_it_waits_and_leaves_no_copy(tmp_path: Path, rng: random.Random) -> None:
    state = tmp_path / "state"
    waits: list[tuple[float, list[str], bool]] = []
    with closing(make_platform(state)) as platform:

        @sa.event.listens_for(platform.database.engine, "checkout")
        def _as_before(connection: Any, *_: Any) -> None:
            """Older releases wrote so: rows move between pages, and where they stood before keeps copies of them."""
            connection.execute("PRAGMA secure_delete=OFF")

        with platform.database.write() as connection:
            ref = platform.outbox.customer_ref(connection, "key", NAME)
        keys = ApiKeys(platform.database, platform.clock, platform.ids)
        for n in range(300):
            name = f"{rng.choice('AZaz')}{rng.randrange(10**9)}{'y' * (n % 40)}"
            for one in (NAME, name):
                keys.create(one, ["customer"])
                Customers(platform.database).set("key", one, Terms())
    assert files_with(state, NAME) == ["platform.db"]
    with closing(make_platform(state, seed=2)) as platform:

        def sleep(seconds: float) -> None:
            with closing(make_platform(state, seed=1)) as other, other.database.read() as connection:
                known = connection.execute(sa.select(customers).filter_by(customer_ref=ref)).first()
                waits.append((seconds, [one for one in keys_of(other) if one == NAME], known is not None))

        assert eraser(platform, sleep).erase("key", NAME) == Erased(ref, 0)
        ((seconds, left, known),) = waits
        assert seconds > KEYS_REMEMBERED_S
        assert (left, known) == ([], True), "committed, while the identity is still there for what is being accepted"
        assert files_with(state, NAME) == []
        assert len(keys_of(platform)) == 300
        assert eraser(platform, sleep).erase("key", NAME) == Erased(None, None)
        assert len(waits) == 1, "nothing was withdrawn: nothing to wait for"
    assert files_with(state, NAME) == []


def test_an_erasure_waits_only_where_there_were_keys(platform: Platform) -> None:
    waits: list[float] = []
    with platform.database.write() as connection:
        ref = platform.outbox.customer_ref(connection, "key", NAME)
    ApiKeys(platform.database, platform.clock, platform.ids).create("other", ["customer"])
    assert eraser(platform, waits.append).erase("key", NAME) == Erased(ref, 0)
    assert (waits, keys_of(platform)) == ([], ["other"])


# Keys of one name that nothing links: a thief's and the log's own.


def test_two_pinned_keys_of_one_name_without_a_rotation_are_a_problem() -> None:
    old, new, recovery = signer("example.com/log", 1), signer("example.com/log", 2), signer("example.com/recovery", 3)

    def problems(*pinned: FileSigner, note: str = "") -> list[str]:
        keys: dict[str, list[Verifier]] = {"checkpoint": [one.verifier for one in pinned]}
        entries = [(0, key_entry(note)[0])] if note else []
        found = Keyring.from_entries(entries, Pinned(keys, recovery.verifier), lambda _digest: note.encode())
        return [problem.what for problem in found.problems]

    (what,) = problems(old, new)
    assert "several checkpoint keys of one name are pinned, and no rotation links them" in what
    assert problems(old) == problems(new) == problems(old, signer("example.com/other", 4)) == []
    rotation = Rotation("checkpoint", old.verifier, new.verifier, recovery.verifier, 1, 0)
    assert problems(old, new, note=countersign(propose(rotation, old, new), recovery)) == []


# A recovery leaves room for the starts that were lost.


def recover(state: Path) -> Recovered:
    with closing(make_platform(state, seed="recovery")) as platform:
        return Recovery(platform.database, platform.cas, platform.log_objects, [platform.log_signer.verifier]).run()


def epoch_of(state: Path) -> int:
    with closing(make_platform(state, seed="epoch")) as platform, platform.database.read() as connection:
        return int(connection.execute(sa.select(gateways.c.epoch)).scalar_one())


def work(shop: Shop) -> None:
    """Jobs that ended, one that did not, and all of it in the log."""
    made = shop.accept(3)
    shop.end(*made[:2])
    outcome = shop.flush()
    assert outcome.verified, said(outcome)


def started(state: Path, us: int, seed: str) -> Shop:
    """The gateway's next start, at `us`."""
    shop = Shop(state, seed=seed)
    shop.clock.move_to(us)
    return shop


def test_a_recovery_skips_epochs_once_and_the_log_says_that_they_were_idle(tmp_path: Path) -> None:
    state = tmp_path / "state"
    shop = Shop(state)
    for _ in range(2):
        work(shop)
        shop.restart()
    backup(state)
    for _ in range(2):
        work(shop)
        shop.restart()
    work(shop)
    us, known = shop.clock.us, shop.epoch
    shop.platform.close()
    assert known == 5
    for turn in ("first", "second"):
        restore(state)
        assert recover(state).entries["usage_batch"] > 0
        assert epoch_of(state) == known + LOST_EPOCHS, "once, whatever many epochs the log knows"
        assert not recover(state).entries
        assert epoch_of(state) == known + LOST_EPOCHS, "a recovery that has nothing to do skips nothing"
        shop = started(state, us, turn)
        assert shop.epoch == known + LOST_EPOCHS + 1
        work(shop)
        work(shop)
        later = [item for entry in shop.said() for item in entry["acceptances"] if item["epoch"] > known]
        through = {item["epoch"]: item["through"] for item in later}
        assert through == {**dict.fromkeys(range(known + 1, shop.epoch), 0), shop.epoch: 6}
        us, known = shop.clock.us, shop.epoch
        shop.platform.close()


# Scratch files of killed writers go; the lock never.


def test_old_scratch_files_are_collected_and_the_lock_is_not(tmp_path: Path) -> None:
    objects, clock = FolderObjects(tmp_path), SystemClock()
    objects.replace("checkpoint", b"x", None)
    left, young = f"{SCRATCH}0123456789abcdef", f"{SCRATCH}fedcba9876543210"
    for name in (left, young):
        (tmp_path / name).write_bytes(b"half of an obj")
    assert (tmp_path / LOCK).exists()
    lock = (tmp_path / LOCK).stat().st_ino
    for name in (left, LOCK):
        os.utime(tmp_path / name, (1, 1))
    planned = collect_orphans(objects, lambda _digest: False, clock, plan=True)
    assert [one.name for one in planned.orphans] == [left]
    assert (tmp_path / left).exists()
    done = collect_orphans(objects, lambda _digest: False, clock, plan=False)
    assert [one.name for one in done.removed] == [left]
    assert sorted(objects.names(SCRATCH)) == [young, LOCK]
    assert (tmp_path / LOCK).stat().st_ino == lock
