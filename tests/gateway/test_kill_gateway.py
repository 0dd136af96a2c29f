"""`kill -9` under load, again and again on one state folder: nothing accepted is lost, nothing is billed twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pysqlite3

from render_platform.gateway.jobs import Acceptance
from render_platform.note import load_or_create_key
from tests.gateway.processes import running_gateway

KILLS = 20
WORKERS = 12
CATALOGUE = """
rate_per_s = 100000
burst = 100000
drain_s = 5

[backends.a]
kind = "simulated"
capacity = 3
speed = 40.0

[backends.b]
kind = "simulated"
capacity = 3
speed = 40.0

[models.llama-8b]
family = "llama"
modality = "text"
type = "llm"
tasks = ["chat"]
backends = { a = "llama-8b", b = "llama-8b" }
"""
CHAT = {"model": "llama-8b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
QUEUED = {"model": "llama-8b", "task": "chat", "input": {"messages": CHAT["messages"], "max_tokens": 60}}


@dataclass
class Told:
    """What clients were told: what the platform must keep."""

    accepted: dict[str, str] = field(default_factory=dict)  # job id → acceptance
    answered: set[str] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)  # idempotency key → job id
    refused: int = 0


async def one_request(session: aiohttp.ClientSession, url: str, rng: random.Random, told: Told) -> None:
    kind = rng.random()
    if kind < 0.4:
        async with session.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
            await answer.read()
            if answer.status == 200:
                told.answered.add(answer.headers["x-job-id"])
        return
    key = str(uuid.UUID(int=rng.getrandbits(128))) if kind > 0.8 else None
    headers = {"Idempotency-Key": key} if key else {}
    async with session.post(f"{url}/queue", json=QUEUED, headers=headers) as answer:
        body = await answer.json()
        if answer.status == 503:
            told.refused += 1
            return
        if answer.status != 202:
            raise AssertionError(body)
        told.accepted[body["id"]] = body["acceptance"]
        if key:
            told.keys[key] = body["id"]
    if kind < 0.5:
        async with session.delete(f"{url}/jobs/{body['id']}") as answer:
            await answer.read()


async def load(address: str, seed: str, told: Told, kill: Any) -> None:
    """Clients that go on until the gateway is gone, which is at a random instant."""
    rng = random.Random(seed)

    async def client(number: int) -> None:
        own = random.Random(f"{seed}/{number}")
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    await one_request(session, f"http://{address}", own, told)
                except (aiohttp.ClientError, ConnectionError):
                    return

    clients = [asyncio.create_task(client(number)) for number in range(WORKERS)]
    await asyncio.sleep(rng.uniform(0.05, 0.6))
    kill()
    await asyncio.gather(*clients)


async def until_all_ended(address: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            async with session.get(f"http://{address}/queue") as answer:
                views = await answer.json()
            if not sum(view["running"] + sum(view["waiting"].values()) for view in views):
                return
            await asyncio.sleep(0.1)


async def asked_again(address: str, told: Told) -> dict[str, str]:
    """Which job each idempotency key stands for, after all the kills."""
    found = {}
    async with aiohttp.ClientSession() as session:
        for key in list(told.keys)[:20]:
            async with session.post(f"http://{address}/queue", json=QUEUED, headers={"Idempotency-Key": key}) as answer:
                found[key] = answer.headers["x-job-id"] if answer.status == 200 else (await answer.json())["detail"]
    return found


def rows(state: Path, sql: str) -> list[tuple[Any, ...]]:
    with pysqlite3.connect(state / "platform.db") as connection:
        found: list[tuple[Any, ...]] = connection.execute(sql).fetchall()
    connection.close()
    return found


def test_killed_twenty_times_under_load(tmp_path: Path, rng: random.Random) -> None:
    told = Told()
    for number in range(KILLS):
        with running_gateway(tmp_path, CATALOGUE) as (process, address):
            kill = lambda process=process: process.send_signal(signal.SIGKILL)  # noqa: E731
            asyncio.run(load(address, f"{rng.random()}/{number}", told, kill))
    assert told.refused == 0
    check_all(tmp_path, told, KILLS)


def test_a_gateway_whose_journal_is_killed_stops_and_loses_nothing(tmp_path: Path, rng: random.Random) -> None:
    told, kills = Told(), 5
    for number in range(kills):
        with running_gateway(tmp_path, CATALOGUE) as (process, address):
            kill = lambda process=process: os.kill(journal_of(process.pid), signal.SIGKILL)  # noqa: E731
            asyncio.run(load(address, f"{rng.random()}/{number}", told, kill))
            assert process.wait(30) == 3
    check_all(tmp_path, told, kills)


def journal_of(gateway: int) -> int:
    """The one process that a gateway has started."""
    [journal] = Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()
    return int(journal)


def check_all(folder: Path, told: Told, kills: int) -> None:
    """After another start: everything accepted has ended, with one event each, and as its client was told."""
    state = folder / "state"
    with running_gateway(folder, CATALOGUE) as (process, address):
        asyncio.run(until_all_ended(address))
        again = asyncio.run(asked_again(address, told))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    states = {str(uuid.UUID(bytes=row[0])): row[1] for row in rows(state, "SELECT job_id, state FROM jobs")}
    billed = Counter(str(uuid.UUID(bytes=row[0])) for row in rows(state, "SELECT job_id FROM usage_events"))
    print(
        f"{kills} kills: {len(states)} jobs accepted, {len(told.accepted)} 202s, {len(told.answered)} 200s,"
        f" {Counter(states.values())}"
    )
    assert len(told.accepted) > 10 * kills, "there was hardly any load"
    assert set(states.values()) <= {"success", "error", "timeout", "cancelled"}
    assert set(billed.values()) == {1}
    assert billed.keys() == states.keys()
    assert told.accepted.keys() <= states.keys()
    assert {states[job] for job in told.answered} == {"success"}
    check_sequences(state)
    check_acceptances(state, told)
    assert all(job in answer for key, answer in again.items() for job in [told.keys[key]])


def check_sequences(state: Path) -> None:
    """`seq` counts from 1 without a gap in each epoch."""
    for epoch, count, first, last in rows(
        state, "SELECT epoch, count(*), min(seq), max(seq) FROM jobs GROUP BY gateway_id, epoch"
    ):
        assert (first, last) == (1, count), f"epoch {epoch} has a gap"


def check_acceptances(state: Path, told: Told) -> None:
    key = load_or_create_key(state / "keys/gateway.key", "unused").verifier
    stored = {
        str(uuid.UUID(bytes=row[0])): row[1:]
        for row in rows(state, "SELECT job_id, gateway_id, epoch, seq, accepted_us, hex(request_digest) FROM jobs")
    }
    for job_id, note in told.accepted.items():
        said = Acceptance.open(note, key)
        assert said.job_id == job_id
        assert stored[job_id] == (said.gateway, said.epoch, said.seq, said.time, said.request_digest.upper())
