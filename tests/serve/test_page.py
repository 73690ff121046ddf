"""The page in a real browser with a real server: both panes, the slider, the cost of a size, and the copied commands."""

import json
import math
import random
import re
import shlex
import subprocess
import sys
import tarfile
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qs

import pytest
from acip_platform.serve.recorded_samples import QUESTIONS
from playwright.sync_api import Page, expect

from acip.evaluate.samples import PROMPTS
from tests.support.browser import Visit, hash_of
from tests.support.near_ties import assert_greedy_text
from tests.support.server import PROMPT, Server
from tests.support.waiting import PATIENCE_S, until

LONG = 480  # tokens, which just fit into the context: the answer is still running when its first words are drawn
PRESS = "document.querySelector('#size').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"


@pytest.fixture
def tradeoff(server: Server) -> dict[str, Any]:
    """Return the trade-off of the small model, as the server reports it."""
    return server.client.get("/v1/models/small/tradeoff").json()


def assert_shown(visit: Visit, name: str, server: Server, size: float, **fields: Any) -> None:
    """Assert that a pane shows the server's answer to a single request without streaming, up to a near tie."""
    assert_greedy_text(
        server.ask(**{"model": f"small@{size}", "max_tokens": 24, "seed": 1, "logprobs": 2, **fields}), visit.completion(name)
    )


def press(page: Page, *keys: str) -> None:
    """Press keys on the slider in one call, so that a busy machine does not pause between them."""
    page.evaluate(";".join(PRESS.format(key) for key in keys))


KEEP_COPIED = """const wait = window.setTimeout; window.setTimeout = (call, ms) => (ms === 2000 ? 0 : wait(call, ms))"""  # of "Copied."


def test_both_panes_stream_the_servers_answers(visit: Visit, server: Server) -> None:
    visit.page.add_init_script(
        "addEventListener('DOMContentLoaded', () => { window.lengths = new Set(); new MutationObserver(() =>"
        "  lengths.add(document.querySelector('#compressed .text').textContent.length))"
        "  .observe(document.querySelector('#compressed .text'), {childList: true, subtree: true}); })"
    )
    visit.open(hash_of(max_tokens=LONG)).done()
    assert_shown(visit, "original", server, 1.0, max_tokens=LONG)
    assert_shown(visit, "compressed", server, 0.6, max_tokens=LONG)
    assert visit.page.evaluate("lengths.size") > 2, "the text must grow in several steps"
    assert visit.requested_models() == ["small@1.0", "small@0.6"]
    first, second = visit.bodies()
    assert first["seed"] == second["seed"] and first["temperature"] == second["temperature"] == 0
    for name in ("original", "compressed"):
        expect(visit.pane(name, ".speed")).to_have_text(re.compile(r"^\d[\d.,]* tokens/s$"))


def test_keys_move_the_slider_and_its_rest_sends_a_request(visit: Visit, tradeoff: dict[str, Any]) -> None:
    page = visit.open(hash_of()).done().page
    slider, requested = page.locator("#size"), page.locator("#asked")
    slider.focus()
    for key, size in [("ArrowLeft", "0.59"), ("PageUp", "0.64"), ("ArrowUp", "0.65"), ("PageDown", "0.60"), ("End", "1.00")]:
        slider.press(key)
        expect(requested).to_have_text(size)
    slider.press("Home")
    smallest = tradeoff["sizes"][-1]["asked"]
    expect(requested).to_have_text(f"{smallest:.2f}")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(rf"^{smallest:.2f} of the original, "))
    visit.done(smallest)
    before = len(visit.requested_models())
    press(page, "PageUp", "PageUp", "ArrowRight")
    visit.done(smallest + 0.11)
    assert visit.requested_models()[before:] == [f"small@{round(smallest + 0.11, 2)}"]
    assert visit.requested_models().count("small@1.0") == 1, "the original must be requested once"
    press(page, "ArrowLeft", "ArrowRight")
    page.wait_for_timeout(400)
    assert len(visit.requested_models()) == before + 1, "the page must reuse the answer for a size"


def test_moving_the_slider_cancels_the_running_request(visit: Visit, server: Server) -> None:
    page, before = visit.page, server.metric("acip_requests_total", "canceled")
    visit.at_first_text(PRESS.format("ArrowLeft"))
    with page.expect_event("requestfailed") as failed:
        visit.open(hash_of(max_tokens=LONG, size=0.5))
    assert "small@0.5" in (failed.value.post_data or "")
    assert failed.value.failure == "net::ERR_ABORTED"
    visit.done(0.49)
    until(lambda: server.metric("acip_requests_total", "canceled") > before, "the server does not cancel the request")
    assert visit.requested_models() == ["small@1.0", "small@0.5", "small@0.49"]


def test_stop_button_stops_both_panes(visit: Visit) -> None:
    visit.at_first_text("document.querySelector('#stop').click()")
    page = visit.open(hash_of(max_tokens=LONG)).page
    for name in ("original", "compressed"):
        expect(visit.pane(name, ".state")).to_contain_text("Stopped.")
    expect(page.locator("#stop")).to_be_disabled()
    assert len(visit.canceled) == 2
    page.click("#run")
    visit.done()


def test_url_holds_the_state(visit: Visit) -> None:
    # the text is sampled, so the test compares only the requests
    page = visit.open(hash_of(size=0.45, seed=7, temperature=0.5, max_tokens=12)).done().page
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    expect(page.locator("#asked")).to_have_text("0.45")
    page.click("#advanced summary")
    for name, value in {"seed": "7", "temperature": "0.5", "max_tokens": "12"}.items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    assert {"seed": 7, "temperature": 0.5, "max_tokens": 12, "model": "small@0.45"}.items() <= visit.bodies()[-1].items()
    page.fill("#seed", "8")
    page.fill("#prompt", "Another & one#")
    page.locator("#prompt").press("Enter")
    press(page, "PageUp")
    expect(page).to_have_url(re.compile("size=0.5&seed=8"))
    kept = {name: value for name, (value,) in parse_qs(page.evaluate("location.hash.slice(1)")).items()}
    assert kept == {"model": "small", "prompt": "Another & one#", "size": "0.5", "seed": "8", "temperature": "0.5", "max_tokens": "12"}
    visit.done()
    body = visit.bodies()[-1]
    page.reload()
    visit.done()
    assert visit.bodies()[-1] == body


def test_page_shows_the_cost_of_a_size(visit: Visit, tradeoff: dict[str, Any]) -> None:
    page = visit.open(hash_of(size=0.6)).done().page
    measured = next(row for row in tradeoff["measured"] if row["asked"] == 0.6)
    listed = next(row for row in tradeoff["sizes"] if row["asked"] == 0.6)
    value, spread = (float(number) for number in visit.text("#perplexity").split(" ± "))
    assert value == pytest.approx(measured["perplexity"], rel=0.01)
    assert spread == pytest.approx(measured["perplexity"] * measured["stderr"], rel=0.05, abs=0.006)
    times = float(visit.text("#how").removesuffix(" times the original, measured"))
    assert times == pytest.approx(measured["perplexity"] / tradeoff["measured"][0]["perplexity"], rel=0.06)
    expect(page.locator("#got")).to_have_text(
        f"requested 0.60, actual {listed['got']:.4f}" if f"{listed['got']:.4f}" != "0.6000" else re.compile(r"^\s*$")
    )
    expect(page.locator("#caption")).to_contain_text("Perplexity, log axis · held-out, context 64, 8 windows")
    expect(page.locator("#bytes")).to_have_text(page.evaluate("inBytes", listed["bytes"]))
    memory = tradeoff["memory"]
    page.select_option("#context", "512")
    needs = listed["bytes"] + 512 * memory["kv_bytes_per_token"] + memory["overhead_bytes"]
    expect(page.locator("#memory")).to_have_text(f"{needs / 1e6:.0f} MB")
    press(page, "ArrowRight")
    expect(page.locator("#perplexity")).to_have_text(re.compile("^≈ "))
    expect(page.locator("#how")).to_have_text(re.compile(" times the original, predicted$"))
    press(page, "Home")
    expect(page.locator("#how")).to_have_text(re.compile("below 0.40"))
    press(page, "End")
    expect(page.locator("#how")).to_have_text("measured")
    expect(page.locator("#got")).to_have_text(re.compile(r"^\s*$"))
    visit.done()


def memory_of(tradeoff: dict[str, Any], row: dict[str, Any]) -> int:
    """Return the bytes that are needed to serve a size at the longest context."""
    memory = tradeoff["memory"]
    return int(row["bytes"] + tradeoff["max_model_len"] * memory["kv_bytes_per_token"] + memory["overhead_bytes"])


def test_memory_field_selects_the_largest_size_that_fits(visit: Visit, tradeoff: dict[str, Any]) -> None:
    page, rows = visit.open(hash_of()).done().page, tradeoff["sizes"]
    exact = memory_of(tradeoff, next(row for row in rows if row["asked"] == 0.7))
    for available in (exact, exact - 1):
        largest = next(row["asked"] for row in rows if memory_of(tradeoff, row) <= available)
        page.fill("#gpu", f"{Decimal(available) / 10**9:f}")
        expect(page.locator("#fits")).to_contain_text(f"{largest:.2f} is the largest size that fits")
        expect(page.locator("#asked")).to_have_text(f"{largest:.2f}")
    page.fill("#gpu", "0.001")
    expect(page.locator("#fits")).to_contain_text("No size fits: ")
    expect(page.locator("#asked")).to_have_text(f"{largest:.2f}")
    page.fill("#gpu", "80")
    expect(page.locator("#fits")).to_contain_text("The original fits")
    expect(page.locator("#asked")).to_have_text("1.00")
    visit.done()


def test_gigabytes_are_converted_to_exact_bytes(visit: Visit) -> None:
    """The page converts any decimal number of gigabytes to the bytes that Python's `Decimal` gives."""
    rng, page = random.Random(0), visit.open(hash_of()).done().page
    amounts = [rng.randrange(1, 10 ** rng.randint(1, 15)) for _ in range(3000)]
    written = [f"{Decimal(amount) / 10**9:f}" for amount in amounts] + [repr(amount / 1e9) for amount in amounts]
    converted = page.evaluate("texts => texts.map((text) => String(bytesOf(text)))", written)
    assert converted == [str(amount) for amount in amounts] * 2
    unusual = {
        "": "null",
        "0": "null",
        "-1": "null",
        ".5": "500000000",
        "8.": "8000000000",
        "1e-3": "1000000",
        "+2E1": "20000000000",
        "x": "null",
    }
    assert page.evaluate("texts => texts.map((text) => String(bytesOf(text)))", list(unusual)) == list(unusual.values())


def test_copied_commands_repeat_the_request(visit: Visit, server: Server) -> None:
    prompt = 'It\'s a "$HOME" `day`\\ and\nmore '
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.add_init_script(KEEP_COPIED)
    page = visit.open(hash_of(prompt=prompt)).done().page

    def copied(button: str) -> str:
        page.evaluate("document.querySelector('#copied').textContent = ''")
        page.click(button)
        expect(page.locator("#copied")).to_have_text("Copied.")
        return page.evaluate("navigator.clipboard.readText()")

    before = len(visit.requested_models())
    arguments = shlex.split(copied("#curl"))
    assert arguments[:3] == ["curl", "-sN", f"{server.url}/v1/completions"]
    assert arguments[3:6] == ["-H", "Content-Type: application/json", "-d"]
    assert json.loads(arguments[6]) == visit.bodies()[-1]
    assert visit.bodies()[-1]["prompt"] == prompt
    program = copied("#python")
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert_greedy_text(server.ask(model="small@0.6", prompt=prompt, max_tokens=24, seed=1, logprobs=2), completed.stdout)
    command = shlex.split(copied("#copycommand"))
    assert command == ["python", "jobs/materialize.py", "small", "--size", "0.6", "--out", "small-0.6"]
    assert len(visit.requested_models()) == before, "copying must not send a request"


def test_edited_fields_are_copied_at_once_and_sent_on_run(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.add_init_script(KEEP_COPIED)
    page = visit.open(hash_of()).done().page
    before = len(visit.requested_models())
    page.click("#advanced summary")
    page.fill("#seed", "9")
    page.fill("#prompt", "Another prompt")
    page.click("#curl")
    expect(page.locator("#copied")).to_have_text("Copied.")
    body = json.loads(shlex.split(page.evaluate("navigator.clipboard.readText()"))[6])
    assert (body["prompt"], body["seed"]) == ("Another prompt", 9)
    expect(visit.pane("compressed", ".state")).to_contain_text("not run yet: press Enter or Run")
    page.wait_for_timeout(400)
    assert len(visit.requested_models()) == before
    page.click("#run")
    visit.done()
    assert len(visit.requested_models()) == before + 2 and visit.bodies()[-1]["prompt"] == "Another prompt"


def test_size_can_be_downloaded(visit: Visit) -> None:
    page = visit.open(hash_of(size=0.55)).done().page
    with page.expect_download() as downloaded:
        page.click("#make")
    expect(page.locator("#jobs")).to_contain_text("small at 0.55 is ready")
    assert re.fullmatch(r"small-0\.5[45]\d\d\.tar", downloaded.value.suggested_filename)
    with tarfile.open(downloaded.value.path()) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    with page.expect_download() as again:
        page.click("#jobs a")
    assert again.value.path().read_bytes() == downloaded.value.path().read_bytes()


def test_download_is_a_command_if_a_key_is_required(visit: Visit, server: Server) -> None:
    """A link can't carry the key, so the page shows a curl command."""
    visit.page.add_init_script("sessionStorage.setItem('acip-key', 'sesame')")
    page = visit.open(hash_of(size=0.55)).done().page
    page.click("#make")
    expect(page.locator("#jobs")).to_contain_text("small at 0.55 is ready")
    command = shlex.split(visit.text("#jobs .download"))
    assert command[:6] == ["curl", "-C", "-", "-OJ", "-H", "Authorization: Bearer $ACIP_API_KEY"]
    assert server.client.head(command[6].removeprefix(server.url)).headers["Accept-Ranges"] == "bytes"


COMPARED = """([original, other, whole]) => {
  const [words, marks, summary] = compared({text: original, whole: true}, {text: other, whole});
  return [summary, words.filter((_, index) => marks?.[index]).map((word) => word.trim())];
}"""


@pytest.mark.parametrize(
    ("other", "whole", "summary", "marked"),
    [
        ("a b c", True, "same words as the original", []),
        ("a x c", True, "differs from the original after 1 word", ["x"]),
        ("a c d", True, "differs from the original after 1 word", ["d"]),
        ("a c", True, "differs from the original after 1 word", []),
        ("a b", True, "differs from the original after 2 words", []),
        ("x b c", True, "differs from the first word on", ["x"]),
        ("a b cc", False, "", []),
        ("a b", False, "", []),
    ],
)
def test_words_are_compared_with_the_original(visit: Visit, other: str, whole: bool, summary: str, marked: list[str]) -> None:
    page = visit.open(hash_of(size=0.6)).done().page
    assert page.evaluate(COMPARED, ["a b c", other, whole]) == [summary, marked]


def test_drafted_characters_have_a_color(visit: Visit) -> None:
    visit.open().done()
    shown = visit.page.evaluate(
        "colored({ drafted: [[2, 5], [8, 12]] }, 'cdefghij', 2).map((part) => part.className ? [part.textContent] : part)"
    )
    assert shown == [["cde"], "fgh", ["ij"]]
    assert visit.page.evaluate("colored(null, 'abc', 0)") == ["abc"]


def test_both_panes_share_the_request_at_full_size(visit: Visit) -> None:
    page = visit.open(hash_of(size=0.3, max_tokens=120)).done().page
    expect(visit.pane("compressed", ".state")).to_contain_text(
        re.compile("differs from the original|differs from the first|same words as the original")
    )
    press(page, "End")
    visit.done(1)
    expect(visit.pane("compressed", "mark")).to_have_count(0)
    assert visit.completion("compressed") == visit.completion("original")
    assert visit.requested_models().count("small@1.0") == 1, "at 1.0 both panes must share one request"


def test_dragging_shows_recorded_text_and_releasing_shows_live_text(visit: Visit, server: Server) -> None:
    def recorded() -> dict[str, Any]:
        return server.client.get("/v1/models/small/tradeoff").json()["recorded"][0]

    def recorded_texts() -> dict[float, str]:
        return {entry["size"]: entry["text"] for entry in recorded()["completions"]}

    until(lambda: 0.6 in recorded_texts(), "no text was recorded at 0.6")
    sample = recorded()
    page = visit.open(hash_of(prompt=sample["prompt"], size=0.9, max_tokens=sample["max_tokens"])).done().page
    box = visit.box("#size")
    smallest = float(page.locator("#size").get_attribute("min") or "")

    def x_of(size: float) -> float:
        return box["x"] + 12 + (box["width"] - 24) * (size - smallest) / (1 - smallest)

    middle = box["y"] + box["height"] / 2
    page.mouse.move(x_of(0.9), middle)
    page.mouse.down()
    page.mouse.move(x_of(0.7), middle, steps=4)
    page.mouse.move(x_of(0.6) + 3, middle, steps=4)
    expect(page.locator("#asked")).to_have_text("0.60")  # snaps to a measured size three pixels away
    expect(visit.pane("compressed", ".state")).to_contain_text("recorded at 0.60")
    assert visit.completion("compressed") == recorded_texts()[0.6]
    page.wait_for_timeout(400)
    assert visit.requested_models() == ["small@1.0", "small@0.9"], "no request may be sent while the slider is held"
    page.mouse.up()
    visit.done()
    assert visit.requested_models() == ["small@1.0", "small@0.9", "small@0.6"]
    assert_shown(visit, "compressed", server, 0.6, prompt=sample["prompt"], max_tokens=sample["max_tokens"])
    page.mouse.click(x_of(0.6) + 20, middle)
    unsnapped = 0.6 + 20 * (1 - smallest) / (box["width"] - 24)
    expect(page.locator("#asked")).to_have_text(f"{unsnapped:.2f}")
    visit.done()


def test_heatmap_describes_the_selected_cell(visit: Visit, tradeoff: dict[str, Any]) -> None:
    page = visit.open(hash_of(size=0.5)).done().page
    heat, kinds = tradeoff["heatmap"], tradeoff["heatmap"]["kinds"]
    expect(page.locator("#heat rect")).to_have_count(sum(rank is not None for row in heat["full"] for rank in row))
    page.locator("#heat").focus()
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    rank, full = heat["ranks"]["0.5"][1][0], heat["full"][1][0]
    expect(page.locator("#cell")).to_have_text(f"{kinds[1]}, layer 1: rank {rank} of {full} ({math.floor(rank / full * 100 + 0.5)} %)")
    page.locator("#heat rect").last.hover()
    expect(page.locator("#cell")).to_contain_text(f"{kinds[-1]}, layer {heat['depths']}: ")
    press(page, "ArrowRight")
    expect(page.locator("#cell")).to_contain_text("rank ≈ ")  # between two recorded sizes
    visit.done()


def test_selected_model_and_its_chat_template_are_used(visit: Visit) -> None:
    """Requests to a model with a chat template use it, unless the link or the checkbox disables it."""
    page = visit.open(hash_of()).done().page
    expect(page.locator("#chatlabel")).to_be_hidden()
    page.select_option("#model", "talker")
    expect(page).to_have_url(re.compile("model=talker.*chat=1"))
    visit.done()
    assert visit.requested_models() == ["small@1.0", "small@0.6", "talker@1.0", "talker@0.6"]
    assert visit.requests[-1].url.endswith("/v1/chat/completions")
    assert visit.bodies()[-1]["messages"] == [{"role": "user", "content": PROMPT}]
    assert page.locator("#compressed .given").count() == 0
    assert "/v1/chat/completions" in visit.text("#code")
    page.click("#advanced summary")
    expect(page.locator("#chat")).to_be_checked()
    with page.expect_request("**/v1/completions"):
        page.uncheck("#chat")
    expect(page).to_have_url(re.compile("model=talker.*chat=0"))
    visit.done()
    assert visit.bodies()[-1]["prompt"] == PROMPT


def test_chat_model_starts_with_a_question(visit: Visit, server: Server) -> None:
    def recorded() -> list[dict[str, Any]]:
        return server.client.get("/v1/models/talker/tradeoff").json()["recorded"]

    until(lambda: all(0.6 in {entry["size"] for entry in sample["completions"]} for sample in recorded()), "the chats are not recorded")
    assert [(sample["prompt"], sample["chat"]) for sample in recorded()] == [(question, True) for question in QUESTIONS]
    visit.open("model=talker")
    visit.done()
    assert visit.bodies()[0]["messages"] == [{"role": "user", "content": QUESTIONS[0]}]
    expect(visit.page.locator("#chips button")).to_have_text(list(QUESTIONS))
    visit.page.select_option("#model", "small")
    expect(visit.page.locator("#prompt")).to_have_value(PROMPTS[0])
    visit.done()


def test_link_to_an_unknown_model_shows_a_notice(visit: Visit) -> None:
    page = visit.open(hash_of(model="smal")).done().page
    notice = 'This server has no model "smal"; small is shown. Available: small, talker.'
    expect(page.locator("#notice")).to_have_text(notice)
    page.select_option("#model", "talker")
    expect(page.locator("#notice")).to_be_hidden()
    visit.done()
    page.evaluate(f"location.hash = {hash_of(model='smal')!r}")
    expect(page.locator("#notice")).to_have_text(notice.replace("small is", "talker is"))
    visit.done()
