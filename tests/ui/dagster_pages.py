"""What a person does in Dagster's UI, by what he reads there."""

from __future__ import annotations

import re
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, expect

from tests.ui.program import Program

RUN_MS = 180_000
"""A run waits in the queue behind the flushes of the sample load."""


def open_asset(page: Page, program: Program, asset: str, view: str = "overview", **more: str) -> None:
    page.goto(f"{program.dagster}/assets/{asset}?{urlencode({'view': view, **more})}")
    expect(page.get_by_role("tab", name="Overview", exact=True)).to_be_visible()


def choose_partitions(page: Page, keys: str, count: int) -> Locator:
    """Open the dialog of an asset's page and choose a key, or `[first...last]`; the dialog, ready to launch."""
    page.get_by_role("button", name=re.compile("Materialize…")).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Show all partitions").click()  # it begins with the last 90 days
    chosen = dialog.get_by_role("textbox").first
    chosen.fill(keys)
    chosen.press("Enter")
    expect(dialog.get_by_text(f"{count} partition{'s' * (count > 1)}", exact=True)).to_be_visible()
    return dialog


def launch(page: Page, dialog: Locator) -> None:
    """Launch, and go where the message leads: to the run, or to the backfill."""
    dialog.get_by_role("button", name=re.compile(r"^Launch")).click()
    follow(page)


def follow(page: Page) -> None:
    page.get_by_role("link", name="View", exact=True).or_(page.get_by_role("button", name="View", exact=True)).click()
    page.wait_for_url(re.compile(r"/runs/"))


def wait_success(page: Page) -> None:
    """Until the run on the page has ended, and well."""
    expect(page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).first).to_be_visible(timeout=RUN_MS)
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()


def metadata(page: Page, key: str) -> Locator:
    """The row of a partition's metadata that has this key."""
    return page.get_by_role("row").filter(has=page.get_by_role("cell", name=key, exact=True)).first


def show_picture(page: Page, row: Locator) -> Locator:
    """Open what a row of metadata keeps behind a link; the dialog, in which the browser has drawn a picture."""
    row.get_by_text("[Show Markdown]").click()
    dialog = page.get_by_role("dialog")
    picture = dialog.get_by_role("img").and_(page.locator("[src^='data:image/svg+xml']"))
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
    return dialog
