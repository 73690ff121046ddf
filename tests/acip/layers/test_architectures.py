"""The whole pipeline works for every architecture: parametrize -> calibrate -> cut -> materialize -> save -> load -> generate.

The models are small. All their tensors are random, including biases and norms, so that a lost tensor changes the result.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from acip.artifact.artifact import Artifact
from acip.base import Base, digest, load_base
from acip.calibration.activation_covariance import activation_covariances
from acip.calibration.loop import Calibration, calibrate, trial_step
from acip.calibration.losses import Task
from acip.calibration.parametrize import parametrize, restore
from acip.data import TokenBatches
from acip.errors import BaseModelError
from acip.export.folder import export, tensor_bytes
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import find_linears, targets
from acip.modeling import from_pretrained
from acip.modeling_acip import keep_attention_cap
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.model_sizes import set_size
from tests.conftest import byte_tokenizer
from tests.support.near_ties import assert_greedy_ids

LAYERS = 2
IDS: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE: dict[str, Any] = {**IDS, **SMALL, "intermediate_size": 48, "initializer_range": 0.2}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2}
OPT: dict[str, Any] = {**IDS, **SMALL, "ffn_dim": 48, "init_std": 0.2}

RECIPE = Recipe(
    sample_windows=8, adapter_rank=2, adapter_alpha=2.0, dtype="float32", batch_size=4, seq_len=16,
    scores="order", lr=4e-3, lambda_start=4e-3, lambda_factor=1.6, lambda_interval=1, max_prune_steps=40, post_tune_steps=4,
)  # fmt: skip

ATTENTION, GATED = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"


@dataclass(frozen=True)
class Architecture:
    config: PreTrainedConfig
    layers: str  # the last part of the name of each linear layer of a block
    recipe: Recipe = field(default=RECIPE)


ARCHITECTURES = {
    "llama-tied": Architecture(LlamaConfig(**GROUPED, tie_word_embeddings=True), f"{ATTENTION} {GATED}"),
    "llama-untied-biases": Architecture(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True), f"{ATTENTION} {GATED}"),
    "mistral": Architecture(MistralConfig(**GROUPED, sliding_window=8), f"{ATTENTION} {GATED}"),
    "qwen2": Architecture(Qwen2Config(**GROUPED, tie_word_embeddings=True), f"{ATTENTION} {GATED}"),
    "qwen3": Architecture(Qwen3Config(**GROUPED, head_dim=16), f"{ATTENTION} {GATED}"),
    "gemma3": Architecture(
        Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        f"{ATTENTION} {GATED}",
    ),
    "gemma3-with-vision": Architecture(
        Gemma3Config(
            text_config=GROUPED | {"head_dim": 16},
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        ),
        f"{ATTENTION} {GATED}",
        replace(RECIPE, exclude=("vision_tower",)),
    ),
    "phi3": Architecture(Phi3Config(**GROUPED), "qkv_proj o_proj gate_up_proj down_proj"),
    "opt-pre-norm": Architecture(OPTConfig(**OPT, word_embed_proj_dim=32), "q_proj k_proj v_proj out_proj fc1 fc2"),
    "opt-post-norm": Architecture(
        OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False), "q_proj k_proj v_proj out_proj fc1 fc2"
    ),
    "opt-16-bit": Architecture(
        OPTConfig(**OPT, word_embed_proj_dim=32), "q_proj k_proj v_proj out_proj fc1 fc2", replace(RECIPE, dtype="bfloat16")
    ),
    "gpt-neox": Architecture(GPTNeoXConfig(**WIDE), "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "gpt2": Architecture(
        GPT2Config(**IDS, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, initializer_range=0.2), "c_attn c_proj c_fc c_proj"
    ),
    "falcon": Architecture(
        FalconConfig(**WIDE, new_decoder_architecture=True, num_kv_heads=2, bias=True),
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "mixtral": Architecture(MixtralConfig(**GROUPED, num_local_experts=4), ATTENTION, replace(RECIPE, exclude=("experts",))),
}


def random_model(config: PreTrainedConfig, kind: Any = None) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # models change their config
    keep_attention_cap(config)
    model = kind(config) if kind else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model.eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 256, (32, 16), generator=torch.Generator().manual_seed(0))


@dataclass
class PipelineResult:
    architecture: Architecture
    folder: Path  # of the base model
    names: list[str]
    base_logits: Tensor
    parametrized_logits: Tensor
    calibration: Calibration
    artifact: Artifact
    any_size: ElasticModel


@pytest.fixture(scope="module", params=ARCHITECTURES)
def result(request: Any, tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> PipelineResult:
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    random_model(architecture.config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    base = load_base(str(folder), architecture.recipe.dtype)
    before = logits(base.model, tokens[:4])
    names = list(parametrize(base.model, architecture.recipe, tokens))
    after = logits(base.model, tokens[:4])
    calibration = calibrate(base.model, TokenBatches(tokens, 4), architecture.recipe)
    Artifact.save(folder / "artifact", base, calibration, {})
    artifact = Artifact.open(folder / "artifact", verify=True)
    return PipelineResult(architecture, folder, names, before, after, calibration, artifact, artifact.load())


def test_the_targets_are_the_linear_layers_of_the_blocks(result: PipelineResult) -> None:
    leaves = [name.rpartition(".")[2] for name in result.names]
    assert sorted(leaves) == sorted(result.architecture.layers.split() * LAYERS)


def test_the_parametrized_model_computes_the_base(result: PipelineResult) -> None:
    exact = result.architecture.recipe.dtype == "float32"
    torch.testing.assert_close(result.parametrized_logits, result.base_logits, rtol=0, atol=1e-4 if exact else 0.3)


def test_size_one_is_the_base_bit_for_bit(result: PipelineResult, tokens: Tensor) -> None:
    base = load_base(str(result.folder), result.architecture.recipe.dtype).model
    result.any_size.resize(0.5)
    cut = result.any_size.resize(1.0)
    assert torch.equal(logits(result.any_size.model, tokens), logits(base, tokens))
    assert cut.params == sum(p.numel() for p in base.parameters())


def test_a_smaller_size_is_a_plain_model_of_that_many_parameters(result: PipelineResult, tokens: Tensor) -> None:
    assert 5 < result.calibration.stop_step < 30, "the schedule prunes too fast or too slowly"
    cut = result.any_size.resize(0.6)
    resident, plain = logits(result.any_size.model, tokens), result.any_size.materialize()
    exact = result.architecture.recipe.dtype == "float32"
    torch.testing.assert_close(logits(plain, tokens), resident, rtol=0, atol=1e-3 if exact else 0.3)
    assert sum(p.numel() for p in plain.parameters()) == cut.params
    assert cut.sizes["linear"] <= 0.6
    assert not any(isinstance(module, ElasticLinear | SVDLinear) for module in plain.modules())
    base = logits(load_base(str(result.folder), result.architecture.recipe.dtype).model, tokens)
    assert not torch.allclose(resident, base, atol=0.1), "the model at 0.6 equals the base model"


def test_every_architecture_is_exported_and_read_back(result: PipelineResult, tokens: Tensor, tmp_path: Path) -> None:
    """A loaded export equals the materialized model, and so does an export of the loaded model."""
    any_size = result.artifact.load()
    for size in (0.6, 1.0):
        cut = any_size.resize(size)
        export(any_size, result.artifact, tmp_path / "out")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(read, tokens), logits(any_size.materialize(), tokens))
        assert tensor_bytes(tmp_path / "out") == cut.bytes
        compressed: Any = from_pretrained(result.artifact.folder, size).compress()  # type: ignore[operator]
        assert torch.equal(logits(compressed, tokens), logits(read, tokens))
        read.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), tokens), logits(read, tokens))


def test_a_loaded_artifact_generates_the_same_text(result: PipelineResult, tokens: Tensor) -> None:
    cut = result.any_size.resize(0.6)
    set_size(targets(result.calibration.model), cut)
    prompt = tokens[:1, :6]
    models: list[Any] = [result.calibration.model, result.any_size.model, result.any_size.materialize()]
    generated = [model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False) for model in models]
    before, resident, plain = (ids[0].tolist() for ids in generated)
    if result.architecture.recipe.dtype == "float32":  # in 16 bit, saving and folding round the adapters
        logits_TV = logits(models[0], generated[0])[0]
        for after in (resident, plain):
            assert_greedy_ids(logits_TV, before, after, prompt.shape[1])
    assert generated[0].shape[1] > prompt.shape[1]


# ---- layers that cannot or must not be compressed

MOE: dict[str, tuple[PreTrainedConfig, str]] = {
    "mixtral": (MixtralConfig(**GROUPED, num_local_experts=4), ""),
    "gpt-oss": (GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4), ""),
    # a shared expert and its gate, which is a linear layer with one output
    "qwen2-moe": (Qwen2MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40), GATED),
}


@pytest.mark.parametrize("name", MOE)
def test_fused_experts_are_refused_and_other_layers_can_be_compressed(name: str, tokens: Tensor) -> None:
    """The router is never a target, whether it is a raw parameter or a linear layer."""
    config, other_targets = MOE[name]
    model = random_model(config)
    with pytest.raises(BaseModelError, match=r"model\.layers\.0\.mlp\.experts .* Set exclude to \['experts'\]"):
        parametrize(model, RECIPE, tokens)
    before = logits(model, tokens)
    found = parametrize(model, replace(RECIPE, exclude=("experts",)), tokens)
    assert {name.rpartition(".")[2] for name in found} == set(f"{ATTENTION} {other_targets}".split())
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_is_refused(tmp_path: Path, bits: str) -> None:
    random_model(LlamaConfig(**GROUPED)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM is already quantized.*Load the base model in 16 or 32 bit"):
        find_linears(model)
    model.hf_quantizer = None
    with pytest.raises(BaseModelError, match=r"model\.layers\.0\.self_attn\.q_proj is already quantized"):
        find_linears(model)


class PackedLinear(nn.Module):
    """A layer that stores eight 4-bit weights per int32, like GPTQ and AWQ."""

    def __init__(self, M: int, N: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(N // 8, M, dtype=torch.int32))


def test_packed_weights_are_refused() -> None:
    model = random_model(LlamaConfig(**GROUPED))
    model.model.layers[1].mlp.up_proj = PackedLinear(48, 32)
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj is already quantized"):
        find_linears(model)


class ReLULinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_subclass_of_linear_that_computes_something_else_is_refused() -> None:
    model = random_model(LlamaConfig(**GROUPED))
    model.model.layers[0].mlp.up_proj = ReLULinear(32, 48)
    with pytest.raises(BaseModelError, match=r"a ReLULinear, which does not compute .* Set exclude to \['up_proj'\]"):
        find_linears(model)


@pytest.mark.parametrize(("name", "idle"), [("gemma3-with-vision", "vision_tower"), ("mamba", "dt_proj")])
def test_layers_that_are_never_called_on_text_are_refused(name: str, idle: str, tokens: Tensor) -> None:
    """The tower of another modality would lose all its directions. Mamba reads the weight of dt_proj without calling the layer."""
    config = ARCHITECTURES[name].config if name in ARCHITECTURES else MambaConfig(**IDS, hidden_size=32, num_hidden_layers=LAYERS)
    model = random_model(config)
    with pytest.raises(BaseModelError, match=rf"never called on this text, for example \S*{idle}\S*, so"):
        parametrize(model, RECIPE, tokens)
    assert not targets(model)


class Towers(nn.Module):
    """A module with two block lists of the same name, and a list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
        self.other = nn.Module()
        self.other.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])


def test_only_the_targets_are_replaced() -> None:
    model = Towers()
    found = parametrize(model, replace(RECIPE, basis="svd", exclude=("other",)))
    assert list(found) == ["layers.0.0"]
    assert isinstance(model.get_submodule("other.layers.0.0"), nn.Linear)
    assert all(type(head) is nn.Linear for head in model.heads)


# ---- encoders and vision models, with the inputs and the loss of their task

ENCODERS = {"bert": (BertForMaskedLM, BertConfig(**IDS, **SMALL, intermediate_size=48)),
            "albert": (AlbertForMaskedLM, AlbertConfig(**IDS, **SMALL, intermediate_size=48, embedding_size=16)),
            "vit": (ViTForImageClassification, ViTConfig(**SMALL | {"image_size": 16, "patch_size": 4}, intermediate_size=48))}  # fmt: skip


def _run(model: nn.Module, inputs: Tensor) -> Any:
    return model(pixel_values=inputs) if inputs.is_floating_point() else model(input_ids=inputs)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_calibrated_saved_and_materialized(name: str, tokens: Tensor, tmp_path: Path) -> None:
    kind, config = ENCODERS[name]
    model: PreTrainedModel = random_model(config, kind)
    inputs = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) if name == "vit" else tokens
    with torch.no_grad():
        before = _run(model, inputs).logits
    parametrize(model, RECIPE, inputs, feed=_run)
    torch.testing.assert_close(_run(model, inputs).logits, before, rtol=0, atol=1e-4)

    def loss(logits: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), logits.detach().argmax(-1).flatten())

    task = Task(lambda model, inputs: _run(model, inputs).logits, loss)
    batches = [inputs[i % len(inputs) : i % len(inputs) + 4] for i in range(0, 400, 4)]
    assert trial_step(model, batches, RECIPE, task) > 0
    calibration = calibrate(model, batches, RECIPE, task=task)

    any_size = Artifact.save(tmp_path, Base(model, None, name, None, digest(model)), calibration, {}).load()
    assert type(any_size.model) is kind
    with torch.no_grad():
        assert torch.equal(_run(any_size.model, inputs).logits, before)
        cut = any_size.resize(Budget(0.6))
        resident, plain = _run(any_size.model, inputs).logits, any_size.materialize()
        torch.testing.assert_close(_run(plain, inputs).logits, resident, rtol=0, atol=1e-3)
        assert sum(p.numel() for p in plain.parameters()) == cut.params
        set_size(targets(model), cut)
        torch.testing.assert_close(_run(model, inputs).logits, resident, rtol=0, atol=1e-4)
        assert torch.equal(_run(restore(model), inputs).logits, before)


def test_the_covariance_of_a_shared_layer_sums_all_its_inputs(tokens: Tensor) -> None:
    """All blocks of ALBERT share one set of weights."""
    kind, config = ENCODERS["albert"]
    model = random_model(config, kind)
    name = next(name for name in find_linears(model) if name.endswith("ffn_output"))
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    C = activation_covariances(model, find_linears(model), tokens)[name]
    handle.remove()
    X = torch.cat(inputs)
    assert len(X) == LAYERS * tokens.numel()
    torch.testing.assert_close(C, X.T @ X / tokens.numel(), rtol=1e-4, atol=1e-4)
