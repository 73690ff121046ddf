"""A model of the registry in memory: one copy of its sorted factors, its tokenizer, and what it may be asked."""

import functools
import logging
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, cast

import torch

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.layers.mixed_sizes import Mixer, Size
from acip.layers.packing import PackedLinear, pack
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip_platform.serve.engine.batch import Batch
from acip_platform.serve.engine.exactness_check import check, served_context
from acip_platform.serve.engine.generation_settings import GenerationSettings
from acip_platform.serve.engine.sampling import SamplingParams
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.size_facts import as_json, size_facts

if TYPE_CHECKING:  # pydantic's and MLflow's modules; a model is served without either
    from acip_platform.serve.http.requests import ChatRequest, CompletionRequest
    from acip_platform.serve.text.structured_output import AnswerFormat, AnswerFormats
    from acip_platform.tracking.registry import ModelVersion

log = logging.getLogger("ray.serve")


class ResidentModel:
    """One registered version of a model, resident at every size.

    With `packed`, dense weights have copies that are faster on a CPU (`acip.layers.packing`).
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
        self.stated = GenerationSettings(version.name, self.any_size.model)
        recipe, table = artifact.recipe, self.any_size.table
        self._removed_at_stop = table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).removed
        config = self.any_size.model.config.get_text_config()
        self.context, shorter = served_context(config, min(self.tokenizer.model_max_length, 1 << 17))
        self.vocabulary = int(config.vocab_size)
        self.cut = functools.lru_cache(maxsize=256)(table.cut)
        if packed:
            pack(self.any_size.model)
        sizes = [Size(removed, table.ranks(removed)) for removed in (0, max(self._removed_at_stop, 1))]
        check(version.name, self.any_size.model, self.any_size.layers, (sizes[0], sizes[1]), self.context)
        self.notes = [
            *([shorter] if shorter else []),
            *(f"{left} of generation_config.json is not honored" for left in self.stated.not_honored),
        ]
        for note in self.notes:
            log.warning("%s: %s", version.name, note)
        self.batch = Batch(self.any_size.model, Mixer(self.any_size.layers), kv_tokens)

    @property
    def chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def bytes(self) -> int:
        """Of the weights that are resident: factors, dense weights and the rest, with packed copies."""
        plain = {id(tensor): tensor.nbytes for tensor in self.any_size.model.state_dict(keep_vars=True).values()}
        return sum(plain.values()) + self.packed_bytes

    @property
    def packed_bytes(self) -> int:
        return sum(module.packed_bytes for module in self._packed())

    def unpack(self) -> None:
        """Give the packed copies' memory back."""
        for module in self._packed():
            module.unpack()

    def _packed(self) -> list[PackedLinear]:
        return [module for module in self.any_size.model.modules() if isinstance(module, PackedLinear)]

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        table, recipe = self.any_size.table, self.artifact.recipe
        return {
            "id": self.version.name,
            "object": "model",
            "created": self.created,
            "owned_by": "acip",
            "max_model_len": self.context,
            "version": self.version.version,
            "artifact": self.version.uri,
            "base": self.artifact.manifest["base"],
            "chat": self.chat,
            "notes": self.notes,
            "resident_bytes": self.bytes,
            "size": {
                "convention": "linear",
                "smallest": int(table.stored()[-1]) / table.dense_params,
                "calibrated_to": recipe.stop_ratio,
                "calibrated_in": recipe.convention,
                "largest": 1.0,
            },
            "curve": as_json(self.artifact.curve),
        }

    def size(self, cut: Cut) -> dict[str, Any]:
        return size_facts(cut, self._removed_at_stop)

    @functools.cached_property
    def forms(self) -> "AnswerFormats":
        from acip_platform.serve.text.structured_output import AnswerFormats  # pydantic and llguidance, only where a form is asked for

        return AnswerFormats(self.version.name, self.tokenizer, self.vocabulary, self._ends)

    def form(self, request: "CompletionRequest | ChatRequest") -> "AnswerFormat | None":
        """Return the form that the request asks its answers to have; None for free text. RequestError where it can't be had."""
        asked = any(getattr(request, name, None) is not None for name in ("response_format", "tools", "tool_choice"))
        return self.forms.of(request) if asked else None

    def encode(self, request: "CompletionRequest | ChatRequest") -> list[list[int]]:
        """Token ids of each prompt. RequestError where they can't be had."""
        if hasattr(request, "messages"):
            chat = cast("ChatRequest", request)
            if not self.chat:
                raise RequestError(
                    f"{self.version.name} has no chat template; ask POST /v1/completions with a prompt.", "messages", "no_chat"
                )
            if chat.has_tools and "tool" not in str(self.tokenizer.chat_template):
                message = f"the chat template of {self.version.name} has no tools, so it can't take messages of tools; leave them out."
                raise RequestError(message, "messages", "no_tools")
            tools = [tool.model_dump(exclude_none=True) for tool in self.forms.tools(chat) or ()] or None
            try:
                text = self.tokenizer.apply_chat_template(chat.told, tools=tools, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever a template makes of them
                raise RequestError(f"the chat template of {self.version.name} refuses these messages: {error}", "messages") from error
            return [self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"], "messages")]
        encoded = []
        for prompt in request.prompts:
            ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise RequestError("the prompt is empty, and this model has no token to start from; give at least one character.", "prompt")
            encoded.append(self._checked(ids, "prompt"))
        return encoded

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise RequestError("the chat template makes nothing of these messages; say something.", param)
        if max(ids) >= self.vocabulary or min(ids) < 0:
            raise RequestError(f"{param} holds token {max(ids)}; {self.version.name} has tokens 0 to {self.vocabulary - 1}.", param)
        return ids

    def fit(self, encoded: Many[Many[int]], max_tokens: int | None, default: int) -> int:
        """How many tokens to generate; None: `default`, or what fits. RequestError where prompt and answer are longer than the context."""
        longest = max(len(ids) for ids in encoded)
        least = 1 if max_tokens is None else 0
        if max_tokens is None:
            max_tokens = min(self.context - longest, self.stated.most_tokens(longest) or default)
        if max_tokens < least or longest + max_tokens > self.context:
            max_tokens = max(max_tokens, 1)
            room = self.context - max_tokens
            fits = f"shorten the prompt to {room} tokens" if room > 0 else f"ask for at most {self.context - 1} tokens"
            fewer = f", or set max_tokens to at most {self.context - longest}" if self.context - longest > 0 and room > 0 else ""
            raise RequestError(
                f"the prompt has {longest} tokens and max_tokens is {max_tokens}, together {longest + max_tokens}; "
                f"the context of {self.version.name} is {self.context} tokens: {fits}{fewer}.",
                "prompt" if room > 0 else "max_tokens",
                "context_length_exceeded",
            )
        return max_tokens

    def ends(self, request: "CompletionRequest | ChatRequest") -> frozenset[int]:
        return frozenset() if request.ignore_eos else self._ends

    @property
    def _ends(self) -> frozenset[int]:
        return frozenset(i for i in (*self.stated.ends, self.tokenizer.eos_token_id) if i is not None)

    def stops(self, request: "CompletionRequest | ChatRequest") -> list[str]:
        """The texts that end an answer: the request's and the model's own."""
        return [*request.stops, *self.stated.stops]

    def sampler(self, request: "CompletionRequest | ChatRequest", seed: int, ids: list[int], max_tokens: int) -> SamplingParams:
        """The request's settings, else the model's own, else OpenAI's defaults. `ids` is the prompt, and grows with the answer."""
        temperature = float(_first(request.temperature, self.stated.temperature))
        top_p, top_k = float(_first(request.top_p, self.stated.top_p)), int(_first(request.top_k, self.stated.top_k))
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            processors=self.stated.processors(len(ids), max_tokens, temperature, top_p, top_k),
            ids=ids,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._biases(request),
            seed=seed,
            logprobs=request.told_logprobs,
        )

    def _biases(self, request: "CompletionRequest | ChatRequest") -> dict[int, float]:
        biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
        if biases and max(biases) >= self.vocabulary:
            raise RequestError(f"logit_bias names token {max(biases)}; the last one is {self.vocabulary - 1}.", "logit_bias")
        return biases


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
