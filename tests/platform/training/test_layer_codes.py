"""With `code: both` in the recipe, a calibration job codes the layers of the base model and stores them in the artifact."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from acip_platform.scheduling.fleet import Fleet, FleetError, Job
from acip_platform.settings import Settings
from acip_platform.tracking.runs import Run, Tracking
from acip_platform.training.layer_codes import code_layers
from acip_platform.training.worker import calibrate_one

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.data import WINDOWS_VERSION
from acip.errors import RecipeError
from acip.layers.targets import find_linears, weight_MN
from acip.recipe import Recipe
from tests.conftest import logits, write_fleet
from tests.support.coded import load_bytes

RECIPE = Recipe(
    basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0, sample_windows=4, batch_size=4, seq_len=64, dtype="float32",
    code="both", code_tune_steps=2,
)  # fmt: skip


def job_of(base: str, **fields: Any) -> Job:
    return Job(
        "small", base, RECIPE, "package:wikipedia", eval_context=64, eval_windows=2, sizes=(1.0, 0.5), cpus=1, **fields
    )  # fmt: skip


def test_a_calibration_job_stores_the_codes(small_base: str, tmp_path: Path, heldout_tokens: torch.Tensor) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    job = job_of(small_base)
    run = Tracking(settings, "test").start(job.name, job.fingerprint, {})
    events: list[dict[str, Any]] = []
    queue = SimpleNamespace(put=SimpleNamespace(remote=events.append))
    summary = calibrate_one(
        {
            "job": job.to_dict(), "settings": settings, "run": run.run_id, "attempt": "first", "threads": 1, "events": queue,
            "fingerprint": job.fingerprint,
        }
    )  # fmt: skip
    artifact = Artifact.open(summary["uri"].removeprefix("file://"), verify=True)
    assert artifact.manifest["schema"] == 5
    assert artifact.recipe.code == "both"
    assert [row["asked"] for row in artifact.curve] == [1.0, 0.5]
    whole, rest = artifact.load(), artifact.tensors("rest").data_bytes
    divergences = []
    for total in (artifact.coded().order.totals[0], artifact.coded().order.totals[-1]):
        model, stored_bytes = load_bytes(artifact, rest + total)
        assert stored_bytes == rest + total
        base_TV, coded_TV = (logits(each, heldout_tokens[:4]).log_softmax(-1) for each in (whole.model, model))
        divergences.append(float((base_TV.exp() * (base_TV - coded_TV)).sum(-1).mean()))
    assert divergences[1] < 1e-3 < divergences[0] < 1, "nats per token, at 7.5 and at 1.5 bits per weight"
    coded = {event["what"] for event in events if event["kind"] == "code"}
    assert coded == {"statistics", "codes", "step sizes"}
    (stage,) = (event["text"] for event in events if event["kind"] == "stage" and event["text"].startswith("codes of"))
    assert f"{artifact.coded().bytes / 1e6:.1f} MB" in stage
    metrics = run.client.get_run(run.run_id).data.metrics
    assert metrics["coding_seconds"] > 0
    assert metrics["code_tuning_seconds"] > 0
    assert metrics["codes_mb"] == pytest.approx(artifact.coded().bytes / 1e6)


class Unused:
    """A run that must not be used."""


def test_the_default_recipe_codes_nothing(small_base: str) -> None:
    base = load_base(small_base, "float32")
    job = replace(job_of(small_base), recipe=replace(RECIPE, code="ranks"))
    assert code_layers(job, base, torch.zeros(0, 64), cast(Run, Unused()), lambda kind, **facts: pytest.fail(kind)) is None


def test_several_workers_are_refused(small_base: str, tmp_path: Path) -> None:
    base = load_base(small_base, "float32")
    with pytest.raises(RecipeError, match="code is 'both' and num_workers is 2"):
        code_layers(job_of(small_base, num_workers=2), base, torch.zeros(4, 64), cast(Run, Unused()), lambda kind, **facts: None)
    fleet = write_fleet(tmp_path / "fleet.yaml", "code: both, post_tune_steps: 1", f"name: small, base: {small_base}, num_workers: 2")
    with pytest.raises(FleetError, match="num_workers is 2 and code 'both'"):
        Fleet.load(fleet)


def test_coding_does_not_change_the_model(small_base: str, golden_tokens: torch.Tensor) -> None:
    base, unchanged = load_base(small_base, "float32"), load_base(small_base, "float32").model
    run = SimpleNamespace(metrics=lambda rows: None)
    coded = code_layers(job_of(small_base), base, golden_tokens[:8], cast(Run, run), lambda kind, **facts: None)
    assert coded is not None
    assert list(coded.versions) == list(find_linears(base.model))
    for name, linear in find_linears(base.model).items():
        assert torch.equal(weight_MN(linear), weight_MN(find_linears(unchanged)[name]))
        assert not linear._forward_hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())


def test_step_sizes_are_trained_as_the_recipe_says(small_base: str, golden_tokens: torch.Tensor) -> None:
    """Training changes the step sizes of the coarsest versions, and no stream."""
    run = SimpleNamespace(metrics=lambda rows: None)
    untrained, trained = (
        code_layers(
            replace(job, recipe=replace(RECIPE, code_tune_steps=steps)), load_base(small_base, "float32"), golden_tokens[:8],
            cast(Run, run), lambda kind, **facts: None,
        )
        for job, steps in ((job_of(small_base), 0), (job_of(small_base), 3))
    )  # fmt: skip
    assert untrained is not None and trained is not None
    for name, version in untrained.order.first.items():
        before, after = untrained.versions[name][version], trained.versions[name][version]
        assert before.stream == after.stream
        assert not torch.equal(before.steps, after.steps)


def test_calibrations_from_before_the_fields_stay_finished() -> None:
    """The fields for codes are not part of the fingerprint of a recipe without codes, which was recorded before they existed."""
    job = Job("a", "b/c")
    recipe = {
        name: value for name, value in job.recipe.to_dict().items() if name not in {"code", "code_tune_steps", "gradient_checkpointing"}
    }
    inputs = {"base": "b/c", "recipe": recipe, "data": "c4", "schema": 4, "windows": WINDOWS_VERSION}
    assert job.fingerprint == hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    with_codes = replace(job, recipe=replace(job.recipe, code="both"))
    assert with_codes.fingerprint != job.fingerprint
    assert replace(with_codes, recipe=replace(with_codes.recipe, code_tune_steps=7)).fingerprint != with_codes.fingerprint
