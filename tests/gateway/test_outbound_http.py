"""Requests to real servers on loopback: to the checked address, without redirect, proxy or cookie, within bounds."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.outbound import AddressRefused, Outbound, SystemResolver
from tests.gateway.test_outbound import Names

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NAME = "hook.example"


class Site:
    """An aiohttp server on a free port; `seen` holds the requests that came, with their bodies."""

    def __init__(self, answer: Handler | None = None) -> None:
        self.seen: list[tuple[web.Request, bytes]] = []
        self.answer = answer
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request, await request.read()))
        return await self.answer(request) if self.answer else web.Response(status=204)

    @asynccontextmanager
    async def open(
        self, address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Site]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, address, port, ssl_context=tls)
            await site.start()
            self.port = runner.addresses[0][1]
            yield self
        finally:
            await runner.cleanup()

    def url(self, path: str = "/", host: str = NAME) -> str:
        return f"http://{host}:{self.port}{path}"

    def outbound(self, *answers: Sequence[str], host: str = NAME) -> Outbound:
        """One that may reach this site under `host`, which resolves to `answers` in turn."""
        names = Names(**{host.replace(".", "_"): answers or [["127.0.0.1"]]})
        return Outbound(names, frozenset({f"{host}:{self.port}"}))


@asynccontextmanager
async def raw_server(answer: bytes, hold: bool = False) -> AsyncIterator[int]:
    """A server that reads a request's head, sends `answer`, and closes, or holds the connection open."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            if hold:
                await done.wait()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        done.set()


def test_a_webhook_arrives_as_it_was_sent() -> None:
    async def story() -> None:
        async with Site().open() as site:
            headers = {"webhook-id": "msg_1", "content-type": "application/json"}
            status = await site.outbound().post(site.url("/a%2Fb?c=%20d&e"), b'{"a":1}', headers, 5)
            assert status == 204
            ((request, body),) = site.seen
            assert (request.method, request.raw_path, body) == ("POST", "/a%2Fb?c=%20d&e", b'{"a":1}')
            assert request.headers["Host"] == f"{NAME}:{site.port}"
            assert request.headers["webhook-id"] == "msg_1"
            assert request.headers["content-type"] == "application/json"
            assert request.headers["Accept-Encoding"] == "identity"

    asyncio.run(story())


@pytest.mark.parametrize("status", [200, 301, 302, 303, 307, 308, 400, 410, 429, 500, 503])
def test_any_status_is_given_and_no_redirect_followed(status: int) -> None:
    async def story() -> None:
        async with Site().open() as inside:

            async def answer(_: web.Request) -> web.Response:
                return web.Response(status=status, headers={"Location": inside.url("/secret", "127.0.0.1")})

            async with Site(answer).open() as site:
                outbound = site.outbound()
                assert await outbound.post(site.url(), b"", {}, 5) == status
                if status != 200:
                    with pytest.raises(Unavailable if status >= 500 else UsageError, match=str(status)):
                        await outbound.get(site.url(), 100, 5)
            assert inside.seen == []

    asyncio.run(story())


def test_what_is_not_allowed_by_name_and_port_is_never_reached() -> None:
    async def story() -> None:
        async with Site().open() as site:
            allowed = site.outbound()
            closed = Outbound(Names(hook_example=[["127.0.0.1"]], mixed_example=[["8.8.8.8", "127.0.0.1"]]))
            for outbound, host in (
                (closed, NAME),
                (closed, "mixed.example"),
                (closed, "127.0.0.1"),
                (closed, "[::ffff:127.0.0.1]"),
                (allowed, "127.0.0.1"),
                (Outbound(SystemResolver(), frozenset({f"{NAME}:{site.port + 1}"})), "127.0.0.1"),
            ):
                with pytest.raises(AddressRefused):
                    await outbound.post(site.url(host=host), b"", {}, 5)
                with pytest.raises(AddressRefused):
                    await outbound.get(site.url(host=host), 100, 5)
            assert site.seen == []

    asyncio.run(story())


def test_a_name_that_changes_is_reached_where_it_was_when_it_was_checked() -> None:
    async def story() -> None:
        async with Site().open("127.0.0.1") as one, Site().open("127.0.0.2", one.port) as two:
            names = Names(hook_example=[["127.0.0.1"], ["127.0.0.2"]])
            outbound = Outbound(names, frozenset({f"{NAME}:{one.port}"}))
            for expected in ((1, 0), (1, 1), (1, 2)):
                await outbound.post(one.url(), b"", {}, 5)
                assert (len(one.seen), len(two.seen)) == expected
            assert names.asked == [NAME] * 3, "once a call, and again for each"

    asyncio.run(story())


def test_nothing_but_the_given_resolver_is_asked() -> None:
    async def story() -> None:
        async with Site().open("127.0.0.1") as wrong, Site().open("127.0.0.2", wrong.port) as right:
            await right.outbound(["127.0.0.2"], host="localhost").post(right.url(host="localhost"), b"", {}, 5)
            assert (len(wrong.seen), len(right.seen)) == (0, 1)

    asyncio.run(story())


def test_the_next_checked_address_is_tried_where_one_does_not_answer() -> None:
    async def story() -> None:
        async with Site().open() as site:
            assert await site.outbound(["127.0.0.3", "127.0.0.1"]).post(site.url(), b"", {}, 5) == 204

    asyncio.run(story())


def test_the_environments_proxies_and_passwords_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with Site().open() as proxy, Site().open() as site:
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, proxy.url(host="127.0.0.1"))
                monkeypatch.setenv(name.upper(), proxy.url(host="127.0.0.1"))
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            (tmp_path / "netrc").write_text(f"machine {NAME} login me password secret\n")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            await site.outbound().post(site.url(), b"", {}, 5)
            assert (proxy.seen, len(site.seen)) == ([], 1)
            assert "Authorization" not in site.seen[0][0].headers

    asyncio.run(story())


def test_no_cookie_is_kept() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(headers={"Set-Cookie": "a=b"})

    async def story() -> None:
        async with Site(answer).open() as site:
            outbound = site.outbound()
            for _ in range(2):
                await outbound.post(site.url(), b"", {}, 5)
            assert [request.headers.get("Cookie") for request, _ in site.seen] == [None, None]

    asyncio.run(story())


def test_a_file_is_read_up_to_its_bound() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * int(request.query["n"]), content_type="image/png")

    async def story() -> None:
        async with Site(answer).open() as site:
            outbound = site.outbound()
            for size in (0, 1, 200_000):
                found = await outbound.get(site.url(f"/?n={size}"), size, 5)
                assert found == (b"x" * size, "image/png")
                with pytest.raises(UsageError, match="too large"):
                    await outbound.get(site.url(f"/?n={size + 1}"), size, 5)

    asyncio.run(story())


def test_an_endless_file_is_not_read_on() -> None:
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 10_000)
            sent += 10_000

    async def story() -> None:
        async with Site(answer).open() as site:
            with pytest.raises(UsageError, match="too large"):
                await site.outbound().get(site.url(), 100_000, 30)
            assert await site.outbound().post(site.url(), b"", {}, 30) == 200

    asyncio.run(story())
    assert sent < 50_000_000


def test_a_compressed_file_is_refused_and_not_expanded() -> None:
    async def answer(_: web.Request) -> web.Response:
        response = web.Response(body=b"x" * 1_000_000)
        response.enable_compression(web.ContentCoding.gzip)
        response.headers["Content-Encoding"] = "gzip"
        return response

    async def story() -> None:
        async with Site(answer).open() as site:
            with pytest.raises(UsageError, match="compressed"):
                await site.outbound().get(site.url(), 10_000_000, 5)

    asyncio.run(story())


class SlowNames(Names):
    async def resolve(self, host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return await super().resolve(host, port)


def test_time_is_bounded_whatever_is_slow() -> None:
    async def story() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"
        for answer in (b"", b"HTTP/1.1 200", head, b"HTTP/1.1 102 Wait\r\n\r\n"):
            async with raw_server(answer, hold=True) as port:
                outbound = Outbound(Names(), frozenset({f"127.0.0.1:{port}"}))
                with pytest.raises(Unavailable, match=r"127\.0\.0\.1 did not answer within 0\.2 s"):
                    await outbound.get(f"http://127.0.0.1:{port}/", 100, 0.2)
        with pytest.raises(Unavailable, match="did not answer"):
            await Outbound(SlowNames()).post("https://hook.example/", b"", {}, 0.2)

    asyncio.run(story())


OK = b"HTTP/1.1 200 OK\r\n"
BROKEN = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "half a head": OK + b"Content-Le",
    "half a body": OK + b"Content-Length: 10\r\n\r\n12345",
    "half a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n123",
    "a bad chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n123",
    "two lengths": OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12",
    "a negative length": OK + b"Content-Length: -1\r\n\r\n",
    "a long header": OK + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": OK + b"".join(b"X-%d: 1\r\n" % n for n in range(5_000)) + b"\r\n",
    "a long status line": b"HTTP/1.1 200 " + b"a" * 100_000 + b"\r\n\r\n",
    "NUL": OK + b"X: \0\r\n\r\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_answer_is_unavailable_and_shows_no_secret(kind: str) -> None:
    secret = "hooks" * 3

    async def story() -> None:
        async with raw_server(BROKEN[kind]) as port:
            outbound = Outbound(Names(), frozenset({f"127.0.0.1:{port}"}))
            with pytest.raises(Unavailable) as caught:
                await outbound.get(f"http://127.0.0.1:{port}/{secret}", 1_000_000, 5)
            assert secret not in "".join(traceback.format_exception(caught.value))

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["image/png; a=b", "", "nonsense", "\xff", "a/b/c", 'text/html; charset="', "/"])
def test_any_content_type_is_read(kind: str) -> None:
    async def story() -> None:
        head = OK + b"Content-Type: " + kind.encode("latin-1") + b"\r\nContent-Length: 2\r\n\r\nhi"
        async with raw_server(head) as port:
            outbound = Outbound(Names(), frozenset({f"127.0.0.1:{port}"}))
            body, content_type = await outbound.get(f"http://127.0.0.1:{port}/", 100, 5)
            assert body == b"hi"
            assert ";" not in content_type

    asyncio.run(story())


def test_a_port_where_nobody_listens_is_unavailable() -> None:
    async def story() -> None:
        async with Site().open() as site:
            pass
        with pytest.raises(Unavailable, match=NAME):
            await site.outbound().post(site.url(), b"", {}, 5)

    asyncio.run(story())


def certificate(folder: Path, *names: str) -> ssl.SSLContext:
    """A server's context with a certificate of its own making, which also stands in `folder`/cert.pem."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    alternatives = [x509.DNSName(n) if n[0].isalpha() else x509.IPAddress(ipaddress.ip_address(n)) for n in names]
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(secret)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_tls_is_verified_against_the_name_not_the_address(tmp_path: Path) -> None:
    context, asked = certificate(tmp_path, NAME), list[str | None]()
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    async def story() -> None:
        async with Site().open(tls=context) as site:
            names = Names(hook_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
            allowed = frozenset({f"{NAME}:{site.port}", f"other.example:{site.port}"})
            url = f"https://{NAME}:{site.port}/"
            assert await Outbound(names, allowed, trusted).post(url, b"", {}, 5) == 204
            assert asked == [NAME]
            assert site.seen[0][0].headers["Host"] == f"{NAME}:{site.port}"
            for outbound, target in (
                (Outbound(names, allowed, trusted), url.replace(NAME, "other.example")),
                (Outbound(names, allowed), url),
            ):
                with pytest.raises(Unavailable, match="Certificate"):
                    await outbound.post(target, b"", {}, 5)
            assert len(site.seen) == 1

    asyncio.run(story())
