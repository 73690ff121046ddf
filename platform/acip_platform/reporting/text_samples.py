"""Text generated at each size, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from acip.evaluate import Samples


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the samples of a curve as columns of a table, with a row for each size and a column for each prompt. {} if there are none."""
    texts: dict[float, dict[str, str]] = {}
    for row in rows:
        for part in row.get("evaluation", ()):
            if part["kind"] == Samples.kind:
                texts.setdefault(row["asked"], {}).update({sample["prompt"]: sample["text"] for sample in part["samples"]})
    prompts = dict.fromkeys(prompt for samples in texts.values() for prompt in samples)
    columns: dict[str, list[Any]] = {"size": list(texts)} if texts else {}
    return columns | {prompt: [samples.get(prompt, "") for samples in texts.values()] for prompt in prompts}
