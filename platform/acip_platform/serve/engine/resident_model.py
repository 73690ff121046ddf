"""A model of the registry in memory: the weights of the sizes that are requested, its batch, and its limits."""

import functools
import logging
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.errors import BudgetError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.integer_linear import supports_integers
from acip.layers.mixed_sizes import Mixer, Size
from acip.modeling_acip import set_module
from acip.recipe import Recipe
from acip.sizing.budget import Budget, Convention
from acip.sizing.cut_table import Cut, CutTable
from acip.sizing.elastic_model import ElasticModel
from acip.utils.malloc import trim
from acip_platform.serve.engine.batch import Batch, SteppedBatch
from acip_platform.serve.engine.errors import ContextTooLongError, InvalidTokensError
from acip_platform.serve.engine.exactness_check import check, served_context
from acip_platform.serve.engine.generation_settings import GenerationSettings
from acip_platform.serve.engine.kv_cache import ATTENTION
from acip_platform.serve.engine.resident_loader import ResidentLoader
from acip_platform.serve.engine.resident_weights import Memory, ResidentWeights, UnlimitedMemory, building
from acip_platform.serve.engine.sampling import Sampler, SamplingParams
from acip_platform.storage.resident_files import ResidentFiles

if TYPE_CHECKING:  # it imports MLflow, which the engine does not need
    from acip_platform.tracking.registry import ModelVersion

MAX_CONTEXT = 1 << 17  # tokens, if neither config nor tokenizer states a context

log = logging.getLogger("ray.serve")


def removed_at_stop(table: CutTable, recipe: Recipe) -> int:
    """Return the number of directions that the smallest calibrated size lacks; 0 if no direction can be removed."""
    return table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).removed if len(table.order) else 0


class ResidentModel:
    """One registered version of a model, resident at every size.

    Without codes, the artifact is loaded whole. With codes, weights are loaded when a size is first requested (`ResidentWeights`, which
    explains `memory`, `code_copies` and `packed`).
    `changes_sizes` says whether the size of a sequence may change between its tokens, `integers` whether layers may compute in integers.
    `max_size` is the largest size that is served (as in `Budget.parse`). Weights of larger sizes are never loaded, and no copies are made.
    `files` are those of this artifact on this node, which replicas share.
    `tokenizer` is kept for `serve/text`; the engine reads only its end token and its context. `kv_tokens` bounds the memory for keys
    and values.
    """

    changes_sizes = True
    integers = True

    def __init__(
        self,
        version: "ModelVersion",
        artifact: Artifact,
        device: str | torch.device = "cpu",
        kv_tokens: int = 1 << 17,
        packed: bool = True,
        memory: Memory | None = None,
        code_copies: float = 1.0,
        max_size: str | None = None,
        files: ResidentFiles | None = None,
    ) -> None:
        self.version, self.artifact, self.files = version, artifact, files
        self.created = int((artifact.folder / MANIFEST).stat().st_mtime)
        memory = memory or UnlimitedMemory()
        memory.reserve(artifact.tensors("rest").decoded_bytes)
        loader = ResidentLoader(artifact, device, files)
        with building:
            self.any_size = ElasticModel(loader.model(), artifact.table(), loader.load_size)
        table = self.any_size.table
        mixer = Mixer({**self.any_size.layers, **self._head()})
        self.max_size = max_size
        self.largest = table.cut(Budget(ratio=1.0) if max_size is None else Budget.parse(max_size, table.convention))
        packed = packed and max_size is None
        self.weights = ResidentWeights(loader, self.any_size, mixer, memory, code_copies, packed, self.integers)
        self.tokenizer = artifact.tokenizer()
        self.settings = GenerationSettings(version.name, self.any_size.model)
        self.removed_at_stop = removed_at_stop(table, artifact.recipe)
        config = self.any_size.model.config.get_text_config()
        self.context, shorter = served_context(config, min(self.tokenizer.model_max_length, MAX_CONTEXT))
        self.vocabulary = int(config.vocab_size)
        self.cut = functools.lru_cache(maxsize=256)(self._cut)
        if table.byte_sizes is None:
            self.weights.load_ranks(self.largest.ranks if max_size else loader.stored_ranks, dense=max_size is None)
        self.weights.pack()
        self._check()
        trim()  # the check has freed a copy of the model
        self.notes = [
            *([shorter] if shorter else []),
            *(f"{left} of generation_config.json is not honored" for left in self.settings.not_honored),
        ]
        for note in self.notes:
            log.warning("%s: %s", version.name, note)
        self.batch = self._batch(mixer, kv_tokens)

    def _head(self) -> dict[str, ElasticLinear]:
        """Replace the output head by a layer that can also be computed in integers, for drafts. Return it by its name."""
        model: Any = self.any_size.model
        for name, module in model.named_modules():
            is_head = module is model.get_output_embeddings() and type(module) is nn.Linear
            if is_head and self.integers and supports_integers(model.device):
                layer = ElasticLinear.without_ranks(module)
                set_module(model, name, layer)
                return {name: layer}
        return {}

    def _batch(self, mixer: Mixer, kv_tokens: int) -> SteppedBatch:
        """Return the batch that computes this model, which uses the engine's attention from then on."""
        self.any_size.model.set_attn_implementation(ATTENTION)
        return Batch(self.any_size.model, mixer, kv_tokens, self.weights.draft)

    def _check(self) -> None:
        """Compare the engine with the model itself at two sizes, unless this has passed with the same files before."""
        model, files = self.any_size.model, self.files
        conditions = f"{model.device} {self.max_size} {self.weights.packed} {self.context}"
        if files is not None and files.passed(conditions):
            return
        with self._two_sizes() as sizes, building:
            check(self.name, model, self.any_size.layers, sizes, self.context)
        if files is not None:
            files.record_passed(conditions)

    @contextmanager
    def _two_sizes(self) -> Iterator[tuple[Size, Size]]:
        """Hold two sizes to check: the base model and the stop ratio, or the largest coded ones that are served."""
        table, coded = self.any_size.table, self.any_size.table.byte_sizes
        if coded is None:
            least = self.largest.removed
            first, second = (Size((0, removed), table.ranks(removed)) for removed in (least, max(self.removed_at_stop, least, 1)))
            yield first, second
            return
        largest = table.cut(Budget(stored_bytes=coded.bytes(coded.all_coded)))
        if self.largest.versions is not None:
            largest = max(largest, self.largest, key=lambda cut: cut.key)
        smaller = table.cut(Budget(stored_bytes=max((largest.bytes or 0) - 1, coded.bytes(0))))
        with self.holding(largest), self.holding(smaller):
            first, second = (Size(cut.key, cut.ranks, cut.versions) for cut in (largest, smaller))
            yield first, second

    @property
    def name(self) -> str:
        return self.version.name

    @property
    def bytes(self) -> int:
        """The bytes of the weights in memory: codes, factors, dense weights and the rest, with packed copies."""
        return self.weights.bytes + self.weights.packed_bytes

    @property
    def drafts(self) -> bool:
        """Whether a small size can draft tokens."""
        return self.weights.drafts

    @property
    def convention(self) -> Convention:
        """The convention of sizes that are requested without one."""
        return self.any_size.table.convention

    def _cut(self, budget: Budget) -> Cut:
        """Return the largest size within a budget. Raise a BudgetError if there is none, or if it is not served."""
        cut = self.any_size.table.cut(budget)
        if cut.key < self.largest.key:
            raise BudgetError(
                f"{cut.asked:g} ({cut.convention}) exceeds the largest size of {self.name} that this server offers, which is "
                f"{self.max_size} ({self.largest.convention}); request at most that."
            )
        return cut

    @contextmanager
    def holding(self, cut: Cut) -> Iterator[None]:
        """Keep the weights of a size in memory within the context. They are loaded first if necessary."""
        self.weights.hold(cut)
        try:
            yield
        finally:
            self.weights.release(cut)

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
