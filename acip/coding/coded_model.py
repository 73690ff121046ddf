"""All linear layers of a model, coded in several versions, and the best choice of versions for any number of bytes.

    statistics -> step sizes at each rate -> codes, layer by layer -> losses and bytes -> one order

Only one layer is in memory as floating point numbers besides the model itself; the versions are kept as they are stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acip.coding.codes import PackedCodes
from acip.coding.error_feedback import code_versions, damped, row_errors
from acip.coding.statistics import LayerStatistics
from acip.coding.step_sizes import RowScales, scale_for
from acip.errors import RecipeError
from acip.layers.targets import weight_MN
from acip.sizing.byte_order import ByteOrder, Version

RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.5)  # mean bits per weight of the versions


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


@torch.no_grad()
def code_model(
    linears: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    rates: Sequence[float] = RATES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodedModel:
    """Code every layer once per rate. `rates` are mean bits per weight over all layers, rising, between 0 and 8.

    Raises RecipeError for other rates.
    """
    if not rates or any(not 0 < rate <= 8 for rate in rates) or list(rates) != sorted(set(rates)):
        raise RecipeError(f"rates are {list(rates)}; they must be at least one number, rising, above 0 and at most 8 bits per weight.")
    rows = {
        name: RowScales.of(weight_MN(layer), damped(statistics[name].metric), statistics[name].importance)
        for name, layer in linears.items()
    }
    scales = [scale_for(rows, rate) for rate in rates]
    versions: dict[str, list[PackedCodes]] = {}
    measured: dict[str, list[Version]] = {}
    for done, (name, layer) in enumerate(linears.items()):
        W_MN, metric_NN, importance_M = weight_MN(layer).float(), damped(statistics[name].metric), statistics[name].importance
        coded = code_versions(W_MN, metric_NN, [rows[name].at(scale) for scale in scales])
        versions[name] = [codes.pack() for codes in coded]
        losses = [0.5 * float(importance_M @ row_errors(W_MN, codes.decode(), metric_NN)) for codes in coded]
        measured[name] = [Version(packed.bytes, loss) for packed, loss in zip(versions[name], losses, strict=True)]
        progress(done + 1, len(linears))
    return CodedModel(versions, ByteOrder(measured))
