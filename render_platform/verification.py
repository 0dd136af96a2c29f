"""Verification: does the evidence in `blobs/` and `log/` hold? Needs the public keys, and nothing else of ours.

Every problem is collected and named; nothing stops at the first. What is trusted is the signed checkpoint: the leaves
that hash to its root say what every tile, bundle, entry and blob must be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from render_platform import attestation, batches, merkle, tiles
from render_platform.cas import digest_at, digest_of, path_of
from render_platform.clock import HOUR_US, iso
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, digest_of_entry, parse
from render_platform.errors import Finding, PlatformError
from render_platform.events import merkle_root, total_gpu_time_ns, uuid_texts
from render_platform.note import Checkpoint, Verifier, read_checkpoint
from render_platform.objects import ObjectStore

END_OF_TIME_US = 2**63
Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done and what there is."""


@dataclass(frozen=True, slots=True)
class Problem:
    where: str
    what: str


@dataclass
class Verification:
    """The outcome. Figures count what was read, good or not."""

    checkpoint: Checkpoint | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    batches: int = 0
    records: int = 0
    gpu_time_ns: int = 0
    blobs: int = 0
    deep: bool = False
    deep_batches: int = 0
    deep_records: int = 0

    @property
    def verified(self) -> bool:
        return self.checkpoint is not None and not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "size": self.checkpoint.size if self.checkpoint else None,
            "root": self.checkpoint.root.hex() if self.checkpoint else None,
            "entries": self.entries,
            "batches": self.batches,
            "events": self.records,
            "gpu_time_ns": self.gpu_time_ns,
            "objects": self.blobs,
            "deep": self.deep,
            "rows_read": self.deep_records,
            "problems": [{"where": problem.where, "what": problem.what} for problem in self.problems],
            "notes": self.notes,
        }

    def add(self, where: str, what: str) -> None:
        self.problems.append(Problem(where, what))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is verified, and with which keys. `history` holds earlier checkpoints that the log must still contain."""

    log: ObjectStore
    blobs: ObjectStore
    log_keys: Sequence[Verifier]
    attestation_keys: Sequence[Verifier]
    history: Sequence[Checkpoint] = ()


def verify(
    evidence: Evidence,
    *,
    deep: bool = False,
    start_us: int = 0,
    end_us: int = END_OF_TIME_US,
    progress: Progress = lambda *_: None,
) -> Verification:
    """Check everything that the checkpoint covers. `deep` also re-reads the rows of the batches of [start, end).

    Raises Unavailable where a store cannot be read at all; whatever is wrong with the evidence is in the outcome.
    """
    outcome = Verification(deep=deep)
    try:
        outcome.checkpoint = read_checkpoint(evidence.log.read("checkpoint"), evidence.log_keys)
    except PlatformError as error:
        outcome.add("log/checkpoint", error.message)
    entries: list[AuditEntry | None] = []
    if outcome.checkpoint is not None:
        leaves = _LogCheck(evidence, outcome, outcome.checkpoint).leaves()
        entries = _check_entries(leaves, outcome)
        _check_order([entry for entry in entries if entry is not None], outcome)
    deep_range = range(start_us, end_us) if deep else range(0)
    _BlobCheck(evidence, outcome, entries, deep_range, progress).run()
    return outcome


class _LogCheck:
    """Tiles and bundles against the checkpoint: gives the entries' bytes, None where a bundle cannot be read."""

    def __init__(self, evidence: Evidence, outcome: Verification, checkpoint: Checkpoint) -> None:
        self._log = evidence.log
        self._outcome = outcome
        self._checkpoint = checkpoint
        self._history = evidence.history
        self._size = checkpoint.size

    def leaves(self) -> list[bytes | None]:
        entries = [entry for index, width in _blocks(self._size) for entry in self._bundle(index, width)]
        hashes = self._trusted(entries)
        self._check_files(hashes)
        for earlier in self._history:
            if earlier.size > self._size or merkle.root(hashes[: earlier.size]) != earlier.root:
                self._outcome.add("log/checkpoint", f"is not consistent with the one published at size {earlier.size}")
        return entries

    def _bundle(self, index: int, width: int) -> list[bytes | None]:
        path = tiles.entries_path(index, width)
        try:
            found = tiles.decode_bundle(self._log.read(path))
            if len(found) != width:
                raise Finding(f"holds {len(found)} entries instead of {width}")
            return list(found)
        except PlatformError as error:
            self._outcome.add(f"log/{path}", _said(error, path))
            return [None] * width

    def _trusted(self, entries: Sequence[bytes | None]) -> list[bytes]:
        """The leaf hashes that give the checkpoint's root: those of the entries, else those of the tiles."""
        by_entry = [merkle.leaf_hash(entry) if entry is not None else b"" for entry in entries]
        if all(by_entry) and merkle.root(by_entry) == self._checkpoint.root:
            return by_entry
        by_tile = [value for index, width in _blocks(self._size) for value in self._tile(index, width)]
        if all(by_tile) and merkle.root(by_tile) == self._checkpoint.root:
            return by_tile
        self._outcome.add("log/checkpoint", "neither the entries nor the tiles hash to its root")
        return by_entry

    def _tile(self, index: int, width: int) -> list[bytes]:
        try:
            data = self._log.read(tiles.tile_path(0, index, width))
        except PlatformError:
            return [b""] * width
        return [data[start : start + 32] for start in range(0, width * 32, 32)]

    def _check_files(self, hashes: Sequence[bytes]) -> None:
        """Every file of the log is one that the leaves give, and every one that was published stands."""
        standing = {name for name in self._log.names() if name != "checkpoint"}
        required = {tile for size in (self._size, *(c.size for c in self._history)) for tile in tiles.tiles_of(size)}
        paths = {_path(tile): tile for tile in required if _end(tile) <= self._size}
        for path in sorted(paths.keys() - standing):
            self._outcome.add(f"log/{path}", "missing")
        for path in sorted(standing):
            tile = paths.get(path) or tiles.parse_path(path)
            if tile is None:
                self._outcome.add(f"log/{path}", "is not a file of a log")
            elif _end(tile) <= self._size:
                self._check_file(path, tile, hashes)

    def _check_file(self, path: str, tile: tiles.Tile, hashes: Sequence[bytes]) -> None:
        level, index, width = tile
        try:
            data = self._log.read(path)
            if level is None:
                start = index * tiles.TILE_WIDTH
                found = [merkle.leaf_hash(entry) for entry in tiles.decode_bundle(data)]
                good = found == list(hashes[start : start + width])
            else:
                good = data == tiles.tile_hashes(level, index, width, lambda start, end: hashes[start:end])
        except PlatformError as error:
            self._outcome.add(f"log/{path}", _said(error, path))
            return
        if not good:
            self._outcome.add(f"log/{path}", "does not hold what the checkpoint covers")


def _check_entries(data: Sequence[bytes | None], outcome: Verification) -> list[AuditEntry | None]:
    """Canonical form, and the chain: each entry names the digest of the one before."""
    entries: list[AuditEntry | None] = []
    previous: str | None = FIRST_PREVIOUS
    for index, entry_bytes in enumerate(data):
        entry = None
        if entry_bytes is not None:
            try:
                entry = parse(entry_bytes)
                if previous is not None and entry.previous != previous:
                    outcome.add(f"entry {index}", "does not name the digest of the entry before it")
            except Finding as error:
                outcome.add(f"entry {index}", error.message)
        entries.append(entry)
        previous = None if entry_bytes is None else digest_of_entry(entry_bytes)
    outcome.entries = len(entries)
    return entries


def _check_order(entries: Sequence[AuditEntry], outcome: Verification) -> None:
    """Nothing left out: contiguous batches an hour, time that never goes back in a lane, watermarks that add up."""
    complete: dict[str | None, int] = defaultdict(int)
    watermarked: dict[str | None, int] = {}
    seqs: dict[int | None, int] = defaultdict(int)
    sums: dict[tuple[str | None, int | None], list[int]] = defaultdict(lambda: [0, 0])
    for entry in entries:
        where = f"entry of {entry.batch_id}"
        if entry.type not in ("usage_batch", "watermark"):
            continue
        if (entry.complete_until or 0) < complete[entry.lane]:
            outcome.add(where, "complete_until goes back")
        complete[entry.lane] = entry.complete_until or 0
        total = sums[entry.lane, entry.recorded_hour]
        if entry.type == "usage_batch":
            if entry.batch_seq != seqs[entry.recorded_hour]:
                outcome.add(where, f"batch_seq is {entry.batch_seq}, and {seqs[entry.recorded_hour]} comes next")
            seqs[entry.recorded_hour] += 1
            total[0] += entry.records
            total[1] += entry.gpu_time_ns
            if entry.recorded_hour in (None, watermarked.get(entry.lane)):
                outcome.add(where, "its hour was declared complete before it")
        else:
            _check_watermark(entry, watermarked.get(entry.lane), total, where, outcome)
            watermarked[entry.lane] = entry.recorded_hour or 0


def _check_watermark(
    entry: AuditEntry, before: int | None, total: list[int], where: str, outcome: Verification
) -> None:
    hour = entry.recorded_hour or 0
    if before is not None and hour != before + HOUR_US:
        outcome.add(where, f"the watermark of {iso(before + HOUR_US)} is missing before it")
    if (entry.complete_until or 0) < hour + HOUR_US:
        outcome.add(where, "declares an hour that is not over")
    if [entry.records, entry.gpu_time_ns] != total:
        outcome.add(where, f"declares {entry.records} records, the batches of its hour hold {total[0]}")


class _BlobCheck:
    """Every object rehashed; every object that an entry binds present, and saying what the entry says."""

    def __init__(
        self,
        evidence: Evidence,
        outcome: Verification,
        entries: Sequence[AuditEntry | None],
        deep: range,
        progress: Progress,
    ) -> None:
        self._blobs = evidence.blobs
        self._keys: Mapping[str, Verifier] = {key.vkey: key for key in evidence.attestation_keys}
        self._outcome = outcome
        self._entries = [entry for entry in entries if entry is not None]
        self._deep = deep
        self._progress = progress
        self._by_subject = {e.subject_digest: e for e in self._entries if e.type == "usage_batch"}
        self._by_attestation = {e.attestation: e for e in self._entries if e.attestation}
        self._seen_events: set[str] = set()

    def run(self) -> None:
        names = list(self._blobs.names())
        good: set[str] = set()
        for done, path in enumerate(names):
            self._progress("blobs", done, len(names))
            if path.startswith("quarantine/"):
                continue
            digest = digest_at(path)
            if digest is None:
                self._outcome.add(f"blobs/{path}", "is not a content-addressed object")
            elif self._check_blob(path, digest):
                good.add(digest)
        self._progress("blobs", len(names), len(names))
        self._outcome.blobs = len(good)
        self._check_presence({digest_at(path) for path in names})

    def _check_presence(self, standing: set[str | None]) -> None:
        for entry in self._entries:
            for digest in (digest_of_entry(entry.to_bytes()), *entry.blobs):
                if digest not in standing:
                    self._outcome.add(f"blobs/{path_of(digest)}", f"missing; the entry of {entry.batch_id} binds it")
            if entry.type == "usage_batch":
                self._outcome.batches += 1
                self._outcome.records += entry.records
                self._outcome.gpu_time_ns += entry.gpu_time_ns

    def _check_blob(self, path: str, digest: str) -> bool:
        try:
            data = self._blobs.read(path)
            if digest_of(data) != digest:
                raise Finding("its bytes do not have the digest that names it")
            if entry := self._by_subject.get(digest):
                self._check_batch(entry, data)
            if entry := self._by_attestation.get(digest):
                self._check_attestation(entry, data)
        except PlatformError as error:
            self._outcome.add(f"blobs/{path}", _said(error, path))
            return False
        return True

    def _check_batch(self, entry: AuditEntry, data: bytes) -> None:
        if len(data) != entry.subject_size:
            raise Finding(f"has {len(data)} bytes; its entry says {entry.subject_size}")
        if (entry.recorded_hour or 0) not in self._deep:
            return
        table = batches.decode(data)
        if table.num_rows != entry.records or total_gpu_time_ns(table) != entry.gpu_time_ns:
            raise Finding("its rows do not have the count and the GPU time that its entry says")
        if merkle_root(table).hex() != entry.merkle_root:
            raise Finding("its rows do not have the Merkle root that its entry says")
        ids = uuid_texts(table, "event_id")
        twice = self._seen_events.intersection(ids)
        if twice or len(set(ids)) != len(ids) or ids != sorted(ids):
            raise Finding(f"an event stands twice, or out of order: {', '.join(sorted(twice)[:3])}")
        self._seen_events.update(ids)
        self._outcome.deep_batches += 1
        self._outcome.deep_records += table.num_rows

    def _check_attestation(self, entry: AuditEntry, data: bytes) -> None:
        if not self._keys:
            self._outcome.notes = ["attestations' signatures were not checked: no attestation key was given"]
            return
        signed = attestation.check(data, str(entry.subject_digest), self._keys)
        if (signed.get("events"), signed.get("gpu_time_ns")) != (entry.records, entry.gpu_time_ns):
            raise Finding("the attestation and the entry do not say the same")


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, tiles.TILE_WIDTH):
        yield start // tiles.TILE_WIDTH, min(tiles.TILE_WIDTH, size - start)


def _path(tile: tiles.Tile) -> str:
    level, index, width = tile
    return tiles.entries_path(index, width) if level is None else tiles.tile_path(level, index, width)


def _end(tile: tiles.Tile) -> int:
    """The number of leaves that a tree has at least, when it has this tile."""
    level, index, width = tile
    return int((index * tiles.TILE_WIDTH + width) * tiles.TILE_WIDTH ** (level or 0))


def _said(error: PlatformError, path: str) -> str:
    return error.message.removeprefix(f"blobs/{path}: ").removeprefix(f"{path}: ")
