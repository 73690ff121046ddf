"""The calibration text of a job comes from one source, from a mixture, or from the base model itself."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.tracking.runs import Tracking
from acip_platform.training import calibration_text
from acip_platform.training.calibration_text import READ, CalibrationText
from acip_platform.training.worker import calibrate_one

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.data import documents, token_windows
from acip.errors import CalibrationError, DataError
from acip.mixture import Mixture
from acip.recipe import Recipe
from acip.self_text import sample
from tests.conftest import byte_tokenizer

RECIPE = Recipe(
    basis="svd", scores="singular_values", adapter_rank=4, post_tune_steps=5, sample_windows=4, batch_size=4, seq_len=32,
    dtype="float32", seed=3,
)  # fmt: skip
MIXED = Mixture((("package:wikipedia", 3.0), ("package:austen", 1.0)))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

Texts = Callable[..., CalibrationText]


@pytest.fixture
def stages() -> list[str]:
    """The messages about stages."""
    return []


@pytest.fixture
def text_of(base: Base, tmp_path: Path, stages: list[str]) -> Texts:
    """Return a function that reads the text of a job with these `data`, as a new process does."""

    def emit(kind: str, **facts: Any) -> None:
        if kind == "stage":
            stages.append(facts["text"])

    def read(data: str | Mixture, tokenizer: Any = None, seed: int = 3, **options: Any) -> CalibrationText:
        READ.clear()
        settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
        other = Base(base.model, tokenizer or base.tokenizer, base.source, None, base.digest)
        return CalibrationText.of(Job("small", base.source, replace(RECIPE, seed=seed), data), other, settings, emit, **options)

    return read


def rows(windows: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, windows.tolist()))


def test_one_source_gives_its_windows_in_the_order_of_the_seed(text_of: Texts, stages: list[str]) -> None:
    windows = token_windows(documents("package:austen", "train"), byte_tokenizer(), 32, 20)
    text = text_of("package:austen")
    assert torch.equal(text.windows, windows[torch.randperm(20, generator=torch.Generator().manual_seed(3))])
    assert text.provenance == {} and stages == []


def test_a_mixture_holds_the_shares_in_every_prefix(text_of: Texts) -> None:
    windows = text_of(MIXED).windows
    texts = {source: rows(token_windows(documents(source, "train"), byte_tokenizer(), 32, n)) for source, n in MIXED.counts(20).items()}
    assert len(windows) == 20 and rows(windows) == texts["package:wikipedia"] | texts["package:austen"]
    is_austen = torch.tensor([tuple(row) in texts["package:austen"] for row in windows.tolist()])
    assert is_austen.view(5, 4).sum(1).tolist() == [1] * 5
    assert torch.equal(text_of(MIXED).windows, windows)
    assert not torch.equal(text_of(MIXED, seed=4).windows, windows)


def test_a_source_that_ends_early_is_repeated(text_of: Texts, stages: list[str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 32 * 4)  # 4 windows
    mixture = Mixture(((str(tmp_path / "short.txt"), 1.0), ("package:austen", 1.0)))
    windows = text_of(mixture).windows
    assert len(windows) == 20 and sum(row == [ord("x")] * 32 for row in windows.tolist()) == 10
    assert any("short.txt has 4 windows, and 10 are needed: each is used about 2.5 times" in text for text in stages)


def test_chats_in_a_mixture_are_rendered_with_the_chat_template(text_of: Texts, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Which size?"}, {"role": "assistant", "content": "Any."}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 40))
    mixture = Mixture(((str(tmp_path / "chats.jsonl"), 1.0), ("package:austen", 1.0)))
    with pytest.raises(DataError, match=r"data .*chats\.jsonl: the text contains chats .* no chat template"):
        text_of(mixture)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    windows = text_of(mixture, tokenizer).windows
    assert sum("Which size?" in tokenizer.decode(row) or "Any." in tokenizer.decode(row) for row in windows) == 10


def test_sampled_text_is_made_once(text_of: Texts, base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job that is repeated reads it, and samples only batches that are missing."""
    sampled: list[int] = []

    def counted(model: Any, tokenizer: Any, seq_len: int, seed: int, batch: int) -> Any:
        sampled.append(batch)
        return sample(model, tokenizer, seq_len, seed, batch)

    monkeypatch.setattr(calibration_text, "sample", counted)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    first = text_of("self", tokenizer)
    files = sorted((tmp_path / "home" / "cache" / "sampled").glob("*/*.jsonl"))
    assert sampled == list(range(len(files))) and len(first.windows) == 20
    content = b"".join(file.read_bytes() for file in files)
    expected = [json.loads(line) for line in content.splitlines()]
    assert first.sampled == {
        "sampling": 2, "seed": 3, "temperature": 1.0, "documents": len(expected), "chats": sum("messages" in row for row in expected),
        "tokens": sum(row["tokens"] for row in expected), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip

    assert torch.equal(text_of("self", tokenizer).windows, first.windows) and len(sampled) == len(files)
    files[-1].unlink()
    assert torch.equal(text_of("self", tokenizer).windows, first.windows) and sampled[len(files) :] == [len(files) - 1]
    assert text_of("self", tokenizer, seed=4).sampled["sha256"] != first.sampled["sha256"]


def test_sampled_text_can_be_a_part_of_a_mixture(text_of: Texts) -> None:
    text = text_of(Mixture((("self", 1.0), ("package:austen", 1.0))))
    austen = rows(token_windows(documents("package:austen", "train"), byte_tokenizer(), 32, 10))
    assert len(text.windows) == 20 and sum(tuple(row) in austen for row in text.windows.tolist()) == 10
    assert text.sampled["tokens"] >= 10 * 31


def test_text_is_not_sampled_from_a_model_that_does_not_fit(text_of: Texts) -> None:
    """Text that was sampled before can be used."""
    with pytest.raises(CalibrationError, match=r"the calibration text is self, but the model does not fit in memory.*Use another source"):
        text_of("self", streamed=True)
    sampled = text_of("self")
    assert torch.equal(text_of("self", streamed=True).windows, sampled.windows)


def test_a_job_is_calibrated_on_sampled_text(small_base: str, tmp_path: Path) -> None:
    """The artifact and the run tell where the text comes from. The curve is measured on another text."""
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    recipe = replace(RECIPE, sample_windows=20, adapter_rank=0, post_tune_steps=0)
    data = Mixture((("self", 1.0), ("package:austen", 1.0)))
    job = Job("small", small_base, recipe, data, eval_context=64, eval_windows=2, sizes=(1.0, 0.5))
    run = Tracking(settings, "test").start(job.name, job.fingerprint, {})
    events: list[dict[str, Any]] = []
    queue = SimpleNamespace(put=SimpleNamespace(remote=events.append))
    config = {"settings": settings, "run": run.run_id, "attempt": "first", "threads": 1, "events": queue, "fingerprint": job.fingerprint}
    summary = calibrate_one(config | {"job": job.to_dict()})
    facts = Artifact.open(summary["uri"].removeprefix("file://")).manifest["provenance"]
    assert facts["job"]["data"] == [{"source": "self", "weight": 1.0}, {"source": "package:austen", "weight": 1.0}]
    assert facts["sampled_text"]["documents"] > 0
    params = run.client.get_run(run.run_id).data.params
    assert params["sampled_text.sha256"] == facts["sampled_text"]["sha256"]
    assert {row["corpus"] for row in summary["curve"]} == {"package:austen"} and all(math.isfinite(row["loss"]) for row in summary["curve"])
    progress = [event for event in events if event.get("what") == "sampled tokens"]
    assert progress and progress[-1]["done"] <= progress[-1]["total"]
    assert any("text of the base model itself: about" in event.get("text", "") for event in events)
