"""The queue against a model that scans lists; shares, fairness, and costs that do not grow with the queue."""

from __future__ import annotations

import itertools
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from render_platform.errors import UsageError
from render_platform.gateway.scheduling import LANES, Queue

SHARES = {"high": 8, "normal": 3, "low": 1}
CUSTOMERS = "abc"
lanes = st.sampled_from(["normal", "normal", "normal", *LANES])


class LaneModel:
    """Rounds as lists of (job, customer)."""

    def __init__(self) -> None:
        self.retried: list[tuple[int, str]] = []
        self.rounds: list[list[tuple[int, str]]] = []
        self.served: set[str] = set()
        self.due = Fraction(0)

    def order(self) -> list[tuple[int, str]]:
        return [*self.retried, *itertools.chain(*self.rounds)]

    def put(self, job: int, customer: str) -> None:
        holding = [n for n, one in enumerate(self.rounds) for _, other in one if other == customer]
        number = max(holding, default=-1) + 1
        if number == 0 and customer in self.served:
            number = 1
        if number == len(self.rounds):
            self.rounds.append([])
        self.rounds[number].append((job, customer))

    def remove(self, item: tuple[int, str]) -> None:
        if item in self.retried:
            self.retried.remove(item)
            return
        number = next(n for n, one in enumerate(self.rounds) if item in one)
        self.rounds[number].remove(item)
        if not self.rounds[number]:
            del self.rounds[number]
            self.served = self.served if number else set()

    def take(self) -> int:
        item = self.order()[0]
        first = not self.retried and self.rounds[0]
        self.remove(item)
        if first:
            self.served.add(item[1])
        return item[0]


class QueueMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.queue: Queue[int] = Queue()
        self.lanes = {lane: LaneModel() for lane in LANES}
        self.now = Fraction(0)
        self.numbers = itertools.count()
        self.taken: list[tuple[int, tuple[str, str]]] = []

    def waiting(self) -> dict[int, tuple[str, str]]:
        return {job: (customer, lane) for lane in LANES for job, customer in self.lanes[lane].order()}

    def enter(self, lane: str) -> LaneModel:
        model = self.lanes[lane]
        if not model.order():
            model.due = self.now + Fraction(1, SHARES[lane])
        return model

    @rule(customer=st.sampled_from(CUSTOMERS), lane=lanes, count=st.integers(1, 3))
    def put(self, customer: str, lane: str, count: int) -> None:
        for job in itertools.islice(self.numbers, count):
            self.queue.put(job, customer, lane)
            self.enter(lane).put(job, customer)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        job, (customer, lane) = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.queue.put_back(job, customer, lane)
        self.enter(lane).retried.append((job, customer))

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        for _ in range(count):
            assert self.queue.take() == self.expect()

    def expect(self) -> int | None:
        jobs = self.waiting()
        due = [(model.due, LANES.index(lane), lane) for lane, model in self.lanes.items() if model.order()]
        if not due:
            return None
        self.now, _, lane = min(due)
        model = self.lanes[lane]
        model.due += Fraction(1, SHARES[lane])
        job = model.take()
        self.taken.append((job, jobs[job]))
        return job

    @precondition(lambda self: len(self.waiting()) > 20)
    @rule()
    def take_all(self) -> None:
        """What positions promise comes true."""
        promised = {job: (lane, self.queue.position(job)) for job, (_, lane) in self.waiting().items()}
        served = Counter[str]()
        while (job := self.queue.take()) is not None:
            assert job == self.expect()
            lane, position = promised[job]
            assert position == served[lane]
            served[lane] += 1

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        jobs = self.waiting()
        job = data.draw(st.sampled_from(sorted(jobs)))
        customer, lane = jobs[job]
        assert self.queue.cancel(job)
        self.lanes[lane].remove((job, customer))
        assert self.queue.position(job) is None
        assert not self.queue.cancel(job)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), lane=st.sampled_from([*LANES, "urgent"]), again=st.booleans())
    def refuse(self, data: st.DataObject, lane: str, again: bool) -> None:
        job = data.draw(st.sampled_from(sorted(self.waiting())))
        with pytest.raises(UsageError):
            (self.queue.put_back if again else self.queue.put)(job, "a new customer", lane)

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.waiting())
        by_customer = Counter(customer for customer, _ in self.waiting().values())
        for customer in [*CUSTOMERS, "a new customer"]:
            assert self.queue.jobs_of(customer) == by_customer[customer]
        for lane, model in self.lanes.items():
            assert self.queue.waiting(lane) == len(model.order())
            positions = [self.queue.position(job) for job, _ in model.order()]
            assert positions == list(range(len(positions)))


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=60)


def test_a_lane_is_one_of_three() -> None:
    queue: Queue[int] = Queue()
    for call in (lambda: queue.put(1, "a", "urgent"), lambda: queue.put_back(1, "a", ""), lambda: queue.waiting("")):
        with pytest.raises(UsageError, match="high, normal, low"):
            call()
    assert len(queue) == 0


@pytest.mark.parametrize("lanes", [lanes for n in (1, 2, 3) for lanes in itertools.combinations(LANES, n)])
def test_lanes_that_wait_share_by_their_weights_whichever_they_are(lanes: tuple[str, ...]) -> None:
    queue: Queue[tuple[str, int]] = Queue()
    for lane, number in itertools.product(lanes, range(200)):
        queue.put((lane, number), "a", lane)
    cycle = sum(SHARES[lane] for lane in lanes)
    for _ in range(10):
        taken = Counter(lane for lane, _ in itertools.islice(iter(queue.take, None), cycle))
        assert taken == {lane: SHARES[lane] for lane in lanes}


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["high", "normal", "low", "take"]), st.integers(1, 12)), max_size=60))
def test_low_has_one_of_any_thirteen_takes_while_it_waits(steps: list[tuple[str, int]]) -> None:
    queue: Queue[tuple[str, int]] = Queue()
    numbers = itertools.count()
    passed_over = 0
    for what, count in [*steps, ("high", 40), ("normal", 40), ("take", 40)]:
        for number in itertools.islice(numbers, count):
            if what != "take":
                queue.put((what, number), "a", what)
                continue
            low_waits = queue.waiting("low") > 0
            job = queue.take()
            passed_over = passed_over + 1 if low_waits and job and job[0] != "low" else 0
            assert passed_over <= 12


def test_a_job_of_a_higher_lane_passes_a_backlog_of_lower_ones() -> None:
    """However long the backlog has been served, and however long `high` has been idle: nothing is saved up or owed."""
    queue: Queue[object] = Queue()
    for number in range(1_000):
        queue.put(number, "a", "low")
        queue.put(-1 - number, "a", "normal")
    for taken in range(500):
        queue.put("urgent", "b", "high")
        assert "urgent" in [queue.take() for _ in range(2)], f"after {taken}"
    for number in range(20):
        queue.put(("high", number), "b", "high")
    assert sum(isinstance(queue.take(), int) for _ in range(12)) >= 3, "idleness is no credit"


@settings(max_examples=50)
@given(
    backlogs=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    served=st.integers(0, 40),
    cancelled=st.lists(st.integers(0, 240), max_size=30),
)
def test_a_first_job_waits_for_at_most_one_of_each_other_customer(
    backlogs: list[int], served: int, cancelled: list[int]
) -> None:
    queue: Queue[object] = Queue()
    jobs = [(f"c{n}", number) for n, backlog in enumerate(backlogs) for number in range(backlog)]
    for job in jobs:
        queue.put(job, job[0], "normal")
    for _ in range(served):
        queue.take()
    for number in cancelled:
        queue.cancel(jobs[number % len(jobs)])
    queue.put("first", "newcomer", "normal")
    others = sum(queue.jobs_of(f"c{n}") > 0 for n in range(len(backlogs)))
    position = queue.position("first")
    assert position is not None
    assert position <= others
    before = [job[0] for job in (queue.take() for _ in range(position)) if isinstance(job, tuple)]
    assert len(set(before)) == len(before) == position, "one of each"
    assert queue.take() == "first"


@settings(max_examples=50)
@given(first=st.lists(st.integers(0, 3), min_size=40, max_size=40), head_start=st.integers(0, 30))
def test_customers_that_always_wait_are_served_alike(first: list[int], head_start: int) -> None:
    """From the moment when all of them wait, in the middle of a round, whoever came first with however many jobs."""
    queue: Queue[tuple[int, int]] = Queue()
    for number, customer in enumerate(first):
        queue.put((customer, number), str(customer), "normal")
    for _ in range(head_start):
        queue.take()
    for customer, number in itertools.product(range(4), range(100, 140)):
        queue.put((customer, number), str(customer), "normal")
    counts = Counter[int]()
    for job in itertools.islice(iter(queue.take, None), 120):
        counts[job[0]] += 1
        assert max(counts.values()) - min(counts[customer] for customer in range(4)) <= 2


def test_ten_thousand_jobs_of_one_customer_delay_anothers_by_one() -> None:
    queue: Queue[object] = Queue()
    for number in range(10_000):
        queue.put(number, "busy", "normal")
    assert [queue.take() for _ in range(5)] == list(range(5))
    queue.put("x", "quiet", "normal")
    queue.put("y", "quiet", "normal")
    assert [queue.position(job) for job in ("x", "y", 9_999)] == [1, 3, 9_996]
    assert [queue.take() for _ in range(5)] == [5, "x", 6, "y", 7]


def test_cancelling_ones_own_backlog_leaves_no_debt() -> None:
    queue: Queue[object] = Queue()
    for number in range(100):
        queue.put(number, "a", "normal")
        queue.put(str(number), "b", "normal")
    for number in reversed(range(1, 100)):
        queue.cancel(number)
    queue.put("again", "a", "normal")
    assert [queue.take() for _ in range(4)] == [0, "0", "1", "again"]


def test_a_customer_that_the_round_has_served_waits_for_the_next_whatever_is_cancelled() -> None:
    queue: Queue[str] = Queue()
    for job in ("a1", "a2", "b1"):
        queue.put(job, job[0], "normal")
    assert queue.take() == "a1"
    assert queue.cancel("a2")
    for job in ("a3", "c1"):
        queue.put(job, job[0], "normal")
    assert [queue.take() for _ in range(3)] == ["b1", "c1", "a3"]


def test_a_job_that_is_put_back_moves_no_other_of_its_customer() -> None:
    queue: Queue[str] = Queue()
    for job in ("a1", "a2", "b1", "b2"):
        queue.put(job, job[0], "normal")
    assert queue.take() == "a1"
    queue.put_back("a1", "a", "normal")
    queue.put("a3", "a", "normal")
    queue.put("c1", "c", "normal")
    assert [queue.take() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def fill(queue: Queue[int], count: int, customers: int) -> None:
    for number in range(count):
        queue.put(number, str(number % customers), "normal")


@contextmanager
def bytes_kept_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("customers", [1, 100, 5_000])
@pytest.mark.parametrize("empty", ["take", "cancel", "cancel backwards"])
def test_a_queue_that_was_emptied_keeps_nothing(customers: int, empty: str) -> None:
    with bytes_kept_below(10_000):
        queue: Queue[int] = Queue()
        fill(queue, 5_000, customers)
        for number in range(5_000):
            if empty == "take":
                queue.take()
            else:
                queue.cancel(number if empty == "cancel" else 4_999 - number)
        assert len(queue) == 0


@pytest.mark.parametrize("staying", ["normal", "low"])
@pytest.mark.parametrize("customers", [1, 7, 20_000])
def test_a_queue_that_is_never_empty_does_not_grow(customers: int, staying: str) -> None:
    with bytes_kept_below(30_000):
        queue: Queue[int] = Queue()
        queue.put(-1, "stays", staying)
        for number in range(20_000):
            queue.put(number, str(number % customers), "normal")
            assert queue.cancel(number)
        assert len(queue) == 1


def opcodes(action: Callable[[], object]) -> int:
    """How many instructions of Python the action takes, in all functions that it calls."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("customers_of", [lambda n: 1, lambda n: 50, lambda n: n], ids=["one", "fifty", "each its own"])
def test_no_operation_scans_the_queue(customers_of: Callable[[int], int]) -> None:
    """A hundred times as many jobs: at most twice the instructions."""

    def add(how: Callable[[int, str, str], None], numbers: range) -> None:
        for number in numbers:
            how(number, "0", "normal")

    def costs(count: int) -> dict[str, int]:
        queue: Queue[int] = Queue()
        fill(queue, count, customers_of(count))
        middle = range(count // 2, count // 2 + 20)
        return {
            "position": opcodes(lambda: [queue.position(number) for number in (*middle, count - 1)]),
            "cancel": opcodes(lambda: [queue.cancel(number) for number in middle]),
            "put": opcodes(lambda: add(queue.put, range(-20, 0))),
            "put_back": opcodes(lambda: add(queue.put_back, middle)),
            "take": opcodes(lambda: [queue.take() for _ in range(40)]),
            "counts": opcodes(lambda: (len(queue), queue.waiting("normal"), queue.jobs_of("0"))),
        }

    few, many = costs(1_000), costs(100_000)
    assert {name: (few[name], many[name]) for name in few if many[name] > 2 * few[name]} == {}


@pytest.mark.parametrize("customers", [1, 50, 5_000])
@pytest.mark.parametrize("how", ["take", "cancel"])
def test_emptying_costs_so_much_a_job(customers: int, how: str, rng: random.Random) -> None:
    """Renumbering included."""

    def cost(count: int) -> float:
        queue: Queue[int] = Queue()
        fill(queue, count, customers)
        order = rng.sample(range(count), count)
        return opcodes(lambda: [queue.take() if how == "take" else queue.cancel(n) for n in order]) / count

    assert cost(5_000) < 2 * cost(500)
