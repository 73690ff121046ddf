"""Check a base model before a calibration: its artifact can be opened again, and the model that is loaded from it generates.

    check                                                          reason
    the classes of the model and tokenizer are transformers' own   an artifact holds no code
    config.json survives the conversion to JSON                    the loaded model must have the base model's shape
    the generation settings do not contradict each other           transformers does not write them otherwise
    every token id of the tokenizer has an embedding               otherwise some texts fail during the calibration
    a tiny model of the same class is saved as an artifact,        everything else
    opened again, resized, and generates

The checks take seconds and need no weights: `base.model` may be on the device `meta` (`acip.base.outline`). A failure raises
BaseModelError. Every calibration runs them, and so does `--dry-run`.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.base import Base, check_tokenizer, own_code, quiet
from acip.calibration.result import Calibration
from acip.errors import BaseModelError, cited, foreign_errors
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, require_matches, weight_MN
from acip.modeling_acip import set_module
from acip.recipe import Recipe
from acip.sizing.model_sizes import cut_table
from acip.sizing.score_map import ScoreMap

VOCABULARY = 64  # tokens of the tiny model
MAX_HEAD_DIM = 32
MAX_HEADS = 4
NOT_COMPARED = {"transformers_version", "_name_or_path", "architectures"}
SIZE = 0.5  # to which the tiny model is resized
PROMPT_TOKENS = 4
MAX_TINY_PARAMS = 20_000_000


def read_back(base: Base, recipe: Recipe) -> None:
    """Raise BaseModelError if the artifact of a calibration of `base` by `recipe` could not be used. Nothing is changed."""
    if getattr(base.model.config, "acip", None):
        raise BaseModelError(f"base {base.source!r} is already compressed: it is an export. Calibrate the model that it was made from.")
    own_code(base.model, base.tokenizer, base.source)
    check_tokenizer(base)
    _check_config(base)
    if (generation := getattr(base.model, "generation_config", None)) is not None:
        with foreign_errors(
            BaseModelError, f"the generation settings of base {base.source!r} can't be stored",
            "Correct its generation_config.json; for example, settings of sampling need do_sample: true.",
        ):  # fmt: skip
            generation.validate(strict=True)
    require_matches(base.model, recipe.exclude)
    find_linears(base.model, recipe.exclude)
    with torch.random.fork_rng(devices=[]):  # the checks leave the random state unchanged
        _try_tiny(base, recipe)


def _check_config(base: Base) -> None:
    """Raise BaseModelError for a field of the configuration that JSON can't represent: NaN, sets, keys that are not strings."""
    config = base.model.config
    with foreign_errors(BaseModelError, f"the configuration of base {base.source!r} can't be saved as JSON", "Correct its config.json."):
        with tempfile.TemporaryDirectory() as folder, quiet():
            config.save_pretrained(folder)
            read = type(config).from_dict(PreTrainedConfig.get_config_dict(folder)[0])
        lost = list(_differences(config.to_dict(), read.to_dict()))
    if lost:
        name, before, after = lost[0]
        raise BaseModelError(
            f"the configuration of base {base.source!r}: {name} is {cited(before)}, but {cited(after)} when it is read back from JSON. "
            "Correct its config.json."
        )


def _differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value before and value after of each field that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in NOT_COMPARED:
                yield from _differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for i, (left, right) in enumerate(zip(before, after, strict=True)):
            yield from _differences(left, right, f"{name}[{i}]")
    elif before != after and not (isinstance(before, list | tuple) and list(before) == after):
        yield name, before, after


def _try_tiny(base: Base, recipe: Recipe) -> None:
    """Save, open, resize and run the artifact of a tiny model of the same class, with random weights and random scores."""
    recipe = replace(recipe, dtype="float32", adapter_rank=0, post_tune_steps=0, total_steps=None, quantize="none", code="ranks")
    tiny = tiny_model(base.model, recipe.exclude)
    if tiny is None:
        return
    failed = f"an artifact of base {base.source!r} could not be used: that of a tiny {type(tiny).__name__} with random weights fails"
    prompt = torch.arange(PROMPT_TOKENS)[None] % VOCABULARY
    with foreign_errors(BaseModelError, failed, "Use another base model."), quiet(), tempfile.TemporaryDirectory() as folder:
        artifact = Artifact.save(folder, replace(base, model=tiny, digest=""), _calibration(tiny, recipe), {})
        artifact.tokenizer()
        any_size = artifact.load()
        any_size.resize(SIZE)
        with torch.no_grad():
            any_size.model(input_ids=prompt)
            if any_size.model.can_generate():
                greedy = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
                any_size.model.generate(prompt, generation_config=greedy)  # type: ignore[operator]


def _calibration(tiny: PreTrainedModel, recipe: Recipe) -> Calibration:
    """Return a calibration of `tiny` with random scores. `tiny` is changed in place."""
    ranks: dict[str, torch.Tensor] = {}
    for name, linear in find_linears(tiny, recipe.exclude).items():
        U_MK, S_K, V_KN = torch.linalg.svd(weight_MN(linear).detach(), full_matrices=False)
        set_module(tiny, name, ElasticLinear(linear, (U_MK * S_K).T.contiguous(), V_KN.contiguous()))
        ranks[name] = torch.rand(len(S_K))
    scores = ScoreMap.start(ranks)
    return Calibration(tiny, recipe, scores, cut_table(tiny, scores, recipe), stop_step=0, history=[])


def tiny_model(model: PreTrainedModel, exclude: tuple[str, ...]) -> PreTrainedModel | None:
    """Return a model of the same class with few and narrow layers, or None if no shrunk configuration gives a model that runs."""
    for shrink in (_narrow, _few_layers):
        config = copy.deepcopy(model.config)
        with quiet():
            torch.manual_seed(0)
            try:
                shrink(config.get_text_config())
                with torch.device("meta"):
                    size = type(model)(copy.deepcopy(config)).num_parameters()
                if size > MAX_TINY_PARAMS:
                    continue
                tiny: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
                tiny.eval().requires_grad_(False)
                find_linears(tiny, exclude)  # raises if `exclude` names layers that were removed here
                with torch.no_grad():
                    tiny(input_ids=torch.arange(PROMPT_TOKENS)[None] % VOCABULARY)
            except Exception:  # noqa: S112 - a model class may raise any type on a configuration that it was not written for
                continue
        if getattr(model, "generation_config", None) is not None:
            tiny.generation_config = copy.deepcopy(model.generation_config)
        return tiny
    return None


def _narrow(config: Any) -> None:
    """Shrink a text configuration in place: few layers, few and small heads, a small vocabulary."""
    _few_layers(config)
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    dimensions = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = heads // kv if kv else 1
    kv_heads = min(kv or heads, MAX_HEADS // min(groups, 2))
    heads_span_width = heads * dimensions == config.hidden_size
    head = min(dimensions, MAX_HEAD_DIM)
    config.num_attention_heads = kv_heads * min(groups, 2)
    if kv:
        config.num_key_value_heads = kv_heads
    if getattr(config, "head_dim", None):
        config.head_dim = head
    config.hidden_size = head * (config.num_attention_heads if heads_span_width else MAX_HEADS)
    for name, limit in (("num_kv_heads", config.num_attention_heads), ("rotary_dim", head)):
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, limit))
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 3 * config.hidden_size // 2)
    if (embedded := getattr(config, "word_embed_proj_dim", None)) is not None:
        config.word_embed_proj_dim = min(embedded, config.hidden_size)
    for rope in _mappings(getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        for name in ("short_factor", "long_factor"):  # one number per pair of head dimensions
            if name in rope:
                rope[name] = rope[name][: len(rope[name]) * head // dimensions]
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name, value in vars(config).items():
        if name.endswith("_token_id"):
            setattr(config, name, _below(value, config.vocab_size))


def layers_of_all_types(config: Any) -> int:
    """Return how many of the first layers of a text configuration contain one of every layer type."""
    kinds = list(getattr(config, "layer_types", None) or ["all"])
    return max(kinds.index(kind) + 1 for kind in set(kinds))


def keep_layers(config: Any, kept: int) -> None:
    """Remove layers from a text configuration in place. Keep the first `kept` ones."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, value[:kept])
    config.num_hidden_layers = min(count, kept)


def _few_layers(config: Any) -> None:
    """Remove layers from a text configuration in place. Keep the first ones: at least two, and one of every layer type."""
    keep_layers(config, max(2, layers_of_all_types(config)))


def _mappings(*values: Any) -> Iterator[dict[str, Any]]:
    """Yield the dicts in `values`, and the dicts nested in them."""
    for value in values:
        if isinstance(value, dict):
            yield value
            yield from _mappings(*value.values())


def _below(value: Any, end: int) -> Any:
    """Return an id or a list of ids, each reduced to at most `end` - 1."""
    if isinstance(value, list | tuple):
        return [_below(item, end) for item in value]
    return min(value, end - 1) if isinstance(value, int) else value
