"""Distribute one model over several workers: frozen matrices are sharded (FSDP2), trained parameters replicated, batches split.

Every dense layer and every `DirectionMatrix` is a separate FSDP unit. A layer at a rank gathers its directions only, and a layer at
full size its dense weight only. Masks and adapters are small and complete on every worker; their gradients are averaged. Without an
initialized process group, all functions here do nothing.
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
    """Return the device of this worker's shards."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def shard(module: nn.Module) -> None:
    """Shard a frozen `module` over the workers. Calling the module gathers its parameters."""
    if workers() > 1:
        fully_shard(module, mesh=_mesh(workers()), reshard_after_forward=True)


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Gather the parameters of a sharded `module` inside the block."""
    if not isinstance(module, FSDPModule):
        yield
        return
    FSDPModule.unshard(module)
    try:
        yield
    finally:
        FSDPModule.reshard(module)


def read(parameter: Tensor) -> Tensor:
    """Return a complete parameter, sharded or not. All workers must call it together."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def write(parameter: Tensor, values: Tensor) -> None:
    """Write `values`, which are complete on every worker, to a parameter."""
    if isinstance(parameter, DTensor):
        parts = values.chunk(workers())
        if rank() < len(parts):
            parameter.to_local().copy_(parts[rank()])
    else:
        parameter.data = values


def settle(module: nn.Module) -> None:
    """Free gathered copies of parameters that a backward pass may have left."""
    if isinstance(module, FSDPModule):
        FSDPModule.reshard(module)


def gather(model: nn.Module) -> None:
    """Collect the complete model on the host of the first worker. The other workers keep empty parameters."""
    for module in model.modules():
        settle(module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = parameter.full_tensor().cpu() if rank() == 0 else parameter.full_tensor()[:0]
                setattr(module, name, nn.Parameter(full, requires_grad=False))


def my_part(batch: Tensor) -> Tensor:
    """Return this worker's rows of a batch that is the same on all workers."""
    return batch[rank() :: workers()]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the workers."""
    if (n := workers()) > 1:
        pending = [(tensor, dist.all_reduce(tensor, async_op=True)) for tensor in tensors]
        for tensor, work in pending:
            work.wait()
            tensor.div_(n)


def decided(decision: bool, device: torch.device) -> bool:
    """Return the first worker's decision on every worker."""
    if workers() == 1:
        return decision
    flag = torch.tensor(float(decision), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


def from_first(value: T) -> T:
    """Return the first worker's `value` on every worker. It must be picklable."""
    values = [value]
    if workers() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value: T) -> list[T]:
    """Return the values of all workers, in the order of their ranks."""
    values = [value] * workers()
    if workers() > 1:
        dist.all_gather_object(values, value)
    return values
