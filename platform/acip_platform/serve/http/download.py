"""GET /v1/materializations/{id}/archive: a materialized size as one tar file, streamed from the store and resumable.

    header | file | padding | header | file | padding | ... | end        each part is created or read when it is sent

The archive itself is not stored. The names and sizes of the files determine the position of every byte, so a range (`curl -C -`, a
browser's resume) can start anywhere. Exports in the store never change, so one id always gives the same archive, byte for byte; the
`ETag` header identifies it.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from acip.artifact.byte_sources import Source
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.materializations import Materializations
from acip_platform.storage.store import StoreError

PART_BYTES = 8 << 20  # bytes of a file in memory at once
BLOCK_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of the archive: either `content`, or a complete file."""

    start: int
    stop: int
    content: bytes = b""
    file: str = ""


class Archive:
    """A tar file with the files of a folder in the store."""

    def __init__(self, source: Source, sizes: Mapping[str, int], folder: str) -> None:
        self.source, self.pieces, self.size = source, list[Piece](), 0
        for name, size in sorted(sizes.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = size
            self._add(content=entry.tobuf(tarfile.GNU_FORMAT))
            if size:
                self._add(file=name, length=size)
            self._add(content=bytes(-size % BLOCK_BYTES))
        self._add(content=bytes(2 * BLOCK_BYTES))

    def _add(self, content: bytes = b"", file: str = "", length: int = 0) -> None:
        stop = self.size + (length or len(content))
        self.pieces.append(Piece(self.size, stop, content, file))
        self.size = stop

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop) of the archive."""
        for piece in self.pieces:
            first, end = max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start
            if not piece.file and first < end:
                yield piece.content[first:end]
            for at in range(first, end, PART_BYTES) if piece.file else ():
                (part,) = self.source.read(piece.file, [(at, min(at + PART_BYTES, end))])
                yield bytes(part)


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the bytes [start, stop) of a Range header with one range, or None for any other header.

    Raise RequestError (416) if the range starts beyond the end.
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header or "")
    if match is None or not (match[1] or match[2]):
        return None  # RFC 9110: ignore an invalid header
    start, stop = (int(match[1]), min(int(match[2] or size), size - 1) + 1) if match[1] else (max(0, size - int(match[2])), size)
    if match[1] and match[2] and int(match[2]) < start:
        return None
    if start >= size or start >= stop:
        raise RequestError(
            f"the range {(header or '').strip()} is beyond the end of the archive, which has {size} bytes.", "Range", "invalid_range", 416
        )
    return start, stop


def archive_name(record: Mapping[str, Any]) -> str:
    """Return the name of the archive and of the folder in it: MODEL-RATIO[-KIND]."""
    model = re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", record["model"])
    return f"{model}-{record['size']['ratio']:.4f}" + (f"-{record['quantize']}" if record["quantize"] else "")


def downloads(materializations: Materializations) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/materializations/{id}/archive", response_class=Response)
    async def archive(id: str, request: Request) -> Response:
        """Return a materialization as a tar file. Range requests are supported."""
        record = await materializations.get(id)
        if record["status"] != "succeeded":
            message = f"materialization {id} is {record['status']}; it can be downloaded once it has succeeded."
            raise RequestError(message, None, "not_materialized", 409)
        name = archive_name(record)
        try:
            source, sizes = await run_in_threadpool(materializations.store.source, record["uri"])
        except StoreError as error:
            raise RequestError(str(error), None, "store_unavailable", 503) from error
        if sum(sizes.values()) != record["bytes"]:
            message = (
                f"files of materialization {id} were removed from {record['uri']}. Remove what is left there, and request the size again."
            )
            raise RequestError(message, None, "not_materialized", 409)
        archive, tag = Archive(source, sizes, name), f'"{record["sha256"]}"'
        headers = {"Accept-Ranges": "bytes", "ETag": tag, "Content-Disposition": f'attachment; filename="{name}.tar"'}
        condition = request.headers.get("if-range")
        part = requested_range(request.headers.get("range"), archive.size) if condition in (None, tag) else None
        start, stop = part or (0, archive.size)
        headers["Content-Length"] = str(stop - start)
        if part:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{archive.size}"
        if request.method == "HEAD":
            return Response(None, 206 if part else 200, headers, media_type="application/x-tar")
        return StreamingResponse(archive.read(start, stop), 206 if part else 200, headers, media_type="application/x-tar")

    return router
