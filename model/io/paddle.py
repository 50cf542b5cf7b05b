"""Reads the weights that PaddleClas published: `.pdparams`, a pickled dict of NumPy arrays. Nothing in it is executed.

A pickle is a program that calls the functions it names. Here each accepted name is mapped to a harmless record of the
call, any other name is refused, and arrays are made afterwards from valid records.
"""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rednet.model.io.untrusted_files import UntrustedError, check_pickle

NOT_TENSORS = "StructuredToParameterName@@"  # an entry with Paddle's internal names
RENAMED = {"_mean": "running_mean", "_variance": "running_var"}
DTYPES = ("f2", "f4", "f8", "i4", "i8")


class PaddleError(ValueError):
    """The file contains other things than arrays, or is damaged."""


@dataclass(eq=False)
class _Dtype:
    """Replaces `numpy.dtype(code, align, copy)`."""

    code: str
    order: str = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def resolve(self) -> np.dtype[Any]:
        if self.code not in DTYPES or self.order not in ("<", "|", "="):
            raise PaddleError(f"it has an array of {self.order}{self.code}, not of plain numbers")
        return np.dtype(f"<{self.code}")


class _Array:
    """Replaces a NumPy array."""

    shape: tuple[int, ...] = ()
    dtype: Any = None
    fortran = False
    content: Any = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def resolve(self) -> Tensor:
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.content, bytes | bytearray):
            raise PaddleError("it has an array of objects, not of plain numbers")
        dtype = self.dtype.resolve()
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise PaddleError(f"it has an array of shape {self.shape}")
        if math.prod(self.shape) * dtype.itemsize != len(self.content):
            raise PaddleError(f"it has an array of shape {list(self.shape)} in {len(self.content)} bytes")
        numbers = np.frombuffer(self.content, dtype).reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(numbers.copy())


def _dtype(code: str, align: object = False, copy: object = False) -> _Dtype:
    return _Dtype(code)


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _from_buffer(content: object, dtype: object, shape: tuple[int, ...], order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes that pickles up to protocol 2 store as text."""
    return text.encode("latin1")


_STAND_INS: Mapping[str, Callable[..., object]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": dict,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get(f"{module}.{name}")
        if found is None:
            raise PaddleError(f"it contains more than tensors (it names {module}.{name})")
        return found


def read_pdparams(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a `.pdparams` file under the names of the official checkpoints.

    Raises:
        PaddleError: the file is damaged, or contains anything but arrays, strings and containers.
    """
    try:
        check_pickle(io.BytesIO(content), len(content))
        entries = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(entries, dict):
            raise PaddleError("it is not a dict of arrays")
        entries.pop(NOT_TENSORS, None)
        return dict(_tensor(name, value) for name, value in entries.items())
    except PaddleError:
        raise
    except UntrustedError as error:
        raise PaddleError(f"it {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise PaddleError("it is damaged") from error


def _tensor(name: object, value: object) -> tuple[str, Tensor]:
    if not isinstance(name, str) or not isinstance(value, _Array):
        raise PaddleError(f"its entry {name!r} is not an array")
    tensor = value.resolve()
    if name == "fc.weight":
        tensor = tensor.t().contiguous()
    owner, _, last = name.rpartition(".")
    part = "head" if owner == "fc" else "backbone"
    return f"{part}.{owner}.{RENAMED.get(last, last)}", tensor
