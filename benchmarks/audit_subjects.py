"""What benchmarks/audit.py measures: events made a batch at a time, three ways to write them, ways to read and prove.

Every function takes its sizes and a folder of its own and gives counts and µs; making events is never counted.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.processes import run_tool
from render_platform import __version__, batches, canonical, events, merkle
from render_platform.audit_log import AuditLog, create_head
from render_platform.cas import Cas
from render_platform.clock import HOUR_US, US_PER_SECOND, ManualClock, iso
from render_platform.config import load_settings
from render_platform.database import open_sqlite
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding
from render_platform.evidence import Evidence
from render_platform.note import FileSigner
from render_platform.objects import FolderObjects
from render_platform.outbox import LIVE
from render_platform.pipeline import open_platform
from render_platform.receipts import _PublishedLog as PublishedLog
from render_platform.verification import verify

PYMERKLE = ("pymerkle==7.0.0", "cachetools==7.2.1")
INSTALL_S = 300
FIRST_HOUR_US = 1_700_157_600_000_000
ROWS_A_COMMIT = 200

PLAIN, DIGESTS, DEEP = "plain reading + SHA-256 of the same files", "verification, digests", "verification, deep"
NAIVE = "one signed JSON object an event, one synced file each"
EVIDENCE = "batches: rows to Parquet, attestation, entry, checkpoint"
WHOLE = "batches, with the outbox: rows to SQL, sealed, stored, published"


class Plan(msgspec.Struct, frozen=True):
    """Sizes: events verified; entries appended and proven; events of the naive design; events through the outbox."""

    events: int
    batch_rows: int
    entries: int
    documents: int
    recorded: int
    rounds: int


class Row(msgspec.Struct, frozen=True):
    """One thing measured: `count` things in each round's `us`. `failure` says why there are none."""

    part: str
    name: str
    count: int = 0
    us: list[int] = []
    failure: str = ""

    @property
    def per_second(self) -> list[float]:
        return [self.count * US_PER_SECOND / max(1, one) for one in self.us]


@dataclass
class Stopwatch:
    us: int = 0


@contextmanager
def timed() -> Iterator[Stopwatch]:
    watch, begun = Stopwatch(), time.perf_counter_ns()
    yield watch
    watch.us = (time.perf_counter_ns() - begun) // 1_000


# Events, made a batch at a time.


def make_tables(count: int, batch_rows: int, rng: np.random.Generator) -> Iterator[tuple[int, pa.Table]]:
    """(hour, rows sorted by event id): one batch an hour."""
    for number, start in enumerate(range(0, count, batch_rows)):
        hour_us = FIRST_HOUR_US + number * HOUR_US
        yield hour_us, make_table(min(batch_rows, count - start), hour_us, rng)


def make_table(count: int, hour_us: int, rng: np.random.Generator) -> pa.Table:
    recorded = np.sort(rng.integers(hour_us, hour_us + HOUR_US, count))
    ended = recorded - rng.integers(1_000, 2_000_000, count)
    wall_us = rng.integers(10_000, 30_000_000, count)
    ids = rng.bytes(48 * count)
    columns: dict[str, Any] = {
        "event_id": sorted(_uuid7(at // 1_000, ids[n * 16 : n * 16 + 16]) for n, at in enumerate(ended.tolist())),
        "nonce": [ids[(count + n) * 16 : (count + n) * 16 + 16] for n in range(count)],
        "request_id": [ids[(2 * count + n) * 16 : (2 * count + n) * 16 + 16] for n in range(count)],
        "gpu_started_at": ended - wall_us,
        "event_time": ended,
        "recorded_at": recorded,
        "inference_time_us": wall_us,
        "total_time_us": wall_us,
        "gpu_time_ns": wall_us * rng.integers(1, 1_000, count),
        "input_tokens": rng.integers(1, 8_000, count),
        "output_tokens": rng.integers(1, 4_000, count),
        "customer_ref": np.array([hashlib.sha256(b"%d" % n).hexdigest() for n in range(500)])[
            rng.integers(0, 500, count)
        ],
        "device_uuid": np.array([f"GPU-{n}" for n in range(64)])[rng.integers(0, 64, count)],
    }
    columns["job_id"] = columns["request_id"]
    rows = zip(*(_column(field, columns.get(field.name), count) for field in events.EVENT_SCHEMA), strict=True)
    return events.table_from_rows(list(rows))


_SAME = {
    "source": "gateway:bench", "gateway_id": "gateway-1", "pricing_tier": "standard", "model_family": "llama",
    "model_name": "llama-3-70b", "model_type": "llm", "modality": "text", "task": "text-generation",
    "meter": "nvml", "status": "success", "attempt": 1, "queue_time_us": 0, "gpu_count": 1, "batch_size": 1,
    "schema_version": events.SCHEMA_VERSION,
}  # fmt: skip


def _column(field: pa.Field, values: Any, count: int) -> list[Any]:
    if values is None:
        return [_SAME.get(field.name)] * count
    return list(values.tolist() if isinstance(values, np.ndarray) else values)


def _uuid7(ms: int, noise: bytes) -> bytes:
    data = bytearray(ms.to_bytes(6, "big") + noise[6:])
    data[6], data[8] = data[6] & 15 | 0x70, data[8] & 63 | 0x80
    return bytes(data)


def as_events(table: pa.Table) -> list[events.UsageEvent]:
    rows = [dict(zip(events.COLUMNS, row, strict=True)) for row in events.plain_rows(table)]
    ids = ("event_id", "request_id", "job_id")
    return [events.UsageEvent(**{**row, **{name: uuid.UUID(bytes=row[name]) for name in ids}}) for row in rows]


# (c) Writing: batches against one signed object an event.


class Writer:
    """A log of batches that are in memory: what the stages after sealing do, without the stages' SQL of batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.database = open_sqlite(folder / "platform.db")
        create_head(self.database)
        self.blobs, self.log = FolderObjects(folder / "blobs"), FolderObjects(folder / "log")
        self.signer, self.attester = new_signer("bench.local/log"), new_signer("bench.local/log/attestation")
        self.cas = Cas(self.blobs)
        self.audit_log = AuditLog(self.database, self.cas, self.log, self.signer)

    def write(self, hour_us: int, rows: pa.Table) -> None:
        name = f"{iso(hour_us)[:13]}-00000"
        data = batches.encode(rows)
        digest = self.cas.put(data)
        envelope = batches.attest(name, digest, rows, self.attester, f"render-platform/{__version__}")
        times = rows.column("recorded_at").cast(pa.int64())
        declared: dict[str, Any] = {"lane": LIVE, "recorded_hour": hour_us, "records": rows.num_rows}
        declared["gpu_time_ns"] = events.total_gpu_time_ns(rows)
        self.append(
            "usage_batch", name, **declared,
            batch_seq=0, first_recorded_at=times[0].as_py(), last_recorded_at=times[-1].as_py(),
            complete_until=times[0].as_py(), subject_digest=digest, subject_size=len(data),
            merkle_root=events.merkle_root(rows).hex(), attestation=self.cas.put(envelope),
        )  # fmt: skip
        self.append("watermark", f"watermark/live/{name[:13]}", **declared, complete_until=hour_us + HOUR_US)
        self.audit_log.publish()

    def append(self, kind: str, name: str, **values: Any) -> None:
        draft = AuditEntry(type=kind, batch_id=name, previous=FIRST_PREVIOUS, **values)
        self.audit_log.append(draft, lambda _connection, _index: None)

    def evidence(self) -> Evidence:
        return Evidence(self.log, self.blobs, [self.signer.verifier], [self.attester.verifier])


def new_signer(name: str) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.generate())


def write_in_turns(writer: Writer, folder: Path, plan: Plan, rng: np.random.Generator) -> list[Row]:
    """One batch, then a share of the single documents, to the end: whatever else the machine does meets both alike.

    Each document: canonical JSON, an Ed25519 signature, and a synced file of its own; their folder is not synced.
    """
    folder.mkdir()
    signer = new_signer("bench.local/naive")
    documents = [_json_of(event) for event in as_events(make_table(plan.documents, FIRST_HOUR_US, rng))]
    turns = -(-plan.events // plan.batch_rows)
    spent = {NAIVE: 0, EVIDENCE: 0}
    for turn, (hour_us, rows) in enumerate(make_tables(plan.events, plan.batch_rows, rng)):
        with timed() as clock:
            writer.write(hour_us, rows)
        spent[EVIDENCE] += clock.us
        with timed() as clock:
            for document in documents[turn::turns]:
                _write_naively(folder, document, signer)
        spent[NAIVE] += clock.us
    counts = {NAIVE: plan.documents, EVIDENCE: plan.events}
    return [Row("write", name, counts[name], [us]) for name, us in spent.items()]


def _write_naively(folder: Path, document: dict[str, Any], signer: FileSigner) -> None:
    signature = signer.sign(canonical.encode(document)).hex()
    signed = canonical.encode({"event": document, "signature": signature})
    with (folder / canonical.digest_of(signed)).open("xb") as file:
        file.write(signed)
        file.flush()
        os.fsync(file.fileno())


def _json_of(event: events.UsageEvent) -> dict[str, Any]:
    values = {name: getattr(event, name) for name in events.COLUMNS}
    return {
        n: v.hex() if isinstance(v, bytes) else str(v) if isinstance(v, uuid.UUID) else v for n, v in values.items()
    }


def write_through_the_outbox(folder: Path, plan: Plan, rng: np.random.Generator) -> Row:
    """The platform as it runs: events committed in groups, then `flush`."""
    made = as_events(make_table(plan.recorded, FIRST_HOUR_US, rng))
    made.sort(key=lambda event: event.recorded_at)
    clock = ManualClock(FIRST_HOUR_US + 2 * HOUR_US)
    settings = load_settings(environ={}, state_dir=folder, batch_rows=plan.batch_rows)
    with open_platform(settings, clock, create=True) as platform, timed() as stopwatch:
        for start in range(0, len(made), ROWS_A_COMMIT):
            with platform.database.write() as connection:
                platform.outbox.record(connection, LIVE, made[start : start + ROWS_A_COMMIT])
        platform.flush()
    return Row("write", WHOLE, plan.recorded, [stopwatch.us])


# (a) Reading: verification against what reading and hashing cost at least.


def files_of(writer: Writer) -> list[Path]:
    stores = (("blobs", writer.blobs), ("log", writer.log))
    return [writer.folder / part / name for part, store in stores for name in store.names()]


def read_plainly(files: Sequence[Path]) -> int:
    """The µs of reading and hashing each file once, on one thread."""
    with timed() as clock:
        for path in files:
            hashlib.sha256(path.read_bytes()).hexdigest()
    return clock.us


def read_verifying(writer: Writer, deep: bool, expected: int) -> int:
    """The µs of a verification; Finding unless it finds the evidence good and whole."""
    with timed() as clock:
        outcome = verify(writer.evidence(), deep=deep)
    if not outcome.verified or outcome.records != expected or (deep and outcome.deep_records != expected):
        problems = [f"{problem.where}: {problem.what}" for problem in outcome.problems[:3]]
        raise Finding(f"the evidence does not verify: {outcome.records} of {expected} events; {problems}")
    return clock.us


def read_all(writer: Writer, plan: Plan) -> list[Row]:
    """Rounds interleaved, after one reading that fills the page cache."""
    files = files_of(writer)
    read_plainly(files)
    rounds: dict[str, list[int]] = {PLAIN: [], DIGESTS: [], DEEP: []}
    for _ in range(plan.rounds):
        rounds[PLAIN].append(read_plainly(files))
        rounds[DIGESTS].append(read_verifying(writer, False, plan.events))
    rounds[DEEP].append(read_verifying(writer, True, plan.events))
    return [Row("verify", name, plan.events, us) for name, us in rounds.items()]


# (b) Trees: appends and proofs against pymerkle.


def load_pymerkle(cache: Path) -> Any:
    """The module, from a folder of its own in the cache; Unavailable where it cannot be installed."""
    home = cache / PYMERKLE[0].replace("==", "-")
    if not (home / ".installed").is_file():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
        ]
        run_tool([*pip, "--target", str(home), *PYMERKLE], INSTALL_S)
        (home / ".installed").touch()
    sys.path.append(str(home))
    return importlib.import_module("pymerkle")


def run_each(part: str, name: str, items: Sequence[Any], act: Callable[[Any], object]) -> Row:
    with timed() as clock:
        for item in items:
            act(item)
    return Row(part, name, len(items), [clock.us])


def measure_ours(folder: Path, data: Sequence[bytes], indexes: Sequence[int]) -> tuple[list[Row], bytes]:
    """Appends to peaks in memory, and to the log; proofs from its published tiles. Gives the log's root too.

    The log appends `data` as the ids of entries: what is hashed is longer, and chained.
    """
    writer, peaks = Writer(folder), [merkle.Peaks.empty()]

    def append_to_peaks(item: bytes) -> None:
        peaks[0] = peaks[0].append(merkle.leaf_hash(item))

    def prove(index: int) -> None:
        log = PublishedLog(writer.log)
        log.proof(index, log.entry(index))

    with closing(writer.database):
        rows = [run_each("append", "peaks in memory", data, append_to_peaks)]
        log = "audit log: object, SQL commit, all read back"
        rows.append(run_each("append", log, data, lambda item: writer.append("watermark", item.hex())))
        writer.audit_log.publish()
        rows.append(run_each("prove", "audit log: published tiles read anew, proof checked", indexes, prove))
    return rows, peaks[0].root()


def measure_pymerkle(
    module: Any, folder: Path, data: Sequence[bytes], indexes: Sequence[int]
) -> tuple[list[Row], list[bytes]]:
    """Its trees in memory and in SQLite (one commit an append, as it does by itself). Gives their roots too."""
    folder.mkdir()
    rows, roots = [], []
    for name, tree in (("in memory", module.InmemoryTree()), ("SQLite", module.SqliteTree(str(folder / "tree.db")))):
        rows.append(run_each("append", f"pymerkle, {name}", data, tree.append_entry))
        proven = [index + 1 for index in indexes]  # it counts from one
        rows.append(run_each("prove", f"pymerkle, {name}", proven, tree.prove_inclusion))
        roots.append(bytes(tree.get_root()))
    return rows, roots


def draw(plan: Plan, rng: random.Random) -> tuple[list[bytes], list[int]]:
    """What is appended, and which indexes are proven."""
    return [rng.randbytes(32) for _ in range(plan.entries)], [rng.randrange(plan.entries) for _ in range(plan.entries)]
