"""Each method of the paper's Table 1 has its defining property, and all methods follow the same rules."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, GPT2Config, GPT2LMHeadModel

from acip.base import Base
from acip.baselines import METHODS, asvd, compress, covariance, method, svdllm
from acip.baselines.prefix_factors import Factors, layers_at, on_inputs, stored, stored_at, swapped, uniform_ranks
from acip.calibration.activation_covariance import activation_covariances, feed_tokens
from acip.errors import AcipError, BaseModelError, BudgetError, DataError, RecipeError
from acip.evaluate import perplexity
from acip.layers.targets import find_linears, hooked, weight_MN
from acip.modeling_acip import LowRankLinear, plain_linear
from tests.acip.layers.test_architectures import ARCHITECTURES, random_model
from tests.acip.layers.test_architectures import WIDE as WIDE_CONFIG
from tests.conftest import logits

QUICK: dict[str, dict[str, Any]] = {
    "asvd": {"search_windows": 1, "ratios": (0.3, 0.7)},
    "svd-llm": {"update_windows": 8},
    "svd-llm-lora": {"lora_epochs": 1, "lora_batch": 16},
    "dobi-svd": {"sample_windows": 8, "epochs": 1, "accumulate": 4},
    "acip-paper": {"set": {"lr": 3e-2, "lambda_factor": 1.3, "adapter_rank": 2, "post_tune_steps": 2}},
    "acip": {"set": {"lr": 1e-3, "adapter_rank": 2, "post_tune_steps": 2, "sample_windows": 8}},
}
LAYER, WIDE = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def linears(base: Base) -> dict[str, nn.Module]:
    return find_linears(base.model)


@pytest.fixture(scope="module")
def inputs(base: Base, windows: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return the inputs x [S, N] in float64 of two layers of the base model."""
    return inputs_of(base.model, windows, {name: linears[name] for name in (LAYER, WIDE)})


@torch.no_grad()
def inputs_of(model: nn.Module, windows: Tensor, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with hooked(on_inputs(layers, lambda name, x: found.update({name: x.double()}))):
        feed_tokens(model, windows)
    return found


@pytest.fixture(scope="module")
def gpt2() -> Base:
    """A random model with biases and transposed weights."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=2, n_positions=64, vocab_size=256)).eval().requires_grad_(False)
    for param in model.parameters():
        param.normal_(0, 0.2)
    return Base(model, None, "random", None, "random")


def loss_of(linear: nn.Module, layer: nn.Module, x_SN: Tensor) -> float:
    """Return |(W - W') X|^2 of a low-rank layer."""
    assert isinstance(layer, LowRankLinear)
    W_MN = layer.left.weight.double() @ layer.right.weight.double()
    return float((x_SN @ (weight_MN(linear).double() - W_MN).T).square().sum())


# ---- rules for all methods


@pytest.mark.parametrize("name", METHODS)
def test_full_size_is_the_base_and_no_size_is_exceeded(name: str, base: Base, windows: Tensor) -> None:
    linears, expected = find_linears(base.model), logits(base.model, windows[:2])
    dense = stored(base.model, linears)
    for made in compress(name, base, windows, (1.0, 0.7, 0.45), **QUICK.get(name, {})):
        got = logits(made.model, windows[:2])
        if made.asked == 1:
            assert (made.got, made.counted) == (1.0, "dense")
            assert torch.equal(got, expected)
        else:
            assert made.asked - 0.07 < made.got <= made.asked
            assert 0 < (got - expected).norm() < 3 * expected.norm()
        assert made.stored_params == stored(made.model, linears)
        assert made.dense_params == dense
    assert find_linears(base.model) == linears
    assert torch.equal(logits(base.model, windows[:2]), expected)


@pytest.mark.parametrize("name", METHODS)
def test_layers_with_biases_are_compressed(name: str, gpt2: Base, windows: Tensor) -> None:
    expected = logits(gpt2.model, windows[:2])
    (made,) = compress(name, gpt2, windows, (0.6,), **QUICK.get(name, {}))
    assert 0.5 < made.got <= 0.6
    assert torch.equal(logits(gpt2.model, windows[:2]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "albert-shared-block"])
def test_every_architecture_is_compressed(architecture: str, windows: Tensor) -> None:
    if architecture in ARCHITECTURES:
        config, exclude = ARCHITECTURES[architecture].config, ARCHITECTURES[architecture].recipe.exclude
        model = random_model(config)
    else:
        config, exclude = AlbertConfig(**WIDE_CONFIG, embedding_size=32), ()
        model = random_model(config, AlbertForMaskedLM)
    if architecture == "opt-16-bit":
        model = model.bfloat16()
    base, tokens = Base(model.requires_grad_(False), None, "random", None, "random"), windows[:, :16]
    expected = logits(model, tokens[:2])
    for name in METHODS:
        for made in compress(name, base, tokens, (0.6,), exclude=exclude, **QUICK.get(name, {})):
            assert 0.4 < made.got <= 0.6, name
            got = logits(made.model, tokens[:2])
            assert torch.isfinite(got).all() and not torch.equal(got, expected), name
    assert torch.equal(logits(model, tokens[:2]), expected)


def test_an_abandoned_run_restores_the_base(base: Base, windows: Tensor) -> None:
    linears = find_linears(base.model)
    made = compress("covariance", base, windows, (0.5, 0.4))
    assert next(made).asked == 0.5
    assert isinstance(base.model.get_submodule(LAYER), LowRankLinear)
    made.close()  # type: ignore[attr-defined]
    assert find_linears(base.model) == linears


def test_bad_input_is_refused(base: Base, windows: Tensor) -> None:
    def refuse(
        error: type[AcipError], message: str, name: str = "svd-llm-w", text: Tensor = windows, size: Any = 0.5, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            next(compress(name, base, text, (size,), **options))

    refuse(RecipeError, "unknown method 'asdv'.*did you mean 'asvd'", "asdv")
    refuse(RecipeError, "no option 'alpa'.*did you mean 'alpha'", "asvd", alpa=0.3)
    refuse(RecipeError, "svd-llm-w has no option 'update'", update=True)
    refuse(RecipeError, "sample_windows is 0", sample_windows=0)
    refuse(RecipeError, r"ratios are \(1.5,\)", "asvd", ratios=(1.5,))
    refuse(RecipeError, "floor is 2", "covariance-global", floor=2)
    refuse(RecipeError, "unknown recipe field 'lrr'", "acip", set={"lrr": 1})
    refuse(BudgetError, "size ratio is 0;", size=0)
    refuse(BudgetError, "size ratio is 1.1", size=1.1)
    refuse(BudgetError, "leaves no rank for", size=0.001)
    refuse(BudgetError, "the smallest size is 0.49.* smaller ratios", "asvd", size=0.2, ratios=(0.5,), search_windows=1)
    refuse(DataError, "n at least 1", text=windows[:0])
    refuse(DataError, "Use at least 2 windows", "dobi-svd", text=windows[:1])
    refuse(BaseModelError, "nothing to compress|does not skip", exclude=("layers",))
    assert method("asvd").options == ("exclude", "alpha", "scale_windows", "search_windows", "ratios")


def test_a_recipe_cannot_set_exclude(base: Base, windows: Tensor) -> None:
    with pytest.raises(RecipeError, match="use `exclude` of the arena file"):
        next(compress("acip", base, windows, (0.5,), set={"exclude": ["up_proj"]}))


# ---- SVD magnitude


def test_singular_values_of_all_layers_are_ranked_together(base: Base, windows: Tensor, linears: dict[str, nn.Module]) -> None:
    kept, dropped = [], []
    for made in compress("svd", base, windows, (0.4,)):
        layers = {name: made.model.get_submodule(name) for name in linears}
    for name, linear in linears.items():
        layer = layers[name]
        if isinstance(layer, LowRankLinear):
            U, s, Vh = torch.linalg.svd(weight_MN(linear).double(), full_matrices=False)
            W_MN = layer.left.weight.double() @ layer.right.weight.double()
            torch.testing.assert_close(W_MN, (U * s)[:, : layer.rank] @ Vh[: layer.rank], rtol=1e-4, atol=1e-5)
            if layer.rank > 1:  # every layer keeps at least one direction
                kept.append(float(s[layer.rank - 1]))
            dropped.append(float(s[layer.rank]))
    assert len(kept) > 5 and min(kept) >= max(dropped) * (1 - 1e-5), "a dropped singular value exceeds a kept one"


# ---- ASVD


def test_asvd_folds_its_scaling_exactly(linears: dict[str, nn.Module], inputs: dict[str, Tensor]) -> None:
    W_MN = weight_MN(linears[WIDE]).double()
    d_N = inputs[WIDE].abs().mean(0).sqrt()
    factors = asvd.scaled_svd(plain_linear(W_MN, None), d_N.double())
    torch.testing.assert_close(factors.left @ factors.right, W_MN, rtol=1e-5, atol=1e-6)
    r = 20
    dropped = torch.linalg.svdvals(W_MN * d_N)[r:].square().sum()  # Eckart-Young: no matrix of this rank is closer
    error = ((W_MN - factors.left[:, :r] @ factors.right[:r]) * d_N).square().sum()
    assert float(error) == pytest.approx(float(dropped), rel=1e-4)


def test_asvd_scales_are_mean_magnitudes(base: Base, windows: Tensor, linears: dict[str, nn.Module], inputs: dict[str, Tensor]) -> None:
    d = asvd.scales(base.model, linears, windows, 0.5)
    mean_N = inputs[LAYER].view(*windows.shape, -1).abs().mean(1).sum(0)
    torch.testing.assert_close(d[LAYER].double(), mean_N.sqrt() + 1e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["base", "gpt2"])
def test_sensitivities_are_losses_with_one_compressed_layer(which: str, windows: Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which).model
    linears = find_linears(model)
    factors = {name: asvd.scaled_svd(linear, torch.ones(weight_MN(linear).shape[1])) for name, linear in linears.items()}
    table = asvd.sensitivities(model, linears, factors, windows[:2], (0.2, 0.6), lambda *_: None)
    assert len(table) == 2 * len(linears)
    for entry in table[:: len(linears) // 4]:
        rank = uniform_ranks(linears, entry.ratio)[entry.name]
        assert rank is not None
        with swapped(model, {entry.name: factors[entry.name].at(linears[entry.name], rank)}):
            assert entry.loss == pytest.approx(perplexity(model, windows[:2]).loss, abs=1e-5)
    assert [entry.loss for entry in table] == sorted((entry.loss for entry in table), reverse=True)


def test_asvd_plans_compress_sensitive_layers_less() -> None:
    layers: dict[str, nn.Module] = {name: plain_linear(torch.randn(40, 40), None) for name in "abc"}
    losses = {("a", 0.5): 9.0, ("b", 0.5): 5.0, ("c", 0.5): 1.0, ("a", 0.8): 2.0, ("b", 0.8): 0.5, ("c", 0.8): 0.1}
    table = sorted((asvd.Entry(loss, name, ratio) for (name, ratio), loss in losses.items()), key=lambda entry: -entry.loss)
    rank = {ratio: uniform_ranks(layers, ratio)["a"] for ratio in (0.5, 0.8)}
    assert asvd.plan(table, layers, 1.0) == {"a": None, "b": None, "c": None}
    assert asvd.plan(table, layers, 0.95) == {"a": None, "b": None, "c": rank[0.8]}
    assert asvd.plan(table, layers, 0.7) == {"a": rank[0.8], "b": rank[0.8], "c": rank[0.5]}
    assert asvd.plan(table, layers, 0.6) == {"a": rank[0.8], "b": rank[0.5], "c": rank[0.5]}
    sizes = [stored_at(layers, asvd.plan(table, layers, size)) for size in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert sizes == sorted(sizes)


# ---- SVD-LLM


@pytest.mark.parametrize("name", [LAYER, WIDE])
@pytest.mark.parametrize("r", [3, 40])
def test_whitened_truncation_loses_the_dropped_singular_values(
    name: str, r: int, linears: dict[str, nn.Module], inputs: dict[str, Tensor]
) -> None:
    x_SN, W_MN = inputs[name], weight_MN(linears[name]).double()
    S_NN = svdllm.whitening(x_SN.T @ x_SN)
    linear = plain_linear(W_MN, None)
    factors = svdllm.whitened_svd(linear, S_NN)
    dropped = torch.linalg.svdvals(W_MN @ S_NN)[r:].square().sum()
    assert loss_of(linear, factors.at(linear, r), x_SN) == pytest.approx(float(dropped), rel=1e-8)
    torch.testing.assert_close(factors.left @ factors.right, W_MN)


def test_whitening_of_too_little_text_is_regularized() -> None:
    x_SN = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e4
    C_NN = x_SN.T @ x_SN
    S_NN = svdllm.whitening(C_NN)
    torch.testing.assert_close(S_NN @ S_NN.T, C_NN, rtol=1e-6, atol=1e-3)
    assert S_NN.diagonal().min() > 0
    with pytest.raises(AcipError, match="not finite"):
        svdllm.whitening(C_NN * torch.nan)


def test_each_layer_is_whitened_by_its_inputs(
    base: Base, windows: Tensor, linears: dict[str, nn.Module], inputs: dict[str, Tensor]
) -> None:
    few = {name: linears[name] for name in (LAYER, WIDE)}
    C = activation_covariances(base.model, few, windows, inputs_only=True)
    for covariance_bytes in (2**40, 1):  # one group, or a group per layer
        factors = dict(svdllm.whitened(base.model, few, windows, covariance_bytes))
        for name, x_SN in inputs.items():
            torch.testing.assert_close(C[name].double() * len(x_SN), x_SN.T @ x_SN, rtol=1e-4, atol=1e-2)
            S_NN = svdllm.whitening(x_SN.T @ x_SN)
            dropped = torch.linalg.svdvals(weight_MN(linears[name]).double() @ S_NN)[20:].square().sum()
            assert loss_of(linears[name], factors[name].at(linears[name], 20), x_SN) == pytest.approx(float(dropped), rel=1e-3)


def test_the_update_is_the_least_squares_fit_on_the_inputs_in_the_compressed_model(
    base: Base, windows: Tensor, linears: dict[str, nn.Module]
) -> None:
    ranks = uniform_ranks(linears, 0.4)
    layers = layers_at(linears, dict(svdllm.whitened(base.model, linears, windows)), ranks)
    fitted = svdllm.updated(base.model, linears, layers, windows, lambda done, total: None)
    assert all(base.model.get_submodule(name) is linear for name, linear in linears.items())
    name = "model.layers.2.self_attn.q_proj"  # the first layer of its block, so its inputs come from compressed blocks only
    new, old = fitted[name], layers[name]
    assert isinstance(new, LowRankLinear) and isinstance(old, LowRankLinear)
    with swapped(base.model, fitted):
        x_SN = inputs_of(base.model, windows, {name: new})[name]
    z_Sr = x_SN @ new.right.weight.double().T
    y_SM = x_SN @ weight_MN(linears[name]).double().T
    residual_SM = y_SM - z_Sr @ new.left.weight.double().T
    assert (z_Sr.T @ residual_SM).norm() < 1e-4 * z_Sr.norm() * residual_SM.norm()  # the normal equations
    before_SM = y_SM - z_Sr @ old.left.weight.double().T
    assert residual_SM.norm() < before_SM.norm()


def test_lora_is_merged_into_the_factors(base: Base, windows: Tensor) -> None:
    def loss(lr: float) -> Tensor:
        options = {**QUICK["svd-llm-lora"], "lora_epochs": 4, "lora_lr": lr}
        (model,) = (logits(made.model, windows) for made in compress("svd-llm-lora", base, windows, (0.3,), **options))
        return nn.functional.cross_entropy(model[:, :-1].flatten(0, 1), windows[:, 1:].flatten())

    assert loss(1e-3) < loss(0.0) - 0.05


def test_merging_adapters_gives_the_model_of_the_last_step(base: Base, windows: Tensor) -> None:
    """Both factors are trained, and after merging the model computes the same as after its last step."""
    linears = find_linears(base.model)
    layers = layers_at(linears, dict(svdllm.whitened(base.model, linears, windows)), uniform_ranks(linears, 0.4))
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLinear)}
    before = {name: (layer.left.weight.clone(), layer.right.weight.clone()) for name, layer in low_rank.items()}
    last: list[Tensor] = []

    def watch(what: str, done: int, total: int) -> None:
        if done == total:
            last.append(logits(base.model, windows[:4]))

    with swapped(base.model, layers):
        svdllm.tuned(base.model, list(low_rank.values()), windows, (4, 8.0, 0.0), 1e-2, 1, 8, 4, watch)
        torch.testing.assert_close(logits(base.model, windows[:4]), last[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last[0], last[1], atol=1e-2)
    for name, layer in low_rank.items():
        assert type(layer.left) is type(layer.right) is nn.Linear
        assert not any(torch.equal(new.weight, old) for new, old in zip((layer.left, layer.right), before[name], strict=True))


# ---- covariance


def test_the_covariance_cut_has_the_loss_of_whitened_svd(
    base: Base, windows: Tensor, linears: dict[str, nn.Module], inputs: dict[str, Tensor]
) -> None:
    def losses(name: str, **options: Any) -> Iterator[float]:
        for made in compress(name, base, windows, (0.7, 0.3), **options):
            yield from (loss_of(linears[layer], made.model.get_submodule(layer), x_SN) for layer, x_SN in inputs.items())

    covariance_losses, whitened = list(losses("covariance")), list(losses("svd-llm-w"))
    assert covariance_losses == pytest.approx(whitened, rel=1e-3)
    d = {layer: x_SN.abs().mean(0).float() for layer, x_SN in inputs.items()}
    ranks = uniform_ranks(linears, 0.3)
    for (layer, x_SN), loss in zip(inputs.items(), covariance_losses[2:], strict=True):
        rank = ranks[layer]
        assert rank is not None
        scaled = asvd.scaled_svd(linears[layer], d[layer]).at(linears[layer], rank)
        plain = asvd.scaled_svd(linears[layer], torch.ones_like(d[layer])).at(linears[layer], rank)
        assert loss < 0.9 * loss_of(linears[layer], scaled, x_SN) < loss_of(linears[layer], plain, x_SN)


def test_global_ranks_keep_more_energy_and_respect_the_floor(base: Base, windows: Tensor, linears: dict[str, nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    energy = {
        name: torch.rand(min(weight_MN(linear).shape), generator=generator).sort(descending=True).values ** (1 + i)
        for i, (name, linear) in enumerate(linears.items())
    }

    def kept_energy(ranks: dict[str, int | None]) -> float:
        return sum(float(energy[name][: ranks[name]].sum() / energy[name].sum()) for name in linears)

    dense = stored_at(linears, dict.fromkeys(linears))
    for floor in (0.5, 0.0):
        for size in (0.8, 0.4):
            uniform = uniform_ranks(linears, size)
            ranks = covariance.global_ranks(linears, energy, uniform, floor, size)
            assert all((ranks[name] or 10**6) >= round(floor * (rank or 0)) for name, rank in uniform.items())
            assert stored_at(linears, ranks) <= size * dense
        assert kept_energy(ranks) > kept_energy(uniform)


def test_energies_are_the_eigenvalues(base: Base, windows: Tensor, linears: dict[str, nn.Module], inputs: dict[str, Tensor]) -> None:
    few = {name: linears[name] for name in inputs}
    factors = {}
    for name, x_SN in inputs.items():
        y_SM = x_SN @ weight_MN(linears[name]).double().T
        Q_MM = torch.linalg.eigh(y_SM.T @ y_SM).eigenvectors.flip(1)
        factors[name] = Factors.of(linears[name], Q_MM, Q_MM.T @ weight_MN(linears[name]).double())
    for name, found in covariance.energies(base.model, few, factors, windows).items():
        y_SM = inputs[name] @ weight_MN(linears[name]).double().T
        eigenvalues = torch.linalg.eigvalsh(y_SM.T @ y_SM).flip(0)
        torch.testing.assert_close(found[:20].double(), eigenvalues[:20], rtol=1e-3, atol=0)
        assert all(a >= b * (1 - 1e-3) for a, b in pairwise(found[:20].tolist()))
