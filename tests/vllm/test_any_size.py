"""vLLM computes every size of a resident model, with the answers of the embedded engine and of transformers.

`VllmModel` compares its log-probabilities with transformers' when it is loaded, at two sizes.
"""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.errors import BrokenEngineError
from acip_platform.serve.engine.events import PromptScored, RequestFailed, TokenSampled
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SamplingParams
from transformers import AutoModelForCausalLM, PreTrainedConfig

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip.sizing.budget import Budget
from tests.acip.artifact.test_codes_file import calibrated_with_codes
from tests.vllm.test_engine import FAMILIES, NATS

pytestmark = pytest.mark.vllm

SIZES = (
    Budget(ratio=1.0),
    Budget(ratio=0.5, convention="bytes"),
    Budget(ratio=0.4, convention="linear"),
    Budget(ratio=0.45, convention="bytes"),
)
PROMPT = list(b"It was a bright cold day")
VERSION: Any = SimpleNamespace(name="small", version="1", uri="here")


def save(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Artifact:
    """Save an artifact with ranks and codes of a model with random weights."""
    torch.manual_seed(0)
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)  # so that logits differ from token to token
    base, calibration, codes = calibrated_with_codes(model)
    return Artifact.save(folder / "artifact", base, calibration, {}, codes)


def answers(engine: Engine, model: ResidentModel) -> list[Any]:
    """Return tokens and log-probabilities of eight requests of all sizes, which run together."""

    def one(i: int) -> Any:
        sampling = SamplingParams(temperature=0.0 if i < 4 else 0.9, top_p=0.9, logprobs=2, presence_penalty=0.1 * i)
        request = GenerationRequest(
            [PROMPT[: 6 + 2 * i]],
            SIZES[i % len(SIZES)],
            max_tokens=12,
            seed=i,
            sampling=sampling,
            prompt_logprobs=1,
            end_tokens=frozenset(),
        )
        events = list(engine.events(model, request))
        assert not isinstance(events[-1], RequestFailed), events[-1]
        scores = [token.logprob for event in events if isinstance(event, PromptScored) for token in event.tokens[1:]]
        tokens = [event.token for event in events if isinstance(event, TokenSampled)]
        return scores, tokens

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(8)))


def assert_same_answers(artifact: Artifact) -> None:
    from acip_vllm.resident_model import VllmModel

    found = []
    for kind in (VllmModel, ResidentModel):
        model, engine = kind(VERSION, artifact, packed=False), Engine()
        engine.add(model)
        found.append(answers(engine, model))
        engine.close()
    for (scores, tokens), (expected_scores, expected) in zip(*found, strict=True):
        assert scores == pytest.approx(expected_scores, abs=NATS)
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a.token != b.token), len(tokens))
        assert [token.logprob for token in tokens[:same]] == pytest.approx([token.logprob for token in expected[:same]], abs=NATS)
        if same < len(tokens):  # a near-tie: both tokens are as likely
            a, b = tokens[same], expected[same]
            assert a.logprob == pytest.approx(b.logprob, abs=0.05), f"token {same}: {a} and {b}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_at_mixed_sizes(family: str, tmp_path: Path) -> None:
    """Ranks, codes and the dense base model share a batch; sampled tokens follow the request's seed."""
    assert_same_answers(save(tmp_path, FAMILIES[family]))


def test_a_step_without_sequences_gives_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM runs such steps to measure its memory."""
    from acip_vllm import any_size

    from acip.layers.mixed_sizes import Mixer

    model = save(tmp_path, FAMILIES["llama"]).load()
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    served = any_size.ServedLayers(model.model, set(model.layers), {}, Mixer(model.layers))
    monkeypatch.setattr(any_size, "get_forward_context", object)
    assert served.compute(served.parts(names), torch.randn(5, 128), 256).equal(torch.zeros(5, 256))


def test_cuda_graphs_end_at_layers_of_any_size() -> None:
    """vLLM captures the pieces between them only: what such a layer computes with differs by step."""
    import acip_vllm.any_size
    from vllm.compilation.backends import split_graph
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    config.set_splitting_ops_for_v1("")
    for _ in range(2):
        acip_vllm.any_size.keep_out_of_cuda_graphs(config)
    assert config.cudagraph_mode is CUDAGraphMode.PIECEWISE
    assert config.splitting_ops is not None and config.splitting_ops.count("vllm::acip_any_size") == 1

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm.acip_any_size(x.relu(), "layer", 7).relu()

    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *x: x[-1:]

    torch.compile(model, fullgraph=True, dynamic=True, backend=backend)(torch.ones(3, 5))
    _, pieces = split_graph(graphs[0], config.splitting_ops)
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def test_two_models_in_one_process(tmp_path: Path, engine: Engine) -> None:
    from acip_vllm.resident_model import VllmModel

    models = [VllmModel(VERSION, save(tmp_path / family, FAMILIES[family]), packed=False) for family in ("llama", "qwen3")]
    for model in models:
        engine.add(model)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda model: answers(engine, model), models))
    for model, found in zip(models, together, strict=True):
        for (scores, _), (alone, _) in zip(found, answers(engine, model), strict=True):
            assert scores == pytest.approx(alone, abs=NATS)


def test_a_model_in_bfloat16_is_checked_by_its_mean_difference(tmp_path: Path, engine: Engine) -> None:
    from acip_vllm.resident_model import VllmModel

    model = VllmModel(VERSION, save(tmp_path, FAMILIES["llama"], torch.bfloat16), packed=False)
    engine.add(model)
    assert all(len(tokens) == 12 for _, tokens in answers(engine, model))


def test_sizes_that_stay_in_use_get_copies(tmp_path: Path, engine: Engine) -> None:
    """They give the same answers, alone and together, and leave when memory is short."""
    from acip_vllm.any_size import SERVED
    from acip_vllm.resident_model import VllmModel

    model = VllmModel(VERSION, save(tmp_path, FAMILIES["llama"]))
    engine.add(model)
    (served,) = [served for served in SERVED.values() if served.model is model.any_size.model]
    sampling = SamplingParams(temperature=0.0, logprobs=0)

    def tokens(size: Budget) -> list[Any]:
        request = GenerationRequest([PROMPT], size, max_tokens=60, sampling=sampling, end_tokens=frozenset())
        return [event.token for event in engine.events(model, request) if isinstance(event, TokenSampled)]

    def together(*sizes: Budget) -> list[list[Any]]:
        with ThreadPoolExecutor(len(sizes)) as pool:
            return list(pool.map(tokens, sizes))

    def copied(*sizes: Budget) -> list[bool]:
        return [model.cut(size).key in served.copies for size in sizes]

    base, half, ranks = SIZES[:3]
    copies = together(base, ranks)
    assert copied(base, half, ranks) == [True, False, True]
    copies += [tokens(half)]
    assert copied(base, half, ranks).count(True) == 2 and copied(half) == [True]
    model.weights.unpack()
    plain = [*together(base, ranks), tokens(half)]
    assert copied(base, half, ranks) == [False, False, False]
    for found, expected in zip(copies, plain, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a.token != b.token), len(found))
        assert same > 20
        assert [token.logprob for token in found[:same]] == pytest.approx([token.logprob for token in expected[:same]], abs=NATS)


def test_wrong_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of vLLM that computes something else is found before the model is served."""
    from acip_vllm.any_size import ServedLayers
    from acip_vllm.resident_model import VllmModel

    compute = ServedLayers.compute
    monkeypatch.setattr(ServedLayers, "compute", lambda *args: 1.05 * compute(*args))
    with pytest.raises(AcipError, match=r"log-probabilities differ by .*--engine acip"):
        VllmModel(VERSION, save(tmp_path, FAMILIES["llama"]), packed=False)


def test_a_failed_step_ends_its_requests_and_the_engine_is_not_alive(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from acip_vllm.resident_model import VllmModel

    model = VllmModel(VERSION, save(tmp_path, FAMILIES["llama"]), packed=False)
    engine.add(model)
    request = GenerationRequest([PROMPT], SIZES[0], max_tokens=4)
    with monkeypatch.context() as patched:
        patched.setattr(model.batch.engine, "step", lambda: 1 / 0)  # type: ignore[attr-defined]
        (failed,) = (event for event in engine.events(model, request) if isinstance(event, RequestFailed))
    assert isinstance(failed.error, ZeroDivisionError)
    assert not engine.alive
    (failed,) = (event for event in engine.events(model, request) if isinstance(event, RequestFailed))
    assert isinstance(failed.error, BrokenEngineError)


def test_a_model_that_is_dropped_frees_its_engine(tmp_path: Path) -> None:
    from acip_vllm.any_size import SERVED
    from acip_vllm.resident_model import VllmModel

    gc.collect()  # the models of other tests
    before = set(SERVED)
    model = VllmModel(VERSION, save(tmp_path, FAMILIES["llama"]), packed=False)
    (folder,) = set(SERVED) - before
    assert Path(folder).is_dir()
    core = weakref.ref(model.batch.engine.engine_core)  # type: ignore[attr-defined]
    del model
    gc.collect()
    assert core() is None
    assert folder not in SERVED
    assert not Path(folder).exists()
