"""The endpoints of the HTTP API and its JSON, from the OpenAPI document."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

from docs_tools.markdown import plain, table
from rednet.service.http.app import create_app
from rednet.service.settings import Settings

OURS = "#/components/schemas/"
NEVER_SENT = "HTTPValidationError"  # FastAPI adds it wherever a path has a parameter; our errors replace it

HTTP_PHRASES = ("Successful Response", "Service Unavailable")  # FastAPI's, where we have none


@cache
def openapi() -> Mapping[str, Any]:
    """The document. It does not depend on the network that is served."""
    return create_app(Settings(), cast("Any", SimpleNamespace(metrics=None))).openapi()


def endpoints() -> str:
    """A section for each endpoint."""
    return "\n\n".join(
        "\n\n".join(_endpoint(method, path, described))
        for path, methods in openapi()["paths"].items()
        for method, described in methods.items()
        if "{version}" not in path
    )


def schemas() -> str:
    """A section for each object in JSON."""
    return "\n\n".join(_schema(name, schema) for name, schema in sorted(_schemas().items()))


def paths() -> set[str]:
    """The paths of all endpoints."""
    return set(openapi()["paths"])


def parameter_names() -> set[str]:
    """The query parameters of all endpoints."""
    operations = (operation for methods in openapi()["paths"].values() for operation in methods.values())
    return {each["name"] for operation in operations for each in operation["parameters"] if each.get("in") == "query"}


def _schemas() -> dict[str, Mapping[str, Any]]:
    """The objects of responses, and of requests, by name."""
    all_of_them: dict[str, Mapping[str, Any]] = openapi()["components"]["schemas"]
    return {name: each for name, each in all_of_them.items() if name not in (NEVER_SENT, "ValidationError")}


def _endpoint(method: str, path: str, described: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield described["description"]
    # Headers of many endpoints are references, and have a section of their own.
    parameters = [each for each in described["parameters"] if each.get("in") == "query"]
    rows = (
        (
            f"`{each['name'].title() if each['in'] == 'header' else each['name']}`",
            each["in"],
            _type(each["schema"]),
            _default(each["schema"]),
            plain(each.get("description", "")),
        )
        for each in parameters
    )
    if parameters:
        yield table(("parameter", "in", "type", "default", "meaning"), rows)
    contents = described.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in contents:
        yield "Request body: [images](#images)."
    elif contents:
        yield from _body(contents)
    yield from _responses(described["responses"])


def _body(contents: Mapping[str, Any]) -> Iterator[str]:
    json_body = contents["application/json"]
    yield "Request body, JSON:"
    yield f"{_type(json_body['schema'])}."
    if "example" in json_body:
        yield f"```json\n{json.dumps(json_body['example'], indent=2)}\n```"
    if "application/octet-stream" in contents:
        yield "Or the same, followed by [binary data](open-inference.md#binary-data)."


def _responses(responses: Mapping[str, Any]) -> Iterator[str]:
    rows, errors = [], {}
    for status, response in sorted(responses.items()):
        contents = response.get("content", {})
        kinds = {media_type: _type(content.get("schema", {})) for media_type, content in contents.items()}
        if any("ErrorBody]" in kind for kind in kinds.values()):
            errors[status] = kinds["application/json"]
        elif NEVER_SENT not in str(contents):
            shown = ", ".join(
                f"`{media_type}`{f': {kind}' if '](' in kind else ''}" for media_type, kind in kinds.items()
            )
            meaning = "" if response["description"] in HTTP_PHRASES else response["description"]
            rows.append((status, shown or "text", plain(meaning)))
    yield table(("status", "body", "meaning"), rows)
    if errors:
        yield f"[Errors](errors.md), as {next(iter(errors.values()))}: {', '.join(errors)}."


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    described = [schema["description"]] if "description" in schema else []
    return "\n\n".join([f"### {name}", *described, _fields(schema)])


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        (
            f"`{name}`",
            _type(field),
            _default(field) or ("" if name in required else "absent"),
            plain(field.get("description", "")),
        )
        for name, field in schema["properties"].items()
    )
    return table(("field", "type", "default", "meaning"), rows)


def _default(schema: Mapping[str, Any]) -> str:
    return f"`{json.dumps(schema['default']).strip(chr(34))}`" if schema.get("default") is not None else ""


def _type(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"$ref": str(reference)}:
            name = reference.removeprefix(OURS)
            shown = f"[{name}](#{name.lower()})"
        case {"anyOf": several}:
            shown = " or ".join(map(_type, several))
        case {"enum": values}:
            shown = ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            shown = f"`{value}`"
        case {"type": "array", "items": item}:
            shown = f"array of {_type(item)}"
        case {"format": "binary"}:
            shown = "bytes"
        case {"type": kind, "minimum": least}:
            shown = f"{kind}, at least {least}"
        case _:
            shown = str(schema.get("type", ""))
    return shown
