"""A failure at every write of the slow path. Each write can fail in two ways:

- lost: it is reported as failed and was not persisted;
- kept: it is reported as failed and was persisted.

And what is reported is one of two: the process ends there (Crash; the platform is opened again), or the stage raises an
error (the same platform goes on). Afterwards an independent checker reads the files.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from render_platform.audit_log import AuditLog
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, ManualClock
from render_platform.database import usage_events
from render_platform.errors import RecordError, Unavailable
from render_platform.events import UsageEvent
from render_platform.objects import ObjectStore, Stat
from render_platform.pipeline import Platform
from tests.factories import START_US, make_events
from tests.platforms import LIVE, check_evidence, make_platform, record, record_random

END_US = START_US + 3 * HOUR_US
LIMITS = {"batch_rows": 5, "seal_rows_a_transaction": 3}
KINDS = ("lost", "kept")


class Crash(BaseException):
    """The process ends here: no handler of the library may stop it."""


def failed_write() -> BaseException:
    return Unavailable("the write failed", "run the command again")


@dataclass
class Faults:
    """Counts writes, and fails the one numbered `at`. After a Crash nothing can be written any more."""

    at: int | None = None
    kind: str = "lost"
    make: Callable[[], BaseException] = Crash
    count: int = 0
    injected: bool = False
    dead: bool = False

    @contextmanager
    def step(self) -> Iterator[None]:
        if self.dead:
            raise Crash
        self.count += 1
        here = self.count == self.at
        if here and self.kind == "lost":
            self._fail()
        yield
        if here and self.kind == "kept":
            self._fail()

    def _fail(self) -> None:
        self.injected = True
        error = self.make()
        self.dead = isinstance(error, Crash)
        raise error


class FaultyObjects:
    """An ObjectStore whose writes go through `faults`."""

    def __init__(self, objects: ObjectStore, faults: Faults) -> None:
        self._objects = objects
        self._faults = faults

    def create(self, path: str, data: bytes) -> bool:
        with self._faults.step():
            return self._objects.create(path, data)

    def read(self, path: str) -> bytes:
        return self._objects.read(path)

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        with self._faults.step():
            self._objects.replace(path, data, expected)

    def names(self, prefix: str = "") -> Iterator[str]:
        return self._objects.names(prefix)

    def stats(self, prefix: str = "") -> Iterator[tuple[str, Stat]]:
        return self._objects.stats(prefix)

    def stat(self, path: str) -> Stat:
        return self._objects.stat(path)

    def delete(self, path: str, seen: Stat) -> bool:
        return self._objects.delete(path, seen)


def with_faults(platform: Platform, faults: Faults) -> Platform:
    """The platform, with every object write and every commit going through `faults`."""
    blobs, log = FaultyObjects(platform.blobs, faults), FaultyObjects(platform.log_objects, faults)
    platform.cas = Cas(blobs)
    platform.log = AuditLog(platform.database, platform.cas, log, platform.log_signer)
    write = platform.database.write

    @contextmanager
    def faulty_write() -> Iterator[sa.Connection]:
        # The step begins before the commit: "lost" raises inside the transaction, "kept" after its end.
        steps = faults.step()
        with write() as connection:
            yield connection
            steps.__enter__()
        steps.__exit__(None, None, None)

    setattr(platform.database, "write", faulty_write)  # noqa: B010 (the type checker refuses the plain form)
    return platform


def open_platform(state: Path, faults: Faults, seed: int | str) -> Platform:
    return with_faults(make_platform(state, ManualClock(END_US), seed, **LIMITS), faults)


@dataclass(frozen=True)
class Template:
    """A folder with events that wait, and all events that were ever recorded in it."""

    folder: Path
    vkey: str
    recorded: Sequence[UsageEvent]

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.folder, target)
        return target


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Two lanes share an hour, two hours are empty, and one batch is published already."""
    folder = tmp_path_factory.mktemp("template") / "state"
    platform = make_platform(folder, ManualClock(START_US), **LIMITS)
    recorded = record_random(platform, 3, 1)
    platform.flush()
    frontier = recorded[-1].recorded_at
    recorded += record_random(platform, 6, 2, start_us=frontier, span_us=START_US + HOUR_US - frontier)
    recorded += record_random(platform, 2, 3, lane="trace-1")
    with platform.database.write() as connection:
        platform.outbox.finish_lane(connection, "trace-1", START_US + HOUR_US)
    vkey = platform.log_signer.verifier.vkey
    platform.close()
    return Template(folder, vkey, recorded)


def check(state: Path, template: Template) -> None:
    entries = check_evidence(state, template.vkey, template.recorded)
    kinds = [(entry["type"], entry["lane"]) for entry in entries]
    assert kinds.count(("usage_batch", LIVE)) == 3
    assert kinds.count(("usage_batch", "trace-1")) == 1
    assert kinds.count(("watermark", LIVE)) == 3
    assert kinds.count(("watermark", "trace-1")) == 1
    platform = make_platform(state, ManualClock(END_US))
    outcome = platform.verify(deep=True)
    assert outcome.verified, outcome.problems
    assert platform.flush().logged == 0
    platform.close()


def flush_once(state: Path, faults: Faults, seed: str) -> bool:
    """Whether the flush came to its end. After an error (not a Crash) the same platform tries once more."""
    platform = open_platform(state, faults, seed)
    try:
        platform.flush()
    except Crash:
        return False
    except Unavailable:
        platform.flush()
    finally:
        platform.close()
    return True


def writes_of_a_flush(template: Template, folder: Path) -> int:
    faults = Faults()
    assert flush_once(template.copy(folder), faults, "dry")
    check(folder, template)
    return faults.count


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_any_write_loses_nothing_and_doubles_nothing(
    template: Template, tmp_path: Path, kind: str, rng: random.Random
) -> None:
    at = 0
    while True:
        at += 1
        state = template.copy(tmp_path / f"{at}")
        first = Faults(at, kind)
        done = flush_once(state, first, f"{at}/0")
        assert done is not first.injected
        if done:
            break
        # The recovery crashes too, at a point that the seed chooses.
        if not flush_once(state, Faults(rng.randrange(1, 30), rng.choice(KINDS)), f"{at}/1"):
            assert flush_once(state, Faults(), f"{at}/2")
        check(state, template)
        shutil.rmtree(state)
    assert at - 1 == writes_of_a_flush(template, tmp_path / "dry") > 35


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_at_any_write_is_made_good_by_the_next_flush(
    template: Template, tmp_path: Path, kind: str, rng: random.Random
) -> None:
    """Every third write of a run, and the seed chooses which: what is read back is the same as after a crash."""
    at = rng.choice((-2, -1, 0))
    while True:
        at += 3
        state = template.copy(tmp_path / f"{at}")
        faults = Faults(at, kind, failed_write)
        assert flush_once(state, faults, f"{at}")
        if not faults.injected:
            break
        check(state, template)
        shutil.rmtree(state)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_alone_recover_as_a_flush_does(
    template: Template, tmp_path: Path, kind: str, rng: random.Random
) -> None:
    """After a crash the stages are run in a shuffled order until all is done: each may run alone."""
    for at in rng.sample(range(1, 35), 8):
        state = template.copy(tmp_path / f"{at}")
        flush_once(state, Faults(at, kind), f"{at}/0")
        platform = open_platform(state, Faults(), f"{at}/1")
        stages: list[Callable[[], object]] = [platform.seal, platform.store, platform.log_batches]
        for stage in rng.choices(stages, k=6):
            stage()
        platform.flush()
        platform.close()
        check(state, template)


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.faults.test_crash_slow_path import Faults, flush_once

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

flush_once(Path(sys.argv[1]), Faults(int(sys.argv[2]), sys.argv[3], kill), sys.argv[2])
"""


def test_a_killed_process_loses_nothing(template: Template, tmp_path: Path, rng: random.Random) -> None:
    """The real thing, SIGKILL: no handler, no rollback and no `finally` runs."""
    for at in rng.sample(range(1, 35), 3):
        state = template.copy(tmp_path / f"{at}")
        arguments = [sys.executable, "-c", CHILD, str(state), str(at), rng.choice(KINDS)]
        child = subprocess.run(arguments, cwd=Path(__file__).parents[2], timeout=60, check=False)
        assert child.returncode == -signal.SIGKILL
        assert flush_once(state, Faults(), "after")
        check(state, template)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Crash, failed_write])
def test_recording_is_all_or_nothing(tmp_path: Path, kind: str, make: Callable[[], BaseException]) -> None:
    """The end of a job and its event are one transaction: before its commit nothing is there, after it all."""
    faults = Faults()
    platform = open_platform(tmp_path / "state", faults, 0)
    before = record_random(platform, 2, 1)
    faults.at, faults.kind, faults.make = faults.count + 1, kind, make
    events = make_events(5, 2, START_US + HOUR_US)
    with pytest.raises((Crash, Unavailable)):
        record(platform, LIVE, events)
    platform.close()

    platform = make_platform(tmp_path / "state", ManualClock(END_US), "again", **LIMITS)
    with platform.database.read() as connection:
        standing = set(connection.execute(sa.select(usage_events.c.event_id)).scalars())
        frontier = platform.outbox.frontier(connection, LIVE)
    kept = events if kind == "kept" else []
    assert standing == {event.event_id.bytes for event in [*before, *kept]}
    assert frontier == max(event.recorded_at for event in [*before, *kept])
    if kept:
        with pytest.raises(RecordError):
            record(platform, LIVE, events)
    else:
        record(platform, LIVE, events)
    platform.flush()
    check_evidence(tmp_path / "state", platform.log_signer.verifier.vkey, [*before, *events])
    platform.close()
