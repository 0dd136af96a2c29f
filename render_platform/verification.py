"""Verification: does the evidence in `blobs/` and `log/` hold? Needs the public keys, and nothing else of ours.

Every problem is collected and named; nothing stops at the first. What is trusted is the signed checkpoint: the leaves
that hash to its root say what every tile, bundle, entry and blob must be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from render_platform import merkle, tiles
from render_platform.canonical import digest_of
from render_platform.clock import HOUR_US, iso
from render_platform.entries import END_OF_TIME_US, FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing
from render_platform.evidence import BlobCheck, Evidence, Progress, Verification, said
from render_platform.note import Checkpoint, read_checkpoint


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
    except (Finding, Missing) as error:
        outcome.add("log/checkpoint", error.message)
    entries: list[AuditEntry | None] = []
    if outcome.checkpoint is not None:
        leaves = _LogCheck(evidence, outcome, outcome.checkpoint).leaves()
        entries = _check_entries(leaves, outcome)
        _check_order([entry for entry in entries if entry is not None], outcome)
    deep_range = range(start_us, end_us) if deep else range(0)
    BlobCheck(evidence, outcome, entries, deep_range, progress).run()
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
        # An entry that the checkpoint does not cover says nothing: its bundle is named above.
        return [e if e is not None and merkle.leaf_hash(e) == h else None for e, h in zip(entries, hashes, strict=True)]

    def _bundle(self, index: int, width: int) -> list[bytes | None]:
        path = tiles.entries_path(index, width)
        try:
            found = tiles.decode_bundle(self._log.read(path))
            if len(found) != width:
                raise Finding(f"holds {len(found)} entries instead of {width}")
            return list(found)
        except (Finding, Missing) as error:
            self._outcome.add(f"log/{path}", said(error, path))
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
        except (Finding, Missing):
            return [b""] * width
        return [data[start : start + 32] for start in range(0, width * 32, 32)]

    def _check_files(self, hashes: Sequence[bytes]) -> None:
        """Every file of the log is one that the leaves give, and every one that was published stands."""
        standing = {name for name in self._log.names() if name != "checkpoint"}
        required = {tile for size in (self._size, *(c.size for c in self._history)) for tile in tiles.tiles_of(size)}
        paths = {tiles.path_of(tile): tile for tile in required if _end(tile) <= self._size}
        for path in sorted(paths.keys() - standing):
            self._outcome.add(f"log/{path}", "missing")
        for path in sorted(standing):
            tile = paths.get(path) or tiles.parse_path(path)
            if tile is None:
                self._outcome.add(f"log/{path}", "is not a file of a log")
            elif _end(tile) <= self._size:
                self._check_file(path, tile, hashes)
            else:
                self._outcome.note(f"log/{path} is beyond the checkpoint, which does not cover it")

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
        except (Finding, Missing) as error:
            self._outcome.add(f"log/{path}", said(error, path))
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
        previous = None if entry_bytes is None else digest_of(entry_bytes)
    outcome.entries = len(entries)
    return entries


_SUBJECT = ("recorded_hour", "subject_digest", "subject_size")
_OF_LANE = ("lane", "recorded_hour", "complete_until")
_NEEDED = {
    "usage_batch": (*_OF_LANE, *_SUBJECT, "first_recorded_at", "last_recorded_at", "merkle_root", "attestation"),
    "watermark": _OF_LANE,
    "reconciliation": _SUBJECT,
    "repair": _SUBJECT,
}


@dataclass
class _Lane:
    complete_until: int = 0
    next_hour: int | None = None
    """The first hour that has not been declared complete; unknown before the lane's first entry."""


def _check_order(entries: Sequence[AuditEntry], outcome: Verification) -> None:
    """Nothing left out: contiguous batches an hour, time that never goes back in a lane, watermarks that add up."""
    named: set[tuple[str, str]] = set()
    lanes: dict[str, _Lane] = defaultdict(_Lane)
    seqs: dict[int, int] = defaultdict(int)
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for entry in entries:
        where = f"entry of {entry.batch_id}"
        if lacking := [name for name in _NEEDED.get(entry.type, ()) if getattr(entry, name) is None]:
            outcome.add(where, f"lacks {', '.join(lacking)}")
        if (entry.type, entry.batch_id) in named:
            outcome.add(where, f"is the second {entry.type} of that name")
        named.add((entry.type, entry.batch_id))
        if entry.type not in ("usage_batch", "watermark"):
            continue
        hour, lane = entry.recorded_hour or 0, lanes[entry.lane or ""]
        if (entry.complete_until or 0) < lane.complete_until:
            outcome.add(where, "complete_until goes back")
        lane.complete_until = entry.complete_until or 0
        lane.next_hour = hour if lane.next_hour is None else lane.next_hour
        total = sums[entry.lane or "", hour]
        if entry.type == "watermark":
            _check_watermark(entry, hour, lane, total, outcome)
            continue
        if entry.batch_seq != seqs[hour]:
            outcome.add(where, f"batch_seq is {entry.batch_seq}, and {seqs[hour]} comes next")
        if hour < lane.next_hour:
            outcome.add(where, "its hour was declared complete before it")
        seqs[hour] += 1
        total[0] += entry.records
        total[1] += entry.gpu_time_ns


def _check_watermark(entry: AuditEntry, hour: int, lane: _Lane, total: list[int], outcome: Verification) -> None:
    where = f"entry of {entry.batch_id}"
    if hour > (lane.next_hour or 0):
        outcome.add(where, f"the watermark of {iso(lane.next_hour or 0)} is missing before it")
    elif hour != lane.next_hour:
        outcome.add(where, "its hour was declared complete before it")
    if (entry.complete_until or 0) < hour + HOUR_US:
        outcome.add(where, "declares an hour that is not over")
    if [entry.records, entry.gpu_time_ns] != total:
        outcome.add(where, f"declares {entry.records} records, the batches of its hour hold {total[0]}")
    lane.next_hour = hour + HOUR_US


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, tiles.TILE_WIDTH):
        yield start // tiles.TILE_WIDTH, min(tiles.TILE_WIDTH, size - start)


def _end(tile: tiles.Tile) -> int:
    """The number of leaves that a tree has at least, when it has this tile."""
    level, index, width = tile
    return int((index * tiles.TILE_WIDTH + width) * tiles.TILE_WIDTH ** (level or 0))
