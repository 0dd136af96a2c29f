"""What keeps one customer, or one failing backend, from holding up the others. In memory, for one thread.

- `TokenBucket`: so many requests a second, and so many at once. `Buckets`: one a customer.
- `CircuitBreaker`: leaves a backend alone that fails, and finds out with single calls whether it works again.
- `backoff_us`: how long to wait before a retry.

Times are integer microseconds, given by the caller. A clock that goes back is harmless: what it says is the new now; no
time has passed, and nobody waits longer than they were told.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Literal

from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError

RATE_PER_S = 100
BURST = 1_000
MAX_BUCKETS = 100_000

WINDOW = 100
"""The breaker looks at the last so many outcomes,"""
MIN_OUTCOMES = 10
"""once it has so many, and opens where half of them are failures."""
OPEN_US = 60 * US_PER_SECOND
PROBES = 5
"""So many successes in a row close the breaker again."""
PROBE_WAIT_US = US_PER_SECOND
"""When to ask again while the one probe is out: nobody knows how long it takes."""

_TOKEN = 1_000_000
"""Micro-tokens a token: at `rate_per_s`, a microsecond brings `rate_per_s` micro-tokens."""


class TokenBucket:
    """At most `burst` takes at once and `rate_per_s` a second after that. Full at first; exact.

    `sharing` gateways have a bucket each: in this one each take costs so many tokens. Together they give `rate_per_s` a
    second at most, and at once `burst`, or one each where that is more.
    """

    __slots__ = ("_burst", "_capacity", "_cost", "_rate_per_s", "_spent", "_us")

    def __init__(self, rate_per_s: int, burst: int, sharing: int = 1) -> None:
        """UsageError where one is less than 1."""
        self._spent = 0  # micro-tokens that the bucket is short of being full
        self._us = 0
        self._set(rate_per_s, burst, sharing)

    def change(self, rate_per_s: int, burst: int, now_us: int, sharing: int = 1) -> None:
        """Other limits from now on; what was taken stays taken, up to the new burst."""
        self._refill(now_us)
        self._set(rate_per_s, burst, sharing)

    def take(self, now_us: int) -> bool:
        """Whether there was a token; if so, it is taken."""
        self._refill(now_us)
        if self._spent + self._cost > self._capacity:
            return False
        self._spent += self._cost
        return True

    def remaining(self, now_us: int) -> int:
        """How many takes are left now."""
        self._refill(now_us)
        return (self._capacity - self._spent) // self._cost

    def wait_us(self, now_us: int) -> int:
        """Until there is a token, if nobody takes one; 0 where there is one."""
        self._refill(now_us)
        return _ceil(max(0, self._spent + self._cost - self._capacity), self._rate_per_s)

    @property
    def limits(self) -> tuple[int, int]:
        """Rate a second, and burst, of all that share."""
        return self._rate_per_s, self._burst

    @property
    def sharing(self) -> int:
        return self._cost // _TOKEN

    @property
    def full_at_us(self) -> int:
        """From when on it is full, and as good as a new one, if nobody takes a token."""
        return self._us + _ceil(self._spent, self._rate_per_s)

    def _set(self, rate_per_s: int, burst: int, sharing: int) -> None:
        if rate_per_s < 1 or burst < 1 or sharing < 1:
            raise UsageError(f"a limit of {rate_per_s} a second, {burst} at once", "set both to 1 or more")
        self._rate_per_s, self._burst, self._cost = rate_per_s, burst, sharing * _TOKEN
        self._capacity = max(burst * _TOKEN, self._cost)
        self._spent = min(self._spent, self._capacity)

    def _refill(self, now_us: int) -> None:
        self._spent = max(0, self._spent - max(0, now_us - self._us) * self._rate_per_s)
        self._us = now_us


class Buckets:
    """A bucket a customer, at most `most`.

    Full ones are forgotten, sooner or later: a new one is as good. Where there is no more room, and none is full, the
    one that is full soonest goes: its customer gets the rest of its burst back.
    """

    def __init__(self, most: int = MAX_BUCKETS) -> None:
        if most < 1:
            raise UsageError(f"room for {most} buckets", "make room for at least one")
        self._most = most
        self.sharing = 1
        """How many gateways have a bucket for each customer."""
        self._buckets: dict[str, TokenBucket] = {}
        self._by_fullness: list[tuple[int, str]] = []
        """A heap with one item a bucket: when it was full, when last looked at. Takes have made that later since."""

    def __len__(self) -> int:
        return len(self._buckets)

    def bucket(self, customer: str, now_us: int, rate_per_s: int = RATE_PER_S, burst: int = BURST) -> TokenBucket:
        """The customer's bucket, under these limits from now on. Use it at once: it may be forgotten at the next call.

        UsageError where a limit is less than 1. Takes O(log n) steps, amortised over the tokens taken.
        """
        self._forget(now_us, self._most if customer in self._buckets else self._most - 1)
        found = self._buckets.get(customer)
        if found is None:
            found = self._buckets[customer] = TokenBucket(rate_per_s, burst, self.sharing)
            heapq.heappush(self._by_fullness, (now_us, customer))
        elif found.limits != (rate_per_s, burst) or found.sharing != self.sharing:
            found.change(rate_per_s, burst, now_us, self.sharing)
        return found

    def _forget(self, now_us: int, room: int) -> None:
        """Look at two buckets that may be full, and at more while there are more than `room`; forget the full ones.

        Two at each call, so that the number goes down to those in use, without a long pause.
        """
        looks = 0
        while self._by_fullness:
            noted_us, customer = self._by_fullness[0]
            if len(self._buckets) <= room and (looks == 2 or noted_us > now_us):
                return
            looks += 1
            full_at_us = self._buckets[customer].full_at_us
            if full_at_us > noted_us:
                heapq.heapreplace(self._by_fullness, (full_at_us, customer))
            else:
                heapq.heappop(self._by_fullness)
                del self._buckets[customer]


State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Closed: calls pass. Open: none does, for OPEN_US. Half open: one at a time does, until PROBES in a row succeed.

    Closed, it opens when half or more of the last WINDOW outcomes are failures, of MIN_OUTCOMES at least. Half open,
    it opens again at one failure. Each call needs a permit, and hands it back once, with its outcome. A permit is void
    once the breaker has opened or closed: how a call ends that began before says nothing about the backend now.
    """

    def __init__(self) -> None:
        self._state: State = "closed"
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._opened_us = 0
        self._successes = 0
        self._probing = False
        self._permit = 1  # what counts now; closed, all calls share one, half open, each probe has its own

    def state(self, now_us: int) -> State:
        if self._state == "open":
            self._opened_us = min(self._opened_us, now_us)
            if now_us - self._opened_us >= OPEN_US:
                self._state = "half_open"
        return self._state

    def allow(self, now_us: int) -> int | None:
        """A permit for one call, never 0; None where it must not be made. Half open, the call is the probe."""
        state = self.state(now_us)
        if state == "open" or self._probing:
            return None
        self._probing = state == "half_open"
        return self._permit

    def retry_after_us(self, now_us: int) -> int:
        """When to ask again; 0 where a call is allowed now."""
        if self.state(now_us) == "open":
            return self._opened_us + OPEN_US - now_us
        return PROBE_WAIT_US if self._probing else 0

    def succeeded(self, permit: int, now_us: int) -> None:
        if permit != self._permit:
            return
        if self._state == "closed":
            self._note(True, now_us)
            return
        self._renew()
        self._successes += 1
        if self._successes == PROBES:
            self._state = "closed"
            self._outcomes.clear()

    def failed(self, permit: int, now_us: int) -> None:
        if permit != self._permit:
            return
        if self._state == "closed":
            self._note(False, now_us)
        else:
            self._open(now_us)

    def abandoned(self, permit: int) -> None:
        """The call was cancelled, or never made: neither success nor failure. Another probe may take its place."""
        if permit == self._permit and self._state != "closed":
            self._renew()

    def _note(self, success: bool, now_us: int) -> None:
        self._outcomes.append(success)
        known = len(self._outcomes)
        if known >= MIN_OUTCOMES and 2 * self._outcomes.count(False) >= known:
            self._open(now_us)

    def _open(self, now_us: int) -> None:
        self._renew()
        self._state = "open"
        self._opened_us = now_us
        self._successes = 0

    def _renew(self) -> None:
        """No permit that is out counts any more, and no probe is out."""
        self._permit += 1
        self._probing = False


def backoff_us(attempt: int, random: Callable[[int], int], base_us: int, cap_us: int) -> int:
    """How long to wait after the `attempt`-th try (1 is the first) failed: exponential, with full jitter.

    Any whole number from 0 to min(cap_us, base_us * 2 ** (attempt - 1)), each as likely; `random(n)` gives one of
    0 … n - 1. UsageError where attempt or base_us is less than 1, or cap_us less than base_us.
    """
    if attempt < 1 or not 1 <= base_us <= cap_us:
        raise UsageError(
            f"no backoff for try {attempt} from {base_us} µs to {cap_us} µs",
            "count tries from 1, and base from 1 to cap",
        )
    doublings = min(attempt - 1, cap_us.bit_length())  # more would pass any cap, and may be a very long number
    return random(min(cap_us, base_us << doublings) + 1)


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
