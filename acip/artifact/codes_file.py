"""The file of the coded layers: several versions of each target layer as integer codes (acip.coding).

codes.safetensors     per layer NAME and version V = 0, 1, ..., from coarse to fine:

    NAME.V.unit       float32 []: the largest step size of the rows
    NAME.V.steps      float16 [M]: the step sizes, as shares of the unit
    NAME.V.stream     uint8 [bytes]: the codes [M, N], as Huffman codes

Units come first, then steps, then streams, so that all are aligned. Each of the three parts is in the order of sizes: the first
version of every layer, then the version of each step of the byte order. Growing from one size to another therefore reads one range of
each part. Versions that no size uses come last. manifest.json gives [bytes, loss] of each version in its field `codes`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from acip.artifact.manifest import CODES
from acip.artifact.reader import ArtifactReader
from acip.artifact.safetensors_ranges import DTYPES, Entry
from acip.coding.coded_model import CodedModel
from acip.coding.codes import STEP_BYTES, UNIT_BYTES, PackedCodes
from acip.errors import ArtifactError
from acip.modeling_acip import as_shares, from_shares
from acip.sizing.byte_order import ByteOrder, Version

PARTS = ("unit", "steps", "stream")


def write_codes(path: Path, coded: CodedModel) -> dict[str, Any]:
    """Write the coded layers to `path`, and return the field `codes` of the manifest."""
    used = [*coded.order.first.items(), *((step.name, step.version) for step in coded.order.steps)]
    every = ((name, version) for name, versions in coded.order.versions.items() for version in range(len(versions)))
    keys = list(dict.fromkeys([*used, *every]))
    header: dict[str, Any] = {}
    end = 0
    for part in PARTS:
        for name, version in keys:
            tensor = _part(coded.versions[name][version], part)
            dtype = next(text for text, dtype in DTYPES.items() if dtype == tensor.dtype)
            header[f"{name}.{version}.{part}"] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:  # save_file of safetensors sorts tensors by their names
        file.write(len(raw).to_bytes(8, "little") + raw)
        for part in PARTS:
            for name, version in keys:
                file.write(_part(coded.versions[name][version], part).numpy().tobytes())
    return {"layers": {name: [[each.bytes, each.loss] for each in versions] for name, versions in coded.order.versions.items()}}


def _part(packed: PackedCodes, part: str) -> Tensor:
    """Return one of the tensors of a version."""
    if part == "stream":
        return torch.frombuffer(bytearray(packed.stream), dtype=torch.uint8)
    unit, shares_M = as_shares(packed.steps)
    return unit if part == "unit" else shares_M


def open_codes(artifact: ArtifactReader) -> CodedModel:
    """Return the coded layers of an artifact. Versions are read from its file when they are used.

    Raise ArtifactError if the artifact has none, or if the file contradicts the manifest.
    """
    return CodedModel(stored := StoredVersions(artifact), ByteOrder(stored.facts))


class StoredVersions(Mapping[str, Sequence[PackedCodes]]):
    """The versions of each layer, in a file of an artifact. Nothing is kept in memory.

    All methods that read raise ArtifactError for a version that is damaged.
    """

    def __init__(self, artifact: ArtifactReader) -> None:
        self.where = f"{artifact.source.where}/{CODES}.safetensors"
        if CODES not in artifact.manifest:
            raise ArtifactError(
                f"{artifact.source.where} holds no coded layers. Set code: both or code: bits in the recipe, and calibrate again."
            )
        self.file = artifact.tensors(CODES)
        self.shapes = {row["name"]: (row["M"], row["N"]) for row in artifact.manifest["layers"]}
        self.facts = {name: [Version(*each) for each in versions] for name, versions in artifact.manifest[CODES]["layers"].items()}
        keys = [(name, version) for name, versions in self.facts.items() for version in range(len(versions))]
        if self.file.entries.keys() != {f"{name}.{version}.{part}" for name, version in keys for part in PARTS}:
            raise ArtifactError(f"{self.where} does not hold the versions that the manifest lists. Fetch the artifact again.")
        for name, version in keys:
            self._check(name, version)

    def _check(self, name: str, version: int) -> None:
        """Raise ArtifactError unless the tensors of a version have the bytes in the manifest and fit to the layer."""
        M, N = self.shapes[name]
        unit, steps, stream = (self.file.entry(f"{name}.{version}.{part}") for part in PARTS)
        stored = UNIT_BYTES + STEP_BYTES * M + stream.rows
        fit = _is(unit, torch.float32) and _is(steps, torch.float16, M) and _is(stream, torch.uint8, stream.rows)
        # a code takes at least one bit, so a stream cannot fill the memory
        if not fit or stored != self.facts[name][version].bytes or 8 * stream.rows < M * N:
            raise ArtifactError(
                f"{self.where}: version {version} of {name} does not fit to its layer of {M} x {N}, or to its bytes in the manifest. "
                "Fetch the artifact again."
            )

    def read(self, chosen: Mapping[str, int]) -> dict[str, PackedCodes]:
        """Return one version of each layer in `chosen`, by one read of the file."""
        tensors = self.file.read([f"{name}.{version}.{part}" for part in PARTS for name, version in chosen.items()])
        return {name: self._packed(name, [tensors[f"{name}.{version}.{part}"] for part in PARTS]) for name, version in chosen.items()}

    def _packed(self, name: str, tensors: Sequence[Tensor]) -> PackedCodes:
        unit, shares_M, stream = tensors
        steps_M = from_shares(unit, shares_M)
        if not steps_M.isfinite().all() or not (steps_M >= 0).all():
            raise ArtifactError(f"{self.where}: the step sizes of {name} are not finite, or negative. Fetch the artifact again.")
        return PackedCodes(stream.numpy().tobytes(), steps_M, self.shapes[name][1])

    def __getitem__(self, name: str) -> "StoredLayer":
        if name not in self.facts:
            raise KeyError(name)
        return StoredLayer(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)


class StoredLayer(Sequence[PackedCodes]):
    """The versions of one layer, in a file."""

    def __init__(self, stored: StoredVersions, name: str) -> None:
        self.stored, self.name = stored, name

    @overload
    def __getitem__(self, version: int) -> PackedCodes: ...
    @overload
    def __getitem__(self, version: slice) -> list[PackedCodes]: ...
    def __getitem__(self, version: int | slice) -> PackedCodes | list[PackedCodes]:
        chosen = range(len(self))[version]
        if isinstance(chosen, range):
            return [self[each] for each in chosen]
        return self.stored.read({self.name: chosen})[self.name]

    def __len__(self) -> int:
        return len(self.stored.facts[self.name])


def _is(entry: Entry, dtype: torch.dtype, *shape: int) -> bool:
    return entry.dtype == dtype and entry.shape == shape
