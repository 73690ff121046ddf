"""The paper's own variants: each is a field of the recipe, and each does what the paper says it does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate, transfer
from acip.calibration.losses import next_token
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.errors import CalibrationError, RecipeError
from acip.evaluate import perplexity
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets, weight_MN
from acip.recipe import Recipe, paper
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import set_size
from acip.sizing.score_map import fisher
from tests.conftest import SEED

Run = Callable[..., Calibration]


@pytest.fixture(scope="module")
def run(small_base: str, golden_tokens: Tensor) -> Run:
    """The paper's recipe on the small model, with changes."""

    def run(**changes: object) -> Calibration:
        model = load_base(small_base, "float32").model
        parametrize(model, recipe(**changes), golden_tokens)
        return calibrate(model, TokenBatches(golden_tokens, 4), recipe(**changes))

    return run


def recipe(**changes: object) -> Recipe:
    fields = {
        "adapter_rank": 4,
        "adapter_alpha": 4.0,
        "adapter_dropout": 0.0,
        "dtype": "float32",
        "batch_size": 4,
        "seq_len": 64,
        "seed": SEED,
    }
    return Recipe.from_dict(fields | {"lr": 2e-3, "lambda_factor": 1.2, "post_tune_steps": 0} | changes, paper())


@pytest.fixture(scope="module")
def plain(run: Run) -> Calibration:
    return run()


def loss(calibration: Calibration, size: float, windows: Tensor) -> float:
    set_size(targets(calibration.model), calibration.table.cut(Budget(size, "paper")))
    return perplexity(calibration.model, windows[:64], 16).loss


def rank_correlation(a: Tensor, b: Tensor) -> float:
    places = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(places)[0, 1])


def test_adapters_earn_their_place(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.2: without them pruning still works, and costs more."""
    bare = run(adapter_rank=0)
    assert loss(plain, 0.6, heldout_tokens) < loss(bare, 0.6, heldout_tokens) < 5.5


def test_the_reset_rule(run: Run, plain: Calibration, small_base: str, heldout_tokens: Tensor) -> None:
    """D.3: without it the adapters stay on in layers that save nothing, and size 1.0 is not the base model."""
    base = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    everywhere = run(dense_if_no_saving=False)
    assert loss(plain, 1.0, heldout_tokens) == base
    assert loss(everywhere, 1.0, heldout_tokens) > base + 0.01
    assert loss(plain, 0.9, heldout_tokens) < loss(everywhere, 0.9, heldout_tokens)
    cut = everywhere.table.cut(Budget(0.9))
    assert None not in cut.ranks.values()
    layers = {name: core for name, core in targets(everywhere.model).items() if isinstance(core, ElasticLinear)}
    set_size(layers, cut)
    sizes = [sum(p.numel() for p in core.materialize("factors").parameters()) for core in layers.values()]
    assert sum(sizes) + everywhere.table.rest_params == cut.params, "what saves nothing is stored as one dense product"


@pytest.mark.parametrize("stop", [0.8, 0.6])
def test_stop_ratios(run: Run, plain: Calibration, heldout_tokens: Tensor, stop: float) -> None:
    """D.4: an earlier stop takes fewer steps, and its forecast below the stop is worse than what was gone through."""
    early = run(stop_ratio=stop)
    assert early.stop_step < plain.stop_step
    assert early.history[-1].size <= stop < early.history[-2].size
    assert loss(early, 0.4, heldout_tokens) > loss(plain, 0.4, heldout_tokens)


def test_an_early_frozen_score_map_forecasts(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.5: pruning goes on, scores don't; the order is much the same."""
    frozen = run(scores_until=0.8)
    assert frozen.stop_step == plain.stop_step
    gone, all_gone = ((c.scores.score <= 0).sum() for c in (frozen, plain))
    assert 0 < gone < 0.85 * all_gone
    assert float(frozen.scores.score.min()) > -frozen.stop_step, "ages stopped counting"
    assert rank_correlation(frozen.scores.score, plain.scores.score) > 0.8
    assert loss(frozen, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.5
    with pytest.raises(RecipeError, match=r"scores_until is 0\.3; it must be in"):
        recipe(scores_until=0.3)


def test_accumulated_gradients_are_scores_too(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.6: they work about as well as the order of pruning."""
    gradient = run(scores="gradient")
    assert gradient.stop_step == plain.stop_step, "only the score map differs"
    assert not torch.equal(gradient.scores.score, plain.scores.score)
    assert rank_correlation(gradient.scores.score, plain.scores.score) > 0.3
    assert loss(gradient, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.6


def test_singular_values_alone_are_poorer_scores(run: Run, small_base: str, heldout_tokens: Tensor) -> None:
    """D.6: no step of pruning, and a worse model than scores that know the loss."""
    trivial = run(scores="singular_values")
    assert (trivial.stop_step, trivial.history) == (0, [])
    model = load_base(small_base, "float32").model
    name = next(iter(targets(trivial.model)))
    S = torch.linalg.svdvals(weight_MN(model.get_submodule(name)).detach())
    torch.testing.assert_close(trivial.scores.of(name), S, rtol=1e-4, atol=1e-4)
    informed = run(scores="fisher")
    assert loss(trivial, 0.6, heldout_tokens) > loss(informed, 0.6, heldout_tokens) + 0.05
    with pytest.raises(RecipeError, match="these scores need basis 'svd'"):
        recipe(scores="singular_values", basis="covariance")


def test_singular_values_can_be_post_tuned(run: Run, heldout_tokens: Tensor) -> None:
    tuned = run(scores="singular_values", post_tune_steps=40)
    assert len(tuned.history) == 40
    assert loss(tuned, 0.4, heldout_tokens) < loss(run(scores="singular_values"), 0.4, heldout_tokens)


def test_post_tuning_helps_where_the_model_is_small(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.7: at the stop ratio, more steps are better."""
    losses = [loss(c, 0.4, heldout_tokens) for c in (plain, run(post_tune_steps=40), run(post_tune_steps=160))]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] - 0.05


def test_excluded_layers_stay_as_they_are(run: Run) -> None:
    """D.8."""
    without = run(exclude=["up_proj"], stop_ratio=0.6)
    assert not any("up_proj" in name for name in targets(without.model))
    cut = without.table.cut(Budget(0.6))
    assert not any("up_proj" in name for name in cut.ranks)
    assert type(without.model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert without.table.rest_params > sum(p.numel() for name, p in without.model.named_parameters() if name.endswith("up_proj.weight"))


def test_a_total_of_steps_is_kept(run: Run, plain: Calibration) -> None:
    total = run(total_steps=plain.stop_step + 7)
    assert total.stop_step == plain.stop_step
    assert len(total.history) == plain.stop_step + 7


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_first_then_back_to_full_precision(
    run: Run, plain: Calibration, small_base: str, golden_tokens: Tensor, heldout_tokens: Tensor, kind: str
) -> None:
    """3.4: scores and adapters of a calibration on 4-bit factors serve the full-precision base."""
    model = load_base(small_base, "float32").model
    rounded = parametrize(model, recipe(quantize=kind), golden_tokens)
    core = next(iter(rounded.values()))
    assert isinstance(core, SVDLinear)
    rows = core.left.read()
    blocks = rows[:, : rows.shape[1] // 64 * 64].reshape(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 16, "a block of 64 holds 4-bit numbers"
    quantized = calibrate(model, TokenBatches(golden_tokens, 4), recipe(quantize=kind))

    full = load_base(small_base, "float32").model
    parametrize(full, recipe(), golden_tokens)
    carried = transfer(quantized, full, recipe())
    base = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    assert loss(carried, 1.0, heldout_tokens) == base
    assert loss(carried, 0.6, heldout_tokens) < loss(quantized, 0.6, heldout_tokens) + 0.1, "rounding errors are gone"
    assert loss(carried, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.5, "and the scores are as good"
    with pytest.raises(CalibrationError, match="freshly parametrized"):
        transfer(quantized, full, recipe())
    with pytest.raises(CalibrationError, match=r"adapter_rank is 8; to transfer the scores it must be 4"):
        transfer(quantized, full, recipe(adapter_rank=8))


def test_fisher_scores_are_the_squared_gradients_of_single_tokens(small_base: str, golden_tokens: Tensor) -> None:
    """Against a gate per token, differentiated by autograd."""
    model = load_base(small_base, "float32").model
    layers = parametrize(model, recipe(), golden_tokens)
    name, core = list(layers.items())[3]
    assert isinstance(core, SVDLinear)
    ids = golden_tokens[:3]
    with fisher({name: core}) as scores:
        next_token(model, ids).backward()

    gates = torch.ones(*ids.shape, len(core.right), requires_grad=True)

    def gated(layer: SVDLinear, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return layer.left.expand(layer.right.project(args[0]) * gates)

    handle = core.register_forward_hook(gated)
    next_token(model, ids).backward()
    handle.remove()
    assert gates.grad is not None
    torch.testing.assert_close(scores[name], gates.grad.square().sum((0, 1)), rtol=1e-3, atol=1e-14)


def test_the_default_needs_no_pruning_and_beats_it(
    run: Run, plain: Calibration, small_base: str, golden_tokens: Tensor, heldout_tokens: Tensor
) -> None:
    """Ours, at the same length: Fisher scores, all steps spent on the adapters."""
    fields = {"dtype": "float32", "batch_size": 4, "seq_len": 64, "lr": 1e-3, "total_steps": plain.stop_step}
    ours = Recipe.from_dict(fields)
    model = load_base(small_base, "float32").model
    parametrize(model, ours, golden_tokens)
    calibration = calibrate(model, TokenBatches(golden_tokens, 4), ours)
    assert {report.phase for report in calibration.history} == {"post_tune"}
    assert len(calibration.history) == plain.stop_step
    base = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    for size in (0.9, 0.6, 0.4):
        assert loss(calibration, size, heldout_tokens) - base < 0.3 * (loss(plain, size, heldout_tokens) - base)
