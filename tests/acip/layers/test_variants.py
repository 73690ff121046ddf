"""Each variant of the paper is a field of the recipe and has the effect that the paper describes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate, transfer
from acip.calibration.losses import next_token
from acip.calibration.memory_plan import predict
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.errors import BaseModelError, CalibrationError, RecipeError
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
    """Return a function that calibrates the small model with the paper's recipe and changes to it."""

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
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_adapters_lower_the_loss(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.2: pruning works without adapters, but the loss is higher."""
    without = run(adapter_rank=0)
    assert loss(plain, 0.6, heldout_tokens) < loss(without, 0.6, heldout_tokens) < 5.5


def test_layers_that_save_nothing_are_dense(run: Run, plain: Calibration, small_base: str, heldout_tokens: Tensor) -> None:
    """D.3: otherwise these layers keep their adapters, and size 1.0 is not the base model."""
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
    assert sum(sizes) + everywhere.table.rest_params == cut.params, "layers that save nothing are not stored as one dense product"


@pytest.mark.parametrize("stop", [0.8, 0.6])
def test_an_early_stop_is_worse_below_the_stop_ratio(run: Run, plain: Calibration, heldout_tokens: Tensor, stop: float) -> None:
    """D.4: an earlier stop takes fewer steps, but sizes below the stop ratio have a higher loss."""
    early = run(stop_ratio=stop)
    assert early.stop_step < plain.stop_step
    assert early.history[-1].size <= stop < early.history[-2].size
    assert loss(early, 0.4, heldout_tokens) > loss(plain, 0.4, heldout_tokens)


def test_scores_that_are_frozen_early_are_nearly_as_good(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.5: pruning continues with frozen scores, and the removal order is similar."""
    frozen = run(scores_until=0.8)
    assert frozen.stop_step == plain.stop_step
    removed, all_removed = ((c.scores.score <= 0).sum() for c in (frozen, plain))
    assert 0 < removed < 0.85 * all_removed
    assert float(frozen.scores.score.min()) > -frozen.stop_step, "the scores were updated after they were frozen"
    assert rank_correlation(frozen.scores.score, plain.scores.score) > 0.8
    assert loss(frozen, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.5
    with pytest.raises(RecipeError, match=r"scores_until is 0\.3; it must be in"):
        recipe(scores_until=0.3)


def test_accumulated_gradients_are_good_scores(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.6: accumulated gradients work about as well as the order of pruning."""
    gradient = run(scores="gradient")
    assert gradient.stop_step == plain.stop_step, "only the score map differs"
    assert not torch.equal(gradient.scores.score, plain.scores.score)
    assert rank_correlation(gradient.scores.score, plain.scores.score) > 0.3
    assert loss(gradient, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.6


def test_singular_values_are_worse_scores(run: Run, small_base: str, heldout_tokens: Tensor) -> None:
    """D.6: singular values need no pruning, but give a higher loss than scores based on the loss."""
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


def test_post_tuning_lowers_the_loss_at_the_stop_ratio(run: Run, plain: Calibration, heldout_tokens: Tensor) -> None:
    """D.7: at the stop ratio, more steps give a lower loss."""
    losses = [loss(c, 0.4, heldout_tokens) for c in (plain, run(post_tune_steps=40), run(post_tune_steps=160))]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] - 0.05


def test_excluded_layers_do_not_change(run: Run) -> None:
    """D.8: excluded layers are not targets, and no cut contains them."""
    without = run(exclude=["up_proj"], stop_ratio=0.6)
    assert not any("up_proj" in name for name in targets(without.model))
    cut = without.table.cut(Budget(0.6))
    assert not any("up_proj" in name for name in cut.ranks)
    assert type(without.model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert without.table.rest_params > sum(p.numel() for name, p in without.model.named_parameters() if name.endswith("up_proj.weight"))


def test_a_part_that_matches_no_module_is_refused(small_base: str, golden_tokens: Tensor) -> None:
    """A misspelled part would leave its layers compressed. A part that matches a module without target layers is allowed."""
    model = load_base(small_base, "float32").model
    typo = recipe(exclude=["up_porj", "q_proj"])
    for check in (lambda: parametrize(model, typo, golden_tokens), lambda: predict(model, typo)):
        with pytest.raises(BaseModelError, match=r"'up_porj', but no module of .* end with k_proj, .*, up_proj, .* Correct 'up_porj'"):
            check()
    assert not targets(model)
    assert len(parametrize(model, recipe(exclude=["embed_tokens"]), golden_tokens)) == 7 * model.config.num_hidden_layers


def test_the_total_number_of_steps_is_kept(run: Run, plain: Calibration) -> None:
    total = run(total_steps=plain.stop_step + 7)
    assert total.stop_step == plain.stop_step
    assert len(total.history) == plain.stop_step + 7


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_calibration_in_four_bit_transfers_to_full_precision(
    run: Run, plain: Calibration, small_base: str, golden_tokens: Tensor, heldout_tokens: Tensor, kind: str
) -> None:
    """3.4: scores and adapters from a calibration with 4-bit factors work for the full-precision base model."""
    model = load_base(small_base, "float32").model
    rounded = parametrize(model, recipe(quantize=kind), golden_tokens)
    core = next(iter(rounded.values()))
    assert isinstance(core, SVDLinear)
    rows = core.left.read()
    blocks = rows[:, : rows.shape[1] // 64 * 64].reshape(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 16, "a block of 64 has more than 16 values"
    quantized = calibrate(model, TokenBatches(golden_tokens, 4), recipe(quantize=kind))

    full = load_base(small_base, "float32").model
    parametrize(full, recipe(), golden_tokens)
    carried = transfer(quantized, full, recipe())
    base = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    assert loss(carried, 1.0, heldout_tokens) == base
    assert loss(carried, 0.6, heldout_tokens) < loss(quantized, 0.6, heldout_tokens) + 0.1, "full precision is worse than 4 bit"
    assert loss(carried, 0.6, heldout_tokens) < loss(plain, 0.6, heldout_tokens) + 0.5, "the scores are worse than those in full precision"
    with pytest.raises(CalibrationError, match="freshly parametrized"):
        transfer(quantized, full, recipe())
    with pytest.raises(CalibrationError, match=r"adapter_rank is 8; to transfer the scores it must be 4"):
        transfer(quantized, full, recipe(adapter_rank=8))


def test_fisher_scores_are_the_squared_gradients_of_single_tokens(small_base: str, golden_tokens: Tensor) -> None:
    """The scores are compared with the gradients of one gate per token."""
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


def test_the_default_recipe_beats_pruning(
    run: Run, plain: Calibration, small_base: str, golden_tokens: Tensor, heldout_tokens: Tensor
) -> None:
    """The default recipe uses Fisher scores and spends all steps on the adapters, for the same number of steps."""
    fields = {"dtype": "float32", "batch_size": 4, "seq_len": 64, "lr": 1e-3, "total_steps": plain.stop_step}
    default = Recipe.from_dict(fields)
    model = load_base(small_base, "float32").model
    parametrize(model, default, golden_tokens)
    calibration = calibrate(model, TokenBatches(golden_tokens, 4), default)
    assert {report.phase for report in calibration.history} == {"post_tune"}
    assert len(calibration.history) == plain.stop_step
    base = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    for size in (0.9, 0.6, 0.4):
        assert loss(calibration, size, heldout_tokens) - base < 0.3 * (loss(plain, size, heldout_tokens) - base)
