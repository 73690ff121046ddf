"""Greedy continuations of a few prompts. A prompt begins with the start tokens of the tokenizer, and has no end token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from acip.base import room
from acip.data import start_tokens
from acip.errors import EvaluationError, cited
from acip.evaluate.measurement import Measurement, Part, Subject

PROMPTS = ("The capital of France is", "Once upon a time, there was a little", "Water boils when")


@dataclass(frozen=True)
class Samples(Measurement):
    """Continuations of `prompts` by `new_tokens` tokens, or up to the end of the model's context.

    EvaluationError if a prompt has no tokens or fills the context.
    """

    kind: ClassVar[str] = "samples"
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise EvaluationError(f"new_tokens is {self.new_tokens}; it must be at least 1.")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Part:
        model: Any = subject.model
        samples = []
        for prompt in self.prompts:
            ids = [*start_tokens(subject.tokenizer), *subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            if not ids:
                raise EvaluationError(
                    f"the prompt {prompt!r} has no token, and the tokenizer puts none before a text. Give another prompt."
                )
            most = room(model.config, len(ids), self.new_tokens, EvaluationError, f"the prompt {cited(prompt)}", "Use a shorter one.")
            ids_1T = torch.tensor([ids], device=model.device)
            whole = model.generate(
                ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=most, do_sample=False,
                pad_token_id=subject.tokenizer.eos_token_id or 0,  # not used, but transformers warns without it
            )  # fmt: skip
            samples.append({"prompt": prompt, "text": subject.tokenizer.decode(whole[0, ids_1T.shape[1] :], skip_special_tokens=True)})
        return {"label": self.kind, "values": {}, "samples": samples}
