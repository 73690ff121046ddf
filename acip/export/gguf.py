"""Export a number of bytes as a GGUF file for llama.cpp: each weight in the type that saves the most loss per byte.

    statistics of inputs and gradients -> loss of each weight in each type -> one order (acip.sizing.byte_order) -> the file

model.gguf         the whole file has at most the requested bytes
README.md          the model card
provenance.json    base model, requested and actual bytes, types, versions, and sha256 of the other files; written last

llama.cpp computes with its own types, so a GGUF file is made from the base model and not from the codes of the artifact. Embeddings and
head take part in the order: the error of an embedding is measured in the second moment of the gradients behind it.

Legend: V = vocabulary, M = out features, N = in features, H = hidden size.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.coding.error_feedback import damped, row_errors
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.data import start_tokens
from acip.errors import ArtifactError, BudgetError
from acip.export.card import gguf_card
from acip.export.folder import SCHEMA, check_target, public, replaced, versions, write_provenance
from acip.export.ggml_types import EXACT, TYPES, dequantized, exactly, fits, llama_cpp, quantized, stored_bytes
from acip.layers.targets import find_linears, hooked
from acip.sizing.byte_order import ByteOrder, Version

FILE = "model.gguf"
SENTENCEPIECE = "sentencepiece"
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
ROPES = ("default", "linear", "llama3")
PRE_TOKENIZERS = ("llama-bpe", "qwen2", "smollm", "gpt-2", "llama4", "deepseek-llm", "tekken", "stablelm2", "falcon", "starcoder", "refact")
SAMPLE = (
    "Hello, world! It's 2024: don't\n\n\n  stop\t\t at 3 33 333 3333 33333.5 items...  \r\n"
    "\u00dcber \u4f60\u597d\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f680 "
    "camelCase x_1 = {'a': [1, 2]};  \n    return I'VE WE'LL ====---- \"\"\"'''"
)  # text that llama.cpp must split into the same tokens as the tokenizer


@dataclass(frozen=True)
class Plan:
    """The type of each weight, and what they give together."""

    types: Mapping[str, GGMLType]
    bytes: int  # of the whole file
    loss: float  # predicted, in nats per token, above the base model's


def export_gguf(
    artifact: Artifact,
    folder: str | Path,
    limit_bytes: int,
    windows: Tensor,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write the base model of an artifact to `folder` as a GGUF file of at most `limit_bytes`, and return its provenance.

    `windows` are token ids [n, T] of text, on which the importance of each weight is measured. An earlier export in `folder` is replaced.
    Raise BudgetError if no file is as small, and ArtifactError if llama.cpp does not run such a model or llama_cpp is not installed.
    """
    folder = check_target(folder)
    check_model(artifact.config)
    llama_cpp()
    model = artifact.load().materialize()
    tensors = weights_of(model)
    file = GGUFFile(model.config, artifact.tokenizer(), tensors)
    statistics = weight_statistics(model, windows, lambda done, total: progress("statistics", done, total))
    facts = losses(tensors, statistics, lambda done, total: progress("types", done, total))
    chosen = plan(facts, limit_bytes, file.overhead(statistics))
    with replaced(folder) as partial:
        file.write(partial / FILE, chosen.types, statistics)
        written = (partial / FILE).stat().st_size
        assert written == chosen.bytes <= limit_bytes, f"{written:,} bytes instead of {chosen.bytes:,}"
        manifest = public(artifact.manifest)
        names = [each.name for each in chosen.types.values()]
        provenance = {
            "acip_export": SCHEMA,
            "format": "gguf",
            "base": manifest["base"],
            "recipe": manifest["recipe"],
            "artifact": manifest["provenance"],
            "size": {"asked": limit_bytes, "got": written, "unit": "bytes", "predicted_loss_increase": chosen.loss},
            "types": {name: names.count(name) for name in sorted(set(names))},
            "packages": versions("acip", "torch", "transformers", "gguf", "llama_cpp_python"),
        }
        (partial / "README.md").write_text(gguf_card(provenance, artifact, folder.name), encoding="utf-8")
        write_provenance(partial, provenance)
    return provenance


# ---- statistics


def weight_statistics(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, LayerStatistics]:
    """Return the statistics of every weight that can be quantized, by its name in the state dict, from token ids [n, T].

    These are the linear layers, the embeddings, and the head unless it is the same tensor as the embeddings.
    """
    linears: dict[str, nn.Module] = {**find_linears(model), "head": model.get_output_embeddings()}
    hidden, size = 0.0, model.config.get_text_config().vocab_size

    def hook(_layer: nn.Module, _args: Any, out: Tensor) -> None:
        def add(grad: Tensor) -> None:
            nonlocal hidden
            g_SH = grad.reshape(-1, grad.shape[-1]).float()
            hidden = hidden + g_SH.T @ g_SH

        if not out.requires_grad:
            out.requires_grad_()
        out.register_hook(add)

    with hooked([model.get_input_embeddings().register_forward_hook(hook)]):
        statistics = layer_statistics(model, linears, windows, progress=progress)
    head = statistics.pop("head")
    # an embedding is read with the frequency of its token, 1 / V in the mean
    embedding = LayerStatistics(torch.as_tensor(hidden) / windows.numel(), torch.full((size,), 1 / size))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = [names[id(table.weight)] for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    if tables[0] == tables[1]:
        both_HH = embedding.metric / size + head.importance.mean() * head.metric
        tied = {tables[0]: LayerStatistics(both_HH, torch.ones(size))}
    else:
        tied = dict(zip(tables, (embedding, head), strict=True))
    return {**{f"{name}.weight": each for name, each in statistics.items()}, **tied}


# ---- the choice of types


def candidates(weight: Tensor) -> list[GGMLType]:
    """Return the types of a weight matrix: those that its rows fit in, and the exact one."""
    return [each for each in (*TYPES, EXACT[weight.dtype]) if fits(each, weight.shape[1])]


def losses(
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[GGMLType, Version]]:
    """Return the bytes and the predicted loss of each weight in each of its types."""
    facts: dict[str, dict[GGMLType, Version]] = {}
    for done, (name, each) in enumerate(statistics.items()):
        W_MN, metric_NN = tensors[name].float(), damped(each.metric)
        facts[name] = {}
        for ggml_type in candidates(tensors[name]):
            loss = 0.0
            if ggml_type != EXACT[tensors[name].dtype]:
                V_MN = dequantized(quantized(W_MN, metric_NN, ggml_type), ggml_type)
                loss = 0.5 * float(each.importance @ row_errors(W_MN, V_MN, metric_NN))
            facts[name][ggml_type] = Version(_padded(stored_bytes(ggml_type, W_MN.shape)), loss)
        progress(done + 1, len(statistics))
    return facts


def plan(facts: Mapping[str, Mapping[GGMLType, Version]], limit: int, overhead: int) -> Plan:
    """Return the types with the least predicted loss for a file of at most `limit` bytes, `overhead` of which are not for these weights.

    Raise BudgetError if no types are as small.
    """
    order = ByteOrder({name: list(each.values()) for name, each in facts.items()})
    if limit < (smallest := overhead + order.totals[0]):
        raise BudgetError(f"{limit:,} bytes are too few: the smallest GGUF file of this model takes {smallest:,} bytes.")
    count = order.within(limit - overhead)
    types = {name: list(facts[name])[version] for name, version in order.at(count).items()}
    return Plan(types, overhead + order.totals[count], order.losses[count])


def _padded(size: int) -> int:
    return gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)


# ---- the file


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model by their names, without a head that is the same tensor as the embeddings."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}  # shared tensors come once


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
        f"a GGUF file can't be written: {problem}. Supported are {', '.join(ARCHITECTURES)} with positions of the types {', '.join(ROPES)}, "
        "silu and full attention. For other models, export a transformers folder, and convert it with llama.cpp's convert_hf_to_gguf.py."
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
            writer = self._writer(Path(folder) / FILE, {})
            for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
                step()
            writer.close()
            size = _padded((Path(folder) / FILE).stat().st_size)
        others = ((name, tensor) for name, tensor in self.tensors.items() if name not in quantizable)
        return size + sum(_padded(stored_bytes(self._type(name, {}), tuple(tensor.shape))) for name, tensor in others)

    def write(self, path: Path, types: Mapping[str, GGMLType], statistics: Mapping[str, LayerStatistics]) -> None:
        """Write the file. Weights without a type in `types` are stored exactly; `statistics` are those of the others."""
        writer = self._writer(path, types)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
            step()
        for name, tensor in self.tensors.items():
            ggml_type = self._type(name, types)
            if ggml_type in EXACT.values():
                stored = exactly(tensor if tensor.ndim > 1 else tensor.float())
            else:
                stored = quantized(tensor.float(), damped(statistics[name].metric), ggml_type)
            writer.write_tensor_data(self.rows_in_llama_cpp(name, stored))
        if (factors := self._rope_factors()) is not None:
            writer.write_tensor_data(factors)
        writer.close()

    def _type(self, name: str, types: Mapping[str, GGMLType]) -> GGMLType:
        tensor = self.tensors[name]
        return types.get(name, EXACT[tensor.dtype]) if tensor.ndim > 1 else GGMLType.F32

    def rows_in_llama_cpp(self, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the rows of a tensor in llama.cpp's order: its Llama rotates neighbors of queries and keys instead of halves."""
        heads = self._rotated_heads(name)
        return rows if heads is None else _swapped(rows, heads, 2)

    def rows_in_transformers(self, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the rows of a tensor of a GGUF file in transformers' order."""
        heads = self._rotated_heads(name)
        return rows if heads is None else _swapped(rows, heads, len(rows) // heads // 2)

    def _rotated_heads(self, name: str) -> int | None:
        """Return the number of heads if the rows of a tensor have another order in llama.cpp, else None."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(name.split(".")[-2]) if self.arch == gguf.MODEL_ARCH.LLAMA else None

    def _rope_factors(self) -> np.ndarray[Any, Any] | None:
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
        kinds = [_kind(token, added.get(i)) for i, token in tokens.items()]
        kinds = dict(zip(tokens, kinds, strict=True))
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
        special.add_special_token["bos"] = self.tokenizer.bos_token_id is not None and self.tokenizer.bos_token_id in start_tokens(
            self.tokenizer
        )
        special.add_to_gguf(writer, quiet=True)
        if pre_tokenizer != SENTENCEPIECE and not special.merges:
            writer.add_token_merges(["! !"])  # llama.cpp needs one, and skips merges whose result is not a token

    def _pre_tokenizer(self) -> str:
        """Return llama.cpp's name of the way in which the tokenizer splits text.

        Found by trial: llama.cpp splits a sample of text into the same tokens as the tokenizer. Raise ArtifactError if it never does.
        """
        expected = self.tokenizer.encode(SAMPLE, add_special_tokens=False)
        byte_level = "ByteLevel" in str(self.tokenizer.backend_tokenizer.decoder)
        with tempfile.TemporaryDirectory() as folder:
            for name in PRE_TOKENIZERS if byte_level else (SENTENCEPIECE,):
                writer = gguf.GGUFWriter(path := Path(folder) / name, gguf.MODEL_ARCH_NAMES[self.arch])
                self._add_tokenizer(writer, name)
                for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
                    step()
                writer.close()
                model = llama_cpp().Llama(str(path), vocab_only=True, verbose=False)
                if model.tokenize(SAMPLE.encode(), add_bos=False, special=True) == expected:
                    return name
        raise ArtifactError(
            "a GGUF file can't be written: llama.cpp does not split text as this tokenizer does. Supported are byte-level BPE tokenizers of "
            f"the kinds {', '.join(PRE_TOKENIZERS)}, and SentencePiece's BPE."
        )


def _swapped(rows: np.ndarray[Any, Any], heads: int, parts: int) -> np.ndarray[Any, Any]:
    """Return rows [heads, parts, rest] in the order [heads, rest, parts]."""
    return np.ascontiguousarray(rows.reshape(heads, parts, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def _kind(token: str, added: Any) -> gguf.TokenType:
    """Return llama.cpp's type of a token."""
    if added is not None:
        return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL
