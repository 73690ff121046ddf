"""The modes that a model is in while it is trained, differentiated or measured: dropout, gradient checkpointing, frozen parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from acip.layers.targets import targets
from acip.recipe import Recipe


@contextmanager
def training(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Turn on the dropout of the adapters, and gradient checkpointing if the recipe sets it. The base model's own dropout stays off."""
    model.eval()
    for core in targets(model).values():
        core.train()
    with recomputing(model, recipe.gradient_checkpointing):
        yield
    model.eval()


@contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Recompute the activations of each outermost block in the backward pass instead of keeping them, if `on`."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = [block for blocks in lists for block in blocks if targets(block)] if on else []
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    blocks = [block for block in blocks if id(block) not in inner]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn off dropout inside the block: all modules are in evaluation mode."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the model's parameters inside the block, without dropout."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
