"""A layer of codes computes the product with its decoded weights, and holds only the codes."""

import pytest
import torch
from torch import Tensor

from acip import modeling_acip
from acip.coding.codes import stored_steps
from acip.modeling_acip import CodedLinear

SHAPES = [(128, 192), (64, 64), (7, 5), (65, 64), (64, 48), (1, 1)]  # the kernel of torch takes the first two


def layer_of(M: int, N: int, bias: bool = True) -> CodedLinear:
    codes = torch.randint(-127, 128, (M, N), dtype=torch.int8)
    return CodedLinear(codes, stored_steps(0.001 + 0.01 * torch.rand(M)), torch.randn(M) if bias else None)


def exact(layer: CodedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output in float64, and the sum of the absolute values of its terms."""
    weight = layer.codes.double() * layer.steps.double()[:, None]
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    return x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + bias.abs()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(1,), (8,), (2, 9), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_output_is_the_product_with_the_decoded_weights(shape: tuple[int, int], rows: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = layer_of(*shape, bias=rows != (8,))
    x = torch.randn(*rows, shape[1]).to(dtype)
    with torch.no_grad():
        y = layer(x)
    expected, terms = exact(layer, x)
    assert (y.dtype, y.shape) == (dtype, (*rows, shape[0]))
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12  # of the product, and of the output
    assert ((y.double() - expected).abs() <= 1e-5 * terms + 2 * rounding * expected.abs() + 2 * rounding * terms * (rounding > 1e-4)).all()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_kernel_equals_the_plain_path_within_rounding(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(128, 192), torch.randn(rows, 192).bfloat16()
    with torch.no_grad():
        assert modeling_acip._has_kernel(x, layer.codes) == hasattr(torch, "_weight_int8pack_mm")
        fast = modeling_acip.integer_product(x, layer.codes)
        monkeypatch.setattr(modeling_acip, "FEW_ROWS", 0)
        assert not modeling_acip._has_kernel(x, layer.codes)
        plain = modeling_acip.integer_product(x, layer.codes)
    terms = x.float().abs() @ layer.codes.float().abs().T
    assert ((fast.float() - plain.float()).abs() <= 2**-7 * plain.float().abs() + 1e-4 * terms).all()


def test_inputs_with_strides_are_read_in_order() -> None:
    layer, x = layer_of(64, 64), torch.randn(1, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))


def test_float16_sums_do_not_overflow() -> None:
    layer = CodedLinear(torch.full((4, 1024), 127, dtype=torch.int8), torch.full((4,), 1e-4), None)
    y = layer(torch.full((2, 1024), 1000.0, dtype=torch.float16))
    torch.testing.assert_close(y, torch.full((2, 4), 127 * 1000 * 1024 * 1e-4).half(), rtol=1e-2, atol=0)


def test_gradients_reach_the_input() -> None:
    layer = layer_of(64, 64, bias=False)
    x = torch.randn(1, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].double(), (layer.codes.double() * layer.steps.double()[:, None]).sum(0), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_layer_holds_a_byte_per_weight_and_four_per_row(rows: int) -> None:
    M, N = 128, 192
    layer = layer_of(M, N, bias=False).to(torch.device("cpu"))
    with torch.no_grad():
        layer(torch.randn(rows, N).bfloat16())
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)] + list(layer.state_dict().values())
    assert sum(tensor.nbytes for tensor in held) == M * N + 4 * M
    assert not list(layer.parameters())
