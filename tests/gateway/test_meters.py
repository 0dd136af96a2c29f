"""Meters: unmodified pynvml and nvtx over a compiled shim, energy against an oracle, CUPTI over a fake and itself."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.clock import ManualClock
from render_platform.errors import RecordError, UsageError
from render_platform.events import METERS
from render_platform.gateway import meters
from render_platform.gateway.meters import (
    CuptiKernels,
    EnergyLedger,
    WallClockMeter,
    nvtx_range,
    open_cupti,
    open_meter,
)
from tests.gateway.nvml import broken_library, said_by, shim

GPU = "GPU-00000000-0000-0000-0000-00000000000"
OPEN = "meter = open_meter('nvml')\na, b = meter.devices()\n"


def test_two_devices_are_read_each_by_itself(tmp_path: Path) -> None:
    script = """
readings(energy_0=5_000, energy_1=70_000, utilisation_1=93)
meter = open_meter()
say(meter.name, meter.describe(), meter.devices())
say(*map(meter.energy_mj, meter.devices()), *map(meter.utilisation, meter.devices()))
readings(energy_0=5_250, energy_1=70_000)
say(*map(meter.energy_mj, meter.devices()), meter.missing)
"""
    assert said_by(script, shim(), tmp_path) == [
        ["nvml", "NVML, driver 535.104.05: energy counters on 2 of 2 device(s)", [f"{GPU}0", f"{GPU}1"]],
        [5_000, 70_000, 50, 93],
        [5_250, 70_000, 0],
    ]
    assert "nvml" in METERS


def test_a_driver_without_the_function_gives_no_energy_and_all_else(tmp_path: Path) -> None:
    script = OPEN + "say(meter.describe(), meter.energy_mj(a), meter.utilisation(a), meter.missing)"
    assert said_by(script, shim("-DWITHOUT_ENERGY"), tmp_path) == [
        ["NVML, driver 535.104.05: energy counters on 0 of 2 device(s)", None, 50, 1]
    ]


def test_every_error_of_nvml_is_a_missing_reading(tmp_path: Path) -> None:
    script = f"""
{OPEN}
for error in (2, 3, 4, 6, 7, 10, 13, 15, 16, 999, 77):
    readings(energy_error_0=error, utilisation_error_0=error)
    say(meter.energy_mj(a), meter.utilisation(a), meter.energy_mj(b))
say(meter.energy_mj("GPU-never-seen"), meter.missing)
"""
    *during, after = said_by(script, shim(), tmp_path)
    assert during == [[None, None, 1_000]] * 11
    assert after == [None, 23]


def test_values_that_stand_for_no_reading_are_missing(tmp_path: Path) -> None:
    script = f"""
{OPEN}
for value in (2**63 - 17, 2**63 - 16, 9223372036854775794, 2**63 - 1, 2**64 - 1):
    readings(energy_0=value, utilisation_0=2**32 - 1)
    say(meter.energy_mj(a), meter.utilisation(a))
readings(utilisation_0=101)
say(meter.utilisation(a))
readings(utilisation_0=100, energy_1=0)
say(meter.utilisation(a), meter.energy_mj(b))
"""
    assert said_by(script, shim(), tmp_path) == [[2**63 - 17, None], *[[None, None]] * 4, [None], [100, 0]]


def test_a_counter_that_goes_back_is_missing_once_and_counts_on_from_there(tmp_path: Path) -> None:
    script = f"""
{OPEN}
for value in (800, 900, 20, 20, 45):
    readings(energy_0=value, energy_1=value + 10 ** 6)
    say(meter.energy_mj(a))
say(meter.missing)
"""
    assert said_by(script, shim(), tmp_path) == [[800], [900], [None], [20], [45], [1]]


def test_a_gpu_that_is_lost_takes_nothing_with_it(tmp_path: Path) -> None:
    script = f"""
{OPEN}
readings(lost_after=6)
say([meter.energy_mj(a) for _ in range(5)], meter.utilisation(b), meter.missing, meter.devices() == [a, b])
say(meter.describe())
"""
    assert said_by(script, shim(), tmp_path) == [
        [[1_000, 1_000, None, None, None], None, 4, True],
        ["NVML, driver 535.104.05: energy counters on 0 of 2 device(s)"],
    ]


def test_a_closed_meter_reads_nothing_and_can_be_opened_again(tmp_path: Path) -> None:
    script = f"""
{OPEN}
meter.close()
meter.close()
say(meter.energy_mj(a), meter.utilisation(b))
say(open_meter("nvml").energy_mj(a))
"""
    assert said_by(script, shim(), tmp_path) == [[None, None], [1_000]]


def test_a_gpu_that_cannot_be_opened_is_left_out_and_named(tmp_path: Path) -> None:
    script = "readings(handle_0=15)\nmeter = open_meter()\nsay(meter.describe(), meter.devices())"
    described = "NVML, driver 535.104.05: energy counters on 1 of 1 device(s); 1 more cannot be read"
    assert said_by(script, shim(), tmp_path) == [[described, [f"{GPU}1"]]]


_NOT_LOADED = "NVML does not start: Driver Not Loaded"


@pytest.mark.parametrize(
    ("readings", "reason"),
    [
        ("init=9", _NOT_LOADED),
        ("init=18", "NVML does not start: RM has detected an NVML/RM version mismatch."),
        ("count=0", "the NVIDIA driver shows no GPU that can be read"),
        ("uuid_0=15, uuid_1=999", "the NVIDIA driver shows no GPU that can be read; 2 more cannot be read"),
        (None, "the NVIDIA driver's library is not here"),
    ],
)
def test_without_nvml_the_gateway_starts_with_the_wall_clock_and_says_why(
    tmp_path: Path, readings: str | None, reason: str
) -> None:
    script = f"""
readings({readings or ""})
meter = open_meter()
say(meter.name, meter.describe(), meter.devices(), meter.energy_mj("{GPU}0"), meter.utilisation("{GPU}0"))
try:
    open_meter("nvml")
except Exception as error:
    say(type(error).__name__, error.exit_code, error.message, bool(error.remedy))
"""
    library = broken_library(tmp_path) if readings is None else shim()
    assert said_by(script, library, tmp_path) == [
        ["wall_clock", f"wall clock: {reason}", [], None, None],
        ["Unavailable", 3, reason, True],
    ]


def test_a_meter_is_chosen_by_name() -> None:
    meter = open_meter("wall_clock")
    meter.close()
    assert isinstance(meter, WallClockMeter)
    assert meter.name in METERS
    assert meter.describe() == "wall clock: as configured"
    with pytest.raises(UsageError):
        open_meter("dcgm")


Step = tuple[str, int, int | None]


@st.composite
def readings_of_jobs(draw: st.DrawFn, missing: bool) -> list[Step]:
    """(begin or end, key, counter) steps that leave no job running; the counter may be missing or go back."""
    steps: list[Step] = []
    counter, running = draw(st.integers(0, 10**12)), list[int]()
    keys = iter(range(draw(st.integers(0, 8))))
    key = next(keys, None)
    while key is not None or running:
        lowest = -5 if missing and counter >= 5 else 0
        counter += draw(st.integers(lowest, 50))
        reading = None if missing and draw(st.integers(0, 7)) == 0 else counter
        if key is not None and (not running or draw(st.booleans())):
            steps.append(("begin", key, reading))
            running.append(key)
            key = next(keys, None)
        else:
            steps.append(("end", running.pop(draw(st.integers(0, len(running) - 1))), reading))
    return steps


def play(ledger: EnergyLedger, steps: Sequence[Step]) -> dict[int, int | None]:
    shares = {}
    for what, key, reading in steps:
        if what == "begin":
            ledger.begin(key, reading)
        else:
            shares[key] = ledger.end(key, reading)
    return shares


@given(readings_of_jobs(missing=False))
def test_shares_and_idle_energy_add_up_to_the_counter(steps: list[Step]) -> None:
    ledger = EnergyLedger()
    shares = [share for share in play(ledger, steps).values() if share is not None]
    counter = [reading for _, _, reading in steps if reading is not None]
    assert len(shares) == len(steps) // 2
    assert sum(shares) + ledger.idle_mj == (counter[-1] - counter[0] if counter else 0)


@given(readings_of_jobs(missing=True))
def test_energy_is_an_equal_share_and_missing_where_any_reading_of_its_time_is(steps: list[Step]) -> None:
    expected: dict[int, Fraction | None] = {}
    running: list[int] = []
    last: int | None = None
    for what, key, reading in steps:
        for other in running:
            so_far = expected[other]
            if so_far is None or last is None or reading is None or reading < last:
                expected[other] = None
            else:
                expected[other] = so_far + Fraction(reading - last, len(running))
        last = reading
        if what == "begin":
            expected[key] = Fraction(0)
            running.append(key)
        else:
            running.remove(key)
    for key, share in play(EnergyLedger(), steps).items():
        ideal = expected[key]
        assert (share is None) == (ideal is None)
        assert share is None or ideal is None or abs(share - ideal) < len(steps) * 8


def test_remainders_go_to_the_job_that_began_last() -> None:
    steps = [("begin", key, 100) for key in (3, 1, 2)] + [("end", key, 111) for key in (3, 1, 2)]
    assert play(EnergyLedger(), steps) == {3: 3, 1: 3, 2: 5}


def _begin_twice(ledger: EnergyLedger) -> None:
    ledger.begin(1, 5)


def _end_unknown(ledger: EnergyLedger) -> None:
    ledger.end(2, 5)


@pytest.mark.parametrize("misuse", [_begin_twice, _end_unknown])
def test_a_job_begins_once_and_ends_once(misuse: Callable[[EnergyLedger], None]) -> None:
    ledger = EnergyLedger()
    ledger.begin(1, 0)
    with pytest.raises(RecordError):
        misuse(ledger)
    assert ledger.end(1, 7) == 7


def test_a_range_without_a_profiler_does_nothing_and_hides_no_error() -> None:
    with pytest.raises(KeyError), nvtx_range("attempt-1"), nvtx_range("attempt-2"):
        raise KeyError


def test_a_profiler_sees_the_ranges_of_jobs_that_run_at_once(tmp_path: Path) -> None:
    script = """
one, two = nvtx_range("attempt-1"), nvtx_range("attempt-2")
one.__enter__(), two.__enter__()
one.__exit__(None, None, None), two.__exit__(None, None, None)
"""
    said_by(script, shim(), tmp_path, traced=True)
    seen = [f"{what} render-platform attempt-{number}" for what in ("start", "end") for number in (1, 2)]
    assert (tmp_path / "ranges").read_text().splitlines() == seen


@dataclass
class Kernel:
    device_id: int
    start: int
    end: int
    kind: int = 10


class FakeCupti:
    """What `CuptiKernels` uses of cupti.cupti, with records that the test puts into its buffer."""

    class ActivityKind(enum.IntEnum):
        MEMCPY = 1
        CONCURRENT_KERNEL = 10

    class cuptiError(Exception):
        pass

    def __init__(self) -> None:
        self.buffer: list[Kernel] = []
        self.enabled: list[int] = []
        self.stamp_ns = self.lost = 0
        self.broken = False

    def activity_register_callbacks(self, requested: Callable[[], Any], completed: Callable[[list[Any]], None]) -> None:
        size, records = requested()
        assert size >= 1 << 20
        assert records == 0
        self._completed = completed

    def activity_enable(self, kind: int) -> None:
        self.enabled.append(kind)

    def activity_disable(self, kind: int) -> None:
        if self.broken:
            raise self.cuptiError
        self.enabled.remove(kind)

    def activity_flush_all(self, flag: int) -> None:
        if self.broken:
            raise self.cuptiError
        assert flag == 0
        buffer, self.buffer = self.buffer, []
        self._completed(buffer)

    def activity_get_num_dropped_records(self, context: int, stream_id: int, dropped: int) -> None:
        assert context == stream_id == 0
        ctypes.c_size_t.from_address(dropped).value, self.lost = self.lost, 0

    def get_timestamp(self) -> int:
        return self.stamp_ns


def test_kernels_are_spans_of_their_devices_in_the_time_of_our_clock() -> None:
    cupti, clock = FakeCupti(), ManualClock(2_000_000)
    cupti.stamp_ns = 500_000_000
    kernels = CuptiKernels(cupti, clock)
    assert cupti.enabled == [10]
    assert kernels.collect() == {}
    cupti.buffer = [Kernel(0, 500, 700), Kernel(1, 600, 900), Kernel(0, 600, 650), Kernel(0, 1, 2, kind=1)]
    at = 1_500_000_000
    assert kernels.collect() == {0: [(at + 500, at + 700), (at + 600, at + 650)], 1: [(at + 600, at + 900)]}
    assert kernels.collect() == {}
    kernels.close()
    assert (cupti.enabled, kernels.dropped) == ([], 0)


def _lose_in_buffers(cupti: FakeCupti) -> None:
    cupti.lost = 3


def _give_no_times(cupti: FakeCupti) -> None:
    cupti.buffer = [Kernel(0, 10, 0), Kernel(0, 0, 10), Kernel(0, 0, 0)]


def _give_too_many(cupti: FakeCupti) -> None:
    cupti.buffer = [Kernel(0, 10, 20)] * (meters.MOST_KERNELS + 3)


@pytest.mark.parametrize("fault", [_lose_in_buffers, _give_no_times, _give_too_many])
def test_lost_kernels_make_a_collection_missing_and_the_next_is_whole_again(fault: Callable[[FakeCupti], None]) -> None:
    cupti = FakeCupti()
    kernels = CuptiKernels(cupti, ManualClock(0))
    fault(cupti)
    assert kernels.collect() is None
    assert kernels.dropped == 3
    cupti.buffer = [Kernel(0, 30, 40)]
    assert kernels.collect() == {0: [(30, 40)]}


def test_an_error_of_cupti_makes_a_collection_missing() -> None:
    cupti = FakeCupti()
    kernels = CuptiKernels(cupti, ManualClock(0))
    cupti.broken = True
    assert kernels.collect() is None
    kernels.close()
    assert kernels.dropped == 2


def test_without_cupti_there_is_a_reason() -> None:
    opened = open_cupti(ManualClock(0))
    if isinstance(opened, CuptiKernels):
        opened.close()
        pytest.skip("ABSENCE OF CUPTI NOT TESTED: it works on this machine")
    assert opened.startswith("CUPTI")


def test_the_fake_has_the_names_of_the_real_module() -> None:
    real = pytest.importorskip("cupti.cupti", reason="NAMES OF CUPTI NOT CHECKED: cupti-python is not installed")
    for name in [name for name in vars(FakeCupti) if not name.startswith("_")]:
        assert hasattr(real, name), name
    assert FakeCupti.ActivityKind.__members__.items() <= real.ActivityKind.__members__.items()
    record = real.ActivityKernel13()
    assert all(hasattr(record, name) for name in Kernel.__dataclass_fields__)
