"""A rehearsal runs all phases of a calibration on a few blocks, and predicts those of the whole model."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.training import rehearsal
from acip_platform.training.rehearsal import Forecast, rehearse
from transformers import Gemma3TextConfig, LlamaConfig

from acip.artifact.artifact import Artifact
from acip.base import Base, digest, load_base
from acip.coding.coded_model import code_model
from acip.coding.statistics import layer_statistics
from acip.errors import BaseModelError
from acip.layers.targets import find_linears
from acip.mixture import Mixture
from acip.recipe import Recipe
from tests.acip.layers.test_architectures import GROUPED, random_model
from tests.support.small import byte_tokenizer

RECIPE = Recipe(sample_windows=4, batch_size=2, seq_len=64, post_tune_steps=3, code="both", code_tune_steps=4, dtype="bfloat16")
RANKS = {"measure", "basis", "training", "scores", "save"}
CODES = {"measure", "statistics", "codes", "step sizes", "save"}
CPU = torch.device("cpu")


def job_of(**changes: Any) -> Job:
    return Job("small", "small", replace(RECIPE, **changes), "package:wikipedia", eval_context=64, eval_windows=2)


def base_of(config: Any) -> Base:
    model = random_model(config).bfloat16().requires_grad_(False)
    return Base(model, byte_tokenizer(), "small", None, digest(model))


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({}, RANKS | CODES),
        ({"sample_windows": 40}, RANKS | CODES),
        ({"code": "ranks"}, RANKS),
        ({"code": "ranks", "sample_windows": 40}, RANKS),
        ({"code": "bits"}, CODES),
        ({"code": "bits", "code_tune_steps": 0}, CODES - {"step sizes"}),
        ({"code": "ranks", "scores": "order", "adapter_rank": 0, "post_tune_steps": 0, "max_prune_steps": 50}, RANKS - {"scores"}),
    ],
    ids=["both", "both, many windows", "ranks", "ranks, many windows", "bits", "bits without training", "pruning"],
)
def test_every_phase_of_the_recipe_has_a_time(changes: dict[str, Any], phases: set[str], small_base: str) -> None:
    forecast = rehearse(job_of(**changes), load_base(small_base), CPU)
    assert forecast.seconds.keys() == phases
    assert all(seconds > 0 for seconds in forecast.seconds.values())
    assert forecast.total_s == pytest.approx(sum(forecast.seconds.values()))


def test_text_that_the_model_writes_has_a_time_per_batch(small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ticks = load_base(small_base), itertools.count()
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))  # each phase takes a second
    seconds = []
    for windows in (64, 65):
        half = job_of(code="bits", code_tune_steps=0, sample_windows=2 * windows)
        job = replace(half, data=Mixture((("package:wikipedia", 1.0), ("self", 1.0))))
        seconds.append(rehearse(job, base, CPU).seconds["sampled text"])
    assert seconds == [2 * 64 / rehearsal.WRITTEN, 2 * 2 * 64 / rehearsal.WRITTEN], "batches have 64 texts, 32 at once, of 64 tokens"


def test_only_a_few_of_the_sample_windows_are_read(small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(model: Any, linears: Any, windows: torch.Tensor, *args: Any, **options: Any) -> Any:
        read.append(len(windows))
        return layer_statistics(model, linears, windows, *args, **options)

    monkeypatch.setattr(rehearsal, "layer_statistics", counted)
    assert rehearse(job_of(code="bits", code_tune_steps=0, sample_windows=4000), load_base(small_base), CPU).total_s > 0
    assert set(read) == {rehearsal.SAMPLED}


def test_the_bytes_of_the_artifact_are_predicted(tmp_path: Path) -> None:
    """The model has random weights, too, so that only the extrapolation is tested."""
    base = base_of(LlamaConfig(**GROUPED | {"num_hidden_layers": 7, "hidden_size": 64, "intermediate_size": 128}))
    recipe, linears = replace(RECIPE, code="bits", code_tune_steps=0), dict(find_linears(base.model))
    windows = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    Artifact.save_coded(tmp_path / "a", base, recipe, code_model(linears, layer_statistics(base.model, linears, windows)), {})
    actual = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    forecast = rehearse(job_of(code="bits", code_tune_steps=0), base, CPU)
    assert forecast.artifact_bytes == pytest.approx(actual, rel=0.1)


def test_a_forecast_grows_by_the_same_amount_per_block() -> None:
    one, two = Forecast({"codes": 3.0, "save": 2.0}, 100.0), Forecast({"codes": 5.0, "save": 1.5}, 160.0)
    assert one.extrapolated(two, 4) == Forecast({"codes": 9.0, "save": 2.0}, 280.0)
    assert one.extrapolated(two, 1) == one


def test_blocks_of_all_types_are_rehearsed() -> None:
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**GROUPED | {"num_hidden_layers": 3}, head_dim=16, sliding_window=4, layer_types=layers)
    base = base_of(config)
    assert rehearse(job_of(code="bits", code_tune_steps=0), base, CPU).artifact_bytes > 0
    assert base.model.config.num_hidden_layers == 3, "the model is left as it was"


def test_parts_of_exclude_may_name_blocks_that_are_not_rehearsed(small_base: str) -> None:
    last = load_base(small_base).model.config.num_hidden_layers - 1
    exclude = (f"layers.{last}.", "up_proj")
    assert rehearse(job_of(exclude=exclude, code="bits", code_tune_steps=0), load_base(small_base), CPU).total_s > 0


def test_a_model_that_cannot_be_shortened_is_refused(small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(small_base)
    monkeypatch.setattr(type(base.model), "_from_config", lambda *args, **options: 1 / 0)
    with pytest.raises(BaseModelError, match="LlamaForCausalLM can't be made with fewer blocks"):
        rehearse(job_of(), base, CPU)
