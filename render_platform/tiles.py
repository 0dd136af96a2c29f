"""The files of a log by C2SP tlog-tiles: their names, and which a tree of some size has.

A tile is (level, index, width): `width` hashes of level 8 * level of the tree, 256 in a full one; level None
is the bundle of the entries under the tile of level 0. Tiles never change: a tree that grows adds files. A partial
tile may go once the full one stands, which begins with it: `prune_partials` deletes it, and `read_tile` does without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from render_platform import merkle
from render_platform.clock import DAY_US, Clock
from render_platform.errors import Finding, Missing, UsageError
from render_platform.objects import ObjectStore

TILE_WIDTH = 256
MAX_LEVEL = 63
MAX_INDEX = (1 << 63) - 1
MAX_ENTRY_BYTES = 65_535
PARTIALS_KEPT_US = DAY_US
"""So long partial tiles stay beside the full one, for whoever is at work under a checkpoint from before it."""
_LISTED = 3
_PATH = re.compile(r"tile/(entries|[0-9]{1,2})/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")

Tile = tuple[int | None, int, int]


def tile_path(level: int, index: int, width: int = TILE_WIDTH) -> str:
    """The name of a hash tile, such as `tile/0/x001/x234/067.p/8`; no leading slash."""
    if not 0 <= level <= MAX_LEVEL:
        raise UsageError(f"there is no tile level {level}", f"levels are 0 to {MAX_LEVEL}")
    return f"tile/{level}/{_name(index, width)}"


def entries_path(index: int, width: int = TILE_WIDTH) -> str:
    """The name of an entry bundle, such as `tile/entries/000.p/3`; no leading slash."""
    return f"tile/entries/{_name(index, width)}"


def path_of(tile: Tile) -> str:
    level, index, width = tile
    return entries_path(index, width) if level is None else tile_path(level, index, width)


def parse_path(path: str) -> Tile | None:
    """The tile that `path` names; None for anything that tile_path and entries_path would not give."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    index, width = int(re.sub("[x/]", "", match[2])), int(match[3] or TILE_WIDTH)
    level = None if match[1] == "entries" else int(match[1])
    if width > TILE_WIDTH or index > MAX_INDEX or (level or 0) > MAX_LEVEL:
        return None
    tile = level, index, width
    return tile if path_of(tile) == path else None


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """The entries, each behind its length as a big-endian uint16; Finding where one is too long."""
    for entry in entries:
        if len(entry) > MAX_ENTRY_BYTES:
            raise Finding(f"an entry of {len(entry)} bytes does not fit a bundle: at most {MAX_ENTRY_BYTES}")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def decode_bundle(data: bytes) -> list[bytes]:
    """The inverse of `encode_bundle`; Finding where the data ends inside a length or an entry."""
    entries, at = [], 0
    while at < len(data):
        start = at + 2
        at = start + int.from_bytes(data[at:start], "big")
        if at > len(data):
            raise Finding("an entry bundle ends inside an entry")
        entries.append(data[start:at])
    return entries


def tiles_of(size: int) -> list[Tile]:
    """Every file of a tree of `size`: full tiles, and on each level one partial for the hashes left over."""
    return new_tiles(0, size)


def new_tiles(old_size: int, new_size: int) -> list[Tile]:
    """The tiles of `new_size` that `old_size` lacks, the lowest level first, at a cost of what is new."""
    found: list[Tile] = []
    for level, old, new in _levels(old_size, new_size):
        for tile in _added(old, new):
            if level == 0:
                found.append((None, *tile))
            found.append((level, *tile))
    return found


def tile_hashes(level: int, index: int, width: int, leaves: Callable[[int, int], Sequence[bytes]]) -> bytes:
    """The bytes of a hash tile; `leaves(start, end)` gives the leaf hashes of [start, end).

    Finding where it gives another number of them than was asked for.
    """
    span = TILE_WIDTH**level
    first = index * TILE_WIDTH
    if level == 0:
        return b"".join(_all(first, first + width, leaves))
    return b"".join(merkle.root(_all(at * span, (at + 1) * span, leaves)) for at in range(first, first + width))


def needed_size(tile: Tile) -> int:
    """The size of the smallest tree that has this tile."""
    level, index, width = tile
    return int((index * TILE_WIDTH + width) * TILE_WIDTH ** (level or 0))


def is_superseded(tile: Tile, size: int) -> bool:
    """Whether it is a partial tile, and a tree of `size` has the full one: then nobody needs it."""
    level, index, width = tile
    return width < TILE_WIDTH and needed_size((level, index, TILE_WIDTH)) <= size


def read_tile(read: Callable[[str], bytes], path: str) -> bytes:
    """What `read` gives for the path of a tile; for a partial one that is gone, what the full one begins with.

    Missing, of `path`, where neither stands; Finding where the full one is not whole.
    """
    try:
        return read(path)
    except Missing as error:
        gone = error
    level, index, width = parse_path(path) or (None, 0, TILE_WIDTH)
    if width < TILE_WIDTH:
        with suppress(Missing):
            return _beginning(read(path_of((level, index, TILE_WIDTH))), level, width)
    raise gone


@dataclass(slots=True)
class Pruned:
    """What `prune_partials` did: files and bytes deleted, and files that the store did not let go of."""

    deleted: int = 0
    bytes: int = 0
    spared: int = 0


def prune_partials(objects: ObjectStore, size: int, clock: Clock) -> Pruned:
    """Delete the partial tiles that full ones have superseded in the log whose published checkpoint has `size`.

    A partial one goes only where its full one belongs to that tree, was written PARTIALS_KEPT_US ago by `clock` (the
    machine's), reads back whole, and begins with the partial one's very bytes. Else it stays: it may be all that is
    left of the truth. Once all others have been looked at, a Finding names it. Harmless to repeat, and for several at
    once. Lists all tiles: two names for 256 entries, and what is published in a day; reads what it deletes, and as many
    full ones. One full and one partial tile are in memory.
    """
    before_us = clock.now_us() - PARTIALS_KEPT_US
    done, wrong = Pruned(), list[str]()
    found = (parse_path(path) for path in objects.names("tile/"))
    superseded = (tile for tile in found if tile is not None and is_superseded(tile, size))
    for (level, index), partials in groupby(superseded, lambda tile: tile[:2]):  # names are sorted
        wrong += _prune_tile(objects, (level, index, TILE_WIDTH), partials, before_us, done)
    if wrong:
        raise Finding(
            f"{', '.join(f'log/{path}' for path in wrong[:_LISTED])}: the full tile is missing, or does not begin with "
            f"what stands here; {len(wrong)} such partial tiles were kept",
            "run `render-platform verify`; restore what is wrong from a copy",
        )
    return done


def _prune_tile(
    objects: ObjectStore, full: Tile, partials: Iterable[Tile], before_us: int, done: Pruned
) -> Iterator[str]:
    """Delete the partial tiles of one full one; gives the paths of those that it does not begin with."""
    try:
        if objects.stat(path_of(full)).modified_us > before_us:
            return
        data = objects.read(path_of(full))
    except Missing:
        data = b""
    for tile in partials:
        path = path_of(tile)
        try:
            seen = objects.stat(path)  # before it is read: what is written after this is not deleted
            if objects.read(path) != _beginning(data, tile[0], tile[2]):
                yield path
                continue
        except Missing:
            continue  # another call has deleted it
        except Finding:
            yield path
            continue
        # A crash after this: one partial tile less, which nobody needs. The repeat goes on with the others.
        if objects.delete(path, seen):
            done.deleted, done.bytes = done.deleted + 1, done.bytes + seen.size
        else:
            done.spared += 1


def _beginning(full: bytes, level: int | None, width: int) -> bytes:
    """The partial tile of `width` that a full one holds; Finding where `full` is not a full one."""
    if level is None:
        entries = decode_bundle(full)
        whole, data = len(entries) == TILE_WIDTH, encode_bundle(entries[:width])
    else:
        whole, data = len(full) == TILE_WIDTH * merkle.HASH_BYTES, full[: width * merkle.HASH_BYTES]
    if not whole:
        raise Finding("a full tile does not hold 256 hashes or entries", "run `render-platform verify`")
    return data


def _all(start: int, end: int, leaves: Callable[[int, int], Sequence[bytes]]) -> Sequence[bytes]:
    hashes = leaves(start, end)
    if len(hashes) != end - start:
        raise Finding(f"{len(hashes)} leaf hashes in place of those of [{start}, {end})")
    return hashes


def _levels(old_size: int, new_size: int) -> Iterator[tuple[int, int, int]]:
    """(level, hashes before, hashes after) for each level that the new tree has."""
    level = 0
    while new_size > 0:
        yield level, old_size, new_size
        level, old_size, new_size = level + 1, old_size // TILE_WIDTH, new_size // TILE_WIDTH


def _added(old: int, new: int) -> Iterator[tuple[int, int]]:
    """(index, width) of one level's tiles with `new` hashes that it lacks with `old`."""
    yield from ((index, TILE_WIDTH) for index in range(old // TILE_WIDTH, new // TILE_WIDTH))
    if new % TILE_WIDTH and new != old:
        yield new // TILE_WIDTH, new % TILE_WIDTH


def _name(index: int, width: int) -> str:
    if not 0 <= index <= MAX_INDEX or not 1 <= width <= TILE_WIDTH:
        raise UsageError(f"there is no tile {index} of width {width}", f"widths are 1 to {TILE_WIDTH}")
    index, last = divmod(index, 1000)
    name = f"{last:03d}"
    while index:
        index, group = divmod(index, 1000)
        name = f"x{group:03d}/{name}"
    return name if width == TILE_WIDTH else f"{name}.p/{width}"
