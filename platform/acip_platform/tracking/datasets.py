"""The texts of evaluations as datasets of MLflow: name, digest of the tokens, source.

A dataset is one text, cut into windows by one protocol, and read by one tokenizer: perplexities are comparable only on the same tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset
from torch import Tensor

from acip.data import HUB
from acip.errors import DataError
from acip.evaluate import Text
from acip.evaluate.heldout_text import content
from acip.sizing.budget import measured_on

Datasets = Mapping[tuple[Any, ...], Dataset]  # by `text_of`


def dataset_of(text: Text, tokenizer: Any) -> Dataset:
    """Return a text as a dataset. DataError if it cannot be read."""
    windows = text.tokens(tokenizer)
    kind = "package" if text.source.startswith("package:") else "hub" if text.source in HUB else "local"
    source = {"text": text.source, "split": text.split}
    profile = {"windows": len(windows), "context": text.context, "tokens": sum(map(len, windows)), "protocol": text.protocol}
    short = text.source.removeprefix("package:") if kind != "local" else Path(text.source).name
    whole = "" if text.split == "heldout" else ", all documents"
    name = f"{short} {text.protocol} {text.context}{whole}"
    return Dataset(name, digest(windows), kind, json.dumps(source), profile=json.dumps(profile))


def digest(windows: Sequence[Tensor]) -> str:
    """Return a hash of windows of token ids."""
    sha = hashlib.sha256()
    for window in windows:
        sha.update(f"{len(window)} ".encode())
        sha.update(window.cpu().numpy().astype("<i4").tobytes())
    return sha.hexdigest()[:16]


def datasets_of(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Datasets:
    """Return the datasets of all measurements in rows of a curve or of an evaluation.

    A text that can no longer be read, or has changed since, is left out.
    """
    datasets: dict[tuple[Any, ...], Dataset] = {}
    unreadable = set[tuple[Any, ...]]()
    for part in (part for row in rows for part in (row, *row.get("evaluation", ()))):
        text = text_of(part)
        if "corpus" not in part or text in datasets or text in unreadable:
            continue
        start = tuple(map(int, part.get("start", "").split()))
        fields = (part["corpus"], part.get("protocol", "packed"), part["context"], part["windows"], part.get("split", "heldout"), start)
        try:
            if part.get("what", {}).get("content", "") not in ("", content(part["corpus"])):
                raise DataError(f"{part['corpus']} has changed.")
            datasets[text] = dataset_of(Text(*fields), tokenizer)
        except DataError:
            unreadable.add(text)
    return datasets


def text_of(part: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what identifies the text of a measurement: a row of a curve, or a part of a row."""
    return tuple(measured_on(part).values())
