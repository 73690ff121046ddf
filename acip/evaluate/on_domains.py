"""The domains of one size: the same numbers as in the rows of a curve (acip.sizing.domains), for a curve that lacks them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from acip.base import positions
from acip.calibration.losses import next_token
from acip.errors import DataError, EvaluationError
from acip.evaluate.curve import Outcomes
from acip.evaluate.domains import CHAT, CONTEXT, EVERY_DOMAIN, chat_windows, text_windows
from acip.evaluate.heldout_text import content
from acip.evaluate.measurement import Measurement, Part, Subject
from acip.sizing.domains import DOMAINS, domain_name


@dataclass(frozen=True)
class OnDomains(Measurement):
    """KL(base || model), the share of equal top tokens, and perplexities on each of `domains`.

    Without a chat template the domain `chat` is left out. Raises EvaluationError if no other domain is measured.
    """

    kind: ClassVar[str] = DOMAINS
    domains: tuple[str, ...] = EVERY_DOMAIN
    windows: int = 8
    calibrated_on: tuple[str, ...] = ()  # local texts of which only the held-out documents may be read

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "content": [content(source) for source in self.domains]}

    @torch.no_grad()
    def measure(self, subject: Subject) -> Part:
        found = {}
        for source in self.domains:
            try:
                windows = self._windows(source, subject)
            except (DataError, EvaluationError) as error:
                if source != CHAT or self.domains == (CHAT,):
                    raise EvaluationError(f"domain {source!r} can't be measured: {error}") from error
                continue
            size, base = Outcomes(), Outcomes()
            for window in windows:
                ids_1T = window[None].to(subject.model.device)
                logits_TV = next_token.logits(subject.model, ids_1T)[0]
                with subject.base() as model:
                    base_TV = next_token.logits(model, ids_1T)[0].to(logits_TV.device)
                size.add(logits_TV, base_TV, ids_1T[0])
                base.add(base_TV, None, ids_1T[0])
            found[domain_name(source)] = size.against(base)
        values = {f"{key}/{name}": each[key] for key in ("kl_nats", "same_top_share") for name, each in found.items()}
        return {"label": self.kind, "values": values, DOMAINS: found}

    def _windows(self, source: str, subject: Subject) -> list[Tensor]:
        context = min(CONTEXT, positions(subject.model.config) or CONTEXT)
        if source == CHAT:
            return chat_windows(subject, context, self.windows)
        return text_windows(source, subject.tokenizer, context, self.windows, self.calibrated_on)
