"""The sizes of a model with coded layers: any number of stored bytes, as a prefix of one order (`acip.sizing.byte_order`).

    size 1.0 ... exact share     the base model, bit for bit; its weights are stored losslessly in `exact` bytes
    below                        the model after the largest number of steps whose bytes are within the budget

The finest version of every layer is the exact one, its losslessly stored weight: the sizes next to the base model have a part of their
layers exact. The stored bytes of a size are those that are read from an artifact. They are divided by `base`, the bytes of the base model's
tensors. In memory, a code takes one byte, and an exact weight the bytes of its dtype.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from acip.errors import BudgetError
from acip.sizing.budget import MEGA, Budget, Curve, as_perplexity, rounded_up
from acip.sizing.byte_order import ByteOrder, Version


def with_exact(coded: Mapping[str, Sequence[Version]], exact_bytes: Mapping[str, int]) -> ByteOrder:
    """Return the order of the coded versions of each layer and of its exact weight, which comes last and takes `exact_bytes`."""
    return ByteOrder({name: [*versions, Version(exact_bytes[name], 0.0)] for name, versions in coded.items()})


@dataclass(frozen=True)
class LayerBytes:
    """A layer in memory."""

    weights: int  # numbers
    coded: int  # bytes of the codes and the step sizes
    exact: int  # bytes of the exact weight


@dataclass(frozen=True)
class ByteSizes:
    """The sizes of a model, by the number of steps of its byte order; None is the base model."""

    order: ByteOrder  # the last version of each layer is the exact one
    layers: Mapping[str, LayerBytes]
    rest: int  # stored bytes of all other tensors
    rest_memory: int  # their bytes in memory
    base: int  # bytes of the base model in its dtype
    loss: Curve | None = None  # measured, over shares of `base`
    kl: Curve | None = None

    @property
    def exact(self) -> int:
        """The stored bytes of the base model."""
        return self.rest + sum(versions[-1].bytes for versions in self.order.versions.values())

    def bytes(self, steps: int | None) -> int:
        """Return the stored bytes of a size."""
        return self.exact if steps is None else self.rest + self.order.totals[steps]

    @property
    def all_coded(self) -> int:
        """The largest number of steps after which no layer is exact."""
        exact = (i for i, step in enumerate(self.order.steps) if step.version == len(self.order.versions[step.name]) - 1)
        return next(exact, len(self.order.steps))

    def versions(self, steps: int | None) -> dict[str, int]:
        """Return the version of each coded layer of a size. The other layers are exact."""
        at = {} if steps is None else self.order.at(steps)
        return {name: version for name, version in at.items() if version < len(self.order.versions[name]) - 1}

    def memory(self, versions: Mapping[str, int]) -> int:
        """Return the bytes of a model in memory whose coded layers are those in `versions`."""
        return self.rest_memory + sum(layer.coded if name in versions else layer.exact for name, layer in self.layers.items())

    def share(self, steps: int | None) -> float:
        """Return the stored bytes of a size as a share of the base model's bytes."""
        return self.bytes(steps) / self.base

    def bits_per_weight(self, steps: int) -> float:
        """Return the mean bits of a weight of the coded layers."""
        return 8 * self.order.totals[steps] / sum(layer.weights for layer in self.layers.values())

    def curve(self, budget: Budget) -> Curve | None:
        """Return the measured curve of the quantity that `budget` limits, a loss or a KL divergence."""
        return self.kl if budget.max_kl is not None else self.loss

    def choose(self, budget: Budget, beside: int = 0) -> tuple[int | None, float | int]:
        """Return (steps, value of the limited quantity) of the best size within `budget`.

        It is the largest size, or, for a budget that limits a loss, the smallest on the measured curve that meets it. `beside` are bytes
        that memory holds besides the weights. Raises BudgetError if no size is within the budget.
        """
        if budget.by_curve:
            return self._by_curve(budget)
        if budget.memory_mb is not None:
            for steps in (None, *range(len(self.order.steps), -1, -1)):
                held = (self.memory(self.versions(steps)) + beside) / MEGA
                if held <= budget.memory_mb:
                    return steps, held
            raise BudgetError(
                f"memory of {budget.memory_mb!r} MB can't be reached: the smallest is {rounded_up(held, 6)} MB, of which the weights take "
                f"{held - beside / MEGA:,.1f} at every size without exact layers, and KV cache and overhead {beside / MEGA:,.1f}."
            )
        scale = self.base if budget.ratio is not None else 1

        def got(count: int | None) -> float | int:
            return self.bytes(count) if scale == 1 else self.bytes(count) / scale  # divide; a product of the budget could round up

        if got(None) <= budget.asked:
            return None, got(None)
        fitting = bisect_left(range(len(self.order.totals)), True, key=lambda count: got(count) > budget.asked)
        if not fitting:
            name = budget.convention if budget.ratio is not None else budget.kind
            least_text = f"{self.bytes(0):,} bytes" if scale == 1 else rounded_up(self.share(0), 4)
            raise BudgetError(f"size {budget.asked!r} ({name}) can't be reached: the smallest is {least_text}.")
        return fitting - 1, got(fitting - 1)

    def predicted(self, steps: int | None) -> dict[str, float] | None:
        """Return loss (nats per token), perplexity, and KL divergence of a size by the measured curves, within their sizes."""
        found = {}
        if self.loss is not None and (loss := self.loss.loss(self.share(steps))) is not None:
            found = {"loss": loss, "perplexity": as_perplexity(loss)}
        if self.kl is not None and (kl := self.kl.loss(self.share(steps))) is not None:
            found["kl"] = kl
        return found or None

    def _by_curve(self, budget: Budget) -> tuple[int | None, float]:
        curve = self.curve(budget)
        assert curve is not None, "without a curve over bytes, a loss is a budget of ranks"

        def got(steps: int | None) -> float | None:
            loss = curve.loss(self.share(steps))
            if loss is None or budget.max_kl is not None:
                return loss
            return as_perplexity(loss) if budget.max_perplexity is not None else loss - curve.losses[0]

        sizes = [*range(len(self.order.totals)), None]  # from the smallest to the base model; losses never rise with the size
        first = bisect_left(range(len(sizes)), True, key=lambda i: self.share(sizes[i]) >= curve.sizes[-1])
        for steps in sizes[first:]:
            if (value := got(steps)) is not None and value <= budget.asked:
                return steps if self.versions(steps) else None, value
        best = got(None)
        raise BudgetError(
            f"{budget.kind} {budget.asked!r} can't be reached: "
            + ("the curve lacks the base model." if best is None else f"the base model has {rounded_up(best, 6)}.")
        )
