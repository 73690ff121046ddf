"""One model over many workers: frozen matrices sharded (FSDP2), what is trained replicated, the batch parted.

Every dense layer and every holder of directions is a unit of its own: a layer at a rank gathers its directions, at full size its
dense weight, and neither the other. Masks and adapters are small and whole on every worker; their gradients are averaged. Called
without an initialized process group, everything here does nothing, and the code reads the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@lru_cache(maxsize=1)
def _mesh(n: int) -> DeviceMesh:
    return init_device_mesh(device().type, (n,))


def device() -> torch.device:
    """Where this worker's parts are."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def shard(module: nn.Module) -> None:
    """Leave each worker its part of a frozen `module`; calling the module gathers it."""
    if workers() > 1:
        fully_shard(module, mesh=_mesh(workers()), reshard_after_forward=True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a sharded `module` are there in full."""
    if not isinstance(module, FSDPModule):
        yield
        return
    FSDPModule.unshard(module)
    try:
        yield
    finally:
        FSDPModule.reshard(module)


def read(parameter: Tensor) -> Tensor:
    """All of a parameter, sharded or not. Every worker must call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def write(parameter: Tensor, values: Tensor) -> None:
    """Put `values`, which every worker has in full, into a parameter."""
    if isinstance(parameter, DTensor):
        parts = values.chunk(workers())
        if rank() < len(parts):
            parameter.to_local().copy_(parts[rank()])
    else:
        parameter.data = values


def settle(module: nn.Module) -> None:
    """Let go of what a backward pass may have left gathered: it is a copy."""
    if isinstance(module, FSDPModule):
        FSDPModule.reshard(module)


def gather(model: nn.Module) -> None:
    """The sharded model whole again, on the host of the first worker; the others keep nothing of it."""
    for module in model.modules():
        settle(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = parameter.full_tensor().cpu() if rank() == 0 else parameter.full_tensor()[:0]
                setattr(module, name, nn.Parameter(full, requires_grad=False))


def my_part(batch: Tensor) -> Tensor:
    """This worker's rows of a batch that all of them have."""
    return batch[rank() :: workers()]


def average(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its mean over the workers."""
    if (n := workers()) > 1:
        waiting = [(tensor, dist.all_reduce(tensor, async_op=True)) for tensor in tensors]
        for tensor, work in waiting:
            work.wait()
            tensor.div_(n)


def decided(mine: bool, device: torch.device) -> bool:
    """What the first worker decided."""
    if workers() == 1:
        return mine
    flag = torch.tensor(float(mine), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


def from_first(value: T) -> T:
    """The first worker's `value`, which can be pickled."""
    values = [value]
    if workers() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value: T) -> list[T]:
    """Every worker's `value`, in their order."""
    values = [value] * workers()
    if workers() > 1:
        dist.all_gather_object(values, value)
    return values
