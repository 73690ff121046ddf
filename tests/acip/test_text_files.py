"""Local files are recognized by their content or refused, and are read in bounded memory."""

import bz2
import gzip
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from acip import text_files
from acip.data import documents, token_windows
from acip.errors import DataError
from acip.evaluate.heldout_text import content
from acip.text_files import LONG_TEXT_CHARACTERS, LongText, parted
from tests.conftest import byte_tokenizer

DOCS = [f"Document {i}." for i in range(16)]
LINES = "".join(json.dumps({"text": doc}) + "\n" for doc in DOCS)


def read_all(source: Path | str) -> list[Any]:
    return ["".join(doc) if isinstance(doc, LongText) else doc for doc in documents(str(source), "all")]


def table(docs: list[str] = DOCS) -> pa.Table:
    return pa.table({"id": list(range(len(docs))), "text": docs})


def arrow(path: Path, new: Callable[[str, pa.Schema], Any]) -> None:
    with new(str(path), table().schema) as writer:
        writer.write_table(table())


WRITE: dict[str, Callable[[Path], Any]] = {
    "a.txt": lambda path: path.write_text("\n\n\n".join(DOCS)),
    "crlf.TXT": lambda path: path.write_bytes("\r\n\r\n\r\n".join(DOCS).encode()),
    "bom.txt": lambda path: path.write_text("\n\n\n".join(DOCS), encoding="utf-8-sig"),
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.JSONL": lambda path: path.write_text(LINES),
    "a.ndjson": lambda path: path.write_text(LINES),
    "a.json": lambda path: path.write_text(LINES),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "blank.jsonl": lambda path: path.write_text(LINES.replace("\n", "\n\n \n")),
    "empty_documents.jsonl": lambda path: path.write_text('{"text": ""}\n' + LINES + '{"text": " \\n"}'),
    "a.csv": lambda path: path.write_text("id,text\n" + "".join(f'{i},"{doc}"\n' for i, doc in enumerate(DOCS))),
    "a.tsv": lambda path: path.write_text("id\ttext\r\n" + "".join(f"{i}\t{doc}\r\n" for i, doc in enumerate(DOCS))),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:100].encode()) + gzip.compress(LINES[100:].encode())),
    "a.txt.bz2": lambda path: path.write_bytes(bz2.compress("\n\n\n".join(DOCS).encode())),
    "a.json.zst": lambda path: path.write_bytes(pa.compress(LINES.encode(), "zstd", asbytes=True)),
    "a.parquet": lambda path: parquet.write_table(table(), path, row_group_size=5),
    "file.arrow": lambda path: arrow(path, ipc.new_file),
    "stream.arrow": lambda path: arrow(path, ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITE)
def test_every_format_yields_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITE[name](tmp_path / name)
    assert read_all(tmp_path / name) == DOCS


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_newline_ends_a_json_line(tmp_path: Path, char: str) -> None:
    file = tmp_path / "text.jsonl"
    docs = [f"one{char}two {i}" for i in range(9)]
    file.write_bytes("".join(json.dumps({"text": doc}, ensure_ascii=char < " ") + "\n" for doc in docs).encode())
    assert read_all(file) == docs


def test_a_csv_field_may_contain_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('text,n\n"one, ""two""\nthree\u2028four",1\nfive,2\n'.encode())
    assert read_all(tmp_path / "a.csv") == ['one, "two"\nthree\u2028four', "five"]


def test_chats_are_read_from_columns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Which size?"}]
    parquet.write_table(pa.table({"messages": [chat, chat]}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == [chat, chat]


BAD: dict[str, tuple[bytes, str]] = {
    "array.json": (json.dumps([{"text": "a"}]).encode(), "line 1: it is a JSON array.*jq"),
    "pretty.json": (json.dumps([{"text": "a"}], indent=1).encode(), "line 1: it is not JSON .*over several lines"),
    "object.json": (json.dumps({"text": "a"}, indent=1).encode(), "line 1: it is not JSON .*over several lines"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line 3: it is not JSON"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1: it is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1: it is not JSON"),
    "missing.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', 'line 2 has the fields "txt"; it must be'),
    "number.jsonl": (b'{"text": 3}\n', "line 1 has text 3; it must be"),
    "null.jsonl": (b'{"text": null}\n', "line 1 has text null; it must be"),
    "string.jsonl": (b'{"text": "a"}\n"b"\n', 'line 2 is "b"; it must be'),
    "chat.jsonl": (b'{"messages": [{"role": "user"}]}\n', "line 1 has messages .*; it must be"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "line 1: the text contains half of a surrogate pair"),
    "half-chat.jsonl": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "line 1: the text contains half of a surrogate pair"),
    "zipped.jsonl": (gzip.compress(LINES.encode()), "contains gzip, but its name indicates text in UTF-8"),
    "named.jsonl.gz": (LINES.encode(), "contains something else, but its name indicates gzip"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES.encode())), "contains gzip after decompression"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(4000).hex().encode())[:-200], "can't be read"),
    "cut.jsonl.zst": (pa.compress(os.urandom(4000).hex().encode(), "zstd", asbytes=True)[:-200], "can't be read"),
    "cut.txt.bz2": (bz2.compress(os.urandom(4000).hex().encode())[:-200], "can't be read"),
    "columns.txt": (b"PAR1....PAR1", "contains Parquet, but its name indicates text in UTF-8"),
    "text.parquet": (b"text", "contains something else, but its name indicates Parquet"),
    "nothing.parquet": (b"", "contains nothing, but its name indicates Parquet"),
    "cut.parquet": (b"PAR1....", "is damaged"),
    "cut.arrow": (b"ARROW1....", "is damaged"),
    "paper.txt": (b"%PDF-1.7\n", "contains PDF, but its name indicates text"),
    "lines.txt": (LINES.encode(), "begins like JSON"),
    "array.txt": (json.dumps([{"text": "a"}], indent=1).encode(), "begins like JSON"),
    "page.txt": (b"\n<!DOCTYPE html>\n<p>a", "begins like HTML"),
    "utf16.txt": ("one".encode("utf-16"), "contains text in UTF-16"),
    "utf16le.txt": ("one\ntwo".encode("utf-16-le"), "line 1, contains a NUL byte"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "contains text in UTF-16"),
    "nul.txt": (b"one\ntwo\nth\0ree", "line 3, contains a NUL byte"),
    "latin1.txt": ("one\ntwo\ncaf\u00e9 noir".encode("latin-1"), "line 3, is not UTF-8: byte 0xe9.*iconv"),
    "latin1.jsonl": (b'{"text": "one"}\n{"text": "caf\xe9"}', "line 2, is not UTF-8: byte 0xe9"),
    "half.txt": ("\u00e9".encode()[:1], "line 1, is not UTF-8"),
    "columns.csv": (b"id;text\n1;a\n", 'line 1: the columns are "id;text"; exactly one of them must be "text"'),
    "uneven.csv": (b"id,text\n1,a\n2,b,c\n", "line 3: it has 3 fields, the header has 2"),
    "open.csv": (b'text\na\n"b\nc\n', "line 4: it is not CSV"),
    "page.html": (b"<p>a", "has no known suffix of a text file. Allowed: .txt, .jsonl"),
    "no_name": (b"text", "has no known suffix of a text file"),
    "packed.zip": (b"PK\x03\x04", "has no known suffix of a text file"),
    "empty.txt": (b"", "contains no text"),
    "blank.txt": (b" \n\n\n\n \n", "contains no text"),
    "empty.jsonl": (b"\n\n", "contains no text"),
    "empty_documents.jsonl": (b'{"text": ""}\n', "contains no text"),
    "empty.csv": (b"text\n", "contains no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    raw, message = BAD[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"(?s){name}.*{message}"):
        read_all(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"body": ["a"]}, 'the columns are "body"; one of them must be "text"'), ({"text": [1, 2]}, "row 1 has text 1"),
     ({"text": ["a", None]}, "row 2 has text null"), ({"messages": [["a"]]}, "row 1 has messages")],
)  # fmt: skip
def test_columns_of_another_type_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet.*{message}"):
        read_all(tmp_path / "a.parquet")


def test_a_folder_and_a_pattern_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "c.txt").mkdir(parents=True)  # a folder of this name is not a file
    (tmp_path / ".hidden").mkdir()
    for name, text in (("b/1.jsonl", '{"text": "b1"}'), ("a.txt", "a"), ("b/2.jsonl", '{"text": "b2"}'), (".hidden/c.txt", "no"),
                       ("state.json", "{\n}"), ("notes.pdf", "%PDF")):  # fmt: skip
        (tmp_path / name).write_text(text)
    assert read_all(tmp_path) == ["a", "b1", "b2"]
    assert read_all(f"{tmp_path}/b/*.jsonl") == ["b1", "b2"]
    assert read_all(f"{tmp_path}/**/*.txt") == ["a"]
    before = content(f"{tmp_path}/b/*.jsonl")
    (tmp_path / "b/2.jsonl").write_text('{"text": "b3"}')
    assert before and content(f"{tmp_path}/b/*.jsonl") not in ("", before)
    with pytest.raises(DataError, match="neither a local file or folder"):
        read_all(f"{tmp_path}/b/*.csv")
    with pytest.raises(DataError, match="contains no text file"):
        read_all(tmp_path / "b" / "c.txt")


def test_sources_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_all(tmp_path / "pipe.txt")
    for source in ("x" * 5000, "a\0b"):
        with pytest.raises(DataError):
            read_all(source)


def test_a_zip_archive_is_refused_whatever_its_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as packed:
        packed.writestr("inside.txt", "text")
    with pytest.raises(DataError, match="contains a zip archive"):
        read_all(tmp_path / "a.txt")


# ---- long documents


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_documents_are_split_independently_of_the_block_size(size: int) -> None:
    text = " \n\n\n one \n\n two\n \n\n\n\n three \u2028\n\n\nfour\n\n\n\n\n\n \n\n\n five \n"
    whole = [doc.strip() for doc in text.split("\n\n\n") if doc.strip()]
    assert list(parted(text[at : at + size] for at in range(0, len(text), size))) == whole == list(parted([text]))


def test_a_long_document_is_read_in_blocks(tmp_path: Path) -> None:
    long = "Any size. " * (LONG_TEXT_CHARACTERS // 5)
    docs = ["one", long.strip(), "three", long.strip() + "!"]
    (tmp_path / "a.txt").write_text(" \n\n\n\n".join(docs))
    assert [type(doc) for doc in documents(str(tmp_path / "a.txt"), "all")] == [
        str,
        LongText,
        str,
        LongText,
    ]
    assert read_all(tmp_path / "a.txt") == docs


def test_an_endless_document_is_read_only_as_far_as_needed() -> None:
    """Memory does not grow for one endless line, endless blank lines, or endless spaces."""
    line = "It was a bright cold day, and the clocks were striking. " * 40_000
    windows = token_windows(parted(cycle([line])), byte_tokenizer(), 64, 8)
    assert bytes(windows.flatten().tolist()).decode() == line[: 64 * 8]
    spaces: Iterator[str] = (" \n\n\n" * LONG_TEXT_CHARACTERS if i < 40 else line for i in cycle(range(41)))
    assert token_windows(parted(spaces), byte_tokenizer(), 64, 2).flatten().tolist() == list(line[: 64 * 2].encode())


def test_a_json_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1000)
    monkeypatch.setattr(text_files, "READ_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' + json.dumps({"text": "x" * 2000}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, is longer than 1,000 characters"):
        read_all(tmp_path / "a.jsonl")
