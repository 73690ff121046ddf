"""A checkpoint in the published format gives the results that the published implementation recorded.

The published implementation saved golden/reference-trace/checkpoint. Its logits at each size were recorded.
"""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry, RegistryError
from acip_platform.tracking.runs import Tracking
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from acip.artifact.artifact import Artifact
from acip.artifact.published import INDEX, WEIGHTS, open_published
from acip.base import Base, load_base
from acip.calibration.result import Calibration
from acip.evaluate import perplexity
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, targets
from tests.conftest import GOLDEN, byte_tokenizer

CHECKPOINT = GOLDEN / "checkpoint"
JOB = Path(__file__).parents[3] / "jobs" / "import_published.py"
SIZES = json.loads((GOLDEN / "sizes.json").read_text())
PROBE = load_file(GOLDEN / "probe.safetensors")
Config = dict[str, Any]
Tensors = dict[str, Tensor]


def logits(model: Any, tokens: Tensor = PROBE["probe"]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens.long()).logits


def elastic(model: nn.Module) -> dict[str, ElasticLinear]:
    return {name: core for name, core in targets(model).items() if isinstance(core, ElasticLinear)}


def recorded_ranks(size: str, reset: bool, calibration: Calibration) -> dict[str, int | None]:
    """Return the recorded rank of each layer. With `reset`, layers that save nothing are dense (D.3 of the paper)."""
    ranks: dict[str, int | None] = {}
    for shape in calibration.table.layers:
        rank = SIZES[size]["ranks"][f"{shape.name}.base_layer.parametrization.mask"]
        ranks[shape.name] = None if reset and rank * (shape.M + shape.N) >= shape.M * shape.N else rank
    return ranks


def write(folder: Path, change: Callable[[Config, Tensors], object] = lambda config, tensors: None) -> Path:
    """Write golden's checkpoint with a change to `folder`."""
    config, tensors = json.loads((CHECKPOINT / "config.json").read_text()), load_file(CHECKPOINT / WEIGHTS)
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def shard(folder: Path) -> Path:
    """Split the weights of a checkpoint into two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((keys[::2], keys[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def opened(small_base: str) -> tuple[Base, Calibration]:
    return open_published(CHECKPOINT, small_base)


@pytest.fixture(scope="module")
def artifact(opened: tuple[Base, Calibration], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.save(tmp_path_factory.mktemp("published") / "artifact", *opened, {})


# ---- the recorded results are reproduced


@pytest.mark.parametrize("reset", ["", "reset_"])
@pytest.mark.parametrize("size", ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3"])
def test_logits_at_the_recorded_ranks(opened: tuple[Base, Calibration], size: str, reset: str) -> None:
    base, calibration = opened
    ranks = recorded_ranks(size, bool(reset), calibration)
    for name, layer in elastic(base.model).items():
        layer.set_rank(ranks[name])
    torch.testing.assert_close(logits(base.model), PROBE[f"logits_{reset}{size}"], rtol=0, atol=1e-3)


def test_the_loss_after_calibration_is_the_recorded_one(opened: tuple[Base, Calibration]) -> None:
    """The model with all directions whose final score is above 0 has the recorded loss."""
    base, calibration = opened
    for name, layer in elastic(base.model).items():
        layer.set_rank(int((calibration.scores.of(name) > 0).sum()))
    assert perplexity(base.model, PROBE["hold"], 32).loss == pytest.approx(SIZES["as_calibrated"]["loss"], abs=1e-4)


@pytest.mark.parametrize("size", ["1.0", "0.5", "0.4", "0.3"])
def test_the_artifact_on_disk_gives_the_recorded_logits(artifact: Artifact, opened: tuple[Base, Calibration], size: str) -> None:
    """At 1.0 every layer is dense, and at the other sizes no layer is. Between these sizes an artifact also counts the adapters."""
    any_size = artifact.load()
    ranks = recorded_ranks(size, True, opened[1])
    assert {rank is None for rank in ranks.values()} == {size == "1.0"}
    for name, layer in any_size.layers.items():
        layer.set_rank(ranks[name])
    torch.testing.assert_close(logits(any_size.model), PROBE[f"logits_reset_{size}"], rtol=0, atol=1e-3)
    torch.testing.assert_close(logits(any_size.materialize()), PROBE[f"logits_reset_{size}"], rtol=0, atol=1e-3)


def test_the_artifact_opens_resizes_and_materializes(artifact: Artifact, small_base: str) -> None:
    Artifact.open(artifact.folder, verify=True)
    any_size = artifact.load()
    cut = any_size.resize(0.45)
    assert 0.44 < cut.got <= 0.45
    assert logits(any_size.materialize()).isfinite().all()
    any_size.resize(1.0)
    assert torch.equal(logits(any_size.model), logits(load_base(small_base, "float32").model)), "size 1.0 is the base model bit for bit"


def test_scores_and_recipe_are_the_recorded_ones(opened: tuple[Base, Calibration]) -> None:
    _, calibration = opened
    recipe, scores = calibration.recipe, calibration.scores
    config = json.loads((GOLDEN / "config.json").read_text())
    for key, score in load_file(GOLDEN / "score_map.safetensors").items():
        assert torch.equal(scores.of(key.removesuffix(".base_layer.parametrization.mask")), score)
    assert (recipe.basis, recipe.convention, recipe.exclude) == ("svd", "paper", ())
    assert (recipe.adapter_rank, recipe.adapter_alpha, recipe.adapter_dropout) == (config["lora_r"], config["lora_alpha"], 0.0)
    assert (recipe.mask_scale, recipe.stop_ratio, recipe.dtype) == (config["mask_scale"], config["stop_ratio"], "float32")


def test_equal_scores_are_removed_in_the_order_of_singular_values(opened: tuple[Base, Calibration]) -> None:
    """Many directions share a score. Within a layer, the direction with the smaller singular value is removed first."""
    scores = opened[1].scores
    ties = 0
    for name, importance in scores.importance().items():
        ordered = scores.of(name)[importance]
        assert (ordered[:-1] >= ordered[1:]).all()
        tied = ordered[:-1] == ordered[1:]
        ties += int(tied.sum())
        assert (importance[:-1][tied] < importance[1:][tied]).all()
    assert ties > 50


# ---- forms of checkpoints


def test_shards_give_the_same_model(opened: tuple[Base, Calibration], small_base: str, tmp_path: Path) -> None:
    _, sharded = open_published(shard(write(tmp_path / "sharded")), small_base)
    assert torch.equal(sharded.scores.score, opened[1].scores.score)
    expected = elastic(opened[1].model)
    assert elastic(sharded.model).keys() == expected.keys()
    for name, layer in elastic(sharded.model).items():
        assert torch.equal(layer.left.values, expected[name].left.values)
        assert torch.equal(layer.right.values, expected[name].right.values)
        assert torch.equal(layer.loras["layer"].A, expected[name].loras["layer"].A)
        assert torch.equal(layer.loras["layer"].B, expected[name].loras["layer"].B)


def test_a_checkpoint_without_adapters_opens(small_base: str, tmp_path: Path) -> None:
    """Without adapters (D.2 of the paper), layers have the names of the base model."""

    def strip(config: Config, tensors: Tensors) -> None:
        config["adapter_config"] = None
        for key in list(tensors):
            tensor = tensors.pop(key)
            if "lora_" not in key:
                tensors[key.replace(".base_layer.", ".")] = tensor

    base, calibration = open_published(write(tmp_path / "plain", strip), small_base)
    for layer in elastic(base.model).values():
        layer.set_rank(layer.stored_rank)
    torch.testing.assert_close(logits(base.model), logits(load_base(small_base, "float32").model), rtol=0, atol=1e-3)
    any_size = Artifact.save(tmp_path / "artifact", base, calibration, {}).load()
    assert any_size.resize(0.5).got <= 0.5
    assert logits(any_size.model).isfinite().all()


def qwen(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """Write a base model with biases and tied embeddings, and its sharded checkpoint without `up_proj`. Return (checkpoint, base)."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, linear in find_linears(model, ("up_proj",)).items():
        W = tensors.pop(f"model.{name}.weight")
        U, S, _ = torch.linalg.svd(W.float(), full_matrices=False)
        ortho = (U / 0.02**0.5).to(dtype)
        at = f"model.{name}.base_layer.parametrization"
        score = torch.where(torch.rand(len(S)) < 0.7, -torch.randint(1, 40, S.shape).float(), 0.02 + 0.01 * torch.rand(len(S)))
        tensors |= {
            f"{at}.ortho.weight": ortho, f"{at}.base.weight": ortho.T @ W, f"{at}.S": S.to(dtype),
            f"{at}.mask": score.clamp(-0.01, 1).to(dtype), f"{at}.mask_score": score,
            f"model.{name}.lora_A.default.weight": 0.1 * torch.randn(4, W.shape[1]).to(dtype),
            f"model.{name}.lora_B.default.weight": 0.1 * torch.randn(W.shape[0], 4).to(dtype),
        }  # fmt: skip
        if getattr(linear, "bias", None) is not None:
            tensors[f"{at}.ortho.bias"] = tensors.pop(f"model.{name}.bias")

    def change(config: Config, target: Tensors) -> None:
        config["adapter_config"]["peft_config"]["default"] |= {"r": 4, "lora_alpha": 8}
        target.clear()
        target.update({key: tensor.clone() for key, tensor in tensors.items()})

    return shard(write(folder / "checkpoint", change)), folder / "base"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.08)])
def test_biases_tied_embeddings_excluded_layers_and_16_bit(tmp_path: Path, dtype: torch.dtype, atol: float) -> None:
    """The logits equal those of dense float32 weights computed from the checkpoint: s ortho diag(kept) base + alpha / R B A."""
    folder, source = qwen(tmp_path, dtype)
    base, calibration = open_published(folder, str(source))
    assert calibration.recipe.exclude == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    any_size = Artifact.save(tmp_path / "artifact", base, calibration, {}).load()
    assert any_size.model.dtype == dtype
    cut = any_size.resize(0.5)
    assert sum(rank is not None for rank in cut.ranks.values()) == len(cut.ranks)

    tensors = {key: tensor.float() for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    reference: Any = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    kept = torch.ones_like(calibration.scores.score)
    kept[calibration.scores.removal_order()[: cut.removed]] = 0
    parts = kept.split([shape.K for shape in calibration.table.layers])
    with torch.no_grad():
        for name, kept_K in zip(calibration.scores.names, parts, strict=True):
            at = f"model.{name}.base_layer.parametrization"
            W = 0.02 * tensors[f"{at}.ortho.weight"] * kept_K @ tensors[f"{at}.base.weight"]
            BA = tensors[f"model.{name}.lora_B.default.weight"] @ tensors[f"model.{name}.lora_A.default.weight"]
            reference.get_submodule(name).weight.copy_(W + 8 / 4 * BA)
    torch.testing.assert_close(logits(any_size.model).float(), logits(reference), rtol=0, atol=atol)


def test_the_base_model_is_the_one_the_checkpoint_names(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(config: Config, _: Tensors) -> None:
        config["base_model_config"]["pretrained_model_kwargs"]["pretrained_model_name_or_path"] = "some/base"

    folder = write(tmp_path / "checkpoint", rename)
    shutil.copytree(small_base, tmp_path / "some" / "base")
    monkeypatch.chdir(tmp_path)
    base, _ = open_published(folder)
    assert base.source == "some/base"
    assert base.digest == load_base(small_base, "float32").digest


# ---- the job


def test_the_job_registers_a_candidate(
    small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job converts, measures, stores and registers the model. The champion stays, and a second run adds nothing."""
    monkeypatch.setenv("ACIP_HOME", str(tmp_path))
    for name in ("ACIP_ARTIFACT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def job(*args: str) -> Any:
        monkeypatch.setattr(sys, "argv", [str(JOB), "--checkpoint", str(CHECKPOINT), "--name", "tiny", *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(JOB), run_name="__main__")
        return end.value.code

    settings = Settings.from_env()
    registry = Registry(settings)
    champion = registry.register("tiny", "/somewhere", Tracking(settings, "acip").start("tiny", "f", {}).run_id, {})
    registry.set_alias(champion)
    assert job() == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "not a hub id. Give the base model" in error
    with pytest.raises(RegistryError, match="no version or alias 'candidate'"):
        registry.resolve("tiny", "candidate")

    options = ("--base", small_base, "--eval-context", "64", "--eval-windows", "4")
    assert job(*options) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "│ 0.40 │" in output
    assert "version 2 of tiny, alias candidate" in output
    version = registry.resolve("tiny", "candidate")
    assert version.tags["base"] == small_base
    artifact = Artifact.open(version.uri, verify=True)
    assert [row["asked"] for row in artifact.curve] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert {(row["corpus"], row["context"], row["windows"]) for row in artifact.curve} == {("package:wikipedia", 64, 4)}
    tracking = Tracking(settings, "acip/published")
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["artifact_uri"] == version.uri
    assert run.data.metrics["tradeoff/perplexity"] > 0

    assert job(*options) == 0
    assert registry.resolve("tiny", "candidate").version == version.version
    assert registry.resolve("tiny").version == champion.version
    assert len(list(tmp_path.glob("artifacts/tiny/*"))) == 1
    assert not list(tmp_path.glob("saving-*"))
