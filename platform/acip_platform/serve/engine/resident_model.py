"""A model of the registry in memory: one copy of its sorted factors, its batch, and its limits."""

import functools
import logging
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.layers.mixed_sizes import Mixer, Size
from acip.layers.packing import PackedLinear, pack
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from acip_platform.serve.engine.batch import Batch
from acip_platform.serve.engine.errors import ContextTooLongError, InvalidTokensError
from acip_platform.serve.engine.exactness_check import check, served_context
from acip_platform.serve.engine.generation_settings import GenerationSettings
from acip_platform.serve.engine.sampling import Sampler, SamplingParams

if TYPE_CHECKING:  # it imports MLflow, which the engine does not need
    from acip_platform.tracking.registry import ModelVersion

MAX_CONTEXT = 1 << 17  # tokens, if neither config nor tokenizer states a context

log = logging.getLogger("ray.serve")


class ResidentModel:
    """One registered version of a model, resident at every size.

    `tokenizer` is kept for `serve/text`; the engine reads only its end token and its context. `kv_tokens` bounds the memory for keys
    and values. With `packed`, dense weights have copies that are faster on a CPU (`acip.layers.packing`).
    """

    def __init__(
        self,
        version: "ModelVersion",
        artifact: Artifact,
        device: str | torch.device = "cpu",
        kv_tokens: int = 1 << 17,
        packed: bool = True,
    ) -> None:
        self.version, self.artifact = version, artifact
        self.created = int((artifact.folder / MANIFEST).stat().st_mtime)
        self.any_size: ElasticModel = artifact.load(device)
        self.tokenizer = artifact.tokenizer()
        self.settings = GenerationSettings(version.name, self.any_size.model)
        recipe, table = artifact.recipe, self.any_size.table
        self.removed_at_stop = table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).removed
        config = self.any_size.model.config.get_text_config()
        self.context, shorter = served_context(config, min(self.tokenizer.model_max_length, MAX_CONTEXT))
        self.vocabulary = int(config.vocab_size)
        self.cut = functools.lru_cache(maxsize=256)(table.cut)
        if packed:
            pack(self.any_size.model)
        sizes = [Size((0, removed), table.ranks(removed)) for removed in (0, max(self.removed_at_stop, 1))]
        check(version.name, self.any_size.model, self.any_size.layers, (sizes[0], sizes[1]), self.context)
        self.notes = [
            *([shorter] if shorter else []),
            *(f"{left} of generation_config.json is not honored" for left in self.settings.not_honored),
        ]
        for note in self.notes:
            log.warning("%s: %s", version.name, note)
        self.batch = Batch(self.any_size.model, Mixer(self.any_size.layers), kv_tokens)

    @property
    def name(self) -> str:
        return self.version.name

    @property
    def bytes(self) -> int:
        """The size of the resident weights: factors, dense weights and the rest, with packed copies."""
        plain = {id(tensor): tensor.nbytes for tensor in self.any_size.model.state_dict(keep_vars=True).values()}
        return sum(plain.values()) + self.packed_bytes

    @property
    def packed_bytes(self) -> int:
        return sum(module.packed_bytes for module in self._packed())

    def unpack(self) -> None:
        """Free the memory of the packed copies."""
        for module in self._packed():
            module.unpack()

    def _packed(self) -> list[PackedLinear]:
        return [module for module in self.any_size.model.modules() if isinstance(module, PackedLinear)]

    # ---- limits and defaults of a request

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return frozenset(i for i in (*self.settings.end_tokens, self.tokenizer.eos_token_id) if i is not None)

    def check_tokens(self, prompts: Many[Many[int]], sampling: SamplingParams) -> None:
        """Raise an InvalidTokensError for a prompt without tokens, and for tokens that the model does not have."""
        last = self.vocabulary - 1
        if not prompts or not all(prompts):
            raise InvalidTokensError("a prompt has no tokens; it must have at least one.", "prompts")
        for prompt in prompts:
            if max(prompt) > last or min(prompt) < 0:
                wrong = max(prompt) if max(prompt) > last else min(prompt)
                raise InvalidTokensError(f"the prompt has token {wrong}; {self.name} has tokens 0 to {last}.", "prompts")
        for token in sampling.logit_bias:
            if not 0 <= token <= last:
                raise InvalidTokensError(f"logit_bias names token {token}; {self.name} has tokens 0 to {last}.", "logit_bias")

    def answer_tokens(self, prompts: Many[Many[int]], max_tokens: int | None, default: int) -> int:
        """Return the number of tokens to generate. Raise a ContextTooLongError if prompt and answer exceed the context.

        Without `max_tokens` it is the model's own limit, else `default`, and never more than fits.
        """
        longest = max(len(ids) for ids in prompts)
        least = 1 if max_tokens is None else 0
        if max_tokens is None:
            max_tokens = min(self.context - longest, self.settings.max_tokens(longest) or default)
        if max_tokens < least or longest + max_tokens > self.context:
            raise ContextTooLongError(self.name, longest, max(max_tokens, 1), self.context)
        return max_tokens

    def sampler(self, sampling: SamplingParams, seed: int, ids: list[int], max_tokens: int) -> Sampler:
        """Return the sampler of one sequence. `ids` is its prompt; the list grows with the sequence."""
        settings = self.settings
        temperature = settings.temperature if sampling.temperature is None else float(sampling.temperature)
        top_p = settings.top_p if sampling.top_p is None else float(sampling.top_p)
        top_k = settings.top_k if sampling.top_k is None else int(sampling.top_k)
        processors = settings.processors(len(ids), max_tokens, temperature, top_p, top_k)
        return Sampler(replace(sampling, temperature=temperature, top_p=top_p, top_k=top_k), seed, processors, ids)
