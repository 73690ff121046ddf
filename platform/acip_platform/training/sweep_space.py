"""Read a space file, which lists the recipes that a sweep tries, and make the checked trials of one fleet job.

    name: schedules                      # name of the sweep; default: the name of the file
    set: {scores: order}                 # changes to the job's recipe that all trials share
    space:                               # any fields of the recipe
      lambda_factor: [1.05, 1.1, 1.2]    # a list of values,
      lr: {loguniform: [1.0e-4, 1.0e-3]} # or a range: uniform, loguniform, randint (both ends included)
      stop_ratio: [0.8, 0.6, 0.4]
    search: random                       # grid (default): all combinations; random: `samples` draws with `seed`
    samples: 8
    seed: 0
    scheduler: asha                      # none (default), or asha: end worse trials early; see acip_platform.training.sweep
    keep: winner                         # which artifacts: winner (default), front (Pareto), all

Every draw is combined with all stop ratios in a list, because they share one pruning (acip.calibration.shared_pruning). All trials
are drawn and checked before the first one starts.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from acip.errors import AcipError, RecipeError, cited
from acip.recipe import Recipe
from acip.utils.coerce import coerce
from acip_platform.scheduling.fleet import Job
from acip_platform.yaml_file import YamlFile

Search = Literal["grid", "random"]
Scheduler = Literal["none", "asha"]
Keep = Literal["winner", "front", "all"]
RECIPE = {field.name: field.type for field in dataclasses.fields(Recipe)}
RANGES = ("uniform", "loguniform", "randint")
MAX_TRIALS = 1000  # of a sweep; more are a mistake
WHY_NO_PBT = (
    "scheduler 'pbt' changes fields during a calibration. Most of them (stop_ratio, lambda, basis, adapter_rank, ...) cannot change then, "
    "and no recipe would reproduce the result. Use 'asha'."
)


class SpaceError(AcipError):
    """A space file cannot be read, or makes an invalid recipe."""


@dataclass(frozen=True)
class Range:
    """A distribution over numbers from `low` to `high`."""

    kind: str
    low: float
    high: float

    def domain(self) -> Any:
        """Return the distribution as Ray Tune defines it, with both ends included."""
        return tune.randint(int(self.low), int(self.high) + 1) if self.kind == "randint" else getattr(tune, self.kind)(self.low, self.high)


@dataclass(frozen=True)
class Trial:
    """One recipe of a sweep: `job.recipe` in full, and in `changes` the fields that vary."""

    name: str  # t00, t01, ...
    changes: dict[str, Any]
    job: Job

    @property
    def label(self) -> str:
        return ", ".join(f"{field} {shown(value)}" for field, value in self.changes.items())


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    name: str
    path: str
    set: dict[str, Any]
    fields: dict[str, tuple[Any, ...] | Range]
    lines: dict[str, int]  # line of each field in the file
    search: Search = "grid"
    samples: int = 1
    seed: int = 0
    scheduler: Scheduler = "none"
    keep: Keep = "winner"

    @classmethod
    def load(cls, path: str | Path) -> "Space":
        """Read and check a space file; SpaceError names the line and the field."""
        return _Reader(str(path)).space()

    def trials(self, job: Job) -> tuple[Trial, ...]:
        """Return all trials of this job, the same at every call. SpaceError if a recipe is invalid."""
        drawn: dict[str, dict[str, Any]] = {}
        for changes in self._draws():
            drawn[json.dumps(changes)] = changes  # random draws may repeat
        trials: list[Trial] = []
        for changes in self._ordered(list(drawn.values())):
            name = f"t{len(trials):02d}"
            try:
                recipe = Recipe.from_dict({**self.set, **changes}, job.recipe)
            except RecipeError as error:
                line = next((f", line {at}" for field, at in self.lines.items() if str(error).startswith(f"{field} ")), "")
                values = ", ".join(f"{field} {shown(value)}" for field, value in changes.items())
                raise SpaceError(f"{self.path}{line}: {error} ({job.name} with {values})") from error
            trials.append(Trial(name, changes, dataclasses.replace(job, recipe=recipe)))
        return tuple(trials)

    def _draws(self) -> list[dict[str, Any]]:
        """Draw with the generator of Ray Tune. Random fields have the same values at all points of the grid."""
        grid = {field for field in self.fields if self.search == "grid" or field == "stop_ratio"}
        spec: dict[str, Any] = {}
        for field, values in self.fields.items():
            if isinstance(values, Range):
                spec[field] = values.domain()
            else:  # by index, because Tune would resolve values that are lists
                indices = list(range(len(values)))
                spec[field] = tune.grid_search(indices) if field in grid else tune.choice(indices)
        random = np.random.RandomState(self.seed)
        draws = []
        for _ in range(self.samples):
            for _, variant in generate_variants(spec, constant_grid_search=True, random_state=random):
                draws.append({field: self._value(field, variant[field]) for field in self.fields})
        return draws

    def _value(self, field: str, drawn: Any) -> Any:
        """Return the value that was drawn: by index from a list, or rounded to 4 digits so that it can be typed again."""
        values = self.fields[field]
        if not isinstance(values, Range):
            return values[drawn]
        return int(drawn) if values.kind == "randint" else float(f"{drawn:.4g}")

    def _ordered(self, draws: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the draws with the smallest stop ratio first: its curve covers all sizes, and asha compares later trials with it."""
        return sorted(draws, key=lambda changes: changes["stop_ratio"]) if "stop_ratio" in self.fields else draws


def shown(value: Any) -> str:
    """Format a value for a label."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Reader(YamlFile):
    def __init__(self, path: str) -> None:
        super().__init__(path, SpaceError)

    def space(self) -> Space:
        allowed = ("name", "set", "space", "search", "samples", "seed", "scheduler", "keep")
        root = self.root("space file", ["space"])
        top = dict(self.items(root, allowed, "the space file"))
        given = {key: self.checked(node, coerce, key, self.value(node), kind) for key, (_, node) in top.items() if (kind := TOP.get(key))}
        name = self.name(top["name"][0] if "name" in top else root, given.pop("name", Path(self.path).stem))
        if "space" not in top:
            raise self.fail(root, "'space' is missing: which fields of the recipe vary, and over which values.")
        fixed: dict[str, tuple[yaml.Node, yaml.Node]] = dict(self.items(top["set"][1], RECIPE, "set")) if "set" in top else {}
        varied = dict(self.items(top["space"][1], RECIPE, "space"))
        for field, (key_node, _) in varied.items():
            if field in fixed:
                raise self.fail(key_node, f"{field} is in 'set' and in 'space'; it can be in one of them.")
        search = given.get("search", "grid")
        fields = {field: self.values(field, node, search) for field, (_, node) in varied.items()}
        if not fields:
            raise self.fail(top["space"][0], "space is empty; nothing would vary.")
        if search == "grid" and "samples" in given:
            raise self.fail(top["samples"][0], "samples is set, but a grid has all combinations. Set search to 'random' or remove samples.")
        if given.setdefault("samples", 1 if search == "grid" else 8) < 1:
            raise self.fail(top["samples"][0], f"samples is {given['samples']}; it must be at least 1.")
        if given.get("seed", 0) < 0:
            raise self.fail(top["seed"][0], f"seed is {given['seed']}; it must be at least 0.")
        lists = {field: values for field, values in fields.items() if not isinstance(values, Range)}
        count = given["samples"] * math.prod(len(values) for field, values in lists.items() if search == "grid" or field == "stop_ratio")
        if count > MAX_TRIALS:
            raise self.fail(
                top["space"][0], f"the space makes {count:,} trials; {MAX_TRIALS:,} are allowed. List fewer values, or use a random search."
            )
        changes = {field: self.checked(node, coerce, field, self.value(node), RECIPE[field]) for field, (_, node) in fixed.items()}
        lines = {field: key_node.start_mark.line + 1 for field, (key_node, _) in (fixed | varied).items()}
        return Space(name=name, path=self.path, set=changes, fields=fields, lines=lines, **given)

    def checked(self, node: yaml.Node, make: Any, *args: Any) -> Any:
        if args[:2] == ("scheduler", "pbt"):
            raise self.fail(node, WHY_NO_PBT)
        return super().checked(node, make, *args)

    def values(self, field: str, node: yaml.Node, search: str) -> tuple[Any, ...] | Range:
        """Return the values of one field: a list, or a range."""
        rule = f"{field} must be a list of values, or a range like {{uniform: [a, b]}} ({', '.join(RANGES)})"
        if isinstance(node, yaml.SequenceNode):
            if not node.value:
                raise self.fail(node, f"{rule}; it is an empty list.")
            return tuple(self.checked(item, coerce, field, self.value(item), RECIPE[field]) for item in node.value)
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{rule}; it is {cited(self.value(node))}. A value that all trials share goes into 'set'.")
        if len(node.value) != 1:
            raise self.fail(node, f"{rule}; this mapping has {len(node.value)} entries.")
        ((kind, (kind_node, ends)),) = self.items(node, RANGES, f"the range of {field}")
        if search == "grid":
            raise self.fail(kind_node, f"{field} is a range, and a grid needs lists. Set search to 'random', or list the values.")
        return self.range(field, kind, kind_node, self.value(ends))

    def range(self, field: str, kind: str, node: yaml.Node, ends: Any) -> Range:
        number = next((k for k in (get_args(RECIPE[field]) or (RECIPE[field],)) if k in (int, float)), None)
        if number is None or (kind == "randint") != (number is int):
            fits = {int: "randint", float: "uniform or loguniform"}.get(number, "a list of values")  # type: ignore[arg-type]
            raise self.fail(node, f"{field} can't be drawn by {kind}; use {fits}.")
        if not isinstance(ends, list) or len(ends) != 2:
            raise self.fail(node, f"{kind} of {field} is {cited(ends)}; it must be two numbers, [from, to].")
        low, high = (self.checked(node, coerce, field, end, number) for end in ends)
        if not low < high or not math.isfinite(high - low) or (kind == "loguniform" and low <= 0):
            raise self.fail(node, f"{kind} of {field} is [{low}, {high}]; it must rise{', and start above 0' * (kind == 'loguniform')}.")
        return Range(kind, low, high)


TOP: dict[str, Any] = {"name": str, "search": Search, "samples": int, "seed": int, "scheduler": Scheduler, "keep": Keep}
