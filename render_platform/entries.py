"""Audit entries: the log's leaves. Canonical JSON, each naming the SHA-256 of the one before it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from render_platform import canonical
from render_platform.clock import HOUR_US
from render_platform.errors import Finding, PlatformError, RecordError
from render_platform.tiles import MAX_ENTRY_BYTES

VERSION = 1
TYPES = ("usage_batch", "watermark", "reconciliation", "repair", "charges", "correction", "key", "erasure")
FIRST_PREVIOUS = "0" * 64
END_OF_TIME_US = 253_402_300_800_000_000
"""The year 10000: no time in an entry is as late."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One statement of the log. Times are microseconds UTC; digests are lower-case hex of SHA-256.

    `previous` is the digest of the entry before, as it was logged: `sha256sum` checks the chain. `batch_id` names what
    the entry is about, once a type. `subject_*` is the blob that it binds: a batch, a report or a repair.
    """

    type: str
    batch_id: str
    previous: str
    lane: str | None = None
    recorded_hour: int | None = None
    batch_seq: int | None = None
    first_recorded_at: int | None = None
    last_recorded_at: int | None = None
    complete_until: int | None = None
    subject_digest: str | None = None
    subject_size: int | None = None
    records: int = 0
    gpu_time_ns: int = 0
    merkle_root: str | None = None
    attestation: str | None = None
    acceptances: tuple[dict[str, Any], ...] = field(default=())
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise RecordError("type", f"{self.type!r} is not a type of entry")
        if self.version != VERSION:
            raise RecordError("version", f"{self.version!r} is not known", "use a newer release to read this log")
        for name in ("previous", "subject_digest", "merkle_root", "attestation"):
            _check_digest(name, getattr(self, name))
        if self.recorded_hour is not None and self.recorded_hour % HOUR_US:
            raise RecordError("recorded_hour", "is not the begin of an hour")

    def to_bytes(self) -> bytes:
        """The leaf's bytes. Finding above 65,535 of them: entries hold digests and sums, never payloads."""
        data = canonical.encode({name: _plain(getattr(self, name)) for name in FIELDS})
        if len(data) > MAX_ENTRY_BYTES:
            raise Finding(f"the entry {self.batch_id} has {len(data)} bytes, more than {MAX_ENTRY_BYTES}")
        return data

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of the blobs that this entry binds."""
        return tuple(digest for digest in (self.subject_digest, self.attestation) if digest is not None)


_TIMES = {"recorded_hour", "first_recorded_at", "last_recorded_at", "complete_until"}
_NUMBERS = {"version", "batch_seq", "subject_size", "records", "gpu_time_ns"}
_REQUIRED = {"version", "type", "batch_id", "previous", "records", "gpu_time_ns"}
FIELDS: tuple[str, ...] = ("version", *(f.name for f in fields(AuditEntry) if f.name != "version"))


def parse(data: bytes) -> AuditEntry:
    """The entry that `data` is. Finding where it is not canonical, or has other fields or types."""
    values = canonical.decode(data)
    if tuple(values) != FIELDS:
        raise Finding("the entry does not have the fields of an audit entry, in their order")
    for name, value in values.items():
        _check_type(name, value)
    try:
        return AuditEntry(**{**values, "acceptances": tuple(values["acceptances"])})
    except (PlatformError, TypeError) as error:
        raise Finding(f"the entry is not valid: {error}") from error


def _check_type(name: str, value: Any) -> None:
    """Finding unless the field has the type that an entry gives it; null only where its default is None."""
    if name == "acceptances":
        good = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    elif name in _TIMES:
        good = value is None or (type(value) is int and 0 <= value < END_OF_TIME_US)
    elif name in _NUMBERS:
        good = (value is None and name not in _REQUIRED) or (type(value) is int and value >= 0)
    else:
        good = (value is None and name not in _REQUIRED) or isinstance(value, str)
    if not good:
        raise Finding(f"{name} does not have its type")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_digest(name: str, value: Any) -> None:
    if value is None and name != "previous":
        return
    if not (isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")):
        raise RecordError(name, f"{value!r} is not a digest")
