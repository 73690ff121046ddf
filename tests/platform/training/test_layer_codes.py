"""With `code: both` or `code: bits` in the recipe, a calibration job codes the layers of the base model and stores them in the artifact.

A job that was killed while it coded reads the finished layers back, and its codes are the same as without the kill.
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from acip_platform.reporting.report import Subject, facts, page
from acip_platform.scheduling.fleet import Fleet, FleetError, Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.storage.code_checkpoints import FILE
from acip_platform.storage.store import StoreError
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Run, Tracking
from acip_platform.training.layer_codes import codes_of, gathered_statistics
from acip_platform.training.worker import calibrate_one, check_memory
from transformers import LlamaConfig, LlamaForCausalLM

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration import memory_check, memory_plan
from acip.calibration.block_pass import PassFiles
from acip.calibration.state import SUMS
from acip.coding.coded_model import CodedModel
from acip.data import WINDOWS_VERSION
from acip.errors import BaseModelError, BudgetError, CalibrationError, RecipeError
from acip.evaluate import divergence_of
from acip.layers.targets import find_linears, weight_MN
from acip.recipe import Recipe
from acip.sizing.budget import Budget, is_coded
from acip.sizing.excess_loss_area import excess_loss_area
from tests.conftest import logits, write_fleet
from tests.support.coded import load_bytes
from tests.support.waiting import PATIENCE_S

RECIPE = Recipe(
    basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0, sample_windows=4, batch_size=4, seq_len=64, dtype="float32",
    code="both", code_tune_steps=2,
)  # fmt: skip


def job_of(base: str, **fields: Any) -> Job:
    return Job(
        "small", base, RECIPE, "package:wikipedia", eval_context=64, eval_windows=2, sizes=(1.0, 0.5), cpus=1,
        domains=("package:code", "chat"), **fields,
    )  # fmt: skip


def calibrated(
    base: str, recipe: Recipe, home: Path, available: float, monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int] = ("", 0)
) -> tuple[Artifact, list[dict[str, Any]]]:
    """Run a job with this many bytes of memory. Return its artifact and its events. KilledError at the event `stop_at` (what, done)."""
    monkeypatch.setattr("acip_platform.training.worker.memory_check.available", lambda model, device: available)
    settings = Settings.from_env({"ACIP_HOME": str(home)})
    job = replace(job_of(base), recipe=recipe)
    run = Tracking(settings, "test").start(job.name, job.fingerprint, {})
    events: list[dict[str, Any]] = []

    def put(event: dict[str, Any]) -> None:
        events.append(event)
        if (event.get("what"), event.get("done")) == stop_at:
            raise KilledError

    queue = SimpleNamespace(put=SimpleNamespace(remote=put))
    config = {"job": job.to_dict(), "settings": settings, "run": run.run_id, "attempt": "first", "threads": 1, "events": queue}
    summary = calibrate_one(config | {"fingerprint": job.fingerprint})
    return Artifact.open(summary["uri"].removeprefix("file://"), verify=True), events


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"code": "bits"}, ["code", "measure"]),
        ({"code": "ranks", "basis": "fisher", "scores": "fisher", "adapter_rank": 2}, ["parametrize", "scores"]),
        ({"code": "both", "basis": "fisher", "scores": "fisher"}, ["code", "parametrize", "scores", "measure"]),
    ],
    ids=["bits", "ranks", "both"],
)
def test_a_streamed_job_writes_the_same_artifact_and_curve(
    changes: dict[str, Any], phases: list[str], small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory has room for one block at a time only."""
    monkeypatch.setattr(memory_plan, "STREAMED_HIDDEN", 1000)
    monkeypatch.setattr(memory_plan, "KEPT_LOGITS_BYTES", 1 << 24)
    model, recipe = load_base(small_base, "float32").model, replace(RECIPE, code_tune_steps=0, **changes)
    least = max(phase.total for phase in memory_plan.predict_streamed(model, recipe, context=64).values()) * 1.06
    assert memory_check.plan(model, recipe, math.inf, context=64).streamed == ()
    assert set(memory_check.plan(model, recipe, least, context=64).streamed) >= set(phases)
    expected, held = calibrated(small_base, recipe, tmp_path / "whole", math.inf, monkeypatch)
    assert any(" Fisher bases" in event.get("text", "") for event in held) == (recipe.code == "both")
    streamed, events = calibrated(small_base, recipe, tmp_path / "streamed", least, monkeypatch)
    assert any(f"a block at a time: {', '.join(phases)}" in event.get("text", "") for event in events)
    assert not any(event.get("text", "").startswith("trial step") for event in events)
    assert streamed.manifest["files"] == expected.manifest["files"]
    for row, other in zip(streamed.curve, expected.curve, strict=True):
        assert (row["bytes"], row["asked"], row["got"]) == (other["bytes"], other["asked"], other["got"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert not [*(tmp_path / "streamed" / "cache" / "statistics").glob("*/*"), *(tmp_path / "streamed" / "cache" / "ranks").glob("*/*")]


def test_bases_from_the_passes_of_the_codes_need_memory_and_are_the_same(
    small_base: str, golden_tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = load_base(small_base, "float32").model, replace(RECIPE, basis="fisher", scores="fisher")
    shared = memory_plan.predict_shared(model, recipe)
    assert shared is not None
    assert shared.total >= next(phase.total for phase in memory_plan.predict(model, recipe).phases if phase.name == "code")
    assert [memory_check.fits_shared(model, recipe, shared.total * factor) for factor in (1.0, 1.1)] == [False, True]
    for other in (replace(recipe, code="bits"), replace(recipe, code="ranks"), replace(recipe, basis="covariance")):
        assert not memory_check.fits_shared(model, other, math.inf)
    together, _ = calibrated(small_base, recipe, tmp_path / "together", math.inf, monkeypatch)
    monkeypatch.setattr(memory_check, "fits_shared", lambda *args: False)
    apart, events = calibrated(small_base, recipe, tmp_path / "apart", math.inf, monkeypatch)
    assert not any(" Fisher bases" in event.get("text", "") for event in events)
    assert together.manifest["files"] == apart.manifest["files"]


def test_a_streamed_job_that_was_stopped_continues_with_its_files(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "STREAMED_HIDDEN", 1000)
    model, recipe = load_base(small_base, "float32").model, replace(RECIPE, code="ranks", basis="fisher", scores="fisher")
    least = max(phase.total for phase in memory_plan.predict_streamed(model, recipe, context=64).values()) * 1.06
    with pytest.raises(KilledError):
        calibrated(small_base, recipe, tmp_path, least, monkeypatch, ("scores", 3))
    (folder,) = (tmp_path / "cache" / "ranks").glob("*/*")
    assert list(folder.glob("directions-*"))
    artifact, events = calibrated(small_base, recipe, tmp_path, least, monkeypatch)
    assert {event["what"] for event in events if event["kind"] == "code"} - {"curve"} == {"scores"}
    assert [row["asked"] for row in artifact.curve] == [1.0, 0.5]
    assert not folder.exists()


def test_a_model_that_cannot_be_run_by_block_is_run_whole(small_base: str, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    """Two lists of blocks are not a chain. A job that must be streamed is refused."""
    base = load_base(small_base, "float32")
    base.model.more = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    linears = {name: layer for name, layer in find_linears(base.model).items() if not name.startswith("more")}
    gather = functools.partial(
        gathered_statistics, base, linears, golden_tokens[:2], RECIPE, PassFiles(tmp_path), torch.device("cpu"), lambda kind, **facts: None
    )
    assert gather(False).keys() == linears.keys()
    with pytest.raises(BaseModelError, match="2 lists of blocks"):
        gather(True)


def test_tasks_are_refused_for_a_model_that_must_be_streamed(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip_platform.training.worker.memory_check.check", lambda *args: memory_plan.Memory((
        memory_plan.Phase("measure", streamed=True),
    )))  # fmt: skip
    job = replace(job_of(small_base), tasks=("package:piqa",))
    with pytest.raises(CalibrationError, match="Remove `tasks`"):
        check_memory(job, load_base(small_base, "float32"), torch.device("cpu"), lambda kind, **facts: None)


def test_the_step_sizes_of_a_model_that_does_not_fit_are_not_trained() -> None:
    """The message names the settings with which the model is streamed."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    recipe = Recipe(code="bits")
    assert memory_check.check(model, recipe, 80e9, "cuda", context=2048).streamed == ()
    with pytest.raises(CalibrationError, match=r"Its peak is in tune: .* Changes that fit: .*code: bits, code_tune_steps: 0"):
        memory_check.check(model, recipe, 8e9, "cuda", context=2048)
    assert memory_check.check(model, replace(recipe, code_tune_steps=0), 8e9, "cuda", context=2048).streamed == ("code", "measure")


def test_a_recipe_that_trains_needs_the_whole_model() -> None:
    """The message names the settings with which the model is streamed."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    phases: tuple[str, ...] = ("parametrize", "scores")
    for recipe, change in (
        (Recipe(), "post_tune_steps: 0"),
        (Recipe(scores="order", total_steps=5), "scores: fisher, post_tune_steps: 0, total_steps: null"),
        (Recipe(code="both"), "post_tune_steps: 0, code_tune_steps: 0"),
    ):
        with pytest.raises(CalibrationError, match=rf"Pruning and post-tuning need the whole model\. Changes that fit: .*{change} \("):
            memory_check.check(model, recipe, 16e9, "cuda", context=2048)
        changed = replace(recipe, scores="fisher", post_tune_steps=0, total_steps=None, code_tune_steps=0)
        streamed = (*(["code"] if recipe.code == "both" else []), *phases, "measure")
        assert memory_check.check(model, changed, 16e9, "cuda", context=2048).streamed == streamed


def test_the_trials_of_a_sweep_are_not_streamed(small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_plan.Memory((memory_plan.Phase("parametrize", streamed=True),))
    monkeypatch.setattr("acip_platform.training.worker.memory_check.check", lambda *args: memory)
    base, device = load_base(small_base, "float32"), torch.device("cpu")
    check_memory(job_of(small_base), base, device, lambda kind, **facts: None)
    with pytest.raises(CalibrationError, match="trials of a sweep hold the whole model"):
        check_memory(job_of(small_base), base, device, lambda kind, **facts: None, held=True)


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
    ranks, coded_rows = ([row for row in artifact.curve if is_coded(row) is kind] for kind in (False, True))
    assert [row["asked"] for row in ranks] == [1.0, 0.5]
    sizes = artifact.table().byte_sizes
    assert sizes is not None and sizes.loss is not None and sizes.kl is not None, "budgets of a loss choose codes"
    assert {row["asked"] for row in coded_rows} <= set(job.byte_sizes) and coded_rows
    assert all(row["got"] <= row["asked"] for row in coded_rows)
    whole, rest = artifact.load(), artifact.tensors("rest").data_bytes
    divergences = []
    for total in (artifact.coded().order.totals[0], artifact.coded().order.totals[-1]):
        model, stored_bytes = load_bytes(artifact, rest + total)
        assert stored_bytes == rest + total
        base_TV, coded_TV = (logits(each, heldout_tokens[:4]).log_softmax(-1) for each in (whole.model, model))
        divergences.append(float((base_TV.exp() * (base_TV - coded_TV)).sum(-1).mean()))
    assert divergences[1] < 1e-3 < divergences[0] < 1, "nats per token, at 6 and at 2.1 bits per weight"
    coded = {event["what"] for event in events if event["kind"] == "code"}
    assert coded == {"statistics", "codes", "step sizes"}
    (stage,) = (event["text"] for event in events if event["kind"] == "stage" and event["text"].startswith("codes of"))
    assert f"{artifact.coded().bytes / 1e6:.1f} MB" in stage
    assert not list(Path(settings.runs).glob("first/codes_*")), "the artifact holds the codes, so they are not kept beside the checkpoints"
    smallest = coded_rows[-1]
    assert f"size {smallest['asked']:g} of the bytes: perplexity {smallest['perplexity']:.2f}" in [event.get("text") for event in events]
    (step,) = {metric.step for metric in run.client.get_metric_history(run.run_id, "bytes/tradeoff/perplexity")} - {
        round(1000 * row["asked"]) for row in coded_rows[:-1]
    }
    assert step == round(1000 * smallest["asked"])
    (kl,) = (metric.value for metric in run.client.get_metric_history(run.run_id, "bytes/tradeoff/kl_nats") if metric.step == step)
    assert kl == divergence_of(smallest)["kl_nats"]
    version = Registry(settings).resolve("small")
    cut = artifact.table().cut(Budget(max_kl=0.05))
    assert version.tags["close_to_base"] == f"{cut.sizes['bytes']:.3f} of the bytes, {(cut.bytes or 0) / 1e6:.1f} MB"
    page = run.client.get_model_version("small", version.version).description
    assert page is not None and "| of the bytes |" in page and version.tags["close_to_base"] in page
    files = {item.path for item in run.client.list_artifacts(run.run_id)}
    assert {"perplexity_over_bytes.png", "kl_over_bytes.png", "perplexity_over_flops.png"} <= files
    metrics = run.client.get_run(run.run_id).data.metrics
    assert metrics["coding_seconds"] > 0
    assert metrics["code_tuning_seconds"] > 0
    assert metrics["codes_mb"] == pytest.approx(artifact.coded().bytes / 1e6)


def settings_of(home: Path, checkpoint_s: float = 60.0) -> Settings:
    return Settings.from_env({"ACIP_HOME": str(home), "ACIP_CHECKPOINT_S": str(checkpoint_s)})


class Unused:
    """A run that must not be used."""


def test_the_default_recipe_codes_nothing(small_base: str, tmp_path: Path) -> None:
    base = load_base(small_base, "float32")
    job = replace(job_of(small_base), recipe=replace(RECIPE, code="ranks"))
    checkpoints = Checkpoints(settings_of(tmp_path), "small")
    assert codes_of(job, base, torch.zeros(0, 64), cast(Run, Unused()), lambda kind, **facts: pytest.fail(kind), checkpoints) is None


def test_several_workers_are_refused(small_base: str, tmp_path: Path) -> None:
    base = load_base(small_base, "float32")
    job, checkpoints = job_of(small_base, num_workers=2), Checkpoints(settings_of(tmp_path), "small")
    with pytest.raises(RecipeError, match="code is 'both' and num_workers is 2"):
        codes_of(job, base, torch.zeros(4, 64), cast(Run, Unused()), lambda kind, **facts: None, checkpoints)
    fleet = write_fleet(tmp_path / "fleet.yaml", "code: both, post_tune_steps: 1", f"name: small, base: {small_base}, num_workers: 2")
    with pytest.raises(FleetError, match="num_workers is 2 and code 'both'"):
        Fleet.load(fleet)


def test_coding_does_not_change_the_model(small_base: str, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    base, unchanged = load_base(small_base, "float32"), load_base(small_base, "float32").model
    run = SimpleNamespace(metrics=lambda rows: None)
    checkpoints = Checkpoints(settings_of(tmp_path), "small")
    coded = codes_of(job_of(small_base), base, golden_tokens[:8], cast(Run, run), lambda kind, **facts: None, checkpoints)
    assert coded is not None
    assert list(coded.versions) == list(find_linears(base.model))
    for name, linear in find_linears(base.model).items():
        assert torch.equal(weight_MN(linear), weight_MN(find_linears(unchanged)[name]))
        assert not linear._forward_hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())


def test_step_sizes_are_trained_as_the_recipe_says(small_base: str, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    """Training changes step sizes, and no stream."""
    base, run = load_base(small_base, "float32"), SimpleNamespace(metrics=lambda rows: None)
    untrained, trained = (
        codes_of(
            replace(job_of(small_base), recipe=replace(RECIPE, code_tune_steps=steps)), base, golden_tokens[:8], cast(Run, run),
            lambda kind, **facts: None, Checkpoints(settings_of(tmp_path / str(steps)), "small"),
        )
        for steps in (0, 3)
    )  # fmt: skip
    assert untrained is not None and trained is not None
    changed = set()
    for name, versions in untrained.versions.items():
        for before, after in zip(versions, trained.versions[name], strict=True):
            assert bytes(before.stream) == bytes(after.stream)
            changed |= set() if torch.equal(before.steps, after.steps) else {name}
    assert changed == set(untrained.versions)


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


def test_a_job_with_bits_alone_stores_codes_and_no_directions(small_base: str, tmp_path: Path, heldout_tokens: torch.Tensor) -> None:
    """Nothing is parametrized or trained. The curve holds size 1.0, the base model bit for bit, and sizes in bytes."""
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    job = replace(job_of(small_base), recipe=replace(RECIPE, code="bits", dtype="bfloat16", adapter_rank=4, adapter="layer"))
    run = Tracking(settings, "test").start(job.name, job.fingerprint, {})
    events: list[dict[str, Any]] = []
    queue = SimpleNamespace(put=SimpleNamespace(remote=events.append))
    config = {
        "job": job.to_dict(), "settings": settings, "run": run.run_id, "attempt": "first", "threads": 1, "events": queue,
        "fingerprint": job.fingerprint,
    }  # fmt: skip
    summary = calibrate_one(config)
    assert not {"parametrize", "step"} & {event["kind"] for event in events}
    artifact = Artifact.open(summary["uri"].removeprefix("file://"), verify=True)
    assert (artifact.recipe.code, artifact.manifest["steps"], artifact.manifest["stop_step"]) == ("bits", 0, 0)
    assert {row["stored_rank"] for row in artifact.manifest["layers"]} == {0}
    assert [row["asked"] for row in artifact.curve if not is_coded(row)] == [1.0]
    assert {row["asked"] for row in artifact.curve if is_coded(row)} <= set(job.byte_sizes) and len(artifact.curve) > 2
    assert max(row["got"] for row in artifact.curve if is_coded(row)) < 0.62, "larger sizes are the base model, losslessly coded"
    tags = Registry(settings).resolve("small").tags
    assert float(tags["area"]) == pytest.approx(excess_loss_area(artifact.curve), rel=1e-4)
    assert "of the bytes" in tags["close_to_base"]

    base = load_base(small_base, "bfloat16")
    whole = artifact.load()
    assert torch.equal(logits(whole.model, heldout_tokens[:2]), logits(base.model, heldout_tokens[:2]))
    assert whole.cut is not None and set(whole.cut.ranks.values()) == {None}
    assert whole.table.dense_params + whole.table.rest_params == base.model.num_parameters()
    for budget in (Budget(ratio=0.9), Budget(ratio=0.9, convention="paper"), Budget(params=1000)):
        with pytest.raises(BudgetError, match="holds codes only"):
            whole.resize(budget)
    codes, rest = artifact.coded(), artifact.tensors("rest").data_bytes
    model, stored_bytes = load_bytes(artifact, rest + codes.order.totals[-1])
    assert stored_bytes == rest + codes.order.totals[-1] < artifact.tensors("rest").decoded_bytes + artifact.tensors("dense").decoded_bytes
    assert logits(model, heldout_tokens[:2]).isfinite().all()
    again = calibrate_one(config)
    assert (again["uri"], again["version"], again["curve"]) == (summary["uri"], summary["version"], artifact.curve)
    subjects = [Subject(job.name, summary["uri"], artifact)]
    assert "holds codes" not in page(facts(subjects, {}, "bits"), subjects)


# ---- resume


LAYERS = 28  # of the small model
FINISHED = 5  # layers before the kill


class KilledError(Exception):
    """The error that stops a job."""


def code(
    base: str, home: Path, kill: Callable[[], Any] = lambda: None, checkpoint_s: float = 1e-9, **recipe: Any
) -> tuple[CodedModel, list[dict[str, Any]]]:
    """Code the layers of the small model, and return the codes and the events. `kill` is called after FINISHED layers.

    By default, every layer is stored as soon as it is finished.
    """
    events: list[dict[str, Any]] = []

    def emit(kind: str, **facts: Any) -> None:
        events.append({"kind": kind, **facts})
        if facts.get("what") == "codes" and facts["done"] == FINISHED + 1:  # which is not stored yet
            kill()

    torch.set_num_threads(1)
    job = replace(job_of(base), recipe=replace(RECIPE, **recipe))
    windows = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    run = SimpleNamespace(metrics=lambda rows: None)
    checkpoints = Checkpoints(settings_of(home, checkpoint_s), "small", emit)
    coded = codes_of(job, load_base(base, "float32"), windows, cast(Run, run), emit, checkpoints)
    assert coded is not None
    return coded, events


def code_until_killed(base: str, home: Path) -> None:
    code(base, home, kill=lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop() -> None:
    raise KilledError


def stages(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["kind"] == "stage")


def done(events: list[dict[str, Any]], what: str) -> list[int]:
    return [event["done"] for event in events if event.get("what") == what]


def assert_same_codes(coded: CodedModel, expected: CodedModel) -> None:
    assert list(coded.versions) == list(expected.versions)
    assert coded.order.versions == expected.order.versions
    assert coded.order.steps == expected.order.steps
    for name, versions in coded.versions.items():
        for version, other in zip(versions, expected.versions[name], strict=True):
            assert version.stream == other.stream
            assert torch.equal(version.steps, other.steps)
            assert version.inputs == other.inputs


@pytest.fixture(scope="module")
def uninterrupted(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> CodedModel:
    coded, events = code(small_base, tmp_path_factory.mktemp("home"))
    assert len(coded.versions) == LAYERS
    assert "read back" not in stages(events)
    assert done(events, "codes") == list(range(1, LAYERS + 1))
    return coded


def test_a_killed_process_codes_only_the_missing_layers(small_base: str, tmp_path: Path, uninterrupted: CodedModel) -> None:
    process = multiprocessing.get_context("spawn").Process(target=code_until_killed, args=(small_base, tmp_path))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL
    coded, events = code(small_base, tmp_path)
    assert f"read back the codes of {FINISHED} of {LAYERS} layers" in stages(events)
    assert done(events, "codes") == list(range(FINISHED + 1, LAYERS + 1))
    assert_same_codes(coded, uninterrupted)


def test_a_job_that_has_coded_all_layers_reads_them_back_without_the_text(
    small_base: str, tmp_path: Path, uninterrupted: CodedModel
) -> None:
    """So a calibration that resumes at a later stage does not gather statistics again."""
    code(small_base, tmp_path, checkpoint_s=60.0)
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 1, "one write after the last layer"
    coded, events = code(small_base, tmp_path)
    assert f"read back the codes of {LAYERS} of {LAYERS} layers" in stages(events)
    assert done(events, "statistics") == done(events, "codes") == []
    assert_same_codes(coded, uninterrupted)


@pytest.mark.parametrize("how", ["changed", "cut", "no checksum"])
def test_damaged_codes_are_coded_again(small_base: str, tmp_path: Path, uninterrupted: CodedModel, how: str) -> None:
    with pytest.raises(KilledError):
        code(small_base, tmp_path, kill=stop)
    folders = sorted((tmp_path / "runs" / "small").iterdir())
    assert len(folders) == FINISHED
    file = folders[0] / FILE
    if how == "no checksum":
        (folders[0] / SUMS).write_text("")
    else:
        file.write_bytes(file.read_bytes()[:-3] + (b"abc" if how == "changed" else b""))
    for damaged in (1, 1):  # it is reported again, as it stays there
        coded, events = code(small_base, tmp_path)
        assert stages(events).count("are damaged") == damaged
        assert_same_codes(coded, uninterrupted)
    assert done(events, "codes") == [], "the layer was stored again"


def test_codes_of_other_settings_are_not_used(small_base: str, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        code(small_base, tmp_path, kill=stop)
    for recipe in ({"seed": 1}, {"sample_windows": 3}, {"exclude": ("q_proj",)}):
        _, events = code(small_base, tmp_path, checkpoint_s=60.0, **recipe)
        assert "read back" not in stages(events)


def test_a_store_that_cannot_be_written_does_not_stop_the_job(
    small_base: str, tmp_path: Path, uninterrupted: CodedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise StoreError("can't write: no space")

    monkeypatch.setattr("acip_platform.storage.store.Store.add", fail)
    coded, events = code(small_base, tmp_path)
    assert "could not write the codes of 1 layers: can't write: no space" in stages(events)
    assert_same_codes(coded, uninterrupted)
