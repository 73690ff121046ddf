"""The two formats of bitsandbytes: int8 with a scale per row, and 4-bit NormalFloat (NF4) in blocks.

Sources: Dettmers et al., 2022, arXiv 2208.07339 (LLM.int8), 2023, arXiv 2305.14314 (NF4, double quantization), and 2016,
arXiv 1511.04561 (the 8-bit dynamic map).

    int8    w ~ q a / 127        a = max |w| of the row, float32; q an integer of 8 bit
    nf4     w ~ level[q] a       a = max |w| of a block of the flattened matrix; q of 4 bit

In LLM.int8, input features with outliers are multiplied in 16 bit, but their weights are stored in 8 bit like all others. So the weights
are those below.

Double quantization codes the scales of nf4, too. It subtracts their mean, then codes blocks of 256 scales with the levels of the dynamic
map, each block with a float32 maximum of its own.

The levels are constants of the formats and do not count as bytes.

Legend: M = out features, N = in features.
"""

import math

import torch
from torch import Tensor

from acip.baselines.quantized.coded_weight import CodedWeight
from acip.modeling_acip import LEVELS

SCALES_PER_BLOCK = 256  # scales that share a float32 in double quantization
FLOAT32_BYTES = 4


@torch.no_grad()
def int8(weight_MN: Tensor) -> CodedWeight:
    """Return the weight in 8 bit, one float32 scale per row. bitsandbytes rounds weights to float16 first, and so does this."""
    weight_MN = weight_MN.to(torch.float16).float()
    absmax_M1 = weight_MN.abs().amax(1, keepdim=True)
    codes_MN = (weight_MN * (127 / absmax_M1.clamp_min(1e-30))).round()
    return CodedWeight(codes_MN * (absmax_M1 / 127), codes_MN.numel() + FLOAT32_BYTES * len(codes_MN))


@torch.no_grad()
def nf4(weight_MN: Tensor, block: int = 64, double_quantization: bool = True) -> CodedWeight:
    """Return the weight in NF4, in blocks of `block` numbers of the flattened matrix. The last block may be shorter."""
    absmax, codes = blockwise(weight_MN.flatten(), block, torch.tensor(LEVELS["nf4"]))
    scales, scale_bytes = absmax, FLOAT32_BYTES * len(absmax)
    if double_quantization:
        scales, scale_bytes = doubly_quantized(absmax)
    decoded = decode(scales, codes, block, torch.tensor(LEVELS["nf4"]))
    return CodedWeight(decoded.view_as(weight_MN), math.ceil(codes.numel() / 2) + scale_bytes)


def doubly_quantized(absmax: Tensor) -> tuple[Tensor, int]:
    """Return the scales after their own quantization to 8 bit, and the bytes that store them."""
    levels, mean = dynamic_levels(), absmax.mean()
    outer_absmax, codes = blockwise(absmax - mean, SCALES_PER_BLOCK, levels)
    decoded = decode(outer_absmax, codes, SCALES_PER_BLOCK, levels) + mean
    return decoded, codes.numel() + FLOAT32_BYTES * (len(outer_absmax) + 1)


def dynamic_levels() -> Tensor:
    """Return the 256 levels of the 8-bit dynamic map, in ascending order.

    Decade 10^(d - 6) to 10^(d - 5), divided by 10, has the centers of 2^d equal intervals, d = 0 ... 6, of either sign. 0 and 1 complete
    the map.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for d in range(7):
        edges = torch.linspace(0.1, 1, 2**d + 1)
        centers = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (d - 6)
        levels += [centers, -centers]
    return torch.cat(levels).sort().values


def blockwise(values: Tensor, block: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return max |values| of each block, and the index of the nearest level of each value divided by this maximum.

    `levels` must be in ascending order.
    """
    blocks = in_blocks(values.float(), block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp_min(1e-30))[:, None]
    middles = ((levels[1:] + levels[:-1]) / 2).to(values.device)
    return absmax, torch.bucketize(scaled, middles).flatten()[: values.numel()]


def decode(absmax: Tensor, codes: Tensor, block: int, levels: Tensor) -> Tensor:
    """Return the values that `blockwise` coded."""
    return (in_blocks(levels.to(codes.device)[codes], block) * absmax[:, None]).flatten()[: codes.numel()]


def in_blocks(values: Tensor, block: int) -> Tensor:
    """Return the values as a matrix of one block per row, with zeros at the end."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
