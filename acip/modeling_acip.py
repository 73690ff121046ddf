"""A language model of one size as a transformers model: the base model's class with smaller layers in place of linear layers.

This file is all the code that an export needs, and a copy of it is in each exported folder. It imports only torch and
transformers. With acip installed, `import acip` registers it in transformers, and no code from the folder is executed.

config.json is the base model's, with model_type "acip", `base_model_type`, and the form of each compressed layer:

    "acip": {"base_class": "LlamaForCausalLM", "quantize": null,
             "layers": {"model.layers.0.self_attn.q_proj": {"form": "pivot", "rank": 37}, ...}}

    form      tensors                                    y = W x + b from
    dense     weight [M, N]                              the layer of the base model
    linear    weight [M, N]                              an nn.Linear
    factors   right.weight [q, N], left.weight [M, q]    two nn.Linear
    pivot     pivots.weight [q, N], combine.weight       q rows of W, and every other row as a combination of them;
              [M - q, q], place [M], bias                place[i] is the index of row i of W in [pivots, rest]
    codes     stream, steps [M], unit, bias              integer codes with one step size per row (`CodedLinear`)

In a quantized model (nf4, fp4, int8), each of these weights is stored as `codes` and `absmax` (`QuantLinear`).

A model with the field "bfloat16" in "acip" is stored in fewer bytes and decoded when it is loaded. Its tensors of the form codes are

    stream    uint8 [bytes]     the codes [M, N], row by row, one byte each, as Huffman codes (raw deflate without matches)
    steps     float16 [M]       the step sizes, as shares of the unit
    unit      float32 []        the largest step size

and the field gives the other encoded tensors, {NAME: [shape, bytes of each chunk]}, whose bytes `encode_bfloat16` describes. The weight of
a Conv1D layer is encoded as [out, in], as in the artifact: its entry is [[out, in], bytes of each chunk, "transposed"].
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

MODEL_TYPE = "acip"
CODE = "modeling_acip.py"
QUANT_BLOCK = 64  # values of a row that share a scale in 4 bit
LEVELS = {  # the values of the 16 codes in bitsandbytes, before they are multiplied by the scale
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
KINDS = ("nf4", "fp4", "int8")
WEIGHTS = "model.safetensors"
PARTS = ("stream", "steps", "unit")  # of a coded layer in a file
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MIN_CHUNK_BYTES = 8 << 10  # so that small tensors have few chunks
MAX_CHUNKS = 128  # per tensor
FEW_ROWS = 8  # up to which the kernel of torch is faster than a conversion with oneDNN's product, measured on one core with AVX-512
KERNEL_SIDE = 64  # torch's kernel reads beyond the ends of weights whose sides are not multiples of its blocks, and may crash

# The function that loads a model of any size from an artifact. acip.auto sets it; in the copy inside an export it stays None.
# It is a hook and not an import, because transformers refuses a copied file that imports a package which is not installed.
load_artifact: Callable[..., Any] | None = None


@contextmanager
def onednn(on: bool) -> Iterator[None]:
    """Turn oneDNN on or off for matrix products on a CPU. PyTorch's default is on.

    For inputs of one row, PyTorch's own kernels are faster, because oneDNN reorders the weight for each product
    (tests/benchmarks/products.py).
    """
    before = torch._C._get_mkldnn_enabled()
    if before == on:
        yield
        return
    torch._C._set_mkldnn_enabled(on)  # torch.backends.mkldnn.flags does the same, but warns about GPUs
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def kernels(x: Tensor) -> AbstractContextManager[None]:
    """Select the fastest kernels for products of `x` with plain weights: not oneDNN's for one row in bfloat16 on a CPU."""
    return onednn(False) if one_row(x) else nullcontext()


def one_row(x: Tensor) -> bool:
    """Return whether `x` is one row in bfloat16 on a CPU, outside of training and compilation, as in decoding one token."""
    single = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() == x.shape[-1]
    return single and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and trained numbers of a model in `dtype`: float64 for float64, and float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def widened(values: Tensor) -> Tensor:
    """Return `values` in the dtype that sums of them are computed in (see `accumulation_dtype`)."""
    return values.to(accumulation_dtype(values.dtype))


class LowRankLinear(nn.Module):
    """y = L (R x) + b: a compressed layer as two plain linear layers (paper eq. 9, 10)."""

    def __init__(self, left_Mq: Tensor, right_qN: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        (self.out_features, self.rank), self.in_features = left_Mq.shape, right_qN.shape[1]
        self.right = plain_linear(right_qN, None)
        self.left = plain_linear(left_Mq, bias_M)

    def forward(self, x: Tensor) -> Tensor:
        with kernels(x):
            return self.left(self.right(x))


class PivotLinear(nn.Module):
    """y_p = W_p x, y_rest = C y_p: a layer of rank q, stored as q of its rows and the other rows as combinations of them.

    This takes q (M + N - q) numbers, two factors take q (M + N). `place` [M] is the position of each row in [y_p, y_rest]
    (the storage of PIFA).
    """

    def __init__(self, pivots_qN: Tensor, combine: Tensor, place_M: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        self.rank, self.in_features = pivots_qN.shape
        self.out_features = len(place_M)
        self.pivots = plain_linear(pivots_qN, None)
        self.combine = plain_linear(combine, None)
        self.register_buffer("place", place_M)
        self.place: Tensor
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach().clone(), requires_grad=False)

    @classmethod
    def of(cls, left_Mq: Tensor, right_qN: Tensor, bias_M: Tensor | None, dtype: torch.dtype) -> "PivotLinear":
        """Make the layer from two factors. The combinations are fitted to the pivot rows after these are rounded to `dtype`."""
        rows_M = pivot_rows(left_Mq)
        q = left_Mq.shape[1]
        W_MN = widened(left_Mq) @ widened(right_qN)
        pivots_qN = W_MN[rows_M[:q]].to(dtype)
        Q, R = torch.linalg.qr(pivots_qN.double().T)
        rest = Q.T @ W_MN[rows_M[q:]].double().T
        deficient = R.diagonal().abs() <= 1e-12 * R.diagonal().abs().max() if q else R.diagonal().bool()
        R[deficient] = torch.eye(q, dtype=R.dtype, device=R.device)[deficient]  # rank-deficient rows, for example of an all-zero layer
        rest[deficient] = 0.0
        combine = torch.linalg.solve_triangular(R, rest, upper=True).T
        return cls(pivots_qN.contiguous(), combine.to(dtype).contiguous(), torch.argsort(rows_M), bias_M)

    def forward(self, x: Tensor) -> Tensor:
        with kernels(x):
            y_p = self.pivots(x)
            y = torch.cat([y_p, self.combine(y_p)], -1).index_select(-1, self.place)
        return y if self.bias is None else y + self.bias


def pivot_rows(left_Mq: Tensor) -> Tensor:
    """Return the row indices [M] of a matrix with factor `left`, the q pivots first.

    The pivots are chosen by LU, so that the other rows are combinations of them with small coefficients.
    """
    pivots = left_Mq.new_zeros(0, dtype=torch.int32)
    if left_Mq.numel():
        pivots = torch.linalg.lu_factor_ex(left_Mq.double()).pivots  # _ex: columns of zeros are not an error
    rows = list(range(left_Mq.shape[0]))
    for i, j in enumerate((pivots - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    return torch.tensor(rows, device=left_Mq.device)


def plain_linear(weight_MN: Tensor, bias_M: Tensor | None) -> nn.Linear:
    """Return an nn.Linear with the given weight and a copy of the bias, without allocating or initializing a weight."""
    layer = nn.Linear(1, 1, bias=bias_M is not None, device="meta")
    layer.out_features, layer.in_features = weight_MN.shape
    layer.weight = nn.Parameter(weight_MN, requires_grad=False)
    if bias_M is not None:
        layer.bias = nn.Parameter(bias_M.detach().clone(), requires_grad=False)
    return layer


class QuantLinear(nn.Module):
    """y = W x + b with the matrix in 8 or 4 bit. It is dequantized for each product (W8A16, W4A16).

    int8         `codes` int8 [M, N], `absmax` float32 [M, 1]: W = codes absmax / 127
    nf4, fp4     `codes` uint8 [M, ceil(N / 64) 32], two codes per byte, the first in the high bits; `absmax` float32 [M, ceil(N / 64)]

    Codes and scales are computed as in bitsandbytes, except that a block never crosses rows. Its Linear4bit lets blocks cross rows;
    on a CPU it then gives wrong results for some shapes, and fails for most ranks (bitsandbytes 0.50). This layer needs no special
    kernels: it runs on any device, but is not fast.
    """

    def __init__(self, codes: Tensor, absmax: Tensor, in_features: int, kind: str, bias_M: Tensor | None) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, in_features, len(codes)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.codes: Tensor
        self.absmax: Tensor
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach().clone(), requires_grad=False)

    @classmethod
    def blank(cls, layer: nn.Module, kind: str) -> "QuantLinear":
        """Return a quantized layer of zeros in the shape of `layer`, to load weights into."""
        (M, N), device = weight_MN(layer).shape, weight_MN(layer).device
        blocks = 1 if kind == "int8" else -(-N // QUANT_BLOCK)
        codes = torch.zeros(M, N, dtype=torch.int8, device=device)
        if kind != "int8":
            codes = torch.zeros(M, blocks * QUANT_BLOCK // 2, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(M, blocks, device=device), N, kind, bias_of(layer))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return W [M, N] in `dtype`."""
        absmax = self.absmax.float()
        if self.kind == "int8":
            return (self.codes * (absmax / 127)).to(dtype)
        pairs = _pairs(self.kind, self.codes.device)[self.codes.int()]  # [M, bytes, 2]
        W = pairs.reshape(*absmax.shape, QUANT_BLOCK) * absmax[..., None]
        return W.flatten(1)[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


@lru_cache(maxsize=16)
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Return the two values of each byte, [256, 2]."""
    levels = torch.tensor(LEVELS[kind])
    return torch.cartesian_prod(levels, levels).to(device)


class CodedLinear(nn.Module):
    """y_m = t_m sum over n of c_mn x_n + b_m: a layer that computes with its integer codes.

    In memory, it takes M N bytes of codes and 4 M bytes of step sizes. Codes are exact in every floating point dtype. Where no kernel
    reads 8-bit weights, a product converts the codes of its layer to the dtype of the input, and frees them afterwards.
    """

    def __init__(self, codes_MN: Tensor, steps_M: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_MN.shape
        self.register_buffer("codes", codes_MN)
        self.register_buffer("steps", steps_M.float())
        self.codes: Tensor  # int8 [M, N]
        self.steps: Tensor  # float32 [M]
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = integer_product(x, self.codes) * self.steps
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CodedLinear":
        """Move or cast the layer. Step sizes are moved, but stay in float32."""
        steps_M = self.steps
        super()._apply(fn, recurse)
        self.steps = steps_M.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def integer_product(x: Tensor, codes_MN: Tensor) -> Tensor:
    """Return x C^T [..., M] in the dtype of `x`; in float32 for float16, whose range is too small for the product."""
    if _has_kernel(x, codes_MN):
        x_SN = x.reshape(-1, x.shape[-1]).contiguous()
        return torch._weight_int8pack_mm(x_SN, codes_MN, x.new_ones(len(codes_MN))).view(*x.shape[:-1], len(codes_MN))
    x = x.float() if x.dtype == torch.float16 else x
    return F.linear(x, codes_MN.to(x.dtype))


def _has_kernel(x: Tensor, codes_MN: Tensor) -> bool:
    """Return whether torch's kernel for 8-bit weights computes this product, and is faster."""
    return (
        hasattr(torch, "_weight_int8pack_mm")
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and not any(side % KERNEL_SIDE for side in codes_MN.shape)
        and codes_MN.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)  # the kernel has no derivative
        and not torch.compiler.is_compiling()
    )


def swap_linears(model: nn.Module, layers: Mapping[str, Any], make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace every linear layer among the modules named in `layers`, or inside them, by `make(linear)`."""
    for name in layers:
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear | PivotLinear):
            for part, linear in list(module.named_children()):
                setattr(module, part, make(linear))
        else:
            set_module(model, name, make(module))


def shrink(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace layers of a base model by layers of zeros with the given forms and ranks, to load weights into."""
    for name, row in layers.items():
        try:
            original = model.get_submodule(name)
            (M, N), weight = weight_MN(original).shape, weight_MN(original)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"config.json describes a layer {name!r}, which this model does not have. Export the model again.") from error
        form, q = row.get("form"), row.get("rank", 0)
        if form == "dense":
            continue
        ranked = form in ("factors", "pivot")
        if not (form in ("linear", "codes") or (ranked and isinstance(q, int) and 0 <= q <= min(M, N))):
            raise ValueError(
                f"config.json describes layer {name!r} [{M}, {N}] as {dict(row)!r}; allowed are form dense, linear, codes, factors or "
                f"pivot, the last two with a rank from 0 to {min(M, N)}. Export the model again."
            )
        empty: Any = {"dtype": weight.dtype, "device": weight.device}
        new: nn.Module
        if form == "linear":
            new = plain_linear(torch.zeros(M, N, **empty), bias_of(original))
        elif form == "codes":
            codes_MN = torch.zeros(M, N, dtype=torch.int8, device=weight.device)
            new = CodedLinear(codes_MN, torch.zeros(M, device=weight.device), bias_of(original))
        elif form == "factors":
            new = LowRankLinear(torch.zeros(M, q, **empty), torch.zeros(q, N, **empty), bias_of(original))
        else:
            place = torch.arange(M, device=weight.device)
            new = PivotLinear(torch.zeros(q, N, **empty), torch.zeros(M - q, q, **empty), place, bias_of(original))
        set_module(model, name, new.requires_grad_(True))


def keep_attention_cap(config: Any) -> None:
    """Make transformers use eager attention, from now on, for a model that caps the logits of its attention (Gemma 2).

    PyTorch's sdpa has no cap, and versions of transformers before 5.20 use it for these models by default, without a warning.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) and type(config) in classes:
        classes[type(config)]._supports_sdpa = False


def weight_MN(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as [out, in]. GPT-2's Conv1D stores it as [in, out]."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{type(layer).__name__} is not a linear layer: it has no weight matrix.")
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias of a linear layer, or None if it has none."""
    bias = layer.bias
    return bias if isinstance(bias, Tensor) else None


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into `model` under the dotted name `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ---- tensors in files


def huffman(content: bytes) -> bytes:
    """Return bytes as a stream of Huffman codes."""
    coder = zlib.compressobj(level=9, method=zlib.DEFLATED, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(content) + coder.flush()


def from_huffman(stream: bytes | memoryview, count: int | None = None) -> bytes:
    """Return the bytes of a stream. Raises ValueError if it is damaged or does not hold `count` bytes (None = any number)."""
    decoder = zlib.decompressobj(wbits=-15)
    most = 8 * len(stream) if count is None else count  # a code takes at least one bit
    try:
        content = decoder.decompress(stream, most + 1)  # a damaged stream cannot fill the memory
    except zlib.error as error:
        raise ValueError(f"is damaged: {error}") from error
    if len(content) > most or (count is not None and len(content) != count) or not decoder.eof or decoder.unused_data:
        raise ValueError("is damaged" if count is None else f"does not hold the {count:,} codes of its layer")
    return content


def as_shares(steps_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return step sizes as they are stored: the largest as a float32 scalar, and all as float16 shares [M] of it."""
    unit = steps_M.float().max()
    return unit, (steps_M / unit).half().clamp_min(2.0**-24)


def from_shares(unit: Tensor, shares_M: Tensor) -> Tensor:
    """Return the step sizes [M] of stored shares, in float32. Stored steps keep their values: the largest share is 1."""
    return shares_M.float() * unit


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Return the rows of one chunk, the unit in which a tensor is read and encoded."""
    return max(1, -(-rows // MAX_CHUNKS), MIN_CHUNK_BYTES // max(1, row_bytes))


def encode_bfloat16(numbers: Tensor) -> bytes:
    """Return bfloat16 numbers as one chunk: low bytes as they are, then high bytes as Huffman codes.

    A number is rotated to the left by one bit, so that its high byte is the exponent, and its low byte mantissa and sign.
    """
    bits = numbers.contiguous().view(torch.int16).numpy().view(np.uint16).ravel()
    rotated = (bits << 1) | (bits >> 15)
    return rotated.astype(np.uint8).tobytes() + huffman((rotated >> 8).astype(np.uint8).tobytes())


def decode_bfloat16(content: memoryview, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the bfloat16 numbers of chunks, in one dimension. A chunk has `sizes` bytes and `counts` numbers.

    Raise ValueError if a chunk is damaged, or holds another number of numbers.
    """
    bits = np.empty(sum(counts), np.uint16)
    start = done = 0
    for size, count in zip(sizes, counts, strict=True):
        low = np.frombuffer(content, np.uint8, count, start)
        high = np.frombuffer(from_huffman(content[start + count : start + size], count), np.uint8)
        rotated = (high.astype(np.uint16) << 8) | low
        bits[done : done + count] = (rotated >> 1) | (rotated << 15)
        start, done = start + size, done + count
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def encoded_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a model as they are stored in fewer bytes, tied ones once, and the field "bfloat16" of its config."""
    coded = {f"{name}.codes": layer for name, layer in model.named_modules() if isinstance(layer, CodedLinear)}
    skipped = {f"{key.removesuffix('.codes')}.steps" for key in coded}
    targets = {f"{name}.weight": model.get_submodule(name) for name in cast(Any, model).config.acip["layers"]}
    transposed = {key for key, layer in targets.items() if type(layer).__name__ == "Conv1D"}
    stored: dict[str, Tensor] = {}
    chunks: dict[str, Any] = {}
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in coded:
            stored |= {f"{key.removesuffix('codes')}{part}": value for part, value in _packed(coded[key]).items()}
        elif key not in skipped and id(tensor) not in seen:
            seen.add(id(tensor))
            stored[key] = tensor.detach().cpu()
            if tensor.dtype == torch.bfloat16 and tensor.nbytes >= MIN_CHUNK_BYTES:
                plain = stored[key].T if key in transposed else stored[key]
                parts = [encode_bfloat16(rows) for rows in plain.split(chunk_rows(len(plain), plain[0].nbytes))]
                stored[key] = _bytes(b"".join(parts))
                chunks[key] = [list(plain.shape), [len(part) for part in parts], *(["transposed"] if key in transposed else [])]
    return stored, chunks


def decoded_tensors(stored: dict[str, Tensor], acip: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a model from those of its files. `acip` is the field of its config; `stored` is emptied.

    Raise ValueError if tensors are missing or damaged.
    """

    def codes(name: str) -> dict[str, Tensor]:
        stream, shares_M, unit = (stored.pop(f"{name}.{part}") for part in PARTS)
        M = len(shares_M)
        flat = torch.frombuffer(bytearray(from_huffman(stream.numpy().tobytes())), dtype=torch.int8)
        if not M or len(flat) % M:
            raise ValueError(f"does not hold the codes of {M:,} rows")
        return {f"{name}.codes": flat.view(M, -1), f"{name}.steps": from_shares(unit, shares_M)}

    def numbers(name: str) -> dict[str, Tensor]:
        shape, sizes, *transposed = acip["bfloat16"][name]
        row = math.prod(shape[1:])
        step = chunk_rows(shape[0], 2 * row)
        counts = [min(step, shape[0] - first) * row for first in range(0, shape[0], step)]
        content = stored.pop(name)
        if sum(sizes) != len(content) or any(8 * (size - count) < count for size, count in zip(sizes, counts, strict=True)):
            raise ValueError(f"does not hold {sum(counts):,} numbers")
        decoded = decode_bfloat16(content.numpy().data, sizes, counts).view(shape)
        return {name: decoded.T.contiguous() if transposed else decoded}

    def decoded(job: tuple[Callable[[str], dict[str, Tensor]], str]) -> dict[str, Tensor]:
        decode, name = job
        try:
            return decode(name)
        except KeyError as error:
            raise ValueError(f"the files of this model lack {error}. Export it again, or fetch the whole folder.") from error
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the stored tensor of {name} {error}. Export the model again, or fetch the whole folder.") from error

    jobs = [(codes, name) for name, row in acip["layers"].items() if row["form"] == "codes"]
    jobs += [(numbers, name) for name in acip["bfloat16"]]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib runs in parallel
        tensors = {key: tensor for part in pool.map(decoded, jobs) for key, tensor in part.items()}
    return tensors | stored


def _packed(layer: "CodedLinear") -> dict[str, Tensor]:
    """Return the tensors of a coded layer as they are stored."""
    unit, shares_M = as_shares(layer.steps.cpu())
    return {"stream": _bytes(huffman(layer.codes.cpu().contiguous().numpy().tobytes())), "steps": shares_M, "unit": unit}


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# ---- the classes for transformers


class AcipConfig(PreTrainedConfig):
    """The config class of model_type "acip". It returns a `CompressedConfig` of the base model's config class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config that the fields of an export's or an artifact's config.json describe."""
        fields = {key: value for key, value in config_dict.items() if key not in ("model_type", "auto_map", "architectures")}
        base_type, acip = fields.pop("base_model_type", None), fields.get("acip")
        if not isinstance(base_type, str) or not isinstance(acip, dict) or not isinstance(acip.get("layers"), dict):
            raise ValueError(
                'config.json has model_type "acip" but lacks base_model_type, or "acip": {"base_class", "layers"}. Export again.'
            )
        if "quantise" in acip:  # the spelling of exports before version 0.1
            fields["acip"] = acip = {("quantize" if key == "quantise" else key): value for key, value in acip.items()}
        config_class, _ = classes(base_type, str(acip.get("base_class")))
        return config_class.from_dict(fields, **kwargs)


def artifact_config(config: dict[str, Any], base_class: str) -> dict[str, Any]:
    """Return the config.json of an artifact, for the config.json of its base model. transformers can load it if acip is installed."""
    acip: dict[str, Any] = {"base_class": base_class, "quantize": None, "layers": {}, "artifact": True}
    architectures = [f"Acip{base_class}"]
    return config | {"model_type": MODEL_TYPE, "base_model_type": config["model_type"], "architectures": architectures, "acip": acip}


def base_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of the base model, for the fields of an `artifact_config`."""
    from transformers import CONFIG_MAPPING

    kept = {key: value for key, value in fields.items() if key not in ("model_type", "base_model_type", "acip")}
    config: PreTrainedConfig = CONFIG_MAPPING[fields["base_model_type"]].from_dict(kept | {"architectures": [fields["acip"]["base_class"]]})
    return config


class CompressedConfig:
    """A mixin for the base model's config class. In memory it is that class; on disk it is an `AcipConfig`."""

    model_type: str
    acip: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of config.json."""
        written: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return written | {
            "model_type": MODEL_TYPE,
            "base_model_type": type(self).model_type,
            "architectures": [f"Acip{self.acip['base_class']}"],
            "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.AcipConfig"},  # the model class is found through the config
        }


class CompressedModel:
    """A mixin for the base model's class. Before weights are loaded, its layers get the forms and ranks of the config."""

    _keep_in_fp32_modules_strict = ("absmax", "steps")

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        shrink(model, config.acip["layers"])
        kind = config.acip.get("quantize")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"config.json has quantize {kind!r}; allowed are {', '.join(KINDS)} or null.")
        if kind is not None:
            swap_linears(model, config.acip["layers"], lambda linear: QuantLinear.blank(linear, kind))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load an export, or a model of any size from an artifact (acip.modeling.load_artifact).

        Raise ImportError for an artifact if acip is not imported, and ValueError for an export that is damaged.
        """
        where, hub = pretrained_model_name_or_path, {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        known = config if isinstance(config, PreTrainedConfig) or where is None else AcipConfig.from_pretrained(config or where, **hub)
        acip = getattr(known, "acip", {})
        if acip.get("artifact"):
            if load_artifact is None:
                raise ImportError("this folder is an artifact, which only acip can load: install acip, and import it first.")
            attention = kwargs.pop("attn_implementation", None) or known._attn_implementation_internal  # set there by transformers
            return load_artifact(where, attn_implementation=attention, **kwargs)
        if where is None or acip.get("bfloat16") is None:
            return super().from_pretrained(where, *args, config=config, **kwargs)  # type: ignore[misc]
        tensors = decoded_tensors(read_tensors(where, hub), acip)
        others = {key: value for key, value in kwargs.items() if key not in hub}
        loaded = super().from_pretrained(None, *args, config=known, state_dict=tensors, **others)  # type: ignore[misc]
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        model.config.name_or_path = model.name_or_path = str(where)
        if kwargs.get("generation_config") is None:
            with suppress(OSError):  # there is none
                model.generation_config = GenerationConfig.from_pretrained(where, **hub)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the model as transformers does, and this file with it. Raise ValueError for `state_dict` if layers are coded."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        target, model = Path(save_directory) / CODE, cast(Any, self)
        if not target.exists():
            shutil.copyfile(__file__, target)
        if model.config.acip.get("bfloat16") is not None and not getattr(self, "_hf_peft_config_loaded", False):
            if kwargs.get("state_dict") is not None:
                raise ValueError("the tensors of a model with coded layers are encoded when it is saved: leave state_dict out.")
            tensors, model.config.acip["bfloat16"] = encoded_tensors(model)
            kwargs |= {"state_dict": tensors, "save_original_format": False}
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def read_tensors(where: Any, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all stored tensors of an export: a folder, or a repository of the hub with the arguments `hub`."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    index = cached_file(where, f"{WEIGHTS}.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    files = [WEIGHTS] if index is None else sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(str(cached_file(where, file, **hub))).items()}


def __getattr__(name: str) -> Any:
    """Return a class that `classes` makes, by its name. pickle needs this to find the classes in another process."""
    import transformers

    base_class = name.removeprefix("Acip").removesuffix("Config")
    base: Any = getattr(transformers, base_class, None) if name.startswith("Acip") else None
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base_config: Any = base.config_class
    config_class, model_class = classes(base_config.model_type, base_class)
    return config_class if name.endswith("Config") else model_class


@cache
def classes(base_type: str, base_class: str) -> tuple[Any, Any]:
    """Return the config class and the model class of compressed models of `base_class`, and register both in transformers."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

    base_model = getattr(transformers, base_class, None)
    if base_type not in CONFIG_MAPPING or not (isinstance(base_model, type) and issubclass(base_model, PreTrainedModel)):
        raise ValueError(
            f"this is a compressed {base_class} ({base_type}), a class that transformers {transformers.__version__} "
            "does not have. Upgrade transformers."
        )
    base_config = CONFIG_MAPPING[base_type]
    plans = dict.fromkeys(("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"))  # they describe the layers of the base model
    # the value in a config that is made without arguments, as transformers does to print a config
    defaults: dict[str, Any] = {"base_class": base_class, "quantize": None, "layers": {}}
    body = {"__module__": __name__, "model_type": base_config.model_type, "__doc__": CompressedConfig.__doc__, "acip": defaults, **plans}
    config_class: Any = type(f"Acip{base_class}Config", (CompressedConfig, base_config), body)
    keep = (*(base_model._keep_in_fp32_modules_strict or ()), *CompressedModel._keep_in_fp32_modules_strict)
    body = {
        "__module__": __name__, "__doc__": CompressedModel.__doc__, "config_class": config_class,
        "_keep_in_fp32_modules_strict": list(keep),
    }  # fmt: skip
    if getattr(base_config(), "attn_logit_softcapping", None):
        body["_supports_sdpa"] = False  # it has no cap
    model_class: Any = type(f"Acip{base_class}", (CompressedModel, base_model), body)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class
