"""The engine: a job's way from its acceptance to its committed end. Everything here runs on one asyncio loop.

    submit ─▶ Accept ─▶ queue ─▶ Start ─▶ attempt ─┬─▶ Finish ─▶ told: client, watchers, fast path
                  └──── a slot is free ────▶       └─▶ backoff ─▶ front of the queue (retriable failures)

- Accept, Start and Finish are journalled (see `store`); what is between them is memory, and lost with the process.
- Every decision about a job is made here, on one thread, so that two of them never cross; `Finish` decides again in
  SQL, so that another process cannot cross either.
- A crash before Accept's commit: no answer, and no job. After it: the job runs at the next start; where it had begun,
  it runs again or fails visibly. After Finish's commit: the end stands, with its one usage event.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from render_platform.clock import US_PER_SECOND, Clock, Ids, random_below, uuid7
from render_platform.errors import PlatformError, RecordError
from render_platform.events import UsageEvent
from render_platform.gateway.backends import Attempt
from render_platform.gateway.catalogue import ModelSpec
from render_platform.gateway.fleet import Fleet, Server, never_ran, not_run
from render_platform.gateway.jobs import MAX_HELD_BYTES, Job, LiveJobs, Outcome, Request
from render_platform.gateway.limits import backoff_us
from render_platform.gateway.problems import Draining, NoBackend, QueueFull
from render_platform.gateway.scheduling import Queue
from render_platform.gateway.store import Accept, Finish, Operation, Start
from render_platform.gateway.writer import Submits, WriterEnded

BACKOFF_BASE_US, BACKOFF_CAP_US = 100_000, 10 * US_PER_SECOND
REMEMBERED = 10_000
"""Ended jobs that are kept in memory for those who watch; others are read from SQL."""
WRITE_AGAIN_S = 1.0
QueueKey = tuple[str, str | None]
"""A model, and the backend that was asked for."""
_log = structlog.get_logger()


class Engine:
    def __init__(
        self,
        fleet: Fleet,
        writer: Submits[Operation],
        clock: Clock,
        ids: Ids,
        *,
        now_ns: Callable[[], int],
        output_ttl_s: int,
        on_end: Callable[[Job, UsageEvent], None],
        may_run: Callable[[], bool] = lambda: True,  # whether its jobs are still its own
    ) -> None:
        self.fleet, self.clock, self.ids = fleet, clock, ids
        self._writer, self._now_ns, self._on_end, self._may_run = writer, now_ns, on_end, may_run
        self._output_ttl_us = output_ttl_s * US_PER_SECOND
        self._queues: defaultdict[QueueKey, Queue[uuid.UUID]] = defaultdict(Queue)
        self._accepting: defaultdict[QueueKey, int] = defaultdict(int)
        self._waiting_keys: dict[str, OrderedDict[QueueKey, None]] = {name: OrderedDict() for name in fleet.servers}
        self._timers: dict[uuid.UUID, asyncio.TimerHandle] = {}
        self._wakes: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.jobs = LiveJobs()
        self._ended: OrderedDict[uuid.UUID, Job] = OrderedDict()
        self.service_us: dict[str, int] = {}
        """A model's time a job, on a moving average: what an ETA is made of."""
        self.draining = False
        self.accepted = self.retried = 0

    # Accepting.
    async def submit(self, request: Request, request_id: uuid.UUID) -> tuple[Job | uuid.UUID, bool]:
        """Accept a request durably: the job, and whether it is new.

        Not new: the idempotency key stands for a job already, given as it is in memory, or by its id. Raises QueueFull,
        NoBackend, Draining, store.Conflict, and Unavailable where the database cannot be written: then nothing stands.
        """
        key = (request.model.name, request.backend)
        now_us = self.clock.now_us()
        self._admit(key, request.model, now_us)
        slot = None if self._queues[key] else self.fleet.take_slot(request.model, request.backend, now_us)
        job = self._job(request, request_id, now_us)
        self._accepting[key] += 1
        accept = Accept(job, running=slot is not None)
        try:
            standing = await self._writer.submit(accept, lambda result: self._abandoned(key, job, slot, result))
        except PlatformError:  # not accepted. A client that goes away is no error: the job goes on, see _abandoned
            self._give_up(key, slot)
            raise
        return self._accepted(key, job, slot, standing)

    def _admit(self, key: QueueKey, model: ModelSpec, now_us: int) -> None:
        if self.draining:
            raise Draining("the gateway is stopping", "try again in a few seconds")
        if len(self._queues[key]) + self._accepting[key] >= model.max_queue:
            raise QueueFull(f"{model.max_queue} jobs wait for {model.name}", "try again later")
        if self.jobs.held_bytes >= MAX_HELD_BYTES:
            raise QueueFull("the requests of waiting jobs fill the memory that they may have", "try again later")
        closed_us = self.fleet.retry_after_us(model, key[1], now_us)
        if closed_us is not None:
            raise NoBackend(model.name, -(-closed_us // US_PER_SECOND))

    def _job(self, request: Request, request_id: uuid.UUID, now_us: int) -> Job:
        ttl_s = min(request.ttl_s or request.model.ttl_s, request.model.ttl_s)
        return Job(
            job_id=uuid7(now_us, self.ids),
            request_id=request_id,
            request=request,
            request_digest=request.digest(),
            accepted_us=now_us,
            deadline_us=now_us + ttl_s * US_PER_SECOND,
            done=asyncio.get_running_loop().create_future() if request.direct else None,
        )

    def _accepted(
        self, key: QueueKey, job: Job, slot: tuple[Server, int] | None, standing: uuid.UUID | None
    ) -> tuple[Job | uuid.UUID, bool]:
        if standing is not None:
            self._give_up(key, slot)
            return self.find(standing) or standing, False
        self._accepting[key] -= 1
        self.accepted += 1
        self.jobs.hold(job)
        if slot is not None:
            job.attempt = 1
            self._spawn(self._work(job, *slot))
        else:
            self.enqueue(job)
        return job, True

    def _abandoned(self, key: QueueKey, job: Job, slot: tuple[Server, int] | None, result: Any) -> None:
        """The commit of a job whose client went away meanwhile has ended."""
        if isinstance(result, PlatformError):
            self._give_up(key, slot)
            return
        _, new = self._accepted(key, job, slot, result)
        if new and job.request.direct:
            self.cancel(job, "client_gone")

    def _give_up(self, key: QueueKey, slot: tuple[Server, int] | None) -> None:
        self._accepting[key] -= 1
        if slot is not None:
            self._forgo(*slot)

    def _forgo(self, server: Server, permit: int) -> None:
        """Give back a slot that no attempt has used."""
        server.breaker.abandoned(permit)
        self._release(server)

    # Waiting.
    def enqueue(self, job: Job, *, again: bool = False) -> None:
        """Let a job wait for a slot; `again`: it was begun before, and stands before all of its lane."""
        key = (job.model.name, job.request.backend)
        waiting = self._queues[key]
        (waiting.put_back if again else waiting.put)(job.job_id, job.customer_ref, job.request.lane)
        self.jobs.hold(job)
        job.state = "queued"
        left_s = (job.deadline_us - self.clock.now_us()) / US_PER_SECOND
        self._timers[job.job_id] = asyncio.get_running_loop().call_later(left_s, self._expire, job)
        job.tell("queued")
        servers = self.fleet.of(job.model, job.request.backend)
        for server in sorted(servers, key=lambda server: (server.spec.name == job.ran_on, server.load)):
            self._waiting_keys[server.spec.name][key] = None
            self._pump(server)

    def _pump(self, server: Server) -> None:
        """Give the server's free slots to waiting jobs, its models in turns."""
        keys = self._waiting_keys[server.spec.name]
        while keys and not self.draining and server.takes(self.clock.now_us()):
            key, _ = keys.popitem(last=False)
            if not self._queues[key]:
                continue
            permit = server.breaker.allow(self.clock.now_us())
            if permit is None:
                keys[key] = None
                return
            job_id = self._queues[key].take()
            keys[key] = None
            if job_id is not None:
                server.running += 1
                self._timers.pop(job_id).cancel()
                self.jobs[job_id].state = "starting"
                self._spawn(self._start(self.jobs[job_id], server, permit))
        open_us = 0 if self.draining or not keys else server.breaker.retry_after_us(self.clock.now_us())
        if open_us and server.spec.name not in self._wakes:  # nobody else looks again when it lets a probe through
            wake = asyncio.get_running_loop().call_later(open_us / US_PER_SECOND, self._wake, server)
            self._wakes[server.spec.name] = wake

    def _wake(self, server: Server) -> None:
        del self._wakes[server.spec.name]
        self._pump(server)

    async def _start(self, job: Job, server: Server, permit: int) -> None:
        """Journal that the next attempt begins, and begin it. The slot is kept while the database takes no write."""
        while True:
            try:
                begun = await self._writer.submit(Start(job, job.attempt + 1))
                break
            except WriterEnded:
                return
            except PlatformError as error:
                _log.error("job_not_started", job_id=str(job.job_id), error=str(error))
                await asyncio.sleep(WRITE_AGAIN_S)
        if begun:
            job.attempt += 1
            await self._work(job, server, permit)
        else:
            self._forgo(server, permit)
            self._end(job, not_run(job.cancelled_by, self._now_ns()), None)

    def _expire(self, job: Job) -> None:
        if self._queues[job.model.name, job.request.backend].cancel(job.job_id):
            del self._timers[job.job_id]
            job.cancelled_by = "expired"
            self._spawn(self.finish(job, not_run(job.cancelled_by, self._now_ns())))

    def get_queue_position(self, job: Job) -> int | None:
        """How many jobs of its lane are served before it; 0 is next; None: it does not wait."""
        return self._queues[job.model.name, job.request.backend].position(job.job_id)

    def eta_us(self, job: Job, position: int | None) -> int | None:
        """How long until it begins at that position of its queue, as far as the last jobs tell.

        None where none has run yet, or it does not wait.
        """
        service_us = self.service_us.get(job.model.name)
        if position is None or service_us is None:
            return None
        slots = sum(server.spec.capacity for server in self.fleet.of(job.model, job.request.backend))
        return (position + 1) * service_us // slots

    def waiting(self) -> dict[QueueKey, Queue[uuid.UUID]]:
        return {key: waiting for key, waiting in self._queues.items() if len(waiting)}

    async def _work(self, job: Job, server: Server, permit: int) -> None:
        now_us = self.clock.now_us()
        if not self._may_run():
            return
        if now_us >= job.deadline_us:
            job.cancelled_by = job.cancelled_by or "expired"
        if job.cancelled_by:
            job.state = "ending"
            self._forgo(server, permit)
            await self.finish(job, not_run(job.cancelled_by, self._now_ns()))
            return
        job.task, job.state, job.ran_on = asyncio.current_task(), "running", server.spec.name
        job.first_started_us = job.first_started_us or now_us
        job.tell("started", attempt=job.attempt, backend=server.spec.name)
        try:
            outcome, retriable = await server.run(
                self._attempt(job, server, now_us), permit, self.clock.now_us, lambda: bool(job.cancelled_by)
            )
        except asyncio.CancelledError:  # the process ends: the job stays as it is, for the next start
            raise
        except BaseException:  # a defect of ours: the job ends visibly, and the error goes on
            broken = never_ran("error", "internal_error", "the gateway failed", 500, self._now_ns())
            self._spawn(self.finish(job, broken))
            raise
        finally:
            self._release(server)
        if outcome.status == "cancelled":
            outcome.error_code = job.cancelled_by
        elif retriable and job.attempt < job.model.max_attempts and await self._backed_off(job):
            self.retried += 1
            self.enqueue(job, again=True)
            return
        elif retriable and job.cancelled_by:
            outcome.status, outcome.error_code = "cancelled", job.cancelled_by
        await self.finish(job, outcome)

    def _attempt(self, job: Job, server: Server, now_us: int) -> Attempt:
        return Attempt(
            attempt_id=f"{job.job_id.hex}-{job.attempt}",
            model=job.model,
            served_as=job.model.backends[server.spec.name],
            task=job.request.task,
            body=job.request.body,
            format=job.request.format,
            timeout_s=min((job.deadline_us - now_us) / US_PER_SECOND, server.spec.timeout_s),
            now_ns=self._now_ns,
            chunk=job.request.chunk,
            progress=lambda done, of: job.tell("progress", done=done, of=of),
            traceparent=job.request.traceparent,
        )

    async def _backed_off(self, job: Job) -> bool:
        """Wait before another attempt; False where none fits before the deadline, or the job was cancelled."""
        wait_us = backoff_us(job.attempt, lambda bound: random_below(self.ids, bound), BACKOFF_BASE_US, BACKOFF_CAP_US)
        if job.cancelled_by or self.clock.now_us() + wait_us >= job.deadline_us:
            return False
        job.state = "waiting"
        job.tell("retry", attempt=job.attempt, after_us=wait_us)
        try:
            await asyncio.sleep(wait_us / US_PER_SECOND)
        except asyncio.CancelledError:
            if not job.cancelled_by:
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
        return not job.cancelled_by

    def _release(self, server: Server) -> None:
        server.running -= 1
        self._pump(server)

    # Ending.
    def cancel(self, job: Job, code: str) -> bool:
        """End a job early, for the reason `code`; False where its end is being committed, or stands."""
        if job.cancelled_by or job.state not in ("queued", "starting", "running", "waiting"):
            return False
        job.cancelled_by = code
        if self._queues[job.model.name, job.request.backend].cancel(job.job_id):
            self._timers.pop(job.job_id).cancel()
            self._spawn(self.finish(job, not_run(job.cancelled_by, self._now_ns())))
        elif job.task is not None:
            job.task.cancel()
        return True

    async def finish(self, job: Job, outcome: Outcome) -> None:
        """Commit the job's end with its usage event, and tell whoever waits. Tried until the database takes it."""
        job.state = "ending"
        keep = not job.request.direct or job.request.idempotency_key is not None
        until_us = self.clock.now_us() + self._output_ttl_us if keep and outcome.body else None
        while True:
            try:
                event = await self._writer.submit(Finish(job, job.attempt, outcome, until_us))
                break
            except WriterEnded as error:  # the next start finds out how it ended; its client is told that nobody knows
                if job.done is not None and not job.done.done():
                    job.done.set_exception(error)
                return
            except PlatformError as error:
                _log.error("end_not_recorded", job_id=str(job.job_id), error=str(error))
                if isinstance(error, RecordError) and outcome.error_code != "usage_refused":
                    # what the backend said cannot be billed: say so, and bill nothing
                    outcome = never_ran("error", "usage_refused", error.message, 502, self._now_ns())
                    until_us = None
                else:
                    await asyncio.sleep(WRITE_AGAIN_S)
        self._end(job, outcome, event)

    def _end(self, job: Job, outcome: Outcome, event: UsageEvent | None) -> None:
        """Tell of an end that is committed; without an event it is another's, and `outcome` did not happen."""
        self.jobs.let_go(job)
        if event is None:
            outcome = never_ran("error", "superseded", "another process decided its end", 502, self._now_ns())
        job.state, job.outcome, job.task = outcome.status, outcome, None
        if not job.request.direct:
            job.outcome = replace(outcome, body=b"")
            self._remember(job)
        (self.handle_request_success if outcome.status == "success" else self.handle_request_failure)(job, outcome)
        if event is not None:
            self._on_end(job, event)
        if job.done is not None and not job.done.done():
            job.done.set_result(outcome)

    def handle_request_success(self, job: Job, outcome: Outcome) -> None:
        last_us = self.service_us.get(job.model.name, outcome.inference_time_us)
        self.service_us[job.model.name] = (7 * last_us + outcome.inference_time_us) // 8
        job.tell("complete", gpu_seconds=outcome.gpu_seconds, gpu_device=outcome.device)

    @staticmethod
    def handle_request_failure(job: Job, outcome: Outcome) -> None:
        job.tell("error", status=outcome.status, code=outcome.error_code, message=outcome.message)

    def _remember(self, job: Job) -> None:
        """For those who watch it now or come back soon: without what it was asked and what it answered."""
        job.request = replace(job.request, body=b"", chunk=None)
        self._ended[job.job_id] = job
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def find(self, job_id: uuid.UUID) -> Job | None:
        """A job in memory: not ended, or ended lately."""
        return self.jobs.get(job_id) or self._ended.get(job_id)

    # Tasks.
    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, seconds: float) -> None:
        """Accept and start nothing more; give running jobs time to end. What is left is recovered at the next start."""
        self.draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._tasks and loop.time() < until:  # jobs that were being accepted bring new ones
            await asyncio.wait(self._tasks, timeout=until - loop.time())
        for timer in (*self._timers.values(), *self._wakes.values()):
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
