"""Go's checksum-database library verifies our log, and refuses it once anything of it is altered."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from render_platform import tiles
from render_platform.note import Checkpoint, Signer, sign_note
from tests.independent.logs import WrittenLog, base64_of, pair_of, record_of
from tests.independent.tools import Verdict, ask, go_program, installed
from tests.stories import signer

ENTRIES, PAIRS = 1_000, 40


@pytest.fixture(scope="module")
def go() -> list[str]:
    return installed(go_program)


def request_of(log: WrittenLog, folder: Path, indexes: list[int], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    hashes = log.hashes
    return {
        "log": str(folder),
        "vkey": log.signer.verifier.vkey,
        "records": [record_of(hashes, index) for index in indexes],
        "pairs": [pair_of(log, hashes, *pair) for pair in sizes],
    }


def test_note_entries_and_sizes_are_verified(go: list[str], written_log: WrittenLog, rng: random.Random) -> None:
    """A thousand random entries; consistency of random sizes, and of every size that was published."""
    published = [checkpoint.size for checkpoint in written_log.history]
    assert len(published) > 10
    indexes = [*rng.sample(range(written_log.size), ENTRIES - 2), 0, written_log.size - 1]
    drawn = [sorted(rng.choices(range(1, written_log.size + 1), k=2)) for _ in range(PAIRS)]
    pairs = [*((old, new) for old, new in drawn), *pairwise(published)]
    asked = request_of(written_log, written_log.folder, indexes, pairs)
    verdict = ask(go, asked)
    assert verdict.accepted, verdict.said
    assert verdict.said.split() == [f'{{"size":{written_log.size},"records":{ENTRIES},"pairs":{len(pairs)}}}']


def test_our_roots_are_those_that_were_signed(written_log: WrittenLog) -> None:
    for checkpoint in written_log.history:
        assert checkpoint.root == written_log.roots[checkpoint.size]


# Altered, each in one place.

INDEX = 700
"""Of an entry in a full bundle; its tile is `tile/0/002`."""


@pytest.fixture
def altered(go: list[str], written_log: WrittenLog, tmp_path: Path) -> Callable[..., Verdict]:
    """Asks about a copy of the log that `harm` has spoiled; whole, the copy is accepted."""
    folder = tmp_path / "log"
    shutil.copytree(written_log.folder, folder)
    asked = request_of(written_log, folder, [INDEX], [(written_log.history[3].size, written_log.size)])
    verdict = ask(go, asked)
    assert verdict.accepted, verdict.said

    def run(harm: Callable[[Path, dict[str, Any]], None]) -> Verdict:
        harm(folder, asked)
        return ask(go, asked)

    return run


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def publish(folder: Path, checkpoint: Checkpoint, by: Signer) -> None:
    (folder / "checkpoint").write_text(sign_note(checkpoint.text(), [by]))


def refused(verdict: Verdict, why: str) -> None:
    assert not verdict.accepted
    assert why in verdict.said, verdict.said


def test_an_altered_size_is_refused(altered: Callable[..., Verdict], written_log: WrittenLog) -> None:
    def harm(folder: Path, _asked: dict[str, Any]) -> None:
        text = (folder / "checkpoint").read_text()
        (folder / "checkpoint").write_text(text.replace(f"\n{written_log.size}\n", f"\n{written_log.size - 1}\n", 1))

    refused(altered(harm), "checkpoint: invalid signature")


def test_an_altered_size_that_is_signed_is_refused(altered: Callable[..., Verdict], written_log: WrittenLog) -> None:
    """A size that was published, so that its tiles stand, with the newest root."""

    def harm(folder: Path, asked: dict[str, Any]) -> None:
        size = written_log.history[-2].size
        publish(folder, Checkpoint(written_log.signer.name, size, written_log.roots[-1]), written_log.signer)

    refused(altered(harm), f"entry {INDEX}: downloaded inconsistent tile")


@pytest.mark.parametrize("tile", ["tile/0/002", "tile/1/000.p/11"])
def test_an_altered_tile_is_refused(altered: Callable[..., Verdict], tile: str) -> None:
    refused(altered(lambda folder, _asked: flip(folder / tile, 40)), f"entry {INDEX}:")


def test_an_altered_entry_is_refused(altered: Callable[..., Verdict]) -> None:
    def harm(folder: Path, _asked: dict[str, Any]) -> None:
        path = folder / "tile/entries/002"
        before = tiles.decode_bundle(path.read_bytes())[: INDEX % 256]
        flip(path, len(tiles.encode_bundle(before)) + 20)

    refused(altered(harm), f"entry {INDEX}:")


def test_an_altered_signature_is_refused(altered: Callable[..., Verdict]) -> None:
    def harm(folder: Path, _asked: dict[str, Any]) -> None:
        text = (folder / "checkpoint").read_text()
        at = len(text) - 40
        (folder / "checkpoint").write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])

    refused(altered(harm), "checkpoint: invalid signature")


def test_another_key_of_the_same_name_is_refused(altered: Callable[..., Verdict], written_log: WrittenLog) -> None:
    def harm(folder: Path, _asked: dict[str, Any]) -> None:
        publish(folder, written_log.history[-1], signer(written_log.signer.name, 9))

    refused(altered(harm), "checkpoint: note has no verifiable signatures")


def test_another_root_is_refused(altered: Callable[..., Verdict], written_log: WrittenLog) -> None:
    def harm(folder: Path, _asked: dict[str, Any]) -> None:
        publish(folder, Checkpoint(written_log.signer.name, written_log.size, bytes(32)), written_log.signer)

    refused(altered(harm), f"entry {INDEX}:")


@pytest.mark.parametrize("part", ["records", "pairs"])
def test_an_altered_proof_is_refused(altered: Callable[..., Verdict], part: str) -> None:
    def harm(_folder: Path, asked: dict[str, Any]) -> None:
        asked[part][0]["proof"][1] = base64_of(bytes(32))

    refused(altered(harm), {"records": "entry", "pairs": "sizes"}[part])


def test_a_fork_is_refused(altered: Callable[..., Verdict], written_log: WrittenLog) -> None:
    """An earlier root that was never this log's."""

    def harm(_folder: Path, asked: dict[str, Any]) -> None:
        asked["pairs"][0]["old_root"] = base64_of(bytes(32))

    refused(altered(harm), f"another root of size {written_log.history[3].size}")
