"""Scores: in which order the directions of all layers leave (paper 2.2.2, Algorithm 1).

`ScoreMap` holds them and orders by them, wherever they come from: from pruning (the paper), or from `fisher` (ours).

A living direction's score is its mask, a forecast of its turn; a pruned one's is minus the number of steps since it was
pruned. Lowest first is the removal order. Ties within a step are broken by the moment of crossing inside it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import hooked
from acip.modeling_acip import widened


@dataclass
class ScoreMap:
    """Scores of all layers in one flat vector, so that an update is a few operations and no loop over layers.

    `score` [D] and `crossing` [D] have the masks' dtype, D = sum of K over layers, layers one after the other in the model's
    order, directions in the order of their basis. `crossing` in (0, 1] is where in its last step a mask met zero.
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
        """[D] index of the layer that each direction belongs to."""
        counts = torch.tensor([b - a for a, b in pairwise(self.offsets)], device=self.score.device)
        return torch.repeat_interleave(torch.arange(len(self.names), device=self.score.device), counts)

    def update(self, before: Tensor, after: Tensor, frozen: Tensor | bool = False) -> None:
        """One optimizer step moved the masks from `before` to `after` [D].

        s = p where alive; 0 - 1 where pruned in this step; s - 1 where pruned before. `frozen` = change nothing.
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
        """[D] flat indices, first to leave first: by score, then crossing, then the later (weaker) basis direction."""
        order = torch.arange(self.score.numel(), device=self.score.device).flip(0)
        for key in (self.crossing, self.score):
            order = order[torch.argsort(key[order], stable=True)]
        return order

    def importance(self) -> dict[str, Tensor]:
        """Per layer, its directions' basis indices [K], most important first: a rank is a prefix of this."""
        order = self.removal_order().flip(0)
        layer = self.layer_of[order]
        by_layer = order[torch.argsort(layer, stable=True)]
        return {name: by_layer[a:b] - a for name, (a, b) in zip(self.names, pairwise(self.offsets), strict=True)}


@contextmanager
def fisher(cores: Mapping[str, SVDLinear]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict of scores [K] per layer while losses are computed and `backward` runs inside.

    A direction i adds u_i (v_i x) to a layer's output, and removing it changes the loss of one token by about
    -(g u_i)(v_i x), g the gradient at the output. Its score is that, squared and summed over tokens: the diagonal of the
    empirical Fisher information of the masks, twice the loss that removing it costs, to second order. It takes the
    gradients of single tokens, which the masks' own gradients no longer hold.
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
