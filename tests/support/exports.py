"""Exports with random weights, whose layers have any forms and ranks, in milliseconds and without a calibration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from acip.export.quantization import quantize_in_place
from acip.layers.targets import find_linears
from acip.modeling_acip import CodedLinear, PivotLinear, classes, weight_MN
from tests.support.small import byte_tokenizer

Choice = Callable[[int, str, int], dict[str, Any]]  # number, name and smaller side of a layer -> its form and rank


def mixed(number: int, name: str, side: int) -> dict[str, Any]:
    """Give neighbors different forms and ranks, among them none and all directions."""
    del name
    rank = (side // 2 + 1, 0, side // 5, side)[number % 4]
    form = ("pivot", "dense", "factors", "pivot", "factors")[number % 5]
    return {"form": form, "rank": None if form == "dense" else rank}


def of_form(form: str) -> Choice:
    """Give every layer one form, with ranks that differ."""
    return lambda number, _, side: {"form": form, "rank": side // 2 - number % 5 if form in ("factors", "pivot") else None}


def half_coded(number: int, name: str, side: int) -> dict[str, Any]:
    """Give codes to two of three layers, and other forms to the others."""
    return {"form": "codes", "rank": None} if number % 3 else mixed(number // 3, name, side)


@torch.no_grad()
def write_export(
    folder: Path, base: PreTrainedConfig, choose: Choice, kind: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Write an export of a model with random weights, and return the model. `choose` gives the forms; with codes, it is encoded."""
    (base_class,) = list(base.architectures or [])
    config_class, model_class = classes(base.model_type, base_class)
    fields = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "architectures")}

    def made(acip: dict[str, Any]) -> Any:
        return model_class._from_config(config_class.from_dict(fields | {"acip": {"base_class": base_class, "quantize": None, **acip}}))

    linears = {name: layer for name, layer in find_linears(made({"layers": {}})).items() if name != "lm_head"}
    layers = {name: choose(i, name, min(weight_MN(layer).shape)) for i, (name, layer) in enumerate(linears.items())}
    encoded = any(row["form"] == "codes" for row in layers.values())
    model = made({"layers": layers, **({"bfloat16": {}} if encoded else {})}).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        _fill(module, generator)
    if kind is not None:
        quantize_in_place(model, kind)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Fill the tensors of one module with random numbers. Outputs of linear layers have about the size of their inputs."""

    def noise(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 2:
            scale = 1.0 if isinstance(module, nn.Embedding) else max(1, parameter.shape[1]) ** -0.5
            parameter.copy_(noise(parameter, scale))
        else:
            parameter.copy_(noise(parameter, 0.2) + (0.0 if name == "bias" else 1.0))
    if isinstance(module, PivotLinear):
        module.place.copy_(torch.randperm(len(module.place), generator=generator))
    if isinstance(module, CodedLinear):
        module.codes.copy_(torch.randint(-9, 10, module.codes.shape, generator=generator))
        module.steps.copy_((torch.rand(len(module.steps), generator=generator) + 0.5) / (6 * module.in_features**0.5))
