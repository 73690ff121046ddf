"""The body of a request: strict JSON, read with clear errors for what is not."""

import json
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_DEPTH = 64  # arrays and objects within each other


class JsonRequest(Request):
    """A request whose body is UTF-8 and JSON by the letter: no NaN, no field twice, no endless nesting or numbers."""

    async def json(self) -> Any:
        """The body's value. Raises json.JSONDecodeError for what is not JSON, HTTPException 415 for a compressed body."""
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise HTTPException(415, f"the body has Content-Encoding {encoding[:40]!r}; this server reads bodies that are not compressed.")
        return parsed(await self.body())


class JsonRoute(APIRoute):
    """A route whose handler gets a `JsonRequest`."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_strictly


def parsed(body: bytes) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError; its `pos` is -1 where the place is not known."""
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
    except ValueError as error:  # Python reads no numbers of thousands of digits
        raise json.JSONDecodeError("it holds a number of more than 4,300 digits", "", -1) from error
    _check_depth(value)
    return value


def _constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not a number of JSON", "", -1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise json.JSONDecodeError(f"the field {name[:100]!r} is there twice", "", -1)
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
