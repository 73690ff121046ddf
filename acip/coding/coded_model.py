"""All linear layers of a model, coded in several versions, and the best choice of versions for any number of bytes.

    statistics -> one scale of the step sizes per rate -> codes, layer by layer -> losses and bytes -> one order

Only one layer per thread is in memory as floating point numbers besides the model itself; the versions are kept as they are stored.
The scales depend on all layers. Given the scales, each layer is coded independently of the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from acip.coding.codes import PackedCodes
from acip.coding.error_feedback import code_versions, damped
from acip.coding.statistics import LayerStatistics
from acip.coding.step_sizes import RowScales, scale_for
from acip.errors import RecipeError
from acip.layers.targets import weight_MN
from acip.sizing.byte_order import ByteOrder, Version
from acip.utils.threads import Spread, each_in_turn

RATES = (2.0, 2.9, 3.7, 4.6, 6.3)  # mean bits per weight of the versions; tests/benchmarks/BYTES.md has the choice


@dataclass(frozen=True)
class CodedModel:
    """The coded layers. `versions[name]` are sorted from coarse to fine."""

    versions: Mapping[str, Sequence[PackedCodes]]
    order: ByteOrder

    @property
    def bytes(self) -> int:
        """The bytes of all versions together."""
        return sum(version.bytes for each in self.order.versions.values() for version in each)

    def weights(self, limit: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight [M, N]) of each layer, in float32, for the best model whose layers take at most `limit` bytes on disk.

        Raises BudgetError if even the coarsest versions are larger.
        """
        for name, version in self.order.at(self.order.within(limit)).items():
            yield name, self.versions[name][version].unpack().decode()


@dataclass(frozen=True)
class CodedLayer:
    """The versions of one layer, from coarse to fine."""

    versions: Sequence[PackedCodes]
    losses: Sequence[float]  # predicted, in nats per token

    @property
    def facts(self) -> list[Version]:
        """The bytes and the loss of each version."""
        return [Version(packed.bytes, loss) for packed, loss in zip(self.versions, self.losses, strict=True)]

    @property
    def bytes(self) -> int:
        """The bytes of all versions together."""
        return sum(packed.bytes for packed in self.versions)


def code_model(
    linears: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    rates: Sequence[float] = RATES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodedModel:
    """Code every layer once per rate. `rates` are mean bits per weight over all layers, rising, between 0 and 8.

    Raises RecipeError for other rates.
    """
    scales = step_scales(linears, statistics, rates)
    coded: dict[str, CodedLayer] = {}
    for done, (name, layer) in enumerate(code_layers(linears, statistics, scales)):
        coded[name] = layer
        progress(done + 1, len(linears))
    return assembled(coded)


@torch.no_grad()
def step_scales(
    linears: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    rates: Sequence[float] = RATES,
    device: torch.device | None = None,
) -> list[float]:
    """Return the scale of the step sizes at each rate, from the weights and statistics of all layers. See `code_model`.

    Each layer is computed on `device`; None = where its weight is.
    """
    if not rates or any(not 0 < rate <= 8 for rate in rates) or list(rates) != sorted(set(rates)):
        raise RecipeError(f"rates are {list(rates)}; they must be at least one number, rising, above 0 and at most 8 bits per weight.")
    # on the CPU, because a bisection reads many numbers from each
    rows = {name: _row_scales(layer, statistics[name], device) for name, layer in linears.items()}
    return [scale_for(rows, rate) for rate in rates]


def code_layers(
    linears: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    scales: Sequence[float],
    device: torch.device | None = None,
    spread: Spread = each_in_turn,
) -> Iterator[tuple[str, CodedLayer]]:
    """Yield (name, `code_layer` of it) of each layer. On a CPU, each layer is coded by one of as many threads as torch uses.

    `spread` distributes the layers.
    """

    def items() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for name, layer in linears.items():
            each = statistics[name]
            yield weight_MN(layer).detach(), each.metric, each.importance

    on_cpu = all((device or weight_MN(layer).device).type == "cpu" for layer in linears.values())
    coded = spread(partial(_coded, scales=list(scales), device=device), items(), threads=0 if on_cpu else 1)
    yield from zip(linears, coded, strict=True)


@torch.no_grad()
def code_layer(layer: nn.Module, statistics: LayerStatistics, scales: Sequence[float], device: torch.device | None = None) -> CodedLayer:
    """Return the versions of a layer at rising rates, computed on `device` (None = where its weight is).

    `scales` are those of `step_scales`, which fall.
    """
    return _coded((weight_MN(layer), statistics.metric, statistics.importance), scales, device)


@torch.no_grad()
def _coded(item: tuple[Tensor, Tensor, Tensor], scales: Sequence[float], device: torch.device | None = None) -> CodedLayer:
    """Code a weight [M, N] for its metric [N, N] and importance [M]. See `code_layer`."""
    W_MN, metric_NN, importance_M = _on_device(*item, device)
    rows, W_MN = RowScales.of(W_MN, metric_NN, importance_M), W_MN.float()
    versions: list[PackedCodes] = []
    losses: list[float] = []
    for codes, errors_M in code_versions(W_MN, metric_NN, [rows.at(scale) for scale in scales]):
        versions.append(codes.pack())
        losses.append(0.5 * float(importance_M @ errors_M))
    return CodedLayer(versions, losses)


def assembled(coded: Mapping[str, CodedLayer]) -> CodedModel:
    """Return the model of coded layers."""
    return CodedModel({name: each.versions for name, each in coded.items()}, ByteOrder({name: each.facts for name, each in coded.items()}))


def _row_scales(layer: nn.Module, statistics: LayerStatistics, device: torch.device | None) -> RowScales:
    return RowScales.of(*_on_device(weight_MN(layer), statistics.metric, statistics.importance, device)).cpu()


def _on_device(W_MN: Tensor, metric_NN: Tensor, importance_M: Tensor, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight, the damped metric and the importance on `device` (None = that of the weight)."""
    device = device or W_MN.device
    return W_MN.to(device), damped(metric_NN.to(device)), importance_M.to(device)
