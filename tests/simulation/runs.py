"""Running seeds: one, or many in two worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from typing import Any
from unittest import mock

import duckdb
import structlog

from render_platform import cas, slow_path
from tests.simulation import checks, disk
from tests.simulation.sql import Template
from tests.simulation.story import Story
from tests.simulation.world import Crash, Violation, World

SEEDS_A_TASK = 25


class InOrder:
    """A ThreadPoolExecutor that does everything at once and in its turn: threads would come in any order."""

    def __init__(self, *_args: object) -> None:
        pass

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:  # noqa: BLE001  the future raises it again; a Crash goes on
            done.set_exception(error)
        return done

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return map(work, *items)


@cache
def _template() -> Template:
    return Template()


@cache
def _duckdb() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    return connection


@contextmanager
def _shared_duckdb() -> Iterator[duckdb.DuckDBPyConnection]:
    yield _duckdb()


@contextmanager
def installed() -> Iterator[None]:
    """What stands around the library in this process, as long as seeds run."""
    with ExitStack() as stack:
        stack.enter_context(disk.installed())
        for module in (cas, slow_path):
            stack.enter_context(mock.patch.object(module, "ThreadPoolExecutor", InOrder))
        logging = structlog.get_config()
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        stack.callback(structlog.configure, **logging)
        yield


@dataclass(frozen=True)
class Outcome:
    """What became of a seed: the digest of its trace, and the violation if there was one."""

    seed: int
    trace: str
    violation: str = ""
    faults: int = 0
    calls: int = 0
    events: int = 0
    cpu_s: float = 0.0


def run_seed(seed: int, say: Callable[[str], object] | None = None) -> Outcome:
    """One seed, from an empty platform to its checks."""
    began = time.process_time()
    world = World(seed, say)
    template = _template()
    violation, events = "", 0
    with installed():
        try:
            story = Story(world, template, _shared_duckdb)
            story.play()
            story.mend()
            checks.check(story)
            events = len(story.told.accepted)
        except Violation as error:
            violation = str(error)
        except (Exception, Crash) as error:  # whatever it is, the library let it through
            if say is not None:
                raise
            violation = f"{type(error).__name__}: {error}"
        finally:
            template.world = None
            template.close()
    return Outcome(seed, world.trace, violation, world.faults, world.calls, events, time.process_time() - began)


@dataclass
class Figures:
    seeds: int = 0
    faults: int = 0
    calls: int = 0
    events: int = 0
    cpu_s: float = 0.0
    violations: list[Outcome] = field(default_factory=list)

    def add(self, one: Outcome) -> None:
        self.seeds += 1
        self.faults += one.faults
        self.calls += one.calls
        self.events += one.events
        self.cpu_s += one.cpu_s
        self.violations += [one] if one.violation else []


def _run_some(seeds: range) -> list[Outcome]:
    return [run_seed(seed) for seed in seeds]


def run_seeds(first: int, count: int, tell: Callable[[Figures], object], workers: int = 2) -> Figures:
    """Seeds from `first` on, in worker processes; `tell` is called now and then."""
    figures = Figures()
    parts = [range(at, min(at + SEEDS_A_TASK, first + count)) for at in range(first, first + count, SEEDS_A_TASK)]
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_run_some, part) for part in parts]):
            for one in done.result():
                figures.add(one)
            tell(figures)
    return figures
