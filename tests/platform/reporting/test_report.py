"""The report shows the numbers of the artifact in one file, needs no network, and escapes every name."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from acip_platform.reporting.report import CONTEXT, Subject, baseline_rows, facts, page
from acip_platform.settings import Settings
from acip_platform.tracking.registry import ModelVersion, Registry
from acip_platform.tracking.runs import Tracking
from playwright.sync_api import Browser

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip.evaluate import CurveSetup, DivergenceOn, Text, divergence_of, trade_off
from acip.evaluate.samples import PROMPTS
from acip.sizing.budget import Budget
from acip.sizing.excess_loss_area import excess_loss_area
from jobs import report
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama
from tests.support.browser import LAPTOP, PHONE, launched
from tests.support.waiting import PATIENCE_S

MARKUP = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> $x_{'
SIZES = (1.0, 0.8, 0.6, 0.4)
Make = Callable[..., Artifact]


@pytest.fixture
def make(small_artifact: Artifact, tmp_path: Path) -> Make:
    """Return a function that copies the small artifact and adds a curve and samples."""

    def make_artifact(name: str, *losses: float, text: str = "text", **more: Any) -> Artifact:
        table, rows = small_artifact.table(), []
        for asked, loss in zip(SIZES, losses, strict=False):
            cut = table.cut(Budget(ratio=asked))
            samples = [{"prompt": prompt, "text": f"{text} at {asked}"} for prompt in PROMPTS]
            parts = [{"kind": "samples", "label": "samples", "key": "s", "values": {}, "samples": samples}, *more.get("parts", [])]
            rows.append({
                "asked": asked, "got": cut.sizes["linear"], "params": cut.params, "bytes": cut.bytes, "loss": loss, "stderr": 0.01,
                "perplexity": math.exp(loss), "corpus": more.get("corpus", "held-out"), "context": 64, "windows": 8,
                "extrapolated": asked < 0.5, "evaluation": parts,
            })  # fmt: skip
        return Artifact.open(copytree(small_artifact.folder, tmp_path / name)).record_curve(rows)

    return make_artifact


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


class ReportPage:
    """A report that is open in a browser. It fails on any other request and on any error."""

    def __init__(self, browser: Browser, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": LAPTOP, **context})
        self.context.set_default_timeout(PATIENCE_S * 1000)
        self.tab = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.tab.goto(path.as_uri())
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]
        assert self.errors == []

    def cells(self, section: str) -> list[list[str]]:
        rows = self.tab.locator(f"#{section} tbody tr").all()
        return [[" ".join(cell.split()) for cell in row.locator("td").all_inner_texts()] for row in rows]

    def overflows(self) -> bool:
        """Return whether the page is wider than the window."""
        return bool(self.tab.evaluate("document.documentElement.scrollWidth > innerWidth"))


def run_report(monkeypatch: pytest.MonkeyPatch, home: Path, *args: str | Path) -> int:
    monkeypatch.setenv("ACIP_HOME", str(home))
    for name in ("ACIP_ARTIFACT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return report.main([*map(str, args)])


def test_the_report_shows_the_numbers_of_the_artifact(
    browser: Browser, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make("small", 2.0, 2.1, 2.3, 2.6)
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    run = Tracking(settings, "fleet").start("small", "f", {})
    registry = Registry(settings)
    registry.set_alias(registry.register("small", str(artifact.folder), run.run_id, {"verdict": "champion: the first of small"}))
    out = tmp_path / "new" / "report.html"
    assert run_report(monkeypatch, tmp_path / "home", "small", "--out", out) == 0
    capsys.readouterr()

    content = json.loads(out.with_suffix(".json").read_text())
    (model,) = content["models"]
    assert [{key: row[key] for key in row if key not in ("memory_bytes", "kl", "label", "worst_domain")} for row in model["curve"]] == [
        {key: value for key, value in row.items() if key != "evaluation"} for row in artifact.curve
    ]
    assert model["area"] == pytest.approx(excess_loss_area(artifact.curve))
    assert (model["provenance"], model["recipe"]["fields"]) == (artifact.manifest["provenance"], artifact.manifest["recipe"])
    table = artifact.table()
    assert table.decoder is not None
    cache_bytes = table.decoder.cache(CONTEXT, 1) + table.decoder.overhead(1)

    report_page = ReportPage(browser, out)
    for cells, row in zip(report_page.cells("sizes"), artifact.curve, strict=True):
        cut = table.cut(Budget(ratio=row["asked"]))
        assert cut.bytes is not None
        assert cells[:3] == [f"{row['asked']:.2f}", f"{row['got']:.4f}", f"{row['params']:,}"]
        assert cells[3:5] == [f"{cut.bytes / 1e6:,.1f}", f"{(cut.bytes + cache_bytes) / 1e6:,.1f}"]
        assert cells[5] == f"{row['perplexity']:.2f} ± {row['perplexity'] * 0.01:.2f}"
        assert cells[6:] == [f"{math.exp(row['loss'] - 2.0):.2f}", "below the stop ratio" if row["asked"] == 0.4 else ""]
    assert report_page.cells("samples")[2] == ["0.60", *["text at 0.6"] * 3]
    text = report_page.tab.inner_text("body")
    for sentence in ("Speed was not measured", "Memory was not measured", "8 windows of 64 tokens", "champion: the first of small"):
        assert sentence in text
    assert "python jobs/promote.py small 1" in report_page.tab.locator("#next pre").all_inner_texts()
    assert json.loads(report_page.tab.locator("#data").text_content() or "") == content
    assert report_page.tab.locator("svg").count() == 5
    assert not report_page.overflows()
    assert not ReportPage(browser, out, viewport=PHONE).overflows()
    light, dark = (
        ReportPage(browser, out, color_scheme=scheme).tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        for scheme in ("light", "dark")
    )
    assert light != dark, "figures use the colors of the page"
    assert not re.search(r"https?://(?!www\.w3\.org|127\.0\.0\.1)", out.read_text()), "no links to other sites"


def test_bytes_come_first_in_the_report_of_coded_layers(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, calibration, codes = calibrated_with_codes(llama())
    artifact = Artifact.save(tmp_path / "coded", base, calibration, {}, codes)
    text = Text("package:austen", context=32, windows=2)
    sizes: list[Budget | float] = [1.0, 0.5, *(Budget(size, "bytes") for size in (0.56, 0.52))]
    domains = {"code": list(torch.arange(128).view(4, 32))}
    setup = CurveSetup(text.tokens(artifact.tokenizer()), text.source, 0.4, divergence=DivergenceOn(text), domains=domains)
    rows = trade_off(artifact.load(), sizes, setup)
    artifact = artifact.record_curve(rows)
    rivals, out = tmp_path / "rivals.json", tmp_path / "report.html"
    rivals.write_text(json.dumps([{"method": "rival in bytes", "got": 0.54, "loss": 5.0, "convention": "bytes"}]))
    assert run_report(monkeypatch, tmp_path / "home", "--artifact", str(artifact.folder), "--baselines", rivals, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.index("of the bytes") < printed.index(": ranks")
    report_page = ReportPage(browser, out)
    charts = [" ".join(chart.split()) for chart in report_page.tab.locator("#curve svg").all_text_contents()]
    assert [[name in chart for name in ("coded, codes", "rival in bytes", "FLOPs of a token")] for chart in charts] == [
        [True, True, False], [False, False, True], [False, False, False],
    ]  # fmt: skip
    cells, sizes_in_bytes = report_page.cells("byte-sizes"), artifact.table().byte_sizes
    assert sizes_in_bytes is not None
    assert len(cells) == 2
    for row, shown in zip(artifact.curve[2:], cells, strict=True):
        kl = divergence_of(row)["kl_nats"]
        assert shown[:4] == [f"{row['asked']:.3g}", f"{row['got']:.4f}", f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:,.1f}"]
        assert float(shown[4].replace(",", "")) > sizes_in_bytes.memory(sizes_in_bytes.versions(0)) / 1e6
        assert shown[6] == f"{kl:.4f}"
        assert [line for line in printed.splitlines() if f"{row['got']:.4f}" in line and f"{row['bits_per_weight']:.2f}" in line]
    assert [shown[0] for shown in report_page.cells("rank-sizes")] == ["1.00", "0.50"]
    for row, shown in zip(artifact.curve, report_page.cells("domains"), strict=True):
        austen, code = (row["domains"][name]["kl_nats"] for name in ("austen", "code"))
        assert shown[1:3] == [f"{austen:,.4g}", f"{code:,.4g}"]
        assert shown[3:5] == ([f"{(austen + code) / 2:,.4g}", "code" if code > austen else "austen"] if austen + code else ["", ""])
    assert not report_page.overflows()


def test_markup_in_names_and_texts_is_escaped(browser: Browser, make: Make, tmp_path: Path) -> None:
    artifact = make("hostile", 2.0, 2.1, 2.3, 2.6, text=MARKUP, corpus=MARKUP)
    manifest = artifact.manifest | {"provenance": {"device": MARKUP, "packages": {MARKUP: MARKUP}, "job": {"data": MARKUP}}}
    manifest["base"] = {**manifest["base"], "source": MARKUP, "revision": MARKUP}
    version = ModelVersion(MARKUP, "1", MARKUP, (MARKUP,), {"verdict": MARKUP})
    subject = Subject(MARKUP, MARKUP, Artifact(artifact.folder, manifest, artifact.source), version)
    content = facts([subject], {MARKUP: [{"got": 0.5, "loss": 3.0}]}, MARKUP)
    out = tmp_path / "hostile.html"
    out.write_text(page(content, [subject]))
    report_page = ReportPage(browser, out)
    assert report_page.tab.locator("script").count() == 1 and report_page.tab.locator("img").count() == 0
    assert report_page.tab.inner_text("h1") == MARKUP
    assert report_page.tab.locator("#curve svg text").filter(has_text=MARKUP).count() >= 2
    assert report_page.cells("samples")[0][1] == f"{MARKUP} at 1.0"
    assert not report_page.overflows()


def test_several_calibrations_and_other_methods(
    browser: Browser, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models are sorted by excess loss area, a curve with a NaN loss is last, and baselines keep their values."""
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    tracking = Tracking(settings, "sweep")
    parent = tracking.start("sweep", "p", {})
    speed = {"kind": "efficiency", "label": "efficiency", "key": "e", "values": {"decode_tokens_per_s": 41.5, "peak_memory_bytes": 5e8}}
    for name, losses in (("worse", (2.0, 2.2, 2.4, 2.7)), ("lost", (2.0, math.nan, 2.2, 2.3)), ("best", (2.0, 2.1, 2.3, 2.6))):
        tracking.start(name, name, {"artifact_uri": str(make(name, *losses, parts=[speed]).folder)}, parent)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"method": "svd", "asked": 0.8, "perplexity": 90.0}, {"method": "svd", "got": 0.6, "loss": 5.0}]))
    out = tmp_path / "report.html"
    assert run_report(monkeypatch, tmp_path / "home", "--sweep", parent.run_id, "--baselines", rows, "--out", out, "--title", "Sweep") == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert [model["label"] for model in content["models"]] == ["best", "worse", "lost"]
    assert content["models"][2]["curve"][1]["loss"] is None
    assert [row["loss"] for row in content["baselines"]["svd"]] == pytest.approx([math.log(90), 5.0])
    report_page = ReportPage(browser, out)
    text = report_page.tab.inner_text("body")
    assert "Speed was not measured" not in text and "Memory was not measured" not in text
    assert report_page.cells("measured") == [
        ["efficiency/decode_tokens_per_s", *["41.5"] * 4],
        ["efficiency/peak_memory_bytes", *["500,000,000"] * 4],
    ]
    assert {"best", "worse", "lost", "svd"} <= set(report_page.tab.locator("#curve svg text").all_text_contents())

    arena = baseline_rows(Path(__file__).parents[2] / "benchmarks" / "arena.json", "package:austen")
    assert {"asvd", "acip"} <= arena.keys() and all(30 < row["perplexity"] < 1e7 for row in arena["acip"])
    assert [row["got"] <= row["asked"] and 0 < row["stderr"] < 0.2 for row in arena["acip"]] == [True] * 3
    with pytest.raises(AcipError, match="or an arena's rows with 'perplexity c4'"):
        baseline_rows(Path(__file__).parents[2] / "benchmarks" / "arena.json", "c4")

    rows.write_text(
        (Path(__file__).parents[2] / "benchmarks" / "arena.json").read_text().replace("perplexity austen", "perplexity held-out")
    )
    assert run_report(monkeypatch, tmp_path / "home", "--artifact", tmp_path / "best", "--baselines", rows, "--out", out) == 0
    assert {"asvd", "acip"} <= set(ReportPage(browser, out).tab.locator("#curve svg text").all_text_contents())

    bare = Artifact.open(copytree(tmp_path / "best", tmp_path / "bare")).record_curve([])
    assert run_report(monkeypatch, tmp_path / "home", "--artifact", bare.folder, "--out", out) == 0
    assert "No curve was measured" in ReportPage(browser, out).tab.inner_text("body")
    rows.write_text('[{"got": 1}]')
    capsys.readouterr()
    assert run_report(monkeypatch, tmp_path / "home", "--artifact", bare.folder, "--baselines", rows, "--out", out) == 2
    assert "It must be a JSON list of rows with method" in capsys.readouterr().err
    assert run_report(monkeypatch, tmp_path / "home", "nobody", "--out", out) == 2
