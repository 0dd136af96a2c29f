"""The names and contents of a log's files against the examples and the formula of C2SP tlog-tiles."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import merkle, tiles
from render_platform.clock import DAY_US, ManualClock
from render_platform.errors import Finding, Missing, UsageError
from render_platform.tiles import Pruned, Tile, prune_partials
from tests.stories import MemoryObjects

ENTRIES = [str(number).encode() for number in range(70_000)]
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]

indexes = st.one_of(st.integers(0, 3000), st.integers(0, tiles.MAX_INDEX))
widths = st.integers(1, 256)
sizes = st.one_of(st.integers(0, 2000), st.integers(0, 300_000))


def tile_set(size: int) -> set[tiles.Tile]:
    """Which tiles a tree has, by the specification's formula: floor(s / 256**l) hashes on level l."""
    found: set[tiles.Tile] = set()
    for level in range(8):
        hashes = size // 256**level
        full, width = hashes // 256, hashes % 256
        here = [(index, 256) for index in range(full)] + ([(full, width)] if width else [])
        found.update((level, *tile) for tile in here)
        if level == 0:
            found.update((None, *tile) for tile in here)
    return found


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        ((0, 0, 256), "tile/0/000"),
        ((0, 1234067, 256), "tile/0/x001/x234/067"),
        ((0, 1234067, 8), "tile/0/x001/x234/067.p/8"),
        ((2, 0, 1), "tile/2/000.p/1"),
        ((63, 1000, 255), "tile/63/x001/000.p/255"),
        ((None, 0, 3), "tile/entries/000.p/3"),
        ((None, 999, 256), "tile/entries/999"),
        ((None, 1000, 256), "tile/entries/x001/000"),
    ],
)
def test_names(tile: tiles.Tile, path: str) -> None:
    level, index, width = tile
    made = tiles.entries_path(index, width) if level is None else tiles.tile_path(level, index, width)
    assert made == path
    assert tiles.parse_path(path) == tile


@given(st.one_of(st.none(), st.integers(0, 63)), indexes, widths)
def test_parse_path_is_the_inverse(level: int | None, index: int, width: int) -> None:
    path = tiles.entries_path(index, width) if level is None else tiles.tile_path(level, index, width)
    assert tiles.parse_path(path) == (level, index, width)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "checkpoint",
        "/tile/0/000",
        "tile/0/000/",
        "tile/0/000\n",
        "tile/0/00",
        "tile/0/0000",
        "tile/0/x000/000",
        "tile/0/001/000",
        "tile/0/x001",
        "tile/00/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/8/0/000",
        "tile/data/000",
        "tile/entries/x000/001",
        "tile/0/000.p/0",
        "tile/0/000.p/01",
        "tile/0/000.p/256",
        "tile/0/000.p/999",
        "tile/0/000.p/",
        "tile/0/000.p",
        "tile/0/٠٠٠",
        "tile/0/" + "x999/" * 6 + "999",
        "tile/0/" + "x999/" * 9000 + "999",
        "../tile/0/000",
    ],
)
def test_other_names_are_not_tiles(path: str) -> None:
    assert tiles.parse_path(path) is None


@given(st.from_regex(r"tile/(entries|[0-9]{1,2})/(x[0-9]{3}/){0,7}[0-9]{3}(\.p/[0-9]{1,3})?", fullmatch=True))
def test_what_parses_is_named_so(path: str) -> None:
    tile = tiles.parse_path(path)
    if tile is not None:
        level, index, width = tile
        made = tiles.entries_path(index, width) if level is None else tiles.tile_path(level, index, width)
        assert made == path


@pytest.mark.parametrize(
    ("level", "index", "width"),
    [(-1, 0, 1), (64, 0, 1), (0, -1, 1), (0, 1 << 63, 1), (0, 0, 0), (0, 0, 257)],
)
def test_tiles_that_cannot_be(level: int, index: int, width: int) -> None:
    with pytest.raises(UsageError):
        tiles.tile_path(level, index, width)


def test_the_tree_of_seventy_thousand() -> None:
    found = tiles.tiles_of(70_000)
    assert Counter((level, width) for level, _, width in found) == {
        (0, 256): 273,
        (0, 112): 1,
        (None, 256): 273,
        (None, 112): 1,
        (1, 256): 1,
        (1, 17): 1,
        (2, 1): 1,
    }
    assert set(tiles.tiles_of(256)) == {(0, 0, 256), (None, 0, 256), (1, 0, 1)}
    assert tiles.tiles_of(0) == []


@given(sizes)
def test_tiles_of_follow_the_formula(size: int) -> None:
    found = tiles.tiles_of(size)
    assert len(set(found)) == len(found)
    assert set(found) == tile_set(size)


@given(sizes, sizes)
def test_new_tiles_are_the_difference(one: int, two: int) -> None:
    old, new = sorted((one, two))
    found = tiles.new_tiles(old, new)
    assert len(set(found)) == len(found)
    assert set(found) == tile_set(new) - tile_set(old)


@pytest.mark.parametrize("old", [0, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 131_071, 131_072])
@pytest.mark.parametrize("more", [0, 1, 2, 255, 256, 65_536])
def test_new_tiles_at_the_edges(old: int, more: int) -> None:
    assert set(tiles.new_tiles(old, old + more)) == tile_set(old + more) - tile_set(old)


def test_new_tiles_do_not_cost_what_the_old_ones_would() -> None:
    assert tiles.new_tiles((1 << 60) - 1, 1 << 60)[0] == (None, (1 << 52) - 1, 256)
    assert len(tiles.new_tiles((1 << 60) - 1, 1 << 60)) == 9


def test_the_hashes_of_every_tile() -> None:
    for level, index, width in tiles.tiles_of(70_000):
        if level is None:
            continue
        made = tiles.tile_hashes(level, index, width, lambda start, end: LEAVES[start:end])
        assert len(made) == 32 * width
        span = 256**level
        for at in {0, width - 1}:
            start = (index * 256 + at) * span
            assert made[32 * at : 32 * at + 32] == merkle.root(LEAVES[start : start + span])


def test_a_tile_of_leaves_is_its_leaf_hashes() -> None:
    made = tiles.tile_hashes(0, 2, 3, lambda start, end: LEAVES[start:end])
    assert made == b"".join(LEAVES[512:515])


def test_the_root_follows_from_the_tiles() -> None:
    def hashes(level: int, index: int, width: int) -> list[bytes]:
        made = tiles.tile_hashes(level, index, width, lambda start, end: LEAVES[start:end])
        return [made[at : at + 32] for at in range(0, len(made), 32)]

    # 70,000 = 65,536 + 16 * 256 + 256 + 112
    *sixteen, one = hashes(1, 1, 17)
    right = merkle.node_hash(merkle.root(sixteen), merkle.node_hash(one, merkle.root(hashes(0, 273, 112))))
    left = hashes(2, 0, 1)[0]
    assert merkle.node_hash(left, right) == merkle.root(LEAVES)


def test_too_few_leaves_are_refused() -> None:
    with pytest.raises(Finding, match="in place of"):
        tiles.tile_hashes(0, 0, 3, lambda start, end: LEAVES[start : min(end, 2)])
    with pytest.raises(Finding, match="in place of"):
        tiles.tile_hashes(1, 0, 1, lambda start, end: LEAVES[start : end - 1])


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_bundles_come_back(entries: list[bytes]) -> None:
    assert tiles.decode_bundle(tiles.encode_bundle(entries)) == entries


def test_the_bytes_of_a_bundle() -> None:
    assert tiles.encode_bundle([b"", b"ab"]) == b"\0\0\0\2ab"


def test_the_longest_entry() -> None:
    longest = bytes(65_535)
    assert tiles.decode_bundle(tiles.encode_bundle([longest])) == [longest]
    with pytest.raises(Finding, match="65536"):
        tiles.encode_bundle([b"", bytes(65_536)])


def test_every_truncation_and_trailing_bytes_are_refused() -> None:
    entries = [b"first", b"", b"the third"]
    data = tiles.encode_bundle(entries)
    whole = {len(tiles.encode_bundle(entries[:count])): entries[:count] for count in range(4)}
    for length in range(len(data)):
        if length in whole:
            assert tiles.decode_bundle(data[:length]) == whole[length]
            continue
        with pytest.raises(Finding, match="ends inside"):
            tiles.decode_bundle(data[:length])
    for trailing in (b"\0", b"\1", b"\0\1", b"\xff\xff"):
        with pytest.raises(Finding, match="ends inside"):
            tiles.decode_bundle(data + trailing)


# Partial tiles, and what is read and deleted of them.

NOW = ManualClock(DAY_US)
"""Objects in memory are of 1970, and by this clock a day old."""


def bytes_of(tile: Tile) -> bytes:
    level, index, width = tile
    if level is None:
        return tiles.encode_bundle(ENTRIES[index * 256 : index * 256 + width])
    return tiles.tile_hashes(level, index, width, lambda start, end: LEAVES[start:end])


def log_of(*sizes: int) -> MemoryObjects:
    """The tiles of a log that was published at these sizes."""
    made, before = MemoryObjects(), 0
    for size in sizes:
        for tile in tiles.new_tiles(before, size):
            made.create(tiles.path_of(tile), bytes_of(tile))
        before = size
    return made


def partials_of(level: int | None, index: int, *widths: int) -> set[str]:
    return {tiles.path_of((level, index, width)) for width in widths}


def test_partial_tiles_go_where_the_full_one_is_published() -> None:
    log = log_of(3, 200, 300, 500, 600)
    before = set(log.files)
    assert prune_partials(log, 499, NOW) == Pruned(4, 203 * 32 + len(bytes_of((None, 0, 3)) + bytes_of((None, 0, 200))))
    assert before - set(log.files) == partials_of(0, 0, 3, 200) | partials_of(None, 0, 3, 200)
    assert prune_partials(log, 511, NOW).deleted == 0
    assert prune_partials(log, 512, NOW).deleted == 4
    standing = {path for path in log.files if ".p/" in path}
    assert standing == partials_of(0, 2, 88) | partials_of(None, 2, 88) | partials_of(1, 0, 1, 2)
    assert prune_partials(log, 600, NOW) == Pruned()


def test_those_of_higher_levels_go_too() -> None:
    log = log_of(300, 65_000, 65_535, 65_536, 70_000)
    assert set(log.files) >= partials_of(1, 0, 1, 253, 255) | partials_of(2, 0, 1)
    assert prune_partials(log, 65_535, NOW).deleted == 4
    assert set(log.files) >= partials_of(1, 0, 1, 253, 255)
    assert prune_partials(log, 70_000, NOW).deleted == 2 + 3
    assert set(log.files) == {tiles.path_of(tile) for tile in tiles.tiles_of(70_000)}


@settings(max_examples=60)
@given(
    st.sets(st.integers(1, 1_500) | st.sampled_from([255, 256, 257, 512, 768, 1_024]), min_size=1, max_size=12),
    st.data(),
)
def test_after_any_pruning_every_published_tree_is_there(published: set[int], data: st.DataObject) -> None:
    sizes = sorted(published)
    log, size = log_of(*sizes), data.draw(st.sampled_from(sizes))
    before, full = set(log.files), {tiles.path_of(tile) for tile in tile_set(size) if tile[2] == 256}
    prune_partials(log, size, NOW)
    assert before - set(log.files) == {path for path in before if ".p/" in path and path.split(".p/")[0] in full}
    assert {tiles.path_of(tile) for tile in tiles.tiles_of(size)} <= set(log.files)
    for each in sizes:
        for tile in tiles.tiles_of(each):
            assert tiles.read_tile(log.read, tiles.path_of(tile)) == bytes_of(tile)


def test_other_names_and_what_is_beyond_the_checkpoint_are_left() -> None:
    log = log_of(3, 300)
    others = {
        "checkpoint",
        "tile/0/000.p/999",
        "tile/0/000.p/03",
        "tile/0/000.p/x",
        "tile/data/000.p/3",
        "note/000.p/3",
    }
    log.files.update(dict.fromkeys(others, b"mine"))
    before = set(log.files)
    assert prune_partials(log, 255, NOW).deleted == 0
    assert prune_partials(log, 300, NOW).deleted == 2
    assert set(log.files) == before - partials_of(0, 0, 3) - partials_of(None, 0, 3)


def test_a_day_long_they_stay_beside_the_full_one() -> None:
    """Whoever read the checkpoint before it finds what he needs."""
    log = log_of(3, 300)
    assert prune_partials(log, 300, ManualClock(DAY_US - 1)).deleted == 0
    assert prune_partials(log, 300, ManualClock(DAY_US)).deleted == 2


def test_a_tile_is_read_from_the_full_one_where_the_partial_one_is_gone() -> None:
    log = log_of(300)
    for tile in ((0, 0, 7), (None, 0, 7), (0, 0, 256)):
        assert tiles.read_tile(log.read, tiles.path_of(tile)) == bytes_of(tile)
    for path in ("tile/0/001.p/45", "tile/0/001", "tile/0/000.p/07", "checkpoint"):
        with pytest.raises(Missing, match=f"^{path}: missing"):
            tiles.read_tile(log.read, path)
    for path, cut in (("tile/0/000", 32), ("tile/entries/000", len(ENTRIES[255]) + 2)):
        log.files[path] = log.files[path][:-cut]
        with pytest.raises(Finding, match="full tile"):
            tiles.read_tile(log.read, f"{path}.p/7")
