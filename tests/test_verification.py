"""Verification offline: good evidence holds, and evidence that says something untrue is found, signed or not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import HOUR_US
from render_platform.database import log_head
from render_platform.errors import Unavailable
from render_platform.evidence import Evidence
from render_platform.note import Verifier, sign_note
from render_platform.objects import FolderObjects
from render_platform.verification import verify
from tests.factories import make_events
from tests.stories import (
    AFTER_HOUR,
    HOUR,
    NOWHERE,
    HandMade,
    MemoryObjects,
    about,
    finish_lane,
    move_to,
    named,
    open_story,
    record,
    rows_of_hour,
    said,
    signer,
)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[HandMade]:
    with closing(HandMade(tmp_path)) as opened:
        yield opened


def simple(made: HandMade, hours: int = 3) -> None:
    """A log that is right: a batch and a watermark an hour."""
    for n in range(hours):
        hour = HOUR + n * HOUR_US
        made.watermark(hour, made.batch(hour, 0, rows_of_hour(5, n, hour)))


# Good evidence.


def test_a_good_log_verifies(made: HandMade) -> None:
    simple(made)
    for deep in (False, True):
        outcome = made.verify(deep=deep)
        assert outcome.verified, said(outcome)
        assert (outcome.entries, outcome.batches, outcome.records) == (6, 3, 15)
        assert outcome.deep == deep
        assert outcome.checkpoint == made.history[-1]


def test_a_platform_verifies_and_counts_what_it_read(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, "none", dsn=NOWHERE, batch_rows=10)) as platform:
        kept = record(platform, make_events(35, 1))
        kept += record(platform, make_events(5, 2), "trace/1")
        finish_lane(platform, "trace/1", HOUR + 2 * HOUR_US)
        platform.flush()
        move_to(platform, AFTER_HOUR + 3 * HOUR_US)
        platform.flush()
        for deep in (False, True):
            outcome = platform.verify(deep=deep)
            assert outcome.verified, said(outcome)
            assert (outcome.records, outcome.batches) == (40, 5)
            assert outcome.gpu_time_ns == sum(event.gpu_time_ns for event in kept)
            assert outcome.blobs == 5 + 5 + outcome.entries


def test_an_auditor_needs_only_blobs_log_and_public_keys(tmp_path: Path) -> None:
    with closing(open_story(tmp_path / "state", "none", dsn=NOWHERE)) as platform:
        record(platform, make_events(20, 1))
        platform.flush()
        vkeys = platform.log_signer.verifier.vkey, platform.attestation_signer.verifier.vkey
    for part in ("blobs", "log"):
        shutil.copytree(tmp_path / "state" / part, tmp_path / "copy" / part)
    shutil.rmtree(tmp_path / "state")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "copy").rglob("*"))
    evidence = Evidence(
        log=FolderObjects(tmp_path / "copy" / "log"),
        blobs=FolderObjects(tmp_path / "copy" / "blobs"),
        log_keys=[Verifier.parse(vkeys[0])],
        attestation_keys=[Verifier.parse(vkeys[1])],
    )
    outcome = verify(evidence, deep=True)
    assert outcome.verified, said(outcome)
    assert outcome.records == 20
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "copy").rglob("*")) == before


def test_progress_reaches_its_end(made: HandMade) -> None:
    simple(made)
    made.publish()
    calls: list[tuple[str, int, int]] = []
    verify(made.evidence(), progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == len(made.blobs.files)


def test_an_empty_platform_has_nothing_that_verifies(tmp_path: Path) -> None:
    with closing(open_story(tmp_path, "none", dsn=NOWHERE)) as platform:
        outcome = platform.verify()
    assert not outcome.verified
    assert named(outcome) == {"log/checkpoint"}


def test_a_store_that_cannot_be_listed_is_unavailable(made: HandMade) -> None:
    class Down(MemoryObjects):
        def names(self, prefix: str = "") -> Iterator[str]:
            raise Unavailable("the store is down")

    simple(made)
    made.publish()
    with pytest.raises(Unavailable, match="the store is down"):
        verify(replace(made.evidence(), blobs=Down(made.blobs.files)))
    with pytest.raises(Unavailable, match="the store is down"):
        verify(replace(made.evidence(), log=Down(made.log.files)))


def test_quarantine_is_ignored_and_orphans_are_no_finding(made: HandMade) -> None:
    simple(made)
    made.blobs.files["quarantine/sha256-ab-cdef-1234"] = b"bad bytes"
    made.cas.put(b"an object that nothing names yet")
    outcome = made.verify(deep=True)
    assert outcome.verified, said(outcome)


@pytest.mark.parametrize(
    "name", ["stranger", "sha256/ab/cd", "sha256/ab/" + "g" * 62, "Quarantine/x", ".tmpstranger", "sha256/.tmp/x"]
)
def test_an_unknown_file_among_the_blobs_is_named(made: HandMade, tmp_path: Path, name: str) -> None:
    simple(made)
    made.publish()
    blobs = FolderObjects(tmp_path / "blobs")
    for path, data in {**made.blobs.files, name: b"x"}.items():
        blobs.create(path, data)
    outcome = verify(replace(made.evidence(), blobs=blobs))
    assert named(outcome) == {f"blobs/{name}"}


@pytest.mark.parametrize(
    "name",
    [
        "stranger",
        "checkpoint.old",
        "tile/0/000.p/256",
        "tile/0/000.p/0",
        "tile/0/0",
        "tile/entries/000.p/7x",
        "tile/64/000.p/1",
        "tile/0/000.p/06",
        ".tmpstranger",
    ],
)
def test_an_unknown_file_in_the_log_is_named(made: HandMade, tmp_path: Path, name: str) -> None:
    simple(made)
    made.publish()
    log = FolderObjects(tmp_path / "log")
    for path, data in {**made.log.files, name: b"x"}.items():
        log.create(path, data)
    outcome = verify(replace(made.evidence(), log=log))
    assert named(outcome) == {f"log/{name}"}


def test_scratch_files_of_a_writer_are_no_finding(made: HandMade, tmp_path: Path) -> None:
    simple(made)
    made.publish()
    stores = FolderObjects(tmp_path / "log"), FolderObjects(tmp_path / "blobs")
    for store, files in zip(stores, (made.log.files, made.blobs.files), strict=True):
        for path, data in files.items():
            store.create(path, data)
        store.create(".tmp/half-written", b"x")
    assert verify(replace(made.evidence(), log=stores[0], blobs=stores[1])).verified


# Signatures and checkpoints.


def test_another_key_signs_nothing_here(made: HandMade) -> None:
    simple(made)
    made.publish()
    for other in (signer("example.com/log", 9), signer("example.com/other", 1)):
        outcome = verify(replace(made.evidence(), log_keys=[other.verifier]))
        assert not outcome.verified
        assert "no known key" in about(outcome, "log/checkpoint")[0].what
        assert outcome.checkpoint is None


def test_a_checkpoint_under_the_right_name_by_another_key_is_refused(made: HandMade) -> None:
    simple(made)
    checkpoint = made.publish()
    forged = sign_note(checkpoint.text(), [signer("example.com/log", 9)])
    made.log.files["checkpoint"] = forged.encode()
    assert named(verify(made.evidence())) == {"log/checkpoint"}


def test_a_signature_moved_onto_another_root_is_refused(made: HandMade) -> None:
    simple(made)
    checkpoint = made.publish()
    note = made.log.files["checkpoint"].decode()
    other = replace(checkpoint, root=bytes(32)).text()
    made.log.files["checkpoint"] = note.replace(checkpoint.text(), other).encode()
    outcome = verify(made.evidence())
    assert about(outcome, "log/checkpoint")


def test_an_attestation_by_another_key_is_named(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    outcome = verify(replace(made.evidence(), attestation_keys=[signer("example.com/log/attestation", 9).verifier]))
    [problem] = outcome.problems
    assert problem.where.startswith("blobs/sha256/")
    assert "known key" in problem.what


def test_an_older_checkpoint_is_found_when_the_newer_one_is_remembered(made: HandMade) -> None:
    simple(made, 1)
    old = made.publish()
    kept = made.log.files["checkpoint"]
    made.watermark(HOUR + HOUR_US)
    made.publish()
    made.log.files["checkpoint"] = kept
    outcome = verify(made.evidence())
    assert "not consistent" in about(outcome, "log/checkpoint")[0].what
    forgetful = verify(replace(made.evidence(), history=[old]))
    assert forgetful.verified, "nobody can know without having seen the newer one"


def test_a_log_rewritten_with_the_true_key_is_found_by_whoever_remembers(tmp_path: Path, made: HandMade) -> None:
    simple(made)
    made.publish()
    (tmp_path / "b").mkdir()
    with closing(HandMade(tmp_path / "b")) as rewritten:
        rewritten.watermark(HOUR, rewritten.batch(HOUR, 0, rows_of_hour(4, 0)))
        for n in range(1, 5):
            rewritten.watermark(HOUR + n * HOUR_US)
        rewritten.publish()
        assert verify(rewritten.evidence(), deep=True).verified
        outcome = verify(replace(rewritten.evidence(), history=made.history))
        assert "not consistent" in said(outcome)


def test_a_forger_who_chains_the_entries_again_needs_the_key(tmp_path: Path, made: HandMade) -> None:
    simple(made)
    made.publish()
    with closing(HandMade(tmp_path, log_seed=7)) as forger:
        forger.watermark(HOUR, forger.batch(HOUR, 0, rows_of_hour(4, 0)))
        forger.publish()
        assert verify(forger.evidence(), deep=True).verified
        evidence = replace(made.evidence(), log=forger.log, blobs=forger.blobs)
        assert "no known key" in said(verify(evidence))
        # With the true checkpoint over the forged tiles the tiles and bundles are what is wrong.
        forger.log.files["checkpoint"] = made.log.files["checkpoint"]
        outcome = verify(evidence)
        assert not outcome.verified
        assert "neither the entries nor the tiles hash to its root" in said(outcome)


# What the entries say. All of these logs are signed with the true key.


def test_a_broken_chain_is_found(tmp_path: Path) -> None:
    """An entry that names another one than the entry before it: the tree and the signature are right."""

    def build(previous: str | None) -> HandMade:
        (tmp_path / f"{previous}").mkdir()
        made = HandMade(tmp_path / f"{previous}")
        made.watermark(HOUR)
        if previous is not None:
            with made.database.write() as connection:
                connection.execute(log_head.update().values(last_entry_digest=previous))
        made.watermark(HOUR + HOUR_US)
        return made

    with closing(build(None)) as good, closing(build("ab" * 32)) as bad:
        assert good.verify().verified
        outcome = bad.verify()
    assert named(outcome) == {"entry 1"}
    assert "digest of the entry before" in said(outcome)


@pytest.mark.parametrize(
    "lie", [{"records": 4}, {"records": 6}, {"gpu_time_ns": 1}, {"records": 0, "gpu_time_ns": 0}], ids=str
)
def test_a_watermark_that_does_not_add_up_is_found(made: HandMade, lie: dict[str, Any]) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1))
    mark = made.watermark(HOUR, batch, **lie)
    assert named(made.verify()) == {f"entry of {mark.batch_id}"}
