"""Export a number of bytes as a GGUF file for llama.cpp: each weight in the type that saves the most loss per byte.

    statistics of inputs and gradients -> loss of each weight in each type -> one order (acip.sizing.byte_order) -> the file

model.gguf         the whole file has at most the requested bytes
README.md          the model card
provenance.json    base model, requested and actual bytes, types, versions, and sha256 of the other files; written last

llama.cpp computes with its own types, so a GGUF file is made from the base model and not from the codes of the artifact. Embeddings and
head take part in the order: the error of an embedding is measured in the second moment of the gradients behind it.

Legend: V = vocabulary, M = out features, N = in features, H = hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor, nn
from transformers import PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.coding.error_feedback import damped, row_errors
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.errors import ArtifactError, BudgetError
from acip.export.card import gguf_card
from acip.export.folder import SCHEMA, check_target, public, replaced, versions, write_provenance
from acip.export.ggml_types import EXACT, TYPES, Array, dequantized, exactly, load_llama_cpp, padded, quantized, stored_bytes
from acip.export.gguf_file import GGUFFile, check_model
from acip.layers.targets import find_linears, hooked
from acip.sizing.byte_order import ByteOrder, Version

FILE = "model.gguf"


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
    load_llama_cpp()
    model = artifact.load().materialize()
    tensors = weights_of(model)
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim > 1}
    file = GGUFFile(model.config, artifact.tokenizer(), tensors)
    overhead = file.overhead(matrices)
    if limit_bytes < (smallest := overhead + sum(padded(stored_bytes(candidates(each)[0], each.shape)) for each in matrices.values())):
        raise BudgetError(f"{limit_bytes:,} bytes are too few: the smallest GGUF file of this model takes {smallest:,} bytes.")
    statistics = weight_statistics(model, windows, lambda done, total: progress("statistics", done, total))
    facts = losses(tensors, statistics, lambda done, total: progress("types", done, total))
    chosen = plan(facts, limit_bytes, overhead)
    with replaced(folder) as partial:
        file.write(partial / FILE, chosen.types, lambda name: version(tensors[name], statistics[name], chosen.types[name])[0])
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


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model by their names, without a head that is the same tensor as the embeddings."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}  # shared tensors come once


# ---- the choice of types


def candidates(weight: Tensor) -> list[GGMLType]:
    """Return the types of a weight matrix, from the fewest bytes to the exact one.

    Raise ArtifactError if its rows fit in no blocks.
    """
    columns = weight.shape[1]
    of_rows = [types for size, types in TYPES.items() if columns % size == 0]
    if not of_rows:
        raise ArtifactError(f"a GGUF file can't be written: rows of {columns} numbers are not a multiple of {min(TYPES)}.")
    return [*of_rows[0], EXACT[weight.dtype]]


def version(weight: Tensor, statistics: LayerStatistics, ggml_type: GGMLType) -> tuple[Array, Version]:
    """Return a weight matrix as it is stored in a type, with its bytes in the file and its predicted loss."""
    if ggml_type == EXACT[weight.dtype]:
        stored, loss = exactly(weight), 0.0
    else:
        W_MN, metric_NN = weight.float(), damped(statistics.metric)
        stored = quantized(W_MN, metric_NN, ggml_type)
        loss = 0.5 * float(statistics.importance @ row_errors(W_MN, dequantized(stored, ggml_type), metric_NN))
    return stored, Version(padded(stored.nbytes), loss)


def losses(
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[GGMLType, Version]]:
    """Return the bytes and the predicted loss of each weight in each of its types."""
    facts: dict[str, dict[GGMLType, Version]] = {}
    for done, (name, each) in enumerate(statistics.items()):
        facts[name] = {ggml_type: version(tensors[name], each, ggml_type)[1] for ggml_type in candidates(tensors[name])}
        progress(done + 1, len(statistics))
    return facts


def plan(facts: Mapping[str, Mapping[GGMLType, Version]], limit: int, overhead: int) -> Plan:
    """Return the types with the least predicted loss for a file of at most `limit` bytes, `overhead` of which are not for these weights.

    Raise BudgetError if no types are as small.
    """
    order = ByteOrder({name: list(each.values()) for name, each in facts.items()})
    count = order.within(limit - overhead)
    types = {name: list(facts[name])[version] for name, version in order.at(count).items()}
    return Plan(types, overhead + order.totals[count], order.losses[count])
