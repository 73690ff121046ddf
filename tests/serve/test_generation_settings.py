"""The engine honors generation_config.json or reports ignored settings; logits that are not finite fail only their request."""

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.generation_settings import GenerationSettings
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import Sampler, SamplingParams, sample
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.size_facts import model_card
from acip_platform.serve.text.events import TextEvent
from acip_platform.serve.text_engine import TextEngine
from acip_platform.tracking.registry import ModelVersion
from transformers import AutoModelForCausalLM, GenerationConfig

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip.utils.checksums import sha256

PROMPT = list(b"the cat and the cat and the ")
VERSION = ModelVersion("small", "7", "here", (), {})


@pytest.fixture(scope="module")
def base(small_base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_base).eval()


def set_generation_config(served: ResidentModel, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Replace the generation config of the resident model."""
    monkeypatch.setattr(served.any_size.model, "generation_config", GenerationConfig(**settings))
    monkeypatch.setattr(served, "settings", GenerationSettings("small", served.any_size.model))


def answer(engine: TextEngine, served: ResidentModel, **fields: Any) -> tuple[list[str], dict[str, Any]]:
    """Return (the text of each choice, the data of the last event)."""
    texts: dict[int, str] = {}
    event = TextEvent("")
    for event in engine.events(served, CompletionRequest.parse({"prompt": PROMPT, "max_tokens": 24, **fields})):
        texts[event.index] = texts.get(event.index, "") + event.text
    return [texts[i] for i in sorted(texts)], event.data


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [ord("e"), ord(" ")]},
        {"begin_suppress_tokens": [ord(c) for c in "abcdefghijklmnopqrstuvwxyz"]},
        {"bad_words_ids": [[ord("t")], [ord("a"), ord("n")]]},
        {"sequence_bias": [[[ord("q")], 9.0]]},
        {"forced_eos_token_id": ord("Z")},
        {"eos_token_id": [ord("e"), ord(" ")], "min_new_tokens": 6},
        {"eos_token_id": [ord("e"), ord(" ")], "min_length": len(PROMPT) + 9},
        {"eos_token_id": ord("Q"), "exponential_decay_length_penalty": [3, 4.0]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [ord("o")]},
    ],
    ids="+".join,
)
def test_setting_has_the_effect_of_transformers_generate(
    settings: dict[str, Any], served: ResidentModel, engine: TextEngine, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_generation_config(served, monkeypatch, do_sample=False, **{"eos_token_id": 255, **settings})
    config = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0, **{"eos_token_id": 255, **settings})
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        generated = base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(PROMPT) :].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    expected = served.tokenizer.decode(generated[:-1] if generated[-1] in ends else generated)
    (text,), done = answer(engine, served)
    assert text == expected
    assert done["usage"]["completion_tokens"] == len(generated)
    batch, _ = answer(engine, served, prompt=[PROMPT, PROMPT[:9], PROMPT])
    assert batch[0] == batch[2] == expected, "settings must apply to each sequence of a batch"


@pytest.mark.parametrize("settings", [{"min_p": 0.3}, {"typical_p": 0.4}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}, {"top_h": 0.3}])
def test_truncation_settings_keep_the_tokens_of_transformers(
    settings: dict[str, Any], served: ResidentModel, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_generation_config(served, monkeypatch, do_sample=True, **settings)
    with torch.no_grad():
        logits = base(torch.tensor([PROMPT])).logits[:, -1].float()
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=40, top_p=0.95, **settings)
    allowed = base._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu", model_kwargs={})(
        torch.tensor([PROMPT]), logits.clone()
    )[0]
    sampler = served.sampler(SamplingParams(temperature=1.5, top_k=40, top_p=0.95), 3, list(PROMPT), 8)
    sampled = torch.tensor([sample(logits.clone(), [sampler])[0].token for _ in range(600)])
    frequencies = torch.bincount(sampled, minlength=len(allowed)) / len(sampled)
    assert not frequencies[allowed == -math.inf].any()
    assert (frequencies - allowed.softmax(-1)).abs().max() < 0.12


def test_top_p_applies_to_the_tokens_that_top_k_keeps() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    sampler = Sampler(SamplingParams(top_k=2, top_p=0.56))  # 0.4 / 0.7 = 0.571
    assert {sample(logits, [sampler])[0].token for _ in range(50)} == {0}
    sampler = Sampler(SamplingParams(top_k=3, top_p=0.5))  # 0.4 / 0.9 = 0.444
    assert {sample(logits, [sampler])[0].token for _ in range(200)} == {0, 1}


def test_stop_strings_and_lengths_of_the_config_are_defaults(
    served: ResidentModel, engine: TextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,), _ = answer(engine, served, temperature=0)
    set_generation_config(served, monkeypatch, do_sample=False, stop_strings=[plain[5:7]], max_new_tokens=11)
    (text,), done = answer(engine, served)
    assert text == plain[: plain.index(plain[5:7])] and done["usage"]["completion_tokens"] <= 7
    assert served.answer_tokens([PROMPT], None, 1000) == 11
    set_generation_config(served, monkeypatch, max_length=40)
    assert served.answer_tokens([PROMPT], None, 1000) == 40 - len(PROMPT)


def with_config(artifact: Artifact, folder: Path, **fields: Any) -> Artifact:
    shutil.copytree(artifact.folder, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **fields}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["generation_config.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Artifact.open(folder)


def test_ignored_settings_are_logged_once_and_listed_in_the_card(
    small_artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = with_config(
        small_artifact, tmp_path / "a", num_beams=4, guidance_scale=1.5, remove_invalid_values=True, max_time=3.0, min_p=0.1
    )
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        served = ResidentModel(VERSION, artifact)
    notes = model_card(served)["notes"]
    for setting in ("num_beams = 4", "guidance_scale = 1.5", "remove_invalid_values = True", "max_time = 3.0"):
        assert f"{setting} of generation_config.json is not honored" in notes
        assert sum(f"small: {setting}" in record.message for record in caplog.records) == 1
    assert not any("min_p" in note for note in notes)
    assert model_card(ResidentModel(VERSION, small_artifact))["notes"] == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"temperature": math.nan, "do_sample": True}, "temperature = nan, which is not finite"),
        ({"repetition_penalty": math.inf}, "repetition_penalty = inf, which is not finite"),
        ({"repetition_penalty": -1.0}, "can't be honored"),
        ({"min_p": 7.0, "do_sample": True}, "can't be honored"),
        ({"no_repeat_ngram_size": "two"}, "generation_config.json can't be"),
    ],
)
def test_invalid_setting_is_refused_at_load(fields: dict[str, Any], reason: str, small_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(AcipError, match=reason) as raised:
        ResidentModel(VERSION, with_config(small_artifact, tmp_path / "a", **fields))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_only_their_request(
    wrong: float, served: ResidentModel, engine: TextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = served.any_size.model
    good, long = bytes(PROMPT).decode(), bytes(PROMPT * 6).decode()
    expected = {prompt: answer(engine, served, prompt=prompt, temperature=0)[0] for prompt in (good, long)}

    def overflow(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        """Simulate an overflow of the dtype for prompts that contain token 1."""
        return out.masked_fill((args[0] == 1)[..., None], wrong)

    hook = model.get_input_embeddings().register_forward_hook(overflow)
    try:
        received: dict[str, list[TextEvent]] = {}
        requests: dict[str, dict[str, Any]] = {
            "good": {"prompt": good},
            "bad": {"prompt": [*PROMPT * 4, 1, 2], "n": 2},
            "long": {"prompt": long},
        }
        for name, fields in requests.items():
            request = CompletionRequest.parse({"max_tokens": 24, "temperature": 0, "logprobs": 2, **fields})
            engine.submit(served, request, received.setdefault(name, []).extend)
        deadline = time.monotonic() + 300
        while engine.open:
            assert time.monotonic() < deadline, "the three requests do not end"
            time.sleep(0.01)
        errors = [event for event in received["bad"] if event.kind == "error"]
        assert len(errors) == 1 and not any(event.text for event in received["bad"])
        assert errors[0].data["status"] == 500
        assert errors[0].data["body"]["error"]["code"] == "not_finite"
        for name, prompt in (("good", good), ("long", long)):
            assert ["".join(event.text for event in received[name])] == expected[prompt]
            assert all(math.isfinite(token["logprob"]) for event in received[name] for token in event.logprobs or [])
        for prompt in (long, good):  # in the slots of the failed sequences
            assert answer(engine, served, prompt=[prompt] * 3, temperature=0)[0] == expected[prompt] * 3
    finally:
        hook.remove()


def test_settings_that_leave_no_token_are_an_error(served: ResidentModel, engine: TextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    set_generation_config(served, monkeypatch, do_sample=False, suppress_tokens=list(range(256)))
    texts, last = answer(engine, served)
    assert not any(texts) and last["status"] == 500 and "leave no token" in last["body"]["error"]["message"]
