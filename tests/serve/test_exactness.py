"""The engine gives the logits of the model: it honors softcaps, sinks, windows, chunks and positions, or refuses the model."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.serve.engine import exactness_check, kv_cache
from acip_platform.serve.engine.exactness_check import check, served_context
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.size_facts import model_card
from acip_platform.serve.text_engine import TextEngine
from acip_platform.tracking.registry import ModelVersion
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Ministral3Config,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.errors import AcipError
from acip.layers.mixed_sizes import Size
from tests.acip.layers.test_architectures import GROUPED, RECIPE, WIDE, random_model
from tests.conftest import byte_tokenizer

LONG: dict[str, Any] = {**GROUPED, "max_position_embeddings": 512}
TWO_KINDS = ["sliding_attention", "full_attention"]
LLAMA4: dict[str, Any] = {
    **LONG, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 16,
    "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
}  # fmt: skip
MLA: dict[str, Any] = {
    **LONG, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
}  # fmt: skip
YARN: dict[str, Any] = {**LONG, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}}
DYNAMIC: dict[str, Any] = {**LONG, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
SERVED: dict[str, PreTrainedConfig] = {
    "many layers": LlamaConfig(**{**LONG, "num_hidden_layers": 30}),
    "a window of few tokens": MistralConfig(**LONG, sliding_window=8),
    "a window of many tokens": MistralConfig(**LONG, sliding_window=4096),
    "capped logits": Gemma2Config(**LONG, head_dim=16, sliding_window=32, query_pre_attn_scalar=2),
    "windows in some layers": Gemma3TextConfig(**LONG, head_dim=16, sliding_window=64, layer_types=TWO_KINDS),
    "no positions in some layers": Cohere2Config(**LONG, sliding_window=64, layer_types=TWO_KINDS),
    "windows from a layer on": Qwen2Config(**LONG, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    "sinks": GptOssConfig(**LONG, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=128, layer_types=TWO_KINDS),
    "chunks": Llama4TextConfig(**LLAMA4, attn_temperature_tuning=False),
    "queries scaled by their position": Ministral3Config(**LONG, head_dim=8),
    "keys that attention makes of latents": DeepseekV3Config(**MLA),
    "yarn": LlamaConfig(**YARN),
    "dynamic": LlamaConfig(**DYNAMIC),
}
REFUSED: dict[str, PreTrainedConfig] = {
    "queries scaled by their place in the pass": Llama4TextConfig(**LLAMA4),
    "alibi": BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4),
    "alibi of its own": MptConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=4),
    "alibi beside rotary embeddings": FalconConfig(**WIDE, alibi=True),
    "attention of its own": GPTJConfig(vocab_size=256, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "no attention": MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2),
}
FACTORS: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = Phi3Config(**{**LONG, "original_max_position_embeddings": 64, "rope_scaling": FACTORS})


def checked_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model after the check, without layers of several sizes."""
    model = random_model(copy.deepcopy(config)).to(dtype)
    context, _ = served_context(model.config.get_text_config(), 512)
    check("toy", model, {}, (Size((0, 0), {}), Size((0, 1), {})), context)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SERVED))
def test_supported_architecture_passes_the_check(name: str, dtype: torch.dtype) -> None:
    assert checked_model(SERVED[name], dtype).config._attn_implementation == kv_cache.ATTENTION


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_architecture_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(AcipError, match=r"^toy: \w+ForCausalLM can't be served: .+ Export sizes with jobs/materialize.py\.$") as raised:
        checked_model(REFUSED[name])
    assert "\n" not in str(raised.value)


def artifact_of(config: PreTrainedConfig, folder: Path, **recipe: Any) -> Artifact:
    changed = replace(RECIPE, **recipe)
    random_model(copy.deepcopy(config)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    base = load_base(str(folder / "base"), "float32")
    windows = torch.randint(3, 256, (32, changed.seq_len), generator=torch.Generator().manual_seed(0))
    parametrize(base.model, changed, windows)
    return Artifact.save(folder / "artifact", base, calibrate(base.model, TokenBatches(windows, changed.batch_size), changed), {})


@pytest.mark.parametrize("name", ["capped logits", "windows in some layers", "chunks"])
def test_answer_has_the_log_probabilities_of_transformers_generate(name: str, tmp_path: Path) -> None:
    """The logits agree beyond the windows and chunks, in a batch of several prompts."""
    artifact = artifact_of(SERVED[name], tmp_path, exclude=("experts", "router") if name == "chunks" else ())
    served, engine = ResidentModel(ModelVersion("toy", "1", str(artifact.folder), (), {}), artifact), TextEngine()
    engine.add(served)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 256, (length,), generator=generator).tolist() for length in (200, 20, 90)]
    logprobs: dict[int, list[float]] = {0: [], 1: [], 2: []}
    request = CompletionRequest(prompt=prompts, temperature=0.0, logprobs=0, ignore_eos=True, max_tokens=24)
    for event in engine.events(served, request):
        assert event.kind != "error", event.data
        logprobs[event.index] += [token["logprob"] for token in event.logprobs or []]
    engine.close()
    for i, prompt in enumerate(prompts):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=255, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = generated.sequences[0, len(prompt) :]
        expected = [float(step[0].log_softmax(-1)[token]) for step, token in zip(generated.logits, tokens, strict=True)]
        changed = next((j for j, token in enumerate(tokens) if generated.logits[j][0].argmax() != token), 24)  # by min_new_tokens
        assert logprobs[i][:changed] == pytest.approx(expected[:changed], abs=1e-3) and changed > 4


def test_longrope_is_served_up_to_its_original_context(tmp_path: Path) -> None:
    assert served_context(LONGROPE, 512)[0] == 64
    assert checked_model(LONGROPE) is not None
    artifact = artifact_of(LONGROPE, tmp_path)
    served = ResidentModel(ModelVersion("toy", "1", str(artifact.folder), (), {}), artifact)
    card = model_card(served)
    assert card["max_model_len"] == 64
    assert any("up to 64 of 512 tokens" in note for note in card["notes"])


def test_check_detects_a_wrong_softcap_sink_or_window(monkeypatch: pytest.MonkeyPatch) -> None:
    right, mask_of = kv_cache.weighted, kv_cache.Rule.mask
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "weighted", lambda q, k, v, mask, scaling, softcap, sinks: right(q, k, v, mask, scaling, None, sinks))
        with pytest.raises(AcipError, match="change its logits by"):
            checked_model(SERVED["capped logits"])
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "weighted", lambda q, k, v, mask, scaling, softcap, sinks: right(q, k, v, mask, scaling, softcap, None))
        with pytest.raises(AcipError, match="change its logits by"):
            checked_model(SERVED["sinks"])
    full = kv_cache.Rule(kv_cache.causal_mask_function, None)
    for name in ("a window of few tokens", "a window of many tokens", "windows in some layers", "chunks"):
        for dtype in (torch.float32, torch.bfloat16):
            with monkeypatch.context() as patch:
                patch.setattr(kv_cache.Rule, "mask", lambda rule, query, key: mask_of(full, query, key))
                with pytest.raises(AcipError, match=r"beyond (sliding_window|attention_chunk_size) = \d+"):
                    checked_model(SERVED[name], dtype)


def test_check_of_a_long_window_uses_a_short_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, run = [], exactness_check._token_by_token

    def counted(model: Any, ids: torch.Tensor) -> torch.Tensor:
        tokens.append(ids.shape[1])
        return run(model, ids)

    monkeypatch.setattr(exactness_check, "_token_by_token", counted)
    checked_model(SERVED["a window of many tokens"])
    assert sum(tokens) < 200


@pytest.mark.parametrize("argument", ["position_bias", "head_mask", "indices"])
def test_unsupported_attention_argument_is_refused(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward: Any = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs, **{argument: torch.ones(1, 1, 1, 1)})
    )
    with pytest.raises(AcipError, match=f"toy: LlamaForCausalLM can't be served: the attention of LlamaAttention takes {argument}"):
        checked_model(LlamaConfig(**LONG))


def test_custom_attention_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def custom_mask(**kwargs: Any) -> torch.Tensor:
        return torch.full((1, 1, kwargs["inputs_embeds"].shape[1], 64), -torch.inf).triu(1)

    model = random_model(LlamaConfig(**LONG))
    model.set_attn_implementation(kv_cache.ATTENTION)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", custom_mask)
    cache = kv_cache.KVCache()
    cache.room(1, 8)
    with (
        pytest.raises(AcipError, match="gets its attention mask from code of its own"),
        kv_cache.Step.of(cache, [kv_cache.CachePiece(0, 0, 0, 8)], torch.device("cpu")) as step,
    ):
        model(input_ids=torch.zeros(1, 8, dtype=torch.long), position_ids=step.position[None], past_key_values=cache, use_cache=True)


def test_model_with_logits_that_are_not_finite_is_refused() -> None:
    model = random_model(LlamaConfig(**LONG))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(AcipError, match="toy: LlamaForCausalLM can't be served: its own logits are not finite in float32"):
        check("toy", model, {}, (Size((0, 0), {}), Size((0, 1), {})), 512)
