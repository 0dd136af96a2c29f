"""Audit entries: the log's leaves. Canonical JSON, each naming the SHA-256 of the one before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from render_platform import canonical
from render_platform.clock import DAY_US, HOUR_US
from render_platform.errors import Finding, PlatformError, RecordError
from render_platform.tiles import MAX_ENTRY_BYTES

VERSION = 1
TYPES = ("usage_batch", "watermark", "reconciliation", "repair", "charges", "correction", "key", "erasure")
FIRST_PREVIOUS = "0" * 64
END_OF_TIME_US = 253_402_300_800_000_000
"""The year 10000: no time in an entry is as late."""
ACCEPTANCE_FIELDS = ("gateway", "epoch", "from", "through", "open", "oldest")
MAX_ACCEPTANCES = 200
"""Acceptance ranges in one entry: as many fit, whatever they say. What is left over stands in the entries after it."""
MAX_GATEWAY_CHARACTERS = 64
MAX_OPEN_US = 8 * DAY_US
"""No job waits longer: its time to live is at most seven days."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One statement of the log. Times are microseconds UTC; digests are lower-case hex of SHA-256.

    `previous` is the digest of the entry before, as it was logged: `sha256sum` checks the chain. `batch_id` names what
    the entry is about, once a type. `subject_*` is the blob that it binds: a batch, a report or a repair.
    `acceptances` are ranges of accepted jobs, each a mapping of ACCEPTANCE_FIELDS (docs/formats.md).
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
        good = isinstance(value, list) and _are_acceptances(value)
    elif name in _TIMES:
        good = value is None or (type(value) is int and 0 <= value < END_OF_TIME_US)
    elif name in _NUMBERS:
        good = (value is None and name not in _REQUIRED) or (type(value) is int and value >= 0)
    else:
        good = (value is None and name not in _REQUIRED) or isinstance(value, str)
    if not good:
        raise Finding(f"{name} does not have its type")


def _are_acceptances(items: list[Any]) -> bool:
    """At most 200 ranges, each right in itself, in the order of gateways and epochs, none twice."""
    if len(items) > MAX_ACCEPTANCES or not all(isinstance(item, dict) and _is_acceptance(item) for item in items):
        return False
    keys = [(item["gateway"], item["epoch"]) for item in items]
    return all(before < after for before, after in pairwise(keys))


def _is_acceptance(item: Mapping[str, Any]) -> bool:
    if tuple(item) != ACCEPTANCE_FIELDS:
        return False
    gateway, *numbers = item.values()
    if not (isinstance(gateway, str) and 1 <= len(gateway) <= MAX_GATEWAY_CHARACTERS and gateway.isascii()):
        return False
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        return False
    epoch, first, through, still_open, oldest = numbers
    good: bool = min(epoch, first, oldest) >= 1 and first <= through + 1 and oldest <= through + 1 - still_open
    return good and (still_open > 0 or oldest == through + 1)


@dataclass(slots=True)
class Accepted:
    """One epoch of a gateway: numbers 1 … `through` were accepted, `open` of them have not ended, none below `oldest`.

    `reached` says when numbers were first declared: (through, time in µs) of entries, as far as some may be open.
    """

    through: int = 0
    open: int = 0
    oldest: int = 1
    reached: deque[tuple[int, int]] = field(default_factory=deque)


@dataclass(slots=True)
class Window:
    """Entries that are balanced together: one, or more where their acceptances did not fit into one."""

    entries: int = 0
    ended: int = 0
    rows: int = 0
    most: int = 0
    """All rows of the batches, whosoever they are."""
    unread: bool = False


ACCEPTING_LANE = "live"
"""Where gateways record."""


class Acceptances:
    """Follows the entries of a log in their order. Afterwards `epochs` says where each gateway's numbers stand.

    Every accepted job is open, or has ended with one row in a batch: a number that is left out, and figures that do not
    add up, are problems. `begun_late` holds gateways that are counted from a later epoch than their first, because the
    log is older than that. `now_us`: until then every end is in the log.
    """

    def __init__(self) -> None:
        self.epochs: dict[tuple[str, int], Accepted] = {}
        self.begun_late: dict[str, int] = {}
        self.now_us = 0
        self._newest: dict[str, int] = {}
        self._lane: str | None = None
        self._counting = False  # after the first ranges: a gateway that comes later is counted from its first epoch
        self._billed: set[str | None] = set()
        self._window = Window()

    def follow(self, entry: AuditEntry, rows: int | None) -> Iterator[str]:
        """Take in what `entry` says; gives what is wrong. `rows`: of gateways' jobs in its batch; None: not read."""
        if entry.acceptances:
            if entry.lane != ACCEPTING_LANE or entry.type not in ("usage_batch", "watermark"):
                yield f"acceptances stand in a {entry.type} of the lane {entry.lane}"
            self._lane = ACCEPTING_LANE
        for item in entry.acceptances:
            name = f"{item['gateway']} epoch {item['epoch']}"
            for problem in self._take(item, entry.complete_until or 0):
                yield f"{name}: {problem}"
        if entry.type == "usage_batch":
            self._billed.add(entry.lane)
        if self._lane is not None and entry.lane == self._lane and entry.type in ("usage_batch", "watermark"):
            self.now_us = entry.complete_until or 0
            yield from self._balance(entry, rows if entry.type == "usage_batch" else 0)

    def undecided(self) -> Iterator[tuple[str, int, Accepted, int]]:
        """Epochs of which a job is open: gateway, epoch, where it stands, and since when at least that job is."""
        for (gateway, epoch), known in self.epochs.items():
            if known.open and known.reached:
                yield gateway, epoch, known, known.reached[0][1]

    def _balance(self, entry: AuditEntry, rows: int | None) -> Iterator[str]:
        window = self._window
        window.most += entry.records if entry.type == "usage_batch" else 0
        window.rows, window.unread = window.rows + (rows or 0), window.unread or rows is None
        window.entries += 1
        if len(entry.acceptances) == MAX_ACCEPTANCES and window.entries <= len(self.epochs) // MAX_ACCEPTANCES + 1:
            return  # there may be more, in the next entry
        self._window = Window()
        self._counting = self._counting or bool(self.epochs)
        held = window.most if window.unread else window.rows
        if window.ended > held:
            yield f"{window.ended} accepted jobs are said to have ended, and {held} rows say how"
        elif window.ended < held and not window.unread and not self.begun_late:
            yield f"{held} rows bill jobs of gateways, and {window.ended} accepted jobs have ended"

    def _take(self, item: Mapping[str, Any], at_us: int) -> Iterator[str]:
        key = gateway, epoch = item["gateway"], item["epoch"]
        if key not in self.epochs:
            newest = self._newest.get(gateway, 0)
            if not (newest or self._counting) and epoch > 1 and self._lane in self._billed:
                self.begun_late[gateway] = epoch
            elif epoch != newest + 1:
                yield f"the acceptances of epoch {newest + 1} come next, and are left out"
            self._newest[gateway] = max(epoch, newest)
        known = self.epochs.setdefault(key, Accepted())
        if item["from"] > known.through + 1:
            yield f"accepted jobs {known.through + 1} … {item['from'] - 1} are in no entry"
        elif item["from"] <= known.through:
            yield f"accepted jobs {item['from']} … {known.through} stand in two entries"
        ended = (item["through"] - item["open"]) - (known.through - known.open)
        if ended < 0 or item["oldest"] < known.oldest:
            yield "jobs that had ended are open again"
        self._window.ended += ended
        if item["through"] > known.through:
            known.reached.append((item["through"], at_us))
        known.through, known.open, known.oldest = item["through"], item["open"], item["oldest"]
        while known.reached and known.reached[0][0] < known.oldest:
            known.reached.popleft()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_digest(name: str, value: Any) -> None:
    if value is None and name != "previous":
        return
    if not (isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")):
        raise RecordError(name, f"{value!r} is not a digest")
