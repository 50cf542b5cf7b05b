"""Writes files atomically, by one process at a time, and replaces existing files only on request."""

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRAINING_SUFFIX = ".training"  # of the file beside an output with the state of the training run that will write it
LONGEST_SUFFIX = f"{TRAINING_SUFFIX}.unfinished"  # the longest one that temporary files add to an output's name


class OutputError(ValueError):
    """A file must not be written. The message names it and the reason."""


def check_output(path: Path, *, replace: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Check that a file can be written, before hours of work are spent on its content.

    Args:
        path: the file; links are followed.
        replace: whether an existing file may be replaced.
        inputs: files that are read meanwhile; the output must be none of them.

    Raises:
        OutputError: the file exists, is one of the inputs, or is not a regular file.
        OSError: it cannot be created.
    """
    target = path.resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: it must be a file in a folder that exists")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: its folder is read-only")
    with suppress(FileNotFoundError):
        target.with_name(target.name + LONGEST_SUFFIX).stat()  # raises OSError if the name is too long
    for source in inputs:
        if source is not None and source.exists() and target.exists() and source.samefile(target):
            raise OutputError(f"{path} is an input of this command; name another file")
    _check_present(path, replace)


def write_atomically(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file so that a partial one is never visible, not even after a kill or on a full disk.

    Raises:
        OutputError: the file exists and must not be replaced, or another process is writing it.
        OSError: it cannot be written. An existing file is unchanged.
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
            publish(unfinished, path, replace=replace)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # of an open file, as when the disk is full
                error.filename = str(path)
            raise


def publish(unfinished: Path, path: Path, *, replace: bool) -> None:
    """Move a finished file to its name, from another one in the same folder.

    Raises:
        OutputError: the file exists and must not be replaced.
        OSError: it cannot be moved.
    """
    target = path.resolve()
    if replace:
        unfinished.replace(target)
        return
    try:
        os.link(unfinished, target)  # unlike a rename, fails if the file was created meanwhile
    except FileExistsError:
        raise OutputError(f"{path} exists; --force replaces it") from None
    except OSError:  # a file system without hard links
        _check_present(path, replace)
        unfinished.replace(target)
    else:
        unfinished.unlink()


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Create or open a file and hold an exclusive lock on it. A killed process leaves the file, but not the lock.

    Raises:
        OutputError: another process holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{path} is in use by another process") from None
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its owner removed or renamed it after we opened it, before we locked it
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
        raise OutputError(f"{path} is not a regular file, so it is not replaced")
    if not replace:
        raise OutputError(f"{path} exists; --force replaces it")


def _lock(descriptor: int) -> None:
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
