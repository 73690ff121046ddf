"""A forward and a backward pass through a model that need not fit in memory: one block at a time, with everything else in files.

    forward     hidden states of all batches before each block        hidden-000.safetensors, ...
    loss        gradients after the last block                        gradients-032.safetensors
    backward    block by block from the last to the first: gradients before the block, and values gathered from its layers
                                                                      statistics-031.safetensors, ...

A block is computed once in the forward and once in the backward pass, and its weights are on the device only then. A file
gets its name when it is complete, so that a process that is started again continues after the last finished block.

Legend: B = windows of a batch, T = tokens of a window, D = width of the hidden states, V = size of the vocabulary.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from acip.errors import CalibrationError
from acip.layers.block_chain import BlockChain, placed, tensors

REMEDY = "Free space on its disk, or set ACIP_HOME to a folder on a larger one."

Layer = TypeVar("Layer", bound=nn.Module)
Loss = Callable[[int, Tensor, Tensor], Tensor]  # (number of the batch, logits [B, T, V], token ids [B, T]) -> loss
# A context in which the layers of a block are differentiated. At its end, the mapping holds the values gathered from them.
Gather = Callable[[Mapping[str, Layer]], AbstractContextManager[Mapping[str, Tensor]]]
Progress = Callable[[int, int], None]  # (done, total)


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
                return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{self.path(kind, number)} cannot be read: {error}. Remove its folder.") from error

    def drop(self, kind: str, number: int) -> None:
        self.path(kind, number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def require_space(self, what: str, needed: float) -> None:
        """Raise CalibrationError if `needed` bytes of `what` do not fit on the disk, beside what the folder holds of them already."""
        parent = next(each for each in (self.folder, *self.folder.parents) if each.exists())
        free = shutil.disk_usage(parent).free + sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        if free < needed:
            raise CalibrationError(f"{what} need up to {needed / 1e9:.1f} GB in {self.folder}, but {free / 1e9:.1f} GB are free. {REMEDY}")


class BlockPass(Generic[Layer]):
    """The passes of batches of token ids [B, T] through the blocks of `chain`.

    `parts` are the layers of each block from which values are gathered. The parameters of the model are frozen, and those outside of the
    blocks are on `device`.
    """

    def __init__(
        self,
        chain: BlockChain,
        parts: Sequence[Mapping[str, Layer]],
        batches: Iterable[Tensor],
        files: PassFiles,
        device: torch.device | str,
    ) -> None:
        self.chain, self.parts, self.files, self.device = chain, parts, files, device
        self.ids = [ids_BT.long().to(device) for ids_BT in batches]
        self.blocks = list(chain.blocks.values())

    def run(self, loss: Loss, gather: Gather[Layer], progress: Progress = lambda done, total: None) -> None:
        """Compute the files `statistics` of all blocks that have layers in `parts`. `progress` counts blocks, twice each."""
        count = len(self.blocks)
        done = next((i for i in range(count + 1) if self.files.has("gradients", i)), None)
        if done is not None and any(part and not self.files.has("statistics", i) for i, part in enumerate(self.parts) if i >= done):
            self.files.remove()  # a block whose statistics were dropped is wanted again
            done = None
        if done is None:
            for i in range(count):
                self.reach(i + 1)
                progress(i + 1, 2 * count)
            self.differentiate(loss)
            done = count
        first = min((i for i, part in enumerate(self.parts) if part), default=count)
        for i in range(done - 1, first - 1, -1):
            self.backward(i, gather)
            progress(2 * count - i, 2 * count)

    @torch.no_grad()
    def reach(self, i: int) -> None:
        """Compute the hidden states before block `i`, from the last ones that are in a file."""
        last = next((k for k in range(i, -1, -1) if self.files.has("hidden", k)), None)
        if last is None:
            self.keep("hidden", 0, [self.chain.embed(ids_BT).cpu() for ids_BT in self.ids])
        for k in range(last or 0, i):
            self.forward(k)

    @torch.no_grad()
    def forward(self, i: int, before_batch: Callable[[], None] = lambda: None) -> None:
        """Compute the hidden states after block `i` from those before it."""
        hidden = []
        with placed(tensors(self.blocks[i]), self.device):
            for ids_BT, hidden_BTD in zip(self.ids, self.read("hidden", i), strict=True):
                before_batch()
                hidden.append(self.chain.block(i, ids_BT, hidden_BTD).cpu())
        self.keep("hidden", i + 1, hidden)

    def differentiate(self, loss: Loss) -> None:
        """Compute the gradients after the last block."""
        end, gradients = len(self.blocks), []
        for number, (ids_BT, hidden_BTD) in enumerate(zip(self.ids, self.read("hidden", end), strict=True)):
            with torch.enable_grad():
                loss(number, self.chain.logits(ids_BT, hidden_BTD.requires_grad_()), ids_BT).backward()
            gradients.append(_gradient(hidden_BTD))
        self.keep("gradients", end, gradients)
        self.files.drop("hidden", end)

    def backward(self, i: int, gather: Gather[Layer]) -> None:
        """Compute the statistics of block `i`, and the gradients before it."""
        gradients = []
        with placed(tensors(self.blocks[i]), self.device):
            with gather(self.parts[i]) as found, torch.enable_grad():
                for ids_BT, hidden_BTD, after_BTD in zip(self.ids, self.read("hidden", i), self.read("gradients", i + 1), strict=True):
                    self.chain.block(i, ids_BT, hidden_BTD.requires_grad_()).backward(after_BTD)
                    gradients.append(_gradient(hidden_BTD))
            self.files.put("statistics", i, found)
        self.keep("gradients", i, gradients)
        self.files.drop("gradients", i + 1)
        self.files.drop("hidden", i)

    def read(self, kind: str, number: int) -> Iterator[Tensor]:
        """Yield what `keep` has written. Each tensor is a copy: sums over mapped memory depend on its place in the file."""
        for hidden_BTD in self.files.get(kind, number, map(str, range(len(self.ids)))).values():
            yield hidden_BTD.to(self.device, copy=True)

    def keep(self, kind: str, number: int, values: list[Tensor]) -> None:
        """Write one tensor [B, T, D] per batch."""
        self.files.put(kind, number, {str(i): value for i, value in enumerate(values)})


def _gradient(x: Tensor) -> Tensor:
    """Return the gradient of `x` in the memory of the CPU."""
    assert x.grad is not None
    return x.grad.cpu()
