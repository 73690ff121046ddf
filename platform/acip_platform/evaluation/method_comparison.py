"""The arena: a comparison of compression methods with the same base model, text, evaluation and count of parameters.

    arena file -> entries: (the dense base), (method, all sizes) or (method, one size) -> rows -> a JSON file

An entry is one Ray task. A method that needs one run per size has one entry for each size. A row is stored as soon as it is
measured, and not measured again. A failed entry does not stop the others. Each entry runs in its own process, so that its peak
memory can be measured.
"""

import dataclasses
import hashlib
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from filelock import FileLock
from torch import nn

from acip import baselines
from acip.base import Base, check_tokenizer, load_base
from acip.data import WINDOWS_VERSION, documents, token_windows
from acip.errors import AcipError, cited
from acip.evaluate import GeneratedTask, PerplexityOn, TaskScore, Text, evaluate
from acip.evaluate.efficiency import reset_peak
from acip.evaluate.heldout_text import Protocol
from acip.evaluate.measurement import Subject, stored_bytes
from acip.evaluate.tasks import check as check_tasks
from acip.evaluate.tasks import expand, score
from acip.evaluate.tasks import measurements as task_measurements
from acip.layers.targets import find_linears, require_matches
from acip.recipe import Dtype
from acip.sizing.budget import Budget
from acip.utils.atomic import atomic_file
from acip.utils.coerce import coerce
from acip_platform.scheduling.job_queue import Nodes, Resources, fits, root_cause
from acip_platform.storage.inputs import identity, resolved
from acip_platform.yaml_file import YamlFile

DENSE = "dense"  # method of the base model's entry
MEAN = "mean of tasks"
PROGRESS_S = 20.0  # between two progress lines of an entry

Row = dict[str, Any]


class ArenaError(AcipError):
    """An arena file or a results file is not valid, or an entry does not fit on the cluster."""


@dataclass(frozen=True)
class Arena:
    """The methods to compare, and the setting. `methods` maps names of acip.baselines to options; the defaults are those of the papers."""

    name: str
    base: str  # see acip.base
    dtype: Dtype = "bfloat16"
    data: str = "c4"  # calibration text, see acip.data; its train split is used
    windows: int = 8192  # most windows of calibration text; each method takes the first ones, as many as its options say
    context: int = 2048  # tokens per window of calibration text
    seed: int = 0  # of the order of the windows
    eval_data: tuple[str, ...] = ("c4",)  # texts for perplexity; their held-out splits are used
    eval_context: int = 2048  # tokens per window of held-out text
    eval_windows: int = 0  # most windows of each text; 0 = all
    protocol: Protocol = "packed"  # how held-out text is cut into windows, see acip.evaluate.heldout_text
    tasks: tuple[str, ...] = ()  # zero-shot, see acip.evaluate.tasks
    task_limit: int = 0  # most items of each task; 0 = all
    sizes: tuple[float, ...] = (0.8, 0.6, 0.4)  # by the convention `linear`, which counts adapters
    exclude: tuple[str, ...] = ()  # parts of names of layers that no method compresses
    cpus: float = 1.0  # per entry; an entry also gets a GPU if the cluster has any
    quoted: bool = False  # also show the numbers that the paper reports
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {name: {} for name in baselines.METHODS})

    @classmethod
    def load(cls, path: str | Path) -> "Arena":
        """Read and check an arena file. ArenaError names the line."""
        file = YamlFile(str(path), ArenaError)
        root = file.root("arena file", ("base",))
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        nodes = dict(file.items(root, kinds, "the arena file"))
        if "base" not in nodes:
            raise file.fail(root, "'base' is missing; name the model that all methods compress.")
        chosen = nodes.pop("methods", None)
        fields = {name: file.checked(key, coerce, name, file.value(node), kinds[name]) for name, (key, node) in nodes.items()}
        for name in fields.keys() & {"base", "data"}:
            fields[name] = file.checked(nodes[name][0], resolved, fields[name])
        if "eval_data" in fields:
            fields["eval_data"] = tuple(file.checked(nodes["eval_data"][0], resolved, text) for text in fields["eval_data"])
        if chosen is not None:
            methods = {name: (node, file.value(node)) for name, (_, node) in file.items(chosen[1], baselines.METHODS, "methods")}
            for name, (node, options) in methods.items():
                if not isinstance(options, dict | None):
                    raise file.fail(node, f"the options of {name} are {cited(options)}; they must be a mapping.")
            fields["methods"] = {name: options or {} for name, (_, options) in methods.items()}
        arena = cls(**{**fields, "name": file.name(root, fields.get("name", Path(path).stem))})
        arena.check()
        return arena

    def check(self) -> None:
        """Raise an error for a field that is not allowed."""
        for name, options in self.methods.items():
            baselines.check_options(name, options)
            try:
                json.dumps(options)
            except (TypeError, ValueError) as error:
                raise ArenaError(f"options of {name} must be numbers, texts, and lists of them: {error}.") from error
        if not self.cpus > 0:
            raise ArenaError(f"cpus is {self.cpus}; it must be above 0.")
        for size in self.sizes:
            Budget(ratio=size)
        check_tasks(expand(self.tasks))
        for name, least in (("windows", 1), ("context", 2), ("eval_context", 2), ("eval_windows", 0), ("task_limit", 0)):
            if getattr(self, name) < least:
                raise ArenaError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    def fingerprint(self, method: str) -> str:
        """Hash everything except code that determines the rows of a method: the content of local files, and the values of options."""
        fields = {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "sizes", "methods", "cpus", "quoted")
        }
        fields |= {"base": identity(self.base), "data": identity(self.data), "eval_data": [identity(text) for text in self.eval_data]}
        options = {} if method == DENSE else baselines.method(method).settings(self.methods[method])
        inputs = [fields, method, options, version("lm_eval") if self.tasks else "", WINDOWS_VERSION]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Entry:
    """The work of one Ray task: a method at one or several sizes."""

    method: str  # a name in acip.baselines, or DENSE
    sizes: tuple[float, ...]


class Results:
    """Rows in a JSON file. Several processes may add rows; the file is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()
        self.forgotten: set[tuple[Any, ...]] = set()

    def _read(self) -> list[Row]:
        try:
            rows: list[Row] = json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []
            for row in rows:
                _key(row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArenaError(f"{self.path} does not hold results of an arena ({error!r}). Move the file away.") from error
        return rows

    def of(self, arena: Arena) -> list[Row]:
        """Return the rows of this arena: the dense base first, then by decreasing size, in the order of the methods."""
        order = [DENSE, *arena.methods]
        rank = {arena.fingerprint(method): order.index(method) for method in order}
        rows = [row for row in self.rows if row["fingerprint"] in rank and (row["method"] == DENSE or row["asked"] in arena.sizes)]
        rows = [row for row in rows if _key(row) not in self.forgotten]
        return sorted(rows, key=lambda row: (row["method"] != DENSE, -row["asked"], rank[row["fingerprint"]]))

    def add(self, arena: Arena, row: Row) -> None:
        """Store a row. It replaces an older row with the same method, size and fingerprint."""
        row = {**row, "fingerprint": arena.fingerprint(row["method"])}
        self.forgotten.discard(_key(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):  # another process may add rows of other methods
            self.rows = [*(old for old in self._read() if _key(old) != _key(row)), row]
            with atomic_file(self.path) as partial:
                partial.write_text(json.dumps({"rows": self.rows}, indent=1), encoding="utf-8")

    def forget(self, arena: Arena) -> None:
        """Ignore the present rows of this arena. Each stays in the file until a new row replaces it."""
        self.forgotten = {_key(row) for row in self.of(arena)}


def _key(row: Row) -> tuple[Any, ...]:
    return row["fingerprint"], row["method"], row["asked"]


def entries(arena: Arena, results: Results) -> list[Entry]:
    """Return the entries that have rows missing in `results`."""
    done = {(row["method"], row["asked"]) for row in results.of(arena)}
    todo = [] if (DENSE, 1.0) in done else [Entry(DENSE, (1.0,))]
    for name in arena.methods:
        sizes = tuple(size for size in arena.sizes if (name, size) not in done)
        if baselines.method(name).one_run_per_size:
            todo += [Entry(name, (size,)) for size in sizes]
        elif sizes:
            todo.append(Entry(name, sizes))
    return todo


def hold(arena: Arena, results: Results, events: Any, nodes: Nodes, emit: Callable[[str], None]) -> list[tuple[Entry, str]]:
    """Run all missing entries on the connected Ray cluster, and return the failed entries with their errors.

    `nodes` are the nodes that the cluster has or may start. `emit` gets a line for each new row.
    """
    gpus, cpus = float(any(node.get("GPU", 0) >= 1 for node in nodes)), arena.cpus
    if not fits([Resources(gpus, cpus)], nodes):
        raise ArenaError(
            f"an entry needs {gpus:g} GPUs and {cpus:g} CPUs; no node has them. Lower cpus in the arena file, or list the nodes "
            "that an autoscaler may start with --pool."
        )
    task = run_entry.options(num_cpus=cpus, num_gpus=gpus)
    running: dict[Any, Entry] = {task.remote(arena, entry, max(1, int(cpus)), events): entry for entry in entries(arena, results)}
    failures = []
    ready: Any
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        try:
            row: Row = ray.get(next(ready))
            if "error" not in row:
                results.add(arena, row)
                values = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
                emit(f"{row['title']} at {row['asked']:g}: {values}")
        except StopIteration:
            del running[ready]
            continue
        except Exception as error:  # the process died, the task raised, or the row can't be stored; other entries continue
            row = {"error": root_cause(error)}
        if "error" in row:
            failures.append((running.pop(ready), row["error"]))
    return failures


# ---- on a worker


@ray.remote(max_retries=0, max_calls=1)
def run_entry(arena: Arena, entry: Entry, threads: int, events: Any) -> Iterator[Row]:
    """Yield the rows of one entry. A user's error is yielded as the last row, because Ray would wrap an exception in a long traceback."""
    torch.set_num_threads(threads)
    try:
        yield from rows(arena, entry, _Progress(entry, events))
    except AcipError as error:
        yield {"error": str(error)}


def rows(arena: Arena, entry: Entry, progress: Callable[[str, int, int], None]) -> Iterator[Row]:
    """Yield a row for each size of an entry. If one run makes all sizes, the first row has "leads" and the cost that all sizes share.

    `seconds` is the wall time of compression, without reading text and evaluation. `cpu_seconds` is its CPU time, which other
    processes hardly change. `peak_bytes` is the peak memory meanwhile.
    """
    base = load_base(arena.base, arena.dtype)
    check_tokenizer(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(base.model, device)
    require_matches(base.model, arena.exclude)
    common = {"method": entry.method, "device": device_or_threads(device)}
    texts, _ = measurements(arena)
    for text in texts:
        text.read_by(base.tokenizer).windows(Subject(base.model, base.tokenizer))  # raises before the long work if a text can't be read
    reset_peak(device)
    if entry.method == DENSE:
        count = baselines.stored(base.model, find_linears(base.model, arena.exclude))
        size = {"asked": 1.0, "got": 1.0, "stored_params": count, "dense_params": count, "counted": DENSE}
        size["stored_bytes"] = sum(stored_bytes(layer) for layer in find_linears(base.model, arena.exclude).values())
        cost = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": peak_bytes(device), "one_run_per_size": False}
        yield common | size | cost | {"title": "Original", **measure(base.model, base, arena)}
        return
    method = baselines.method(entry.method)
    options = {**arena.methods[entry.method], **({"exclude": arena.exclude} if arena.exclude else {})}
    lead = {} if method.one_run_per_size else {"leads": True}
    windows = calibration_windows(arena, base)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for compressed in baselines.compress(entry.method, base, windows, entry.sizes, progress, **options):
        times = {"seconds": time.perf_counter() - wall_start, "cpu_seconds": time.process_time() - cpu_start}
        size = {key: getattr(compressed, key) for key in ("asked", "got", "stored_params", "stored_bytes", "dense_params", "counted")}
        cost = times | {"peak_bytes": peak_bytes(device), "one_run_per_size": method.one_run_per_size}
        yield common | size | cost | lead | {"title": method.title, **measure(compressed.model, base, arena)}
        lead = dict.fromkeys(lead, False)
        reset_peak(device)  # the peak of the evaluation does not count
        wall_start, cpu_start = time.perf_counter(), time.process_time()


def calibration_windows(arena: Arena, base: Base) -> torch.Tensor:
    """Return the windows of calibration text, shuffled by the seed; they are the same for all methods."""
    windows = token_windows(documents(arena.data, "train"), base.tokenizer, arena.context, arena.windows)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(arena.seed))]


def measurements(arena: Arena) -> tuple[list[PerplexityOn], list[TaskScore | GeneratedTask]]:
    """Return the perplexity and task measurements of the arena."""
    texts = [PerplexityOn(Text(source, arena.protocol, arena.eval_context, arena.eval_windows)) for source in arena.eval_data]
    return texts, task_measurements(arena.tasks, limit=arena.task_limit)


def measure(model: Any, base: Base, arena: Arena) -> dict[str, dict[str, float]]:
    """Evaluate one model: {"metrics": values by column of the table, "stderr": standard errors}. All methods are evaluated here."""
    texts, tasks = measurements(arena)
    parts = evaluate(model, base.tokenizer, [*texts, *tasks])["evaluation"]
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for part in parts[: len(texts)]:
        name, values = f"perplexity {part['corpus'].removeprefix('package:')}", part["values"]
        metrics[name], errors[name] = values["perplexity"], values["perplexity"] * values["loss_stderr_nats"]
    scored = []
    for task, part in zip(tasks, parts[len(texts) :], strict=True):
        values = part["values"]
        metric, value = score(values)
        name = task.task.removeprefix("package:")
        if metric == "acc":
            scored.append(name)
        metrics[name], errors[name] = value, values.get(f"{metric}_stderr", math.nan)
    if scored:
        metrics[MEAN] = statistics.fmean(metrics[name] for name in scored)
        errors[MEAN] = math.hypot(*(errors[name] for name in scored)) / len(scored)
    return {"metrics": metrics, "stderr": {name: error for name, error in errors.items() if math.isfinite(error)}}


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process since `reset_peak`: allocated GPU memory, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_or_threads(device: torch.device) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


class _Progress:
    """A callback that sends the progress of an entry to the driver, at most every PROGRESS_S seconds."""

    def __init__(self, entry: Entry, events: Any) -> None:
        self.name = entry.method + (f" {entry.sizes[0]:g}" if len(entry.sizes) == 1 else "")
        self.events, self.last_sent = events, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.last_sent >= PROGRESS_S:
            self.last_sent = time.monotonic()
            self.events.put.remote({"model": self.name, "kind": "stage", "text": f"{what}: {done} of {total}"})


def total_cost(rows: Sequence[Row]) -> tuple[float, float, int]:
    """Return (seconds, CPU seconds, peak bytes) of all rows of a method.

    The row that "leads" holds the cost that all sizes share, and the peak memory; it counts once, also if an interrupted run was repeated.
    If that row is missing, because its size was removed from the arena, the totals are lower bounds.
    """

    def total(key: str) -> float:
        leading = [row[key] for row in rows if row.get("leads")]
        return sum(row[key] for row in rows if not row.get("leads")) + max(leading, default=0.0)

    leaders = [row for row in rows if row.get("leads", True)] or rows
    return total("seconds"), total("cpu_seconds"), max(row["peak_bytes"] for row in leaders)
