"""Text generated at each size, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from acip.evaluate import Samples
from acip.sizing.budget import is_coded


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the samples of a curve as columns of a table, with a row for each size and a column for each prompt. {} if there are none."""
    texts: dict[str, dict[str, str]] = {}
    for row in rows:
        for part in row.get("evaluation", ()):
            if part["kind"] == Samples.kind:
                texts.setdefault(size_label(row), {}).update({sample["prompt"]: sample["text"] for sample in part["samples"]})
    prompts = dict.fromkeys(prompt for samples in texts.values() for prompt in samples)
    columns: dict[str, list[Any]] = {"size": list(texts)} if texts else {}
    return columns | {prompt: [samples.get(prompt, "") for samples in texts.values()] for prompt in prompts}


def size_label(row: Mapping[str, Any]) -> str:
    """Return the requested size of a row as text: 0.60 for ranks, 0.6 of the bytes for codes."""
    return f"{row['asked']:g} of the bytes" if is_coded(row) else f"{row['asked']:.2f}"
