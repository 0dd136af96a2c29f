"""Platforms for tests, and a checker of their evidence that shares no code with what wrote it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from render_platform import database
from render_platform.clock import HOUR_US, Clock, ManualClock
from render_platform.config import Settings, load_settings
from render_platform.database import Database, open_database
from render_platform.events import UsageEvent
from render_platform.pipeline import Platform
from tests import postgres
from tests.factories import START_US, make_events

LIVE = "live"


class SeededIds:
    """Ids from a seed. A platform that is opened again needs another seed: ids must not come back."""

    def __init__(self, seed: int | str = 0) -> None:
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    def random(self, size: int) -> bytes:
        with self._lock:
            return self._rng.randbytes(size)


def on_postgres(state: Path) -> bool:
    """What a drill has rebuilt is in SQLite, wherever the live state is."""
    return postgres.CHOSEN and not (state / "platform.db").exists()


def settings_of(state: Path, **options: Any) -> Settings:
    """Of a state folder, with the kind of database that this run of the tests is about."""
    own: dict[str, Any] = {"database_url": postgres.url_of(state)} if on_postgres(state) else {}
    return load_settings(environ={}, state_dir=state, **(own | options))


def make_platform(path: Path, clock: Clock | None = None, seed: int | str = 0, **options: Any) -> Platform:
    """The platform whose state is at `path`; by default its clock stands at START_US."""
    return Platform(settings_of(path, **options), clock or ManualClock(START_US), SeededIds(seed))


def open_database_of(state: Path) -> Database:
    """The database of a state folder alone."""
    return open_database(settings_of(state).database)


def connect(state: Path) -> Any:
    """Plain SQL, with the library's own SQLite: two copies of SQLite in one process drop each other's locks."""
    if on_postgres(state):
        return postgres.Plain(postgres.url_of(state))
    return vars(database)["sqlite_module"].connect(state / "platform.db")


def back_up(state: Path, name: str) -> None:
    """A copy of the folder's database as it is now, kept under a name; see `restore`."""
    if postgres.CHOSEN:
        postgres.back_up(state, name)
        return
    (state / name).unlink(missing_ok=True)
    with closing(connect(state)) as connection:
        connection.execute("VACUUM INTO ?", [str(state / name)])


def empty_copy(state: Path, name: str) -> Database:
    """A new database that is kept under a name, as `back_up` keeps its copy."""
    return open_database(postgres.make_copy(state, name) if postgres.CHOSEN else str(state / name))


def restore(state: Path, name: str) -> None:
    """The database is what it was when the copy was made."""
    if postgres.CHOSEN:
        postgres.restore(state, name)
        return
    lose_database(state)
    shutil.copy(state / name, state / "platform.db")


def files_with(state: Path, needle: bytes) -> list[str]:
    """The files of a state folder, and of its database, that hold these bytes, as they are or in hex."""
    forms = (needle, needle.hex().encode())
    files = [*state.rglob("*"), *(postgres.files_of(postgres.url_of(state)) if on_postgres(state) else ())]
    return [path.name for path in files if path.is_file() and any(form in path.read_bytes() for form in forms)]


def lose_database(state: Path) -> None:
    if postgres.CHOSEN:
        postgres.lose(state)
    for path in state.glob("platform.db*"):
        path.unlink()


def record(platform: Platform, lane: str, events: Sequence[UsageEvent]) -> list[UsageEvent]:
    """`events`, in the order of their clock readings, in one transaction; gives them as recorded."""
    with platform.database.write() as connection:
        return platform.outbox.record(connection, lane, sorted(events, key=lambda event: event.recorded_at))


def record_random(
    platform: Platform, n: int, seed: int, lane: str = LIVE, start_us: int = START_US, span_us: int = HOUR_US
) -> list[UsageEvent]:
    return record(platform, lane, make_events(n, seed, start_us, span_us))


# An encoder of canonical bytes that shares no code with the library's: docs/formats.md, one value at a time.

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def scalar_json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        escaped = (_ESCAPES.get(char) or (f"\\u{ord(char):04x}" if char < " " else char) for char in value)
        return '"' + "".join(escaped) + '"'
    if isinstance(value, dict):
        return "{" + ",".join(f"{scalar_json(key)}:{scalar_json(item)}" for key, item in value.items()) + "}"
    return "[" + ",".join(map(scalar_json, value)) + "]"


def event_fields(event: UsageEvent) -> dict[str, Any]:
    """The event as JSON says it: UUIDs in their text form, bytes in hex, times in microseconds."""
    values = {field.name: getattr(event, field.name) for field in fields(UsageEvent)}
    values |= {name: str(value) for name, value in values.items() if isinstance(value, uuid.UUID)}
    return values | {"nonce": event.nonce.hex()}


def event_bytes(event: UsageEvent) -> bytes:
    return scalar_json(event_fields(event)).encode()


# The checker. It reads files with hashlib, json and pyarrow alone.


class Row(NamedTuple):
    """What must survive of an event, whatever crashes."""

    event_id: uuid.UUID
    job_id: uuid.UUID
    recorded_at: int
    gpu_time_ns: int


def row_of(event: UsageEvent) -> Row:
    return Row(event.event_id, event.job_id, event.recorded_at, event.gpu_time_ns)


def tree_hash(leaves: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, as it is written there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:split]) + tree_hash(leaves[split:])).digest()


class Published(NamedTuple):
    origin: str
    size: int
    root: bytes


def read_published(state: Path, vkey: str) -> Published:
    """The signed checkpoint, its signature checked here."""
    text, _, lines = (state / "log" / "checkpoint").read_text().rpartition("\n\n")
    name, _, key = vkey.split("+", 2)
    dash, signer, encoded = lines.removesuffix("\n").split(" ")
    assert (dash, signer) == ("—", name)
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key)[1:])
    public.verify(base64.b64decode(encoded)[4:], (text + "\n").encode())
    origin, size, root = text.split("\n")
    return Published(origin, int(size), base64.b64decode(root))


def read_log(state: Path, size: int) -> list[bytes]:
    """The first `size` entries, out of the log's bundles; sizes below 256,000."""
    entries: list[bytes] = []
    while len(entries) < size:
        index, width = len(entries) // 256, min(256, size - len(entries) // 256 * 256)
        name = f"{index:03d}" if width == 256 else f"{index:03d}.p/{width}"
        data = (state / "log" / "tile" / "entries" / name).read_bytes()
        while data:
            end = 2 + int.from_bytes(data[:2], "big")
            entries.append(data[2:end])
            data = data[end:]
    return entries


def check_chain(entries: Sequence[bytes]) -> None:
    previous = "0" * 64
    for entry in entries:
        assert json.loads(entry)["previous"] == previous
        previous = hashlib.sha256(entry).hexdigest()


def read_blob(state: Path, digest: str) -> bytes:
    data = (state / "blobs" / "sha256" / digest[:2] / digest[2:]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    return data


def rows_of_parquet(data: bytes) -> list[Row]:
    table = pq.read_table(pa.BufferReader(data))
    ids = [table.column(name).combine_chunks().storage.to_pylist() for name in ("event_id", "job_id")]
    times = table.column("recorded_at").cast(pa.int64()).to_pylist()
    return [
        Row(uuid.UUID(bytes=event), uuid.UUID(bytes=job), at, ns)
        for event, job, at, ns in zip(*ids, times, table.column("gpu_time_ns").to_pylist(), strict=True)
    ]


def check_evidence(state: Path, vkey: str, recorded: Sequence[UsageEvent]) -> list[dict[str, Any]]:
    """Every recorded event is in exactly one published batch, as recorded; the log is whole. Gives its entries."""
    published = read_published(state, vkey)
    raw = read_log(state, published.size)
    assert len(raw) == published.size
    assert tree_hash(raw) == published.root
    check_chain(raw)
    entries: list[dict[str, Any]] = [json.loads(entry) for entry in raw]
    assert len({(entry["type"], entry["batch_id"]) for entry in entries}) == len(entries)
    for entry in raw:
        read_blob(state, hashlib.sha256(entry).hexdigest())
    rows = [row for entry in entries if entry["type"] == "usage_batch" for row in _rows_of_entry(state, entry)]
    assert sorted(rows) == sorted(map(row_of, recorded))
    _check_order(entries, rows)
    _check_sql(state, entries, published)
    return entries


def _rows_of_entry(state: Path, entry: dict[str, Any]) -> list[Row]:
    data = read_blob(state, entry["subject_digest"])
    assert len(data) == entry["subject_size"]
    rows = rows_of_parquet(data)
    assert [row.event_id for row in rows] == sorted(row.event_id for row in rows)
    assert (len(rows), sum(row.gpu_time_ns for row in rows)) == (entry["records"], entry["gpu_time_ns"])
    times = [row.recorded_at for row in rows]
    assert (min(times), max(times)) == (entry["first_recorded_at"], entry["last_recorded_at"])
    assert {at - at % HOUR_US for at in times} == {entry["recorded_hour"]}
    statement = json.loads(base64.b64decode(json.loads(read_blob(state, entry["attestation"]))["payload"]))
    assert statement["subject"][0]["digest"]["sha256"] == entry["subject_digest"]
    assert statement["predicate"]["events"] == len(rows)
    return rows


def _check_order(entries: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    """Batches count up within an hour; `complete_until` never goes back in a lane; watermarks say what is there."""
    seqs: dict[int, int] = defaultdict(int)
    complete: dict[str, int] = defaultdict(int)
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    hours: dict[str, list[int]] = defaultdict(list)
    for entry in entries:
        if entry["type"] not in ("usage_batch", "watermark"):
            continue
        lane, hour = entry["lane"], entry["recorded_hour"]
        assert entry["complete_until"] >= complete[lane]
        complete[lane] = entry["complete_until"]
        if entry["type"] == "watermark":
            assert entry["complete_until"] >= hour + HOUR_US
            assert [entry["records"], entry["gpu_time_ns"]] == sums[lane, hour]
            hours[lane].append(hour)
            continue
        assert hour not in hours[lane], "a batch after its hour was declared complete"
        assert entry["batch_seq"] == seqs[hour]
        seqs[hour] += 1
        sums[lane, hour][0] += entry["records"]
        sums[lane, hour][1] += entry["gpu_time_ns"]
    for declared in filter(None, hours.values()):
        assert declared == list(range(declared[0], declared[-1] + 1, HOUR_US))
    assert sum(records for records, _ in sums.values()) == len(rows)


def _check_sql(state: Path, entries: Sequence[dict[str, Any]], published: Published) -> None:
    with closing(connect(state)) as connection:
        head = connection.execute("SELECT size, root FROM log_head").fetchall()
        assert head == [(published.size, published.root)]
        states = connection.execute("SELECT DISTINCT state FROM batches").fetchall()
        assert states in ([], [("published",)])
        assert connection.execute("SELECT count(*) FROM usage_events WHERE batch_id IS NULL").fetchone() == (0,)
        logged = connection.execute("SELECT type, batch_id, log_index FROM batches ORDER BY log_index").fetchall()
    kinds = ("usage_batch", "watermark")
    expected = [(e["type"], e["batch_id"], index) for index, e in enumerate(entries) if e["type"] in kinds]
    assert logged == expected


def run_together(script: str, path: Path, names: str = "ab") -> list[str]:
    """Run a script in one process a name, all let go at once; gives what each printed after it was ready.

    The script gets `path` and its name, prints `ready`, waits for a line, and then does its work.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), name],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), [errors for _, errors in said]
    return [output for output, _ in said]
