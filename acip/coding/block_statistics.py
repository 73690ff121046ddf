"""Statistics of all layers of a model that need not fit in memory: one block at a time, with everything else in files.

    forward     hidden states of all windows before each block        hidden-000.safetensors, ...
    loss        gradients after the last block                        gradients-032.safetensors
    backward    block by block from the last to the first: gradients before the block, and the statistics of its layers
                                                                      statistics-031.safetensors, ...

A block is computed once in the forward and once in the backward pass, and its weights are on the device only then. The results equal those
of `acip.coding.statistics.layer_statistics`, bit for bit on a CPU.

Every file is complete when it has its name, so that a process that is started again continues after the last finished block. The
statistics of a block can be dropped as soon as its layers are coded.

Legend: T = tokens of a window, D = width of the hidden states.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from acip.calibration.losses import DrawnTokens, sampled_loss
from acip.calibration.memory_plan import statistics_bytes
from acip.calibration.training_mode import frozen
from acip.coding.statistics import LayerStatistics, LayerSums, require_reached
from acip.errors import CalibrationError
from acip.layers.block_chain import BlockChain, placed, tensors
from acip.layers.targets import hooked, weight_MN

REMEDY = "Free space on its disk, or set ACIP_HOME to a folder on a larger one."


class PassFiles:
    """The files of one pass over the blocks, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:03}.safetensors"

    def has(self, kind: str, number: int) -> bool:
        return self.path(kind, number).is_file()

    def put(self, kind: str, number: int, some: Mapping[str, Tensor]) -> None:
        """Write tensors. Raises CalibrationError if the file cannot be written."""
        path = self.path(kind, number)
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in some.items()}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path} cannot be written: {error}. {REMEDY}") from error

    def get(self, kind: str, number: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a file, or some of them. They are mapped: their pages are in memory only while there is room for them."""
        try:
            with safe_open(self.path(kind, number), "pt") as file:
                return {name: file.get_tensor(name) for name in names or file.keys()}
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{self.path(kind, number)} cannot be read: {error}. Remove its folder.") from error

    def drop(self, kind: str, number: int) -> None:
        self.path(kind, number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
    counts blocks, twice each. Raises CalibrationError if the loss does not depend on a layer, or if a file cannot be written.
    """
    _check_disk(files.folder, chain, linears, windows)
    this = _Pass(chain, chain.parts(linears), [window[None].long().to(device) for window in windows], files, device)
    with placed(chain.outside(), device), frozen(chain.model):
        this.run(seed, progress)
    return StoredStatistics(files, this.parts)


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


class _Pass:
    """A forward and a backward pass over all windows, a block at a time."""

    def __init__(
        self, chain: BlockChain, parts: list[dict[str, nn.Module]], ids: list[Tensor], files: PassFiles, device: torch.device | str
    ) -> None:
        self.chain, self.parts, self.ids, self.files, self.device = chain, parts, ids, files, device
        self.blocks = list(chain.blocks.values())

    def run(self, seed: int, progress: Callable[[int, int], None]) -> None:
        """Compute the files that do not exist yet."""
        count = len(self.blocks)
        done = next((i for i in range(count + 1) if self.files.has("gradients", i)), None)
        if done is not None and any(part and not self.files.has("statistics", i) for i, part in enumerate(self.parts) if i >= done):
            self.files.remove()  # a block whose statistics were dropped is wanted again
            done = None
        if done is None:
            for i in range(count):
                self.forward(i)
                progress(i + 1, 2 * count)
            self.loss(seed)
            done = count
        first = min((i for i, part in enumerate(self.parts) if part), default=count)
        for i in range(done - 1, first - 1, -1):
            self.backward(i)
            progress(2 * count - i, 2 * count)

    @torch.no_grad()
    def forward(self, i: int) -> None:
        """Compute the hidden states after block `i`."""
        if not self.files.has("hidden", 0):
            self.keep("hidden", 0, [self.chain.embed(ids_1T).cpu() for ids_1T in self.ids])
        if not self.files.has("hidden", i + 1):
            with placed(tensors(self.blocks[i]), self.device):
                windows = zip(self.ids, self.read("hidden", i), strict=True)
                self.keep("hidden", i + 1, [self.chain.block(i, ids_1T, hidden_1TD).cpu() for ids_1T, hidden_1TD in windows])

    def loss(self, seed: int) -> None:
        """Compute the gradients after the last block."""
        end, drawn, gradients = len(self.blocks), DrawnTokens(seed), []
        for ids_1T, hidden_1TD in zip(self.ids, self.read("hidden", end), strict=True):
            with torch.enable_grad():
                sampled_loss(self.chain.logits(ids_1T, hidden_1TD.requires_grad_())[0], drawn).backward()
            gradients.append(_gradient(hidden_1TD))
        self.keep("gradients", end, gradients)
        self.files.drop("hidden", end)

    def backward(self, i: int) -> None:
        """Compute the statistics of block `i`, and the gradients before it."""
        layers, gradients = self.parts[i], []
        with placed(tensors(self.blocks[i]), self.device):
            sums = {name: LayerSums(layer) for name, layer in layers.items()}
            with hooked(layer.register_forward_hook(sums[name].hook) for name, layer in layers.items()), torch.enable_grad():
                for ids_1T, hidden_1TD, after_1TD in zip(self.ids, self.read("hidden", i), self.read("gradients", i + 1), strict=True):
                    self.chain.block(i, ids_1T, hidden_1TD.requires_grad_()).backward(after_1TD)
                    gradients.append(_gradient(hidden_1TD))
            require_reached(sums)
            found = {name: each.statistics(sum(ids_1T.numel() for ids_1T in self.ids)) for name, each in sums.items()}
        self.files.put("statistics", i, {f"{name}.{key}": tensor for name, each in found.items() for key, tensor in vars(each).items()})
        self.keep("gradients", i, gradients)
        self.files.drop("gradients", i + 1)
        self.files.drop("hidden", i)

    def read(self, kind: str, number: int) -> list[Tensor]:
        """Return what `keep` has written."""
        found = self.files.get(kind, number)
        return [found[str(i)].to(self.device) for i in range(len(self.ids))]

    def keep(self, kind: str, number: int, values: list[Tensor]) -> None:
        """Write one tensor [1, T, D] per window."""
        self.files.put(kind, number, {str(i): value for i, value in enumerate(values)})


def _gradient(x: Tensor) -> Tensor:
    """Return the gradient of `x` in the memory of the CPU."""
    assert x.grad is not None
    return x.grad.cpu()


def _check_disk(folder: Path, chain: BlockChain, linears: Mapping[str, nn.Module], windows: Tensor) -> None:
    """Raise CalibrationError if the files of a pass do not fit on the disk."""
    width = max(weight_MN(layer).shape[1] for layer in linears.values())
    needed = pass_bytes(linears, len(chain), windows.numel() * width * weight_MN(next(iter(linears.values()))).itemsize)
    parent = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(parent).free + sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
    if free < needed:
        raise CalibrationError(f"the statistics need up to {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} GB are free. {REMEDY}")


def pass_bytes(linears: Mapping[str, nn.Module], blocks: int, hidden_bytes: float) -> float:
    """Return the bytes of the files of a pass, at most. `hidden_bytes` are those of the hidden states at one place, of all windows."""
    return sum(statistics_bytes(*weight_MN(layer).shape) for layer in linears.values()) + (blocks + 3) * hidden_bytes
