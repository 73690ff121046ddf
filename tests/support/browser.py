"""A real browser for the tests of the page: Debian's headless Chromium, driven by Playwright.

`visiting` opens a tab for one test. At the end it checks that the console is empty and that every request went to the server.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Browser, FloatRect, Locator, Page, Request, Route, ViewportSize, expect, sync_playwright

from tests.support.server import PROMPT
from tests.support.waiting import PATIENCE_S

LAPTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
SMALL_PHONE: ViewportSize = {"width": 320, "height": 568}
PATIENCE_MS = 1000 * PATIENCE_S  # the timeout of every condition
expect.set_options(timeout=PATIENCE_MS)


class Visit:
    """One tab, its requests, and the errors and warnings of its console."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": LAPTOP, **context})
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[Request] = []
        self.canceled: list[Request] = []
        self.console_errors: list[str] = []
        # Playwright sets an attribute on each handler, and a list's bound `append` accepts none
        self.page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108
        self.page.on("requestfailed", lambda request: self.canceled.append(request))  # noqa: PLW0108
        self.page.on("console", lambda message: self.console_errors.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.console_errors.append(str(error)))

    def open(self, hash: str = "") -> "Visit":
        self.page.goto(f"{self.url}/{hash and '#' + hash}")
        return self

    def bodies(self) -> list[dict[str, Any]]:
        """Return the bodies of the requests to /v1/completions and /v1/chat/completions, in order."""
        return [json.loads(request.post_data or "") for request in self.requests if "completions" in request.url]

    def requested_models(self) -> list[str]:
        """Return the `model` of each completion request, in order."""
        return [body["model"] for body in self.bodies()]

    def pane(self, name: str, part: str = ".text") -> Locator:
        return self.page.locator(f"#{name} {part}")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).text_content() or ""

    def box(self, selector: str) -> FloatRect:
        box = self.page.locator(selector).bounding_box()
        assert box is not None, f"{selector} is not shown"
        return box

    def done(self, size: float | None = None) -> "Visit":
        """Wait until both panes show a complete answer, the second one at `size`."""
        if size is not None:
            expect(self.page).to_have_url(re.compile(f"size={size:g}&"))
        for name in ("original", "compressed"):
            expect(self.pane(name, ".state")).to_contain_text(re.compile(r"^live · \d+ tokens · "))
        return self

    def completion(self, name: str) -> str:
        """Return the text of a pane without the prompt at its beginning."""
        prompt = self.text(f"#{name} .given") if self.pane(name, ".given").count() else ""
        return self.text(f"#{name} .text").removeprefix(prompt)

    def at_first_text(self, action: str) -> None:
        """Run the JavaScript `action` when the first text of an answer appears.

        It runs inside the page, because a fast server may finish before the test can react.
        """
        self.page.add_init_script(
            "addEventListener('DOMContentLoaded', () => new MutationObserver((_, watch) => {"
            "  if (!document.querySelector('#compressed .speed').textContent) return;"
            f" watch.disconnect(); {action} }}).observe(document.body, {{childList: true, subtree: true}}))"
        )

    @contextlib.contextmanager
    def replace_response(self, glob: str, status: int, message: str) -> Iterator[None]:
        """Replace the server's responses to `glob` within the context.

        It simulates states that a test cannot bring about, for example a model that is being loaded or a busy server.
        """

        def answer(route: Route) -> None:
            route.fulfill(status=status, json={"error": {"message": message}}, headers={"Retry-After": "1"})

        self.page.route(glob, answer)
        yield
        self.page.unroute(glob, answer)

    def check(self, refused: bool) -> None:
        """Check that all requests went to the server and that the console is empty.

        With `refused`, the console may hold the messages that Chromium writes for responses with an error status.
        """
        foreign = [request.url for request in self.requests if not request.url.startswith((self.url + "/", "data:"))]
        assert foreign == [], "the page sent requests to another server"
        expected = "Failed to load resource: the server responded with a status of"
        assert [text for text in self.console_errors if not (refused and text.startswith(expected))] == []


@contextlib.contextmanager
def visiting(browser: Browser, url: str, refused: bool = False, **context: Any) -> Iterator[Visit]:
    """Open a tab for one test and check it at the end. `refused`: the server will answer some request with an error status."""
    visit = Visit(browser, url, **context)
    try:
        yield visit
        visit.check(refused)
    finally:
        visit.context.close()


def hash_of(**state: Any) -> str:
    """Return the fragment of the page's URL for a state of the page."""
    return urlencode({"model": "small", "prompt": PROMPT, "size": 0.6, "max_tokens": 24, **state})


def chromium() -> str:
    """Return the path of the browser. Without one the tests of the page fail; skipped tests would go unnoticed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("the tests of the page need a browser, and chromium is not installed. As root: apt-get install chromium")


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's sandbox does not work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=sandbox, timeout=PATIENCE_MS)
        yield browser
        browser.close()
