"""What a checkpoint file claims of itself, checked before a library believes it and takes the memory.

Nothing here executes or decompresses anything. One rule covers bombs of every format: what a file holds is no larger
than the file. Nothing that writes checkpoints compresses or repeats tensors.
"""

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any, Protocol

MAX_HEADER_BYTES = 8_000_000  # of a safetensors file: ten times the labels of ImageNet-21k
MAX_DIRECTORY_BYTES = 8_000_000  # of a zip archive, at least 46 for each of its entries
MAX_PICKLE_BYTES = 64_000_000  # of the pickle in a zip archive, which holds no tensor data
MAX_STEPS = 2_000_000  # of a pickle; RedNet-152 with its optimizer's state takes 200,000
MAX_VALUES = 10_000_000  # that a pickle may make, counting what is used again as often as it is used

# The dtypes that `rednet.model.io.checkpoint` goes on to check; float8 and float4 need scales that are not here.
SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}

PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
GET = {"GET", "BINGET", "LONG_BINGET"}
INTO_CONTAINER = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class UntrustedError(ValueError):
    """The file claims more than it holds, or is damaged. The message goes on after the name of the file."""


class Readable(Protocol):
    """A file or a memory map."""

    def read(self, n: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, refused where two of its entries have one key, of which readers see either."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise UntrustedError("has an entry twice in its header")
    return made


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file: its length, that names are unique, and the dtypes.

    Offsets and shapes are checked by the safetensors library.

    Raises:
        UntrustedError: the header cannot be what it says.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size - 8:
            raise UntrustedError("is damaged: it ends within its header")
        if length > MAX_HEADER_BYTES:
            raise UntrustedError(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        except UntrustedError:
            raise
        except (ValueError, RecursionError) as error:
            raise UntrustedError("is damaged: its header is not JSON") from error
    for name, tensor in header.items() if isinstance(header, dict) else ():
        if name != "__metadata__" and (not isinstance(tensor, dict) or tensor.get("dtype") not in SAFETENSORS_DTYPES):
            held = tensor.get("dtype") if isinstance(tensor, dict) else None
            raise UntrustedError(f"has a tensor {name[:100]} of {str(held)[:20]}, a type that is not read")


def check_archive(path: Path) -> None:
    """Check a zip archive as torch.save writes it, and the pickle in it.

    Raises:
        UntrustedError: it is damaged, compressed, or its entries overlap, share names or are larger than the file.
        OSError: it cannot be read.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedError("is compressed, which torch.save never does; it was not unpacked")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UntrustedError("is hostile: the entries of its archive are larger than the file")
            if len({entry.filename.casefold() for entry in entries}) < len(entries):
                raise UntrustedError("is hostile: two entries of its archive have one name")
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        raise UntrustedError(
                            f"has a pickle of {entry.file_size} bytes; at most {MAX_PICKLE_BYTES} are read"
                        )
                    content = archive.read(entry)
                    check_pickle(io.BytesIO(content), len(content))
    except UntrustedError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UntrustedError("is damaged: its archive is broken") from error


def _check_directory(path: Path) -> None:
    """Check the end of a zip archive, so that zipfile and torch's reader see the same directory, and a small one.

    Without a comment, and with the directory right before it: then no reader has to search or to guess. (zipfile
    takes the directory by its size from the end, torch by its offset from the start.)
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 42))
        tail = file.read(42)
        end = size - 22
        short = directory, offset = (_number(tail[-10:-6]), _number(tail[-6:-2]))
        if tail[-42:-38] == b"PK\x06\x07":  # the end in the format for large files lies before it
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
            f"has an archive with a directory of {directory} bytes; at most {MAX_DIRECTORY_BYTES} are read"
        )


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")


def check_pickle(file: Readable, size: int) -> None:
    """Follow a pickle up to its end without making anything, and refuse what would take much more than its size.

    Three ways are known: a short text that claims a huge length (which `pickletools` reads, and finds missing), a place
    in the memo far beyond what was stored, for which the C code takes memory, and values that hold one another twice,
    level by level: a tuple of such ones takes for ever to hash.

    Args:
        file: at the start of the pickle; left behind its end.
        size: of the file.

    Raises:
        UntrustedError: it is damaged or would grow.
    """
    try:
        _Machine(MAX_VALUES + 2 * size).run(file)
    except UntrustedError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UntrustedError("is damaged: its pickle is broken") from error


class _Machine:
    """The pickle machine with sizes instead of values. A size is a list of one number: containers grow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stack: list[list[int]] = []
        self._marks: list[int] = []
        self._memo: dict[int, list[int]] = {}

    def run(self, file: Readable) -> None:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if steps > MAX_STEPS:
                raise UntrustedError(f"has a pickle of more than {MAX_STEPS} steps")
            place = argument if isinstance(argument, int) else 0  # of the operations that have one
            if opcode.name == "MARK":
                self._marks.append(len(self._stack))
            elif opcode.name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif opcode.name in PUT:
                if place > steps:
                    raise UntrustedError("is hostile: its pickle claims memory that it does not fill")
                self._memo[place] = self._stack[-1]
            elif opcode.name in GET:
                self._push(self._memo[place])
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
            raise UntrustedError("is hostile: its pickle repeats what it holds without end")
        self._stack.append(size)
