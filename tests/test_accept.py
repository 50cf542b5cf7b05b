"""Which of two types a caller wants."""

import pytest

from rednet.service.http.routes.accept import prefers


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("image/png;q=0.5, application/json", True),
        ("application/json, image/png", True),
        ("application/json, text/plain, */*", True),
        ("image/*;q=0.5, application/json, */*", True),
        ("*/*, application/json;q=0.1", False),
        ("image/*, application/json;q=0.2", False),
        ("*/*", False),
        ("", False),
        ("application/jsonl", False),
        ("application/json;q=0", False),
        ("image/png, application/json;q=0.9", False),
    ],
)
def test_a_type_must_be_named_and_wanted_as_much(accept: str, wanted: bool) -> None:
    """Else the usual one is sent."""
    assert prefers(accept, "application/json", "image/png") == wanted
