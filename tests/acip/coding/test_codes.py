"""Codes survive their Huffman stream, the stream is near the entropy, and damaged streams raise within the memory of a layer."""

import math
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from acip.coding.codes import TOP, Codes, compress, decompress, stored_steps
from acip.errors import ArtifactError
from tests.support.fuzzing import fuzz

SLACK = 256 * 1024  # bytes: the buffers of zlib, and the interpreter


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Draw an int8 matrix, with few or many distinct values."""
    M, N = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    low, high = sorted((draw(st.integers(-128, 127)), draw(st.integers(-128, 127))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(low, high + 1, (M, N), generator=generator).to(torch.int8)


def normal_codes(M: int, N: int, deviation: float, seed: int = 0) -> Tensor:
    """Return rounded numbers of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return (deviation * torch.randn(M, N, generator=generator)).round().clamp(-TOP, TOP).to(torch.int8)


def entropy(codes: Tensor) -> float:
    """Return the entropy of the codes in bits per code."""
    shares = codes.unique(return_counts=True)[1] / codes.numel()
    return float(-(shares * shares.log2()).sum())


def shape_of(codes: Tensor) -> tuple[int, int]:
    M, N = codes.shape
    return M, N


@fuzz(matrices())
def test_codes_survive_compression(codes: Tensor) -> None:
    decoded = decompress(compress(codes), shape_of(codes))
    assert decoded.dtype == torch.int8
    assert torch.equal(decoded, codes)


@fuzz(matrices())
def test_transposed_codes_survive_compression(codes: Tensor) -> None:
    """A matrix that is not contiguous is stored in the order of its rows."""
    assert torch.equal(decompress(compress(codes.T), shape_of(codes.T)), codes.T)


@fuzz(matrices(), st.floats(1e-6, 1e3))
def test_packed_matrix_decodes_to_the_same_weight(codes: Tensor, step: float) -> None:
    coded = Codes(codes, stored_steps(torch.linspace(step, 2 * step, len(codes))))
    packed = coded.pack()
    assert torch.equal(packed.unpack().decode(), coded.decode())
    torch.testing.assert_close(coded.decode(), codes.float() * coded.steps[:, None])


@fuzz(matrices())
def test_bytes_are_the_stream_and_the_steps(codes: Tensor) -> None:
    packed = Codes(codes, torch.ones(len(codes))).pack()
    assert packed.bytes == len(packed.stream) + 2 * len(codes) + 4


def test_decoded_codes_may_be_changed() -> None:
    codes = normal_codes(5, 7, 3.0)
    decoded = decompress(compress(codes), (5, 7))
    decoded.zero_()
    assert not decoded.any()


@pytest.mark.parametrize(
    ("deviation", "excess"), [(0.5, 0.3), (0.7, 0.2), (1.0, 0.15), (1.2, 0.1), (1.5, 0.1), (3.0, 0.1), (6.0, 0.1), (12.0, 0.1), (30.0, 0.1)]
)
def test_streams_of_normal_codes_are_near_their_entropy(deviation: float, excess: float) -> None:
    """A Huffman code has at least 1 bit, so the excess is larger for codes that are mostly 0."""
    codes = normal_codes(250, 400, deviation)
    assert 8 * len(compress(codes)) <= (entropy(codes) + excess) * codes.numel()


def test_constant_codes_take_one_bit() -> None:
    assert 8 * len(compress(torch.zeros(250, 400, dtype=torch.int8))) <= 1.01 * 250 * 400


@fuzz(matrices(), st.data())
def test_damaged_streams_raise_or_keep_the_shape(codes: Tensor, data: st.DataObject) -> None:
    """A changed bit raises, or it changes codes. It never gives another shape."""
    stream = bytearray(compress(codes))
    position = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[position // 8] ^= 1 << position % 8
    try:
        decoded = decompress(bytes(stream), shape_of(codes))
    except ArtifactError:
        return
    assert decoded.shape == codes.shape


@fuzz(st.binary(max_size=200), st.integers(1, 20), st.integers(1, 20))
def test_arbitrary_bytes_raise_or_keep_the_shape(stream: bytes, M: int, N: int) -> None:
    try:
        assert decompress(stream, (M, N)).shape == (M, N)
    except ArtifactError:
        return


@fuzz(matrices(), st.data())
def test_truncated_streams_raise(codes: Tensor, data: st.DataObject) -> None:
    stream = compress(codes)
    kept = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(ArtifactError, match="Fetch the artifact again"):
        decompress(stream[:kept], shape_of(codes))


@fuzz(matrices(), st.binary(min_size=1, max_size=20))
def test_extended_streams_raise(codes: Tensor, more: bytes) -> None:
    with pytest.raises(ArtifactError, match="does not hold the"):
        decompress(compress(codes) + more, shape_of(codes))


@fuzz(matrices(), st.integers(1, 24), st.integers(1, 24))
def test_streams_of_other_layers_raise(codes: Tensor, M: int, N: int) -> None:
    assume(codes.numel() != M * N)
    with pytest.raises(ArtifactError, match=f"does not hold the {M * N} codes"):
        decompress(compress(codes), (M, N))


def test_too_long_streams_raise_without_memory_for_their_codes() -> None:
    """A few KB that decode to 50 MB raise within the memory of the stream, the layer and small buffers."""
    coder = zlib.compressobj(level=9, wbits=-15)
    stream = coder.compress(bytes(50_000_000)) + coder.flush()
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="does not hold the 4,096 codes"):
            decompress(stream, (64, 64))
        assert tracemalloc.get_traced_memory()[1] <= 2 * len(stream) + 4096 + SLACK
    finally:
        tracemalloc.stop()


def test_short_streams_of_large_layers_raise_without_memory_for_the_layer() -> None:
    stream = compress(normal_codes(4, 4, 2.0))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="does not hold the 1,000,000,000,000 codes"):
            decompress(stream, (1_000_000, 1_000_000))
        assert tracemalloc.get_traced_memory()[1] <= SLACK
    finally:
        tracemalloc.stop()


# ---- step sizes


@st.composite
def step_sizes(draw: st.DrawFn) -> Tensor:
    unit = 10 ** draw(st.floats(-20, 10))
    return torch.tensor(draw(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=12))) * unit


@fuzz(step_sizes())
def test_stored_steps_have_the_precision_of_float16(steps_M: Tensor) -> None:
    """The relative error is 2^-11. Shares of the largest step below 2^-14 have an absolute error of 2^-24."""
    unit = float(steps_M.max())
    stored_M = stored_steps(steps_M)
    assert stored_M.dtype == torch.float32
    assert ((stored_M - steps_M).abs() <= 1.001 * (2.0**-11 * steps_M + 2.0**-24 * unit)).all()
    normal_M = steps_M >= 2.0**-14 * unit
    assert ((stored_M - steps_M).abs()[normal_M] <= 1.001 * 2.0**-11 * steps_M[normal_M]).all()
    assert (stored_M > 0).all()
    assert math.isclose(float(stored_M.max()), unit, rel_tol=1e-6)


@fuzz(step_sizes())
def test_stored_steps_stay_the_same_when_stored_again(steps_M: Tensor) -> None:
    stored_M = stored_steps(steps_M)
    torch.testing.assert_close(stored_steps(stored_M), stored_M, rtol=1e-6, atol=0)


def test_steps_of_zero_are_stored_as_the_smallest_share() -> None:
    assert stored_steps(torch.tensor([0.0, 0.5])).tolist() == [2.0**-25, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_steps_are_float32_for_any_dtype(dtype: torch.dtype) -> None:
    steps_M = torch.tensor([0.25, 0.5], dtype=dtype)
    assert stored_steps(steps_M).dtype == torch.float32
    assert stored_steps(steps_M).tolist() == [0.25, 0.5]
