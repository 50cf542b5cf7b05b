"""The parser process for large bodies: the same results, its limits, and restarts."""

import asyncio
import base64
import json
import os
import signal
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from rednet.service.errors import NotReady, PayloadTooLarge, ServiceError
from rednet.service.parsing import parser as parser_module
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, InferOptions, ParsedBody
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_parser import parse_body
from rednet.service.parsing.parser import Parser
from tests.body_corpus import FORM, JSON, PART, corpus
from tests.servers import PATIENCE_S

Result = TypeVar("Result")
LIMITS = BodyLimits(max_images=256, side=32, max_abs_pixel=10.0)
JSON_FORMAT = BodyFormat("v1", JSON)
PHOTO = base64.b64encode(b"photo").decode()
BODY = json.dumps({"images": [PHOTO]}).encode()


def with_parser(work: Callable[[Parser], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        parser = Parser()
        try:
            return await work(parser)
        finally:
            parser.close()

    return asyncio.run(run())


@asynccontextmanager
async def in_file(body: bytes) -> AsyncIterator[BodyFile]:
    file = BodyFile()
    file.append(body)
    yield file
    file.close()


def plain(parsed: ParsedBody) -> dict[str, object]:
    """A copy of all fields as values that can be compared."""
    images: list[object] = []
    for image in parsed.images:
        match image:
            case np.ndarray():
                images.append((image.shape, image.tobytes()))
            case ServiceError():
                images.append(image.message)
            case _:
                images.append(bytes(image))
    return {each.name: getattr(parsed, each.name) for each in fields(parsed)} | {"images": images}


PLAIN = plain(ParsedBody([b"photo"]))  # of BODY


async def parsed_in_process(parser: Parser, body_format: BodyFormat, body: bytes) -> object:
    async with in_file(body) as file:
        try:
            return plain(await parser.parse(body_format, file, LIMITS))
        except ServiceError as error:
            return type(error), error.message


def parsed_here(body_format: BodyFormat, body: bytes) -> object:
    try:
        return plain(parse_body(body_format, body, LIMITS))
    except ServiceError as error:
        return type(error), error.message


def test_parser_process_gives_the_results_of_parse_body() -> None:
    """For bodies of every format: the same images, options and errors."""

    async def compare(parser: Parser) -> int:
        count = 0
        for sent in chain.from_iterable(corpus(300_000, 1000).values()):
            there = await parsed_in_process(parser, sent.format, sent.body)
            assert there == parsed_here(sent.format, sent.body), sent.name
            count += 1
        return count

    assert with_parser(compare) > 40


def test_raw_image_is_not_parsed_in_the_process() -> None:
    """A raw image of any size is a view of the file or of the memory."""

    async def check(parser: Parser) -> None:
        async with in_file(b"x" * 1_000_000) as file:
            parsed = parser.parse_quickly(BodyFormat("v1", "image/png"), file, LIMITS)
            assert parsed
            (image,) = parsed.images
            assert isinstance(image, memoryview)
            assert image == b"x" * 1_000_000
            image.release()
            assert parser.parse_quickly(JSON_FORMAT, file, LIMITS) is None
        assert plain(parser.parse_quickly(JSON_FORMAT, BODY, LIMITS) or pytest.fail("it is small")) == PLAIN

    with_parser(check)


@pytest.mark.parametrize(
    ("body_format", "body"),
    [
        (JSON_FORMAT, b'{"images": [' + b'"",' * 6000 + b'""]}'),
        (BodyFormat("v1", FORM), (PART + b"\r\n") * 256),
        (BodyFormat("v2"), b'{"x": [' + b"[1]," * 6000 + b"1]}"),
    ],
)
def test_small_body_that_is_costly_to_parse_goes_to_the_process(body_format: BodyFormat, body: bytes) -> None:
    """It has thousands of values or dozens of parts, whatever its size."""

    async def check(parser: Parser) -> None:
        assert parser.parse_quickly(body_format, body, LIMITS) is None
        try:
            there: object = plain(await parser.parse(body_format, body, LIMITS))
        except ServiceError as error:
            there = type(error), error.message
        assert there == parsed_here(body_format, body)

    with_parser(check)


def test_infer_options_cross_the_process_boundary() -> None:
    """Together with binary images."""
    tail = struct.pack("<I", 3) + b"abc"
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    parameters = {"binary_data_output": True}
    header = json.dumps({"inputs": [tensor], "id": "é7", "outputs": outputs, "parameters": parameters}).encode()

    async def check(parser: Parser) -> None:
        found = await parsed_in_process(parser, BodyFormat("v2", "", str(len(header))), header + tail)
        assert found == plain(ParsedBody([b"abc"], InferOptions("é7", {"logits": True}, binary=True)))

    with_parser(check)


def limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **constants: int) -> None:
    """Start parser processes with other limits, which pause while a file `pause` exists."""
    lines = ["import rednet.service.parsing.worker as p"]
    lines += [f"p.{name} = {value}" for name, value in constants.items()]
    lines += ["p.main()"]
    (tmp_path / "limited_parser.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    start = parser_module.Parser.__init__

    def changed(parser: Parser) -> None:
        start(parser)
        parser._command[3] = "limited_parser"

    monkeypatch.setattr(parser_module.Parser, "__init__", changed)


def test_body_that_takes_too_long_to_parse_is_413(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CPU limit ends its process, and the next body is parsed."""
    limited(monkeypatch, tmp_path, CPU_S=1, BYTES_PER_CPU_S=10**12, MEMORY_BYTES=8 * 10**9)

    async def check(parser: Parser) -> None:
        started = time.monotonic()
        body = b'{"images": ["AAAA"], "x": [' + b'"a",' * 30_000_000 + b"1]}"
        error = await parsed_in_process(parser, JSON_FORMAT, body)
        assert error == (PayloadTooLarge, "the body takes too long to parse"), time.monotonic() - started
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


def test_body_that_takes_too_much_memory_to_parse_is_413(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next body is parsed."""
    limited(monkeypatch, tmp_path, MEMORY_BYTES=30_000_000, MEMORY_PER_BYTE=1)

    async def check(parser: Parser) -> None:
        body = b'{"inputs": [{"name": "pixels", "data": [' + b"1," * 10_000_000 + b"1]}]}"
        error = await parsed_in_process(parser, BodyFormat("v2"), body)
        assert isinstance(error, tuple)
        assert error[0] is PayloadTooLarge
        assert error[1].startswith("the body takes too much memory to parse")  # orjson crashes if an allocation fails
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


SLOW = b'{"images": ["AAAA"], "x": [' + b"1," * 14_000_000 + b"1]}"


async def child_of(parser: Parser, seen: Container[int] = ()) -> int:
    """The process that parses a body now, except for those in `seen`."""

    def others() -> list[int]:
        return [child for child in children(parser._process.pid) if child not in seen] if parser._process else []

    await until(lambda: bool(others()))
    return others()[0]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def killed(parser: Parser, times: int, signum: signal.Signals = signal.SIGKILL) -> object:
    """The result of a body whose process is killed several times."""
    seen = (
        set(children(parser._process.pid)) if parser._process else set()
    )  # processes of earlier bodies, which are about to be reaped
    task = asyncio.create_task(parsed_in_process(parser, JSON_FORMAT, SLOW))
    for _ in range(times):
        seen.add(child := await child_of(parser, seen))
        os.kill(child, signum)
    return await task


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc, which is not here")
def test_body_is_retried_once_when_its_parser_is_killed() -> None:
    """The system may have killed it for lack of memory, so the body may be valid. The second time it is 503 with Retry-
    After."""

    async def check(parser: Parser) -> None:
        assert await killed(parser, 1) == plain(ParsedBody([bytes(3)]))
        error = await killed(parser, 2)
        assert error == (NotReady, "the process that parsed the body was killed; try again")
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc, which is not here")
@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT])
def test_body_that_crashes_its_parser_is_not_retried(signum: signal.Signals) -> None:
    """The error says so."""

    async def check(parser: Parser) -> None:
        assert await killed(parser, 1, signum) == (
            PayloadTooLarge,
            "the body takes too much memory to parse, or crashes the parser",
        )
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc, which is not here")
def test_parser_process_that_has_ended_is_replaced() -> None:
    """If it ends while parsing, the body is retried."""

    async def check(parser: Parser) -> None:
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN
        assert parser._process
        parser._process.kill()
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


def test_parser_process_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed after a timeout, and the body is retried."""

    async def check(parser: Parser) -> None:
        await parsed_in_process(parser, JSON_FORMAT, BODY)
        stopped = parser._process
        assert stopped
        stopped.send_signal(signal.SIGSTOP)
        end = parser._end

        def end_patiently() -> None:  # the next process must have started
            monkeypatch.setattr(parser_module, "REPLY_TIMEOUT_S", PATIENCE_S)
            end()

        monkeypatch.setattr(parser, "_end", end_patiently)
        monkeypatch.setattr(parser_module, "REPLY_TIMEOUT_S", 0.2)
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN
        assert stopped.poll() == -signal.SIGKILL

    with_parser(check)


def test_parser_that_cannot_be_started_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without memory for a process continues to run."""
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    async def check(parser: Parser) -> None:
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == (
            NotReady,
            "large bodies cannot be parsed now; try again later",
        )

    with_parser(check)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc, which is not here")
def test_cancelled_parse_ends_its_process() -> None:
    """A disconnected client must not occupy a core or the parser."""

    async def check(parser: Parser) -> None:
        for _ in range(3):
            task = asyncio.create_task(parsed_in_process(parser, JSON_FORMAT, SLOW))
            child = await child_of(parser)
            task.cancel()
            await asyncio.wait([task])
            await until(lambda gone=child: parser._process is None or gone not in children(parser._process.pid))  # type: ignore[misc]
        assert await parsed_in_process(parser, JSON_FORMAT, BODY) == PLAIN

    with_parser(check)


def test_waiting_bodies_are_parsed_smallest_first() -> None:
    """Small bodies do not wait behind large ones that wait, too."""

    async def check(parser: Parser) -> None:
        order: list[str] = []

        async def parse(name: str, body: bytes) -> None:
            await parsed_in_process(parser, JSON_FORMAT, body)
            order.append(name)

        slow = [asyncio.create_task(parse("slow", SLOW)) for _ in range(4)]
        await asyncio.sleep(0)
        await asyncio.create_task(parse("small", BODY))
        await asyncio.gather(*slow)
        assert order.index("small") <= 2

    with_parser(check)


def test_close_ends_all_parser_processes() -> None:
    """The parser's process and those that it has forked."""

    async def check(parser: Parser) -> None:
        task = asyncio.create_task(parsed_in_process(parser, JSON_FORMAT, SLOW))
        child = await child_of(parser)
        parser.close()
        await until(lambda: not Path(f"/proc/{child}").exists())
        await asyncio.wait([task])

    with_parser(check)
