"""Step sizes that are trained against the base model, all layers together.

Coding chooses the steps of each layer alone, with exact inputs. At a small size the inputs of a layer are wrong, too, and its steps can
compensate for a part of that. The codes are not changed, so that every size keeps its bytes.

    step t_m of each row of each version -> t_m exp(a_m / s_m),    a = 0 at the start,    s_m = root mean square of the row's codes

A change of `a` by 1 moves the weights of a row by about one step, so that one learning rate serves coarse and fine versions.

Each training step draws a size, and reduces the KL divergence from the base model to the model of that size. A version serves many sizes,
so its steps are trained at all of them. Versions that occur only in sizes above MAX_RATE are not trained: little is left to gain there.

Legend: M = out features.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from acip.calibration.losses import Divergence
from acip.calibration.training_mode import frozen
from acip.coding.coded_model import CodedModel
from acip.coding.codes import PackedCodes, stored_steps
from acip.errors import CalibrationError, RecipeError
from acip.modeling_acip import CodedLinear, bias_of, weight_MN

LR = 5e-3  # of Adam, for the changes `a`
MIN_SPREAD = 0.1  # lower bound of s
MAX_RATE = 5.0  # mean bits per weight of the largest size that is drawn
SIZE_WEIGHT_EXPONENT = 0.75  # gradients are divided by divergence ** this, or the smallest sizes would dominate
MIN_DIVERGENCE_NATS = 1e-3  # lower bound of the divergence in that weight


def tune_steps(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    coded: CodedModel,
    windows: Tensor,
    steps: int,
    lr: float = LR,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodedModel:
    """Return `coded` with step sizes that were trained for `steps` training steps. Codes, bytes and their order stay the same.

    `model` is the base model in evaluation mode, whose layers `linears` were coded; it is left unchanged. It maps input_ids to an object
    with `logits`. `windows` are token ids [n, T]; a training step reads one. The result depends on `seed` and is the same for the same one
    (on a CPU). In memory: `coded`, one version of each layer in 8 bit, and what a backward pass holds.

    Raises RecipeError for steps below 0, a learning rate that is not above 0, and no windows; CalibrationError if the loss is not finite.
    """
    if steps < 0 or not lr > 0 or (steps and not len(windows)):
        raise RecipeError(
            f"steps is {steps}, lr is {lr}, and there are {len(windows)} windows; steps must be at least 0, lr above 0, windows at least 1."
        )
    layers = {name: _TunedLayer(layer, list(coded.versions[name])) for name, layer in linears.items()}
    optimizer = torch.optim.Adam([change for layer in layers.values() for change in layer.changes], lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    draw, device = random.Random(seed), next(model.parameters()).device
    weights = sum(weight_MN(layer).numel() for layer in linears.values())
    smallest, largest = coded.order.totals[0], min(coded.order.totals[-1], int(MAX_RATE / 8 * weights))
    with frozen(model), torch.enable_grad():
        for step in range(steps):
            ids_1T = windows[step % len(windows)][None].long().to(device)
            limit = draw.randint(smallest, max(smallest, largest))
            for name, version in coded.order.at(coded.order.within(limit)).items():
                layers[name].use(version)
            loss = _divergence(model, linears, layers, ids_1T)
            if not math.isfinite(loss.item()):
                raise CalibrationError(
                    f"the KL divergence at {limit:,} bytes is {loss.item()} in training step {step}; it must be finite. "
                    "Use dtype float32 or bfloat16, or set code_tune_steps to 0."
                )
            (loss * loss.detach().clamp_min(MIN_DIVERGENCE_NATS) ** -SIZE_WEIGHT_EXPONENT).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress(step + 1, steps)
    return CodedModel({name: layer.tuned() for name, layer in layers.items()}, coded.order)


def _divergence(model: nn.Module, linears: Mapping[str, nn.Module], layers: Mapping[str, "_TunedLayer"], ids_1T: Tensor) -> Tensor:
    """Return the KL divergence from the base model, the mean over tokens in nats."""
    logits: Callable[[], Tensor] = lambda: model(input_ids=ids_1T, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        base_1TV = logits()
    with _computing(linears, layers):
        coded_1TV = logits()
    loss: Tensor = Divergence.apply(coded_1TV, base_1TV)[0]
    return loss


@contextmanager
def _computing(linears: Mapping[str, nn.Module], layers: Mapping[str, "_TunedLayer"]) -> Iterator[None]:
    """Let every linear layer compute with its codes inside the block."""
    for name, linear in linears.items():
        linear.forward = layers[name].forward()
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward


class _TunedLayer:
    """The versions of a layer, the trained changes of their steps, and the version in use."""

    def __init__(self, linear: nn.Module, versions: list[PackedCodes]) -> None:
        self.linear, self.versions, self.device = linear, versions, weight_MN(linear).device
        self.changes = [torch.zeros(len(each.steps), device=self.device, requires_grad=True) for each in versions]
        self.version = -1

    def use(self, version: int) -> None:
        if version != self.version:
            self.version = version
            codes = self.versions[version].unpack()
            self.coded = CodedLinear(codes.codes, codes.steps, bias_of(self.linear)).to(self.device)
            self.steps_M, self.spread_M = self.coded.steps, _spread(self.coded.codes)

    def forward(self) -> Callable[[Tensor], Tensor]:
        """Return the function that the layer computes in its version."""
        self.coded.steps = self.steps_M * (self.changes[self.version] / self.spread_M).exp()
        return self.coded.forward

    @torch.no_grad()
    def tuned(self) -> list[PackedCodes]:
        """Return all versions with their trained steps, rounded as they are stored. Untrained versions are unchanged."""
        return [
            replace(each, steps=stored_steps(each.steps * (change.cpu() / _spread(each.unpack().codes)).exp())) if change.any() else each
            for each, change in zip(self.versions, self.changes, strict=True)
        ]


def _spread(codes_MN: Tensor) -> Tensor:
    """Return the root mean square of the codes of each row [M]."""
    return codes_MN.float().square().mean(1).sqrt().clamp_min(MIN_SPREAD)
