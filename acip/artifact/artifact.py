"""The artifact: a folder from which a model of any size is read. safetensors and JSON only; nothing in it is executed.

manifest.json         written last, atomically: without it the artifact does not exist. Schema, provenance, recipe,
                      layer table, curve, and size and sha256 of every other file
factors.safetensors   per target layer `NAME.left` [S, M], `NAME.right` [S, N]: one direction a row, most important first,
                      adapters folded in, so that a size is a prefix; S is the largest rank that is smaller than the dense
                      layer. Where the adapter sits beside the layer, its R rows come before the directions
dense.safetensors     `NAME.weight` [M, N]: for the layers that are dense at a size
rest.safetensors      every other tensor of the base model (embeddings, norms, biases, head)
order.safetensors     `layer` [D]: the layer that loses a direction, first to leave first; `score`, `crossing`, and
                      `direction`: each layer's basis indices in the order of importance
digests.safetensors   `FILE/TENSOR` [chunks, 32]: sha256 of each chunk of rows (acip.artifact.safetensors_ranges) of the files above
adapters.safetensors  the adapters by themselves, for PEFT; no size reads them: `NAME.PLACE.A`, `NAME.PLACE.B` (scaled) at
                      the places right (A [R, N], B [S, R]) and left (A [R, S], B [M, R]), or layer (A [R, N], B [M, R])
config.json           the base model's, with what makes transformers load an artifact (acip/modeling_acip.py)
tokenizer files, generation_config.json    the base model's own
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torch
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from acip.artifact.byte_sources import Folder, Source
from acip.artifact.reader import ModelLoader
from acip.artifact.safetensors_ranges import TensorFile, digests
from acip.base import Base
from acip.calibration.result import Calibration
from acip.errors import ArtifactError
from acip.layers.linear import ElasticLinear
from acip.layers.targets import targets, weight_MN
from acip.modeling_acip import MODEL_TYPE, artifact_config, base_config, classes
from acip.recipe import Recipe
from acip.sizing.budget import Bits, Budget, Curve, Decoder
from acip.sizing.cut_table import CutTable, LayerShape, Weights
from acip.sizing.elastic_model import ElasticModel
from acip.utils.checksums import sha256

SCHEMA = 4
READABLE = (3, SCHEMA)  # until 3, config.json was the base model's own
DIGESTS = "digests"
MANIFEST = "manifest.json"
CONFIG = "config.json"
COPY_CHUNK_BYTES = 64 << 20  # bytes of a file in memory at once
DIGESTED = ("factors", "dense", "rest", "order", "adapters")


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its checked manifest, where its bytes come from, and the folder for those that are needed as files."""

    folder: Path
    manifest: dict[str, Any]
    source: Source

    # ---- write

    @classmethod
    def save(cls, folder: str | Path, base: Base, calibration: Calibration, provenance: Mapping[str, Any]) -> "Artifact":
        """Write a calibrated model. `folder` may hold remains of a broken attempt; they are overwritten."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / MANIFEST).with_suffix(".partial").unlink(missing_ok=True)
        recipe, table, layers = calibration.recipe, calibration.table, targets(calibration.model)
        stored = {shape.name: shape.stored_rank(recipe.adapter_rows, recipe.storage, recipe.dense_if_no_saving) for shape in table.layers}
        factors: dict[str, Tensor] = {}
        adapters: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        inside: set[int] = set()
        for name, core in layers.items():
            assert isinstance(core, ElasticLinear)
            left, right = core.folded(stored[name])
            factors |= {f"{name}.left": left.to(core.left.dtype), f"{name}.right": right.to(core.left.dtype)}
            dense[f"{name}.weight"] = weight_MN(core.exact)
            inside.update(id(tensor) for tensor in core.parameters() if tensor is not core.bias)
            for place, lora in core.loras.items():
                A = lora.A[:, : stored[name]] if place == "left" else lora.A
                B = (lora.B[: stored[name]] if place == "right" else lora.B) * lora.scale
                adapters |= {f"{name}.{place}.A": A.to(core.left.dtype), f"{name}.{place}.B": B.to(core.left.dtype)}
        rest: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in (*calibration.model.named_parameters(), *_persistent_buffers(calibration.model)):
            if id(tensor) not in inside and id(tensor) not in seen:  # a tied head is stored once
                rest[name.replace(".original.", ".")] = tensor
                seen.add(id(tensor))
        scores = calibration.scores
        importance = scores.importance()
        order = {
            "layer": table.order,
            "score": scores.score,
            "crossing": scores.crossing,
            "direction": torch.cat([importance[name] for name in scores.names]).to(torch.int32),
        }
        for file, tensors in zip(DIGESTED, (factors, dense, rest, order, adapters), strict=True):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / f"{file}.safetensors")
        base.model.config.architectures = [type(base.model).__name__]
        for part in (base.model.config, getattr(base.model, "generation_config", None), base.tokenizer):
            if part is not None:  # a vision model has no words to read or write
                part.save_pretrained(folder)
        if base.model.can_generate():
            with suppress(ValueError):  # a class of its own, which transformers can't load
                classes(base.model.config.model_type, type(base.model).__name__)
                config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
                (folder / CONFIG).write_text(json.dumps(artifact_config(config, type(base.model).__name__), indent=1), encoding="utf-8")
        return cls._seal(folder, {
            "schema": SCHEMA,
            "base": {"source": base.source, "revision": base.revision, "digest": base.digest},
            "recipe": recipe.to_dict(),
            "provenance": dict(provenance),
            "stop_step": calibration.stop_step,
            "steps": len(calibration.history),
            "layers": [
                {"name": s.name, "M": s.M, "N": s.N, "bias": s.bias, "stored_rank": stored[s.name]} for s in table.layers
            ],
            "rest_params": table.rest_params,
        })  # fmt: skip

    def tuned(
        self, folder: str | Path, factors: Mapping[str, Tensor], adapters: Mapping[str, Tensor], provenance: Mapping[str, Any]
    ) -> "Artifact":
        """Write this artifact with other numbers into an empty `folder`: `factors` are tensors' new first rows, `adapters` whole tensors.

        The other rows, the order, and everything else stay bit for bit as they are; the curve is to be measured again.
        """
        folder = Path(folder)
        for file in self.manifest["files"]:
            if file not in (f"{changed}.safetensors" for changed in ("factors", "adapters", DIGESTS)):
                self.copy(file, folder / file)
        changed = {}
        for name, rows in self.tensors("factors").read(list(self.tensors("factors").entries)).items():
            first = factors.get(name, rows[:0])
            changed[name] = torch.cat([first.to(rows), rows[len(first) :]])
        save_file(changed, folder / "factors.safetensors")
        kept = self.tensors("adapters").read([name for name in self.tensors("adapters").entries if name not in adapters])
        save_file({**kept, **{name: matrix.cpu().contiguous() for name, matrix in adapters.items()}}, folder / "adapters.safetensors")
        return self._seal(folder, {**self.manifest, "provenance": dict(provenance)})

    @classmethod
    def _seal(cls, folder: Path, manifest: Mapping[str, Any]) -> "Artifact":
        """Complete the artifact in `folder`: digests, and last the manifest, with what describes the files."""
        save_file(dict(_digests(folder)), folder / f"{DIGESTS}.safetensors")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        facts = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)} for file in files}
        cls.write_manifest(folder, {**manifest, "curve": [], "files": facts})
        return cls.open(folder)

    @staticmethod
    def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
        """The last file of an artifact: without it there is none."""
        _write_atomically(folder / MANIFEST, dict(manifest))

    def record_curve(self, rows: list[dict[str, Any]]) -> "Artifact":
        """Put the measured trade-off curve into the manifest. Nothing else changes. Of a local artifact only."""
        if not (self.folder / MANIFEST).is_file():
            raise ArtifactError(f"{self.source.where} can't be changed in place. Fetch it, record the curve, publish the manifest.")
        self.write_manifest(self.folder, {**self.manifest, "curve": rows})
        return Artifact.open(self.folder)

    def __deepcopy__(self, memo: Any) -> "Artifact":
        """Itself: nothing of it changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Where it is, without opened files."""
        return {"folder": self.folder, "manifest": self.manifest, "source": self.source}

    # ---- read

    @classmethod
    def open(cls, folder: str | Path, source: Source | None = None, verify: bool = False) -> "Artifact":
        """Open and check an artifact: its manifest, and that every file has its size (`verify`: its checksums too).

        `source` is where its bytes are, None = in `folder`; of a source elsewhere only what has to be a file is copied there.
        """
        folder = Path(folder)
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
        check(manifest, source.where)
        for file, facts in manifest["files"].items():
            if (got := source.size(file)) != facts["bytes"]:
                raise ArtifactError(
                    f"{source.where}/{file} is {got:,} bytes; the manifest says {facts['bytes']:,} bytes. Fetch the artifact again."
                )
            if verify:
                for _ in _pieces(source, file, facts):
                    pass
        return cls(folder, manifest, source)

    def local(self, file: str) -> Path:
        """A file of the artifact as a local file, its checksum compared where it had to be copied."""
        path = self.folder / file
        if not path.is_file():
            self.copy(file, path)
        return path

    def copy(self, file: str, path: Path) -> None:
        """Write a file of the artifact to `path`, its checksum compared on the way."""
        facts = self.manifest["files"].get(file)
        if facts is None:
            raise ArtifactError(f"{self.source.where} has no {file}. Fetch the artifact again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as written:
                for piece in _pieces(self.source, file, facts):
                    written.write(piece)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def tensors(self, file: str) -> TensorFile:
        """One of the artifact's safetensors files, to be read in parts."""
        if file not in self._opened:
            self._opened[file] = self._open(file)
        return self._opened[file]

    @cached_property
    def _opened(self) -> dict[str, TensorFile]:
        return {}

    def _open(self, file: str) -> TensorFile:
        known = self._digests if self.source.checked else {}
        own = {key.removeprefix(f"{file}/"): value for key, value in known.items() if key.startswith(f"{file}/")}
        return TensorFile(self.source, f"{file}.safetensors", own)

    @cached_property
    def _digests(self) -> dict[str, Tensor]:
        file = f"{DIGESTS}.safetensors"
        return load(b"".join(_pieces(self.source, file, self.manifest["files"].get(file, {"bytes": 0, "sha256": ""}))))

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.manifest["recipe"])

    @property
    def curve(self) -> list[dict[str, Any]]:
        return self.manifest["curve"]

    def table(self) -> CutTable:
        layers = tuple(LayerShape(row["name"], row["M"], row["N"], row["bias"]) for row in self.manifest["layers"])
        order = self.tensors("order").read(["layer"])["layer"]
        misfit = ArtifactError(f"{self.source.where}: the removal order does not fit the layer table. Fetch the artifact again.")
        if order.dtype != torch.int32 or order.ndim != 1 or not len(order) or not 0 <= int(order.min()) <= int(order.max()) < len(layers):
            raise misfit
        if torch.bincount(order.long(), minlength=len(layers)).tolist() != [layer.K for layer in layers]:
            raise misfit
        dense, recipe = self.tensors("dense"), self.recipe
        itemsizes = tuple(dense.entry(f"{layer.name}.weight").dtype.itemsize for layer in layers)
        return CutTable(
            layers, order, recipe.adapter_rows, self.manifest["rest_params"], recipe.storage, recipe.dense_if_no_saving,
            weights=Weights(itemsizes, self.tensors("rest").data_bytes),
            decoder=Decoder.of(self.config, max(itemsizes)),
            curve=Curve.of(self.curve),
            quantized={bits: curve for bits in get_args(Bits) if (curve := Curve.of(self.curve, bits))},
        )  # fmt: skip

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The base model's."""
        path = self.local(CONFIG)
        try:
            fields, _ = PreTrainedConfig.get_config_dict(path.parent)  # which decodes what JSON has no number for
            if fields["model_type"] == MODEL_TYPE:
                return base_config(fields)
            return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever a foreign config makes of it
            raise ArtifactError(f"{self.source.where}/{CONFIG} describes no model: {error}") from error

    def tokenizer(self) -> Any:
        for file in self.manifest["files"]:
            if not file.endswith(".safetensors"):
                self.local(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            tokenizer("a")  # some files are found to be wrong only when they are used
            return tokenizer
        except Exception as error:  # as above, and what tokenizers raises is a bare Exception
            raise ArtifactError(f"{self.source.where}: its tokenizer's files describe none: {error}") from error

    def load(self, device: str | torch.device = "cpu", size: Budget | float | None = None) -> ElasticModel:
        """The resident model: of every size, at size 1.0, bit for bit the base model; or of one `size`, which grows when it is resized.

        At a size, only its bytes are read.
        """
        reader = ModelLoader(self, device)
        any_size = ElasticModel(reader.model(), self.table(), reader.fill)
        if size is None:
            reader.fill(any_size.layers, reader.everything(), dense=True)
        any_size.resize(1.0 if size is None else size)
        return any_size


def _digests(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in DIGESTED:
        written = TensorFile(Folder(folder), f"{file}.safetensors")
        for name, entry in written.entries.items():
            (piece,) = written.source.read(written.file, [(entry.start, entry.start + entry.rows * entry.row_bytes)])
            yield f"{file}/{name}", digests(piece, entry)


def _pieces(source: Source, file: str, facts: Mapping[str, Any]) -> Iterator[memoryview]:
    """A whole file, a piece in memory at a time; ArtifactError at its end where it is not what the manifest says."""
    sha = hashlib.sha256()
    for start in range(0, facts["bytes"], COPY_CHUNK_BYTES):
        (piece,) = source.read(file, [(start, min(start + COPY_CHUNK_BYTES, facts["bytes"]))])
        sha.update(piece)
        yield piece
    if sha.hexdigest() != facts["sha256"]:
        raise ArtifactError(f"{source.where}/{file} is corrupted: its sha256 is not the manifest's. Fetch the artifact again.")


def check(manifest: Any, where: str) -> None:
    """Refuse what this code did not write: other schemas, missing fields, paths that leave the folder, numbers that can't be."""
    if not isinstance(manifest, dict) or not _is_count(manifest.get("schema")):
        raise ArtifactError(f"{where}/{MANIFEST} is not an acip manifest.")
    if manifest["schema"] not in READABLE:
        remedy = (
            "Upgrade acip." if manifest["schema"] > SCHEMA else "Calibrate again; nothing reads what was written before the first release."
        )
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
            raise ArtifactError(f"{where}/{MANIFEST} names a file outside its folder, or without its size: {file!r}. It is not ours.")
    for row in manifest["layers"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not isinstance(row.get("bias"), bool):
            raise ArtifactError(f"{where}/{MANIFEST}: malformed layer row {row!r}.")
        counts = [row[key] for key in ("M", "N", "stored_rank") if _is_count(row.get(key))]
        if len(counts) < 3 or not all(0 < side < 2**24 for side in counts[:2]) or counts[2] > min(counts[:2]):
            raise ArtifactError(f"{where}/{MANIFEST}: malformed layer row {row!r}.")
    names = {row["name"] for row in manifest["layers"]}
    if not names or len(names) < len(manifest["layers"]) or not _is_count(manifest["rest_params"]):
        raise ArtifactError(f"{where}/{MANIFEST}: its layers are none, or named twice, or the rest is no number.")
    if not all(_is_row(row) for row in manifest["curve"]):
        raise ArtifactError(f"{where}/{MANIFEST}: malformed row of the curve.")
    if not all(isinstance(manifest["base"].get(key), str) for key in ("source", "digest")):
        raise ArtifactError(f"{where}/{MANIFEST} does not say of which base model it is.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _is_row(row: Any) -> bool:
    """A row of a curve: plain values beside the parts in `evaluation`; sizes are ratios, and losses, where they are numbers, small ones."""
    if not isinstance(row, dict) or not all(
        value is None or isinstance(value, str | bool | int | float) for key, value in row.items() if key != "evaluation"
    ):
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


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in model.named_buffers() if name in kept]


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
