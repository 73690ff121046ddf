"""Measurements of a model: `evaluate(model, tokenizer, what)` returns a row with one part per measurement in `what`.

    what          = [PerplexityOn(Text("wikitext2", "paper", 4096)), TaskScore("package:piqa", limit=500), Efficiency(), ...]
    row           = {asked, got, params, bytes, ..., "evaluation": [part, ...]}
    part          = {kind, label, key, what, values: {name with its unit: number}, seconds, ...}

A measurement is a frozen dataclass, identified by its fields: `key` is their hash. A part whose key is known is not measured again.
Each kind of measurement has its own file.
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
from acip.calibration.training_mode import evaluating
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import Text
from acip.modeling_acip import CodedLinear, QuantLinear, encoded_tensors
from acip.sizing.budget import BITS_PER_WEIGHT
from acip.sizing.elastic_model import ElasticModel

Part = dict[str, Any]


class Known(Protocol):
    """A mapping from keys to parts: a dict, or a persistent store."""

    def __contains__(self, key: object) -> bool: ...
    def __getitem__(self, key: str) -> Part: ...
    def __setitem__(self, key: str, part: Part) -> None: ...


@dataclass
class Subject:
    """The model under measurement, with its tokenizer and, if available, its base model."""

    model: PreTrainedModel
    tokenizer: Any
    any_size: ElasticModel | None = None
    reference: PreTrainedModel | None = None  # the base model for KL, if `model` is not an ElasticModel
    windows: dict[Text, list[Tensor]] = field(default_factory=dict)  # windows of tokens that were read already

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """Yield the base model, valid only in the context: an ElasticModel uses the same modules. EvaluationError if there is none."""
        if self.any_size is not None:
            layers = self.any_size.layers
            self.any_size.load_base()
            with as_base(layers):
                yield self.model
        elif self.reference is not None:
            yield self.reference
        else:
            raise EvaluationError("the divergence from the base model needs an artifact, or a model with `base`, its base model.")

    def plain(self) -> PreTrainedModel:
        """Return the model in its exported form, for bytes, speed and memory."""
        return self.model if self.any_size is None else self.any_size.materialize()


@dataclass(frozen=True)
class Measurement(ABC):
    """A kind of measurement. Its fields determine its outcome."""

    kind: ClassVar[str]

    @abstractmethod
    def measure(self, subject: Subject) -> Part:
        """Measure `subject`. Return a part with at least {"label": ..., "values": {...}}."""

    def read_by(self, tokenizer: Any) -> Self:
        """Return this measurement with the fields that depend on the tokenizer filled in. Only then its key identifies the outcome."""
        return self

    def identity(self) -> dict[str, Any]:
        """Return the kind and the fields, from which the key is computed."""
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
    on_part: Callable[[Part], None] = lambda part: None,
) -> dict[str, Any]:
    """Measure `model` at its present size. Return a row. `base` is the base model for KL, if `model` does not contain it.

    A model of `acip.from_pretrained` is measured as its ElasticModel until it is compressed.
    Parts whose key is in `known` are taken from there; new parts are stored there at once, and `on_part(part)` is called for each of them.
    """
    parts_by_key: Known = {} if known is None else known
    if not isinstance(model, ElasticModel):
        model = getattr(model, "any_size", None) or model
    subject = Subject(model.model, tokenizer, model) if isinstance(model, ElasticModel) else Subject(model, tokenizer, reference=base)
    parts = []
    with evaluating(subject.model):
        for measurement in (item.read_by(tokenizer) for item in what):
            key = measurement.key
            if key not in parts_by_key:
                start = time.perf_counter()
                part = part_of(measurement, measurement.measure(subject))
                parts_by_key[key] = part | {"seconds": round(time.perf_counter() - start, 3)}
                on_part(parts_by_key[key])
            parts.append(parts_by_key[key])
    return {**size_facts(model), "evaluation": parts}


def part_of(measurement: Measurement, outcome: Part) -> Part:
    """Return the outcome of `measurement` with its kind, key and identity."""
    identity = json.loads(json.dumps(measurement.identity()))  # in the form that JSON returns
    return {"kind": measurement.kind, "key": key_of(identity), "what": identity, **outcome}


def size_facts(model: PreTrainedModel | ElasticModel) -> dict[str, Any]:
    """Return the size of a model in the fields of a trade-off curve's row.

    Bytes are those of the saved files. For an ElasticModel that is not from an artifact, they are those of the parameters, up to 1 % less.
    A quantized or coded matrix [M, N] counts as M N parameters. `got` is a share of the base model's bytes for a coded size, else a
    `linear` ratio. `flops` are those of a token, without attention (`CutTable.flops`).
    """
    if not isinstance(model, ElasticModel):
        matrices = (layer for layer in model.modules() if isinstance(layer, QuantLinear | CodedLinear))  # their codes are buffers
        params = sum(p.numel() for p in model.parameters()) + sum(layer.out_features * layer.in_features for layer in matrices)
        return {"params": params, "bytes": saved_bytes(model)}
    cut = model.cut
    assert cut is not None, "resize first"
    if cut.bits_per_weight is not None:
        got = {"got": cut.sizes["bytes"], "convention": "bytes", BITS_PER_WEIGHT: cut.bits_per_weight}
    else:
        got = {"got": cut.sizes["linear"], "convention": cut.convention, "got_paper": cut.sizes["paper"], "got_model": cut.sizes["model"]}
    return {
        "asked": cut.asked,
        **got,
        "params": cut.params,
        "bytes": cut.params * model.model.dtype.itemsize if cut.bytes is None else cut.bytes,
        **({} if model.table.decoder is None else {"flops": model.table.flops(cut.removed)}),
    }


def saved_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the tensors in the files of a model, which are encoded for a model with coded layers."""
    if (getattr(model.config, "acip", None) or {}).get("bfloat16") is None:
        return stored_bytes(model)
    return sum(tensor.nbytes for tensor in encoded_tensors(model)[0].values())


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors in the state dict; tied tensors count once."""
    saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.itemsize for tensor in saved.values())


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row by name: `task/piqa/acc`, `efficiency/latency_s`, ..."""
    numbers = {f"{part['label']}/{name}": float(value) for part in row["evaluation"] for name, value in part["values"].items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def label(*words: object) -> str:
    """Join words into a part of a metric's name, of letters, digits, and . _ -"""
    return "_".join(re.sub(r"[^\w.-]+", "_", str(word)).strip("_") for word in words if word not in ("", None))
