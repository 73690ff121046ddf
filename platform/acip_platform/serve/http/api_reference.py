"""The reference of the HTTP API: additions to the OpenAPI schema, and /docs, a self-contained page generated from it."""

import json
from collections.abc import Collection
from html import escape
from typing import Any

from fastapi import FastAPI

STATUS_MEANINGS = {
    400: "The request is invalid; the message states what is allowed.",
    401: "The API key is missing or unknown.",
    404: "The model, version, materialization or route does not exist.",
    405: "The route does not support the method.",
    408: "No token was generated within the time limit.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The queue is full; retry after the number of seconds in Retry-After.",
    500: "The server failed; the reason is in its log.",
    503: "The server or a service that it needs is not available; retry after the number of seconds in Retry-After.",
}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": TEXT_OR_NULL, "code": TEXT_OR_NULL},
        }
    },
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": 'The response. With "stream": true, server-sent events: chunks and a final [DONE], or an error event.',
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
    }
}
STYLE = "body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}td,th{text-align:left;padding-right:1em}"


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of a route's error responses."""
    schema = {"$ref": "#/components/schemas/Error"}
    return {status: {"description": STATUS_MEANINGS[status], "content": {"application/json": {"schema": schema}}} for status in statuses}


def describe(app: FastAPI, open_paths: Collection[str]) -> None:
    """Complete the OpenAPI schema of `app`: add the error schema and API keys, and remove 422, which this server never sends."""
    schema = app.openapi()
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "required if the server has API keys"}}
    for path, route in schema["paths"].items():
        for operation in route.values():
            operation["responses"].pop("422", None)
            if path in open_paths:
                del operation["responses"]["401"]
            else:
                operation["security"] = [{}, {"key": []}]


def page(schema: dict[str, Any]) -> str:
    """Return the reference as HTML: every route with its fields and responses."""
    out = [f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>acip: the API</title><style>{STYLE}</style><h1>The API</h1>"]
    out.append(f"<p>{escape(schema['info']['description'])} If the server has API keys, send <code>Authorization: Bearer KEY</code>. ")
    out.append("For programs: <a href=/openapi.json>openapi.json</a>. Every error is <code>")
    out.append(escape(json.dumps({"error": {"message": "", "type": "", "param": None, "code": ""}})) + "</code>.</p>")
    out += _table(("status", "meaning"), {str(status): meaning for status, meaning in STATUS_MEANINGS.items()})
    for path, route in schema["paths"].items():
        for method, operation in route.items():
            out.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}")
            out.append(f" Statuses: {', '.join(operation['responses'])}.</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = schema["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
            out += _table(("field", "value"), {name: field.get("description", "left out") for name, field in fields.items()})
    return "".join(out)


def _table(head: tuple[str, str], rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    lines = [f"<tr><td><code>{escape(str(name))}</code><td>{escape(text)}" for name, text in rows.items()]
    return [f"<table><tr><th>{head[0]}<th>{head[1]}", *lines, "</table>"]
