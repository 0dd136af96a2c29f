"""The benchmark of receipts: what it watches of a gateway, what it believes, its arithmetic. No platform is started."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.receipts import (
    AIM_S,
    BEGIN,
    END,
    LOAD,
    POLL_S,
    WATCHED,
    Flush,
    Plan,
    Report,
    Sample,
    Watch,
    findings,
    percentile,
    prove,
    read_flushes,
    render,
)
from benchmarks.report import replace_section
from tests.made_receipts import LOG, make

KEYS = {LOAD: "rp_load", WATCHED: "rp_watched"}
SALT = "07" * 32
REF = hashlib.sha256(b"render-platform/customer/v1\n" + bytes.fromhex(SALT) + WATCHED.encode()).hexdigest()
COUNTS = {"accepted": 13, "finished": 13, "events": 13}


class Gateway:
    """Jobs end at once, as `end` says; a receipt is there when it is asked for the second time."""

    def __init__(self, end: str = "complete", status: int = 202) -> None:
        self.end, self.status = end, status
        self.asked: Counter[str] = Counter()
        self.jobs: Counter[str] = Counter()

    async def accept(self, request: web.Request) -> web.Response:
        self.jobs[request.headers["authorization"]] += 1
        return web.json_response({"id": f"job-{self.jobs.total()}"}, status=self.status)

    async def tell(self, request: web.Request) -> web.Response:
        return web.Response(text=f"id: 1\nevent: queued\ndata: {{}}\n\nid: 1001\nevent: {self.end}\ndata: {{}}\n\n")

    async def give(self, request: web.Request) -> web.Response:
        job = request.match_info["job"]
        self.asked[job] += 1
        return web.Response(text=f"of {job}", status=200 if self.asked[job] > 1 else 202)

    def watch(self, plan: Plan) -> Watch:
        return asyncio.run(self._watch(plan))

    async def _watch(self, plan: Plan) -> Watch:
        app = web.Application()
        app.add_routes([web.post("/queue", self.accept), web.get("/jobs/{job}/events", self.tell)])
        app.add_routes([web.get("/jobs/{job}/receipt", self.give)])
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            watch = Watch(f"http://127.0.0.1:{runner.addresses[0][1]}", KEYS, plan)
            await watch.run()
        finally:
            await runner.cleanup()
        return watch


def report(
    waited_ms: Sequence[int], answers: dict[int, int] | None = None, failed: int = 0, counts: dict[str, int] = COUNTS
) -> Report:
    """One of 10 jobs of the load, and the watched ones given."""
    samples = [Sample(f"job-{at}", at * 1_000, ms, at) for at, ms in enumerate(waited_ms)]
    flushes = [Flush(-9_000, 1, 2), Flush(1_000, 3_000, 5_000), Flush(25_000, 4_000, 8_000)]
    found = {202: 10} if answers is None else answers
    return Report(
        "2026-01-01T00:00:00Z", Plan(1, 13, 4), {"cores": "2"}, {"x": "1"}, found, counts, samples, flushes, failed
    )


def test_one_in_n_jobs_is_watched_from_its_end_to_its_receipt() -> None:
    gateway = Gateway()
    watch = gateway.watch(Plan(rate=40, seconds=1, one_in=10))
    assert gateway.jobs == {"Bearer rp_load": 36, "Bearer rp_watched": 4}
    assert watch.answers == {202: 36}
    assert set(gateway.asked.values()) == {2}
    assert [one.failure for one in watch.samples] == [""] * 4
    assert all(POLL_S * 1_000 <= one.waited_ms < POLL_S * 1_000 + 5_000 for one in watch.samples)
    assert watch.receipts == {one.job_id: f"of {one.job_id}" for one in watch.samples}


@pytest.mark.parametrize(
    ("gateway", "said"), [(Gateway(end="error"), "without its completion"), (Gateway(status=429), "answered 429")]
)
def test_a_watched_job_that_fails_is_a_finding(gateway: Gateway, said: str) -> None:
    watch = gateway.watch(Plan(rate=10, seconds=1, one_in=10))
    assert [said in one.failure for one in watch.samples] == [True]
    assert watch.answers == {gateway.status: 9}


def test_a_gateway_that_is_gone_is_no_answer() -> None:
    watch = Watch("http://127.0.0.1:1", KEYS, Plan(rate=4, seconds=1, one_in=4))
    asyncio.run(watch.run())
    assert watch.answers == {0: 3}
    assert [bool(one.failure) for one in watch.samples] == [True]


def test_a_receipt_counts_only_where_it_proves_this_customers_job() -> None:
    event = {"job_id": "j", "customer_ref": REF}
    receipt = make(size=7, event=event, opening={"customer_id": WATCHED, "salt": SALT}).text()
    assert prove(Sample("j"), receipt, LOG.vkey) == Sample("j", tree_size=7)
    assert "is that of" in prove(Sample("k"), receipt, LOG.vkey).failure
    assert "is that of" in prove(Sample("j"), make(event={"job_id": "j"}).text(), LOG.vkey).failure
    assert "not proven" in prove(Sample("j"), receipt.replace("index 3", "index 4"), LOG.vkey).failure


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[int], percent: int) -> None:
    enough = [one for one in values if 100 * sum(other <= one for other in values) >= percent * len(values)]
    assert percentile(values, percent) == min(enough)


@pytest.mark.parametrize(("slow_ms", "said"), [(AIM_S * 1_000, "met"), (AIM_S * 1_000 + 1, "MISSED")])
def test_the_aim_is_that_of_the_99th_percentile(slow_ms: int, said: str) -> None:
    assert f"p99 of at most 60 s: {said}\n" in render(report([20_000, 25_000, slow_ms]))
    assert "p99 of at most 60 s: met\n" in render(report([20_000] * 99 + [slow_ms]))
    assert "p99 of at most 60 s: MISSED\n" in render(report([]))


def test_the_table_lines_up_and_shows_each_third() -> None:
    text = render(report([10_000, 30_000, 25_000]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]]
    assert cells == [["3", "10.0", "25.0", "30.0", "30.0"], *([["1", *[ms] * 4] for ms in ("10.0", "30.0", "25.0")])]
    assert "checkpoints seen in receipts: 3; flushes meanwhile: 2" in text
    assert "from its launch to its end: 6.5 s (5.0–8.0)" in text
    assert "cores: 2" in text
    assert "FINDINGS" not in text


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (report([1] * 3, {202: 10, 429: 2}), "by status: {429: 2}"),
        (report([1] * 3, {202: 9}), "12 jobs accepted"),
        (report([1] * 3, counts={**COUNTS, "events": 12}), "[13, 13, 12]"),
        (report([1] * 3, failed=2), "2 flushes failed"),
    ],
)
def test_what_was_not_kept_is_said_loudly(spoiled: Report, said: str) -> None:
    assert [text for text in findings(spoiled) if said in text]
    assert "FINDINGS" in render(spoiled)
    assert findings(report([1] * 3)) == []


def test_a_job_without_a_receipt_is_a_finding_and_no_figure() -> None:
    whole = report([1_000, 2_000])
    spoiled = msgspec.structs.replace(whole, samples=[*whole.samples, Sample("job-9", 1, 99_000, failure="no receipt")])
    assert findings(spoiled) == ["job job-9: no receipt"]
    assert "99.0" not in render(spoiled)


def test_a_report_keeps_every_sample_as_json() -> None:
    whole = report([1, 2])
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Report) == whole


def test_only_flushes_that_succeeded_are_timed() -> None:
    runs = [
        {"status": "SUCCESS", "creationTime": 130.0, "startTime": 133.5, "endTime": 136.0},
        {"status": "FAILURE", "creationTime": 120.0, "startTime": 121.0, "endTime": 122.0},
        {"status": "STARTED", "creationTime": 140.0, "startTime": None, "endTime": None},
        {"status": "SUCCESS", "creationTime": 99.0, "startTime": 100.0, "endTime": 101.0},
    ]
    assert read_flushes(runs, 100.0) == [Flush(-1_000, 1_000, 2_000), Flush(30_000, 3_500, 6_000)]


def test_a_section_is_replaced_where_it_stands_and_appended_where_it_is_not() -> None:
    first = replace_section("# Benchmarks\n", "old", BEGIN, END)
    assert first == f"# Benchmarks\n\n{BEGIN}\nold\n{END}\n"
    assert replace_section(first + "\nafter\n", "new", BEGIN, END) == f"# Benchmarks\n\n{BEGIN}\nnew\n{END}\n\nafter\n"
