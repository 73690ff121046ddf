"""The int8 and NF4 baselines decode to the values of bitsandbytes and count the bytes of its formats."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from acip.baselines.quantized import bitsandbytes_formats as formats

SHAPES = [(130, 576), (64, 96), (3, 10)]


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_bitsandbytes(shape: tuple[int, int]) -> None:
    W = weight(shape)
    codes, absmax, _ = bnb.int8_vectorwise_quant(W.half())
    torch.testing.assert_close(formats.int8(W).weight, bnb.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_equals_bitsandbytes(shape: tuple[int, int], block: int) -> None:
    W = weight(shape)
    torch.testing.assert_close(formats.nf4(W, block, double_quantization=False).weight, nf4_of_bitsandbytes(W, block, False))


def test_double_quantization_equals_bitsandbytes_and_is_nearest() -> None:
    """On a CPU, bitsandbytes codes a few scales per thousand with a level next to the nearest one."""
    W = weight((1300, 576))
    ours, theirs = formats.nf4(W).weight, nf4_of_bitsandbytes(W, 64, True)
    same = torch.isclose(ours, theirs, rtol=1e-5, atol=0).view(-1, 64).all(1)
    assert same.float().mean() > 0.99
    absmax = W.view(-1, 64).abs().amax(1)
    error, their_error = (matrix.view(-1, 64).abs().amax(1) - absmax for matrix in (ours, theirs))
    assert (error.abs() <= their_error.abs() + 1e-7).all()


def nf4_of_bitsandbytes(W: Tensor, block: int, double_quantization: bool) -> Tensor:
    # flattened: on a CPU, bitsandbytes dequantizes matrices wrongly unless their sides are multiples of 64
    codes, state = bnb.quantize_4bit(W.flatten(), blocksize=block, compress_statistics=double_quantization, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).view(W.shape)


def test_dynamic_levels_equal_those_of_bitsandbytes() -> None:
    torch.testing.assert_close(formats.dynamic_levels(), bnb.create_dynamic_map(), rtol=1e-6, atol=0)


def test_bytes_are_exact() -> None:
    W = weight((130, 576))  # 74880 numbers: 1170 blocks of 64, and 5 blocks of 256 scales
    assert formats.int8(W).bytes == 74880 + 4 * 130
    assert formats.nf4(W, double_quantization=False).bytes == 37440 + 4 * 1170
    assert formats.nf4(W).bytes == 37440 + 1170 + 4 * 5 + 4
    assert formats.nf4(weight((3, 7)), double_quantization=False).bytes == 11 + 4  # 21 numbers take 10.5 bytes


def test_zeros_stay_zeros() -> None:
    W = torch.zeros(2, 64)
    assert not formats.int8(W).weight.any()
    assert not formats.nf4(W).weight.any()
