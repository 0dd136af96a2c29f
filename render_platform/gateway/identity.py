"""Who is calling: API keys, tokens of configured issuers, and what our own tables say about a customer.

- an API key is `rp_<key id>_<secret>`; only SHA-256 of the whole key is stored. Its secret is 256 random bits, which
  nobody can guess: a slow password hash would protect nothing more, and cost every request;
- tier, priority and limits come from our tables, never from a token (`tokens` says what a token must be);
- a customer is (issuer, customer id); holders of API keys have the issuer "key", which no token's issuer can be called;
- what was verified is remembered for at most five seconds, so that a revocation takes effect within them.

Everything here is called from one thread. No error, log or repr holds a credential or a part of one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from render_platform.clock import US_PER_SECOND, Clock, Ids
from render_platform.database import Database, metadata
from render_platform.errors import UsageError
from render_platform.gateway.outbound import webhook_key
from render_platform.gateway.tokens import Issuer as Issuer
from render_platform.gateway.tokens import Tokens as Tokens
from render_platform.gateway.tokens import Unauthorized as Unauthorized
from render_platform.gateway.tokens import is_customer_id
from render_platform.outbox import KEYS_REMEMBERED_S

ROLES = frozenset({"customer", "meter", "auditor", "operator"})
PRIORITIES = ("low", "normal", "high")
API_KEY_ISSUER = "key"
RESERVED_SOURCES = ("gateway/", "trace/")
ANY = "*"
REMEMBER_US = KEYS_REMEMBERED_S * US_PER_SECOND
REMEMBERED = 10_000

_KEY = re.compile(r"rp_([0-9a-f]{16})_[A-Za-z0-9_-]{43}", re.ASCII)
_KEY_CHARACTERS = 3 + 16 + 1 + 43
_BEARER = re.compile(r"bearer +([!-~]+)", re.ASCII | re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}", re.ASCII)


def _limits() -> list[sa.Column[Any]]:
    """The columns of Terms, which two tables have."""
    return [
        sa.Column("pricing_tier", sa.Text, nullable=False),
        sa.Column("priority_max", sa.Text, nullable=False),
        sa.Column("rate_per_s", sa.BigInteger),
        sa.Column("burst", sa.BigInteger),
    ]


api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("key_hash", sa.LargeBinary, nullable=False),
    sa.Column("issuer", sa.Text, nullable=False),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("roles", sa.Text, nullable=False),  # comma separated, as sources and customers are
    sa.Column("sources", sa.Text),  # of meter credentials: the CloudEvents sources that they may report
    sa.Column("customers", sa.Text),  # of meter credentials: whom they may report about; * is anyone
    *_limits(),
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("revoked_us", sa.BigInteger),
)
customer_settings = sa.Table(
    "customer_settings",
    metadata,
    sa.Column("issuer", sa.Text, primary_key=True),
    sa.Column("customer_id", sa.Text, primary_key=True),
    *_limits(),
    sa.Column("webhook_secret", sa.Text),  # as it is, because it signs
)


class Forbidden(UsageError):
    """The credential is valid, and does not allow this."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a customer gets. `rate_per_s` and `burst` are requests; None is the gateway's default."""

    pricing_tier: str = "standard"
    priority_max: str = "normal"
    rate_per_s: int | None = None
    burst: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.pricing_tier):
            raise UsageError("the pricing tier is not a name", "use letters, digits and ._:/@+-")
        if self.priority_max not in PRIORITIES:
            raise UsageError("the priority is unknown", f"use one of {', '.join(PRIORITIES)}")
        if any(limit is not None and not 1 <= limit <= 1_000_000 for limit in (self.rate_per_s, self.burst)):
            raise UsageError("a limit is out of range", "set rate_per_s and burst to 1 … 1,000,000")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling and what they may do. `sources` and `customers` bind meter credentials; None is none."""

    issuer: str
    customer_id: str
    roles: frozenset[str]
    pricing_tier: str
    priority_max: str
    rate_per_s: int | None
    burst: int | None
    sources: frozenset[str] | None = None
    customers: frozenset[str] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.issuer, self.customer_id

    def require(self, role: str) -> None:
        if role not in self.roles:
            raise Forbidden(f"this needs the role {role}", "ask the operator for a credential that has it")

    def may_report(self, source: str, customer: str) -> bool:
        """Whether usage of `customer` may be reported from `source`. The platform's own sources never may."""
        return (
            "meter" in self.roles
            and not source.lower().startswith(RESERVED_SOURCES)
            and not {source, ANY}.isdisjoint(self.sources or ())
            and not {customer, ANY}.isdisjoint(self.customers or ())
        )


_OURS = ("rp_", "eyJ")
ANONYMOUS = Principal(
    "anonymous",
    "local",
    ROLES,
    **asdict(Terms(priority_max="high")),
    sources=frozenset({ANY}),
    customers=frozenset({ANY}),
)


class _Remembered:
    """Principals by the SHA-256 of their credential, each for a while; the oldest one goes when there are too many."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[Principal, int, int]] = {}

    def get(self, digest: bytes, now_us: int) -> Principal | None:
        found = self._found.get(digest)
        # a clock that was set back must not keep anything for longer
        return found[0] if found is not None and found[1] <= now_us < found[2] else None

    def put(self, digest: bytes, principal: Principal, now_us: int, until_us: int) -> None:
        self._found.pop(digest, None)
        if len(self._found) >= REMEMBERED:
            del self._found[next(iter(self._found))]
        self._found[digest] = (principal, now_us, min(until_us, now_us + REMEMBER_US))

    def clear(self) -> None:
        self._found.clear()


class ApiKey(NamedTuple):
    """A key as an operator may see it: all but the key."""

    key_id: str
    principal: Principal
    created_us: int
    revoked_us: int | None


class ApiKeys:
    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids
        self._remembered = _Remembered()

    def create(
        self,
        customer_id: str,
        roles: Collection[str],
        terms: Terms | None = None,
        sources: Collection[str] = (),
        customers: Collection[str] = (),
    ) -> str:
        """A new key, shown this once. UsageError where its holder could not be who it says.

        A crash before the commit: no key. After it: a key that nobody knows; list and revoke it.
        """
        _check_grant(customer_id, roles, sources, customers)
        key_id = self._ids.random(8).hex()
        key = f"rp_{key_id}_{base64.urlsafe_b64encode(self._ids.random(32)).decode().rstrip('=')}"
        row = {
            "key_id": key_id,
            "key_hash": hashlib.sha256(key.encode()).digest(),
            "issuer": API_KEY_ISSUER,
            "customer_id": customer_id,
            "roles": ",".join(sorted(roles)),
            "sources": ",".join(sorted(sources)) or None,
            "customers": ",".join(sorted(customers)) or None,
            "created_us": self._clock.now_us(),
        }
        with self._database.write() as connection:
            connection.execute(api_keys.insert(), row | asdict(terms or Terms()))
        return key

    def revoke(self, key_id: str) -> None:
        """The key is refused from now on here, and within five seconds by other processes."""
        revoked = sa.func.coalesce(api_keys.c.revoked_us, self._clock.now_us())
        with self._database.write() as connection:
            changed = connection.execute(api_keys.update().filter_by(key_id=key_id).values(revoked_us=revoked))
        self._remembered.clear()
        if not changed.rowcount:
            raise UsageError("no API key has this id", "list the keys for their ids")

    def list(self) -> Sequence[ApiKey]:
        with self._database.read() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created_us, api_keys.c.key_id)).all()
        return [ApiKey(row.key_id, _principal(row), row.created_us, row.revoked_us) for row in rows]

    def find(self, key: str) -> Principal | None:
        """Whose key it is; None where it is unknown, revoked or malformed (which never reaches SQL)."""
        if len(key) != _KEY_CHARACTERS or not key.isascii():
            return None
        digest, now_us = hashlib.sha256(key.encode()).digest(), self._clock.now_us()
        found = self._remembered.get(digest, now_us)
        if found is None and (match := _KEY.fullmatch(key)):
            found = self._look_up(match[1], digest)
            if found is not None:
                self._remembered.put(digest, found, now_us, now_us + REMEMBER_US)
        return found

    def _look_up(self, key_id: str, digest: bytes) -> Principal | None:
        with self._database.read() as connection:
            row = connection.execute(sa.select(api_keys).filter_by(key_id=key_id, revoked_us=None)).one_or_none()
        return _principal(row) if row is not None and hmac.compare_digest(row.key_hash, digest) else None


class Customers:
    """What an operator has set for each customer of an issuer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(self, issuer: str, customer_id: str, terms: Terms, webhook_secret: str | None = None) -> None:
        """Replace a customer's settings; without a `webhook_secret` it stays as it is.

        A crash before the commit: the old ones stand; after it: these.
        """
        if not is_customer_id(customer_id):
            raise UsageError("the customer id is not one", "use 1 … 200 printable characters")
        if webhook_secret is not None:
            webhook_key(webhook_secret)
        key = {"issuer": issuer, "customer_id": customer_id}
        query = sa.select(customer_settings.c.webhook_secret).filter_by(**key)
        with self._database.write() as connection:
            webhook_secret = webhook_secret or connection.execute(query).scalar()
            connection.execute(customer_settings.delete().filter_by(**key))
            connection.execute(customer_settings.insert(), key | asdict(terms) | {"webhook_secret": webhook_secret})

    def terms(self, issuer: str, customer_id: str) -> Terms:
        """The customer's terms; the default ones where none were set."""
        row = self._row(issuer, customer_id)
        return Terms() if row is None else _terms(row)

    def webhook_secret(self, issuer: str, customer_id: str) -> str | None:
        row = self._row(issuer, customer_id)
        return None if row is None else row.webhook_secret

    def _row(self, issuer: str, customer_id: str) -> Any:
        query = sa.select(customer_settings).filter_by(issuer=issuer, customer_id=customer_id)
        with self._database.read() as connection:
            return connection.execute(query).one_or_none()


class Identity:
    """Says whose request it is. `anonymous`: without a credential it is the operator's own (loopback, no keys)."""

    def __init__(
        self, keys: ApiKeys, tokens: Tokens, customers: Customers, clock: Clock, anonymous: bool = False
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._customers = customers
        self._clock = clock
        self._anonymous = anonymous
        self._remembered = _Remembered()

    def authenticate(self, authorization: str | None, x_api_key: str | None) -> Principal:
        """The caller by the headers `Authorization` and `X-API-Key`; Unauthorized, also where they disagree.

        Where none is needed, one that is no key or token of ours stands for none: many clients insist on one.
        One that looks like ours must be valid. Unavailable where SQL cannot be read.
        """
        if authorization is None and x_api_key is None:
            if self._anonymous:
                return ANONYMOUS
            raise Unauthorized(
                "no credential was sent", "send Authorization: Bearer <key or token>, or X-API-Key: <key>"
            )
        credential = x_api_key if authorization is None else _bearer(authorization)
        if credential is None or x_api_key not in (None, credential):
            raise Unauthorized("the headers hold no credential, or two", "send one API key or token")
        found = self._keys.find(credential)
        if found is None and x_api_key is None and credential.startswith("eyJ"):
            found = self._by_token(credential)
        if found is None and self._anonymous and not credential.startswith(_OURS):
            return ANONYMOUS
        if found is None:
            raise Unauthorized("the API key is not valid")
        return found

    def _by_token(self, token: str) -> Principal:
        digest, now_us = hashlib.sha256(token.encode()).digest(), self._clock.now_us()
        found = self._remembered.get(digest, now_us)
        if found is None:
            alias, customer_id, expires_us = self._tokens.verify(token, now_us)
            terms = self._customers.terms(alias, customer_id)
            found = Principal(alias, customer_id, frozenset({"customer"}), **asdict(terms))
            self._remembered.put(digest, found, now_us, expires_us)
        return found


def _bearer(authorization: str) -> str | None:
    match = _BEARER.fullmatch(authorization)
    return match[1] if match else None


def _check_grant(
    customer_id: str, roles: Collection[str], sources: Collection[str], customers: Collection[str]
) -> None:
    if not is_customer_id(customer_id):
        raise UsageError("the customer id is not one", "use 1 … 200 printable characters")
    if not roles or not ROLES.issuperset(roles):
        raise UsageError("a role is missing or unknown", f"use some of {', '.join(sorted(ROLES))}")
    if not bool(sources) == bool(customers) == ("meter" in roles):
        raise UsageError("sources and customers go with the role meter", "name both for a meter, neither for others")
    if not all(_NAME.fullmatch(source) and not source.lower().startswith(RESERVED_SOURCES) for source in sources):
        raise UsageError("a source is not a name, or reserved", f"none may begin with {' or '.join(RESERVED_SOURCES)}")
    if not all(is_customer_id(customer) and "," not in customer for customer in customers):
        raise UsageError("a customer that may be reported is not one", f"give ids without a comma, or {ANY}")


def _terms(row: Any) -> Terms:
    return Terms(row.pricing_tier, row.priority_max, row.rate_per_s, row.burst)


def _principal(row: Any) -> Principal:
    """The holder of a row of `api_keys`."""
    sources, customers = (None if text is None else frozenset(text.split(",")) for text in (row.sources, row.customers))
    roles = frozenset(row.roles.split(","))
    return Principal(row.issuer, row.customer_id, roles, **asdict(_terms(row)), sources=sources, customers=customers)
