"""Which inputs and which outputs of a layer matter for the loss: second moments of inputs and gradients, from one pass over text.

The loss is the negative log likelihood of tokens that are drawn from the model's own predictions. The expected outer product of its
gradients is the Fisher information, and a change dW of a layer moves the model's predictions, to second order, by

    KL = 1/2 mean over tokens of (g^T dW x)^2 nats per token

with the input x and the gradient g at the output of the layer. Per row of dW, and with the approximation that |g| decides how much a
token matters and the row's importance how much a row matters:

    KL ~ 1/2 sum over rows m of importance_m  dW_m H dW_m^T
    importance_m = mean of g_m^2,   H = mean of |g|^2 x x^T / mean of |g|^2

All means are over the tokens of the text. A layer that is called for some of the tokens, such as an expert, has zeros for the others, and
the calls of a layer that is called several times are summed.

Legend: M = out features, N = in features, S = tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acip.calibration.activation_covariance import add_outer, complete
from acip.calibration.losses import sampled_loss
from acip.calibration.training_mode import frozen
from acip.data import check_windows
from acip.errors import CalibrationError
from acip.layers.targets import hooked, weight_MN


@dataclass(frozen=True)
class LayerStatistics:
    """The second moments of one layer, in float32."""

    metric: Tensor  # [N, N]: H
    importance: Tensor  # [M]


def layer_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerStatistics]:
    """Return the statistics of each layer from token ids [n, T]. `model` maps input_ids to an object with `logits`.

    The model is run in evaluation mode. Its parameters get no gradients. Tokens are drawn with `seed`. Raises CalibrationError if the loss
    does not depend on a layer, and DataError if `windows` are not [n, T].
    """
    check_windows(windows)
    sums = {name: LayerSums(layer) for name, layer in linears.items()}
    hooks = hooked(layer.register_forward_hook(sums[name].hook) for name, layer in linears.items())
    with frozen(model), hooks, torch.enable_grad():
        for number, window in enumerate(windows):
            _differentiate(model, window, number, seed)
            progress(number + 1, len(windows))
    require_reached(sums)
    return {name: each.statistics(windows.numel()) for name, each in sums.items()}


def _differentiate(model: nn.Module, window: Tensor, number: int, seed: int) -> None:
    """Run the backward pass of one window. On return, nothing of it is in memory."""
    device = next(model.parameters()).device
    loss = sampled_loss(model(input_ids=window[None].long().to(device)).logits[0], number, seed)
    if loss.requires_grad:  # false if no layer was called
        loss.backward()


class LayerSums:
    """The sums of one layer over tokens."""

    def __init__(self, layer: nn.Module) -> None:
        M, N = weight_MN(layer).shape
        device = weight_MN(layer).device
        self.weighted_NN = torch.zeros(N, N, device=device)  # sum of |g|^2 x x^T, lower triangle
        self.squares_M = torch.zeros(M, device=device)  # sum of g^2
        self.reached = False  # by the loss

    def hook(self, _layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        inputs_SN = args[0].detach().reshape(-1, args[0].shape[-1])  # kept until the backward pass, shared by layers of equal input

        def add(grad: Tensor) -> None:
            x_SN = inputs_SN.float()
            g_SM = grad.reshape(-1, grad.shape[-1]).float()
            squares_SM = g_SM.square()
            add_outer(self.weighted_NN, x_SN * squares_SM.sum(1, keepdim=True).sqrt())
            self.squares_M.add_(squares_SM.sum(0))
            self.reached |= len(g_SM) > 0

        if not out.requires_grad:  # the first layers, because the parameters are frozen
            out.requires_grad_()
        out.register_hook(add)

    def statistics(self, tokens: int) -> LayerStatistics:
        """Turn the sums into means over this number of tokens, in place, and return them."""
        total = self.squares_M.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return LayerStatistics(complete(self.weighted_NN.div_(total)), self.squares_M.div_(tokens))


def require_reached(sums: Mapping[str, LayerSums]) -> None:
    """Raise CalibrationError if the loss does not depend on one of these layers."""
    if unreached := [name for name, each in sums.items() if not each.reached]:
        raise CalibrationError(
            f"the loss does not depend on {len(unreached)} layers, for example {unreached[0]}, so they cannot be coded. "
            "Add a part of their names to exclude."
        )
