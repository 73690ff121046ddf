"""The variables of the calibration loop: start, switch from pruning to post-tuning, save and load."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip.calibration.result import StepReport
from acip.errors import CalibrationError
from acip.layers.adapters import sort_directions
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.model_sizes import live_ranks, sort_layers
from acip.sizing.score_map import ScoreMap
from acip.utils.checksums import sha256

FILES = "state.json", "state.safetensors"  # the files of a saved state
SUMS = "sha256.json"  # their checksums, written last
PACK_BELOW = 0.9  # pack a layer once this share of its multiplied directions is left; packing copies rows, so it has to save enough


@dataclass
class CalibrationState:
    """Every variable of the loop. Its tensors are updated in place: observers use `save` and keep no reference to them."""

    layers: dict[str, SVDLinear | ElasticLinear]
    scores: ScoreMap
    params: dict[str, nn.Parameter]  # the trained parameters, by name
    optimizer: torch.optim.Optimizer
    lambda_: float
    gradients: Tensor  # [D] gradients of the task loss by the masks, summed over the steps; 0 unless `recipe.scores` is "gradient"
    step: int = 0
    stop_step: int | None = None
    stop_ranks: list[int] = field(default_factory=list)  # directions per layer when pruning stopped
    history: list[StepReport] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe) -> "CalibrationState":
        """Return the state before the first step. Raises CalibrationError if `model` is not freshly parametrized."""
        layers = targets(model)
        masks: dict[str, Tensor] = {name: core.p for name, core in layers.items() if isinstance(core, SVDLinear)}
        if len(masks) != len(layers) or not layers:
            raise CalibrationError("calibrate needs a freshly parametrized model. Call parametrize(model, recipe) first.")
        params, scores = _parameters(layers), ScoreMap.start(masks)
        return cls(layers, scores, params, _adamw(params, recipe.lr), recipe.lambda_start, torch.zeros_like(scores.score))

    @classmethod
    def tuning(cls, model: nn.Module, scores: ScoreMap, recipe: Recipe) -> "CalibrationState":
        """Return the state that fine-tunes the adapters of a calibrated model at its present size, with a fresh optimizer.

        Raises CalibrationError if it has no adapters.
        """
        layers, ranks = targets(model), []
        for core in layers.values():
            assert isinstance(core, ElasticLinear)
            ranks.append(min(weight_MN(core.exact).shape) if core.rank is None else core.rank)
        params = _parameters(layers)
        if not params:
            raise CalibrationError("fine-tuning needs a model with adapters. Call attach(any_size, recipe) first.")
        optimizer = _adamw(params, recipe.lr)
        return cls(layers, scores, params, optimizer, 0.0, torch.zeros_like(scores.score), stop_step=0, stop_ranks=ranks)

    @property
    def masks(self) -> list[nn.Parameter]:
        return [core.p for core in self.layers.values() if isinstance(core, SVDLinear)]

    @property
    def size(self) -> float:
        """The size after the last step, in the recipe's convention."""
        return self.history[-1].size if self.history else 1.0

    def flat_masks(self) -> Tensor:
        return torch.cat([p.detach() for p in self.masks])

    def record(self, reports: list[StepReport], recipe: Recipe) -> None:
        """Append `reports` to the history. Raises CalibrationError if a loss is not finite."""
        for report in reports:
            if not math.isfinite(report.loss):
                raise _diverged(f"the loss is {report.loss} at step {report.step}", recipe)
        self.history += reports

    def require_finite(self, recipe: Recipe) -> None:
        """Raise CalibrationError if a trained number is not finite."""
        if not all(p.detach().isfinite().all() for p in self.params.values()):
            raise _diverged(f"the trained weights are not finite after step {self.step}", recipe)

    def pack(self) -> None:
        """Drop pruned directions from the multiplications of layers that have lost enough of them since they were last packed."""
        ranks = live_ranks(self.flat_masks(), self.scores).tolist()
        for core, rank in zip(self.layers.values(), ranks, strict=True):
            if isinstance(core, SVDLinear):
                multiplied = len(core.p) if core.live is None else core.live
                if rank <= PACK_BELOW * multiplied:
                    core.pack((core.p > 0).nonzero().squeeze(1))

    def end_pruning(self, model: nn.Module, recipe: Recipe) -> None:
        """End pruning: sort the directions of every layer by score, and sort the optimizer's moments of the adapters in the same way."""
        self.stop_step = self.step
        if recipe.scores == "gradient":
            self.scores.score = -self.gradients
        importance = self.scores.importance()
        moments, old = self.optimizer.state, self.params
        self.layers = sort_layers(model, self.scores)
        self.params = _parameters(self.layers)
        if not self.params:  # no adapters: post-tuning has nothing to train
            return
        self.optimizer = _adamw(self.params, recipe.post_tune_lr or recipe.lr)
        for name, param in self.params.items():
            if (old_param := old[name]) in moments:
                layer, place, part = name.rsplit(".", 2)
                self.optimizer.state[param] = {
                    key: (value if key == "step" else sort_directions(value, place, part, importance[layer])).clone()
                    for key, value in moments[old_param].items()
                }

    def save(self, folder: str | Path) -> None:
        """Write `state.safetensors`, `state.json` and their checksums (SUMS, last) to an existing folder."""
        tensors = {"score": self.scores.score, "crossing": self.scores.crossing, "gradients": self.gradients}
        for name, core in self.layers.items():
            if isinstance(core, SVDLinear) and core.packed is not None:
                tensors[f"packed/{name}"] = core.packed  # part of the state: a sum over fewer terms rounds differently
        for name, param in self.params.items():
            tensors[f"param/{name}"] = param.detach()
            for key, value in self.optimizer.state.get(param, {}).items():
                tensors[f"optim/{name}/{key}"] = value
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, Path(folder) / "state.safetensors")
        scalars = {
            "lambda": self.lambda_,
            "step": self.step,
            "stop_step": self.stop_step,
            "stop_ranks": self.stop_ranks,
            "history": [asdict(r) for r in self.history],
        }
        (Path(folder) / "state.json").write_text(json.dumps(scalars))
        sums = {name: sha256(Path(folder) / name) for name in FILES}
        (Path(folder) / SUMS).write_text(json.dumps(sums))

    def load(self, folder: Path, model: nn.Module, recipe: Recipe) -> None:
        """Restore a saved state in this freshly started one. Raises CalibrationError if it is damaged or of another model or recipe."""
        if (fault := damage(folder)) is not None:
            raise CalibrationError(f"the checkpoint in {folder} is damaged: {fault}. Resume from another checkpoint, or start again.")
        scalars: Mapping[str, Any] = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
        device = self.scores.score.device
        if tensors["score"].shape != self.scores.score.shape:
            raise CalibrationError(
                f"the checkpoint in {folder} belongs to another model or recipe: it holds {tensors['score'].numel()} scores, "
                f"and this model has {self.scores.score.numel()}."
            )
        self.scores.score, self.scores.crossing = tensors["score"].to(device), tensors["crossing"].to(device)
        self.gradients = tensors["gradients"].to(device)
        self.lambda_, self.step, self.stop_ranks = scalars["lambda"], scalars["step"], scalars["stop_ranks"]
        self.history = history(folder)
        if scalars["stop_step"] is not None and self.stop_step is None:
            self.end_pruning(model, recipe)
        self.stop_step = scalars["stop_step"]
        saved = {key.removeprefix("param/"): tensor.shape for key, tensor in tensors.items() if key.startswith("param/")}
        if saved != {name: param.shape for name, param in self.params.items()}:
            raise CalibrationError(f"the checkpoint in {folder} belongs to another model or recipe: its parameters differ.")
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(tensors[f"param/{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optim/{name}/{key}" in tensors]
                self.optimizer.state[param] = {key: tensors[f"optim/{name}/{key}"].to(param.device) for key in keys}
        for name, core in self.layers.items():
            if isinstance(core, SVDLinear) and f"packed/{name}" in tensors:
                core.pack(tensors[f"packed/{name}"].to(device))


def damage(folder: Path) -> str | None:
    """Return how the files of a saved state are damaged, or None if they match their checksums."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        wrong = [name for name in FILES if sha256(folder / name) != sums[name]]
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{SUMS} cannot be read ({error})"
    return f"{wrong[0]} does not match its checksum" if wrong else None


def history(folder: Path) -> list[StepReport]:
    """Return the step reports of a saved state."""
    return [StepReport(**report) for report in json.loads((folder / "state.json").read_text())["history"]]


def _parameters(layers: Mapping[str, SVDLinear | ElasticLinear]) -> dict[str, nn.Parameter]:
    params: dict[str, nn.Parameter] = {}
    for name, core in layers.items():
        if isinstance(core, SVDLinear):
            params[f"{name}.mask"] = core.p
        for place, lora in core.loras.items():
            params |= {f"{name}.{place}.A": lora.A, f"{name}.{place}.B": lora.B}
    return params


def _adamw(params: dict[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def _diverged(what: str, recipe: Recipe) -> CalibrationError:
    return CalibrationError(f"{what}: the calibration diverged. Lower lr (now {recipe.lr}), or use dtype float32.")
