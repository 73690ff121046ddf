"""Exceptions that libraries raise on user input become acip's errors, on one line and with the name of the input."""

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from acip_platform.cluster import ClusterError, connect
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import Registry, reached
from acip_platform.training.worker import worker
from safetensors.torch import load_file, save_file

import acip
from acip.base import load_base, outline
from acip.errors import AcipError, ArtifactError, BaseModelError, DataError, foreign_errors


@pytest.mark.parametrize(
    "raised", [OSError("a"), KeyError("b"), TypeError(), AssertionError("c\nd"), UnicodeDecodeError("utf-8", b"x", 0, 1, "e")]
)
def test_a_foreign_exception_becomes_an_error_of_acip(raised: Exception) -> None:
    with pytest.raises(DataError) as caught, foreign_errors(DataError, "text 'x' can't be read", "Fix it."):
        raise raised
    text = str(caught.value)
    assert text.startswith("text 'x' can't be read: ") and text.endswith("Fix it.") and "\n" not in text
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [BaseModelError("ours"), MemoryError(), OSError(errno.ENOMEM, "no memory"), KeyboardInterrupt()])
def test_errors_of_acip_and_out_of_memory_errors_pass_unchanged(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, foreign_errors(DataError, "x"):
        raise raised
    assert caught.value is raised


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


BROKEN: dict[str, Callable[[Path], None]] = {
    "git lfs": written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "cut off": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "empty": written("model.safetensors", b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "vocabulary": edited(vocab_size=300),
    "pad": edited(pad_token_id=32_000),
    "heads": edited(num_attention_heads=7),
    "layers": edited(num_hidden_layers="two"),
    "model type": edited(model_type="no_such"),
    "rope": edited(rope_scaling={"type": "no_such", "factor": "x"}),
    "not JSON": written("config.json", b"{"),
    "not UTF-8": written("config.json", b"\xff\xfe\xff"),
    "a list": written("config.json", b"[1, 2]"),
    "tokenizer not JSON": written("tokenizer.json", b"{"),
    "tokenizer of nothing": written("tokenizer.json", b"{}"),
    "tokenizer config": written("tokenizer_config.json", b'{"tokenizer_class": 3}'),
}


@pytest.mark.parametrize("load", [load_base, outline])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_base_is_a_base_model_error_with_its_path(
    small_base: str, tmp_path: Path, fault: str, load: Callable[[str, str], object]
) -> None:
    folder = Path(shutil.copytree(small_base, tmp_path / "base"))
    BROKEN[fault](folder)
    with pytest.raises(BaseModelError) as caught:
        load(str(folder), "float32")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all, but text" * 100])
def test_a_broken_gguf_is_a_base_model_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"x\.gguf"):
        load_base(str(tmp_path / "x.gguf"))


def test_an_export_that_lacks_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    lost = next(name for name in weights if "layers.1" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=lost.replace(".", r"\.")):
        acip.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="export"):
        acip.from_pretrained(folder)


def test_a_worker_returns_permanent_errors_and_raises_transient_ones() -> None:
    def fails(error: Exception) -> Callable[[dict[str, object]], dict[str, object]]:
        def work(config: dict[str, object]) -> dict[str, object]:
            raise error

        return work

    for error in (AcipError("ours"), IndexError("foreign"), TypeError("foreign"), ValueError("foreign")):
        assert str(error) in worker({"work": fails(error)})["error"]
    for transient in (ConnectionError("away"), MemoryError(), RuntimeError("of a device")):
        with pytest.raises(type(transient)):
            worker({"work": fails(transient)})


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "dashboard"),
        ("https://ray.example", "dashboard"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:0", "HOST:PORT"),
        ("127.0.0.1:99999", "HOST:PORT"),
        ("ray://", "HOST:PORT"),
        ("grpc://127.0.0.1:6379", "HOST:PORT"),
        ("127.0.0.1:UNUSED", "nothing answers"),
        ("ray://127.0.0.1:UNUSED", "nothing answers"),
        ("127.0.0.1:HTTP", "HTTP server"),
        ("ray://127.0.0.1:HTTP", "HTTP server"),
    ],
)
def test_a_wrong_cluster_address_is_a_one_line_error_at_once(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused, HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        unused.bind(("127.0.0.1", 0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, port in (("UNUSED", unused.getsockname()[1]), ("HTTP", server.server_port)):
            address = address.replace(name, str(port))
        monkeypatch.setenv("RAY_ADDRESS", address)
        try:
            with pytest.raises(ClusterError, match=message) as caught:
                connect(Settings.from_env({"ACIP_HOME": str(tmp_path)}))
        finally:
            server.shutdown()
    assert address in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["no_such://x", "postgresql+no_such://x/y", "http://["])
def test_a_bad_registry_uri_is_an_error_of_acip(uri: str, tmp_path: Path) -> None:
    def list_models() -> list[str]:
        settings = Settings.from_env({"ACIP_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": uri})
        with reached(settings):
            return Registry(settings).models()

    with pytest.raises(AcipError, match="MLFLOW_TRACKING_URI"):
        list_models()


def test_an_endpoint_that_is_not_a_url_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
        Store("s3://bucket/x", tmp_path).exists("s3://bucket/x/y")
