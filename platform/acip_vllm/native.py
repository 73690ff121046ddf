"""`vllm serve ARTIFACT`: vLLM itself serves every size of an artifact, one size per request.

    {"model": ..., "prompt": ..., "vllm_xargs": {"size": "0.42"}}

The process that computes holds the resident model. What a size needs is loaded, between two steps, when the first request of this size is
scheduled, and stays as in `acip_platform.serve.engine.resident_weights`. Requests without a size get the base model.

`SizeTracker` is a logits processor that changes no logits: vLLM tells logits processors which request is in which slot of the batch. Keys
and values differ by size, and vLLM's prefix cache does not know sizes, so requests do not read that cache.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from acip_platform.serve.engine.resident_weights import ResidentWeights, UnlimitedMemory, building
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from acip.artifact.artifact import Artifact
from acip.artifact.loading import ModelLoader
from acip.errors import BudgetError
from acip.layers.mixed_sizes import Mixer, Size
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut, CutTable
from acip.sizing.elastic_model import ElasticModel
from acip_vllm.any_size import ServedLayers
from acip_vllm.artifacts import opened, served_uri
from acip_vllm.shards import StoredLayer

BASE = "1.0"  # the size of requests that name none
FIELD = "size"  # of vllm_xargs


@lru_cache(maxsize=4)
def table_of(uri: str) -> CutTable:
    """Return the table of all sizes of an artifact."""
    return opened(uri).table()


@lru_cache(maxsize=256)
def cut_of(uri: str, size: str) -> Cut:
    """Return the cut of a size as text, such as "0.42" or "8GB". Raise BudgetError for one that the artifact does not have."""
    table = table_of(uri)
    return table.cut(Budget.parse(size, table.convention))


class ShardLoader(ModelLoader):
    """Load the part of each layer that this worker computes with."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        super().__init__(artifact, device)
        self.shards: Mapping[str, StoredLayer] = {}

    def part(self, name: str, side: str, tensor: Tensor) -> Tensor:
        """Return the worker's part of a tensor of the layer `name`."""
        return self.shards[name].part(side, tensor) if name in self.shards else tensor


class NativeModel:
    """The resident model of an artifact in a process of vLLM that computes: one for each worker of tensor parallelism."""

    def __init__(self, uri: str, device: torch.device) -> None:
        self.uri = uri
        artifact = opened(uri)
        loader = ShardLoader(artifact, device)
        with building:
            any_size = ElasticModel(loader.model(), table_of(uri), loader.load_size)
        mixer = Mixer(any_size.layers)
        self.weights = ResidentWeights(loader, any_size, mixer, UnlimitedMemory(), packed=False)
        model: Any = any_size.model
        rest = set(artifact.tensors("rest").entries)
        stored = {name: tensor for name, tensor in model.state_dict().items() if name in rest}
        self.served = ServedLayers(model, set(any_size.layers), stored, mixer)
        self.served.rows, self.served.load = self.rows, self.load
        loader.shards = self.served.shards
        self.slots: dict[int, Cut] = {}
        self.base = cut_of(uri, BASE)

    def load(self) -> None:
        """Load the base model; of an artifact without codes, everything."""
        self.weights.hold(self.base)
        if table_of(self.uri).byte_sizes is None:
            self.weights.load_ranks(self.weights.loader.stored_ranks)

    def rows(self) -> list[tuple[Size, int]]:
        """Return the sizes and numbers of rows of the step that vLLM computes now."""
        metadata: Any = get_forward_context().attn_metadata
        if not metadata:
            return []
        starts = next(iter(metadata.values())).query_start_loc.tolist()
        cuts = [self.slots.get(i, self.base) for i in range(len(starts) - 1)]
        return [(Size(cut.key, cut.ranks, cut.versions), starts[i + 1] - starts[i]) for i, cut in enumerate(cuts)]

    def add(self, slot: int, size: str) -> None:
        """Put a request into a slot of the batch, and load its size if necessary."""
        self.remove(slot)
        cut = cut_of(self.uri, size)
        self.weights.hold(cut)
        self.slots[slot] = cut

    def remove(self, slot: int) -> None:
        """Take the request out of a slot of the batch."""
        if (cut := self.slots.pop(slot, None)) is not None:
            self.weights.release(cut)

    def move(self, source: int, target: int, swap: bool) -> None:
        """Move the request of a slot to another slot, or exchange two."""
        moved, other = self.slots.pop(source, None), self.slots.pop(target, None)
        if swap and other is not None:
            self.slots[source] = other
        elif other is not None:
            self.weights.release(other)
        if moved is not None:
            self.slots[target] = moved


_models: dict[str, NativeModel] = {}


def served_layers(folder: str, uri: str, device: torch.device) -> ServedLayers:
    """Load the resident model of an artifact for a new engine, and return its layers."""
    _models[folder] = NativeModel(uri, device)
    return _models[folder].served


class SizeTracker(LogitsProcessor):
    """Tells the resident model of an artifact which size each slot of the batch has."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.folder = vllm_config.model_config.model

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a size that the artifact does not have."""
        try:
            cut_of(served_uri(), size_of(sampling_params))
        except BudgetError as error:
            raise ValueError(f"vllm_xargs.{FIELD}: {error}") from error
        sampling_params.skip_reading_prefix_cache = True

    def is_argmax_invariant(self) -> bool:
        """Return True: it changes no logits."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests from slot to slot."""
        model = _models.get(self.folder)  # it is loaded after this object is made
        if model is None or batch_update is None:
            return
        for slot in batch_update.removed:
            model.remove(slot)
        for slot, params, *_ in batch_update.added:
            model.add(slot, size_of(params))
        for source, target, direction in batch_update.moved:
            model.move(source, target, direction is MoveDirectionality.SWAP)


def size_of(params: SamplingParams) -> str:
    """Return the size that a request asks for, as text."""
    return str((params.extra_args or {}).get(FIELD, BASE))
