"""What the checksums of rows are, a value at a time in Python integers: docs/formats.md, sharing no code with SQL."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import pyarrow as pa

from render_platform.clock import WINDOW_US
from render_platform.events import EVENT_SCHEMA, UsageEvent, plain_rows, table_from_events

Key = tuple[int, str, str]
_IDS = ("nonce", "request_id", "job_id")


def weight(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1


def row_value(row: dict[str, object]) -> int:
    """Of a row as SQL stores it: ids as 16 bytes, times as integers."""
    total = 0
    for name, value in row.items():
        if name in _IDS:
            high, low = divmod(int.from_bytes(bytes(value), "big"), 2**64)  # type: ignore[call-overload]
            total += high * weight(f"{name}/high") + low * weight(f"{name}/low")
        elif isinstance(value, str):
            total += int.from_bytes(hashlib.md5(value.encode()).digest()[:8], "little") * weight(name)
        elif isinstance(value, int):
            total += value * weight(name)
        elif value is None and pa.types.is_integer(EVENT_SCHEMA.field(name).type):
            total -= 7_046_029_254_386_353_131 * weight(name)
    return total % 2**64


def sums_of_rows(rows: Iterable[dict[str, object]]) -> dict[Key, tuple[int, int, int, int, int]]:
    """Events, ns, both id sums and the row sum of each window, customer and model."""
    found: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for row in rows:
        event_id, at, ns = row.pop("event_id"), row["recorded_at"], row["gpu_time_ns"]
        assert isinstance(event_id, bytes)
        assert isinstance(at, int)
        assert isinstance(ns, int)
        high, low = divmod(int.from_bytes(event_id, "big"), 2**64)
        one = found[at // WINDOW_US, str(row["customer_ref"]), str(row["model_name"])]
        one[0] += 1
        one[1] += ns
        one[2] += low
        one[3] += high
        one[4] += (low % 2**32 | 1) * row_value(row)
    return {key: (n, ns, a % 2**64, b % 2**64, c % 2**64) for key, (n, ns, a, b, c) in found.items()}


def sums_of_table(table: pa.Table) -> dict[Key, tuple[int, int, int, int, int]]:
    return sums_of_rows(dict(zip(EVENT_SCHEMA.names, row, strict=True)) for row in plain_rows(table))


def sums_of_events(made: Iterable[UsageEvent]) -> dict[Key, tuple[int, int, int, int, int]]:
    return sums_of_table(table_from_events(made))


def row_values(made: Iterable[UsageEvent]) -> pa.Table:
    """ROW_VALUES_SCHEMA, as each side gives it."""
    return row_values_of_table(table_from_events(made))


def row_values_of_table(table: pa.Table) -> pa.Table:
    names = ("event_id", "window", "customer_ref", "model_name", "row_value")
    found = []
    for plain in plain_rows(table):
        row = dict(zip(EVENT_SCHEMA.names, plain, strict=True))
        event_id = row.pop("event_id")
        key = (row["recorded_at"] // WINDOW_US, row["customer_ref"], row["model_name"])
        found.append(dict(zip(names, (event_id, *key, row_value(row)), strict=True)))
    kinds = (pa.binary(16), pa.int64(), pa.string(), pa.string(), pa.uint64())
    return pa.Table.from_pylist(found, pa.schema(list(zip(names, kinds, strict=True))))
