"""The only code that talks to addresses which a customer chose: webhooks, and images that a request names.

- a URL is http or https, to a DNS name, a dotted IPv4 address or an IPv6 address, spelled as such: whatever else some
  parser would read as one (`0x7f.1`, `2130706433`, `127.1`, full-width digits, a zone, a trailing dot) is refused;
- ports are 80, 443 and those from 1024 on: the services below (mail, SSH, DNS) have nothing to receive from us;
- the name is resolved once a call, every address that it has must be public, and the connection goes to one of exactly
  these: a name that resolves otherwise a moment later gains nothing. Each call resolves anew;
- TLS and `Host` keep the name. No redirect is followed, no proxy or password of the environment used, no cookie kept;
- time and size of each answer are bounded. Errors name the host at most: paths and queries often hold a secret.

An address of this machine's own network that is public everywhere cannot be told from others: let a firewall do it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from render_platform.errors import Unavailable, UsageError

MAX_URL_CHARACTERS = 2_048
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 64
RESOLVER_THREADS = 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_URL = re.compile(
    r"(https?)://(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?([/?][!-~]*)?", re.ASCII | re.IGNORECASE
)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?", re.ASCII)
"""A DNS name below a top-level domain, which begins with a letter: no spelling of a number is one."""
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers
        "127.0.0.0/8",
        "168.63.129.16/32",  # public by number, but the machine's own host on Azure
        "169.254.0.0/16",  # link-local: the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo and the like
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(UsageError):
    """The URL is not one that the platform connects to, or its host has an address that is not public."""


class Resolver(Protocol):
    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Every address of a host name, as text; OSError where it has none."""
        ...


class SystemResolver:
    """The machine's own resolver, in threads of its own: names that answer slowly hold up nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, "resolver")

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _getaddrinfo, host, port)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Target(NamedTuple):
    """A URL that has been read: `host` in lower case, as it stands in the URL but without brackets."""

    host: str
    port: int
    url: URL
    private: bool
    """Whether configuration allows it wherever it is."""


def is_public(address: Address) -> bool:
    """Whether the whole Internet knows it.

    An IPv6 address that carries an IPv4 one (mapped, NAT64, 6to4) is judged by that one. Teredo, and a network's own
    NAT64 (64:ff9b:1::/48, which may carry it in several places), are not public at all.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address.scope_id is not None:
        return False
    carried = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        carried = ipaddress.IPv4Address(address.packed[12:])
    if carried is not None:
        return is_public(carried)
    return address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def parse_url(url: str, allow_private: frozenset[str] = frozenset()) -> Target:
    """Read a customer's URL without asking the network; AddressRefused unless it is plainly http(s) to a host."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
    if match is None or "#" in url or "\\" in url:
        raise AddressRefused("the URL is not http(s)://host/path", "send one of at most 2,048 ASCII characters")
    scheme, host, digits, rest = match[1].lower(), match[2].lower(), match[3], match[4] or "/"
    port = int(digits) if digits else {"http": 80, "https": 443}[scheme]
    private = f"{host}:{port}" in allow_private
    if not (private or port in (80, 443) or 1_024 <= port <= 65_535):
        raise AddressRefused(f"the port {port} is not allowed", "use 80, 443 or one from 1024 on")
    bare = host.strip("[]")
    named = bare == host and (private or _NAME.fullmatch(host))
    if not named and (_literal(bare) is None or (bare == host) is (":" in bare)):
        raise AddressRefused("the host is not a DNS name or an IP address", "write it as such")
    path, _, query = rest.partition("?")
    built = URL.build(scheme=scheme, host=host, port=port, path=path or "/", query_string=query, encoded=True)
    return Target(bare, port, built, private)


async def resolve_public(host: str, port: int, resolver: Resolver, private: bool = False) -> list[Address]:
    """The addresses of a host, resolved once; AddressRefused unless every one is public, or `private` ones may be.

    The refusal does not say which address it was: that would show a stranger our own network.
    """
    try:
        literal = _literal(host)
        texts = [host] if literal is not None else await resolver.resolve(host, port)
        addresses = list(dict.fromkeys(ipaddress.ip_address(text) for text in texts))
    except (OSError, ValueError):
        addresses = []
    if not addresses:
        raise Unavailable(f"{host} cannot be resolved", "check the name")
    if not private and not all(is_public(address) for address in addresses):
        raise AddressRefused(f"{host} has an address that is not public", "use a host that the Internet can reach")
    return addresses


class Outbound:
    """Requests to URLs that customers chose.

    `allow_private` holds hosts that may be anywhere, as exact `host:port` in lower case: for development and tests.
    `tls` says which certificates are trusted; None: those that this machine trusts.
    """

    def __init__(
        self,
        resolver: Resolver,
        allow_private: frozenset[str] = frozenset(),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._resolver = resolver
        self._allow_private = allow_private
        self._tls = tls or ssl.create_default_context()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """Send `body`; the answer's status, whatever it is: its body is not read.

        AddressRefused as above; Unavailable where there is no answer within `timeout_s`, resolving included.
        """
        async with self._exchange("POST", url, timeout_s, headers, body) as answer:
            return answer.status

    async def get(self, url: str, max_bytes: int, timeout_s: float) -> tuple[bytes, str]:
        """What stands at `url`, and its content type, such as `image/png`.

        AddressRefused and Unavailable as above, Unavailable for a status from 500 on too. UsageError where the answer
        is no 200 (a redirect, say), is compressed, or has more than `max_bytes`: reading stops there.
        """
        async with self._exchange("GET", url, timeout_s, {}, None) as answer:
            host = answer.url.raw_host
            if answer.status >= 500:
                raise Unavailable(f"{host} answered {answer.status}", "try again later")
            if answer.status != 200:
                raise UsageError(f"{host} answered {answer.status}", "give the URL of the file itself")
            if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise UsageError(f"{host} sent a compressed file", "give the URL of one that is sent as it is")
            data = bytearray()
            async for chunk in answer.content.iter_any():
                data += chunk
                if len(data) > max_bytes:
                    raise UsageError(f"the file at {host} is too large", f"give one of at most {max_bytes} bytes")
            return bytes(data), answer.content_type

    @asynccontextmanager
    async def _exchange(
        self, method: str, url: str, timeout_s: float, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        target = parse_url(url, self._allow_private)
        headers = {"User-Agent": "render-platform", "Accept-Encoding": "identity", **headers}
        try:
            async with asyncio.timeout(timeout_s):
                addresses = await resolve_public(target.host, target.port, self._resolver, target.private)
                async with (
                    self._session(addresses) as session,
                    session.request(method, target.url, headers=headers, data=body, allow_redirects=False) as answer,
                ):
                    yield answer
        except TimeoutError:
            raise Unavailable(f"{target.host} did not answer within {timeout_s} s", "try again later") from None
        except (aiohttp.ClientError, OSError) as error:
            # without its cause, which would carry the whole URL into a traceback
            kind = type(error).__name__
            raise Unavailable(f"{target.host} gave no answer ({kind})", "check that it is up") from None

    def _session(self, addresses: Sequence[Address]) -> aiohttp.ClientSession:
        """A session that can reach these addresses only. One a call: nothing of one customer's is left for another."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_Pinned(addresses), use_dns_cache=False, force_close=True, ssl=self._tls
            ),
            cookie_jar=aiohttp.DummyCookieJar(),  # not even read
            timeout=aiohttp.ClientTimeout(),  # the call's own time-out holds for all of it
            auto_decompress=False,
            trust_env=False,
        )


class _Pinned(AbstractResolver):
    """Answers with addresses that have been checked, whatever name it is asked for."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002  # the connector asks for any
    ) -> list[ResolveResult]:
        kinds = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [
            ResolveResult(hostname=host, host=str(a), port=port, family=kinds[a.version], proto=0, flags=0)
            for a in self._addresses
        ]

    async def close(self) -> None:
        return


def deliverable(status: int) -> bool:
    """Whether a webhook's receiver has taken it."""
    return 200 <= status < 300


def webhook_key(secret: str) -> bytes:
    """The key in a Standard Webhooks secret, `whsec_<base64>`; UsageError, which shows nothing of it, otherwise."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith("whsec_") or not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise UsageError("not a webhook secret", "give whsec_ and 16 … 64 random bytes in base64")
    return key


def sign_webhook(secret: bytes, message_id: str, timestamp_s: int, payload: bytes) -> str:
    """The `webhook-signature` (Standard Webhooks, symmetric): HMAC-SHA256 of `id.timestamp.payload`."""
    digest = hmac.digest(secret, f"{message_id}.{timestamp_s}.".encode() + payload, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def webhook_headers(secret: bytes, message_id: str, timestamp_s: int, payload: bytes) -> dict[str, str]:
    """The three headers of a Standard Webhook. An id is one message's, and the same on each of its retries."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": sign_webhook(secret, message_id, timestamp_s, payload),
    }


def _literal(host: str) -> Address | None:
    """The address that `host` is, where it is one in its usual spelling."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _getaddrinfo(host: str, port: int) -> Sequence[str]:
    # bytes: the name is ASCII already, and Python's own codec for other names must not touch it
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
