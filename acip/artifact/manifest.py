"""The manifest of an artifact: the constants of the format, the checks of a manifest, and writing it.

An artifact is a folder of safetensors and JSON files (ARTIFACT.md). Nothing in it is executed.

manifest.json         schema, provenance, recipe, layer table, curve, and size and sha256 of every other file. It is written
                      last and atomically: a folder without it is not an artifact
factors.safetensors   per target layer `NAME.left` [S, M] and `NAME.right` [S, N]: one direction per row, most important first,
                      adapters folded in, so that a size is a prefix. S is the largest rank that stores less than the dense
                      layer. If the adapter is beside the layer, its R rows come before the directions
dense.safetensors     `NAME.weight` [M, N]: the dense weights, for the layers that are dense at a size
rest.safetensors      every other tensor of the base model (embeddings, norms, biases, head)
order.safetensors     `layer` [D]: the layer that loses a direction at each removal, in the order of removal; `score`,
                      `crossing`; `direction`: the basis indices of each layer in the order of importance
codes.safetensors     if the target layers are coded: several versions of each, as integer codes (codes_file.py)
digests.safetensors   `FILE/TENSOR` [chunks, 32]: sha256 of each chunk of rows (safetensors_ranges.py) of the files above
adapters.safetensors  the adapters alone, for PEFT: `NAME.PLACE.A` and `NAME.PLACE.B` (scaled). Places are right (A [R, N],
                      B [S, R]) and left (A [R, S], B [M, R]), or layer (A [R, N], B [M, R]). No size reads this file
config.json           the configuration of the base model, with the fields that make transformers load an artifact (modeling_acip.py)
tokenizer files, generation_config.json    those of the base model
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from acip.errors import ArtifactError
from acip.sizing.domains import DOMAINS
from acip.utils.atomic import atomic_file

SCHEMA = 5  # with codes, and bfloat16 tensors in fewer bytes (lossless.py)
UNCODED_SCHEMA = 4  # without both, otherwise equal
READABLE = range(3, SCHEMA + 1)  # in schema 3, config.json is the unchanged configuration of the base model
MANIFEST = "manifest.json"
CONFIG = "config.json"
DIGESTS = "digests"
TENSOR_FILES = ("factors", "dense", "rest", "order", "adapters")  # of every artifact
CODES = "codes"  # file and field of the manifest, if the target layers are coded
DIGESTED = (*TENSOR_FILES, CODES)


def check_manifest(manifest: Any, where: str) -> None:
    """Raise ArtifactError for a manifest that this code cannot have written; `where` names the artifact in the message.

    Refused are unreadable schemas, missing fields, paths that leave the folder, and numbers out of range.
    """
    if not isinstance(manifest, dict) or not _is_count(manifest.get("schema")):
        raise ArtifactError(f"{where}/{MANIFEST} is not an acip manifest.")
    if manifest["schema"] not in READABLE:
        remedy = "Upgrade acip." if manifest["schema"] > SCHEMA else "Schemas before the first release are not supported: calibrate again."
        raise ArtifactError(f"{where} has schema {manifest['schema']}; this acip reads {READABLE[0]} to {SCHEMA}. {remedy}")
    for key, kind in (("base", dict), ("recipe", dict), ("layers", list), ("files", dict), ("curve", list), ("rest_params", int)):
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{where}/{MANIFEST}: {key!r} is missing or not a {kind.__name__}. Fetch the artifact again.")
    for file, facts in manifest["files"].items():
        path = PurePosixPath(file)
        inside = (
            file == str(path) and path.parts and re.fullmatch(r"[\w./ @+-]+", file) and not path.is_absolute() and ".." not in path.parts
        )
        if not inside or not isinstance(facts, dict) or not _is_count(facts.get("bytes")) or not isinstance(facts.get("sha256"), str):
            raise ArtifactError(
                f"{where}/{MANIFEST} lists {file!r}, which is outside its folder or has no size and sha256. "
                "acip does not write such entries: do not trust this artifact."
            )
    for row in manifest["layers"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not isinstance(row.get("bias"), bool):
            raise ArtifactError(f"{where}/{MANIFEST}: malformed layer row {row!r}.")
        counts = [row[key] for key in ("M", "N", "stored_rank") if _is_count(row.get(key))]
        if len(counts) < 3 or not all(0 < side < 2**24 for side in counts[:2]) or counts[2] > min(counts[:2]):
            raise ArtifactError(f"{where}/{MANIFEST}: malformed layer row {row!r}.")
    names = {row["name"] for row in manifest["layers"]}
    if not names or len(names) < len(manifest["layers"]) or not _is_count(manifest["rest_params"]):
        raise ArtifactError(f"{where}/{MANIFEST}: the layer table is empty or has duplicate names, or 'rest_params' is not a count.")
    _check_codes(manifest, names, where)
    if not all(_is_curve_row(row) for row in manifest["curve"]):
        raise ArtifactError(f"{where}/{MANIFEST}: malformed row of the curve.")
    if not all(isinstance(manifest["base"].get(key), str) for key in ("source", "digest")):
        raise ArtifactError(f"{where}/{MANIFEST} does not name its base model: 'base' lacks 'source' or 'digest'.")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest to `folder` atomically and durably. It must be the last file of an artifact to be written.

    Raise ArtifactError, and write nothing, if it could not be read back.
    """
    check_manifest(dict(manifest), str(folder))
    with atomic_file(folder / MANIFEST) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(dict(manifest), file, indent=1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _check_codes(manifest: Mapping[str, Any], names: set[str], where: str) -> None:
    """Raise ArtifactError unless schema 5, and no other, gives bytes and loss of at least one version of each layer in `codes`."""
    if (manifest["schema"] == SCHEMA) != (CODES in manifest):
        raise ArtifactError(f"{where}/{MANIFEST}: {CODES!r} is a field of schema {SCHEMA} and of no other. Fetch the artifact again.")
    if CODES not in manifest:
        return
    layers = manifest[CODES].get("layers") if isinstance(manifest[CODES], dict) else None
    if (
        not isinstance(layers, dict)
        or layers.keys() != names
        or not all(isinstance(versions, list) and versions and all(map(_is_version, versions)) for versions in layers.values())
    ):
        raise ArtifactError(
            f"{where}/{MANIFEST}: {CODES!r} does not list [bytes, loss] of the versions of each layer. Fetch the artifact again."
        )


def _is_version(version: Any) -> bool:
    if not isinstance(version, list) or len(version) != 2 or not _is_count(version[0]):
        return False
    return _is_count(version[1]) or (isinstance(version[1], float) and math.isfinite(version[1]))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _is_curve_row(row: Any) -> bool:
    """Return whether a row of the curve is well formed.

    Its values are scalars, except `evaluation`, a list of parts, and `domains`, which has numbers by domain (acip.sizing.domains).
    `got` is in [0, 1]. `loss` is at most 1e6 in magnitude, or not finite.
    """
    if not isinstance(row, dict) or not isinstance(row.get(DOMAINS, {}), dict):
        return False
    scalars = {key: value for key, value in row.items() if key not in ("evaluation", DOMAINS)}
    if not all(isinstance(each, dict) and all(map(_is_scalar, each.values())) for each in (scalars, *row.get(DOMAINS, {}).values())):
        return False
    numbers = {key: row[key] for key in ("got", "loss") if key in row}
    parts = row.get("evaluation", [])
    return (
        all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers.values())
        and 0 <= numbers.get("got", 0) <= 1
        and not 1e6 < abs(numbers.get("loss", 0)) < math.inf
        and isinstance(parts, list)
        and all(isinstance(part, dict) and isinstance(part.get("values", {}), dict) for part in parts)
    )
