"""Large request bodies of every shape that the parsers know: what a caller could send to hold the event loop."""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from rednet.service.parsing.bodies import BodyFormat
from tests.conftest import encoded, photo

PREDICT, FEATURES, EXPLAIN, EMBEDDINGS = "/v1/predict", "/v1/features", "/v1/explain", "/v1/embeddings"
INFER = "/v2/models/fake/infer"
PROTOCOLS: Mapping[str, Literal["v2", "embeddings"]] = {INFER: "v2", EMBEDDINGS: "embeddings"}  # of others: v1
JSON, FORM = "application/json", "multipart/form-data; boundary=frontier"
NOISE = np.random.default_rng(0).bytes(1_000_000)
PART = b'--frontier\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
END = b"\r\n--frontier--\r\n"
CHUNK = 65_536


class Sent(NamedTuple):
    """One request."""

    name: str
    path: str
    headers: dict[str, str]
    body: bytes
    chunk: int = 0  # bytes in each chunk of a chunked body; 0: it has a Content-Length

    @property
    def format(self) -> BodyFormat:
        """What its headers say about the body."""
        length = self.headers.get("Inference-Header-Content-Length")
        return BodyFormat(PROTOCOLS.get(self.path, "v1"), self.headers.get("Content-Type", ""), length)

    def raw(self) -> Iterator[bytes]:
        """The bytes of the request, in pieces."""
        length = {"Transfer-Encoding": "chunked"} if self.chunk else {"Content-Length": str(len(self.body))}
        fields = {"Host": "x", "X-Request-Timeout-Ms": "60000"} | self.headers | length
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "\r\n"]
        yield "\r\n".join(lines).encode("latin-1")
        if not self.chunk:
            for start in range(0, len(self.body), CHUNK):
                yield self.body[start : start + CHUNK]
            return
        per_piece = max(1, CHUNK // (self.chunk + 6))
        head = b"%x\r\n" % self.chunk
        for start in range(0, len(self.body), self.chunk * per_piece):
            piece = self.body[start : start + self.chunk * per_piece]
            whole = len(piece) - len(piece) % self.chunk
            parts = [head + piece[at : at + self.chunk] + b"\r\n" for at in range(0, whole, self.chunk)]
            if rest := piece[whole:]:
                parts.append(b"%x\r\n%b\r\n" % (len(rest), rest))
            yield b"".join(parts)
        yield b"0\r\n\r\n"


def noise(size: int) -> bytes:
    return (NOISE * (size // len(NOISE) + 1))[:size]


def filled(start: bytes, unit: bytes, end: bytes, size: int) -> bytes:
    """A body of about that size: a start, many times the unit, an end."""
    return start + unit * max(1, (size - len(start) - len(end)) // len(unit)) + end


def json_bodies(size: int) -> Iterator[tuple[str, bytes]]:
    yield "small integers", filled(b'{"images": ["AAAA"], "x": [', b"1,", b"1]}", size)
    yield "floats", filled(b'{"images": ["AAAA"], "x": [', b"0.12,", b"1]}", size)
    yield "integers for images", filled(b'{"images": [', b"1,", b"1]}", size)
    yield "one long number", filled(b'{"images": ["AAAA"], "x": ', b"1", b"}", size)
    yield "deep arrays", filled(b'{"images": ', b"[", b"", size)
    yield "many arrays", filled(b'{"images": ["AAAA"], "x": [', b"[],", b"[]]}", size)
    yield "many objects", filled(b'{"images": ["AAAA"], "x": [', b"{},", b"{}]}", size)
    yield "many strings", filled(b'{"images": ["', b'","', b'"]}', size)
    yield "many keys", filled(b"{", b'"a":1,', b'"images": ["AAAA"]}', size)
    yield "one long string", filled(b'{"images": ["', b"A", b'"]}', size - size % 4)
    yield "escaped letters", filled(b'{"images": ["', b"\\u0041", b'"]}', size)
    yield "a long unknown string", filled(b'{"images": ["AAAA"], "x": "', b"\\n", b'"}', size)
    yield "spaces", filled(b'{"images": ["AAAA"]', b" ", b"}", size)
    yield "broken at the end", filled(b'{"images": ["', b"A", b"\xff", size)
    lines = base64.encodebytes(noise(size * 3 // 4 * 70 // 78)).decode()
    yield "base64 in lines", json.dumps({"images": [lines]}).encode()
    yield "a data URL", filled(b'{"images": ["data:image/png;base64,', b"AAAA", b'"]}', size)
    text = base64.b64encode(noise(size * 3 // 4 // 256 - 16)).decode()
    yield "256 strings", json.dumps({"images": [text] * 256}).encode()


def embeddings_bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """The same bodies with the names of embeddings; what else they hold is an unknown field."""
    for name, body in json_bodies(size):
        yield name, body.replace(b'"images"', b'"model": "fake", "input"', 1)


def forms(size: int) -> Iterator[tuple[str, bytes]]:
    yield "one large part", PART + noise(size - 200) + END
    yield "256 parts", b"\r\n".join([PART + noise(size // 256 - 200)] * 256) + END
    yield "many empty parts", filled(b"", PART + b"\r\n", b"--frontier--\r\n", size)
    header = b'--frontier\r\nContent-Disposition: form-data; name="a"; filename="'
    yield "a long part header", filled(header, b"a", b'"\r\n\r\nphoto' + END, size)
    yield "many part headers", filled(PART[:-2], b"X-A: b\r\n", b"\r\nphoto" + END, size)
    yield "almost boundaries", filled(PART, b"\r\n--frontie", END, size)
    yield "line ends", filled(PART, b"\r\n", END, size)
    yield "a long preamble", filled(b"", b"x", PART + b"photo" + END, size)
    yield "no boundary at the end", PART + noise(size - 200)


def infer_json(size: int) -> Iterator[tuple[str, bytes]]:
    start = b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": ['
    yield "small integers", filled(start, b"1,", b"1]}]}", size)
    yield "floats", filled(start, b"0.1234567,", b"1]}]}", size)
    yield "nested arrays", filled(start, b"[1],", b"1]}]}", size)
    values = ",".join(["0.25"] * 3072).encode()
    count = min(256, size // len(values) - 1)
    pixels = b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [%d, 3, 32, 32], "data": [' % count
    yield "pixels", pixels + b",".join([values] * count) + b"]}]}"
    image = b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["'
    yield "one long string", filled(image, b"AAAA", b'"]}]}', size)
    sound = b'"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}]}'
    yield "a long id", filled(b'{"id": "', b"a", b'", ' + sound, size)
    yield "a long unknown list", filled(b'{"x": [', b"1,", b"1], " + sound, size)
    yield "many outputs", filled(b'{"outputs": [', b'{"name":"logits"},', b'{"name":"logits"}], ' + sound, size)
    yield "deep arrays", filled(b'{"inputs": ', b"[", b"", size)
    yield (
        "a long shape",
        filled(b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [', b"1,", b"1]}]}", size),
    )
    yield "a long name", filled(b'{"inputs": [{"name": "', b"a", b'"}]}', size)


def infer_binary(size: int) -> Iterator[tuple[str, dict[str, str], bytes]]:
    for count in (1, 256):
        each = noise(size // count - 400)
        tail = (struct.pack("<I", len(each)) + each) * count
        yield f"{count} binary images", *binary({"name": "image", "datatype": "BYTES", "shape": [count]}, tail)
    count = min(256, size // (3 * 32 * 32 * 4) - 1)
    pixels = np.zeros((count, 3, 32, 32), "<f4")
    for name, values in (("pixels", pixels), ("pixels that are not finite", pixels + np.nan)):
        tensor = {"name": "pixels", "datatype": "FP32", "shape": list(values.shape)}
        yield f"binary {name}", *binary(tensor, values.tobytes())
    sides = int((size / 12) ** 0.5) - 2
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, sides, sides]}
    yield "binary pixels of another size", *binary(tensor, bytes(12 * sides * sides))


def binary(tensor: Mapping[str, object], tail: bytes) -> tuple[dict[str, str], bytes]:
    header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}]}).encode()
    return {"Inference-Header-Content-Length": str(len(header))}, header + tail


def heads(size: int) -> Iterator[Sent]:
    """Heads that are nearly as long as they may be, with a small photo behind them."""
    body = encoded(photo())

    def sent(name: str, path: str = PREDICT, **fields: str) -> Sent:
        return Sent(f"head: {name}", path, {key.replace("_", "-"): value for key, value in fields.items()}, body)

    yield sent("a long header", X_Long="a" * size)
    yield sent("many headers", **{f"X-{index}": "b" for index in range(size // 12)})
    yield sent("a long Content-Type", Content_Type="image/" + "a" * size)
    yield sent("many parameters of Content-Type", Content_Type="multipart/form-data" + ";a=b" * (size // 4))
    yield sent("quotes in Content-Type", Content_Type='multipart/form-data; boundary="' + '\\"' * (size // 2) + '"')
    yield sent("many types in Accept", FEATURES, Accept="a/b;q=0.1," * (size // 10))
    yield sent("many parameters in Accept", FEATURES, Accept="a/b" + ";q=0.1" * (size // 6))
    yield sent("a long number of bytes", INFER, Inference_Header_Content_Length="9" * size)
    yield sent("a long timeout", X_Request_Timeout_Ms="9" * size)
    yield sent("a long id", X_Request_Id="a" * size)
    yield sent("a long key", Authorization="Bearer " + "a" * size)
    yield sent("a long query", f"{PREDICT}?top_k={'9' * size}")
    yield sent("many query parameters", f"{PREDICT}?{'a=b&' * (size // 4)}top_k=1")
    yield sent("an escaped query", f"{PREDICT}?a={'%41' * (size // 3)}")
    yield sent("a long path", "/" + "a" * size)
    yield sent("a path of many parts", "/a" * (size // 2))
    yield sent("an escaped path", "/" + "%41" * (size // 3))
    yield sent("a long class", f"{EXPLAIN}?class={'a' * size}")


def raw_images(size: int) -> Iterator[Sent]:
    image = {"Content-Type": "image/png"}
    png = encoded(photo()) + noise(size * 15 // 16)
    yield Sent("raw: a large image", PREDICT, image, png)
    yield Sent("raw: a large image in chunks of 8 kB", PREDICT, image, png, 8192)
    yield Sent("raw: a large image in chunks of 100 bytes", PREDICT, image, png[: size // 4], 100)
    yield Sent("raw: chunks of 1 byte", PREDICT, image, png[: size // 16], 1)
    yield Sent("raw: no image", PREDICT, {"Content-Type": "text/plain"}, bytes(size))
    yield Sent("raw: a body that is too large", PREDICT, image, bytes(size + size // 8))


def many_photos() -> Iterator[Sent]:
    """As many small photos as a request may hold: what they cost is the answer."""
    text = base64.b64encode(encoded(photo(0, 8, 8))).decode()
    body = json.dumps({"images": [text] * 256}).encode()
    as_json, npy = {"Content-Type": JSON}, {"Content-Type": JSON, "Accept": "application/x-npy"}
    yield Sent("many: classes", PREDICT, as_json, body)
    yield Sent("many: all classes", f"{PREDICT}?top_k=1000", as_json, body)
    yield Sent("many: features", FEATURES, as_json, body)
    yield Sent("many: features as an array", FEATURES, npy, body)
    yield Sent("many: explained", EXPLAIN, as_json | {"Accept": JSON}, body)
    images = {"model": "fake", "input": [text] * 256}
    yield Sent("many: embeddings", EMBEDDINGS, as_json, json.dumps(images).encode())
    yield Sent(
        "many: embeddings as base64", EMBEDDINGS, as_json, json.dumps(images | {"encoding_format": "base64"}).encode()
    )
    tensor = {"name": "image", "datatype": "BYTES", "shape": [256], "data": [text] * 256}
    yield Sent("many: infer", INFER, as_json, json.dumps({"inputs": [tensor]}).encode())


def corpus(size: int, head_size: int = 60_000) -> dict[str, Iterator[Sent]]:
    """Every request by its kind, each made when it is needed: together they take gigabytes."""
    return {
        "head": heads(head_size),
        "raw": raw_images(size),
        "many": many_photos(),
        "json": (Sent(f"json: {name}", PREDICT, {"Content-Type": JSON}, body) for name, body in json_bodies(size)),
        "embeddings": (
            Sent(f"embeddings: {name}", EMBEDDINGS, {"Content-Type": JSON}, body)
            for name, body in embeddings_bodies(size)
        ),
        "form": (Sent(f"form: {name}", PREDICT, {"Content-Type": FORM}, body) for name, body in forms(size)),
        "infer": (Sent(f"infer: {name}", INFER, {"Content-Type": JSON}, body) for name, body in infer_json(size)),
        "binary": (Sent(f"infer: {name}", INFER, fields, body) for name, fields, body in infer_binary(size)),
    }


KINDS = tuple(corpus(1000))
