"""Calibrate a model that need not fit in memory: bases and scores one block at a time, with everything else in files.

    gradients    second moments of gradients, for the Fisher basis: a forward and a backward pass (block_pass.py)
    directions   second moments of inputs, and the directions of a block: a forward pass
    scores       Fisher scores: a forward and a backward pass, with the directions of one block at a time
    sorted       the directions of each block in the order of their scores

The recipe must not train. The result then equals that of `parametrize` and `calibrate`, bit for bit on a CPU. (On an accelerator, layers
are solved in different stacks, and adapters are drawn on the CPU.) Directions are mapped from their files, and weights stay
where they are. A process that is started again with the same folder continues after the last finished block.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acip.calibration.activation_covariance import MomentSums
from acip.calibration.bases import require_called, require_reached, solve
from acip.calibration.block_pass import BlockPass, PassFiles
from acip.calibration.fisher_moments import gradient_sums
from acip.calibration.fixed_scores import require_gradients, scored_parts, singular_values
from acip.calibration.losses import next_token, sampled_loss
from acip.calibration.parametrize import adapters, check_base
from acip.calibration.result import Calibration
from acip.errors import CalibrationError
from acip.layers.adapters import sort_directions
from acip.layers.block_chain import BlockChain, placed, tensors
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import accumulation_dtype, set_module, widened
from acip.recipe import Recipe
from acip.sizing.model_sizes import cut_table
from acip.sizing.score_map import ScoreMap, fisher
from acip.utils.threads import Spread, each_in_turn

Progress = Callable[[str, int, int], None]  # (what is computed, done, total)


def calibrate_by_block(
    chain: BlockChain,
    recipe: Recipe,
    windows: Tensor,
    batch: Callable[[int], Tensor],
    folder: Path,
    device: torch.device | str,
    progress: Progress = lambda what, done, total: None,
    spread: Spread = each_in_turn,
) -> Calibration:
    """Parametrize and score the model of `chain`, in place, with the weights of one block on `device` at a time.

    The bases read the first `recipe.sample_windows` of `windows`, token ids [n, T]; `batch(i)` is the i-th batch for Fisher scores. Files
    are in `folder`, which must stay as long as the result is used. Raises CalibrationError if the recipe trains, if the disk is too small,
    if the files are damaged or of another model, recipe or text, BaseModelError if the loss does not depend on a layer or if the model
    does not match the text, and DataError if `windows` are not [n, T] or hold negative ids.
    """
    if recipe.trains or recipe.quantize != "none":
        raise CalibrationError(
            "pruning, post-tuning and 4-bit weights need the whole model in memory. Set scores to 'fisher', post_tune_steps to 0, "
            "total_steps to null and quantize to none."
        )
    model = chain.model
    check_base(model, windows)
    linears = find_linears(model, recipe.exclude)
    this = _Blocks(chain, recipe, linears, PassFiles(folder), device, progress)
    this.files.require_space("the directions", this.file_bytes(windows))
    this.require_same(windows)
    model.eval().requires_grad_(False)
    torch.manual_seed(recipe.seed)  # for the initial adapters
    loras = {name: adapters(weight_MN(linear), recipe) for name, linear in linears.items()}
    with placed(chain.outside(), device):
        this.find_directions(windows[: recipe.sample_windows], spread)
        layers: dict[str, ElasticLinear] = {}
        for name, linear in linears.items():
            left, right = this.directions(name)
            layers[name] = ElasticLinear(linear, left, right, loras[name])
            set_module(model, name, layers[name])
        scores = ScoreMap.start(this.scores(layers, list(scored_parts(recipe, batch)) if recipe.scores == "fisher" else []))
    this.sort(layers, scores)
    return Calibration(model, recipe, scores, cut_table(model, scores, recipe), stop_step=0, history=[])


class _Blocks:
    """The steps of a calibration by block, and their files."""

    def __init__(
        self,
        chain: BlockChain,
        recipe: Recipe,
        linears: Mapping[str, nn.Module],
        files: PassFiles,
        device: torch.device | str,
        progress: Progress,
    ) -> None:
        self.chain, self.recipe, self.linears, self.files, self.device, self.progress = chain, recipe, linears, files, device, progress
        self.parts = chain.parts(linears)
        self.numbers = {name: i for i, part in enumerate(self.parts) for name in part}

    def file_bytes(self, windows: Tensor) -> float:
        """Return the bytes of all files, at most."""
        shapes = {name: weight_MN(linear).shape for name, linear in self.linears.items()}
        dtype = weight_MN(next(iter(self.linears.values()))).dtype
        each = [{name: sum(shapes[name]) * min(shapes[name]) * dtype.itemsize for name in part} for part in self.parts]
        gradients = sum(min(shape) ** 2 for shape in shapes.values()) * accumulation_dtype(dtype).itemsize * (self.recipe.basis == "fisher")
        tokens = (self.recipe.sample_windows + self.recipe.batch_size) * windows.shape[1]
        width = next(iter(shapes.values()))[1]  # the first layer of a block reads the hidden states
        hidden = (len(self.parts) + 3) * tokens * width * dtype.itemsize
        return sum(sum(part.values()) for part in each) + max(sum(part.values()) for part in each) + gradients + hidden

    def require_same(self, windows: Tensor) -> None:
        """Raise CalibrationError if the folder has files of another model, recipe or text.

        Of the weights, the first row of each layer is compared.
        """
        digest = hashlib.sha256(json.dumps(self.recipe.to_dict(), sort_keys=True).encode())
        digest.update(f"{tuple(windows.shape)}".encode() + windows.long().cpu().numpy().tobytes())
        for name, linear in self.linears.items():
            W_MN = weight_MN(linear)
            digest.update(f"{name} {tuple(W_MN.shape)} {W_MN.dtype}".encode() + widened(W_MN[0].detach().cpu()).numpy().tobytes())
        own = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        if not self.files.has("job", 0):
            self.files.put("job", 0, {"digest": own})
        elif not torch.equal(self.files.get("job", 0, ["digest"])["digest"], own):
            raise CalibrationError(f"{self.files.folder} has files of another model, recipe or text. Remove it, or choose another folder.")

    def pass_of(self, name: str, batches: Any, parts: list[dict[str, Any]]) -> BlockPass[Any]:
        return BlockPass(self.chain, parts, batches, PassFiles(self.files.folder / name), self.device)

    def find_directions(self, windows: Tensor, spread: Spread) -> None:
        """Compute the files `directions` that do not exist yet."""
        recipe = self.recipe
        missing = [{} if self.kind(i) else part for i, part in enumerate(self.parts)]
        gradients = self.pass_of("gradients", windows.split(1), missing)
        inputs = self.pass_of("inputs", windows.split(1), [])
        if recipe.basis == "fisher" and any(missing):
            gradients.run(
                lambda number, logits_1TV, ids_1T: sampled_loss(logits_1TV[0], number, recipe.seed),
                _reached,
                lambda done, total: self.progress("gradients", done, total),
            )
        done = len(self.linears) - sum(map(len, missing))
        for i, part in enumerate(missing):
            if part:
                G = gradients.files.get("statistics", i, part) if recipe.basis == "fisher" else {}
                self.files.put("directions", i, self.directions_of(i, part, inputs, G, windows.numel(), spread))
                inputs.files.drop("hidden", i)
                gradients.files.drop("statistics", i)
                self.progress("basis", done := done + len(part), len(self.linears))
        inputs.files.remove()
        gradients.files.remove()

    def directions_of(
        self, i: int, part: Mapping[str, nn.Module], inputs: BlockPass[Any], G: Mapping[str, Tensor], tokens: int, spread: Spread
    ) -> dict[str, Tensor]:
        """Return NAME.left [K, M] and NAME.right [K, N] of the layers in `part`, those of block `i`. `G` has moments of gradients."""
        basis, found, C = self.recipe.basis, dict[str, Tensor](), dict[str, Tensor]()
        with placed(tensors(inputs.blocks[i]), self.device):
            if basis != "svd":
                inputs.reach(i)
                sums = MomentSums(part, ends=False)
                with sums.hooks():
                    inputs.forward(i, sums.start)
                C = sums.means(tokens)
                require_called(part, C)
            for name, U_KM in solve(part, C, {name: each.to(self.device) for name, each in G.items()}, spread=spread).items():
                core = SVDLinear(part[name], weight_MN(part[name]), U_KM.T, self.recipe.mask_scale, orthonormal=basis != "fisher")
                found |= {f"{name}.left": core.left.values, f"{name}.right": core.right.values}
        return found

    def kind(self, i: int) -> str | None:
        """Return the kind of the file that has the directions of block `i`, or None if there is none."""
        return next((kind for kind in ("sorted", "directions") if self.files.has(kind, i)), None)

    def directions(self, name: str) -> tuple[Tensor, Tensor]:
        """Return left and right of a layer, mapped from their file."""
        i = self.numbers[name]
        kind = self.kind(i)
        assert kind is not None
        found = self.files.get(kind, i, (left := f"{name}.left", right := f"{name}.right"))
        return found[left], found[right]

    def scores(self, layers: Mapping[str, ElasticLinear], batches: list[Tensor]) -> dict[str, Tensor]:
        """Return the scores [K] of each layer, in the order of `layers`. They are computed if they are not in a file."""
        if not self.files.has("scores", 0):
            found = {}
            if self.recipe.scores == "singular_values":
                found = {name: singular_values(layer) for name, layer in layers.items()}
            else:
                parts = self.chain.parts(layers)
                passes = self.pass_of("scores", batches, parts)
                passes.run(
                    lambda number, logits_BTV, ids_BT: next_token.loss(logits_BTV, ids_BT),
                    _scored,
                    lambda done, total: self.progress("scores", done, total),
                )
                for i, part in enumerate(parts):
                    found |= passes.files.get("statistics", i, part) if part else {}
            self.files.put("scores", 0, found)
        PassFiles(self.files.folder / "scores").remove()
        return self.files.get("scores", 0, layers)

    def sort(self, layers: Mapping[str, ElasticLinear], scores: ScoreMap) -> None:
        """Sort the directions and the adapters of every layer by score."""
        importance = scores.importance()
        for i, part in enumerate(self.chain.parts(layers)):
            if part and not self.files.has("sorted", i):
                self.files.put("sorted", i, {
                    f"{name}.{side}": matrix.read().index_select(0, importance[name])
                    for name, layer in part.items()
                    for side, matrix in (("left", layer.left), ("right", layer.right))
                })  # fmt: skip
            for name, layer in part.items():
                for matrix, values in zip((layer.left, layer.right), self.directions(name), strict=True):
                    matrix.values = nn.Parameter(values, requires_grad=False)
                for place, lora in layer.loras.items():
                    for key, values in (("A", lora.A), ("B", lora.B)):
                        values.data = sort_directions(values.data, place, key, importance[name])
            self.files.drop("directions", i)


@contextmanager
def _reached(layers: Mapping[str, nn.Module]) -> Iterator[Mapping[str, Tensor]]:
    with gradient_sums(layers) as sums:
        yield sums
    require_reached(layers, sums)


@contextmanager
def _scored(layers: Mapping[str, ElasticLinear]) -> Iterator[Mapping[str, Tensor]]:
    with fisher(layers) as scores:
        yield scores
    require_gradients([name for name in layers if name not in scores])
