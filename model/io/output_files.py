"""Files that are written: whole or not at all, by one process at a time, and over another file only if asked to."""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


LONGEST_SUFFIX = ".training.unfinished"  # of the files that are made beside an output


class OutputError(ValueError):
    """A file cannot be written without harm; the message says which and why."""


def check_output(path: Path, *, replace: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Check that a file can be written, before the work that it is to hold.

    Args:
        path: the file; a link stands for what it points to.
        replace: whether a file that is there may be replaced.
        inputs: files that are read meanwhile, which the output must not be.

    Raises:
        OutputError: it is there already, is an input, or is a device or the like.
        OSError: it cannot be created there.
    """
    target = path.resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: it must be a file in a folder that exists")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: its folder is read-only")
    with suppress(FileNotFoundError):
        target.with_name(target.name + LONGEST_SUFFIX).stat()  # fails where the name is too long for the file system
    for source in inputs:
        if source is not None and source.exists() and target.exists() and source.samefile(target):
            raise OutputError(f"{path} is an input of this command; name another file")
    _check_present(path, replace)


def write_atomically(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file that is never seen half-written, not even after a kill or on a full disk.

    Raises:
        OutputError: it is there already and may not be replaced, or another process is writing it.
        OSError: it cannot be written; what was there stays.
    """
    target = path.resolve()
    _check_present(path, replace)
    unfinished = target.with_name(target.name + ".unfinished")
    with locked(unfinished) as descriptor:
        try:
            os.ftruncate(descriptor, 0)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            _move(unfinished, target, path, replace)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # of a file that is open: a full disk
                error.filename = str(path)
            raise


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Open a file that no other process has open in this way; a killed process leaves the file, but no lock.

    Raises:
        OutputError: another process has it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{path} is in use: another process is writing there") from None
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its owner removed or renamed it between our opening and locking it
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_present(path: Path, replace: bool) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is not a regular file, and is not replaced")
    if not replace:
        raise OutputError(f"{path} exists; --force replaces it")


def _move(unfinished: Path, target: Path, path: Path, replace: bool) -> None:
    if replace:
        unfinished.replace(target)
        return
    try:
        os.link(unfinished, target)  # unlike a rename, fails where a file has come up meanwhile
    except FileExistsError:
        raise OutputError(f"{path} exists; --force replaces it") from None
    except OSError:  # a file system without hard links
        _check_present(path, replace)
        unfinished.replace(target)
    else:
        unfinished.unlink()


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
