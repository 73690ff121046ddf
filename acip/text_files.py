"""Read documents from local files in bounded memory. The content of a file must match the format that its name states.

    name                    content                                         a document is
    .txt                    text                                            a text between two blank lines
    .jsonl .ndjson .json    one JSON object per line; lines end at \\n only   a line's "text", or "messages"
    .csv .tsv               a header with a column "text", then rows        a row's "text"
    .parquet .arrow         columns (Arrow's file or stream format)         a row's "text", or "messages"

Text is UTF-8; a byte order mark is skipped. The formats of the first three lines may be compressed (suffix .gz, .zst or .bz2).
Empty documents and blank lines are skipped. A folder is searched for files with these names, except hidden ones; a pattern
(`data/*.jsonl`) is expanded. Files are read in the order of their sorted paths. Errors name the file, and the line or row.

A text longer than `LONG_TEXT_CHARACTERS` is returned as a `LongText`, so that it is never in memory as a whole.
"""

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from acip.errors import DataError

LONG_TEXT_CHARACTERS = 2**18  # longer documents are read in blocks
READ_BYTES = 2**20  # per read
LONGEST_LINE = 2**26  # characters of a JSON line or a CSV field, which must be in memory as a whole
BATCH_ROWS = 64  # rows of a column file in memory at once

Messages = list[dict[str, str]]


class LongText:
    """A document as an iterator of text blocks. Read it once, before the next document is requested."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[str]:
        return self.blocks


Document = str | LongText | Messages  # text, or the messages of a chat

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
MAGIC = {  # first bytes of file formats
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow", b"%PDF": "PDF",
    b"{\\rtf": "RTF", b"GGUF": "GGUF", b"\x7fELF": "a program", b"SQLite format 3": "a SQLite database",
    b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16",
}  # fmt: skip
JSON_BEGINS = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
MARKUP_BEGINS = re.compile(r"\s*<(!doctype\s|html[\s>]|\?xml\s)", re.IGNORECASE)
NOT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")  # metadata files that `datasets` writes beside the data


def files(source: str) -> list[Path]:
    """Return the files that match `source`, a path or a pattern; empty if there are none. Raises DataError for a folder without text."""
    try:
        root = Path(source)
        if not source:  # not the current folder
            return []
        if root.is_dir():
            visible = (path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts))
            texts = sorted(path for path in visible if _format(path)[0] and path.name not in NOT_DATA and path.is_file())
            if not texts:
                raise DataError(f"folder {source!r} contains no text file. {ALLOWED}")
            return texts
        if root.exists():
            if not root.is_file():
                raise DataError(f"{source} is neither a file nor a folder.")
            return [root]
        if not glob.has_magic(source):
            return []
        return sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())  # noqa: PTH207 (Path.glob takes no absolute pattern)
    except OSError as error:  # for example: no permission, or a name that is too long
        raise DataError(f"{source[:200]!r} can't be read: {error.strerror or error}.") from error


def read(file: Path) -> Iterator[Document]:
    """Yield the documents of one file. Raises DataError, with the line or row, if the content does not match the name."""
    name, compression = _format(file)
    if not name:
        raise DataError(f"{file} has no known suffix of a text file. {ALLOWED}")
    columns = name in COLUMNS
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
        actual = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")
        expected = compression or COLUMNS.get(name, "")
        if actual != expected:
            raise DataError(
                f"{file} contains {actual or ('nothing' if not head else 'something else')}, but its name indicates "
                f"{expected or 'text in UTF-8'}. Convert or rename the file. " + ALLOWED
            )
        if columns:
            yield from _columns(file, head)
            return
        with _opened(file, compression) as raw:
            yield from TEXT_FORMATS[name](raw, file)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}.") from error


def _format(path: Path) -> tuple[str, str]:
    """Return (suffix of the format, compression) as the file's name states them; "" for an unknown format or no compression."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    compression = COMPRESSED.get(last, "")
    name = before if compression else last
    return (name, compression) if name in TEXT_FORMATS or (name in COLUMNS and not compression) else ("", "")


def _opened(file: Path, compression: str) -> BinaryIO:
    if not compression:
        return file.open("rb")
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(file)), compression)


def _blocks(raw: BinaryIO, file: Path) -> Iterator[str]:
    """Yield the decoded content of a text file block by block."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    first = True
    while True:
        try:
            data = raw.read(READ_BYTES)
        except OSError as error:  # a compressed file is truncated or damaged
            raise DataError(f"{file}, after line {line}, can't be read: {error}") from error
        if first and (actual := next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), "")):
            raise DataError(f"{file} contains {actual} after decompression; it must contain text in UTF-8.")
        first = False
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = line + error.object[: error.start].count(b"\n")
            raise DataError(
                f"{file}, line {at}, is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}). If it is text in another "
                "encoding, convert it, for example with iconv -f LATIN1 -t UTF-8."
            ) from error
        if (zero := text.find("\0")) >= 0:
            at = line + text.count("\n", 0, zero)
            raise DataError(f"{file}, line {at}, contains a NUL byte, so it is binary or UTF-16. Convert UTF-16 text to UTF-8.")
        line += text.count("\n")
        if text:
            yield text
        if not data:
            return


# ---- text


def _text(raw: BinaryIO, file: Path) -> Iterator[Document]:
    newlines = io.IncrementalNewlineDecoder(None, translate=True)  # \r\n and \r also end lines
    yield from parted(_plain((newlines.decode(block) for block in _blocks(raw, file)), file))


def _plain(blocks: Iterator[str], file: Path) -> Iterator[str]:
    for i, block in enumerate(blocks):
        if i == 0 and (JSON_BEGINS.match(block) or MARKUP_BEGINS.match(block)):
            kind = "JSON" if JSON_BEGINS.match(block) else "HTML or XML"
            raise DataError(f"{file} begins like {kind}, not like plain text. Rename the file, or extract its text. {ALLOWED}")
        yield block


def parted(blocks: Iterable[str]) -> Iterator[str | LongText]:
    """Yield the documents of a text. Two blank lines separate documents; they are stripped, and empty ones are skipped."""
    pieces = _pieces(blocks)
    while True:
        held: list[str] = []
        size = 0
        for piece in pieces:
            if piece is None:
                break
            held.append(piece)
            size += len(piece)
            if size > LONG_TEXT_CHARACTERS:
                rest = _until_end(held, pieces)
                yield LongText(rest)
                for _ in rest:  # skip what the caller did not read
                    pass
                break
        else:
            if held:
                yield "".join(held)
            return
        if 0 < size <= LONG_TEXT_CHARACTERS:
            yield "".join(held)


def _until_end(held: list[str], pieces: Iterator[str | None]) -> Iterator[str]:
    yield from held
    for piece in pieces:
        if piece is None:
            return
        yield piece


def _pieces(blocks: Iterable[str]) -> Iterator[str | None]:
    """Yield stripped documents in pieces, with None after each. Trailing white space is held back until more text follows."""
    tail, fresh = "", True  # fresh: no piece of this document was yielded yet
    for block in blocks:
        text = tail + block
        body = text.rstrip()
        tail = text[len(body) :]
        parts = re.split(r"\n{3,}", body)
        for i, part in enumerate(parts):
            ends = i < len(parts) - 1
            piece = part.lstrip() if fresh else part
            piece = piece.rstrip() if ends else piece
            if piece:
                fresh = False
                yield piece
            if ends:
                fresh = True
                yield None
        if len(tail) > LONG_TEXT_CHARACTERS:  # long white space is not kept in memory
            ends_here = "\n\n\n" in tail
            tail = "\n\n\n" if ends_here or fresh else tail[:LONG_TEXT_CHARACTERS]


# ---- lines


def _lines(blocks: Iterable[str], file: Path, longest: int) -> Iterator[str]:
    """Yield lines, each with its final newline. No other character ends a line."""
    held: list[str] = []
    size, number = 0, 1
    for block in blocks:
        start = 0
        while (end := block.find("\n", start)) >= 0:
            yield "".join((*held, block[start : end + 1]))
            held, size, start = [], 0, end + 1
            number += 1
        if start < len(block):
            held.append(block[start:])
            size += len(block) - start
        if size > longest:
            raise DataError(
                f"{file}, line {number}, is longer than {longest:,} characters, the most for one line. Store texts of this length as "
                ".txt, which is read in pieces, or split them."
            )
    if held:
        yield "".join(held)


def _json_lines(raw: BinaryIO, file: Path) -> Iterator[Document]:
    for n, line in enumerate(_lines(_blocks(raw, file), file, LONGEST_LINE), 1):
        if not line.strip(" \t\r\n"):
            continue
        where = f"{file}, line {n}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = (
                " The file is one JSON value over several lines: convert it with jq -c '.[]?'." if line.strip() in ("[", "{", "[{") else ""
            )
            raise DataError(f"{where}: it is not JSON ({error}).{hint} Each line must be one JSON object.") from error
        if isinstance(row, list):
            raise DataError(f"{where}: it is a JSON array. Each line must be one JSON object: convert the file with jq -c '.[]'.")
        if (doc := _document(row, where)) is not None:
            yield doc


def _csv(raw: BinaryIO, file: Path, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    rows = csv.reader(_lines(_blocks(raw, file), file, LONGEST_LINE), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    began = 1
    try:
        for row in rows:
            where, began = f"{file}, line {began}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                if header.count("text") != 1:
                    raise DataError(f'{where}: the columns are {_some(header)}; exactly one of them must be "text".')
                continue
            if len(row) != len(header):
                raise DataError(f"{where}: it has {len(row)} fields, the header has {len(header)}.")
            if (doc := _document(dict(zip(header, row, strict=True)), where)) is not None:
                yield doc
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: it is not CSV ({error}).") from error


# ---- columns


def _columns(file: Path, head: bytes) -> Iterator[Document]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        if head.startswith(b"PAR1"):
            parquet = ParquetFile(file)
            names = parquet.schema_arrow.names
            batches = parquet.iter_batches(BATCH_ROWS, columns=_known(names, file))
        else:
            mapped = pa.memory_map(str(file))
            if head.startswith(b"ARROW1"):
                opened = pa.ipc.open_file(mapped)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            else:
                opened = batches = pa.ipc.open_stream(mapped)
            _known(opened.schema.names, file)
        n = 0
        for batch in batches:
            known = batch.select(_known(batch.schema.names, file))
            for at in range(0, len(known), BATCH_ROWS):
                for row in known.slice(at, BATCH_ROWS).to_pylist():
                    n += 1
                    if (doc := _document(row, f"{file}, row {n}")) is not None:
                        yield doc
    except (pa.ArrowException, ValueError) as error:  # ValueError: a text in the file is not UTF-8
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged or of an unsupported kind: {error}") from error


def _known(names: list[str], file: Path) -> list[str]:
    known = [name for name in names if name in ("text", "messages")]
    if not known or len(set(known)) != len(known):
        raise DataError(f'{file}: the columns are {_some(names)}; one of them must be "text" or "messages".')
    return known


# ---- rows


def _document(row: Any, where: str) -> Document | None:
    """Return the document in a row, or None if it is empty."""
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        _check_characters(row["text"], where)
        return row["text"] if row["text"].strip() else None
    if isinstance(row, Mapping) and _is_chat(row.get("messages")):
        for message in row["messages"]:
            _check_characters(message["content"], where)
        return row["messages"]
    if not isinstance(row, Mapping):
        actual = f"is {_shown(row)}"
    elif "text" in row or "messages" in row:
        actual = "has " + " and ".join(f"{key} {_shown(row[key])}" for key in ("text", "messages") if key in row)
    else:
        actual = f"has the fields {_some(list(row))}"
    raise DataError(
        f'{where} {actual}; it must be an object with a string "text", or with "messages", a list of {{"role": ..., "content": ...}}.'
    )


def _check_characters(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the text contains half of a surrogate pair ({error.reason}), which is not a character.") from error


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


def _some(names: list[str]) -> str:
    return ", ".join(map(_shown, names[:8])) + (", ..." if len(names) > 8 else "") if names else "nothing"


TEXT_FORMATS: Mapping[str, Callable[[BinaryIO, Path], Iterator[Document]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": lambda raw, file: _csv(raw, file, ","),
    ".tsv": lambda raw, file: _csv(raw, file, "\t"),
}
COLUMNS = {".parquet": "Parquet", ".arrow": "Arrow"}
ALLOWED = f"Allowed: {', '.join(TEXT_FORMATS)}, each also compressed ({', '.join(COMPRESSED)}), and {', '.join(COLUMNS)}."
