"""Sizes of one model measured side by side, each as a Ray task; what was measured once is not measured again.

    artifact on disk, mapped by all tasks of a node --> size 1.0 --> row -.
                                                    --> size 0.6 --> row --> MLflow, JSON, the artifact's curve
                                                    --> size 0.4 --> (its process dies: this row is lost, no other)

Each part of a row is stored as soon as it is there, at STORE/evaluations/MODEL/SIZE/PART/part.json, by hashes of the model's files
and of what was measured. So neither a second run nor another fleet with the same artifact repeats it, nor what the curve holds.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from acip.artifact.artifact import Artifact
from acip.base import check_tokenizer, load_base, tokenizer_of
from acip.errors import AcipError, BudgetError, EvaluationError
from acip.evaluate import DivergenceOn, Efficiency, Measurement, Part, TaskScore, evaluate, extended, metrics, recorded
from acip.evaluate.tasks import expand
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Nodes, Resources, fits, resources_of, root_cause
from acip_platform.settings import Settings
from acip_platform.storage.inputs import identity
from acip_platform.storage.store import Store
from acip_platform.tracking.runs import Run

PART = "part.json"
SIZE = "size"  # key of what a row says of the size itself
SIZE_FACTS = ("got", "convention", "got_paper", "got_model", "params", "bytes")
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What is measured: an artifact by its URI, at any size, or a model that `acip.base` loads, as it is."""

    uri: str = ""
    base: str = ""
    dtype: str = "bfloat16"  # of `base`
    trust_remote_code: bool = False

    def identity(self, artifact: Artifact | None) -> str:
        """The same for the same weights: a curve that grows changes nothing."""
        facts = (self.dtype, identity(self.base)) if artifact is None else artifact.manifest["files"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def reads(self, artifact: Artifact | None, what: Sequence[Measurement]) -> list[Measurement]:
        """`what` as this model's tokenizer reads it: what is measured, and under which key it is known, depends on that."""
        tokenizer = tokenizer_of(self.base, self.trust_remote_code) if artifact is None else artifact.tokenizer()
        return [one.read_by(tokenizer) for one in what]


@dataclass(frozen=True)
class Parts:
    """Stored parts of one model at one size, as a mapping by key, over those that its curve holds."""

    store: Store
    place: str
    curve: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, model: Model, artifact: Artifact | None, cut: Cut | None) -> "Parts":
        removed, curve = 0, dict[str, Part]()
        if artifact is not None and cut is not None:
            removed = cut.removed
            for row in artifact.curve:
                if row["got"] == cut.sizes["linear"]:
                    curve = {**recorded(row), SIZE: {key: row[key] for key in SIZE_FACTS if key in row}}
        return cls(Store.of(settings), f"evaluations/{model.identity(artifact)}/{removed}", curve)

    def __contains__(self, key: object) -> bool:
        return key in self.curve or self.store.exists(self._uri(key), PART)

    def __getitem__(self, key: str) -> Part:
        if key in self.curve:
            return self.curve[key]
        (raw,) = self.store.read([f"{self._uri(key)}/{PART}"])
        part: Part = json.loads(raw)
        return part

    def __setitem__(self, key: str, part: Part) -> None:
        folder = Path(tempfile.mkdtemp(prefix="part-"))
        (folder / PART).write_text(json.dumps(part))
        self.store.add(folder, f"{self.place}/{key}", PART)

    def _uri(self, key: object) -> str:
        return self.store.uri(f"{self.place}/{key}")


@dataclass(frozen=True)
class Outcome:
    """A size's row, or what went wrong with it."""

    size: float
    row: Row | None
    error: str | None


def measure_sizes(
    model: Model, sizes: Sequence[float], what: Sequence[Measurement], settings: Settings, inbox: Any, there: Nodes, cpus: float = 0.0
) -> Iterator[Outcome]:
    """A row for every size, as they come. On GPUs one size each; on CPUs `cpus` of them (0 = shared out). `there` are the nodes that
    Ray has, or may start.

    Where sizes share a machine's CPUs, speed is measured afterwards, one size at a time with all of a node's.
    """
    alone = resources_of(Job("a size", model.uri or model.base), there)
    each = cpus or (alone.cpus if alone.gpus else max(1.0, alone.cpus // len(sizes)))
    if not fits([Resources(alone.gpus, each)], there):
        raise EvaluationError(
            f"a size asks for {alone.gpus:g} GPUs and {each:g} CPUs; no node has them. Lower --cpus, or name with --pool what an "
            "autoscaler may start."
        )
    waves = [(list(what), each)]
    if not alone.gpus:
        quality, speed = ([one for one in what if isinstance(one, Efficiency) == fast] for fast in (False, True))
        waves = [(part, cpus) for part, cpus in ((quality, each), (speed, alone.cpus)) if part]
    failed: set[float] = set()
    rows: dict[float, Row] = {}
    for i, (part, threads) in enumerate(waves):
        options = {"num_cpus": threads, "num_gpus": alone.gpus}
        todo = [size for size in sizes if size not in failed]
        started = {_measure.options(**options).remote(model, size, part, settings, max(1, int(threads)), inbox): size for size in todo}
        while started:
            (done,), _ = ray.wait(list(started))
            size = started.pop(done)
            try:
                row = ray.get(done)
            except Exception as error:  # its process died, or what it ran raised: the others go on
                row = {"error": root_cause(error)}
            if "error" in row:
                failed.add(size)
                yield Outcome(size, None, row["error"])
                continue
            rows[size] = {**row, "evaluation": [*rows.get(size, {}).get("evaluation", []), *row["evaluation"]]}
            if i == len(waves) - 1:
                yield Outcome(size, rows[size], None)


@ray.remote(max_retries=0)
def _measure(model: Model, size: float, what: list[Measurement], settings: Settings, threads: int, inbox: Any) -> Row:
    """One size's row. The user's errors come back as values: raised, they would come with a page of Ray around them."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(part: Part) -> None:
        inbox.put.remote({"model": f"size {size:g}", "kind": "stage", "text": told(part)})

    try:
        artifact = Store.of(settings).open(model.uri) if model.uri else None
        known = Parts.of(settings, model, artifact, artifact.table().cut(Budget(ratio=size)) if artifact else None)
        what = model.reads(artifact, what)
        if SIZE in known and all(one.key in known for one in what):
            return {"asked": size, **known[SIZE], "evaluation": [known[one.key] for one in what]}
        if artifact is None:
            base = load_base(model.base, model.dtype, model.trust_remote_code)  # type: ignore[arg-type]
            check_tokenizer(base)
            torch.nn.Module.to(base.model, device)
            reference = _reference(model, what, base.tokenizer, device)
            row = {"got": 1.0, **evaluate(base.model, base.tokenizer, what, reference, known, say)}
        else:
            artifact = Artifact.open(Store.of(settings).fetch(model.uri))  # one copy on a node's disk, mapped by all
            row = evaluate(artifact.load(device, size=size), artifact.tokenizer(), what, known=known, say=say)
        if SIZE not in known:
            known[SIZE] = {key: value for key, value in row.items() if key not in ("asked", "evaluation")}
        return {"asked": size, **row}
    except AcipError as error:
        return {"error": str(error)}


def _reference(model: Model, what: Sequence[Measurement], tokenizer: Any, device: torch.device) -> Any:
    """The model that distances are measured to, where they are; EvaluationError for one that reads other tokens."""
    source = next((one.reference for one in what if isinstance(one, DivergenceOn)), "")
    if not source:
        return None
    found = load_base(source, model.dtype, model.trust_remote_code)  # type: ignore[arg-type]
    if found.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise EvaluationError(f"{source} has other tokens than {model.base}: their distributions can't be compared.")
    return torch.nn.Module.to(found.model, device)


def told(part: Part) -> str:
    """A part in a few words."""
    shown = [f"{name} {value:.6g}" for name, value in part["values"].items() if "stderr" not in name]
    return f"{part['label']}: {', '.join(shown) or 'done'} ({part['seconds']:.0f} s)"


def log_rows(run: Run, rows: Sequence[Row]) -> None:
    """Rows as metrics over size percent, each once, and as a file."""
    logged = run.steps("size/got")
    points = []
    for row in rows:
        size = {f"size/{key}": float(row[key]) for key in ("got", "params", "bytes")}
        points.append((round(row["asked"] * 100), {**metrics(row), **size}))
    run.metrics([(step, values) for step, values in points if step not in logged])
    run.json(list(rows), "evaluation.json")


def record(store: Store, uri: str, rows: Sequence[Row]) -> tuple[Artifact, list[float]]:
    """Put rows into the curve of the artifact at `uri`; returns it, and the sizes that the curve has no place for."""
    artifact = store.open(uri)
    curve, left_out = extended(artifact.curve, rows, artifact.recipe.stop_ratio)
    return store.record_curve(uri, artifact, curve), left_out


def measure_tasks(
    job: Job, artifact: Artifact, any_size: ElasticModel, uri: str, run: Run, settings: Settings, say: Callable[..., None]
) -> Artifact:
    """A fleet's `tasks`, at the sizes of its curve, one after the other where the model is resident. The artifact with what they gave."""
    what = [TaskScore(task, limit=job.task_limit) for task in expand(job.tasks)]
    rows = []
    for size in job.sizes if what else ():
        try:
            cut = any_size.resize(Budget(ratio=size))
        except BudgetError:
            continue
        say("stage", text=f"size {size:.2f}: {len(what)} tasks")
        known = Parts.of(settings, Model(uri), artifact, cut)
        rows.append(evaluate(any_size, artifact.tokenizer(), what, known=known, say=lambda part: say("stage", text=told(part))))
    if not rows:
        return artifact
    log_rows(run, rows)
    recorded, _ = record(Store.of(settings), uri, rows)
    return recorded
