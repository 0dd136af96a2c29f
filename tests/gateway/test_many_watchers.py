"""Ten thousand open event streams on one gateway process: all are served, and what each costs is reported."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway.processes import running_gateway

CONNECTIONS = 10_000
JOBS = 20
OPENED_AT_ONCE = 200
MOST_BYTES_A_CONNECTION = 100_000
CATALOGUE = """
rate_per_s = 1000000
burst = 1000000
drain_s = 1

[backends.slow]
kind = "simulated"
capacity = 1
speed = 0.001

[models.m]
family = "f"
modality = "text"
type = "llm"
tasks = ["chat"]
backends = { slow = "m" }
"""


@pytest.fixture
def _many_files() -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 1_000:
        pytest.skip(f"TEN THOUSAND CONNECTIONS NOT TRIED: this machine allows a process {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def queue_jobs(address: str) -> list[str]:
    body = {"model": "m", "input": {"messages": [], "max_tokens": 10_000}}
    async with aiohttp.ClientSession() as session:
        made = []
        for _ in range(JOBS):
            async with session.post(f"http://{address}/queue", json=body) as answer:
                made.append((await answer.json())["id"])
        return made


async def watch(
    address: str, job_id: str, gate: asyncio.Semaphore
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open stream whose first event has come."""
    host, port = address.split(":")
    async with gate:
        reader, writer = await asyncio.open_connection(host, int(port), limit=4_096)
        writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        assert b"event: " in await reader.readuntil(b"\n\n")
    return reader, writer


async def ends(reader: asyncio.StreamReader) -> str:
    """The name of the last event of a stream."""
    text = (await reader.read()).decode()
    while not reader.at_eof():
        text += (await reader.read()).decode()
    return [line for line in text.splitlines() if line.startswith("event: ")][-1]


async def story(address: str, pid: int) -> dict[str, int]:
    made = await queue_jobs(address)
    before = resident_bytes(pid)
    gate = asyncio.Semaphore(OPENED_AT_ONCE)
    opened = await asyncio.gather(*(watch(address, made[number % JOBS], gate) for number in range(CONNECTIONS)))
    after = resident_bytes(pid)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{address}/health") as answer:
            assert answer.status == 200
        for job_id in made:
            async with session.delete(f"http://{address}/jobs/{job_id}") as answer:
                assert answer.status == 200
    last = await asyncio.gather(*(ends(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.close()
    return {
        "connections": len(opened),
        "told_of_the_end": sum(name == "event: error" for name in last),
        "resident_before": before,
        "resident_after": after,
        "bytes_a_connection": (after - before) // len(opened),
    }


@pytest.mark.usefixtures("_many_files")
def test_ten_thousand_watchers(tmp_path: Path) -> None:
    with running_gateway(tmp_path, CATALOGUE) as (process, address):
        found = asyncio.run(story(address, process.pid))
    print(json.dumps(found))
    assert found["told_of_the_end"] == found["connections"] == CONNECTIONS
    assert found["bytes_a_connection"] < MOST_BYTES_A_CONNECTION
