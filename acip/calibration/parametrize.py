"""Replace the target layers of a base model with `SVDLinear` layers in the bases of acip.calibration.bases, and undo it (paper 2.2.1)."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from acip.base import own_code, require_positions
from acip.calibration.activation_covariance import Feed, feed_tokens
from acip.calibration.bases import bases
from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.data import check_windows
from acip.errors import BaseModelError, DataError
from acip.layers import sharding
from acip.layers.adapters import LoRA
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import find_linears, require_matches, targets, weight_MN
from acip.modeling_acip import set_module
from acip.recipe import Recipe
from acip.utils.threads import Spread, each_in_turn


def parametrize(
    model: nn.Module,
    recipe: Recipe,
    windows: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    feed: Feed = feed_tokens,
    cache: BasisCache | None = None,
    spread: Spread = each_in_turn,
) -> dict[str, SVDLinear | ElasticLinear]:
    """Replace every target layer of `model` with an `SVDLinear` and its adapters, in place. Return these layers by name.

    The covariance and Fisher bases read the first `recipe.sample_windows` of `windows`, [n, T] token ids; `feed(model, windows[i:j])` runs
    a model that has other inputs. `cache` stores the bases for later calls, `spread` distributes their eigenproblems. `progress(done,
    total)` counts layers. The outputs of the model stay the same, up to rounding.

    Raises BaseModelError if the model is parametrized already, has nothing to compress, or does not match the text, and DataError if
    `windows` are not [n, T] or hold negative ids.
    """
    check_base(model, windows if feed is feed_tokens else None)
    require_matches(model, recipe.exclude)
    linears = find_linears(model, recipe.exclude)
    model.eval().requires_grad_(False)  # without dropout
    torch.manual_seed(recipe.seed)  # for the initial adapters
    device = sharding.device() if sharding.workers() > 1 else None
    loras = {name: adapters(weight_MN(linear), recipe, device) for name, linear in linears.items()}
    keys = basis_keys(model, linears, recipe, windows, feed) if cache and sharding.rank() == 0 else {}
    if sharding.workers() > 1:
        for linear in linears.values():
            sharding.shard(linear)
        nn.Module.to(model, device)
    cores: dict[str, SVDLinear] = {}
    with cache.exclusive(keys.values()) if cache and keys else nullcontext():
        for name, directions_KM in bases(model, linears, recipe, windows, feed, cache, keys, progress, spread=spread):
            linear = linears[name]
            with sharding.gathered_parameters(linear):
                cores[name] = SVDLinear(
                    linear, weight_MN(linear), directions_KM.T, recipe.mask_scale, loras[name], recipe.quantize, recipe.basis != "fisher"
                )
            for rows in (cores[name].left, cores[name].right):
                sharding.shard(rows)
    for name in linears:
        set_module(model, name, cores[name])
        cores[name].park()
    return targets(model)


def check_base(model: nn.Module, windows: Tensor | None) -> None:
    """Raise BaseModelError for a model that is parametrized already, needs remote code, or does not match the token ids `windows`.

    It does not match if it has no embedding for an id, or fewer positions than a window has tokens. Raise DataError if `windows` are not
    [n, T] or hold negative ids.
    """
    if targets(model):
        raise BaseModelError("this model is parametrized already. Call restore(model) first.")
    own_code(model, None, str(getattr(getattr(model, "config", None), "_name_or_path", "")))
    if windows is None:
        return
    check_windows(windows)
    tokens = windows.shape[1]
    if isinstance(model, PreTrainedModel):
        require_positions(model.config, tokens, BaseModelError, f"the windows have {tokens:,} tokens", "Use a smaller seq_len.")
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(embeddings, nn.Embedding) and int(windows.max()) >= embeddings.num_embeddings:
        raise BaseModelError(
            f"the text contains the token id {int(windows.max()):,}, but the model has {embeddings.num_embeddings:,} embeddings: the "
            "tokenizer is larger than the model. Resize the embeddings with model.resize_token_embeddings(len(tokenizer)) and save both."
        )
    if int(windows.min()) < 0:
        raise DataError(f"the windows contain the token id {int(windows.min())}; ids are at least 0. Remove ids that mark ignored tokens.")


def adapters(W_MN: Tensor, recipe: Recipe, device: torch.device | None = None) -> dict[str, LoRA]:
    """Return new adapters by place: `layer` beside the layer, or `right` and `left` on its factors. B is zero: outputs do not change."""
    (M, N), R = W_MN.shape, recipe.adapter_rank
    places = {} if not R else {"layer": (N, M)} if recipe.adapter == "layer" else {"right": (N, min(M, N)), "left": (min(M, N), M)}
    scale = recipe.adapter_alpha / max(1, R)
    return {place: LoRA(n, m, R, scale, recipe.adapter_dropout, device or W_MN.device, W_MN.dtype) for place, (n, m) in places.items()}


def restore(model: nn.Module) -> nn.Module:
    """Undo `parametrize`: put every original layer back, without adapters. Return `model`."""
    for name, core in targets(model).items():
        set_module(model, name, core.exact)
    return model
