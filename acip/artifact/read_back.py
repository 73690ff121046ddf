"""The check before the long work: what a calibration of this base model would leave can be opened again, and generates.

    the model's and the tokenizer's classes are transformers' own     an artifact holds no code
    config.json comes back from JSON as it went                       what is built from an artifact is the base model's shape
    every token id of the tokenizer has an embedding                  no text can fail in the middle of the work
    a tiny model of the same architecture -> artifact -> opened again -> another size -> generates

Seconds, and no weights are needed: `base.model` may be on the device `meta` (`acip.base.outline`). What is wrong is a BaseModelError.
Run by each calibration, and by `--dry-run`.
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
from acip.layers.linear import ElasticLinear
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import set_module
from acip.recipe import Recipe
from acip.sizing.model_sizes import cut_table
from acip.sizing.score_map import ScoreMap

VOCABULARY = 64  # tokens of the tiny model
HEAD = 32  # dimensions of each of its attention heads
MOST_HEADS = 4
UNCOMPARED = {"transformers_version", "_name_or_path", "architectures"}
SIZE = 0.5  # that the tiny artifact is opened at
TOKENS = 4  # of its prompt
LARGEST_TINY = 20_000_000  # parameters


def read_back(base: Base, recipe: Recipe) -> None:
    """Raise BaseModelError where the artifact of a calibration of `base` by `recipe` could not be used. Changes nothing."""
    if getattr(base.model.config, "acip", None):
        raise BaseModelError(f"base {base.source!r} is a compressed model already (an export). Calibrate the model that it was made from.")
    own_code(base.model, base.tokenizer, base.source)
    check_tokenizer(base)
    _check_config(base)
    find_linears(base.model, recipe.exclude)
    with torch.random.fork_rng(devices=[]):  # what is drawn after this is what it was without it
        _try_tiny(base, recipe)


def _check_config(base: Base) -> None:
    """Raise BaseModelError for a field of the configuration that JSON does not carry: NaN, sets, keys that are not text."""
    config = base.model.config
    with foreign_errors(BaseModelError, f"the configuration of base {base.source!r} can't be kept as JSON", "Correct its config.json."):
        with tempfile.TemporaryDirectory() as folder, quiet():
            config.save_pretrained(folder)
            read = type(config).from_dict(PreTrainedConfig.get_config_dict(folder)[0])
        lost = list(_differences(config.to_dict(), read.to_dict()))
    if lost:
        name, before, after = lost[0]
        raise BaseModelError(
            f"the configuration of base {base.source!r}: {name} is {cited(before)}, and comes back from JSON as {cited(after)}. "
            "Correct its config.json."
        )


def _differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in UNCOMPARED:
                yield from _differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for i, (left, right) in enumerate(zip(before, after, strict=True)):
            yield from _differences(left, right, f"{name}[{i}]")
    elif before != after and not (isinstance(before, list | tuple) and list(before) == after):
        yield name, before, after


def _try_tiny(base: Base, recipe: Recipe) -> None:
    """Save, open, resize and use the artifact of a tiny model of the same class, with random weights and random scores."""
    recipe = replace(recipe, dtype="float32", adapter_rank=0, post_tune_steps=0, total_steps=None, quantize="none")
    tiny = _tiny(base.model, recipe.exclude)
    if tiny is None:
        return
    failed = f"an artifact of base {base.source!r} could not be used: a tiny one of its architecture ({type(tiny).__name__}) fails"
    prompt = torch.arange(TOKENS)[None] % VOCABULARY
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
    """What a calibration would leave of `tiny`, in place; its scores are random."""
    ranks: dict[str, torch.Tensor] = {}
    for name, linear in find_linears(tiny, recipe.exclude).items():
        U_MK, S_K, V_KN = torch.linalg.svd(weight_MN(linear).detach(), full_matrices=False)
        set_module(tiny, name, ElasticLinear(linear, (U_MK * S_K).T.contiguous(), V_KN.contiguous()))
        ranks[name] = torch.rand(len(S_K))
    scores = ScoreMap.start(ranks)
    return Calibration(tiny, recipe, scores, cut_table(tiny, scores, recipe), stop_step=0, history=[])


def _tiny(model: PreTrainedModel, exclude: tuple[str, ...]) -> PreTrainedModel | None:
    """Make a model of the same class with few and narrow layers; None where its configuration can't be shrunk to one that computes."""
    for shrink in (_narrow, _few_layers):
        config = copy.deepcopy(model.config)
        with quiet():
            torch.manual_seed(0)
            try:
                shrink(config.get_text_config())
                with torch.device("meta"):
                    size = type(model)(copy.deepcopy(config)).num_parameters()
                if size > LARGEST_TINY:
                    continue
                tiny: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
                tiny.eval().requires_grad_(False)
                find_linears(tiny, exclude)  # which may name the layers that were left out here
                with torch.no_grad():
                    tiny(input_ids=torch.arange(TOKENS)[None] % VOCABULARY)
            except Exception:  # noqa: S112 - whatever a class makes of a configuration that it was not written for
                continue
        vars(tiny)["generation_config"] = copy.deepcopy(getattr(model, "generation_config", None))
        return tiny
    return None


def _narrow(config: Any) -> None:
    """Shrink a text configuration in place: few layers, few and small heads, a small vocabulary."""
    _few_layers(config)
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    dimensions = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = heads // kv if kv else 1
    kv_heads = min(kv or heads, MOST_HEADS // min(groups, 2))
    own_width = heads * dimensions == config.hidden_size
    head = min(dimensions, HEAD)
    config.num_attention_heads = kv_heads * min(groups, 2)
    if kv:
        config.num_key_value_heads = kv_heads
    if getattr(config, "head_dim", None):
        config.head_dim = head
    config.hidden_size = head * (config.num_attention_heads if own_width else MOST_HEADS)
    for name, most in (("num_kv_heads", config.num_attention_heads), ("rotary_dim", head)):
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, most))
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 3 * config.hidden_size // 2)
    if (embedded := getattr(config, "word_embed_proj_dim", None)) is not None:
        config.word_embed_proj_dim = min(embedded, config.hidden_size)
    for rope in _mappings(getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        for name in ("short_factor", "long_factor"):  # one number for each pair of a head's dimensions
            if name in rope:
                rope[name] = rope[name][: len(rope[name]) * head // dimensions]
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name, value in vars(config).items():
        if name.endswith("_token_id"):
            setattr(config, name, _below(value, config.vocab_size))


def _few_layers(config: Any) -> None:
    """Keep the first layers in place: as many as it takes to have one of every type, and two at least."""
    kinds, count = getattr(config, "layer_types", None), config.num_hidden_layers
    kept = 2
    if kinds:
        kept = max(kept, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, value[:kept])
    config.num_hidden_layers = min(count, kept)


def _mappings(*values: Any) -> Iterator[dict[str, Any]]:
    for value in values:
        if isinstance(value, dict):
            yield value
            yield from _mappings(*value.values())


def _below(value: Any, end: int) -> Any:
    if isinstance(value, list | tuple):
        return [_below(item, end) for item in value]
    return min(value, end - 1) if isinstance(value, int) else value
