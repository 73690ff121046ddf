"""Layout and security of the page: it is readable in each width and color scheme, shows prompts as text, and loads no other origin."""

import re

import pytest
from playwright.sync_api import Browser

from tests.support.browser import LAPTOP, PHONE, SMALL_PHONE, Visit, hash_of, visiting
from tests.support.server import Server


def test_prompt_is_shown_as_text(visit: Visit) -> None:
    prompt = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    page = visit.open(hash_of(prompt=prompt)).done().page
    assert visit.pane("original", ".given").text_content() == prompt
    assert page.locator("main img, .pane b").count() == 0
    assert page.title() == "Compress models like images"


def test_content_policy_blocks_other_origins(visit: Visit) -> None:
    page = visit.open(hash_of()).done().page
    blocked = page.evaluate(
        "new Promise((done) => { addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));"
        " fetch('http://127.0.0.1:9/').catch(() => setTimeout(() => done('let through'), 60000)); })"
    )
    assert blocked == "connect-src"
    assert visit.console_errors and all("http://127.0.0.1:9/" in message for message in visit.console_errors)
    visit.console_errors.clear()
    visit.requests = [request for request in visit.requests if request.url != "http://127.0.0.1:9/"]


# The contrast of each text with its background by the formula of WCAG, whose level AA requires 4.5 for small text.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.disabled || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
    const style = getComputedStyle(element);
    const [a, b] = [parse(element instanceof SVGElement ? style.fill : style.color).slice(0, 3), behind(element)].map(light);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.tagName + " " + element.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_in_every_width_and_scheme(browser: Browser, server: Server, scheme: str) -> None:
    with visiting(browser, server.url, color_scheme=scheme, reduced_motion="reduce") as visit:
        page = visit.open(hash_of(size=0.3)).done().page
        page.click("#advanced summary")
        for size in (LAPTOP, PHONE, SMALL_PHONE):
            page.set_viewport_size(size)
            page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # wait for a redraw
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
                f"{size}: the page is wider than the window"
            )
            for drawing in ("#curve", "#heat"):
                parts = page.locator(f"{drawing} :is(line, rect, text)")
                right = parts.evaluate_all("all => all.map((it) => it.getBoundingClientRect().right)")
                assert max(right) <= size["width"], f"{size}: {drawing} is wider than the window"
            assert (visit.box("#compressed")["y"] > visit.box("#original")["y"]) == (size != LAPTOP), (
                "the panes must stack in narrow windows only"
            )
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 30
            assert [contrast for contrast in contrasts if contrast[0] < 4.5] == []
        red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert red < 60 if scheme == "dark" else red > 200
