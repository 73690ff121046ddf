"""Layers of any size in vLLM's models: each row of a batch is computed at the size of its own sequence.

A `ServedLayers` holds the layers of one resident model (`acip.layers.elastic_linear`), which are not vLLM's: vLLM's linear layers, fused
or not, pass their inputs to them. Before the first layer of each step, the rows of the batch are put in the order of falling size that
`acip.layers.mixed_sizes` needs; every layer permutes its inputs and outputs accordingly.

In a compiled model, such a layer is one operation (`vllm::acip_any_size`) that torch.compile does not look into, because what it computes
depends on the sizes in the step. On GPUs, vLLM splits the model's graph at these operations as it does at attention, and captures CUDA
graphs of the pieces between them: norms, activations, rotary embeddings. The layers themselves, and attention, are not captured. On a
CPU, a compiled model of any size takes about as long as an eager one (tests/benchmarks/SERVE.md), so the endpoint does not compile.

vLLM's model, and this module, run in the process that created the `ServedLayers`, so that weights can be loaded between steps.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Protocol, cast

import torch
from acip_platform.serve.engine.resident_weights import ResidentWeights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from vllm.config import CompilationConfig, CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.layers.targets import weight_MN
from acip.modeling_acip import onednn
from acip_vllm.export_config import ANY_SIZE
from acip_vllm.linear_layers import PlainQuantization, worker_layers
from acip_vllm.shards import StoredLayer
from acip_vllm.size_copies import Parts, SizeCopies

OPERATION = "acip_any_size"  # in vLLM's namespace of torch.ops


class Rows(Protocol):
    """The rows of the step that vLLM computes now."""

    def __call__(self) -> list[tuple[Size, int]]:
        """Return the size and the number of rows of each sequence, in the order of the batch."""
        ...


class ServedLayers:
    """The layers of one resident model, and the order of the rows of the present step."""

    def __init__(
        self, model: nn.Module, targets: set[str], stored: Mapping[str, Tensor], mixer: Mixer, weights: ResidentWeights | None = None
    ) -> None:
        """`weights` states whether there may be copies of sizes, and has their memory; None = there are none."""
        self.model, self.targets, self.mixer = model, targets, mixer
        self.copies = SizeCopies(weights)
        self.stored = dict(stored)  # all other tensors of the model, for vLLM to load
        self.shards: dict[str, StoredLayer] = {}  # what this worker computes with, of the layers that are split between workers
        self.rows: Rows = list
        self.load: Callable[[], None] = lambda: None  # the weights of layers that the first requests need
        self._step: object = None
        self._runs: list[tuple[Size, int]] = []  # of rows of the present step, by falling size
        self._copied = False  # whether all sizes of the step have copies
        self._order: tuple[Tensor, Tensor] | None = None  # rows of the batch by falling size, and where each row of the batch is then

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that vLLM computes with, and free them. The modules that `parts` has returned keep theirs."""
        self.load()
        yield from self.stored.items()
        for name in self.stored:
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            for tensors in (module._parameters, module._buffers):
                if (tensor := tensors.get(last)) is not None:
                    empty = tensor.new_empty(0)
                    tensors[last] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty  # type: ignore[assignment]
        self.stored.clear()

    def parts(self, names: list[str]) -> Parts:
        """Return the layers whose outputs a fused layer of vLLM puts one after another, by name; none if no part has sizes."""
        if not self.targets.intersection(names):
            return {}
        for name in names:
            self.stored.pop(f"{name}.weight", None)
        return {name: self.model.get_submodule(name) for name in names}

    def keep(self, stored: StoredLayer) -> None:
        """Keep a worker's part of one layer. What is loaded later must be sharded by the loader (`shards`)."""
        linear: Any = self.model.get_submodule(stored.name)
        if isinstance(linear, ElasticLinear):
            self.shards[stored.name] = stored
            for side, directions in (("left", linear.left), ("right", linear.right)):
                directions.values = nn.Parameter(stored.part(side, directions.values), requires_grad=False)
            linear = linear.original
        if not linear.weight.is_meta:
            weight_mn = stored.part("weight", weight_MN(linear))
            linear.weight = nn.Parameter(weight_mn.T if isinstance(linear, Conv1D) else weight_mn, requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(stored.part("bias", linear.bias), requires_grad=False)

    def compute(self, parts: Parts, x_TN: Tensor, outputs: int) -> Tensor:
        """Return the outputs [T, M] of the layers `parts`, one after another. M is `outputs`."""
        step = get_forward_context()
        if step is not self._step:
            self._prepare(x_TN)
            self._step = step
        if not self._runs:  # vLLM measures its memory
            return x_TN.new_zeros(len(x_TN), outputs)
        if self._order is not None:
            x_TN = x_TN[self._order[0]]
        y_TM = self.copies.compute(parts, self._runs, x_TN) if self._copied else None
        if y_TM is None:
            with onednn(len(x_TN) > 1):
                outputs_TM = [part(x_TN) for part in parts.values()]
            y_TM = outputs_TM[0] if len(parts) == 1 else torch.cat(outputs_TM, -1)
        return y_TM if self._order is None else y_TM[self._order[1]]

    def _prepare(self, x_TN: Tensor) -> None:
        """Order the rows of a new step, and set the layers to its sizes."""
        rows = self.rows()
        by_size = sorted(range(len(rows)), key=lambda i: rows[i][0].key)
        same = groupby(by_size, key=lambda i: rows[i][0].key)
        self._runs = [(rows[members[0]][0], sum(rows[i][1] for i in members)) for _, group in same if (members := list(group))]
        self._order = None
        self._copied = self.copies.prepare([size.key for size, _ in self._runs])
        if not rows:
            return
        used, total = sum(count for _, count in rows), len(x_TN)
        want = max(padded(used), total)
        if len(self._runs) > 1 or want != used:
            # rows that belong to no sequence repeat the last one
            starts = [0, *accumulate(count for _, count in rows)]
            order = [row for i in by_size for row in range(starts[i], starts[i + 1])]
            size, count = self._runs[-1]
            self._runs[-1] = (size, count + want - used)
            index = torch.tensor(order + order[-1:] * (want - used), device=x_TN.device)
            back = torch.zeros(total, dtype=torch.int64, device=x_TN.device)
            back[index[:used]] = torch.arange(used, device=x_TN.device)
            self._order = (index, back)
        self.mixer.set(self._runs)


def compute(x: Tensor, layer: str, outputs: int) -> Tensor:
    """Return the outputs [..., outputs] of a layer of any size. `layer` is its name in vLLM's model."""
    method: AnySizeLinearMethod = get_forward_context().no_compile_layers[layer]
    return method.compute(x)


def _shape(x: Tensor, layer: str, outputs: int) -> Tensor:
    """Return a tensor of the shape that `compute` returns."""
    return x.new_empty(*x.shape[:-1], outputs)


direct_register_custom_op(OPERATION, compute, fake_impl=_shape)


SERVED: dict[str, ServedLayers] = {}  # by the folder that vLLM is given as the model
LOADERS: list[Callable[[str, str, torch.device], ServedLayers]] = []  # loads an artifact that vLLM itself serves (acip_vllm.native)


class AnySizeConfig(PlainQuantization):
    """The quantization of a model whose layers are in `SERVED`."""

    method = ANY_SIZE

    def __init__(self, folder: str, uri: str) -> None:
        super().__init__()
        self.folder, self.uri = folder, uri
        self.mapper: Any = None

    @cached_property
    def served(self) -> ServedLayers:
        """The layers in this process: those of a resident model, or loaded for each engine that serves an artifact."""
        if self.uri:
            SERVED[self.folder] = LOADERS[0](self.folder, self.uri, torch.device(current_platform.device_type))
        return SERVED[self.folder]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the layers out: vLLM passes the config between processes."""
        return {key: value for key, value in self.__dict__.items() if key not in ("served", "names")}

    @cached_property
    def names(self) -> dict[str, str]:
        """The names of the modules in the resident model, by their names in vLLM's."""
        names = {name: name for name, _ in self.served.model.named_modules()}
        return names if self.mapper is None else self.mapper.apply_dict(names)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AnySizeConfig":
        """Return the layers that the config of `acip_vllm.resident_model` names."""
        return cls(config["folder"], config["uri"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as a model of vLLM does."""
        self.mapper = hf_to_vllm_mapper

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method that computes a layer; vLLM's own if no part of the layer has sizes."""
        parts = self.served.parts([self.names.get(name, "") for name in self.part_names(prefix)])
        if isinstance(layer, LinearBase):
            return AnySizeLinearMethod(self.served, parts, prefix) if parts else UnquantizedLinearMethod()
        if parts:
            raise ValueError(f"layer {prefix} has sizes, but vLLM computes it with {type(layer).__name__}, which is not a linear layer.")
        return None


class AnySizeLinearMethod(LinearMethodBase):
    """Compute a linear layer of vLLM with the layers of the resident model."""

    def __init__(self, served: ServedLayers, parts: Parts, prefix: str) -> None:
        self.served, self.parts, self.prefix = served, parts, prefix
        self.outputs = 0
        compilation = get_current_vllm_config().compilation_config
        compilation.static_forward_context[prefix] = self  # `compute` finds it there
        keep_out_of_cuda_graphs(compilation)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Create nothing: the resident model has the weights. It keeps this worker's part of them only."""
        self.outputs = sum(output_partition_sizes)
        if cast(Any, layer).tp_size > 1:
            inputs, outputs = (input_size_per_partition, input_size), (output_partition_sizes, output_size)
            for stored in worker_layers(layer, [(name, None) for name in self.parts], None, inputs, outputs):
                self.served.keep(stored)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs [..., M] for inputs [..., N]. The layers of the resident model add their own biases."""
        if not torch.compiler.is_compiling():
            return self.compute(x)
        y: Tensor = getattr(torch.ops.vllm, OPERATION)(x, self.prefix, self.outputs)
        return y

    def compute(self, x: Tensor) -> Tensor:
        """Return the outputs, outside of compiled graphs."""
        if x.dim() == 2:
            return self.served.compute(self.parts, x, self.outputs)
        return self.served.compute(self.parts, x.flatten(0, -2), self.outputs).unflatten(0, x.shape[:-1])


def keep_out_of_cuda_graphs(compilation: CompilationConfig) -> None:
    """Make vLLM split its graphs at the layers of any size, and capture the pieces between them only: these layers differ by step."""
    operations = compilation.splitting_ops
    if operations and f"vllm::{OPERATION}" not in operations:
        operations.append(f"vllm::{OPERATION}")
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if operations else CUDAGraphMode.NONE
