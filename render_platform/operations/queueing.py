"""Waits in a queue, by the formulas of the textbooks: pure, in floats, in seconds.

Jobs arrive at random and independently (Poisson), and are served in that order by servers that are all alike, one job a
server. Each formula gives the mean wait before service. It is UNBOUNDED where the servers are given all they can do or
more: the queue grows for as long as that lasts. It is never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

UNBOUNDED = math.inf


@dataclass(frozen=True, slots=True)
class Load:
    """Jobs and the servers that they share: arrivals of all jobs (λ), the mean and the second moment of the time that
    one server is busy with one (E[S], E[S²]), and the number of servers (c), at least one."""

    arrivals_per_s: float
    service_s: float
    service_s2: float
    servers: int = 1

    @property
    def offered(self) -> float:
        """Servers that would be busy all of the time: λ·E[S], in erlangs."""
        return self.arrivals_per_s * self.service_s

    @property
    def utilisation(self) -> float:
        """ρ = λ·E[S] / c, the share of the time that a server is busy; 1 or more is more than they can do."""
        return self.offered / self.servers

    def at(self, utilisation: float) -> Load:
        """The same jobs on the same servers, arriving as often as makes that utilisation. `service_s` is not 0."""
        return replace(self, arrivals_per_s=utilisation * self.servers / self.service_s)


class Waits(NamedTuple):
    """Mean seconds before service, by each formula."""

    mm1_s: float
    mg1_s: float
    mmc_s: float
    mgc_s: float


def waits_of(load: Load) -> Waits:
    return Waits(mm1_wait_s(load), mg1_wait_s(load), mmc_wait_s(load), mgc_wait_s(load))


def mm1_wait_s(load: Load) -> float:
    """M/M/1: ρ·E[S] / (1 − ρ). A queue a server, each with an even share of the jobs; service times exponential."""
    return _stable(load, lambda: load.utilisation * load.service_s / (1 - load.utilisation))


def mg1_wait_s(load: Load) -> float:
    """M/G/1, Pollaczek and Khinchine: λ·E[S²] / 2(1 − ρ). A queue a server, each with an even share of the jobs;
    service times as they are."""
    arrivals_per_s = load.arrivals_per_s / load.servers
    return _stable(load, lambda: arrivals_per_s * load.service_s2 / (2 * (1 - load.utilisation)))


def mmc_wait_s(load: Load) -> float:
    """M/M/c: C(c, a)·E[S] / (c − a). One queue before all servers; service times exponential."""
    return _stable(load, lambda: erlang_c(load) * load.service_s / (load.servers - load.offered))


def mgc_wait_s(load: Load) -> float:
    """M/G/c, as Lee and Longton approximate it: the wait of M/M/c × E[S²] / 2E[S]². One queue before all servers;
    service times as they are. For one server it is Pollaczek and Khinchine's, for exponential times that of M/M/c."""
    if not load.service_s:
        return 0.0
    return _stable(load, lambda: mmc_wait_s(load) * load.service_s2 / (2 * load.service_s**2))


def erlang_c(load: Load) -> float:
    """C(c, a): the share of jobs that have to wait in M/M/c; 1 where ρ ≥ 1. By way of Erlang B, which never
    overflows."""
    if load.utilisation >= 1:
        return 1.0
    blocked = 1.0
    for servers in range(1, load.servers + 1):
        blocked = load.offered * blocked / (servers + load.offered * blocked)
    return blocked / (1 - load.utilisation * (1 - blocked))


def _stable(load: Load, wait_s: Callable[[], float]) -> float:
    return wait_s() if load.utilisation < 1 else UNBOUNDED
