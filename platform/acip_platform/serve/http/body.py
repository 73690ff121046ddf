"""Strict parsing of JSON request bodies."""

import json
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_DEPTH = 64  # levels of nested arrays and objects


class JsonRequest(Request):
    """A request with a strict JSON body in UTF-8: no NaN, no duplicate fields, limited nesting and limited numbers."""

    async def json(self) -> Any:
        """Return the value of the body. Raises json.JSONDecodeError for invalid JSON, and HTTPException 415 for a compressed body."""
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise HTTPException(415, f"the body has Content-Encoding {encoding[:40]!r}; send it uncompressed.")
        return parsed(await self.body())


class JsonRoute(APIRoute):
    """A route whose handler receives a `JsonRequest`."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_strictly


def parsed(body: bytes) -> Any:
    """Return the value of a JSON text. Raises json.JSONDecodeError; its `pos` is -1 if the position is not known."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("it must be a JSON object in UTF-8", "", error.start) from error
    try:
        value = json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError(f"it is nested deeper than {MAX_DEPTH} arrays and objects", "", -1) from error
    except ValueError as error:  # Python parses no integer of more than 4300 digits
        raise json.JSONDecodeError("it holds a number of more than 4,300 digits", "", -1) from error
    _check_depth(value)
    return value


def _constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not a JSON number", "", -1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise json.JSONDecodeError(f"the field {name[:100]!r} occurs twice", "", -1)
        fields[name] = value
    return fields


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise json.JSONDecodeError(f"it is nested deeper than {MAX_DEPTH} arrays and objects", "", -1)
