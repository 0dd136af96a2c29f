"""What people read in the UI: columns, links, tables and plots, on real states, beside sums made by hand."""

from __future__ import annotations

import base64
import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dagster as dg
import pytest

from assets import plots, views
from assets.jobs import day_of_key, hour_key
from render_platform.clock import DAY_US, HOUR_US, WINDOW_US, ManualClock
from render_platform.config import load_settings
from render_platform.events import UsageEvent, table_from_events
from tests.factories import START_US
from tests.platforms import record
from tests.stories import logged
from tests.test_dagster_layer import LANE, NOWHERE, Location, open_location, sound_events, specs, table_of

DAY = hour_key(START_US)[:10]
LONG = "m" * 200
IMAGE = re.compile(r"!\[([^\]]+)\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)")
MAX_BYTES = 60 * 1024
SVG = "{http://www.w3.org/2000/svg}"


# Plots.


def shown(value: Any) -> tuple[str, ElementTree.Element, bytes]:
    """The title, the parsed SVG, and its bytes."""
    text = value.value if isinstance(value, dg.MarkdownMetadataValue) else value
    match = IMAGE.fullmatch(str(text))
    assert match, str(text)[:80]
    assert len(str(text)) < MAX_BYTES
    data = base64.b64decode(match[2], validate=True)
    return match[1], ElementTree.fromstring(data), data


def words(svg: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in svg.iter(f"{SVG}text")]


def inks(element: ElementTree.Element, inherited: str = "black") -> set[str]:
    """The colours of all text, its own or those of what it stands in."""
    found = re.search(r"fill: (#[0-9a-f]{6})", element.get("style", ""))
    ink = found[1] if found else inherited
    return ({ink} if element.tag == f"{SVG}text" else set()).union(*(inks(child, ink) for child in element))


def worst(rng: random.Random) -> dict[str, Any]:
    """The most that each plot can be given, drawn."""
    names = [f"{number}{LONG}" for number in range(50)]
    of_hours = {(name, hour): rng.randrange(10**13) for name in names for hour in range(24)}
    windows = [
        (at * WINDOW_US, rng.randrange(-(10**6), 10**6), rng.randrange(-(10**15), 10**15)) for at in range(0, 288, 2)
    ]
    return {
        "GPU seconds by model": plots.gpu_seconds_by_model(of_hours),
        "Utilisation by device": plots.utilisation(of_hours),
        "Slow path minus fast path by five minutes": plots.deltas(windows),
        "Latency by model": plots.latency([(name, 0, 10**9, 10**12) for name in names]),
        "Events by window": plots.windows([(f"18:{at * 5:02d}", rng.randrange(10**9), 7) for at in range(12)]),
    }


def test_each_plot_is_small_titled_and_readable_on_light_and_dark(rng: random.Random) -> None:
    for title, figure in worst(rng).items():
        found, svg, data = shown(plots.svg(figure))
        assert found == title
        assert words(svg), "text is text"
        assert inks(svg) == {plots.INK}
        assert b"#ffffff" not in data, "the page's own ground shines through"
        assert LONG not in data.decode(), "a name that is wider than the plot is cut"


def test_the_ink_has_contrast_on_white_and_on_the_dark_ground() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ink = luminance(plots.INK)
    assert (1 + 0.05) / (ink + 0.05) > 4
    assert (ink + 0.05) / (luminance("#0f1318") + 0.05) > 4


def test_nothing_to_draw_is_drawn_as_nothing() -> None:
    for figure in (plots.gpu_seconds_by_model({}), plots.utilisation({}), plots.deltas([]), plots.latency([])):
        shown(plots.svg(figure))


def test_the_same_figures_give_the_same_bytes() -> None:
    one, two = (plots.svg(plots.gpu_seconds_by_model({("flux", 3): 10**12})) for _ in range(2))
    assert one.value == two.value


def test_a_window_without_a_report_is_a_gap() -> None:
    drawn = plots.with_gaps([(0, 1, 10), (WINDOW_US, 2, 20), (3 * WINDOW_US, 3, 30)])
    assert [at for at, events, _ in drawn if events != events] == [2 * WINDOW_US]
    assert [events for _, events, _ in drawn if events == events] == [1, 2, 2, 3, 3]
    assert len(drawn) == 6


# Columns, links, and figures.


def columns(schema: Any) -> list[str]:
    found = schema if isinstance(schema, dg.TableSchema) else schema.value
    return [column.name for column in found.columns]


def test_each_asset_says_what_a_row_is_and_which_columns_it_has() -> None:
    for name, spec in specs().items():
        assert "row is" in (spec.description or ""), name
        assert columns(spec.metadata["dagster/column_schema"]), name


def test_seconds_are_exact_below_zero_too() -> None:
    assert views.gpu_seconds(-5) == "-0.000000005"
    assert views.gpu_seconds(-1_500_000_000) == "-1.5"
    assert views.gpu_seconds(1_234_000_000_000) == "1,234"


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("127.0.0.1", 8080, "[x](http://127.0.0.1:8080/a)"),
        ("0.0.0.0", 9, "[x](http://127.0.0.1:9/a)"),
        ("::", 9, "[x](http://127.0.0.1:9/a)"),
        ("2001:db8::1", 9, "[x](http://[2001:db8::1]:9/a)"),
        ("127.0.0.1", 0, "x"),
    ],
)
def test_links_lead_to_the_gateway_where_its_port_is_known(host: str, port: int, expected: str) -> None:
    settings = load_settings(environ={}, gateway_host=host, gateway_port=port)
    assert views.link(settings, "a", "x") == expected


def test_objects_are_bounded_and_named_where_they_are() -> None:
    settings = load_settings(environ={}, objects_url="s3://bucket/prefix")
    text = str(views.objects(settings, [(f"b{n}", f"{n:064x}", 1_000_000) for n in range(25)]).value)
    assert text.count("\n") == 20
    assert text.endswith("and 5 more")
    assert f"1,000,000 bytes, `s3://bucket/prefix/blobs/sha256/00/{'0' * 62}`" in text


def test_the_ten_who_used_most_are_told_by_reference() -> None:
    used = [(f"{customer:064x}", 1, customer * 10**9) for customer in range(12)] * 2
    rows = [dict(one.data) for one in views.customers(used).records]
    assert [row["GPU seconds"] for row in rows] == [str(2 * customer) for customer in range(11, 1, -1)]
    assert {row["events"] for row in rows} == {2}
    assert {len(str(row["customer"])) for row in rows} == {12}


def test_stages_take_the_time_of_the_platform_s_clock() -> None:
    clock = ManualClock(START_US)
    stages = views.Stages(clock)
    clock.move_to(START_US + 1_500_000)
    stages.ended("seal")
    clock.move_to(START_US + 1_502_000)
    stages.ended("store")
    assert stages.metadata == {"seal ms": 1_500, "store ms": 2}


# On materializations.


def metadata_of(location: Location, name: str) -> dict[str, Any]:
    return {key: value.value for key, value in location.materializations(name)[0].metadata.items()}


@pytest.fixture(scope="module")
def flushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Location, list[UsageEvent]]]:
    """Two closed hours of one day, one event lost to the fast path in the second; reconciled in one run."""
    rng = random.Random(7)
    with open_location(tmp_path_factory.mktemp("views") / "state") as location:
        made = [*sound_events(rng, 10), *sound_events(rng, 20, START_US + HOUR_US)]
        recorded = record(location.platform, LANE, made)
        location.platform.clickhouse.insert_events(table_from_events(recorded[:-1]), "first")
        location.finish_lane(2)
        location.dagster.flush()
        location.dagster.reconcile([START_US, START_US + HOUR_US])
        yield location, recorded


Flushed = tuple[Location, list[UsageEvent]]


def test_a_flush_leads_to_its_objects(flushed: Flushed) -> None:
    location, recorded = flushed
    found = metadata_of(location, "cas_batches")
    assert found["dagster/row_count"] == len(recorded)
    link = r"\[([0-9a-f]{64})\]\(http://127\.0\.0\.1:8080/v1/objects/([0-9a-f]{64})\).*`(.+)`"
    links = re.findall(link, found["objects"])
    assert len(links) == 2
    for digest, linked, place in links:
        assert digest == linked
        assert Path(place).is_file()
    assert found["bytes"] == sum(Path(place).stat().st_size for *_, place in links)
    assert {"store ms", "read back ms"} <= set(found)
    assert "seal ms" in metadata_of(location, "sealed_batches")
    assert metadata_of(location, "audit_log")["dagster/row_count"] == 4, "two batches and two watermarks"


def test_the_columns_are_those_of_what_is_there(flushed: Flushed) -> None:
    location, _ = flushed
    (entry, *_) = logged(location.platform, "usage_batch")
    assert columns(specs()["audit_log"].metadata["dagster/column_schema"]) == [
        field.name for field in dataclasses.fields(entry)
    ]
    (window, *_) = location.platform.reconcile(START_US).windows
    of_window = columns(specs()["reconciliation"].metadata["dagster/column_schema"])
    assert of_window == [field.name for field in dataclasses.fields(window)]
    nullable = {c.name: c.constraints.nullable for c in views.entry_columns().columns}
    assert (nullable["records"], nullable["merkle_root"]) == (False, True)


def test_an_hour_that_is_over_has_its_customers_objects_and_plot_and_a_range_has_none(flushed: Flushed) -> None:
    location, recorded = flushed
    ranged = [set(one.metadata) for one in location.materializations("reconciliation")]
    assert all({"reconcile ms", "status"} <= names for names in ranged)
    assert not any({"windows", "top customers", "objects", "events by window"} & names for names in ranged)

    assert location.run("reconcile", partition=hour_key(START_US)).success
    materialized = location.materializations("reconciliation")[0]
    expected: Counter[str] = Counter()
    for event in recorded[:10]:
        expected[event.customer_ref[:12]] += event.gpu_time_ns
    top = table_of(materialized, "top customers")
    assert {row["customer"]: Decimal(row["GPU seconds"]) * 10**9 for row in top} == dict(expected)
    _, svg, _ = shown(materialized.metadata["events by window"])
    assert {"18:00", "18:55", "slow path", "fast path"} <= set(words(svg))
    last = location.platform.hours.last_report(START_US)
    assert last is not None
    assert last.digest in str(materialized.metadata["objects"].value)


def test_a_verified_day_has_its_customers_and_models_from_the_batches(flushed: Flushed) -> None:
    location, recorded = flushed
    result = location.run("verify", partition=DAY)
    assert result.success
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed, check.blocking) == ("billed_once", True, True)
    materialized = location.materializations("audit_verification")[0]
    assert materialized.partition == DAY
    assert materialized.metadata["dagster/partition_row_count"].value == len(recorded)
    top = table_of(materialized, "top customers")
    assert sum(row["events"] for row in top) == len(recorded)
    assert sum(Decimal(row["GPU seconds"]) for row in top) * 10**9 == sum(event.gpu_time_ns for event in recorded)
    _, svg, _ = shown(materialized.metadata["GPU seconds by model"])
    assert {event.model_name for event in recorded} <= set(words(svg))


# The report of a day.


def run_days(location: Location, first: str, last: str) -> dg.ExecuteInProcessResult:
    from definitions import defs

    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    return defs.resolve_job_def("daily").execute_in_process(instance=location.instance, tags=tags, raise_on_error=False)


def test_a_day_s_report_says_what_its_hours_and_clickhouse_say(flushed: Flushed) -> None:
    location, recorded = flushed
    result = location.run("daily", partition=DAY)
    assert result.success
    assert {one.check_name for one in result.get_asset_check_evaluations()} == {"billed_once", "duplicates"}
    materialized = location.materializations("daily_report")[0]
    lost = recorded[-1]
    assert {name: materialized.metadata[name].value for name in FIGURES} == {
        "dagster/partition_row_count": 24,
        "hours reported": 2,
        "hours reconciled": 1,
        "events reported": 30,
        "events missing from the fast path": 1,
        "GPU seconds missing from the fast path": views.gpu_seconds(lost.gpu_time_ns),
        "events in ClickHouse": 29,
        "GPU seconds in ClickHouse": views.gpu_seconds(sum(event.gpu_time_ns for event in recorded[:-1])),
    }
    hours = {row["hour"]: row for row in table_of(materialized, "hours")}
    assert (hours["18:00"]["status"], hours["19:00"]["status"]) == ("reconciled", "discrepant")
    assert (hours["19:00"]["events"], hours["19:00"]["events missing"]) == (20, 1)
    assert hours["20:00"] == {**dict.fromkeys(hours["20:00"]), "hour": "20:00", "status": "not reported"}
    for name in ("GPU seconds by model", "deltas", "latency", "utilisation"):
        shown(materialized.metadata[name])
    assert "GPU-0" in words(shown(materialized.metadata["utilisation"])[1])


FIGURES = (
    "dagster/partition_row_count",
    "hours reported",
    "hours reconciled",
    "events reported",
    "events missing from the fast path",
    "GPU seconds missing from the fast path",
    "events in ClickHouse",
    "GPU seconds in ClickHouse",
)


def test_a_range_of_days_has_figures_of_each_and_no_plot(flushed: Flushed) -> None:
    location, recorded = flushed
    result = run_days(location, "2023-11-15", "2023-11-16")
    assert result.success
    for name, rows in (("daily_report", "events reported"), ("audit_verification", "events re-read")):
        found = {one.partition: one.metadata for one in location.materializations(name, result.run_id)}
        assert {partition: metadata[rows].value for partition, metadata in found.items()} == {
            "2023-11-15": 0,
            "2023-11-16": len(recorded),
        }
        for metadata in found.values():
            assert not [value for value in metadata.values() if "svg" in str(value.value)]
            assert "top customers" not in metadata


def test_a_day_that_cannot_be_read_is_not_materialized(flushed: Flushed) -> None:
    location, _ = flushed
    before = len(location.materializations("daily_report"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
        result = location.run("daily", partition=DAY)
    assert not result.success
    assert len(location.materializations("daily_report")) == before
    (failed,) = [one for one in result.all_events if one.is_step_failure and one.step_key == "daily_report"]
    said = failed.step_failure_data.user_failure_data
    assert said is not None
    assert "1 of 1 days could not be read: 2023-11-16" in (said.description or "")
    duplicates = {one.check_name: one for one in result.get_asset_check_evaluations()}["duplicates"]
    assert not duplicates.passed
    assert "unknown" in (duplicates.description or "")


def test_a_day_that_clickhouse_no_longer_keeps_is_refused(flushed: Flushed) -> None:
    location, _ = flushed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RENDER_PLATFORM_RETENTION_DAYS", "90")
        result = location.run("daily", partition=DAY)
    (failed,) = [one for one in result.all_events if one.is_step_failure and one.step_key == "daily_report"]
    assert failed.step_failure_data.user_failure_data is not None
    assert "no longer keeps" in (failed.step_failure_data.user_failure_data.description or "")


def test_a_day_is_a_day() -> None:
    start, end = day_of_key(DAY)
    assert (start <= START_US < end, end - start) == (True, DAY_US)
