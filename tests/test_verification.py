"""Verification offline: good evidence holds, and evidence that says something untrue is found, signed or not."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from render_platform import tiles
from render_platform.canonical import digest_of
from render_platform.clock import DAY_US, HOUR_US
from render_platform.database import log_head
from render_platform.entries import parse
from render_platform.errors import Unavailable
from render_platform.events import table_from_events
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


def test_a_batch_left_out_is_found_by_the_watermark(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    left_out = replace(first, records=7, gpu_time_ns=9)
    mark = made.watermark(HOUR, first, left_out)
    assert named(made.verify()) == {f"entry of {mark.batch_id}"}


def test_a_missing_watermark_is_found(made: HandMade) -> None:
    made.watermark(HOUR)
    mark = made.watermark(HOUR + 2 * HOUR_US)
    outcome = made.verify()
    assert named(outcome) == {f"entry of {mark.batch_id}"}
    assert "2023-11-16T19:00:00Z is missing" in said(outcome)


def test_a_first_hour_that_was_never_declared_is_found(made: HandMade) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1))
    made.watermark(HOUR + HOUR_US)
    outcome = made.verify()
    assert not outcome.verified, f"{batch.batch_id}'s hour was passed over"


def test_watermarks_of_lanes_are_apart(made: HandMade) -> None:
    live = made.batch(HOUR, 0, rows_of_hour(5, 1))
    trace = made.batch(HOUR, 1, rows_of_hour(6, 2), lane="trace/1")
    made.watermark(HOUR, live)
    made.watermark(HOUR, trace, lane="trace/1")
    made.watermark(HOUR + HOUR_US)
    assert made.verify(deep=True).verified


@pytest.mark.parametrize("seqs", [(0, 2), (1,), (0, 1, 1), (1, 0), (0, None)])
def test_batch_numbers_with_a_gap_are_found(made: HandMade, seqs: tuple[int | None, ...]) -> None:
    entries = [made.batch(HOUR, 0, rows_of_hour(3, n), batch_seq=seq) for n, seq in enumerate(seqs)]
    made.watermark(HOUR, *entries)
    outcome = made.verify()
    assert "batch_seq is" in said(outcome)
    assert named(outcome) <= {f"entry of {entry.batch_id}" for entry in entries}


@pytest.mark.parametrize("hours_later", [1, 2, 3])
def test_a_batch_of_an_hour_that_was_declared_complete_is_found(made: HandMade, hours_later: int) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    made.watermark(HOUR, first)
    for n in range(1, hours_later):
        made.watermark(HOUR + n * HOUR_US)
    late = made.batch(HOUR, 1, rows_of_hour(5, 2), complete_until=HOUR + hours_later * HOUR_US)
    outcome = made.verify()
    assert named(outcome) == {f"entry of {late.batch_id}"}
    assert "declared complete" in said(outcome)


def test_a_declaration_before_the_hour_is_over_is_found(made: HandMade) -> None:
    mark = made.watermark(HOUR, complete_until=HOUR + HOUR_US - 1)
    assert "not over" in about(made.verify(), f"entry of {mark.batch_id}")[0].what


def test_completeness_that_goes_back_is_found(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1), complete_until=HOUR + 9)
    second = made.batch(HOUR, 1, rows_of_hour(5, 2), complete_until=HOUR + 8)
    made.watermark(HOUR, first, second)
    assert "goes back" in about(made.verify(), f"entry of {second.batch_id}")[0].what


# What the batches hold, read again.


def test_deep_reads_the_rows_of_the_hours_that_were_asked_for(made: HandMade) -> None:
    simple(made, 4)
    liar = made.batch(HOUR + 4 * HOUR_US, 0, rows_of_hour(5, 9, HOUR + 4 * HOUR_US), merkle_root="ab" * 32)
    made.publish()

    def deep(start: int, end: int) -> tuple[int, int, bool]:
        outcome = verify(made.evidence(), deep=True, start_us=HOUR + start * HOUR_US, end_us=HOUR + end * HOUR_US)
        return outcome.deep_batches, outcome.deep_records, outcome.verified

    assert deep(0, 4) == (4, 20, True)
    assert deep(1, 3) == (2, 10, True)
    assert deep(0, 0) == (0, 0, True)
    assert deep(0, 5) == (4, 20, False)
    assert liar.batch_id
    shallow = made.verify()
    assert (shallow.deep_batches, shallow.deep_records, shallow.verified) == (0, 0, True)


def test_deep_over_everything_reads_every_batch_whatever_its_hour_says(made: HandMade) -> None:
    rows = rows_of_hour(5, 1)
    made.batch(HOUR, 0, rows, recorded_hour=2_400_000 * HOUR_US, merkle_root="ab" * 32)
    assert not made.verify(deep=True).verified


def test_without_an_attestation_key_the_outcome_says_what_was_not_checked(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    outcome = verify(replace(made.evidence(), attestation_keys=[]))
    assert outcome.verified
    assert len(outcome.notes) == 1
    assert "attestation" in outcome.notes[0]
    assert made.verify().notes == []


@pytest.mark.parametrize(
    "lie",
    [
        {"merkle_root": "ab" * 32},
        {"records": 6},
        {"gpu_time_ns": 1},
        {"merkle_root": None},
        {"recorded_hour": HOUR + HOUR_US},
        {"first_recorded_at": HOUR},
        {"last_recorded_at": HOUR + HOUR_US - 1},
    ],
    ids=str,
)
def test_deep_finds_rows_that_are_not_what_the_entry_says(made: HandMade, lie: dict[str, Any]) -> None:
    rows = rows_of_hour(5, 1)
    batch = made.batch(HOUR, 0, rows, **lie)
    made.watermark(batch.recorded_hour or 0, batch)
    outcome = made.verify(deep=True)
    assert not outcome.verified
    digest = str(batch.subject_digest)
    places = {f"blobs/sha256/{digest[:2]}/{digest[2:]}", f"entry of {batch.batch_id}"}
    attested = str(batch.attestation)
    places.add(f"blobs/sha256/{attested[:2]}/{attested[2:]}")
    assert named(outcome) <= places


@pytest.mark.parametrize(
    "lie", [{"subject_digest": None, "subject_size": None}, {"attestation": None}, {"subject_size": 1}], ids=str
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_batch_entry_that_binds_no_batch_or_no_attestation_is_found(
    made: HandMade, lie: dict[str, Any], deep: bool
) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1), **lie)
    made.watermark(HOUR, batch)
    assert not made.verify(deep=deep).verified


def test_an_event_in_two_batches_is_found_deep(made: HandMade) -> None:
    rows = rows_of_hour(6, 1)
    first, second = made.batch(HOUR, 0, rows.slice(0, 4)), made.batch(HOUR, 1, rows.slice(3, 3))
    made.watermark(HOUR, first, second)
    assert made.verify().verified
    outcome = made.verify(deep=True)
    assert len(outcome.problems) == 1
    twice = str(sorted(make_events(6, 1), key=lambda event: event.event_id)[3].event_id)
    assert f"an event stands twice, or out of order: {twice}" in outcome.problems[0].what


def test_one_batch_billed_by_two_entries_is_found_deep(made: HandMade) -> None:
    rows = rows_of_hour(6, 1)
    first, second = made.batch(HOUR, 0, rows), made.batch(HOUR, 1, rows)
    assert first.subject_digest == second.subject_digest
    made.watermark(HOUR, first, second)
    outcome = made.verify(deep=True)
    assert not outcome.verified, f"{outcome.records} records are said to be there, and {rows.num_rows} are"


@pytest.mark.parametrize("lie", [{"merkle_root": "ab" * 32}, {"records": 60}, {"subject_size": 1}], ids=str)
def test_each_of_two_entries_of_one_batch_is_checked(made: HandMade, lie: dict[str, Any]) -> None:
    rows = rows_of_hour(6, 1)
    liar = made.batch(HOUR, 0, rows, **lie)
    second = made.batch(HOUR, 1, rows)
    made.watermark(HOUR, liar, second)
    assert not made.verify(deep=True).verified


@pytest.mark.parametrize("order", ["reversed", "doubled"])
def test_rows_out_of_order_or_twice_in_a_batch_are_found_deep(made: HandMade, order: str) -> None:
    rows = rows_of_hour(4, 1)
    table = rows.take([3, 2, 1, 0]) if order == "reversed" else pa.concat_tables([rows, rows.slice(3)])
    batch = made.batch(HOUR, 0, table)
    made.watermark(HOUR, batch)
    assert made.verify().verified
    outcome = made.verify(deep=True)
    assert "stands twice, or out of order" in said(outcome)


def test_a_batch_of_another_schema_is_found_deep(made: HandMade) -> None:
    rows = table_from_events(make_events(4, 1))
    sink = io.BytesIO()
    pq.write_table(rows.drop_columns(["energy_mj"]), sink)
    data = sink.getvalue()
    batch = made.batch(HOUR, 0, rows, subject_digest=made.cas.put(data), subject_size=len(data))
    made.watermark(HOUR, batch)
    assert "schema" in said(made.verify(deep=True))


@pytest.mark.parametrize("lie", [{"records": 6}, {"gpu_time_ns": 1}], ids=str)
def test_an_entry_that_does_not_say_what_was_attested_is_found_without_reading_rows(
    made: HandMade, lie: dict[str, Any]
) -> None:
    batch = made.batch(HOUR, 0, rows_of_hour(5, 1), **lie)
    made.watermark(HOUR, batch)
    outcome = made.verify()
    attested = str(batch.attestation)
    assert named(outcome) == {f"blobs/sha256/{attested[:2]}/{attested[2:]}"}
    assert "do not say the same" in said(outcome)


def test_an_attestation_of_another_batch_is_found(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(5, 1))
    second = made.batch(HOUR, 1, rows_of_hour(5, 2), attestation=first.attestation)
    made.watermark(HOUR, first, second)
    assert "another batch" in said(made.verify()) or "not say the same" in said(made.verify())


def test_a_report_whose_size_the_entry_gets_wrong_is_found(made: HandMade) -> None:
    made.entry("reconciliation", recorded_hour=HOUR, subject_digest=made.cas.put(b"{}"), subject_size=3)
    assert not made.verify().verified


# Verification itself must not fall over whatever an entry holds.


@pytest.mark.parametrize(
    "values",
    [
        {"complete_until": "soon"},
        {"complete_until": []},
        {"complete_until": -1},
        {"lane": ["live"]},
        {"lane": {"a": 1}},
        {"recorded_hour": 10**25 * HOUR_US},
        {"recorded_hour": -DAY_US * 10**6},
        {"batch_id": None},
        {"batch_id": ["x"]},
        {"subject_size": "x"},
        {"acceptances": ([], 1, None)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["watermark", "usage_batch"])
def test_entries_with_values_of_another_type_are_named_and_stop_nothing(
    made: HandMade, kind: str, values: dict[str, Any]
) -> None:
    """Whoever alters a bundle chooses what is parsed: nothing that it holds may end the verification."""
    simple(made, 2)
    made.publish()
    first: dict[str, Any] = {
        "type": kind,
        "lane": "trace/x",
        "recorded_hour": HOUR,
        "batch_id": "x",
        "complete_until": HOUR + HOUR_US,
    }
    bundle = tiles.entries_path(0, 4)
    entries = tiles.decode_bundle(made.log.read(bundle))
    strange = parse(entries[0])
    template = replace(strange, previous=parse(entries[2]).previous, **(first | values))
    follower = replace(strange, previous=digest_of(template.to_bytes()), **first)
    made.log.files[bundle] = tiles.encode_bundle([*entries[:2], template.to_bytes(), follower.to_bytes()])
    for deep in (False, True):
        outcome = verify(made.evidence(), deep=deep)
        assert not outcome.verified
        assert about(outcome, f"log/{bundle}")


def test_an_entry_nested_deeply_stops_nothing(made: HandMade) -> None:
    simple(made, 1)
    made.publish()
    bundle = tiles.entries_path(0, 2)
    entries = tiles.decode_bundle(made.log.read(bundle))
    for depth in (100, 400, 900, 980, 20_000):
        nested = entries[0].replace(b'"acceptances":[]', b'"acceptances":[' + b"[" * depth + b"]" * depth + b"]")
        assert len(nested) > len(entries[0])
        made.log.files[bundle] = tiles.encode_bundle([nested, entries[1]])
        assert about(verify(made.evidence()), f"log/{bundle}")
