"""Folders that are not a checkpoint in the published format, or not of this base model, are refused, and none of their code runs."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acip.artifact.published import INDEX, WEIGHTS, open_published
from acip.base import digest, load_base
from acip.errors import ArtifactError
from acip.layers.targets import targets
from tests.acip.artifact.test_published import CHECKPOINT, Config, Tensors, shard, write

Q = "model.model.layers.0.self_attn.q_proj"
P = f"{Q}.base_layer.parametrization"


def _set(*path: str, to: Any) -> Callable[[Config, Tensors], None]:
    def change(config: Config, _: Tensors) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return change


def _tensor(key: str, make: Callable[[Tensor], Tensor | None]) -> Callable[[Config, Tensors], None]:
    def change(_: Config, tensors: Tensors) -> None:
        result = make(tensors.pop(key))
        if result is not None:
            tensors[key] = result

    return change


def _broken(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(0),), torch.tensor(value))


LORA = ("adapter_config", "peft_config", "default")
FACTORY = ("parametrization_config", "module_factory_kwargs")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda config, _: config.pop("parametrization_config"), "not a checkpoint in the published ACIP format"),
        (_set("parametrization_config", "module_factory_cls", to="qr"), "only 'svd'"),
        (_set("parametrization_config", to=[1]), "must be a JSON object"),
        (_set(*FACTORY, "mask_scaling_factor", to="norm"), "mask_scale is 'norm'; it must be a number"),
        (_set(*FACTORY, "mask_scaling_factor", to=-1.0), "mask_scale is -1.0; it must be > 0"),
        (_set(*FACTORY, "mask_scaling_factor", to=float("inf")), "mask_scale is inf; it must be finite"),
        (_set("adapter_config", "peft_config", "second", to={}), "has the adapters default, second"),
        (_set(*LORA, "use_dora", to=True), "use_dora is True; it must be False"),
        (_set(*LORA, "rank_pattern", to={"q_proj": 4}), "rank_pattern is .* a plain LoRA"),
        (_set(*LORA, "r", to=16), r"lora_A.default.weight is F32 \[8, .*it must be \[16, "),
        (_set(*LORA, "r", to=None), "adapter_rank is None; it must be a whole number"),
        (_tensor(f"{P}.mask_score", lambda t: None), "lacks the tensor model.*q_proj.*mask_score.*Fetch"),
        (_tensor(f"{P}.mask", lambda t: None), "lacks the tensor model.*q_proj.*mask"),
        (_tensor(f"{P}.mask_score", lambda t: t[1:]), r"is F32 \[95\]; it must be \[96\]"),
        (_tensor(f"{P}.ortho.weight", lambda t: t[:, :40]), r"is F32 \[96, 40\]; it must be \[96, 96\].*compressed"),
        (_tensor(f"{P}.base.weight", lambda t: t.to(torch.uint8)), "is U8 .*quantized"),
        (_tensor(f"{P}.mask_score", _broken(float("nan"))), "mask_score holds NaN or infinity"),
        (_tensor(f"{Q}.lora_B.default.weight", _broken(float("inf"))), "lora_B.default.weight holds NaN or infinity"),
        (_tensor(f"{P}.base.weight", lambda t: t * 1.01), "is not the base model.*q_proj differ by 1.0%; rounding explains"),
        (_tensor("model.model.norm.weight", lambda t: t + 1e-6), "is not the base model.*model.norm.weight differs"),
        (_tensor("model.model.norm.weight", lambda t: t.bfloat16()), "is not the base model.*model.norm.weight differs"),
        (lambda _, tensors: tensors.update({"model.extra": torch.zeros(1)}), "holds model.extra, which is neither in the published format"),
        (
            lambda _, tensors: tensors.update({key.replace("layers.0.", "layers.9."): t.clone() for key, t in tensors.items() if P in key}),
            "is not the base model.*no linear layer model.layers.9.self_attn.q_proj",
        ),
        (lambda _, tensors: [tensors.pop(key) for key in list(tensors) if "ortho" in key], "holds no layer in the published format"),
        (
            lambda _, tensors: tensors.update({key: t.abs() + 1 for key, t in tensors.items() if key.endswith("mask_score")}),
            "every score is above 0",
        ),
    ],
)
def test_a_malformed_checkpoint_is_refused(
    small_base: str, tmp_path: Path, harm: Callable[[Config, Tensors], object], message: str
) -> None:
    """The base model that was passed in does not change."""
    folder = write(tmp_path / "bad", harm)
    base = load_base(small_base, "float32")
    with pytest.raises(ArtifactError, match=message):
        open_published(folder, base)
    assert digest(base.model) == base.digest
    assert not targets(base.model)


def _index(**change: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        index = json.loads((shard(folder) / INDEX).read_text())
        index["weight_map"].update(change)
        (folder / INDEX).write_text(json.dumps(index))

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "No such file.*not a checkpoint folder"),
        (lambda folder: (folder / "config.json").write_bytes(b"\x80\x04"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is a list; it must be a JSON object"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights; it must hold model.safetensors"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "only pytorch_model.bin, a pickle, which can run code"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]), "can't be read.*Fetch"),
        (_index(**{"model.lm_head.weight": "../model.safetensors"}), "names '../model.safetensors'; only .safetensors files beside it"),
        (_index(**{"model.lm_head.weight": "/tmp/model.safetensors"}), "names '/tmp/model.safetensors'; only"),
        (_index(**{"model.lm_head.weight": "..\\model.safetensors"}), "only .safetensors files beside it"),
        (_index(**{"model.lm_head.weight": "pytorch_model.bin"}), "names 'pytorch_model.bin'; only"),
        (_index(**{"model.lm_head.weight": "model-00003-of-00003.safetensors"}), "model-00003-of-00003.safetensors can't be read"),
        (_index(**{"model.none.weight": "model-00001-of-00002.safetensors"}), "lacks model.none.weight, although .* lists it there"),
        (lambda folder: (shard(folder) / INDEX).write_text('{"weight_map": []}'), "has no 'weight_map'"),
    ],
)
def test_damaged_or_unsafe_files_are_refused(small_base: str, tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    folder = write(tmp_path / "bad")
    harm(folder)
    with pytest.raises(ArtifactError, match=message):
        open_published(folder, small_base)


def test_another_base_model_is_refused(small_base: str, tmp_path: Path) -> None:
    other = shutil.copytree(small_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ArtifactError, match=r"other' is not the base model .* \('base'; give that one\): the weights of model.layers.3.mlp.up_proj"
    ):
        open_published(CHECKPOINT, str(other))
    with pytest.raises(ArtifactError, match=r"base model 'base', which is not a hub id. Give the base model"):
        open_published(CHECKPOINT)
    with pytest.raises(ArtifactError, match=r"is in torch.bfloat16; load it in the checkpoint's dtype, float32"):
        open_published(CHECKPOINT, load_base(small_base, "bfloat16"))


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_no_code_of_the_folder_runs(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds a code file, which the config names in `auto_map`, and a pickle."""
    trace = tmp_path / "trace"
    folder = write(tmp_path / "checkpoint")
    (folder / "acip_model.py").write_text(f"open({str(trace)!r}, 'w')")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trace)))
    monkeypatch.chdir(folder)
    open_published(folder, small_base)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="a pickle"):
        open_published(folder, small_base)
    assert not trace.exists()
    assert "acip_model" not in sys.modules
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "unpickling would have created the file"
