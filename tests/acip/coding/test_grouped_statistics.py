"""Statistics that are gathered in groups of layers equal those of one pass, and take at most the given memory."""

import resource
import signal
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from acip.calibration.memory_plan import statistics_bytes
from acip.coding.coded_model import code_model
from acip.coding.grouped_statistics import grouped_statistics, groups
from acip.coding.scratch import Scratch
from acip.coding.statistics import DrawnTokens, layer_statistics
from acip.errors import CalibrationError
from acip.layers.targets import find_linears, weight_MN
from tests.acip.layers.test_architectures import GROUPED, random_model

WINDOWS = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    return random_model(LlamaConfig(**GROUPED)).requires_grad_(False)


def bytes_of(linears: Mapping[str, nn.Module]) -> int:
    return sum(statistics_bytes(*weight_MN(layer).shape) for layer in linears.values())


def test_groups_are_the_fewest_of_consecutive_layers_within_the_limit() -> None:
    layers = {str(i): nn.Linear(N, 4, bias=False) for i, N in enumerate([8, 8, 8, 16, 8])}
    small = statistics_bytes(4, 8)
    assert [list(group) for group in groups(layers, 2 * small)] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert [list(group) for group in groups(layers, 0)] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert [list(group) for group in groups(layers, bytes_of(layers))] == [list(layers)]
    assert len(groups(layers, bytes_of(layers) - 1)) == 2
    assert groups({}) == []


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.0], ids=["one pass", "half", "a quarter", "a pass per layer"])
def test_statistics_and_codes_are_the_same_for_any_grouping(share: float, tmp_path: Path) -> None:
    model = llama()
    linears = dict(find_linears(model))
    expected = layer_statistics(model, linears, WINDOWS, seed=5)
    limit = share * bytes_of(linears)
    statistics = grouped_statistics(model, linears, WINDOWS, Scratch(tmp_path), limit, seed=5)
    assert (len(groups(linears, limit)) == 1) == (share == 1.0)
    assert list(statistics) == list(linears)
    for name, each in statistics.items():
        assert torch.equal(each.metric, expected[name].metric), name
        assert torch.equal(each.importance, expected[name].importance), name
    coded, reference = (code_model(linears, some, [2.0, 4.0]) for some in (statistics, expected))
    assert coded.order.steps == reference.order.steps
    for name, versions in coded.versions.items():
        assert [version.stream for version in versions] == [version.stream for version in reference.versions[name]]


def test_all_passes_use_the_same_drawn_tokens() -> None:
    drawn = DrawnTokens(seed=3)
    logits_SV = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    first, second = drawn.of(0, logits_SV), drawn.of(1, logits_SV)
    assert not torch.equal(first, second)
    assert torch.equal(drawn.of(0, -logits_SV), first)
    assert torch.equal(drawn.of(1, -logits_SV), second)


def test_progress_counts_the_windows_of_all_passes(tmp_path: Path) -> None:
    model, calls = llama(), list[tuple[int, int]]()
    linears = dict(find_linears(model))
    passes = len(groups(linears, bytes_of(linears) / 3))
    grouped_statistics(
        model, linears, WINDOWS, Scratch(tmp_path), bytes_of(linears) / 3, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done + 1, passes * len(WINDOWS)) for done in range(passes * len(WINDOWS))]


class TestScratch:
    def test_contents_are_read_back_after_the_object_is_gone(self, tmp_path: Path) -> None:
        scratch = Scratch(tmp_path / "new")
        parts = [b"abc", b"", bytes(10_000), b"\xff"]
        tensors = [torch.arange(12.0).view(3, 4), torch.randn(70, 70, dtype=torch.float64)]
        mapped = [scratch.add(parts), scratch.add([]), scratch.add([b""])]
        mapped_tensors = [scratch.add_tensor(tensor) for tensor in tensors]
        mapped += [scratch.add([b"later"])]
        del scratch
        assert [[bytes(part) for part in some] for some in mapped] == [parts, [], [b""], [b"later"]]
        assert all(torch.equal(read, tensor) for read, tensor in zip(mapped_tensors, tensors, strict=True))

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

    def test_a_transposed_tensor_keeps_its_values(self, tmp_path: Path) -> None:
        tensor: Tensor = torch.arange(12.0).view(3, 4).T
        assert torch.equal(Scratch(tmp_path).add_tensor(tensor), tensor)

    def test_the_file_has_no_name(self, tmp_path: Path) -> None:
        """So it cannot be left behind."""
        scratch = Scratch(tmp_path)
        scratch.add([b"content"])
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CalibrationError, match=r"cannot be written in .*file: .* set ACIP_HOME"):
            Scratch(tmp_path / "file")


def test_smaller_limits_need_more_passes() -> None:
    linears = dict(find_linears(llama()))
    counts = [len(groups(linears, bytes_of(linears) / parts)) for parts in (1, 2, 4, 8, 100)]
    assert counts[0] == 1
    assert counts[-1] == len(linears)
    assert all(fewer <= more for fewer, more in pairwise(counts))
