"""Content negotiation: which of two media types a client prefers."""

import pytest

from rednet.service.http.routes.accept import prefers


@pytest.mark.parametrize(
    ("accept", "preferred"),
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
def test_accept_header_prefers_a_named_type_with_the_highest_quality(accept: str, preferred: bool) -> None:
    """The default type is sent unless the other one is named explicitly, with a quality at least as high."""
    assert prefers(accept, "application/json", "image/png") == preferred
