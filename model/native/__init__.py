"""The native library (C, beside this module) behind Python types. Nothing else touches it.

It is optional. Where it could not be built, or the environment variable REDNET_NATIVE says off, `unavailable` tells
why, and callers do without. REDNET_NATIVE may also name one of the builds: avx512, avx2 or generic. Importing this with
any other value raises ValueError.
"""

import ctypes
import importlib.util
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

VARIABLE = "REDNET_NATIVE"
STAGES = 4
MOST_THREADS = 64
MOST_SIZES = 2  # image sizes whose memory is kept; a server has one


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_int64))


class Engine:
    """A whole network in C: uint8 pixels to logits and features.

    Args:
        config: the fields of `struct config` in native/network.h.
        arrays: table, weights and biases, in the order of `network_create` there.
        threads: cores to use; no more than 64 are.
        build: one of `builds`, or of `int8_builds`, which take other arrays: see native/weights.h; None: the best of
            `builds`.

    Raises:
        ValueError: the arrays are not those of the configuration.
        RuntimeError: there is no native library, or no such build, here.
    """

    # Stage maps and kernel sums behind logits and features.
    OUTPUTS = 2 + 2 * STAGES

    def __init__(self, config: Sequence[int], arrays: Sequence[Floats], threads: int, build: str | None = None) -> None:
        self.build = _runnable(build)
        self._process = os.getpid()
        self._lock = threading.Lock()  # the memory below is one call's
        self._workspaces: OrderedDict[tuple[int, int], int] = OrderedDict()
        arrays = [np.ascontiguousarray(array, np.float32) for array in arrays]
        error = ctypes.c_char_p()
        create = _function(self.build, "engine_create", ctypes.c_void_p)
        self._engine = create(
            (ctypes.c_int32 * len(config))(*config),
            ctypes.c_int64(len(config)),
            _arrays(arrays),
            ctypes.c_int64(len(arrays)),
            min(threads, MOST_THREADS),
            ctypes.byref(error),
        )
        if not self._engine:
            raise ValueError(_text(error.value))
        self.threads: int = _function(self.build, "engine_threads", ctypes.c_int)(ctypes.c_void_p(self._engine))
        # Not when the interpreter ends: a thread may still be running a batch then.
        weakref.finalize(self, _free, self.build, self._engine, self._workspaces).atexit = False

    def run(self, pixels: NDArray[np.uint8] | Floats, outputs: Sequence[Floats | None]) -> None:
        """Forward a batch into `outputs`.

        Args:
            pixels: [B, 3, H, W], bytes, or floats that are normalised already.
            outputs: ten contiguous arrays of exactly the right sizes: logits [B, classes], features [B, D], four stage
                maps [B, h, w, C], four sums of kernels [B, h, w, G]. None: a map that is not wanted.

        Raises:
            ValueError: a shape or dtype is wrong, or this is a child of fork, where the engine's threads are not.
            MemoryError: there is no memory for photos of this size.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(f"pixels must be uint8 or float32 [B, 3, H, W], got {pixels.dtype} {pixels.shape}")
        if len(outputs) != self.OUTPUTS or not all(array is None or _can_be_filled(array) for array in outputs):
            raise ValueError(f"there must be {self.OUTPUTS} outputs, contiguous float32")
        if os.getpid() != self._process:  # asked first: a thread that is no more may hold the lock for ever
            raise ValueError("the engine's threads do not outlive a fork")
        batch, _, height, width = pixels.shape
        contiguous: NDArray[Any] = np.ascontiguousarray(pixels)
        with self._lock:
            error = _function(self.build, "run", ctypes.c_char_p)(
                ctypes.c_void_p(self._engine),
                ctypes.c_void_p(self._workspace(height, width)),
                contiguous.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(pixels.size),
                ctypes.c_int(pixels.dtype == np.float32),
                ctypes.c_int64(batch),
                _arrays(outputs),
            )
        if error:
            raise ValueError(_text(error))

    def _workspace(self, height: int, width: int) -> int:
        size = (height, width)
        if size not in self._workspaces:
            while len(self._workspaces) >= MOST_SIZES:
                _, oldest = self._workspaces.popitem(last=False)
                _function(self.build, "workspace_free", None)(ctypes.c_void_p(oldest))
            error = ctypes.c_char_p()
            create = _function(self.build, "workspace_create", ctypes.c_void_p)
            workspace = create(ctypes.c_void_p(self._engine), height, width, ctypes.byref(error))
            if not workspace:
                message = f"{width}x{height} pixels: {_text(error.value)}"
                raise MemoryError(message) if error.value == b"out of memory" else ValueError(message)
            self._workspaces[size] = workspace
        self._workspaces.move_to_end(size)
        return self._workspaces[size]


class Operators:
    """Involution and its gradients in C, with threads of their own.

    Args:
        threads: cores to use.
        build: as for `Engine`.
    """

    def __init__(self, threads: int, build: str | None = None) -> None:
        self.build = _runnable(build)
        self._lock = threading.Lock()
        self._operators = _function(self.build, "operators_create", ctypes.c_void_p)(threads)
        if not self._operators:
            raise MemoryError
        free = _function(self.build, "operators_free", None)
        weakref.finalize(self, free, ctypes.c_void_p(self._operators)).atexit = False

    def involution(self, sizes: Sequence[int], pointers: Sequence[tuple[int, int]], element_size: int) -> None:
        """Run `involution` of native/engine.h.

        Args:
            sizes: as there.
            pointers: address and number of elements of each array.
            element_size: 2 for bfloat16, 4 for float32, 8 for float64.

        Raises:
            ValueError: sizes and arrays do not fit together.
            MemoryError: there is no memory for a plane of this size.
        """
        arrays = (_Array * 5)(*(_Array(*pointer) for pointer in pointers))
        with self._lock:
            error = _function(self.build, "involution", ctypes.c_char_p)(
                ctypes.c_void_p(self._operators), (ctypes.c_int32 * 8)(*sizes), arrays, element_size
            )
        if error:
            raise MemoryError if error == b"out of memory" else ValueError(_text(error))

    def batch_norm(self, sizes: Sequence[int], pointers: Sequence[tuple[int | None, int]]) -> None:
        """Run a pass of `batch_norm` of native/engine.h.

        Args:
            sizes: its pass, rows, channels, blocks and relu.
            pointers: address (or None) and number of elements of each of its ten arrays.

        Raises:
            ValueError: sizes and arrays do not fit together.
        """
        arrays = (_Array * 10)(*(_Array(*pointer) for pointer in pointers))
        step, rows, *others = sizes
        with self._lock:
            error = _function(self.build, "batch_norm", ctypes.c_char_p)(
                ctypes.c_void_p(self._operators), step, ctypes.c_int64(rows), *others, arrays
            )
        if error:
            raise ValueError(_text(error))


def unavailable() -> str | None:
    """Why there is no native library here; None: there is."""
    return _library()[1]


def builds() -> list[str]:
    """The builds that this machine can run, best first; none if there is no library."""
    return _names("rednet_builds")


def int8_builds() -> list[str]:
    """The same of those for int8; none where REDNET_NATIVE asks for another."""
    return [] if os.environ.get(VARIABLE) else _names("rednet_int8_builds")


def int8_unavailable() -> str | None:
    """Why no int8 build can run here; None: one can."""
    if reason := unavailable():
        return reason
    if asked := os.environ.get(VARIABLE):
        return f"{VARIABLE} asks for the build {asked}"
    return None if int8_builds() else "this machine has no AVX2, which int8 needs"


def _names(name: str) -> list[str]:
    library, _ = _library()
    if library is None:
        return []
    function = library[name]
    function.restype = ctypes.c_char_p
    return _text(function()).split()


def _runnable(build: str | None) -> str:
    """The build of that name; None: that of REDNET_NATIVE, or the best one."""
    if reason := unavailable():
        raise RuntimeError(reason)
    build, found = build or os.environ.get(VARIABLE) or builds()[0], [*builds(), *int8_builds()]
    if build not in found:
        raise RuntimeError(f"this machine cannot run a build {build!r}; it can run {', '.join(found)}")
    return build


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None, f"{VARIABLE} is off"
    spec = importlib.util.find_spec(f"{__name__}.library")
    if spec is None or spec.origin is None:
        return None, "the native library was not built: that needs a C compiler when the package is installed"
    try:
        return ctypes.CDLL(spec.origin), None
    except OSError as error:
        return None, f"the native library cannot be loaded: {error}"


@cache
def _function(build: str, name: str, result: Any) -> Any:
    library, reason = _library()
    if library is None:
        raise RuntimeError(reason)
    function = library[f"rednet_{build}_{name}"]
    function.restype = result
    return function


def _arrays(arrays: Sequence[Floats | None]) -> "ctypes.Array[_Array]":
    found = [_Array() if array is None else _Array(array.ctypes.data, array.size) for array in arrays]
    return (_Array * len(found))(*found)


def _can_be_filled(array: Floats) -> bool:
    return array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable


def _free(build: str, engine: int, workspaces: Mapping[tuple[int, int], int]) -> None:
    for workspace in workspaces.values():
        _function(build, "workspace_free", None)(ctypes.c_void_p(workspace))
    _function(build, "engine_free", None)(ctypes.c_void_p(engine))


def _text(message: bytes | None) -> str:
    return (message or b"").decode()


if (_wanted := os.environ.get(VARIABLE, "")) not in ("", "off", *builds()) and not unavailable():
    raise ValueError(f"{VARIABLE} is {_wanted!r}; it can be off, {', '.join(builds())} here")
