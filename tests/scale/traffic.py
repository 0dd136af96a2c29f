"""Clients of several gateways: they go on through kills, and keep what they were told."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

MESSAGES = [{"role": "user", "content": "hello there"}]
QUEUED = {"model": "llama-8b", "task": "chat", "input": {"messages": MESSAGES, "max_tokens": 20}}
DIRECT = {"model": "llama-8b", "messages": MESSAGES, "max_tokens": 10}
AGAIN_S = 0.25


@dataclass
class Told:
    """What clients were told: what the platform must keep."""

    accepted: dict[str, str] = field(default_factory=dict)  # job → acceptance
    answered: set[str] = field(default_factory=set)
    keys: dict[str, set[str]] = field(default_factory=dict)  # idempotency key → the jobs that it was said to stand for
    statuses: Counter[str] = field(default_factory=Counter)
    accept_ms: list[int] = field(default_factory=list)


async def drive(urls: Sequence[str], jobs: int, seconds: float, seed: int, told: Told) -> None:
    """So many requests, spread evenly; each goes on until some gateway has taken it."""
    connector = aiohttp.TCPConnector(limit=200)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
        begun = time.monotonic()
        tasks = []
        for number in range(jobs):
            await asyncio.sleep(max(0.0, begun + seconds * number / jobs - time.monotonic()))
            rng = random.Random(f"{seed}/{number}")
            tasks.append(asyncio.create_task(_one(session, urls, rng, told)))
        await asyncio.gather(*tasks)


async def _one(session: aiohttp.ClientSession, urls: Sequence[str], rng: random.Random, told: Told) -> None:
    direct, key = rng.random() < 0.3, str(uuid.UUID(int=rng.getrandbits(128)))
    while True:
        url, begun = rng.choice(urls), time.monotonic()
        try:
            done = await (_direct(session, url, told) if direct else _queued(session, url, key, told))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:  # nobody knows what became of it
            told.statuses[type(error).__name__] += 1
            done = direct
        if done:
            told.accept_ms.append(int((time.monotonic() - begun) * 1_000))
            return
        await asyncio.sleep(AGAIN_S)


async def _direct(session: aiohttp.ClientSession, url: str, told: Told) -> bool:
    async with session.post(f"{url}/v1/chat/completions", json=DIRECT) as answer:
        await answer.read()
        told.statuses[f"direct {answer.status}"] += 1
        if answer.status == 200:
            told.answered.add(answer.headers["x-job-id"])
        return answer.status != 503


async def _queued(session: aiohttp.ClientSession, url: str, key: str, told: Told) -> bool:
    """The same key for each try: however often it is asked, it is one job."""
    async with session.post(f"{url}/queue", json=QUEUED, headers={"Idempotency-Key": key}) as answer:
        told.statuses[f"queued {answer.status}"] += 1
        if answer.status == 200:  # it was taken before, and has ended
            told.keys.setdefault(key, set()).add(answer.headers["x-job-id"])
        elif answer.status == 202:
            body = await answer.json()
            told.keys.setdefault(key, set()).add(body["id"])
            if body.get("acceptance"):
                told.accepted[body["id"]] = body["acceptance"]
        return answer.status in (200, 202)
