"""The loader of a resident model. It maps what it loads from the files of the node, if there are some (`storage.resident_files`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.artifact.loading import ModelLoader
from acip.artifact.manifest import DIGESTS
from acip.coding.codes import Codes
from acip.layers.packing import PackedLinear, as_bytes, from_bytes, packed_weight, supports_bytes
from acip.modeling_acip import weight_MN
from acip_platform.storage.resident_files import ResidentFiles

Compute = Callable[[], Mapping[str, Tensor]]


class ResidentLoader(ModelLoader):
    """A loader whose tensors replicas share. Without `files`, each reads and decodes the artifact, and has its own."""

    def __init__(self, artifact: Artifact, device: str | torch.device, files: ResidentFiles | None) -> None:
        super().__init__(artifact, device)
        self.files = files

    @cached_property
    def verified(self) -> ModelLoader:
        """A loader that compares what it reads with the artifact's checksums. Artifacts of early schemas have none."""
        artifact = self.artifact
        if isinstance(artifact.source, Folder) and f"{DIGESTS}.safetensors" in artifact.manifest["files"]:
            artifact = replace(artifact, source=Folder(artifact.source.folder, checked=True))
        return ModelLoader(artifact, self.device)

    def rest_tensors(self) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return self.verified.rest_tensors()

        return dict(self._get("rest", compute))

    def directions(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Return rows of factors. Factors that are read whole are mapped."""
        return [self._directions(*each) for each in wanted]

    def _directions(self, key: str, first: int, last: int) -> Tensor:
        def compute() -> dict[str, Tensor]:
            return {key: self.verified.directions([(key, first, last)])[0]}

        whole = first == 0 and last == self.factors.entry(key).rows
        return (self._get(key, compute) if whole else compute())[key]

    def dense_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        def compute(name: str) -> dict[str, Tensor]:
            return self.verified.dense_weights([name])

        return {f"{name}.weight": self._get(f"{name}.weight", partial(compute, name))[f"{name}.weight"] for name in names}

    def decoded(self, name: str, version: int) -> Codes:
        def compute() -> dict[str, Tensor]:
            codes = self.verified.decoded(name, version)
            return {"codes": codes.codes, "steps": codes.steps}

        tensors = self._get(f"{name}.codes-{version}", compute)
        return Codes(tensors["codes"], tensors["steps"])

    def packed(self, name: str, linear: Any) -> PackedLinear:
        """Return a linear layer of the model with a packed copy of its weight."""
        weight = weight_MN(linear)
        if self.files is None or type(linear) is not nn.Linear or not supports_bytes():
            return PackedLinear(linear)
        return PackedLinear(linear, from_bytes(self._get(f"{name}.packed", lambda: as_bytes(packed_weight(weight))), weight))

    def _get(self, name: str, compute: Compute) -> Mapping[str, Tensor]:
        return compute() if self.files is None else self.files.get(name, compute)
