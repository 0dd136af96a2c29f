"""ClickHouse in memory, as far as the fast path, reconciliation and repair use it; both insert and read may fail.

Raw rows and rollups are kept apart: an insert that is cut off leaves the first without the second. The numbers of a
row are computed here from docs/formats.md, by code of this module's own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from render_platform.clickhouse_schema import (
    NO_NUMBER,
    ROLLUP_SCHEMA,
    ROW_VALUES_SCHEMA,
    WINDOW_SCHEMA,
    ReportRow,
)
from render_platform.clock import DAY_US, HOUR_US, WINDOW_US
from render_platform.errors import Unavailable
from render_platform.events import COLUMNS, EVENT_SCHEMA, Totals, plain_rows
from tests.simulation.world import World

_WRAP = 2**64
_MINUTE_US = 60_000_000
Row = dict[str, Any]


def weight(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1


_TEXTS = {field.name for field in EVENT_SCHEMA if pa.types.is_string(field.type)}
_BYTES = {field.name for field in EVENT_SCHEMA if field.type in (pa.uuid(), pa.binary(16))}
_WEIGHTS = {name: weight(name) for name in COLUMNS}
_HALVES = {name: (weight(f"{name}/high"), weight(f"{name}/low")) for name in _BYTES}


def _value(row: Row) -> int:
    total = 0
    for name in COLUMNS[1:]:
        value = row[name]
        if name in _BYTES:
            high, low = _HALVES[name]
            total += int.from_bytes(value[:8], "big") * high + int.from_bytes(value[8:], "big") * low
        elif name in _TEXTS:
            if value is not None:
                total += int.from_bytes(hashlib.md5(value.encode()).digest()[:8], "little") * _WEIGHTS[name]
        else:
            total += (NO_NUMBER if value is None else int(value)) * _WEIGHTS[name]
    return total % _WRAP


def rows_of(table: pa.Table) -> list[Row]:
    """Bytes, texts and integers, by column; and the row's value."""
    found = []
    for plain in plain_rows(table):
        row = dict(zip(COLUMNS, plain, strict=True))
        found.append({**row, "value": _value(row)})
    return found


class FakeClickHouse:
    """Stands in for clickhouse.ClickHouse. `raw`, `minutes` and `hours` hold a row for each insert that came there."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.raw: list[Row] = []
        self.rolled: dict[int, list[Row]] = {_MINUTE_US: [], HOUR_US: []}
        self._tokens: set[tuple[str, str]] = set()
        self.reports: list[ReportRow] = []

    def close(self) -> None:
        pass

    def make_ready(self) -> None:
        self._read("make_ready")

    def _read(self, what: str) -> None:
        self._world.read(f"clickhouse: {what}", _unavailable)

    def _write(self, what: str, do: Callable[[], None]) -> None:
        self._world.write(f"clickhouse: {what}", do, _unavailable)

    def insert_events(self, table: pa.Table, token: str) -> None:
        rows = rows_of(table)
        into: list[tuple[str, list[Row]]] = [("raw", self.raw)]
        into += [(f"rollup {unit}", kept) for unit, kept in self.rolled.items()]
        for name, kept in into:
            if (name, token) not in self._tokens:
                self._write(f"insert {len(rows)} into {name}", partial(self._insert, name, token, kept, rows))

    def _insert(self, name: str, token: str, kept: list[Row], rows: list[Row]) -> None:
        self._tokens.add((name, token))
        kept.extend(rows)

    def _within(self, rows: Iterable[Row], start_us: int, end_us: int) -> list[Row]:
        return [row for row in rows if start_us <= row["recorded_at"] < end_us]

    def window_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        self._read("window_aggregates")
        found = self._by_key(self._within(self.raw, start_us, end_us))
        return pa.Table.from_pylist(found, WINDOW_SCHEMA)

    def rollup_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        self._read("rollup_aggregates")
        found = self._by_key(self._within(self.rolled[_MINUTE_US], start_us, end_us))
        return pa.Table.from_pylist([{name: one[name] for name in ROLLUP_SCHEMA.names} for one in found], ROLLUP_SCHEMA)

    def _by_key(self, rows: list[Row]) -> list[Row]:
        keys: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
        for row in rows:
            keys[row["recorded_at"] // WINDOW_US, row["customer_ref"], row["model_name"]].append(row)
        return [
            {
                "window": window,
                "customer_ref": customer,
                "model_name": model,
                "events": len(of_key),
                "gpu_time_ns": sum(row["gpu_time_ns"] for row in of_key),
                "id_sum": sum(_low(row) for row in of_key) % _WRAP,
                "id_high_sum": sum(int.from_bytes(row["event_id"][:8], "big") for row in of_key) % _WRAP,
                "row_sum": sum((_low(row) % 2**32 | 1) * row["value"] for row in of_key) % _WRAP,
                "minute_sum": _minute_sum(of_key),
            }
            for (window, customer, model), of_key in sorted(keys.items())
        ]

    def row_values(self, start_us: int, end_us: int) -> Iterator[pa.Table]:
        self._read("row_values")
        found = [
            {**{name: row[name] for name in ("event_id", "customer_ref", "model_name")}, "row_value": row["value"]}
            | {"window": row["recorded_at"] // WINDOW_US}
            for row in self._within(self.raw, start_us, end_us)
        ]
        yield pa.Table.from_pylist(found, ROW_VALUES_SCHEMA)

    def hourly_totals(self, hour_us: int) -> Totals:
        self._read("hourly_totals")
        return _totals(self._within(self.rolled[HOUR_US], hour_us, hour_us + HOUR_US))

    def hours_with_rows(self, start_us: int = 0, end_us: int = 2**62) -> list[int]:
        self._read("hours_with_rows")
        rows = self._within([*self.raw, *self.rolled[_MINUTE_US]], start_us, end_us)
        return sorted({row["recorded_at"] // HOUR_US * HOUR_US for row in rows})

    def hours_of(self, rows: pa.Table) -> list[int]:
        self._read("hours_of")
        ids = {row["event_id"] for row in rows_of(rows)}
        return sorted({row["recorded_at"] // HOUR_US * HOUR_US for row in self.raw if row["event_id"] in ids})

    def rebuild_rollup(self, start_us: int, end_us: int) -> None:
        for unit, kept in self.rolled.items():
            start, end = -(-start_us // unit) * unit, end_us - end_us % unit
            rows = self._within(self.raw, start, end)
            left = [row for row in kept if not start <= row["recorded_at"] < end]
            self._write(f"delete from rollup {unit}", partial(_set, kept, left))
            self._write(f"fill rollup {unit}", partial(kept.extend, rows))

    def rebuild_day(
        self, day_us: int, tables: Iterable[pa.Table], expected: Totals, ready: Callable[[], None] = lambda: None
    ) -> None:
        rows = [row for table in tables for row in rows_of(table)]
        if _totals(rows) != expected:
            raise Unavailable(f"staged {_totals(rows)} where {expected} was expected", "repeat this")
        ready()
        for kept in (self.raw, *self.rolled.values()):
            left = [row for row in kept if not day_us <= row["recorded_at"] < day_us + DAY_US]
            self._write("swap a day", partial(_set, kept, [*left, *rows]))

    def record_report(self, row: ReportRow) -> None:
        self._write(f"report {row.status}", lambda: self.reports.append(row))


def _set(kept: list[Row], rows: list[Row]) -> None:
    kept[:] = rows


def _low(row: Row) -> int:
    return int.from_bytes(row["event_id"][8:], "big")


def _totals(rows: list[Row]) -> Totals:
    return Totals(len(rows), sum(row["gpu_time_ns"] for row in rows))


def _minute_sum(rows: list[Row]) -> int:
    minutes: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        minutes[row["recorded_at"] // _MINUTE_US].append(row)
    said = [(at, *_totals(of_minute)) for at, of_minute in sorted(minutes.items())]
    return int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:8], "big")


def _unavailable(kind: str) -> Unavailable:
    return Unavailable(f"ClickHouse: a request was {kind}", "try again")
