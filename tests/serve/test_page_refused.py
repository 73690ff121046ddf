"""The page while the server does not answer: it refuses a request, loads the model, is busy, or requires a key."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.support.browser import Visit, hash_of, visiting
from tests.support.server import Server


@pytest.fixture
def refused(browser: Browser, server: Server) -> Iterator[Visit]:
    """Open a tab for requests that the server refuses."""
    with visiting(browser, server.url, refused=True) as visit:
        yield visit


def test_error_message_of_the_server_is_shown(refused: Visit) -> None:
    refused.open(hash_of(max_tokens=5000))
    for name in ("original", "compressed"):
        expect(refused.pane(name, ".state")).to_contain_text("max_tokens is 5000, together ")
    expect(refused.page.locator("#stop")).to_be_disabled()


def test_page_waits_until_the_model_is_loaded(refused: Visit) -> None:
    with refused.replace_response("**/ready", 503, "the model is being loaded."):
        page = refused.open(hash_of()).page
        expect(page.locator("#notice")).to_contain_text("The model is being loaded.")
        expect(page.locator("#size")).to_be_disabled()
    refused.done()
    expect(page.locator("#notice")).to_be_hidden()


def test_request_to_a_busy_server_is_retried(refused: Visit) -> None:
    with refused.replace_response("**/v1/completions", 429, "the server is busy and its queue is full; try again in a moment."):
        refused.open(hash_of())
        expect(refused.pane("original", ".state")).to_contain_text("its queue is full; try again in a moment. Trying again in 1 s.")
    refused.done()
    assert set(refused.requested_models()) == {"small@1.0", "small@0.6"} and len(refused.requested_models()) > 2


def test_key_is_requested_and_kept_in_this_tab_only(refused: Visit) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.fallback()
        else:
            route.fulfill(status=401, json={"error": {"message": "this server requires an API key."}})

    refused.page.route("**/v1/**", guard)
    page = refused.open(hash_of()).page
    for key, label in (("wrong", "This server requires an API key:"), ("sesame", "The server rejected this key. Enter another:")):
        expect(page.locator("#key-message")).to_have_text(label)
        page.fill("#key", key)
        page.locator("#key").press("Enter")
    refused.done()
    expect(page.locator("#keyform")).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("sessionStorage.getItem('acip-key')") == "sesame"
    assert "sesame" not in page.url
    code = refused.text("#code")
    assert '"Authorization: Bearer $ACIP_API_KEY"' in code and "sesame" not in code
