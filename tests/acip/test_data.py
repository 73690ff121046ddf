"""Text is packed into token windows, deterministically and with disjoint splits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from acip.base import load_base
from acip.data import TokenBatches, documents, token_windows
from acip.errors import BaseModelError, DataError
from tests.conftest import byte_tokenizer


def test_the_splits_share_no_document() -> None:
    train, heldout = (list(documents("package:wikipedia", split)) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 93
    assert len(heldout) == 11
    assert not set(train) & set(heldout)
    assert str(train[0]).startswith("Anarchism")


def test_documents_are_packed_with_their_end_token() -> None:
    windows = token_windows(["abc", "defg"], byte_tokenizer(), 3)
    assert windows.tolist() == [[*b"abc"], [2, *b"de"], [*b"fg", 2]]


def test_only_as_many_documents_as_needed_are_read() -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "x" * 10

    assert token_windows(endless(), byte_tokenizer(), 8, count=5).shape == (5, 8)
    assert len(read) == 4


def test_batches_are_a_function_of_seed_and_step() -> None:
    windows = torch.arange(10).view(10, 1).int()
    batches = TokenBatches(windows, 4, seed=3)
    assert torch.equal(batches[7], TokenBatches(windows, 4, seed=3)[7])
    epoch = torch.cat([TokenBatches(windows, 5, seed=3)[i] for i in range(2)])
    assert sorted(epoch.flatten().tolist()) == list(range(10))
    assert not torch.equal(epoch, torch.cat([TokenBatches(windows, 5, seed=3)[i] for i in range(2, 4)]))


def test_local_text_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n\n\nthree")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "five", "id": 1}')
    assert list(documents(str(tmp_path), "train")) == ["one", "two", "three", "four", "five"]
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(DataError, match=r'b\.jsonl, line 1.*"messages"'):
        list(documents(str(tmp_path), "train"))
    (tmp_path / "b.jsonl").write_text('{"txt": "four"}')
    with pytest.raises(DataError, match=r"b\.jsonl, line 1"):
        list(documents(str(tmp_path), "train"))


def test_every_eighth_document_of_local_text_is_held_out(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join("abcdefghi"))
    assert {split: "".join(map(str, documents(str(text), split))) for split in ("train", "heldout", "all")} == {
        "train": "abcdefgi", "heldout": "h", "all": "abcdefghi",
    }  # fmt: skip
    text.write_text("one document of many lines\n\nas WikiText's test file is one")
    with pytest.raises(DataError, match=r"text\.txt has 1 documents; at least 8 are needed.*--all-documents"):
        next(documents(str(text), "heldout"))
    assert len(list(documents(str(text), "all"))) == 1
    text.write_text("")
    with pytest.raises(DataError, match=r"text\.txt contains no text"):
        next(documents(str(text), "all"))


def test_bad_sources_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'wikipedia'"):
        list(documents("package:wikipedias", "train"))
    with pytest.raises(DataError, match=r"Allowed: package:austen, package:code, package:wikipedia, c4, wikitext2, or a path"):
        list(documents("wikitext", "train"))
    with pytest.raises(DataError, match="contains no text file"):
        list(documents(str(tmp_path), "train"))
    with pytest.raises(DataError, match="less than one window of 512"):
        token_windows(["short"], byte_tokenizer(), 512)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "Allowed: package:NAME, a .gguf file"),
        ("package:no_such_package", "no package 'no_such_package' is installed"),
        ("package:acip", "contains 0 GGUF files"),
        ("no/such.gguf", "GGUF file 'no/such.gguf' does not exist"),
        ("no-such-org/no-such-model", "can't be loaded"),
    ],
)
def test_bad_base_models_are_refused_with_advice(source: str, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        load_base(source)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base(str(tmp_path))


def test_chats_are_rendered_with_the_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Which size?"}, {"role": "assistant", "content": "Any."}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 20))
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        token_windows(documents(str(tmp_path), "train"), tokenizer, 16)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    windows = token_windows(documents(str(tmp_path), "train"), tokenizer, 16)
    assert tokenizer.decode(windows.flatten()[:32]) == "<user>Which size?<assistant>Any."
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(DataError, match=r"rejects a chat that begins with .*Which size"):
        token_windows(documents(str(tmp_path), "train"), tokenizer, 16)
