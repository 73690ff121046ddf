"""Measurements of one model at several sizes. Each size is a Ray task, and finished measurements are not repeated.

    artifact on disk, mapped by all tasks of a node --> size 1.0 --> row -.
                                                    --> size 0.6 --> row --> MLflow, JSON, the artifact's curve
                                                    --> size 0.4 --> (if its process dies, only this row is lost)

A row describes one size; its parts are single measurements. Each part is stored as soon as it is measured, at
STORE/evaluations/MODEL/SIZE/PART/part.json, where MODEL and PART are hashes of the model's files and of the measurement. A second
run, or another fleet with the same artifact, reuses stored parts and those in the artifact's curve.
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
from acip.errors import AcipError, EvaluationError
from acip.evaluate import DivergenceOn, Efficiency, Measurement, Part, evaluate, extended, metrics, place_of, recorded
from acip.evaluate.tasks import measurements as task_measurements
from acip.sizing.budget import BITS_PER_WEIGHT, Budget
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip_platform.reporting.text_samples import size_label
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Nodes, Resources, fits, resources_of, root_cause
from acip_platform.settings import Settings
from acip_platform.storage.inputs import identity
from acip_platform.storage.store import Store
from acip_platform.tracking import logged_models
from acip_platform.tracking.logged_models import experiment_of, of_other, of_sizes
from acip_platform.tracking.runs import BYTES, Run, at_size

PART = "part.json"
SIZE = "size"  # key of the part that describes the size itself
SIZE_FACTS = ("got", "convention", BITS_PER_WEIGHT, "got_paper", "got_model", "params", "bytes", "flops")
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The model to measure: an artifact at `uri`, at any size, or a base model, as `acip.base` loads it."""

    uri: str = ""
    base: str = ""
    dtype: str = "bfloat16"  # dtype of `base`
    trust_remote_code: bool = False

    def identity(self, artifact: Artifact | None) -> str:
        """Return a hash of the weights. It does not depend on the artifact's curve."""
        facts = (self.dtype, identity(self.base)) if artifact is None else artifact.manifest["files"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def reads(self, artifact: Artifact | None, measurements: Sequence[Measurement]) -> list[Measurement]:
        """Return `measurements` for the tokenizer of this model, which their results and keys depend on."""
        tokenizer = tokenizer_of(self.base, self.trust_remote_code) if artifact is None else artifact.tokenizer()
        return [measurement.read_by(tokenizer) for measurement in measurements]


@dataclass(frozen=True)
class Parts:
    """The parts of one model's row at one size, as a mapping by key: those in the artifact's curve, and those in the store."""

    store: Store
    place: str
    curve: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, model: Model, artifact: Artifact | None, cut: Cut | None) -> "Parts":
        """Return the parts of `model` at the size of `cut`; `artifact` and `cut` are None for a base model."""
        size, curve = "0", dict[str, Part]()
        if artifact is not None and cut is not None:
            coded, number = cut.key
            size = f"codes{-number}" if coded else str(number)
            place = (bool(coded), -cut.sizes["bytes" if coded else "linear"])
            for row in artifact.curve:
                if place_of(row) == place:
                    curve = {**recorded(row), SIZE: {key: row[key] for key in SIZE_FACTS if key in row}}
        return cls(Store.of(settings), f"evaluations/{model.identity(artifact)}/{size}", curve)

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
    """The result of measuring one size: its row, or an error."""

    size: Budget
    row: Row | None
    error: str | None


def measure_sizes(
    model: Model,
    sizes: Sequence[Budget],
    measurements: Sequence[Measurement],
    settings: Settings,
    events: Any,
    nodes: Nodes,
    cpus: float = 0.0,
) -> Iterator[Outcome]:
    """Measure every size, and yield the outcomes in the order in which they are ready.

    `nodes` are the nodes that Ray has or may start. A task gets one GPU if there are any, and `cpus` CPUs; with 0, the CPUs are divided
    among the sizes. Without GPUs, speed is measured after everything else, one size at a time with all CPUs of a node.
    """
    exclusive = resources_of(Job("a size", model.uri or model.base), nodes)
    shared_cpus = cpus or (exclusive.cpus if exclusive.gpus else max(1.0, exclusive.cpus // len(sizes)))
    if not fits([Resources(exclusive.gpus, shared_cpus)], nodes):
        raise EvaluationError(
            f"a size needs {exclusive.gpus:g} GPUs and {shared_cpus:g} CPUs; no node has them. Lower --cpus, or list the nodes that an "
            "autoscaler may start with --pool."
        )
    waves = [(list(measurements), shared_cpus)]
    if not exclusive.gpus:
        quality, speed = ([each for each in measurements if isinstance(each, Efficiency) == fast] for fast in (False, True))
        waves = [(part, cpus) for part, cpus in ((quality, shared_cpus), (speed, exclusive.cpus)) if part]
    failed: set[Budget] = set()
    rows: dict[Budget, Row] = {}
    for i, (part, threads) in enumerate(waves):
        options = {"num_cpus": threads, "num_gpus": exclusive.gpus}
        todo = [size for size in sizes if size not in failed]
        started = {_measure.options(**options).remote(model, size, part, settings, max(1, int(threads)), events): size for size in todo}
        while started:
            (done,), _ = ray.wait(list(started))
            size = started.pop(done)
            try:
                row = ray.get(done)
            except Exception as error:  # the process died or the task raised; other sizes continue
                row = {"error": root_cause(error)}
            if "error" in row:
                failed.add(size)
                yield Outcome(size, None, row["error"])
                continue
            rows[size] = {**row, "evaluation": [*rows.get(size, {}).get("evaluation", []), *row["evaluation"]]}
            if i == len(waves) - 1:
                yield Outcome(size, rows[size], None)


@ray.remote(max_retries=0)
def _measure(model: Model, size: Budget, measurements: list[Measurement], settings: Settings, threads: int, events: Any) -> Row:
    """Measure one size. A user's error is returned as a value, because Ray would wrap an exception in a long traceback."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def emit(part: Part) -> None:
        events.put.remote({"model": f"size {shown(size)}", "kind": "stage", "text": part_line(part)})

    try:
        artifact = Store.of(settings).open(model.uri) if model.uri else None
        known = Parts.of(settings, model, artifact, artifact.table().cut(size) if artifact else None)
        measurements = model.reads(artifact, measurements)
        if SIZE in known and all(each.key in known for each in measurements):
            return {"asked": size.asked, **known[SIZE], "evaluation": [known[each.key] for each in measurements]}
        if artifact is None:
            base = load_base(model.base, model.dtype, model.trust_remote_code)  # type: ignore[arg-type]
            check_tokenizer(base)
            torch.nn.Module.to(base.model, device)
            reference = _reference(model, measurements, base.tokenizer, device)
            row = {"got": 1.0, **evaluate(base.model, base.tokenizer, measurements, reference, known, emit)}
        else:
            artifact = Artifact.open(Store.of(settings).fetch(model.uri))  # one copy on the node's disk, mapped by all tasks
            row = evaluate(artifact.load(device, size=size), artifact.tokenizer(), measurements, known=known, on_part=emit)
        if SIZE not in known:
            known[SIZE] = {key: value for key, value in row.items() if key not in ("asked", "evaluation")}
        return {"asked": size.asked, **row}
    except AcipError as error:
        return {"error": str(error)}


def _reference(model: Model, measurements: Sequence[Measurement], tokenizer: Any, device: torch.device) -> Any:
    """Load the reference model of a divergence measurement, or return None. EvaluationError if its vocabulary differs."""
    source = next((each.reference for each in measurements if isinstance(each, DivergenceOn)), "")
    if not source:
        return None
    reference = load_base(source, model.dtype, model.trust_remote_code)  # type: ignore[arg-type]
    if reference.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise EvaluationError(f"{source} has another vocabulary than {model.base}: their distributions can't be compared.")
    return torch.nn.Module.to(reference.model, device)


def shown(size: Budget) -> str:
    """Return a size ratio as text, with its convention if that is not `linear`."""
    return f"{size.asked:g}" + ("" if size.convention == "linear" else f" ({size.convention})")


def part_line(part: Part) -> str:
    """Return a part as one line: its label, values and duration."""
    shown = [f"{name} {value:.6g}" for name, value in part["values"].items() if "stderr" not in name]
    return f"{part['label']}: {', '.join(shown) or 'done'} ({part['seconds']:.0f} s)"


def log_rows(run: Run, rows: Sequence[Row]) -> None:
    """Log rows as metrics over their size (`at_size`), unless they are logged already, and as a JSON file."""
    points = []
    for row in rows:
        size = {f"size/{key}": float(row[key]) for key in ("got", "params", "bytes")}
        points.append(at_size(row, {**metrics(row), **size}))
    logged = {name: run.steps(name) for name in ("size/got", f"{BYTES}size/got")}
    run.metrics([(step, values) for step, values in points if not any(step in logged[name] for name in logged if name in values)])
    run.json(list(rows), "evaluation.json")


def log_models(run: Run, name: str, model: Model, artifact: Artifact | None, rows: Sequence[Row]) -> None:
    """Log the measured sizes as LoggedModels, those of an artifact in the experiment that it was made in."""
    if artifact is None:
        tokenizer, key = tokenizer_of(model.base, model.trust_remote_code), model.identity(None)
        models = [of_other(name, key, {"base": model.base, "dtype": model.dtype}, row, tokenizer) for row in rows]
    else:
        models = of_sizes(name, artifact, model.uri, rows)
    logged_models.log_models(run, models, experiment_of(run, artifact), made=False)


def record(store: Store, uri: str, rows: Sequence[Row]) -> tuple[Artifact, list[float]]:
    """Add rows to the curve of the artifact at `uri`. Return the artifact, and the sizes that could not be added."""
    artifact = store.open(uri)
    curve, left_out = extended(artifact.curve, rows, artifact.recipe.stop_ratio)
    return store.record_curve(uri, artifact, curve), left_out


def measure_tasks(
    job: Job, artifact: Artifact, any_size: ElasticModel, uri: str, run: Run, settings: Settings, emit: Callable[..., None]
) -> Artifact:
    """Score the job's `tasks` at the sizes of its curve with the resident model. Return the artifact with the scores in its curve."""

    def emit_part(part: Part) -> None:
        emit("stage", text=part_line(part))

    measurements = task_measurements(job.tasks, limit=job.task_limit)
    rows = []
    for row in artifact.curve if measurements else ():
        cut = any_size.resize(Budget(row["asked"], row.get("convention", "linear")))
        emit("stage", text=f"size {size_label(row)}: {len(measurements)} tasks")
        known = Parts.of(settings, Model(uri), artifact, cut)
        rows.append(evaluate(any_size, artifact.tokenizer(), measurements, known=known, on_part=emit_part))
    if not rows:
        return artifact
    log_rows(run, rows)
    recorded, _ = record(Store.of(settings), uri, rows)
    return recorded
