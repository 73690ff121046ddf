"""An opened artifact: its checked manifest, its files, its tensors by ranges of rows, and its tables."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from acip.artifact.byte_sources import Folder, Source
from acip.artifact.manifest import CODES, CONFIG, DIGESTS, MANIFEST, check_manifest
from acip.artifact.safetensors_ranges import TensorFile
from acip.errors import ArtifactError
from acip.modeling_acip import MODEL_TYPE, base_config
from acip.recipe import Recipe
from acip.sizing.budget import Bits, Curve, Decoder
from acip.sizing.byte_order import Version
from acip.sizing.byte_sizes import ByteSizes, LayerBytes, with_exact
from acip.sizing.cut_table import CutTable, LayerShape, Weights
from acip.utils.atomic import atomic_file

COPY_CHUNK_BYTES = 64 << 20  # bytes of a file that are in memory at once


@dataclass(frozen=True)
class ArtifactReader:
    """An opened artifact.

    `source` is where its bytes are. `folder` is a local folder: the artifact itself, or the place for copies of those files that
    transformers reads by path.
    """

    folder: Path
    manifest: dict[str, Any]
    source: Source

    @classmethod
    def open(cls, folder: str | Path, source: Source | None = None, verify: bool = False) -> Self:
        """Open an artifact, check its manifest, and check that every file has the size in the manifest.

        The bytes are read from `source` (default: `folder`). `verify` also reads every file and compares its sha256.
        Raise ArtifactError if the artifact is incomplete, corrupted, or of a schema that this code does not read.
        """
        folder = Path(folder).absolute()  # later reads must not depend on the working directory
        source = source or Folder(folder)
        try:
            (raw,) = source.read(MANIFEST, [(0, source.size(MANIFEST))])
        except ArtifactError:
            raise ArtifactError(
                f"{source.where} holds no {MANIFEST}: it is not an artifact, or its writing was cut short. "
                "Calibrate again, or check the path."
            ) from None
        try:
            manifest = json.loads(bytes(raw).decode())
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{source.where}/{MANIFEST} is not JSON ({error}). Fetch the artifact again.") from error
        check_manifest(manifest, source.where)
        for file, facts in manifest["files"].items():
            if (size := source.size(file)) != facts["bytes"]:
                raise ArtifactError(
                    f"{source.where}/{file} is {size:,} bytes; its size in the manifest is {facts['bytes']:,} bytes. "
                    "Fetch the artifact again."
                )
            if verify:
                for _ in _verified_chunks(source, file, facts):
                    pass
        return cls(folder, manifest, source)

    def local(self, file: str) -> Path:
        """Return a file of the artifact as a local path. A file that is not in `folder` is copied there and verified first."""
        path = self.folder / file
        if not path.is_file():
            self.copy(file, path)
        return path

    def copy(self, file: str, path: Path) -> None:
        """Copy a file of the artifact to `path` atomically, and verify its sha256."""
        facts = self.manifest["files"].get(file)
        if facts is None:
            raise ArtifactError(f"{self.source.where} has no {file}. Fetch the artifact again.")
        with atomic_file(path) as partial, partial.open("wb") as written:
            for chunk in _verified_chunks(self.source, file, facts):
                written.write(chunk)

    def tensors(self, file: str) -> TensorFile:
        """Return one of the artifact's safetensors files, named without its suffix. It is opened once."""
        if file not in self._tensor_files:
            digests = self._digests if self.source.checked else {}
            of_file = {key.removeprefix(f"{file}/"): value for key, value in digests.items() if key.startswith(f"{file}/")}
            self._tensor_files[file] = TensorFile(self.source, f"{file}.safetensors", of_file)
        return self._tensor_files[file]

    @cached_property
    def _tensor_files(self) -> dict[str, TensorFile]:
        return {}

    @cached_property
    def _digests(self) -> dict[str, Tensor]:
        file = f"{DIGESTS}.safetensors"
        facts = self.manifest["files"].get(file, {"bytes": 0, "sha256": ""})
        return load(b"".join(_verified_chunks(self.source, file, facts)))

    @property
    def recipe(self) -> Recipe:
        """The recipe of the calibration."""
        return Recipe.from_dict(self.manifest["recipe"])

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The measured trade-off curve, one row per size."""
        return self.manifest["curve"]

    def table(self) -> CutTable:
        """Return the table that turns a budget into one rank per layer."""
        layers = tuple(LayerShape(row["name"], row["M"], row["N"], row["bias"]) for row in self.manifest["layers"])
        order = self.tensors("order").read(["layer"])["layer"]
        misfit = ArtifactError(f"{self.source.where}: the removal order does not fit the layer table. Fetch the artifact again.")
        if order.dtype != torch.int32 or order.ndim != 1 or not bool(((order >= 0) & (order < len(layers))).all()):
            raise misfit
        codes_only = self.recipe.code == "bits"  # no direction can be removed
        if torch.bincount(order.long(), minlength=len(layers)).tolist() != [0 if codes_only else layer.K for layer in layers]:
            raise misfit
        dense, recipe = self.tensors("dense"), self.recipe
        itemsizes = tuple(dense.entry(f"{layer.name}.weight").dtype.itemsize for layer in layers)
        weights = Weights(itemsizes, self.tensors("rest").decoded_bytes)
        return CutTable(
            layers, order, recipe.adapter_rows, self.manifest["rest_params"], recipe.storage, recipe.dense_if_no_saving or codes_only,
            weights=weights,
            decoder=Decoder.of(self.config, max(itemsizes)),
            curve=Curve.of(self.curve),
            kl=Curve.of(self.curve, value="kl"),
            byte_sizes=self._byte_sizes(layers, weights) if CODES in self.manifest else None,
            quantized={bits: curve for bits in get_args(Bits) if (curve := Curve.of(self.curve, bits))},
        )  # fmt: skip

    def _byte_sizes(self, layers: Sequence[LayerShape], weights: Weights) -> ByteSizes:
        coded = {name: [Version(*each) for each in versions] for name, versions in self.manifest[CODES]["layers"].items()}
        dense = {layer.name: self.tensors("dense").entry(f"{layer.name}.weight") for layer in layers}
        in_memory = {
            layer.name: LayerBytes(layer.M * layer.N, layer.M * layer.N + 4 * layer.M, dense[layer.name].bytes) for layer in layers
        }
        sizes = ByteSizes(
            order=with_exact(coded, {name: sum(entry.stored_chunks(0, entry.rows)) for name, entry in dense.items()}),
            layers=in_memory, rest=self.tensors("rest").data_bytes, rest_memory=weights.rest,
            base=weights.rest + sum(layer.exact for layer in in_memory.values()),
        )  # fmt: skip
        share = sizes.share(None)
        return replace(sizes, loss=Curve.over_bytes(self.curve, share), kl=Curve.over_bytes(self.curve, share, value="kl"))

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the base model."""
        path = self.local(CONFIG)
        try:
            fields, _ = PreTrainedConfig.get_config_dict(path.parent)  # also decodes infinity and NaN, which JSON lacks
            if fields["model_type"] == MODEL_TYPE:
                return base_config(fields)
            return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        except Exception as error:  # a malformed configuration makes transformers raise exceptions of any type
            raise ArtifactError(f"{self.source.where}/{CONFIG} does not describe a model: {error}") from error

    def tokenizer(self) -> Any:
        """Return the tokenizer of the base model."""
        for file in self.manifest["files"]:
            if not file.endswith(".safetensors"):
                self.local(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            tokenizer("a")  # some malformed files raise only when the tokenizer is used
            return tokenizer
        except Exception as error:  # as above; the tokenizers library raises bare Exceptions
            raise ArtifactError(f"{self.source.where}: the tokenizer files can't be loaded: {error}") from error

    def __deepcopy__(self, memo: Any) -> Self:
        """Return the same object: an opened artifact is immutable."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without opened files."""
        return {"folder": self.folder, "manifest": self.manifest, "source": self.source}


def _verified_chunks(source: Source, file: str, facts: Mapping[str, Any]) -> Iterator[memoryview]:
    """Yield a whole file, one chunk in memory at a time. Raise ArtifactError after the last one if the sha256 is wrong."""
    sha = hashlib.sha256()
    for start in range(0, facts["bytes"], COPY_CHUNK_BYTES):
        (chunk,) = source.read(file, [(start, min(start + COPY_CHUNK_BYTES, facts["bytes"]))])
        sha.update(chunk)
        yield chunk
    if sha.hexdigest() != facts["sha256"]:
        raise ArtifactError(f"{source.where}/{file} is corrupted: its sha256 is not the manifest's. Fetch the artifact again.")
