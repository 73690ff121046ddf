"""The memory predicted from shapes matches what autograd saves and tensors occupy. A refusal names recipes that fit."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from acip.calibration import memory_plan
from acip.calibration.block_calibration import calibrate_by_block
from acip.calibration.block_pass import PassFiles
from acip.calibration.fisher_moments import FisherMoments
from acip.calibration.loop import calibrate, recomputing, trial_step
from acip.calibration.losses import next_token, objective
from acip.calibration.memory_check import available, check, fits, plan
from acip.calibration.memory_plan import CODED_BYTES, STATISTICS, VERSIONS, Memory, _Prediction, predict, predict_streamed, statistics_bytes
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState
from acip.coding.block_statistics import block_statistics
from acip.coding.coded_model import RATES, code_layer, code_model, step_scales
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.errors import CalibrationError
from acip.layers.block_chain import BlockChain, tensors
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, targets, weight_MN, with_matches
from acip.recipe import Basis, Dtype, Recipe
from acip.self_text import TOGETHER
from acip.utils.free_memory import control_group_memory
from acip.utils.generation import continued

IDS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**IDS, **SIZE, "num_key_value_heads": 2, "intermediate_size": 176}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2}

CAUSAL: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
    "gpt2": GPT2Config(**IDS, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "opt": OPTConfig(**IDS, **SIZE, ffn_dim=256, max_position_embeddings=64, word_embed_proj_dim=64),
}
RECIPE = Recipe(
    basis="svd", sample_windows=4, adapter_rank=4, adapter_dropout=0.0, dtype="float32", batch_size=2, seq_len=64, post_tune_steps=4
)
IDS_BT = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))


class Batches:
    def __getitem__(self, i: int, /) -> Tensor:
        return IDS_BT[:2]


def causal(name: str, dtype: Dtype = "float32", device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(deepcopy(CAUSAL[name]), dtype=getattr(torch, dtype))
    return model.eval()


def saved_bytes(model: nn.Module, recipe: Recipe, distill_weight: float) -> int:
    """Return the bytes that autograd saves in a forward pass, except weights and the probabilities of the cross-entropy."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recomputing(model, recipe.gradient_checkpointing):
        loss, _ = objective(model, targets(model), IDS_BT[:2], next_token, distill_weight)
    assert loss.requires_grad
    rows = recipe.batch_size * (recipe.seq_len - 1)
    return sum(storage.nbytes() for storage in storages.values()) - (rows * (4 * 300 + 8) if distill_weight < 1 else 0)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter_dropout": 0.05}, {"adapter": "layer", "adapter_dropout": 0.05}, {"quantize": "nf4"}],
    ids=["factors", "factors with dropout", "layer with dropout", "nf4"],
)
def test_predicted_activations_match_what_autograd_saves(name: str, dtype: Dtype, changes: dict[str, Any]) -> None:
    model = causal(name, dtype)
    recipes = [
        replace(RECIPE, dtype=dtype, gradient_checkpointing=gradient_checkpointing, **changes) for gradient_checkpointing in (False, True)
    ]
    predictions = [_Prediction(model, recipe, True, 1) for recipe in recipes]
    parametrize(model, recipes[0])
    for recipe, prediction in zip(recipes, predictions, strict=True):
        assert -0.05 < prediction.activations("prune")[0] / saved_bytes(model, recipe, 0.5) - 1 < 0.15
    state = CalibrationState.start(model, RECIPE)
    state.end_pruning(model, recipes[0])
    for core in state.layers.values():
        assert isinstance(core, ElasticLinear)
        core.train().set_rank(core.stored_rank)
    for recipe, prediction in zip(recipes, predictions, strict=True):
        assert -0.05 < prediction.activations("post-tune")[0] / saved_bytes(model, recipe, 1.0) - 1 < 0.15


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors, including those of `model`, but not those of other threads or inside of operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.storages = {id(storage): weakref.ref(storage) for storage in self.weights}
        self.base = self.now = self.peak = sum(storage.nbytes() for storage in self.weights)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self.track, out)
        self.peak = max(self.peak, self.now)
        return out

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (known := self.storages.get(id(storage))) is None or known() is not storage:
            self.storages[id(storage)] = weakref.ref(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, bytes_: int) -> None:
        self.now -= bytes_

    def peak_of(self, run: Callable[[], Any]) -> int:
        """Return the peak during `run`."""
        self.peak = self.now
        with self:
            run()
        return self.peak


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "quantize": "nf4"}], ids=str)
def test_phases_use_the_predicted_memory(name: str, dtype: Dtype, changes: dict[str, Any]) -> None:
    model, recipe = causal(name, dtype), replace(RECIPE, dtype=dtype, adapter_dropout=0.05, **changes)
    predicted = {phase.name: phase.total for phase in predict(model, recipe).phases}
    live = LiveBytes(model)
    live.peak_of(lambda: parametrize(model, recipe))
    measured = {"prune": live.peak_of(lambda: trial_step(model, Batches(), recipe))}
    measured["scores"] = live.peak_of(lambda: calibrate(model, Batches(), replace(recipe, post_tune_steps=0)))
    for phase, bytes_ in measured.items():
        assert -0.05 < predicted[phase] / bytes_ - 1 < 0.16, phase


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coding_uses_the_predicted_memory(name: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured are one pass over the text, and the coding of all layers, without the memory of the finished codes."""
    monkeypatch.setattr(memory_plan, "VERSIONS", 3)
    model = causal(name, dtype).requires_grad_(False)
    linears, statistics, live = find_linears(model), dict[str, LayerStatistics](), LiveBytes(model)
    prediction = _Prediction(model, replace(RECIPE, dtype=dtype, code="both", basis="fisher"), False, 1).coded
    gathering = live.peak_of(lambda: statistics.update(layer_statistics(model, linears, IDS_BT[:2])))
    scales = step_scales(linears, statistics, [2.0, 3.0, 4.0])
    coding = live.peak_of(lambda: [code_layer(layer, statistics[name], scales) for name, layer in linears.items()])
    assert -0.05 < prediction.code().total / max(gathering, coding) - 1 < 0.05
    moments = FisherMoments(linears)

    def gather() -> None:
        with moments.summed():
            statistics.update(layer_statistics(model, linears, IDS_BT[:2]))

    statistics.clear()
    together = live.peak_of(gather)
    monkeypatch.setattr(_Prediction, "coding", lambda self, layer: 0.0)
    monkeypatch.setattr(_Prediction, "solving", lambda self, layers: 0.0)
    assert -0.05 < prediction.code().total / gathering - 1 < 0.05
    shared = prediction.shared()
    assert shared is not None and -0.05 < shared.total / together - 1 < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coding_a_block_at_a_time_uses_the_predicted_memory(dtype: Dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured is the memory beside the weights, which may be mapped: hidden states, the graph of a block, and its statistics."""
    model = causal("llama", dtype).requires_grad_(False)
    linears, live = find_linears(model), LiveBytes(model)
    monkeypatch.setattr(_Prediction, "coding", lambda self, layer: 0.0)
    recipe = replace(RECIPE, dtype=dtype, code="bits", sample_windows=2)
    phase, chain = predict_streamed(model, recipe)["code"], BlockChain(model)
    weights = sum(tensor.nbytes for tensor in tensors(model))

    def gather() -> None:
        assert block_statistics(chain, linears, IDS_BT[:2], PassFiles(tmp_path), "cpu").keys() == linears.keys()

    gathering = live.peak_of(gather) - weights
    assert -0.1 < (phase.total - phase.rest - phase.originals) / gathering - 1 < 0.6


@pytest.mark.parametrize("basis", ["fisher", "covariance"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bases_and_scores_a_block_at_a_time_use_the_predicted_memory(
    basis: Basis, dtype: Dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Measured is the memory beside the weights, which may be mapped, without that of the threads that solve layers.

    The model has one block, because the mapped directions of all blocks are counted, too.
    """
    monkeypatch.setattr(CAUSAL["llama"], "num_hidden_layers", 1)
    model = causal("llama", dtype)
    chain, live = BlockChain(model), LiveBytes(model)
    monkeypatch.setattr(_Prediction, "solving", lambda self, layers: 0.0)
    recipe = replace(RECIPE, dtype=dtype, basis=basis, sample_windows=4, post_tune_steps=0)
    phases = predict_streamed(model, recipe)
    assert phases.keys() == {"parametrize", "scores"}
    weights = sum(tensor.nbytes for tensor in tensors(model))
    found = live.peak_of(lambda: calibrate_by_block(chain, recipe, IDS_BT, lambda i: IDS_BT[:2], tmp_path / "files", "cpu")) - weights
    assert -0.1 < max(phase.total - phase.rest - phase.originals for phase in phases.values()) / found - 1 < 0.6


def test_a_calibration_that_does_not_fit_is_streamed_as_a_whole() -> None:
    """Its phases need the directions of the others, and there is no trial step."""
    model, recipe = causal("llama", device="meta"), replace(RECIPE, post_tune_steps=0)
    held = plan(model, recipe, 1e12, "cpu", context=64)
    assert [phase.name for phase in held.phases] == ["parametrize", "scores", "prune", "measure"] and not held.by_block
    least = plan(model, recipe, 0, "cpu", context=64)
    assert least.streamed == ("parametrize", "scores", "measure") == tuple(phase.name for phase in least.phases)
    by_name = {phase.name: phase.total for phase in held.phases}
    between = plan(model, recipe, 1.04 * max(by_name.values()), "cpu", context=64)
    assert between.by_block, "one phase does not fit with its headroom"
    for change in ({"post_tune_steps": 1}, {"scores": "order"}, {"quantize": "nf4"}, {"code": "both", "code_tune_steps": 1}):
        assert plan(model, replace(recipe, **change), 0, "cpu", context=64).streamed == ("measure",)
    assert plan(model, recipe, 0, "cpu", workers=2).streamed == ()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_text_uses_the_predicted_memory(name: str, dtype: Dtype) -> None:
    """Measured are texts that do not end before the window does."""
    model, recipe = causal(name, dtype).requires_grad_(False), replace(RECIPE, dtype=dtype, seq_len=48)
    (phase,) = (phase for phase in predict(model, recipe, sampled=True).phases if phase.name == "sample")
    live = LiveBytes(model)
    sampling = live.peak_of(lambda: continued(model, [[1]] * TOGETHER, 47, (), do_sample=True, top_k=0))
    assert -0.05 < phase.total / sampling - 1 < 0.25


def test_a_model_that_does_not_fit_for_coding_is_not_sampled_from() -> None:
    model, recipe = causal("llama", device="meta"), replace(RECIPE, code="bits", code_tune_steps=0)
    names = [phase.name for phase in plan(model, recipe, 1e12, "cpu", sampled=True).phases]
    assert names == ["sample", *(phase.name for phase in predict(model, recipe, "cpu").phases)]
    least = plan(model, recipe, 0, "cpu", sampled=True)
    assert [phase.name for phase in least.phases] == names[1:] and "code" in least.streamed


def test_the_plan_counts_enough_versions_and_bytes(small_base: str, golden_tokens: Tensor) -> None:
    assert len(RATES) <= VERSIONS
    model = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval().requires_grad_(False)
    linears = dict(list(find_linears(model).items())[:7])
    coded = code_model(linears, layer_statistics(model, linears, golden_tokens[:4]))
    weights = sum(weight_MN(layer).numel() for layer in linears.values())
    assert coded.bytes < VERSIONS * CODED_BYTES * weights * 1.3  # small layers have relatively many step sizes


def test_only_recipes_with_codes_have_the_phase_of_coding() -> None:
    model = causal("llama", device="meta")
    names = [[phase.name for phase in predict(model, replace(RECIPE, code=code)).phases] for code in ("ranks", "both")]
    assert names[1] == ["code", "tune", *names[0]]


def test_a_refusal_because_of_codes_names_a_recipe_without_them() -> None:
    model = causal("gpt2", device="meta")
    coded, plain = (predict(model, replace(RECIPE, code=code, seq_len=16, batch_size=1), "cpu") for code in ("both", "ranks"))
    assert coded.worst.name == "code"
    assert coded.peak > 1.1 * plain.peak
    with pytest.raises(CalibrationError, match=r"peak is in code: .*code: ranks \("):
        check(model, replace(RECIPE, code="both", seq_len=16, batch_size=1), 1.06 * plain.peak, "cpu")


def test_a_prediction_needs_no_weights() -> None:
    for name in CAUSAL:
        on_meta, on_cpu = (causal(name, device=device) for device in ("meta", "cpu"))
        assert predict(on_meta, RECIPE, "cpu").peak == pytest.approx(predict(on_cpu, RECIPE).peak, rel=1e-3)


def test_the_parts_of_llama_7b_are_predicted() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    with torch.device("meta"):
        llama_7b = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    memory = predict(llama_7b, Recipe())
    phases = {phase.name: phase for phase in memory.phases}
    assert phases["prune"].rest == pytest.approx(2 * (2 * 32000 * 4096 + 65 * 4096), rel=1e-4)
    assert phases["prune"].originals == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert phases["prune"].directions == 2 * 32 * (4 * 2 * 4096**2 + 3 * 4096 * (4096 + 11008))
    assert phases["post-tune"].optimizer == 2 * phases["post-tune"].trainable
    assert memory.worst.name == "prune" and "activations" in str(memory)
    code = predict(llama_7b, Recipe(code="both")).phases[0]
    assert code.name == "code" and code.total < phases["prune"].total
    assert code.statistics < STATISTICS < 32 * statistics_bytes(4096, 11008)
    four_bit = predict(llama_7b, Recipe(quantize="nf4"))
    assert {phase.name: phase for phase in four_bit.phases}["prune"].originals == pytest.approx(0.5625 / 2 * phases["prune"].originals)
    half = {phase.name: phase for phase in predict(llama_7b, Recipe(), workers=2).phases}["prune"]
    assert half.directions == phases["prune"].directions / 2
    assert half.activations < 0.55 * phases["prune"].activations


def test_any_architecture_has_a_prediction() -> None:
    models = [
        AutoModelForCausalLM.from_config(config)
        for config in (
            MixtralConfig(**EXPERTS, num_local_experts=4),
            Qwen2MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48),
            Phi3Config(**GROUPED),
            MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2),
        )
    ]
    models += [BertForMaskedLM(BertConfig(**IDS, **SIZE)), ViTForImageClassification(ViTConfig(**SIZE, image_size=32, patch_size=8))]
    for model in models:
        memory = predict(model, replace(RECIPE, exclude=with_matches(model, ("experts",))))
        assert all(part >= 0 for phase in memory.phases for part in phase.parts.values())
        assert memory.worst.activations > 0


def test_a_refusal_names_recipes_that_fit() -> None:
    model, recipe = causal("llama", device="meta"), replace(RECIPE, batch_size=4, seq_len=256, adapter_dropout=0.05)
    needed = predict(model, recipe).peak
    assert isinstance(check(model, recipe, 1.1 * needed), Memory)
    with pytest.raises(CalibrationError, match=r"peak is in \w+: activations") as refused:
        check(model, recipe, 0.9 * needed)
    changes = "gradient_checkpointing: true", "batch_size: 2, gradient_accumulation_steps: 2", "seq_len: 128", "dtype: bfloat16"
    for change in (f"{change} (" for change in changes):
        assert change in str(refused.value)
    lean = predict(model, replace(recipe, gradient_checkpointing=True, batch_size=1, gradient_accumulation_steps=4)).peak
    assert fits(predict(model, replace(recipe, gradient_checkpointing=True, batch_size=1, gradient_accumulation_steps=4)), 1.06 * lean)
    with pytest.raises(CalibrationError, match="gradient_checkpointing: true, batch_size: 1, gradient_accumulation_steps: 4"):
        check(model, recipe, 1.06 * lean)
    with pytest.raises(CalibrationError, match="use a larger device"):
        check(model, recipe, 1e5)


def test_more_workers_are_the_last_resort() -> None:
    with torch.device("meta"):
        wide = LlamaConfig(**IDS, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
        model = AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16)
    with pytest.raises(CalibrationError, match=r"gradient_checkpointing: true, num_workers: (8|16)"):
        check(model, Recipe(), 80e9)


def test_available_memory_respects_control_groups(tmp_path: Path) -> None:
    free_bytes = available(causal("llama"), torch.device("cpu"))
    assert 1e6 < free_bytes < 1e15
    assert control_group_memory(tmp_path, tmp_path / "none") == float("inf")

    def group(folder: str, **files: object) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{text}\n")

    own = tmp_path / "cgroup"
    group("", memory__max=1000, memory__current=700, memory__stat="anon 5\ninactive_file 100")  # the limit of the parent is lower
    group("pod/box", memory__max="max", memory__current=1, memory__stat="")
    own.write_text("0::/pod/box\n")
    assert control_group_memory(tmp_path, own) == 400
    group("memory/box", memory__limit_in_bytes=900, memory__usage_in_bytes=700, memory__stat="total_inactive_file 50")
    own.write_text("3:cpu:/\n4:memory:/box\n")
    assert control_group_memory(tmp_path, own) == 250
