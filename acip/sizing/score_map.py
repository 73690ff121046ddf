"""Scores of directions, which give the order in which the directions of all layers are removed (paper 2.2.2, Algorithm 1).

A `ScoreMap` stores scores from pruning (the paper) or from `fisher` (ours) and computes the removal order: lowest score first.

During pruning, the score of an unpruned direction is its mask, which predicts when it will be pruned. The score of a pruned direction
is minus the number of steps since it was pruned. Directions that were pruned in the same step are ordered by the moment within the
step at which their masks reached zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from acip.layers.compressible import Compressible
from acip.layers.targets import hooked
from acip.modeling_acip import widened


@dataclass
class ScoreMap:
    """The scores of all layers in one flat vector, so that an update takes a few operations without a loop over layers.

    `score` [D] and `crossing` [D] have the dtype of the masks, with D = sum of K over layers. Layers are in the order of the model and
    directions in the order of their basis. `crossing` in (0, 1] is the fraction of the last step after which a mask reached zero.
    """

    names: tuple[str, ...]
    offsets: tuple[int, ...]  # layer i is [offsets[i] : offsets[i + 1]]
    score: Tensor
    crossing: Tensor

    @classmethod
    def start(cls, masks: dict[str, Tensor]) -> "ScoreMap":
        offsets = [0]
        for p in masks.values():
            offsets.append(offsets[-1] + p.numel())
        score = torch.cat([widened(p.detach()) for p in masks.values()])
        return cls(tuple(masks), tuple(offsets), score, torch.ones_like(score))

    @cached_property
    def layer_of(self) -> Tensor:
        """The index of each direction's layer [D]."""
        counts = torch.tensor([b - a for a, b in pairwise(self.offsets)], device=self.score.device)
        return torch.repeat_interleave(torch.arange(len(self.names), device=self.score.device), counts)

    def update(self, before: Tensor, after: Tensor, frozen: Tensor | bool = False) -> None:
        """Update the scores after an optimizer step that changed the masks from `before` to `after` [D].

        s = p if p > 0; -1 if pruned in this step; s - 1 if pruned before. If `frozen`, change nothing.
        """
        alive = after > 0
        crossed = (before > 0) & ~alive
        frozen = torch.as_tensor(frozen, device=after.device)
        self.crossing = torch.where(crossed & ~frozen, before / (before - after).clamp_min(torch.finfo(before.dtype).tiny), self.crossing)
        self.score = torch.where(frozen, self.score, torch.where(alive, after, self.score.clamp(max=0) - 1))

    def of(self, name: str) -> Tensor:
        i = self.names.index(name)
        return self.score[self.offsets[i] : self.offsets[i + 1]]

    def removal_order(self) -> Tensor:
        """Return flat indices [D] in the order of removal: by score, then by crossing, then the later (weaker) basis direction first."""
        order = torch.arange(self.score.numel(), device=self.score.device).flip(0)
        for key in (self.crossing, self.score):
            order = order[torch.argsort(key[order], stable=True)]
        return order

    def importance(self) -> dict[str, Tensor]:
        """Return the basis indices [K] of each layer's directions, most important first. A rank is a prefix of them."""
        order = self.removal_order().flip(0)
        layer = self.layer_of[order]
        by_layer = order[torch.argsort(layer, stable=True)]
        return {name: by_layer[a:b] - a for name, (a, b) in zip(self.names, pairwise(self.offsets), strict=True)}


@contextmanager
def fisher(cores: Mapping[str, Compressible]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that receives Fisher scores [K] per layer while losses and their backward passes are computed in the block.

    Direction i adds u_i (v_i x) to a layer's output. Removing it changes the loss of one token by about -(g u_i)(v_i x), where g is
    the gradient at the output. Its score is the square of this change, summed over tokens. This is the diagonal of the empirical
    Fisher information of the masks, and to second order twice the loss that the removal costs. It needs the gradients of single
    tokens; the gradients of the masks are already summed over tokens.
    """
    scores: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def forward(core: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            x_BTN = args[0].detach()

            def backward(grad_BTM: Tensor) -> None:
                h_BTK = widened(core.right.project(x_BTN)) * widened(core.left.project(grad_BTM))
                scores[name] = scores.get(name, 0) + h_BTK.square().flatten(0, -2).sum(0)

            if not out.requires_grad:  # the first layer of a frozen model
                out.requires_grad_()
            out.register_hook(backward)

        return forward

    with hooked(core.register_forward_hook(hook(name)) for name, core in cores.items()):
        yield scores
