"""What a model of each size says: short greedy completions of the same prompts, for a person to read side by side."""

from collections.abc import Sequence
from typing import Any

import torch

from acip.cut import Budget
from acip.errors import BudgetError
from acip.materialise import AnySize

PROMPTS = ("The capital of France is", "Once upon a time, there was a little", "Water boils when")
MAX_TOKENS = 24


def samples(any_size: AnySize, tokenizer: Any, sizes: Sequence[float], max_tokens: int = MAX_TOKENS) -> list[dict[str, Any]]:
    """One entry per prompt with its completions, largest size first. A size that can't be reached is left out.

    A completion ends where the model ends it or after `max_tokens`, and never holds the prompt.
    """
    found: list[dict[str, Any]] = [{"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "completions": []} for prompt in PROMPTS]
    for size in sorted(sizes, reverse=True):
        try:
            any_size.resize(Budget(ratio=size))
        except BudgetError:
            continue
        for sample in found:
            sample["completions"].append({"size": size, "text": _greedy(any_size.model, tokenizer, sample["prompt"], max_tokens)})
    return found


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    given = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**given, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    text: str = tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
