"""The methods of the paper's Table 1 and their successors, behind one call: each model they make, and what it stores.

    name                 directions                           ranks               corrects                   one run per size
    svd                  SVD of W                             global, by sigma    -                          no
    asvd                 SVD of W diag(d)                     sensitivity search  -                          no
    svd-llm-w            SVD of W S, S S^T = C                uniform             -                          no
    svd-llm              the same                             uniform             U by least squares         yes
    svd-llm-lora         the same                             uniform             factors by LoRA            yes
    dobi-svd             principal components of activations  learned             -                          yes
    covariance           eigenvectors of W C W^T              uniform             -                          no
    covariance-global    the same                             global, by energy   -                          no
    acip-paper           SVD of W                             L1 pruning          adapters beside the layer  no
    acip                 eigenvectors of W C W^T              Fisher information  adapters on the factors    no

C is the second moment of a layer's inputs on the calibration text. All but `acip` store plain factors, r (M + N) numbers; it
stores pivot rows where that is less (acip.sizing.cut_table). What a model stores is counted on the model itself, adapters included.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from acip.base import Base
from acip.baselines import asvd, calibrated, covariance, dobi, svd, svdllm
from acip.baselines.prefix_factors import Progress, stored
from acip.errors import DataError, RecipeError
from acip.evaluate.measurement import stored_bytes
from acip.layers.targets import find_linears
from acip.modeling_acip import LowRankLinear, PivotLinear
from acip.recipe import named
from acip.sizing.budget import Budget
from acip.utils.coerce import coerce, did_you_mean


@dataclass(frozen=True)
class Method:
    """One way to make models of asked sizes. `run` yields (size, model) and takes the options that it names as keywords."""

    title: str  # as tables print it
    one_run_per_size: bool  # what is learned for one size is of no use for another
    run: Callable[..., Iterator[tuple[float, nn.Module]]]
    preset: Mapping[str, Any]  # options that make it this method

    @property
    def options(self) -> tuple[str, ...]:
        """What may be set, with the paper's values as defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.preset)

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All that a run with `options` is made with: the defaults of the others, and of its recipe, too."""
        parameters = inspect.signature(self.run).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | dict(self.preset) | dict(options)
        return found | ({"recipe": dataclasses.asdict(named(found["recipe"]))} if "recipe" in found else {})


METHODS: dict[str, Method] = {
    "svd": Method("SVD-Magn.", False, svd.run, {}),
    "asvd": Method("ASVD", False, asvd.run, {}),
    "svd-llm-w": Method("SVD-LLM (W)", False, svdllm.run, {"update": False, "lora": False}),
    "svd-llm": Method("SVD-LLM", True, svdllm.run, {"update": True, "lora": False}),
    "svd-llm-lora": Method("SVD-LLM + LoRA", True, svdllm.run, {"update": False, "lora": True}),
    "dobi-svd": Method("Dobi-SVD", True, dobi.run, {}),
    "covariance": Method("Covariance cut", False, covariance.run, {"allocation": "uniform"}),
    "covariance-global": Method("Covariance cut, global ranks", False, covariance.run, {"allocation": "global"}),
    "acip-paper": Method("ACIP (paper)", False, calibrated.run, {"recipe": "paper"}),
    "acip": Method("ACIP (ours)", False, calibrated.run, {"recipe": "acip"}),
}


@dataclass(frozen=True)
class Compressed:
    """A model of one size. `model` is the base model with other layers in place, until the next size is asked for."""

    asked: float
    model: nn.Module
    stored_params: int  # of the target layers
    stored_bytes: int  # of them, with the places of pivot rows, which are no parameters
    dense_params: int  # of the base model's target layers
    counted: str  # the forms that the layers are stored in: dense, factors, pivot

    @property
    def got(self) -> float:
        """The size by the convention `linear`."""
        return self.stored_params / self.dense_params


def method(name: str) -> Method:
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}{did_you_mean(name, METHODS)}. Allowed: {', '.join(METHODS)}.")
    return METHODS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """RecipeError for one that the method has not, or of another kind; their ranges are the method's business."""
    chosen = method(name)
    allowed, parameters = chosen.options, inspect.signature(chosen.run).parameters
    for option, value in options.items():
        if option not in allowed:
            raise RecipeError(f"{name} has no option {option!r}{did_you_mean(option, allowed)}. Allowed: {', '.join(allowed)}.")
        if option == "set":
            calibrated.changed(chosen.preset["recipe"], value)
        else:
            coerce(f"{name}'s {option}", value, parameters[option].annotation)


def compress(
    name: str,
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress = lambda what, done, total: None,
    **options: Any,
) -> Iterator[Compressed]:
    """`base` at each of `sizes` by the method `name`, calibrated on `windows` [n, T] of token ids; never above the size.

    The base model is as it was once the iterator is used up or closed. RecipeError for an unknown method or option, BudgetError
    for a size that is malformed or out of reach, DataError for too little text, BaseModelError for what can't be compressed.
    """
    chosen = method(name)
    check_options(name, options)
    for size in sizes:
        Budget(ratio=size)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise DataError(f"the windows are {list(windows.shape)}; calibration needs [n, T] token ids, n at least 1 and T at least 2.")
    linears = find_linears(base.model, options.get("exclude", ()))
    dense = stored(base.model, linears)
    for size, model in chosen.run(base, windows, sizes, progress, **chosen.preset, **options):
        count = stored(model, linears)
        assert count <= size * dense * (1 + 1e-12), f"{name} stores {count} of {dense} numbers at size {size}"
        made = {layer: model.get_submodule(layer) for layer in linears}
        forms = " + ".join(sorted({_form(layer) for layer in made.values()}))
        yield Compressed(size, model, count, sum(map(stored_bytes, made.values())), dense, forms)


def _form(layer: nn.Module) -> str:
    return "factors" if isinstance(layer, LowRankLinear) else "pivot" if isinstance(layer, PivotLinear) else "dense"
