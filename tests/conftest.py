"""Fixtures: the small byte-level Llama of golden/, with a tokenizer, and an artifact calibrated from it in seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning pools on two cores are ten times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from acip.artifact import Artifact
from acip.base import load_base
from acip.calibrate import calibrate
from acip.data import TokenBatches
from acip.parametrise import parametrise
from acip.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden" / "reference-trace"

FLEET = """\
name: small
defaults:
  data: package:wikipedia
  eval_context: 64
  eval_windows: 8
  sizes: [1.0, 0.5]
  cpus: 1
  set: {sample_windows: 16, adapter_rank: 4, adapter_alpha: 4.0, dtype: float32, batch_size: 4, seq_len: 64, SET}
models:
"""


def write_fleet(path: Path, settings: str, *models: str) -> Path:
    """A fleet file of models that take seconds; `settings` and `models` are YAML between braces."""
    path.write_text(FLEET.replace("SET", settings) + "".join(f"  - {{{model}}}\n" for model in models))
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value: the tokenizer that golden's model was trained with."""
    alphabet = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in alphabet.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2], bos_token=alphabet[1])


@pytest.fixture(scope="session")
def golden_tokens() -> torch.Tensor:
    """[1404, 64] token windows of public-domain text."""
    return load_file(GOLDEN / "batches.safetensors")["batches"].long()


@pytest.fixture(scope="session")
def heldout_tokens() -> torch.Tensor:
    """[256, 64] held-out token windows."""
    return load_file(GOLDEN / "probe.safetensors")["hold"].long()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in transformers' format: golden's model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "small"
    shutil.copytree(GOLDEN / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quick_recipe() -> Recipe:
    """Prunes by L1, as the paper does, and reaches the stop ratio in about forty steps on the small model."""
    return Recipe(
        sample_windows=64, adapter_rank=4, adapter_alpha=4.0, adapter_dropout=0.05, dtype="float32", batch_size=4, seq_len=64,
        lr=3e-3, lambda_factor=1.2, post_tune_steps=60, scores="order",
    )  # fmt: skip


@pytest.fixture(scope="session")
def calibrated(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> Any:
    """(base, calibration) of the small model with the quick recipe."""
    base = load_base(small_base, quick_recipe.dtype)
    parametrise(base.model, quick_recipe, golden_tokens)
    return base, calibrate(base.model, TokenBatches(golden_tokens, quick_recipe.batch_size), quick_recipe)


@pytest.fixture(scope="session")
def small_artifact(calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact of the small model, saved and opened."""
    base, calibration = calibrated
    return Artifact.save(tmp_path_factory.mktemp("artifact") / "small", base, calibration, {"seed": 0})
