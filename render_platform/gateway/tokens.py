"""JWTs of configured issuers, verified against the key sets in their files.

- the algorithm is fixed by the key (its kty and crv, and its alg if given), and the header must name that very one:
  Ed25519, RS256 from 2,048 bits, ES256. So `none` and HS* never verify;
- a `typ`, where there is one, says JWT or at+jwt: another kind of token of the same issuer is no credential;
- headers that bring a key of their own or change the rules (`crit`, `jku`, `x5u`, `x5c`, `jwk`) are refused;
- `exp`, `iss` and `aud` are required, `nbf` and `iat` honoured, by a clock that the caller reads;
- a token has one reading: a JSON member that stands twice is refused, and so is base64url that has another spelling.

No error or log holds a token or a part of one. What may be shown to the sender is all that Unauthorized says.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import structlog
from jwt import PyJWTError
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError

CLAIMS = ("sub", "customer_id", "user_id")
RESERVED_ALIASES = frozenset({"key", "trace", "anonymous"})
MAX_TOKEN_CHARACTERS, MAX_JWKS_BYTES, MAX_ID_CHARACTERS, MIN_RSA_BITS = 8_192, 262_144, 200, 2_048
MAX_LEEWAY_S = 60
LOOK_AGAIN_US = US_PER_SECOND

_TOKEN = re.compile(r"(?:[A-Za-z0-9_-]+\.){2}[A-Za-z0-9_-]+", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}", re.ASCII)
_TYPES = ("jwt", "at+jwt", "application/at+jwt")
_REFUSED_HEADERS = frozenset({"crit", "jku", "x5u", "x5c", "jwk"})
_SECRET_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_KINDS: dict[tuple[Any, Any], tuple[frozenset[str], Algorithm]] = {
    ("OKP", "Ed25519"): (frozenset({"EdDSA", "Ed25519"}), OKPAlgorithm()),
    ("RSA", None): (frozenset({"RS256"}), RSAAlgorithm(RSAAlgorithm.SHA256)),
    ("EC", "P-256"): (frozenset({"ES256"}), ECAlgorithm(ECAlgorithm.SHA256)),
}
"""(kty, crv) → the names that a header may use for the one algorithm, and the algorithm."""
_log = structlog.get_logger()


class Unauthorized(UsageError):
    """No credential, or none that is valid. The message may be shown to whoever sent it."""

    def __init__(self, message: str, remedy: str = "send a valid API key or token") -> None:
        super().__init__(message, remedy)


@dataclass(frozen=True, slots=True)
class Issuer:
    """Whose tokens are accepted, and which of their claims is the customer. `alias` is its name in our records."""

    alias: str
    issuer: str
    audience: str
    claim: str
    jwks_file: Path
    leeway_s: int = 30

    def __post_init__(self) -> None:
        if not _ALIAS.fullmatch(self.alias) or self.alias in RESERVED_ALIASES:
            raise UsageError("the issuer's alias is not a short lower-case name, or reserved", "call it otherwise")
        if not self.issuer or not self.audience:
            raise UsageError(f"the issuer {self.alias} has no iss or no aud", "set issuer and audience")
        if self.claim not in CLAIMS:
            raise UsageError(f"the claim of the issuer {self.alias} is unknown", f"use one of {', '.join(CLAIMS)}")
        if not 0 <= self.leeway_s <= MAX_LEEWAY_S:
            raise UsageError(f"the leeway of the issuer {self.alias} is {self.leeway_s} s", "set it to 0 … 60")


class Verified(NamedTuple):
    """A token that is good until `expires_us`, the leeway included."""

    alias: str
    customer_id: str
    expires_us: int


class Tokens:
    """Verifies tokens. UsageError at start where an issuer's keys cannot be read or are not to be trusted."""

    def __init__(self, issuers: Collection[Issuer]) -> None:
        self._issuers = {issuer.issuer: _KeySet(issuer) for issuer in issuers}
        if len(self._issuers) != len(issuers) or len({issuer.alias for issuer in issuers}) != len(issuers):
            raise UsageError("two issuers have the same iss or alias", "configure each issuer once")

    def verify(self, token: str, now_us: int) -> Verified:
        """Whose token it is; Unauthorized for any that is not one of ours, whole, signed and current."""
        if len(token) > MAX_TOKEN_CHARACTERS or not _TOKEN.fullmatch(token):
            raise Unauthorized("the token is malformed or too long")
        signed, _, signature = token.rpartition(".")
        header, claims = (_object(part) for part in signed.split("."))
        iss = claims.get("iss")
        keys = self._issuers.get(iss) if isinstance(iss, str) else None
        if keys is None:
            raise Unauthorized("the token is not of a known issuer")
        if not keys.find(header, now_us).verifies(signed.encode(), _unbase64url(signature)):
            raise Unauthorized("the token's signature is wrong")
        return _check_claims(claims, keys.issuer, now_us)


@dataclass(frozen=True, slots=True)
class _Key:
    kid: str | None
    names: frozenset[str]
    algorithm: Algorithm
    public: Any

    def verifies(self, data: bytes, signature: bytes) -> bool:
        return self.algorithm.verify(data, self.public, signature)


class _KeySet:
    """The keys of one issuer's file. It is looked at once a second at most; the last good keys stay when that fails."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self._stamp, self._keys = _read(issuer)
        self._looked_us = 0

    def find(self, header: dict[str, Any], now_us: int) -> _Key:
        """The one key that the header names, for the one algorithm that this key has."""
        self._look_again(now_us)
        if not _REFUSED_HEADERS.isdisjoint(header):
            raise Unauthorized("the token's header brings keys or rules of its own")
        if str(header.get("typ", "JWT")).lower() not in _TYPES:
            raise Unauthorized("the token is of another type", "send an access token")
        found = [key for key in self._keys if "kid" not in header or key.kid == header["kid"]]
        if len(found) != 1:
            raise Unauthorized("the token does not name one known key")
        if header.get("alg") not in list(found[0].names):  # a list: alg may be anything, hashable or not
            raise Unauthorized("the token's algorithm is not the one of its key")
        return found[0]

    def _look_again(self, now_us: int) -> None:
        if 0 <= now_us - self._looked_us < LOOK_AGAIN_US:
            return
        self._looked_us = now_us
        try:
            if _stamp(self.issuer.jwks_file) != self._stamp:
                self._stamp, self._keys = _read(self.issuer)
        except OSError as error:
            _log.error("jwks_not_read", issuer=self.issuer.alias, error=error.strerror)
        except UsageError as error:
            _log.error("jwks_not_read", issuer=self.issuer.alias, error=error.message)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(issuer: Issuer) -> tuple[tuple[int, int, int], Sequence[_Key]]:
    """The file's stamp, taken before it is read, and its keys; UsageError where they cannot be used."""
    where = f"the key set of the issuer {issuer.alias}"
    try:
        stamp = _stamp(issuer.jwks_file)
        with issuer.jwks_file.open("rb") as file:
            data = file.read(MAX_JWKS_BYTES)  # what is cut off there does not parse
    except OSError as error:
        raise UsageError(
            f"{where} cannot be read: {error.strerror}", "give jwks_file a file that can be read"
        ) from error
    try:
        members = _parse(data).get("keys")
    except ValueError:
        members = None
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise UsageError(f"{where} is not one, or too long", 'write {"keys": […]} in it, each member once')
    keys = [key for member in members if (key := _key(member, where)) is not None]
    kids = [key.kid for key in keys]
    if not keys or len(set(kids)) != len(kids):
        raise UsageError(f"{where} has no key to verify with, or two of one kid", "copy the issuer's key set again")
    return stamp, keys


def _key(jwk: dict[str, Any], where: str) -> _Key | None:
    """The key of a JWK; None for one that is for something else, which a set may well have (RFC 7517, section 5)."""
    if not _SECRET_MEMBERS.isdisjoint(jwk):
        raise UsageError(
            f"{where} holds a private or symmetric key", "put public keys only in it, and replace that key"
        )
    kinds = [kind for kind in _KINDS if kind == (jwk.get("kty"), jwk.get("crv"))]
    if not kinds or jwk.get("use", "sig") != "sig":
        return None
    names, algorithm = _KINDS[kinds[0]]
    if "alg" in jwk:
        names = frozenset(name for name in names if name == jwk["alg"])
    kid = jwk.get("kid")
    try:
        public = algorithm.from_jwk(jwk)
    except (PyJWTError, ValueError, TypeError):
        public = None
    if public is None or not isinstance(kid, str | None):
        raise UsageError(f"{where} holds a malformed key", "copy the issuer's key set again")
    if kinds[0] == ("RSA", None) and public.key_size < MIN_RSA_BITS:
        raise UsageError(f"{where} holds an RSA key of {public.key_size} bits", f"use {MIN_RSA_BITS} or more")
    return _Key(kid, names, algorithm, public) if names else None


def _check_claims(claims: dict[str, Any], issuer: Issuer, now_us: int) -> Verified:
    audience = claims.get("aud")
    if issuer.audience not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthorized("the token is for somebody else")
    leeway_us = issuer.leeway_s * US_PER_SECOND
    if "exp" not in claims or now_us >= _time_us(claims, "exp") + leeway_us:
        raise Unauthorized("the token has expired, or never does", "send a new token")
    if any(now_us < _time_us(claims, name) - leeway_us for name in ("nbf", "iat") if name in claims):
        raise Unauthorized("the token is not valid yet", "check the clock of its issuer")
    customer_id = claims.get(issuer.claim)
    if not is_customer_id(customer_id):
        raise Unauthorized("the token does not say who the customer is", f"the claim is {issuer.claim}")
    return Verified(issuer.alias, customer_id, _time_us(claims, "exp") + leeway_us)


def _time_us(claims: dict[str, Any], name: str) -> int:
    seconds = claims[name]
    if type(seconds) not in (int, float) or not 0 <= seconds < 2**53:
        raise Unauthorized(f"the token's {name} is not a time")
    return int(seconds * US_PER_SECOND)


def is_customer_id(value: object) -> TypeGuard[str]:
    """Whether it is 1 … 200 characters that can be printed: no control or invisible ones, no lone surrogates."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS and value.isprintable()


def _object(part: str) -> dict[str, Any]:
    try:
        return _parse(_unbase64url(part))
    except ValueError:
        raise Unauthorized("the token is malformed or too long") from None


def _parse(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, each of its members once; ValueError for anything else."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member stands twice")
    return found


def _unbase64url(text: str) -> bytes:
    """The bytes of unpadded base64url; empty, which is nothing that could verify, where it is not exactly that."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return b""
    return data if base64.urlsafe_b64encode(data).decode().rstrip("=") == text else b""
