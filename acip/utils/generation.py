"""Continue prompts with a model, several at once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


def end_tokens(model: Any, tokenizer: Any, more: Sequence[int] = ()) -> list[int]:
    """Return the token ids that end a text: those of the model's settings, the tokenizer's end token, and `more`."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return sorted({token for token in (*ends, tokenizer.eos_token_id, *more) if token is not None})


@torch.no_grad()
def continued(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int], **settings: Any) -> list[list[int]]:
    """Return a continuation of each prompt, of at most `new_tokens` token ids, without the token of `ends` that ends it.

    It is greedy, unless `settings`, fields of transformers' GenerationConfig, say otherwise. Settings that come with the model, such as
    penalties, are not used. Shorter prompts are padded on the left.
    """
    pad, longest = ends[0] if ends else 0, max(map(len, prompts))
    ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    fields: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": list(ends) or None, "pad_token_id": pad}
    own = model.generation_config
    model.generation_config = GenerationConfig()  # else generate() takes the settings that are not given from the model
    try:
        written_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=GenerationConfig(**fields | settings))
    finally:
        model.generation_config = own
    return [_until(ids, ends) for ids in written_BT[:, longest:].tolist()]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
