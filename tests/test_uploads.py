"""Request bodies parsed into images."""

import base64
import binascii
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rednet.service.errors import MalformedRequest, PayloadTooLarge, UnsupportedMediaType
from rednet.service.parsing.uploads import parse_uploads
from rednet.service.types import Upload
from tests.conftest import encoded, photo

FORM = "multipart/form-data; boundary=frontier"


JSON = "application/json"
PHOTO = encoded(photo(), "JPEG")
PNG = encoded(photo(), "PNG")
END = b"--frontier--\r\n"


def images(content_type: str, body: bytes, max_images: int = 8) -> Sequence[Upload]:
    return parse_uploads(content_type, body, max_images).images


def part(content: bytes, disposition: str) -> bytes:
    return b"--frontier\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def test_every_file_of_a_form_is_an_image() -> None:
    """In order, whatever their names. Other fields and empty file inputs are ignored."""
    body = b"".join(
        (
            part(b"one", 'name="a"; filename="1.jpg"'),
            part(b"words", 'name="comment"'),
            part(b"", 'name="b"; filename=""'),
            part(b"two\r\n--frontie", 'name="c"; filename="2.jpg"'),
            b"--frontier--\r\n",
        )
    )
    parsed = parse_uploads(FORM, body, 8)
    assert parsed.images == [b"one", b"two\r\n--frontie"]
    assert parsed.ignored == ["comment"]


def test_large_form_files_stay_in_memory() -> None:
    """There is no temporary file, because the server's file system may be read-only."""
    content = bytes(range(256)) * 20_000
    assert images(FORM, part(content, 'name="a"; filename="a"') + b"--frontier--") == [content]


@given(st.sampled_from([FORM, "application/json", "multipart/form-data", ""]), st.binary(max_size=300))
def test_arbitrary_body_is_parsed_or_malformed(content_type: str, body: bytes) -> None:
    """Arbitrary bytes give images or a clear error."""
    with suppress(MalformedRequest, UnsupportedMediaType):
        assert images(content_type, body)


@given(st.binary(max_size=120), st.integers(0, 200))
def test_damaged_form_is_parsed_or_malformed(noise: bytes, position: int) -> None:
    """Noise anywhere in a valid form, including its headers."""
    body = part(b"one", 'name="a"; filename="1.jpg"') + b"--frontier--\r\n"
    with suppress(MalformedRequest, UnsupportedMediaType):
        assert images(FORM, body[:position] + noise + body[position:])


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (JSON, b'{"images": ["", "", ""]}'),
        (FORM, part(b"", 'name="a"; filename="a"') * 3 + b"--frontier--"),
        (FORM, part(PHOTO, 'name="a"') * 200 + b"never ends"),
    ],
)
def test_more_images_than_the_limit_are_rejected(content_type: str, body: bytes) -> None:
    """Forms with very many parts are rejected before all of them are parsed."""
    with pytest.raises(PayloadTooLarge, match="more than 2 images"):
        parse_uploads(content_type, body, 2)


def test_form_with_too_many_fields_is_rejected_before_its_end() -> None:
    """The error is about fields, not images."""
    with pytest.raises(PayloadTooLarge, match="more than 100 parts of the form are not images"):
        parse_uploads(FORM, part(b"", 'name="a"') * 200 + b"never ends", 2)


def test_json_list_of_invalid_images_is_one_short_error() -> None:
    """A small body must not become a long list of messages."""
    with pytest.raises(MalformedRequest, match=r"images\.0 is a number") as caught:
        images(JSON, b'{"images": [' + b"1," * 1000 + b"1]}", 2000)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "disposition",
    [
        'form-data; name="b"\r\nContent-Type: image/jpeg',
        'form-data; name="b"\r\nContent-Type: IMAGE/JPEG; x=y',
        'form-data; name="b"',
        'form-data;\r\n name="b";\r\n\tfilename="b.jpg"',
        "form-data; name=b; filename*=UTF-8''%D1%84.jpg",
        "form-data; name=b; filename*0*=UTF-8''%D1; filename*1*=%84.jpg",
        "attachment",
    ],
)
def test_form_part_that_is_an_image_is_read_with_or_without_filename(disposition: str) -> None:
    """By its content type, its first bytes or an extended file name. The order of the results does not change."""
    block = b"--frontier\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + PHOTO + b"\r\n"
    parsed = parse_uploads(FORM, block + part(PNG, 'name="a"; filename="a.png"') + END, 8)
    assert parsed.images == [PHOTO, PNG]
    assert parsed.ignored == []


def test_form_part_without_headers_is_read_by_its_first_bytes() -> None:
    """In any kind of multipart body."""
    body = b"--frontier\r\n\r\n" + PHOTO + b"\r\n--frontier\r\n\r\n--frontier--"
    for kind in ("multipart/form-data", "multipart/mixed", "Multipart/Related"):
        assert images(f'{kind}; boundary="frontier"', body) == [PHOTO]


def test_form_fields_of_base64_are_images_and_others_are_reported() -> None:
    """A data URL or base64 of an image is read. Names of other text fields are returned."""
    text = base64.b64encode(PHOTO)
    body = (
        part(text, 'name="a"')
        + part(b"DATA:image/jpeg;base64," + text, 'name="b"')
        + part(b"aGVsbG8gd29ybGQgaGVsbG8=", 'name="c"')
        + part(b"BMW", 'name="d"')
        + part(b"", 'name="e"')
        + part(b"{}", 'name="c"')
        + END
    )
    parsed = parse_uploads(FORM, body, 8)
    assert parsed.images == [PHOTO, PHOTO]
    assert parsed.ignored == ["c", "d"]


@pytest.mark.parametrize("encoding", ["base64", "BASE64", "quoted-printable", "binary", "8bit"])
def test_form_content_transfer_encoding_is_decoded(encoding: str) -> None:
    """As Python's standard library writes it."""
    lines, quoted = base64.encodebytes(PNG), binascii.b2a_qp(PNG, istext=False)
    content = {"base64": lines, "quoted-printable": quoted}.get(encoding.lower(), PNG)
    head = f'name="a"; filename="a"\r\nContent-Transfer-Encoding: {encoding}'
    assert images(FORM, part(content, head) + END) == [PNG]


@pytest.mark.parametrize("encoding", ["base64", "x-zip"])
def test_form_part_that_cannot_be_decoded_has_its_own_error(encoding: str) -> None:
    """The message names the part."""
    bad = part(b"%%%", f'name="bad"; filename="a"\r\nContent-Transfer-Encoding: {encoding}')
    first, second = images(FORM, bad + part(PHOTO, 'name="b"') + END)
    assert isinstance(first, MalformedRequest)
    assert "'bad'" in first.message
    assert second == PHOTO


GOOD = part(PHOTO, 'name="a"; filename="a"')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ((GOOD + END).replace(b"\r\n", b"\n"), "CR and LF"),
        (GOOD[:-2] + b"\n" + GOOD + END, "CR and LF"),
        (b"--frontier\n" + GOOD[12:] + GOOD + END, "CR and LF"),
        (b"--frontie\r\n" + GOOD[12:] + GOOD + END, "does not begin with the boundary"),
        (GOOD + END + GOOD + END, "goes on after its closing boundary"),
        (GOOD, "ends before its closing boundary"),
        (b"--frontier\r\n" + GOOD + END, "no empty line"),
        (b"--frontier\r\nno colon\r\n\r\nx\r\n" + END, "damaged header"),
        (part(PHOTO, 'name="a"\r\n' + "a: b\r\n" * 20 + "c: d") + END, "more than 16 headers"),
        (part(PHOTO, 'name="a"' + ";" * 40) + END, "more than 30 parameters"),
        (part(PHOTO, "x" * 9000) + END, "no empty line after its headers"),
        (part(b"x", 'name="a"\r\nContent-Type: multipart/mixed; boundary=b') + END, "form inside the form"),
        (part(b"text", 'name="word"') + END, "no image, only 'word'"),
        (b"--frontier--", "no image"),
        (part(b"\r\n--frontierx" * 200, 'name="a"') + END, "also occurs in its parts"),
    ],
)
def test_form_that_would_lose_an_image_is_malformed(body: bytes, message: str) -> None:
    """Nothing is silently ignored."""
    with pytest.raises(MalformedRequest, match=message):
        parse_uploads(FORM, body, 8)


def test_form_with_epilogue_padding_and_similar_delimiter_is_read() -> None:
    """RFC 2046 allows them, and clients send them."""
    body = b"\r\n" + part(b"a\r\n--frontiers", 'name="a"; filename="a"').replace(b"frontier\r", b"frontier \t\r")
    assert images(FORM, body + b"--frontier--\n\n the end") == [b"a\r\n--frontiers"]


SPELLINGS = {
    "lines": lambda data: base64.encodebytes(data).decode(),
    "crlf": lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "indented": lambda data: "\n    " + base64.encodebytes(data).decode().replace("\n", "\n\t  "),
    "final newline": lambda data: base64.b64encode(data).decode() + "\n",
    "unpadded": lambda data: base64.b64encode(data).decode().rstrip("="),
    "url-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "url-safe unpadded": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "data url": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "data url with parameters": lambda data: "DATA:;name=a.png;Base64," + base64.b64encode(data).decode() + " ",
}


@given(st.sampled_from(sorted(SPELLINGS)), st.binary(max_size=200))
def test_every_variant_of_base64_is_decoded(spelling: str, data: bytes) -> None:
    """The variants are defaults of common libraries."""
    assert images(JSON, json.dumps({"images": [SPELLINGS[spelling](data)]}).encode()) == [data]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "%%%",
            "A",
            "AAAAA",
            "AA=",
            "AA===",
            "A=AA",
            "AA==AAAA",
            "AAAA AAAA",
            "+AA-",
            "_AA/",
            "AAé=",
            "AA\0A",
        ),
        *("data:image/png,AAAA", "data:image/png;base64", "data:;base64,%%%%", "https://host/a-b.jpg", "AAAA\vAAAA"),
    ],
)
def test_invalid_base64_has_its_own_error(text: str) -> None:
    """No character is skipped, so damaged text is not decoded as an image."""
    bad, good = images(JSON, json.dumps({"images": [text, "AAAA"]}).encode())
    assert isinstance(bad, MalformedRequest)
    assert good == bytes(3)


@pytest.mark.parametrize("kind", ["application/vnd.api+json", "text/json;charset=utf-8", "APPLICATION/JSON ; x=y"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_is_read_with_every_json_type_and_unicode_encoding(kind: str, encoding: str) -> None:
    """Types that end in +json, byte order marks, and UTF-16 and UTF-32."""
    assert images(kind, '{"images": ["AAAA"], "é": 1}'.encode(encoding)) == [bytes(3)]


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        *((kind, b' {"images": []}', "Content-Type: application/json") for kind in ("", "text/plain", "image/png")),
        ("application/octet-stream", '"AAAA"'.encode("utf-16"), "Content-Type: application/json"),
        ("", GOOD + END, "multipart/form-data with the boundary"),
        ("application/x-www-form-urlencoded", b"image=@photo.jpg", "multipart/form-data"),
        ("image/jpeg", b"data:image/jpeg;base64,/9j/4AAQSkZJRgABAQ", "data URL"),
        ("image/jpeg", base64.encodebytes(PHOTO), "base64"),
        (JSON, PHOTO, "looks like an image"),
        (FORM, PHOTO, "looks like an image"),
        (FORM, b'{"images": []}', "looks like JSON"),
        ("multipart/form-data", PNG, "looks like an image"),
    ],
)
def test_body_of_another_type_than_declared_is_reported(content_type: str, body: bytes, message: str) -> None:
    """The message says what the body is and what to send, instead of "not an image"."""
    with pytest.raises(UnsupportedMediaType, match=message):
        parse_uploads(content_type, body, 8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["AAAA"], "not a list"),
        ("AAAA", "not a string"),
        (None, "not null"),
        (3, "not a number"),
        ({"image": "AAAA"}, "no field 'images' but 'image'"),
        ({"instances": [{"b64": "AAAA"}]}, "no field 'images' but 'instances'"),
        ({}, "no field 'images'"),
        ({"images": "AAAA"}, "images is a string"),
        ({"images": None}, "images is null"),
        ({"images": ["AAAA", {"b64": "AAAA"}]}, r"images\.1 is an object"),
        ({"images": []}, "no image"),
    ],
)
def test_json_that_does_not_match_the_schema_is_reported(value: Any, message: str) -> None:
    """The message names the expected and the found type."""
    with pytest.raises(MalformedRequest, match=message):
        parse_uploads(JSON, json.dumps(value).encode(), 8)


def test_unknown_json_fields_are_ignored() -> None:
    """They do not count as images."""
    extra = {f"tag{index}": f"value{index}" for index in range(2000)} | {"images": 1}
    body = json.dumps({"images": ["AAAA"], "meta": extra, "of": "images"}).encode()
    assert images(JSON, body, 1) == [bytes(3)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"images": ["AAAA"], "images": ["BBBB"]}', "'images' twice"),
        (b"[" * 100_000, "100000 lists and objects; at most"),
        (b'{"images": [], "a": ' + b"[" * 2000 + b"]" * 2000 + b"}", "cannot be read"),
        (b'{"images": ["AAAA"], "a": NaN}', "cannot be read"),
        (b'{"images": ["\\ud800"]}', "cannot be read"),
        (b'{"images": ["\xff"]}', "cannot be read"),
        (b"{\0", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_damaged_json_and_duplicate_keys_are_malformed(body: bytes, message: str) -> None:
    """The parser would drop one of two lists with the same key."""
    with pytest.raises(MalformedRequest, match=message):
        parse_uploads(JSON, body, 8)


def test_form_without_a_boundary_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is the client's mistake, and the response says so."""
    with pytest.raises(MalformedRequest, match="has no boundary"):
        parse_uploads("multipart/form-data", b"--x", 2)
    assert not caplog.records
