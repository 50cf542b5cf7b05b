"""Files of torch.save, in both layouts that it has had, read without executing them."""

import mmap
import pickle
import re
from pathlib import Path

import torch

from rednet.model.io.untrusted_files import UntrustedError, check_archive, check_pickle

ZIP = b"PK\x03\x04"
TORCH_PICKLE = b"\x80\x02\x8a\x0a"  # torch before 1.6 wrote pickles, a long magic number first
LEGACY_PICKLES = 5  # before the tensors: magic number, version, system, content, keys of the tensors
# What training scripts store beside weights: options, scores as NumPy's numbers, logs.
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
    """Stands in for an object that is not needed, whatever it was made of."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_file(path: Path) -> object:
    """The content of a `.pth` file: tensors, containers, text and numbers.

    Raises:
        UntrustedError: it is damaged, would take more memory than its size explains, or holds anything else.
        OSError: it cannot be read.
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
        # Torch's own text advises to load without its protection, which nobody should: only what it found is passed on.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it names {found[1]})" if found else ""
        raise UntrustedError(f"is damaged or holds more than tensors{what}; it was not loaded") from None
    except Exception as error:  # a damaged zip archive or pickle raises nearly anything
        raise UntrustedError(f"is damaged: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error
