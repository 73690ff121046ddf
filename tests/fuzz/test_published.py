"""Fuzz tests of checkpoints in the published format: opening one returns a calibration or raises an AcipError."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from acip.artifact.published import CONFIG, INDEX, WEIGHTS, open_published
from acip.base import Base, load_base
from acip.errors import AcipError
from tests.acip.artifact.test_published import CHECKPOINT, shard
from tests.support.fuzzing import NUMBERS, WORDS, fuzz, harmed

ANYTHING = st.none() | st.booleans() | NUMBERS | WORDS | st.lists(st.integers(-2, 9), max_size=3) | st.just({"": {"a": 1}})
GOLDEN_CONFIG: dict[str, Any] = json.loads((CHECKPOINT / CONFIG).read_text())
ACIP_FIELDS = {key: GOLDEN_CONFIG[key] for key in ("parametrization_config", "adapter_config", "base_model_config")}


@pytest.fixture(scope="module")
def base(small_base: str) -> Base:
    return load_base(small_base, "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the golden checkpoint. Each case changes one file in it and restores that file."""
    folder = tmp_path_factory.mktemp("published")
    for file in (CONFIG, WEIGHTS):
        (folder / file).write_bytes((CHECKPOINT / file).read_bytes())
    return folder


def open_and_check(folder: Path, base: Base) -> None:
    """Open the checkpoint with a copy of the base model. Assert that the scores are finite and no file is added or removed."""
    before = {path.name for path in folder.iterdir()}
    with contextlib.suppress(AcipError):
        _, calibration = open_published(folder, copy.deepcopy(base))
        assert torch.isfinite(calibration.scores.score).all()
        assert 0 < calibration.recipe.stop_ratio < 1
    assert {path.name for path in folder.iterdir()} == before


def test_the_golden_checkpoint_opens(folder: Path, base: Base) -> None:
    _, calibration = open_published(folder, copy.deepcopy(base))
    assert len(calibration.table.layers) > 9


@fuzz(harmed(ACIP_FIELDS, ANYTHING), share=0.5)
def test_configs(folder: Path, base: Base, config: Any) -> None:
    try:
        content = json.dumps({**GOLDEN_CONFIG, **config} if isinstance(config, dict) else config)
    except ValueError:  # Python refuses to print very long ints
        content = json.dumps(GOLDEN_CONFIG)[:-1] + ', "n": ' + "9" * 5000 + "}"
    (folder / CONFIG).write_text(content)
    open_and_check(folder, base)
    (folder / CONFIG).write_bytes((CHECKPOINT / CONFIG).read_bytes())


@fuzz(st.data(), share=0.3)
def test_tensors(folder: Path, base: Base, data: st.DataObject) -> None:
    """One tensor is missing, renamed, or has another value, shape, or dtype."""
    tensors = load_file(CHECKPOINT / WEIGHTS)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["lost", "renamed", "shape", "dtype", "value"]))
    tensor = tensors.pop(key)
    if change == "renamed":
        tensors[data.draw(st.text(max_size=8)) + key[data.draw(st.integers(0, len(key))) :]] = tensor
    elif change == "shape":
        tensors[key] = tensor.flatten()[: data.draw(st.integers(0, 9))].reshape([-1, *[1] * data.draw(st.integers(0, 3))])
    elif change == "dtype":
        tensors[key] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int8, torch.bool])))
    elif change == "value":
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.floats(width=32))
        tensors[key] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    open_and_check(folder, base)
    (folder / WEIGHTS).write_bytes((CHECKPOINT / WEIGHTS).read_bytes())


@fuzz(st.data(), share=0.5)
def test_header_bytes(folder: Path, base: Base, data: st.DataObject) -> None:
    content = bytearray((CHECKPOINT / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, end), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    open_and_check(folder, base)
    (folder / WEIGHTS).write_bytes((CHECKPOINT / WEIGHTS).read_bytes())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("shards")
    for file in (CONFIG, WEIGHTS):
        (folder / file).write_bytes((CHECKPOINT / file).read_bytes())
    return folder, json.loads((shard(folder) / INDEX).read_text())


@fuzz(st.data(), share=0.3)
def test_indices(shards: tuple[Path, Any], base: Base, data: st.DataObject) -> None:
    folder, index = shards
    try:
        content = json.dumps(data.draw(harmed(index, ANYTHING, most=2))).encode()
    except ValueError:
        content = b"9" * 5000
    (folder / INDEX).write_bytes(content)
    open_and_check(folder, base)
