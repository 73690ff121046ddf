"""The loader of a resident model. Replicas of a node share what it loads.

tensors that the artifact holds as they are      are mapped from the artifact, as every loader does
coded tensors, codes of layers, packed copies    are decoded or packed once, and mapped from files of the node (`ResidentFiles`)
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.artifact.loading import ModelLoader
from acip.artifact.manifest import DIGESTS
from acip.artifact.safetensors_ranges import Entry
from acip.coding.codes import Codes
from acip.layers.packing import PackedLinear, as_bytes, from_bytes, packed_weight, supports_bytes
from acip_platform.storage.resident_files import ResidentFiles


class ResidentLoader(ModelLoader):
    """A loader whose tensors replicas share. Without `files`, each decodes and packs its own."""

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
        files = self._files(self.artifact.tensors("rest").entries.values())
        return super().rest_tensors() if files is None else dict(files.get("rest", lambda: self.verified.rest_tensors()))  # noqa: PLW0108

    def directions(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Return rows of factors. Coded factors are kept if they are read whole."""
        entries = [self.factors.entry(key) for key, *_ in wanted]
        files = self._files(entries)
        if files is None or any(first or last < entry.rows for entry, (_, first, last) in zip(entries, wanted, strict=True)):
            return super().directions(wanted)

        def compute(key: str, first: int, last: int) -> dict[str, Tensor]:
            return {key: self.verified.directions([(key, first, last)])[0]}

        return [files.get(key, partial(compute, key, first, last))[key] for key, first, last in wanted]

    def dense_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        files = self._files(self.dense.entry(f"{name}.weight") for name in names)
        if files is None:
            return super().dense_weights(names)

        def compute(name: str) -> dict[str, Tensor]:
            return self.verified.dense_weights([name])

        return {f"{name}.weight": files.get(f"{name}.weight", partial(compute, name))[f"{name}.weight"] for name in names}

    def decoded(self, name: str, version: int) -> Codes:
        if self.files is None:
            return super().decoded(name, version)

        def compute() -> dict[str, Tensor]:
            codes = self.verified.decoded(name, version)
            return {"codes": codes.codes, "steps": codes.steps}

        return Codes(**self.files.get(f"{name}.codes-{version}", compute))

    def packed(self, name: str, linear: nn.Module) -> PackedLinear:
        if self.files is None or type(linear) is not nn.Linear or not supports_bytes():
            return super().packed(name, linear)
        weight = linear.weight
        return PackedLinear(linear, from_bytes(self.files.get(f"{name}.packed", lambda: as_bytes(packed_weight(weight))), weight))

    def _files(self, entries: Iterable[Entry]) -> ResidentFiles | None:
        """Return the files, if there are some, and if tensors of the artifact need them because they are coded."""
        return self.files if any(entry.coded is not None for entry in entries) else None
