"""More of test_audit_log.py: audit log stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from render_platform.audit_log import CHECKPOINT, AuditLog
from render_platform.database import log_entries
from render_platform.errors import Finding, PlatformError, SequencerStopped
from tests import platforms
from tests.platforms import (
    connect,
    make_platform,
    record_random,
)
from tests.test_audit_log import append, check_log, files_of, open_log


def stops(state: Path, expected: type[PlatformError] = SequencerStopped) -> None:
    """Both writing calls stop with an error that says what to do, and nothing has changed."""
    before = files_of(state / "log"), files_of(state / "blobs"), rows_of(state)
    acts: list[Callable[[AuditLog], object]] = [AuditLog.publish, lambda log: append(log, "later")]
    for act in acts:
        with pytest.raises(expected) as stopped:
            act(open_log(state))
        if expected is SequencerStopped:
            assert stopped.value.remedy
            assert stopped.value.exit_code == 3
    assert (files_of(state / "log"), files_of(state / "blobs"), rows_of(state)) == before


def rows_of(state: Path) -> list[object]:
    with closing(connect(state)) as connection:
        return [
            connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()  # the names stand in this file
            for table in ("log_head", "log_entries", "checkpoints")
        ]


def backup(state: Path) -> None:
    platforms.back_up(state, "copy.db")


def restore(state: Path) -> None:
    platforms.restore(state, "copy.db")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Three entries published, then one more, with copies of the database and the checkpoint of size 2 beside them."""
    log = open_log(tmp_path)
    append(log, "a", "b")
    log.publish()
    backup(tmp_path)
    shutil.copy(tmp_path / "log" / CHECKPOINT, tmp_path / "old checkpoint")
    append(log, "c")
    log.publish()
    append(log, "d")
    log._database.close()
    return tmp_path


def test_a_restored_older_database_stops_the_log(state: Path) -> None:
    restore(state)
    stops(state)


def test_a_restored_database_that_has_grown_again_stops_the_log(state: Path) -> None:
    """Someone hid the checkpoint, and let the restored database grow to another tree of the same size and more."""
    newest = (state / "log" / CHECKPOINT).read_bytes()
    restore(state)
    shutil.copy(state / "old checkpoint", state / "log" / CHECKPOINT)
    append(open_log(state), "other c", "other d")
    (state / "log" / CHECKPOINT).write_bytes(newest)
    stops(state)


def test_a_restored_older_checkpoint_stops_the_log(state: Path) -> None:
    shutil.copy(state / "old checkpoint", state / "log" / CHECKPOINT)
    stops(state)


def test_a_lost_checkpoint_stops_the_log(state: Path) -> None:
    (state / "log" / CHECKPOINT).unlink()
    stops(state)


def test_another_platforms_checkpoint_stops_the_log(state: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    foreign = open_log(other)
    append(foreign, "a", "b", "c")
    foreign.publish()
    shutil.copy(other / "log" / CHECKPOINT, state / "log" / CHECKPOINT)
    stops(state, Finding)


def test_the_same_keys_checkpoint_of_another_tree_stops_the_log(
    state: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(state / "keys", other / "keys")
    foreign = open_log(other)
    append(foreign, "a", "x", "c")
    foreign.publish()
    shutil.copy(other / "log" / CHECKPOINT, state / "log" / CHECKPOINT)
    stops(state)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data.replace(b"\n3\n", b"\n2\n"), lambda _: b""]
)
def test_an_altered_checkpoint_stops_the_log(state: Path, damage: Callable[[bytes], bytes]) -> None:
    path = state / "log" / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    stops(state, PlatformError)


@pytest.mark.parametrize("path", ["tile/0/000.p/4", "tile/entries/000.p/4"])
def test_a_tile_with_other_bytes_stops_publication(state: Path, path: str) -> None:
    (state / "log" / path).write_bytes(b"other bytes")
    before = files_of(state / "log")
    with pytest.raises(SequencerStopped, match=path):
        open_log(state).publish()
    assert files_of(state / "log")[CHECKPOINT] == before[CHECKPOINT]
    assert files_of(state / "log")[path] == before[path]


def test_a_tile_that_stands_already_with_its_own_bytes_is_left(state: Path) -> None:
    """A crash between the tiles and the checkpoint."""
    log = open_log(state)
    log._write_tiles(3, 4)
    before = files_of(state / "log")
    log.publish()
    after = files_of(state / "log")
    assert before.items() - after.items() == {(CHECKPOINT, before[CHECKPOINT])}
    check_log(state, 4)


def test_a_new_database_beside_an_old_log_stops_it(state: Path) -> None:
    """The database and the checkpoint are both lost: the tiles still say that this is another log."""
    (state / "log" / CHECKPOINT).unlink()
    platforms.lose_database(state)
    log = open_log(state)
    append(log, "x", "y", "z")
    with pytest.raises(SequencerStopped, match="tile"):
        log.publish()
    assert not (state / "log" / CHECKPOINT).exists()


def test_a_database_that_lacks_entries_stops_publication(state: Path) -> None:
    with closing(connect(state)) as connection:
        connection.execute("DELETE FROM log_entries WHERE log_index = 3")
        connection.commit()
    with pytest.raises(SequencerStopped, match="lacks entries"):
        open_log(state).publish()
    check_log(state, 3)


def test_batches_are_logged_in_the_order_of_sealing_and_marked_in_the_same_commit(tmp_path: Path) -> None:
    platform = make_platform(tmp_path, batch_rows=3)
    record_random(platform, 7, 1)
    platform.seal()
    assert platform.log_batches().logged == 0, "nothing is stored yet"
    platform.store()
    state = platform.log_batches()
    assert (state.logged, state.checkpoint and state.checkpoint.size) == (3, 3)
    with platform.database.read() as connection:
        found = connection.execute(sa.select(log_entries.c.batch_id).order_by(log_entries.c.log_index)).scalars().all()
    assert found == [f"2023-11-16T18-0000{n}" for n in range(3)]
    assert platform.log_batches().logged == 0
    platform.close()
