"""`Artifact`: a folder from which a model of any size is loaded.

    Artifact.save(folder, base, calibration, provenance)     write it (writer.py)
    Artifact.save_coded(folder, base, recipe, codes, ...)    write one that holds codes only
    artifact = Artifact.open(folder)                         check it (manifest.py, reader.py)
    artifact.load(size=0.6)                                  an ElasticModel; reads only the bytes that the size needs (loading.py)
    artifact.unloaded()                                      the same without the target layers, which are loaded block by block
    artifact.record_curve(rows)                              store a measured trade-off curve

ARTIFACT.md specifies the format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acip.artifact import manifest, writer
from acip.artifact.codes_file import open_codes
from acip.artifact.loading import ModelLoader
from acip.artifact.reader import ArtifactReader
from acip.base import Base
from acip.calibration.result import Calibration
from acip.coding.coded_model import CodedModel
from acip.errors import ArtifactError
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel


class Artifact(ArtifactReader):
    """An opened artifact, and the functions that write one."""

    @classmethod
    def save(
        cls, folder: str | Path, base: Base, calibration: Calibration, provenance: Mapping[str, Any], codes: CodedModel | None = None
    ) -> "Artifact":
        """Write a calibrated model to `folder`, and open it. Files of an earlier, interrupted attempt are overwritten.

        `codes` are coded versions of the target layers of the base model, for sizes in bytes. Raise ArtifactError if `codes` are of other
        layers, or if `folder` holds other files.
        """
        writer.write_artifact(Path(folder), base, calibration, provenance, codes)
        return cls.open(folder)

    @classmethod
    def save_coded(cls, folder: str | Path, base: Base, recipe: Recipe, codes: CodedModel, provenance: Mapping[str, Any]) -> "Artifact":
        """Write coded versions of the target layers of `base`, and no directions, to `folder`, and open it.

        `recipe.code` is "bits". The only size in ranks is 1.0, the base model; all others are budgets of bytes. Files of an earlier,
        interrupted attempt are overwritten. Raise ArtifactError if `codes` are of other layers, or if `folder` holds other files.
        """
        writer.write_coded(Path(folder), base, recipe, codes, provenance)
        return cls.open(folder)

    def tuned(
        self, folder: str | Path, factors: Mapping[str, Tensor], adapters: Mapping[str, Tensor], provenance: Mapping[str, Any]
    ) -> "Artifact":
        """Write a copy of this artifact with other factors and adapters to the empty folder `folder`, and open it.

        `factors` holds new first rows by tensor name, `adapters` whole tensors. The other rows, the order, and all other files stay
        bit for bit the same, coded layers included: they are those of the base model. The curve is left empty, because it must be
        measured again.
        """
        writer.write_tuned(self, Path(folder), factors, adapters, provenance)
        return self.open(folder)

    @staticmethod
    def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
        """Write the manifest to `folder` atomically. It must be the last file of an artifact to be written."""
        manifest.write_manifest(folder, content)

    def record_curve(self, rows: list[dict[str, Any]]) -> "Artifact":
        """Store the measured trade-off curve in the manifest, and return the artifact opened again.

        Nothing else changes. Raise ArtifactError if the artifact is not in a local folder, or if `rows` are malformed.
        """
        if not (self.folder / manifest.MANIFEST).is_file():
            raise ArtifactError(f"{self.source.where} can't be changed in place. Fetch it, record the curve, publish the manifest.")
        manifest.write_manifest(self.folder, {**self.manifest, "curve": rows})
        return self.open(self.folder)

    def load(self, device: str | torch.device = "cpu", size: Budget | float | str | None = None) -> ElasticModel:
        """Load the model.

        Without `size`, every layer is loaded whole, and the model is the base model, bit for bit. With a `size`, only the bytes
        that it needs are read; a later `resize` to a larger size reads the difference.
        """
        any_size, loader = self._unloaded(device)
        if size is None:
            loader.load_missing(any_size.layers, loader.all_stored_ranks(), dense=True)
        any_size.resize(Budget(ratio=1.0) if size is None else size)
        return any_size

    def unloaded(self, device: str | torch.device = "cpu") -> ElasticModel:
        """Return the model without the weights of its target layers, for callers that load and unload them a block at a time."""
        return self._unloaded(device)[0]

    def _unloaded(self, device: str | torch.device) -> tuple[ElasticModel, ModelLoader]:
        loader = ModelLoader(self, device)
        return ElasticModel(loader.model(), self.table(), loader.load_size), loader

    def coded(self) -> CodedModel:
        """Return the coded versions of the target layers. They are read from the file when they are used.

        Raise ArtifactError if the artifact has none.
        """
        return open_codes(self)
