"""Predict the time and the artifact of a calibration: run all phases on a few blocks of the model with random weights, and extrapolate.

    the model with n blocks    time of each phase, bytes of the artifact      n = 1, or as many as contain all types of layers
    the model with 2n blocks   the same
    the model                  both grow by the same amount for every n blocks

Training is timed for a step, the curve for a window, passes over the sample windows for a few of them, and text that the model writes
itself for a few tokens, as if none of it were on the machine yet. Loading the base model,
uploads and pauses of the cluster are not included.
"""

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from acip.artifact.artifact import Artifact
from acip.artifact.read_back import keep_layers, layers_of_all_types
from acip.base import Base, digest, quiet
from acip.calibration import memory_check
from acip.calibration.bases import cache_bases
from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.calibration.fisher_moments import FisherMoments
from acip.calibration.loop import calibrate, trial_step
from acip.calibration.parametrize import parametrize, restore
from acip.coding.coded_model import CodedModel, assembled, code_layers, step_scales
from acip.coding.statistics import layer_statistics
from acip.coding.step_tuning import tune_steps
from acip.data import SELF, TokenBatches
from acip.errors import BaseModelError, foreign_errors
from acip.evaluate.domains import CONTEXT
from acip.layers.targets import find_linears, with_matches
from acip.mixture import Mixture
from acip.self_text import BATCH, TOGETHER
from acip.utils.generation import continued
from acip_platform.scheduling.fleet import Job
from acip_platform.training.calibration_text import samples_text

SAMPLED = 8  # windows of the statistics, the basis and the scores that are timed
WRITTEN = 8  # tokens of each sampled text that are timed
TUNED = 2  # steps of the step sizes that are timed
WINDOWS = 160  # of held-out text, if the job does not limit them, about as many as WikiText-2 has at 2048 tokens


@dataclass(frozen=True)
class Forecast:
    """The predicted seconds of each phase, and the bytes of the artifact."""

    seconds: dict[str, float]
    artifact_bytes: float

    @property
    def total_s(self) -> float:
        """The seconds of all phases."""
        return sum(self.seconds.values())

    def extrapolated(self, twice: "Forecast", times: float) -> "Forecast":
        """Return the forecast for `times` as many blocks, from this one and that of twice as many blocks."""

        def at(one: float, two: float) -> float:
            return one + (times - 1) * max(0.0, two - one)

        return Forecast(
            {phase: at(value, twice.seconds[phase]) for phase, value in self.seconds.items()}, at(self.artifact_bytes, twice.artifact_bytes)
        )


def rehearse(job: Job, base: Base, device: torch.device) -> Forecast:
    """Return the forecast of `job` by one worker on `device`. `base` may be on the device `meta` (`acip.base.outline`).

    Raises BaseModelError if the class of the model can't have fewer blocks.
    """
    config = base.model.config.get_text_config()
    unit = min(layers_of_all_types(config), config.num_hidden_layers)
    shared = memory_check.fits_shared(base.model, job.recipe, memory_check.available(base.model, device), device)
    with foreign_errors(BaseModelError, f"{type(base.model).__name__} can't be made with fewer blocks"):
        # the first run compiles kernels and loads libraries
        _, one, two = (_Rehearsal(job, base, device, count, shared).run() for count in (unit, unit, 2 * unit))
    return one.extrapolated(two, config.num_hidden_layers / unit)


class _Rehearsal:
    """All phases of the calibration of a model with a few blocks.

    `shared` says whether the moments of the basis are summed in the passes of the statistics.
    """

    def __init__(self, job: Job, base: Base, device: torch.device, blocks: int, shared: bool) -> None:
        self.job, self.device, self.shared = job, device, shared
        self.moments: FisherMoments | None = None
        config = copy.deepcopy(base.model.config)
        keep_layers(config.get_text_config(), blocks)
        torch.manual_seed(0)
        with quiet():
            model = type(base.model)._from_config(config, dtype=getattr(torch, job.recipe.dtype)).eval().requires_grad_(False)
        self.base = Base(model, base.tokenizer, base.source, None, digest(model))
        self.recipe = replace(job.recipe, exclude=with_matches(model, job.recipe.exclude))  # some may name later blocks
        nn.Module.to(model, device)
        self.vocabulary = config.get_text_config().vocab_size
        self.seconds: dict[str, float] = {}

    def run(self) -> Forecast:
        """Run all phases."""
        recipe, model = self.recipe, self.base.model
        windows = self.ids(max(recipe.sample_windows, recipe.batch_size), recipe.seq_len)
        if samples_text(self.job):
            self.sample_text()
        codes = self.codes(windows) if recipe.code != "ranks" else None
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            if recipe.code == "bits":
                assert codes is not None
                self.measure()
                with self.clock("save"):
                    Artifact.save_coded(folder, self.base, recipe, codes, {})
            else:
                self.measure()
                if self.moments is None:
                    self.parametrize(windows)
                else:
                    self.parametrize_shared(windows, self.moments)
                batches = TokenBatches(windows, recipe.batch_size, recipe.seed)
                with self.clock("training", self.job.steps * recipe.gradient_accumulation_steps):
                    trial_step(model, batches, recipe)
                scores = "fisher" if recipe.prunes else recipe.scores  # pruning, which gives scores, too, is part of the training
                few = replace(
                    recipe, sample_windows=4 * min(SAMPLED, recipe.score_windows), post_tune_steps=0, total_steps=None, scores=scores
                )
                with nullcontext() if recipe.prunes else self.clock("scores", recipe.score_windows / few.score_windows):
                    calibration = calibrate(model, batches, few)
                with self.clock("save"):
                    Artifact.save(folder, self.base, calibration, {}, codes)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return Forecast(self.seconds, float(size))

    def sample_text(self) -> None:
        """Time the first tokens of the text that the model itself writes. It is written in whole batches, from short prompts."""
        T = self.recipe.seq_len
        batches = math.ceil(Mixture.of(self.job.data).counts(self.job.windows)[SELF] / BATCH)
        with self.clock("sampled text", batches * (BATCH // TOGETHER) * T / WRITTEN):
            continued(self.base.model, self.ids(TOGETHER, 1).tolist(), WRITTEN, (), do_sample=True, top_k=0)

    def parametrize(self, windows: Tensor) -> None:
        """Parametrize the model with a few windows, and again with twice as many, because only a part of the time depends on them."""
        recipe, count = self.recipe, self.recipe.sample_windows
        few = count if recipe.basis == "svd" or count <= 2 * SAMPLED else SAMPLED
        with self.clock("basis"):
            parametrize(self.base.model, replace(recipe, sample_windows=few), windows)
        if few < count:
            once = self.seconds["basis"]
            restore(self.base.model)
            with self.clock("basis"):
                parametrize(self.base.model, replace(recipe, sample_windows=2 * few), windows)
            self.seconds["basis"] += (count / few - 2) * max(0.0, self.seconds["basis"] - once)

    def parametrize_shared(self, windows: Tensor, moments: FisherMoments) -> None:
        """Parametrize the model with moments that were summed in the passes of the statistics."""
        model, recipe = self.base.model, replace(self.recipe, sample_windows=min(SAMPLED, self.recipe.sample_windows))
        samples = windows[: recipe.sample_windows]
        with tempfile.TemporaryDirectory() as folder, self.clock("basis"):
            cache = BasisCache(Path(folder))
            cache_bases(moments, samples, basis_keys(model, moments.linears, recipe, samples), cache)
            parametrize(model, recipe, windows, cache=cache)
        self.moments = None

    def codes(self, windows: Tensor) -> CodedModel:
        """Code the layers."""
        recipe, model = self.recipe, self.base.model
        linears = dict(find_linears(model, recipe.exclude))
        few = min(SAMPLED, recipe.sample_windows)
        self.moments = FisherMoments(linears) if self.shared else None
        with self.clock("statistics", recipe.sample_windows / few), self.moments.summed() if self.moments else nullcontext():
            statistics = layer_statistics(model, linears, windows[:few], recipe.seed)
        with self.clock("codes"):
            scales = step_scales(linears, statistics, device=self.device)
            codes = assembled(dict(code_layers(linears, statistics, scales, self.device)))
        if recipe.code_tune_steps:
            with self.clock("step sizes", recipe.code_tune_steps / TUNED):
                codes = tune_steps(model, linears, codes, windows, TUNED)
        return codes

    def measure(self) -> None:
        """Time a window of the curve."""
        job = self.job
        sizes = len(job.sizes) * (job.recipe.code != "bits") + len(job.byte_sizes) * (job.recipe.code != "ranks") + 1
        windows = self.ids(2, job.eval_context)
        of_domains = len(job.domains) * job.domain_windows * min(CONTEXT, job.eval_context) / job.eval_context  # they may be shorter
        with self.clock("measure", ((job.eval_windows or WINDOWS) + of_domains) * sizes / len(windows)), torch.no_grad():
            for window in windows:
                self.base.model(input_ids=window[None].to(self.device))

    def ids(self, count: int, tokens: int) -> Tensor:
        """Return random windows [count, tokens]."""
        return torch.randint(self.vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    @contextmanager
    def clock(self, phase: str, times: float = 1.0) -> Iterator[None]:
        """Record the time of a block of code, multiplied by `times`, as that of a phase."""
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds[phase] = (time.perf_counter() - began) * times

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
