"""The auditor's bundle: one archive that proves what was billed in a range of hours. See docs/spec/bundle.md.

- It holds a contiguous part ("cut") of the log, the hashes that put it under the signed checkpoint, every object that
  the entries of those hours bind, and a signed manifest. It is read with pinned keys; the keys inside are names.
- The archive is a plain tar whose every byte is given by its members: a reader writes each header again and compares.
- The verdict is `verified` (exit 0), `not_verified` (something is wrong: 1) or `indeterminate` (nothing is wrong, but
  the hours are not provably complete: 3, as for all that is unknown). docs/audits.md has the argument.
"""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from render_platform import canonical, merkle, tiles
from render_platform.canonical import digest_of
from render_platform.cas import Cas, path_of
from render_platform.clock import HOUR_US, hours_between, iso
from render_platform.entries import END_OF_TIME_US, FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing, Unavailable, UsageError
from render_platform.evidence import BlobCheck, Evidence, Logged, Progress, Verification
from render_platform.note import Checkpoint, Signer, Verifier, open_note, read_checkpoint, sign_note
from render_platform.objects import ObjectStore, sync_folder
from render_platform.outbox import LIVE

README, KEYS, CHECKPOINT, PROOF = "README.txt", "keys.txt", "checkpoint", "proof"
MANIFEST, SIGNATURE = "manifest.json", "manifest.note"
CONTEXT, VERSION, _BLOCK, TILE_WIDTH = "render-platform.dev/bundle/v1", 1, 512, tiles.TILE_WIDTH
MAX_MEMBERS, MAX_MEMBER_BYTES, MAX_HOURS = 200_000, 1 << 28, 10 * 366 * 24
_CLAIMS = ("version", "start_us", "end_us", "first_entry", "end_entry", "doubts")
_README = b"""Evidence of GPU usage in a range of hours: a part of an audit log (checkpoint, proof, tile/), and what its
entries of these hours bind (sha256/: batches as Parquet, attestations, reports, repairs). manifest.json lists all.
Verify it offline, with keys that you were given beforehand; those in keys.txt prove nothing:

    render-platform verify-bundle FILE --key VKEY
"""
Log = Callable[[str], bytes]


@dataclass
class BundleVerification(Verification):
    """The outcome. `claims` is the manifest but for its members: hours, cut, the maker's doubts. `doubts` are this
    check's: why the hours are not provably complete. `lanes` have a batch or a watermark in the hours."""

    claims: dict[str, Any] = field(default_factory=dict)
    lanes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.checkpoint is None or self.problems:
            return "not_verified"
        return "indeterminate" if self.doubts else "verified"

    @property
    def verified(self) -> bool:
        return self.verdict == "verified"

    @property
    def exit_code(self) -> int:
        return {"verified": 0, "not_verified": 1, "indeterminate": 3}[self.verdict]

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("verdict", "doubts", "lanes", "claims")} | super().as_json()

    @contextmanager
    def naming(self, where: str) -> Iterator[None]:
        """What is found inside is a problem of `where`, and the caller goes on."""
        try:
            yield
        except (Finding, Missing) as error:
            self.add(where, error.message.removeprefix(f"{where}: "))


class Archive:
    """The members of an open bundle: (offset, bytes, SHA-256) by name. Finding where a byte is not as they give it.
    `read` is that of an ObjectStore: names in the archive are those of the log and of the CAS."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.members: dict[str, tuple[int, int, str]] = {}
        while (block := file.read(_BLOCK)) != bytes(_BLOCK):
            name, digits = block[:100].rstrip(b"\0").decode("ascii", "replace"), block[124:135]
            size = MAX_MEMBER_BYTES + 1 if digits.strip(b"01234567") else int(digits or b"0", 8)
            if size > MAX_MEMBER_BYTES or _header(name, size) != block:
                raise Finding("what stands in place of a member's header is not one, or the member is too large")
            offset, data, filling = file.tell(), file.read(size), file.read(-size % _BLOCK)
            if len(data) != size or filling != bytes(-size % _BLOCK):
                raise Finding(f"the archive ends inside {name}, or its last block is not filled with zeros")
            if name in self.members or len(self.members) == MAX_MEMBERS:
                raise Finding(f"{name} stands twice, or is one of more than {MAX_MEMBERS}")
            self.members[name] = offset, size, digest_of(data)
        if file.read(_BLOCK + 1) != bytes(_BLOCK):
            raise Finding("bytes are missing at its end, or follow it")

    def read(self, path: str) -> bytes:
        if path not in self.members:
            raise Missing(path)
        offset, size, digest = self.members[path]
        data = os.pread(self._file.fileno(), size, offset)
        if digest_of(data) != digest:
            raise Finding(f"{path}: changed while it was read")
        return data


def _header(name: str, size: int) -> bytes:
    """The POSIX ustar header of a member: mode 0444, every owner and time zero."""
    zero = b"0000000\0"
    parts = (b"0000444\0", zero, zero, b"%011o\0" % size, b"%011o\0" % 0, b" " * 8, b"0", bytes(100), b"ustar\x0000")
    plain = b"".join((name.encode().ljust(100, b"\0"), *parts, bytes(64), zero, zero, bytes(167)))
    return plain[:148] + b"%06o\0 " % sum(plain) + plain[156:]


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + bytes(-len(data) % _BLOCK)


def tree_hash(start: int, end: int, cut: range, known: Callable[[int, int], bytes]) -> bytes:
    """The root over the leaves [start, end), by RFC 6962. `known(start, end)` gives, from left to right, the hash of
    each leaf in the cut, and of each largest subtree outside it."""
    if end <= cut.start or start >= cut.stop or end - start == 1:
        return known(start, end)
    split = start + (1 << (end - start - 1).bit_length() - 1)
    return merkle.node_hash(tree_hash(start, split, cut, known), tree_hash(split, end, cut, known))


def _subtree(log: Log, size: int, start: int, end: int) -> bytes:
    """The root over the leaves [start, end) that `tree_hash` asked for, from the tiles of a log of `size`."""
    height = (end - start - 1).bit_length()
    if end - start != 1 << height:
        split = start + (1 << height - 1)
        return merkle.node_hash(_subtree(log, size, start, split), _subtree(log, size, split, end))
    level, bits = divmod(height, 8)
    index, at = divmod(start >> 8 * level, TILE_WIDTH)
    data = log(tiles.tile_path(level, index, min(TILE_WIDTH, (size >> 8 * level) - index * TILE_WIDTH)))
    return merkle.root([data[node * 32 : node * 32 + 32] for node in range(at, at + (1 << bits))])


def _bundles(cut: range, size: int) -> list[str]:
    starts = range(cut.start, cut.stop, TILE_WIDTH)
    return [tiles.entries_path(start // TILE_WIDTH, min(TILE_WIDTH, size - start)) for start in starts]


def _entries(log: Log, cut: range, size: int) -> Iterator[bytes]:
    for name in _bundles(cut, size):
        yield from tiles.decode_bundle(log(name))


class _Coverage:
    """What the cut's entries, taken in their order, prove of the hours. Finding where they contradict each other;
    `doubts` where they do not show that nothing was left out. docs/audits.md has the argument, rule by rule."""

    def __init__(self, hours: range, cut: range, size: int) -> None:
        self._hours = hours
        self._from_start, self._whole = cut.start == 0, cut == range(size)
        self._live_begins, self.lanes = END_OF_TIME_US, set[str]()
        self._closed, self._sums = set[tuple[int, str]](), defaultdict[int, dict[str, tuple[int, int]]](dict)
        self._next_seq, self._begun_before = dict[int, int](), set[int]()

    def take(self, entry: AuditEntry) -> None:
        if entry.type not in ("usage_batch", "watermark"):
            return
        lane, hour, until = entry.lane, entry.recorded_hour, entry.complete_until
        if lane is None or hour is None or until is None:
            raise Finding("lacks its lane, its hour or its complete_until")
        self._live_begins = min(self._live_begins, hour) if lane == LIVE else self._live_begins
        if hour not in self._hours:
            return
        if (hour, lane) in self._closed:
            raise Finding("its hour was declared complete before it")
        self.lanes.add(lane)
        sums = self._sums[hour].setdefault(lane, (0, 0))
        if entry.type == "usage_batch":
            self._take_batch(entry, hour)
            self._sums[hour][lane] = sums[0] + entry.records, sums[1] + entry.gpu_time_ns
            return
        if until < hour + HOUR_US:
            raise Finding("declares an hour that is not over")
        if (entry.records, entry.gpu_time_ns) != sums:
            if self._from_start or (hour in self._next_seq and hour not in self._begun_before):
                raise Finding("does not declare the sums of the batches of its hour")
            self._begun_before.add(hour)
        self._closed.add((hour, lane))

    def _take_batch(self, entry: AuditEntry, hour: int) -> None:
        if entry.batch_seq is None or entry.merkle_root is None or len(entry.blobs) != 2:
            raise Finding("lacks its batch_seq, its batch, its Merkle root or its attestation")
        expected = self._next_seq.get(hour, 0 if self._from_start else entry.batch_seq)
        if entry.batch_seq != expected:
            raise Finding(f"batch_seq is {entry.batch_seq}, and {expected} comes next")
        if expected and hour not in self._next_seq:
            self._begun_before.add(hour)
        self._next_seq[hour] = expected + 1

    def doubts(self) -> list[str]:
        found: dict[str, list[int]] = defaultdict(list)
        for hour in hours_between(self._hours.start, self._hours.stop):
            lanes = set(self._sums.get(hour, ()))
            # A part of the log cannot show that `live` had not begun; nor can a lane that says nothing close an hour.
            if not (lanes and self._whole and hour < self._live_begins):
                lanes.add(LIVE)
            for lane in sorted(lane for lane in lanes if (hour, lane) not in self._closed):
                found[f"the lane {lane} has not declared it complete"].append(hour)
            if hour in self._begun_before:
                found["entries of it stand before the first entry of the bundle"].append(hour)
        return [f"{iso(hours[0])} ({len(hours)} h in all): {reason}" for reason, hours in found.items()]


def make_bundle(
    evidence: Evidence,
    signer: Signer,
    hours: range,
    target: Path,
    *,
    whole_log: bool = False,
    progress: Progress = lambda *_: None,
) -> BundleVerification:
    """Write the bundle of `hours` (µs, whole hours) to `target`, signed by the log's `signer`; gives what verifying it
    gave. The same evidence under the same checkpoint gives the same bytes. One member is in memory at a time.
    Finding where the evidence of these hours does not verify; UsageError for a range that cannot be; Unavailable where
    a store or the folder of `target` fails.
    """
    if not _are_hours(hours.start, hours.stop):
        raise UsageError("the range is not whole hours, or more than ten years", "give the begins of two hours")
    log, note = partial(tiles.read_tile, evidence.log.read), evidence.log.read("checkpoint")
    size = read_checkpoint(note, evidence.log_keys).size
    cut = range(size) if whole_log else _find_cut(log, size, hours, progress)
    coverage, blobs, proof = _Coverage(hours, cut, size), dict[str, str](), bytearray()
    for data in _entries(log, cut, size):
        coverage.take(entry := parse(data))
        if (entry.recorded_hour or 0) in hours:
            blobs |= {path_of(digest): digest for digest in (digest_of(data), *entry.blobs)}

    def prove(start: int, end: int) -> bytes:
        proof.extend(b"" if start in cut else _subtree(log, size, start, end))
        return b""

    tree_hash(0, size, cut, prove)
    keys = "".join(f"{key.vkey}\n" for key in (*evidence.log_keys, *evidence.attestation_keys))
    texts = {README: _README, KEYS: keys.encode(), CHECKPOINT: note, PROOF: bytes(proof)}
    names = [*texts, *sorted(blobs), *_bundles(cut, size)]
    if len(names) > MAX_MEMBERS - 2:
        raise UsageError(f"these hours need more than {MAX_MEMBERS} members", "make a bundle of fewer hours")
    claims = dict(zip(_CLAIMS, (VERSION, hours.start, hours.stop, cut.start, cut.stop, coverage.doubts()), strict=True))
    cas, members = Cas(evidence.blobs), list[list[Any]]()
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Its owner's alone: it holds every customer's rows.
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for done, name in enumerate(names):
                progress("members", done, len(names))
                data = texts[name] if name in texts else cas.get(blobs[name]) if name in blobs else log(name)
                members.append([name, len(data), digest_of(data)])
                file.write(_member(name, data))
            manifest = canonical.encode({**claims, "members": members})
            signed = sign_note(f"{CONTEXT}\n{digest_of(manifest)}\n", [signer])
            file.write(_member(MANIFEST, manifest) + _member(SIGNATURE, signed.encode()) + bytes(2 * _BLOCK))
            file.flush()
            os.fsync(file.fileno())
        outcome = verify_bundle(scratch, (*evidence.log_keys, *evidence.attestation_keys), progress=progress)
        for found in outcome.problems:
            raise Finding(f"{found.where}: {found.what}", "run `render-platform verify`: the evidence is not whole")
        # A crash before this: a scratch file that nothing names. After it: the whole bundle under its name.
        scratch.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise Unavailable(f"{target}: {error.strerror}", "name a file in a folder that has space") from error
    finally:
        scratch.unlink(missing_ok=True)
    return outcome


def _find_cut(log: Log, size: int, hours: range, progress: Progress) -> range:
    """The bundles from the first to the last entry of the hours; the last one where no entry is of them. The whole log
    where the lane `live` had not begun with the first hour: a part of the log cannot show that."""
    found, live_begins = list[int](), END_OF_TIME_US
    for index, entry in enumerate(map(parse, _entries(log, range(size), size))):
        progress("entries", index, size)
        found += [index] if (entry.recorded_hour or 0) in hours else []
        live_begins = min(live_begins, entry.recorded_hour or 0) if entry.lane == LIVE else live_begins
    if live_begins > hours.start:
        return range(size)
    found = found or [size - 1]
    return range(found[0] - found[0] % TILE_WIDTH, min(size, found[-1] - found[-1] % TILE_WIDTH + TILE_WIDTH))


def _are_hours(start_us: int, end_us: int) -> bool:
    whole = start_us % HOUR_US == end_us % HOUR_US == 0 <= start_us
    return whole and start_us < end_us < END_OF_TIME_US and end_us - start_us <= MAX_HOURS * HOUR_US


def verify_bundle(
    path: Path, keys: Sequence[Verifier], *, remembered: Sequence[Checkpoint] = (), progress: Progress = lambda *_: None
) -> BundleVerification:
    """Check the bundle at `path`, offline, with the pinned `keys` alone: the log's, and those of the attestations.

    `remembered` are checkpoints of the log that the caller has kept. UsageError where no key is a log's, Unavailable
    where the file cannot be read; whatever is wrong with the bundle is in the outcome. In memory: some members, and
    about 500 bytes a member, 300 an entry of the cut, 2,000 an entry of the hours.
    """
    outcome = BundleVerification(deep=True)
    attesting = [key for key in keys if key.name.endswith("/attestation")]
    if not (signing := [key for key in keys if key not in attesting]):  # a role signs what is its own, nothing else
        raise UsageError("no pinned key is a log's", "give what `render-platform vkey` prints")
    try:
        with path.open("rb") as file, outcome.naming(path.name):
            store = cast(ObjectStore, archive := Archive(file))  # nothing but `read` is called
            _check(archive, Evidence(store, store, signing, attesting, remembered), outcome, progress)
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}", "check the file") from error
    return outcome


def _check(archive: Archive, evidence: Evidence, outcome: BundleVerification, progress: Progress) -> None:
    """From what is trusted to what follows: by a pinned key, by the checkpoint's root, by the entries."""
    with outcome.naming(CHECKPOINT):
        checkpoint = read_checkpoint(archive.read(CHECKPOINT), evidence.log_keys)
    with outcome.naming(MANIFEST):
        outcome.claims, cut = _read_manifest(archive, evidence.log_keys)
    with outcome.naming(PROOF):
        if not outcome.problems:
            if _check_tree(archive, evidence, outcome, cut, checkpoint.size) != checkpoint.root:
                raise Finding("it and the entries do not give the root of the checkpoint")
            outcome.checkpoint = checkpoint
            _check_entries(archive, evidence, outcome, cut, checkpoint.size, progress)


def _read_manifest(archive: Archive, keys: Sequence[Verifier]) -> tuple[dict[str, Any], range]:
    """The claims, and the cut. Finding unless a pinned key has signed them, and all that stands here in its order."""
    data, note = archive.read(MANIFEST), archive.read(SIGNATURE)
    text, _ = open_note(note.decode(errors="replace"), keys)
    # One signature line: another, of an unknown key, would be bytes that nobody has signed.
    if text != f"{CONTEXT}\n{digest_of(data)}\n" or note.count(b"\n") != 4:
        raise Finding(f"{SIGNATURE} does not sign it, and it alone")
    claims = canonical.decode(data)
    listed = claims.pop("members", None)
    standing = [[name, *member[1:]] for name, member in archive.members.items()]
    if listed != standing[:-2] or [name for name, *_ in standing[-2:]] != [MANIFEST, SIGNATURE]:
        known = set(map(str, listed if isinstance(listed, list) else ()))
        other = [str(one[0]) for one in standing[:-2] if str(one) not in known]
        raise Finding(f"does not list what stands in the archive: {', '.join(other[:3]) or 'in this order'}")
    version, *numbers, _ = claims.values() if tuple(claims) == _CLAIMS else [None] * 6
    start, end, first, stop = (number if type(number) is int else -1 for number in numbers)
    if version != VERSION or not _are_hours(start, end):
        raise Finding("is not one that this release knows")
    return claims, range(first, stop)


def _check_tree(archive: Archive, evidence: Evidence, outcome: BundleVerification, cut: range, size: int) -> bytes:
    """The root that the cut's entries, each a leaf at its place, give with the proof."""
    proof = archive.read(PROOF)
    if not 0 <= cut.start < cut.stop <= size or cut.start % TILE_WIDTH:
        raise Finding("there is no such part of the log")
    leaves = [merkle.leaf_hash(data) for data in _entries(archive.read, cut, size)]
    nodes = {(index, index + 1): leaf for index, leaf in enumerate(leaves, cut.start)}

    def prove(start: int, end: int) -> bytes:
        at = 32 * (len(nodes) - len(leaves))
        return nodes.setdefault((start, end), proof[at : at + 32])

    if len(leaves) != len(cut):
        raise Finding("the part of the log holds fewer or more entries than the manifest says")
    root = tree_hash(0, size, cut, prove)
    if len(proof) != 32 * (len(nodes) - len(leaves)):
        raise Finding("holds fewer or more hashes than the proof has")
    for old in evidence.history:
        try:
            if tree_hash(0, old.size, cut, lambda start, end: nodes[start, end]) != old.root:
                outcome.add(CHECKPOINT, f"is not consistent with the one remembered at size {old.size}")
        except KeyError:
            outcome.note(f"consistency with the checkpoint of size {old.size} was not checked: its hashes are not here")
    return root


def _check_entries(
    archive: Archive, evidence: Evidence, outcome: BundleVerification, cut: range, size: int, progress: Progress
) -> None:
    """The chain, what it proves of the hours, and the objects that the entries bind."""
    hours = range(outcome.claims["start_us"], outcome.claims["end_us"])
    coverage, logged, previous = _Coverage(hours, cut, size), list[Logged](), None if cut.start else FIRST_PREVIOUS
    for index, data in zip(cut, _entries(archive.read, cut, size), strict=True):
        with outcome.naming(f"entry {index}"):
            coverage.take(entry := parse(data))
            logged += [Logged(index, digest_of(data), entry)] if (entry.recorded_hour or 0) in hours else []
            if previous not in (None, entry.previous):
                raise Finding("does not name the digest of the entry before it")
        previous = digest_of(data)
    BlobCheck(evidence, outcome, logged, deep=hours, progress=progress, within=hours).run()
    expected = {path_of(digest) for one in logged for digest in (one.digest, *one.entry.blobs)}
    expected |= {README, KEYS, CHECKPOINT, PROOF, MANIFEST, SIGNATURE, *_bundles(cut, size)}
    for name in sorted(archive.members.keys() ^ expected):
        outcome.add(name, "is missing, or is no part of this bundle")
    outcome.entries, outcome.lanes, outcome.doubts = len(cut), sorted(coverage.lanes), coverage.doubts()
