"""The methods of the paper's Table 1 and their successors behind one call, `compress`, which counts the storage of each model.

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

C is the second moment of the inputs of a layer on the calibration text. All methods store plain factors, r (M + N) numbers, except `acip`,
which stores pivot rows if they are smaller (acip.sizing.cut_table). Storage is counted on the model itself, including adapters.
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
from acip.data import check_windows
from acip.errors import RecipeError
from acip.evaluate.measurement import stored_bytes
from acip.layers.targets import find_linears, require_matches
from acip.modeling_acip import LowRankLinear, PivotLinear
from acip.recipe import named
from acip.sizing.budget import Budget
from acip.utils.coerce import coerce, did_you_mean


@dataclass(frozen=True)
class Method:
    """A compression method. `run` yields (size, model); its keyword-only parameters are the options."""

    title: str  # in tables
    one_run_per_size: bool  # whether each size is trained separately
    run: Callable[..., Iterator[tuple[float, nn.Module]]]
    preset: Mapping[str, Any]  # fixed options that define this method

    @property
    def options(self) -> tuple[str, ...]:
        """The options that may be set. Their defaults are the values of the paper."""
        parameters = inspect.signature(self.run).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.preset)

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of a run with `options`: these, the defaults of the others, and the fields of its recipe."""
        parameters = inspect.signature(self.run).parameters.values()
        settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | dict(self.preset) | dict(options)
        return settings | ({"recipe": dataclasses.asdict(named(settings["recipe"]))} if "recipe" in settings else {})


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
    """A model at one size. `model` is the base model with replaced layers, valid until the iterator advances."""

    asked: float
    model: nn.Module
    stored_params: int  # of the target layers
    stored_bytes: int  # of the target layers, including the indices of pivot rows, which are not parameters
    dense_params: int  # of the base model's target layers
    counted: str  # the forms of the layers: dense, factors, pivot

    @property
    def got(self) -> float:
        """The size in the convention `linear`."""
        return self.stored_params / self.dense_params


def method(name: str) -> Method:
    """Return the method `name`. RecipeError if it is unknown."""
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}{did_you_mean(name, METHODS)}. Allowed: {', '.join(METHODS)}.")
    return METHODS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise RecipeError for an unknown option or one of the wrong type. The methods check the ranges themselves."""
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
    """Compress `base` to each of `sizes` by the method `name`, with calibration text `windows`, [n, T] token ids.

    No model exceeds its size. The base model is restored once the iterator is exhausted or closed. Raises RecipeError for an unknown method
    or option, BudgetError for an invalid or unreachable size, DataError for too little text, and BaseModelError for a model that
    cannot be compressed.
    """
    chosen = method(name)
    check_options(name, options)
    for size in sizes:
        Budget(ratio=size)
    check_windows(windows)
    require_matches(base.model, options.get("exclude", ()))
    linears = find_linears(base.model, options.get("exclude", ()))
    dense = stored(base.model, linears)
    for size, model in chosen.run(base, windows, sizes, progress, **chosen.preset, **options):
        count = stored(model, linears)
        assert count <= size * dense * (1 + 1e-12), f"{name} stores {count} of {dense} numbers at size {size}"
        layers = [model.get_submodule(layer) for layer in linears]
        forms = " + ".join(sorted({_form(layer) for layer in layers}))
        yield Compressed(size, model, count, sum(map(stored_bytes, layers)), dense, forms)


def _form(layer: nn.Module) -> str:
    return "factors" if isinstance(layer, LowRankLinear) else "pivot" if isinstance(layer, PivotLinear) else "dense"
