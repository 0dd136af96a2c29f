"""Charges in Dagster: assets and their checks on real states, schedules and the sensor ticked on real instances."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster_duckdb import DuckDBResource

from assets import ASSETS
from assets.jobs import SEQUENCER
from definitions import defs
from render_platform.charges.charging import Charging
from render_platform.charges.commands import spending_of
from render_platform.charges.price_book import load_price_book, parse_price_book
from render_platform.charges.spend import Budgets
from render_platform.clock import DAY_US, HOUR_US, SystemClock, iso
from render_platform.database import log_entries
from render_platform.events import table_from_events
from resources.platform import PlatformResource
from sensors.charges import MAX_FAILURES, budgets, charges_daily, invoices_monthly
from tests.factories import START_US
from tests.platforms import record
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    Location,
    location,  # noqa: F401  fixtures
    sound_events,
)
from tests.test_dagster_runs import an_hour_passes

DAY = START_US - START_US % DAY_US
DAYS = ("2023-11-16", "2023-11-17", "2023-11-18")
TICK = datetime(2023, 12, 2, 3, 10, tzinfo=UTC)
BOOK = load_price_book(None)


@pytest.fixture
def charged(location: Location) -> Location:
    """Three closed days of events, published."""
    rng = random.Random(8)
    made = [event for day in range(3) for event in sound_events(rng, 12, START_US + day * DAY_US)]
    recorded = record(location.platform, LANE, made)
    location.platform.clickhouse.insert_events(table_from_events(recorded), "first")
    location.finish_lane(3 * 24)
    location.dagster.flush()
    return location


def charging(at: Location) -> Charging:
    return Charging(at.platform, BOOK)


def charge(at: Location, first: str, last: str) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def("charges").execute_in_process(
        instance=at.instance, tags=range_tags(first, last), raise_on_error=False
    )


def range_tags(first: str, last: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def of_asset(at: Location, name: str) -> dict[str, dg.AssetMaterialization]:
    """The newest of each partition."""
    return {str(one.partition): one for one in reversed(at.materializations(name))}


def table_of(value: dg.MetadataValue[Any]) -> list[dg.TableRecord]:
    assert isinstance(value, dg.TableMetadataValue)
    return list(value.records)


def test_what_is_declared() -> None:
    found = {a.key.to_user_string(): a for a in ASSETS if isinstance(a, dg.AssetsDefinition)}
    for name, partitions in (
        ("usage_charges", dg.DailyPartitionsDefinition),
        ("invoices", dg.MonthlyPartitionsDefinition),
    ):
        asset = found[name]
        assert isinstance(asset.partitions_def, partitions)
        assert asset.op.pool == SEQUENCER, "they append to the log"
        assert set(asset.owners_by_key[asset.key]) == {"team:finance"}
    blocking = {spec.name for asset in found.values() for spec in asset.check_specs if spec.blocking}
    assert {"sum_of_lines", "conserved"} <= blocking
    assert "unmeasured" not in blocking


def test_a_day_is_charged_with_tables_plot_and_proof(charged: Location) -> None:
    result = charged.run("charges", DAYS[0])
    assert result.success
    (one,) = charged.materializations("usage_charges")
    logged = charging(charged).month("2023-11").days[0]
    said = one.metadata
    assert said["record"].value == logged.digest
    assert said["log index"].value == logged.log_index
    assert said["events"].value == 12
    assert BOOK.digest in str(said["price book"].value)
    assert "](data:image/svg+xml" in str(said["the month"].value)
    amounts = [str(record.data["amount"]) for record in table_of(said["by SKU"])]
    assert sum(map(Decimal, amounts)) == logged.record.amount
    customers = [str(record.data["amount"]) for record in table_of(said["top customers"])]
    assert sum(map(Decimal, customers)) == logged.record.amount
    assert "checkpoint" in said
    assert {name: check.passed for name, check in checks(result).items()} == {
        "sum_of_lines": True,
        "conserved": True,
        "unmeasured": True,
    }


def test_a_range_is_one_run_and_small(charged: Location) -> None:
    result = charge(charged, "2023-11-14", DAYS[2])
    assert result.success, "days into which nothing was recorded are no failure of a range"
    found = of_asset(charged, "usage_charges")
    assert set(found) == set(DAYS)
    assert all("the month" not in one.metadata and "by SKU" not in one.metadata for one in found.values())
    assert len(charging(charged).month("2023-11").days) == 3
    again = charge(charged, DAYS[0], DAYS[2])
    assert again.success
    assert [one.metadata["changed"].value for one in of_asset(charged, "usage_charges").values()] == [False] * 3


def test_a_day_that_is_not_closed_is_refused_and_does_not_stop_the_others(charged: Location) -> None:
    with charged.platform.database.write() as connection:
        charged.platform.outbox.open_lane(connection, "trace/open", DAY + DAY_US + HOUR_US)
    result = charge(charged, DAYS[0], DAYS[1])
    assert not result.success
    assert set(of_asset(charged, "usage_charges")) == {DAYS[0]}


def test_an_invoice_follows_and_its_sums_are_checked(charged: Location) -> None:
    refused = charged.run("invoicing", "2023-11-01")
    assert not refused.success
    assert charged.materializations("invoices") == []
    assert charge(charged, DAYS[0], DAYS[2]).success
    result = charged.run("invoicing", "2023-11-01")
    assert result.success
    (one,) = charged.materializations("invoices")
    invoice = charging(charged).month("2023-11").invoices[0]
    assert one.metadata["record"].value == invoice.digest
    assert one.metadata["total"].value == f"{invoice.record.total} USD"
    lines = [Decimal(str(row.data["amount"])) for row in table_of(one.metadata["lines"])]
    assert sum(lines) == Decimal(invoice.record.total)
    assert checks(result)["sum_of_lines"].passed


def test_gpu_time_that_the_charges_lack_is_found(charged: Location) -> None:
    """The entry of a batch of the charged day says more than the record does."""
    with charged.platform.database.write() as connection:
        index, entry = connection.execute(
            sa.select(log_entries.c.log_index, log_entries.c.entry).where(log_entries.c.type == "usage_batch")
        ).first() or (0, b"")
    assert charged.run("charges", DAYS[0]).success
    said = json.loads(bytes(entry))
    harmed = bytes(entry).replace(
        f'"gpu_time_ns":{said["gpu_time_ns"]}'.encode(), f'"gpu_time_ns":{said["gpu_time_ns"] + 1}'.encode()
    )
    assert harmed != bytes(entry)
    with charged.platform.database.write() as connection:
        connection.execute(log_entries.update().where(log_entries.c.log_index == index).values(entry=harmed))
    result = charged.run("charges", DAYS[0])
    conserved = checks(result)["conserved"]
    assert (conserved.passed, conserved.blocking, conserved.severity) == (False, True, dg.AssetCheckSeverity.ERROR)
    assert "ns are charged" in str(conserved.description)


def test_what_is_not_measured_is_a_warning(charged: Location, tmp_path: Path) -> None:
    """Images of a text model: no event has a figure."""
    file = tmp_path / "prices.toml"
    rule = b'[[prices.rules]]\nsku = "picture"\nunit = "step"\nprice = "1"\n'
    file.write_bytes(BOOK.data.replace(b"version = 1", b"version = 9") + rule)
    charged.patch.setenv("RENDER_PLATFORM_PRICE_BOOK", str(file))
    result = charge(charged, DAYS[0], DAYS[2])
    unmeasured = checks(result)["unmeasured"]
    assert (unmeasured.passed, unmeasured.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "without step of" in str(unmeasured.description)


# Schedules.


def tick(schedule: Any, at: Location) -> list[dg.RunRequest]:
    found = evaluate(schedule, at)
    return [] if isinstance(found, dg.SkipReason) else found


def skipped(schedule: Any, at: Location) -> str:
    found = evaluate(schedule, at)
    assert isinstance(found, dg.SkipReason), found
    return str(found.skip_message)


def evaluate(schedule: Any, at: Location) -> Any:
    with dg.build_schedule_context(
        instance=at.instance, scheduled_execution_time=TICK, resources={"platform": at.resource}
    ) as context:
        return schedule(context)


def launch(at: Location, job: str, request: dg.RunRequest, *, failed: bool) -> None:
    tags = {name: str(value) for name, value in request.tags.items()}
    tags |= {"dagster/partition": request.partition_key} if request.partition_key else {}
    run = at.instance.create_run_for_job(defs.resolve_job_def(job), status=dg.DagsterRunStatus.STARTED, tags=tags)
    if failed:
        at.instance.report_run_failed(run)


def test_due_days_are_asked_for_as_ranges_and_then_no_more(charged: Location) -> None:
    (request,) = tick(charges_daily, charged)
    assert {name: request.tags[name] for name in range_tags("", "")} == range_tags(DAYS[0], DAYS[2])
    assert request.run_key == f"{TICK.isoformat()}/{DAYS[0]}"
    assert charge(charged, DAYS[0], DAYS[1]).success
    (request,) = tick(charges_daily, charged)
    assert request.partition_key == DAYS[2]
    assert charged.run("charges", DAYS[2]).success
    assert "every closed day is charged" in skipped(charges_daily, charged)


def test_days_of_a_run_are_left_to_it_and_failures_count(charged: Location) -> None:
    (request,) = tick(charges_daily, charged)
    launch(charged, "charges", request, failed=False)
    assert "3 due days are in runs already" in skipped(charges_daily, charged)
    for _ in range(6):
        an_hour_passes(charged)
    charged.instance.report_run_failed(charged.instance.get_runs()[0])
    for _ in range(MAX_FAILURES - 1):
        (request,) = tick(charges_daily, charged)
        launch(charged, "charges", request, failed=True)
    assert "failed 3 times" in skipped(charges_daily, charged)


def test_a_month_is_invoiced_once_it_is_charged_and_again_when_it_changed(charged: Location) -> None:
    assert "every finished month is invoiced" in skipped(invoices_monthly, charged)
    assert charged.run("charges", DAYS[0]).success
    assert "2023-11 has days to charge first" in skipped(invoices_monthly, charged)
    assert charge(charged, DAYS[1], DAYS[2]).success
    (request,) = tick(invoices_monthly, charged)
    assert request.partition_key == "2023-11-01"
    launch(charged, "invoicing", request, failed=True)
    assert len(tick(invoices_monthly, charged)) == 1, "a failed run is asked for again"
    assert charged.run("invoicing", "2023-11-01").success
    assert "every finished month is invoiced" in skipped(invoices_monthly, charged)


def test_schedules_skip_where_there_is_no_state(location: Location, tmp_path: Path) -> None:
    resource = PlatformResource(state_dir=str(tmp_path / "nothing"), duckdb=DuckDBResource(database=":memory:"))
    for schedule in (charges_daily, invoices_monthly):
        with dg.build_schedule_context(
            instance=location.instance, scheduled_execution_time=TICK, resources={"platform": resource}
        ) as context:
            found = schedule(context)
        assert isinstance(found, dg.SkipReason)
        assert "holds no platform state" in str(found.skip_message)


# Budgets.


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook on loopback, and what it was sent."""
    taken: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sense(at: Location) -> str:
    with dg.build_sensor_context(instance=at.instance, resources={"platform": at.resource}) as context:
        found = budgets(context)
    assert isinstance(found, dg.SkipReason)
    return str(found.skip_message)


def test_budgets_alert_at_80_and_100_percent_and_say_when_there_is_room(location: Location, tmp_path: Path) -> None:
    platform, now_us = location.platform, SystemClock().now_us()
    assert "nobody has a budget" in sense(location)
    dear = BOOK.data.replace(b'"0.0', b'"5')
    (tmp_path / "prices.toml").write_bytes(dear)
    location.patch.setenv("RENDER_PLATFORM_PRICE_BOOK", str(tmp_path / "prices.toml"))
    (event, *_) = made = record(platform, "live", sound_events(random.Random(3), 5, now_us - now_us % HOUR_US))
    platform.clickhouse.insert_events(table_from_events(made), "own")
    spent = spending_of(platform, parse_price_book(dear)).of(event.customer_ref, iso(now_us)[:7]).spent
    assert spent > 1
    limits = Budgets(platform.database, SystemClock())
    with receiver() as (url, taken):
        location.patch.setenv("RENDER_PLATFORM_ALERT_WEBHOOK", url)
        for amount, over in ((spent * 10, 0), (spent * 10 / 9, 1), (spent * 10 / 9, 1), (spent, 1), (spent * 2, 0)):
            limits.set(event.customer_ref, f"{amount:.2f}", "USD", enforce=False)
            assert f"{over} of 1 budgets" in sense(location)
        assert [one["severity"] for one in taken] == ["warning", "error", "resolved"], "each is told once"
        assert event.customer_ref in taken[0]["text"]
        assert "90.0 %" in taken[0]["text"]


def test_a_budget_in_another_currency_is_told_once_and_again_when_it_is_compared(location: Location) -> None:
    (event, *_) = record(location.platform, "live", sound_events(random.Random(3), 2))
    limits = Budgets(location.platform.database, SystemClock())
    with receiver() as (url, taken):
        location.patch.setenv("RENDER_PLATFORM_ALERT_WEBHOOK", url)
        for currency, said in (("EUR", "1 are in another currency"),) * 2 + (("USD", "0 of 1 budgets"),):
            limits.set(event.customer_ref, "1000000", currency, enforce=True)
            assert said in sense(location)
        assert [one["severity"] for one in taken] == ["warning", "resolved"]
        assert "the budget is in EUR, charges are in USD" in taken[0]["text"]


def test_spend_that_is_not_known_is_not_held_against_a_budget(location: Location) -> None:
    (event, *_) = record(location.platform, "live", sound_events(random.Random(3), 2))
    Budgets(location.platform.database, SystemClock()).set(event.customer_ref, "0", "USD", enforce=False)
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    assert "of 1 customers only what is charged is known" in sense(location)
