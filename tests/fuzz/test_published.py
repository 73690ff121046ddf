"""Checkpoints in the published format that hold anything: a calibration, or an ArtifactError; never another exception."""

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
CONFIGURED: dict[str, Any] = json.loads((CHECKPOINT / CONFIG).read_text())
OURS = {key: CONFIGURED[key] for key in ("parametrization_config", "adapter_config", "base_model_config")}


@pytest.fixture(scope="module")
def base(small_base: str) -> Base:
    return load_base(small_base, "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden's checkpoint; one thing in it is exchanged and put back by each case."""
    folder = tmp_path_factory.mktemp("published")
    for file in (CONFIG, WEIGHTS):
        (folder / file).write_bytes((CHECKPOINT / file).read_bytes())
    return folder


def opened(folder: Path, base: Base) -> None:
    """What is opened has finite scores, and the base model stays as it is: each case has a copy."""
    before = {path.name for path in folder.iterdir()}
    with contextlib.suppress(AcipError):
        _, calibration = open_published(folder, copy.deepcopy(base))
        assert torch.isfinite(calibration.scores.score).all()
        assert 0 < calibration.recipe.stop_ratio < 1
    assert {path.name for path in folder.iterdir()} == before


def test_the_checkpoint_is_opened_without_harm(folder: Path, base: Base) -> None:
    _, calibration = open_published(folder, copy.deepcopy(base))
    assert len(calibration.table.layers) > 9


@fuzz(harmed(OURS, ANYTHING), share=0.5)
def test_configs(folder: Path, base: Base, config: Any) -> None:
    try:
        content = json.dumps({**CONFIGURED, **config} if isinstance(config, dict) else config)
    except ValueError:  # an int that Python does not write
        content = json.dumps(CONFIGURED)[:-1] + ', "n": ' + "9" * 5000 + "}"
    (folder / CONFIG).write_text(content)
    opened(folder, base)
    (folder / CONFIG).write_bytes((CHECKPOINT / CONFIG).read_bytes())


@fuzz(st.data(), share=0.3)
def test_tensors(folder: Path, base: Base, data: st.DataObject) -> None:
    """One is missing, renamed, or of other numbers, another shape or dtype."""
    tensors = load_file(CHECKPOINT / WEIGHTS)
    key = data.draw(st.sampled_from(sorted(tensors)))
    harm = data.draw(st.sampled_from(["lost", "renamed", "shape", "dtype", "value"]))
    tensor = tensors.pop(key)
    if harm == "renamed":
        tensors[data.draw(st.text(max_size=8)) + key[data.draw(st.integers(0, len(key))) :]] = tensor
    elif harm == "shape":
        tensors[key] = tensor.flatten()[: data.draw(st.integers(0, 9))].reshape([-1, *[1] * data.draw(st.integers(0, 3))])
    elif harm == "dtype":
        tensors[key] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int8, torch.bool])))
    elif harm == "value":
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.floats(width=32))
        tensors[key] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    opened(folder, base)
    (folder / WEIGHTS).write_bytes((CHECKPOINT / WEIGHTS).read_bytes())


@fuzz(st.data(), share=0.5)
def test_bytes_of_the_header(folder: Path, base: Base, data: st.DataObject) -> None:
    content = bytearray((CHECKPOINT / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for at in data.draw(st.lists(st.integers(0, end), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    opened(folder, base)
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
    opened(folder, base)
