"""What Dagster is told of the gateway's jobs: now and then one materialization of `gpu_jobs`, through its webserver.

Best effort, and for people to look at; the truth is in SQL. A report covers a range of `recorded_at`, half-open; the
ranges of one epoch follow each other without a hole. A report that fails is dropped and counted, never sent again: the
sensor `gpu_jobs_backstop` finds the range that nobody reported. Nothing here can hold up a job.

Dagster's own processes use the form of a report too, so that this module loads without an HTTP client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import structlog

from render_platform.clock import Clock, iso
from render_platform.events import Totals, UsageEvent

ASSET = "gpu_jobs"
GATEWAY, FROM_US, THROUGH_US = "gateway", "from_us", "through_us"
"""Names of metadata that the sensor reads again."""
TIMEOUT_S, LAST_TIMEOUT_S = 5.0, 1.0
MAX_MODELS = 200
MAX_ANSWER_BYTES = 512

Figures = Mapping[tuple[str, str], Totals]
"""Jobs and exact GPU ns by model and status."""

_log = structlog.get_logger()


def report_metadata(gateway_id: str, from_us: int, through_us: int, figures: Figures, report_id: str) -> dict[str, Any]:
    """A report as plain JSON. `report_id` is the same wherever the same report is made again."""
    rows = [
        {"model": model, "status": status, "jobs": totals.events, "GPU seconds": _seconds(totals.gpu_time_ns)}
        for (model, status), totals in sorted(figures.items())
    ]
    return {
        "jobs": sum(totals.events for totals in figures.values()),
        "GPU seconds": _seconds(sum(totals.gpu_time_ns for totals in figures.values())),
        "models": rows[:MAX_MODELS],
        "recorded": f"{iso(from_us)} to {iso(through_us)}",
        GATEWAY: gateway_id,
        FROM_US: from_us,
        THROUGH_US: through_us,
        "report id": report_id,
    }


class Reporter:
    """`count` and `run` belong to one loop. `sent` and `failed` count reports since the start."""

    def __init__(self, url: str, clock: Clock, gateway_id: str, epoch: int, every_s: int) -> None:
        """`url` is the webserver's base, such as http://127.0.0.1:3000; empty: nothing is reported."""
        self._url, self._gateway_id, self._epoch, self._every_s = url.rstrip("/"), gateway_id, epoch, every_s
        self._from_us = self._through_us = clock.now_us()
        self._figures: dict[tuple[str, str], Totals] = {}
        self.sent = self.failed = 0
        self.last_error = ""

    def count(self, event: UsageEvent) -> None:
        """Take in an event of this gateway that is committed, in the order of the commits."""
        key = event.model_name, event.status
        known = self._figures.get(key, Totals(0, 0))
        self._figures[key] = Totals(known.events + 1, known.gpu_time_ns + event.gpu_time_ns)
        # the clock may have been set back since the start: what is counted lies inside the range all the same
        self._from_us = min(self._from_us, event.recorded_at)
        self._through_us = max(self._through_us, event.recorded_at + 1)

    async def run(self) -> None:
        """Report every `every_s` seconds while there is something, and once more, briefly, when it is cancelled."""
        if not self._url:
            return
        try:
            while True:
                await asyncio.sleep(self._every_s)
                await self._report(TIMEOUT_S)
        finally:
            await self._report(LAST_TIMEOUT_S)

    async def _report(self, timeout_s: float) -> None:
        if not self._figures:
            return
        report_id = f"{self._gateway_id}/{self._epoch}/{self.sent + self.failed + 1}"
        metadata = report_metadata(self._gateway_id, self._from_us, self._through_us, self._figures, report_id)
        self._figures, self._from_us = {}, self._through_us
        error = "the gateway stopped before Dagster answered"
        try:
            error = await self._post({"metadata": {**metadata, "epoch": self._epoch}}, timeout_s)
        finally:
            self._judge(error)

    async def _post(self, report: Mapping[str, Any], timeout_s: float) -> str:
        """Why Dagster does not have the report; empty where it has. Texts hold no part of the URL."""
        import aiohttp

        try:
            async with (
                aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
                session.post(
                    f"{self._url}/report_asset_materialization/{ASSET}", json=report, allow_redirects=False
                ) as response,
            ):
                answer = await response.content.read(MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError) as error:
            return f"Dagster does not answer: {type(error).__name__}"
        try:
            said = json.loads(answer)
        except ValueError:
            said = None
        if response.status != 200 or not isinstance(said, dict) or "error" in said:
            return f"this is not Dagster, or it refuses: status {response.status}"
        return ""

    def _judge(self, error: str) -> None:
        """Count the report; say so where it is another error than the last time."""
        if error:
            self.failed += 1
        else:
            self.sent += 1
        if error != self.last_error:
            log = _log.warning if error else _log.info
            log("dagster_reports", state="failing" if error else "arriving", error=error)
        self.last_error = error


def _seconds(gpu_time_ns: int) -> str:
    """Exact decimal seconds, to read."""
    return f"{gpu_time_ns // 1_000_000_000}.{gpu_time_ns % 1_000_000_000:09d}".rstrip("0").rstrip(".")
