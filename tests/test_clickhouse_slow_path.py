"""The slow path through ClickHouse over a real bucket: records equal to DuckDB's, and what becomes of each fault."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from assets.daily import day_of_batches
from render_platform import batches
from render_platform.charges.charging import Charging
from render_platform.charges.price_book import load_price_book
from render_platform.clickhouse import ClickHouse
from render_platform.clickhouse_slow_path import Bucket, ClickHouseReader, open_reader
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND
from render_platform.config import load_settings
from render_platform.errors import DigestMismatch, Missing, Unavailable, UsageError
from render_platform.events import UsageEvent
from render_platform.operations.doctor import Diagnosis, Doctor
from render_platform.pipeline import Platform
from tests import chdb_server, factories
from tests.conformance import s3_server
from tests.gateway.servers import free_port
from tests.platforms import SeededIds
from tests.slow_paths import ENGINES, BucketObjects, Stored, bridge_client, bucket_bridge, bucket_options, connection
from tests.stories import HOUR, deliver, finish_lane, logged, open_story, record
from tests.test_charging import AFTER_MONTH, DAY, MONTH, SECOND
from tests.test_clickhouse import engine  # noqa: F401  fixture

RECORDS = ("reconciliation", "charges", "correction")
BOOK = load_price_book(None)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use_credentials(monkeypatch)


def open_with(slow_engine: str, state: Path, **options: Any) -> Platform:
    options = bucket_options(slow_path_engine=slow_engine, **options)
    return open_story(state, chdb_server.fresh_database(), now_us=AFTER_MONTH, **options)


def record_hour(platform: Platform, lane: str, made: Sequence[UsageEvent], hour_us: int) -> list[UsageEvent]:
    """Events of one hour in a lane that covers it alone, and is over: few watermarks, each an object in the bucket."""
    with platform.database.write() as connection:
        platform.outbox.open_lane(connection, lane, hour_us, hour_us + HOUR_US)
    recorded = record(platform, made, lane)
    finish_lane(platform, lane, hour_us + HOUR_US + 60 * US_PER_SECOND)
    platform.flush()
    return recorded


def tell(platform: Platform) -> dict[str, Any]:
    """Two days, of which ClickHouse was told wrongly. Gives all that was said of them, and all that was logged."""
    made = record_hour(platform, "a", factories.make_events(120, 1), HOUR)
    later = record_hour(platform, "b", factories.make_events(40, 2, SECOND + 3 * HOUR_US), SECOND + 3 * HOUR_US)
    altered = replace(made[3], gpu_time_ns=made[3].gpu_time_ns // 2)
    deliver(platform, [*made[4:], altered, *factories.make_events(1, 99)])
    deliver(platform, made[5:6], "again")
    deliver(platform, later)
    found: dict[str, Any] = {"first": platform.reconcile(HOUR), "second": platform.reconcile(SECOND + 3 * HOUR_US)}
    charging = Charging(platform, BOOK)
    found["days"] = [charging.charge(DAY).record.to_bytes(), charging.charge(SECOND).record.to_bytes()]
    record_hour(platform, "late", factories.make_events(7, 5), HOUR)
    found["correction"] = charging.charge(DAY).record.to_bytes()
    found["repaired"] = platform.repair(HOUR).after
    found["invoice"] = charging.invoice(MONTH).record.to_bytes()
    found["daily"] = sums_of_day(platform)
    entries = [entry for kind in RECORDS for entry in logged(platform, kind)]
    found["logged"] = [(one.batch_id, one.subject_digest, platform.cas.get(str(one.subject_digest))) for one in entries]
    return found


def sums_of_day(platform: Platform) -> Any:
    by_model, by_customer = day_of_batches(platform, connection(), DAY, DAY + DAY_US)
    return by_model, sorted(by_customer)


def test_reports_charges_and_invoices_are_equal_byte_for_byte(tmp_path: Path) -> None:
    told = {}
    for one in ENGINES:
        with closing(open_with(one, tmp_path / one)) as platform:
            told[one] = tell(platform)
            outcome = platform.verify(deep=True)
            assert not outcome.problems
    assert told["duckdb"] == told["clickhouse"]
    first = told["clickhouse"]["first"]
    assert {cause: first.count(cause) for cause in ("missing", "duplicated", "altered", "unexpected")} == {
        "missing": 3,
        "duplicated": 1,
        "altered": 1,
        "unexpected": 1,
    }
    assert told["clickhouse"]["repaired"].status == "reconciled"
    assert len(told["clickhouse"]["logged"]) >= 7


def written(platform: Platform) -> tuple[Any, ...]:
    return platform.log.published(), len(list(platform.cas.digests()))


def alter(platform: Platform, path: str, data: bytes | None) -> None:
    bucket, _, prefix = platform.settings.objects_url.removeprefix("s3://").partition("/")
    assert bucket == "plain"
    objects = BucketObjects(platform.blobs, f"{prefix}/blobs/")
    if data is None:
        objects.remove(path)
    else:
        objects.put(path, data)


def flip(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


FAULTS: dict[str, tuple[Callable[[bytes], bytes | None], type[Exception], str]] = {
    "missing": (lambda _data: None, Missing, "restore the object from a copy"),
    "empty": (lambda _data: b"", DigestMismatch, "restore the object from a copy"),
    "another bit": (flip, DigestMismatch, "restore the object from a copy"),
    "another batch": (
        lambda _data: batches.encode(factories.make_table(120, 77)),
        DigestMismatch,
        "restore the object from a copy",
    ),
}


@pytest.fixture(scope="module")
def closed_day(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        s3_server.use_credentials(patch)
        with closing(open_with("clickhouse", tmp_path_factory.mktemp("closed") / "state")) as platform:
            deliver(platform, record_hour(platform, "a", factories.make_events(120, 1), HOUR))
            yield platform


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_that_is_not_what_the_log_names_stops_both(closed_day: Platform, fault: str) -> None:
    make, error, remedy = FAULTS[fault]
    [entry] = closed_day.slow.hour(HOUR)
    path = f"sha256/{str(entry.subject_digest)[:2]}/{str(entry.subject_digest)[2:]}"
    whole = closed_day.blobs.read(path)
    alter(closed_day, path, make(whole))
    try:
        before = written(closed_day)
        report = closed_day.reconcile(HOUR)
        assert report.status == "unavailable"
        assert path in report.error
        assert remedy in report.error
        with pytest.raises(error, match=path):
            Charging(closed_day, BOOK).charge(DAY)
        assert written(closed_day) == before
    finally:
        alter(closed_day, path, whole)


def test_a_wrong_secret_writes_nothing_and_is_told_without_it(
    closed_day: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(closed_day)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a wrong secret")
    report = closed_day.reconcile(HOUR)
    assert report.status == "unavailable"
    assert "answers 403" in report.error
    assert "docs/configuration.md" in report.error
    with pytest.raises(Unavailable, match="answers 403") as error:
        Charging(closed_day, BOOK).charge(DAY)
    said = "".join(traceback.format_exception(error.value)) + report.error
    assert "a wrong secret" not in said
    assert s3_server.KEY not in said
    assert written(closed_day) == before
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.SECRET)
    assert closed_day.reconcile(HOUR).status == "reconciled"
    assert Charging(closed_day, BOOK).charge(DAY).record.events == 120


def test_doctor_has_clickhouse_read_a_batch(closed_day: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Diagnosis:
        doctor = Doctor(closed_day.settings, closed_day.clock, SeededIds("doctor"))
        return next(one for one in doctor.examine() if one.part == "slow path")

    assert (look().status, look().says.endswith("the 120 events of the newest batch")) == ("good", True)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a wrong secret")
    ill = look()
    assert ill.status == "unavailable"
    assert ill.remedy


class Watched:
    """A ClickHouse whose statements are kept; `before` and `after` the one of that number something is done."""

    def __init__(
        self, number: int = 0, before: Callable[[], object] = list, after: Callable[[], object] = list
    ) -> None:
        self.statements: list[str] = []
        self._number, self._before, self._after = number, before, after

    def read(self, sql: str, settings: Mapping[str, Any]) -> pa.Table:
        self.statements.append(sql)
        at = len(self.statements) == self._number
        if at:
            self._before()
        try:
            return bridge_client().read(sql, settings)
        finally:
            if at:
                self._after()


def reader_of(stored: Stored, watched: Any, **changes: Any) -> ClickHouseReader:
    bucket: Bucket = vars(stored.reader)["_bucket"]
    return ClickHouseReader(stored.cas, lambda: watched, bucket._replace(**changes))


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize(("restored", "error"), [(False, DigestMismatch), (True, Unavailable)])
def test_what_is_swapped_after_it_was_hashed_is_never_read(number: int, restored: bool, error: type[Exception]) -> None:
    """Footers, rows, ids: each statement reads only the writing that was hashed, even if all is well again after."""
    bucket_bridge()
    table = factories.make_table(30, 1)
    other = factories.replace_column(table, "gpu_time_ns", [1] * 30)
    stored = Stored(table, engine="clickhouse")
    whole = stored.objects.read(stored.path(0))
    watched = Watched(
        number,
        lambda: stored.overwrite(0, batches.encode(other)),
        lambda: stored.overwrite(0, whole) if restored else None,
    )
    with pytest.raises(error):
        reader_of(stored, watched).window_sums(stored.entries, connection())
    assert len(watched.statements) == number


def test_no_secret_is_in_a_statement_nor_in_the_engines_folder() -> None:
    bucket_bridge()
    stored = Stored(factories.make_table(30, 1), factories.make_table(20, 2), engine="clickhouse")
    watched = Watched()
    reader_of(stored, watched).window_sums(stored.entries, connection())
    assert len(watched.statements) == 4
    assert not [one for one in watched.statements if s3_server.SECRET in one or s3_server.KEY in one]
    for path in bucket_bridge().folder.parent.rglob("*"):
        assert not path.is_file() or s3_server.SECRET.encode() not in path.read_bytes(), path


def open_local() -> ClickHouse:
    return chdb_server.open_fresh()


def test_a_named_collection_gives_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket_bridge()
    stored = Stored(factories.make_table(30, 1), engine="clickhouse")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a wrong secret")  # what the engine in this process has by itself
    with closing(open_local()) as local, closing(chdb_server.open_raw(chdb_server.shared_dsn())) as client:
        for name, secret in (("evidence", s3_server.SECRET), ("stale", "a stale secret")):
            client.command(
                f"CREATE NAMED COLLECTION {name} AS access_key_id = '{s3_server.KEY}', secret_access_key = '{secret}'"
            )
        with pytest.raises(Unavailable, match="answers 403"):
            reader_of(stored, local).window_sums(stored.entries, connection())
        with pytest.raises(Unavailable, match="answers 403") as error:
            reader_of(stored, local, collection="stale").window_sums(stored.entries, connection())
        assert "stale secret" not in "".join(traceback.format_exception(error.value))
        sums, _ = reader_of(stored, local, collection="evidence").window_sums(stored.entries, connection())
        assert sum(sums[0].column("events").to_pylist()) == 30
        with pytest.raises(Unavailable, match="no named collection absent") as error:
            reader_of(stored, local, collection="absent").window_sums(stored.entries, connection())
        assert "slow_path_collection" in error.value.remedy


def test_a_cluster_is_asked_by_its_name() -> None:
    bucket_bridge()
    stored = Stored(factories.make_table(30, 1), engine="clickhouse")
    watched = Watched()
    with pytest.raises(Unavailable, match="no cluster of_ten") as error:
        reader_of(stored, watched, cluster="of_ten").window_sums(stored.entries, connection())
    assert "slow_path_cluster" in error.value.remedy
    assert "FROM s3Cluster('of_ten', 'http" in watched.statements[0]


def test_a_store_that_is_down_for_clickhouse_is_said_so() -> None:
    bucket_bridge()
    stored = Stored(factories.make_table(30, 1), engine="clickhouse")
    down = reader_of(stored, bridge_client(), url=f"http://127.0.0.1:{free_port()}/plain/x/blobs/")
    with pytest.raises(Unavailable, match="does not answer"):
        down.window_sums(stored.entries, connection())


def test_more_batches_than_one_statement_names_are_refused() -> None:
    bucket_bridge()
    stored = Stored(factories.make_table(30, 1), engine="clickhouse")
    with pytest.raises(Unavailable, match="at most 4000 batches") as error:
        stored.reader.window_sums(stored.entries * 4_001, connection())
    assert "duckdb" in error.value.remedy


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ({}, "slow_path_engine is clickhouse", "objects_url"),
        ({"objects_url": "s3://b/x", "objects_endpoint": "http://k:secret@h:1"}, "objects_endpoint", "AWS_"),
        ({"objects_url": "s3://b/x", "slow_path_cluster": "a'b"}, "slow_path_cluster", "name"),
        ({"objects_url": "s3://b/x", "slow_path_collection": "a, NOSIGN"}, "slow_path_collection", "name"),
    ],
)
def test_what_cannot_be_read_so_is_refused_at_once(options: dict[str, Any], named: str, remedy: str) -> None:
    settings = load_settings({}, slow_path_engine="clickhouse", **options)
    with pytest.raises(UsageError, match=named) as error:
        open_reader(settings, Stored().cas, bridge_client)
    assert remedy in error.value.remedy
    assert "secret" not in str(error.value)
