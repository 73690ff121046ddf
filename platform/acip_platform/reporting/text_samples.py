"""What a model of each size says, for a person to read side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from acip.evaluate import Samples


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The samples of a curve as the columns of a table: a row per size, a column per prompt. {} where there are none."""
    texts: dict[float, dict[str, str]] = {}
    for row in rows:
        for part in row.get("evaluation", ()):
            if part["kind"] == Samples.kind:
                texts.setdefault(row["asked"], {}).update({said["prompt"]: said["text"] for said in part["samples"]})
    prompts = dict.fromkeys(prompt for found in texts.values() for prompt in found)
    columns: dict[str, list[Any]] = {"size": list(texts)} if texts else {}
    return columns | {prompt: [found.get(prompt, "") for found in texts.values()] for prompt in prompts}
