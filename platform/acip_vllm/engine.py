"""The classes that vLLM calls to load and compute exports: config parser, model loader, quantization, linear method."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER, HFConfigParser

import acip  # noqa: F401  (registers model_type "acip" in transformers)
from acip_vllm import any_size, artifacts, native
from acip_vllm.decoding import decoded
from acip_vllm.export_config import METHOD, served_config
from acip_vllm.linear_layers import PlainQuantization, worker_layers
from acip_vllm.product import FusedProduct

SHARD_IDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a fused layer; other fused layers number them
DTYPES = {"place": torch.int64, "steps": torch.float32, "absmax": torch.float32, "codes": torch.int8}  # of stored tensors


def register_with_vllm() -> None:
    """Register the classes below. The entries of vLLM's tables are set directly, because its functions warn about replaced ones."""
    register_quantization_config(METHOD)(AcipQuantizationConfig)
    register_quantization_config(any_size.ANY_SIZE)(any_size.AnySizeConfig)
    any_size.LOADERS[:] = [native.served_layers]
    artifacts.register()
    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = ExportConfigParser
    for load_format, loader in _LOAD_FORMAT_TO_MODEL_LOADER.items():
        if loader is DefaultModelLoader:
            _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = ExportLoader


class ExportConfigParser(HFConfigParser):
    """Read config.json as vLLM does, and return the base model's config for an export."""

    def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Return the fields of config.json and the config."""
        fields, config = super().parse(*args, **kwargs)
        if getattr(config, "acip", None) is None:
            return fields, config
        folder = str(args[0] if args else kwargs["model"])
        served = served_config(fields, folder, artifacts.uri_of(folder))
        served.name_or_path = config.name_or_path
        return fields, served


class ExportLoader(DefaultModelLoader):
    """Load weights as vLLM does. The encoded tensors of an export are decoded."""

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights of a model by the names in its files."""
        quantization = getattr(model_config.hf_config, "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == any_size.ANY_SIZE:
            yield from any_size.SERVED[quantization["folder"]].weights()
            return
        weights: Iterable[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
        export = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
        yield from decoded(weights, quantization) if export else weights  # type: ignore[arg-type]


class AcipQuantizationConfig(PlainQuantization):
    """The forms of the layers of an export."""

    method = METHOD

    def __init__(self, layers: dict[str, Any], kind: str | None) -> None:
        super().__init__()
        self.layers, self.kind = layers, kind

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AcipQuantizationConfig":
        """Return the forms that a `served_config` gives."""
        return cls(config["layers"], config["quantize"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as a model of vLLM does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method that computes a layer; vLLM's own if all parts of the layer are plain matrices."""
        entries = self.entries(prefix)
        plain = self.kind is None and all(row is None or row["form"] in ("dense", "linear") for _, row in entries)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if plain else AcipLinearMethod(entries, self.kind)
        if any(row is not None for _, row in entries) and not (plain and isinstance(layer, VocabParallelEmbedding)):
            raise ValueError(
                f"layer {prefix} is compressed, but vLLM computes it with {type(layer).__name__}, which is not a linear layer. Calibrate "
                f'the model with exclude=["{prefix.rpartition(".")[2]}"], or use the embedded engine.'
            )
        return None

    def entries(self, prefix: str) -> list[tuple[str, Any]]:
        """Return names and config entries of the stored layers that vLLM fuses into one under the name `prefix`."""
        entries = [(name, self.layers.get(name)) for name in self.part_names(prefix)]
        return [(name, row if row is None or self.kind or row["form"] != "linear" else {**row, "form": "dense"}) for name, row in entries]


class AcipLinearMethod(LinearMethodBase):
    """Load and compute a linear layer, whose parts may be dense, factors, pivots or coded, each with a rank of its own.

    Matrices in 8 or 4 bit (int8, nf4, fp4) are dequantized when they are loaded, and then take the memory of plain ones.
    """

    def __init__(self, entries: list[tuple[str, Any]], kind: str | None) -> None:
        self.entries, self.kind = entries, kind
        self.plain = UnquantizedLinearMethod()  # of the platform

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer an empty parameter for each stored tensor, which vLLM's loaders find by its name."""
        linear = cast(Any, layer)
        inputs, outputs = (input_size_per_partition, input_size), (output_partition_sizes, output_size)
        linear.stored = worker_layers(linear, self.entries, self.kind, inputs, outputs)
        linear.tensors = [{} for _ in linear.stored]
        linear.dtype = params_dtype
        names = {name for part in linear.stored for name in part.shapes()}
        if linear.has_bias and any(part.form == "factors" for part in linear.stored):
            names.add("left.bias")
        for name in sorted(names):
            dtype = DTYPES.get(name.rpartition(".")[2], params_dtype)
            if dtype == torch.int8 and self.kind not in (None, "int8"):
                dtype = torch.uint8  # two codes of 4 bit
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self.load, linear, name)})
            *path, last = name.split(".")
            for module in path:
                if not hasattr(linear, module):
                    linear.add_module(module, nn.Module())
            linear.get_submodule(".".join(path)).register_parameter(last, parameter)
        linear.placeholders = sorted(names)

    def load(self, layer: Any, name: str, parameter: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
        """Keep a stored tensor, and make the worker's matrices when the layer is complete."""
        if name == "left.bias":
            layer.bias.weight_loader(layer.bias, tensor, *([] if shard_id is None else [shard_id]))
            return
        index = SHARD_IDS.get(shard_id, shard_id) or 0
        layer.tensors[index][name] = tensor
        if all(part.shapes().keys() == tensors.keys() for part, tensors in zip(layer.stored, layer.tensors, strict=True)):
            self.build(layer, parameter.device)

    def build(self, layer: Any, device: torch.device) -> None:
        """Make the worker's matrices from the stored tensors, and free those."""
        pieces = [part.piece(tensors, layer.dtype) for part, tensors in zip(layer.stored, layer.tensors, strict=True)]
        layer.product = FusedProduct(pieces, device)
        layer.tensors = [{} for _ in layer.stored]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Remove the empty parameters, and prepare the matrices for the platform's product. Raise ValueError if tensors are missing."""
        linear = cast(Any, layer)
        if not hasattr(linear, "product"):
            self.build(linear, torch.device("cpu"))  # raises an error that says what is missing
        for name in linear.placeholders:
            owner, _, last = name.rpartition(".")
            if owner in dict(linear.named_children()):
                delattr(linear, owner)
            elif not owner:
                delattr(linear, last)
        for matrix in linear.product.matrices():
            self.plain.process_weights_after_loading(matrix)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the worker's outputs y [..., m] for its inputs x [..., n]."""
        y: Tensor = cast(Any, layer).product(x, self.plain.apply)
        return y if bias is None else y + bias
