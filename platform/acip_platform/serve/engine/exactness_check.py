"""Check, before a model is served, that the engine computes what the model computes by itself.

    the model itself    a prompt in one pass with transformers' own attention and cache, and its last tokens one by one, as in `generate`
    the engine          three sequences of different lengths and sizes in shared passes, in pieces, and one token that is alone

Both are compared twice:

    as it is            beyond every threshold of its config (a window, a chunk, ...) that a run of `AFFORDABLE` work can reach
    a reduced twin      the same weights under a config whose thresholds are `REDUCED` tokens: the same code at the cost of a short
                        prompt. It is computed in float32 where a copy of the weights in float32 is small enough

The error of a token is the norm of its logits' difference, without what is common to all logits, in units of the logits' own norm.
In float32 the largest error of any token counts: rounding makes 1e-5 of it, another window or cap 1e-3 or more. In 16 bit the mean
counts, against the model's own difference between one pass and token by token, which is rounding by definition.

Frequencies of rotary embeddings that depend on the longest sequence of a batch (longrope) can't be computed for each sequence, so the
served context ends where they would change.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import DynamicCache

from acip.errors import AcipError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.modeling_acip import onednn, set_module
from acip_platform.serve.engine.kv_cache import ATTENTION, CachePiece, KVCache, Step

THRESHOLD = re.compile(r"(^|_)(window|chunk|floor_scale|local_attention)(_|$)")  # names of config fields that count tokens
NO_THRESHOLD = re.compile(r"layers|pattern|type|feed_forward|use_")
REDUCED = 8  # tokens
LENGTHS = (29, 20, 6)  # of the three sequences: several times REDUCED, and less
ALONE = 4  # tokens at the end of each that come one by one
AFFORDABLE = 2e12  # multiplications for a prompt, in about
MOST_TOKENS = 600  # whatever the model's size
FLOAT32_BYTES = 1 << 30  # of a copy of the weights
ALLOWED = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
ROUNDING = 3  # times the model's own difference, in 16 bit
HOPELESS = 0.15  # in 16 bit: nothing is compared by more rounding than that


def served_context(config: Any, otherwise: int) -> tuple[int, str | None]:
    """(tokens, why there are no more, if there were): the length up to which every position encoding is the same for all sequences."""
    context = int(getattr(config, "max_position_embeddings", None) or otherwise)
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if rope.get("rope_type", rope.get("type")) in ("longrope", "su") and original and original < context:
            return int(original), (
                f"the context is served up to {original} of {context} tokens: beyond them longrope changes the frequencies of all positions"
            )
    return context, None


def check(name: str, model: Any, layers: Mapping[str, ElasticLinear], sizes: tuple[Size, Size], context: int) -> None:
    """Raise an AcipError of one line, with the model's name and the reason, unless the engine computes what `model` does at both `sizes`.

    The model is left with the engine's attention.
    """
    try:
        with torch.inference_mode():
            thresholds = dict(_thresholds(model.config))
            tokens = min(MOST_TOKENS, int(AFFORDABLE / max(sum(p.numel() for p in model.parameters()), 1)))
            twin = _twin(model, layers) if any(count > REDUCED for count in thresholds.values()) or model.dtype.itemsize < 4 else None
            if twin is not None:
                _compare(twin, {key: twin.get_submodule(key) for key in layers}, sizes, LENGTHS, context, thresholds)
            reached = {field: count for field, count in thresholds.items() if count + REDUCED <= min(tokens, context)}
            longest = max([LENGTHS[0], *(count + REDUCED for count in reached.values())])
            _compare(model, layers, sizes, (longest, *LENGTHS[1:]), context, reached)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever an architecture makes of it
        kind = "" if isinstance(error, AcipError) else f"{type(error).__name__} in the engine's forward pass: "
        reason = " ".join(str(error).split()).rstrip(".")[:400]
        raise AcipError(
            f"{name}: {type(model).__name__} can't be served: {kind}{reason}. Export sizes with jobs/materialize.py."
        ) from error


def _compare(
    model: Any, layers: Mapping[str, Any], sizes: tuple[Size, Size], lengths: tuple[int, ...], context: int, thresholds: Mapping[str, int]
) -> None:
    mixer, device, vocabulary = Mixer(layers), model.device, model.config.get_text_config().vocab_size
    of = [sizes[0], sizes[1], sizes[1]]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (min(length, context),), generator=generator).tolist() for length in lengths]
    alone, noise = [], 0.0
    for size, row in zip(of, ids, strict=True):
        mixer.set([(size, len(row))])
        tokens = torch.tensor([row], device=device)
        whole = model(input_ids=tokens, use_cache=False).logits[0].float()
        alone.append(_token_by_token(model, tokens))
        if not bool(alone[-1].isfinite().all()):
            raise AcipError(f"its own logits are not finite in {str(model.dtype).removeprefix('torch.')}")
        noise = max(noise, _error(whole, alone[-1], model.dtype))
    limit = ALLOWED.get(model.dtype, ALLOWED[torch.float32])
    if model.dtype.itemsize < 4:
        limit = min(max(limit, ROUNDING * noise), HOPELESS)
    if not noise <= limit:
        raise AcipError(
            f"its logits differ by {noise:.2g} between one pass and token by token, so its answers depend on how they are computed"
        )
    implementation = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    together = _together(model, mixer, of, ids)
    mixer.clear()
    error = max(_error(beside, apart, model.dtype) for apart, beside in zip(alone, together, strict=True))
    if not error <= limit:
        beyond = "".join(f", beyond {field} = {count}" for field, count in thresholds.items())
        raise AcipError(
            f"tokens of several sequences in one pass change its logits by {error:.2g}{beyond} ({limit:.2g} is rounding), "
            f"so its attention or positions work in another way than with {implementation} attention"
        )


def _token_by_token(model: Any, tokens: Tensor) -> Tensor:
    """[T, V] logits of a prompt but for its last tokens, and of these one at a time, as `generate` computes them."""
    cache, found, start = DynamicCache(config=model.config), [], 0
    for stop in range(max(tokens.shape[1] - ALONE, 1), tokens.shape[1] + 1):
        places = torch.arange(start, stop, device=tokens.device)[None]
        found.append(model(input_ids=tokens[:, start:stop], position_ids=places, past_key_values=cache, use_cache=True).logits[0].float())
        start = stop
    return torch.cat(found)


def _together(model: Any, mixer: Mixer, sizes: list[Size], ids: list[list[int]]) -> list[Tensor]:
    """[T, V] logits of each sequence, in the engine: each begins a step later than the one before, in pieces, and ends token by token."""
    device, slots, found = model.device, KVCache(), [list[Tensor]() for _ in ids]
    order, past, step = (2, 0, 1), [0] * len(ids), 0  # slots not in the order of rows
    while any(done < len(row) for done, row in zip(past, ids, strict=True)):
        pieces, runs, tokens = list[CachePiece](), list[tuple[Size, int]](), list[int]()
        parts = []
        for i, row in enumerate(ids):
            prompt = max(len(row) - ALONE, 1)
            count = 0 if step < i else min(-(-prompt // 3), prompt - past[i]) if past[i] < prompt else min(1, len(row) - past[i])
            if count:
                pieces.append(CachePiece(order[i], past[i], len(tokens), len(tokens) + count))
                tokens += row[past[i] : past[i] + count]
                runs = [*runs[:-1], (sizes[i], runs[-1][1] + count)] if runs and runs[-1][0] is sizes[i] else [*runs, (sizes[i], count)]
                parts.append((i, pieces[-1]))
                past[i] += count
        more = padded(len(tokens)) - len(tokens)
        runs[-1] = (runs[-1][0], runs[-1][1] + more)
        slots.room(len(ids) + 1, max(past))
        mixer.set(runs)
        with Step.of(slots, pieces, device, more, len(ids)) as places, onednn(len(tokens) > 1):
            out = model(
                input_ids=torch.tensor([tokens + [0] * more], device=device), position_ids=places.position[None], past_key_values=slots,
                use_cache=True,
            )  # fmt: skip
        for i, piece in parts:
            found[i].append(out.logits[0, piece.start : piece.stop].float())
        step += 1
    return [torch.cat(rows) for rows in found]


def _error(found_TV: Tensor, expected_TV: Tensor, dtype: torch.dtype) -> float:
    """How far logits are from those that are expected, without what all of a token's have in common, in units of their norm."""
    difference, expected = found_TV - expected_TV, expected_TV - expected_TV.mean(-1, keepdim=True)
    error_T = (difference - difference.mean(-1, keepdim=True)).norm(dim=-1) / expected.norm(dim=-1).square().mean().sqrt().clamp_min(1e-12)
    return float(error_T.max() if dtype.itemsize >= 4 else error_T.mean())


def _twin(model: Any, layers: Mapping[str, ElasticLinear]) -> Any:
    """`model` with its weights, but with all thresholds of its config reduced; in float32 if that copy is small."""
    config = copy.deepcopy(model.config)
    for part in _parts(config):
        for field, count in _own_thresholds(part):
            setattr(part, field, min(count, REDUCED))
        for rope in _ropes(part):
            if rope.get("llama_4_scaling_beta") is not None and rope.get("original_max_position_embeddings"):
                rope["original_max_position_embeddings"] = min(rope["original_max_position_embeddings"], REDUCED)
    with init_empty_weights(include_buffers=False):
        twin = type(model)._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    kept = set(model.state_dict(keep_vars=True))
    replaced: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done in replaced):
            continue
        other = twin.get_submodule(name)
        if type(other) is not type(module):
            set_module(twin, name, module)
            replaced.append(name)
            continue
        other._parameters.update(module._parameters)
        for key, buffer in other._buffers.items():
            persistent = (f"{name}.{key}" if name else key) in kept
            other._buffers[key] = module._buffers[key] if persistent or buffer is None else buffer.to(model.device)
    if model.dtype.itemsize < 4 and 4 * sum(tensor.numel() for tensor in twin.state_dict().values()) <= FLOAT32_BYTES:
        twin = copy.deepcopy(twin).float()
    return twin.eval()


def _thresholds(config: Any) -> Iterator[tuple[str, int]]:
    """Every field of the config, and of those inside, that is a number of tokens where the model changes what it does."""
    for part in _parts(config):
        yield from _own_thresholds(part)
        for rope in _ropes(part):
            if rope.get("llama_4_scaling_beta") is not None and rope.get("original_max_position_embeddings"):
                yield "original_max_position_embeddings", rope["original_max_position_embeddings"]


def _own_thresholds(config: Any) -> Iterator[tuple[str, int]]:
    for field, value in list(vars(config).items()):
        if THRESHOLD.search(field) and not NO_THRESHOLD.search(field) and isinstance(value, int) and value is not True and value > 0:
            yield field, value


def _parts(config: Any) -> list[Any]:
    """The config, and that of the text model where it is another."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary embeddings: one for all layers, or one for each kind of them."""
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):
        if isinstance(settings, dict) and ("rope_type" in settings or "type" in settings):
            yield settings
