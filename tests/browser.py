"""A headless Chromium for the tests that look at pages; Debian's own, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, Page, sync_playwright


@contextmanager
def open_browser(allowed: str = "file:") -> Generator[tuple[Page, list[str]]]:
    """A page that may load only addresses that begin with `allowed`, and the list of what went wrong in it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have Chromium: .ci/run installs it")
        pytest.skip("needs Chromium: apt-get install chromium")
    errors: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route(
            "**/*",
            lambda route: (
                route.continue_() if route.request.url.startswith((allowed, "blob:", "data:")) else route.abort()
            ),
        )
        yield page, errors
        browser.close()


def screenshot(page: Page, name: str) -> None:
    """Keep a picture if LM_SCREENSHOTS names a folder."""
    folder = os.environ.get("LM_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
