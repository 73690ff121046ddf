"""The settings of a model's generation_config.json. Each request honors them; the others are logged once, when the model is loaded.

this module               do_sample, temperature, top_p, top_k, eos_token_id, max_new_tokens, max_length
`serve/text`              stop_strings
transformers' own code    every setting that is a logits processor: repetition_penalty, no_repeat_ngram_size, min_p, suppress_tokens, ...
not honored               beams, guidance, encoders, a time limit, and settings that this version does not support
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from acip.errors import AcipError, cited
from acip_platform.serve.engine.sampling import GREEDY_BELOW

HONORED = ("do_sample", "temperature", "top_p", "top_k", "eos_token_id", "stop_strings", "max_new_tokens", "max_length")
PROCESSED = (
    "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "top_h", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "watermarking_config", "renormalize_logits",
)  # fmt: skip
NO_EFFECT = (  # on the tokens: caches, speculation, outputs, special tokens outside of answers, and settings that only beams read
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id", "early_stopping",
    "length_penalty", "transformers_version",
)  # fmt: skip
NEUTRAL: dict[str, Any] = {  # values of settings that are not honored, with which they have no effect
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0, "diversity_penalty": 0,
    "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
OFF = ("guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "remove_invalid_values", "num_beams")


class GenerationSettings:
    """A model's generation config. Its constructor raises an AcipError for a setting with an invalid value."""

    def __init__(self, name: str, model: Any) -> None:
        self.model = model
        self.config: Any = model.generation_config or GenerationConfig()
        for field, value in vars(self.config).items():
            if any(not math.isfinite(number) for number in _numbers(value)):
                raise AcipError(
                    f"{name}: generation_config.json has {field} = {cited(value)}, which is not finite. Correct it, and calibrate again."
                )
        try:
            self.processed = bool(self._processors(1, 1, None, None, None, True))
            self.processors(1, 1, self.temperature, self.config.top_p, self.config.top_k)
            if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
                raise ValueError(f"temperature = {self.temperature}, top_p = {self.top_p}, top_k = {self.top_k}")
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())
            raise AcipError(f"{name}: generation_config.json can't be honored: {reason}. Correct it, and calibrate again.") from error

    @property
    def temperature(self) -> float:
        return 0.0 if self.config.do_sample is False else float(_first(self.config.temperature, 1.0))

    @property
    def top_p(self) -> float:
        return float(_first(self.config.top_p, 1.0))

    @property
    def top_k(self) -> int:
        return int(_first(self.config.top_k, 0))

    @property
    def end_tokens(self) -> list[int]:
        ids = self.config.eos_token_id
        return [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]

    def max_tokens(self, prompt_tokens: int) -> int | None:
        """Return the limit for an answer whose request has none; None = no limit."""
        if self.config.max_new_tokens is not None:
            return int(self.config.max_new_tokens)
        longest = self.config.max_length
        return None if longest is None or longest <= prompt_tokens else int(longest) - prompt_tokens

    @property
    def not_honored(self) -> list[str]:
        """The settings that answers do not follow."""
        return [f"{field} = {cited(value)}" for field, value in vars(self.config).items() if self._is_left_out(field, value)]

    def _is_left_out(self, field: str, value: Any) -> bool:
        known = field.startswith("_") or field in HONORED or field in PROCESSED or field in NO_EFFECT
        return not known and value is not None and value is not False and value != NEUTRAL.get(field)

    def processors(
        self, prompt_tokens: int, max_tokens: int, temperature: float, top_p: float | None, top_k: int | None
    ) -> LogitsProcessorList | None:
        """Return transformers' logits processors for one sequence; None if the config has none."""
        if not self.processed:
            return None
        return self._processors(prompt_tokens, max_tokens, temperature, top_p, top_k, temperature >= GREEDY_BELOW)

    def _processors(
        self, prompt_tokens: int, max_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None, do_sample: bool
    ) -> LogitsProcessorList:
        config = copy.deepcopy(self.config)
        for field in OFF:
            setattr(config, field, None)
        config.do_sample, config.temperature, config.top_p, config.top_k = do_sample, temperature, top_p, top_k
        config.max_length = prompt_tokens + max_tokens
        config._eos_token_tensor = torch.tensor(self.end_tokens, device=self.model.device) if self.end_tokens else None
        made: LogitsProcessorList = self.model._get_logits_processor(
            config, input_ids_seq_length=prompt_tokens, device=self.model.device, model_kwargs={}
        )
        return made


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
