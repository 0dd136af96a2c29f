"""Addresses that customers choose: which URLs are read at all, which addresses are public; how webhooks are signed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import string
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.provisional import domains

from render_platform.errors import Unavailable, UsageError
from render_platform.gateway.outbound import (
    AddressRefused,
    Outbound,
    SystemResolver,
    deliverable,
    is_public,
    parse_url,
    resolve_public,
    sign_webhook,
    webhook_headers,
    webhook_key,
)


class Names:
    """A resolver whose answers are given: those of a name in turn, the last one for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(sets) for name, sets in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        sets = self.answers.get(host)
        if not sets:
            raise OSError("no such name")
        return sets.pop(0) if len(sets) > 1 else sets[0]


NOT_PUBLIC = {
    "this network": "0.0.0.0 0.1.2.3",
    "private": "10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 192.168.255.255",
    "carriers": "100.64.0.0 100.100.100.200 100.127.255.255",
    "loopback": "127.0.0.1 127.255.255.255 ::1",
    "link-local, metadata": "169.254.0.1 169.254.169.254 169.254.170.2 fe80::1 fe80::1%eth0 fe80::a9fe:a9fe",
    "protocol assignments": "192.0.0.1 192.0.0.170 192.0.0.192 2001:1::1 2001:20::1",
    "documentation": "192.0.2.1 198.51.100.1 203.0.113.255 2001:db8::1 3fff::1",
    "benchmarks": "198.18.0.1 198.19.255.255 2001:2::1",
    "relays": "192.88.99.1",
    "multicast": "224.0.0.1 239.255.255.255 ff02::1 ff0e::1",
    "reserved, broadcast": "240.0.0.1 255.255.255.255",
    "a cloud's own": "168.63.129.16 fd00:ec2::254 fd20:ce::254",
    "unspecified": "::",
    "unique local": "fc00::1 fd12:3456::1",
    "site-local": "fec0::1",
    "discard": "100::1",
    "segment routing": "5f00::1",
    "mapped": "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0 ::ffff:7f00:1",
    "compatible": "::127.0.0.1 ::8.8.8.8 ::a00:1",
    "translated": "::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8",
    "NAT64": "64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::",
    "a network's own NAT64": "64:ff9b:1::10.0.0.1 64:ff9b:1:7f00:0:100:: 64:ff9b:1::8.8.8.8 64:ff9b:1:ffff::1",
    "6to4": "2002:7f00:1::1 2002:a00:1:: 2002:c0a8:101::1 2002:a9fe:a9fe::",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2 2001::1 2001:0:7f00:1::",
    "a zone": "2606:4700:4700::1111%1",
}
PUBLIC = """1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
    169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
    223.255.255.255 2606:4700:4700::1111 2001:4860:4860::8888 2a00:1450::1 2400:cb00::1 2001:200::1
    ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1"""


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_what_is_not_public_is_refused_alone_and_among_public_ones(kind: str) -> None:
    for text in NOT_PUBLIC[kind].split():
        assert not is_public(ipaddress.ip_address(text)), text
        for answer in ([text], ["8.8.8.8", text], [text, "8.8.8.8"], ["8.8.8.8", "2606:4700::1", text]):
            with pytest.raises(AddressRefused) as caught:
                asyncio.run(resolve_public("host.example", 443, Names(host_example=[answer])))
            assert text not in str(caught.value), "our own network is not shown"


@pytest.mark.parametrize("text", PUBLIC.split())
def test_public_addresses_are_given_as_they_are(text: str) -> None:
    found = asyncio.run(resolve_public("host.example", 443, Names(host_example=[[text, "8.8.4.4", text]])))
    assert found == [ipaddress.ip_address(text), ipaddress.ip_address("8.8.4.4")]


@given(st.integers(0, 2**32 - 1))
def test_an_address_is_judged_alike_however_it_is_carried(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    carried = [(0xFFFF << 32) + number, (0x64FF9B << 96) + number, (0x2002 << 112) + (number << 80) + 1]
    assert {is_public(ipaddress.IPv6Address(value)) for value in carried} == {is_public(plain)}


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_calls_otherwise(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(address) and not (address.version == 6 and (address.ipv4_mapped or address.sixtofour)):
        assert address.is_global or address in ipaddress.ip_network("64:ff9b::/96")
        assert not address.is_multicast


@pytest.mark.parametrize("answer", [[], ["not an address"], [""]])
def test_a_name_without_addresses_is_unavailable(answer: list[str]) -> None:
    names = Names(host_example=[answer])
    for name in ("host.example", "other.example"):
        with pytest.raises(Unavailable):
            asyncio.run(resolve_public(name, 443, names))


def test_each_call_resolves_anew_and_only_once() -> None:
    names = Names(rebind_example=[["8.8.8.8"], ["127.0.0.1"]])
    assert asyncio.run(resolve_public("rebind.example", 443, names)) == [ipaddress.ip_address("8.8.8.8")]
    assert names.asked == ["rebind.example"]
    with pytest.raises(AddressRefused):
        asyncio.run(resolve_public("rebind.example", 443, names))


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1"])
def test_a_literal_is_judged_without_asking_a_resolver(host: str) -> None:
    names = Names()
    with pytest.raises(AddressRefused):
        asyncio.run(resolve_public(host, 80, names))
    assert names.asked == []


GOOD = {
    "https://example.com": ("example.com", 443, "/"),
    "http://example.com/": ("example.com", 80, "/"),
    "HTTPS://Example.COM:8443/a/b?c=d&e=%20": ("example.com", 8443, "/a/b?c=d&e=%20"),
    "https://example.com?x=//a@b:1/": ("example.com", 443, "/?x=//a@b:1/"),
    "https://xn--bcher-kva.example/%2e%2e//x": ("xn--bcher-kva.example", 443, "/%2e%2e//x"),
    "https://my_bucket.s3.example.com/a.png": ("my_bucket.s3.example.com", 443, "/a.png"),
    "https://1.2.3.4.example.com/": ("1.2.3.4.example.com", 443, "/"),
    "http://8.8.8.8:1024/": ("8.8.8.8", 1024, "/"),
    "http://[2606:4700:4700::1111]:65535/x": ("2606:4700:4700::1111", 65535, "/x"),
}


@pytest.mark.parametrize("url", GOOD)
def test_a_plain_url_is_read_and_its_path_kept(url: str) -> None:
    target = parse_url(url)
    assert (target.host, target.port, target.url.raw_path_qs) == GOOD[url]
    assert target.url.raw_host == target.host
    assert target.url.port == target.port


BAD = [
    *("", "example.com", "//example.com/", "http:", "http://", "http:///x", "https:example.com", "http:/example.com"),
    *(
        f"{scheme}://example.com/"
        for scheme in ("ftp", "file", "gopher", "ws", "unix", "http+unix", "javascript", "httpſ")
    ),
    *("http://0x7f.1/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://017700000001/", "http://0177.0.0.1/"),
    *(
        "http://2130706433/",
        "http://127.1/",
        "http://127.0.1/",
        "http://127.0.0.01/",
        "http://127.0.0.1./",
        "http://0/",
    ),
    *("http://1.1.1.1.1/", "http://256.1.1.1/", "http://1.1.1.0x1/", "http://a.0x7f/", "http://a.1/", "http://1.1/"),
    *(
        "http://１２７.0.0.1/",
        "http://127。0。0。1/",
        "http://ⓔxample.com/",
        "http://bücher.example/",
        "http://exam\u200bple.com/",
    ),
    *(
        "http://example.com./",
        "http://.example.com/",
        "http://a..example.com/",
        "http://-a.example/",
        "http://a-.example/",
    ),
    *("http://localhost/", "http://intranet/", "http://com/", "http://" + "a" * 64 + ".example/"),
    *(
        "http://user@example.com/",
        "http://user:pw@example.com/",
        "http://@example.com/",
        "http://a.example:80@b.example/",
    ),
    *(
        "http://example.com\\@evil.example/",
        "http://example.com/\\evil",
        "http://example.com#@evil.example/",
        "http://a.b/#x",
    ),
    *(
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1/",
        "http://::1/",
        "http://[]/",
        "http://[v1.a]/",
    ),
    *("http://[8.8.8.8]/", "http://[1::2::3]/", "http://[:::]/", "http://[2606:4700::1111]a/", "http://[[::1]]/"),
    *("http://example.com:/", "http://example.com:0/", "http://example.com:-1/", "http://example.com:65536/"),
    *(f"http://example.com:{port}/" for port in (1, 21, 22, 23, 25, 53, 79, 81, 110, 442, 444, 445, 587, 993, 1023)),
    *("http://example.com:99999/", "http://example.com:８０/", "http://example.com:80:80/", "http://example.com: 80/"),
    *(
        "http://example.com/ x",
        "http://exa mple.com/",
        " http://example.com/",
        "http://example.com/\n",
        "http://a.b/\r\nX: y",
    ),
    *(
        "http://example.com/\0",
        "http://example.com/é",
        "http://example.com\t/",
        "http://%31%32%37.0.0.1/",
        "http://ex%61mple.com/",
    ),
    "https://example.com/" + "a" * 2_030,
]


@pytest.mark.parametrize("url", BAD)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(AddressRefused) as caught:
        parse_url(url)
    assert "pw" not in str(caught.value)
    assert url == "" or url not in str(caught.value)


def test_a_refused_url_asks_no_resolver() -> None:
    names = Names()
    for url in ("http://localhost/", "http://127.1/", "http://user@hook.example/", "https://hook.example:22/"):
        with pytest.raises(AddressRefused):
            asyncio.run(Outbound(names).post(url, b"", {}, 5))
        with pytest.raises(AddressRefused):
            asyncio.run(Outbound(names).get(url, 1, 5))
    assert names.asked == []


def test_a_url_may_have_2048_characters() -> None:
    assert parse_url("https://example.com/" + "a" * 2_028).port == 443


@pytest.mark.parametrize("url", ["http://localhost:22/", "http://127.0.0.1:9/", "http://[::1]:9/", "http://backend:9/"])
def test_what_configuration_allows_is_that_host_and_port_exactly(url: str) -> None:
    authority = url.removeprefix("http://").rstrip("/")
    assert parse_url(url, frozenset({authority})).private
    for other in (f"x{authority}", f"{authority}0", authority.partition(":")[0], "*"):
        try:
            assert not parse_url(url, frozenset({other})).private
        except AddressRefused:
            continue


URLS = st.one_of(
    st.text(),
    st.text(string.printable),
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["http", "https", "HTTP", "ftp"]),
        st.text("0123456789abcdefx.:[]%@-_1１。", max_size=30) | st.ip_addresses().map(str) | domains(),
        st.sampled_from(["", ":80", ":8080", ":22", ":99999", ":x"]),
        st.sampled_from(["", "/", "?"]) | st.text().map("/".__add__),
    ),
)


@given(URLS)
@example("http://[::]")
def test_any_url_is_read_or_refused(url: str) -> None:
    """And what is read has one reading: the connection's own parser sees no other host."""
    try:
        target = parse_url(url)
    except AddressRefused:
        return
    assert url.isascii()
    assert target.host in url.lower()
    assert target.url.raw_host == target.host
    assert target.url.user is None
    assert target.port in (80, 443) or target.port >= 1_024


def test_the_systems_resolver_gives_every_address() -> None:
    resolver = SystemResolver()
    try:
        assert set(asyncio.run(resolver.resolve("localhost", 80))) <= {"127.0.0.1", "::1"} != set()
        with pytest.raises(AddressRefused):
            asyncio.run(resolve_public("localhost", 80, resolver))
    finally:
        resolver.close()


@pytest.mark.parametrize(
    ("secret", "message", "at_s", "payload", "signature"),
    [
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            '{"test": 2432232314}',
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "whsec_plJ3nmyCDGBKInavdOK15jsl",
            "msg_loFOjxBNrRLzqYUf",
            1_731_705_121,
            '{"event_type":"ping","data":{"success":true}}',
            "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=",
        ),
    ],
)
def test_webhooks_are_signed_as_the_published_vectors_say(
    secret: str, message: str, at_s: int, payload: str, signature: str
) -> None:
    assert sign_webhook(webhook_key(secret), message, at_s, payload.encode()) == signature


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """RFC 2104, written out."""
    block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + data).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in block) + inner).digest()


@given(st.binary(min_size=16, max_size=64), st.uuids(), st.integers(0, 2**40), st.binary(max_size=300))
def test_a_receiver_that_knows_the_standard_verifies_it(key: bytes, message: object, at_s: int, payload: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    headers = webhook_headers(webhook_key(secret), f"msg_{message}", at_s, payload)
    assert headers.keys() == {"webhook-id", "webhook-timestamp", "webhook-signature"}
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + payload
    version, _, signature = headers["webhook-signature"].partition(",")
    assert (version, base64.b64decode(signature)) == ("v1", hmac_sha256(key, signed))


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "whsec_AAAA", "plJ3nmyCDGBKInavdOK15jsl", "whsec_" + "A" * 92, "whsec_pl*3nmyCDGBKInavdOK15jsl"],
)
def test_a_malformed_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(UsageError) as caught:
        webhook_key(secret)
    assert secret.removeprefix("whsec_") in ("", "AAAA") or secret[6:] not in str(caught.value)


def test_only_200_to_299_is_delivered() -> None:
    assert [status for status in range(100, 600) if deliverable(status)] == list(range(200, 300))
