"""The fleet: backends with their slots, breakers and devices, and what one attempt on one of them used."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable

from render_platform.gateway.backends import Answer, Attempt, Backend, BackendFailure, Span, Usage
from render_platform.gateway.catalogue import ModelSpec
from render_platform.gateway.jobs import Outcome
from render_platform.gateway.ledger import DeviceLedger
from render_platform.gateway.limits import CircuitBreaker
from render_platform.gateway.meters import DeviceMeter, EnergyLedger, nvtx_range

CANCELLED = BackendFailure("cancelled", "the job was cancelled", retriable=False)
OUT_OF_TIME = BackendFailure("backend_timeout", "the backend did not answer in time", retriable=False)


class Device:
    """What jobs share: a GPU under its UUID, or, where nobody has read one, a backend under its name."""

    def __init__(self, name: str, meter: DeviceMeter, slots: int | None = None) -> None:
        self.name = name
        self.ledger = DeviceLedger(slots)
        self.energy = EnergyLedger()
        self.meter = meter
        self.is_read = name in meter.devices()

    def energy_mj(self) -> int | None:
        return self.meter.energy_mj(self.name) if self.is_read else None


class Use:
    """One attempt's time on a device: begun at once, ended exactly once."""

    _keys = itertools.count()

    def __init__(self, device: Device, gpu_count: int, now_ns: Callable[[], int]) -> None:
        self._device, self._gpu_count, self._now_ns = device, gpu_count, now_ns
        self._key = next(self._keys)
        self.begun_ns = now_ns()
        device.ledger.begin(self._key, self.begun_ns)
        if device.is_read:
            device.energy.begin(self._key, device.energy_mj())

    def on_request_end(self, status: str, meter: str, spans: list[Span] | None, usage: Usage) -> Outcome:
        """The device is let go of. `spans` None: the whole attempt counts, by the clock."""
        device, ended_ns = self._device, self._now_ns()
        used = [(self.begun_ns, ended_ns)] if spans is None else _clipped(spans, self.begun_ns, ended_ns)
        gpu_time_ns = device.ledger.end(self._key, used, ended_ns)
        if spans is None and meter != "simulated":
            meter = device.meter.name if device.is_read else "wall_clock"
        return Outcome(
            status=status,
            error_code=None,
            started_ns=min((start for start, _ in used), default=ended_ns),
            ended_ns=max((end for _, end in used), default=ended_ns),
            gpu_time_ns=gpu_time_ns * self._gpu_count,
            gpu_count=self._gpu_count,
            device=device.name,
            energy_mj=device.energy.end(self._key, device.energy_mj()) if device.is_read else None,
            meter=meter,
            inference_time_us=(ended_ns - self.begun_ns) // 1_000,
            usage=usage,
        )


class Server:
    """One backend: how many jobs it runs, and whether it is trusted to run more."""

    def __init__(self, backend: Backend, device: Device) -> None:
        self.backend, self.spec, self.device = backend, backend.spec, device
        self.breaker = CircuitBreaker()
        self.running = 0

    @property
    def load(self) -> float:
        return self.running / self.spec.capacity

    def takes(self, now_us: int) -> bool:
        """Whether it has a free slot and its breaker is not open."""
        return self.running < self.spec.capacity and self.breaker.state(now_us) != "open"

    def on_request_start(self, attempt: Attempt) -> Use:
        """The attempt holds the device from now on."""
        return Use(self.device, self.spec.gpu_count, attempt.now_ns)

    async def run(
        self, attempt: Attempt, permit: int, now_us: Callable[[], int], cancelled: Callable[[], bool]
    ) -> tuple[Outcome, bool]:
        """Run one attempt and meter it, whatever its end; and whether another attempt may do better.

        A cancellation that `cancelled` does not know of leaves it as CancelledError: the process is ending.
        """
        use = self.on_request_start(attempt)
        failure, answer = CANCELLED, None
        try:
            with nvtx_range(attempt.attempt_id):
                async with asyncio.timeout(attempt.timeout_s):
                    answer = await self.backend.run(attempt)
        except TimeoutError:
            failure = OUT_OF_TIME
        except BackendFailure as error:
            failure = error
        except asyncio.CancelledError:
            if not cancelled():
                raise
            _forget_cancellation()
        finally:
            self._judge(permit, now_us(), attempt, answer, failure)
            outcome = self._outcome(use, answer, failure)
        return outcome, failure.retriable and answer is None

    def _outcome(self, use: Use, answer: Answer | None, failure: BackendFailure) -> Outcome:
        if answer is not None:
            outcome = use.on_request_end("success", self.backend.meter, answer.spans, answer.usage)
            outcome.body, outcome.content_type = answer.body, answer.content_type
            return outcome
        status = {"backend_timeout": "timeout", "cancelled": "cancelled"}.get(failure.code, "error")
        outcome = use.on_request_end(status, self.backend.meter, failure.spans, failure.usage)
        outcome.error_code, outcome.message, outcome.http_status = failure.code, failure.message, 502
        if failure.refused is not None:
            outcome.http_status, outcome.body = failure.refused
        elif status == "timeout":
            outcome.http_status = 504
        return outcome

    def _judge(
        self, permit: int, now_us: int, attempt: Attempt, answer: Answer | None, failure: BackendFailure
    ) -> None:
        """What the attempt says of the backend. One that had not all of the backend's time may run out of it: else a
        customer who asks for too little could close the backend for all others."""
        short = failure.code == OUT_OF_TIME.code and attempt.timeout_s < self.spec.timeout_s
        if answer is not None or failure.refused is not None:
            self.breaker.succeeded(permit, now_us)
        elif failure is CANCELLED or short:
            self.breaker.abandoned(permit)
        else:
            self.breaker.failed(permit, now_us)


class Fleet:
    """All servers, and which of them can take a job of a model."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.servers = {server.spec.name: server for server in servers}
        self._of: dict[tuple[str, str | None], list[Server]] = {}
        """The servers of a model and a pinned backend: the catalogue bounds how many there are."""

    def of(self, model: ModelSpec, pinned: str | None) -> list[Server]:
        found = self._of.get((model.name, pinned))
        if found is None:
            found = [self.servers[name] for name in ([pinned] if pinned else model.backends)]
            self._of[model.name, pinned] = found
        return found

    def take_slot(self, model: ModelSpec, pinned: str | None, now_us: int) -> tuple[Server, int] | None:
        """The least loaded server that takes a job, its slot taken, with its breaker's permit; or None."""
        free = [server for server in self.of(model, pinned) if server.takes(now_us)]
        if len(free) > 1:
            free.sort(key=lambda server: server.load)
        for server in free:
            permit = server.breaker.allow(now_us)
            if permit is not None:
                server.running += 1
                return server, permit
        return None

    def retry_after_us(self, model: ModelSpec, pinned: str | None, now_us: int) -> int | None:
        """None while a server of the model is trusted; otherwise until the first one is tried again."""
        servers = self.of(model, pinned)
        for server in servers:
            if server.breaker.state(now_us) != "open":
                return None
        return min(server.breaker.retry_after_us(now_us) for server in servers)


def never_ran(status: str, code: str, message: str, http_status: int, now_ns: int) -> Outcome:
    """The end of a job that no device has worked for: zero because nothing was begun, not because nothing was read."""
    return Outcome(status, code, now_ns, now_ns, message=message, http_status=http_status)


def not_run(code: str, now_ns: int) -> Outcome:
    """The end of a job that was cancelled, or whose time was up (`expired`), before an attempt of it began."""
    if code == "expired":
        return never_ran("timeout", code, "no slot became free before the job's time was up", 504, now_ns)
    return never_ran("cancelled", code, "it was cancelled", 499, now_ns)


def _clipped(spans: list[Span], begun_ns: int, ended_ns: int) -> list[Span]:
    """The parts of a backend's spans that lie inside the attempt: a server's clock is not trusted beyond it."""
    cut = ((max(start, begun_ns), min(end, ended_ns)) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]


def _forget_cancellation() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
