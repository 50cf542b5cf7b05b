"""Checks the sizes that a checkpoint file claims, before a library trusts them and allocates the memory.

Nothing here executes or decompresses anything. One rule covers decompression bombs of every format: the content of a
file is not larger than the file. No tool that writes checkpoints compresses or repeats tensors.
"""

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any, Protocol

MAX_HEADER_BYTES = 8_000_000  # of a safetensors file; ten times the labels of ImageNet-21k
MAX_DIRECTORY_BYTES = 8_000_000  # of a zip archive; an entry takes at least 46
MAX_PICKLE_BYTES = 64_000_000  # of the pickle in a zip archive, which does not include tensor data
MAX_STEPS = 2_000_000  # opcodes of a pickle; RedNet-152 with its optimizer's state takes 200,000
MAX_VALUES = 10_000_000  # values that a pickle may create, counting a reused one at every use

# The dtypes that `rednet.model.io.checkpoint` checks further. float8 and float4 would need scales.
SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}

PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
GET = {"GET", "BINGET", "LONG_BINGET"}
INTO_CONTAINER = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class UntrustedError(ValueError):
    """The file claims more than it contains, or is damaged. The message continues after the name of the file."""


class Readable(Protocol):
    """A file or a memory map."""

    def read(self, n: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads` that refuses duplicate keys, of which different readers use different ones."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise UntrustedError("has a duplicate entry in its header")
    return made


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file: its length, that names are unique, and the dtypes.

    The safetensors library checks offsets and shapes.

    Raises:
        UntrustedError: the header is damaged, too long, or has duplicate names or unsupported dtypes.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size - 8:
            raise UntrustedError("is damaged: it ends within its header")
        if length > MAX_HEADER_BYTES:
            raise UntrustedError(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        except UntrustedError:
            raise
        except (ValueError, RecursionError) as error:
            raise UntrustedError("is damaged: its header is not JSON") from error
    for name, tensor in header.items() if isinstance(header, dict) else ():
        if name != "__metadata__" and (not isinstance(tensor, dict) or tensor.get("dtype") not in SAFETENSORS_DTYPES):
            dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
            raise UntrustedError(f"has a tensor {name[:100]} of {str(dtype)[:20]}, which is not supported")


def check_archive(path: Path) -> None:
    """Check a zip archive of torch.save and the pickle in it.

    Raises:
        UntrustedError: the archive is damaged or compressed, or its entries overlap, share names or exceed the file.
        OSError: the file cannot be read.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedError("is compressed, unlike files of torch.save; it was not unpacked")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UntrustedError("is hostile: the entries of its archive are larger than the file")
            if len({entry.filename.casefold() for entry in entries}) < len(entries):
                raise UntrustedError("is hostile: two entries of its archive have the same name")
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        raise UntrustedError(
                            f"has a pickle of {entry.file_size} bytes; at most {MAX_PICKLE_BYTES} are allowed"
                        )
                    content = archive.read(entry)
                    check_pickle(io.BytesIO(content), len(content))
    except UntrustedError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UntrustedError("is damaged: its archive is broken") from error


def _check_directory(path: Path) -> None:
    """Check the end of a zip archive, so that zipfile and torch's reader use the same directory, and a small one.

    The archive must have no comment, and the directory must end where the end record begins; then no reader has to
    search or guess. (zipfile locates the directory by its size from the end, torch by its offset from the start.)
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 42))
        tail = file.read(42)
        end = size - 22
        short = directory, offset = (_number(tail[-10:-6]), _number(tail[-6:-2]))
        if tail[-42:-38] == b"PK\x06\x07":  # the zip64 end record is in front of it
            end = _number(tail[-34:-26])
            file.seek(min(end, size))
            record = file.read(56)
            if record[:4] != b"PK\x06\x06" or end + 56 != size - 42:
                raise UntrustedError("is damaged: its archive is broken")
            directory, offset = _number(record[40:48]), _number(record[48:56])
            if any(each not in (0xFFFFFFFF, long) for each, long in zip(short, (directory, offset), strict=True)):
                raise UntrustedError("is damaged: its archive is broken")
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0" or offset + directory != end:
        raise UntrustedError("is damaged: the end of its archive is missing or wrong")
    if directory > MAX_DIRECTORY_BYTES:
        raise UntrustedError(
            f"has an archive with a directory of {directory} bytes; at most {MAX_DIRECTORY_BYTES} are allowed"
        )


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")


def check_pickle(file: Readable, size: int) -> None:
    """Simulate a pickle without creating its objects, and refuse one that would expand far beyond its size.

    Three attacks are known: a short text that claims a huge length (`pickletools` finds it missing); a memo index far
    beyond the stored values, for which the C code allocates memory; and values that contain each other twice at every
    level, whose hash takes exponential time.

    Args:
        file: at the start of the pickle; afterwards at its end.
        size: of the file, in bytes.

    Raises:
        UntrustedError: the pickle is damaged or would expand.
    """
    try:
        _Machine(MAX_VALUES + 2 * size).run(file)
    except UntrustedError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UntrustedError("is damaged: its pickle is broken") from error


class _Machine:
    """The pickle machine with sizes instead of values. A size is a list of one number, because containers grow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stack: list[list[int]] = []
        self._marks: list[int] = []
        self._memo: dict[int, list[int]] = {}

    def run(self, file: Readable) -> None:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if steps > MAX_STEPS:
                raise UntrustedError(f"has a pickle of more than {MAX_STEPS} opcodes")
            index = argument if isinstance(argument, int) else 0  # in the memo; not all opcodes have one
            if opcode.name == "MARK":
                self._marks.append(len(self._stack))
            elif opcode.name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif opcode.name in PUT:
                if index > steps:
                    raise UntrustedError("is hostile: its pickle claims memory that it does not fill")
                self._memo[index] = self._stack[-1]
            elif opcode.name in GET:
                self._push(self._memo[index])
            else:
                self._step(opcode, argument)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        before = opcode.stack_before
        taken: list[list[int]] = []
        if pickletools.markobject in before:
            start = self._marks.pop()
            taken, self._stack[start:] = self._stack[start:], []
            before = before[: before.index(pickletools.markobject)]
        below = [self._stack.pop() for _ in before]
        size = 1 + sum(each[0] for each in (*taken, *below))
        if opcode.name in INTO_CONTAINER:
            below[-1][0] = size
            self._push(below[-1])
            return
        size += len(argument) if isinstance(argument, str | bytes | bytearray) else 0
        for _ in opcode.stack_after:
            self._push([size])

    def _push(self, size: list[int]) -> None:
        if size[0] > self._limit:
            raise UntrustedError("is hostile: its pickle expands without limit")
        self._stack.append(size)
