"""What this machine can measure, found at start-up. Nothing here needs a GPU: without a driver the wall clock remains.

- `open_meter` gives NVML (energy and utilisation of each GPU), or the wall clock with the reason.
- `EnergyLedger` apportions a GPU's energy counter, which knows no requests, between the jobs that run.
- `nvtx_range` marks a job for profilers; `open_cupti` gives the kernels of this process, for backends inside it.

A reading that cannot be had is None: missing, never 0. No error of NVIDIA's libraries leaves this module.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pynvml

from render_platform.clock import Clock
from render_platform.errors import RecordError, Unavailable, UsageError

NVTX_DOMAIN = "render-platform"
CUPTI_BUFFER_BYTES = 8 << 20
MOST_KERNELS = 200_000
"""Kernel records kept between two collections, some 30 MB; more of them, and the collection is missing."""
_BLANK = 2**63 - 16
"""Readings from here on are the driver's and DCGM's ways to say that there is none (9223372036854775794 and others)."""


class DeviceMeter(Protocol):
    """The devices of this machine. `name` is one of events.METERS. Calls may block for some milliseconds."""

    name: str
    missing: int
    """Readings that could not be had since the start."""

    def devices(self) -> list[str]:
        """The UUID of each device."""

    def energy_mj(self, device: str, /) -> int | None:
        """The device's energy counter in mJ; None where it is missing or has gone back since the last reading."""

    def utilisation(self, device: str, /) -> int | None:
        """Percent of the last sampling period in which any kernel ran; None where it is missing."""

    def describe(self) -> str:
        """One line for the start-up output."""

    def close(self) -> None: ...


class WallClockMeter:
    """No device can be read: jobs are metered by the time that they held their backend."""

    name = "wall_clock"
    missing = 0

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def devices(self) -> list[str]:
        return []

    def energy_mj(self, _device: str, /) -> int | None:
        return None

    def utilisation(self, _device: str, /) -> int | None:
        return None

    def describe(self) -> str:
        return f"wall clock: {self._reason}"

    def close(self) -> None:
        pass


class NvmlMeter:
    """The GPUs that the NVIDIA driver shows. A GPU that is lost later gives no readings; nothing raises."""

    name = "nvml"

    def __init__(self) -> None:
        """Unavailable, with the reason, where NVML does not start or shows no GPU."""
        self.missing = 0
        self._handles: dict[str, Any] = {}
        self._last_mj: dict[str, int] = {}
        self._unreadable = 0
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise Unavailable(_reason(error), "install the NVIDIA driver, or meter by the wall clock") from error
        for index in range(_reading(pynvml.nvmlDeviceGetCount) or 0):
            handle = _reading(pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = None if handle is None else _reading(pynvml.nvmlDeviceGetUUID, handle)
            if uuid is None:
                self._unreadable += 1
            else:
                self._handles[str(uuid)] = handle
        if not self._handles:
            self.close()
            raise Unavailable(f"the NVIDIA driver shows no GPU that can be read{self._others()}", "see nvidia-smi")

    def devices(self) -> list[str]:
        return list(self._handles)

    def energy_mj(self, device: str, /) -> int | None:
        value = self._counter_mj(device)
        if value is None:
            return self._counted(None)
        went_back = value < self._last_mj.get(device, 0)
        self._last_mj[device] = value
        return self._counted(None if went_back else value)

    def utilisation(self, device: str, /) -> int | None:
        rates = self._read(pynvml.nvmlDeviceGetUtilizationRates, device)
        return self._counted(None if rates is None or rates.gpu > 100 else int(rates.gpu))

    def describe(self) -> str:
        driver = _reading(pynvml.nvmlSystemGetDriverVersion) or "unknown"
        counters = sum(self._counter_mj(device) is not None for device in self._handles)
        devices = len(self._handles)
        return f"NVML, driver {driver}: energy counters on {counters} of {devices} device(s){self._others()}"

    def close(self) -> None:
        _reading(pynvml.nvmlShutdown)

    def _read(self, function: Callable[[Any], Any], device: str) -> Any:
        handle = self._handles.get(device)
        return None if handle is None else _reading(function, handle)

    def _counter_mj(self, device: str) -> int | None:
        value = self._read(pynvml.nvmlDeviceGetTotalEnergyConsumption, device)
        return None if value is None or value >= _BLANK else int(value)

    def _others(self) -> str:
        return f"; {self._unreadable} more cannot be read" if self._unreadable else ""

    def _counted(self, reading: int | None) -> int | None:
        self.missing += reading is None
        return reading


def open_meter(preference: str = "auto") -> DeviceMeter:
    """`auto`: NVML where it works, the wall clock otherwise; `nvml` or `wall_clock`: that one.

    Unavailable where `nvml` is asked for and cannot be had; UsageError for any other preference.
    """
    if preference == "wall_clock":
        return WallClockMeter("as configured")
    if preference not in ("auto", "nvml"):
        raise UsageError(f"there is no meter {preference!r}", "choose auto, nvml or wall_clock")
    try:
        return NvmlMeter()
    except Unavailable as error:
        if preference == "nvml":
            raise
        return WallClockMeter(error.message)


def _reading(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML says; None for each of its errors (missing symbol, not supported, lost, unknown, not permitted …)."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "the NVIDIA driver's library is not here"
    return f"NVML does not start: {error}"


class EnergyLedger:
    """Apportions one device's energy counter between the jobs that run: equal shares in mJ, remainders to the one that
    began last. Shares and idle energy add up to the counter exactly, as long as no reading is missing.
    """

    def __init__(self) -> None:
        self.idle_mj = 0
        """Energy of times in which no job ran."""
        self._last: int | None = None
        self._shares: dict[int, int | None] = {}  # mJ so far of the running jobs, in the order of their begins

    def begin(self, key: int, reading: int | None) -> None:
        """The job runs from now on; `reading` is the counter in mJ. RecordError where `key` runs already."""
        if key in self._shares:
            raise RecordError("key", f"{key} runs on this device already")
        self._apportion(reading)
        self._shares[key] = 0

    def end(self, key: int, reading: int | None) -> int | None:
        """The job's energy in mJ; None where a reading was missing, or the counter went back, while it ran."""
        if key not in self._shares:
            raise RecordError("key", f"{key} does not run on this device")
        self._apportion(reading)
        return self._shares.pop(key)

    def _apportion(self, reading: int | None) -> None:
        last, self._last = self._last, reading
        if last is None or reading is None or reading < last:
            self._shares = dict.fromkeys(self._shares)
        elif not self._shares:
            self.idle_mj += reading - last
        else:
            each, rest = divmod(reading - last, len(self._shares))
            for place, (key, share) in enumerate(self._shares.items(), 1):
                if share is not None:
                    self._shares[key] = share + each + (rest if place == len(self._shares) else 0)


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Marks a job for a profiler, where one is attached; otherwise it does nothing.

    `name` is our attempt id, never a client's text: an attached profiler keeps every name. The range belongs to the
    process, not to a thread's stack, so ranges of jobs that run at once may overlap.
    """
    import nvtx

    marked = nvtx.start_range(message=name, domain=NVTX_DOMAIN)
    try:
        yield
    finally:
        nvtx.end_range(marked)


class CuptiKernels:
    """The kernels that this process runs on its GPUs, from CUPTI's activity records: for a backend inside this process
    that runs one job at a time. One in a process.
    """

    def __init__(self, cupti: Any, clock: Clock) -> None:
        """`cupti` is the module cupti.cupti of cupti-python; its errors pass. Spans come in the time of `clock`."""
        self.dropped = 0
        """Records that were lost since the start, or came without times."""
        self._cupti = cupti
        self._clock = clock
        self._kind = cupti.ActivityKind.CONCURRENT_KERNEL
        self._lock = threading.Lock()  # CUPTI delivers from threads of its own
        self._kernels: list[tuple[int, int, int]] = []
        self._lost = 0
        cupti.activity_register_callbacks(_buffer, self._take)
        cupti.activity_enable(self._kind)

    def collect(self) -> dict[int, list[tuple[int, int]]] | None:
        """The kernels that ended since the last collection: by CUDA device number, their (start, end) in ns.

        Synchronise the device first: kernels that still run come with a later collection. None where records were lost:
        what this time cost is not known, and the caller must meter it in another way.
        """
        try:
            offset_ns = self._offset_ns()
            self._cupti.activity_flush_all(0)
            lost = self._lost_in_buffers()
        except (self._cupti.cuptiError, RuntimeError):
            lost, offset_ns = 1, 0
        with self._lock:
            kernels, self._kernels = self._kernels, []
            lost, self._lost = lost + self._lost, 0
        self.dropped += lost
        if lost:
            return None
        spans: dict[int, list[tuple[int, int]]] = {}
        for device, start, end in kernels:
            spans.setdefault(device, []).append((start + offset_ns, end + offset_ns))
        return spans

    def close(self) -> None:
        try:
            self._cupti.activity_disable(self._kind)
        except (self._cupti.cuptiError, RuntimeError):
            self.dropped += 1

    def _take(self, records: Sequence[Any]) -> None:
        with self._lock:
            for record in records:
                if record.kind != self._kind:
                    continue
                if record.start and record.end and len(self._kernels) < MOST_KERNELS:
                    self._kernels.append((record.device_id, record.start, record.end))
                else:
                    self._lost += 1

    def _offset_ns(self) -> int:
        """What CUPTI's time lacks to the clock's: its reading lies between two of the clock's."""
        before = self._clock.now_us()
        stamp_ns = int(self._cupti.get_timestamp())
        return (before + self._clock.now_us()) * 500 - stamp_ns

    def _lost_in_buffers(self) -> int:
        lost = ctypes.c_size_t(0)
        self._cupti.activity_get_num_dropped_records(0, 0, ctypes.addressof(lost))
        return lost.value


def open_cupti(clock: Clock) -> CuptiKernels | str:
    """The kernels of this process from now on, or the reason why they cannot be seen."""
    try:
        cupti = importlib.import_module("cupti.cupti")
    except ImportError:
        return "CUPTI: the package cupti-python is not installed"
    try:
        return CuptiKernels(cupti, clock)
    except (cupti.cuptiError, RuntimeError) as error:
        return f"CUPTI does not start: {error}"


def _buffer() -> tuple[int, int]:
    """The size of each of CUPTI's buffers in bytes, and the most records in one (0: as many as fit)."""
    return CUPTI_BUFFER_BYTES, 0
