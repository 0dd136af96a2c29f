"""Whatever bytes come from outside, each parser gives a value or one of our errors with a message, soon and in little
memory; `make fuzz SECONDS=…` does the same for longer."""

from __future__ import annotations

import asyncio
import random
import resource
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from render_platform import batches
from render_platform.charges.price_book import MAX_BYTES, MAX_DOTS, load_price_book, parse_price_book
from render_platform.config import MAX_FILE_BYTES, load_settings
from render_platform.errors import Finding, RecordError, UsageError
from render_platform.gateway.triton_spans import MAX_ID_CHARACTERS, MAX_SPANS, SpanBook
from tests import fuzz
from tests.factories import make_table
from tests.fuzz_samples import BOOK, CONFIG, FORM, VECTORS
from tests.fuzz_targets import Target, make_targets
from tests.gateway.test_triton_meters import compute, export, request
from tests.mutations import HUGE

VECTOR = (VECTORS / "spec.parquet").read_bytes()
with tempfile.TemporaryDirectory() as _folder:
    TARGETS = list(make_targets(Path(_folder)))
SECONDS, MOST = 0.6, 2_000
"""A target's share of the always-run part: CPU time and inputs."""
MOST_MEMORY_KIB = 400 * 1024


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_its_samples_are_read(targets: dict[str, Target], name: str) -> None:
    for sample in targets[name].samples:
        targets[name].read(sample)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(targets: dict[str, Target], name: str, rng: random.Random) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capture_logs():
        tried, _ = fuzz.fuzz(targets[name], rng, SECONDS, MOST)
    assert tried > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KIB


FOUND: dict[str, tuple[bytes, ...]] = {
    "batch": (VECTOR.replace(b"event_id", b"event\xf5id"), VECTOR[:4] + VECTOR[-8:]),
    "trace": (b'{"timestamp": 3, "input_length": 1, "output_length": 2.0e99999999999999999999}\n',),
    "config": (b"batch_rows = " + b"[" * 2_000, b"batch_rows = " + HUGE, b"\xff", b'state_dir = "\\u0000"'),
    "price-book": (
        BOOK.replace(b"version = 3", b"version = " + HUGE),
        BOOK + b"a = " + b"[" * 2_000,
        b"a." * 200_000 + b"a = 1",
        BOOK.replace(b"2023-01-01T00:00:00Z", b"0001-01-01T00:00:00.5+23:59"),
    ),
    "bridge": (
        FORM.replace(b"boundary=xx", b"boundary=" + b"x" * 100_000),
        FORM.replace(b"boundary=xx", b"charset=none; boundary*0*=x"),
        FORM.replace(b'name="query"', b"name*=utf-8''%ff"),
        FORM.replace(b"\r\n--xx--", b""),
        FORM + b"--xx--\r\n",
    ),
}
"""What parsers did not survive once: none of it may come back."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_is_refused(targets: dict[str, Target], name: str) -> None:
    for data in FOUND[name]:
        fuzz.try_one(targets[name], data)


def test_a_batch_whose_texts_are_no_utf8_is_a_finding() -> None:
    """Its footer, and its values: both would fail only where they are shown."""
    assert batches.decode(VECTOR).num_rows
    for data in (VECTOR.replace(b"event_id", b"event\xf5id"), with_column("device_uuid", b"GPU-\xff")):
        with pytest.raises(Finding, match="not readable as Parquet"):
            batches.decode(data)


def with_column(name: str, value: bytes) -> bytes:
    table = make_table(5, 1)
    at = table.column_names.index(name)
    texts = pa.array([value] * 5, pa.binary()).view(pa.string())
    return batches.encode(table.set_column(at, table.schema.field(at), texts))


def test_a_price_book_begins_at_its_very_microsecond() -> None:
    book = BOOK.replace(b"2023-01-01T00:00:00Z", b"9999-12-31T23:59:58.999999Z")
    assert parse_price_book(book).periods[0].from_us == 253_402_300_798_999_999


def test_files_are_read_up_to_their_bound(tmp_path: Path) -> None:
    path = tmp_path / "book.toml"
    path.write_bytes(BOOK + b"#" * (MAX_BYTES - len(BOOK)))
    assert load_price_book(path).version == 3
    for data in (BOOK + b"#" * MAX_BYTES, BOOK + b"#" + b"." * (MAX_DOTS + 1)):
        path.write_bytes(data)
        with pytest.raises(UsageError, match="more than"):
            load_price_book(path)
        with pytest.raises(RecordError, match="more than"):
            parse_price_book(data)
    path.write_bytes(CONFIG + b"#" * MAX_FILE_BYTES)
    with pytest.raises(UsageError, match="more than"):
        load_settings({}, config=path)
    with pytest.raises(UsageError, match="not a path"):
        load_price_book(Path("a\0b"))


def test_spans_of_one_request_are_not_kept_without_bound() -> None:
    async def story() -> None:
        book = SpanBook()
        with book.awaiting("mine") as mine, book.awaiting("long") as long:
            for _ in range(3):
                book.add(export(*(compute("a", start, start + 1) for start in range(MAX_SPANS - 1))))
            book.add(export(compute("x" * (MAX_ID_CHARACTERS + 1), 1, 2)))
            book.add(export(request("a", "http", "mine"), request("x" * (MAX_ID_CHARACTERS + 1), "http", "long")))
            assert (len(mine.result()), long.result()) == (MAX_SPANS, [])

    asyncio.run(story())
