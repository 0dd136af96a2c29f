"""Receipts made from published files: every event's verifies, at every place of small and large logs, and over time."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import canonical, merkle, tiles
from render_platform.audit_log import BatchLogger
from render_platform.clock import HOUR_US
from render_platform.database import batches, jobs, usage_events
from render_platform.errors import DigestMismatch, Finding, Missing, Unavailable, UsageError
from render_platform.events import UsageEvent
from render_platform.note import Checkpoint, sign_note
from render_platform.pipeline import Platform
from render_platform.receipt_verifier import Proven, verify_receipt
from render_platform.receipts import RETRY_AFTER_S, NotPublished, Receipts, UnknownEvent, encode
from tests.factories import START_US, make_events
from tests.made_receipts import Made, other_key
from tests.platforms import LIVE, event_fields, make_platform, record

CHECKOUT = Path(__file__).parents[1]
SPEC = CHECKOUT / "docs/spec/receipt.md"
VECTORS = CHECKOUT / "tests/vectors"


def record_of(
    platform: Platform, n: int, seed: int, customer: str = "acme", start_us: int = START_US
) -> list[UsageEvent]:
    """`n` events of a customer whom the outbox knows, as recorded."""
    with platform.database.write() as connection:
        ref = platform.outbox.customer_ref(connection, "key", customer)
    return record(platform, LIVE, [replace(e, customer_ref=ref) for e in make_events(n, seed, start_us)])


def receipts_of(platform: Platform) -> Receipts:
    return Receipts(platform.database, platform.cas, platform.log_objects)


def check(platform: Platform, event: UsageEvent, text: str) -> Proven:
    proven = verify_receipt(text, [platform.log_signer.verifier.vkey])
    assert proven.event == event_fields(event)
    return proven


def test_every_event_has_a_receipt_that_verifies(platform: Platform) -> None:
    events = record_of(platform, 23, 1)
    platform.flush()
    made = receipts_of(platform)
    places = set()
    for event in events:
        text = made.of_event(event.event_id)
        proven = check(platform, event, text)
        assert (proven.identity, proven.customer_id) == ("opened", "acme")
        assert made.of_job(event.job_id) == text
        places.add((proven.batch_id, proven.event_index))
    assert len(places) == 23


def test_a_receipt_for_others_names_nobody(platform: Platform) -> None:
    (event,) = record_of(platform, 1, 1)
    platform.flush()
    made = receipts_of(platform)
    for text in (made.of_event(event.event_id, opened=False), made.of_job(event.job_id, opened=False)):
        proven = check(platform, event, text)
        assert (proven.identity, proven.customer_id) == ("not opened", None)
        assert Made.of(text).extra["opening"] is None


def test_what_is_unknown_and_what_is_not_published_yet(platform: Platform) -> None:
    made = receipts_of(platform)
    for ask in (made.of_event, made.of_job):
        with pytest.raises(UnknownEvent):
            ask(uuid.uuid4())
    assert issubclass(UnknownEvent, UsageError)
    assert issubclass(NotPublished, Unavailable)
    (event,) = record_of(platform, 1, 1)
    steps: list[Callable[[], object]] = [lambda: None, platform.seal, platform.store, lambda: log_only(platform)]
    for step in steps:
        step()
        for ask, name in ((made.of_event, event.event_id), (made.of_job, event.job_id)):
            with pytest.raises(NotPublished) as caught:
                ask(name)
            assert caught.value.retry_after_s == RETRY_AFTER_S
    platform.log.publish()
    check(platform, event, made.of_event(event.event_id))


def log_only(platform: Platform) -> None:
    """stored → logged, and nothing published."""
    BatchLogger(platform.database, platform.log).log_stored(lambda *_: None)


def test_a_published_log_does_not_make_what_was_logged_after_it_published(platform: Platform) -> None:
    first = record_of(platform, 1, 1)
    platform.flush()
    (second,) = record_of(platform, 1, 2, start_us=START_US + HOUR_US)
    platform.seal()
    platform.store()
    log_only(platform)
    check(platform, first[0], receipts_of(platform).of_event(first[0].event_id))
    with pytest.raises(NotPublished):
        receipts_of(platform).of_event(second.event_id)


def test_a_job_that_runs_is_not_published_yet(platform: Platform) -> None:
    job_id = uuid.uuid4()
    row: dict[str, Any] = {c.name: b"" if isinstance(c.type, sa.LargeBinary) else 0 for c in jobs.c if not c.nullable}
    row |= {c.name: "x" for c in jobs.c if not c.nullable and isinstance(c.type, sa.Text)}
    with platform.database.write() as connection:
        connection.execute(jobs.insert().values(row | {"job_id": job_id.bytes, "state": "running", "direct": False}))
    with pytest.raises(NotPublished, match="not ended"):
        receipts_of(platform).of_job(job_id)


def test_a_receipt_made_again_has_a_newer_checkpoint_and_both_verify(platform: Platform) -> None:
    (event,) = record_of(platform, 1, 1)
    platform.flush()
    first = receipts_of(platform).of_event(event.event_id)
    record_of(platform, 9, 2, start_us=START_US + HOUR_US)
    platform.flush()
    second = receipts_of(platform).of_event(event.event_id)
    one, two = check(platform, event, first), check(platform, event, second)
    assert one.tree_size < two.tree_size
    assert one.entry == two.entry


def test_the_note_is_passed_on_as_it_was_published(platform: Platform) -> None:
    (event,) = record_of(platform, 1, 1)
    platform.flush()
    note = platform.log_objects.read("checkpoint")
    body = note.decode().split("\n\n")[0] + "\n"
    new, witness = other_key(platform.log_signer.name), other_key("witness.example", 4)
    more = note.decode() + new.line(body) + witness.line(body, 1_700_000_000)
    platform.log_objects.replace("checkpoint", more.encode(), note)
    text = receipts_of(platform).of_event(event.event_id)
    assert text.endswith("\n\n" + more)
    proven = verify_receipt(text, [platform.log_signer.verifier.vkey, new.vkey], [witness.vkey])
    assert len(proven.signed_by) == 2
    assert proven.witnesses == {witness.vkey: 1_700_000_000}


# Large logs: the files of a tree of any size, around one real entry.


class Files:
    """A published log in memory, that counts what is read of it."""

    def __init__(self, entries: list[bytes], platform: Platform) -> None:
        hashes = [merkle.leaf_hash(entry) for entry in entries]
        checkpoint = Checkpoint(platform.log_signer.name, len(entries), merkle.root(hashes))
        self.files = {"checkpoint": sign_note(checkpoint.text(), [platform.log_signer]).encode()}
        for level, index, width in tiles.tiles_of(len(entries)):
            start = index * tiles.TILE_WIDTH
            data = (
                tiles.encode_bundle(entries[start : start + width])
                if level is None
                else tiles.tile_hashes(level, index, width, lambda a, b: hashes[a:b])
            )
            self.files[tiles.path_of((level, index, width))] = data
        self.reads = 0

    def read(self, path: str) -> bytes:
        self.reads += 1
        if path not in self.files:
            raise Missing(path)
        return self.files[path]


class Grown:
    """A platform with one event, and its entry in logs of any size."""

    def __init__(self, path: Path) -> None:
        self.platform = make_platform(path)
        (self.event,) = record_of(self.platform, 1, 1)
        self.platform.flush()
        bundle = self.platform.log_objects.read("tile/entries/000.p/1")
        (self.entry,) = tiles.decode_bundle(bundle)

    def log(self, size: int, index: int) -> Files:
        with self.platform.database.write() as connection:
            connection.execute(batches.update().values(log_index=index))
        entries = [b"%d" % n for n in range(size)]
        entries[index] = self.entry
        return Files(entries, self.platform)

    def make(self, files: Files) -> str:
        return Receipts(self.platform.database, self.platform.cas, files).of_event(self.event.event_id)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    made = Grown(tmp_path_factory.mktemp("grown") / "state")
    yield made
    made.platform.close()


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(1, 1_500) | st.sampled_from([255, 256, 257, 511, 512, 513, 768, 1024]))
def test_every_place_of_logs_of_every_size(grown: Grown, data: st.DataObject, size: int) -> None:
    index = data.draw(st.integers(0, size - 1) | st.sampled_from([0, size - 1, size // 2, size - size % 256 - 1]))
    index = max(index, 0)
    proven = check(grown.platform, grown.event, grown.make(grown.log(size, index)))
    assert (proven.entry_index, proven.tree_size) == (index, size)


def test_a_large_log_costs_a_handful_of_reads(grown: Grown) -> None:
    for index in (0, 40_000):
        files = grown.log(70_000, index)
        check(grown.platform, grown.event, grown.make(files))
        assert files.reads <= 8, "the checkpoint, a bundle, and at most two tiles on each of three levels"


def test_a_partial_tile_that_is_gone_is_read_from_the_full_one(grown: Grown) -> None:
    files, larger = grown.log(300, 299), grown.log(600, 299)
    for path in [path for path in files.files if ".p/" in path and "/001" in path]:
        del files.files[path]
    files.files.update({path: data for path, data in larger.files.items() if path.endswith("/001")})
    proven = check(grown.platform, grown.event, grown.make(files))
    assert (proven.tree_size, proven.entry_index) == (300, 299)


def test_evidence_that_does_not_hold_gives_no_receipt(grown: Grown) -> None:
    """A receipt that would not verify is never handed out."""
    whole = grown.log(300, 5).files
    cases: list[tuple[str, bytes | None]] = [
        ("tile/0/000", bytes(32 * 256)),
        ("tile/0/001.p/44", whole["tile/0/001.p/44"][:-32]),
        ("tile/0/001.p/44", None),
        ("tile/entries/000", tiles.encode_bundle([b"x"])),
        ("tile/entries/000", whole["tile/entries/000"].replace(b"usage_batch", b"usage_match")),
        ("checkpoint", b"\xff"),
        ("checkpoint", b"no note"),
    ]
    for path, data in cases:
        files = grown.log(300, 5)
        del files.files[path]
        files.files |= {} if data is None else {path: data}
        with pytest.raises((Finding, Missing)):
            grown.make(files)
    files = grown.log(300, 5)
    del files.files["checkpoint"]
    with pytest.raises(NotPublished):
        grown.make(files)


def test_a_blob_that_was_altered_gives_no_receipt(platform: Platform) -> None:
    (event,) = record_of(platform, 1, 1)
    platform.flush()
    with platform.database.read() as connection:
        digest = str(connection.execute(sa.select(batches.c.blob_digest)).scalar())
    path = platform.settings.blobs_dir / "sha256" / digest[:2] / digest[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatch):
        receipts_of(platform).of_event(event.event_id)
    path.unlink()
    with pytest.raises(Missing):
        receipts_of(platform).of_event(event.event_id)


def test_an_event_that_its_batch_does_not_hold_gives_no_receipt(platform: Platform) -> None:
    """SQL names the place; what it says is not believed."""
    record_of(platform, 1, 1)
    platform.flush()
    other = uuid.uuid4()
    with platform.database.write() as connection:
        connection.execute(usage_events.update().values(event_id=other.bytes))
    with pytest.raises(Finding, match="does not hold"):
        receipts_of(platform).of_event(other)


def test_proof_ranges_are_those_of_the_inclusion_proof() -> None:
    for size in [*range(1, 40), 255, 256, 257]:
        hashes = [merkle.leaf_hash(b"%d" % n) for n in range(size)]
        for index in range(size):
            ranges = merkle.proof_ranges(index, size)
            assert [merkle.root(hashes[a:b]) for a, b in ranges] == merkle.inclusion_proof(index, hashes)
    for index, size in ((0, 0), (5, 5), (-1, 5)):
        with pytest.raises(UsageError):
            merkle.proof_ranges(index, size)


# The page, and the committed receipts.


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SPEC.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["receipt.tlog-proof", "receipt-erased.tlog-proof"])
def test_our_encoder_gives_the_bytes_of_the_committed_receipts(name: str) -> None:
    text = (VECTORS / name).read_text()
    made = Made.of(text)
    extra = canonical.encode(made.extra)
    proof = [base64.b64decode(line) for line in made.proof]
    assert encode(extra, made.index, proof, f"{made.body}\n{made.signatures}") == text


def test_the_page_shows_the_committed_receipt_and_its_names() -> None:
    receipt = (VECTORS / "receipt.tlog-proof").read_text()
    assert blocks("text")[0] == receipt
    vector = json.loads((VECTORS / "receipt.json").read_text())
    for value in (vector["vkey"], vector["witness"]):
        assert value in SPEC.read_text()
    table = re.findall(r"^\| `(\w+)` \|", SPEC.read_text(), re.MULTILINE)
    assert table == list(Made.of(receipt).extra)


def test_the_commands_of_the_page_print_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "receipt").write_text((VECTORS / "receipt.tlog-proof").read_text())
    shutil.copy(CHECKOUT / "render_platform/receipt_verifier.py", tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    if lacking := [name for name in ("jq", "openssl", "xxd", "sha256sum") if shutil.which(name) is None]:
        pytest.skip(f"docs/spec/receipt.md NOT RUN: its commands need {', '.join(lacking)}")
    script, said = "\n".join(["set -eu", *blocks("sh")]), "".join(blocks("text")[1:])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == said
