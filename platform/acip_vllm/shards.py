"""The matrices of a compressed layer, and the part of them that one worker of tensor parallelism computes with.

A worker computes some rows of y = W x (column parallelism, in vLLM's words), or adds the products of some columns of W (row parallelism),
where the workers' results are summed. Both are exact for every form:

    form            the first matrix [a, N], of which all forms take columns     rows of W are taken from
    dense, linear   W                                                            W
    factors         right [q, N]                                                 left [M, q]
    pivot           pivots [q, N]                                                combine [M - q, q], through place [M]
    codes           codes [M, N]                                                 codes and steps [M]

Legend: M rows (outputs) and N columns (inputs) of a stored layer, q its rank, m and n those of one worker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acip.modeling_acip import QUANT_BLOCK, QuantLinear

MATRICES = {  # the tensors of each form, with their shapes
    "dense": {"weight": "MN"},
    "linear": {"weight": "MN"},
    "factors": {"right.weight": "qN", "left.weight": "Mq"},
    "pivot": {"pivots.weight": "qN", "combine.weight": "Rq", "place": "M"},
    "codes": {"codes": "MN", "steps": "M"},
}


@dataclass(frozen=True)
class Piece:
    """The tensors that a worker computes y [m] from: y = first x, or second (first x), or, for pivots, both of them."""

    first: Tensor  # [a, n]; integers for coded layers
    second: Tensor | None = None  # [b, a]
    place: Tensor | None = None  # int64 [m]: the position of each row of y in [first x, second (first x)]
    steps: Tensor | None = None  # float32 [m]: the step size of each row of a coded layer


@dataclass(frozen=True)
class StoredLayer:
    """A layer as it is stored, and the rows and columns of it that a worker needs.

    `row` is the layer's entry in the config of its export; None for a layer that is not in it. `kind` is the export's quantization.
    """

    name: str
    row: Mapping[str, Any] | None
    kind: str | None
    M: int
    N: int
    rows: tuple[slice, ...]
    columns: slice

    @property
    def form(self) -> str:
        return "dense" if self.row is None else str(self.row["form"])

    @property
    def quantized(self) -> str | None:
        """The kind of 8 or 4 bit that the matrices are stored in; None for plain matrices."""
        return None if self.row is None else self.kind

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the stored tensors, without the bias."""
        q = int((self.row or {}).get("rank") or 0)
        sizes = {"M": self.M, "N": self.N, "q": q, "R": self.M - q}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, letters in MATRICES[self.form].items():
            shape = tuple(sizes[letter] for letter in letters)
            if self.quantized and name.endswith("weight"):
                blocks = 1 if self.quantized == "int8" else -(-shape[1] // QUANT_BLOCK)
                width = shape[1] if self.quantized == "int8" else blocks * QUANT_BLOCK // 2
                shapes |= {name.replace("weight", "codes"): (shape[0], width), name.replace("weight", "absmax"): (shape[0], blocks)}
            else:
                shapes[name] = shape
        return shapes

    def piece(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Piece:
        """Return the worker's piece in `dtype`, from all stored tensors. Quantized matrices are dequantized.

        Raise ValueError if tensors are missing or have other shapes than the config says.
        """
        for name, shape in self.shapes().items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                state = "is missing" if found is None else f"has shape {list(found)}, but its config.json describes {list(shape)}"
                raise ValueError(f"tensor {self.name}.{name} of the export {state}. Export the model again.")
        if self.form == "codes":
            return Piece(self._rows(tensors["codes"][:, self.columns]), steps=self._rows(tensors["steps"]).float())

        def matrix(name: str) -> Tensor:
            if not self.quantized:
                return tensors[f"{name}weight"].to(dtype)
            width = self.N if name != "left." else int((self.row or {})["rank"])
            return QuantLinear(tensors[f"{name}codes"], tensors[f"{name}absmax"], width, self.quantized, None).dequantized(dtype)

        if self.form == "factors":
            return Piece(matrix("right.")[:, self.columns], self._rows(matrix("left.")))
        if self.form == "pivot":
            pivots_qn = matrix("pivots.")[:, self.columns]
            place_m, combine = pivot_rows(self._rows(tensors["place"]), matrix("combine."), len(pivots_qn))
            return Piece(pivots_qn, combine, place_m)
        return Piece(self._rows(matrix("")[:, self.columns]))

    def part(self, side: str, tensor: Tensor) -> Tensor:
        """Return the worker's part of a tensor of a layer of any size.

        These are weight and codes [M, N], left [K, M], right [K, N], steps and bias [M].
        Where workers add up their results, the first one adds the bias, and all others have zeros.
        """
        match side:
            case "weight" | "codes":
                return self._rows(tensor[:, self.columns])
            case "left":
                return self._rows(tensor.T).T.contiguous()
            case "right":
                return tensor[:, self.columns].contiguous()
        return torch.zeros_like(tensor) if side == "bias" and self.columns.start else self._rows(tensor)

    def _rows(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[rows] for rows in self.rows])


def pivot_rows(place_m: Tensor, combine: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Return `place` and `combine` for some rows of a layer with q pivots. `place_m` holds the stored positions of these rows.

    All pivots are kept, because every other row is a combination of them. The kept rows of `combine` move together.
    """
    others = place_m >= q
    moved = place_m.clone()
    moved[others] = q + torch.arange(int(others.sum()), device=place_m.device)
    return moved, combine[place_m[others] - q]


def local_rows(sizes: Sequence[int], local: Sequence[int], copies: Sequence[int], rank: int) -> list[slice]:
    """Return the rows of each output of a fused layer that a worker computes, as slices of the outputs' rows one after another.

    `sizes` are the rows of the outputs (such as query, key, value), `local` the rows of each that a worker computes. `copies` workers
    in a row compute the same rows of an output, as of keys and values if there are more workers than heads of these.
    """
    rows, first = [], 0
    for size, count, same in zip(sizes, local, copies, strict=True):
        start = first + (rank // same * count if count < size else 0)
        if start + count > first + size:
            raise ValueError(f"worker {rank} would compute rows {start - first} to {start - first + count} of an output with {size} rows.")
        rows.append(slice(start, start + count))
        first += size
    return rows


def stored_layers(
    entries: Sequence[tuple[str, Mapping[str, Any] | None]],
    kind: str | None,
    sizes: Sequence[int],
    rows: Sequence[slice],
    N: int,
    columns: slice,
) -> list[StoredLayer]:
    """Return the stored layers of a fused layer: one for each output, or one for all outputs (as in Phi-3).

    `entries` are names and config entries of the stored layers, `sizes` the rows of the outputs, `rows` the worker's (see `local_rows`).
    """
    if len(entries) == 1:
        ((name, row),) = entries
        return [StoredLayer(name, row, kind, sum(sizes), N, tuple(rows), columns)]
    if len(entries) != len(sizes):
        raise ValueError(f"a fused layer with {len(sizes)} outputs cannot be made of {[name for name, _ in entries]}.")
    layers, first = [], 0
    for (name, row), size, part in zip(entries, sizes, rows, strict=True):
        own = slice(part.start - first, part.stop - first)
        layers.append(StoredLayer(name, row, kind, size, N, (own,), columns))
        first += size
    return layers
