"""Products of 16-bit matrices on CPUs without instructions for them: computed in float32 and rounded, with and without gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acip.utils import half_products
from acip.utils.half_products import is_slow, speed_up_products

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Replace the kernels of a type on any CPU, also on one that has instructions for it."""
    before = set(half_products._slow)
    was_replaced = bool(half_products._libraries)
    monkeypatch.setattr(half_products, "is_slow", lambda dtype: dtype in DTYPES)
    speed_up_products(request.param)
    assert half_products._slow == before | {request.param} and len(half_products._libraries) == 1
    yield request.param
    half_products._slow.clear()
    half_products._slow.update(before)
    if not was_replaced:
        half_products._libraries.pop()._destroy()


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "linear without a bias": lambda x, weight, bias: F.linear(x, weight),
    "linear of a batch": lambda x, weight, bias: F.linear(x.view(3, -1, x.shape[1]), weight, bias),
    "few rows": lambda x, weight, bias: F.linear(x[:3], weight, bias),
    "no rows": lambda x, weight, bias: F.linear(x[:0], weight, bias),
    "factors": lambda x, weight, bias: (x @ weight.T) @ weight,
    "scaled sum": lambda x, weight, bias: torch.addmm(bias, x, weight.T, beta=0.5, alpha=2.0),
    "ignored sum": lambda x, weight, bias: torch.addmm(torch.full_like(bias, torch.nan), x, weight.T, beta=0.0),
    "batches": lambda x, weight, bias: x.view(3, -1, x.shape[1]) @ weight.T.expand(3, -1, -1),
    "scaled sum of batches": lambda x, weight, bias: torch.baddbmm(
        bias, x.view(3, -1, x.shape[1]), weight.T.expand(3, -1, -1), beta=0.5, alpha=2.0
    ),
    "attention": lambda x, weight, bias: F.scaled_dot_product_attention(*(x.view(1, 1, -1, x.shape[1]),) * 3, is_causal=True),
    "attention with a mask": lambda x, weight, bias: F.scaled_dot_product_attention(
        *(x.view(1, 1, -1, x.shape[1]),) * 3, attn_mask=torch.ones(33, 33, dtype=x.dtype).tril().log()
    ),
    "attention of few rows": lambda x, weight, bias: F.scaled_dot_product_attention(
        x.view(1, 3, -1, x.shape[1])[..., :2, :], *(x.view(1, 3, -1, x.shape[1]),) * 2
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_are_those_of_float64(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ by the rounding of a few results to 16 bit, also if the operands are converted in many tiles."""
    product = PRODUCTS[name]
    seed = torch.Generator().manual_seed(0)
    operands = [torch.randn(*shape, generator=seed).div(4).to(dtype) for shape in ((33, 40), (24, 40), (24,))]
    expected = outcome(product, [operand.double() for operand in operands])
    for tile in (half_products.TILE, 100):
        monkeypatch.setattr(half_products, "TILE", tile)
        found = outcome(product, operands)
        for value, correct in zip(found, expected, strict=True):
            assert value.dtype == dtype and value.shape == correct.shape
            assert float((value.double() - correct).norm()) <= 3 * torch.finfo(dtype).eps * float(correct.norm())


def outcome(product: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """Return a product, and the gradients of the sum of its squares."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    result = product(*leaves)
    result.square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_only_products_that_are_faster_are_converted(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[torch.dtype] = []

    def record(tensor: Tensor) -> Tensor:
        converted.append(tensor.dtype)
        return tensor.to(torch.float32)

    monkeypatch.setattr(Tensor, "float", record)
    operands = [torch.ones(*shape, dtype=dtype) for shape in ((33, 40), (24, 40), (24,))]
    PRODUCTS[name](*operands)
    assert bool(converted) == (name not in ("few rows", "no rows") and "attention" not in name), "attention: only its gradients"
    converted.clear()
    PRODUCTS[name](*(operand.float() for operand in operands))
    assert set(converted) <= {dtype}, "float32 needs no conversion"


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda a, b: a @ b[:-1], "cannot be multiplied"),
        (lambda a, b: a @ b.double(), "same dtype"),
        (lambda a, b: torch.addmm(torch.zeros(24), a, b), "dtype"),
        (lambda a, b: torch.bmm(a[None], b.expand(2, -1, -1)), "batch"),
        (lambda a, b: torch.mm(a[0], b[0]), "must be a matrix"),
    ],
    ids=["shapes", "types", "types of a sum", "batches", "vectors"],
)
def test_malformed_products_have_the_errors_of_pytorch(product: Callable[..., Tensor], message: str, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=message):
        product(torch.ones(33, 40, dtype=dtype), torch.ones(40, 24, dtype=dtype))


def test_other_types_and_modes_are_not_affected(dtype: torch.dtype) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    assert (x @ x.T).numpy() == pytest.approx(x.numpy() @ x.numpy().T, rel=1e-4, abs=1e-5)
    assert (x.double() @ x.double().T).numpy() == pytest.approx(x.double().numpy() @ x.double().numpy().T, rel=1e-12)
    assert torch.equal(torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2), torch.tensor([[10, 13], [28, 40]]))
    half = x.to(dtype)
    with torch.inference_mode():
        assert (half @ half.T).float().numpy() == pytest.approx(half.float().numpy() @ half.float().numpy().T, rel=0.01, abs=0.01)
    with torch.no_grad():
        assert (half @ half.T).grad_fn is None
    assert (half.requires_grad_() @ half.T).grad_fn is not None


def test_a_second_call_changes_nothing(dtype: torch.dtype) -> None:
    kernels: list[Any] = list(half_products._libraries)
    speed_up_products(dtype)
    assert half_products._libraries == kernels


def test_types_that_the_cpu_multiplies_are_left_alone() -> None:
    assert not is_slow(torch.float32) and not is_slow(torch.float64)
    before = list(half_products._libraries)
    speed_up_products(torch.float32)
    assert half_products._libraries == before
