"""Usage that others report, as CloudEvents 1.0 in JSON: read strictly, recorded once, whatever is sent again.

- one event, or a batch of at most 1,000, which is recorded as a whole or not at all;
- (`source`, `id`) names one event for ever: sent again as it was it changes nothing, with other content it is a 409;
- `subject` is the customer's id, as the reporter's own issuer gives it; `time` is the end of the GPU work, and now
  where it is not sent. Times are RFC 3339; digits beyond the microsecond widen the run time, never narrow it;
- `data` is a plain object (`MEMBERS`). What a price may hang on must be sent. The rest is unknown where it is not sent,
  or the default of `event`; null is the same as not sent, and an unknown member is refused;
- the event has no job or request here: its `job_id` and `request_id` are its `event_id`, its meter is `external`.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from render_platform import canonical
from render_platform.clock import US_PER_SECOND, Clock, Ids
from render_platform.config import nearest
from render_platform.database import metadata
from render_platform.errors import RecordError
from render_platform.events import EVENT_SCHEMA, MAX_GPU_TIME_NS, UsageEvent
from render_platform.gateway.identity import Forbidden, Principal, Terms, customer_settings
from render_platform.gateway.problems import Conflict, Refused
from render_platform.outbox import LIVE, Outbox, located

TYPE = "com.render-platform.usage.v1"
ingested = sa.Table(  # never pruned: duplicates are decided without a time window
    "ingested",
    metadata,
    sa.Column("event_id", sa.LargeBinary, primary_key=True),  # a UUIDv8 of (source, id)
    sa.Column("content_digest", sa.LargeBinary, nullable=False),
)
ONE, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"
MAX_EVENTS = 1_000
MAX_CHARACTERS = 200
MAX_AHEAD_US = 300 * US_PER_SECOND
"""How far a reporter's clock may be ahead of ours."""
NOBODY = "0" * 64
"""Stands for a customer whose reference is not known yet."""
REQUIRED = ("model", "model_family", "model_type", "modality", "task", "gpu_time_ns")
OPTIONAL = (
    *("gpu_started_at", "gpu_count", "device_uuid", "batch_size", "energy_mj", "status", "error_code"),
    *("input_tokens", "output_tokens", "input_dims", "num_steps", "image_count"),
    *("queue_time_us", "inference_time_us", "total_time_us"),
)
MEMBERS = {name: name for name in (*REQUIRED, *OPTIONAL)} | {"model": "model_name"}
"""Member of `data` → column of the usage event: text, an integer in the column's unit, or a time."""

_CONTENT_TYPE = re.compile(r'application/cloudevents(-batch)?\+json(?:\s*;\s*charset="?utf-8"?)?', re.IGNORECASE)
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNKNOWN = tuple(field.name for field in EVENT_SCHEMA if field.nullable)
_PLACES = {"source": "source", "event_time": "time", **{column: f"data.{name}" for name, column in MEMBERS.items()}}


class _Object(tuple[tuple[str, Any], ...]):
    """A JSON object as it was sent: a member may stand twice."""


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """One event that was read. `where` is its place in a batch, `[3].`; `data` holds what was sent, by column."""

    where: str
    event_id: uuid.UUID
    source: str
    id: str
    subject: str
    time_us: int | None
    data: Mapping[str, Any]
    content: bytes

    def content_digest(self, issuer: str) -> bytes:
        """SHA-256 of what was sent, other than source and id; `issuer` is whose customer the subject is."""
        return hashlib.sha256(f"{issuer}\n".encode() + self.content).digest()

    def event(
        self, now_us: int, customer_ref: str = NOBODY, tier: str = "none", nonce: bytes = bytes(16)
    ) -> UsageEvent:
        """The usage event, where it is recorded at `now_us`; RecordError names the member that cannot be right."""
        ended = now_us if self.time_us is None else self.time_us
        started = self.data.get("gpu_started_at", max(0, ended - self.least_us()))
        if started > ended:
            raise RecordError(
                f"{self.where}data.gpu_started_at", "is after the end", "send the end as the event's time"
            )
        queued = self.data.get("queue_time_us", 0)
        values: dict[str, Any] = {
            **dict.fromkeys(_UNKNOWN),
            "queue_time_us": queued,
            "inference_time_us": ended - started,
            "total_time_us": queued + ended - started,
            "gpu_count": 1,
            "batch_size": 1,
            "status": "success",
            **self.data,
            "event_id": self.event_id,
            "nonce": nonce,
            "source": self.source,
            "gateway_id": "ingest",
            "request_id": self.event_id,
            "job_id": self.event_id,
            "attempt": 1,
            "gpu_started_at": started,
            "event_time": ended,
            "recorded_at": now_us,
            "customer_ref": customer_ref,
            "pricing_tier": tier,
            "meter": "external",
        }
        try:
            return UsageEvent(**values)
        except RecordError as error:
            place = self.where + _PLACES.get(error.field, error.field)
            raise RecordError(place, error.message.removeprefix(f"{error.field}: "), error.remedy) from None

    def least_us(self) -> int:
        """The shortest run time that holds the GPU time."""
        gpus: int = max(1, self.data.get("gpu_count", 1))
        return int(-(-self.data["gpu_time_ns"] // (1_000 * gpus)))


def event_id_of(source: str, id: str) -> uuid.UUID:
    """A UUIDv8 (RFC 9562) of SHA-256(length of the source in 4 bytes, big-endian ‖ source ‖ id), all in UTF-8."""
    name = source.encode()
    digest = hashlib.sha256(len(name).to_bytes(4, "big") + name + id.encode()).digest()
    value = int.from_bytes(digest[:16], "big") & ~(0xF << 76) | (0x8 << 76)
    return uuid.UUID(int=value & ~(0x3 << 62) | (0x2 << 62))


# Reading.


def parse(body: bytes, content_type: str) -> list[CloudEvent]:
    """The events of a request; Refused (415) for another content type, RecordError that names the field for the rest.

    A batch of 1,000 takes some 100 ms: call it in a thread.
    """
    match = _CONTENT_TYPE.fullmatch(content_type.strip())
    if match is None:
        raise Refused(415, "unsupported_media_type", "Not a content type that is read", f"send {ONE} or {BATCH}")
    try:
        document = json.loads(body.decode(), object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RecordError("body", "is not JSON in UTF-8", "send an event, or an array of events") from None
    if match[1] is None:
        return [_read(document, "")]
    if type(document) is not list or len(document) > MAX_EVENTS:
        raise RecordError("body", f"is not an array of at most {MAX_EVENTS:,} events", f"send one event as {ONE}")
    return [_read(one, f"[{number}].") for number, one in enumerate(document)]


def _read(value: Any, where: str) -> CloudEvent:
    found = _members(value, where)
    for name, only in (("specversion", "1.0"), ("type", TYPE)):
        if found.get(name) != only:
            raise RecordError(where + name, f"is not {only}", "send events of that kind only")
    if found.get("datacontenttype", "application/json") != "application/json" or "data_base64" in found:
        raise RecordError(f"{where}data", "is not a JSON object", "send application/json as such")
    source, id, subject = (_text(found.get(name), where + name) for name in ("source", "id", "subject"))
    time_us = _time_us(found["time"], f"{where}time", up=True) if "time" in found else None
    data = _data(found.get("data"), f"{where}data.")
    content = {"type": TYPE, "subject": subject, "time": time_us, "data": dict(sorted(data.items()))}
    event = CloudEvent(where, event_id_of(source, id), source, id, subject, time_us, data, canonical.encode(content))
    # Only an event without a time has an end that is not known yet: any other one is checked as it will stand.
    event.event(event.data.get("gpu_started_at", 0) + event.least_us())
    return event


def _data(value: Any, where: str) -> dict[str, Any]:
    found = _members(value, where)
    for name in REQUIRED:
        if name not in found:
            raise RecordError(where + name, "is missing", "a price may hang on it")
    data: dict[str, Any] = {}
    for name, item in found.items():
        if name not in MEMBERS:
            raise RecordError(_place(where, name), "is not known", nearest(name[:MAX_CHARACTERS], MEMBERS))
        data[MEMBERS[name]] = _READERS[name](item, where + name)
    if data["gpu_time_ns"] > MAX_GPU_TIME_NS:
        raise RecordError(f"{where}gpu_time_ns", "is more than 50 hours", "send it in nanoseconds")
    return data


def _members(value: Any, where: str) -> dict[str, Any]:
    """The members of an object that are not null."""
    if type(value) is not _Object:
        raise RecordError(where.rstrip(".") or "body", "is not a JSON object", "see docs/formats.md for its members")
    found: dict[str, Any] = {}
    for name, item in value:
        if name in found:
            raise RecordError(_place(where, name), "stands twice", "send each member once")
        found[name] = item
    return {name: item for name, item in found.items() if item is not None}


def _place(where: str, name: str) -> str:
    """The path of a member; of one whose name cannot be shown, only where it stands."""
    shown = len(name) <= MAX_CHARACTERS and name.isprintable()
    return where + name if shown else where.rstrip(".") or "body"


def _text(value: Any, place: str) -> str:
    if not (isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS and value.isprintable()):
        raise RecordError(place, f"is not 1 … {MAX_CHARACTERS} printable characters", "send it as text")
    return value


def _count(value: Any, place: str) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise RecordError(place, "is not a whole number from 0 to 2^53 - 1", "send a JSON integer")
    return value


def _time_us(value: Any, place: str, up: bool = False) -> int:
    """Microseconds since 1970, down to the last whole one, or up to the next."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is None:
            raise ValueError
        moment = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[4].upper()}")
    except ValueError:
        raise RecordError(place, "is not a time of RFC 3339", "send one such as 2026-01-31T12:00:00.5Z") from None
    if moment < _EPOCH:
        raise RecordError(place, "is before 1970", "send when the work was done")
    nanoseconds = int((match[3] or "").ljust(9, "0"))
    return (moment - _EPOCH) // timedelta(microseconds=1) + (-(-nanoseconds // 1_000) if up else nanoseconds // 1_000)


def _refuse_constant(text: str) -> Any:
    raise ValueError(text)


def _reader(column: str) -> Callable[[Any, str], Any]:
    kind = EVENT_SCHEMA.field(column).type
    if pa.types.is_timestamp(kind):
        return _time_us
    return _text if pa.types.is_string(kind) else _count


_READERS = {name: _reader(column) for name, column in MEMBERS.items()}


# Recording.


def authorise(principal: Principal, events: Sequence[CloudEvent]) -> None:
    """Forbidden unless `principal` may report every one of `events`."""
    for event in events:
        if not principal.may_report(event.source, event.subject):
            raise Forbidden(
                f"{event.where}source: usage of this subject may not be reported from it with this credential",
                "ask the operator for a meter credential that is bound to both",
            )


class Ingest:
    def __init__(self, outbox: Outbox, ids: Ids, clock: Clock) -> None:
        self._outbox, self._ids, self._clock = outbox, ids, clock

    def record(self, connection: sa.Connection, principal: Principal, events: Sequence[CloudEvent]) -> list[UsageEvent]:
        """Record those of `events` that are new, all in the caller's transaction; gives them as recorded.

        Forbidden, Conflict (409) or RecordError for one of them: the caller undoes the transaction, and none stands.
        A crash before the caller's commit: nothing stands, and the reporter sends them again. After it: all stand, and
        what is sent again is a duplicate.
        """
        authorise(principal, events)
        new = _new(connection, principal.issuer, events)
        if not new:
            return []
        if located(connection, [one.event_id.bytes for one, _ in new]):  # known of the log alone: rows may be pruned
            raise RecordError("event_id", "stands in the outbox already", "it was recorded before a recovery: leave it")
        now_us = self._clock.now_us()
        known: dict[str, tuple[str, str]] = {}
        made = []
        for one, _ in new:
            if one.time_us is not None and one.time_us > now_us + MAX_AHEAD_US:
                raise RecordError(f"{one.where}time", "lies in the future", "set the clock of the reporter")
            if one.subject not in known:
                known[one.subject] = self._customer(connection, principal.issuer, one.subject)
            made.append(one.event(now_us, *known[one.subject], nonce=self._ids.random(16)))
        rows = [{"event_id": one.event_id.bytes, "content_digest": digest} for one, digest in new]
        connection.execute(ingested.insert(), rows)
        return self._outbox.record(connection, LIVE, made)

    def _customer(self, connection: sa.Connection, issuer: str, subject: str) -> tuple[str, str]:
        """The customer's reference and pricing tier."""
        tier = sa.select(customer_settings.c.pricing_tier).filter_by(issuer=issuer, customer_id=subject)
        found = connection.execute(tier).scalar()
        return self._outbox.customer_ref(connection, issuer, subject), str(found or Terms().pricing_tier)


def _new(connection: sa.Connection, issuer: str, events: Sequence[CloudEvent]) -> list[tuple[CloudEvent, bytes]]:
    """Those of `events` that do not stand yet, with their digests, each once; Conflict where one stands otherwise."""
    query = sa.select(ingested).where(ingested.c.event_id.in_([event.event_id.bytes for event in events]))
    standing = {row.event_id: row.content_digest for row in connection.execute(query)}
    new = []
    for event in events:
        key, digest = event.event_id.bytes, event.content_digest(issuer)
        if key not in standing:
            standing[key] = digest
            new.append((event, digest))
        elif standing[key] != digest:
            raise Conflict(
                f"{event.where}id: {event.id} of {event.source} stands for other usage",
                "send what differs under an id of its own",
                status=409,
            )
    return new
