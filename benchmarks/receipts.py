"""How long a customer waits for a receipt: everything as `render-platform up` starts it, default settings, under load.

    python -m benchmarks.receipts                   six minutes of 50 jobs/s, 450 of them watched
    python -m benchmarks.receipts --write           and put the table into docs/benchmarks.md

Jobs come at a fixed rate, however fast they are answered (an open loop), through POST /queue, to the built-in simulated
backends. A watched job is one of another customer's. From the `complete` event of its stream, which is sent after the
commit of its end, its receipt is asked for every second until it is there. Each receipt is verified with the log's key,
and must be that job's and that customer's. Six minutes hold at least one reconciliation, which takes turns with
flushes. Exit codes: 0 measured, 1 a finding (a job without a proven receipt).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec

from benchmarks.machine import CHECKOUT, TOOL_S, describe_machine, own_version
from benchmarks.processes import Server, clean_environment, free_port, run_tool, running
from benchmarks.report import bullets, replace_section, right_table
from render_platform.clock import US_PER_SECOND, SystemClock, iso
from render_platform.errors import Finding, PlatformError, Unavailable
from render_platform.receipt_verifier import InvalidReceipt, verify_receipt

BEGIN, END = "<!-- receipts -->", "<!-- /receipts -->"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
PROGRAM = str(Path(sys.executable).with_name("render-platform"))
PACKAGES = ("dagster", "litestar", "uvicorn", "sqlalchemy", "pyarrow", "chdb", "aiohttp")
AIM_S = 60
READY_S = 180
GIVE_UP_S = 300
POLL_S = 1.0
SHARES = ("first", "second", "last")
MESSAGES = [{"role": "user", "content": "Say something short about foxes and dogs."}]
JOB = {"model": "llama-8b", "task": "chat", "input": {"messages": MESSAGES, "max_tokens": 16}}
LOAD, WATCHED = "load", "watched"
COUNTED = ("accepted", "finished", "events")
RUNS = (
    '{runsOrError(filter:{pipelineName:"flush"},limit:500)'
    "{... on Runs{results{status creationTime startTime endTime}}}}"
)


class Plan(msgspec.Struct, frozen=True):
    """`rate` jobs a second for `seconds`; one in `one_in` is watched."""

    rate: int
    seconds: int
    one_in: int


class Sample(msgspec.Struct, frozen=True):
    """A watched job: when it ended after the load's begin, and how long its receipt took; `failure` where it has none.

    `tree_size` is that of its receipt's checkpoint: as many sizes, as many publications were seen.
    """

    job_id: str
    ended_ms: int = 0
    waited_ms: int = 0
    tree_size: int = 0
    failure: str = ""


class Flush(msgspec.Struct, frozen=True):
    """A run of Dagster's flush job that succeeded: when it was launched, how long until its start and until its end."""

    launched_ms: int
    starting_ms: int
    whole_ms: int


class Report(msgspec.Struct, frozen=True):
    """`answers` counts the answers to the load's own jobs, by status (0: no answer)."""

    measured_at: str
    plan: Plan
    machine: dict[str, str]
    versions: dict[str, str]
    answers: dict[int, int]
    counts: dict[str, Any]
    samples: list[Sample]
    flushes: list[Flush]
    failed_flushes: int


class Watch:
    """Asks a running gateway as two customers, by their keys; times are of this process's monotonic clock."""

    def __init__(self, url: str, keys: dict[str, str], plan: Plan) -> None:
        self._url, self._plan = url, plan
        self._headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        self._begun = 0.0
        self.answers: Counter[int] = Counter()
        self.receipts: dict[str, str] = {}
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """The whole load; returns when every watched job has its receipt, or none in time."""
        timeout = aiohttp.ClientTimeout(total=GIVE_UP_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            self._begun = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for number in range(self._plan.rate * self._plan.seconds):
                    await asyncio.sleep(self._begun + number / self._plan.rate - time.monotonic())
                    send = self._watch if number % self._plan.one_in == 0 else self._send
                    tasks.create_task(send(session))

    async def _send(self, session: aiohttp.ClientSession) -> None:
        try:
            async with session.post(f"{self._url}/queue", json=JOB, headers=self._headers[LOAD]) as answer:
                await answer.read()
                self.answers[answer.status] += 1
        except (aiohttp.ClientError, TimeoutError):
            self.answers[0] += 1

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        job_id = ""
        try:
            headers = self._headers[WATCHED]
            async with session.post(f"{self._url}/queue", json=JOB, headers=headers) as answer:
                said = await answer.read()
                if answer.status != 202:
                    raise Finding(f"a watched job was answered {answer.status}")
                job_id = str(json.loads(said)["id"])
            await self._wait_for_end(session, job_id)
            ended = time.monotonic()
            self.receipts[job_id] = await self._wait_for_receipt(session, job_id, ended + GIVE_UP_S)
            waited = time.monotonic() - ended
            self.samples.append(Sample(job_id, _ms(ended - self._begun), _ms(waited)))
        except (aiohttp.ClientError, TimeoutError, Finding) as error:
            self.samples.append(Sample(job_id, failure=f"{type(error).__name__}: {error}"))

    async def _wait_for_end(self, session: aiohttp.ClientSession, job_id: str) -> None:
        async with session.get(f"{self._url}/jobs/{job_id}/events", headers=self._headers[WATCHED]) as stream:
            async for line in stream.content:
                if line.strip() == b"event: complete":
                    return
        raise Finding("the job's events ended without its completion")

    async def _wait_for_receipt(self, session: aiohttp.ClientSession, job_id: str, until: float) -> str:
        status = 0
        while time.monotonic() < until:
            async with session.get(f"{self._url}/jobs/{job_id}/receipt", headers=self._headers[WATCHED]) as answer:
                text, status = await answer.text(), answer.status
            if status == 200:
                return text
            await asyncio.sleep(POLL_S)
        raise Finding(f"no receipt within {GIVE_UP_S} s; the last answer was {status}")


def prove(sample: Sample, receipt: str, vkey: str) -> Sample:
    """The sample with its checkpoint's size; with a failure where the receipt does not prove this customer's job."""
    try:
        proven = verify_receipt(receipt, [vkey])
    except InvalidReceipt as error:
        return msgspec.structs.replace(sample, failure=f"not proven: {error}")
    whose = (proven.event.get("job_id"), proven.customer_id)
    failure = "" if whose == (sample.job_id, WATCHED) else f"the receipt is that of {whose}"
    return msgspec.structs.replace(sample, tree_size=proven.tree_size, failure=failure)


def run(plan: Plan, cache: Path) -> Report:
    """Everything, over a state folder of its own below `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    machine = describe_machine(cache)
    work = Path(tempfile.mkdtemp(prefix="receipts-", dir=cache))
    try:
        state = str(work / "state")
        keys = {name: _tool("key", "create", name, "--state", state).strip() for name in (LOAD, WATCHED)}
        ports = {"--port": free_port(), "--gateway-port": free_port()}
        options = [word for name, port in ports.items() for word in (name, str(port))]
        command = [PROGRAM, "up", "--state", state, "--no-load", *options]
        with running("render-platform up", command, ports["--gateway-port"], work) as server:
            _wait_until_all_is_up(server)
            _say(f"{plan.rate} jobs/s for {plan.seconds} s, then until the last receipt")
            begun_s, watch = time.time(), Watch(server.url, keys, plan)
            asyncio.run(watch.run())
            server.require_running()
            runs = asyncio.run(_ask_runs(f"http://127.0.0.1:{ports['--port']}/graphql"))
        vkey = _tool("vkey", "--state", state).strip()
        samples = [one if one.failure else prove(one, watch.receipts[one.job_id], vkey) for one in watch.samples]
        return Report(
            measured_at,
            plan,
            {**machine, "load average after": f"{os.getloadavg()[0]:.2f}"},
            collect_versions(),
            dict(watch.answers),
            json.loads(_tool("status", "--json", "--state", state)),
            sorted(samples, key=lambda one: one.ended_ms),
            read_flushes(runs, begun_s),
            sum(one["status"] == "FAILURE" for one in runs),
        )
    finally:
        shutil.rmtree(work)


def _wait_until_all_is_up(server: Server) -> None:
    """`up` names each part when it works, Dagster and the gateway last; the order of these two is not fixed."""
    until = time.monotonic() + READY_S
    while not all(f"\n{part:8} http" in server.log.read_text() for part in ("dagster", "gateway")):
        server.require_running()
        if time.monotonic() > until:
            raise Unavailable(f"`up` was not ready within {READY_S} s", f"see {server.log}")
        time.sleep(0.2)


async def _ask_runs(url: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, json={"query": RUNS}) as answer:
        found: list[dict[str, Any]] = (await answer.json())["data"]["runsOrError"]["results"]
    return found


def read_flushes(runs: Sequence[dict[str, Any]], begun_s: float) -> list[Flush]:
    """Those of Dagster's runs that succeeded, oldest first. Its times are seconds since 1970."""
    good = [one for one in runs if one["status"] == "SUCCESS"]
    times = sorted((one["creationTime"], one["startTime"], one["endTime"]) for one in good)
    return [Flush(_ms(at - begun_s), _ms(start - at), _ms(end - at)) for at, start, end in times]


def percentile(values: Sequence[int], percent: int) -> int:
    """The smallest value that `percent` of all do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def findings(report: Report) -> list[str]:
    """Everything that makes the figures worth less, or shows that a job was not kept. Empty: a clean run."""
    found = [f"job {one.job_id or '?'}: {one.failure}" for one in report.samples if one.failure]
    bad = {status: count for status, count in sorted(report.answers.items()) if status != 202}
    asked = report.answers.get(202, 0) + sum(bool(one.job_id) for one in report.samples)
    kept = [report.counts[name] for name in COUNTED]
    found += [f"answers to the load that were not 202, by status: {bad}"] if bad else []
    found += [f"{asked} jobs accepted for their clients; accepted, finished, events: {kept}"] * (kept != [asked] * 3)
    return found + [f"{report.failed_flushes} flushes failed"] * bool(report.failed_flushes)


def render(report: Report) -> str:
    """The Markdown of a report: table, what the waiting is made of, findings, machine and versions."""
    plan, good = report.plan, [one for one in report.samples if not one.failure]
    waited = [one.waited_ms for one in good]
    met = bool(waited) and percentile(waited, 99) <= AIM_S * 1_000
    said = (
        f"Measured {report.measured_at}: `render-platform up` over a new state folder, default settings, "
        f"{plan.rate} jobs/s for {plan.seconds} s in an open loop, one in {plan.one_in} watched; no warm-up. From the "
        "`complete` event of a job, sent after the commit of its end, to the first 200 of `GET /jobs/{id}/receipt`, "
        f"asked for every {POLL_S:g} s, so that each figure may be so much too large. Only receipts that verify are "
        "counted. The client shares the machine's cores."
    )
    blocks = [
        said,
        _table(good),
        bullets("Aim", [f"p99 of at most {AIM_S} s: {'met' if met else 'MISSED'}"]),
        bullets("What the waiting is made of", _parts(report, good)),
        bullets("FINDINGS: read these before the figures", findings(report)),
        bullets("Machine", [f"{name}: {value}" for name, value in report.machine.items()]),
        bullets("Versions", [", ".join(f"{name} {value}" for name, value in report.versions.items())]),
    ]
    return "\n\n".join(block for block in blocks if block)


def _table(samples: Sequence[Sample]) -> str:
    """All samples, and each third of them in the order of their ends."""
    rows = [("jobs that ended", "receipts", "least s", "p50 s", "p99 s", "max s"), _row("at any time", samples)]
    for number, share in enumerate(SHARES):
        cut = [len(samples) * (number + more) // len(SHARES) for more in (0, 1)]
        rows.append(_row(f"in the {share} third", samples[slice(*cut)]))
    return right_table(rows, 1)


def _row(name: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    waited = [one.waited_ms for one in samples]
    figures = (min(waited), percentile(waited, 50), percentile(waited, 99), max(waited)) if waited else ()
    return (name, str(len(waited)), *(f"{ms / 1_000:.1f}" for ms in figures), *[""] * (4 - len(figures)))


def _parts(report: Report, samples: Sequence[Sample]) -> list[str]:
    last_ms = max((one.ended_ms + one.waited_ms for one in samples), default=0)
    flushes = [one for one in report.flushes if 0 <= one.launched_ms <= last_ms]
    starts = [one.launched_ms for one in flushes]
    counts = ", ".join(f"{report.counts[name]:,} {name}" for name in COUNTED)
    return [
        f"checkpoints seen in receipts: {len({one.tree_size for one in samples})}; flushes meanwhile: {len(flushes)}",
        f"from one flush's launch to the next: {_spread([b - a for a, b in pairwise(starts)])}",
        f"from a flush's launch to the start of its process's work: {_spread([one.starting_ms for one in flushes])}",
        f"from its launch to its end: {_spread([one.whole_ms for one in flushes])}",
        f"kept: {counts}",
    ]


def _spread(values_ms: Sequence[int]) -> str:
    if not values_ms:
        return "not measured"
    middle, least, most = (ms / 1_000 for ms in (statistics.median(values_ms), min(values_ms), max(values_ms)))
    return f"{middle:.1f} s ({least:.1f}–{most:.1f})"


def collect_versions() -> dict[str, str]:
    own = {"render-platform": own_version(), "Python": platform.python_version()}
    return {**own, **{name: version(name) for name in PACKAGES}}


def _tool(*words: str) -> str:
    return run_tool([PROGRAM, *words], TOOL_S, clean_environment({}))


def _ms(seconds: float) -> int:
    return round(seconds * 1_000)


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--rate", type=click.IntRange(1, 1_000), default=50, show_default=True, help="Jobs a second.")
@click.option("--seconds", type=click.IntRange(1, 3_600), default=360, show_default=True)
@click.option("--one-in", type=click.IntRange(1), default=40, show_default=True, help="Of the jobs, one in N watched.")
@click.option("--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="Scratch [.bench].")
@click.option("--json", "as_json", is_flag=True, help="Print every sample as one JSON object.")
@click.option("--write", is_flag=True, help="Also put the table into docs/benchmarks.md.")
def main(rate: int, seconds: int, one_in: int, cache: Path, as_json: bool, write: bool) -> None:
    """Measure from a job's end to its receipt, with everything running and under load."""
    try:
        report = run(Plan(rate, seconds, one_in), cache.absolute())
    except PlatformError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if write:
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text() if DOCUMENT.exists() else "", section, BEGIN, END))
        _say(f"written to {DOCUMENT}")
    sys.exit(1 if findings(report) else 0)


if __name__ == "__main__":
    main()
