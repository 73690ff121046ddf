"""A calibration, described by one frozen `Recipe`. A named recipe is a function that returns one.

The comment of each field gives its meaning, unit, allowed range and section of the paper (ACIP, TMLR 2025). "Paper" marks the
paper's choice, "ours" our own. Recipes in files are read by `Recipe.from_dict`, whose errors state what is wrong and what is allowed.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from acip import renamed
from acip.errors import RecipeError, cited
from acip.utils.coerce import coerce, did_you_mean

Basis = Literal["fisher", "covariance", "svd"]
Adapter = Literal["factors", "layer"]
Scores = Literal["fisher", "order", "gradient", "singular_values"]
Storage = Literal["pivot", "factors"]
Convention = Literal["linear", "paper", "model"]
PostTune = Literal["stop", "sizes"]
Quantize = Literal["none", "nf4", "fp4"]
Code = Literal["ranks", "both", "bits"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Recipe:
    """All settings of a calibration. Raises RecipeError for wrong types and for values out of range."""

    # Parametrization (2.2.1)
    # a layer's directions (acip.calibration.bases): the best prefixes for the model's predictions, from the second moments of inputs and
    # gradients (fisher, ours); for the layer's outputs, from those of inputs (covariance); or the SVD of W (paper)
    basis: Basis = "fisher"
    # windows of calibration text for the basis and the codes; a quarter of them for the Fisher scores; >= 1
    sample_windows: int = 256
    exclude: tuple[str, ...] = ()  # layers whose dotted name contains one of these are not compressed (D.8)
    mask_scale: float = 0.02  # initial value of the mask parameters p; > 0
    adapter: Adapter = "factors"  # place of the LoRA adapters: on U and V, where they cost no rank (ours), or beside the layer (paper)
    adapter_rank: int = 32  # R; 0 = no adapters (D.2)
    adapter_alpha: float = 16.0  # adapters are scaled by alpha / R
    adapter_dropout: float = 0.0  # [0, 1); above 0, each layer stores its own copy of its input
    dtype: Dtype = "bfloat16"  # of the weights; masks, scores, adapters and optimizer state are float32 (float64 for float64 weights)
    quantize: Quantize = "none"  # 4-bit weights and directions (3.4); `transfer` applies the result at full precision

    # Data
    batch_size: int = 4  # windows per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, one more forward pass
    seq_len: int = 1024  # tokens per window
    seed: int = 0  # of the order of windows, initial adapters, dropout, and sizes in post-tuning

    # Scores (2.2.2, Algorithm 1, Appendix B)
    # fisher: Fisher information of each direction, measured once (ours)
    # order: the order in which an L1 penalty prunes the masks (paper)
    # gradient: the task gradients of the masks, summed over that pruning
    # singular_values: the singular values themselves (D.6)
    scores: Scores = "fisher"
    lr: float = 5e-5  # of AdamW, for masks and adapters; > 0
    lambda_start: float = 1e-3  # initial weight lambda of the L1 term on the masks; > 0
    lambda_factor: float = 1.01  # lambda is multiplied by this factor; >= 1
    lambda_interval: int = 4  # optimizer steps between two increases of lambda; >= 1
    stop_ratio: float = 0.4  # pruning stops at this size (D.4); (0, 1)
    convention: Convention = "linear"  # how stop_ratio and sizes in post-tuning are counted; see acip.sizing.cut_table
    # share of the KL divergence from the base model in the task loss; [0, 1), because KL alone has no gradient at the start
    prune_distill_weight: float = 0.5
    scores_until: float | None = None  # freeze the score map below this size; pruning continues to the stop ratio (D.5)
    max_prune_steps: int = 10_000  # CalibrationError if the stop ratio is not reached within these steps

    # Post-tuning (D.7)
    post_tune_steps: int = 1000  # >= 0
    total_steps: int | None = None  # steps of pruning and post-tuning together; None = post_tune_steps after the end of pruning
    post_tune: PostTune = "sizes"  # stop: the smallest size only (paper); sizes: alternate the smallest and U[stop, 1] (ours)
    post_tune_lr: float | None = None  # at the first step; None = lr
    post_tune_lr_end: float = (
        0.05  # at the last step, as a share of that at the first, with a linear decrease; [0, 1], 1 = constant (paper)
    )
    distill_weight: float = 1.0  # share of the KL divergence from the base model in the loss of post-tuning; [0, 1]

    # Any size (2.2.3)
    storage: Storage = "pivot"  # storage form of a compressed layer, which sets the cost of a rank; see acip.sizing.cut_table
    dense_if_no_saving: bool = True  # a layer that saves nothing becomes the original one, without adapter (D.3)
    # what the artifact holds: ranks; coded versions of the layers, for models of any number of bytes (bits: acip.coding, ours); or both.
    # With bits alone, nothing is parametrized or scored.
    code: Code = "ranks"
    code_tune_steps: int = 100  # training steps, of one window each, for the step sizes of the codes (ours); >= 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, coerce(field.name, getattr(self, field.name), field.type))
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
            ("post_tune_lr_end", "in [0, 1]", 0 <= self.post_tune_lr_end <= 1),
            ("prune_distill_weight", "in [0, 1)", 0 <= self.prune_distill_weight < 1),
            ("distill_weight", "in [0, 1]", 0 <= self.distill_weight <= 1),
            ("code_tune_steps", ">= 0", self.code_tune_steps >= 0),
            ("scores_until", "in (stop_ratio, 1)", self.scores_until is None or self.stop_ratio < self.scores_until < 1),
        ):
            if not ok:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")
        if not self.adapter_rank and (self.post_tune_steps or self.total_steps):
            raise RecipeError(
                "adapter_rank is 0, and without adapters there is nothing to post-tune: set post_tune_steps to 0 and total_steps to null."
            )
        if self.scores == "singular_values" and self.basis != "svd":
            raise RecipeError(f"scores is 'singular_values' and basis is {self.basis!r}; these scores need basis 'svd'.")

    @property
    def prunes(self) -> bool:
        """True if the scores come from pruning. If not, they are known before the first step."""
        return self.scores in ("order", "gradient")

    @property
    def trains(self) -> bool:
        """True if the calibration takes optimizer steps on masks or adapters, which need the whole model in memory."""
        return self.prunes or self.end(0) > 0

    def end(self, stop_step: int) -> int:
        """Return the last step of a calibration whose pruning stopped at `stop_step`."""
        return stop_step + self.post_tune_steps if self.total_steps is None else max(stop_step, self.total_steps)

    def tuning_lr(self, step: int, steps: int) -> float:
        """Return the learning rate of a step of post-tuning, 0 <= step < steps."""
        return (self.post_tune_lr or self.lr) * (1 - (1 - self.post_tune_lr_end) * step / max(1, steps - 1))

    @property
    def score_windows(self) -> int:
        """The number of windows for the Fisher scores, a quarter of the sample windows: K scores need fewer than N x N second moments."""
        return -(-self.sample_windows // 4)

    @property
    def adapter_rows(self) -> int:
        """The number of directions that a layer's adapter adds at every size."""
        return self.adapter_rank if self.adapter == "layer" and self.code != "bits" else 0

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], start: "Recipe | None" = None) -> "Recipe":
        """Return `start` (default: the default recipe) with `fields` changed. Raises RecipeError for unknown names and wrong values."""
        known = [field.name for field in dataclasses.fields(cls)]
        changes: dict[str, Any] = {}
        for given_name, value in fields.items():
            name = renamed.recipe_field(given_name)
            if name not in known:
                raise RecipeError(f"unknown recipe field {cited(name)}{did_you_mean(name, known)}. Allowed: {', '.join(known)}.")
            if name in changes:
                raise RecipeError(f"{name} is given twice, once under an old name. Keep only {name}.")
            changes[name] = value
        return dataclasses.replace(start or cls(), **changes)


def acip() -> Recipe:
    """Return the default recipe, for models of the paper's scale."""
    return Recipe()


def paper() -> Recipe:
    """Return the paper's recipe: SVD basis, sizes counted without adapters, post-tuning at the stop ratio only (Appendix B)."""
    return Recipe(
        basis="svd", adapter="layer", adapter_dropout=0.05, scores="order", convention="paper", prune_distill_weight=0.0,
        post_tune="stop", post_tune_lr_end=1.0, distill_weight=0.0, storage="factors",
    )  # fmt: skip


def demo() -> Recipe:
    """Return a recipe that takes minutes on two CPU cores for a 135M model: few, small batches and a high learning rate."""
    return Recipe(sample_windows=128, batch_size=2, seq_len=256, lr=1e-3, post_tune_steps=60)


RECIPES: dict[str, Callable[[], Recipe]] = {"acip": acip, "paper": paper, "demo": demo}


def named(name: str) -> Recipe:
    """Return the recipe called `name` in `RECIPES`. Raises RecipeError for an unknown name."""
    if not isinstance(name, str) or name not in RECIPES:
        raise RecipeError(f"unknown recipe {cited(name)}{did_you_mean(name, RECIPES)}. Allowed: {', '.join(RECIPES)}.")
    return RECIPES[name]()


def nearest(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return the name of the named recipe that is closest to `recipe`, and the fields of `recipe` that differ from it."""
    given = recipe.to_dict()
    known = {name: make().to_dict() for name, make in RECIPES.items()}
    differences = {name: {key: value for key, value in given.items() if value != fields[key]} for name, fields in known.items()}
    return min(differences.items(), key=lambda entry: len(entry[1]))
