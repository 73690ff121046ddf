"""Every variable of a calibration: how it starts, turns from pruning to post-tuning, and is saved and loaded again."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip.errors import CalibrationError
from acip.layers.adapters import sort_directions
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.model_sizes import live_ranks, sort_layers
from acip.sizing.score_map import ScoreMap
from acip.utils.checksums import sha256

FILES = "state.json", "state.safetensors"  # of a saved state
SUMS = "sha256.json"  # their checksums, written last
PACK_BELOW = 0.9  # of the directions that are multiplied now; packing moves rows, so not for a few


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step. `size` is the size after it (prune) or the size it trained (post-tune)."""

    step: int
    phase: Literal["prune", "post_tune"]
    loss: float  # total loss before the step, nats per token plus the L1 term
    size: float  # in the recipe's convention
    lambda_: float  # after the step
    live: int  # directions not pruned
    progress: float  # [0, 1] of this phase, an estimate while pruning
    task_loss: float | None = None  # of the batch, at the size before the step (prune) or at `size`; nats per token of a text


@dataclass
class CalibrationState:
    """Every variable of the loop. Tensors are live: `save` reads them, nothing else may."""

    layers: dict[str, SVDLinear | ElasticLinear]
    scores: ScoreMap
    params: dict[str, nn.Parameter]  # what is trained, by name
    optimizer: torch.optim.Optimizer
    lambda_: float
    gradients: Tensor  # [D] the task loss' gradients of the masks, summed over the steps; stays 0 where scores don't need it
    step: int = 0
    stop_step: int | None = None
    stop_ranks: list[int] = field(default_factory=list)  # directions of each layer that were left when pruning stopped
    history: list[StepReport] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe) -> "CalibrationState":
        layers = targets(model)
        masks: dict[str, Tensor] = {name: core.p for name, core in layers.items() if isinstance(core, SVDLinear)}
        if len(masks) != len(layers) or not layers:
            raise CalibrationError("calibrate needs a freshly parametrized model: call parametrize(model, recipe) first.")
        params, scores = _parameters(layers), ScoreMap.start(masks)
        return cls(layers, scores, params, _adamw(params, recipe.lr), recipe.lambda_start, torch.zeros_like(scores.score))

    @classmethod
    def tuning(cls, model: nn.Module, scores: ScoreMap, recipe: Recipe) -> "CalibrationState":
        """Of a model that was calibrated and is at its size: pruning is over, its adapters are left to train, from a fresh optimizer."""
        layers, ranks = targets(model), []
        for core in layers.values():
            assert isinstance(core, ElasticLinear)
            ranks.append(min(weight_MN(core.exact).shape) if core.rank is None else core.rank)
        params = _parameters(layers)
        optimizer = _adamw(params, recipe.lr)
        return cls(layers, scores, params, optimizer, 0.0, torch.zeros_like(scores.score), stop_step=0, stop_ranks=ranks)

    @property
    def masks(self) -> list[nn.Parameter]:
        return [core.p for core in self.layers.values() if isinstance(core, SVDLinear)]

    @property
    def size(self) -> float:
        """After the last step, in the recipe's convention."""
        return self.history[-1].size if self.history else 1.0

    def flat_masks(self) -> Tensor:
        return torch.cat([p.detach() for p in self.masks])

    def record(self, reports: list[StepReport], recipe: Recipe) -> None:
        for report in reports:
            if not math.isfinite(report.loss):
                raise CalibrationError(
                    f"the loss is {report.loss} at step {report.step}: the calibration diverged. "
                    f"Lower lr (now {recipe.lr}), or use dtype float32."
                )
        self.history += reports

    def pack(self) -> None:
        """Layers that lost enough directions since they were packed multiply only the living ones from here on."""
        ranks = live_ranks(self.flat_masks(), self.scores).tolist()
        for core, rank in zip(self.layers.values(), ranks, strict=True):
            if isinstance(core, SVDLinear):
                multiplied = len(core.p) if core.live is None else core.live
                if rank <= PACK_BELOW * multiplied:
                    core.pack((core.p > 0).nonzero().squeeze(1))

    def end_pruning(self, model: nn.Module, recipe: Recipe) -> None:
        """Masks are done: sort every layer by score, and carry the adapters' moments along."""
        self.stop_step = self.step
        if recipe.scores == "gradient":
            self.scores.score = -self.gradients
        importance = self.scores.importance()
        moments, old = self.optimizer.state, self.params
        self.layers = sort_layers(model, self.scores)
        self.params = _parameters(self.layers)
        if not self.params:  # no adapters: nothing is left to train
            return
        self.optimizer = _adamw(self.params, recipe.post_tune_lr or recipe.lr)
        for name, param in self.params.items():
            if (was := old[name]) in moments:
                layer, place, part = name.rsplit(".", 2)
                self.optimizer.state[param] = {
                    key: (value if key == "step" else sort_directions(value, place, part, importance[layer])).clone()
                    for key, value in moments[was].items()
                }

    def save(self, folder: str | Path) -> None:
        """Write the state as `state.safetensors` and `state.json` into an existing folder, and what they must be as SUMS."""
        tensors = {"score": self.scores.score, "crossing": self.scores.crossing, "gradients": self.gradients}
        for name, core in self.layers.items():
            if isinstance(core, SVDLinear) and core.packed is not None:
                tensors[f"packed/{name}"] = core.packed  # sums over fewer terms round differently, so this is state
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
        """Put a saved state into this freshly started one."""
        if (fault := damage(folder)) is not None:
            raise CalibrationError(f"the checkpoint in {folder} is damaged: {fault}. Go on from another, or start afresh.")
        scalars: Mapping[str, Any] = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
        device = self.scores.score.device
        if tensors["score"].shape != self.scores.score.shape:
            raise CalibrationError(
                f"the checkpoint in {folder} belongs to another model or recipe: it holds {tensors['score'].numel()} scores."
            )
        self.scores.score, self.scores.crossing = tensors["score"].to(device), tensors["crossing"].to(device)
        self.gradients = tensors["gradients"].to(device)
        self.lambda_, self.step, self.stop_ranks = scalars["lambda"], scalars["step"], scalars["stop_ranks"]
        self.history = history(folder)
        if scalars["stop_step"] is not None and self.stop_step is None:
            self.end_pruning(model, recipe)
        self.stop_step = scalars["stop_step"]
        if {f"param/{name}" for name in self.params} != {key for key in tensors if key.startswith("param/")}:
            raise CalibrationError(f"the checkpoint in {folder} belongs to another model or recipe: its parameters have other names.")
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(tensors[f"param/{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optim/{name}/{key}" in tensors]
                self.optimizer.state[param] = {key: tensors[f"optim/{name}/{key}"].to(param.device) for key in keys}
        for name, core in self.layers.items():
            if isinstance(core, SVDLinear) and f"packed/{name}" in tensors:
                core.pack(tensors[f"packed/{name}"].to(device))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a saved state; None = they are as they were written."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        wrong = [name for name in FILES if sha256(folder / name) != sums[name]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{SUMS} can't be read ({error})"
    return f"{wrong[0]} is not what was written" if wrong else None


def history(folder: Path) -> list[StepReport]:
    """The steps of a saved state."""
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
