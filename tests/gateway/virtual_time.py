"""Time that passes only where everyone waits for it.

`run` gives a test a loop whose clock stands still while anything can happen, and jumps to the next timer otherwise: an
hour's time-out takes no time, and two things due at the same instant meet.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, cast

from tests.factories import START_US

S = 1_000_000_000
HUNG_S = 60
T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Waits for real while something real is under way; else time jumps to the next timer."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is not None and timeout > 0 and not self.loop.under_way:
            self.loop.ns += -int(-timeout * S // 1)
            timeout = 0
        if timeout is not None and timeout <= 0:
            return super().select(0)
        found = super().select(HUNG_S)
        if not found:
            raise RuntimeError("all tasks wait, and nothing will wake them")
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """`ns` have passed since its beginning; `under_way`: threads that will answer, whom time waits for."""

    def __init__(self) -> None:
        self.ns = self.under_way = 0
        self.errors: list[BaseException] = []
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_exception_handler(lambda _, context: self.errors.append(context.get("exception", RuntimeError())))

    def time(self) -> float:
        return self.ns / S

    def wait_for(self, future: asyncio.Future[T]) -> asyncio.Future[T]:
        def done(_: object) -> None:
            self.under_way -= 1

        self.under_way += 1
        future.add_done_callback(done)
        return future

    def run_in_executor(self, executor: Executor | None, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        return self.wait_for(super().run_in_executor(executor, func, *args))


def run(test: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run an async test in virtual time. Errors that no task has awaited fail it."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(test())
        errors = cast(VirtualLoop, runner.get_loop()).errors
    if errors:
        raise errors[0]
    return result


def virtual_loop() -> VirtualLoop:
    return cast(VirtualLoop, asyncio.get_running_loop())


def now_ns() -> int:
    return START_US * 1_000 + virtual_loop().ns


class LoopClock:
    """The loop's time, as the gateway's clock; the writer's thread reads it too."""

    def __init__(self) -> None:
        self._loop = virtual_loop()

    def now_us(self) -> int:
        return START_US + self._loop.ns // 1_000


async def until(condition: Callable[[], Any]) -> None:
    """Let others run until the condition holds; time passes in steps of 1 ms."""
    while not condition():
        await asyncio.sleep(0.001)


async def pause() -> None:
    """Let everything happen that can happen now, without time."""
    for _ in range(20):
        await asyncio.sleep(0)
