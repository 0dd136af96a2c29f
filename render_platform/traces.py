"""Inference traces, read into jobs through declared mappings: another format is one more entry of `FORMATS`.

A row becomes a job or a `BadRow` that says where and why; none is left out. A row is one record of the file:
a CSV record may hold newlines inside quotes, over at most 50 lines. Numbers go from text to integers, never
through floats. The file is read as a stream: only its rows stay in memory, and their number is bounded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError
from render_platform.trace_formats import FORMATS, GENERATED, TraceFormat, shown

MAX_ROWS = 10_000_000
MAX_BAD_ROWS = 1_000_000
MAX_TEXT_BYTES = 64 << 30
"""Of a trace's text, unpacked: a small gzip file can hold lines without end."""
MAX_LINE_BYTES = 1 << 20
MAX_ROW_LINES = 50
PROGRESS_ROWS = 10_000
_GENERATED_START_US = 1_705_310_400 * US_PER_SECOND
_GENERATED_SPAN_US = 90 * 60 * US_PER_SECOND
_CHUNK_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One request of a trace. `row` counts data rows from 1, bad ones too; `line` is where the row begins.

    None means that the trace does not say. `exec_time_us` is the run time that the trace itself recorded.
    """

    row: int
    line: int
    arrival_us: int
    client: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    image_count: int | None = None
    num_steps: int | None = None
    exec_time_us: int | None = None
    status: str = "success"
    modality: str = "text"


@dataclass(frozen=True, slots=True)
class BadRow:
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """The jobs of a file, by (arrival_us, row). `digest` is the SHA-256 hex of the file's bytes as they are on disk."""

    path: str
    digest: str
    format: TraceFormat
    jobs: list[TraceJob]
    bad_rows: list[BadRow] = field(default_factory=list)

    def format_of(self, job: TraceJob) -> TraceFormat:
        """The format whose model, modality and task are those of `job`: a generated trace has two."""
        if job.modality == self.format.modality:
            return self.format
        for other in GENERATED:
            if job.modality == other.modality:
                return other
        raise UsageError(f"no known format has jobs of modality {job.modality!r}", "use text or image")


class _Lines:
    """Numbered lines with their newline; those taken ahead can be put back. A line too long is cut and marked."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self._stream = stream
        self._ahead: deque[tuple[int, bytes, bool]] = deque()
        self._number = 0
        self._max_bytes = self._left = max_bytes

    def take(self) -> tuple[int, bytes, bool] | None:
        """(number, bytes, whole), or None at the end of the file."""
        if self._ahead:
            return self._ahead.popleft()
        text = self._read()
        if not text:
            return None
        self._number += 1
        whole = tail = text.endswith(b"\n") or len(text) < MAX_LINE_BYTES
        while not tail:
            rest = self._read()
            tail = not rest or rest.endswith(b"\n")
        return self._number, text.removeprefix(_BOM) if self._number == 1 else text, whole

    def _read(self) -> bytes:
        text = self._stream.readline(MAX_LINE_BYTES)
        self._left -= len(text)
        if self._left < 0:
            raise UsageError(f"the trace has more than {self._max_bytes} bytes of text", "split it into several files")
        return text

    def put_back(self, taken: list[tuple[int, bytes, bool]]) -> None:
        self._ahead.extendleft(reversed(taken))


class _Digesting(io.RawIOBase):
    """The bytes of `file`, hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self.digest.update(data)
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A format, met in a file: its columns in the file's order, and (job field, column, index, parser) to read."""

    format: TraceFormat
    names: list[str]
    plan: list[tuple[str, str, int, Callable[[Any], Any]]]


def read_trace(
    path: Path,
    progress: Callable[[int], None] | None = None,
    *,
    max_rows: int = MAX_ROWS,
    max_bad_rows: int = MAX_BAD_ROWS,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Trace:
    """Read a CSV or JSON-lines file, plain or gzip; format and compression are told from the content.

    `progress` gets the number of rows read so far, now and then and at the end. UsageError where the file
    cannot be read as a whole: missing, empty, damaged gzip, of no known format, or beyond a bound. Rows that cannot
    be read are `bad_rows`.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            hashing = _Digesting(file)
            raw = io.BufferedReader(hashing, _CHUNK_BYTES)
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), _CHUNK_BYTES) if zipped else raw
            lines = _Lines(cast(BinaryIO, stream), max_text_bytes)
            layout = _detect(lines, path)
            jobs, bad_rows = _read_rows(lines, layout, progress or (lambda _rows: None), max_rows, max_bad_rows)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: the gzip data is damaged: {error}", "fetch the file again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "name a readable trace file") from error
    if not jobs and not bad_rows:
        raise UsageError(f"{path}: the file has a header and no rows", "give a trace file with a header and rows")
    jobs.sort(key=attrgetter("arrival_us", "row"))
    return Trace(str(path), hashing.digest.hexdigest(), layout.format, jobs, bad_rows)


def _detect(lines: _Lines, path: Path) -> _Layout:
    """The layout by the header, or by the first records that are JSON objects; UsageError where none fits."""
    head = lines.take()
    if head is None:
        raise UsageError(f"{path}: the file is empty", "give a trace file with a header and rows")
    if head[1].lstrip().startswith(b"{"):
        lines.put_back([head])
        kind, candidates = "jsonl", _first_keys(lines)
    else:
        kind, candidates = "csv", [_header(head[1], path)]
    for found in candidates:
        for known in FORMATS:
            if known.kind == kind and known.matches(found):
                return _layout(known, found)
    raise UsageError(
        f"{path}: no known trace format has these columns: {_shown_columns(candidates)}",
        f"known formats: {'; '.join(_described(known) for known in FORMATS)}",
    )


def _first_keys(lines: _Lines) -> list[list[str]]:
    taken: list[tuple[int, bytes, bool]] = []
    while len(taken) < 100 and (item := lines.take()):
        taken.append(item)
    lines.put_back(taken)
    found = []
    for _number, text, _whole in taken:
        try:
            found.append(list(_json_object(text)))
        except ValueError:
            continue
    return found


def _header(text: bytes, path: Path) -> list[str]:
    try:
        names = [name.strip() for name in _csv_fields(text.decode())]
    except ValueError as error:
        raise UsageError(f"{path}: the first line is no header: {error}", "give a CSV or JSON-lines file") from error
    if len(set(names)) != len(names):
        raise UsageError(f"{path}: a column is named twice: {', '.join(names)[:500]}", "rename or drop one of them")
    return names


def _shown_columns(candidates: list[list[str]]) -> str:
    return ", ".join(candidates[0])[:500] if candidates and candidates[0] else "none"


def _described(known: TraceFormat) -> str:
    return f"{known.name} ({known.kind}: {', '.join('/'.join(c.names) for c in known.columns if c.required)})"


def _layout(known: TraceFormat, found: list[str]) -> _Layout:
    plan = []
    for column in known.columns:
        name = next((name for name in column.names if name in found), None)
        if name is not None:
            plan.append((column.field, name, found.index(name), column.parse))
    return _Layout(known, found, plan)


def _read_rows(
    lines: _Lines, layout: _Layout, progress: Callable[[int], None], max_rows: int, max_bad_rows: int
) -> tuple[list[TraceJob], list[BadRow]]:
    jobs: list[TraceJob] = []
    bad_rows: list[BadRow] = []
    row = 0
    for row, (line, values) in enumerate(_records(lines, layout), 1):
        if isinstance(values, str):
            bad_rows.append(BadRow(line, values))
        else:
            try:
                jobs.append(_job(layout, values, row, line))
            except ValueError as error:
                bad_rows.append(BadRow(line, str(error)))
        if row % PROGRESS_ROWS == 0:
            progress(row)
        if row > max_rows:
            raise UsageError(f"the trace has more than {max_rows} rows", "split it into several files")
        if len(bad_rows) > max_bad_rows:
            raise UsageError(
                f"more than {max_bad_rows} rows are no jobs, the last in line {line}: {bad_rows[-1].reason}",
                "mend or split the file",
            )
    progress(row)
    return jobs, bad_rows


def _job(layout: _Layout, values: list[Any], row: int, line: int) -> TraceJob:
    """A job of the values, which are in the file's column order; ValueError names the column."""
    found: dict[str, Any] = {"modality": layout.format.modality}
    for name, column, index, parse in layout.plan:
        try:
            found[name] = parse(values[index])
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from None
    return TraceJob(row=row, line=line, **found)


def _records(lines: _Lines, layout: _Layout) -> Iterator[tuple[int, list[Any] | str]]:
    """(line, values in column order) of each row; the reason instead of the values where it has none."""
    read = _csv_record if layout.format.kind == "csv" else _json_record
    blank: int | None = None
    while item := lines.take():
        number, text, whole = item
        if blank is not None:
            yield blank, "the line is blank"
        blank = None if text.strip() else number
        if blank is not None:
            continue
        try:
            if not whole:
                raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
            values: list[Any] | str = read(lines, text, layout)
        except ValueError as error:
            values = str(error)
        yield number, values


def _csv_record(lines: _Lines, first: bytes, layout: _Layout) -> list[str]:
    names = layout.names
    raw = first if first.count(b'"') % 2 == 0 else _closed(lines, first, names)
    text = raw.decode(errors="surrogateescape")
    values = _csv_fields(text) if '"' in text else text.removesuffix("\n").removesuffix("\r").split(",")
    if not text.isascii() or "\0" in text:
        _refuse_odd_characters(names, values)
    if len(values) != len(names):
        raise ValueError(f"the row has {len(values)} columns, the header has {len(names)} ({', '.join(names)[:200]})")
    return values


def _closed(lines: _Lines, first: bytes, names: list[str]) -> bytes:
    """`first` and the lines that its open quote runs over; ValueError, nothing taken, where it is not closed."""
    raw = first
    taken: list[tuple[int, bytes, bool]] = []
    while len(taken) < MAX_ROW_LINES and len(raw) < MAX_LINE_BYTES and (item := lines.take()):
        taken.append(item)
        raw += item[1]
        if item[1].count(b'"') % 2:
            return raw
    lines.put_back(taken)
    opened = first[: first.rindex(b'"')].count(b",")
    raise ValueError(f"{names[min(opened, len(names) - 1)]}: a quote is opened and not closed")


def _csv_fields(text: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        raise ValueError(f"not a CSV row: {error}") from None


def _refuse_odd_characters(names: list[str], values: list[str]) -> None:
    for index, value in enumerate(values):
        name = names[index] if index < len(names) else f"column {index + 1}"
        if "\0" in value:
            raise ValueError(f"{name}: holds a NUL byte")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name}: is not UTF-8")


def _json_record(_lines: _Lines, text: bytes, layout: _Layout) -> list[Any]:
    found = _json_object(text)
    return [found.get(name) for name in layout.names]


def _json_object(text: bytes) -> dict[str, Any]:
    """The object of one line, decimals as Decimal; ValueError where it is none, or has a key twice."""
    try:
        value = json.loads(text.decode(), parse_float=Decimal, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except RecursionError:
        raise ValueError("not a JSON object: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error.msg} at column {error.colno}") from None
    except InvalidOperation:
        raise ValueError("a number's exponent is out of range") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {shown(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the JSON object has a key twice: {shown([key for key, _ in pairs])}")
    return found


def generated_trace(seed: int = 7, jobs: int = 1200) -> Trace:
    """A made-up trace of 90 minutes from 2024-01-15T09:20:00Z, six clients, about one job in eight an image.

    Draws come from SHA-256, so that the same seed gives the same jobs, and `digest` of their content, everywhere.
    """
    draws = sorted(_draw(seed, number) for number in range(jobs))
    made = [_generated_job(row, draw) for row, draw in enumerate(draws, 1)]
    names = [f.name for f in fields(TraceJob)]
    content = "".join(f"{','.join(str(getattr(job, name)) for name in names)}\n" for job in made)
    return Trace("generated", hashlib.sha256(content.encode()).hexdigest(), GENERATED[0], made)


def _draw(seed: int, number: int) -> tuple[int, ...]:
    """An offset in µs, and seven numbers below 2^24."""
    block = hashlib.sha256(f"render-platform/generated/{seed}/{number}".encode()).digest()
    offset = int.from_bytes(block[:8], "big") % _GENERATED_SPAN_US
    return offset, *(int.from_bytes(block[at : at + 3], "big") for at in range(8, 29, 3))


def _generated_job(row: int, draw: tuple[int, ...]) -> TraceJob:
    offset, who, what, size, more, fails, _, _ = draw
    client = f"client-{min(who % 6, who // 6 % 6) + 1:02d}"
    arrival, status = _GENERATED_START_US + offset, "error" if fails % 50 == 0 else "success"
    if what % 8 == 0:
        steps, count = 20 + size % 31, 1 + more % 4
        return TraceJob(row, row + 1, arrival, client, None, None, count, steps, status=status, modality="image")
    return TraceJob(row, row + 1, arrival, client, 16 + size % 2_000, 1 + more % 400, status=status)
