"""A check, run before a model is served, that the engine computes the same logits as the model itself.

    the model itself    one pass over a prompt with the attention and cache of transformers, and its last tokens one by one, as in
                        `generate`
    the engine          three sequences of different lengths and sizes in shared passes: in chunks, then token by token, and finally a
                        pass with one token only

The two are compared on two models:

    the served model    with prompts that exceed every threshold of its config (a window, a chunk, ...) that `MAX_MULTIPLICATIONS` of
                        work can reach
    a reduced copy      the same weights with a config whose thresholds are `REDUCED` tokens. It runs the same code with a short prompt.
                        It is computed in float32 if a float32 copy of the weights is small enough

The error of a token is the norm of the difference of its logits, without the part that is common to all logits, in units of the norm of
the logits. In float32, the largest error of any token counts: rounding causes 1e-5, while another window or soft cap causes 1e-3 or
more. In 16 bit, the mean error counts. Its limit depends on the number of layers, and on the model's own difference between one pass and
token by token, which is rounding by definition.

longrope changes the frequencies of rotary embeddings with the longest sequence of a batch, so they cannot be computed for each sequence.
The served context ends where they would change.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from acip.artifact.loading import without_weights
from acip.errors import AcipError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.modeling_acip import onednn, set_module
from acip.utils.free_memory import free_memory
from acip_platform.serve.engine.kv_cache import ATTENTION, CachePiece, KVCache, Step

THRESHOLD = re.compile(r"(^|_)(window|chunk|floor_scale|local_attention)(_|$)")  # names of config fields that count tokens
NOT_THRESHOLD = re.compile(r"layers|pattern|type|feed_forward|use_")
REDUCED = 8  # tokens
LENGTHS = (29, 20, 6)  # tokens of the three sequences: two exceed REDUCED, one does not
SINGLE_TOKENS = 4  # tokens at the end of each sequence that are processed one by one
MAX_MULTIPLICATIONS = 2e12  # approximate number for one prompt
MAX_TOKENS = 600  # of a prompt, for small models
FLOAT32_BYTES = 1 << 30  # largest float32 copy of the weights
FREE_SHARE = 0.5  # of the free memory that this copy may take
MAX_ERROR = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
ERROR_PER_LAYER = 0.002  # allowed in 16 bit; rounding causes half of it
ROUNDING_FACTOR = 3  # allowed error in 16 bit, in units of the model's own difference
MAX_ERROR_16_BIT = 0.15  # a larger rounding error would make the comparison meaningless


def served_context(config: Any, otherwise: int) -> tuple[int, str | None]:
    """Return the context in tokens, and a note if it is shorter than the model's own.

    Up to this length, position encodings do not depend on the other sequences of a batch.
    """
    context = int(getattr(config, "max_position_embeddings", None) or otherwise)
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su") and original and original < context:
            return int(original), (
                f"the context is served up to {original} of {context} tokens: beyond them longrope changes the frequencies of all positions"
            )
    return context, None


def check(name: str, model: Any, layers: Mapping[str, ElasticLinear], sizes: tuple[Size, Size], context: int) -> None:
    """Raise an AcipError if the logits of the engine differ from those of `model` at one of the `sizes`.

    The message is one line, with the model's name and the reason. Afterwards the model uses the engine's attention.
    """
    try:
        with torch.inference_mode():
            thresholds = dict(_thresholds(model.config))
            tokens = min(MAX_TOKENS, int(MAX_MULTIPLICATIONS / max(sum(p.numel() for p in model.parameters()), 1)))
            if any(count > REDUCED for count in thresholds.values()) or model.dtype.itemsize < 4:
                reduced = _reduced_copy(model, layers)
                _compare(reduced, {key: reduced.get_submodule(key) for key in layers}, sizes, LENGTHS, context, thresholds)
            reached = {field: count for field, count in thresholds.items() if count + REDUCED <= min(tokens, context)}
            longest = max([LENGTHS[0], *(count + REDUCED for count in reached.values())])
            _compare(model, layers, sizes, (longest, *LENGTHS[1:]), context, reached)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the code of an architecture can raise anything
        kind = "" if isinstance(error, AcipError) else f"{type(error).__name__} in the engine's forward pass: "
        reason = " ".join(str(error).split()).rstrip(".")[:400]
        raise AcipError(
            f"{name}: {type(model).__name__} can't be served: {kind}{reason}. Export sizes with jobs/materialize.py."
        ) from error


def _compare(
    model: Any, layers: Mapping[str, Any], sizes: tuple[Size, Size], lengths: tuple[int, ...], context: int, thresholds: Mapping[str, int]
) -> None:
    mixer, device, vocabulary = Mixer(layers), model.device, model.config.get_text_config().vocab_size
    sequence_sizes = [sizes[0], sizes[1], sizes[1]]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (min(length, context),), generator=generator).tolist() for length in lengths]
    expected, noise = [], 0.0
    for size, row in zip(sequence_sizes, ids, strict=True):
        mixer.set([(size, len(row))])
        tokens = torch.tensor([row], device=device)
        one_pass = model(input_ids=tokens, use_cache=False).logits[0].float()
        expected.append(_token_by_token(model, tokens))
        if not bool(expected[-1].isfinite().all()):
            raise AcipError(f"its own logits are not finite in {str(model.dtype).removeprefix('torch.')}")
        noise = max(noise, _error(one_pass, expected[-1], model.dtype))
    limit = MAX_ERROR.get(model.dtype, MAX_ERROR[torch.float32])
    if model.dtype.itemsize < 4:
        depth = int(getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0)
        limit = min(max(limit, ERROR_PER_LAYER * depth, ROUNDING_FACTOR * noise), MAX_ERROR_16_BIT)
    if not noise <= limit:
        raise AcipError(
            f"its logits differ by {noise:.2g} between one pass and token by token, so its answers depend on how they are computed"
        )
    implementation = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    found = _in_engine(model, mixer, sequence_sizes, ids)
    mixer.clear()
    error = max(_error(logits, reference, model.dtype) for logits, reference in zip(found, expected, strict=True))
    if not error <= limit:
        beyond = "".join(f", beyond {field} = {count}" for field, count in thresholds.items())
        raise AcipError(
            f"tokens of several sequences in one pass change its logits by {error:.2g}{beyond} ({limit:.2g} is rounding), "
            f"so its attention or positions are not computed as with {implementation} attention"
        )


def _token_by_token(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits [T, V] of a prompt: of all but its last tokens in one pass, then of these one by one, as in `generate`."""
    cache, found, start = DynamicCache(config=model.config), [], 0
    for stop in range(max(tokens.shape[1] - SINGLE_TOKENS, 1), tokens.shape[1] + 1):
        positions = torch.arange(start, stop, device=tokens.device)[None]
        out = model(input_ids=tokens[:, start:stop], position_ids=positions, past_key_values=cache, use_cache=True)
        found.append(out.logits[0].float())
        start = stop
    return torch.cat(found)


def _in_engine(model: Any, mixer: Mixer, sizes: list[Size], ids: list[list[int]]) -> list[Tensor]:
    """Return the logits [T, V] of each sequence in the engine.

    Each sequence begins one step after the previous one, in chunks, and ends token by token.
    """
    device, cache, found = model.device, KVCache(least=1), [list[Tensor]() for _ in ids]
    order, past, step = (2, 0, 1), [0] * len(ids), 0  # the slots are not in the order of the sequences
    while any(done < len(row) for done, row in zip(past, ids, strict=True)):
        pieces, runs, tokens = list[CachePiece](), list[tuple[Size, int]](), list[int]()
        parts = []
        for i, row in enumerate(ids):
            prompt = max(len(row) - SINGLE_TOKENS, 1)
            count = 0 if step < i else min(-(-prompt // 3), prompt - past[i]) if past[i] < prompt else min(1, len(row) - past[i])
            if count:
                pieces.append(CachePiece(order[i], past[i], len(tokens), len(tokens) + count))
                tokens += row[past[i] : past[i] + count]
                runs = [*runs[:-1], (sizes[i], runs[-1][1] + count)] if runs and runs[-1][0] is sizes[i] else [*runs, (sizes[i], count)]
                parts.append((i, pieces[-1]))
                past[i] += count
        padding = padded(len(tokens)) - len(tokens)
        runs[-1] = (runs[-1][0], runs[-1][1] + padding)
        cache.room(len(ids) + 1, max(past))
        mixer.set(runs)
        with Step.of(cache, pieces, device, padding, len(ids)) as placed, onednn(len(tokens) > 1):
            out = model(
                input_ids=torch.tensor([tokens + [0] * padding], device=device), position_ids=placed.position[None], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
        for i, piece in parts:
            found[i].append(out.logits[0, piece.start : piece.stop].float())
        step += 1
    return [torch.cat(rows) for rows in found]


def _error(found_TV: Tensor, expected_TV: Tensor, dtype: torch.dtype) -> float:
    """Return the difference of logits in units of the norm of the expected ones, without the part that is common to all of a token."""
    difference, expected = found_TV - expected_TV, expected_TV - expected_TV.mean(-1, keepdim=True)
    error_T = (difference - difference.mean(-1, keepdim=True)).norm(dim=-1) / expected.norm(dim=-1).square().mean().sqrt().clamp_min(1e-12)
    return float(error_T.max() if dtype.itemsize >= 4 else error_T.mean())


def _reduced_copy(model: Any, layers: Mapping[str, ElasticLinear]) -> Any:
    """Return a copy of `model` whose config has reduced thresholds. It shares the weights, or has them in float32 if that is small."""
    config = copy.deepcopy(model.config)
    for part in _parts(config):
        for field, count in _own_thresholds(part):
            setattr(part, field, min(count, REDUCED))
        for rope in _ropes(part):
            if rope.get("llama_4_scaling_beta") is not None and rope.get("original_max_position_embeddings"):
                rope["original_max_position_embeddings"] = min(rope["original_max_position_embeddings"], REDUCED)
    reduced: Any = without_weights(type(model), config, model.dtype, attn_implementation=model.config._attn_implementation)
    kept = set(model.state_dict(keep_vars=True))
    replaced: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done in replaced):
            continue
        other = reduced.get_submodule(name)
        if type(other) is not type(module):
            set_module(reduced, name, module)
            replaced.append(name)
            continue
        other._parameters.update(module._parameters)
        for key, buffer in other._buffers.items():
            persistent = (f"{name}.{key}" if name else key) in kept
            other._buffers[key] = module._buffers[key] if persistent or buffer is None else buffer.to(model.device)
    copy_bytes = 4 * sum(tensor.numel() for tensor in reduced.state_dict().values())
    if model.dtype.itemsize < 4 and copy_bytes <= min(FLOAT32_BYTES, FREE_SHARE * free_memory(model.device)):
        reduced = copy.deepcopy(reduced).float()
    return reduced.eval()


def _thresholds(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the name and value of each config field that is a number of tokens at which the model's computation changes."""
    for part in _parts(config):
        yield from _own_thresholds(part)
        for rope in _ropes(part):
            if rope.get("llama_4_scaling_beta") is not None and rope.get("original_max_position_embeddings"):
                yield "original_max_position_embeddings", rope["original_max_position_embeddings"]


def _own_thresholds(config: Any) -> Iterator[tuple[str, int]]:
    for field, value in list(vars(config).items()):
        if THRESHOLD.search(field) and not NOT_THRESHOLD.search(field) and isinstance(value, int) and value is not True and value > 0:
            yield field, value


def _parts(config: Any) -> list[Any]:
    """Return the config, and the config of the text model if it is a different object."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of rotary embeddings: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):
        if isinstance(settings, dict) and ("rope_type" in settings or "type" in settings):
            yield settings
