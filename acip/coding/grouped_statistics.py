"""Statistics of all layers of a model with a limit on their memory: several passes over the text, one per group of layers.

    layers in their order -> groups that fit -> a pass for each -> a temporary file -> one layer at a time

A pass costs a forward and a backward pass per window. The step sizes of any layer depend on the statistics of all layers, so coding
begins after the last pass. The temporary file makes one pass per group enough.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from acip.calibration.memory_plan import STATISTICS, statistics_bytes
from acip.coding.scratch import Scratch
from acip.coding.statistics import DrawnTokens, LayerStatistics, layer_statistics
from acip.layers.targets import weight_MN


def groups(linears: Mapping[str, nn.Module], limit: float = STATISTICS) -> list[dict[str, nn.Module]]:
    """Return the layers in the fewest groups of consecutive layers whose statistics take at most `limit` bytes.

    A layer with larger statistics is a group of its own.
    """
    found: list[dict[str, nn.Module]] = []
    free = 0.0
    for name, layer in linears.items():
        needed = statistics_bytes(*weight_MN(layer).shape)
        if not found or needed > free:
            found.append({})
            free = limit
        found[-1][name] = layer
        free -= needed
    return found


def grouped_statistics(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    scratch: Scratch,
    limit: float = STATISTICS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerStatistics]:
    """Return what `layer_statistics` returns, with at most `limit` bytes of statistics in memory.

    If they all fit, they stay in the memory of the model's device after one pass. Otherwise the metrics are in the file `scratch`.
    The drawn tokens are those of one pass. Raises CalibrationError if the loss does not depend on a layer, or if the file cannot be
    written.
    """
    parts = groups(linears, limit)
    drawn, statistics = DrawnTokens(seed), dict[str, LayerStatistics]()

    def within(passes: int, done: int, total: int) -> None:
        progress(passes * total + done, len(parts) * total)

    for i, part in enumerate(parts):
        gathered = layer_statistics(model, part, windows, progress=partial(within, i), drawn=drawn)
        if len(parts) == 1:
            return gathered
        for name in part:  # one by one, so that the memory of a layer is free before the next is copied
            each = gathered.pop(name)
            statistics[name] = LayerStatistics(scratch.add_tensor(each.metric), each.importance.cpu())
    return statistics
