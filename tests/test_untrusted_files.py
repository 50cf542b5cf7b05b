"""Checkpoint files that claim more than they hold are rejected in little time and memory, in a separate process."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rednet import CheckpointError, load_checkpoint
from rednet.model.io.checkpoint import METADATA_KEY
from rednet.model.io.untrusted_files import UntrustedError, check_pickle
from tests.test_checkpoint import metadata
from tests.test_paddle import pdparams

MEMORY_BYTES = 300_000_000  # above what a process takes that has only imported the package
ADDRESS_SPACE_BYTES = 12_000_000_000  # limits a file that is not rejected
TIME_S = 20.0

LOAD = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from rednet import CheckpointError, load_checkpoint
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before, started = peak(), time.process_time()
try:
    load_checkpoint(sys.argv[1])
    said = "loaded"
except CheckpointError as error:
    said = str(error)
print(peak() - before, time.process_time() - started, said.encode("ascii", "backslashreplace").decode(), sep="|")
"""


def load_in_a_process(path: Path) -> str:
    """The result of `load_checkpoint` in a child process whose memory and time are limited."""
    command = [sys.executable, "-c", LOAD, str(path), str(ADDRESS_SPACE_BYTES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    memory, seconds, said = result.stdout.rstrip("\n").split("|", 2)
    assert int(memory) < MEMORY_BYTES, said
    assert float(seconds) < TIME_S, said
    return said


def state(tiny_path: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(tiny_path).net.state_dict())


def compressed(path: Path, tiny_path: Path) -> None:
    """2 MB that decompress to 2 GB."""
    torch.save({"state_dict": state(tiny_path)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        with archive.open("archive/data/999", "w", force_zip64=True) as bomb:
            for _ in range(2000):
                bomb.write(bytes(1_000_000))


def overlapping(path: Path, _: Path) -> None:
    """Stored entries that share their bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for index in range(50):
            archive.writestr(f"archive/data/{index}", bytes(10))
        for entry in archive.infolist():
            entry.file_size = entry.compress_size = 100_000_000
    path.write_bytes(content.getvalue())


def many_entries(path: Path, _: Path) -> None:
    """A directory of half a million entries."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")
    entry, end = whole[start : whole.index(b"PK\x05\x06")], bytearray(whole[-22:])
    directory = entry * 500_000
    end[12:16] = struct.pack("<I", len(directory))
    path.write_bytes(whole[:start] + directory + bytes(end))


def expanded(path: Path, tiny_path: Path) -> None:
    """A few numbers that claim to be a network of 65,536 channels."""
    tensors = state(tiny_path)
    tensors["head.fc.weight"] = torch.zeros(1).expand(60_000, 512)
    tensors["head.fc.bias"] = torch.zeros(1).expand(60_000)
    torch.save(tensors, path)


def one_storage(path: Path, tiny_path: Path) -> None:
    """Every tensor is a view of the same numbers."""
    tensors = state(tiny_path)
    largest = torch.zeros(max(tensor.numel() for tensor in tensors.values()))
    views = {key: largest[: each.numel()].view(each.shape) for key, each in tensors.items() if each.dim()}
    torch.save(views, path)


def memo(path: Path, _: Path) -> None:
    """Nine bytes with a large memo index, for which the C unpickler allocates a table of 4 GB."""
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")


def long_text(path: Path, _: Path) -> None:
    path.write_bytes(b"\x80\x04\x96" + struct.pack("<Q", 8_000_000_000) + b".")


def nested_tuples() -> bytes:
    """Sixty nested pairs of the same tuple: as the key of a dict, they take 2**60 steps to hash."""
    pairs = b"".join(b"q" + bytes([index]) + b"h" + bytes([index]) + b"\x86" for index in range(60))
    return b"\x80\x02})" + pairs + b"Ns."


def hashed(path: Path, _: Path) -> None:
    path.write_bytes(nested_tuples())


def hashed_in_zip(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", nested_tuples())
        archive.writestr("archive/version", b"3\n")


def hashed_legacy(path: Path, _: Path) -> None:
    head = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + nested_tuples())


def shared_arrays(path: Path, tiny_path: Path) -> None:
    """The bytes of one array, many times."""
    array = np.zeros(5_000_000, np.float32)
    content = pickle.dumps([array.tobytes()] * 3, 4)
    again = content[content.rindex(b"h") : content.rindex(b"h") + 2]
    path.write_bytes(content[: content.rindex(b"h")] + again * 100_000 + content[content.rindex(b"h") :])


def long_header(path: Path, _: Path) -> None:
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{" + b" " * 90_000_000)


def lists_in_header(path: Path, _: Path) -> None:
    text = b'{"a":' + b"[" * 7_000_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("make", "suffix", "message"),
    [
        (compressed, "pth", "is compressed, unlike files of torch.save"),
        (overlapping, "pth", "entries of its archive are larger than the file"),
        (many_entries, "pth", "directory of"),
        (expanded, "pth", "the tensors have"),
        (one_storage, "pth", "the tensors have"),
        (memo, "pdparams", "claims memory that it does not fill"),
        (long_text, "pdparams", "pickle is broken"),
        (hashed, "pdparams", "expands without limit"),
        (hashed_in_zip, "pth", "expands without limit"),
        (hashed_legacy, "pth", "expands without limit"),
        (shared_arrays, "pdparams", "expands without limit"),
        (long_header, "safetensors", "a header of 90000000 bytes"),
        (lists_in_header, "safetensors", "header is not JSON"),
    ],
)
def test_bomb_is_rejected_in_little_time_and_memory(
    make: Callable[[Path, Path], None], suffix: str, message: str, tiny_path: Path, tmp_path: Path
) -> None:
    """A clear error, within 300 MB and 20 s of CPU time."""
    path = tmp_path / f"bomb.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(path, tiny_path)
    assert message in load_in_a_process(path)


def test_pickles_of_valid_files_are_accepted() -> None:
    """Shared values are not a bomb: lists that contain one another, repeated text, and every protocol."""
    loop: list[Any] = ["x" * 100] * 1000
    loop.append(loop)
    for protocol in range(6):
        content = pickle.dumps([loop, {"a": (1, 2.5, None, True), "b": {1, 2}}, b"bytes", 1 << 70], protocol)
        check_pickle(io.BytesIO(content), len(content))
    with pytest.raises(UntrustedError, match="broken"):
        check_pickle(io.BytesIO(b"\x80\x04h\x05."), 5)


@pytest.mark.parametrize("suffix", ["pth", "legacy.pth", "pdparams"])
def test_valid_files_load_after_the_checks(suffix: str, tiny_path: Path, tmp_path: Path) -> None:
    """Every layout, with the state of an optimizer and other objects of training scripts."""
    path, tiny = tmp_path / f"x.{suffix}", load_checkpoint(tiny_path)
    if suffix == "pdparams":
        path.write_bytes(pickle.dumps(pdparams(tiny), 2))
    else:
        optimizer = {"state": {index: {"exp_avg": torch.zeros(10)} for index in range(200)}}
        content = {"state_dict": tiny.net.state_dict(), "optimizer": optimizer, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=suffix == "pth")
    assert torch.equal(load_checkpoint(path).net.head.fc.weight, tiny.net.head.fc.weight)


@pytest.mark.parametrize(
    "dtype", ["float4_e2m1fn_x2", "float8_e4m3fn", "float8_e8m0fnu", "complex64", "bool", "uint16", "quint8"]
)
def test_tensor_of_unsupported_dtype_raises_checkpoint_error(dtype: str, tiny_path: Path, tmp_path: Path) -> None:
    """The error names the tensor, whatever arithmetic its dtype lacks."""
    tensors, key = state(tiny_path), "backbone.layer2.0.conv3.weight"
    shape = tensors[key].shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype == "quint8":
            tensors[key] = torch.quantize_per_tensor(tensors[key], 0.1, 0, torch.quint8)
        else:
            kind = getattr(torch, dtype)
            tensors[key] = torch.zeros(tensors[key].numel() * kind.itemsize, dtype=torch.uint8).view(kind).view(shape)
        torch.save(tensors, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=rf"{key} is torch.{dtype}|no state dict of plain tensors"):
            load_checkpoint(tmp_path / "x.pth")
    if dtype != "quint8":
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=f"{key} (of|is)"):
            load_checkpoint(tmp_path / "x.safetensors")


def described(tiny_path: Path, path: Path, **changes: Any) -> Path:
    save_file(load_file(tiny_path), path, {METADATA_KEY: json.dumps(metadata(tiny_path) | changes)})
    return path


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": {"a": nested(150)}}, "nested more than 20 deep"),
        ({"provenance": {"a": 1 << 70}}, "more than 64 bits"),
        ({"name": "x" * 2000}, "a name has 2000 characters"),
        ({"labels": [["a", "b" * 2000]] * 5}, "a name has 2000 characters"),
        ({"name": "\udcff"}, "invalid description"),
        ({"preprocess": {"crop": 4096, "resize": 4096}}, "crop must be at most 1024"),
        ({"preprocess": {"crop": 64, "resize": 72, "std": [1e-320, 1, 1]}}, "std must be above 0"),
        ({"preprocess": {"crop": 64, "resize": 72, "mean": [10**400, 1, 1]}}, "invalid description"),
    ],
)
def test_metadata_that_would_break_responses_is_rejected(
    changes: dict[str, Any], message: str, tiny_path: Path, tmp_path: Path
) -> None:
    """When the file is read, not with every request."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(described(tiny_path, tmp_path / "x.safetensors", **changes))


def test_text_in_a_checkpoint_is_sanitised(tiny_path: Path, tmp_path: Path) -> None:
    """Control characters and line breaks are escaped, names are normalised to one spelling, and NaN becomes null."""
    path = described(
        tiny_path,
        tmp_path / "x.safetensors",
        name="a\nb\x1b[2J",
        labels=[["cafe\u0301", "\u202etxet"], *([str(index), "\x07"] for index in range(4))],
        provenance={"no\rte": ["\x9b", float("nan"), {"\x00": 1.5}]},
    )
    read = load_checkpoint(path)
    assert read.name == r"a\x0ab\x1b[2J"
    assert read.labels[0] == ("caf\u00e9", r"\u202etxet")
    assert read.labels[1].name == r"\x07"
    assert read.provenance == {r"no\x0dte": [r"\x9b", None, {r"\x00": 1.5}]}


def test_error_messages_quote_a_file_without_control_characters(tiny_path: Path, tmp_path: Path) -> None:
    """And not at length: names of tensors are the file's."""
    tensors = state(tiny_path) | {"\x1b[2J" + "x" * 100_000: torch.zeros(1)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x.pth")
    assert r"\x1b[2Jxxx" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def test_header_with_an_entry_twice_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    """Of which one reader would take the first, another the last."""
    whole = tiny_path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + length].rstrip()
    doubled = header[:-1] + b',"head.fc.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(doubled)) + doubled + whole[8 + length :])
    with pytest.raises(CheckpointError, match="has a duplicate entry"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_checkpoint_with_a_file_name_that_is_not_utf8(tiny_path: Path, tmp_path: Path) -> None:
    """Its name is escaped, so that every response can contain it."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/net\xff\n.pth"))
    torch.save(state(tiny_path), path)
    read = load_checkpoint(path)
    assert read.name == r"net\xff\x0a"
    assert read.provenance["converted from"] == r"net\xff\x0a.pth"


def test_pipe_as_checkpoint_is_rejected(tmp_path: Path) -> None:
    """Opening it would block until a writer opens it."""
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_a_damaged_byte_loads_or_raises_checkpoint_error(
    zipped: bool, tiny_path: Path, tmp_path: Path
) -> None:
    """In pickles, headers and directories."""
    path, generator = tmp_path / "x.pth", random.Random(7)
    torch.save(state(tiny_path), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.choice([generator.randrange(20_000), -generator.randrange(1, 5_000)])] = (
                generator.randrange(256)
            )
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 10


def test_checks_of_a_valid_file_are_cheap(tmp_path: Path, tiny_path: Path) -> None:
    """They take less CPU time than loading the tensors of a full-size network."""
    path = tmp_path / "x.pth"
    torch.save({f"layer{index}": torch.zeros(10) for index in range(2000)}, path)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="not a RedNet"):
        load_checkpoint(path)
    assert time.process_time() - started < 5
