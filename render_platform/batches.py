"""A batch's bytes: Parquet, written once, and its attestation.

The attestation is a DSSE envelope around an in-toto Statement: our signed statement, not hardware attestation.
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, https://in-toto.io/Statement/v1
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from render_platform import canonical
from render_platform.errors import Finding
from render_platform.events import require_schema
from render_platform.note import Signer, Verifier

MAX_ROWS, ROWS_AT_ONCE = 50_000, 2_000
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
LOW_BITS = 2**32 - 1
_MAGIC = b"PAR1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://render-platform.dev/gpu-usage/v1"


def encode(table: pa.Table) -> bytes:
    """The Parquet bytes of a batch: zstd, one row group, sorted by `event_id`.

    Call it once a batch: another version of the library may give other bytes for the same rows.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, table.num_rows), version="2.6")
    return bytes(sink.getvalue().to_pybytes())


def decode(data: bytes) -> pa.Table:
    """The rows of a batch. Raises Finding where the bytes are not Parquet of exactly the events' schema."""
    if not (data.startswith(_MAGIC) and data.endswith(_MAGIC)):
        raise Finding("not a Parquet file from its first byte to its last")
    try:
        # One thread: the bytes are in memory, and pyarrow's pools can outlive the interpreter at exit.
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        require_schema(file.schema_arrow)
        table = _unpacked(file)
        table.validate(full=True)  # texts too: what is no UTF-8 would fail wherever it is shown
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is no UTF-8
        raise Finding(f"not readable as Parquet: {error}") from error
    if _length(file.metadata) != len(data):
        raise Finding("holds bytes that are no part of the Parquet file that its footer describes")
    require_schema(table.schema)
    return table


def _unpacked(file: pq.ParquetFile) -> pa.Table:
    """The rows, unpacked a few at a time: what a footer says of its size is as good as who wrote it."""
    groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
    if file.metadata.num_rows > MAX_ROWS or sum(group.total_byte_size for group in groups) > MAX_UNPACKED_BYTES:
        raise Finding("holds more than a batch may")
    parts: list[pa.RecordBatch] = []
    rows = size = 0
    for part in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
        parts.append(part)
        rows, size = rows + part.num_rows, size + part.nbytes
        if rows > MAX_ROWS or size > MAX_UNPACKED_BYTES:
            raise Finding("holds more than a batch may")
    return pa.Table.from_batches(parts, file.schema_arrow).combine_chunks()


def _length(metadata: pq.FileMetaData) -> int:
    """What a file has to be long: its last column chunk's end, then footer, its length and the magic.

    A reader begins at the end, and would not see what a copied footer hides before it.
    """
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    chunks = [group.column(at) for group in groups for at in range(group.num_columns)]
    ends = [(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size for chunk in chunks]
    return int(max(ends, default=len(_MAGIC)) + metadata.serialized_size + 8)


def predicate(table: pa.Table) -> dict[str, Any]:
    """What a batch says that its GPUs did. Times are microseconds UTC; sums are exact."""

    def distinct(name: str) -> list[str]:
        return sorted(value for value in pc.unique(table.column(name)).to_pylist() if value is not None)

    resources = _resources(table)
    times = pc.min_max(table.column("event_time").cast(pa.int64())).as_py()
    return {
        "events": table.num_rows,
        "gpu_time_ns": sum(one["gpu_time_ns"] for one in resources),
        "devices": distinct("device_uuid"),
        "meters": distinct("meter"),
        "first_event_time_us": times["min"],
        "last_event_time_us": times["max"],
        "resources": resources,
    }


def _resources(table: pa.Table) -> list[dict[str, Any]]:
    """What was used, by device and meter: events, GPU ns, and mJ of the events whose energy was read, if any was."""
    halves = {
        f"{name}_{part}": of(table.column(name), 32 if part == "high" else LOW_BITS)
        for name in ("gpu_time_ns", "energy_mj")
        for part, of in (("high", pc.shift_right), ("low", pc.bit_wise_and))
    }  # the sums of halves fit 64 bits; those of whole numbers may not
    rows = pa.table({"device": table.column("device_uuid"), "meter": table.column("meter"), **halves})
    sums = [(name, "sum") for name in halves]
    counts = [("meter", "count"), ("energy_mj_low", "count")]
    found = rows.group_by(["device", "meter"], use_threads=False).aggregate(sums + counts).to_pylist()
    return [
        {
            "device": one["device"],
            "meter": one["meter"],
            "events": one["meter_count"],
            "gpu_time_ns": _whole(one, "gpu_time_ns"),
            "energy_events": one["energy_mj_low_count"],
            "energy_mj": _whole(one, "energy_mj") if one["energy_mj_low_count"] else None,
        }
        for one in sorted(found, key=lambda one: (one["device"] or "", one["meter"]))
    ]


def _whole(sums: Mapping[str, Any], name: str) -> int:
    return (int(sums[f"{name}_high_sum"]) << 32) + int(sums[f"{name}_low_sum"])


def attest(name: str, digest: str, table: pa.Table, signer: Signer, software: str) -> bytes:
    """The envelope's canonical bytes. Ed25519 is deterministic and no clock is read: the same batch gives the same."""
    statement = canonical.encode(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {**predicate(table), "software": software},
        }
    )
    signature = signer.sign(_pae(statement))
    return canonical.encode(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(statement).decode(),
            "signatures": [{"keyid": signer.verifier.vkey, "sig": base64.b64encode(signature).decode()}],
        }
    )


def check_attestation(envelope: bytes, digest: str, keys: Mapping[str, Verifier]) -> dict[str, Any]:
    """The predicate, if one of `keys` (by vkey) signed it for the batch `digest`; Finding otherwise."""
    try:
        outer = canonical.decode(envelope)
        payload = base64.b64decode(outer["payload"], validate=True)
        signature = base64.b64decode(outer["signatures"][0]["sig"], validate=True)
        verifier = keys.get(outer["signatures"][0]["keyid"])
        if outer["payloadType"] != PAYLOAD_TYPE:
            raise Finding("the attestation is not an in-toto statement")
        if verifier is None or not verifier.verifies(_pae(payload), signature):
            raise Finding("the attestation is not signed by a known key")
        statement = canonical.decode(payload)
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise Finding("the attestation is not a statement of GPU usage")
        if statement["subject"][0]["digest"]["sha256"] != digest:
            raise Finding("the attestation speaks of another batch")
        return dict(statement["predicate"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Finding(f"the attestation is not valid ({type(error).__name__})") from error


def _pae(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
