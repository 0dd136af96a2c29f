"""HTTP to one inference server: a bounded pool of connections, bounded answers, and failures told apart.

| what happened | code | retriable | GPU time |
|---|---|---|---|
| no connection: refused, no such host, TLS | backend_unreachable | yes | none: nothing was sent |
| the connection broke before the answer was whole | backend_disconnected | yes | unknown |
| 408, 502, 503, 504, 429 | backend_unavailable | yes | none for 503 and 429, else unknown |
| another 5xx | backend_error | yes | unknown |
| 401, 403, 404, 405, 407, 501, a redirect: not what the catalogue says | backend_misconfigured | yes | none |
| another 4xx: the request itself, handed back to the client | backend_refused | no | none |
| not HTTP, too large, compressed, not what was asked for | backend_malformed | no | unknown |
| the deadline passed | backend_timeout | no | unknown |

"None" is `spans=[]`, unknown is `spans=None`. Retriable means elsewhere or later: a deadline is gone everywhere.
Messages hold the backend's name and a status, never a body, a header or a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import msgspec
from yarl import URL

from render_platform.errors import Unavailable
from render_platform.gateway.backends import MAX_ANSWER_BYTES, BackendFailure
from render_platform.gateway.catalogue import BackendSpec

CONNECT_S = 5
CHECK_S = 5
IDLE_S = 4
"""How long a connection is kept for the next request: less than the 5 s after which many servers close theirs."""
MAX_REFUSAL_BYTES = 65_536

_TEMPORARY = frozenset({408, 429, 502, 503, 504})
_NOT_RUN = frozenset({429, 503})
_NOT_THE_REQUEST = frozenset({401, 403, 404, 405, 407, 501})
_REFUSED = b'{"error":{"message":"the inference server refused the request","type":"invalid_request_error"}}'

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_T = TypeVar("_T")


class BackendClient:
    """Connections to one server: at most its capacity, and one for questions about the server itself."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._base = spec.url.rstrip("/")
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    def open(self, headers: Mapping[str, str] | None = None) -> None:
        """Make the pools; `headers` go with every request. Nothing is sent yet."""
        limit = self._spec.capacity + 1
        self._kept = self._session(aiohttp.TCPConnector(limit=limit, keepalive_timeout=IDLE_S), headers or {})
        self._fresh = self._session(aiohttp.TCPConnector(limit=limit, force_close=True), headers or {})

    def _session(self, connector: aiohttp.TCPConnector, headers: Mapping[str, str]) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **headers},
            skip_auto_headers=("User-Agent",),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        for session in (self._kept, self._fresh):
            if session is not None:
                await session.close()
        self._kept = self._fresh = None

    @asynccontextmanager
    async def within(self, timeout_s: float) -> AsyncIterator[None]:
        """What goes wrong inside is a BackendFailure; so is the end of `timeout_s`."""
        name = self._spec.name
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            message = f"{name} cannot be reached: {type(error).__name__}"
            raise BackendFailure("backend_unreachable", message, retriable=True, spans=[]) from None
        except aiohttp.ClientResponseError:  # its repr holds the request's headers: it goes no further
            raise self.malformed("what came is not HTTP") from None
        except aiohttp.ClientError as error:
            message = f"the connection to {name} broke: {type(error).__name__}"
            raise BackendFailure("backend_disconnected", message, retriable=True) from None
        except TimeoutError:
            message = f"{name} did not answer within {timeout_s:.3f} s"
            raise BackendFailure("backend_timeout", message, retriable=False) from None

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        streamed: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, its body still to be read. Left early, the connection is closed.

        A stream has a connection of its own: llama.cpp closes it at the end without having said so, and the next
        request on it would fail.
        """
        session = self._opened(self._fresh if streamed else self._kept)
        url = self._url(path)
        async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
            await self._require_good(response)
            yield response

    async def fetch(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """The whole body of an answer with status 200, at most MAX_ANSWER_BYTES."""
        session, url = self._opened(self._kept), self._url(path)
        async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
            await self._require_good(response)
            return await self._read(response, MAX_ANSWER_BYTES)

    def _opened(self, session: aiohttp.ClientSession | None) -> aiohttp.ClientSession:
        if session is None:
            raise Unavailable(f"{self._spec.name} is not open", "start the backend before it is used")
        return session

    def _url(self, path: str) -> URL:
        return URL(f"{self._base}/{path}", encoded=True)  # yarl keeps the last ones

    async def _require_good(self, response: aiohttp.ClientResponse) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self.malformed("the answer is compressed, which nobody asked for")
        if response.status != 200:
            raise await self._failure(response)

    async def check(self, path: str) -> None:
        """Whether a GET is answered with 200, in CHECK_S."""
        async with self.within(CHECK_S):
            await self.fetch("GET", path)

    def malformed(self, what: str) -> BackendFailure:
        return BackendFailure("backend_malformed", f"{self._spec.name}: {what}", retriable=False)

    def decode(self, decoder: msgspec.json.Decoder[_T], data: bytes) -> _T:
        """`data`, which the server sent, as JSON; backend_malformed where it is none of that type."""
        try:
            return decoder.decode(data)
        except (ValueError, RecursionError):
            raise self.malformed("the answer is not the JSON that was asked for") from None

    async def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        if (response.content_length or 0) > limit:
            raise self.malformed(f"the answer has more than {limit} bytes")
        parts: list[bytes] = []
        size = 0
        while part := await response.content.readany():
            size += len(part)
            if size > limit:
                raise self.malformed(f"the answer has more than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    async def _failure(self, response: aiohttp.ClientResponse) -> BackendFailure:
        status = response.status
        message = f"{self._spec.name} answered {status}"
        if status in _TEMPORARY:
            spans: list[tuple[int, int]] | None = [] if status in _NOT_RUN else None
            return BackendFailure("backend_unavailable", message, retriable=True, spans=spans)
        if status < 400 or status in _NOT_THE_REQUEST:
            return BackendFailure("backend_misconfigured", message, retriable=True, spans=[])
        if status >= 500:
            return BackendFailure("backend_error", message, retriable=True)
        body = await self._read(response, MAX_REFUSAL_BYTES)
        refused = (status, body if _is_object(body) else _REFUSED)
        return BackendFailure("backend_refused", message, retriable=False, refused=refused, spans=[])


def _is_object(body: bytes) -> bool:
    try:
        _object.decode(body)
    except (ValueError, RecursionError):
        return False
    return True
