"""A real browser for the tests of the page: Debian's Chromium without a window, driven by Playwright.

visiting -> Visit opens the page -> test -> nothing failed in its console, and nothing was asked of anyone but the server
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
PATIENCE_MS = 1000 * PATIENCE_S  # where a condition is awaited
expect.set_options(timeout=PATIENCE_MS)


class Visit:
    """One tab, what it asked for, and what it complained about."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": LAPTOP, **context})
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[Request] = []
        self.canceled: list[Request] = []
        self.complaints: list[str] = []
        # playwright sets an attribute on what it is given, which a list's own append has no place for
        self.page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108
        self.page.on("requestfailed", lambda request: self.canceled.append(request))  # noqa: PLW0108
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, hash: str = "") -> "Visit":
        self.page.goto(f"{self.url}/{hash and '#' + hash}")
        return self

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked of /v1/completions and /v1/chat/completions, in order."""
        return [json.loads(request.post_data or "") for request in self.requests if "completions" in request.url]

    def asked(self) -> list[str]:
        return [body["model"] for body in self.bodies()]

    def pane(self, name: str, part: str = ".text") -> Locator:
        return self.page.locator(f"#{name} {part}")

    def text(self, where: str) -> str:
        return self.page.locator(where).text_content() or ""

    def box(self, where: str) -> FloatRect:
        box = self.page.locator(where).bounding_box()
        assert box is not None, f"{where} is not shown"
        return box

    def done(self, size: float | None = None) -> "Visit":
        """Both panes have their answer, the second at `size`."""
        if size is not None:
            expect(self.page).to_have_url(re.compile(f"size={size:g}&"))
        for name in ("original", "compressed"):
            expect(self.pane(name, ".state")).to_contain_text(re.compile(r"^live · \d+ tokens · "))
        return self

    def completion(self, name: str) -> str:
        """A pane's text without the prompt that it begins with."""
        given = self.text(f"#{name} .given") if self.pane(name, ".given").count() else ""
        return self.text(f"#{name} .text").removeprefix(given)

    def at_first_words(self, action: str) -> None:
        """Run `action` in the page the moment an answer begins to show: from outside, a fast server may be done by then."""
        self.page.add_init_script(
            "addEventListener('DOMContentLoaded', () => new MutationObserver((_, watch) => {"
            "  if (!document.querySelector('#compressed .speed').textContent) return;"
            f" watch.disconnect(); {action} }}).observe(document.body, {{childList: true, subtree: true}}))"
        )

    @contextlib.contextmanager
    def answering(self, glob: str, status: int, message: str) -> Iterator[None]:
        """Inside, what the server says in states that a test can't bring about: loading, busy. Afterwards it answers itself."""

        def answer(route: Route) -> None:
            route.fulfill(status=status, json={"error": {"message": message}}, headers={"Retry-After": "1"})

        self.page.route(glob, answer)
        yield
        self.page.unroute(glob, answer)

    def check(self, refused: bool) -> None:
        """Nobody else was asked, and the console is empty but for what Chromium notes where the server refused something."""
        elsewhere = [request.url for request in self.requests if not request.url.startswith((self.url + "/", "data:"))]
        assert elsewhere == [], "the page asked someone else"
        noted = "Failed to load resource: the server responded with a status of"
        assert [told for told in self.complaints if not (refused and told.startswith(noted))] == []


@contextlib.contextmanager
def visiting(browser: Browser, url: str, refused: bool = False, **context: Any) -> Iterator[Visit]:
    """A tab for one test, checked when it is through. `refused`: the server will refuse something."""
    visit = Visit(browser, url, **context)
    try:
        yield visit
        visit.check(refused)
    finally:
        visit.context.close()


def hash_of(**state: Any) -> str:
    """What is behind the # in the page's address."""
    return urlencode({"model": "small", "prompt": PROMPT, "size": 0.6, "max_tokens": 24, **state})


def chromium() -> str:
    """Where the browser is. Without one the page's tests fail: skipped, nobody would miss them."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("the page is tested in a real browser, and there is no chromium. As root: apt-get install chromium")


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's own does not work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=sandbox)
        yield browser
        browser.close()
