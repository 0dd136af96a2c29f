"""The Merkle tree of RFC 6962 and RFC 9162, section 2.1, with SHA-256: roots, proofs, and their verification.

Everything here takes and gives 32-byte hashes; `leaf_hash` makes the one of an entry. Verifiers return
nothing or raise Finding; a proof that was asked for and cannot exist raises UsageError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from render_platform.errors import Finding, UsageError

HASH_BYTES = 32
LEAF = "\0"
"""What is hashed before an entry."""
EMPTY_ROOT: bytes = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """The hash of an entry: SHA-256(0x00 || data)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes (RFC 9162, 2.1.1); EMPTY_ROOT where there are none."""
    level = list(hashes)
    while len(level) > 1:
        level = _parents(level)
    return level[0] if level else EMPTY_ROOT


@dataclass(frozen=True)
class Peaks:
    """The compact range of [0, size): the roots of its perfect subtrees, the largest first.

    It is all that a log must remember to append: popcount(size) hashes.
    """

    size: int
    hashes: tuple[bytes, ...]

    @classmethod
    def empty(cls) -> Peaks:
        return cls(0, ())

    def append(self, leaf_hash: bytes) -> Peaks:
        """The peaks after one more leaf hash; `self` is unchanged."""
        _check_hashes([leaf_hash])
        hashes, merges = list(self.hashes), self.size
        while merges & 1:
            leaf_hash, merges = node_hash(hashes.pop(), leaf_hash), merges >> 1
        return Peaks(self.size + 1, (*hashes, leaf_hash))

    def root(self) -> bytes:
        """The root of the tree; EMPTY_ROOT where it is empty."""
        if not self.hashes:
            return EMPTY_ROOT
        found = self.hashes[-1]
        for peak in reversed(self.hashes[:-1]):
            found = node_hash(peak, found)
        return found

    def to_bytes(self) -> bytes:
        return b"".join(self.hashes)

    @classmethod
    def from_bytes(cls, size: int, data: bytes) -> Peaks:
        """The inverse of `to_bytes`; Finding where the length does not fit `size`."""
        if size < 0 or len(data) != HASH_BYTES * size.bit_count():
            raise Finding(f"{len(data)} bytes are not the peaks of a tree of {size}")
        return cls(size, tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)))


def inclusion_proof(index: int, hashes: Sequence[bytes]) -> list[bytes]:
    """The path from leaf `index` to the root over `hashes`, the leaf's sibling first (RFC 9162, 2.1.3.1)."""
    if not 0 <= index < len(hashes):
        raise UsageError(f"no entry {index} in a tree of {len(hashes)}", "ask for an index below its size")
    proof, level = [], list(hashes)
    while len(level) > 1:
        if index ^ 1 < len(level):
            proof.append(level[index ^ 1])
        level, index = _parents(level), index >> 1
    return proof


def proof_ranges(index: int, size: int) -> list[tuple[int, int]]:
    """What the nodes of an inclusion proof stand for: the leaves [start, end) of each, in the proof's order.

    For those who hold a tree's upper hashes and not all of its leaves. Each range begins at a multiple of the largest
    power of two that fits into it.
    """
    if not 0 <= index < size:
        raise UsageError(f"no entry {index} in a tree of {size}", "ask for an index below its size")
    ranges, start, end = [], 0, size
    while end - start > 1:
        split = start + (1 << (end - start - 1).bit_length() - 1)
        if index < split:
            ranges.append((split, end))
            end = split
        else:
            ranges.append((start, split))
            start = split
    return ranges[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Finding unless `proof` shows that leaf hash `leaf` is at `index` under `root` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        raise Finding(f"inclusion proof: no entry {index} in a tree of {size}")
    _check_hashes([leaf, root, *proof])
    found, first, last = leaf, index, size - 1
    for node in proof:
        if last == 0:
            raise Finding("inclusion proof: too many nodes")
        on_the_left = _is_left(first, last)
        found = node_hash(node, found) if on_the_left else node_hash(found, node)
        first, last = _climb(first, last)
    if last != 0:
        raise Finding("inclusion proof: nodes are missing")
    if found != root:
        raise Finding(f"inclusion proof: entry {index} is not under the root of size {size}")


def consistency_proof(old_size: int, hashes: Sequence[bytes]) -> list[bytes]:
    """The proof that the tree over `hashes` extends that of its first `old_size` (RFC 9162, 2.1.4.1)."""
    if not 0 <= old_size <= len(hashes):
        raise UsageError(f"a tree of {len(hashes)} has no part of {old_size}", "ask for an older size")
    return _subproof(old_size, hashes, True) if old_size else []


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Finding unless `proof` shows that the new tree extends the old one (RFC 9162, 2.1.4.2).

    The empty tree needs no proof, but its root must be EMPTY_ROOT.
    """
    if not 0 <= old_size <= new_size:
        raise Finding(f"consistency proof: a tree of {new_size} cannot extend one of {old_size}")
    _check_hashes([old_root, new_root, *proof])
    if (old_size == 0 and old_root != EMPTY_ROOT) or (new_size == 0 and new_root != EMPTY_ROOT):
        raise Finding("consistency proof: an empty tree has another root")
    if old_size == new_size and old_root != new_root:
        raise Finding(f"two roots of size {old_size}: the log has forked")
    if old_size not in (0, new_size):
        _verify_extension(old_size, old_root, new_size, new_root, proof)
    elif proof:
        raise Finding("consistency proof: too many nodes")


def _verify_extension(old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    # A perfect old tree is a node of the new one, and its root is then left out of the proof.
    nodes = [old_root, *proof] if proof and old_size.bit_count() == 1 else list(proof)
    if not nodes:
        raise Finding("consistency proof: nodes are missing")
    first, last = old_size - 1, new_size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise Finding("consistency proof: too many nodes")
        if _is_left(first, last):
            old, new = node_hash(node, old), node_hash(node, new)
        else:
            new = node_hash(new, node)
        first, last = _climb(first, last)
    if last != 0:
        raise Finding("consistency proof: nodes are missing")
    if old != old_root or new != new_root:
        raise Finding(f"the tree of {new_size} does not extend the one of {old_size}: the log has forked")


def _parents(level: list[bytes]) -> list[bytes]:
    """The level above; a last node without a sibling moves up as it is."""
    sha256 = hashlib.sha256  # node_hash, without its call
    pairs = zip(level[::2], level[1::2], strict=False)
    return [sha256(b"\x01" + left + right).digest() for left, right in pairs] + level[len(level) & ~1 :]


def _subproof(old_size: int, hashes: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162; `whole` while the part proven is the old tree itself. Depth: log2 of the size."""
    if old_size == len(hashes):
        return [] if whole else [root(hashes)]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    if old_size <= split:
        return [*_subproof(old_size, hashes[:split], whole), root(hashes[split:])]
    return [*_subproof(old_size - split, hashes[split:], False), root(hashes[:split])]


def _is_left(first: int, last: int) -> bool:
    """Whether the next node of a proof stands left of the path."""
    return bool(first & 1) or first == last


def _climb(first: int, last: int) -> tuple[int, int]:
    """One step up, and past the levels at which the right edge has no sibling."""
    if first == last:
        while first and not first & 1:
            first, last = first >> 1, last >> 1
    return first >> 1, last >> 1


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(item) != HASH_BYTES for item in hashes):
        raise Finding(f"a hash is not {HASH_BYTES} bytes long")
