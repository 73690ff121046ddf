"""The arena: every method on one base model, one text, one evaluation and one count, as Ray tasks side by side.

    arena file -> entries: (the dense base), (method, all sizes) or (method, one size) -> rows, as they come -> a JSON file

A method that needs one run per size is one entry for each. A row is kept as soon as it is there and not made again; what fails is
said and does not end the others. Each entry has a process of its own, so that its peak memory is its own.
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
from acip.evaluate import PerplexityOn, TaskScore, Text, evaluate
from acip.evaluate.efficiency import reset_peak
from acip.evaluate.heldout_text import Protocol
from acip.evaluate.measurement import Subject, stored_bytes
from acip.evaluate.tasks import check as check_tasks
from acip.evaluate.tasks import expand
from acip.layers.targets import find_linears
from acip.recipe import Dtype
from acip.sizing.budget import Budget
from acip.utils.coerce import coerce
from acip_platform.scheduling.job_queue import Nodes, Resources, fits, root_cause
from acip_platform.storage.inputs import identity, resolved
from acip_platform.yaml_file import YamlFile

DENSE = "dense"  # the base model's entry
MEAN = "mean of tasks"
PROGRESS_S = 20.0

Row = dict[str, Any]


class ArenaError(AcipError):
    """An arena file that can't be read, or asks for what is not there."""


@dataclass(frozen=True)
class Arena:
    """Who meets, and on what. `methods` maps names of acip.baselines to their options; the defaults are each paper's."""

    name: str
    base: str  # see acip.base
    dtype: Dtype = "bfloat16"
    data: str = "c4"  # calibration text, see acip.data; its train split
    windows: int = 8192  # of calibration text that there are; methods take the first of them, as many as their options say
    context: int = 2048  # tokens of such a window
    seed: int = 0  # order of the windows
    eval_data: tuple[str, ...] = ("c4",)  # held-out splits
    eval_context: int = 2048  # tokens per window of held-out text
    eval_windows: int = 0  # at most so many of each; 0 = all
    protocol: Protocol = "packed"  # that held-out text is cut by, see acip.evaluate.heldout_text
    tasks: tuple[str, ...] = ()  # zero-shot, see acip.evaluate.tasks
    task_limit: int = 0  # items of each; 0 = all
    sizes: tuple[float, ...] = (0.8, 0.6, 0.4)  # by the convention `linear`: adapters are counted
    exclude: tuple[str, ...] = ()  # layers that no method compresses, by parts of their names
    cpus: float = 1.0  # per entry; a GPU too, where the cluster has one
    quoted: bool = False  # the paper's own numbers beside ours
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {name: {} for name in baselines.METHODS})

    @classmethod
    def load(cls, path: str | Path) -> "Arena":
        """Read and check an arena file."""
        file = YamlFile(str(path), ArenaError)
        root = file.root("arena file", ("base",))
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        given = dict(file.items(root, kinds, "the arena file"))
        if "base" not in given:
            raise file.fail(root, "'base' is missing: the model that all methods compress.")
        chosen = given.pop("methods", None)
        fields = {name: file.checked(key, coerce, name, file.value(node), kinds[name]) for name, (key, node) in given.items()}
        for name in fields.keys() & {"base", "data"}:
            fields[name] = file.checked(given[name][0], resolved, fields[name])
        if "eval_data" in fields:
            fields["eval_data"] = tuple(file.checked(given["eval_data"][0], resolved, text) for text in fields["eval_data"])
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
        """Hash of all that decides the rows of a method, but its code: local files by their content, options by their values."""
        fields = {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "sizes", "methods", "cpus", "quoted")
        }
        fields |= {"base": identity(self.base), "data": identity(self.data), "eval_data": [identity(text) for text in self.eval_data]}
        options = {} if method == DENSE else baselines.method(method).settings(self.methods[method])
        decides = [fields, method, options, version("lm_eval") if self.tasks else "", WINDOWS_VERSION]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Entry:
    """One Ray task's work."""

    method: str  # or DENSE
    sizes: tuple[float, ...]


class Results:
    """Rows in a JSON file: added one by one, by whoever has some, the file always whole."""

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
            raise ArenaError(f"{self.path} holds no results of an arena ({error!r}); move it away.") from error
        return rows

    def of(self, arena: Arena) -> list[Row]:
        """The rows of this very arena: the dense base first, then by falling size, in the order of the methods."""
        order = [DENSE, *arena.methods]
        prints = {arena.fingerprint(method): order.index(method) for method in order}
        mine = [row for row in self.rows if row["fingerprint"] in prints and (row["method"] == DENSE or row["asked"] in arena.sizes)]
        mine = [row for row in mine if _key(row) not in self.forgotten]
        return sorted(mine, key=lambda row: (row["method"] != DENSE, -row["asked"], prints[row["fingerprint"]]))

    def add(self, arena: Arena, row: Row) -> None:
        """Keep a row, in the place of an older one of the same."""
        row = {**row, "fingerprint": arena.fingerprint(row["method"])}
        self.forgotten.discard(_key(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):  # another arena may run, with other methods
            self.rows = [*(old for old in self._read() if _key(old) != _key(row)), row]
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"rows": self.rows}, indent=1), encoding="utf-8")
            part.replace(self.path)

    def forget(self, arena: Arena) -> None:
        """Do as if there were no rows of this arena: each stays in the file until there is a new one."""
        self.forgotten = {_key(row) for row in self.of(arena)}


def _key(row: Row) -> tuple[Any, ...]:
    return row["fingerprint"], row["method"], row["asked"]


def entries(arena: Arena, results: Results) -> list[Entry]:
    """What is still to be done."""
    done = {(row["method"], row["asked"]) for row in results.of(arena)}
    todo = [] if (DENSE, 1.0) in done else [Entry(DENSE, (1.0,))]
    for name in arena.methods:
        sizes = tuple(size for size in arena.sizes if (name, size) not in done)
        if baselines.method(name).one_run_per_size:
            todo += [Entry(name, (size,)) for size in sizes]
        elif sizes:
            todo.append(Entry(name, sizes))
    return todo


def hold(arena: Arena, results: Results, inbox: Any, there: Nodes, say: Callable[[str], None]) -> list[tuple[Entry, str]]:
    """Run all that is still to be done on the Ray that this process is connected to; returns what failed, and why.

    `there` are its nodes, or those that it may start.
    """
    gpus, cpus = float(any(node.get("GPU", 0) >= 1 for node in there)), arena.cpus
    if not fits([Resources(gpus, cpus)], there):
        raise ArenaError(
            f"an entry asks for {gpus:g} GPUs and {cpus:g} CPUs; no node has them. Lower cpus in the arena file, or name with --pool "
            "what an autoscaler may start."
        )
    task = compete.options(num_cpus=cpus, num_gpus=gpus)
    running: dict[Any, Entry] = {task.remote(arena, entry, max(1, int(cpus)), inbox): entry for entry in entries(arena, results)}
    failures = []
    ready: Any
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        try:
            row: Row = ray.get(next(ready))
            if "error" not in row:
                results.add(arena, row)
                said = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
                say(f"{row['title']} at {row['asked']:g}: {said}")
        except StopIteration:
            del running[ready]
            continue
        except Exception as error:  # its process died, what it ran raised, or its row can't be kept: the others go on
            row = {"error": root_cause(error)}
        if "error" in row:
            failures.append((running.pop(ready), row["error"]))
    return failures


# ---- on a worker


@ray.remote(max_retries=0, max_calls=1)
def compete(arena: Arena, entry: Entry, threads: int, inbox: Any) -> Iterator[Row]:
    """Rows of one entry. The user's errors come as a last row: raised, they would come with a page of Ray around them."""
    torch.set_num_threads(threads)
    try:
        yield from rows(arena, entry, _Progress(entry, inbox))
    except AcipError as error:
        yield {"error": str(error)}


def rows(arena: Arena, entry: Entry, progress: Callable[[str, int, int], None]) -> Iterator[Row]:
    """A row for each size of an entry. What sizes share counts for the first, which `leads`.

    `seconds` is the size's own work by the clock, reading text and evaluation aside; `cpu_seconds` what processors worked for it,
    which other work on the machine hardly changes; `peak_bytes` the most memory meanwhile.
    """
    base = load_base(arena.base, arena.dtype)
    check_tokenizer(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(base.model, device)
    common = {"method": entry.method, "device": device_name(device)}
    texts, _ = measurements(arena)
    for text in texts:
        text.read_by(base.tokenizer).windows(Subject(base.model, base.tokenizer))  # what can't be read is known before the long work
    reset_peak(device)
    if entry.method == DENSE:
        count = baselines.stored(base.model, find_linears(base.model, arena.exclude))
        size = {"asked": 1.0, "got": 1.0, "stored_params": count, "dense_params": count, "counted": DENSE}
        size["stored_bytes"] = sum(stored_bytes(layer) for layer in find_linears(base.model, arena.exclude).values())
        cost = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": peak_bytes(device), "one_run_per_size": False}
        yield common | size | cost | {"title": "Original", **measure(base.model, base, arena)}
        return
    chosen = baselines.method(entry.method)
    options = {**arena.methods[entry.method], **({"exclude": arena.exclude} if arena.exclude else {})}
    shares = {} if chosen.one_run_per_size else {"leads": True}
    windows = calibration_windows(arena, base)
    began, worked = time.perf_counter(), time.process_time()
    for made in baselines.compress(entry.method, base, windows, entry.sizes, progress, **options):
        taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        size = {key: getattr(made, key) for key in ("asked", "got", "stored_params", "stored_bytes", "dense_params", "counted")}
        cost = taken | {"peak_bytes": peak_bytes(device), "one_run_per_size": chosen.one_run_per_size}
        yield common | size | cost | shares | {"title": chosen.title, **measure(made.model, base, arena)}
        shares = dict.fromkeys(shares, False)
        reset_peak(device)  # which was the evaluation's
        began, worked = time.perf_counter(), time.process_time()


def calibration_windows(arena: Arena, base: Base) -> torch.Tensor:
    """The same for all methods, in the order that the seed says."""
    windows = token_windows(documents(arena.data, "train"), base.tokenizer, arena.context, arena.windows)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(arena.seed))]


def measurements(arena: Arena) -> tuple[list[PerplexityOn], list[TaskScore]]:
    texts = [PerplexityOn(Text(source, arena.protocol, arena.eval_context, arena.eval_windows)) for source in arena.eval_data]
    return texts, [TaskScore(task, limit=arena.task_limit) for task in expand(arena.tasks)]


def measure(model: Any, base: Base, arena: Arena) -> dict[str, dict[str, float]]:
    """What one model is worth, by column of the table, and the standard errors. The only place where the arena evaluates."""
    texts, tasks = measurements(arena)
    parts = evaluate(model, base.tokenizer, [*texts, *tasks])["evaluation"]
    found: dict[str, float] = {}
    errors: dict[str, float] = {}
    for part in parts[: len(texts)]:
        name, values = f"perplexity {part['corpus'].removeprefix('package:')}", part["values"]
        found[name], errors[name] = values["perplexity"], values["perplexity"] * values["loss_stderr_nats"]
    scored = []
    for task, part in zip(tasks, parts[len(texts) :], strict=True):
        values = part["values"]
        metric = "acc" if "acc" in values else next(iter(values))  # lm-eval's first, where nothing is chosen from
        name = task.task.removeprefix("package:")
        if metric == "acc":
            scored.append(name)
        found[name], errors[name] = values[metric], values.get(f"{metric}_stderr", math.nan)
    if scored:
        found[MEAN] = statistics.fmean(found[name] for name in scored)
        errors[MEAN] = math.hypot(*(errors[name] for name in scored)) / len(scored)
    return {"metrics": found, "stderr": {name: error for name, error in errors.items() if math.isfinite(error)}}


def peak_bytes(device: torch.device) -> int:
    """The most memory of this process since `reset_peak`: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


class _Progress:
    """Tells the driver now and then how far an entry is."""

    def __init__(self, entry: Entry, inbox: Any) -> None:
        self.name = entry.method + (f" {entry.sizes[0]:g}" if len(entry.sizes) == 1 else "")
        self.inbox, self.said = inbox, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.said >= PROGRESS_S:
            self.said = time.monotonic()
            self.inbox.put.remote({"model": self.name, "kind": "stage", "text": f"{what}: {done} of {total}"})


def total_cost(rows: Sequence[Row]) -> tuple[float, float, int]:
    """(seconds, seconds of processors, peak bytes) of all of a method's rows. What sizes share, and an interrupted run did again,
    counts once; it has the peak. Where no row has it, because its size is left out now, they are what the others took.
    """

    def total(key: str) -> float:
        leading = [row[key] for row in rows if row.get("leads")]
        return sum(row[key] for row in rows if not row.get("leads")) + max(leading, default=0.0)

    shared = [row for row in rows if row.get("leads", True)] or rows
    return total("seconds"), total("cpu_seconds"), max(row["peak_bytes"] for row in shared)
