"""A GGUF file: a model's metadata, tokenizer and tensors as llama.cpp reads them.

The names of tensors and fields are those of gguf-py. llama.cpp splits text in ways of its own; the one that gives the tokenizer's tokens is
found by trial.
"""

import importlib.resources
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor
from transformers import PreTrainedConfig

from acip.data import start_tokens
from acip.errors import ArtifactError
from acip.export.ggml_types import EXACT, Array, exactly, load_llama_cpp, padded, stored_bytes

SENTENCEPIECE = "sentencepiece"
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
EXACTLY: Mapping[str, GGMLType] = {}  # no weight has another type than that of its dtype
ROPES = ("default", "linear", "llama3")
# in the order in which they are tried: the kinds that split more finely come first
PRE_TOKENIZERS = ("qwen2", "llama-bpe", "smollm", "gpt-2", "llama4", "deepseek-llm", "tekken", "stablelm2", "falcon", "starcoder", "refact")
SAMPLE_CHARACTERS = 20_000
UNUSUAL = (
    "\n\n\n  stop\t\t at 3 33 333 3333 33333.5 items...  \r\n\u00dcber \u4f60\u597d\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f680 camelCase x_1 = {'a': [1, 2]};  \n    return I'VE WE'LL don't ====---- \"\"\"'''"
)


@cache
def sample() -> str:
    """Return text that llama.cpp must split into the same tokens as the tokenizer."""
    text = importlib.resources.files("acip").joinpath("corpora", "wikipedia.txt").read_text(encoding="utf-8")
    return text[:SAMPLE_CHARACTERS] + UNUSUAL


def check_model(config: PreTrainedConfig) -> None:
    """Raise ArtifactError unless llama.cpp computes what a model with this configuration computes."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ARCHITECTURES:
        problem = f"the model is a {config.model_type}"
    elif rope not in ROPES:
        problem = f"its positions are of the type {rope}"
    elif getattr(config, "hidden_act", "silu") != "silu":
        problem = f"its activation is {config.hidden_act}"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        problem = "it has sliding windows"
    else:
        return
    raise ArtifactError(
        f"a GGUF file can't be written: {problem}. Supported are {', '.join(ARCHITECTURES)} with silu, full attention, and positions of "
        f"the types {', '.join(ROPES)}. For others, export a transformers folder, and convert it with llama.cpp's convert_hf_to_gguf.py."
    )


class GGUFFile:
    """Writes a model as a GGUF file, tensor by tensor."""

    def __init__(self, config: PreTrainedConfig, tokenizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are the model's, by their names in transformers. Raise ArtifactError if llama.cpp can't run such a model."""
        check_model(config)
        self.config, self.tokenizer, self.tensors = config, tokenizer, tensors
        self.arch = ARCHITECTURES[config.model_type]
        names = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)
        self.names = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
        if unknown := [name for name, other in self.names.items() if other is None]:
            raise ArtifactError(f"a GGUF file can't be written: llama.cpp's {config.model_type} has no tensor {unknown[0]}.")
        self.pre_tokenizer = self._pre_tokenizer()

    def overhead(self, quantizable: Mapping[str, Any]) -> int:
        """Return the bytes of the file without the tensors in `quantizable`."""
        with tempfile.TemporaryDirectory() as folder:
            writer = self._writer(path := Path(folder) / "empty", {})
            _begin(writer)
            writer.close()
            size = padded(path.stat().st_size)
        others = [stored_bytes(self._type(name, {}), tuple(each.shape)) for name, each in self.tensors.items() if name not in quantizable]
        others += [factors.nbytes] if (factors := self._rope_factors()) is not None else []
        return size + sum(map(padded, others))

    def write(self, path: Path, types: Mapping[str, GGMLType] = EXACTLY, stored: Callable[[str], Array] | None = None) -> None:
        """Write the file. `stored` returns a weight in its type; weights without a type in `types` are stored exactly."""
        writer = self._writer(path, types)
        _begin(writer)
        for name, tensor in self.tensors.items():
            rows = stored(name) if stored and name in types else exactly(tensor if tensor.ndim > 1 else tensor.float())
            writer.write_tensor_data(self.rows_in_llama_cpp(name, rows))
        if (factors := self._rope_factors()) is not None:
            writer.write_tensor_data(factors)
        writer.close()

    def _type(self, name: str, types: Mapping[str, GGMLType]) -> GGMLType:
        tensor = self.tensors[name]
        return types.get(name, EXACT[tensor.dtype]) if tensor.ndim > 1 else GGMLType.F32

    def rows_in_llama_cpp(self, name: str, rows: Array) -> Array:
        """Return the rows of a tensor in llama.cpp's order: its Llama rotates neighbors of queries and keys instead of halves."""
        heads = self._rotated_heads(name)
        return rows if heads is None else _swapped(rows, heads, 2)

    def rows_in_transformers(self, name: str, rows: Array) -> Array:
        """Return the rows of a tensor of a GGUF file in transformers' order."""
        heads = self._rotated_heads(name)
        return rows if heads is None else _swapped(rows, heads, len(rows) // heads // 2)

    def _rotated_heads(self, name: str) -> int | None:
        """Return the number of heads if the rows of a tensor have another order in llama.cpp, else None."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(name.split(".")[-2]) if self.arch == gguf.MODEL_ARCH.LLAMA else None

    def _rope_factors(self) -> Array | None:
        """Return the factors by which Llama 3 divides its rotary frequencies, or None for other models."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = self.config.rope_parameters["rope_theta"] ** -(torch.arange(0, len(scaled)) / len(scaled))
        return (plain / scaled).float().numpy()

    # ---- metadata

    def _writer(self, path: Path, types: Mapping[str, GGMLType]) -> gguf.GGUFWriter:
        """Return a writer with metadata, tokenizer, and names, shapes and types of all tensors."""
        config, writer = self.config, gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self.arch])
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType.GUESSED)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_rope_dimension_count(head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        self._add_tokenizer(writer, self.pre_tokenizer)
        for name, tensor in self.tensors.items():
            ggml_type, shape = self._type(name, types), tuple(tensor.shape)
            writer.add_tensor_info(self.names[name], shape, np.dtype(np.float32), stored_bytes(ggml_type, shape), ggml_type)
        if (factors := self._rope_factors()) is not None:
            name = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
            writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
        return writer

    def _add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
        added = self.tokenizer.added_tokens_decoder
        tokens = {i: token for token, i in self.tokenizer.get_vocab().items()}
        kinds = {i: _kind(token, added.get(i)) for i, token in tokens.items()}
        ids = range(self.config.vocab_size)
        writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in ids])
        writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in ids])
        if pre_tokenizer == SENTENCEPIECE:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_token_scores([-float(i) for i in ids])  # tokens are in the order of their merges
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre_tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            special = gguf.SpecialVocab(folder, load_merges=pre_tokenizer != SENTENCEPIECE, n_vocab=self.config.vocab_size)
        special.add_special_token["bos"] = self.tokenizer.bos_token_id in start_tokens(self.tokenizer)
        special.add_to_gguf(writer, quiet=True)
        if pre_tokenizer != SENTENCEPIECE and not special.merges:
            writer.add_token_merges(["! !"])  # llama.cpp needs one, and skips merges whose result is not a token

    def _pre_tokenizer(self) -> str:
        """Return llama.cpp's name of the way in which the tokenizer splits text.

        Found by trial: llama.cpp splits `sample` into the same tokens as the tokenizer. Raise ArtifactError if it never does.
        """
        expected = self.tokenizer.encode(sample(), add_special_tokens=False)
        byte_level = "ByteLevel" in str(self.tokenizer.backend_tokenizer.decoder)
        with tempfile.TemporaryDirectory() as folder:
            for name in PRE_TOKENIZERS if byte_level else (SENTENCEPIECE,):
                writer = gguf.GGUFWriter(path := Path(folder) / name, gguf.MODEL_ARCH_NAMES[self.arch])
                self._add_tokenizer(writer, name)
                _begin(writer)
                writer.close()
                model = load_llama_cpp().Llama(str(path), vocab_only=True, verbose=False)
                if model.tokenize(sample().encode(), add_bos=False, special=True) == expected:
                    return name
        raise ArtifactError(
            "a GGUF file can't be written: llama.cpp does not split text as this tokenizer does. Supported are byte-level BPE "
            f"tokenizers of the kinds {', '.join(PRE_TOKENIZERS)}, and SentencePiece's BPE."
        )


def _begin(writer: gguf.GGUFWriter) -> None:
    """Write everything that comes before the first tensor."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _swapped(rows: Array, heads: int, parts: int) -> Array:
    """Return rows [heads, parts, rest] in the order [heads, rest, parts]."""
    return np.ascontiguousarray(rows.reshape(heads, parts, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def _kind(token: str, added: Any) -> gguf.TokenType:
    """Return llama.cpp's type of a token."""
    if added is not None:
        return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL
