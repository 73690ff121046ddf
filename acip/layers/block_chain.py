"""Run a transformer one block at a time, with the hidden states between the blocks in the hands of the caller.

    ids -> embed -> hidden -> block 0 -> hidden -> block 1 -> ... -> logits

The blocks of a decoder are the elements of one ModuleList, and each maps hidden states [1, T, D] to hidden states [1, T, D]. To run one of
them, the model's own forward pass is started with the other blocks skipped, so that block gets the masks, the positions and all other
arguments that the code of the model computes for it. No knowledge of the architecture is needed. `check` finds models for which this does
not hold.

Legend: T = tokens of a window, D = width of the hidden states, V = size of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from acip.errors import BaseModelError, foreign_errors

Forward = Callable[..., Any]
Layer = TypeVar("Layer", bound=nn.Module)


class BlockChain:
    """The blocks of a model, in their order."""

    def __init__(self, model: nn.Module) -> None:
        """Find the blocks. Raises BaseModelError if `model` does not have exactly one list of blocks."""
        self.model = model
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if len(outer) != 1:
            raise BaseModelError(
                f"{type(model).__name__} has {len(outer)} lists of blocks; it must have one to be calibrated a block at a time. "
                "Use a device whose memory holds the whole model."
            )
        blocks: Any = model.get_submodule(outer[0])
        self.blocks: dict[str, nn.Module] = {f"{outer[0]}.{i}": block for i, block in enumerate(blocks)}

    def __len__(self) -> int:
        return len(self.blocks)

    def parts(self, layers: Mapping[str, Layer]) -> list[dict[str, Layer]]:
        """Return those of `layers` that are inside each block."""
        return [{name: layer for name, layer in layers.items() if name.startswith(f"{block}.")} for block in self.blocks]

    def outside(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers that are not part of a block: embeddings, last norm, head."""
        inside = {id(tensor) for block in self.blocks.values() for tensor in tensors(block)}
        return (tensor for tensor in tensors(self.model) if id(tensor) not in inside)

    def embed(self, ids_1T: Tensor) -> Tensor:
        """Return the hidden states [1, T, D] before the first block."""
        found: Tensor = self._run(ids_1T, {0: _stop})
        return found

    def block(self, i: int, ids_1T: Tensor, hidden_1TD: Tensor) -> Tensor:
        """Return the output [1, T, D] of block `i` for the input `hidden_1TD`. `ids_1T` are the tokens of the window."""
        block = list(self.blocks.values())[i]
        forward = type(block).forward.__get__(block)

        def computed(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = ((hidden_1TD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_1TD})
            return _stop(forward(*args, **kwargs))

        out: Tensor = self._run(ids_1T, {i: computed})
        return out

    def logits(self, ids_1T: Tensor, hidden_1TD: Tensor) -> Tensor:
        """Return the logits [1, T, V] for the output `hidden_1TD` of the last block."""
        logits: Tensor = self._run(ids_1T, {0: lambda *args, **kwargs: hidden_1TD}).logits
        return logits

    def check(self, ids_1T: Tensor) -> None:
        """Raise BaseModelError unless running the model block by block gives the logits of the whole model on `ids_1T`.

        All weights are used, so check a small model of the same class.
        """
        name = type(self.model).__name__
        with torch.no_grad(), foreign_errors(BaseModelError, f"{name} can't be run a block at a time"):
            hidden_1TD = self.embed(ids_1T)
            for i in range(len(self)):
                hidden_1TD = self.block(i, ids_1T, hidden_1TD)
            logits, expected = self.logits(ids_1T, hidden_1TD), self.model(input_ids=ids_1T, use_cache=False).logits
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise BaseModelError(
                f"{name} can't be run a block at a time: its blocks exchange more than hidden states. "
                "Use a device whose memory holds the whole model."
            )

    def _run(self, ids_1T: Tensor, forwards: Mapping[int, Forward]) -> Any:
        """Run the model with other forward functions for some blocks. All other blocks return their input."""
        for i, block in enumerate(self.blocks.values()):
            block.forward = forwards.get(i, _input)
        try:
            return self.model(input_ids=ids_1T, use_cache=False)
        except _Stopped as stopped:
            return stopped.hidden
        finally:
            for block in self.blocks.values():
                del block.forward


class _Stopped(Exception):  # noqa: N818
    """Ends a forward pass of which only the hidden states at one block are needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _input(*args: Any, **kwargs: Any) -> Tensor:
    """Return the hidden states among the arguments of a block."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _stop(*args: Any, **kwargs: Any) -> Any:
    hidden = _input(*args, **kwargs)
    if not isinstance(hidden, Tensor):
        raise BaseModelError(
            f"the blocks of this model return a {type(hidden).__name__}; they must return hidden states alone to be run one at a time. "
            "Use a device whose memory holds the whole model."
        )
    raise _Stopped(hidden)


def tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module; tied tensors once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


@contextmanager
def placed(some: Iterable[Tensor], device: torch.device | str) -> Iterator[None]:
    """Hold the data of `some` parameters and buffers on `device` inside the context. Afterwards it is where it was, and unchanged."""
    some = list(some)
    kept = [tensor.data for tensor in some]
    try:
        for tensor in some:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(some, kept, strict=True):
            tensor.data = data
