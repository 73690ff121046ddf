"""Sizes of a parametrized model: the shapes of its layers, the numbers they store, and setting all of them to one size."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from acip.layers.compressible import Compressible
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets, weight_MN
from acip.modeling_acip import set_module
from acip.recipe import Recipe
from acip.sizing.cut_table import Cut, CutTable, LayerShape, stored_params
from acip.sizing.score_map import ScoreMap


def layer_shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    shapes = []
    for name, core in targets(model).items():
        M, N = weight_MN(core.exact).shape
        shapes.append(LayerShape(name, M, N, core.bias is not None))
    return tuple(shapes)


def cut_table(model: nn.Module, scores: ScoreMap, recipe: Recipe) -> CutTable:
    """Return the cut table of `model`, which gives every size."""
    inside = {id(p) for core in targets(model).values() for p in core.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)  # parameters() counts tied weights once
    order = scores.layer_of[scores.removal_order()].to(torch.int32).cpu()
    return CutTable(layer_shapes(model), order, recipe.adapter_rows, rest, recipe.storage, recipe.dense_if_no_saving)


def sort_layers(model: nn.Module, scores: ScoreMap) -> dict[str, SVDLinear | ElasticLinear]:
    """Replace every SVDLinear by an ElasticLinear with directions and adapters in the order of their scores. Return the new layers."""
    importance = scores.importance()
    for name, core in targets(model).items():
        assert isinstance(core, SVDLinear)
        set_module(model, name, core.sorted(importance[name]))
    return targets(model)


def set_size(layers: Mapping[str, Compressible], cut: Cut) -> None:
    """Set every layer to its rank in `cut`, or to the version of its codes, which is loaded."""
    for name, core in layers.items():
        assert isinstance(core, ElasticLinear)
        core.set_rank(cut.ranks[name])
        if name in (cut.versions or {}):
            core.set_version(cut.versions[name])  # type: ignore[index]


def live_ranks(values: Tensor, scores: ScoreMap) -> Tensor:
    """Return [L]: how many of each layer's `values` [D] (masks or scores) are above 0."""
    return torch.zeros(len(scores.names), dtype=torch.long, device=values.device).index_add_(0, scores.layer_of, (values > 0).long())


def size_ratio(ranks: Tensor, shapes: tuple[LayerShape, ...], recipe: Recipe) -> Tensor:
    """Return the size ratio of layers at `ranks` [L] in the recipe's convention, as a float64 scalar on the device of `ranks`."""
    M, N, bias, dense = _dimensions(shapes, ranks.device)
    paper = recipe.convention == "paper"
    stored = stored_params(M, N, ranks, 0 if paper else recipe.adapter_rows, "factors" if paper else recipe.storage)
    return (stored.sum() + bias).double() / dense


@lru_cache(maxsize=8)
def _dimensions(shapes: tuple[LayerShape, ...], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    M, N = (torch.tensor([getattr(shape, key) for shape in shapes], device=device) for key in ("M", "N"))
    return M, N, sum(shape.M for shape in shapes if shape.bias), sum(shape.dense_params for shape in shapes)
