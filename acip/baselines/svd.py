"""SVD magnitude: the singular values of all layers are the scores, and the smallest are removed first (paper 3.2, D.6).

It needs no data and no training. It is ACIP without calibration, and uses the same cut.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from acip.base import Base
from acip.baselines import calibrated
from acip.baselines.prefix_factors import Progress
from acip.recipe import Recipe

RECIPE = Recipe(basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0, storage="factors")


def run(
    base: Base, windows: Tensor, sizes: Sequence[float], progress: Progress, *, exclude: tuple[str, ...] = ()
) -> Iterator[tuple[float, nn.Module]]:
    """Yield (size, model) for each size."""
    return calibrated.run(base, windows, sizes, progress, recipe=RECIPE, exclude=exclude)
