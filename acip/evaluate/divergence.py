"""How far a model's answers are from its base model's: KL divergence, and how often the likeliest next token is the same.

Perplexity may stay while answers change. Both models see the same windows; every position counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from acip.calibration.losses import Divergence, next_token
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import content
from acip.evaluate.measurement import Part, Subject
from acip.evaluate.perplexity import OnText, mean_and_stderr


@dataclass(frozen=True)
class DivergenceOn(OnText):
    """KL(base || model) in nats per token, and the share of equal top tokens, with standard errors over windows."""

    kind: ClassVar[str] = "divergence"
    reference: str = ""  # the model that it is from, see acip.base; "" = the base model that an artifact holds

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if self.reference:
            return {**found, "reference_content": content(self.reference)}
        return {key: value for key, value in found.items() if key != "reference"}

    @torch.no_grad()
    def measure(self, subject: Subject) -> Part:
        found = []
        device = next(subject.model.parameters()).device
        for window in self.windows(subject):
            ids_1T = window[None].to(device)
            ours_TV = next_token.logits(subject.model, ids_1T)[0]
            with subject.base() as base:
                theirs_TV = next_token.logits(base, ids_1T)[0].to(ours_TV.device)
            found.append(distance(ours_TV, theirs_TV))
        return self.outcome(found)

    def outcome(self, found: Sequence[tuple[float, float]]) -> Part:
        """Of the `distance` of each window."""
        (kl, kl_stderr), (share, share_stderr) = (mean_and_stderr(list(values)) for values in zip(*found, strict=True))
        values = {"kl_nats": kl, "kl_stderr_nats": kl_stderr, "same_top_share": share, "same_top_share_stderr": share_stderr}
        return {**self.facts(len(found)), "values": values}


def distance(ours_TV: Tensor, theirs_TV: Tensor) -> tuple[float, float]:
    """Return (KL, share of equal top tokens) of one window's logits. Only chunks of them are float32 at once."""
    if ours_TV.shape != theirs_TV.shape:
        raise EvaluationError(f"logits are {list(ours_TV.shape)}, the base model's {list(theirs_TV.shape)}: it is another model's base.")
    kl, _ = Divergence.apply(ours_TV, theirs_TV)
    return float(kl), float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).double().mean())
