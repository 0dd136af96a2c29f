"""Tampering: whatever happens to any one file of the evidence, verification fails and names that file."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform import tiles
from render_platform.cas import digest_at
from render_platform.clock import HOUR_US, SystemClock
from render_platform.database import checkpoints
from render_platform.evidence import Evidence, Verification
from render_platform.note import Checkpoint, cosignatures_of
from render_platform.objects import FolderObjects
from render_platform.verification import verify
from render_platform.witness import make_witness, open_witness
from tests import chdb_server
from tests.commands import run_inside, trace_rows, write_trace
from tests.factories import make_events
from tests.stories import (
    AFTER_HOUR,
    HOUR,
    NOWHERE,
    HandMade,
    MemoryObjects,
    about,
    deliver,
    finish_lane,
    logged,
    move_to,
    named,
    open_story,
    record,
    run_in_clickhouse,
    said,
)
from tests.tampering_cases import ROWS, Scene, fork_the_log, make_scene, problems_of, rotate_the_key, submission

FLIPS = 6


class State:
    """Evidence in memory that can be harmed, and is whole again for the next test."""

    def __init__(self, evidence: Evidence, folder: Path | None = None) -> None:
        self.folder = folder
        self.whole = {f"log/{name}": evidence.log.read(name) for name in evidence.log.names()}
        self.whole |= {f"blobs/{name}": evidence.blobs.read(name) for name in evidence.blobs.names()}
        self._evidence = evidence

    def verify(
        self, changes: dict[str, bytes | None], *, deep: bool = False, history: tuple[Checkpoint, ...] | None = None
    ) -> Verification:
        """With some files replaced, or gone where None."""
        files = {name: data for name, data in (self.whole | changes).items() if data is not None}
        stores = {
            part: MemoryObjects({n.removeprefix(part): d for n, d in files.items() if n.startswith(part)})
            for part in ("log/", "blobs/")
        }
        kept = self._evidence.history if history is None else history
        return verify(replace(self._evidence, log=stores["log/"], blobs=stores["blobs/"], history=kept), deep=deep)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.whole if name.startswith(prefix))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """Two lanes, three hours, an empty one, duplicates, a repair, several revisions, many published sizes."""
    folder = tmp_path_factory.mktemp("state")
    with closing(open_story(folder, chdb_server.fresh_database(), batch_rows=9)) as platform:
        made = record(platform, make_events(20, 1))
        deliver(platform, made[4:])
        platform.flush()
        platform.repair(HOUR)
        record(platform, make_events(4, 3), "trace/1")
        finish_lane(platform, "trace/1", HOUR + HOUR_US)
        platform.flush()
        platform.reconcile(HOUR)
        deliver(platform, made[:1], "again")
        platform.reconcile(HOUR)
        move_to(platform, AFTER_HOUR + 2 * HOUR_US)
        record(platform, make_events(3, 5, HOUR + 2 * HOUR_US, 60_000_000))
        platform.flush()
        platform.reconcile(HOUR + HOUR_US)
        run_in_clickhouse(platform, f"DROP DATABASE {platform.settings.clickhouse_database}")
        kinds = {kind: len(logged(platform, kind)) for kind in ("usage_batch", "watermark", "reconciliation", "repair")}
        assert kinds == {"usage_batch": 5, "watermark": 4, "reconciliation": 5, "repair": 1}
        evidence = Evidence(
            log=platform.log_objects,
            blobs=platform.blobs,
            log_keys=[platform.log_signer.verifier],
            attestation_keys=[platform.attestation_signer.verifier],
            history=tuple(platform.history()),
        )
        return State(evidence, folder)


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    """More than two full tiles of level 0: level 1 exists, and partial tiles of several sizes stand."""
    with closing(HandMade(tmp_path_factory.mktemp("long"))) as made:
        for n in range(530):
            made.watermark(HOUR + n * HOUR_US)
            if n in (0, 99, 255, 256, 300, 511):
                made.publish()
        made.publish()
        yield State(made.evidence())


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def assert_found(outcome: Verification, name: str, state: State) -> None:
    """It fails, it names the file, and it accuses no other file that is whole."""
    assert not outcome.verified
    assert about(outcome, name), f"{name} is not named:\n{said(outcome)}"
    if name == "log/checkpoint":
        return  # without it nothing of the log can be trusted
    others = {where for where in named(outcome) if where in state.whole and where != name}
    assert not others, f"{name} was harmed, and {others} accused"


def positions(name: str, size: int) -> list[tuple[int, int]]:
    """Byte and bit positions: the first, the last, and some that the name seeds."""
    rng = random.Random(name)
    return [(at, rng.randrange(8)) for at in {0, size - 1, *(rng.randrange(size) for _ in range(FLIPS))}]


def test_the_state_holds_every_kind_of_file_and_is_good(state: State) -> None:
    for deep in (False, True):
        outcome = state.verify({}, deep=deep)
        assert outcome.verified, said(outcome)
    assert state.names("log/checkpoint")
    assert len(state.names("log/tile/0/")) == len(state.names("log/tile/entries/")) > 5
    blobs = [state.whole[name] for name in state.names("blobs/")]
    for kind in (
        b"PAR1",
        b'{"payloadType"',
        b'{"version":1,"type"',
        b'{"version":1,"hour"',
        b'{"version":1,"repair_id"',
    ):
        assert any(data.startswith(kind) for data in blobs), kind
    assert state.folder is not None
    stray = {path for path in state.folder.rglob("*") if path.is_file()}
    evidence = {state.folder / name for name in state.whole}
    assert evidence <= stray


def test_one_changed_bit_in_any_file_is_found_and_named(state: State) -> None:
    for name, data in state.whole.items():
        for at, bit in positions(name, len(data)):
            assert_found(state.verify({name: flipped(data, at, bit)}), name, state)


def test_every_byte_of_the_checkpoint_counts(state: State) -> None:
    data = state.whole["log/checkpoint"]
    for at in range(len(data)):
        for bit in (0, 5):
            assert_found(state.verify({"log/checkpoint": flipped(data, at, bit)}), "log/checkpoint", state)


def test_every_byte_of_the_newest_bundle_counts(state: State) -> None:
    name = max(state.names("log/tile/entries/"), key=lambda path: len(state.whole[path]))
    data = state.whole[name]
    for at in range(0, len(data), 11):
        outcome = state.verify({name: flipped(data, at, at % 8)})
        assert about(outcome, name), said(outcome)


def test_an_altered_bundle_accuses_no_file_that_is_whole(state: State) -> None:
    """The hash tiles say which entries are altered: what those claim is nothing to hold other files against."""
    name = max(state.names("log/tile/entries/"), key=lambda path: len(state.whole[path]))
    data = state.whole[name]
    for at in range(0, len(data), 23):
        assert_found(state.verify({name: flipped(data, at, at % 8)}), name, state)


@pytest.mark.parametrize(
    "harm", ["delete", "truncate", "empty", "append", "append newline", "prepend", "double", "zero"]
)
def test_any_file_that_is_gone_shorter_longer_or_blank_is_found_and_named(state: State, harm: str) -> None:
    for name, data in state.whole.items():
        harmed = {
            "delete": None,
            "truncate": data[:-1],
            "empty": b"",
            "append": data + b"\0",
            "append newline": data + b"\n",
            "prepend": b"\0" + data,
            "double": data + data,
            "zero": bytes(len(data)),
        }[harm]
        assert_found(state.verify({name: harmed}), name, state)


def test_two_files_that_changed_places_are_both_named(state: State) -> None:
    rng = random.Random(1)
    for part in ("blobs/", "log/"):
        pairs = list(itertools.combinations(state.names(part), 2))
        for one, two in rng.sample(pairs, min(60, len(pairs))):
            if state.whole[one] == state.whole[two]:
                continue
            outcome = state.verify({one: state.whole[two], two: state.whole[one]})
            assert not outcome.verified
            if "log/checkpoint" in (one, two):
                assert about(outcome, "log/checkpoint")
            else:
                assert {one, two} <= named(outcome), said(outcome)


def test_one_object_in_the_place_of_another_is_found(state: State) -> None:
    names = state.names("blobs/")
    for one, two in itertools.pairwise(names):
        assert_found(state.verify({one: state.whole[two]}), one, state)


def test_every_object_harmed_at_once_is_named(state: State) -> None:
    harmed = {name: flipped(state.whole[name], 0, 0) for name in state.names("blobs/")}
    outcome = state.verify(dict(harmed))
    assert harmed.keys() <= named(outcome)


def test_deep_says_no_less(state: State) -> None:
    for name in state.names("blobs/"):
        assert_found(state.verify({name: flipped(state.whole[name], 9, 1)}, deep=True), name, state)


def test_a_batch_replaced_by_another_under_its_own_digest_is_missed_by_nobody(state: State) -> None:
    """The forger stores a good object elsewhere and removes the true one."""
    name = next(n for n in state.names("blobs/") if state.whole[n].startswith(b"PAR1"))
    other = flipped(state.whole[name], 40, 0)
    digest = hashlib.sha256(other).hexdigest()
    outcome = state.verify({name: None, f"blobs/sha256/{digest[:2]}/{digest[2:]}": other}, deep=True)
    assert about(outcome, name)


def test_each_earlier_checkpoint_in_place_of_the_newest_is_found(state: State) -> None:
    """Signed and true once: only whoever remembers the newer one can tell."""
    platform = open_story(state.folder or Path(), "none", dsn=NOWHERE)
    with closing(platform), platform.database.read() as connection:
        notes = [row.note.encode() for row in connection.execute(checkpoints.select().order_by("size"))]
    assert notes[-1] == state.whole["log/checkpoint"]
    assert len(notes) > 5
    for note in notes[:-1]:
        outcome = state.verify({"log/checkpoint": note})
        assert "not consistent" in about(outcome, "log/checkpoint")[0].what


def test_on_the_disk_as_in_memory(state: State, tmp_path: Path) -> None:
    """A few of the same through the real store, each file in its folder."""
    rng = random.Random(4)
    for name in ["log/checkpoint", *rng.sample(state.names("log/tile/"), 2), *rng.sample(state.names("blobs/"), 3)]:
        root = tmp_path / hashlib.sha256(name.encode()).hexdigest()[:8]
        for path, data in state.whole.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        stores = {"log": FolderObjects(root / "log"), "blobs": FolderObjects(root / "blobs")}
        evidence = replace(state._evidence, **stores)  # type: ignore[arg-type]
        assert verify(evidence).verified
        (root / name).write_bytes(flipped(state.whole[name], 3, 2))
        assert_found(verify(evidence), name, state)
        (root / name).unlink()
        assert_found(verify(evidence), name, state)
        (root / name).mkdir()
        outcome = verify(evidence)
        assert not outcome.verified
        assert about(outcome, name)


# A log of more than one tile.


def test_the_long_log_has_full_tiles_and_a_second_level(long_log: State) -> None:
    assert long_log.verify({}).verified
    found = {tiles.parse_path(name.removeprefix("log/")) for name in long_log.names("log/tile/")}
    assert {(0, 0, 256), (0, 1, 256), (0, 2, 18), (1, 0, 1), (1, 0, 2), (None, 0, 256), (None, 2, 18)} <= found
    assert {(0, 0, 1), (0, 0, 100), (None, 1, 45), (0, 1, 1)} <= found


def has_to_stand(long_log: State, name: str) -> bool:
    """Not a partial tile whose full one is published: that one may be deleted."""
    return name.partition(".p/")[0] not in long_log.whole or ".p/" not in name


def test_every_tile_and_bundle_of_a_long_log_counts(long_log: State) -> None:
    for name in long_log.names("log/"):
        data = long_log.whole[name]
        rng = random.Random(name)
        at = rng.randrange(len(data))
        for harmed in (flipped(data, at, at % 8), None, data[:-1], data + b"\0"):
            outcome = long_log.verify({name: harmed})
            found = harmed is not None or has_to_stand(long_log, name)
            assert outcome.verified != found
            assert bool(about(outcome, name)) == found, f"{name}:\n{said(outcome)}"


def test_a_full_tile_that_is_only_partial_is_found(long_log: State) -> None:
    tile = "log/tile/0/000"
    outcome = long_log.verify({tile: long_log.whole[tile][: 100 * 32]})
    assert_found(outcome, tile, long_log)


def test_bundles_of_two_tiles_that_changed_places_are_both_named(long_log: State) -> None:
    one, two = "log/tile/entries/000", "log/tile/entries/001"
    outcome = long_log.verify({one: long_log.whole[two], two: long_log.whole[one]})
    assert {one, two} <= named(outcome)


def test_all_hash_tiles_gone_leaves_the_entries_to_say_which(long_log: State) -> None:
    gone = {name: None for name in long_log.names("log/tile/") if "entries" not in name}
    outcome = long_log.verify(dict(gone))
    assert named(outcome) == {name for name in gone if has_to_stand(long_log, name)}


def test_all_bundles_gone_leaves_the_tiles_to_be_checked(long_log: State) -> None:
    gone = dict.fromkeys(long_log.names("log/tile/entries/"))
    outcome = long_log.verify(dict(gone))
    assert named(outcome) == {name for name in gone if has_to_stand(long_log, name)}


def test_a_partial_tile_left_over_after_its_full_one_must_still_be_right(long_log: State) -> None:
    partial = "log/tile/0/000.p/100"
    assert long_log.verify({partial: None}).verified
    assert_found(long_log.verify({partial: b"x" * 3_200}), partial, long_log)


def test_names_promise_digests(state: State) -> None:
    for name in state.names("blobs/"):
        assert digest_at(name.removeprefix("blobs/")) == hashlib.sha256(state.whole[name]).hexdigest()


# The table: what somebody who reaches the folders can do, and what the command says of it.


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene") / "state")


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_table_is_detected_and_named(scene: Scene, tmp_path: Path, name: str) -> None:
    row, harmed = ROWS[name], scene.copy(tmp_path / "state")
    command = ["verify", "--state", harmed.state, *row.options(harmed)]
    before = run_inside(*command)
    assert before.code == 0, before.said
    places = row.harm(harmed)
    after = run_inside(*command)
    assert after.code == 1, after.said
    for place in places:
        found = [problem["what"] for problem in problems_of(after.stdout) if problem["where"] == place]
        assert any(row.what in what for what in found), f"{place} is not named with {row.what!r}: {after.stdout}"


def test_bytes_after_the_end_of_gzip_are_refused(tmp_path: Path) -> None:
    """No evidence is gzip; traces may be, and nothing is billed of one that goes on after its last member."""
    whole = gzip.compress(write_trace(tmp_path / "trace.csv", trace_rows(5)).read_bytes())
    trace = tmp_path / "trace.csv.gz"
    for data in (whole + b"\x01", whole[:-8] + whole, whole + whole[:20]):
        trace.write_bytes(data)
        outcome = run_inside("demo", "--state", tmp_path / "state", "--trace", trace)
        assert outcome.code == 2, outcome.said
        assert f"{trace}: the gzip data is damaged" in outcome.stderr.replace("\n", "")


def test_a_log_signed_again_with_a_key_stolen_before_its_rotation_is_found_by_a_witness(
    scene: Scene, tmp_path: Path
) -> None:
    """The old key may sign sizes before the rotation for good: to who pinned it, the thief's log is a whole one."""
    true, forged = scene.copy(tmp_path / "true"), scene.copy(tmp_path / "forged")
    size, log = scene.sizes[-1], rotate_the_key(true)
    fork_the_log(forged)
    alone = run_inside("verify", "--state", forged.state, *forged.pins, "--json")
    assert alone.code == 0, alone.said
    note = (forged.log / "checkpoint").read_text()
    make_witness(tmp_path / "witness", "example.com/witness")
    with open_witness(tmp_path / "witness", [log.old.verifier, log.new.verifier], SystemClock()) as witness:
        cosigned = witness.add_checkpoint(submission(0, [], log.before))
        assert cosigned.status == 200, cosigned.body
        refused = witness.add_checkpoint(submission(size, [], note))
        assert (refused.status, refused.body) == (409, f"two roots of size {size}: the log has forked\n")
        extended = witness.add_checkpoint(submission(size, log.proof, log.after))
        assert extended.status == 200
        twice = log.before + cosigned.body * 2
        assert [len(cosignatures_of(text, [witness.key])) for text in (twice, note)] == [1, 0]
    (true.log / "checkpoint").write_text(log.after + extended.body)
    asked = (*forged.pins, "--witness", witness.key.vkey)
    found = [run_inside("verify", "--state", one.state, *asked) for one in (true, forged)]
    assert [one.code for one in found] == [0, 1]
    assert "problem: log/checkpoint: 0 of 1 pinned witnesses have cosigned it" in found[1].stdout
