"""One program and one browser for all tests of this folder; a test that fails leaves its page and the parts' logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.commands import CHECKOUT
from tests.ui.program import Program, running_up

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
SCREENSHOTS = CHECKOUT / "docs/screenshots"
LEFT = CHECKOUT / "build/ui"
"""Where a test that fails leaves its page."""
MAX_BYTES = 200 * 1024
PATIENCE_MS = 60_000

Keep = Callable[[Page, str], None]


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    """Its folder's name stands in pictures of docs/, so that it has none of a test's."""
    with TemporaryDirectory(prefix="render-platform-") as folder, running_up(Path(folder) / "state") as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.fail(f"there is no {CHROMIUM}: install Debian's package chromium, or set CHROMIUM", pytrace=False)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, program: Program) -> Iterator[Page]:
    """A new tab that keeps nothing of another test's. Every wait on it is bounded."""
    expect.set_options(timeout=PATIENCE_MS)
    context = browser.new_context(
        viewport={"width": 1440, "height": 900}, locale="en-GB", timezone_id="UTC", color_scheme="light"
    )
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    context.close()


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    """Take the screenshot that the pages in docs/ show.

    With UPDATE_SCREENSHOTS=1 it becomes the one in docs/; else that one has to be there already, and stays.
    """
    update = os.environ.get("UPDATE_SCREENSHOTS") == "1"

    def take(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        kept = SCREENSHOTS / f"{name}.png"
        file = kept if update else tmp_path / kept.name
        page.screenshot(path=file, animations="disabled")
        assert kept.exists(), f"{kept.relative_to(CHECKOUT)} is missing: UPDATE_SCREENSHOTS=1 make test-ui makes it"
        assert max(file.stat().st_size, kept.stat().st_size) <= MAX_BYTES

    return take


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    found = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and "page" in found:
        page, program = found["page"], found["program"]
        file = LEFT / f"{item.name}.png"
        page.screenshot(path=file)
        report.sections += [("page", f"{page.url}\n{file}"), ("logs", program.logs())]
    return report
