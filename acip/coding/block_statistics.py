"""Statistics of all layers of a model that need not fit in memory (acip.calibration.block_pass).

The results equal those of `acip.coding.statistics.layer_statistics`, bit for bit on a CPU. The statistics of a block can be dropped as
soon as its layers are coded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from acip.calibration.block_pass import BlockPass, PassFiles
from acip.calibration.losses import sampled_loss
from acip.calibration.memory_plan import statistics_bytes
from acip.calibration.training_mode import frozen
from acip.coding.statistics import LayerStatistics, LayerSums, require_reached
from acip.data import check_windows
from acip.layers.block_chain import BlockChain, placed
from acip.layers.targets import hooked, weight_MN


def block_statistics(
    chain: BlockChain,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    files: PassFiles,
    device: torch.device | str,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "StoredStatistics":
    """Return the statistics of `linears`, layers of the blocks of `chain`, from token ids [n, T]. They are read from files when asked for.

    The model's parameters get no gradients, and stay where they are; those of a block are on `device` while it is computed. `progress`
    counts blocks, twice each. Raises CalibrationError if the loss does not depend on a layer, or if a file cannot be written,
    and DataError if `windows` are not [n, T].
    """
    check_windows(windows)
    width = max(weight_MN(layer).shape[1] for layer in linears.values())
    hidden_bytes = windows.numel() * width * weight_MN(next(iter(linears.values()))).itemsize
    files.require_space("the statistics", pass_bytes(linears, len(chain), hidden_bytes))
    parts = chain.parts(linears)

    @contextmanager
    def gather(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
        sums, found = {name: LayerSums(layer) for name, layer in layers.items()}, dict[str, Tensor]()
        with hooked(layer.register_forward_hook(sums[name].hook) for name, layer in layers.items()):
            yield found
        require_reached(sums)
        for name, each in sums.items():
            found |= {f"{name}.{key}": tensor for key, tensor in vars(each.statistics(windows.numel())).items()}

    with placed(chain.outside(), device), frozen(chain.model):
        passes = BlockPass(chain, parts, (window[None] for window in windows), files, device)
        passes.run(lambda number, logits_1TV, ids_1T: sampled_loss(logits_1TV[0], number, seed), gather, progress)
    return StoredStatistics(files, parts)


class StoredStatistics(Mapping[str, LayerStatistics]):
    """The statistics of layers by name, in one file per block."""

    def __init__(self, files: PassFiles, parts: list[dict[str, nn.Module]]) -> None:
        self.files = files
        self.numbers = {name: number for number, part in enumerate(parts) for name in part}

    def __getitem__(self, name: str) -> LayerStatistics:
        """Read the statistics of one layer."""
        some = self.files.get("statistics", self.numbers[name], [f"{name}.{key}" for key in ("metric", "importance")])
        return LayerStatistics(*some.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def drop(self, names: Iterable[str]) -> None:
        """Forget the statistics of these layers. The file of a block is removed when those of all its layers are forgotten."""
        dropped = {self.numbers.pop(name) for name in names}
        for number in dropped - set(self.numbers.values()):
            self.files.drop("statistics", number)


def pass_bytes(linears: Mapping[str, nn.Module], blocks: int, hidden_bytes: float) -> float:
    """Return the bytes of the files of a pass, at most. `hidden_bytes` are those of the hidden states at one place, of all windows."""
    return sum(statistics_bytes(*weight_MN(layer).shape) for layer in linears.values()) + (blocks + 3) * hidden_bytes
