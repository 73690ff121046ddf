"""Tasks of the LM Evaluation Harness (lm-eval), run on the model in memory, without an export.

    name                      the task
    package:arc_easy          with data from a wheel, without the hub (acip.evaluate.packaged_tasks)
    a name in `folder`        from your own task files; paths in them are relative to the folder, and functions in them are run
    arc_easy, mmlu, ...       from lm-eval, with data from the hub
    generated:arithmetic      generated answers that a program checks, beside those of the base model (acip.evaluate.generated_tasks)
    paper, package:paper      the seven tasks of the paper's tables; those of them that the wheel has
    generated                 all generated tasks

Log-probabilities are computed in float32. By default, lm-eval would round those of a bfloat16 model to 3 digits, and choices would tie.

A prompt begins with the start tokens of the tokenizer (`acip.data.start_tokens`), once, and there is no end token between a prompt and its
continuation. If a task scores a whole text (`loglikelihood_rolling`), the first window has the start tokens, and later windows begin with
the last token of the previous one, as in lm-eval.
"""

import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tqdm import tqdm

from acip.data import start_tokens
from acip.errors import EvaluationError
from acip.evaluate import generated_tasks, packaged_tasks
from acip.evaluate.generated_tasks import GeneratedTask
from acip.evaluate.heldout_text import content
from acip.evaluate.measurement import Measurement, Part, Subject, label
from acip.utils.coerce import did_you_mean

PAPER = ("piqa", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa", "mathqa")
PRESETS = {
    "paper": PAPER,
    "package:paper": tuple(packaged_tasks.PREFIX + name for name in PAPER if name in packaged_tasks.TASKS),
    "generated": tuple(generated_tasks.names()),
}
CPU_BATCH, CPU_LOGIT_BYTES = 16, 1 << 30
RESAMPLES = 1000  # bootstrap samples, for standard errors without a formula


@dataclass(frozen=True)
class TaskScore(Measurement):
    """The metrics of a task or a group of tasks, with standard errors, on its first `limit` items."""

    kind: ClassVar[str] = "task"
    task: str
    folder: str = ""  # folder of your own task files; "" = none
    shots: int | None = None  # examples in the prompt; None = the task's own number
    limit: int = 0  # items; 0 = all
    start: tuple[int, ...] = ()  # token ids that each prompt begins with; set by `read_by`

    def __post_init__(self) -> None:
        if self.limit < 0 or (self.shots or 0) < 0:
            raise EvaluationError(
                f"shots is {self.shots} and limit is {self.limit} for task {self.task}; both must be at least 0 (limit 0 = all items)."
            )

    def read_by(self, tokenizer: Any) -> Self:
        return replace(self, start=start_tokens(tokenizer))

    def identity(self) -> dict[str, Any]:
        fields = {key: value for key, value in super().identity().items() if key != "start" or value}
        return {**fields, "content": content(self.folder), "lm_eval": version("lm_eval")}

    def measure(self, subject: Subject) -> Part:
        from lm_eval import simple_evaluate

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no process pool for the bootstrap inside a worker
        spec, manager = find(self.task, self.folder)
        with chdir(self.folder) if self.folder else nullcontext():
            try:
                outcome = simple_evaluate(
                    model=harness(subject.model, subject.tokenizer), tasks=[spec], num_fewshot=self.shots, limit=self.limit or None,
                    bootstrap_iters=RESAMPLES, log_samples=False, task_manager=manager,
                )  # fmt: skip
            except OSError as error:  # no network, or no such data set
                instead = packaged_tasks.PREFIX + self.task
                hint = f"; {instead} needs no hub" if instead in packaged_tasks.names() else ""
                raise EvaluationError(f"the data set of task {self.task} cannot be read: {error}{hint}.") from error
        assert outcome is not None, "simple_evaluate returns None only on ranks above 0"
        results, shots, items = outcome["results"], outcome["n-shot"], outcome["n-samples"]
        if self.task not in results:
            raise EvaluationError(f"task {self.task} has no score of its own. Use its parts instead: {', '.join(sorted(results))}.")
        values = {
            name.removesuffix(",none").replace(",", "_"): value
            for name, value in results[self.task].items()
            if isinstance(value, int | float) and "," in name
        }
        count = sum(part["effective"] for part in items.values())
        return {"label": self.label, "values": values, "items": count, "shots": shots.get(self.task)}

    @property
    def label(self) -> str:
        """The label of the part: the task, and what was chosen about it."""
        chosen = (f"{self.shots}shot" if self.shots is not None else "", f"first{self.limit}" if self.limit else "")
        return f"{self.kind}/{label(self.task, *chosen)}"


def score(values: Mapping[str, float]) -> tuple[str, float]:
    """Return the name and the value of a task's main metric: its accuracy, or lm-eval's first metric for tasks without choices."""
    name = "acc" if "acc" in values else next(iter(values))
    return name, values[name]


def expand(names: Iterable[str]) -> list[str]:
    """Replace presets by their tasks. Each task is returned once."""
    return list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))


def measurements(names: Iterable[str], folder: str = "", shots: int | None = None, limit: int = 0) -> list[TaskScore | GeneratedTask]:
    """Return a measurement of each task; `shots` is for tasks of lm-eval. EvaluationError if the name of a generated task is unknown."""
    return [
        GeneratedTask(name, limit) if name.startswith(generated_tasks.PREFIX) else TaskScore(name, folder, shots, limit)
        for name in expand(names)
    ]


def check(names: Iterable[str], folder: str = "") -> None:
    """Raise EvaluationError if a task is unknown. Call it before a long run."""
    for each in measurements(names, folder):
        if isinstance(each, TaskScore):
            find(each.task, folder)


def find(name: str, folder: str = "") -> tuple[Any, Any]:
    """Return (the task in the form that lm-eval accepts, a task manager that has it). EvaluationError if it is unknown."""
    if folder and not Path(folder).is_dir():
        raise EvaluationError(f"task folder {folder!r} does not exist.")
    if name.startswith(packaged_tasks.PREFIX):
        return packaged_tasks.task(name), _manager("", False)
    folder = str(Path(folder).resolve()) if folder else ""
    own = _manager(folder, False)
    if name in own.all_tasks:
        return name, own
    known = _manager(folder, True)
    if name in known.all_tasks:
        return name, known
    offline = [*packaged_tasks.names(), *generated_tasks.names()]
    every = [*PRESETS, *offline, *known.all_tasks]
    raise EvaluationError(
        f"unknown task {name!r}{did_you_mean(name, every)}. Without the hub: {', '.join(offline)}. "
        "With the hub: the tasks that `lm-eval ls tasks` lists. For your own tasks, give a task folder."
    )


@lru_cache(maxsize=8)
def _manager(folder: str, defaults: bool) -> Any:
    """Return a task manager of `folder`, with lm-eval's own 14,000 task files if `defaults`, which take about 20 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None, include_defaults=defaults)


def harness(model: Any, tokenizer: Any) -> Any:
    """Wrap a model in memory for lm-eval. Logits are computed only for the positions that are scored, not for the contexts."""
    from lm_eval.models.huggingface import HFLM

    start = list(start_tokens(tokenizer))
    keep = inspect.signature(model.forward).parameters.get("logits_to_keep")
    can_keep = keep is not None and "Tensor" in str(keep.annotation)

    class InMemory(HFLM):  # type: ignore[misc]  # lm-eval has no type hints
        kept = 0  # last positions of a sequence whose logits are needed; 0 = all
        prefixed = False  # whether lm-eval itself adds the start token

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any) -> Any:
            ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
            plain = self.prefixed or add_special_tokens is False or ids[: len(start)] == start
            ids = ids if plain else start + ids
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.prefixed = True
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.prefixed = False

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> list[Any]:
            """Score batch by batch, to compute how many positions each batch needs. A request is (texts, context ids, continuation ids)."""
            todo = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1] + requests[i][2]))
            size = override_bs or self.batch_size
            if size == "auto":
                size = self._detect_batch_size([requests[i] for i in todo])
            # lm-eval runs equal inputs once
            groups = [list(group) for _, group in groupby(todo, lambda i: requests[i][1] + requests[i][2][:-1])]
            answers: list[Any] = [None] * len(requests)
            for first in tqdm(range(0, len(groups), size), desc="batches of requests", disable=disable_tqdm):
                indices = [i for group in groups[first : first + size] for i in group]
                batch = [requests[i] for i in indices]
                lengths = [min(len(context) + len(scored) - 1, self.max_length) for _, context, scored in batch]
                positions = [max(lengths) - n + len(scored) for n, (_, _, scored) in zip(lengths, batch, strict=True)]
                self.kept = max(positions) if can_keep else 0
                try:
                    batch_answers = super()._loglikelihood_tokens(batch, True, size)
                finally:
                    self.kept = 0
                for i, answer in zip(indices, batch_answers, strict=True):
                    answers[i] = answer
            return answers

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            """Return the logits of the last `kept` positions. lm-eval slices from the end, and accepts logits shorter than the input."""
            if not self.kept:
                return super()._model_call(inps, attn_mask, labels)
            # indices, because with a slice the head is multiplied row by row
            last = torch.arange(inps.shape[1] - self.kept, inps.shape[1], device=inps.device)
            with torch.no_grad():
                return self.model(inps, logits_to_keep=last).logits

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            """On a GPU, let lm-eval try sizes. On a CPU, limit the bytes of the logits; a failed try could use up memory."""
            if self.device.type != "cpu":
                return int(super()._detect_batch_size(requests, pos))
            longest = len(requests[pos][1]) + len(requests[pos][2]) if requests else self.max_length
            per_sequence = min(longest, self.max_length) * model.config.get_text_config().vocab_size * 2 * 4
            return max(1, min(CPU_BATCH, CPU_LOGIT_BYTES // per_sequence))

    return InMemory(
        pretrained=model, tokenizer=tokenizer, batch_size="auto", softmax_dtype=torch.float32, prefix_token_id=start[-1] if start else None
    )
