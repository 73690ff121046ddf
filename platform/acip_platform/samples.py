"""What a model of each size says: short greedy completions of the same prompts, for a person to read side by side.

They stand beside what else was measured at a size, as a part of its row of the curve: {kind, label, values, samples: [{prompt, text}]}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from acip.materialise import AnySize

PROMPTS = ("The capital of France is", "Once upon a time, there was a little", "Water boils when")
MAX_TOKENS = 24
KIND = "samples"


@torch.inference_mode()
def greedy(any_size: AnySize, tokenizer: Any) -> dict[str, Any]:
    """The model's completions at its present size, without the prompts; at most MAX_TOKENS tokens each."""
    model: Any = any_size.model
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        padding = tokenizer.eos_token_id or 0  # none is needed; without one, transformers warns
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=padding
        )  # fmt: skip
        said.append({"prompt": prompt, "text": tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)})
    return {"kind": KIND, "key": KIND, "label": KIND, "values": {}, "samples": said}


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The samples of a curve as the columns of a table: a row per size, a column per prompt. {} where there are none."""
    texts: dict[float, dict[str, str]] = {}
    for row in rows:
        for part in row.get("evaluation", ()):
            if part["kind"] == KIND:
                texts.setdefault(row["asked"], {}).update({said["prompt"]: said["text"] for said in part["samples"]})
    prompts = dict.fromkeys(prompt for found in texts.values() for prompt in found)
    columns: dict[str, list[Any]] = {"size": list(texts)} if texts else {}
    return columns | {prompt: [found.get(prompt, "") for found in texts.values()] for prompt in prompts}
