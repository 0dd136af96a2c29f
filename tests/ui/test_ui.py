"""What a person does in the first hour, in a real browser: in Dagster's UI, and on the gateway's page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from definitions import defs
from tests.commands import run_command
from tests.ui import dagster_pages as dagster
from tests.ui.conftest import Keep
from tests.ui.program import DAY, HOURS, Program

pytestmark = [
    pytest.mark.skipif(os.environ.get("RENDER_TEST_UI") != "yes", reason="THE UI IS NOT TESTED: `make test-ui` does"),
    pytest.mark.timeout(600),
]
HOUR = f"{DAY}-{HOURS[0]}"
GROUPS = {"serving", "billing", "storage", "compliance", "fast_path", "operations"}
PLOTS = ("GPU seconds by model", "deltas", "latency", "utilisation")
STAGES = ("accepted", "queued", "running", "finished", "fast_path", "sealed", "stored", "logged", "published")
VERIFIED = "Verified in this browser, with the log's key"
PUBLISHED_MS = 180_000
"""The slow path lands within a minute; this machine may be busy with other things."""


def status(program: Program) -> dict[str, int]:
    figures: dict[str, int] = run_command("status", "--state", program.state, "--json").json
    return figures


def test_materialize_a_flush(page: Page, program: Program, keep: Keep) -> None:
    recorded = status(program)["events"]
    page.goto(f"{program.dagster}/locations/render_platform/jobs/flush")
    page.get_by_role("button", name=re.compile("Materialize all")).click()
    dagster.follow(page)
    dagster.wait_success(page)
    expect(page.get_by_text("Materialized value audit_log.")).to_be_visible()
    keep(page, "flush-run")
    assert status(program)["published"] >= recorded > 0


def test_the_doctor_finds_everything_well(program: Program) -> None:
    parts = {"DAGSTER": program.dagster, "GATEWAY": program.gateway}
    env = {f"RENDER_PLATFORM_{name}_PORT": url.rpartition(":")[2] for name, url in parts.items()}
    found = run_command("doctor", "--state", program.state, "--json", env=env).json
    assert {one["part"]: one["says"] for one in found if one["status"] != "good" and one["part"] != "disk"} == {}
    assert len(found) == 10


def test_an_hours_verdict_has_its_table_and_its_plot(page: Page, program: Program, keep: Keep) -> None:
    dagster.open_asset(page, program, "reconciliation")
    dagster.launch(page, dagster.choose_partitions(page, HOUR, 1))
    dagster.wait_success(page)
    dagster.open_asset(page, program, "reconciliation", "partitions", partition=HOUR)
    expect(dagster.metadata(page, "status")).to_contain_text("reconciled")
    windows = dagster.metadata(page, "windows").get_by_role("table").get_by_role("row")
    expect(windows).to_have_count(1 + 12)
    expect(windows.nth(0)).to_contain_text("fast events")
    expect(windows.nth(12)).to_contain_text("09:55")
    dagster.metadata(page, "windows").evaluate("row => row.scrollIntoView()")
    keep(page, "reconciliation")
    dagster.show_picture(page, dagster.metadata(page, "events by window"))
    keep(page, "reconciliation-plot")


def test_a_days_report_has_its_plots(page: Page, program: Program, keep: Keep) -> None:
    dagster.open_asset(page, program, "daily_report")
    dagster.launch(page, dagster.choose_partitions(page, DAY, 1))
    dagster.wait_success(page)
    dagster.open_asset(page, program, "daily_report", "partitions", partition=DAY)
    expect(dagster.metadata(page, "events in ClickHouse")).to_contain_text("1200")
    for name in PLOTS:
        dialog = dagster.show_picture(page, dagster.metadata(page, name))
        if name == PLOTS[0]:
            keep(page, "daily-report-plot")
        dialog.get_by_role("button", name="Close").click()
        expect(dialog).to_have_count(0)


def test_a_backfill_of_a_day(page: Page, program: Program, keep: Keep) -> None:
    day = f"[{DAY}-00:00...{DAY}-23:00]"
    dagster.open_asset(page, program, "reconciliation")
    dialog = dagster.choose_partitions(page, day, 24)
    keep(page, "backfill-dialog")
    dagster.launch(page, dialog)
    expect(page.get_by_text("100% completed")).to_be_visible(timeout=dagster.RUN_MS)
    keep(page, "backfill")
    dagster.open_asset(page, program, "reconciliation", "partitions")
    chosen = page.get_by_role("textbox").first
    chosen.fill(day)
    chosen.press("Enter")
    expect(page.get_by_text("24 Partitions Selected")).to_be_visible()
    expect(page.get_by_text("Materialized (24)")).to_be_visible()
    expect(page.get_by_text("Failed (0)")).to_be_visible()


def test_a_job_is_followed_to_its_verified_receipt(page: Page, program: Program, keep: Keep, tmp_path: Path) -> None:
    hosts, errors = set[str | None](), list[str]()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.set_viewport_size({"width": 1100, "height": 960})
    page.goto(program.gateway)
    for name in ("count-accepted", "count-finished", "count-sealed", "count-published", "fast-written"):
        expect(page.get_by_test_id(name)).to_have_attribute("data-value", re.compile(r"^[1-9]\d*$"))
    expect(page.get_by_test_id("verdict-last-hour")).to_contain_text("reconciled")
    expect(page.get_by_test_id("link-dagster-reconciliation")).to_have_attribute(
        "href", f"{program.dagster}/assets/reconciliation"
    )
    job = page.get_by_test_id("last-job")
    expect(job).to_have_text(re.compile(r"^[0-9a-f-]{36}$"))
    keep(page, "page-job-begins")
    followed = job.inner_text()
    for stage in STAGES:
        state = page.get_by_test_id(f"stage-{stage}").get_by_test_id("stage-state")
        expect(state).to_have_text("done", timeout=PUBLISHED_MS)
    verify, verdict = page.get_by_test_id("receipt-verify"), page.get_by_test_id("receipt-verdict")
    verify.click()
    expect(verdict).to_contain_text(VERIFIED)
    expect(job).to_have_text(followed)
    page.get_by_role("heading", name=re.compile("^One job")).evaluate("heading => heading.scrollIntoView()")
    keep(page, "page-receipt")

    href = page.get_by_test_id("receipt-link").get_attribute("href")
    receipt = tmp_path / "receipt.txt"
    receipt.write_bytes(page.request.get(f"{program.gateway}{href}").body())
    key = run_command("vkey", "--state", program.state).stdout.strip()
    outcome = run_command("verify-receipt", receipt, "--key", key)
    assert (outcome.code, followed in outcome.stdout) == (0, True), outcome.said

    another = run_command("vkey", "--gateway", "--state", program.state).stdout.strip()
    page.get_by_test_id("log-key").fill(another)
    verify.click()
    expect(verdict).to_contain_text(re.compile("Not proven|the signature is not"))
    assert (hosts, errors) == ({"127.0.0.1"}, []), "the page asks nobody else, and breaks none of its own rules"


def test_lineage_shows_every_group_and_every_asset(page: Page, program: Program, keep: Keep) -> None:
    specs = defs.resolve_all_asset_specs()
    assert {spec.group_name for spec in specs} == GROUPS
    page.goto(f"{program.dagster}/asset-groups")
    graph = page.locator("svg foreignObject")
    for group in GROUPS:
        expect(graph.get_by_text(group, exact=True).first).to_be_visible()
    page.keyboard.press("Alt+e")
    for spec in specs:
        expect(graph.get_by_text(spec.key.to_user_string(), exact=True).first).to_be_visible()
    page.wait_for_load_state("networkidle")  # what is shown of each asset comes after its name
    keep(page, "lineage")
