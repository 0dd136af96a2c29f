"""backup.py FOLDER: copies the state folder while everything runs. What and why in this order: docs/backup.md.

The database first, then the checkpoint, tiles, and objects last: a copy's log never lacks what its checkpoint covers,
nor its objects what its log names, and its database is never ahead of its log. Names are replaced at the end of a
copy: an earlier backup in FOLDER stays whole until the new one is. Keys are not copied: they belong elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

from pysqlite3 import dbapi2 as sqlite

USAGE = "usage: RENDER_PLATFORM_STATE_DIR=STATE backup.py FOLDER"


def copy_file(source: Path, target: Path) -> None:
    """Durable, and whole or not there."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, made)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.replace(target)


def is_superseded(tile: Path) -> bool:
    """A partial tile, 067.p/8, whose full one, 067, stands beside it: readers do without."""
    return tile.parent.suffix == ".p" and tile.parent.with_suffix("").exists()


def copy_new(source: Path, target: Path) -> int:
    """The files below `source` that `target` lacks: none ever changes. One that goes meanwhile is left out."""
    count = 0
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        to = target / name
        if path.is_file() and not to.exists() and not name.parts[0].startswith(".") and not is_superseded(to):
            try:
                copy_file(path, to)
            except FileNotFoundError:  # deleted since: a partial tile, an object that nothing names
                continue
            count += 1
    return count


def back_up(state: Path, folder: Path) -> str:
    """Copy into `folder`, which stands, and which nobody else writes to; what was copied, in words."""
    database, log = folder / "platform.db.new", state / "log"
    database.unlink(missing_ok=True)
    with (
        closing(sqlite.connect(f"file:{state / 'platform.db'}?mode=ro", uri=True)) as live,
        closing(sqlite.connect(str(database))) as copy,
    ):
        live.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, which says all
    checkpoint = (log / "checkpoint").read_bytes() if (log / "checkpoint").exists() else None
    tiles = copy_new(log / "tile", folder / "log/tile") if checkpoint is not None else 0
    blobs = copy_new(state / "blobs", folder / "blobs") if (state / "blobs").exists() else 0
    os.sync()  # the names, too
    if checkpoint is not None:  # all that it covers is here: now it may say so
        held = folder / "checkpoint.new"
        held.write_bytes(checkpoint)
        copy_file(held, folder / "log/checkpoint")
        held.unlink()
    database.chmod(0o600)
    database.replace(folder / "platform.db")
    for tile in [path for path in (folder / "log/tile").rglob("*.p/*") if is_superseded(path)]:
        tile.unlink()
    return f"platform.db, {tiles} new tiles, {blobs} new objects, in {folder}"


if __name__ == "__main__":
    state_dir = os.environ.get("RENDER_PLATFORM_STATE_DIR", "")
    if len(sys.argv) != 2 or not state_dir or not (Path(state_dir) / "platform.db").exists():
        sys.exit(f"{USAGE}; the state folder must hold a platform.db")
    os.umask(0o077)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    only = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another backup into {target} runs: let it finish")
    print(back_up(Path(state_dir), target))  # noqa: T201
