"""The deterministic simulation (tests/simulation): fixed seeds, random ones, planted bugs, and what it found."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from render_platform.errors import Unavailable
from tests.conftest import SEED
from tests.simulation import disk
from tests.simulation.disk import Disk, DiskFolder
from tests.simulation.plants import PLANTS
from tests.simulation.runs import run_seed
from tests.simulation.world import Violation, World
from tests.test_audit_log import append, open_log

FIXED = range(150)
RANDOM = 100
SEARCHED = 500
"""Within so many seeds each planted bug has to be found."""
FOUND_AT = {"lost_delivery_mark": 25, "stolen_head": 90}
"""Where the search may begin, so that it is short: it goes on from there through all the others."""


def test_fixed_seeds() -> None:
    found = [one for one in map(run_seed, FIXED) if one.violation]
    assert not found, "\n".join(f"make sim SEED={one.seed}: {one.violation}" for one in found)


def test_random_seeds() -> None:
    """`RENDER_TEST_SEED` gives the same ones again."""
    first = 10_000 + SEED
    print(f"simulated seeds from {first} on")
    found = [one for one in map(run_seed, range(first, first + RANDOM)) if one.violation]
    assert not found, "\n".join(f"make sim SEED={one.seed}: {one.violation}" for one in found)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    begin = FOUND_AT.get(name, 0)
    seeds = [*range(begin, SEARCHED), *range(begin)]
    with PLANTS[name]():
        found = next((one for one in map(run_seed, seeds) if one.violation), None)
    assert found is not None, f"{name} was not found in {SEARCHED} seeds"
    print(f"{name}: seed {found.seed}: {found.violation[:200]}")


TRACE = "from tests.simulation.runs import run_seed; print([run_seed(seed).trace for seed in range(10)])"


def test_a_seed_is_the_same_story_each_time() -> None:
    """In one process, in another, and whatever order Python's sets have there."""
    here = [run_seed(seed).trace for seed in range(10)]
    assert here == [run_seed(seed).trace for seed in range(10)]
    assert len(set(here)) == len(here)
    environment = {**os.environ, "PYTHONHASHSEED": str(1 + SEED % 1_000)}
    done = subprocess.run(
        [sys.executable, "-c", TRACE],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(here)


# The disk itself.


@pytest.fixture
def world() -> Iterator[World]:
    made = World(1)
    made.calm = True
    with disk.installed():
        yield made


def test_what_is_synced_survives_and_what_is_not_may_be_gone(world: World) -> None:
    synced, seen = Disk(world), set()
    store = DiskFolder(synced, "/store", world.ids)
    assert store.create("a/b", b"whole")
    for number in range(50):
        synced.lose_power(random.Random(number))
        assert store.read("a/b") == b"whole"
    for number in range(50):
        careless = Disk(world)
        careless.make_folder("/store")
        careless.sync_all()
        with careless.path("/store/a").open("xb") as file:
            file.write(b"whole")
        careless.lose_power(random.Random(number))
        seen.add(careless.files("").get("store/a", b"gone"))
    assert {b"gone", b"", b"whole"} < seen, "and some beginnings"


@pytest.mark.parametrize("at", range(12))
def test_a_folder_whose_sync_failed_is_durable_with_the_next_object_in_it(world: World, at: int) -> None:
    """Found by the simulation: the second call saw the folder standing, and did not sync it."""
    made = Disk(world)
    store = DiskFolder(made, "/store", world.ids)
    calls = 0
    change = made.change

    def fail_once(what: str, do: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise OSError(5, "Input/output error")
        change(what, do)  # type: ignore[arg-type]

    made.change = fail_once  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        store.create("sha256/aa/object", b"whole")
    again = DiskFolder(made, "/store", world.ids)  # another process
    again.create("sha256/aa/object", b"whole")
    for number in range(20):
        made.lose_power(random.Random(number))
        assert again.read("sha256/aa/object") == b"whole"


@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_is_durable_before_the_database_calls_it_published(
    world: World, tmp_path: Path, size: int
) -> None:
    """Found by the simulation: a checkpoint stood whose folder was not synced, and the next publication marked it."""
    made = Disk(world)
    objects = DiskFolder(made, "/log", world.ids)
    log = open_log(tmp_path, objects, DiskFolder(Disk(world), "/blobs", world.ids))
    for number in range(1, size):
        append(log, f"entry {number}")
        log.publish()
    append(log, "last")
    change, struck = made.change, False

    def fail_after_the_checkpoint(what: str, do: Callable[[], None]) -> None:
        nonlocal struck
        if what == "fsync /log/" and not struck and any(line.endswith(" /log/checkpoint") for line in done[-2:]):
            struck = True
            raise OSError(5, "Input/output error")
        done.append(what)
        change(what, do)

    done: list[str] = []
    made.change = fail_after_the_checkpoint  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        log.publish()
    assert struck
    again = DiskFolder(made, "/log", world.ids)  # another process
    published = open_log(tmp_path, again, DiskFolder(Disk(world), "/blobs", world.ids)).publish()
    assert published is not None
    for number in range(20):
        made.lose_power(random.Random(number))
        assert open_log(tmp_path, again).publish() == published


def test_a_violation_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(*_: object) -> None:
        raise Violation("planted")

    monkeypatch.setattr("tests.simulation.checks.check", forget)
    assert run_seed(3).violation == "planted"
