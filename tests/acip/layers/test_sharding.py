"""A model sharded over two workers gets the same scores and adapters as with one worker and the same global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate, trial_step
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.evaluate import perplexity
from acip.layers import sharding
from acip.layers.targets import targets
from acip.recipe import Recipe

PRUNES = {"scores": "order", "lr": 3e-3, "lambda_factor": 1.2, "post_tune_steps": 6, "prune_distill_weight": 0.3}
FISHER = {"total_steps": 8, "lr": 1e-3, "basis": "covariance"}
RECIPES: dict[str, dict[str, Any]] = {
    "prunes": PRUNES,
    "fisher": FISHER,
    "recomputes": FISHER | {"gradient_checkpointing": True, "total_steps": 2},
}


def recipe(name: str) -> Recipe:
    fields = {"dtype": "float32", "adapter_rank": 4, "adapter_dropout": 0.0, "batch_size": 4, "seq_len": 64, "basis": "svd"}
    return Recipe.from_dict(fields | RECIPES[name])


def work(rank: int, workers: int, folder: str, base: str, name: str) -> None:
    """Calibrate on `workers` processes like a Ray Train worker. Each rank saves its tensors, and rank 0 the artifact."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    loaded = load_base(base, "float32")
    windows = load_file(Path(folder) / "windows.safetensors")["windows"]
    batches, chosen = TokenBatches(windows, 4), recipe(name)
    layers = parametrize(loaded.model, chosen, windows)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for core in layers.values() for p in core.parameters())
    trial_step(loaded.model, batches, chosen)
    calibration = calibrate(loaded.model, batches, chosen)
    sharding.gather(loaded.model)
    losses = torch.tensor([report.loss for report in calibration.history])
    adapters = {
        f"{layer}/{key}": value
        for layer, core in targets(loaded.model).items()
        for key, value in core.loras.state_dict().items()  # type: ignore[attr-defined]
    }
    tensors = {"score": calibration.scores.score, "losses": losses, "held": torch.tensor(held)} | adapters
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(folder) / f"{workers}-{rank}.safetensors")
    if rank == 0:
        Artifact.save(Path(folder) / f"artifact-{workers}", loaded, calibration, {})
    if workers > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=["fisher", "prunes", pytest.param("recomputes", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_base: str, golden_tokens: torch.Tensor) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    save_file({"windows": golden_tokens}, folder / "windows.safetensors")
    threads = torch.get_num_threads()
    work(0, 1, str(folder), small_base, request.param)
    torch.set_num_threads(threads)
    mp.spawn(work, args=(2, str(folder), small_base, request.param), nprocs=2)
    return folder


def test_two_workers_give_the_result_of_one(folder: Path) -> None:
    one, two, second_rank = (load_file(folder / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one["held"] > 1.6 * two["held"], "a worker holds more than half of the frozen weights"
    del one["held"], two["held"], second_rank["held"]
    assert all(torch.equal(two[key], second_rank[key]) for key in two), "the two workers differ"
    steps = min(len(two["losses"]), len(one["losses"]))  # rounding may move the stop of pruning, and a direction's end, by a step
    assert steps >= max(len(two["losses"]), len(one["losses"])) - 1
    torch.testing.assert_close(two["losses"][:steps], one["losses"][:steps], rtol=1e-4, atol=5e-4)
    ranks = [torch.argsort(torch.argsort(scores)).double() for scores in (one["score"], two["score"])]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9999
    close = torch.isclose(two["score"], one["score"], rtol=1e-2, atol=1e-3 * float(one["score"].abs().max()))
    assert float(close.double().mean()) > 0.995


def test_the_artifact_of_two_workers_is_complete(folder: Path, heldout_tokens: torch.Tensor) -> None:
    one, two = (Artifact.open(folder / f"artifact-{n}").load() for n in (1, 2))
    for size in (1.0, 0.8, 0.5):
        for any_size in (one, two):
            any_size.resize(size)
        expected, loss = (perplexity(any_size.model, heldout_tokens[:32], 16).loss for any_size in (one, two))
        # not bit for bit: Adam's first steps are the signs of gradients, some of which are almost zero
        assert abs(loss - expected) <= (0 if size == 1 else 5e-3), size
