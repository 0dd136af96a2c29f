"""The auditor's bundle: what verifies, what nobody can know from it, and what is not made at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import merkle
from render_platform.bundle import make_bundle, tree_hash, verify_bundle
from render_platform.clock import HOUR_US
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.note import Checkpoint, Verifier
from tests import platforms
from tests.bundles import FAR, Story, batch_of, evidence_of, make_story, pack, unpack
from tests.factories import make_events
from tests.stories import (
    HOUR,
    NOWHERE,
    HandMade,
    MemoryObjects,
    finish_lane,
    open_story,
    record,
    rows_of_hour,
    said,
    signer,
)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("bundle"))


# What verifies.


def test_a_bundle_of_two_hours_verifies_with_pinned_keys_alone(story: Story) -> None:
    outcome = story.verify(story.data)
    assert (outcome.verdict, outcome.exit_code, outcome.notes) == ("verified", 0, [])
    assert (outcome.records, outcome.deep_records, outcome.batches) == (29, 29, 4)
    assert (outcome.lanes, outcome.doubts) == (["live", "trace/2"], [])
    assert (outcome.claims["first_entry"], outcome.claims["end_entry"], outcome.entries) == (256, 512, 256)
    assert outcome.checkpoint == story.checkpoints[-1]
    assert outcome.as_json()["verdict"] == "verified"
    assert json.dumps(outcome.as_json())


def test_the_same_evidence_gives_the_same_bytes_that_any_tar_reads(story: Story, tmp_path: Path) -> None:
    story.make(FAR, FAR + 2 * HOUR_US)
    assert (story.folder / "bundle.tar").read_bytes() == story.data
    assert pack(unpack(story.data)) == story.data
    assert sorted(path.name for path in story.folder.iterdir() if path.name.startswith(".")) == []
    assert (story.folder / "bundle.tar").stat().st_mode & 0o077 == 0


def test_what_it_holds_is_what_the_hours_bind(story: Story) -> None:
    parts = unpack(story.data)
    bound = set()
    for data in story.entries:
        entry = json.loads(data)
        if entry["recorded_hour"] in (FAR, FAR + HOUR_US):
            bound |= {hashlib.sha256(data).hexdigest(), entry["subject_digest"], entry["attestation"]} - {None}
    assert {name[7:].replace("/", "") for name in parts if name.startswith("sha256/")} == bound
    assert parts["tile/entries/001"] == story.evidence.log.read("tile/entries/001")
    assert parts["keys.txt"].decode().split() == [key.vkey for key in story.keys]


def test_the_whole_log_can_be_asked_for_and_is_taken_where_live_had_not_begun(story: Story) -> None:
    size = len(story.entries)
    for hour in (FAR, HOUR):
        outcome = story.make(hour, hour + HOUR_US, whole_log=True)
        assert (outcome.verdict, outcome.entries) == ("verified", size)
    before = story.make(HOUR - HOUR_US, HOUR + HOUR_US)
    assert (before.verdict, before.entries) == ("indeterminate", size)


def test_a_trace_of_years_before_live_is_complete_by_its_own_lane(tmp_path: Path) -> None:
    past = HOUR - 1000 * HOUR_US
    with closing(open_story(tmp_path / "state", "none", dsn=NOWHERE)) as platform:
        record(platform, make_events(6, 1, past), "trace/1")
        finish_lane(platform, "trace/1", past + 2 * HOUR_US)
        record(platform, make_events(6, 2))
        platform.flush()
        outcome = make_bundle(evidence_of(platform), platform.log_signer, range(past, past + HOUR_US), tmp_path / "b")
    assert (outcome.verdict, outcome.lanes) == ("verified", ["trace/1"])


def test_entries_of_no_hour_stand_between_the_others_and_bind_nothing_here(tmp_path: Path) -> None:
    with closing(HandMade(tmp_path)) as made:
        rows = made.batch(HOUR, 0, rows_of_hour(3, 1))
        made.entry("key", subject_digest=made.cas.put(b"a rotation"), subject_size=10)
        made.watermark(HOUR, rows)
        made.entry("erasure")
        made.publish()
        outcome = make_bundle(made.evidence(), made.log_signer, range(HOUR, HOUR + HOUR_US), tmp_path / "b")
    assert (outcome.verdict, outcome.entries, outcome.batches) == ("verified", 4, 1)
    assert b"a rotation" not in (tmp_path / "b").read_bytes()


def test_no_identity_of_a_customer_is_in_it(tmp_path: Path) -> None:
    with closing(open_story(tmp_path / "state", "none", dsn=NOWHERE)) as platform:
        with platform.database.write() as connection:
            ref = platform.outbox.customer_ref(connection, "issuer", "alice@example.com")
        record(platform, [replace(event, customer_ref=ref) for event in make_events(5, 1)])
        platform.flush()
        make_bundle(evidence_of(platform), platform.log_signer, range(HOUR, HOUR + HOUR_US), tmp_path / "b")
        with platform.database.read() as connection:
            [salt] = connection.exec_driver_sql("SELECT salt FROM customers").scalars()
    data = (tmp_path / "b").read_bytes()
    assert b"alice" not in data
    assert bytes(salt) not in data
    assert bytes(salt).hex().encode() not in data


# What nobody can know from it.


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (FAR + 299 * HOUR_US, FAR + 300 * HOUR_US, "the lane trace/3 has not declared it complete"),
        (FAR + 298 * HOUR_US, FAR + 301 * HOUR_US, "the lane live has not declared it complete"),
        (FAR + 9000 * HOUR_US, FAR + 9003 * HOUR_US, "(3 h in all): the lane live"),
    ],
)
def test_hours_that_are_not_closed_are_indeterminate(story: Story, start: int, end: int, reason: str) -> None:
    outcome = story.make(start, end)
    assert (outcome.verdict, outcome.exit_code, outcome.verified) == ("indeterminate", 3, False)
    assert any(reason in doubt for doubt in outcome.doubts), outcome.doubts
    assert outcome.claims["doubts"] == outcome.doubts


def test_another_lane_does_not_close_an_hour_for_live(tmp_path: Path) -> None:
    with closing(HandMade(tmp_path)) as made:
        made.watermark(HOUR - HOUR_US)
        made.watermark(HOUR, lane="trace/1")
        made.publish()
        outcome = make_bundle(made.evidence(), made.log_signer, range(HOUR, HOUR + HOUR_US), tmp_path / "b")
    assert outcome.verdict == "indeterminate"
    assert outcome.doubts == ["2023-11-16T18:00:00Z (1 h in all): the lane live has not declared it complete"]


@pytest.fixture
def straddling(tmp_path: Path) -> Iterator[Story]:
    """A log in which an hour of `live` begins in one bundle of entries and ends in the next."""
    with closing(HandMade(tmp_path)) as made:
        for n in range(250):
            made.watermark(FAR - (250 - n) * HOUR_US)
        ten = [made.batch(FAR, seq, rows_of_hour(2, seq, FAR)) for seq in range(10)]
        made.watermark(FAR, *ten)
        for n in range(1, 300):
            made.watermark(FAR + n * HOUR_US)
        last = made.publish()
        target = tmp_path / "bundle.tar"
        outcome = make_bundle(made.evidence(), made.log_signer, range(FAR, FAR + 2 * HOUR_US), target)
        assert (outcome.verdict, outcome.entries) == ("verified", 512)
        entries = [made.cas.get(digest) for digest in chain_of(made, last.size)]
        yield Story(made.evidence(), made.log_signer, tmp_path, target.read_bytes(), entries, [last])


def chain_of(made: HandMade, size: int) -> list[str]:
    """The digests of the entries, as the chain has them: each in the entry after it, and the last in none."""
    entries = [data for data in made.blobs.files.values() if data.startswith(b'{"version":1,"type"')]
    following = {json.loads(data)["previous"]: hashlib.sha256(data).hexdigest() for data in entries}
    chain = [following["0" * 64]]
    while chain[-1] in following:
        chain.append(following[chain[-1]])
    assert len(chain) == size
    return chain


def test_entries_missing_at_an_edge_make_it_indeterminate(straddling: Story) -> None:
    """Signed with the true key by somebody who chose a part that is too narrow."""
    assert straddling.verify(straddling.cut(0, 512)).verdict == "verified"
    left = straddling.verify(straddling.cut(256, 512))
    assert (left.verdict, left.problems) == ("indeterminate", [])
    assert "entries of it stand before the first entry" in left.doubts[0]
    right = straddling.verify(straddling.cut(0, 256))
    assert (right.verdict, right.problems) == ("indeterminate", [])
    assert "(2 h in all): the lane live has not declared it complete" in right.doubts[0]
    beside = straddling.verify(straddling.cut(512, 560))
    assert (beside.verdict, beside.records) == ("indeterminate", 0)


# What is not made.

Build = Callable[[HandMade], Any]
LIES: dict[str, tuple[Build, str]] = {
    "a watermark that declares more": (lambda m: m.watermark(HOUR, records=9), "sums of the batches"),
    "a batch that comes too late": (lambda m: (m.watermark(HOUR), batch(m, 0)), "declared complete before it"),
    "a number left out": (lambda m: (batch(m, 0), batch(m, 2)), "batch_seq is 2, and 1 comes next"),
    "a first number left out": (lambda m: batch(m, 1), "batch_seq is 1, and 0 comes next"),
    "an hour that is not over": (lambda m: m.watermark(HOUR, complete_until=HOUR), "not over"),
    "a batch without a root": (lambda m: batch(m, 0, merkle_root=None), "lacks its batch_seq"),
    "a watermark without a lane": (lambda m: m.entry("watermark", recorded_hour=HOUR), "lacks its lane"),
    "rows of another root": (lambda m: batch(m, 0, merkle_root="ab" * 32), "Merkle root"),
    "rows of another hour": (lambda m: m.batch(HOUR, 0, rows_of_hour(3, 1, HOUR + HOUR_US)), "hour"),
    "a size that is not": (lambda m: batch(m, 0, subject_size=1), "bytes"),
}


def batch(made: HandMade, seq: int, **overrides: Any) -> Any:
    return made.batch(HOUR, seq, rows_of_hour(3, seq), **overrides)


@pytest.mark.parametrize("name", LIES)
def test_entries_that_contradict_each_other_give_no_bundle(tmp_path: Path, name: str) -> None:
    build, said_of_it = LIES[name]
    with closing(HandMade(tmp_path)) as made:
        build(made)
        made.publish()
        with pytest.raises(Finding, match=said_of_it):
            make_bundle(made.evidence(), made.log_signer, range(HOUR, HOUR + HOUR_US), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_made_says_why_and_leaves_nothing(story: Story) -> None:
    for start, end in ((FAR, FAR), (FAR + 1, FAR + HOUR_US), (FAR, FAR - HOUR_US), (0, 90_000 * HOUR_US)):
        with pytest.raises(UsageError, match="whole hours"):
            story.make(start, end)
    hours, target, name = range(FAR, FAR + HOUR_US), story.folder / "b", batch_of(story)
    with pytest.raises(Unavailable, match="No such file"):
        make_bundle(story.evidence, story.signer, hours, story.folder / "none" / "b")
    with pytest.raises(Unavailable, match="No such file"):
        verify_bundle(story.folder / "none", story.keys)
    whole = cast(MemoryObjects, story.evidence.blobs).files
    harmed: dict[type[Exception], Any] = {
        Finding: MemoryObjects(whole | {name: b"other"}),
        Unavailable: MemoryObjects({path: data for path, data in whole.items() if path != name}),
    }
    for error, blobs in harmed.items():
        with pytest.raises(error):
            make_bundle(replace(story.evidence, blobs=blobs), story.signer, range(FAR, FAR + 2 * HOUR_US), target)
    with pytest.raises(Finding, match="no known key"):
        make_bundle(story.evidence, signer(story.signer.name, 9), hours, target)
    assert [path.name for path in story.folder.iterdir() if path.name in ("b", "none") or path.name[0] == "."] == []


# Consistency with what a verifier remembers.


def test_an_older_checkpoint_is_compared_where_the_hashes_are_here(story: Story) -> None:
    size = len(story.entries)
    kept = {at: remembered(story, at) for at in (1, 128, 255, 256, 257, 300, 384, 511, 512, 513, 600, size)}
    known = [at for at, old in kept.items() if not story.verify(story.data, remembered=[old]).notes]
    assert known == [256, 257, 300, 384, 511, 512, size]
    forked = replace(remembered(story, 300), root=bytes(32))
    outcome = story.verify(story.data, remembered=[forked])
    assert outcome.verdict == "not_verified"
    assert "not consistent with the one remembered at size 300" in said(outcome)
    later = Checkpoint(story.signer.name, len(story.entries) + 5, bytes(32))
    assert "was not checked" in story.verify(story.data, remembered=[later]).notes[0]


def remembered(story: Story, size: int) -> Checkpoint:
    return Checkpoint(story.signer.name, size, platforms.tree_hash(story.entries[:size]))


@given(size=st.integers(1, 600), ends=st.tuples(st.integers(0, 599), st.integers(1, 600)))
def test_any_part_of_any_tree_gives_its_root(size: int, ends: tuple[int, int]) -> None:
    leaves = [merkle.leaf_hash(b"%d" % n) for n in range(size)]
    cut = range(min(ends), max(ends))
    calls: list[tuple[int, int]] = []

    def known(start: int, end: int) -> bytes:
        calls.append((start, end))
        return merkle.root(leaves[start:end])

    assert tree_hash(0, size, cut, known) == merkle.root(leaves)
    assert [end for _, end in calls[:-1]] == [start for start, _ in calls[1:]]
    assert len([call for call in calls if call[0] not in cut]) <= 2 * size.bit_length()


# The pages, and the bytes that they show.

VECTORS = Path(__file__).parent / "vectors"
SPEC = (Path(__file__).parents[1] / "docs/spec/bundle.md").read_text()


def test_the_vector_verifies_as_it_did(tmp_path: Path) -> None:
    """A release that does not verify what an older one wrote breaks the promise of years."""
    known = json.loads((VECTORS / "bundle.json").read_text())
    keys = [Verifier.parse(vkey) for vkey in known["keys"]]
    outcome = verify_bundle(VECTORS / "bundle.tar", keys)
    assert outcome.verified, said(outcome)
    told = outcome.as_json()
    assert {name: told[name] for name in known["outcome"]} == known["outcome"]


def test_the_page_shows_the_vector() -> None:
    parts = unpack((VECTORS / "bundle.tar").read_bytes())
    assert pack(parts) == (VECTORS / "bundle.tar").read_bytes()
    listing, text = (block.strip() for block in SPEC.split("```\n")[1:5:2])
    assert listing.splitlines() == [f"{name} {len(data)}" for name, data in parts.items()]
    assert parts["manifest.note"].decode().startswith(text + "\n\n")
    fields = [name for line in SPEC.split("| manifest field |")[1].splitlines()[2:] if line.startswith("| `")
              for name in re.findall("`([a-z_]+)`", line.split("|")[1])]  # fmt: skip
    assert fields == list(json.loads(parts["manifest.json"]))


def test_the_page_for_auditors_names_each_verdict_with_its_exit_code() -> None:
    page = (Path(__file__).parents[1] / "docs/audits.md").read_text()
    for verdict, code in (("verified", 0), ("not_verified", 1), ("indeterminate", 3)):
        assert f"| `{verdict}` | {code} |" in page
