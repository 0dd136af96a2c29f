"""Tokens: every known attack on a JWT is refused, every good one is read, and keys can be changed while we run."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError
from render_platform.gateway.tokens import Issuer, Tokens, Unauthorized, Verified

NOW_S = 1_700_157_600
NOW_US = NOW_S * US_PER_SECOND
RSA = rsa.generate_private_key(65_537, 2_048)
WEAK_RSA = rsa.generate_private_key(65_537, 1_024)
EC = ec.generate_private_key(ec.SECP256R1())
EC384 = ec.generate_private_key(ec.SECP384R1())
ED, OTHER_ED = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def number(value: int, size: int | None = None) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    """The public JWK of a private key, written down from RFC 7517 and 8037."""
    public = key.public_key()
    if isinstance(key, rsa.RSAPrivateKey):
        numbers = public.public_numbers()
        return {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e), **more}
    if isinstance(key, ec.EllipticCurvePrivateKey):
        numbers, size = public.public_numbers(), (key.key_size + 7) // 8
        curve = f"P-{key.key_size}"
        return {"kty": "EC", "crv": curve, "x": number(numbers.x, size), "y": number(numbers.y, size), **more}
    return {"kty": "OKP", "crv": "Ed25519", "x": b64(public.public_bytes_raw()), **more}


def signature(key: Any, data: bytes) -> bytes:
    if isinstance(key, bytes):
        return hmac.digest(key, data, hashlib.sha256)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        size = (key.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    return bytes(key.sign(data)) if key is not None else b""


def token_of(header: str, claims: str, key: Any, encoding: str = "utf-8") -> str:
    signed = f"{b64(header.encode(encoding))}.{b64(claims.encode(encoding))}"
    return f"{signed}.{b64(signature(key, signed.encode()))}"


GOOD: dict[str, Any] = {"iss": "https://id.example", "aud": "render", "sub": "acme", "exp": NOW_S + 600}


def make(key: Any = ED, alg: Any = "EdDSA", kid: Any = "ed", head: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token; a header or claim of `...` is left out."""
    header = {"typ": "JWT", "alg": alg, "kid": kid, **(head or {})}
    kept = [{k: v for k, v in part.items() if v is not ...} for part in (header, GOOD | claims)]
    return token_of(json.dumps(kept[0]), json.dumps(kept[1]), key)


def write(path: Path, *keys: Any) -> Path:
    path.write_text(json.dumps({"keys": list(keys)}))
    return path


def issuer(path: Path, **changes: Any) -> Issuer:
    values = {"alias": "example", "issuer": GOOD["iss"], "audience": "render", "claim": "sub", "jwks_file": path}
    return Issuer(**values | changes)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    keys = (jwk(ED, kid="ed"), jwk(RSA, kid="rsa"), jwk(EC, kid="ec", alg="ES256", use="sig"))
    return Tokens([issuer(write(tmp_path_factory.mktemp("keys") / "jwks.json", *keys))])


def refused(tokens: Tokens, token: str) -> str:
    with pytest.raises(Unauthorized) as caught:
        tokens.verify(token, NOW_US)
    assert all(part not in str(caught.value) for part in token.split(".") if part), "nothing of the token is shown"
    return caught.value.message


@pytest.mark.parametrize(
    ("key", "alg", "kid"), [(ED, "EdDSA", "ed"), (ED, "Ed25519", "ed"), (RSA, "RS256", "rsa"), (EC, "ES256", "ec")]
)
def test_a_good_token_is_read(tokens: Tokens, key: Any, alg: str, kid: str) -> None:
    verified = tokens.verify(make(key, alg, kid, nbf=NOW_S, iat=NOW_S), NOW_US)
    assert verified == Verified("example", "acme", (NOW_S + 600 + 30) * US_PER_SECOND)


PUBLIC_PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
ATTACKS: dict[str, str] = {
    "no signature": make(None, "none"),
    "none, in capitals": make(None, "NONE"),
    "none, with the signature of another": make(ED, "none"),
    "HS256 with the RSA key's PEM as secret": make(PUBLIC_PEM, "HS256", "rsa"),
    "HS256 with the Ed25519 key's bytes as secret": make(ED.public_key().public_bytes_raw(), "HS256"),
    "HS256 and no kid": make(PUBLIC_PEM, "HS256", ...),
    "another's key": make(OTHER_ED),
    "key of another type under its kid": make(RSA, "RS256", "ed"),
    "the algorithm of another type": make(RSA, "EdDSA", "ed"),
    "right key, another's kid": make(ED, "EdDSA", "rsa"),
    "RS512": make(RSA, "RS512", "rsa"),
    "PS256": make(RSA, "PS256", "rsa"),
    "ES384": make(EC384, "ES384", "ec"),
    "weak RSA": make(WEAK_RSA, "RS256", "rsa"),
    "unknown kid": make(kid="other"),
    "kid of another type": make(kid=1),
    "kid that is a list": make(kid=["ed"]),
    "kid that is null": make(kid=None),
    "no kid where there are several keys": make(kid=...),
    "alg left out": make(alg=...),
    "alg that is a list": make(alg=["EdDSA"]),
    "alg that is null": make(alg=None),
    "crit": make(head={"crit": ["exp"]}),
    "an empty crit": make(head={"crit": []}),
    "jku": make(head={"jku": "https://evil.example/jwks.json"}),
    "x5u": make(head={"x5u": "https://evil.example/cert"}),
    "x5c": make(head={"x5c": ["MIIB"]}),
    "jwk": make(OTHER_ED, head={"jwk": jwk(OTHER_ED)}),
    "a logout token": make(head={"typ": "logout+jwt"}),
    "a type that is no text": make(head={"typ": ["JWT"]}),
    "aud left out": make(aud=...),
    "another aud": make(aud="other"),
    "no aud of several": make(aud=["other", "render2"]),
    "aud that is an object": make(aud={"render": 1}),
    "aud that is part of ours": make(aud="rend"),
    "aud that has ours in it": make(aud="render-2"),
    "iss left out": make(iss=...),
    "another iss": make(iss="https://evil.example"),
    "iss with a slash more": make(iss="https://id.example/"),
    "iss that is a list": make(iss=["https://id.example"]),
    "exp left out": make(exp=...),
    "exp null": make(exp=None),
    "exp past": make(exp=NOW_S - 30),
    "exp as text": make(exp=str(NOW_S + 600)),
    "exp true": make(exp=True),
    "exp infinite": make(exp=float("inf")),
    "exp no number": make(exp=float("nan")),
    "exp negative": make(exp=-1),
    "exp too large": make(exp=10**400),
    "nbf in the future": make(nbf=NOW_S + 31),
    "nbf true": make(nbf=True),
    "nbf as text": make(nbf="0"),
    "iat in the future": make(iat=NOW_S + 31),
    "sub left out": make(sub=...),
    "sub empty": make(sub=""),
    "sub a number": make(sub=7),
    "sub null": make(sub=None),
    "sub too long": make(sub="a" * 201),
    "sub with a newline": make(sub="acme\n"),
    "sub with NUL": make(sub="ac\0me"),
    "sub with a lone surrogate": make(sub="\ud800"),
    "sub with an invisible character": make(sub="ac\u200bme"),
    "sub with text turned round": make(sub="acme\u202e"),
    "another claim": make(sub=..., customer_id="acme"),
    "too long": make(padding="a" * 8_192),
    "nested too deep": token_of("[" * 4_000, "{}", ED),
    "header no object": token_of("[]", json.dumps(GOOD), ED),
    "payload no object": token_of('{"alg":"EdDSA","kid":"ed"}', '"acme"', ED),
    "UTF-16": token_of('{"alg":"EdDSA","kid":"ed"}', json.dumps(GOOD), ED, "utf-16"),
    "UTF-8 with a mark": token_of('{"alg":"EdDSA","kid":"ed"}', json.dumps(GOOD), ED, "utf-8-sig"),
    "header twice alg": token_of('{"alg":"none","kid":"ed","alg":"EdDSA"}', json.dumps(GOOD), ED),
    "payload twice sub": token_of('{"alg":"EdDSA","kid":"ed"}', json.dumps(GOOD)[:-1] + ',"sub":"victim"}', ED),
    "twice, deeper": token_of('{"alg":"EdDSA","kid":"ed"}', json.dumps(GOOD)[:-1] + ',"x":{"a":1,"a":1}}', ED),
    "two parts": make().rpartition(".")[0],
    "four parts": make() + ".e30",
    "an encrypted one": make() + ".e30.e30",
    "empty signature": make().rpartition(".")[0] + ".",
    "short signature": make()[:-8],
    "signature with padding": make() + "==",
    "spaces": f" {make()}",
    "a newline": f"{make()}\n",
    "empty": "",
    "dots": "..",
    "not ASCII": make() + "é",
    "full-width": make().replace("e", "ｅ"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(tokens: Tokens, attack: str) -> None:
    refused(tokens, ATTACKS[attack])


def test_an_attack_is_refused_for_its_own_reason(tokens: Tokens) -> None:
    assert refused(tokens, ATTACKS["HS256 with the RSA key's PEM as secret"]) == (
        "the token's algorithm is not the one of its key"
    )
    assert refused(tokens, ATTACKS["another's key"]) == "the token's signature is wrong"
    assert refused(tokens, ATTACKS["jwk"]) == "the token's header brings keys or rules of its own"
    assert refused(tokens, ATTACKS["another aud"]) == "the token is for somebody else"
    assert refused(tokens, ATTACKS["exp past"]) == "the token has expired, or never does"
    assert refused(tokens, ATTACKS["nbf in the future"]) == "the token is not valid yet"


def test_a_signature_has_one_spelling(tokens: Tokens) -> None:
    """The last character of 86 carries two bits that mean nothing: another one there is another text of the same."""
    token = make()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    for other in range(last + 1, last + 16):
        refused(tokens, token[:-1] + alphabet[other % 64])


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_one_changed_bit_anywhere_is_refused(tokens: Tokens, position: int, bit: int) -> None:
    data = bytearray(make().encode())
    data[position % len(data)] ^= 1 << bit
    refused(tokens, data.decode("latin-1"))


def test_times_are_judged_by_the_given_clock_with_the_leeway(tokens: Tokens) -> None:
    token = make(exp=NOW_S, nbf=NOW_S - 100, iat=NOW_S - 100.5)
    first, last = (NOW_S - 130) * US_PER_SECOND, (NOW_S + 30) * US_PER_SECOND - 1
    assert tokens.verify(token, first) == tokens.verify(token, last) == ("example", "acme", last + 1)
    for outside in (first - 1, last + 1):
        with pytest.raises(Unauthorized):
            tokens.verify(token, outside)


@pytest.mark.parametrize("claim", ["sub", "customer_id", "user_id"])
def test_the_configured_claim_is_the_customer(tmp_path: Path, claim: str) -> None:
    made = Tokens([issuer(write(tmp_path / "k", jwk(ED)), claim=claim)])
    token = make(kid=..., sub="one", customer_id="two", user_id="three", aud=["other", "render"])
    expected = {"sub": "one", "customer_id": "two", "user_id": "three"}[claim]
    assert made.verify(token, NOW_US).customer_id == expected


def test_issuers_do_not_vouch_for_each_other(tmp_path: Path) -> None:
    one = issuer(write(tmp_path / "1", jwk(ED, kid="ed")))
    two = issuer(write(tmp_path / "2", jwk(OTHER_ED, kid="ed")), alias="two", issuer="https://two.example")
    made = Tokens([one, two])
    assert made.verify(make(), NOW_US).alias == "example"
    assert made.verify(make(OTHER_ED, iss="https://two.example"), NOW_US).alias == "two"
    refused(made, make(OTHER_ED))
    refused(made, make(ED, iss="https://two.example"))
    for twin in (issuer(two.jwks_file, alias="two"), issuer(two.jwks_file, issuer="https://two.example")):
        with pytest.raises(UsageError, match="same iss or alias"):
            Tokens([one, twin])


def private_jwk() -> dict[str, Any]:
    return jwk(ED, d=b64(ED.private_bytes_raw()))


BAD_SETS: dict[str, Callable[[], object]] = {
    "a private key": lambda: {"keys": [jwk(RSA), private_jwk()]},
    "a symmetric key": lambda: {"keys": [jwk(RSA), {"kty": "oct", "k": b64(b"secret")}]},
    "weak RSA": lambda: {"keys": [jwk(WEAK_RSA)]},
    "no key": lambda: {"keys": []},
    "only keys for other things": lambda: {"keys": [jwk(RSA, use="enc"), jwk(EC384), jwk(RSA, alg="RS512")]},
    "two of one kid": lambda: {"keys": [jwk(ED, kid="a"), jwk(RSA, kid="a")]},
    "a kid that is no text": lambda: {"keys": [jwk(ED, kid=1)]},
    "a point off the curve": lambda: {"keys": [jwk(EC) | {"y": number(1, 32)}]},
    "numbers as members": lambda: {"keys": [jwk(RSA) | {"n": 3}]},
    "a member left out": lambda: {"keys": [{"kty": "OKP", "crv": "Ed25519"}]},
    "one key": lambda: jwk(ED),
    "keys that are none": lambda: {"keys": ["a"]},
    "a list": lambda: [jwk(ED)],
    "too long": lambda: {"keys": [jwk(ED)], "more": "a" * 262_144},
}


@pytest.mark.parametrize("bad", BAD_SETS)
def test_a_bad_key_set_is_refused_at_start_and_not_shown(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(BAD_SETS[bad]()))
    with pytest.raises(UsageError, match="the key set of the issuer example") as caught:
        Tokens([issuer(path)])
    assert private_jwk()["d"] not in str(caught.value)
    assert b64(b"secret") not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"keys":[],"keys":[]}', "\ufeff{}", "[" * 100_000])
def test_what_is_no_key_set_is_refused_at_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text)
    with pytest.raises(UsageError, match="is not one"):
        Tokens([issuer(tmp_path / "k")])
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Tokens([issuer(tmp_path / "missing")])


def test_a_set_may_hold_keys_for_other_things(tmp_path: Path) -> None:
    others = (jwk(RSA, use="enc", alg="RSA-OAEP", kid="ed"), {"kty": "new"}, jwk(RSA, alg="RS512"))
    made = Tokens([issuer(write(tmp_path / "k", *others, jwk(ED, kid="ed")))])
    assert made.verify(make(), NOW_US).customer_id == "acme"
    refused(made, make(RSA, "RS512", ...))


def test_changed_keys_are_read_again_and_a_failed_read_keeps_the_old_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "k", jwk(ED, kid="ed"))
    made, now = Tokens([issuer(path)]), NOW_US
    old, new = make(), make(OTHER_ED, kid="new")
    made.verify(old, now)

    def change(text: str) -> None:
        nonlocal now
        now += US_PER_SECOND
        path.write_text(text)
        os.utime(path, ns=(now, now))

    secret = json.dumps({"keys": [private_jwk()]})
    for broken in ("{", secret, ""):
        change(broken)
        with capture_logs() as logs:
            assert made.verify(old, now).customer_id == "acme"
        assert [(line["event"], line["issuer"]) for line in logs] == [("jwks_not_read", "example")]
        assert private_jwk()["d"] not in str(logs)
    path.unlink()
    now += US_PER_SECOND
    with capture_logs() as logs:
        assert made.verify(old, now).customer_id == "acme"
        assert made.verify(old, now).customer_id == "acme"
    assert len(logs) == 1, "it is looked at once a second"
    change(json.dumps({"keys": [jwk(OTHER_ED, kid="new")]}))
    assert made.verify(new, now).customer_id == "acme"
    with pytest.raises(Unauthorized):
        made.verify(old, now)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({"alias": alias}, "alias")
            for alias in ("key", "trace", "anonymous", "", "A", "1a", "a_b", "a" * 33, "a\n")
        ],
        ({"issuer": ""}, "no iss"),
        ({"audience": ""}, "no iss or no aud"),
        ({"claim": "email"}, "claim"),
        ({"leeway_s": 61}, "leeway"),
        ({"leeway_s": -1}, "leeway"),
    ],
)
def test_an_issuer_that_could_not_be_trusted_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        issuer(Path("k"), **changes)
