"""A GGUF file has at most the requested bytes, and llama.cpp computes with it what transformers computes with its numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.coding.error_feedback import damped, row_errors
from acip.errors import ArtifactError, BudgetError
from acip.export.folder import PROVENANCE, check_target
from acip.export.ggml_types import CODES, TYPES, Layout, dequantized, quantized, quantized_alone, stored_bytes
from acip.export.gguf import FILE, export_gguf, losses, plan, weight_statistics, weights_of
from acip.export.gguf_file import GGUFFile, check_model
from acip.sizing.byte_order import Version
from tests.conftest import byte_tokenizer, logits

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE = {"rope_theta": 10000.0, "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


# ---- without llama.cpp


@pytest.mark.parametrize("ggml_type", CODES)
def test_the_codes_of_every_type_are_written_where_they_are_read(ggml_type: GGMLType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    random = np.random.default_rng(0)
    stored = random.integers(0x31, 0x40, (50, block_bytes), np.uint8)  # scales are finite and not 0
    stored[:, CODES[ggml_type]] = random.integers(0, 256, stored[:, CODES[ggml_type]].shape)
    if ggml_type == GGMLType.Q8_0:
        stored[stored == 0x80] = 0x81  # -128 is never written
    layout, wanted = Layout.of(ggml_type), dequantized(stored, ggml_type)
    scale, offset = (each.T for each in layout.scales(stored))
    cleared = stored.copy()
    cleared[:, CODES[ggml_type]] = 0
    assert np.array_equal(layout.with_values(cleared, wanted, scale, offset), stored)
    torch.testing.assert_close(layout.nearest(wanted, scale, offset), wanted)
    assert wanted.shape == (50, block)


def test_types_are_chosen_by_saved_loss_per_byte_within_the_limit() -> None:
    Q4, Q8 = GGMLType.Q4_K, GGMLType.Q8_0
    facts = {"a": {Q4: Version(100, 3.0), Q8: Version(200, 0.0)}, "b": {Q4: Version(100, 1.0), Q8: Version(200, 0.0)}}
    assert plan(facts, 349, 50).types == {"a": Q4, "b": Q4}
    assert plan(facts, 350, 50).types == {"a": Q8, "b": Q4}
    chosen = plan(facts, 10**6, 50)
    assert (chosen.types, chosen.bytes, chosen.loss) == ({"a": Q8, "b": Q8}, 450, 0.0)
    with pytest.raises(BudgetError, match="too few"):
        plan(facts, 249, 50)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (GPT2Config(), "the model is a gpt2"),
        (LlamaConfig(**SHAPE, rope_parameters={**ROPE, "rope_type": "yarn"}), "its positions are of the type yarn"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "its activation is gelu"),
        (MistralConfig(**SHAPE, sliding_window=32), "it has sliding windows"),
    ],
)
def test_models_that_llama_cpp_would_compute_differently_are_refused(config: Any, problem: str) -> None:
    with pytest.raises(ArtifactError, match=f"{problem}. Supported are llama, mistral, qwen2, qwen3"):
        check_model(config)


def test_a_missing_llama_cpp_is_a_clear_error(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ArtifactError, match="pip install 'acip\\[gguf\\]'"):
        export_gguf(small_artifact, tmp_path / "out", 400_000, torch.zeros(1, 8, dtype=torch.long))
    assert not (tmp_path / "out").exists()


def test_embeddings_and_head_have_statistics_of_their_own(base: Base, windows: Tensor) -> None:
    """A tied matrix has one entry, whose predicted loss is the sum of both uses."""
    statistics = weight_statistics(base.model, windows[:2])
    matrices = {name for name, tensor in weights_of(base.model).items() if tensor.ndim > 1}
    assert statistics.keys() == matrices
    for name, each in statistics.items():
        rows, columns = base.model.get_parameter(name).shape
        assert each.metric.shape == (columns, columns) and each.importance.shape == (rows,)
        assert each.importance.sum() > 0 and each.metric.diagonal().sum() > 0
    tied = random_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    statistics = weight_statistics(tied, windows[:2])
    assert "lm_head.weight" not in statistics and "model.embed_tokens.weight" in statistics


# ---- with llama.cpp


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python compiles it)")


def in_llama_cpp(llama_cpp: Any, path: Path, tokens: Tensor) -> Tensor:
    """Return the logits [T, V] that llama.cpp computes for token ids [T]."""
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_ctx=len(tokens))
    model.eval(tokens.tolist())
    scores = torch.from_numpy(np.array(model.scores[: len(tokens)]))
    model.close()
    return scores


def near(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def random_model(config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases, too
    return model


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [10**7, 700_000, 450_000, 380_000])
def test_a_byte_size_is_opened_by_llama_cpp_and_computes_the_same(
    llama_cpp: Any, small_artifact: Artifact, windows: Tensor, heldout_tokens: Tensor, tmp_path: Path, limit_bytes: int
) -> None:
    provenance = export_gguf(small_artifact, tmp_path / "out", limit_bytes, windows[:8])
    path = tmp_path / "out" / FILE
    assert provenance["size"]["asked"] == limit_bytes and provenance["size"]["got"] == path.stat().st_size <= limit_bytes
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == provenance
    assert f"{limit_bytes:,} bytes" in (tmp_path / "out" / "README.md").read_text()
    check_target(tmp_path / "out")  # may be replaced by another export

    # the numbers of the file, in transformers
    model = small_artifact.load().materialize()
    exact = logits(model, heldout_tokens[:1])[0]
    file = GGUFFile(model.config, small_artifact.tokenizer(), weights_of(model))
    names = {other: name for name, other in file.names.items()}
    for tensor in gguf.GGUFReader(path).tensors:
        values = file.rows_in_transformers(names[tensor.name], gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        model.get_parameter(names[tensor.name]).copy_(torch.tensor(values))
    expected = logits(model, heldout_tokens[:1])[0]
    got = in_llama_cpp(llama_cpp, path, heldout_tokens[0])
    assert near(got, expected) < 0.03  # llama.cpp rounds activations to 8 bit
    assert near(expected, exact) < 0.1
    if limit_bytes == 10**7:
        assert torch.equal(expected, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        LlamaConfig(**SHAPE, head_dim=32, rope_parameters={**ROPE, **LLAMA3}),
        LlamaConfig(**SHAPE, rope_parameters={**ROPE, "rope_type": "linear"}),
        MistralConfig(**SHAPE, sliding_window=None),
        Qwen2Config(**SHAPE, tie_word_embeddings=True),
        Qwen3Config(**SHAPE, head_dim=32),
    ],
    ids=lambda config: config.model_type,
)
def test_every_supported_architecture_computes_the_same(llama_cpp: Any, config: Any, tmp_path: Path) -> None:
    model = random_model(config)
    tokens = torch.randint(256, (60,))
    GGUFFile(config, byte_tokenizer(), weights_of(model)).write(tmp_path / FILE)
    assert near(in_llama_cpp(llama_cpp, tmp_path / FILE, tokens), logits(model, tokens[None])[0]) < 0.005  # its KV cache has 16 bits


@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", [each for types in TYPES.values() for each in types if each != GGMLType.Q8_0])
def test_error_feedback_has_less_error_than_llama_cpp_alone(llama_cpp: Any, ggml_type: GGMLType) -> None:
    """llama.cpp alone gets the diagonal of the metric as its importance matrix."""
    N = 512
    x_SN = torch.randn(1000, 32) @ torch.randn(32, N) + 0.3 * torch.randn(1000, N)
    metric_NN, W_MN = damped(x_SN.T @ x_SN / 1000), torch.randn(64, N)
    stored = {
        "alone": quantized_alone(W_MN, metric_NN.diagonal(), ggml_type),
        "feedback": quantized(W_MN, metric_NN, ggml_type, sweeps=0),
        "descent": quantized(W_MN, metric_NN, ggml_type),
    }
    assert {each.nbytes for each in stored.values()} == {stored_bytes(ggml_type, (64, N))}
    errors = {name: float(row_errors(W_MN, dequantized(each, ggml_type), metric_NN).sum()) for name, each in stored.items()}
    assert errors["descent"] < errors["feedback"] < 0.8 * errors["alone"]


@pytest.mark.slow
def test_more_bits_have_less_predicted_loss(llama_cpp: Any, base: Base, windows: Tensor) -> None:
    facts = losses(weights_of(base.model), weight_statistics(base.model, windows[:4]))
    for each in facts.values():
        versions = sorted(each.values(), key=lambda version: version.bytes)
        assert versions[0].loss > versions[len(versions) // 2].loss > versions[-1].loss == 0


def trained(regex: str | None, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of included text: byte-level words that `regex` splits (None: those of GPT-2), or SentencePiece's."""
    text = (Path(__file__).parents[3] / "acip" / "corpora" / "austen.txt").read_text(encoding="utf-8")[:200_000]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if sentencepiece)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=sentencepiece, unk_token="<unk>", fuse_unk=sentencepiece))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif regex is None:
        tokenizer.pre_tokenizer = byte_level
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])
    tokenizer.decoder = decoders.Fuse() if sentencepiece else decoders.ByteLevel()
    alphabet = [] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet))
    if sentencepiece:  # as Llama 2: no words, bytes are plain tokens
        content = json.loads(tokenizer.to_str())
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
        content["pre_tokenizer"], content["added_tokens"] = None, content["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "gpt-2": (None, False),
    "qwen2": (QWEN, False),
    "llama-bpe": (QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), False),
    "sentencepiece": (None, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(llama_cpp: Any, kind: str, tmp_path: Path) -> None:
    tokenizer = trained(*TOKENIZERS[kind])
    model = random_model(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer) + 5}))  # more embeddings than tokens
    GGUFFile(model.config, tokenizer, weights_of(model)).write(tmp_path / FILE)
    text = (Path(__file__).parents[3] / "acip" / "corpora" / "wikipedia.txt").read_text(encoding="utf-8")[50_000:100_000]
    opened = llama_cpp.Llama(str(tmp_path / FILE), vocab_only=True, verbose=False)
    assert opened.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, add_special_tokens=False)
    assert opened.tokenize(b"text", add_bos=True)[0] == tokenizer.encode("text")[0]  # bos only if the tokenizer writes it
    assert opened.token_eos() == tokenizer.eos_token_id
    opened.close()


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(llama_cpp: Any) -> None:
    tokenizer = trained(r"\p{L}|\p{N}|\s|[^\p{L}\p{N}\s]")  # single characters
    model = random_model(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)}))
    with pytest.raises(ArtifactError, match="does not split text as this tokenizer does"):
        GGUFFile(model.config, tokenizer, weights_of(model))
