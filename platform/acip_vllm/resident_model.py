"""A resident model of every size that vLLM computes, for the engine of acip_platform.

Weights, sizes, limits and sampling are those of `acip_platform.serve.engine.resident_model`. vLLM schedules the sequences, and computes
everything between the compressed layers, attention included.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from acip_platform.serve.engine.batch import Sequence, SteppedBatch
from acip_platform.serve.engine.events import EndReason
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.resident_weights import building
from acip_platform.serve.engine.sampling import SampledToken, Sampler
from torch import Tensor

from acip.errors import AcipError
from acip.layers.mixed_sizes import Mixer
from acip.utils.free_memory import free_memory

SETTINGS = {  # of vLLM. Its engine must run in this process, where weights can be loaded between steps
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
MAX_SEQUENCES = 64  # in a step
KV_SHARE = 0.25  # of the free memory, for keys and values, at most
CHECKED_TOKENS = 300  # of the prompts of the check
MAX_DIFFERENCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # of log-probabilities, in nats, of any token
MEAN_DIFFERENCE_16_BIT = 0.2  # in nats, of the mean


class VllmModel(ResidentModel):
    """One registered version of a model, resident at every size, with an engine of vLLM of its own."""

    changes_sizes = False  # vLLM reuses keys and values of prompts by size
    integers = False  # vLLM computes the layers

    @property
    def drafts(self) -> bool:
        """False: vLLM's scheduler gives each sequence one token per step, of one size."""
        return False

    def _check(self) -> None:
        """Do nothing: the check needs vLLM's engine, which `_batch` starts."""

    def _batch(self, mixer: Mixer, kv_tokens: int) -> SteppedBatch:
        """Start vLLM, and compare its log-probabilities with those of the model itself at two sizes.

        Raise an AcipError if they differ, or if vLLM has no model of this architecture or no room for one sequence.
        """
        os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
        import vllm

        from acip_vllm import check_version, register
        from acip_vllm.any_size import ANY_SIZE, ServedLayers
        from acip_vllm.batch import VllmBatch

        check_version(vllm.__version__)
        register()
        model: Any = self.any_size.model
        targets = set(self.any_size.layers)
        rest = set(self.artifact.tensors("rest").entries)
        folder = Path(tempfile.mkdtemp(prefix="acip-vllm-"))
        fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
        fields["quantization_config"] = {"quant_method": ANY_SIZE, "folder": str(folder), "uri": ""}
        (folder / "config.json").write_text(json.dumps(fields))
        stored = {name: tensor for name, tensor in model.state_dict().items() if name in rest}
        served = ServedLayers(model, targets, stored, mixer, self.weights)
        with self._two_sizes() as sizes:
            generator = torch.Generator().manual_seed(0)
            lengths = [min(CHECKED_TOKENS, self.context - 1), min(20, self.context - 1)]
            prompts = [torch.randint(self.vocabulary, (length,), generator=generator).tolist() for length in lengths]
            expected = []
            with torch.inference_mode():
                for size, ids in zip(sizes, prompts, strict=True):
                    mixer.set([(size, len(ids))])
                    logits_TV = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
                    following = torch.tensor(ids[1:], device=model.device)[:, None]
                    expected.append(logits_TV[:-1].float().log_softmax(-1).gather(1, following)[:, 0].cpu())
            try:
                with building:
                    batch = VllmBatch(
                        self.name, str(folder), served, dtype=str(model.dtype).removeprefix("torch."), max_model_len=self.context,
                        max_num_seqs=MAX_SEQUENCES, kv_cache_memory_bytes=self._kv_bytes(kv_tokens),
                    )  # fmt: skip
            except AcipError:
                raise
            except Exception as error:  # vLLM raises many kinds
                reason = " ".join(str(error).split())[:600]
                raise AcipError(f"{self.name}: vLLM can't serve {type(model).__name__}: {reason}") from error
            probes = [_Probe() for _ in prompts]
            for size, ids, probe in zip(sizes, prompts, probes, strict=True):
                batch.waiting.append(Sequence(list(ids), size, Sampler(), 0, frozenset(), probe, prompt_logprobs=0))
            while batch:
                batch.step()
            for probe, logprobs in zip(probes, expected, strict=True):
                self._compare(probe, logprobs)
        return batch

    def _compare(self, probe: "_Probe", expected: Tensor) -> None:
        if probe.error is not None:
            raise AcipError(f"{self.name}: vLLM gives no token: {probe.error}")
        difference = (torch.tensor(probe.logprobs) - expected).abs()
        limit = MAX_DIFFERENCE.get(self.any_size.model.dtype)
        found = float(difference.mean() if limit is None else difference.max())
        if not found <= (limit or MEAN_DIFFERENCE_16_BIT):
            raise AcipError(
                f"{self.name}: vLLM's log-probabilities differ by {found:.2g} nats from those of {type(self.any_size.model).__name__} in "
                "transformers. Serve it with the embedded engine (--engine acip)."
            )

    def _kv_bytes(self, kv_tokens: int) -> int:
        """Return the bytes for keys and values: of `kv_tokens` tokens, at least one context, at most a share of the free memory."""
        decoder, device = self.any_size.table.decoder, self.any_size.model.device
        per_token = decoder.cache(1, 1) if decoder is not None else 0
        free = free_memory(device)
        return int(max(min(kv_tokens * per_token, KV_SHARE * free) if per_token else KV_SHARE * free, 2 * self.context * per_token))

    @property
    def bytes(self) -> int:
        """The bytes of the weights in memory, those in vLLM's model included."""
        return super().bytes + int(self.artifact.tensors("rest").decoded_bytes)


@dataclass
class _Probe:
    """The owner of a sequence whose prompt is scored."""

    done: bool = False
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None

    def on_prompt(self, sequence: Sequence) -> None:
        self.logprobs = [float(token.logprob) for token in sequence.prompt_scores[1:] if token.logprob is not None]

    def on_drafts(self, count: int) -> None: ...

    def on_token(self, sequence: Sequence, token: SampledToken) -> None: ...

    def on_end(self, sequence: Sequence, reason: EndReason) -> None: ...

    def on_no_token(self, reason: str) -> None:
        self.error = reason

    def on_error(self, error: Exception) -> None:
        self.error = str(error)
