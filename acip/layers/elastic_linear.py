"""A linear layer of any size: of any rank, or in any version of its codes. Changing the size of a model sets one integer per layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acip.layers.adapters import LoRA
from acip.layers.compressible import Compressible
from acip.layers.directions import DirectionMatrix, product
from acip.modeling_acip import CodedLinear, LowRankLinear, PivotLinear, one_row, plain_linear, widened
from acip.recipe import Storage

RANK_STEP = 64  # ranks are multiplied in steps of this many rows in 16 bit on a CPU


@dataclass(frozen=True)
class Group:
    """Rows of a batch that a layer multiplies together, by a prefix of its directions, by its codes, or by its dense weight."""

    rows: slice  # rows of the batch to multiply
    wanted: slice  # rows of that product to keep
    coded: nn.Module | None = None
    factors: tuple[Tensor, Tensor] | None = None  # right [r, N], left [M, r]; without codes, None = the dense weight
    mask: Tensor | None = None  # [rows, r] zeros the directions beyond a row's own rank; [1, r] for all rows alike


class ElasticLinear(Compressible):
    """A layer that computes any rank from one copy of its directions, which are sorted by importance.

    Rank r is the prefix [:r] of the rows. `rank = None` computes the original dense layer, bit for bit. The layer may hold fewer
    than K rows, because ranks that cost more than W are never used. The first `lead` rows belong to every rank: they are a
    folded adapter beside the layer. `coded` holds versions of the layer's codes; if `version` is one of them, it is computed instead
    of a rank. `groups` of rows with their own sizes override both (`acip.layers.mixed_sizes`).
    """

    def __init__(
        self,
        original: nn.Module,
        left: DirectionMatrix | Tensor,
        right: DirectionMatrix | Tensor,
        loras: dict[str, LoRA] | None = None,
        lead: int = 0,
    ) -> None:
        sides = [side if isinstance(side, DirectionMatrix) else DirectionMatrix(side) for side in (left, right)]
        super().__init__(original, sides[0], sides[1], loras)
        self.rank: int | None = None
        self.version: int | None = None
        self.coded: dict[str, CodedLinear] = nn.ModuleDict()  # type: ignore[assignment]
        self.groups: tuple[Group, ...] | None = None
        self.lead = lead

    @property
    def stored_rank(self) -> int:
        return min(len(self.left), len(self.right)) - self.lead

    @property
    def kept(self) -> int:
        """The number of rows at the current rank, `lead` included."""
        assert self.rank is not None
        return self.lead + self.rank

    def set_rank(self, rank: int | None) -> None:
        assert rank is None or 0 <= rank <= self.stored_rank, f"rank {rank} of {self.stored_rank} stored"
        self.rank, self.version = rank, None

    def set_version(self, version: int) -> None:
        assert str(version) in self.coded, f"version {version} is not loaded"
        self.version = version

    def forget_versions(self) -> None:
        """Free the memory of all versions except the one that is set."""
        for key in [key for key in self.coded if key != str(self.version)]:
            del self.coded[key]

    def unload(self) -> None:
        """Free the memory of all weights. A size that needs them has to load them again."""
        self.set_rank(None)
        self.forget_versions()
        for side in (self.left, self.right):
            side.values = nn.Parameter(side.values[:0].clone(), requires_grad=False)
        self.original.weight = nn.Parameter(self.original.weight.to("meta"), requires_grad=False)  # type: ignore[arg-type]

    def forward(self, x_BTN: Tensor) -> Tensor:
        if self.groups is not None:
            if len(self.groups) == 1:
                return self._grouped(x_BTN, self.groups[0])
            x_TN = x_BTN.flatten(0, -2)  # the product of a 3-D slice would run as a batched product, with copies of the weight
            y_TM = torch.cat([self._grouped(x_TN[group.rows], group)[group.wanted] for group in self.groups])
            return y_TM.unflatten(0, x_BTN.shape[:-1])
        if self.version is not None and not self.bypass:
            return self.coded[str(self.version)](x_BTN)
        if self.rank is None or self.bypass:
            return self.original(x_BTN)
        rows = self._multiplied(x_BTN)
        h_BTr = self.right.project(x_BTN, rows)
        if "right" in self.loras:
            h_BTr = h_BTr + self.loras["right"](x_BTN, outputs=slice(rows))
        if rows > self.kept:
            h_BTr = h_BTr.masked_fill(torch.arange(rows) >= self.kept, 0.0)
        y_BTM = self.left.expand(h_BTr, rows, self.bias)
        if "left" in self.loras:
            y_BTM = y_BTM + self.loras["left"](h_BTr, inputs=slice(rows))
        if "layer" in self.loras:
            y_BTM = y_BTM + self.loras["layer"](x_BTN)
        return y_BTM

    def _multiplied(self, x: Tensor) -> int:
        """Return how many rows are multiplied with `x`: those kept, or a few more, whose results are set to zero.

        For products in 16 bit on a CPU, oneDNN compiles code for each new shape, and keeps it.
        """
        if x.device.type != "cpu" or x.dtype.itemsize != 2 or one_row(x):
            return self.kept
        return min(-(-self.kept // RANK_STEP) * RANK_STEP, self.lead + self.stored_rank)

    @classmethod
    def without_ranks(cls, original: nn.Linear) -> "ElasticLinear":
        """Return a layer that is dense or coded."""
        M, N = original.weight.shape
        return cls(original, original.weight.new_empty(0, M), original.weight.new_empty(0, N))

    def group(self, rows: slice, wanted: slice, kept: int | None, mask: Tensor | None = None, version: int | None = None) -> Group:
        """Return a group that is multiplied by a version of the codes, or else by the first `kept` rows (None = by the dense weight).

        Adapters must be folded in.
        """
        assert not self.loras
        if version is not None:
            return Group(rows, wanted, self.coded[str(version)])
        factors = None if kept is None else (self.right.read(kept), self.left.read(kept).T)
        return Group(rows, wanted, factors=factors, mask=mask)

    def _grouped(self, x: Tensor, group: Group) -> Tensor:
        if group.coded is not None:
            return group.coded(x)
        if group.factors is None:
            return self.original(x)
        right_rN, left_Mr = group.factors
        h = product(x, right_rN)
        if group.mask is not None:
            h = h * group.mask
        return product(h, left_Mr, self.bias)

    @torch.no_grad()
    def folded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (left [q, M], right [q, N]) of the first `rank` directions with the adapters folded in.

        Both are in the accumulation dtype. An adapter beside the layer becomes rows before the directions.
        """
        right, left = widened(self.right.read(self.lead + rank)), widened(self.left.read(self.lead + rank))
        if "right" in self.loras:
            right = right + self.loras["right"].product()[:rank]
            left = left + self.loras["left"].product()[:, :rank].T
        if "layer" in self.loras:
            adapter = self.loras["layer"]
            left, right = torch.cat([widened(adapter.B).T * adapter.scale, left]), torch.cat([widened(adapter.A), right])
        return left, right

    def materialize(self, storage: Storage) -> nn.Module:
        """Return the layer at its current size in its smallest form, as a plain module. It may share weights with this layer."""
        if self.version is not None:
            return self.coded[str(self.version)]
        if self.rank is None:
            return self.original
        left_qM, right_qN = self.folded(self.rank)
        left_Mq = left_qM.T
        (M, q), N, dtype = left_Mq.shape, right_qN.shape[1], self.left.dtype
        if q >= min(M, N) or (storage == "factors" and q * (M + N) >= M * N):
            return plain_linear((left_Mq @ right_qN).to(dtype), self.bias)
        if storage == "factors":
            return LowRankLinear(left_Mq.to(dtype).contiguous(), right_qN.to(dtype).contiguous(), self.bias)
        return PivotLinear.of(left_Mq, right_qN, self.bias, dtype)
