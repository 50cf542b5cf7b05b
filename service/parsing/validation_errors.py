"""Words Pydantic's validation errors for clients: its own messages name Python's types, and do not show the value."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

MAX_SHOWN_CHARS = 40  # of a value
JSON_TYPES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}
# What is expected, by the type of the error, from its context.
EXPECTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "bool_parsing": lambda _: "true or false",
    "bool_type": lambda _: "true or false",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "int_from_float": lambda _: "a whole number",
    "int_parsing": lambda _: "a whole number",
    "int_parsing_size": lambda _: "a whole number",
    "int_type": lambda _: "a whole number",
    "list_type": lambda _: "a list",
    "literal_error": lambda context: str(context["expected"]),
    "model_type": lambda _: "an object",
    "string_type": lambda _: "a string",
}
LENGTH: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "string_too_long": lambda context: f"at most {context['max_length']} characters",
    "too_long": lambda context: f"at most {_items(context['max_length'])}",
    "too_short": lambda context: f"at least {_items(context['min_length'])}",
}


def first_error(error: ValidationError) -> str:
    """Word the first error of a JSON body."""
    return worded(error.errors(include_url=False)[0])


def worded(error: Mapping[str, Any]) -> str:
    """The place of an error, what is expected there and what was found.

    Args:
        error: one of `ValidationError.errors()`, or of FastAPI's `RequestValidationError.errors()`.
    """
    place, kind, context = ".".join(map(str, error["loc"])) or "body", error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{place}: this field is required"
    if kind == "extra_forbidden":
        return f"{place}: there is no such field"
    if kind in LENGTH:
        return f"{place}: must have {LENGTH[kind](context)}"
    if kind in EXPECTED:
        return f"{place}: must be {EXPECTED[kind](context)}, not {_shown(error['input'])}"
    return f"{place}: {error['msg']}"


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_SHOWN_CHARS else f"{value[:MAX_SHOWN_CHARS]!r}..."
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else JSON_TYPES.get(type(value), "another type")
