"""Verification: does the evidence in `blobs/` and `log/` hold? Needs the public keys, and nothing else of ours.

Every problem is collected and named; nothing stops at the first. What is trusted is the signed checkpoint: the leaves
that hash to its root say what every tile, bundle, entry and blob must be. Each file is read once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from render_platform import merkle, tiles
from render_platform.canonical import digest_of
from render_platform.cas import Cas, Read, read_each
from render_platform.clock import HOUR_US, iso
from render_platform.entries import END_OF_TIME_US, FIRST_PREVIOUS, MAX_OPEN_US, Acceptances, AuditEntry, parse
from render_platform.errors import Finding, Missing
from render_platform.evidence import (
    PROGRESS_EVERY,
    BlobCheck,
    Evidence,
    Logged,
    Progress,
    Verification,
    said,
)
from render_platform.keyring import Keyring, Pinned
from render_platform.note import Checkpoint, claimed_checkpoint


def verify(
    evidence: Evidence,
    *,
    deep: bool = False,
    start_us: int = 0,
    end_us: int = END_OF_TIME_US,
    only_range: bool = False,
    progress: Progress = lambda *_: None,
) -> Verification:
    """Check everything that the checkpoint covers. `deep` also re-reads the rows of the batches of [start, end).

    With `only_range` the log is checked as a whole, and of the objects only those that the entries of [start, end)
    bind. Raises Unavailable where a store cannot be read at all; whatever is wrong with the evidence is in the outcome.
    """
    outcome = Verification(deep=deep)
    entries, keyring = _read_log(evidence, outcome, progress)
    outcome.logged = entries
    order = _Order(outcome)
    for logged in entries:
        order.follow(logged.entry)
    asked = range(start_us, end_us)
    if only_range:
        outcome.note("only the objects of the hours asked for were read; the log was checked as a whole")
    blobs = BlobCheck(
        evidence,
        outcome,
        entries,
        asked if deep else range(0),
        progress,
        within=asked if only_range else None,
        attesters=lambda index: keyring.allowed("attestation", index + 1),
    )
    blobs.run()
    _check_acceptances([logged.entry for logged in entries], blobs.gateway_rows, outcome)
    return outcome


def _read_log(evidence: Evidence, outcome: Verification, progress: Progress) -> tuple[list[Logged], Keyring]:
    """The log's entries, and whose keys hold. Rotations stand in the log itself: what it claims is read first, and
    believed once a key has signed it that pinned keys and rotations lead to."""
    pinned = {"checkpoint": evidence.log_keys, "attestation": evidence.attestation_keys}
    found = Verification()
    try:
        data = evidence.log.read("checkpoint")
        checkpoint = claimed_checkpoint(data)
        if checkpoint.size > sum(tiles.TILE_WIDTH for _ in evidence.log.names("tile/")):
            raise Finding(f"says {checkpoint.size} entries, and the log has not the files for so many")
        entries = _LogCheck(evidence, found, checkpoint, progress).entries()
        numbered = ((one.at, one.entry) for one in entries)
        keyring = Keyring.from_entries(numbered, Pinned(pinned, evidence.recovery_key), Cas(evidence.blobs).get)
        outcome.checkpoint = keyring.read_checkpoint(data)
    except (Finding, Missing) as error:
        outcome.add("log/checkpoint", error.message, None, "everything: nothing says which log is the true one")
        return [], Keyring({}, None, ())
    for problem in keyring.problems:
        where = "log/checkpoint" if problem.index is None else f"entry {problem.index}"
        outcome.add(where, problem.what, None, "what the keys signed that it speaks of")
    outcome.problems, outcome.entries = outcome.problems + found.problems, found.entries
    if evidence.recovery_key is None and keyring.recovery is not None:
        outcome.note("the recovery key is not pinned: the first rotation named it")
    return entries, keyring


class _LogCheck:
    """Tiles and bundles against the checkpoint: gives the entries, without those whose bundle cannot be read."""

    def __init__(self, evidence: Evidence, outcome: Verification, checkpoint: Checkpoint, progress: Progress) -> None:
        self._log = evidence.log
        self._outcome = outcome
        self._checkpoint = checkpoint
        self._history = sorted(evidence.history, key=lambda earlier: earlier.size)
        self._size = checkpoint.size
        self._progress = progress
        self._bad: dict[str, str] = {}
        """Bundles of this size that cannot be read, and why."""
        self._hours: list[tuple[int, int]] = []
        """(index, hour) of the entries that name an hour."""

    def entries(self) -> list[Logged]:
        leaves = self._read_bundles()
        hashes = self._trusted(leaves)
        # An entry that the checkpoint does not cover says nothing: its bundle is named below.
        good = [e if e is not None and merkle.leaf_hash(e) == h else None for e, h in zip(leaves, hashes, strict=True)]
        entries = _check_entries(good, self._outcome)
        self._hours = [(one.at, one.entry.recorded_hour) for one in entries if one.entry.recorded_hour is not None]
        self._check_history(hashes)
        self._check_files(good, hashes)
        return entries

    def _read_bundles(self) -> list[bytes | None]:
        """Every leaf, in order; None where its bundle cannot be read."""
        leaves: list[bytes | None] = []
        widths = {tiles.entries_path(index, width): width for index, width in _blocks(self._size)}
        for done, read in enumerate(read_each(self._log, list(widths), lambda _: True)):
            if not done % PROGRESS_EVERY:
                self._progress("log", done, len(widths))
            try:
                leaves += _entries_of(read, widths[read.path])
            except (Finding, Missing) as error:
                self._bad[read.path] = said(error, read.path)
                leaves += [None] * widths[read.path]
        self._progress("log", len(widths), len(widths))
        return leaves

    def _trusted(self, entries: Sequence[bytes | None]) -> list[bytes]:
        """The leaf hashes that give the checkpoint's root: those of the entries, else those of the tiles."""
        by_entry = [merkle.leaf_hash(entry) if entry is not None else b"" for entry in entries]
        if all(by_entry) and merkle.root(by_entry) == self._checkpoint.root:
            return by_entry
        by_tile = [value for index, width in _blocks(self._size) for value in self._tile(index, width)]
        if all(by_tile) and merkle.root(by_tile) == self._checkpoint.root:
            return by_tile
        self._outcome.add(
            "log/checkpoint",
            "neither the entries nor the tiles hash to its root",
            None,
            "every entry: which of them are the signed ones cannot be told",
        )
        return by_entry

    def _tile(self, index: int, width: int) -> list[bytes]:
        try:
            data = tiles.read_tile(self._log.read, tiles.tile_path(0, index, width))
        except (Finding, Missing):
            return [b""] * width
        return [data[start : start + 32] for start in range(0, width * 32, 32)]

    def _check_history(self, hashes: Sequence[bytes]) -> None:
        """The log still holds every tree that was signed before."""
        roots = _roots_at(hashes, {earlier.size for earlier in self._history})
        agreed = 0
        for earlier in self._history:
            if roots.get(earlier.size) == earlier.root:
                agreed = earlier.size
                continue
            self._outcome.add(
                "log/checkpoint",
                f"is not consistent with the one published at size {earlier.size}",
                self._hour_from(agreed),
                f"every entry from {agreed} on: an earlier signature covers other ones",
            )

    def _check_files(self, leaves: Sequence[bytes | None], hashes: Sequence[bytes]) -> None:
        """Every file of the log is one that the leaves give, and every one that has to stand does."""
        standing = {name for name in self._log.names() if name != "checkpoint"}
        paths = self._required()
        for path in sorted(paths.keys() - standing - self._bad.keys()):
            self._add(path, "missing", paths[path])
        read_before = {tiles.entries_path(index, width) for index, width in _blocks(self._size)}
        for path, what in self._bad.items():
            self._add(path, what, paths[path])
        levels = _levels(hashes)
        to_read = {}
        for path in sorted(standing - self._bad.keys()):
            tile = paths.get(path) or tiles.parse_path(path)
            if tile is None:
                self._outcome.add(f"log/{path}", "is not a file of a log", None, "nothing: no entry stands in it")
            elif tiles.needed_size(tile) > self._size:
                self._outcome.note(f"log/{path} is beyond the checkpoint, which does not cover it")
            elif path in read_before:
                start = tile[1] * tiles.TILE_WIDTH
                if None in leaves[start : start + tile[2]]:
                    self._add(path, "does not hold what the checkpoint covers", tile)
            else:
                to_read[path] = tile
        for done, read in enumerate(read_each(self._log, list(to_read), lambda _: True)):
            if not done % PROGRESS_EVERY:
                self._progress("tiles", done, len(to_read))
            self._check_file(read, to_read[read.path], leaves, levels)
        self._progress("tiles", len(to_read), len(to_read))

    def _required(self) -> dict[str, tiles.Tile]:
        """The files of every tree that was published, as far as it holds it; no partial tile that it has full."""
        sizes = [0, *sorted({self._size, *(c.size for c in self._history if c.size <= self._size)})]
        made = (tile for old, new in pairwise(sizes) for tile in tiles.new_tiles(old, new))
        return {tiles.path_of(tile): tile for tile in made if not tiles.is_superseded(tile, self._size)}

    def _check_file(
        self, read: Read, tile: tiles.Tile, leaves: Sequence[bytes | None], levels: Sequence[Sequence[bytes]]
    ) -> None:
        level, index, width = tile
        if isinstance(read.error, Missing) and tiles.is_superseded(tile, self._size):
            return  # deleted since it was listed
        own = slice(index * tiles.TILE_WIDTH, index * tiles.TILE_WIDTH + width)
        try:
            if read.error is not None:
                raise read.error
            known = [leaf for leaf in leaves[own] if leaf is not None] if level is None else []
            if level is not None:
                good = read.data == b"".join(levels[level][own])
            elif len(known) == width:
                good = read.data == tiles.encode_bundle(known)
            else:
                good = [merkle.leaf_hash(entry) for entry in tiles.decode_bundle(read.data)] == levels[0][own]
        except (Finding, Missing) as error:
            self._add(read.path, said(error, read.path), tile)
            return
        if not good:
            self._add(read.path, "does not hold what the checkpoint covers", tile)

    def _add(self, path: str, what: str, tile: tiles.Tile) -> None:
        level, index, width = tile
        span = tiles.TILE_WIDTH ** (level or 0)
        first, last = index * tiles.TILE_WIDTH * span, (index * tiles.TILE_WIDTH + width) * span - 1
        whose = f"entries {first} … {last}"
        doubt = f"{whose}, where no other file of the log holds them" if level is None else f"proofs for {whose}"
        self._outcome.add(f"log/{path}", what, self._hour_from(first), doubt)

    def _hour_from(self, index: int) -> int | None:
        """The hour of the entry at `index`, or of the next one that names an hour."""
        at = bisect_right(self._hours, (index, -1))
        return self._hours[at][1] if at < len(self._hours) else None


def _entries_of(read: Read, width: int) -> list[bytes]:
    if read.error is not None:
        raise read.error
    found = tiles.decode_bundle(read.data)
    if len(found) != width:
        raise Finding(f"holds {len(found)} entries instead of {width}")
    return found


def _check_entries(data: Sequence[bytes | None], outcome: Verification) -> list[Logged]:
    """Canonical form, and the chain: each entry names the digest of the one before. Gives those that can be read."""
    entries: list[Logged] = []
    previous: str | None = FIRST_PREVIOUS
    for index, entry_bytes in enumerate(data):
        digest = None if entry_bytes is None else digest_of(entry_bytes)
        if entry_bytes is not None and digest is not None:
            try:
                entry = parse(entry_bytes)
                entries.append(Logged(index, digest, entry))
                if previous is not None and entry.previous != previous:
                    doubt = f"the order of the entries before and after {index}"
                    what = "does not name the digest of the entry before it"
                    outcome.add(f"entry {index}", what, entry.recorded_hour, doubt)
            except Finding as error:
                outcome.add(f"entry {index}", error.message, None, "whatever this entry was to say")
        previous = digest
    outcome.entries = len(data)
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


class _Order:
    """Nothing left out: contiguous batches an hour, time that never goes back in a lane, watermarks that add up."""

    def __init__(self, outcome: Verification) -> None:
        self._outcome = outcome
        self._named: set[tuple[str, str]] = set()
        self._lanes: dict[str, _Lane] = defaultdict(_Lane)
        self._seqs: dict[int, int] = defaultdict(int)
        self._sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])

    def follow(self, entry: AuditEntry) -> None:
        if lacking := [name for name in _NEEDED.get(entry.type, ()) if getattr(entry, name) is None]:
            self._add(entry, f"lacks {', '.join(lacking)}")
        if (entry.type, entry.batch_id) in self._named:
            self._add(entry, f"is the second {entry.type} of that name")
        self._named.add((entry.type, entry.batch_id))
        if entry.type in ("usage_batch", "watermark"):
            self._follow_lane(entry, entry.recorded_hour or 0, self._lanes[entry.lane or ""])

    def _follow_lane(self, entry: AuditEntry, hour: int, lane: _Lane) -> None:
        if (entry.complete_until or 0) < lane.complete_until:
            self._add(entry, "complete_until goes back")
        lane.complete_until = entry.complete_until or 0
        lane.next_hour = hour if lane.next_hour is None else lane.next_hour
        if hour > lane.next_hour:
            self._add(entry, f"the watermark of {iso(lane.next_hour)} is missing before it", lane.next_hour)
            lane.next_hour = hour
        elif hour < lane.next_hour:
            self._add(entry, "its hour was declared complete before it")
        total = self._sums[entry.lane or "", hour]
        if entry.type == "watermark":
            self._check_watermark(entry, hour, total)
            lane.next_hour = hour + HOUR_US
            return
        if entry.batch_seq != self._seqs[hour]:
            self._add(entry, f"batch_seq is {entry.batch_seq}, and {self._seqs[hour]} comes next")
        self._seqs[hour] += 1
        total[0] += entry.records
        total[1] += entry.gpu_time_ns

    def _check_watermark(self, entry: AuditEntry, hour: int, total: list[int]) -> None:
        if (entry.complete_until or 0) < hour + HOUR_US:
            self._add(entry, "declares an hour that is not over")
        if [entry.records, entry.gpu_time_ns] != total:
            self._add(entry, f"declares {entry.records} records, the batches of its hour hold {total[0]}")

    def _add(self, entry: AuditEntry, what: str, since_us: int | None = None) -> None:
        since_us = entry.recorded_hour if since_us is None else since_us
        hours = f"{iso(since_us)} …" if since_us is not None else "its hour"
        doubt = f"that the log holds every batch of {hours} in lane {entry.lane}" if entry.lane else f"{entry.batch_id}"
        self._outcome.add(f"entry of {entry.batch_id}", what, since_us, doubt)


def _check_acceptances(entries: Sequence[AuditEntry], rows: Mapping[str, int], outcome: Verification) -> None:
    """Every accepted job is billed, has failed visibly, or may still wait. `rows`: of gateways' jobs, by batch."""
    followed = Acceptances()
    doubt = "that every accepted job is billed, or has failed visibly"
    for entry in entries:
        for what in followed.follow(entry, rows.get(str(entry.subject_digest))):
            outcome.add(f"entry of {entry.batch_id}", what, entry.recorded_hour, doubt)
    for gateway, epoch in followed.begun_late.items():
        outcome.note(f"{gateway}: accepted jobs are counted from its epoch {epoch} on; this log is older than that")
    waiting = 0
    for gateway, epoch, known, since_us in followed.undecided():
        waiting += known.open
        if followed.now_us - since_us > MAX_OPEN_US:
            outcome.add(
                f"{gateway} epoch {epoch}",
                f"job {known.oldest} was accepted, and is neither billed nor failed by {iso(followed.now_us)}",
                since_us,
                f"acceptances {known.oldest} … {known.through} of that epoch: {known.open} of them have no event",
            )
    if waiting:
        outcome.note(f"{waiting} accepted jobs have not ended by {iso(followed.now_us)}")


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, tiles.TILE_WIDTH):
        yield start // tiles.TILE_WIDTH, min(tiles.TILE_WIDTH, size - start)


def _levels(hashes: Sequence[bytes]) -> list[Sequence[bytes]]:
    """The hashes that the tiles of each level hold: the leaves', then the roots of every 256 of the level below."""
    levels = [hashes]
    while len(levels[-1]) >= tiles.TILE_WIDTH:
        below = levels[-1]
        full = range(0, len(below) - len(below) % tiles.TILE_WIDTH, tiles.TILE_WIDTH)
        levels.append([merkle.root(below[start : start + tiles.TILE_WIDTH]) for start in full])
    return levels


def _roots_at(hashes: Sequence[bytes], sizes: Collection[int]) -> dict[int, bytes]:
    """The tree's root at each of `sizes` that it has reached, in one pass."""
    found = {0: merkle.EMPTY_ROOT}
    peaks: list[bytes] = []
    for index, value in enumerate(hashes):
        merges = index
        while merges & 1:
            value, merges = merkle.node_hash(peaks.pop(), value), merges >> 1
        peaks.append(value)
        if index + 1 in sizes:
            found[index + 1] = merkle.Peaks(index + 1, tuple(peaks)).root()
    return found
