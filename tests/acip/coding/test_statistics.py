"""Layer statistics equal a computation token by token and predict the KL divergence of small changes. The model stays as it was."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig

from acip.coding.error_feedback import row_errors
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.errors import CalibrationError
from acip.layers.targets import find_linears, hooked, weight_MN
from tests.acip.layers.test_architectures import GROUPED, IDS, random_model

LAST = "model.layers.1.mlp.down_proj"  # its output at a token changes only the prediction at this token


def llama(**options: Any) -> Any:
    return random_model(LlamaConfig(**GROUPED, **options)).requires_grad_(False)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 256, (3, 10), generator=torch.Generator().manual_seed(1))


def run_with_outputs(model: Any, linears: dict[str, nn.Module], window_T: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Return the input [T, N] and the output, with gradients, of each layer, and the logits [T, V]."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _layer, args, out: calls.update({name: (args[0][0].detach(), out.requires_grad_())})

    with hooked(layer.register_forward_hook(keep(name)) for name, layer in linears.items()):
        return calls, model(input_ids=window_T[None]).logits[0]


def token_by_token(model: Any, linears: dict[str, nn.Module], windows: Tensor, seed: int) -> dict[str, LayerStatistics]:
    """Return the statistics with the same drawn tokens, from the gradient of each layer's output at each token."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
    for number, window_T in enumerate(windows):
        places_T1 = torch.rand(len(window_T), 1, generator=torch.Generator().manual_seed(1_000_003 * seed + number))
        calls, logits_TV = run_with_outputs(model, linears, window_T)
        drawn_T = (logits_TV.detach().double().softmax(-1).cumsum(-1) <= places_T1).sum(1)
        loss = -logits_TV.log_softmax(-1)[torch.arange(len(window_T)), drawn_T].sum()
        grads = torch.autograd.grad(loss, [out for _, out in calls.values()])
        for (name, (x_TN, _)), grad in zip(calls.items(), grads, strict=True):
            pairs[name] += list(zip(x_TN, grad.reshape(len(x_TN), -1), strict=True))
    return {name: mean_of_tokens(each) for name, each in pairs.items()}


def mean_of_tokens(pairs: list[tuple[Tensor, Tensor]]) -> LayerStatistics:
    importance_M = sum(g_M**2 for _, g_M in pairs) / len(pairs)
    weighted_NN = sum(float(g_M @ g_M) * torch.outer(x_N, x_N) for x_N, g_M in pairs)
    return LayerStatistics(weighted_NN / sum(float(g_M @ g_M) for _, g_M in pairs), importance_M)  # type: ignore[arg-type]


def assert_close(statistics: LayerStatistics, expected: LayerStatistics) -> None:
    for actual, wanted in ((statistics.metric, expected.metric), (statistics.importance, expected.importance)):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_statistics_equal_a_computation_token_by_token(tied: bool, windows: Tensor) -> None:
    model = llama(tie_word_embeddings=tied)
    linears = find_linears(model)
    assert len(linears) == 14
    expected = token_by_token(model, linears, windows, seed=5)
    statistics = layer_statistics(model, linears, windows, seed=5)
    assert statistics.keys() == linears.keys()
    for name, each in statistics.items():
        assert each.metric.dtype == each.importance.dtype == torch.float32
        assert_close(each, expected[name])


def test_statistics_of_transposed_weights_equal_a_computation_token_by_token(windows: Tensor) -> None:
    """GPT-2's Conv1D stores its weights as [in, out]."""
    model = random_model(GPT2Config(**IDS, n_embd=32, n_layer=1, n_head=2, n_positions=32)).requires_grad_(False)
    linears = find_linears(model)
    expected = token_by_token(model, linears, windows, seed=0)
    for name, each in layer_statistics(model, linears, windows).items():
        M, N = weight_MN(linears[name]).shape
        assert each.metric.shape == (N, N)
        assert each.importance.shape == (M,)
        assert_close(each, expected[name])


def test_metric_is_symmetric_and_positive_semidefinite(windows: Tensor) -> None:
    model = llama()
    for each in layer_statistics(model, find_linears(model), windows).values():
        torch.testing.assert_close(each.metric, each.metric.T)
        assert torch.linalg.eigvalsh(each.metric.double())[0] > -1e-5 * float(each.metric.diagonal().mean())
        assert (each.importance >= 0).all()


def test_seed_decides_the_drawn_tokens(windows: Tensor) -> None:
    model = llama()
    linears = {LAST: find_linears(model)[LAST]}
    first, same, other = (layer_statistics(model, linears, windows, seed)[LAST].importance for seed in (0, 0, 1))
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, other, rtol=1e-2)


# ---- the predicted KL divergence


def predicted(statistics: LayerStatistics, change_MN: Tensor) -> float:
    return 0.5 * float(statistics.importance @ row_errors(change_MN, torch.zeros_like(change_MN), statistics.metric))


@torch.no_grad()
def measured(model: Any, changes: dict[str, Tensor], windows: Tensor) -> float:
    """Return the KL divergence in nats per token after the changes. The model is restored afterwards."""
    before = model(input_ids=windows).logits.double().log_softmax(-1)
    linears: dict[str, Any] = dict(find_linears(model))
    copies = {name: linears[name].weight.clone() for name in changes}
    for name, change in changes.items():
        linears[name].weight += change
    after = model(input_ids=windows).logits.double().log_softmax(-1)
    for name, copy in copies.items():
        linears[name].weight.copy_(copy)
    return float((before.exp() * (before - after)).sum(-1).mean())


def random_change(layer: Any, share: float, seed: int) -> Tensor:
    weight = layer.weight
    return share * weight.norm() / weight.numel() ** 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def test_predicted_kl_of_the_last_layer_is_the_measured_kl() -> None:
    """The mean over 20 random changes has a standard deviation of a few percent."""
    model = llama()
    linears = {LAST: find_linears(model)[LAST]}
    windows = torch.randint(3, 256, (40, 32), generator=torch.Generator().manual_seed(2))
    statistics = layer_statistics(model, linears, windows)[LAST]
    changes = [random_change(linears[LAST], 0.01, seed) for seed in range(20)]
    expected = sum(measured(model, {LAST: change}, windows) for change in changes)
    assert sum(predicted(statistics, change) for change in changes) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_predicted_kl_of_any_layer_is_near_the_measured_kl(name: str) -> None:
    """The prediction leaves out products of gradients at different tokens."""
    model = llama()
    linears = {key: layer for key, layer in find_linears(model).items() if name in key}
    windows = torch.randint(3, 256, (40, 32), generator=torch.Generator().manual_seed(2))
    statistics = layer_statistics(model, linears, windows)
    for key, layer in linears.items():
        changes = [random_change(layer, 0.01, seed) for seed in range(6)]
        expected = sum(measured(model, {key: change}, windows) for change in changes)
        assert 0.4 < sum(predicted(statistics[key], change) for change in changes) / expected < 2.5


def test_predicted_kl_of_all_layers_is_the_sum() -> None:
    model = llama()
    linears = find_linears(model)
    windows = torch.randint(3, 256, (40, 32), generator=torch.Generator().manual_seed(2))
    statistics = layer_statistics(model, linears, windows)
    changes = {name: random_change(layer, 0.003, i) for i, (name, layer) in enumerate(linears.items())}
    expected = measured(model, changes, windows)
    assert sum(predicted(statistics[name], change) for name, change in changes.items()) == pytest.approx(expected, rel=0.5)


# ---- layers of some tokens


class TwoLayers(nn.Module):
    """Logits of one layer for all tokens, and of a second one that is called `calls` times for the tokens below `limit`."""

    def __init__(self, limit: int = 16, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(16, 6), nn.Linear(6, 12), nn.Linear(6, 12)
        self.limit, self.calls = limit, calls
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Any:
        x_BTN, chosen_BT = self.embedding(input_ids), input_ids < self.limit
        logits_BTV = self.first(x_BTN)
        for _ in range(self.calls):
            part = torch.zeros_like(logits_BTV)
            part[chosen_BT] = self.second(x_BTN[chosen_BT])
            logits_BTV = logits_BTV + part
        return SimpleNamespace(logits=logits_BTV)


@torch.no_grad()
def kl_of_change(model: TwoLayers, change_MN: Tensor, windows: Tensor) -> float:
    """Return the KL divergence in nats per token after a change of the second layer."""
    before = model(windows).logits.log_softmax(-1)
    model.second.weight += change_MN
    after = model(windows).logits.log_softmax(-1)
    model.second.weight -= change_MN
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("limit", [16, 8, 2])
def test_kl_of_a_layer_of_some_tokens_is_a_mean_over_all_tokens(limit: int) -> None:
    """An expert that sees an eighth of the tokens matters for an eighth of the tokens."""
    model = TwoLayers(limit)
    windows = torch.randint(0, 16, (40, 50), generator=torch.Generator().manual_seed(0))
    statistics = layer_statistics(model, {"second": model.second}, windows)["second"]
    generator = torch.Generator().manual_seed(1)
    changes = [0.03 * torch.randn(12, 6, generator=generator) for _ in range(60)]
    expected = sum(kl_of_change(model, change, windows) for change in changes)
    assert sum(predicted(statistics, change) for change in changes) == pytest.approx(expected, rel=0.2)


def test_layers_that_are_called_twice_matter_twice() -> None:
    """The gradients of both calls are summed, as if the layers were two."""
    windows = torch.randint(0, 16, (20, 50), generator=torch.Generator().manual_seed(0))
    models = [TwoLayers(calls=calls) for calls in (1, 2)]
    for model in models:  # the same predictions
        model.second.weight.zero_(), model.second.bias.zero_()
    first, second = (layer_statistics(model, {"second": model.second}, windows)["second"] for model in models)
    torch.testing.assert_close(second.importance, 2 * first.importance)
    torch.testing.assert_close(second.metric, first.metric)


# ---- errors, and what stays as it was


@pytest.mark.parametrize("names", [["first", "second"], ["second"]])
@pytest.mark.parametrize("calls", [0, 1])
def test_layers_that_the_loss_does_not_depend_on_raise(calls: int, names: list[str]) -> None:
    """The second layer is never called, or it is called for no token."""
    model = TwoLayers(limit=0, calls=calls)
    windows = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=r"does not depend on 1 layers, for example second, .* exclude"):
        layer_statistics(model, {name: model.get_submodule(name) for name in names}, windows)


class Detached(TwoLayers):
    """The second layer is called, but its output is not part of the logits."""

    def forward(self, input_ids: Tensor) -> Any:
        x_BTN = self.embedding(input_ids)
        return SimpleNamespace(logits=self.first(x_BTN) + 0 * self.second(x_BTN).detach())


def test_layers_behind_a_detached_output_raise() -> None:
    model = Detached()
    with pytest.raises(CalibrationError, match="for example second"):
        layer_statistics(model, {"first": model.first, "second": model.second}, torch.arange(10).view(2, 5))


@pytest.mark.parametrize("trainable", [False, True])
def test_the_model_stays_as_it_was(trainable: bool, windows: Tensor) -> None:
    model = llama()
    model.lm_head.requires_grad_(trainable)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(trainable)
    before = {name: (parameter.detach().clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    layer_statistics(model, find_linears(model), windows)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None, name
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules())
    assert not model.training


def test_hooks_are_removed_after_an_error(windows: Tensor) -> None:
    model = llama()
    with pytest.raises(IndexError):
        layer_statistics(model, find_linears(model), windows + 1000)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_trainable_parameters_do_not_change_the_statistics(windows: Tensor) -> None:
    model = llama()
    linears = {LAST: find_linears(model)[LAST]}
    frozen = layer_statistics(model, linears, windows)[LAST]
    trainable = layer_statistics(model.requires_grad_(True), linears, windows)[LAST]
    torch.testing.assert_close(trainable.metric, frozen.metric)
    torch.testing.assert_close(trainable.importance, frozen.importance)


def test_gradients_are_computed_inside_no_grad(windows: Tensor) -> None:
    model = llama()
    linears = {LAST: find_linears(model)[LAST]}
    with torch.no_grad():
        assert layer_statistics(model, linears, windows)[LAST].importance.sum() > 0
        assert not torch.is_grad_enabled()


def test_progress_counts_windows(windows: Tensor) -> None:
    model = llama()
    calls: list[tuple[int, int]] = []
    layer_statistics(model, find_linears(model), windows, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_16_bit_models_have_float32_statistics_near_those_of_float32(windows: Tensor) -> None:
    """The second moment of the inputs does not depend on the drawn tokens to first order."""
    model = llama()
    linears = {LAST: find_linears(model)[LAST]}
    full = layer_statistics(model, linears, windows)[LAST]
    half = layer_statistics(model.bfloat16(), linears, windows)[LAST]
    assert half.metric.dtype == half.importance.dtype == torch.float32
    assert float(half.metric.trace()) == pytest.approx(float(full.metric.trace()), rel=0.2)
    assert float(half.importance.sum()) == pytest.approx(float(full.importance.sum()), rel=0.2)
