"""The page for a model with coded layers: the slider moves over bytes, and a switch leads to ranks. The server runs in this process."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, expect

from acip.artifact.artifact import Artifact
from acip.sizing.budget import Budget
from tests.serve.conftest import in_bytes
from tests.support.application import Application
from tests.support.browser import Visit, hash_of, visiting
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture(scope="module")
def url(coded_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the artifact, and yield the address."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACIP_HOME", str(home))
        application = Application(home, coded_artifact)
        server = uvicorn.Server(uvicorn.Config(application.app, port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started and application.replica.warm, "the server does not start")
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()
        application.close()


@pytest.fixture
def visit_bytes(browser: Browser, url: str) -> Iterator[Visit]:
    with visiting(browser, url) as visit:
        yield visit


@pytest.fixture
def facts(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/v1/models/small/tradeoff", timeout=PATIENCE_S).json()


def at(rows: list[dict[str, Any]], size: float) -> dict[str, Any]:
    return next(row for row in rows if row["asked"] == size)


def state(**fields: Any) -> str:
    return hash_of(**{"max_tokens": 8, "size": 0.44, **fields})


def test_the_slider_moves_over_bytes(visit_bytes: Visit, facts: dict[str, Any]) -> None:
    page = visit_bytes.open(state()).done().page
    slider, smallest = page.locator("#size"), facts["sizes"][-1]["asked"]
    expect(page.locator("#counted")).to_have_text("Size in bytes")
    slider.focus()
    for key, size in (("ArrowLeft", 0.43), ("Home", smallest), ("ArrowRight", round(smallest + 0.01, 2))):
        slider.press(key)
        row = at(facts["sizes"], size)
        expect(page.locator("#asked")).to_have_text(f"{size:.2f}")
        expect(page.locator("#got")).to_have_text(f"{row['bits_per_weight']:.2f} bits per weight, actual {row['got']:.4f}")
        expect(page.locator("#bytes")).to_have_text(page.evaluate("inBytes", row["bytes"]))
    visit_bytes.done(round(smallest + 0.01, 2))
    assert visit_bytes.requested_models()[-1] == f"small@{round(smallest + 0.01, 2)}"
    assert all("convention" not in body for body in visit_bytes.bodies())
    slider.press("End")
    expect(page.locator("#saved")).to_have_text("the original")
    visit_bytes.done(1)


def test_the_dot_follows_the_loss_over_bytes(visit_bytes: Visit, facts: dict[str, Any]) -> None:
    page = visit_bytes.open(state()).done().page
    heights = []
    for size in (0.36, 0.4, 0.44):
        page.evaluate("size => setSize(size)", size)
        x, y = page.evaluate("[scale.x(state.size), scale.y(at(state.size).perplexity)]")
        dot = page.locator("#dot")
        assert float(dot.get_attribute("cx") or 0) == pytest.approx(x)
        assert float(dot.get_attribute("cy") or 0) == pytest.approx(y)
        heights.append(y)
    assert heights == sorted(heights), "more bytes, less loss, lower on the page"
    expect(page.locator("#perplexity")).to_have_text(re.compile(r"^8\.17 ± "))
    expect(page.locator("#caption")).to_contain_text("held-out, context 64, 8 windows")
    visit_bytes.done(0.44)


def test_the_page_names_the_domain_on_which_a_size_loses_most(visit_bytes: Visit) -> None:
    """Between measured sizes, the nearest one that has domains is used. The original loses nothing."""
    page = visit_bytes.open(state()).done().page
    domain = page.locator("#domain")
    expect(domain).to_have_text("On code, this size loses 2.0 times as much as on held-out (KL 0.2 nats at 0.44).")
    page.evaluate("setSize(0.4)")
    expect(domain).to_have_text("On code, this size loses about 2.0 times as much as on held-out (KL 0.2 nats at 0.44).")
    page.evaluate("view.measured.find((row) => row.worst_domain).worst_domain.kl = 0.0002; drawSize()")
    expect(domain).to_have_text("This size is close to the original on all measured domains of text (on code, KL 0.0002 nats at 0.44).")
    page.evaluate("setSize(1)")
    expect(domain).to_be_hidden()


def test_the_heatmap_shows_bits_per_weight(visit_bytes: Visit, facts: dict[str, Any]) -> None:
    page = visit_bytes.open(state()).done().page
    expect(page.locator("#heat-title")).to_have_text("Bits per weight in each layer")
    page.locator("#heat").focus()
    page.locator("#heat").press("ArrowRight")
    bits, full = facts["heatmap"]["bits"]["0.44"][0][0], facts["heatmap"]["full"][0][0]
    expect(page.locator("#cell")).to_have_text(f"{facts['heatmap']['kinds'][0]}, layer 1: {bits:.2f} of {full} bits per weight")
    expect(page.locator("#hit")).to_contain_text(" bits)")


def test_a_switch_leads_to_ranks_and_back(visit_bytes: Visit, facts: dict[str, Any], coded_artifact: Artifact) -> None:
    table = coded_artifact.table()
    page = visit_bytes.open(state()).done().page
    page.evaluate("setSize(0.6)")
    page.check("#by")
    expect(page.locator("#heat-title")).to_have_text("Rank kept in each layer")
    expect(page.locator("#counted")).to_have_text("Size in ranks")
    visit_bytes.done(0.6)
    body = visit_bytes.bodies()[-1]
    assert (body["model"], body["convention"]) == ("small@0.6", "linear")
    expect(page.locator("#bytes")).to_have_text(page.evaluate("inBytes", table.cut(Budget(ratio=0.6)).bytes))
    expect(page).to_have_url(re.compile("by=ranks"))
    assert json.dumps({"convention": "linear"})[1:-1] in page.evaluate("asPython()")
    assert "--size 0.6 --convention linear" in visit_bytes.text("#command")
    page.reload()
    expect(page.locator("#by")).to_be_checked()
    visit_bytes.done(0.6)
    page.uncheck("#by")
    page.evaluate("setSize(0.4)")
    visit_bytes.done(0.4)
    assert "convention" not in visit_bytes.bodies()[-1]
    expect(page.locator("#bytes")).to_have_text(page.evaluate("inBytes", in_bytes(table, 0.4).bytes))


def test_the_memory_field_counts_eight_bits_per_coded_weight(visit_bytes: Visit, facts: dict[str, Any]) -> None:
    page = visit_bytes.open(state()).done().page
    memory, coded = facts["memory"], at(facts["sizes"], 0.44)
    context = facts["max_model_len"] * memory["kv_bytes_per_token"] + memory["overhead_bytes"]
    page.fill("#gpu", f"{(coded['memory_bytes'] + context) / 1e9:.9f}")
    largest = next(row["asked"] for row in facts["sizes"] if row["memory_bytes"] <= coded["memory_bytes"])
    expect(page.locator("#fits")).to_contain_text(f"{largest:.2f} is the largest size that fits")
    visit_bytes.done(largest)
