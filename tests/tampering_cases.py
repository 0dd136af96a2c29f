"""What can be done to evidence: the rows of the table in tests/test_tampering.py.

Each row harms a copy of a state folder and gives the places that verification must name. Some of them are done by
somebody who stole the log's key, and signs what is left as a whole log again.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from render_platform import merkle, tiles
from render_platform.canonical import digest_of
from render_platform.cas import path_of
from render_platform.clock import HOUR_US, ManualClock
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.keyring import Rotation, countersign, key_entry, propose
from render_platform.note import Checkpoint, FileSigner, load_key, sign_note
from tests.factories import START_US
from tests.platforms import make_platform, read_log, record_random
from tests.stories import signer

ROWS_A_BATCH = 5


@dataclass(frozen=True)
class Scene:
    """A state folder with a whole log: three hours, batches of five rows, five published sizes."""

    state: Path
    sizes: tuple[int, ...]

    @property
    def log(self) -> Path:
        return self.state / "log"

    @property
    def key(self) -> FileSigner:
        return load_key(self.state / "keys/checkpoint.key")

    @property
    def pins(self) -> tuple[str, ...]:
        """What an auditor pinned: the options that verify the folders alone."""
        attestation = load_key(self.state / "keys/attestation.key").verifier
        return ("--key", self.key.verifier.vkey, "--key", attestation.vkey)

    def entries(self) -> list[bytes]:
        return read_log(self.state, self.sizes[-1])

    def batches(self) -> list[AuditEntry]:
        return [entry for entry in map(parse, self.entries()) if entry.type == "usage_batch"]

    def object(self, number: int) -> str:
        """The name of a batch's object, from the state folder."""
        return f"blobs/{path_of(str(self.batches()[number].subject_digest))}"

    def copy(self, to: Path) -> Scene:
        shutil.copytree(self.state, to)
        return replace(self, state=to)


def make_scene(state: Path, keys: Path | None = None, seed: int = 0) -> Scene:
    """With the keys in `keys`, if given. `seed` chooses what happens after the second publication."""
    if keys is not None:
        shutil.copytree(keys, state / "keys")
    with closing(make_platform(state, batch_rows=ROWS_A_BATCH)) as platform:
        sizes = []
        for number in range(5):
            hour = START_US + number // 2 * HOUR_US
            record_random(platform, 9, number + (seed if number > 1 else 0), start_us=hour)
            if isinstance(platform.clock, ManualClock):
                platform.clock.move_to(hour + (number % 2 + 1) * HOUR_US // 2)
            checkpoint = platform.flush().checkpoint
            sizes.append(checkpoint.size if checkpoint else 0)
    return Scene(state, tuple(sizes))


def write_log(scene: Scene, entries: Sequence[bytes], by: FileSigner, *, chained: bool) -> None:
    """What a thief of the log's key can do: sign other entries as the log, with all their files."""
    if chained:
        entries = _chain(entries)
    shutil.rmtree(scene.log)
    hashes = [merkle.leaf_hash(entry) for entry in entries]
    for tile in tiles.tiles_of(len(entries)):
        level, index, width = tile
        start = index * tiles.TILE_WIDTH
        if level is None:
            data = tiles.encode_bundle(entries[start : start + width])
        else:
            data = tiles.tile_hashes(level, index, width, lambda first, end: hashes[first:end])
        _write(scene.log / tiles.path_of(tile), data)
    for entry in entries:
        _write(scene.state / "blobs" / path_of(digest_of(entry)), entry)
    checkpoint = Checkpoint(by.name, len(entries), merkle.root(hashes))
    _write(scene.log / "checkpoint", sign_note(checkpoint.text(), [by]).encode())


def _chain(entries: Sequence[bytes]) -> list[bytes]:
    chained, previous = [], FIRST_PREVIOUS
    for entry in entries:
        chained.append(replace(parse(entry), previous=previous).to_bytes())
        previous = digest_of(chained[-1])
    return chained


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# The rows. Each harms the scene and gives the places to be named.


def flip_a_byte(scene: Scene) -> set[str]:
    path = scene.state / scene.object(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return {scene.object(1)}


def delete_an_object(scene: Scene) -> set[str]:
    (scene.state / scene.object(1)).unlink()
    return {scene.object(1)}


def swap_two_objects(scene: Scene) -> set[str]:
    one, two = (scene.state / scene.object(number) for number in (1, 2))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    return {scene.object(1), scene.object(2)}


def cut_the_tail(scene: Scene) -> set[str]:
    """Back to an earlier size, with that size's checkpoint, and without any file of later ones."""
    write_log(scene, scene.entries()[: scene.sizes[2]], scene.key, chained=False)
    return {"log/checkpoint"}


def restore_an_old_checkpoint(scene: Scene) -> set[str]:
    earlier = merkle.root([merkle.leaf_hash(entry) for entry in scene.entries()[: scene.sizes[3]]])
    note = sign_note(Checkpoint(scene.key.name, scene.sizes[3], earlier).text(), [scene.key])
    (scene.log / "checkpoint").write_text(note)  # Ed25519 is deterministic: byte for byte what was published then
    return {"log/checkpoint"}


def cut_two_entries_out(scene: Scene) -> set[str]:
    path = scene.log / tiles.entries_path(0, scene.sizes[-1])
    path.write_bytes(tiles.encode_bundle(_without_two(scene.entries())))
    return {f"log/{tiles.entries_path(0, scene.sizes[-1])}"}


def leave_two_entries_out_and_sign(scene: Scene) -> set[str]:
    write_log(scene, _without_two(scene.entries()), scene.key, chained=False)
    return {"entry 1"}


def leave_two_entries_out_chain_and_sign(scene: Scene) -> set[str]:
    left = _without_two(scene.entries())
    write_log(scene, left, scene.key, chained=True)
    return {f"entry of {parse(left[1]).batch_id}"}


def _without_two(entries: list[bytes]) -> list[bytes]:
    """Two batches of the first hour that stand one after the other."""
    return [*entries[:1], *entries[3:]]


def append_to_parquet(scene: Scene) -> set[str]:
    path = scene.state / scene.object(1)
    path.write_bytes(path.read_bytes() + b"\0")
    return {scene.object(1)}


def append_to_parquet_and_sign(scene: Scene) -> set[str]:
    """The longer object under its own digest, and the log made to bind it."""
    entries = scene.entries()
    index = next(n for n, data in enumerate(entries) if parse(data).type == "usage_batch")
    entry = parse(entries[index])
    longer = (scene.state / "blobs" / path_of(str(entry.subject_digest))).read_bytes() + b"one row more"
    name = f"blobs/{path_of(digest_of(longer))}"
    _write(scene.state / name, longer)
    entries[index] = replace(entry, subject_digest=digest_of(longer), subject_size=len(longer)).to_bytes()
    write_log(scene, entries, scene.key, chained=True)
    return {name}


def replace_the_key(scene: Scene) -> set[str]:
    """The log and the key file of somebody else, under the origin's name."""
    write_log(scene, scene.entries(), signer(scene.key.name, 9), chained=False)
    return {"log/checkpoint"}


def add_a_second_line_of_the_key(scene: Scene) -> set[str]:
    """A second signature line with the key's name and id, over another text."""
    other = sign_note(Checkpoint(scene.key.name, 1, bytes(32)).text(), [scene.key])
    path = scene.log / "checkpoint"
    path.write_text(path.read_text() + other.rpartition("\n\n")[2])
    return {"log/checkpoint"}


def sign_under_the_same_key_id(scene: Scene) -> set[str]:
    """A key that was searched for until its id, four bytes, is that of the log's key."""
    other = signer(scene.key.name, 9)
    checkpoint = Checkpoint(scene.key.name, scene.sizes[-1], bytes(32))
    payload = scene.key.verifier.key_id + other.sign(checkpoint.text().encode())
    line = f"— {scene.key.name} {base64.b64encode(payload).decode()}\n"
    (scene.log / "checkpoint").write_text(f"{checkpoint.text()}\n{line}")
    return {"log/checkpoint"}


def fork_the_log(scene: Scene) -> set[str]:
    """Another log of the same key: the first two sizes are the same, then other batches, all of them well formed."""
    other = make_scene(scene.state.with_name("fork"), scene.state / "keys", seed=70)
    common = [one == two for one, two in zip(scene.entries(), other.entries(), strict=True)]
    assert all(common[: scene.sizes[1]])
    assert not any(common[scene.sizes[1] :])
    shutil.copytree(other.state / "blobs", scene.state / "blobs", dirs_exist_ok=True)
    write_log(scene, other.entries(), scene.key, chained=False)
    return {"log/checkpoint"}


@dataclass(frozen=True)
class Row:
    """One way to tamper; `what` must be said at each place. `pinned`: the folders alone, with an auditor's keys."""

    harm: Callable[[Scene], set[str]]
    what: str
    pinned: bool = False
    deep: bool = False

    def options(self, scene: Scene) -> list[str]:
        """Of `verify`; asked for before anything is harmed."""
        return [*(scene.pins if self.pinned else ()), *(["--deep"] if self.deep else []), "--json"]


ROWS = {
    "a flipped byte": Row(flip_a_byte, "digest"),
    "an object deleted": Row(delete_an_object, "missing"),
    "two objects swapped": Row(swap_two_objects, "digest"),
    "a truncated tail": Row(cut_the_tail, "not consistent"),
    "two consecutive entries missing": Row(cut_two_entries_out, "entries"),
    "two consecutive entries missing, signed again": Row(leave_two_entries_out_and_sign, "before it", pinned=True),
    "two consecutive entries missing, chained and signed again": Row(
        leave_two_entries_out_chain_and_sign, "comes next", pinned=True
    ),
    "bytes after the end of Parquet": Row(append_to_parquet, "digest"),
    "bytes after the end of Parquet, signed again": Row(append_to_parquet_and_sign, "Parquet", pinned=True, deep=True),
    "a replaced key": Row(replace_the_key, "no known key", pinned=True),
    "a second signature line of one key": Row(add_a_second_line_of_the_key, "signature"),
    "a key with the same key id": Row(sign_under_the_same_key_id, "signature"),
    "an old checkpoint restored": Row(restore_an_old_checkpoint, "not consistent"),
    "a forked log": Row(fork_the_log, "not consistent"),
}


# A stolen key, and the witness that finds it.


@dataclass(frozen=True)
class Rotated:
    """A log whose key was rotated after its last batch: the notes that were published before and after, as they stood,
    and the proof that the later extends the earlier."""

    old: FileSigner
    new: FileSigner
    before: str
    after: str
    proof: list[bytes]


def rotate_the_key(scene: Scene) -> Rotated:
    """As the platform does it: old, new and recovery key sign, and the entry is the last before the new key's size."""
    old, new, recovery = scene.key, signer(scene.key.name, 7), signer("example.com/recovery", 8)
    size = scene.sizes[-1]
    rotation = Rotation("checkpoint", old.verifier, new.verifier, recovery.verifier, size + 1, 0)
    draft, blob = key_entry(countersign(propose(rotation, old, new), recovery))
    _write(scene.state / "blobs" / path_of(digest_of(blob)), blob)
    before = (scene.log / "checkpoint").read_text()
    entries = [*scene.entries(), draft.to_bytes()]
    write_log(scene, entries, new, chained=True)
    hashes = [merkle.leaf_hash(entry) for entry in read_log(scene.state, size + 1)]
    return Rotated(old, new, before, (scene.log / "checkpoint").read_text(), merkle.consistency_proof(size, hashes))


def submission(old_size: int, proof: Sequence[bytes], note: str) -> bytes:
    """The body of a request to a witness."""
    lines = [f"old {old_size}", *(base64.b64encode(node).decode() for node in proof)]
    return ("\n".join(lines) + f"\n\n{note}").encode()


def problems_of(stdout: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(stdout)["problems"]
    return found
