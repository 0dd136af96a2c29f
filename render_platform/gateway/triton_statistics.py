"""How long a request computed, from the totals that Triton keeps of its model.

What the totals grew by between two readings is one request's time only if nothing else ran: one attempt of ours, begun
when all before it were counted, no other begun before its own end was, and exactly one request and one execution more.
Otherwise there is no figure, and the wall clock counts: never someone else's time. Totals cannot tell a request of ours
that is counted late from another client's in its place, so no other client should use the model.

While requests come one after another, one reading each is enough; while they overlap, there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec

from render_platform.gateway.backend_http import BackendClient
from render_platform.gateway.backends import Attempt, BackendFailure, Span
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton_meters import READ_S, Reading, model_path

TRIES = 7
SETTLE_S = 1.0
"""Triton counts a request within this time of its answer."""


class _Part(msgspec.Struct):
    count: int
    ns: int


class _InferenceStats(msgspec.Struct):
    success: _Part
    fail: _Part
    compute_input: _Part
    compute_infer: _Part
    compute_output: _Part


class _ModelStats(msgspec.Struct):
    """Of one version of the model."""

    execution_count: int
    inference_stats: _InferenceStats


class _Statistics(msgspec.Struct):
    model_stats: list[_ModelStats]


_statistics = msgspec.json.Decoder(_Statistics)


@dataclass(frozen=True, slots=True)
class Counts:
    """A model's totals, over its versions, since the server began."""

    requests: int
    failures: int
    executions: int
    compute_ns: int

    @property
    def ended(self) -> int:
        return self.requests + self.failures

    def one_more(self, later: Counts) -> int | None:
        """What a single request computed, where `later` holds that one more and nothing else."""
        grown = (later.requests - self.requests, later.failures - self.failures, later.executions - self.executions)
        compute_ns = later.compute_ns - self.compute_ns
        return compute_ns if grown == (1, 0, 1) and compute_ns > 0 else None


_End = Literal["counted", "answered", "not run", "lost"]


@dataclass(slots=True)
class _Watch:
    """What is known of one model."""

    running: int = 0
    begun: int = 0
    reading: Counts | None = None
    """The totals when all requests of ours that had ended were counted."""
    uncounted: int = 0
    """Requests of ours that were answered since, and maybe not counted yet."""
    doubtful_until_s: float = 0.0
    """Until then, something of ours may still be counted that `reading` and `uncounted` do not tell of."""


class StatisticsMeter:
    """The growth of a model's totals, where it can only be this attempt's."""

    def __init__(self, spec: BackendSpec, client: BackendClient) -> None:
        self._client = client
        self._timeout_s = spec.timeout_s
        self._watches: dict[str, _Watch] = {}

    async def start(self) -> None:
        """Nothing to begin: the first request reads."""

    async def close(self) -> None:
        """Nothing to end."""

    @asynccontextmanager
    async def measure(self, attempt: Attempt) -> AsyncIterator[Reading]:
        watch = self._watches.setdefault(attempt.served_as, _Watch())
        alone = not watch.running
        watch.begun += 1
        watch.running += 1
        mine = watch.begun
        before: Counts | None = None
        how: _End = "lost"

        async def read(at_most_s: float) -> list[Span] | None:
            nonlocal how
            how = "answered"
            if before is None or watch.begun != mine:
                return None
            after, compute_ns = await self._grown(attempt.served_as, before, at_most_s)
            if after is None or compute_ns is None or watch.begun != mine:
                return None
            watch.reading, how = after, "counted"
            return [(0, compute_ns)]

        try:
            if alone:
                before = await self._before(watch, attempt.served_as)
            yield read
        except BackendFailure as failure:
            if failure.spans == []:
                how = "not run"
            raise
        finally:
            self._end(watch, how)

    def _end(self, watch: _Watch, how: _End) -> None:
        now_s = asyncio.get_running_loop().time()
        watch.running -= 1
        if how == "answered":
            watch.uncounted += 1
            watch.doubtful_until_s = max(watch.doubtful_until_s, now_s + SETTLE_S)
        elif how == "not run":  # though it may have been counted as a failure
            watch.reading = None
        elif how == "lost":  # the server may go on with it, at most as long as any request may take
            watch.reading, watch.doubtful_until_s = None, now_s + self._timeout_s

    async def _before(self, watch: _Watch, served_as: str) -> Counts | None:
        """Totals that count all that has ended; None where that is not certain. Read only where they are not known."""
        if watch.reading is not None and not watch.uncounted:
            return watch.reading
        found = await self._counts(served_as)
        if found is None:
            return None
        # What ended while they were read is in `uncounted` by now, and in doubt.
        doubtful = asyncio.get_running_loop().time() < watch.doubtful_until_s
        if doubtful and (watch.reading is None or found.ended != watch.reading.ended + watch.uncounted):
            return None
        watch.reading, watch.uncounted = found, 0
        return found

    async def _grown(self, served_as: str, before: Counts, at_most_s: float) -> tuple[Counts | None, int | None]:
        """The totals once they have grown, and by what; Triton may count a request just after its answer."""
        pause_s = 0.001
        until_s = asyncio.get_running_loop().time() + at_most_s
        for _ in range(TRIES):
            after = await self._counts(served_as, min(READ_S, at_most_s))
            if after != before or asyncio.get_running_loop().time() + pause_s > until_s:
                break
            await asyncio.sleep(pause_s)
            pause_s *= 2
        return after, before.one_more(after) if after else None

    async def _counts(self, served_as: str, timeout_s: float = READ_S) -> Counts | None:
        try:
            async with self._client.within(timeout_s):
                stats = await self._client.fetch("GET", model_path(served_as) + "/stats")
            found = self._client.decode(_statistics, stats).model_stats
        except BackendFailure:
            return None
        parts = [one.inference_stats for one in found]
        return Counts(
            requests=sum(one.success.count for one in parts),
            failures=sum(one.fail.count for one in parts),
            executions=sum(one.execution_count for one in found),
            compute_ns=sum(one.compute_input.ns + one.compute_infer.ns + one.compute_output.ns for one in parts),
        )
