"""A model of the registry in memory: one copy of its sorted factors, its tokenizer, and what it may be asked."""

import functools
from collections.abc import Sequence as Many
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from acip.artifact import MANIFEST, Artifact
from acip.budget import Budget
from acip.cut import Cut
from acip.errors import AcipError
from acip.materialise import AnySize
from acip.mixed import Mixer, Size
from acip.packed import PackedLinear, pack
from acip_platform.serve.batch import Batch
from acip_platform.serve.errors import RequestError
from acip_platform.serve.request import ChatRequest, CompletionRequest
from acip_platform.serve.sampling import Sampler
from acip_platform.serve.sizes import as_json, told
from acip_platform.serve.slots import ATTENTION, Piece, Slots, Step
from acip_platform.serve.structured import Forms
from acip_platform.tracking import ModelVersion

CHECK_TOKENS = 13
AGREES = 0.05  # of the logits' norm: rounding stays below, another position or mask does not


class Served:
    """One registered version of a model, resident at every size. `packed`: with copies of dense weights that are faster (`acip.packed`)."""

    def __init__(
        self,
        version: ModelVersion,
        artifact: Artifact,
        device: str | torch.device = "cpu",
        kv_tokens: int = 1 << 17,
        packed: bool = True,
    ) -> None:
        self.version, self.artifact = version, artifact
        self.created = int((artifact.folder / MANIFEST).stat().st_mtime)
        self.any_size: AnySize = artifact.load(device)
        self.tokenizer = artifact.tokenizer()
        self.stated = self.any_size.model.generation_config or GenerationConfig()
        recipe, table = artifact.recipe, self.any_size.table
        self._removed_at_stop = table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).removed
        config = self.any_size.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or min(self.tokenizer.model_max_length, 1 << 17))
        self.vocabulary = int(config.vocab_size)
        self.forms = Forms(version.name, self.tokenizer, self.vocabulary, self._ends)
        self.cut = functools.lru_cache(maxsize=256)(table.cut)
        if packed:
            pack(self.any_size.model)
        self._check(Mixer(self.any_size.layers))
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
        return told(cut, self._removed_at_stop)

    def encode(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """Token ids of each prompt. RequestError where they can't be had."""
        if isinstance(request, ChatRequest):
            if not self.chat:
                raise RequestError(
                    f"{self.version.name} has no chat template; ask POST /v1/completions with a prompt.", "messages", "no_chat"
                )
            if request.has_tools and "tool" not in str(self.tokenizer.chat_template):
                message = f"the chat template of {self.version.name} has no tools, so it can't take messages of tools; leave them out."
                raise RequestError(message, "messages", "no_tools")
            tools = [tool.model_dump(exclude_none=True) for tool in self.forms.tools(request) or []] or None
            try:
                text = self.tokenizer.apply_chat_template(request.told, tools=tools, tokenize=False, add_generation_prompt=True)
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
            max_tokens = min(default, self.context - longest)
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

    def ends(self, request: CompletionRequest | ChatRequest) -> frozenset[int]:
        return frozenset() if request.ignore_eos else self._ends

    @property
    def _ends(self) -> frozenset[int]:
        stated = self.stated.eos_token_id
        ids = stated if isinstance(stated, list) else [stated]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def sampler(self, request: CompletionRequest | ChatRequest, seed: int) -> Sampler:
        """The request's settings, else the model's own, else OpenAI's defaults."""
        stated = self.stated
        usual = 0.0 if stated.do_sample is False else _first(stated.temperature, 1.0)
        return Sampler(
            temperature=float(_first(request.temperature, usual)),
            top_p=float(_first(request.top_p, _first(stated.top_p, 1.0))),
            top_k=int(_first(request.top_k, _first(stated.top_k, 0))),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._biases(request),
            seed=seed,
            logprobs=request.told_logprobs,
        )

    def _biases(self, request: CompletionRequest | ChatRequest) -> dict[int, float]:
        biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
        if biases and max(biases) >= self.vocabulary:
            raise RequestError(f"logit_bias names token {max(biases)}; the last one is {self.vocabulary - 1}.", "logit_bias")
        return biases

    @torch.inference_mode()
    def _check(self, mixer: Mixer) -> None:
        """A prompt in pieces and a sequence beside it, at two sizes in one pass, give the logits of each alone: a real token, too.

        Whatever would mix up sequences or positions of an architecture is noticed here, not by its users.
        """
        model, device = self.any_size.model, self.any_size.model.device
        small = max(self._removed_at_stop, 1)
        sizes = [Size(0, self.any_size.table.ranks(0)), Size(small, self.any_size.table.ranks(small))]
        ids = [[(7 + 3 * i + 11 * row) % self.vocabulary for i in range(CHECK_TOKENS)] for row in range(2)]
        alone = []
        for size, row in zip(sizes, ids, strict=True):
            mixer.set([(size, CHECK_TOKENS)])
            alone.append(model(input_ids=torch.tensor([row], device=device), past_key_values=DynamicCache(config=model.config)).logits[0])
        model.set_attn_implementation(ATTENTION)
        slots, found = Slots(), []
        slots.room(2, CHECK_TOKENS)
        start = 0
        for stop in (5, 9, *range(10, CHECK_TOKENS + 1)):
            count = stop - start
            pieces = [Piece(1, start, 0, count), Piece(0, start, count, 2 * count)]  # slots not in the order of rows
            mixer.set([(sizes[0], count), (sizes[1], count)])
            with Step.of(slots, pieces, device) as step:
                out = model(
                    input_ids=torch.tensor([ids[0][start:stop] + ids[1][start:stop]], device=device),
                    position_ids=step.position[None], past_key_values=slots, use_cache=True,
                )  # fmt: skip
            found.append(out.logits[0].unflatten(0, (2, count)))
            start = stop
        mixer.clear()
        together = torch.cat(found, 1)
        for apart, beside in zip(alone, together, strict=True):
            error = float((apart.float() - beside.float()).norm() / apart.float().norm())
            if not error < AGREES:
                raise AcipError(
                    f"{self.version.name}: {type(model).__name__} can't be served: tokens of several sequences in one pass change its "
                    f"logits by {error:.1%}, so its attention or positions work in another way. Export sizes with jobs/materialise.py."
                )


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
