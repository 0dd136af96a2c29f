"""Triton Inference Server over HTTP (KServe v2).

- Requests: see `triton_requests`. The answer is Triton's JSON as it came.
- GPU time: see `triton_meters` and `triton_statistics`. Reading it is never waited for beyond the job's deadline, and
  never fails a job.
- Cancelled, the connection is closed, and a request that Triton runs already is **not** stopped by that: measured with
  2.51, its HTTP side lets the model go on. What the GPU does after that is nobody's job here, and the statistics
  are left alone until it must have ended.
"""

from __future__ import annotations

import asyncio

import msgspec

from render_platform.errors import RecordError, Unavailable
from render_platform.gateway.backend_http import CHECK_S, BackendClient
from render_platform.gateway.backends import Answer, Attempt, BackendFailure, Span
from render_platform.gateway.catalogue import BackendSpec
from render_platform.gateway.triton_meters import Reading, SpanMeter, TritonMeter, model_path
from render_platform.gateway.triton_requests import inference_body
from render_platform.gateway.triton_spans import fitted
from render_platform.gateway.triton_statistics import StatisticsMeter
from render_platform.gateway.usage import usage_of_request

MARGIN_S = 0.1
"""Kept free before the deadline: an answer that is there is not lost to the reading of its GPU time."""


class _Input(msgspec.Struct):
    name: str
    shape: list[int]


class _Metadata(msgspec.Struct):
    inputs: list[_Input]


class _Outputs(msgspec.Struct):
    """What every answer has; its data is not decoded."""

    outputs: list[msgspec.Raw]


_metadata = msgspec.json.Decoder(_Metadata)
_outputs = msgspec.json.Decoder(_Outputs)


class TritonBackend:
    meter = "backend"

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec
        self._client = BackendClient(spec)
        self._meter: TritonMeter = (SpanMeter if spec.spans_port else StatisticsMeter)(spec, self._client)
        self._ranks: dict[str, dict[str, int]] = {}

    async def start(self) -> None:
        """UsageError where its spans cannot come here; Unavailable where the server is not ready yet."""
        self._client.open()
        try:
            async with self._client.within(CHECK_S):
                await self._meter.start()
            await self.check()
        except BackendFailure as failure:
            raise Unavailable(failure.message, f"start the server at {self.spec.url}") from failure

    async def run(self, attempt: Attempt) -> Answer:
        loop = asyncio.get_running_loop()
        begun_ns, until_s = attempt.now_ns(), loop.time() + attempt.timeout_s
        async with self._client.within(attempt.timeout_s):
            body = await self._body(attempt)
        headers = {"traceparent": attempt.traceparent} if attempt.traceparent else None
        path = model_path(attempt.served_as) + "/infer"

        async def spans(read: Reading) -> list[Span] | None:
            ended_ns = attempt.now_ns()
            found = await read(max(0.0, until_s - loop.time() - MARGIN_S))
            return fitted(found, begun_ns, ended_ns) if found else None

        async with self._meter.measure(attempt) as read:
            try:
                async with self._client.within(until_s - loop.time()):
                    answer = await self._client.fetch("POST", path, body, headers)
            except BackendFailure as failure:
                if failure.code == "backend_error":
                    failure.spans = await spans(read)
                elif failure.code == "backend_refused":
                    self._ranks.pop(attempt.served_as, None)  # the model may be another one than before
                raise
            used = await spans(read)
        self._client.decode(_outputs, answer)
        return Answer(answer, usage=usage_of_request(attempt.model, attempt.body), spans=used)

    async def check(self) -> None:
        await self._client.check("v2/health/ready")

    async def close(self) -> None:
        await self._meter.close()
        await self._client.close()

    async def _body(self, attempt: Attempt) -> bytes:
        """The KServe request. The model is asked for its inputs once: one that batches has a dimension more."""
        ranks = self._ranks.get(attempt.served_as)
        if ranks is None:
            metadata = await self._client.fetch("GET", model_path(attempt.served_as))
            inputs = self._client.decode(_metadata, metadata).inputs
            ranks = self._ranks[attempt.served_as] = {one.name: len(one.shape) for one in inputs}
        try:
            return inference_body(attempt.model, attempt.body, attempt.attempt_id, ranks)
        except RecordError as error:
            problem = {"title": "A field is not valid", "status": 422, "detail": str(error), "field": error.field}
            refused = (422, msgspec.json.encode({**problem, "code": "invalid_field"}))
            raise BackendFailure("backend_refused", str(error), retriable=False, refused=refused, spans=[]) from error
