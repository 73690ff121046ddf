"""The outputs of the workers of tensor parallelism, put together, equal those of the whole layer, for every form and mixture of forms."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from acip_vllm.product import FusedProduct
from acip_vllm.shards import StoredLayer, local_rows, stored_layers
from torch import Tensor, nn

from acip.export.quantization import quantized
from acip.modeling_acip import CodedLinear, LowRankLinear, PivotLinear, plain_linear

N = 80  # inputs, of which 1, 2 or 4 workers get equal shares
HEAD = 4  # rows of a head
RANKS = {"factors": (0, 1, 7), "pivot": (0, 5, 16)}
Layer = tuple[dict[str, Any] | None, nn.Module]  # config entry, module


def layer(form: str, M: int, rank: int = 0) -> Layer:
    """Return a random layer and its entry in the config of an export."""
    if form == "dense":
        return None, plain_linear(torch.randn(M, N), None)
    if form == "factors":
        return {"form": form, "rank": rank}, LowRankLinear(torch.randn(M, rank), torch.randn(rank, N), None)
    if form == "pivot":
        rank = min(rank, M)
        pivots_qN, combine = torch.randn(rank, N), torch.randn(M - rank, rank)
        return {"form": form, "rank": rank}, PivotLinear(pivots_qN, combine, torch.randperm(M), None)
    return {"form": form, "rank": None}, CodedLinear(torch.randint(-127, 128, (M, N), dtype=torch.int8), torch.rand(M), None)


LAYERS: dict[str, Callable[[int], Layer]] = {
    "dense": lambda M: layer("dense", M),
    "codes": lambda M: layer("codes", M),
    **{f"{form}-{rank}": partial(layer, form, rank=rank) for form, ranks in RANKS.items() for rank in ranks},
}


def worker_output(
    layers: Sequence[Layer], sizes: Sequence[int], local: Sequence[int], rank: int, x: Tensor, kind: str | None = None, **columns: int
) -> Tensor:
    """Return what worker `rank` computes. `columns` are the first of its inputs and their number; all by default."""
    rows = local_rows(sizes, local, [1] + [columns.get("copies", 1)] * (len(sizes) - 1), rank)
    start, width = columns.get("start", 0), columns.get("width", N)
    entries = [(f"part{i}", row) for i, (row, _) in enumerate(layers)]
    stored = stored_layers(entries, kind, sizes, rows, N, slice(start, start + width))
    pieces = [part.piece(module.state_dict(), torch.float32) for part, (_, module) in zip(stored, layers, strict=True)]
    return FusedProduct(pieces)(x[:, start : start + width])


@torch.no_grad()
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("names", list(product(LAYERS, LAYERS, ("dense", "pivot-5", "codes"))), ids="+".join)
def test_workers_compute_rows_of_query_key_and_value(names: Sequence[str], workers: int) -> None:
    """With four workers and two heads of keys and values, two workers compute the same head of these."""
    heads, key_heads = 4, 2
    sizes = [heads * HEAD, key_heads * HEAD, key_heads * HEAD]
    copies, keys = max(1, workers // key_heads), max(1, key_heads // workers) * HEAD
    layers = [LAYERS[name](size) for name, size in zip(names, sizes, strict=True)]
    x = torch.randn(3, N)
    q, k, v = (module(x) for _, module in layers)
    for rank in range(workers):
        y = worker_output(layers, sizes, [sizes[0] // workers, keys, keys], rank, x, copies=copies)
        own, start = slice(rank * sizes[0] // workers, (rank + 1) * sizes[0] // workers), rank // copies * keys
        expected = torch.cat([q[:, own], k[:, start : start + keys], v[:, start : start + keys]], -1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_workers_compute_rows_of_a_layer_that_is_stored_fused(name: str, workers: int) -> None:
    """In Phi-3, gate and up are one stored layer: a worker computes rows of both."""
    M = 16
    row, module = LAYERS[name](2 * M)
    x = torch.randn(3, N)
    gate, up = module(x).split(M, -1)
    for rank in range(workers):
        own = slice(rank * M // workers, (rank + 1) * M // workers)
        y = worker_output([(row, module)], [M, M], [M // workers] * 2, rank, x)
        torch.testing.assert_close(y, torch.cat([gate[:, own], up[:, own]], -1), rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_workers_with_some_columns_add_up_to_the_layer(name: str, workers: int) -> None:
    M, width = 16, N // workers
    stored = LAYERS[name](M)
    x = torch.randn(3, N)
    parts = [worker_output([stored], [M], [M], 0, x, start=rank * width, width=width) for rank in range(workers)]
    torch.testing.assert_close(torch.stack(parts).sum(0), stored[1](x), rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("form", ["linear", "factors"])
def test_quantized_matrices_are_dequantized_and_shared(kind: str, form: str) -> None:
    """Rows of 80 values have a block of 64 and one that is not full."""
    M, rank, workers = 16, 70, 2
    left, right = plain_linear(torch.randn(M, rank), None), plain_linear(torch.randn(rank, N), None)
    x = torch.randn(3, N)
    module: nn.Module = nn.Module()
    if form == "linear":
        module = quantized(plain_linear(torch.randn(M, N), None), kind)
        whole = module(x)
    else:
        module.left, module.right = quantized(left, kind), quantized(right, kind)
        whole = module.left(module.right(x))
    stored = [({"form": form, "rank": rank}, module)]
    rows = [worker_output(stored, [M], [M // workers], worker, x, kind) for worker in range(workers)]
    torch.testing.assert_close(torch.cat(rows, -1), whole, rtol=1e-4, atol=1e-3)
    columns = [worker_output(stored, [M], [M], 0, x, kind, start=worker * N // 2, width=N // 2) for worker in range(workers)]
    torch.testing.assert_close(torch.stack(columns).sum(0), whole, rtol=1e-4, atol=1e-3)


def test_missing_and_wrong_tensors_are_refused() -> None:
    row, module = layer("pivot", 16, 5)
    stored = StoredLayer("block.q_proj", row, None, 16, N, (slice(0, 16),), slice(0, N))
    tensors = module.state_dict()
    assert stored.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in tensors:
        with pytest.raises(ValueError, match=rf"block\.q_proj\.{name} of the export is missing"):
            stored.piece({key: value for key, value in tensors.items() if key != name}, torch.float32)
    with pytest.raises(ValueError, match=r"has shape \[5, 80\], but its config.json describes \[6, 80\]"):
        replace(stored, row={"form": "pivot", "rank": 6}).piece(tensors, torch.float32)


def test_layers_that_do_not_fit_their_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="worker 3 would compute rows 12 to 16 of an output with 8 rows"):
        local_rows([8], [4], [1], 3)
    with pytest.raises(ValueError, match="3 outputs cannot be made of"):
        stored_layers([("a", None), ("b", None)], None, [4, 4, 4], local_rows([4] * 3, [4] * 3, [1] * 3, 0), N, slice(0, N))


@torch.no_grad()
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_workers_share_a_layer_of_any_size(by: str) -> None:
    """At a rank, dense, and coded, the outputs of two workers, put together, are those of the layer. Its bias is added once."""
    M, rank, x = 16, 7, torch.randn(3, N)
    tensors = {"weight": torch.randn(M, N), "left": torch.randn(rank, M), "right": torch.randn(rank, N), "bias": torch.randn(M)}
    tensors |= {"codes": torch.randint(-127, 128, (M, N), dtype=torch.int8), "steps": torch.rand(M)}

    def outputs(part: Callable[[str], Tensor], x: Tensor) -> Tensor:
        products = (part("weight"), part("left").T @ part("right"), part("codes") * part("steps")[:, None])
        return torch.stack([x @ W_MN.T + part("bias") for W_MN in products])

    def own_part(stored: StoredLayer, side: str) -> Tensor:
        return stored.part(side, tensors[side])

    found = []
    for worker in range(2):
        own = slice(worker * N // 2, (worker + 1) * N // 2) if by == "columns" else slice(0, N)
        rows = slice(0, M) if by == "columns" else slice(worker * M // 2, (worker + 1) * M // 2)
        stored = StoredLayer("layer", None, None, M, N, (rows,), own)
        found.append(outputs(partial(own_part, stored), x[:, own]))
    together = torch.stack(found).sum(0) if by == "columns" else torch.cat(found, -1)
    torch.testing.assert_close(together, outputs(tensors.__getitem__, x), rtol=1e-4, atol=1e-3)
