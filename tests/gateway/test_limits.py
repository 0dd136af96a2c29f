"""Token buckets against exact fractions, a circuit breaker against a plain account of it, backoff within its bounds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError
from render_platform.gateway.limits import (
    MIN_OUTCOMES,
    OPEN_US,
    PROBES,
    WINDOW,
    Buckets,
    CircuitBreaker,
    TokenBucket,
    backoff_us,
)

START_US = 1_700_000_000_000_000
steps_us = st.one_of(st.integers(0, 50_000), st.integers(0, 20 * US_PER_SECOND), st.integers(-20 * US_PER_SECOND, -1))
rates = st.one_of(st.integers(1, 20), st.sampled_from([100, 999_983, 10_000_000]))
bursts = st.one_of(st.integers(1, 6), st.just(1_000))


class BucketMachine(RuleBasedStateMachine):
    """The model counts tokens as fractions, and sees time only where it goes forward."""

    @initialize(rate=rates, burst=bursts)
    def begin(self, rate: int, burst: int) -> None:
        self.bucket = TokenBucket(rate, burst)
        self.rate, self.burst = rate, burst
        self.tokens = Fraction(burst)
        self.now_us = START_US

    @rule(step_us=steps_us)
    def move(self, step_us: int) -> None:
        self.now_us += step_us
        self.tokens = min(Fraction(self.burst), self.tokens + Fraction(max(0, step_us) * self.rate, US_PER_SECOND))

    @rule(step_us=steps_us, tries=st.integers(1, 8))
    def move_and_take(self, step_us: int, tries: int) -> None:
        self.move(step_us)
        self.take(tries)

    def take(self, tries: int) -> None:
        for _ in range(tries):
            assert self.bucket.take(self.now_us) == (self.tokens >= 1)
            self.tokens -= self.tokens >= 1

    @rule(step_us=steps_us, rate=rates, burst=bursts)
    def change(self, step_us: int, rate: int, burst: int) -> None:
        """What came before came at the old rate."""
        self.move(step_us)
        missing = self.burst - self.tokens
        self.bucket.change(rate, burst, self.now_us)
        self.rate, self.burst = rate, burst
        self.tokens = max(Fraction(0), burst - missing)

    @rule()
    def wait_as_told(self) -> None:
        """A microsecond earlier there is none."""
        wait_us = self.bucket.wait_us(self.now_us)
        if wait_us:
            self.move(wait_us - 1)
            assert not self.bucket.take(self.now_us)
            self.move(1)
        self.take(1)

    @invariant()
    def agrees(self) -> None:
        assert self.bucket.remaining(self.now_us) == math.floor(self.tokens)
        short = max(Fraction(0), 1 - self.tokens)
        assert self.bucket.wait_us(self.now_us) == math.ceil(short * US_PER_SECOND / self.rate)
        full_us = self.bucket.full_at_us
        assert full_us == self.now_us + math.ceil((self.burst - self.tokens) * US_PER_SECOND / self.rate)
        assert self.bucket.limits == (self.rate, self.burst)


TestTokenBucket = BucketMachine.TestCase
TestTokenBucket.settings = settings(max_examples=150, stateful_step_count=40)


@settings(max_examples=60)
@given(rate=st.integers(1, 50), burst=st.integers(1, 20), steps=st.lists(st.integers(0, 300_000), max_size=60))
def test_no_stretch_of_time_sees_more_than_the_burst_and_the_rate(rate: int, burst: int, steps: list[int]) -> None:
    bucket = TokenBucket(rate, burst)
    times = [START_US + passed for passed in itertools.accumulate(steps)]
    taken = [us for us in times if bucket.take(us)]
    for first, last in itertools.combinations(range(len(taken)), 2):
        assert (last - first + 1 - burst) * US_PER_SECOND <= rate * (taken[last] - taken[first])


def test_a_clock_that_goes_back_an_hour_neither_gives_nor_holds_up() -> None:
    bucket = TokenBucket(1, 1)
    assert bucket.take(START_US)
    earlier = START_US - 3_600 * US_PER_SECOND
    assert not bucket.take(earlier)
    assert bucket.wait_us(earlier) == US_PER_SECOND
    assert bucket.take(earlier + US_PER_SECOND)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 5), (5, -1)])
def test_a_limit_of_nothing_is_refused(rate: int, burst: int) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        TokenBucket(rate, burst)
    bucket = TokenBucket(3, 4)
    with pytest.raises(UsageError, match="1 or more"):
        bucket.change(rate, burst, START_US)
    assert bucket.limits == (3, 4)
    buckets = Buckets()
    with pytest.raises(UsageError, match="1 or more"):
        buckets.bucket("a", START_US, rate, burst)
    assert len(buckets) == 0
    with pytest.raises(UsageError, match="at least one"):
        Buckets(most=0)


def takes(buckets: Buckets, customer: str, now_us: int, tries: int) -> int:
    return sum(buckets.bucket(customer, now_us).take(now_us) for _ in range(tries))


def test_each_customer_has_a_bucket_of_1000_and_100_a_second() -> None:
    buckets = Buckets()
    assert takes(buckets, "a", START_US, 1_100) == 1_000
    assert takes(buckets, "b", START_US, 10) == 10
    assert takes(buckets, "a", START_US + US_PER_SECOND, 200) == 100


def test_a_customers_own_limits_hold_from_the_call_that_names_them() -> None:
    buckets = Buckets()
    own = buckets.bucket("a", START_US, rate_per_s=1, burst=2)
    assert [own.take(START_US) for _ in range(3)] == [True, True, False]
    raised = buckets.bucket("a", START_US, rate_per_s=10, burst=5)
    assert raised.remaining(START_US) == 3, "two stay taken"
    assert buckets.bucket("b", START_US).remaining(START_US) == 1_000


@settings(max_examples=60)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 4), steps_us, st.sampled_from([(1, 2), (5, 5)])), max_size=80
    )
)
def test_what_is_forgotten_is_never_missed(calls: list[tuple[int, int, int, tuple[int, int]]]) -> None:
    """As if every bucket were kept: only full ones go while there is room."""
    buckets, kept = Buckets(), dict[int, TokenBucket]()
    now_us = START_US
    for customer, tries, step_us, limits in calls:
        now_us += max(0, step_us)
        bucket = buckets.bucket(str(customer), now_us, *limits)
        if customer not in kept:
            kept[customer] = TokenBucket(*limits)
        kept[customer].change(*limits, now_us)
        for _ in range(tries):
            assert bucket.take(now_us) == kept[customer].take(now_us)
        assert bucket.remaining(now_us) == kept[customer].remaining(now_us)
        assert len(buckets) <= len(kept)


def test_buckets_are_bounded_and_the_full_ones_go_first() -> None:
    buckets = Buckets(most=50)
    for number in range(50):
        takes(buckets, f"busy {number}", START_US, 1_000 if number % 2 else 0)
        buckets.bucket(f"busy {number}", START_US)
    for number in range(25):
        takes(buckets, f"new {number}", START_US, 1_000)
        assert len(buckets) <= 50
    assert all(takes(buckets, f"busy {n}", START_US, 1) == 0 for n in range(1, 50, 2)), "none that was empty went"


def test_where_none_is_full_the_one_that_is_soonest_goes() -> None:
    buckets = Buckets(most=3)
    for customer, tries in (("a", 900), ("b", 20), ("c", 500)):
        takes(buckets, customer, START_US, tries)
    takes(buckets, "b", START_US, 980)  # was the first to be full, and is the last now
    takes(buckets, "new", START_US, 1_000)
    assert len(buckets) == 3
    assert [takes(buckets, customer, START_US, 1_000) for customer in ("a", "b", "new")] == [100, 0, 0]


def test_customers_that_do_not_come_back_are_forgotten() -> None:
    buckets = Buckets()
    for number in range(10_000):
        takes(buckets, f"once {number}", START_US, 3)
    assert len(buckets) == 10_000
    later = START_US + 60 * US_PER_SECOND
    buckets.bucket("later 0", later)
    assert len(buckets) > 9_990, "a few at each call: no call takes long"
    for number in range(10_000):
        takes(buckets, f"later {number}", later + number * US_PER_SECOND, 3)
    assert len(buckets) <= 3


Call = tuple[int | None, int, int]
"""The permit, if there was one; the era in which it was given; the call's number."""


class BreakerMachine(RuleBasedStateMachine):
    """The model knows of each call in which era, or as which probe, it began."""

    calls = Bundle("calls")

    @initialize()
    def begin(self) -> None:
        self.breaker = CircuitBreaker()
        self.now_us = START_US
        self.era = 0
        self.opened_us: int | None = None
        self.outcomes: list[bool] = []
        self.streak = 0
        self.probe: int | None = None
        self.numbers = itertools.count()

    def expected(self) -> str:
        if self.opened_us is None:
            return "closed"
        return "half_open" if self.now_us >= self.opened_us + OPEN_US else "open"

    @rule(step_us=st.sampled_from([0, 1, US_PER_SECOND, OPEN_US - 1, OPEN_US]))
    def move(self, step_us: int) -> None:
        self.now_us += step_us

    @rule(target=calls)
    def allow(self) -> Call:
        return self.ask()

    def ask(self) -> Call:
        permit = self.breaker.allow(self.now_us)
        number = next(self.numbers)
        allowed = self.expected() == "closed" or (self.expected() == "half_open" and self.probe is None)
        assert (permit is not None) == allowed
        assert permit != 0
        if allowed and self.expected() == "half_open":
            self.probe = number
        return permit, self.era, number

    @rule(call=consumes(calls), outcome=st.sampled_from(["succeeded", "failed", "failed", "abandoned"]))
    def end(self, call: Call, outcome: str) -> None:
        self.finish(call, outcome)

    def finish(self, call: Call, outcome: str) -> None:
        permit, era, number = call
        if permit is None:
            return
        self.report(permit, outcome)
        if era != self.era:
            return
        if self.opened_us is None:
            self.note(outcome)
        elif number == self.probe:
            self.end_probe(outcome)

    @rule(count=st.integers(1, 60), outcome=st.sampled_from(["succeeded", "failed"]))
    def many(self, count: int, outcome: str) -> None:
        """One after the other, as long as they are allowed."""
        for _ in range(count):
            call = self.ask()
            if call[0] is None:
                return
            self.finish(call, outcome)

    def report(self, permit: int, outcome: str) -> None:
        if outcome == "abandoned":
            self.breaker.abandoned(permit)
        elif outcome == "failed":
            self.breaker.failed(permit, self.now_us)
        else:
            self.breaker.succeeded(permit, self.now_us)

    def note(self, outcome: str) -> None:
        if outcome == "abandoned":
            return
        self.outcomes.append(outcome == "succeeded")
        last = self.outcomes[-100:]
        if len(last) >= 10 and Fraction(last.count(False), len(last)) >= Fraction(1, 2):
            self.open()

    def open(self) -> None:
        self.opened_us, self.era, self.probe, self.streak = self.now_us, self.era + 1, None, 0

    def end_probe(self, outcome: str) -> None:
        self.probe = None
        if outcome == "failed":
            self.open()
        elif outcome == "succeeded":
            self.streak += 1
            if self.streak == 5:
                self.opened_us, self.era, self.outcomes = None, self.era + 1, []

    @invariant()
    def agrees(self) -> None:
        assert self.breaker.state(self.now_us) == self.expected()
        retry_us = self.breaker.retry_after_us(self.now_us)
        if self.expected() == "open":
            assert self.opened_us is not None
            assert retry_us == self.opened_us + 60_000_000 - self.now_us
        else:
            assert (retry_us > 0) == (self.probe is not None)


TestCircuitBreaker = BreakerMachine.TestCase
TestCircuitBreaker.settings = settings(max_examples=150, stateful_step_count=60)


def call(breaker: CircuitBreaker, success: bool, now_us: int = START_US) -> None:
    permit = breaker.allow(now_us)
    assert permit is not None
    (breaker.succeeded if success else breaker.failed)(permit, now_us)


def opened() -> tuple[CircuitBreaker, int]:
    """A breaker that is open, and a permit from before it was."""
    breaker = CircuitBreaker()
    early = breaker.allow(START_US)
    assert early is not None
    for _ in range(MIN_OUTCOMES):
        call(breaker, False)
    assert breaker.state(START_US) == "open"
    return breaker, early


@pytest.mark.parametrize("successes", [0, 10, WINDOW, 10 * WINDOW])
def test_it_opens_at_half_of_the_last_hundred(successes: int) -> None:
    breaker = CircuitBreaker()
    for _ in range(successes):
        call(breaker, True)
    failures = 0
    while breaker.state(START_US) == "closed":
        call(breaker, False)
        failures += 1
    assert failures == (10 if successes == 0 else min(successes, 50))


@pytest.mark.parametrize("later_us", [0, OPEN_US])
def test_a_late_outcome_neither_closes_nor_opens_it(later_us: int) -> None:
    breaker, early = opened()
    now_us = START_US + later_us
    state, retry_us = breaker.state(now_us), breaker.retry_after_us(now_us)
    for _ in range(2 * PROBES):
        breaker.succeeded(early, now_us)
        breaker.failed(early, now_us)
        breaker.abandoned(early)
    assert (breaker.state(now_us), breaker.retry_after_us(now_us)) == (state, retry_us)
    now_us = START_US + OPEN_US
    for _ in range(PROBES):
        call(breaker, True, now_us)
    for _ in range(WINDOW):
        breaker.failed(early, now_us)
    assert breaker.state(now_us) == "closed"


def test_a_late_outcome_does_not_free_the_place_of_the_probe() -> None:
    breaker, early = opened()
    now_us = START_US + OPEN_US
    probe = breaker.allow(now_us)
    assert probe is not None
    breaker.abandoned(early)
    breaker.succeeded(early, now_us)
    assert breaker.allow(now_us) is None
    breaker.abandoned(probe)
    assert breaker.allow(now_us) not in (None, probe)


def test_a_clock_that_goes_back_an_hour_does_not_keep_it_open_for_one() -> None:
    breaker, _ = opened()
    earlier = START_US - 3_600 * US_PER_SECOND
    assert breaker.retry_after_us(earlier) == OPEN_US
    assert breaker.state(earlier + OPEN_US) == "half_open"
    assert breaker.state(earlier) == "half_open", "once seen, it stays"


@given(st.integers(1, 10**9), st.integers(1, 10**7), st.integers(0, 10**9))
@example(64, 1, 2**63)
def test_backoff_is_any_time_up_to_a_ceiling_that_doubles(attempt: int, base_us: int, more_us: int) -> None:
    cap_us = base_us + more_us
    ceiling = cap_us if attempt > 64 else min(cap_us, base_us * 2 ** (attempt - 1))
    assert backoff_us(attempt, lambda n: n - 1, base_us, cap_us) == ceiling
    assert backoff_us(attempt, lambda n: 0, base_us, cap_us) == 0
    assert backoff_us(attempt, lambda n: n // 2, base_us, cap_us) == (ceiling + 1) // 2


@pytest.mark.parametrize(("attempt", "base_us", "cap_us"), [(0, 1, 1), (-1, 1, 1), (1, 0, 1), (1, 2, 1)])
def test_backoff_without_bounds_is_refused(attempt: int, base_us: int, cap_us: int) -> None:
    with pytest.raises(UsageError, match="no backoff"):
        backoff_us(attempt, lambda n: 0, base_us, cap_us)
