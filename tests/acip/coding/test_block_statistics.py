"""Statistics that are gathered a block at a time equal those of the whole model, in little memory, and survive the end of the process."""

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Qwen3Config

from acip.calibration.block_pass import PassFiles
from acip.coding.block_statistics import StoredStatistics, block_statistics
from acip.coding.coded_model import code_model
from acip.coding.scratch import Scratch
from acip.coding.statistics import layer_statistics
from acip.errors import BaseModelError, CalibrationError, DataError
from acip.layers.block_chain import BlockChain
from acip.layers.targets import find_linears
from tests.acip.layers.test_architectures import GROUPED, random_model

WINDOWS = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(1))


def llama(**changes: Any) -> nn.Module:
    return random_model(LlamaConfig(**GROUPED | changes)).requires_grad_(False)


def gathered(model: nn.Module, folder: Path, names: str = "", **options: Any) -> StoredStatistics:
    linears = {name: layer for name, layer in find_linears(model).items() if names in name}
    return block_statistics(BlockChain(model), linears, WINDOWS, PassFiles(folder / "pass"), "cpu", seed=5, **options)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        Qwen3Config(**GROUPED, head_dim=16),
        Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4),
        OPTConfig(vocab_size=256, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_statistics_and_codes_equal_those_of_the_whole_model(config: Any, tmp_path: Path) -> None:
    model = random_model(config).requires_grad_(False)
    linears = dict(find_linears(model))
    expected = layer_statistics(model, linears, WINDOWS, seed=5)
    found = gathered(model, tmp_path)
    assert list(found) == list(linears)
    for name, each in found.items():
        assert torch.equal(each.metric, expected[name].metric), name
        assert torch.equal(each.importance, expected[name].importance), name
    coded, reference = (code_model(linears, some, [2.0, 4.0]) for some in (found, expected))
    for name, versions in coded.versions.items():
        assert [version.stream for version in versions] == [version.stream for version in reference.versions[name]]


def test_weights_are_unchanged_and_trainable_as_before(tmp_path: Path) -> None:
    model = llama().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gathered(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("at", range(1, 9))
def test_a_pass_that_was_interrupted_continues_after_the_last_finished_block(at: int, tmp_path: Path) -> None:
    """Four blocks are computed twice each."""
    model = llama(num_hidden_layers=4)
    expected = layer_statistics(model, dict(find_linears(model)), WINDOWS, seed=5)

    def kill(done: int, total: int) -> None:
        assert total == 8
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        gathered(model, tmp_path, progress=kill)
    later = list[int]()
    found = gathered(model, tmp_path, progress=lambda done, total: later.append(done))
    assert at < 4 or later == list(range(at + 1 if at > 4 else 1, 9))
    for name, each in found.items():
        assert torch.equal(each.metric, expected[name].metric), name


def test_finished_files_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    first = gathered(model, tmp_path)
    monkeypatch.setattr(BlockChain, "block", lambda *args: pytest.fail("a finished block was computed"))
    assert all(torch.equal(each.metric, first[name].metric) for name, each in gathered(model, tmp_path).items())


def test_dropped_statistics_leave_the_disk_and_are_gathered_again_if_they_are_wanted(tmp_path: Path) -> None:
    model, files = llama(num_hidden_layers=4), PassFiles(tmp_path / "pass")
    linears = dict(find_linears(model))
    found = gathered(model, tmp_path)
    expected = dict(found)
    first = list(linears)[: len(linears) // 4]
    found.drop(first[:-1])
    assert files.has("statistics", 0), "a layer of this block is not coded yet"
    found.drop(first[-1:])
    assert not files.has("statistics", 0)
    assert list(found) == list(linears)[len(first) :]
    passes = list[int]()
    gathered(model, tmp_path, "layers.3.", progress=lambda done, total: passes.append(done))
    assert not passes, "all statistics that are wanted are still there"
    for name, each in gathered(model, tmp_path).items():
        assert torch.equal(each.metric, expected[name].metric), name


def test_blocks_before_the_first_wanted_layer_get_no_backward_pass(tmp_path: Path) -> None:
    model = llama()
    found = gathered(model, tmp_path, "layers.1.")
    assert {name.split(".")[2] for name in found} == {"1"}
    assert not PassFiles(tmp_path / "pass").has("statistics", 0)


def test_a_layer_that_is_not_reached_is_named(tmp_path: Path) -> None:
    model = random_model(MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(BaseModelError, match="experts"):
        gathered(model, tmp_path)


def test_a_model_in_training_mode_has_the_same_statistics_and_stays_in_it(tmp_path: Path) -> None:
    """GPT-2 has dropout by default."""
    model = random_model(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4)).requires_grad_(False)
    linears = dict(find_linears(model))
    expected = layer_statistics(model, linears, WINDOWS, seed=5)
    model.train()
    for found in (layer_statistics(model, linears, WINDOWS, seed=5), gathered(model, tmp_path)):
        assert all(torch.equal(found[name].metric, each.metric) for name, each in expected.items())
    assert all(module.training for module in model.modules())


def test_windows_without_a_token_to_predict_are_refused(tmp_path: Path) -> None:
    model = llama()
    linears = dict(find_linears(model))
    for windows in (WINDOWS[:0], WINDOWS[:, :0]):
        with pytest.raises(DataError, match="n at least 1 and T at least 2"):
            layer_statistics(model, linears, windows)
        with pytest.raises(DataError, match="n at least 1 and T at least 2"):
            block_statistics(BlockChain(model), linears, windows, PassFiles(tmp_path), "cpu")


def test_a_disk_that_is_too_small_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CalibrationError, match=r"need up to .* GB in .* but 0.0 GB are free. Free space"):
        gathered(llama(), tmp_path)
    assert not (tmp_path / "pass").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("")
    with pytest.raises(CalibrationError, match=r"pass.* cannot be written: .* set ACIP_HOME"):
        gathered(llama(), tmp_path)


class TestScratch:
    def test_contents_are_read_back_after_the_object_is_gone(self, tmp_path: Path) -> None:
        scratch = Scratch(tmp_path / "new")
        parts = [b"abc", b"", bytes(10_000), b"\xff"]
        mapped = [scratch.add(parts), scratch.add([]), scratch.add([b""])]
        mapped += [scratch.add([b"later"])]
        del scratch
        assert [[bytes(part) for part in some] for some in mapped] == [parts, [], [b""], [b"later"]]

    def test_contents_fill_several_segments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("acip.coding.scratch.SEGMENT", 4096)
        scratch = Scratch(tmp_path)
        contents = [[bytes([i]) * (700 * i), bytes([i]) * 3] for i in range(20)]
        mapped = [scratch.add(parts) for parts in contents]
        assert [[bytes(part) for part in parts] for parts in mapped] == contents

    def test_many_contents_need_few_open_files(self, tmp_path: Path) -> None:
        """A mapping takes an open file, of which a process may have 1024 only."""
        scratch = Scratch(tmp_path)
        mapped = [scratch.add([i.to_bytes(4, "little")]) for i in range(5000)]
        assert [int.from_bytes(part, "little") for (part,) in mapped] == list(range(5000))

    def test_a_full_disk_is_reported(self, tmp_path: Path) -> None:
        """The process may write 1 MB to a file; the operating system's error is that of a file that is too large."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        try:
            with pytest.raises(CalibrationError, match=r"a temporary file of 0.01 GB cannot be written in .*: File too large"):
                Scratch(tmp_path).add([bytes(10**7)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    def test_the_file_has_no_name(self, tmp_path: Path) -> None:
        """So it cannot be left behind."""
        scratch = Scratch(tmp_path)
        scratch.add([b"content"])
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CalibrationError, match=r"cannot be written in .*file: .* set ACIP_HOME"):
            Scratch(tmp_path / "file")
