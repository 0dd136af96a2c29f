"""A batch's bytes: Parquet, written once, and what verification reads out of it again."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from render_platform.errors import Finding
from render_platform.events import require_schema

_MAGIC = b"PAR1"


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
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise Finding(f"not readable as Parquet: {error}") from error
    require_schema(table.schema)
    return table
