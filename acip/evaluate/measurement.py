"""One model, measured: `evaluate(model, tokenizer, what)` -> a row, with everything in `what` as a part of it.

    what          = [PerplexityOn(Text("wikitext2", "paper", 4096)), TaskScore("package:piqa", limit=500), Efficiency(), ...]
    row           = {asked, got, params, bytes, ..., "evaluation": [part, ...]}
    part          = {kind, label, key, what, values: {name with its unit: number}, seconds, ...}

A measurement is a frozen dataclass, so that its fields identify it: `key` is their hash. A part whose key is known already is not
measured again. One file per kind of measurement.
"""

import hashlib
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from acip.calibration.losses import as_base
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import Text
from acip.modeling_acip import QuantLinear
from acip.sizing.elastic_model import ElasticModel

Part = dict[str, Any]


class Known(Protocol):
    """Parts by key: a dict, or something that keeps them."""

    def __contains__(self, key: object) -> bool: ...
    def __getitem__(self, key: str) -> Part: ...
    def __setitem__(self, key: str, part: Part) -> None: ...


@dataclass
class Subject:
    """What is measured: a model that answers, and where it is known what it comes from."""

    model: PreTrainedModel
    tokenizer: Any
    any_size: ElasticModel | None = None
    reference: PreTrainedModel | None = None  # of KL, where `model` is not of any size
    windows: dict[Text, list[Tensor]] = field(default_factory=dict)  # of tokens, once they are read

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The base model, to be used inside only: of any size, it is the very same modules."""
        if self.any_size is not None:
            layers = self.any_size.layers
            if self.any_size.load_missing is not None:
                self.any_size.load_missing(layers, dict.fromkeys(layers))  # dense weights, where they were not read yet
            with as_base(layers):
                yield self.model
        elif self.reference is not None:
            yield self.reference
        else:
            raise EvaluationError("distance from the base model is measured of an artifact, or with `base` = the base model.")

    def plain(self) -> PreTrainedModel:
        """The model as it is exported: what its bytes, speed and memory are."""
        return self.model if self.any_size is None else self.any_size.materialize()


@dataclass(frozen=True)
class Measurement(ABC):
    """Something to measure, with all that decides its outcome in its fields."""

    kind: ClassVar[str]

    @abstractmethod
    def measure(self, subject: Subject) -> Part:
        """At least {"label": ..., "values": {...}}."""

    def read_by(self, tokenizer: Any) -> Self:
        """The same measurement, with what depends on the tokenizer filled in: its key is that of the outcome only then."""
        return self

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    @property
    def key(self) -> str:
        return key_of(self.identity())


def key_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def evaluate(
    model: PreTrainedModel | ElasticModel,
    tokenizer: Any,
    what: Sequence[Measurement],
    base: PreTrainedModel | None = None,
    known: Known | None = None,
    say: Callable[[Part], None] = lambda part: None,
) -> dict[str, Any]:
    """Measure `model` at the size it has. `base` is what KL is measured to, where `model` does not hold it.

    Parts in `known` (by key) are taken from there, new ones are put there at once; `say` hears of each that was measured.
    """
    parts_by_key: Known = {} if known is None else known
    subject = Subject(model.model, tokenizer, model) if isinstance(model, ElasticModel) else Subject(model, tokenizer, reference=base)
    was_training = subject.model.training
    subject.model.eval()
    parts = []
    for measurement in (one.read_by(tokenizer) for one in what):
        key = measurement.key
        if key not in parts_by_key:
            began = time.perf_counter()
            part = part_of(measurement, measurement.measure(subject))
            parts_by_key[key] = part | {"seconds": round(time.perf_counter() - began, 3)}
            say(parts_by_key[key])
        parts.append(parts_by_key[key])
    subject.model.train(was_training)
    return {**size_facts(model), "evaluation": parts}


def part_of(measurement: Measurement, outcome: Part) -> Part:
    """What `measurement` found, with what identifies it."""
    identity = json.loads(json.dumps(measurement.identity()))  # as it is read back
    return {"kind": measurement.kind, "key": key_of(identity), "what": identity, **outcome}


def size_facts(model: PreTrainedModel | ElasticModel) -> dict[str, Any]:
    """How large a model is, as every row of a trade-off curve says it.

    Bytes are those that are saved; of an AnySize before it is an artifact, its parameters' alone, up to 1 % less.
    A quantized matrix [M, N] is M N parameters.
    """
    if not isinstance(model, ElasticModel):
        matrices = (layer for layer in model.modules() if isinstance(layer, QuantLinear))  # their codes are no parameters
        params = sum(p.numel() for p in model.parameters()) + sum(layer.out_features * layer.in_features for layer in matrices)
        return {"params": params, "bytes": stored_bytes(model)}
    cut = model.cut
    assert cut is not None, "resize first"
    return {
        "asked": cut.asked,
        "got": cut.sizes["linear"],
        "convention": cut.convention,
        "got_paper": cut.sizes["paper"],
        "got_model": cut.sizes["model"],
        "params": cut.params,
        "bytes": cut.params * model.model.dtype.itemsize if cut.bytes is None else cut.bytes,
    }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that the model saves, a tied one once."""
    saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.itemsize for tensor in saved.values())


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """The row's finite numbers by name, flat: `task/piqa/acc`, `efficiency/latency_s`, ..."""
    found = {f"{part['label']}/{name}": float(value) for part in row["evaluation"] for name, value in part["values"].items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def label(*words: object) -> str:
    """Words as part of a metric's name: letters, digits, . _ -"""
    return "_".join(re.sub(r"[^\w.-]+", "_", str(word)).strip("_") for word in words if word not in ("", None))
