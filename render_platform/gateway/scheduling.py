"""The jobs that wait for one model: which one is next, and how many stand before one. In memory, for one thread.

- Lanes share the model by weights: high 8, normal 3, low 1. A take costs its lane 24 / weight ticks of virtual time,
  and the lane that is due first is served: of twelve takes, eight, three and one. A lane that begins to wait is due
  after one such cost: idleness saves nothing up, and what an idle lane leaves goes to the others. `low` is never
  starved: while it waits, it has one of any thirteen takes in a row.
- In a lane, customers take turns by rounds, each with at most one job a customer. A new job goes to the round after its
  customer's last waiting one, else to the first round, or to the second where the first has served that customer.
  Rounds are served in order, and the jobs of a round as they came. So a customer's first job waits for at most one job
  of each other customer, however many those have, and for jobs that were put back.
- A round exists while it holds jobs. A cancelled job leaves its customer's later jobs in their rounds.
- A job that is put back, to be tried again, comes before all rounds, after those put back earlier.

Costs: all operations take O(log n) steps to the base 64 (three for 100,000 jobs), `position` with a sum of at most 63
numbers in each; renumbering is amortised. Memory follows the jobs that wait, and the customers that the first round
has served.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Self, TypeVar

from render_platform.errors import UsageError

WEIGHTS = {"high": 8, "normal": 3, "low": 1}
LANES = tuple(WEIGHTS)
"""The order in which lanes are served that are due at once."""
_TICKS = math.lcm(*WEIGHTS.values())
_FAN = 64

JobId = TypeVar("JobId", bound=Hashable)


class Queue(Generic[JobId]):
    """Jobs by their id; an id waits at most once."""

    def __init__(self) -> None:
        self._lanes = {name: _Lane[JobId](_TICKS // weight) for name, weight in WEIGHTS.items()}
        self._jobs: dict[JobId, _Job[JobId]] = {}
        self._ticks = 0

    def put(self, job_id: JobId, customer: str, lane: str) -> None:
        """Let a job wait its turn. UsageError where the id waits already, or `lane` is none of LANES."""
        entered = self._enter(job_id, lane)
        self._jobs[job_id] = entered.add(job_id, customer, entered.next_round(customer))

    def put_back(self, job_id: JobId, customer: str, lane: str) -> None:
        """Let a job that was taken wait again, before all others of its lane that were not. Errors as in `put`."""
        entered = self._enter(job_id, lane)
        self._jobs[job_id] = entered.add(job_id, customer, entered.retried)

    def take(self) -> JobId | None:
        """The next job, which waits no more; None where none waits."""
        waiting = [lane for lane in self._lanes.values() if lane.size]
        if not waiting:
            return None
        lane = min(waiting, key=lambda lane: lane.due)
        self._ticks = lane.due
        lane.due += lane.cost
        job = lane.take()
        self._forget(job)
        return job.job_id

    def cancel(self, job_id: JobId) -> bool:
        """Whether the job waited; it does so no more."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        job.lane.remove(job)
        self._forget(job)
        return True

    def position(self, job_id: JobId) -> int | None:
        """How many jobs of its lane are served before it if no other comes; 0 is the next. None: it does not wait."""
        job = self._jobs.get(job_id)
        return None if job is None else job.lane.rounds.before(job.round) + job.round.jobs.before(job)

    def __len__(self) -> int:
        return len(self._jobs)

    def waiting(self, lane: str) -> int:
        """How many jobs wait in the lane. UsageError where it is none of LANES."""
        return self._lane(lane).size

    def jobs_of(self, customer: str) -> int:
        """How many jobs of the customer wait, in all lanes."""
        return sum(len(lane.customers.get(customer, ())) for lane in self._lanes.values())

    def _lane(self, name: str) -> _Lane[JobId]:
        try:
            return self._lanes[name]
        except KeyError:
            raise UsageError(f"{name!r} is not a lane", f"lanes are {', '.join(LANES)}") from None

    def _enter(self, job_id: JobId, name: str) -> _Lane[JobId]:
        """The lane of a job that comes; a lane that begins to wait is due after one cost."""
        lane = self._lane(name)
        if job_id in self._jobs:
            raise UsageError(f"the job {job_id} waits already", "put each job once")
        if not lane.size:
            lane.due = self._ticks + lane.cost
        return lane

    def _forget(self, job: _Job[JobId]) -> None:
        del self._jobs[job.job_id]
        if not self._jobs:
            self._jobs.clear()  # gives back the table, which deletions leave at its greatest size


class _Node:
    """A member of a _Line; `size` is what it counts for."""

    __slots__ = ("next", "previous", "size", "slot")

    def __init__(self, size: int) -> None:
        self.size = size
        self.slot = 0
        self.next: Self | None = None
        self.previous: Self | None = None


_Member = TypeVar("_Member", bound=_Node)


class _Line(Generic[_Member]):
    """Nodes in the order in which they came, and what stands before each.

    A linked list. Each node has a slot in a tree of sums, with _FAN slots below each sum; its slot stays when it goes,
    and all slots are given anew when more than half of them (and _FAN) are of nodes that went.
    """

    __slots__ = ("_first", "_last", "_length", "_sums")

    def __init__(self) -> None:
        self._first: _Member | None = None
        self._last: _Member | None = None
        self._length = 0
        self._sums: list[list[int]] = [[]]

    def __iter__(self) -> Iterator[_Member]:
        node = self._first
        while node is not None:
            yield node
            node = node.next

    def append(self, node: _Member) -> None:
        node.previous = self._last
        if self._last is None:
            self._first = node
        else:
            self._last.next = node
        self._last = node
        self._length += 1
        self._give_slot(node)

    def remove(self, node: _Member) -> None:
        if node.previous is None:
            self._first = node.next
        else:
            node.previous.next = node.next
        if node.next is None:
            self._last = node.previous
        else:
            node.next.previous = node.previous
        self._length -= 1
        self._count(node.slot, -node.size)
        if len(self._sums[0]) > 2 * self._length + _FAN:
            self._give_slots()

    def resize(self, node: _Member, change: int) -> None:
        node.size += change
        self._count(node.slot, change)

    def before(self, node: _Member) -> int:
        """The sizes of all nodes before this one, added up."""
        total, slot = 0, node.slot
        for level in self._sums:
            total += sum(level[slot - slot % _FAN : slot])
            slot //= _FAN
        return total

    def _count(self, slot: int, change: int) -> None:
        for level in self._sums:
            level[slot] += change
            slot //= _FAN

    def _give_slots(self) -> None:
        self._sums = [[]]
        for node in self:
            self._give_slot(node)

    def _give_slot(self, node: _Member) -> None:
        node.slot = slot = len(self._sums[0])
        for level in self._sums:
            if slot == len(level):
                level.append(0)
            slot //= _FAN
        top = self._sums[-1]
        if len(top) > _FAN:
            self._sums.append([sum(top[:_FAN]), sum(top[_FAN:])])
        self._count(node.slot, node.size)


class _Round(_Node, Generic[JobId]):
    """A round and its jobs; its size is their number."""

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        super().__init__(0)
        self.jobs: _Line[_Job[JobId]] = _Line()


class _Job(_Node, Generic[JobId]):
    __slots__ = ("customer", "job_id", "lane", "round")

    def __init__(self, job_id: JobId, customer: str, lane: _Lane[JobId], target: _Round[JobId]) -> None:
        super().__init__(1)
        self.job_id = job_id
        self.customer = customer
        self.lane = lane
        self.round = target


class _Lane(Generic[JobId]):
    """The rounds of one lane, after `retried`, which holds what was put back and stays when it is empty."""

    def __init__(self, cost: int) -> None:
        self.cost = cost
        self.due = 0
        self.size = 0
        self.rounds: _Line[_Round[JobId]] = _Line()
        self.retried = _Round[JobId]()
        self.rounds.append(self.retried)
        # Each customer's jobs, by their rounds. A dict would find the last one by passing all that were deleted.
        self.customers: dict[str, OrderedDict[_Job[JobId], None]] = {}
        self._served: set[str] = set()
        """Customers that the first round has served."""

    def next_round(self, customer: str) -> _Round[JobId]:
        """Where a new job of the customer goes. May be made here: add the job."""
        jobs = self.customers.get(customer)
        found = self._after(next(reversed(jobs)).round if jobs else self.retried)
        if found is self.retried.next and customer in self._served:
            return self._after(found)
        return found

    def _after(self, earlier: _Round[JobId]) -> _Round[JobId]:
        if earlier.next is not None:
            return earlier.next
        made = _Round[JobId]()
        self.rounds.append(made)
        return made

    def add(self, job_id: JobId, customer: str, target: _Round[JobId]) -> _Job[JobId]:
        job = _Job(job_id, customer, self, target)
        target.jobs.append(job)
        self.rounds.resize(target, 1)
        jobs = self.customers.setdefault(customer, OrderedDict())
        jobs[job] = None
        if target is self.retried:
            jobs.move_to_end(job, last=False)
        self.size += 1
        return job

    def take(self) -> _Job[JobId]:
        """The first job; of a lane that holds one."""
        serving = next(each for each in self.rounds if each.size)  # only `retried` may be empty
        job = next(iter(serving.jobs))
        self.remove(job)
        if serving.size and serving is not self.retried:
            self._served.add(job.customer)
        return job

    def remove(self, job: _Job[JobId]) -> None:
        left = job.round
        left.jobs.remove(job)
        self.rounds.resize(left, -1)
        if not left.size and left is not self.retried:
            if left is self.retried.next:
                self._served.clear()
            self.rounds.remove(left)
        jobs = self.customers[job.customer]
        del jobs[job]
        if not jobs:
            del self.customers[job.customer]
        self.size -= 1
        if not self.size:
            self.customers.clear()  # gives back the table, as in Queue
