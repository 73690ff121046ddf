"""vLLM computes the sequences of one resident model: it schedules them, runs its own model, and holds keys and values in pages.

    waiting --step--> vLLM's queue --[prefix cache, chunks of the prompt]--> logits --our sampler--> token --> Sequence.take

Tokens are sampled by `acip_platform.serve.engine.sampling` from vLLM's logits, so that seeds, penalties, grammars and log-probabilities
are the same as in the embedded engine.
"""

import gc
import shutil
import threading
import time
import weakref
from collections import deque
from typing import Any

import ray
import torch
from acip_platform.serve.engine.batch import Sequence
from acip_platform.serve.engine.errors import BrokenEngineError
from acip_platform.serve.engine.sampling import SampledToken, ScoredToken, sample
from torch import Tensor
from vllm import EngineArgs, TokensPrompt
from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.sample.sampler import Sampler

from acip.layers.mixed_sizes import Size
from acip_vllm.any_size import SERVED, ServedLayers

IN_USE = threading.Lock()  # vLLM keeps the present step in global variables, so only one thread may start or step an engine


class VllmBatch:
    """The sequences of one model in an engine of vLLM, which runs in this process."""

    def __init__(self, name: str, folder: str, served: ServedLayers, **arguments: Any) -> None:
        """Start the engine. `arguments` are those of vLLM's EngineArgs; `folder` has the config, and is removed at the end.

        In a process of Ray, vLLM's metrics of the model are exported under its `name` with Ray's.
        """
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}  # by vLLM's id of the request
        self.sampled: dict[str, SampledToken] = {}  # the tokens of the present step
        self._keys: dict[str, str] = {}  # our id of a request -> vLLM's
        self._count = 0
        self.broken: str | None = None  # why no step is possible any more
        SERVED[folder] = served
        itself = weakref.proxy(self)  # `SERVED` is global, and must not keep the engine
        served.rows = lambda: itself._rows()  # noqa: PLW0108  (a bound method of the proxy would hold the object)
        with IN_USE:
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=folder, skip_tokenizer_init=True, generation_config="vllm", async_scheduling=False, max_logprobs=-1,
                    enforce_eager=True, served_model_name=name, disable_log_stats=not ray.is_initialized(), **arguments,
                ),
                stat_loggers=[RayPrometheusStatLogger] if ray.is_initialized() else None,
            )  # fmt: skip
        gc.unfreeze()  # vLLM excludes everything in memory from garbage collection, but models come and go here
        core: Any = self.engine.engine_core
        self._runner: Any = core.engine_core.model_executor.driver_worker.worker.model_runner
        self._runner.sampler = EngineSampler(itself)
        core._finalizer.detach()  # vLLM's own, see `_shut_down`
        weakref.finalize(self, _shut_down, core.engine_core, folder)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def active(self) -> list[Sequence]:
        """The sequences that vLLM has, those in its queue included."""
        return list(self.running.values())

    def step(self) -> None:
        """Run one step of vLLM, and hand over the tokens.

        A step that raises leaves vLLM in an unknown state, so that all later ones raise a BrokenEngineError.
        """
        with IN_USE:
            if self.broken is not None:
                raise BrokenEngineError(f"vLLM can't go on after {self.broken}; the replica is being replaced. Try again in a moment.")
            try:
                self._step()
            except Exception as error:
                self.broken = type(error).__name__
                raise

    def _step(self) -> None:
        self._abort([key for key, sequence in self.running.items() if sequence.owner.done])
        while self.waiting:
            sequence = self.waiting.popleft()
            if not sequence.owner.done:
                self._add(sequence)
        if not self.running:
            return
        self.sampled.clear()
        outputs = self.engine.step()
        ended = []
        for output in outputs:
            key = self._keys[output.request_id]
            sequence, scores = self.running[key], getattr(output, "prompt_logprobs", None)
            if sequence.scores_prompt and scores:
                sequence.prompt_scores = _scores(sequence, scores)
        for key, token in self.sampled.items():
            sequence = self.running[key]
            sequence.take(token)
            if sequence.ended:
                ended.append(key)
        self._abort(ended)

    def clear(self) -> None:
        """Drop all sequences, as after a step that failed."""
        with IN_USE:
            self.waiting.clear()
            if self.broken is None:
                self._abort(list(self.running))
            self.running.clear()

    def _add(self, sequence: Sequence) -> None:
        self._count += 1
        params = VllmParams(
            temperature=0.0, max_tokens=sequence.max_tokens or 1, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            prompt_logprobs=sequence.prompt_logprobs,
        )  # fmt: skip
        prompt = TokensPrompt(prompt_token_ids=list(sequence.ids), cache_salt=f"{sequence.size.key}")  # keys and values differ by size
        name = str(self._count)
        key = self.engine.add_request(name, prompt, params)
        self._keys[name] = key
        self.running[key] = sequence

    def _abort(self, keys: list[str]) -> None:
        """End the requests of vLLM that are not wanted any more. vLLM ignores those that it has ended itself."""
        if keys:
            self.engine.abort_request(keys, internal=True)
        for key in keys:
            del self.running[key]
            del self._keys[key.rpartition("-")[0]]

    def _rows(self) -> list[tuple[Size, int]]:
        runner = getattr(self, "_runner", None)
        if runner is None:
            return []
        starts = runner.query_start_loc.np
        rows = []
        for i, key in enumerate(runner.input_batch.req_ids):
            sequence = self.running[key]
            sequence.started = sequence.started or time.monotonic()
            rows.append((sequence.size, int(starts[i + 1] - starts[i])))
        return rows

    def sample(self, logits_nV: Tensor) -> Tensor:
        """Sample a token for each row whose tokens have all been computed, and return the tokens [n]. Those of other rows are not used."""
        keys = self._runner.input_batch.req_ids
        complete = [i for i in range(len(keys)) if not self._runner.discard_request_mask.np[i]]
        tokens = [0] * len(keys)
        if complete:
            rows_nV = logits_nV if len(complete) == len(logits_nV) else logits_nV[complete]
            for i, token in zip(complete, sample(rows_nV, [self.running[keys[i]].sampler for i in complete]), strict=True):
                self.sampled[keys[i]] = token
                tokens[i] = max(token.token, 0)
        return torch.tensor(tokens, device=logits_nV.device)


class EngineSampler(Sampler):
    """vLLM's interface to `VllmBatch.sample`."""

    def __init__(self, batch: VllmBatch) -> None:
        super().__init__()
        self.batch = batch

    def sample(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the tokens."""
        return self.batch.sample(logits), None


def _scores(sequence: Sequence, scores: list[Any]) -> list[ScoredToken]:
    """Return vLLM's log-probabilities of a prompt in the form of ours."""
    found = [ScoredToken(sequence.ids[0])]
    for token, entries in zip(sequence.ids[1:], scores[1:], strict=False):
        top = sorted(entries.items(), key=lambda entry: entry[1].rank)[: sequence.prompt_logprobs or 0]
        found.append(ScoredToken(token, entries[token].logprob, tuple((other, entry.logprob) for other, entry in top)))
    return found


def _shut_down(core: Any, folder: str) -> None:
    """Free an engine of vLLM. Its own `shutdown` would end torch.distributed for the other engines in this process."""
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    SERVED.pop(folder, None)
    shutil.rmtree(folder, ignore_errors=True)
