"""The OpenAPI document: FastAPI's, completed so that linters accept it and generators make usable clients from it."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from rednet.service.http.schemas import (
    EmbeddingsRequestBody,
    ErrorBody,
    ImagesBody,
    InferErrorBody,
    RepositoryIndexRequestBody,
)
from rednet.service.parsing.oip_schemas import InferBody

KEY = "HTTPBearer"  # FastAPI's name of the security scheme
REFERENCE = "#/components/schemas/{model}"
NEVER_SENT = ("HTTPValidationError", "ValidationError")  # FastAPI adds them; invalid parameters are 400 here
REQUEST_BODIES: tuple[type[BaseModel], ...] = (  # read without FastAPI
    ImagesBody,
    InferBody,
    EmbeddingsRequestBody,
    RepositoryIndexRequestBody,
)

REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "up to 128 visible ASCII characters, returned and logged; the server makes one if there is none",
    "schema": {"type": "string"},
}
TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "deadline of this request, in ms; after it the answer is 504 (default: --request-timeout-s)",
    "schema": {"type": "integer", "minimum": 1, "maximum": 3_600_000},
    "example": 2000,
}
RESPONSE_HEADERS = {
    "X-Request-Id": "the id of the request, as in the log",
    "Server-Timing": "duration of the stages, in ms",
    "Retry-After": "seconds after which to try again",
    "WWW-Authenticate": "`Bearer`",
}
ALWAYS = ("X-Request-Id", "Server-Timing")
BY_STATUS = {"401": ("WWW-Authenticate",), "429": ("Retry-After",), "503": ("Retry-After",)}


def operation_id(route: APIRoute) -> str:
    """The name of the function in generated clients. It is stable: it does not depend on paths."""
    return f"{route.name}_of_version" if "{version}" in route.path else route.name


def complete(app: FastAPI) -> dict[str, Any]:
    """The document of an application. Further calls return the same one."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for operations in document["paths"].values():
            for operation in operations.values():
                _complete_operation(operation)
        _add_components(document["components"])
    return app.openapi_schema or document


def _complete_operation(operation: dict[str, Any]) -> None:
    is_health = "health" in operation["tags"]
    operation.setdefault("security", [] if is_health else [{KEY: []}, {}])  # without keys, any request is accepted
    parameters = operation.setdefault("parameters", [])
    parameters.append({"$ref": "#/components/parameters/RequestId"})
    responses = operation["responses"]
    if NEVER_SENT[0] in str(responses.get("422")):
        del responses["422"]
    if "504" in responses:
        parameters.append({"$ref": "#/components/parameters/RequestTimeoutMs"})
    model = InferErrorBody if "v2" in operation["tags"] else ErrorBody
    responses.setdefault("400", _error(model, "malformed_request"))
    if operation["security"]:
        responses.setdefault("401", _error(model, "unauthorized, if the server requires an API key"))
    for status, response in responses.items():
        names = (*ALWAYS, *(() if is_health else BY_STATUS.get(status, ())))
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error(model: type[BaseModel], code: str) -> dict[str, Any]:
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"description": code, "content": {"application/json": {"schema": schema}}}


def _add_components(components: dict[str, Any]) -> None:
    schemas = components["schemas"]
    for name in NEVER_SENT:
        schemas.pop(name, None)
    for body in REQUEST_BODIES:
        described = body.model_json_schema(ref_template=REFERENCE)
        schemas.update(described.pop("$defs", {}))
        schemas[body.__name__] = described
    components["securitySchemes"] = {
        KEY: {"type": "http", "scheme": "bearer", "description": "a key of --api-key-file, if the server has one"}
    }
    components["parameters"] = {"RequestId": REQUEST_ID, "RequestTimeoutMs": TIMEOUT}
    components["headers"] = {
        name: {"description": text, "schema": {"type": "integer" if name == "Retry-After" else "string"}}
        for name, text in RESPONSE_HEADERS.items()
    }
