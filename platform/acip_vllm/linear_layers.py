"""Linear layers of vLLM: the stored layers that one is made of, and the part of them that a worker computes with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from acip_vllm.shards import StoredLayer, local_rows, stored_layers


class PlainQuantization(QuantizationConfig):
    """A quantization, in vLLM's sense, that needs no special kernels, and no files beside config.json."""

    method: str

    def get_name(self) -> str:
        """Return the name of this method."""
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that layers can compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU times ten: no special kernels are used."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything is in config.json."""
        return []

    def part_names(self, prefix: str) -> list[str]:
        """Return the names of the layers that vLLM fuses into one under the name `prefix`, in vLLM's spelling."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]


def worker_layers(
    layer: Any,
    entries: Sequence[tuple[str, Mapping[str, Any] | None]],
    kind: str | None,
    inputs: tuple[int, int],
    outputs: tuple[Sequence[int], int],
) -> list[StoredLayer]:
    """Return the stored layers of a linear layer, each with the rows and columns that this worker computes with.

    `entries` and `kind` are those of `stored_layers`; `inputs` are (the worker's, all), `outputs` (the worker's by part, all).
    """
    (n, N), (m, M) = inputs, outputs
    sizes, copies = list(getattr(layer, "output_sizes", [M])), []
    if isinstance(layer, QKVParallelLinear):
        heads, keys = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
        copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    rows = local_rows(sizes, m, copies or [1] * len(sizes), 0 if sum(m) == M else layer.tp_rank)
    start = 0 if n == N else layer.tp_rank * n
    return stored_layers(entries, kind, sizes, rows, N, slice(start, start + n))
