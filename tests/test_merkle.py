"""The tree against published vectors, and against RFC 6962's own recursive definition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import merkle
from render_platform.errors import Finding, UsageError
from render_platform.merkle import Peaks

# The test data of certificate-transparency: eight entries, the roots of the first n of them, and proofs.
ENTRIES = [
    bytes.fromhex(entry)
    for entry in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
CONSISTENCY = [
    (1, 1, []),
    (
        1,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        6,
        8,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        [
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]
MANY = [merkle.leaf_hash(str(number).encode()) for number in range(70)]

sizes = st.integers(0, 70)


def oracle(hashes: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, 2.1, word for word, on leaf hashes."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = _split(len(hashes))
    return hashlib.sha256(b"\1" + oracle(hashes[:split]) + oracle(hashes[split:])).digest()


def oracle_path(index: int, hashes: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962, 2.1.1."""
    if len(hashes) == 1:
        return []
    split = _split(len(hashes))
    if index < split:
        return [*oracle_path(index, hashes[:split]), oracle(hashes[split:])]
    return [*oracle_path(index - split, hashes[split:]), oracle(hashes[:split])]


def oracle_consistency(old: int, hashes: Sequence[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF of RFC 6962, 2.1.2."""
    if old == len(hashes):
        return [] if whole else [oracle(hashes)]
    split = _split(len(hashes))
    if old <= split:
        return [*oracle_consistency(old, hashes[:split], whole), oracle(hashes[split:])]
    return [*oracle_consistency(old - split, hashes[split:], False), oracle(hashes[:split])]


def _split(size: int) -> int:
    split = 1
    while split * 2 < size:
        split *= 2
    return split


def damaged(proof: Sequence[bytes]) -> list[list[bytes]]:
    """Every node with a flipped bit, every node missing, doubled or shortened, and a node too many."""
    found = [[*proof, MANY[0]], [MANY[0], *proof]]
    for at, node in enumerate(proof):
        before, after = proof[:at], proof[at + 1 :]
        found += [[*before, bytes([node[0] ^ 1]) + node[1:], *after], [*before, node[:-1] + b"\0", *after]]
        found += [[*before, *after], [*before, node, node, *after], [*before, node[:-1], *after]]
    return [other for other in found if other != list(proof)]


@pytest.mark.parametrize("size", range(9))
def test_published_roots(size: int) -> None:
    assert merkle.root(LEAVES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size", "proof"), INCLUSION)
def test_published_inclusion_proofs(index: int, size: int, proof: list[str]) -> None:
    nodes = [bytes.fromhex(node) for node in proof]
    assert merkle.inclusion_proof(index, LEAVES[:size]) == nodes
    merkle.verify_inclusion(LEAVES[index], index, size, nodes, bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("old", "new", "proof"), CONSISTENCY)
def test_published_consistency_proofs(old: int, new: int, proof: list[str]) -> None:
    nodes = [bytes.fromhex(node) for node in proof]
    assert merkle.consistency_proof(old, LEAVES[:new]) == nodes
    merkle.verify_consistency(old, bytes.fromhex(ROOTS[old]), new, bytes.fromhex(ROOTS[new]), nodes)


def test_every_size_has_the_root_of_the_definition() -> None:
    peaks = Peaks.empty()
    for size in range(71):
        assert merkle.root(MANY[:size]) == oracle(MANY[:size]) == peaks.root()
        assert Peaks.from_bytes(size, peaks.to_bytes()) == peaks
        assert (peaks.size, len(peaks.hashes)) == (size, size.bit_count())
        if size < 70:
            peaks = peaks.append(MANY[size])


@given(st.lists(st.binary(max_size=40), max_size=70))
def test_any_entries_have_the_root_of_the_definition(entries: list[bytes]) -> None:
    hashes = [merkle.leaf_hash(entry) for entry in entries]
    peaks = Peaks.empty()
    for item in hashes:
        peaks = peaks.append(item)
    assert merkle.root(hashes) == oracle(hashes) == peaks.root()


def test_every_inclusion_proof_up_to_seventy() -> None:
    for size in range(1, 71):
        root = oracle(MANY[:size])
        for index in range(size):
            proof = merkle.inclusion_proof(index, MANY[:size])
            assert proof == oracle_path(index, MANY[:size])
            merkle.verify_inclusion(MANY[index], index, size, proof, root)


def test_every_consistency_proof_up_to_seventy() -> None:
    for new in range(71):
        for old in range(new + 1):
            proof = merkle.consistency_proof(old, MANY[:new])
            assert proof == (oracle_consistency(old, MANY[:new]) if old else [])
            merkle.verify_consistency(old, oracle(MANY[:old]), new, oracle(MANY[:new]), proof)


@given(sizes.filter(bool), st.data())
def test_a_damaged_inclusion_proof_is_refused(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    root, proof = oracle(MANY[:size]), oracle_path(index, MANY[:size])
    for other in damaged(proof):
        with pytest.raises(Finding):
            merkle.verify_inclusion(MANY[index], index, size, other, root)
    for leaf, at in [(MANY[index - 1], index), (MANY[index], index ^ 1), (MANY[index], size)]:
        if (leaf, at) != (MANY[index], index) and size > 1:
            with pytest.raises(Finding):
                merkle.verify_inclusion(leaf, at, size, proof, root)


@given(sizes, sizes)
def test_a_damaged_consistency_proof_is_refused(one: int, two: int) -> None:
    old, new = sorted((one, two))
    old_root, new_root = oracle(MANY[:old]), oracle(MANY[:new])
    proof = oracle_consistency(old, MANY[:new]) if old else []
    for other in damaged(proof):
        with pytest.raises(Finding):
            merkle.verify_consistency(old, old_root, new, new_root, other)
    forged = merkle.leaf_hash(b"another")
    with pytest.raises(Finding):
        merkle.verify_consistency(old, forged, new, new_root, proof)
    if old:
        with pytest.raises(Finding):
            merkle.verify_consistency(old, old_root, new, forged, proof)
    if old < new:
        with pytest.raises(Finding, match="cannot extend"):
            merkle.verify_consistency(new, new_root, old, old_root, proof)


@pytest.mark.parametrize("changed", range(5))
def test_a_rewritten_history_has_no_proof(changed: int) -> None:
    rewritten = [*MANY[:changed], merkle.leaf_hash(b"rewritten"), *MANY[changed + 1 : 9]]
    with pytest.raises(Finding, match="forked"):
        merkle.verify_consistency(5, oracle(MANY[:5]), 9, oracle(rewritten), merkle.consistency_proof(5, rewritten))


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3), (4, 3)])
def test_an_index_outside_the_tree(index: int, size: int) -> None:
    with pytest.raises(UsageError):
        merkle.inclusion_proof(index, MANY[:size])
    with pytest.raises(Finding, match="no entry"):
        merkle.verify_inclusion(MANY[0], index, size, [], MANY[0])


@pytest.mark.parametrize("old", [-1, 4])
def test_no_consistency_proof_from_a_size_outside_the_tree(old: int) -> None:
    with pytest.raises(UsageError):
        merkle.consistency_proof(old, MANY[:3])


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(Finding):
        merkle.verify_consistency(-1, MANY[0], 3, MANY[0], [])
    with pytest.raises(Finding):
        Peaks.from_bytes(-1, MANY[0])


def test_an_empty_tree_has_one_root_only() -> None:
    merkle.verify_consistency(0, merkle.EMPTY_ROOT, 0, merkle.EMPTY_ROOT, [])
    with pytest.raises(Finding, match="empty tree"):
        merkle.verify_consistency(0, MANY[0], 0, MANY[0], [])
    with pytest.raises(Finding, match="empty tree"):
        merkle.verify_consistency(0, MANY[0], 3, oracle(MANY[:3]), [])


def test_a_proof_of_another_size_is_refused_although_its_hashes_fit() -> None:
    one, two, three, four = MANY[:4]
    pair = merkle.node_hash(one, two)
    with pytest.raises(Finding, match="nodes are missing"):
        merkle.verify_inclusion(one, 0, 4, [two], pair)
    with pytest.raises(Finding, match="too many nodes"):
        merkle.verify_inclusion(two, 0, 1, [one], pair)
    with pytest.raises(Finding, match="nodes are missing"):
        merkle.verify_consistency(1, one, 4, pair, [two])
    above = MANY[5]
    old = merkle.node_hash(above, merkle.node_hash(pair, three))
    new = merkle.node_hash(above, merkle.node_hash(pair, merkle.node_hash(three, four)))
    with pytest.raises(Finding, match="too many nodes"):
        merkle.verify_consistency(3, old, 4, new, [three, four, pair, above])


def test_bytes_cannot_move_from_one_node_to_the_next() -> None:
    leaf, sibling = MANY[0], MANY[1]
    moved = (leaf + sibling[:1], sibling[1:])
    assert merkle.node_hash(*moved) == oracle(MANY[:2])
    with pytest.raises(Finding, match="32 bytes"):
        merkle.verify_inclusion(moved[0], 0, 2, [moved[1]], oracle(MANY[:2]))


@given(sizes, st.integers(0, 200))
def test_peaks_of_another_length_are_refused(size: int, length: int) -> None:
    if length == 32 * size.bit_count():
        return
    with pytest.raises(Finding, match="peaks"):
        Peaks.from_bytes(size, bytes(length))


def test_peaks_take_hashes_only() -> None:
    with pytest.raises(Finding, match="32 bytes"):
        Peaks.empty().append(b"an entry, not its hash")
