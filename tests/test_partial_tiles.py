"""Partial tiles are deleted once the full one stands, and nothing else is; every reader does without them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from render_platform import merkle, tiles
from render_platform.bundle import make_bundle, verify_bundle
from render_platform.clock import DAY_US, HOUR_US, ManualClock
from render_platform.errors import Finding, Missing, Unavailable
from render_platform.events import UsageEvent
from render_platform.gateway.evidence_routes import tile_of
from render_platform.objects import FolderObjects, Stat
from render_platform.pipeline import Platform
from render_platform.tiles import Pruned, Tile, prune_partials
from render_platform.verification import verify
from tests.factories import START_US
from tests.platforms import check_evidence, make_platform, record_random
from tests.stories import MemoryObjects, named, said
from tests.test_audit_log import append, open_log
from tests.test_receipts import check, receipts_of
from tests.test_recovery import backup, recovery, restore
from tests.test_tiles import ENTRIES, NOW, log_of
from tests.test_witnessed_log import cosigned_by, log_with, witnesses_of

# What is kept.

SIZES = (3, 100, 200, 300)


@pytest.mark.parametrize("full", ["tile/0/000", "tile/entries/000"])
@pytest.mark.parametrize("harm", ["missing", "empty", "short", "long", "forged"])
def test_what_the_full_tile_does_not_hold_is_kept_and_named(full: str, harm: str) -> None:
    log = log_of(*SIZES)
    good = log.files.pop(full)
    at = 150 * 32 if full == "tile/0/000" else len(tiles.encode_bundle(ENTRIES[:150])) + 4
    harmed = {
        "empty": b"",
        "short": good[: -len(good) // 3],
        "long": good + b"\0\1x",
        "forged": good[:at] + b"?" + good[at + 1 :],  # of entry 150
    }
    log.files |= {full: harmed[harm]} if harm in harmed else {}
    kept = {f"{full}.p/{width}" for width in ((200,) if harm == "forged" else (3, 100, 200))}
    before = set(log.files)
    with pytest.raises(Finding, match=f"{len(kept)} such partial tiles were kept") as found:
        prune_partials(log, 300, NOW)
    assert all(f"log/{path}" in found.value.message for path in kept)
    assert {path for path in log.files if path.startswith(full)} == kept | ({full} & before)
    assert not [
        path for path in log.files if ".p/" in path and "/000" in path and path not in kept and "/1/" not in path
    ]


@pytest.mark.parametrize("path", ["tile/0/000.p/100", "tile/entries/000.p/100"])
@pytest.mark.parametrize("data", [b"", b"\0\1x", b"x" * 3_200])
def test_a_partial_tile_that_was_altered_is_kept(path: str, data: bytes) -> None:
    log = log_of(*SIZES)
    log.files[path] = data
    with pytest.raises(Finding, match=path):
        prune_partials(log, 300, NOW)
    assert log.files[path] == data
    assert {name for name in log.files if "0/000.p/" in name or "entries/000.p/" in name} == {path}


class Killed(BaseException):
    """The process ends here."""


class Deleting(MemoryObjects):
    """Ends the process after some deletions; may lock some names."""

    def __init__(self, files: dict[str, bytes], alive: int = 10**9, locked: Sequence[str] = ()) -> None:
        super().__init__(files)
        self._alive, self._locked = alive, locked

    def delete(self, path: str, seen: Stat) -> bool:
        if path in self._locked:
            return False
        if not self._alive:
            raise Killed
        self._alive -= 1
        return super().delete(path, seen)


def test_a_call_that_was_killed_is_gone_on_with() -> None:
    whole = log_of(*SIZES)
    files = dict(whole.files)
    every = prune_partials(whole, 300, NOW).deleted
    assert every == 6
    for alive in range(every):
        log = Deleting(dict(files), alive)
        with pytest.raises(Killed):
            prune_partials(log, 300, NOW)
        assert len(log.files) == len(files) - alive
        assert prune_partials(MemoryObjects(log.files), 300, NOW).deleted == every - alive
        assert log.files == whole.files


def test_what_the_store_does_not_let_go_of_is_counted() -> None:
    log = Deleting(log_of(*SIZES).files, locked=["tile/0/000.p/3", "tile/entries/000.p/200"])
    done = prune_partials(log, 300, NOW)
    assert (done.deleted, done.spared) == (4, 2)
    assert {"tile/0/000.p/3", "tile/entries/000.p/200"} <= set(log.files)


class Racing(FolderObjects):
    """Another one changes what is read: writes it anew, or deletes it."""

    def __init__(self, root: Path, rewrite: bool) -> None:
        super().__init__(root)
        self._folder, self._rewrite = root, rewrite

    def read(self, path: str) -> bytes:
        data = super().read(path)
        if ".p/" in path:
            (self._folder / path).unlink()
            if self._rewrite:
                (self._folder / "spare").write_bytes(data)
                (self._folder / path).write_bytes(data)
                (self._folder / "spare").unlink()
        return data


@pytest.mark.parametrize("rewrite", [True, False])
def test_only_what_was_read_is_deleted(tmp_path: Path, rewrite: bool) -> None:
    log = FolderObjects(tmp_path)
    for path, data in log_of(3, 300).files.items():
        log.create(path, data)
    done = prune_partials(Racing(tmp_path, rewrite), 300, ManualClock(10**17))
    assert (done.deleted, done.spared) == (0, 2)
    assert (tmp_path / "tile/0/000.p/3").exists() == rewrite


class Silent(MemoryObjects):
    def read(self, path: str) -> bytes:
        raise Unavailable("no answer")


def test_a_store_that_does_not_answer_is_no_finding() -> None:
    log = Silent(log_of(3, 300).files)
    with pytest.raises(Unavailable, match="no answer"):
        prune_partials(log, 300, NOW)
    assert "tile/0/000.p/3" in log.files


# A platform whose log has grown beyond a bundle, published every ten hours.


class Grown(NamedTuple):
    state: Path
    events: list[UsageEvent]
    partials: dict[str, bytes]
    """Every partial tile that a full one supersedes."""


LATE_US = START_US + 300 * HOUR_US


def open_grown(state: Path, us: int = LATE_US, seed: str = "again") -> Platform:
    return make_platform(state, ManualClock(us), seed, batch_rows=50)


def size_of(platform: Platform) -> int:
    checkpoint = platform.log.published()
    assert checkpoint is not None
    return checkpoint.size


def prune(platform: Platform) -> Pruned:
    """Two days later."""
    newest_us = max(stat.modified_us for _, stat in platform.log_objects.stats())
    return prune_partials(platform.log_objects, size_of(platform), ManualClock(newest_us + 2 * DAY_US))


def files_in(platform: Platform) -> set[str]:
    return set(platform.log_objects.names())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    state, events = tmp_path_factory.mktemp("grown") / "state", list[UsageEvent]()
    with closing(open_grown(state, START_US, "first")) as platform:
        for hour in range(0, 300, 10):
            now_us = START_US + hour * HOUR_US
            platform.clock.move_to(now_us)  # type: ignore[attr-defined]
            if hour % 40 == 0:
                events += record_random(platform, 3, hour, start_us=now_us, span_us=HOUR_US)
            if hour == 150:
                backup(state)
            platform.flush()
        size = size_of(platform)
        found = {path: tiles.parse_path(path) for path in files_in(platform)}
        old = [path for path, tile in found.items() if tile is not None and tiles.is_superseded(tile, size)]
        return Grown(state, events, {path: platform.log_objects.read(path) for path in old})


@pytest.fixture
def grown(template: Grown, tmp_path: Path) -> Grown:
    shutil.copytree(template.state, tmp_path / "state")
    return template._replace(state=tmp_path / "state")


@pytest.fixture
def pruned(grown: Grown) -> Iterator[Platform]:
    with closing(open_grown(grown.state)) as platform:
        assert prune(platform).deleted == len(grown.partials)
        yield platform


def test_verification_holds_before_and_after(grown: Grown) -> None:
    with closing(open_grown(grown.state)) as platform:
        before, size = files_in(platform), size_of(platform)
        assert size > 290
        assert platform.verify(deep=True).verified
        done = prune(platform)
        after = files_in(platform)
        assert before - after == set(grown.partials)
        assert (done.deleted, done.bytes) == (len(grown.partials), sum(map(len, grown.partials.values())))
        assert len(before) > 55 > 15 > len(after)
        for deep in (False, True):
            outcome = platform.verify(deep=deep)
            assert outcome.verified, said(outcome)
            assert outcome.notes == []
        assert prune(platform) == Pruned()


class Listed(MemoryObjects):
    """A log from which some files were deleted since it was listed."""

    def __init__(self, files: dict[str, bytes], gone: Collection[str]) -> None:
        super().__init__(files)
        self._gone = gone

    def read(self, path: str) -> bytes:
        if path in self._gone:
            raise Missing(path)
        return super().read(path)


def test_what_is_deleted_during_a_verification_is_no_problem(grown: Grown) -> None:
    with closing(open_grown(grown.state)) as platform:
        files = {path: platform.log_objects.read(path) for path in files_in(platform)}
        evidence = platform.evidence()
        assert verify(replace(evidence, log=Listed(files, grown.partials))).verified
        lost = f"tile/0/001.p/{size_of(platform) % 256}"
        assert named(verify(replace(evidence, log=Listed(files, [lost])))) == {f"log/{lost}"}


def test_what_still_has_to_stand_is_missed(pruned: Platform, grown: Grown) -> None:
    size = size_of(pruned)
    for path in (f"tile/entries/001.p/{size % 256}", f"tile/0/001.p/{size % 256}", "tile/1/000.p/1"):
        file = grown.state / "log" / path
        data = file.read_bytes()
        file.unlink()
        assert f"log/{path}" in named(pruned.verify()), path
        file.write_bytes(data)
    (grown.state / "log/tile/0/000").unlink()
    assert named(pruned.verify()) == {"log/tile/0/000"}


def test_receipts_of_old_and_new_events(pruned: Platform, grown: Grown) -> None:
    (event,) = record_random(pruned, 1, 9, start_us=LATE_US, span_us=1)
    pruned.flush()
    for each in (*grown.events, event):
        check(pruned, each, receipts_of(pruned).of_event(each.event_id, opened=False))


def test_bundles_and_tiles_over_http(pruned: Platform, grown: Grown, tmp_path: Path) -> None:
    for hour in (0, 120, 280):
        hours = range(START_US + hour * HOUR_US, START_US + (hour + 1) * HOUR_US)
        made = make_bundle(pruned.evidence(), pruned.log_signer, hours, tmp_path / f"{hour}.tar")
        keys = [pruned.log_signer.verifier, pruned.attestation_signer.verifier]
        assert made.verdict == "verified", said(made)
        assert verify_bundle(tmp_path / f"{hour}.tar", keys).verdict == "verified"
    for path, data in grown.partials.items():
        tile = tiles.parse_path(path)
        assert tile is not None
        assert tile_of(pruned.log_objects, tile) == data
    with pytest.raises(Missing):
        tile_of(pruned.log_objects, (0, 1, 255))


@pytest.mark.parametrize("older", ["none", "backup"])
def test_recovery_from_the_log_and_the_objects(pruned: Platform, grown: Grown, older: str) -> None:
    size = size_of(pruned)
    pruned.close()
    for path in grown.state.glob("platform.db*"):
        path.unlink()
    if older == "backup":
        restore(grown.state)
    with closing(open_grown(grown.state, seed=older)) as platform:
        done = recovery(platform).run()
        assert (done.size, done.events_restored > 0) == (size, True)
        more = record_random(platform, 2, 8, start_us=LATE_US, span_us=HOUR_US)
        platform.flush()
        check_evidence(grown.state, platform.log_signer.verifier.vkey, [*grown.events, *more])
        outcome = platform.verify(deep=True)
        assert outcome.verified, said(outcome)


def test_the_log_goes_on_and_is_pruned_again(pruned: Platform, grown: Grown) -> None:
    pruned.clock.move_to(LATE_US + 230 * HOUR_US)  # type: ignore[attr-defined]
    assert pruned.flush().logged > 220
    here = {path for path in files_in(pruned) if "/001.p/" in path}
    assert len(here) > 4
    assert prune(pruned).deleted == len(here)
    assert not here & files_in(pruned)
    check_evidence(grown.state, pruned.log_signer.verifier.vkey, grown.events)
    outcome = pruned.verify(deep=True)
    assert outcome.verified, said(outcome)


def test_readers_under_an_older_checkpoint_find_their_tree(pruned: Platform, grown: Grown) -> None:
    """A replica, a mirror, or an auditor's copy whose checkpoint is older than the tiles beside it."""
    log = pruned.log_objects
    for old in pruned.history()[::3]:
        leaves = [leaf for tile in tiles.tiles_of(old.size) if tile[0] == 0 for leaf in cut(log, tile)]
        assert merkle.root(leaves) == old.root


def cut(log: Any, tile: Tile) -> list[bytes]:
    data = tiles.read_tile(log.read, tiles.path_of(tile))
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def test_a_slow_writer_that_writes_them_again(pruned: Platform, grown: Grown) -> None:
    """It was about to publish a size that another one has long gone past: the same bytes, and they go again."""
    pruned.log._write_tiles(100, 101)
    pruned.log._write_tiles(200, 202)
    outcome = pruned.verify()
    assert outcome.verified, said(outcome)
    assert prune(pruned).deleted == 4


def test_witnesses_that_are_behind_are_told_from_where_they_are(tmp_path: Path) -> None:
    def grow(log: Any, start: int, end: int, step: int) -> None:
        for at in range(start, end, step):
            append(log, *(f"n{n}" for n in range(at, min(end, at + step))))
            log.publish()

    log = open_log(tmp_path, blobs=MemoryObjects())
    grow(log, 0, 200, 50)
    with witnesses_of(tmp_path) as members:
        assert log_with(tmp_path, members).publish() is not None
    grow(log, 200, 300, 50)
    assert prune_partials(FolderObjects(tmp_path / "log"), 300, ManualClock(10**17)).deleted == 10
    with witnesses_of(tmp_path) as members:
        assert log_with(tmp_path, members).publish() is not None
        assert cosigned_by(tmp_path, members) == 1


def test_emptied_folders_are_in_nobodys_way(pruned: Platform, grown: Grown) -> None:
    assert list((grown.state / "log/tile/0/000.p").iterdir()) == []
    path, data = next((path, data) for path, data in grown.partials.items() if path.startswith("tile/0/000.p/"))
    assert pruned.log_objects.create(path, data)
