"""What is verified, what verification found, and its check of the objects against the entries that bind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from render_platform import batches, canonical
from render_platform.canonical import digest_of
from render_platform.cas import digest_at, path_of
from render_platform.clock import hour_of
from render_platform.entries import AuditEntry
from render_platform.errors import Finding, Missing, PlatformError
from render_platform.events import merkle_root, total_gpu_time_ns, uuid_texts
from render_platform.note import Checkpoint, Verifier
from render_platform.objects import ObjectStore

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done and what there is."""


@dataclass(frozen=True, slots=True)
class Problem:
    where: str
    what: str


@dataclass
class Verification:
    """The outcome. Figures count what was read, good or not."""

    checkpoint: Checkpoint | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    batches: int = 0
    records: int = 0
    gpu_time_ns: int = 0
    blobs: int = 0
    deep: bool = False
    deep_batches: int = 0
    deep_records: int = 0

    @property
    def verified(self) -> bool:
        return self.checkpoint is not None and not self.problems

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
            "problems": [{"where": problem.where, "what": problem.what} for problem in self.problems],
            "notes": self.notes,
        }

    def note(self, text: str) -> None:
        """Something that a reader should know, and that is no problem; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, where: str, what: str) -> None:
        self.problems.append(Problem(where, what))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is verified, and with which keys. `history` holds earlier checkpoints that the log must still contain."""

    log: ObjectStore
    blobs: ObjectStore
    log_keys: Sequence[Verifier]
    attestation_keys: Sequence[Verifier]
    history: Sequence[Checkpoint] = ()


def said(error: PlatformError, path: str) -> str:
    """An error's message without the name of the object, which the problem names."""
    return error.message.removeprefix(f"blobs/{path}: ").removeprefix(f"{path}: ")


class BlobCheck:
    """Every object rehashed; every object that an entry binds present, and saying what the entry says."""

    def __init__(
        self,
        evidence: Evidence,
        outcome: Verification,
        entries: Sequence[AuditEntry | None],
        deep: range,
        progress: Progress,
    ) -> None:
        self._blobs = evidence.blobs
        self._keys: Mapping[str, Verifier] = {key.vkey: key for key in evidence.attestation_keys}
        self._outcome = outcome
        self._entries = [entry for entry in entries if entry is not None]
        self._deep = deep
        self._progress = progress
        self._by_subject = _grouped((entry.subject_digest, entry) for entry in self._entries)
        self._by_attestation = _grouped((entry.attestation, entry) for entry in self._entries)
        self._seen_events: set[str] = set()

    def run(self) -> None:
        names = list(self._blobs.names())
        good: set[str] = set()
        for done, path in enumerate(names):
            self._progress("blobs", done, len(names))
            if path.startswith("quarantine/"):
                self._outcome.note(f"blobs/{path} was put aside: its bytes were not what its name said")
                continue
            digest = digest_at(path)
            if digest is None:
                self._outcome.add(f"blobs/{path}", "is not a content-addressed object")
            elif self._check_blob(path, digest):
                good.add(digest)
        self._progress("blobs", len(names), len(names))
        self._outcome.blobs = len(good)
        self._check_presence({digest_at(path) for path in names})

    def _check_presence(self, standing: set[str | None]) -> None:
        for entry in self._entries:
            for digest in (digest_of(entry.to_bytes()), *entry.blobs):
                if digest not in standing:
                    self._outcome.add(f"blobs/{path_of(digest)}", f"missing; the entry of {entry.batch_id} binds it")
            if entry.type == "usage_batch":
                self._outcome.batches += 1
                self._outcome.records += entry.records
                self._outcome.gpu_time_ns += entry.gpu_time_ns

    def _check_blob(self, path: str, digest: str) -> bool:
        try:
            data = self._blobs.read(path)
            if digest_of(data) != digest:
                raise Finding("its bytes do not have the digest that names it")
            subjects = self._by_subject.get(digest, [])
            if len([entry for entry in subjects if entry.type == "usage_batch"]) > 1:
                raise Finding("two entries bill the same batch")
            for entry in subjects:
                self._check_subject(entry, data)
            for entry in self._by_attestation.get(digest, []):
                self._check_attestation(entry, data)
        except (Finding, Missing) as error:
            self._outcome.add(f"blobs/{path}", said(error, path))
            return False
        return True

    def _check_subject(self, entry: AuditEntry, data: bytes) -> None:
        if len(data) != entry.subject_size:
            raise Finding(f"has {len(data)} bytes; its entry says {entry.subject_size}")
        if entry.type in ("reconciliation", "repair"):
            _check_record(entry, data)
        elif (entry.recorded_hour or 0) in self._deep:
            self._check_batch(entry, data)

    def _check_batch(self, entry: AuditEntry, data: bytes) -> None:
        table = batches.decode(data)
        if table.num_rows != entry.records or total_gpu_time_ns(table) != entry.gpu_time_ns:
            raise Finding("its rows do not have the count and the GPU time that its entry says")
        if merkle_root(table).hex() != entry.merkle_root:
            raise Finding("its rows do not have the Merkle root that its entry says")
        times = table.column("recorded_at").cast(pa.int64()).to_pylist()
        first, last = entry.first_recorded_at or 0, entry.last_recorded_at or 0
        if (min(times, default=0), max(times, default=0)) != (first, last) or {hour_of(first), hour_of(last)} != {
            entry.recorded_hour
        }:
            raise Finding("its rows were not recorded in the hour and between the times that its entry says")
        ids = uuid_texts(table, "event_id")
        twice = self._seen_events.intersection(ids)
        if twice or len(set(ids)) != len(ids) or ids != sorted(ids):
            raise Finding(f"an event stands twice, or out of order: {', '.join(sorted(twice)[:3])}")
        self._seen_events.update(ids)
        self._outcome.deep_batches += 1
        self._outcome.deep_records += table.num_rows

    def _check_attestation(self, entry: AuditEntry, data: bytes) -> None:
        if not self._keys:
            self._outcome.note("attestations' signatures were not checked: no attestation key was given")
            return
        signed = batches.check_attestation(data, str(entry.subject_digest), self._keys)
        if (signed.get("events"), signed.get("gpu_time_ns")) != (entry.records, entry.gpu_time_ns):
            raise Finding("the attestation and the entry do not say the same")


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
        said = (record["hour"], sum(p[name] for p in parts), sum(p["gpu_time_ns"] for p in parts))
    except (KeyError, TypeError) as error:
        raise Finding(f"is not the record of a {entry.type}") from error
    if said != (entry.recorded_hour, entry.records, entry.gpu_time_ns):
        raise Finding("does not say the hour, the count and the GPU time that its entry says")
