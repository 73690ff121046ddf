"""Layers of any size in vLLM's models: each row of a batch is computed at the size of its own sequence.

A `ServedLayers` holds the layers of one resident model (`acip.layers.elastic_linear`), which are not vLLM's: vLLM's linear layers, fused
or not, pass their inputs to them. Before the first layer of each step, the rows of the batch are put in the order of falling size that
`acip.layers.mixed_sizes` needs; every layer permutes its inputs and outputs accordingly.

On a CPU, a size that is computed alone for some steps gets copies of its matrices, stacked and packed as those of an export, because
reordering plain weights takes a third of the time of products for 8 rows. They are made if there is memory for them, for one size at a
time.

vLLM's model, and this module, run in the process that created the `ServedLayers`, so that weights can be loaded between steps.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.layers.targets import weight_MN
from acip.modeling_acip import CodedLinear, onednn
from acip_vllm.export_config import ANY_SIZE
from acip_vllm.product import FusedProduct
from acip_vllm.shards import Piece

if TYPE_CHECKING:  # exports are served without the platform
    from acip_platform.serve.engine.resident_weights import ResidentWeights

PACKED_AFTER = 16  # steps of one size


class Rows(Protocol):
    """The rows of the step that vLLM computes now."""

    def __call__(self) -> list[tuple[Size, int]]:
        """Return the size and the number of rows of each sequence, in the order of the batch."""
        ...


class ServedLayers:
    """The layers of one resident model, and the order of the rows of the present step."""

    def __init__(
        self, model: nn.Module, targets: set[str], stored: Mapping[str, Tensor], mixer: Mixer, weights: "ResidentWeights | None" = None
    ) -> None:
        """`weights` states whether there may be packed copies, and has their memory; None = there are none."""
        self.model, self.targets, self.mixer = model, targets, mixer
        self.copies = PackedCopies(weights)
        self.stored = dict(stored)  # all other tensors of the model, for vLLM to load
        self.rows: Rows = list
        self._step: object = None
        self._order: tuple[Tensor, Tensor] | None = None  # rows of the batch by falling size, and where each row of the batch is then
        self._rows = 0  # that have a sequence; vLLM may add others

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that vLLM computes with, and free them. The modules that `parts` has returned keep theirs."""
        yield from self.stored.items()
        for name in self.stored:
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            for tensors in (module._parameters, module._buffers):
                if (tensor := tensors.get(last)) is not None:
                    empty = tensor.new_empty(0)
                    tensors[last] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty  # type: ignore[assignment]
        self.stored.clear()

    def parts(self, names: list[str]) -> list[nn.Module]:
        """Return the layers whose outputs a fused layer of vLLM puts one after another; none if no part has sizes."""
        if not self.targets.intersection(names):
            return []
        for name in names:
            self.stored.pop(f"{name}.weight", None)
        return [self.model.get_submodule(name) for name in names]

    def compute(self, parts: list[nn.Module], x_TN: Tensor) -> Tensor:
        """Return the outputs [T, M] of the layers `parts`, one after another."""
        step = get_forward_context()
        if step is not self._step:
            self._prepare(x_TN)
            self._step = step
        if not self._rows:  # vLLM measures its memory
            rows_M = sum(len(weight_MN(cast(Any, getattr(part, "original", part)))) for part in parts)
            return x_TN.new_zeros(len(x_TN), rows_M)
        if self.copies.used and (y := self.copies.compute(parts, x_TN)) is not None:
            return y
        if self._order is not None:
            x_TN = x_TN[self._order[0]]
        elif len(x_TN) != self._rows:
            x_TN = x_TN[: self._rows]
        with onednn(len(x_TN) > 1):
            y_TM = parts[0](x_TN) if len(parts) == 1 else torch.cat([part(x_TN) for part in parts], -1)
        return y_TM if self._order is None else y_TM[self._order[1]]

    def _prepare(self, x_TN: Tensor) -> None:
        rows = self.rows()
        self._rows, self._order = sum(count for _, count in rows), None
        self.copies.prepare({size.key for size, _ in rows})
        if not rows:
            return
        by_size = sorted(range(len(rows)), key=lambda i: rows[i][0].key)
        same = groupby(by_size, key=lambda i: rows[i][0].key)
        runs = [(rows[members[0]][0], sum(rows[i][1] for i in members)) for _, group in same if (members := list(group))]
        starts = [0]
        for _, count in rows:
            starts.append(starts[-1] + count)
        total = len(x_TN)
        missing = total - self._rows
        want = max(padded(self._rows), total)
        if len(runs) > 1 or want != total or missing:
            # rows that belong to no sequence repeat the last one
            order = [row for i in by_size for row in range(starts[i], starts[i + 1])]
            runs[-1] = (runs[-1][0], runs[-1][1] + want - self._rows)
            index = torch.tensor(order + order[-1:] * (want - self._rows), device=x_TN.device)
            back = torch.zeros(total, dtype=torch.int64, device=x_TN.device)
            back[index[: self._rows]] = torch.arange(self._rows, device=x_TN.device)
            self._order = (index, back)
        self.mixer.set(runs)


class PackedCopies:
    """The matrices of one size, stacked and packed for vLLM's product."""

    def __init__(self, weights: "ResidentWeights | None") -> None:
        self.weights = weights
        self.used = False  # in the present step
        self._reserved = False
        self._last: set[tuple[int, int]] = set()  # the sizes of the last steps, by their keys
        self._steps = 0  # that had these sizes
        self._of: set[tuple[int, int]] = set()  # the size of the copies
        self._products: dict[int, tuple[FusedProduct, Tensor | None] | None] = {}  # by the id of the list of parts
        self._gemm = UnquantizedLinearMethod()

    def prepare(self, sizes: set[tuple[int, int]]) -> None:
        """Decide whether the next step, which has these sizes, uses copies. They are made in this step if they are new."""
        self._steps = self._steps + 1 if sizes == self._last else 0
        self._last = sizes
        if self.weights is None or not self.weights.packed:  # memory is short
            self._of = set()
            self._products.clear()
        elif self._steps == PACKED_AFTER and len(sizes) == 1 and sizes != self._of and self._reserve(self.weights):
            self._of = sizes
            self._products.clear()
        self.used = bool(sizes) and sizes == self._of

    def _reserve(self, weights: "ResidentWeights") -> bool:
        """Reserve memory for the largest size. Return whether there is enough."""
        if not self._reserved:
            layers = [(weight_MN(layer.original), layer.left.values, layer.right.values) for layer in weights.layers.values()]
            self._reserved = weights.memory.reserve_copies(sum(max(W.nbytes, left.nbytes + right.nbytes) for W, left, right in layers))
        return self._reserved

    def compute(self, parts: list[nn.Module], x_TN: Tensor) -> Tensor | None:
        """Return the outputs [T, M] of the layers `parts`; None if one of them has no sizes."""
        key = id(parts)
        if key not in self._products:
            self._products[key] = self._packed(parts)
        found = self._products[key]
        if found is None:
            return None
        product, bias_M = found
        y_TM = product(x_TN, self._gemm.apply)
        return y_TM if bias_M is None else y_TM + bias_M

    def _packed(self, parts: list[nn.Module]) -> tuple[FusedProduct, Tensor | None] | None:
        if not all(isinstance(part, ElasticLinear) and part.groups for part in parts):
            return None
        layers = cast(list[ElasticLinear], parts)
        product = FusedProduct([_piece(layer) for layer in layers])
        for matrix in product.matrices():
            self._gemm.process_weights_after_loading(matrix)
        if all(layer.bias is None for layer in layers):
            return product, None
        dtype = layers[0].left.dtype
        biases = [torch.zeros(len(weight_MN(layer.original)), dtype=dtype) if layer.bias is None else layer.bias for layer in layers]
        return product, torch.cat(biases)


def _piece(layer: ElasticLinear) -> Piece:
    """Return the matrices of a layer whose rows are all of one size."""
    assert layer.groups is not None
    (group,) = layer.groups
    if group.coded is not None:
        coded = cast(CodedLinear, group.coded)
        return Piece(coded.codes, steps=coded.steps)
    if group.factors is None:
        return Piece(weight_MN(layer.original))
    right_rN, left_Mr = group.factors
    rank = len(right_rN) if group.mask is None else int(group.mask[0].sum())
    return Piece(right_rN[:rank], left_Mr[:, :rank])


SERVED: dict[str, ServedLayers] = {}  # by the folder that vLLM is given as the model
LOADERS: list[Callable[[str, torch.device], ServedLayers]] = []  # loads an artifact that vLLM itself serves (acip_vllm.native)


class PlainQuantization(QuantizationConfig):
    """A quantization, in vLLM's sense, that needs no special kernels, and no files beside config.json."""

    method: str

    def get_name(self) -> str:
        """Return the name of this method."""
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that layers can compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU times ten: no special kernels are used."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything is in config.json."""
        return []

    def part_names(self, prefix: str) -> list[str]:
        """Return the names of the layers that vLLM fuses into one under the name `prefix`, in vLLM's spelling."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]


class AnySizeConfig(PlainQuantization):
    """The quantization of a model whose layers are in `SERVED`."""

    method = ANY_SIZE

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.mapper: Any = None

    @property
    def served(self) -> ServedLayers:
        """The layers in this process. vLLM passes the config between processes, without them."""
        if self.folder not in SERVED:
            SERVED[self.folder] = LOADERS[0](self.folder, torch.device(current_platform.device_type))
        return SERVED[self.folder]

    @cached_property
    def names(self) -> dict[str, str]:
        """The names of the modules in the resident model, by their names in vLLM's."""
        names = {name: name for name, _ in self.served.model.named_modules()}
        return names if self.mapper is None else self.mapper.apply_dict(names)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AnySizeConfig":
        """Return the layers that the config of `acip_vllm.resident_model` names."""
        return cls(config["folder"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as a model of vLLM does."""
        self.mapper = hf_to_vllm_mapper

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method that computes a layer; vLLM's own if no part of the layer has sizes."""
        parts = self.served.parts([self.names.get(name, "") for name in self.part_names(prefix)])
        if isinstance(layer, LinearBase):
            return AnySizeLinearMethod(self.served, parts) if parts else UnquantizedLinearMethod()
        if parts:
            raise ValueError(f"layer {prefix} has sizes, but vLLM computes it with {type(layer).__name__}, which is not a linear layer.")
        return None


class AnySizeLinearMethod(LinearMethodBase):
    """Compute a linear layer of vLLM with the layers of the resident model."""

    def __init__(self, served: ServedLayers, parts: list[nn.Module]) -> None:
        self.served, self.layers = served, parts

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create nothing: the resident model has the weights. Raise ValueError if the layer is split between workers."""
        if cast(Any, layer).tp_size > 1:
            raise ValueError("a resident model of any size is not split between workers. Export one size for tensor parallelism.")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs [..., M] for inputs [..., N]. The layers of the resident model add their own biases."""
        y_TM = self.served.compute(self.layers, x.flatten(0, -2))
        return y_TM.unflatten(0, x.shape[:-1])
