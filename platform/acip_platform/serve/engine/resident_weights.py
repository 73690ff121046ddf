"""The weights of one model in memory: those that its requests need, loaded when a size is first requested.

    a coded size     one version of the codes of each layer, or its dense weight. Sizes share versions; each is held once, 8 bits per weight
    a size in ranks  the factors of all layers, whole, and the dense weights of the layers that are dense at this size
    the base model   the dense weights of all layers

    drafts           8-bit integers of all layers and of the output head, for `speculation`; made in the background, if there is memory for
                     copies

A request holds its size from `hold` to `release`. The codes of held sizes stay. Others leave when all codes together take more than
`codes_limit`, the least recently used first. Factors and dense weights leave only if `memory` is short and no request needs them.

Weights are read and decoded in the thread of the request, never in a step of the engine.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acip.artifact.loading import ModelLoader
from acip.coding.codes import Codes
from acip.layers.integer_linear import IntegerLinear, PreciseIntegerLinear, rounded, supports_integers, supports_precise_integers
from acip.layers.mixed_sizes import Mixer, Size
from acip.layers.packing import PackedLinear, unpacked
from acip.modeling_acip import set_module, weight_MN
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip.utils.malloc import trim
from acip_platform.serve.engine.errors import ModelUnloadedError

STEP_SIZE_BYTES = 4  # of a row of a coded layer
DECODED_AHEAD = 8  # layers for each thread that decodes
TRIM_BYTES = 1 << 27  # of codes that are read or dropped, before freed memory is returned. glibc keeps up to twice the bytes otherwise
LEAST_INTEGERS = 1 << 20  # weights of a layer whose codes are multiplied in integers; smaller layers are not faster (products.py)
DRAFT_KEY = (2, 0)  # of the size that drafts
DRAFT_VERSION = -1  # of its layers

log = logging.getLogger("ray.serve")

building = threading.RLock()  # accelerate's empty parameters affect all threads at once, so no other thread may create parameters

Coded = tuple[str, int]  # name of a layer, version of its codes


class Memory(Protocol):
    """The memory that a model may use."""

    def reserve(self, bytes: int) -> None:
        """Reserve memory for weights. Wait until there is room, or raise an AcipError."""

    def release(self, bytes: int) -> None:
        """Give memory for weights back."""

    def reserve_copies(self, bytes: int) -> bool:
        """Reserve memory for packed copies if it is free. Return whether it is."""


class UnlimitedMemory:
    """Memory without a limit."""

    def reserve(self, bytes: int) -> None: ...

    def release(self, bytes: int) -> None: ...

    def reserve_copies(self, bytes: int) -> bool:
        return True


class ResidentWeights:
    """The target layers of one model. `memory` was asked for everything that they hold.

    With `packed`, linear layers get copies that are faster on a CPU (`acip.layers.packing`), if `memory` has room.
    `code_copies` sets the limit for codes, in units of the codes of one size. With `integers`, codes are multiplied in integers where
    that is precise and faster (`acip.layers.integer_linear`).
    """

    def __init__(
        self, loader: ModelLoader, any_size: ElasticModel, mixer: Mixer, memory: Memory, code_copies: float = 1.0, packed: bool = True,
        integers: bool = False,
    ) -> None:  # fmt: skip
        self.loader, self.model, self.layers, self.mixer, self.memory = loader, any_size.model, any_size.layers, mixer, memory
        self.packed, self.closed = packed, False  # packed: copies may be made
        codes = any_size.table.byte_sizes
        self._has_codes = codes is not None
        self._integers = integers and supports_precise_integers(loader.device, any_size.model.dtype)
        self._code_bytes = {layer.name: layer.M * layer.N + STEP_SIZE_BYTES * layer.M for layer in any_size.table.layers}
        if codes is not None:
            self._finest = {name: len(versions) - 2 for name, versions in codes.order.versions.items()}  # the last version is exact
        self.codes_limit = code_copies * sum(self._code_bytes.values())
        self.code_bytes = 0  # of all codes in memory
        self._used: dict[Coded, float] = {}  # versions in memory: when they were last requested, in seconds of time.monotonic
        self._held: dict[tuple[int, int], Cut] = {}  # the sizes that requests hold
        self._holders: Counter[tuple[int, int]] = Counter()  # the number of requests that hold each
        self._draft: Size | None = None  # the size that drafts, once it is in memory
        self._draft_tried = self._draft_failed = False
        self._lock = threading.Lock()  # of these fields and of the modules of the model; held for a short time
        self._loading = threading.Lock()

    def hold(self, cut: Cut) -> None:
        """Load what a size needs, and keep it until `release`. It may take seconds.

        Raise a ModelUnloadedError if the model has left memory, or an AcipError if there is no room or the artifact is damaged.
        """
        with self._lock:
            if self.closed:
                raise ModelUnloadedError("the model was unloaded; send the request again.")
            self._held[cut.key] = cut
            self._holders[cut.key] += 1
            self._used.update((each, time.monotonic()) for each in (cut.versions or {}).items() if each in self._used)
            complete = self._is_loaded(cut)
        try:
            if not complete:
                with self._loading:
                    coded = cut.versions or {}
                    if coded:
                        self._load_codes(coded)
                    if others := {name: rank for name, rank in cut.ranks.items() if name not in coded}:
                        self.load_ranks(others)
                        self.pack()
        except BaseException:
            self.release(cut)
            raise

    def release(self, cut: Cut) -> None:
        """End a `hold`. Codes that no request uses leave if there are too many."""
        with self._lock:
            self._holders[cut.key] -= 1
            if not self._holders[cut.key]:
                del self._holders[cut.key], self._held[cut.key]
            self._drop(self.code_bytes - self.codes_limit)

    def is_loaded(self, cut: Cut) -> bool:
        """Return whether everything that a size needs is in memory."""
        with self._lock:
            return self._is_loaded(cut)

    @property
    def in_use(self) -> bool:
        """Whether a request holds a size."""
        with self._lock:
            return bool(self._held)

    @property
    def sizes(self) -> int:
        """The number of sizes that requests hold."""
        with self._lock:
            return len(self._held)

    def close(self) -> bool:
        """Accept no more requests. Return False, and change nothing, if one holds a size."""
        with self._lock:
            self.closed = not self._held
            return self.closed

    def drop_unused(self) -> None:
        """Drop all codes that no request holds, and, if the model has codes, other weights that none holds. Packed copies must be gone."""
        with self._lock:
            self._drop(self.code_bytes)
            if self._has_codes:
                self._drop_ranks()

    def pack(self) -> None:
        """Add packed copies of the linear layers in memory, if there is room for all of them."""
        with self._lock:
            linears = unpacked(self.model) if self.packed else []
        if not self.memory.reserve_copies(sum(linear.weight.nbytes for _, linear in linears)):
            return
        for name, linear in linears:
            with building:
                packed = self.loader.packed(name, linear)
            with self._lock:
                if self.packed:
                    set_module(self.model, name, packed)

    def unpack(self) -> None:
        """Free the memory of the packed copies. There will be no others."""
        with self._lock:
            self.packed = False
            for module in self.model.modules():
                if isinstance(module, PackedLinear):
                    module.unpack()
            if not self._held:
                self._drop_draft()

    @property
    def packed_bytes(self) -> int:
        with self._lock:
            modules = list(self.model.modules())
        return sum(module.packed_bytes for module in modules if isinstance(module, PackedLinear | IntegerLinear))

    # ---- drafts

    @property
    def drafts(self) -> bool:
        """Whether a size that drafts is in memory or may be made."""
        return self.packed and supports_integers(self.loader.device) and (self._draft is not None or not self._draft_failed)

    def prepare_draft(self) -> None:
        """Make the copies that draft tokens, in a thread, at the first call."""
        with self._lock:
            start, self._draft_tried = self.drafts and not self._draft_tried, True
        if start:
            threading.Thread(target=self._make_draft, daemon=True, name="drafts").start()

    def _make_draft(self) -> None:
        try:
            self._draft_failed = not self.load_draft()
        except Exception:  # answers do not need it
            self._draft_failed = True
            log.exception("tokens are not drafted, because the copies of the layers can't be made")

    def load_draft(self) -> bool:
        """Make integer copies of the layers from their finest codes, or from their dense weights where the artifact has no codes.

        Return False, and make none, if memory is short.
        """
        layers = self.mixer.layers
        if not self.memory.reserve_copies(sum(weight_MN(layer.original).numel() for layer in layers.values())):
            return False
        drafts = {}
        for name, layer in layers.items():
            if self._has_codes and name in self.layers:
                finest = self.loader.decoded(name, self._finest[name])
                codes_MN, steps_M = finest.codes, finest.steps
            else:
                codes_MN, steps_M = rounded(weight_MN(layer.original).detach())
            with building:
                drafts[name] = IntegerLinear(codes_MN, steps_M, layer.bias)
        with self._lock:
            if self.packed:  # memory is not short
                for name, draft in drafts.items():
                    layers[name].coded[str(DRAFT_VERSION)] = draft  # type: ignore[assignment]
                self._draft = Size(DRAFT_KEY, {}, dict.fromkeys(layers, DRAFT_VERSION))
            return self.packed

    def draft(self) -> Size | None:
        """Return the size that drafts, if it is in memory. The engine's thread calls it between two passes: here it may leave."""
        with self._lock:
            if self._draft is not None and not self.packed:
                self._drop_draft()
            return self._draft

    def _drop_draft(self) -> None:
        """Free the copies that draft tokens. The lock must be held, and no pass may be running."""
        self._draft = None
        for layer in self.mixer.layers.values():
            if str(DRAFT_VERSION) in layer.coded:
                del layer.coded[str(DRAFT_VERSION)]
        self.mixer.keep(self._held)

    @property
    def bytes(self) -> int:
        """The bytes of the model's tensors, without packed copies."""
        with self._lock:
            tensors = [tensor for tensor in self.model.state_dict(keep_vars=True).values() if not tensor.is_meta]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    # ---- codes

    def _is_loaded(self, cut: Cut) -> bool:
        layers, coded = self.layers, cut.versions or {}
        return all(each in self._used for each in coded.items()) and not any(
            layers[name].original.weight.is_meta if rank is None else layers[name].stored_rank < rank
            for name, rank in cut.ranks.items()
            if name not in coded
        )

    def _load_codes(self, versions: Mapping[str, int]) -> None:
        with self._lock:
            missing = [each for each in versions.items() if each not in self._used]
            needed = sum(self._code_bytes[name] for name, _ in missing)
            self._drop(self.code_bytes + needed - self.codes_limit)
        self.memory.reserve(needed)
        threads = max(1, torch.get_num_threads() // 2)  # of decoding; the engine's steps run meanwhile
        untrimmed = 0
        try:
            with ThreadPoolExecutor(threads, "codes") as pool:
                for i in range(0, len(missing), DECODED_AHEAD * threads):
                    some = missing[i : i + DECODED_AHEAD * threads]
                    for (name, version), codes in zip(some, pool.map(self._decoded, some), strict=True):
                        self._add(name, version, codes)
                        needed -= self._code_bytes[name]
                        untrimmed += self._code_bytes[name]
                    if untrimmed >= TRIM_BYTES:
                        trim()
                        untrimmed = 0
        finally:
            self.memory.release(needed)

    def _add(self, name: str, version: int, codes: Codes) -> None:
        """Add a version of a layer."""
        layer = self.layers[name]
        with building:
            coded: Any = self.loader.coded(name, codes, layer.bias)
            if self._integers and coded.codes.numel() >= LEAST_INTEGERS:
                coded = PreciseIntegerLinear(coded.codes, coded.steps, layer.bias)
        with self._lock:
            layer.coded[str(version)] = coded
            self._used[name, version] = time.monotonic()
            self.code_bytes += self._code_bytes[name]

    def _decoded(self, coded: Coded) -> Codes:
        return self.loader.decoded(*coded)

    def _drop(self, surplus: float) -> None:
        """Drop codes that no request holds, the least recently used first, until `surplus` bytes are free. The lock must be held."""
        if surplus <= 0:
            return
        kept = {each for cut in self._held.values() for each in (cut.versions or {}).items()}
        freed = 0
        dropped = set[Coded]()
        for each in sorted((each for each in self._used if each not in kept), key=self._used.__getitem__):
            if freed >= surplus:
                break
            freed += self._code_bytes[each[0]]
            dropped.add(each)
        self.mixer.keep({*self._held, DRAFT_KEY})
        for name, version in dropped:
            del self.layers[name].coded[str(version)], self._used[name, version]
        self.code_bytes -= freed
        if freed >= TRIM_BYTES:
            trim()
        self.memory.release(freed)

    # ---- ranks and dense weights

    def load_ranks(self, ranks: Mapping[str, int | None], dense: bool = False) -> None:
        """Load the factors of all layers if a layer has a rank, and the dense weights of the others; with `dense`, of all layers."""
        stored = self.loader.stored_ranks
        with_factors = any(rank is not None for rank in ranks.values())
        missing: list[tuple[str, int | None, int]] = []  # layer, rank or None = its dense weight, bytes
        for name, rank in ranks.items():
            if (rank is None or dense) and self.layers[name].original.weight.is_meta:
                missing.append((name, None, self.loader.dense.entry(f"{name}.weight").bytes))
            if with_factors and self.layers[name].stored_rank < stored[name]:
                sides = (self.loader.factors.entry(f"{name}.{side}") for side in ("left", "right"))
                missing.append((name, stored[name], sum(side.bytes for side in sides)))
        needed = sum(bytes for *_, bytes in missing)
        self.memory.reserve(needed)
        try:
            for name, rank, bytes in missing:
                with building:
                    self.loader.load_missing({name: self.layers[name]}, {name: rank})
                needed -= bytes
        finally:
            self.memory.release(needed)

    def _drop_ranks(self) -> None:
        """Drop the factors and dense weights of all layers unless a request holds such a size. The lock must be held."""
        if any(len(cut.versions or {}) < len(self.layers) for cut in self._held.values()):
            return
        self.mixer.keep({*self._held, DRAFT_KEY})
        freed = 0
        for layer in self.layers.values():
            original: Any = layer.original
            weight: Tensor = original.weight
            if not weight.is_meta:
                freed += weight.nbytes
                original._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            for side in (layer.left, layer.right):
                freed += side.values.nbytes
                side._parameters["values"] = nn.Parameter(side.values[:0].clone(), requires_grad=False)
        self.memory.release(freed)
