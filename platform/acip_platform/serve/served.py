"""A model of the registry in memory: one copy of its sorted factors, its tokenizer, and what it may be asked."""

import copy
import json
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from acip.artifact import MANIFEST, Artifact
from acip.cut import Budget, Cut
from acip.materialise import AnySize
from acip_platform.serve.errors import RequestError
from acip_platform.serve.request import CompletionRequest
from acip_platform.tracking import ModelVersion

GREEDY_BELOW = 1e-5  # dividing logits by a temperature much smaller than this overflows float32


class Served:
    """One registered version of a model, resident at every size."""

    def __init__(self, version: ModelVersion, artifact: Artifact, device: str | torch.device = "cpu") -> None:
        self.version, self.artifact = version, artifact
        self.any_size: AnySize = artifact.load(device)
        self.tokenizer = artifact.tokenizer()
        # what the model states is a default for requests; left in the model, it would come back through what they don't set
        self.stated = self.any_size.model.generation_config
        self.any_size.model.generation_config = GenerationConfig()
        recipe, table = artifact.recipe, self.any_size.table
        self._removed_at_stop = table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).removed
        config = self.any_size.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or min(self.tokenizer.model_max_length, 1 << 17))

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        table, recipe = self.any_size.table, self.artifact.recipe
        return {
            "id": self.version.name,
            "object": "model",
            "created": int((self.artifact.folder / MANIFEST).stat().st_mtime),
            "owned_by": "acip",
            "max_model_len": self.context,
            "version": self.version.version,
            "artifact": self.version.uri,
            "base": self.artifact.manifest["base"],
            "size": {
                "convention": "linear",
                "smallest": int(table.stored()[-1]) / table.dense_params,
                "calibrated_to": recipe.stop_ratio,
                "calibrated_in": recipe.convention,
                "largest": 1.0,
            },
            "curve": json.loads(json.dumps(self.artifact.curve), parse_constant=lambda _: None),  # an infinite perplexity is no JSON
        }

    def size(self, cut: Cut) -> dict[str, Any]:
        """What was asked for and what it is. Below the size that calibration stopped at, the order is extrapolated."""
        extrapolated = cut.removed > self._removed_at_stop
        return {"asked": cut.asked, "got": cut.got, "convention": cut.convention, "params": cut.params, "extrapolated": extrapolated}

    def encode(self, prompt: str, max_tokens: int) -> Tensor:
        """[1, T] token ids that fit into the context together with what is to be generated."""
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise RequestError("the prompt is empty, and this model has no token to start from; give at least one character.", "prompt")
        if len(ids) + max_tokens > self.context:
            room = self.context - max_tokens
            fits = f"shorten the prompt to {room} tokens" if room > 0 else f"ask for at most {self.context - 1} tokens"
            fewer = f", or set max_tokens to at most {self.context - len(ids)}" if self.context - len(ids) > 0 and room > 0 else ""
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}, together {len(ids) + max_tokens}; "
                f"the context of {self.version.name} is {self.context} tokens: {fits}{fewer}.",
                "prompt" if room > 0 else "max_tokens",
                "context_length_exceeded",
            )
        return torch.tensor([ids], device=self.any_size.model.device)

    def generation_config(self, request: CompletionRequest, max_tokens: int) -> GenerationConfig:
        """The request's settings, else the model's own, else OpenAI's defaults."""
        stated = self.stated
        usual = 0.0 if stated.do_sample is False else _first(stated.temperature, 1.0)
        temperature = _first(request.temperature, usual)
        if temperature < GREEDY_BELOW:
            how: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # what transformers calls unset
        else:
            top_p = _first(request.top_p, _first(stated.top_p, 1.0))
            how = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": _first(stated.top_k, 0)}
        how |= {"max_new_tokens": max_tokens, "max_length": None, "num_beams": 1, "num_return_sequences": 1}
        eos = stated.eos_token_id[0] if isinstance(stated.eos_token_id, list) else stated.eos_token_id
        config = copy.deepcopy(stated)
        config.update(**how, pad_token_id=_first(stated.pad_token_id, eos), return_dict_in_generate=False)
        return config


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
