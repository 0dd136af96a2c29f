"""Recovery: a database older than the published log is brought up to it, whatever it held and wherever it stops."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from render_platform import merkle, tiles
from render_platform.clock import HOUR_US, ManualClock
from render_platform.database import job_bodies, jobs
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing, PlatformError, SequencerStopped
from render_platform.events import UsageEvent
from render_platform.note import Checkpoint, load_or_create_key, sign_note
from render_platform.pipeline import Platform
from render_platform.recovery import Recovered, Recovery
from tests import platforms
from tests.factories import START_US, make_events
from tests.faults.test_crash_slow_path import KINDS, Crash, Faults, with_faults
from tests.platforms import LIVE, check_evidence, connect, make_platform, read_log, record, record_random

State = tuple[Path, list[UsageEvent]]
END_US = START_US + 3 * HOUR_US
LIMITS = {"batch_rows": 5, "seal_rows_a_transaction": 3}
LOGGED = {
    "log_head": "size, peaks, root, last_entry_digest",
    "log_entries": "log_index, type, batch_id, hour_us, entry, leaf_hash",
    "batches": "batch_id, type, lane, hour_us, batch_seq, state, records, gpu_time_ns, first_recorded_at,"
    " last_recorded_at, complete_until, merkle_root, blob_digest, blob_size, attestation_digest, log_index",
    "usage_events": "*",
    "reports": "hour_us, revision, digest, status",
    "repairs": "repair_id, hour_us, state",
}


def open_state(state: Path, seed: str = "again", us: int = END_US) -> Platform:
    return make_platform(state, ManualClock(us), seed, **LIMITS)


def recovery(platform: Platform) -> Recovery:
    return Recovery(platform.database, platform.cas, platform.log_objects, [platform.log_signer.verifier])


def recover(state: Path) -> Recovered:
    with closing(open_state(state)) as platform:
        return recovery(platform).run()


def backup(state: Path, name: str = "copy.db") -> None:
    platforms.back_up(state, name)


def restore(state: Path, name: str = "copy.db") -> None:
    platforms.restore(state, name)


def dump(state: Path, tables: Sequence[str] = tuple(LOGGED)) -> dict[str, list[Any]]:
    """What the log gives of a database, every row of it."""
    with closing(connect(state)) as connection:
        return {
            name: sorted(connection.execute(f"SELECT {LOGGED[name]} FROM {name}").fetchall(), key=repr)
            for name in tables
        }


def epoch_of(state: Path) -> int:
    with closing(connect(state)) as connection:
        return int(connection.execute("SELECT epoch FROM log_head").fetchone()[0])


def refused(state: Path) -> None:
    with closing(open_state(state)) as platform, pytest.raises(SequencerStopped, match="older copy") as stopped:
        platform.flush()
    assert stopped.value.remedy == "run `render-platform recover`"


def whole(state: Path, recorded: Sequence[UsageEvent], us: int = END_US) -> None:
    """The platform works again: what waits is sealed, and all evidence holds."""
    with closing(open_state(state, "whole", us)) as platform:
        platform.flush()
        check_evidence(state, platform.log_signer.verifier.vkey, recorded)
        outcome = platform.verify(deep=True)
        assert outcome.verified, outcome.problems
        assert platform.flush().logged == 0


@pytest.fixture
def live(tmp_path: Path) -> State:
    """A state with a backup from before most of it; its last batches were published after that."""
    state = tmp_path / "state"
    with closing(open_state(state, "live", START_US)) as platform:
        recorded = record_random(platform, 7, 1, span_us=HOUR_US // 4)
        platform.flush()
        recorded += record_random(platform, 4, 2, start_us=START_US + HOUR_US // 2, span_us=HOUR_US // 4)
        backup(state)
        recorded += record_random(platform, 6, 3, start_us=START_US + HOUR_US, span_us=HOUR_US)
        recorded += record_random(platform, 3, 4, lane="trace/1")
        with platform.database.write() as connection:
            platform.outbox.finish_lane(connection, "trace/1", START_US + HOUR_US)
    with closing(open_state(state, "later")) as platform:
        platform.flush()
        check_evidence(state, platform.log_signer.verifier.vkey, recorded)
    return state, recorded


def test_a_restored_database_is_refused_until_it_is_recovered(live: State) -> None:
    state, recorded = live
    before = dump(state)
    restore(state)
    refused(state)
    restore(state)
    old = epoch_of(state)
    done = recover(state)
    assert epoch_of(state) > old, "an append that had begun before finds another head"
    assert (done.size_before, done.events_restored, done.events_marked) == (2, 9, 4)
    assert done.entries == {"usage_batch": 4, "watermark": 4}
    assert dump(state) == before
    assert recover(state) == Recovered(done.size, done.size), "a second time there is nothing to do"
    with closing(open_state(state, "new", END_US)) as platform:
        more = record_random(platform, 3, 9, start_us=END_US)
    whole(state, [*recorded, *more], END_US + 2 * HOUR_US)


def test_what_the_refused_platform_had_begun_is_undone(live: State) -> None:
    """A flush of the restored database seals and stores, under names that the log has given to others."""
    state, recorded = live
    restore(state)
    with closing(open_state(state, "new", END_US)) as platform:
        more = record_random(platform, 2, 9, start_us=END_US)
        with pytest.raises(SequencerStopped):
            platform.flush()
    done = recover(state)
    assert done.batches_undone > 2
    assert done.events_marked == 4
    whole(state, [*recorded, *more], END_US + 2 * HOUR_US)


def test_a_lost_database_comes_back_from_the_log_alone(live: State) -> None:
    state, recorded = live
    before = dump(state)
    platforms.lose_database(state)
    done = recover(state)
    assert (done.size_before, done.events_restored) == (0, len(recorded))
    assert dump(state) == before
    whole(state, recorded)


def test_a_plan_says_the_same_and_writes_nothing(live: State) -> None:
    state, _ = live
    restore(state)
    before = dump(state)
    with closing(open_state(state)) as platform:
        seen: list[tuple[str, int, int]] = []
        planned = recovery(platform).plan(lambda *one: seen.append(one))
        assert dump(state) == before
        assert recovery(platform).run() == planned
    assert {stage for stage, _, _ in seen} == {"log", "plan"}
    assert all(0 <= step <= total for _, step, total in seen)


def copies_at_every_write(folder: Path) -> Iterator[State]:
    """States that were backed up at each write of a flush, and whose flush then came to its end."""
    first = folder / "first"
    with closing(open_state(first, "first", START_US)) as platform:
        recorded = record_random(platform, 8, 1)
        platform.flush()
        recorded += record(platform, LIVE, make_events(6, 2, START_US + HOUR_US))
    at = 0
    while True:
        at += 1
        state = shutil.copytree(first, folder / f"{at}")
        faults = Faults(at, "kept")
        platform = with_faults(open_state(state, f"{at}"), faults)
        with closing(platform):
            try:
                platform.flush()
            except Crash:
                backup(state)
        if not faults.injected:
            return
        with closing(open_state(state, f"{at}/end")) as platform:
            platform.flush()
        yield state, recorded
        shutil.rmtree(state)


def test_a_backup_from_any_instant_of_a_flush_is_recovered(tmp_path: Path) -> None:
    seen = 0
    for state, recorded in copies_at_every_write(tmp_path):
        before = dump(state)
        restore(state)
        recover(state)
        whole(state, recorded)
        assert dump(state) == before
        seen += 1
    assert seen > 20


def run_with(state: Path, faults: Faults) -> None:
    with closing(with_faults(open_state(state), faults)) as platform, suppress(Crash):
        recovery(platform).run()


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_any_commit_is_made_good_by_the_next_recovery(
    live: State, tmp_path: Path, kind: str, rng: random.Random
) -> None:
    state, recorded = live
    before = dump(state)
    restore(state)
    at = 0
    while True:
        at += 1
        crashed = shutil.copytree(state, tmp_path / f"{at}")
        faults = Faults(at, kind)
        run_with(crashed, faults)
        if not faults.injected:
            break
        if dump(crashed, ["log_head"]) != {"log_head": before["log_head"]}:
            refused(crashed)
        run_with(crashed, Faults(rng.randrange(1, 4), rng.choice(KINDS)))
        recover(crashed)
        assert dump(crashed) == before
        whole(crashed, recorded)
    assert at == 9, "eight entries, a commit each"


def test_a_fork_is_never_repaired(live: State, tmp_path: Path) -> None:
    """The log was hidden while the restored database grew on: to a shorter log, one of the same size, a longer one."""
    state, _ = live
    for grown in (1, 8, 12):
        forked = shutil.copytree(state, tmp_path / f"{grown}")
        restore(forked)
        shutil.rmtree(forked / "log")
        with closing(connect(forked)) as connection:
            connection.execute("DELETE FROM checkpoints")
            connection.commit()
        with closing(open_state(forked)) as platform:
            for n in range(grown):
                platform.log.append(AuditEntry("charges", f"{n}", FIRST_PREVIOUS), lambda *_: None)
        shutil.copytree(state / "log", forked / "log")
        unchanged(forked, SequencerStopped, "never repaired")


def unchanged(state: Path, expected: type[PlatformError], match: str) -> None:
    before = dump(state)
    for act in (Recovery.plan, Recovery.run):
        with closing(open_state(state)) as platform, pytest.raises(expected, match=match):
            act(recovery(platform))
    assert dump(state) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("checkpoint", "note"),
        ("tile/0/000.p/10", "does not hold"),
        ("tile/entries/000.p/10", "entr|canonical|JSON"),
    ],
)
def test_a_log_that_does_not_hold_is_not_replayed(live: State, path: str, match: str) -> None:
    state, _ = live
    restore(state)
    whole_log = shutil.copytree(state / "log", state / "whole")
    flip(state / "log" / path)
    unchanged(state, Finding, match)
    (state / "log" / path).unlink()
    unchanged(state, Missing, path)
    shutil.rmtree(state / "log")
    shutil.copytree(whole_log, state / "log")
    recover(state)


def test_a_log_of_another_key_is_not_replayed(live: State) -> None:
    state, _ = live
    restore(state)
    (state / "keys" / "checkpoint.key").unlink()
    load_or_create_key(state / "keys" / "checkpoint.key", "log.example")
    unchanged(state, Finding, "no known key")


def test_a_signed_log_whose_chain_is_broken_is_not_replayed(tmp_path: Path) -> None:
    with closing(open_state(tmp_path / "state")) as platform:
        entries = [AuditEntry("charges", name, FIRST_PREVIOUS).to_bytes() for name in "ab"]
        leaves = [merkle.leaf_hash(entry) for entry in entries]
        checkpoint = Checkpoint(platform.log_signer.name, 2, merkle.root(leaves))
        platform.log_objects.create("tile/entries/000.p/2", tiles.encode_bundle(entries))
        platform.log_objects.create("tile/0/000.p/2", b"".join(leaves))
        note = sign_note(checkpoint.text(), [platform.log_signer]).encode()
        platform.log_objects.replace("checkpoint", note, None)
    unchanged(tmp_path / "state", Finding, "entry 1 does not name")


def test_a_lost_batch_stops_the_recovery_where_it_is_needed(live: State) -> None:
    state, recorded = live
    restore(state)
    lost = next(entry for entry in map(parse, read_log(state, 10)[2:]) if entry.type == "usage_batch")
    digest = str(lost.subject_digest)
    path = state / "blobs" / "sha256" / digest[:2] / digest[2:]
    path.rename(state / "aside")
    with pytest.raises(Missing):
        recover(state)
    refused(state)
    (state / "aside").rename(path)
    recover(state)
    whole(state, recorded)


def test_the_log_bills_an_event_once(live: State) -> None:
    """A log that was signed over the same batch twice: the second time is a finding."""
    state, _ = live
    entries = [parse(data) for data in read_log(state, 10)]
    twice = next(entry for entry in entries if entry.type == "usage_batch")
    with closing(open_state(state)) as platform:
        platform.log.append(replace(twice, batch_id="other", batch_seq=77), lambda *_: None)
        platform.log.publish()
    restore(state)
    with pytest.raises(Finding, match="in the log twice"):
        recover(state)


def test_an_event_of_a_declared_time_moves_to_the_frontier(live: State) -> None:
    """Recorded into the restored database by a clock that stood still: its hour is complete in the log."""
    state, recorded = live
    restore(state)
    with closing(open_state(state, "new", START_US)) as platform:
        late = record_random(platform, 2, 9, start_us=START_US + HOUR_US, span_us=1_000)
        done = recovery(platform).run()
        assert done.events_raised == 2
    whole(state, [*recorded, *(replace(event, recorded_at=END_US) for event in late)], END_US + 2 * HOUR_US)


def accept(platform: Platform, events: Sequence[UsageEvent], state: str, attempt: int, epoch: int = 1) -> None:
    """Rows of the jobs that the events end, with a body that waits."""
    with platform.database.write() as connection:
        for seq, event in enumerate(events, 1):
            job_id = event.job_id.bytes
            row: dict[str, Any] = {"job_id": job_id, "gateway_id": "gw", "epoch": epoch, "seq": seq, "request_id": b""}
            row |= {"request_digest": b"", "customer_ref": event.customer_ref, "pricing_tier": "free", "lane": "normal"}
            row |= {"model_name": "m", "task": "t", "direct": False, "state": state, "attempt": attempt}
            connection.execute(jobs.insert().values(**row, accepted_us=START_US, deadline_us=END_US))
            connection.execute(job_bodies.insert().values(job_id=job_id, body=b"{}"))


def ends(state: Path) -> dict[bytes, tuple[str, int, str | None, int]]:
    with closing(connect(state)) as connection:
        rows = connection.execute("SELECT job_id, state, attempt, error_code, finished_us FROM jobs").fetchall()
    return {row[0]: row[1:] for row in rows}


def test_a_job_whose_event_is_in_the_log_has_ended(tmp_path: Path) -> None:
    """The restored database thinks it queued, running, or has run it again and ended it otherwise."""
    state = tmp_path / "state"
    events = make_events(9, 1)
    queued, running, again = events[:3], events[3:6], events[6:]
    with closing(open_state(state, "live")) as platform:
        accept(platform, queued, "queued", 0)
        backup(state)
        recorded = record(platform, LIVE, events)
        platform.flush()
    restore(state)
    with closing(open_state(state, "new")) as platform:
        accept(platform, running, "running", 1, epoch=2)
        accept(platform, again, "success", 7, epoch=3)
        other = make_events(3, 77, END_US)
        second = [replace(new, job_id=old.job_id) for new, old in zip(other, again, strict=True)]
        record(platform, LIVE, second)
        planned = recovery(platform).plan()
        done = recovery(platform).run()
    assert planned == done
    assert done.jobs_ended == 9
    assert sorted(done.events_superseded) == sorted(str(event.event_id) for event in second)
    said = {e.job_id.bytes: (e.status, e.attempt, e.error_code, e.recorded_at) for e in recorded}
    assert ends(state) == said
    with closing(connect(state)) as connection:
        assert connection.execute("SELECT count(*) FROM job_bodies").fetchone() == (0,)
    whole(state, recorded)
