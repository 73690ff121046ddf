"""Bases are orthonormal and optimal, do not depend on how the covariances are gathered, and are computed once."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import spawn

from acip.base import load_base
from acip.calibration.activation_covariance import activation_covariances, feed_tokens, grouped
from acip.calibration.bases import accuracy, bases, basis, solve
from acip.calibration.basis_cache import BasisCache
from acip.calibration.fisher_moments import fisher_moments
from acip.calibration.parametrize import parametrize
from acip.errors import BaseModelError
from acip.layers import sharding
from acip.layers.targets import find_linears, weight_MN
from acip.recipe import Recipe
from tests.conftest import GOLDEN
from tests.support.waiting import PATIENCE_S

RECIPE = Recipe(basis="covariance", dtype="float32", sample_windows=8)
Directions = dict[str, torch.Tensor]


class CountingFeed:
    """`feed_tokens` with a count of its calls."""

    def __init__(self) -> None:
        self.calls, self.__module__, self.__qualname__ = 0, "tests", "CountingFeed"

    def __call__(self, model: nn.Module, ids_BT: torch.Tensor) -> None:
        self.calls += 1
        feed_tokens(model, ids_BT)


@pytest.fixture
def model(small_base: str) -> Any:
    return load_base(small_base, "float32").model


@pytest.fixture
def solve_all(model: Any, golden_tokens: torch.Tensor) -> Callable[..., tuple[Directions, int]]:
    """Return a function that computes the bases of the small model and counts the forward passes."""

    def run(recipe: Recipe = RECIPE, windows: torch.Tensor = golden_tokens, **options: Any) -> tuple[Directions, int]:
        feed = CountingFeed()
        directions = dict(bases(model, find_linears(model, recipe.exclude), recipe, windows, feed=feed, **options))
        return directions, feed.calls

    return run


def same(first: Directions, second: Directions) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- one layer


@pytest.mark.parametrize(("M", "N"), [(24, 24), (40, 16), (16, 40)])
def test_bases_are_orthonormal_and_lossless(M: int, N: int) -> None:
    torch.manual_seed(0)
    W, X = torch.randn(M, N), torch.randn(500, N) @ torch.randn(N, N)
    for C in (None, X.T @ X / len(X), torch.zeros(N, N)):
        U = basis(W, C).double()
        torch.testing.assert_close(U.T @ U, torch.eye(min(M, N), dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(U @ (U.T @ W.double()), W.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("M", "N"), [(24, 24), (40, 16), (16, 40)])
def test_every_covariance_prefix_is_the_whitening_optimum(M: int, N: int) -> None:
    """The error of rank r equals the dropped singular values of W S, C = S S^T (SVD-LLM's optimum), without its inverse."""
    torch.manual_seed(1)
    W, X = torch.randn(M, N).double(), (torch.randn(2000, N) @ torch.randn(N, N)).double()
    C = X.T @ X
    U = basis(W, C)
    dropped = torch.linalg.svdvals(W @ torch.linalg.cholesky(C)) ** 2
    for r in (1, 5, 10, 15):
        error = ((W - U[:, :r] @ (U[:, :r].T @ W)) @ X.T).square().sum()
        torch.testing.assert_close(error, dropped[r:].sum(), rtol=1e-4, atol=1e-6)


def test_directions_are_ordered_even_if_rounding_makes_the_covariance_indefinite() -> None:
    """If one direction carries nearly all energy (massive activations), float32 rounding exceeds the energy of the others."""
    torch.manual_seed(0)
    X, W = torch.randn(600, 256) + 1e3 * torch.randn(256), torch.randn(300, 256)
    C = X.T @ X / len(X)
    assert torch.linalg.eigvalsh(C.double())[0] < 0
    U, W, X = basis(W, C).double(), W.double(), X.double()
    error = ((W - U[:, :64] @ (U[:, :64].T @ W)) @ X.T).square().sum()
    assert error < 1.5 * torch.linalg.svdvals(W @ X.T)[64:].square().sum()


def correlated(M: int, N: int, samples: int, massive: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W, C) with energies that decrease as in a trained model. One feature is scaled by `massive`."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(samples, N, generator=generator) @ (torch.randn(N, N, generator=generator) / torch.arange(1, N + 1))
    X[:, 3] *= massive
    return torch.randn(M, N, generator=generator), X.T @ X / samples


@pytest.mark.parametrize(("M", "N"), [(192, 192), (320, 128), (128, 320)])
@pytest.mark.parametrize(("samples", "massive"), [(4000, 1.0), (4000, 1e3), (60, 1.0), (60, 1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_are_optimal_for_ill_conditioned_covariances(M: int, N: int, samples: int, massive: float, dtype: torch.dtype) -> None:
    """With massive activations or fewer samples than features, the error at each rank stays close to the optimum."""
    W, C = correlated(M, N, samples, massive)
    W = W.to(dtype)
    inputs = basis(W, C)
    of_inputs = accuracy(W, C, inputs.T)
    assert inputs.dtype == torch.float32
    assert of_inputs.orthonormality < 1e-5
    assert of_inputs.excess.max() < 2e-6
    first = min(M, N) // 8  # with a massive activation, the others hold a millionth of the energy
    assert (of_inputs.excess < 0.05 * of_inputs.optimum)[:first].all()
    if M < N:
        of_outputs = accuracy(W, C, basis(W, (W.double() @ C.double() @ W.double().T).float()).T)
        assert of_outputs.orthonormality < 1e-5
        assert of_outputs.excess.max() < 2e-6
        assert (of_outputs.excess < 0.05 * of_outputs.optimum)[:first].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N"), [(96, 96), (160, 64), (64, 160)])
def test_the_svd_basis_is_that_of_torch(M: int, N: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(M, N).to(dtype)
    found = accuracy(W, None, basis(W).T)
    assert found.orthonormality < 1e-5
    assert found.excess.max() < 1e-7
    overlap = (torch.linalg.svd(W.double(), full_matrices=False).U * basis(W).double()).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("M", "N"), [(96, 96), (160, 64), (64, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("covariance", [True, False])
def test_a_weight_of_any_condition_gets_a_basis(M: int, N: int, dtype: torch.dtype, covariance: bool) -> None:
    """The weights are of low rank, nearly of low rank, and zero."""
    W, C = correlated(M, N, 500)
    low = W[:, :8] @ torch.randn(8, N, generator=torch.Generator().manual_seed(1))
    for weight in (low, low + 1e-3 * W, torch.zeros(M, N)):
        found = basis(weight.to(dtype), C if covariance else None)
        torch.testing.assert_close(found.T @ found, torch.eye(min(M, N)), rtol=0, atol=2e-5)
        if weight.any():
            assert accuracy(weight.to(dtype), C if covariance else None, found.T).excess.max() < 2e-6


def test_a_stack_of_layers_is_solved_like_single_layers() -> None:
    """GPUs solve stacks of layers."""
    for M, N in ((48, 48), (80, 32), (32, 80)):
        pairs = [correlated(M, N, 500 + i) for i in range(3)]
        for with_c in (True, False):
            W, C = torch.stack([W for W, _ in pairs]), torch.stack([C for _, C in pairs]) if with_c else None
            for basis_MK, (W_MN, C_NN) in zip(basis(W, C), pairs, strict=True):
                assert accuracy(W_MN, C_NN if with_c else None, basis_MK.T).excess.max() < 1e-6


# ---- gathering covariances


def test_layers_with_the_same_input_share_its_covariance(model: Any, golden_tokens: torch.Tensor) -> None:
    """Layers with fewer outputs than inputs gather the covariance of their outputs instead."""
    linears = find_linears(model)
    C = activation_covariances(model, linears, golden_tokens[:8])
    layer = "model.layers.1."
    square = weight_MN(linears[layer + "self_attn.k_proj"]).shape == weight_MN(linears[layer + "self_attn.q_proj"]).shape
    assert (C[layer + "self_attn.q_proj"] is C[layer + "self_attn.k_proj"]) == square
    assert C[layer + "mlp.gate_proj"] is C[layer + "mlp.up_proj"]
    assert C[layer + "self_attn.q_proj"] is not C[layer + "self_attn.o_proj"]
    activations: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(layer + "mlp.up_proj").register_forward_hook(lambda _, args, y: activations.update(up=args[0].flatten(0, 1))),
        model.get_submodule(layer + "mlp.down_proj").register_forward_hook(lambda _, args, y: activations.update(down=y.flatten(0, 1))),
    ]
    with torch.no_grad():
        model(input_ids=golden_tokens[:8])
    for handle in handles:
        handle.remove()
    for name, X in activations.items():
        torch.testing.assert_close(C[f"{layer}mlp.{name}_proj"], X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_bias_gathers_its_inputs() -> None:
    """The covariance of the outputs is W C W^T only without a bias, so a layer with a bias gathers its inputs at any width."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 4))
    X = torch.randn(100, 12)
    C = activation_covariances(layer, {"0": layer[0]}, X, feed=lambda model, batch: model(batch))["0"]
    torch.testing.assert_close(C, X.T @ X / X.numel(), rtol=1e-4, atol=1e-6)


def test_several_groups_for_little_memory_give_the_same_bases(solve_all: Callable[..., tuple[Directions, int]]) -> None:
    in_one, passes = solve_all()
    in_many, more = solve_all(covariance_bytes=1)
    assert passes == RECIPE.sample_windows
    assert more > 2 * passes
    assert same(in_many, dict(sorted(in_one.items(), key=lambda item: list(in_many).index(item[0]))))


def test_groups_stay_within_the_limit_and_count_a_shared_input_once() -> None:
    linears: dict[str, nn.Module] = {name: nn.Linear(10, 10) for name in "abcd"}
    trace = [("a", "a"), ("b", "a"), ("c", "c"), ("a", "a")]
    assert grouped(linears, trace, 800) == [["a", "b", "c"], ["d"]]
    assert grouped(linears, trace, 400) == [["a", "b"], ["c"], ["d"]]
    assert grouped(linears, trace, 1) == [["a", "b"], ["c"], ["d"]]
    assert grouped(linears, [], 800) == [["a", "b"], ["c", "d"]]


def test_a_pass_ends_after_the_last_requested_layer(model: Any, golden_tokens: torch.Tensor) -> None:
    linears = {name: layer for name, layer in find_linears(model).items() if ".layers.0." in name}
    later: list[int] = []
    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(lambda _, args: later.append(1))
    C = activation_covariances(model, linears, golden_tokens[:12])
    handle.remove()
    assert len(later) == 1, "only the first batch may run past the last requested layer"
    all_layers = activation_covariances(model, find_linears(model), golden_tokens[:12])
    assert all(torch.equal(C[name], all_layers[name]) for name in linears)


def test_layers_that_are_never_called_are_named(model: Any, golden_tokens: torch.Tensor) -> None:
    model.model.layers[0].extra = nn.Linear(8, 8)
    with pytest.raises(BaseModelError, match=r"1 layers are never called.*extra"):
        list(bases(model, find_linears(model), RECIPE, golden_tokens))
    with pytest.raises(BaseModelError, match=r"layers are never called.*extra"):
        list(bases(model, find_linears(model), RECIPE, golden_tokens, covariance_bytes=1))


def test_the_number_of_threads_is_restored(solve_all: Callable[..., tuple[Directions, int]]) -> None:
    threads = torch.get_num_threads()
    svd = replace(RECIPE, basis="svd")
    alone, _ = solve_all(svd)
    try:
        torch.set_num_threads(2)
        assert same(solve_all(svd)[0], alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# ---- the cache


@pytest.mark.parametrize("kind", ["covariance", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cached_bases_are_the_same_and_not_computed_again(
    model: Any, solve_all: Callable[..., tuple[Directions, int]], tmp_path: Path, kind: Any, dtype: torch.dtype
) -> None:
    model.to(dtype)
    recipe, cache = replace(RECIPE, basis=kind), BasisCache(tmp_path / "bases")
    plain, passes = solve_all(recipe)
    first, _ = solve_all(recipe, cache=cache)
    steps: list[tuple[int, int]] = []
    again, none = solve_all(recipe, cache=BasisCache(tmp_path / "bases"), progress=lambda *step: steps.append(step))
    assert same(first, again)
    assert dtype == torch.bfloat16 or same(plain, first)  # in 16 bit, products may depend on the addresses of the tensors
    assert {directions.dtype for directions in again.values()} == {dtype}
    assert passes == (RECIPE.sample_windows if kind == "covariance" else 0) and none == 0
    assert steps == [(i + 1, len(again)) for i in range(len(again))]


def test_a_broken_cache_file_is_computed_again(solve_all: Callable[..., tuple[Directions, int]], tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    first, _ = solve_all(cache=cache)
    truncated, empty, foreign, *_ = sorted(tmp_path.iterdir())
    content = truncated.read_bytes()
    truncated.write_bytes(content[:-10])
    empty.write_bytes(b"")
    foreign.write_bytes(content if len(content) != foreign.stat().st_size else b"no tensors")
    again, passes = solve_all(cache=cache)
    assert passes > 0 and first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert truncated.read_bytes() == content
    assert solve_all(cache=cache)[1] == 0


def test_a_changed_exclude_reuses_the_rest(solve_all: Callable[..., tuple[Directions, int]], tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    some, _ = solve_all(replace(RECIPE, exclude=("layers.0.mlp",)), cache=cache)
    files = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    all_layers, passes = solve_all(cache=cache)
    assert passes == RECIPE.sample_windows
    assert all(path.stat().st_ino == inode for path, inode in files.items()), "existing files were written again"
    assert len(list(tmp_path.iterdir())) == len(all_layers) > len(some)
    assert solve_all(replace(RECIPE, exclude=("layers.1",)), cache=cache)[1] == 0


def test_the_cache_key_depends_on_all_inputs_of_a_basis(
    model: Any, solve_all: Callable[..., tuple[Directions, int]], golden_tokens: torch.Tensor, tmp_path: Path
) -> None:
    cache = BasisCache(tmp_path)

    def misses(**options: Any) -> int:
        before = set(tmp_path.iterdir())
        solve_all(cache=cache, **options)
        return len(set(tmp_path.iterdir()) - before)

    svd = replace(RECIPE, basis="svd")
    layers = misses()
    assert misses(recipe=svd) == layers
    assert misses() == misses(recipe=svd) == 0
    other = golden_tokens.clone()
    other[0, 0] += 1
    assert misses(windows=other) == layers
    other[8] += 1
    assert misses(windows=other) == 0, "windows after the sampled ones do not matter"
    assert misses(recipe=replace(svd, sample_windows=9)) == 0
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] += 1e-3
    assert misses(recipe=svd) == 1
    assert misses() == layers, "a changed weight may change the inputs of every layer"


def test_the_least_recently_used_basis_is_evicted(tmp_path: Path) -> None:
    directions = torch.eye(16)
    BasisCache(tmp_path / "one").put("a", directions)
    size = next((tmp_path / "one").iterdir()).stat().st_size
    cache = BasisCache(tmp_path / "many", limit_bytes=3 * size)
    for i, key in enumerate("abc"):
        cache.put(key, directions)
        os.utime(tmp_path / "many" / f"{key}.safetensors", (i, i))
    assert cache.get("a", (16, 16), torch.float32) is not None
    cache.put("d", directions)
    assert {path.stem for path in (tmp_path / "many").iterdir()} == {"a", "c", "d"}
    BasisCache(tmp_path / "many", limit_bytes=1).put("e", directions)
    assert not list((tmp_path / "many").iterdir())


def test_an_unwritable_cache_is_only_a_warning(
    solve_all: Callable[..., tuple[Directions, int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "acip.calibration.bases"):
        found, _ = solve_all(cache=BasisCache(tmp_path / "file" / "bases"))
    assert same(found, solve_all()[0])
    assert "cannot be written" in caplog.text


def test_concurrent_runs_wait_for_the_first_and_compute_nothing(tmp_path: Path) -> None:
    together, computed = Barrier(4), []

    def work(_: int) -> None:
        cache = BasisCache(tmp_path)
        together.wait()
        with cache.exclusive(["a", "b"]):
            for key in ("a", "b"):
                if cache.get(key, (2, 2), torch.float32) is None:
                    computed.append(key)
                    time.sleep(0.05)
                    cache.put(key, torch.eye(2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert computed == ["a", "b"]
    (tmp_path / "file").touch()
    with BasisCache(tmp_path / "file").exclusive(["a"]):
        pass  # does not wait, because the folder cannot be written


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from acip.calibration.basis_cache import BasisCache

with BasisCache(Path({str(tmp_path)!r})).exclusive(["a"]):
    print("locked", flush=True)
    time.sleep({PATIENCE_S})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            (lock,) = tmp_path.glob("*.lock")
            with pytest.raises(Timeout):
                FileLock(lock).acquire(blocking=False)
        finally:
            process.kill()
    with FileLock(lock, timeout=PATIENCE_S):
        pass


def test_a_cached_basis_is_mapped_and_outlives_its_file(tmp_path: Path) -> None:
    cache = BasisCache(tmp_path)
    cache.put("a", torch.arange(4.0).view(2, 2))
    first, second = (cache.get("a", (2, 2), torch.float32) for _ in range(2))
    assert first is not None and second is not None
    (tmp_path / "a.safetensors").unlink()
    first[0, 0] = 5.0
    assert first[0, 0] == 5.0 and second[0, 0] == 0.0, "a write changed the other mapping"


def test_parametrize_gives_the_same_model_with_and_without_the_cache(small_base: str, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    """All parameters and buffers are equal, including the adapters."""
    cache = BasisCache(tmp_path)
    states = []
    for used_cache in (None, cache, cache):
        model = load_base(small_base, "float32").model
        parametrize(model, RECIPE, golden_tokens, cache=used_cache)
        states.append([*model.named_parameters(), *model.named_buffers()])
    for state in states[1:]:
        assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in zip(states[0], state, strict=True))


# ---- several processes


def _process(rank: int, size: int, folder: str, small_base: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    model = load_base(small_base, "float32").model
    windows = load_file(GOLDEN / "batches.safetensors")["batches"].long()
    cache = BasisCache(Path(folder) / "cache") if rank == 0 else BasisCache(Path(folder) / "nowhere")
    feed = CountingFeed()
    for turn, exclude in enumerate((("layers.0",), (), ())):  # with an empty, a partial and a complete cache
        linears = find_linears(model, exclude)
        found = dict(bases(model, linears, RECIPE, windows, feed, cache, covariance_bytes=10**9 if turn else 1))
        torch.save((found, feed.calls), f"{folder}/{rank}-{turn}.pt")
        feed.calls = 0
    for linear in (linears := find_linears(model)).values():
        sharding.shard(linear)
    torch.save(fisher_moments(model, linears, windows[:3]), f"{folder}/{rank}-fisher.pt")
    torch.save(activation_covariances(model, linears, windows[:9]), f"{folder}/{rank}-activations.pt")
    dist.destroy_process_group()


def test_processes_share_the_work(model: Any, golden_tokens: torch.Tensor, small_base: str, tmp_path: Path) -> None:
    linears = find_linears(model)
    C = activation_covariances(model, linears, golden_tokens[: RECIPE.sample_windows])
    alone = solve(linears, C)
    spawn(_process, (2, str(tmp_path), small_base), nprocs=2)
    assert not (tmp_path / "nowhere").exists()
    turns = [[torch.load(tmp_path / f"{rank}-{turn}.pt") for rank in (0, 1)] for turn in range(3)]
    for turn, ((found, calls), (others, other_calls)) in enumerate(turns):
        assert same(found, others)
        assert (calls == 0) == (other_calls == 0) == (turn == 2)
        for name, directions in found.items():
            assert accuracy(weight_MN(linears[name]), C[name], directions).excess.max() < 1e-6
            first = directions[:1], alone[name][:1]
            torch.testing.assert_close(first[0].T @ first[0], first[1].T @ first[1], rtol=0, atol=1e-4)
    assert turns[1][0][0].keys() == turns[2][0][0].keys() == alone.keys()
    # one worker has no window in the last pass
    expected = (*fisher_moments(model, linears, golden_tokens[:3]), activation_covariances(model, linears, golden_tokens[:9]))
    for rank in (0, 1):
        found = *torch.load(tmp_path / f"{rank}-fisher.pt"), torch.load(tmp_path / f"{rank}-activations.pt")
        for moments, own in zip(found, expected, strict=True):
            assert moments.keys() == own.keys() == linears.keys()
            for name, moment in own.items():
                torch.testing.assert_close(moments[name], moment, rtol=1e-3, atol=1e-3 * float(moment.diagonal().max()))
