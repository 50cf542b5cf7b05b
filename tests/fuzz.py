"""Coverage-guided fuzzing of all that meets hostile bytes: the image decoders and the parsers of bodies.

python -m tests.fuzz {decode,infer,grpc,uploads,embeddings} -max_total_time=600 [options of libFuzzer]

`make fuzz` runs all of them, for half an hour.

Anything but a named error for the caller is a finding, and so is an input that takes two seconds or grows memory by a
gigabyte. Findings are written to files named crash-* in the working directory.
"""

import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["PIL", "rednet"]):
    from rednet import Preprocess
    from rednet.service.decoding.decode import decode_image
    from rednet.service.errors import ServiceError
    from rednet.service.grpc.infer_messages import ModelInferRequest, parse_request
    from rednet.service.parsing.bodies import BodyLimits
    from rednet.service.parsing.embeddings import parse_embeddings
    from rednet.service.parsing.oip import parse_infer
    from rednet.service.parsing.uploads import parse_uploads

from tests.conftest import EVERY_FORMAT, encoded, photo
from tests.servers import FakeRunner, fake_network

LONGEST_S = 2.0
PREPROCESS = Preprocess(resize=40, crop=32)
MODEL = fake_network(FakeRunner()).description
CONTENT_TYPES = ("multipart/form-data; boundary=x", "application/json", "image/jpeg")


def decode(data: bytes) -> None:
    assert decode_image(data, PREPROCESS, 1_000_000).shape == (3, 32, 32)


def infer(data: bytes) -> None:
    """The first two bytes are the length of the JSON part; all ones: there is no header that says so."""
    length = int.from_bytes(data[:2], "little")
    asked = parse_infer(None if length == 0xFFFF else str(length), data[2:], 4)
    assert 1 <= len(asked.images) <= 4


def grpc(data: bytes) -> None:
    request = parse_request(memoryview(data), MODEL, BodyLimits(4, 2, 10.0))
    assert 1 <= len(request.body.images) <= 4


def uploads(data: bytes) -> None:
    kind = CONTENT_TYPES[data[0] % len(CONTENT_TYPES)] if data else ""
    assert 1 <= len(parse_uploads(kind, data[1:], 4).images) <= 4


def embeddings(data: bytes) -> None:
    assert 1 <= len(parse_embeddings(data, 4).images) <= 4


def seeds(target: Callable[[bytes], None]) -> list[bytes]:
    """Inputs that are right, to begin with."""
    photos = [encoded(photo(index, 60, 50), file_format) for index, file_format in enumerate(EVERY_FORMAT)]
    if target is decode:
        return [*photos, encoded(photo(9, 60, 50), "JPEG", progressive=True), encoded(photo(8, 60, 50).convert("P"))]
    if target is uploads:
        form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nphoto\r\n--x--\r\n'
        return [b"\0" + form, b'\1{"images": ["AAAA", "data:image/png;base64,AAAA"]}', b"\2photo"]
    if target is embeddings:
        return [b'{"model": "fake", "input": ["data:image/png;base64,AAAA"], "encoding_format": "base64"}']
    tail = struct.pack("<I", 5) + b"photo"
    if target is grpc:
        named: dict[str, Any] = {"model_name": "fake", "id": "1", "outputs": [{"name": "logits"}]}
        image = {"name": "image", "datatype": "BYTES", "shape": [1]}
        pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 2, 2]}
        messages: list[dict[str, Any]] = [
            {"inputs": [image], "raw_input_contents": [tail]},
            {"inputs": [image | {"contents": {"bytes_contents": [b"photo"]}}]},
            {
                "inputs": [pixels | {"contents": {"fp32_contents": [0.5] * 12}}],
                "parameters": {"x": {"double_param": 1}},
            },
        ]
        return [ModelInferRequest(**named, **each).SerializeToString() for each in messages]
    binary = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 9}}]}
    plain = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}], "id": "1"}
    header = json.dumps(binary).encode()
    return [len(header).to_bytes(2, "little") + header + tail, b"\xff\xff" + json.dumps(plain).encode()]


def main() -> None:
    target = {"decode": decode, "infer": infer, "grpc": grpc, "uploads": uploads, "embeddings": embeddings}[
        sys.argv.pop(1)
    ]

    def run(data: bytes) -> None:
        started = time.process_time()  # a busy machine is no finding
        with suppress(ServiceError):
            target(data)
        took_s = time.process_time() - started
        assert took_s < LONGEST_S, f"{took_s:.1f} s"

    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(seeds(target)):
            (Path(corpus) / str(index)).write_bytes(seed)
        atheris.Setup([*sys.argv, "-max_len=20000", "-rss_limit_mb=2000", "-timeout=100", corpus], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
