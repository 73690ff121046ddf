"""Finished codes of an attempt that has not ended, so that a resumed job codes only the layers that are missing.

    finished layers -> a temporary folder -> RUNS/ATTEMPT/codes_IDENTITY-4f2a91c0, one folder per group of layers

    codes.safetensors     NAME.V.stream uint8 [bytes] and NAME.V.steps float32 [M] for each layer NAME and version V. Its metadata holds
                          the scales of the step sizes, and the number of inputs and the losses of each layer.
    sha256.json           its checksum, written last

IDENTITY is a checksum of everything that decides the codes: base model, text, and settings.
"""

import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from acip.calibration.state import SUMS
from acip.coding.coded_model import CodedLayer
from acip.coding.codes import PackedCodes
from acip.utils.checksums import sha256
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.storage.disk import StoreError, reason

FILE = "codes.safetensors"
PREFIX = "codes_"


class CodeCheckpoints:
    """The finished codes of an attempt, beside its other checkpoints. Problems are reported with the `emit` of `checkpoints`."""

    def __init__(self, checkpoints: Checkpoints, identity: str) -> None:
        self.store, self.attempt, self.emit = checkpoints.store, checkpoints.attempt, checkpoints.emit
        self.every_s, self.prefix = checkpoints.every_s, f"{PREFIX}{identity}-"

    def write(self, scales: Sequence[float], layers: Mapping[str, CodedLayer]) -> bool:
        """Write finished layers, and return whether it succeeded. An error is reported but not raised, so that coding continues."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "codes"
                folder.mkdir()
                _save(folder / FILE, scales, layers)
                (folder / SUMS).write_text(json.dumps({FILE: sha256(folder / FILE)}))
                # a random name, so that it differs from that of a damaged folder
                self.store.add(folder, f"{self.attempt}/{self.prefix}{secrets.token_hex(4)}", SUMS)
        except (StoreError, SafetensorError, OSError) as error:
            cause = reason(error) if isinstance(error, OSError) else error
            self.emit("stage", text=f"could not write the codes of {len(layers)} layers: {cause}")
            return False
        return True

    def read(self) -> Iterator[tuple[list[float], dict[str, CodedLayer]]]:
        """Yield (scales, layers) of each intact folder. Other folders are reported, and their layers have to be coded again."""
        for uri in sorted(self.store.complete(self.attempt, SUMS)):
            name = uri.rpartition("/")[2]
            if not name.startswith(self.prefix):
                continue
            try:
                with self.store.folder(uri) as folder:
                    if json.loads((folder / SUMS).read_text()) != {FILE: sha256(folder / FILE)}:
                        raise ValueError(f"{FILE} does not match its checksum")
                    found = _load(folder / FILE)
            except (StoreError, SafetensorError, OSError, ValueError) as error:
                self.emit("stage", text=f"codes {name} are damaged ({error}): coding their layers again")
                continue
            yield found


def remove_codes(checkpoints: Checkpoints) -> None:
    """Remove the finished codes of an attempt whose artifact holds them. An error is reported but not raised."""
    try:
        checkpoints.store.keep_only(checkpoints.attempt, [], PREFIX)
    except (StoreError, OSError) as error:
        checkpoints.emit("stage", text=f"could not remove the stored codes, which are not used any more: {error}")


def _save(path: Path, scales: Sequence[float], layers: Mapping[str, CodedLayer]) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {}  # views, because copies of all streams would take much memory
    for name, layer in layers.items():
        for i, packed in enumerate(layer.versions):
            arrays[f"{name}.{i}.stream"] = np.frombuffer(packed.stream, np.uint8)
            arrays[f"{name}.{i}.steps"] = packed.steps.numpy()
    facts = {name: {"inputs": layer.versions[0].inputs, "losses": list(layer.losses)} for name, layer in layers.items()}
    save_file(arrays, path, {"scales": json.dumps(list(scales)), "layers": json.dumps(facts)})


def _load(path: Path) -> tuple[list[float], dict[str, CodedLayer]]:
    layers: dict[str, CodedLayer] = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for name, facts in json.loads(metadata["layers"]).items():
            versions = [
                PackedCodes(
                    file.get_tensor(f"{name}.{i}.stream").numpy().tobytes(), file.get_tensor(f"{name}.{i}.steps").clone(), facts["inputs"]
                )
                for i in range(len(facts["losses"]))
            ]
            layers[name] = CodedLayer(versions, facts["losses"])
    return json.loads(metadata["scales"]), layers
