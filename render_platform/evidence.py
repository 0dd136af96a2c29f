"""What is verified, what verification found, and its check of the objects against the entries that bind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from uuid import UUID

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from render_platform import batches, canonical
from render_platform.cas import Read, digest_at, path_of, read_each
from render_platform.clock import hour_of, iso
from render_platform.entries import AuditEntry
from render_platform.errors import Finding, Missing, PlatformError
from render_platform.events import event_ids, merkle_root, total_gpu_time_ns
from render_platform.note import Checkpoint, Verifier
from render_platform.objects import ObjectStore

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done and what there is."""
PROGRESS_EVERY = 32
MAX_LISTED = 3
IDS_MEMORY = "512MB"
_ANY_ORDER = ("preserve_insertion_order", "false")
GATEWAY_SOURCES = "gateway/"
UNBOUND = "nothing: no entry binds it"


@dataclass(frozen=True, slots=True)
class Problem:
    """`where` is a file or an entry. `since` is the hour that it begins with, in ISO; empty where nothing tells.
    `doubt` says what can no longer be relied on."""

    where: str
    what: str
    since: str = ""
    doubt: str = ""

    def as_json(self) -> dict[str, str | None]:
        return {"where": self.where, "what": self.what, "since": self.since or None, "doubt": self.doubt}


@dataclass(slots=True)
class Reread:
    """What the batches of one hour hold that were read row by row."""

    batches: int = 0
    records: int = 0
    gpu_time_ns: int = 0


@dataclass
class Verification:
    """The outcome. Figures count what was read, good or not; `hours` what was re-read, by hour, and was good."""

    checkpoint: Checkpoint | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    batches: int = 0
    records: int = 0
    gpu_time_ns: int = 0
    blobs: int = 0
    deep: bool = False
    hours: dict[int, Reread] = field(default_factory=dict)
    charges: int = 0
    """Records of charges that were made again from batches and price books, and compared."""
    logged: list[Logged] = field(default_factory=list, repr=False)
    """The log's entries, as far as they could be trusted."""

    @property
    def verified(self) -> bool:
        return self.checkpoint is not None and not self.problems

    @property
    def deep_batches(self) -> int:
        return sum(hour.batches for hour in self.hours.values())

    @property
    def deep_records(self) -> int:
        return sum(hour.records for hour in self.hours.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "size": self.checkpoint.size if self.checkpoint else None,
            "root": self.checkpoint.root.hex() if self.checkpoint else None,
            "entries": self.entries,
            "batches": self.batches,
            "events": self.records,
            "gpu_time_ns": self.gpu_time_ns,
            "objects": self.blobs,
            "deep": self.deep,
            "rows_read": self.deep_records,
            "charges_rated": self.charges,
            "problems": [problem.as_json() for problem in self.problems],
            "notes": self.notes,
        }

    def note(self, text: str) -> None:
        """Something that a reader should know, and that is no problem; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, where: str, what: str, since_us: int | None = None, doubt: str = "") -> None:
        self.problems.append(Problem(where, what, "" if since_us is None else iso(since_us), doubt))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is verified, and with which keys. `history` holds earlier checkpoints that the log must still contain."""

    log: ObjectStore
    blobs: ObjectStore
    log_keys: Sequence[Verifier]
    attestation_keys: Sequence[Verifier]
    history: Sequence[Checkpoint] = ()
    recovery_key: Verifier | None = None
    """With which rotations of the other keys are checked; None: the first rotation names it."""


class Logged(NamedTuple):
    """An entry that the checkpoint covers, with its place in the log and the digest of its bytes."""

    at: int
    digest: str
    entry: AuditEntry


def said(error: PlatformError, path: str) -> str:
    """Its message, without the name of the object, which the problem names."""
    return error.message.removeprefix(f"blobs/{path}: ").removeprefix(f"{path}: ")


class EventIds:
    """Finds events and jobs that stand twice, in bounded memory: DuckDB puts what does not fit into files."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="render-platform-")
        self._rows = duckdb.connect()
        for name, value in (
            ("temp_directory", self._folder.name),
            ("memory_limit", IDS_MEMORY),
            ("threads", 2),
            _ANY_ORDER,
        ):
            self._rows.execute(f"SET {name} = '{value}'")
        self._rows.execute("CREATE TABLE ids (event_id UUID, job_id UUID, batch UINTEGER)")

    def add(self, rows: pa.Table, batch: int) -> None:
        self._rows.register("more", rows.select(["event_id", "job_id"]))
        self._rows.execute(f"INSERT INTO ids SELECT DISTINCT event_id, job_id, {batch:d} FROM more")  # noqa: S608  a number

    def twice(self, of: Literal["event_id", "job_id"]) -> Iterator[tuple[UUID, list[int]]]:
        """Each event in several rows, or each job with several events, and the numbers of their batches, sorted."""
        several = "count(*) > 1" if of == "event_id" else "min(event_id) <> max(event_id)"
        found = self._rows.execute(
            f"SELECT {of}, list_sort(list(batch)) FROM ids SEMI JOIN "  # noqa: S608  a column's name
            f"(SELECT {of} FROM ids GROUP BY {of} HAVING {several}) USING ({of}) GROUP BY {of} ORDER BY ALL"
        )
        while some := found.fetchmany(1_000):
            yield from some

    def close(self) -> None:
        self._rows.close()
        self._folder.cleanup()


class BlobCheck:
    """Every object rehashed; every object that an entry binds present, and saying what the entry says.

    `deep` are the hours whose batches are read row by row. With `within`, only what the entries of these hours bind is
    looked at. Afterwards `gateway_rows` gives, by digest, the rows of gateways' jobs in each batch that was read.
    """

    def __init__(
        self,
        evidence: Evidence,
        outcome: Verification,
        entries: Sequence[Logged],
        deep: range,
        progress: Progress,
        within: range | None = None,
        attesters: Callable[[int], Sequence[Verifier]] | None = None,
    ) -> None:
        """`attesters` gives the keys that may attest an entry, by its index; None: those of the evidence, any entry."""
        self._blobs, keys = evidence.blobs, attesters or (lambda _: evidence.attestation_keys)
        self._attesters = {one.entry.attestation: keys(one.at) for one in entries if one.entry.attestation}
        self._outcome = outcome
        self._entries = [one for one in entries if within is None or _is_in(one.entry, within)]
        self._listed, self._deep = within is None, deep
        self._progress = progress
        self._by_own = {one.digest: one.entry for one in self._entries}
        self._by_subject = _grouped((one.entry.subject_digest, one.entry) for one in self._entries)
        self._by_attestation = _grouped((one.entry.attestation, one.entry) for one in self._entries)
        self._ids: EventIds | None = None
        self._read_batches: list[AuditEntry] = []
        self.gateway_rows: dict[str, int] = {}

    def run(self) -> None:
        bound = dict.fromkeys(digest for one in self._entries for digest in (one.digest, *one.entry.blobs))
        digests = self._listed_digests() if self._listed else {path_of(digest): digest for digest in sorted(bound)}
        try:
            for done, read in enumerate(read_each(self._blobs, list(digests), lambda path: self._needs(digests[path]))):
                if not done % PROGRESS_EVERY:
                    self._progress("blobs", done, len(digests))
                self._outcome.blobs += self._check_blob(read, digests[read.path])
            self._progress("blobs", len(digests), len(digests))
            if self._ids is not None:
                self._progress("events", 0, self._outcome.deep_records)
                self._find_twice("an event", self._ids.twice("event_id"))
                self._find_twice("a job", self._ids.twice("job_id"))
                self._progress("events", self._outcome.deep_records, self._outcome.deep_records)
        finally:
            if self._ids is not None:
                self._ids.close()
        for digest in bound.keys() - set(digests.values()):
            self._add(digest, f"missing; the entry of {self._binder(digest).batch_id} binds it")
        for one in self._entries:
            if one.entry.type == "usage_batch":
                self._outcome.batches += 1
                self._outcome.records += one.entry.records
                self._outcome.gpu_time_ns += one.entry.gpu_time_ns

    def _listed_digests(self) -> dict[str, str]:
        """The digest that each object's name promises; names that promise none are problems, or put aside."""
        found: dict[str, str] = {}
        for path in self._blobs.names():
            digest = digest_at(path)
            if digest is not None:
                found[path] = digest
            elif path.startswith("quarantine/"):
                self._outcome.note(f"blobs/{path} was put aside: its bytes were not what its name said")
            else:
                self._outcome.add(f"blobs/{path}", "is not a content-addressed object", None, UNBOUND)
        return found

    def _needs(self, digest: str) -> bool:
        """Whether more than the digest is looked at."""
        return digest in self._by_attestation or any(
            entry.type in ("reconciliation", "repair") or (entry.recorded_hour or 0) in self._deep
            for entry in self._by_subject.get(digest, ())
        )

    def _binder(self, digest: str) -> AuditEntry:
        return (self._by_subject.get(digest) or self._by_attestation.get(digest) or [self._by_own[digest]])[0]

    def _add(self, digest: str, what: str) -> None:
        """A problem of one object, with the hour and what hangs on it."""
        if digest in self._by_subject:
            entry = self._binder(digest)
            doubt = f"{entry.type} {entry.batch_id}"
            if entry.type == "usage_batch":
                doubt = f"batch {entry.batch_id}: its {entry.records} events, their charges and receipts"
        elif digest in self._by_attestation:
            entry = self._by_attestation[digest][0]
            doubt = f"what is attested of batch {entry.batch_id}: its devices, meters and times"
        elif digest in self._by_own:
            entry = self._by_own[digest]
            doubt = f"nothing that the log does not hold itself: it is a copy of the entry of {entry.batch_id}"
        else:
            self._outcome.add(f"blobs/{path_of(digest)}", what, None, UNBOUND)
            return
        self._outcome.add(f"blobs/{path_of(digest)}", what, entry.recorded_hour, doubt)

    def _check_blob(self, read: Read, digest: str) -> bool:
        try:
            if isinstance(read.error, Missing) and not self._listed:
                raise Finding(f"missing; the entry of {self._binder(digest).batch_id} binds it")
            if read.error is not None:
                raise read.error
            if read.digest != digest:
                raise Finding("its bytes do not have the digest that names it")
            subjects = self._by_subject.get(digest, [])
            if len([entry for entry in subjects if entry.type == "usage_batch"]) > 1:
                raise Finding("two entries bill the same batch")
            for entry in subjects:
                self._check_subject(entry, read)
            for entry in self._by_attestation.get(digest, []):
                self._check_attestation(entry, read.data)
        except (Finding, Missing) as error:
            self._add(digest, said(error, read.path))
            return False
        return True

    def _check_subject(self, entry: AuditEntry, read: Read) -> None:
        if read.size != entry.subject_size:
            raise Finding(f"has {read.size} bytes; its entry says {entry.subject_size}")
        if entry.type in ("reconciliation", "repair"):
            _check_record(entry, read.data)
        elif entry.type == "usage_batch" and (entry.recorded_hour or 0) in self._deep:
            self._check_batch(entry, read.data)

    def _check_batch(self, entry: AuditEntry, data: bytes) -> None:
        table = batches.decode(data)
        if table.num_rows != entry.records or total_gpu_time_ns(table) != entry.gpu_time_ns:
            raise Finding("its rows do not have the count and the GPU time that its entry says")
        if merkle_root(table).hex() != entry.merkle_root:
            raise Finding("its rows do not have the Merkle root that its entry says")
        times = pc.min_max(table.column("recorded_at").cast(pa.int64())).as_py()
        first, last = entry.first_recorded_at or 0, entry.last_recorded_at or 0
        hours = {hour_of(first), hour_of(last)}
        if (times["min"] or 0, times["max"] or 0) != (first, last) or hours != {entry.recorded_hour}:
            raise Finding("its rows were not recorded in the hour and between the times that its entry says")
        self.gateway_rows[str(entry.subject_digest)] = int(
            pc.sum(pc.starts_with(table.column("source"), GATEWAY_SOURCES).cast(pa.int64())).as_py() or 0
        )
        self._ids = self._ids or EventIds()
        self._ids.add(table, len(self._read_batches))
        self._read_batches.append(entry)
        if any(after <= before for before, after in pairwise(event_ids(table).to_pylist())):
            raise Finding("an event stands twice, or out of order, among its rows")
        hour = self._outcome.hours.setdefault(entry.recorded_hour or 0, Reread())
        hour.batches, hour.records = hour.batches + 1, hour.records + table.num_rows
        hour.gpu_time_ns += entry.gpu_time_ns

    def _find_twice(self, what: str, twice: Iterable[tuple[UUID, list[int]]]) -> None:
        """Ids that stand in two of the batches that were read: one problem for all that the same batches hold."""
        found: dict[tuple[int, ...], list[str]] = defaultdict(list)
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        for event, numbers in twice:
            counts[tuple(numbers)] += 1
            if counts[tuple(numbers)] <= MAX_LISTED:
                found[tuple(numbers)].append(str(event))
        for holders, events in found.items():
            held = [self._read_batches[number] for number in holders]
            *others, last = sorted(held, key=lambda entry: (entry.recorded_hour or 0, entry.batch_id))
            more = f" and {counts[holders] - MAX_LISTED} more" if counts[holders] > MAX_LISTED else ""
            where = ", ".join(entry.batch_id for entry in others)
            named = f"{what} stands twice: {', '.join(events)}{more}"
            self._add(str(last.subject_digest), f"{named}; {where} holds it too")

    def _check_attestation(self, entry: AuditEntry, data: bytes) -> None:
        keys = {key.vkey: key for key in self._attesters[str(entry.attestation)]}
        if not keys:
            self._outcome.note("attestations' signatures were not checked: no attestation key was given")
            return
        signed = batches.check_attestation(data, str(entry.subject_digest), keys)
        if (signed.get("events"), signed.get("gpu_time_ns")) != (entry.records, entry.gpu_time_ns):
            raise Finding("the attestation and the entry do not say the same")


def _is_in(entry: AuditEntry, hours: range) -> bool:
    return entry.recorded_hour is None or entry.recorded_hour in hours


def _grouped(pairs: Iterable[tuple[str | None, AuditEntry]]) -> dict[str, list[AuditEntry]]:
    grouped: dict[str, list[AuditEntry]] = defaultdict(list)
    for digest, entry in pairs:
        if digest is not None:
            grouped[digest].append(entry)
    return grouped


def _check_record(entry: AuditEntry, data: bytes) -> None:
    """A report or a repair says what its entry says of it."""
    record = canonical.decode(data)
    try:
        parts = record["windows"] if entry.type == "reconciliation" else [record]
        name = "events" if entry.type == "reconciliation" else "records"
        hour = record["day" if record.get("kind") == "rebuild" else "hour"]
        said = (hour, sum(p[name] for p in parts), sum(p["gpu_time_ns"] for p in parts))
    except (KeyError, TypeError) as error:
        raise Finding(f"is not the record of a {entry.type}") from error
    if said != (entry.recorded_hour, entry.records, entry.gpu_time_ns):
        raise Finding("does not say the hour, the count and the GPU time that its entry says")
