"""A reader of the chat page in Chromium, with a fake server behind it.

Needs Playwright for Python (`pip install playwright`) and a Chromium of the system's (`apt-get install chromium`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serve_fake import FakeServer, Reply, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TRIED = "This document requires 'TrustedHTML' assignment"  # what a test tries, and the browser refuses
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


class Reader:
    """One tab on the page of a fake server."""

    def __init__(self, tab: Any, server: FakeServer) -> None:
        self.tab, self.server = tab, server

    def ask(self, text: str, *replies: Reply, wait: bool = True) -> None:
        """Writes a question and sends it with Enter; waits until its answer has ended."""
        self.server.replies.extend(replies)
        self.tab.fill("#question", text)
        self.tab.press("#question", "Enter")
        if wait:
            self.settle()

    def settle(self) -> None:
        self.tab.wait_for_selector(".turn:last-child[aria-busy=false]")

    def press(self, name: str) -> None:
        self.tab.get_by_role("button", name=name, exact=True).last.click()

    def add(self, *paths: str) -> None:
        """Picks images, and waits until they are with the question."""
        before = self.tab.locator("#attached li").count()
        self.tab.set_input_files("#files", list(paths))
        self.tab.locator("#attached li").nth(before + len(paths) - 1).wait_for()

    def text(self, selector: str) -> str:
        return str(self.tab.locator(selector).last.inner_text())

    def focused(self) -> str:
        return str(self.tab.evaluate("document.activeElement.id || document.activeElement.className"))


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    # Chromium's sandbox refuses to run as root, which tests in a container do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def readers(browser: Any) -> Iterator[Any]:
    """Opens tabs: `open(viewport, scheme, **options)`.

    In the end there must have been no error of the page or its policy, and no request to another place. That a
    request was refused, Chromium's console tells by itself; that is left out.
    """
    problems: list[str] = []
    contexts = []
    with serving() as server:

        def new(viewport: dict[str, int] = DESK, scheme: str = "light", **options: Any) -> Reader:
            context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce", **options)
            contexts.append(context)
            tab = context.new_page()
            tab.set_default_timeout(10_000)
            tab.on("console", lambda message: note(message.text))
            tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
            tab.on("request", lambda request: None if expected(request.url) else problems.append(request.url))
            tab.goto(server.address)
            if options.get("java_script_enabled", True):
                tab.wait_for_selector("#model:not(:empty), #notice button")
            return Reader(tab, server)

        def note(text: str) -> None:
            if not text.startswith(("Failed to load resource", TRIED)):
                problems.append(f"console: {text}")

        def expected(url: str) -> bool:
            return url.startswith((server.address, "data:", "blob:"))

        new.server = server  # type: ignore[attr-defined]
        yield new
        for context in contexts:
            context.close()
    assert problems == []
