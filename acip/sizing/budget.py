"""Budgets: the size of a model as a ratio, a number of parameters, bytes, memory, or a loss.

    budget                      unit                       limited quantity
    ratio (and convention)      ratio                      stored numbers, relative to the base model (`acip.sizing.cut_table`)
    params                      parameters                 all stored numbers of the model
    stored_bytes                bytes                      tensors of the materialized model, as saved
    memory_mb, context, batch   MB (1e6 bytes)             weights, KV cache and overhead while serving (`Decoder`)
    max_perplexity              perplexity                 perplexity that the measured curve predicts (`Curve`)
    max_loss_increase           nats per token             predicted loss minus the base model's loss
    max_kl                      nats per token             predicted KL divergence from the base model
    max_flops                   FLOPs per token            products of the linear layers and the output head, without attention

If the model has coded layers (`acip.coding`), a size ratio in the convention `bytes`, and budgets of bytes, memory or a loss choose the
codes of the layers; all others choose ranks. A budget of a loss needs a curve over bytes for that. Without codes, all choose ranks.

`bits` is another axis, for ranks: the matrices of all target layers, dense ones included, in 8 or 4 bit, and the rest in the model's dtype.
Only curves measured in 8 and 4 bit (jobs/evaluate.py --quantize) show whether more directions or more bits are better. With such
curves, "best" chooses the bits: the smallest predicted loss within bytes or memory, or the fewest bytes for a loss.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from fractions import Fraction
from typing import Any, Literal, get_args

from acip.errors import BudgetError

Convention = Literal["linear", "paper", "model", "bytes"]  # of a size ratio (`acip.sizing.cut_table`)
Bits = Literal[8, 4]
ALL_BITS: tuple[Bits | None, ...] = (None, 8, 4)  # None = the model's own dtype
MEGA, GIGA = 10**6, 10**9
OVERHEAD = 256 * MEGA  # bytes, an estimate: workspaces of kernels and fragmentation of allocators

BITS_PER_WEIGHT = "bits_per_weight"  # field of a curve's row that only the sizes of coded layers have
DIVERGENCE = "divergence"  # kind of a measurement (acip.evaluate.divergence)
QUANTIZED = "quantized"  # kind of a measurement (acip.evaluate.perplexity)
QUANTISED = ("quantised", "quantise")  # the kind and its field in curves of version 0.1
Kind = Literal["nf4", "fp4", "int8"]  # number format of quantized matrices
KIND_OF_BITS: dict[Bits, Kind] = {8: "int8", 4: "nf4"}
# fields that must be equal for two losses to be comparable, and their defaults
COMPARABLE_FIELDS: Mapping[str, Any] = {
    "corpus": None,
    "protocol": "packed",
    "context": None,
    "windows": None,
    "split": "heldout",
    "start": "none",
}


def measured_on(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that describe the text of a measurement: a row of a curve, or a part of a row."""
    return {key: row.get(key, default) for key, default in COMPARABLE_FIELDS.items()}


def is_coded(row: Mapping[str, Any]) -> bool:
    """Return whether a row of a curve is of a coded size. Its `got` is a share of the base model's bytes; else it is a `linear` ratio."""
    return BITS_PER_WEIGHT in row


UNITS = {
    "ratio": "ratio",
    "params": "parameters",
    "stored_bytes": "bytes",
    "memory_mb": "MB",
    "max_perplexity": "perplexity",
    "max_loss_increase": "nats per token",
    "max_kl": "nats per token",
    "max_flops": "FLOPs per token",
}
PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LONGEST = 200  # characters of a budget that is parsed
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"  # unambiguous: an ambiguous pattern would take quadratic time


@dataclass(frozen=True)
class Budget:
    """A limit on the size of a model: exactly one of the kinds above. Raises BudgetError if it is malformed."""

    ratio: float | None = None
    convention: Convention = "linear"
    params: int | None = None
    stored_bytes: int | None = None
    memory_mb: float | None = None
    context: int | None = None  # tokens per sequence, prompt and answer
    batch: int | None = None  # concurrent sequences
    max_perplexity: float | None = None
    max_loss_increase: float | None = None
    max_kl: float | None = None
    max_flops: int | None = None
    bits: Bits | Literal["best"] | None = None  # bits per number of the target layers; None = the model's dtype

    def __post_init__(self) -> None:
        given = [kind for kind in UNITS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget is exactly one of {', '.join(UNITS)}{_but(given)}.")
        if self.convention not in get_args(Convention):
            raise BudgetError(f"unknown convention {self.convention!r}; allowed: {', '.join(get_args(Convention))}.")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise BudgetError(f"size ratio is {self.ratio!r}; it must be above 0 and at most 1 (1.0 = the base model).")
        for kind, noun in (
            ("params", "parameters"), ("stored_bytes", "bytes"), ("context", "tokens"), ("batch", "sequences"), ("max_flops", "FLOPs"),
        ):  # fmt: skip
            value = getattr(self, kind)
            if value is not None and not (_is_number(value) and isinstance(value, int) and value >= 1):
                raise BudgetError(f"{kind} is {value!r}; it must be a whole number of {noun}, at least 1.")
        if self.memory_mb is not None and not (_is_number(self.memory_mb) and 0 < self.memory_mb < math.inf):
            raise BudgetError(f"memory_mb is {self.memory_mb!r}; it must be a number of MB (1e6 bytes) above 0.")
        if (self.memory_mb is None) != (self.context is None) or (self.memory_mb is None) != (self.batch is None):
            raise BudgetError(
                f"memory_mb is {self.memory_mb!r}, context {self.context!r} and batch {self.batch!r}; give all of memory_mb, context "
                "(tokens per sequence) and batch (concurrent sequences), or none of them."
            )
        if self.max_perplexity is not None and not (_is_number(self.max_perplexity) and 1 <= self.max_perplexity < math.inf):
            raise BudgetError(f"max_perplexity is {self.max_perplexity!r}; it must be a number of at least 1.")
        for kind in ("max_loss_increase", "max_kl"):
            value = getattr(self, kind)
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise BudgetError(f"{kind} is {value!r}; it must be a number of nats per token, at least 0.")
        if self.bits not in (None, "best") and not (_is_number(self.bits) and self.bits in get_args(Bits)):
            raise BudgetError(f"bits is {self.bits!r}; it must be 8, 4, 'best' or None (the model's own dtype).")
        if self.bits == "best" and (self.ratio is not None or self.params is not None or self.max_flops is not None):
            raise BudgetError(f"bits is 'best' and {self.kind} does not depend on bits; use 'best' with stored_bytes, memory_mb or a loss.")

    @property
    def kind(self) -> str:
        return next(kind for kind in UNITS if getattr(self, kind) is not None)

    @property
    def asked(self) -> float | int:
        return getattr(self, self.kind)

    @property
    def by_curve(self) -> bool:
        return self.max_perplexity is not None or self.max_loss_increase is not None or self.max_kl is not None

    @property
    def in_bytes(self) -> bool:
        """Whether this budget chooses codes of the layers, if the model has them, and not ranks."""
        counts_bytes = self.convention == "bytes" if self.ratio is not None else self.params is None and self.max_flops is None
        return counts_bytes and self.bits is None

    @property
    def exact_bits(self) -> Bits | None:
        assert self.bits != "best", "CutTable.cut chooses the bits first"
        return self.bits

    @classmethod
    def parse(cls, text: str, convention: Convention = "linear") -> "Budget":
        """Parse a budget: "0.6" or "60%"; "800M params"; "8GB", "8 GiB" or "fit:8GB" (stored bytes); "ppl<=20"; "kl<=0.05"; "200M flops".

        `convention` is that of a ratio. G is 1e9 and Gi is 2^30. Case does not matter. Raises BudgetError for other text.
        """
        written = text.strip().upper().removeprefix("FIT:").strip() if len(text) <= LONGEST else ""
        if match := re.fullmatch(NUMBER + r"\s*(%?)", written):
            # parse the decimal as written: 70% is exactly float("0.7"), but 70 / 100 may not be
            return cls(ratio=float(f"{match[1]}e-2") if match[2] else float(match[1]), convention=convention)
        if match := re.fullmatch(r"PPL\s*<=\s*" + NUMBER, written):
            return cls(max_perplexity=float(match[1]))
        if match := re.fullmatch(r"KL\s*<=\s*" + NUMBER, written):
            return cls(max_kl=float(match[1]))
        if match := re.fullmatch(NUMBER + r"\s*([KMGT]?)\s*FLOPS?", written):
            return cls(max_flops=_whole(match[1], PREFIXES[match[2]]))
        if match := re.fullmatch(NUMBER + r"\s*([KMGTB]?)\s*PARAM(?:ETER)?S?", written):
            return cls(params=_whole(match[1], PREFIXES["G" if match[2] == "B" else match[2]]))
        if match := re.fullmatch(NUMBER + r"\s*(?:([KMGT]I?)B|BYTES?)", written):
            return cls(stored_bytes=_whole(match[1], PREFIXES[match[2] or ""]))
        raise BudgetError(
            f"{reprlib.repr(text)} is not a budget; allowed are a ratio (0.6 or 60%), parameters (800M params), bytes (8GB, 8GiB or "
            "fit:8GB), a perplexity (ppl<=20), a KL divergence (kl<=0.05) and FLOPs per token (200M flops)."
        )


def in_bytes(amount: float, unit: int) -> int:
    """Convert an amount of `unit` (1e6 or 1e9 bytes) to whole bytes, rounded down once.

    The amount is taken as a decimal: 2.3 GB are 2,300,000,000 bytes, although 2.3 * 1e9 is less in binary.
    """
    return int(Fraction(repr(amount)) * unit)


def rounded_up(value: float, digits: int) -> str:
    """Format `value` with `digits` significant digits, rounded up, so that a budget with the result can be met."""
    return f"{Context(prec=digits, rounding=ROUND_CEILING).create_decimal(value):f}"


def _but(given: list[str]) -> str:
    return f" (got {' and '.join(given)})" if given else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(digits: str, factor: int) -> int:
    """Return digits * factor rounded down, computed without binary fractions."""
    whole, _, decimals = digits.partition(".")
    return int(whole + decimals) * factor // 10 ** len(decimals)


@dataclass(frozen=True)
class Decoder:
    """Memory that serving a decoder takes in addition to its weights, computed from its config.

    The KV cache counts full context in every layer, as transformers allocates it; this is an upper bound for sliding windows. The
    overhead is `OVERHEAD` plus the float32 logits of one token per sequence. The device's context and the activations of long prompts
    are not included.
    """

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    hidden: int  # inputs of the output head
    itemsize: int  # bytes per number

    @classmethod
    def of(cls, config: Any, itemsize: int) -> "Decoder | None":
        """Read a transformers config. Return None if it does not describe a decoder with attention in every layer."""
        if getattr(config, "is_encoder_decoder", False):
            return None
        text = config.get_text_config()
        keys = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        layers, heads, hidden, vocabulary = (getattr(text, key, None) or 0 for key in keys)
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if not all(isinstance(number, int) and number > 0 for number in (layers, heads, hidden, vocabulary, kv_heads)):
            return None
        # keys, values or single layers may have different sizes; the largest counts
        stated = [getattr(text, key, None) or 0 for key in ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")]
        return cls(layers, kv_heads, max(stated) or -(-hidden // heads), vocabulary, hidden, itemsize)

    def cache(self, context: int, batch: int) -> int:
        """Return the bytes of the keys and values of `batch` sequences of `context` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * batch * self.itemsize

    @property
    def head_params(self) -> int:
        """The numbers of the output head."""
        return self.hidden * self.vocabulary

    def overhead(self, batch: int) -> int:
        return OVERHEAD + 4 * batch * self.vocabulary


@dataclass(frozen=True)
class Curve:
    """A measured trade-off curve: falling size ratios and losses (nats per token) that never fall with them.

    Sizes are `linear` ratios, or, for coded layers, shares of the base model's bytes. Losses are held-out losses or KL divergences. If a
    smaller size was measured better than a larger one, the difference is noise, and the larger size's loss is used for both. Between
    sizes the curve is linear.
    """

    sizes: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], bits: Bits | None = None, value: Literal["loss", "kl"] = "loss") -> "Curve | None":
        """Return the curve over ranks of measured rows, which have `got` (else `asked`) and `loss`, or a loss measured in `bits`.

        The curve ends before the first loss that is not finite. Return None if it has no points.
        """
        over_ranks = [row for row in rows if not is_coded(row)]
        measured: list[tuple[Any, Any]] = [(row.get("got", row.get("asked")), _measured(row, bits, value)) for row in over_ranks]
        if bits is not None or value == "kl":  # skip sizes that were not measured so
            measured = [(size, loss) for size, loss in measured if loss is not None]
        return cls._of(measured)

    @classmethod
    def over_bytes(cls, rows: Sequence[Mapping[str, Any]], exact: float, value: Literal["loss", "kl"] = "loss") -> "Curve | None":
        """Return the curve over bytes of the rows of coded sizes, and of the base model, which takes the share `exact` of its bytes."""
        measured = [(row.get("got"), _measured(row, None, value)) for row in rows if is_coded(row)]
        base = [(exact, _measured(row, None, value)) for row in rows if not is_coded(row) and row.get("got") == 1.0]
        return cls._of([point for point in (*base, *measured) if point[1] is not None]) if measured else None

    @classmethod
    def _of(cls, measured: Sequence[tuple[Any, Any]]) -> "Curve | None":
        sizes: list[float] = []
        losses: list[float] = []
        for size, loss in sorted((point for point in measured if _is_number(point[0])), key=lambda point: -point[0]):
            if not (_is_number(loss) and math.isfinite(loss)):
                break
            sizes.append(size)
            losses.append(max([*losses[-1:], float(loss)]))
        return cls(tuple(sizes), tuple(losses)) if sizes else None

    def loss(self, size: float) -> float | None:
        """Return the predicted loss at a size, or None outside of the measured sizes. It never falls with falling size."""
        if not self.sizes[-1] <= size <= self.sizes[0]:
            return None
        for i in range(1, len(self.sizes)):
            if size > self.sizes[i]:
                share = (self.sizes[i - 1] - size) / (self.sizes[i - 1] - self.sizes[i])
                low, high = self.losses[i - 1], self.losses[i]
                return min(high, low + (high - low) * share)
        return self.losses[-1]


def _measured(row: Mapping[str, Any], bits: Bits | None, value: Literal["loss", "kl"]) -> Any:
    """Return the loss or the KL divergence of a row of a curve, or the loss measured in `bits`, on the same text."""
    if bits is None and value == "loss":
        return row.get("loss")
    parts = row.get("evaluation")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("kind") == QUANTISED[0]:
            part = {**part, "kind": QUANTIZED, "quantize": part.get(QUANTISED[1])}  # noqa: PLW2901
        wanted = (DIVERGENCE, None) if bits is None else (QUANTIZED, KIND_OF_BITS[bits])
        if isinstance(part, dict) and (part.get("kind"), part.get("quantize")) == wanted:
            values = part.get("values")
            if measured_on(part) == measured_on(row) and isinstance(values, dict):
                return values.get("kl_nats" if value == "kl" else "loss_nats")
    return None


def as_perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
