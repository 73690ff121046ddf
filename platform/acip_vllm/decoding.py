"""Encoded tensors of an export are decoded while its weights are loaded."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from acip.modeling_acip import PARTS, decoded_tensors

BATCH_BYTES = 256 << 20  # of encoded tensors that are decoded together, in several threads


def decoded(weights: Iterable[tuple[str, Tensor]], acip: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an export under the names of its layers. `acip` has the fields "layers" and "bfloat16" of its config.

    A coded layer is yielded as NAME.codes (int8) and NAME.steps (float32). Raise ValueError if tensors are missing or damaged.
    """
    coded = {name for name, row in acip["layers"].items() if row["form"] == "codes"}
    seen: set[str] = set()
    waiting: dict[str, dict[str, Tensor]] = {}  # the tensors of coded layers that are not complete
    batch: dict[str, Tensor] = {}
    fields: dict[str, dict[str, Any]] = {"layers": {}, "bfloat16": {}}

    def flush() -> Iterator[tuple[str, Tensor]]:
        yield from decoded_tensors(batch.copy(), fields).items()
        batch.clear()
        fields.update(layers={}, bfloat16={})

    for name, tensor in weights:
        layer, _, part = name.rpartition(".")
        if layer in coded and part in PARTS:
            waiting.setdefault(layer, {})[name] = tensor
            if len(waiting[layer]) < len(PARTS):
                continue
            batch |= waiting.pop(layer)
            fields["layers"][layer] = acip["layers"][layer]
            seen.add(layer)
        elif name in acip["bfloat16"]:
            batch[name] = tensor
            fields["bfloat16"][name] = acip["bfloat16"][name]
        else:
            yield name, tensor
            continue
        if sum(value.nbytes for value in batch.values()) >= BATCH_BYTES:
            yield from flush()
    for layer in coded - seen:  # not complete: decoding raises an error that says what is missing
        batch |= waiting.get(layer, {})
        fields["layers"][layer] = acip["layers"][layer]
    yield from flush()
