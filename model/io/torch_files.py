"""Reads files of torch.save, in both the current and the legacy layout, without executing them."""

import mmap
import pickle
import re
from pathlib import Path

import torch

from rednet.model.io.untrusted_files import UntrustedError, check_archive, check_pickle

ZIP = b"PK\x03\x04"
TORCH_PICKLE = b"\x80\x02\x8a\x0a"  # torch before 1.6 wrote pickles, of which the first is a magic number
LEGACY_PICKLES = 5  # before the tensors: magic number, version, system, content, keys of the tensors
# Types that training scripts store next to weights: options, scores as NumPy numbers, logs.
IGNORED = (
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Int64DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)


class Ignored:
    """A stand-in for pickled objects whose contents are not needed."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(path: Path) -> object:
    """Return the content of a `.pth` file: tensors, containers, text and numbers.

    Raises:
        UntrustedError: the file is damaged, would expand in memory, or contains anything else.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == ZIP
    if zipped:
        check_archive(path)
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _ in range(LEGACY_PICKLES):
                check_pickle(content, len(content))
    try:
        with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's message advises loading with weights_only=False, which would execute the file. Keep only its finding.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it names {found[1]})" if found else ""
        raise UntrustedError(f"is damaged or contains more than tensors{what}; it was not loaded") from None
    except Exception as error:  # a damaged zip archive or pickle can raise anything
        raise UntrustedError(f"is damaged: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error
