"""Request bodies to images."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.errors import MalformedRequest, PayloadTooLarge
from service.schemas import ImagesBody
from service.uploads import parse_uploads

FORM = "multipart/form-data; boundary=frontier"


def part(content: bytes, disposition: str) -> bytes:
    return b"--frontier\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def test_every_file_of_a_form_is_an_image() -> None:
    """In order, whatever their names; fields without a file and inputs left empty are passed over."""
    body = b"".join(
        (
            part(b"one", 'name="a"; filename="1.jpg"'),
            part(b"words", 'name="comment"'),
            part(b"", 'name="b"; filename=""'),
            part(b"two\r\n--frontie", 'name="c"; filename="2.jpg"'),
            b"--frontier--\r\n",
        )
    )
    assert parse_uploads(FORM, body, 8) == [b"one", b"two\r\n--frontie"]


def test_large_files_stay_in_memory() -> None:
    """No temporary file: the server's file system may be read-only."""
    content = bytes(range(256)) * 20_000
    assert parse_uploads(FORM, part(content, 'name="a"; filename="a"') + b"--frontier--", 8) == [content]


@given(st.sampled_from([FORM, "application/json", "multipart/form-data", ""]), st.binary(max_size=300))
def test_no_body_breaks_the_parser(content_type: str, body: bytes) -> None:
    """Arbitrary bytes are images or a clear error."""
    with suppress(MalformedRequest):
        assert parse_uploads(content_type, body, 8)


@given(st.binary(max_size=120), st.integers(0, 200))
def test_no_damaged_form_breaks_the_parser(noise: bytes, position: int) -> None:
    """Noise in the middle of a good form, its headers included."""
    body = part(b"one", 'name="a"; filename="1.jpg"') + b"--frontier--\r\n"
    with suppress(MalformedRequest):
        assert parse_uploads(FORM, body[:position] + noise + body[position:], 8)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"images": ["", "", ""]}'),
        ("application/json", b'{"images": [' + b'"",' * 1000),
        (FORM, part(b"", 'name="a"; filename="a"') * 3 + b"--frontier--"),
        (FORM, part(b"", 'name="a"') * 200 + b"never ends"),
    ],
)
def test_more_images_than_the_server_holds_are_refused(content_type: str, body: bytes) -> None:
    """And so are forms of very many parts, before all of them are parsed."""
    with pytest.raises(PayloadTooLarge, match="more than 2 images"):
        parse_uploads(content_type, body, 2)


def test_a_list_full_of_errors_is_one_error() -> None:
    """A small body must not become a large list of messages."""
    with pytest.raises(ValidationError) as caught:
        ImagesBody.model_validate_json(b'{"images": [' + b"1," * 1000 + b"1]}")
    assert caught.value.error_count() == 1


def test_a_form_without_a_boundary_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It is the caller's mistake, and the caller is told."""
    with pytest.raises(MalformedRequest, match="names no boundary"):
        parse_uploads("multipart/form-data", b"--x", 2)
    assert not caplog.records
