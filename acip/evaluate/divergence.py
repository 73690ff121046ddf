"""The divergence of a model from its base model: KL divergence, and the share of positions with the same most likely next token.

Predictions can change while perplexity stays the same. Both models read the same windows; every position counts.
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
    reference: str = ""  # name of the base model (acip.base); "" = the base model in the artifact

    def identity(self) -> dict[str, Any]:
        fields = super().identity()
        if self.reference:
            return {**fields, "reference_content": content(self.reference)}
        return {key: value for key, value in fields.items() if key != "reference"}

    @torch.no_grad()
    def measure(self, subject: Subject) -> Part:
        distances = []
        device = next(subject.model.parameters()).device
        for window in self.windows(subject):
            ids_1T = window[None].to(device)
            logits_TV = next_token.logits(subject.model, ids_1T)[0]
            with subject.base() as base:
                base_TV = next_token.logits(base, ids_1T)[0].to(logits_TV.device)
            distances.append(distance(logits_TV, base_TV))
        return self.outcome(distances)

    def outcome(self, distances: Sequence[tuple[float, float]]) -> Part:
        """Return the part for the `distance` of each window."""
        (kl, kl_stderr), (share, share_stderr) = (mean_and_stderr(list(values)) for values in zip(*distances, strict=True))
        values = {"kl_nats": kl, "kl_stderr_nats": kl_stderr, "same_top_share": share, "same_top_share_stderr": share_stderr}
        return {**self.facts(len(distances)), "values": values}


def distance(logits_TV: Tensor, base_TV: Tensor) -> tuple[float, float]:
    """Return (KL in nats per token, share of equal top tokens) for the logits of one window.

    Only chunks of the logits are float32 at once. Raises EvaluationError if the shapes differ.
    """
    if logits_TV.shape != base_TV.shape:
        raise EvaluationError(
            f"the logits are {list(logits_TV.shape)}, but those of the base model are {list(base_TV.shape)}. "
            "Give the base model of this model."
        )
    kl, _ = Divergence.apply(logits_TV, base_TV)
    return float(kl), float((logits_TV.argmax(-1) == base_TV.argmax(-1)).double().mean())
