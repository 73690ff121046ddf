"""A calibration is described by one frozen `Recipe`; a named recipe is a function that returns one.

Fields carry their meaning, unit, allowed range and the section of the paper (ACIP, TMLR 2025) they come from.
`Recipe.from_dict` is the only way in from files: it names what is wrong and what is allowed.
"""

import dataclasses
import difflib
import json
import math
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from acip import renamed
from acip.errors import RecipeError, cited

Basis = Literal["covariance", "svd"]
Adapter = Literal["factors", "layer"]
Scores = Literal["fisher", "order", "gradient", "singular_values"]
Storage = Literal["pivot", "factors"]
Convention = Literal["linear", "paper", "model"]
PostTune = Literal["stop", "sizes"]
Quantize = Literal["none", "nf4", "fp4"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
LARGEST = 2**31  # whole numbers in files are below it


@dataclass(frozen=True)
class Recipe:
    # Parametrization (2.2.1)
    basis: Basis = "covariance"  # directions of a layer: eigenvectors of W C W^T (ours), or the SVD's of W (the paper)
    sample_windows: int = 64  # windows of calibration text behind the covariance basis and the Fisher scores; >= 1
    exclude: tuple[str, ...] = ()  # layers whose dotted name contains one of these stay as they are (D.8)
    mask_scale: float = 0.02  # start of the mask parameters p; > 0
    adapter: Adapter = "factors"  # where the LoRA adapters sit: on U and V, where they cost nothing (ours), or beside the layer (the paper)
    adapter_rank: int = 32  # R of the adapters; 0 = no adapters (D.2)
    adapter_alpha: float = 16.0  # adapters are scaled by alpha / R
    adapter_dropout: float = 0.0  # [0, 1); each layer then keeps its own dropped input
    dtype: Dtype = "bfloat16"  # of the weights; masks, scores, adapters and optimizer state are float32, or float64 with float64
    quantize: Quantize = "none"  # weights and directions in 4 bit (3.4); `transfer` carries the result over to full precision

    # Data
    batch_size: int = 4  # windows per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    gradient_checkpointing: bool = (
        False  # activations again in the backward pass instead of keeping them: less memory, one more forward pass
    )
    seq_len: int = 1024  # tokens per window
    seed: int = 0  # order of the windows, adapters' start, dropout, sizes in post-tuning

    # Scores (2.2.2, Algorithm 1, Appendix B). fisher: Fisher information of each direction, measured once (ours);
    # order: of pruning by L1 (the paper); gradient: the masks' task gradients summed over that; singular_values: as they are (D.6)
    scores: Scores = "fisher"
    lr: float = 5e-5  # AdamW, masks and adapters; > 0
    lambda_start: float = 1e-3  # weight of the L1 term on the masks; > 0
    lambda_factor: float = 1.01  # lambda grows by this factor; >= 1
    lambda_interval: int = 4  # every so many optimizer steps
    stop_ratio: float = 0.4  # pruning stops at this size (D.4); (0, 1)
    convention: Convention = "linear"  # what stop_ratio and the sizes in post-tuning count; see acip.sizing.cut_table
    prune_distill_weight: float = (
        0.5  # share of KL to the base model's distribution in the task loss; [0, 1), as KL alone starts without a gradient
    )
    scores_until: float | None = None  # the score map is frozen below this size, while pruning goes on to the stop ratio (D.5)
    max_prune_steps: int = 10_000  # an error if the stop ratio isn't reached by then

    # Post-tuning (D.7)
    post_tune_steps: int = 1000
    total_steps: int | None = None  # of pruning and post-tuning together; None = post_tune_steps after however many pruning took
    post_tune: PostTune = "sizes"  # stop: the smallest size only (the paper); sizes: the smallest and U[stop, 1] in turn
    post_tune_lr: float | None = None  # None = lr
    distill_weight: float = 1.0  # share of KL to the base model's distribution in post-tuning's loss; [0, 1]

    # Any size (2.2.3)
    storage: Storage = "pivot"  # how a compressed layer is stored, and so what a rank costs; see acip.sizing.cut_table
    dense_if_no_saving: bool = True  # a layer that saves nothing is the original one, without adapter (D.3)

    def __post_init__(self) -> None:
        for name, rule, ok in (
            ("sample_windows", ">= 1", self.sample_windows >= 1),
            ("mask_scale", "> 0", self.mask_scale > 0),
            ("adapter_rank", ">= 0", self.adapter_rank >= 0),
            ("adapter_alpha", "> 0", self.adapter_alpha > 0),
            ("adapter_dropout", "in [0, 1)", 0 <= self.adapter_dropout < 1),
            ("batch_size", ">= 1", self.batch_size >= 1),
            ("gradient_accumulation_steps", ">= 1", self.gradient_accumulation_steps >= 1),
            ("seq_len", ">= 2", self.seq_len >= 2),
            ("lr", "> 0", self.lr > 0),
            ("lambda_start", "> 0", self.lambda_start > 0),
            ("lambda_factor", ">= 1", self.lambda_factor >= 1),
            ("lambda_interval", ">= 1", self.lambda_interval >= 1),
            ("stop_ratio", "in (0, 1)", 0 < self.stop_ratio < 1),
            ("max_prune_steps", ">= 1", self.max_prune_steps >= 1),
            ("post_tune_steps", ">= 0", self.post_tune_steps >= 0),
            ("total_steps", ">= 1", self.total_steps is None or self.total_steps >= 1),
            ("post_tune_lr", "> 0", self.post_tune_lr is None or self.post_tune_lr > 0),
            ("prune_distill_weight", "in [0, 1)", 0 <= self.prune_distill_weight < 1),
            ("distill_weight", "in [0, 1]", 0 <= self.distill_weight <= 1),
            ("scores_until", "in (stop_ratio, 1)", self.scores_until is None or self.stop_ratio < self.scores_until < 1),
        ):
            if not ok:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")
        if not self.adapter_rank and (self.post_tune_steps or self.total_steps):
            raise RecipeError(
                "without adapters (adapter_rank 0) there is nothing to post-tune: set post_tune_steps to 0, total_steps to null."
            )
        if self.scores == "singular_values" and self.basis != "svd":
            raise RecipeError("singular values as scores need the SVD's directions: set basis to 'svd'.")

    @property
    def prunes(self) -> bool:
        """Whether scores come from pruning, and aren't known before the first step."""
        return self.scores in ("order", "gradient")

    def end(self, stop_step: int) -> int:
        """The last step of a calibration whose pruning stopped at `stop_step`."""
        return stop_step + self.post_tune_steps if self.total_steps is None else max(stop_step, self.total_steps)

    @property
    def adapter_rows(self) -> int:
        """The directions that the adapter of a layer takes up at every size."""
        return self.adapter_rank if self.adapter == "layer" else 0

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], start: "Recipe | None" = None) -> "Recipe":
        """`start` (default: the default recipe) with `fields` changed. Unknown names and wrong types are RecipeErrors."""
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        changes: dict[str, Any] = {}
        for given, value in fields.items():
            name = renamed.recipe_field(given)
            if name not in known:
                raise RecipeError(f"unknown recipe field {cited(name)}{did_you_mean(name, known)}. Allowed: {', '.join(known)}.")
            if name in changes:
                raise RecipeError(f"{name} is given twice, once under its old name. Keep {name}.")
            changes[name] = coerce(name, value, known[name])
        return dataclasses.replace(start or cls(), **changes)


def did_you_mean(name: object, known: "Mapping[str, Any] | list[str] | tuple[str, ...]") -> str:
    close = difflib.get_close_matches(name if isinstance(name, str) else cited(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, where that loses nothing: 3 is a float, 3.5 is no int, "3" is no number.

    Numbers are finite and below `LARGEST`, texts without control characters.
    """
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise RecipeError(f"{name} is {cited(value)}; allowed: {', '.join(map(repr, get_args(kind)))}.")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(coerce(name, item, get_args(kind)[0]) for item in value)
        raise RecipeError(f"{name} is {cited(value)}; it must be a list.")
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if kind is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RecipeError(f"{name} is {cited(value)}; it must be {_article(kind)}.")
    _check_plain(name, value)
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int):
        return value
    if kind is float and not isinstance(value, str):
        return float(value)
    raise RecipeError(f"{name} is {cited(value)}; it must be {_article(kind)}.")


def _check_plain(name: str, value: float | str) -> None:
    if isinstance(value, str) and any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise RecipeError(f"{name} is {cited(value)}; it must be text without control characters.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name} is {value}; it must be finite.")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise RecipeError(f"{name} is {cited(value)}; it must be below {LARGEST:,}.")


def _article(kind: Any) -> str:
    return {int: "a whole number", float: "a number (write 1.0e-4, not 1e-4, in YAML)", str: "text", bool: "true or false"}[kind]


def acip() -> Recipe:
    """Our default at the scale of the paper's models."""
    return Recipe()


def paper() -> Recipe:
    """The paper to the letter: SVD basis, sizes without adapters, post-tuning at the stop ratio only (Appendix B)."""
    return Recipe(
        basis="svd", adapter="layer", adapter_dropout=0.05, scores="order", convention="paper", prune_distill_weight=0.0,
        post_tune="stop", distill_weight=0.0, storage="factors",
    )  # fmt: skip


def demo() -> Recipe:
    """Minutes on two CPU cores for a 135M model: few, small batches, so a high learning rate."""
    return Recipe(
        sample_windows=32, batch_size=2, seq_len=256, lr=1e-3, post_tune_steps=60,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {"acip": acip, "paper": paper, "demo": demo}


def named(name: str) -> Recipe:
    """A recipe by its name in `RECIPES`."""
    if not isinstance(name, str) or name not in RECIPES:
        raise RecipeError(f"unknown recipe {cited(name)}{did_you_mean(name, RECIPES)}. Allowed: {', '.join(RECIPES)}.")
    return RECIPES[name]()


def nearest(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The named recipe that `recipe` differs least from, and its fields that differ."""
    ours = recipe.to_dict()
    theirs = {name: make().to_dict() for name, make in RECIPES.items()}
    differences = {name: {key: value for key, value in ours.items() if value != fields[key]} for name, fields in theirs.items()}
    return min(differences.items(), key=lambda found: len(found[1]))
