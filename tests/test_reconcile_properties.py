"""From random events and random harm, the report names exactly what was done, and repair brings back equality.

What must be said is worked out here from the harm alone, one fault an event: no row is compared with another. Equality
after a repair is asked of ClickHouse itself, by every column, against a database that was never harmed.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from render_platform.clock import HOUR_US, WINDOW_US
from render_platform.events import (
    COLUMNS,
    EVENT_SCHEMA,
    TIME,
    UsageEvent,
    storage_row,
    table_from_events,
    table_from_rows,
)
from render_platform.pipeline import Platform
from tests import chdb_server
from tests.chdb_server import open_raw
from tests.factories import CUSTOMERS, MODELS
from tests.fault_cases import CAUSES, LAST_HOUR
from tests.stories import DEADLINE_US, Key, keyed_event, open_story, record, wanting
from tests.test_clickhouse import engine  # noqa: F401  fixture

Row = dict[str, Any]
Fault = tuple[str, str]
"""What is done to a row, and the column where it is done to one."""
Found = dict[tuple[str, Key], set[str]]
HOUR, CLOSED_US = LAST_HOUR, LAST_HOUR + HOUR_US + DEADLINE_US
KEY_COLUMNS = ("customer_ref", "model_name", "window")
OTHERS = [name for name in COLUMNS if name not in ("event_id", "customer_ref", "model_name")]
FAULTS = ("missing", "duplicated", "unexpected", "altered", "swapped", "new id", *KEY_COLUMNS)
SUMS = "events, gpu_time_ns_sum, input_tokens_known, input_tokens_sum, output_tokens_known, output_tokens_sum"


# Harm, and what must be said of it.


def key_of(row: Row) -> Key:
    return row["recorded_at"] // WINDOW_US, row["customer_ref"], row["model_name"]


def id_of(row: Row) -> str:
    return str(UUID(bytes=row["event_id"]))


def other_value(rng: random.Random, name: str, value: Any) -> Any:
    """Another value that the column can hold, often near: null for zero, one bit, one unit."""
    column = EVENT_SCHEMA.field(name)
    choices: list[Any] = [None] if column.nullable else []
    if isinstance(value, bytes):
        choices.append(bytes([value[0] ^ 1 << rng.randrange(8), *value[1:]]))
    elif pa.types.is_string(column.type):
        choices += ["x", "0", "success", f"{value}0"]
    elif column.type == TIME:
        choices += [value - 1, value + 1]
        if name == "recorded_at":  # in the same window, or it would be a move
            choices = [at for at in choices if at // WINDOW_US == value // WINDOW_US]
    else:
        known = value or 0
        choices += [0, 1, 2**32, 2**63 - 1, known ^ 1, known ^ 1 << rng.randrange(62)]
    return rng.choice([other for other in choices if other != value])


@dataclass
class Harm:
    """The rows of the fast path, and what was done to them."""

    rng: random.Random
    rows: list[Row]
    said: Found = field(default_factory=lambda: defaultdict(set))
    untouched: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.untouched = self.rng.sample(self.rows, len(self.rows))

    def say(self, cause: str, key: Key, row: Row) -> None:
        self.said[cause, key].add(id_of(row))

    def do(self, fault: str, column: str = "") -> None:
        """One more fault, on rows that no other fault has touched; nothing where there are none left."""
        if fault == "swapped":
            self._swap(column)
        elif self.untouched:
            row = self.untouched.pop()
            if fault in KEY_COLUMNS:
                self._move(row, fault)
            elif fault == "altered":
                self._alter(row, column)
            else:
                plain = {"missing": self._lose, "duplicated": self._double, "unexpected": self._add}
                plain.get(fault, self._rename)(row)

    def _lose(self, row: Row) -> None:
        self.rows.remove(row)
        self.say("missing", key_of(row), row)

    def _double(self, row: Row) -> None:
        self.rows += [dict(row) for _ in range(self.rng.randrange(1, 4))]
        self.say("duplicated", key_of(row), row)

    def _add(self, row: Row) -> None:
        """A stranger: the row again under an id that was never minted."""
        stranger = row | {"event_id": self._new_id(row)}
        self.rows.append(stranger)
        self.say("unexpected", key_of(stranger), stranger)

    def _rename(self, row: Row) -> None:
        self.say("missing", key_of(row), row)
        row["event_id"] = self._new_id(row)
        self.say("unexpected", key_of(row), row)

    def _new_id(self, row: Row) -> bytes:
        """Of the same time; now and then it differs in its last bit alone."""
        data: bytes = row["event_id"]
        return data[:-1] + bytes([data[-1] ^ 1]) if self.rng.random() < 0.5 else data[:9] + self.rng.randbytes(7)

    def _alter(self, row: Row, column: str) -> None:
        self.say("altered", key_of(row), row)
        row[column] = other_value(self.rng, column, row[column])

    def _move(self, row: Row, where: str) -> None:
        before = key_of(row)
        self.say("altered", before, row)
        if where == "window":
            row["recorded_at"] += WINDOW_US * (1 if before[0] * WINDOW_US == HOUR else -1)
        else:
            names = CUSTOMERS if where == "customer_ref" else [model[1] for model in MODELS]
            row[where] = self.rng.choice([name for name in names if name != row[where]])
        self.say("unexpected", key_of(row), row)

    def _swap(self, column: str) -> None:
        """Two rows of one key have each other's value: every plain sum stays."""
        if column == "recorded_at":
            return
        for one in self.untouched:
            for two in self.untouched:
                if key_of(one) == key_of(two) and one[column] != two[column]:
                    one[column], two[column] = two[column], one[column]
                    for row in (one, two):
                        self.untouched.remove(row)
                        self.say("altered", key_of(row), row)
                    return


def event(rng: random.Random, window: int, customer: int = 0, model: int = 0) -> UsageEvent:
    return keyed_event(rng, window, customer, model, HOUR)


def random_events(rng: random.Random, n: int) -> list[UsageEvent]:
    """Few keys, so that most have several rows."""
    windows = rng.sample(range(12), rng.randrange(1, 4))
    customers, models = rng.randrange(1, len(CUSTOMERS)), rng.randrange(1, len(MODELS))
    return [event(rng, rng.choice(windows), rng.randrange(customers), rng.randrange(models)) for _ in range(n)]


# Both sides.


@contextmanager
def story(made: Sequence[UsageEvent], **options: Any) -> Iterator[Platform]:
    """The slow path whole, its hour closed; the fast path empty."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(
            open_story(Path(folder) / "s", chdb_server.fresh_database(), now_us=CLOSED_US, batch_rows=20, **options)
        ) as platform,
    ):
        record(platform, made)
        platform.flush()
        yield platform


def put(platform: Platform, rows: Sequence[Row]) -> None:
    if rows:
        ordered = sorted(rows, key=lambda row: row["event_id"])
        platform.clickhouse.insert_events(table_from_rows([[row[name] for name in COLUMNS] for row in ordered]), "fast")


def found_in(report: bytes) -> Found:
    """What a report says, of its bytes; its exact counts are those of its lists."""
    found: Found = {}
    for one in json.loads(report)["findings"]:
        key = (one["window_start"] // WINDOW_US, one["customer_ref"], one["model_name"])
        assert one["counts"] == {cause: len(one[cause]) for cause in CAUSES}
        assert one["rollup_equal"]
        for cause in CAUSES:
            assert one[cause] == sorted(set(one[cause]))
            if one[cause]:
                found[cause, key] = set(one[cause])
    return found


def assert_whole(platform: Platform, made: Sequence[UsageEvent]) -> None:
    """Raw rows and rollup are, column by column, what a database has that got `made` once."""
    good, name = platform.settings.clickhouse_database, chdb_server.fresh_database()
    with closing(open_story(platform.settings.state_dir, name, seed=9)) as fresh:
        fresh.clickhouse.insert_events(table_from_events(sorted(made, key=lambda one: one.event_id)), "all")
    sums = ", ".join(f"sum({column})" for column in SUMS.split(", "))
    of_rollup = f"SELECT minute, customer_ref, model_name, {sums}, min(gpu_time_ns_min), max(gpu_time_ns_max)"
    with closing(open_raw(chdb_server.shared_dsn())) as client:
        for query in ("SELECT * FROM {}.usage_events", of_rollup + " FROM {}.usage_minute GROUP BY ALL"):
            left, right = query.format(good), query.format(name)
            for one, two in ((left, right), (right, left)):
                assert client.query(f"{one} EXCEPT {two}").result_rows == []
        count = client.query(f"SELECT count() FROM {good}.usage_events").first_row[0]
    assert count == len(made)


def verdict(said: Found, made: Sequence[UsageEvent], threshold_ppm: int) -> str:
    """By the rule of the design: only missing rows, and of each key at most the threshold."""
    events = Counter(key_of(storage_row(event)) for event in made)
    good = all(
        cause == "missing" and len(ids) * 1_000_000 <= threshold_ppm * events[key] for (cause, key), ids in said.items()
    )
    return "reconciled" if good else "discrepant"


def check(made: Sequence[UsageEvent], faults: Sequence[Fault], seed: int, threshold_ppm: int = 1_000) -> None:
    with story(made, threshold_ppm=threshold_ppm) as platform:
        harmed = Harm(random.Random(seed), [storage_row(event) for event in made])
        for fault in faults:
            harmed.do(*fault)
        put(platform, harmed.rows)
        report = platform.reconcile(HOUR)
        assert found_in(report.to_bytes()) == harmed.said
        assert report.status == verdict(harmed.said, made, threshold_ppm)
        assert {cause: report.count(cause) for cause in CAUSES} == {
            cause: sum(len(ids) for (of, _), ids in harmed.said.items() if of == cause) for cause in CAUSES
        }
        outcome = platform.repair(HOUR)
        assert (outcome.after.status, outcome.after.findings) == ("reconciled", ())
        assert_whole(platform, made)
        assert platform.reconcile(HOUR).to_bytes() == outcome.after.to_bytes()
        assert HOUR not in wanting(platform)


faults = st.lists(st.tuples(st.sampled_from(FAULTS), st.sampled_from(OTHERS)), max_size=8)


@settings(max_examples=12)
@example(seed=1, n=40, faults=[(fault, "output_tokens") for fault in FAULTS], threshold_ppm=1_000)
@example(seed=2, n=40, faults=[("missing", "")] * 30, threshold_ppm=1_000_000)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 60),
    faults=faults,
    threshold_ppm=st.sampled_from((0, 1_000, 250_000, 1_000_000)),
)
def test_the_report_names_what_was_done_and_repair_undoes_it(
    seed: int, n: int, faults: list[Fault], threshold_ppm: int
) -> None:
    made = random_events(random.Random(seed), n)
    check(made, faults, seed, threshold_ppm)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_harm_alone(fault: str, rng: random.Random) -> None:
    column = rng.choice([name for name in OTHERS if name not in ("recorded_at", "schema_version")])
    made = [event(rng, n % 2, 0, 2) for n in range(20)]
    check(made, [(fault, column)], rng.randrange(2**32))


def test_any_column_that_is_altered_in_one_row_is_found(rng: random.Random) -> None:
    """Each column in a key of its own, beside rows that are sound."""
    places = [(n % 12, n // 12 % 5, n // 60 % 4) for n in range(len(OTHERS))]
    made = {column: [event(rng, *place) for _ in range(3)] for column, place in zip(OTHERS, places, strict=True)}
    with story([event for events in made.values() for event in events]) as platform:
        harm = Harm(rng, [storage_row(event) for events in made.values() for event in events])
        of_column = {column: str(events[0].event_id) for column, events in made.items()}
        by_id = {id_of(row): row for row in harm.rows}
        for column, event_id in of_column.items():
            by_id[event_id][column] = other_value(rng, column, by_id[event_id][column])
        put(platform, harm.rows)
        found = {i for ids in found_in(platform.reconcile(HOUR).to_bytes()).values() for i in ids}
        assert [column for column, event_id in of_column.items() if event_id not in found] == []
        assert found == set(of_column.values())


def test_missing_rows_at_the_threshold_reconcile_are_listed_and_come_back(rng: random.Random) -> None:
    """One of a thousand, whichever it is; a second one is too many."""
    made = [event(rng, 3) for _ in range(1_000)]
    check(made, [("missing", "")], rng.randrange(2**32))
    check(made, [("missing", "")] * 2, rng.randrange(2**32))


def test_harm_that_comes_back_after_a_repair_is_found_again(rng: random.Random) -> None:
    """A second repair is no retry of the first: its rows must not be taken for rows that stand already."""
    made = [event(rng, n % 3) for n in range(12)]
    with story(made) as platform:
        put(platform, [storage_row(event) for event in made[:6]])
        for _ in range(2):
            assert platform.repair(HOUR).after.status == "reconciled"
            with closing(open_raw(chdb_server.shared_dsn(), platform.settings.clickhouse_database)) as client:
                for table in ("usage_events", "usage_minute"):
                    client.command(f"TRUNCATE TABLE {table}")
            report = platform.reconcile(HOUR)
            assert (report.status, report.count("missing")) == ("discrepant", 12)
        assert platform.repair(HOUR).after.status == "reconciled"
        assert_whole(platform, made)
