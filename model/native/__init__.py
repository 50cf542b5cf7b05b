"""Python bindings of the native library, whose C source lies beside this module. Only this module calls it.

The library is optional. If it was not built, or if the environment variable REDNET_NATIVE is `off`, `unavailable`
returns the reason and callers use other implementations. REDNET_NATIVE may also name a build: avx512, avx2 or generic.
With any other value the import of this module raises ValueError.
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

ENVIRONMENT_VARIABLE = "REDNET_NATIVE"
STAGES = 4
MAX_THREADS = 64  # as in native/threads.h
MAX_WORKSPACES = 2  # one per image size; a server has one size


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_int64))


class Engine:
    """A whole network in C, from uint8 pixels to logits and features.

    Args:
        config: the fields of `struct config` in native/weights.h.
        arrays: table, weights and biases, in the order of `network_create` in native/weights.h, which differs for int8.
        threads: number of threads, at most 64.
        build: a name from `builds` or `int8_builds`; None for the best of `builds`.

    Raises:
        ValueError: the arrays do not match the configuration.
        RuntimeError: there is no native library, or this machine cannot run the build.
    """

    OUTPUTS = 2 + 2 * STAGES  # logits, features, stage maps, kernel sums

    def __init__(self, config: Sequence[int], arrays: Sequence[Floats], threads: int, build: str | None = None) -> None:
        self.build = _runnable(build)
        self._process = os.getpid()
        self._lock = threading.Lock()  # a workspace serves one call at a time
        self._workspaces: OrderedDict[tuple[int, int], int] = OrderedDict()
        arrays = [np.ascontiguousarray(array, np.float32) for array in arrays]
        error = ctypes.c_char_p()
        create = _function(self.build, "engine_create", ctypes.c_void_p)
        self._engine = create(
            (ctypes.c_int32 * len(config))(*config),
            ctypes.c_int64(len(config)),
            _arrays(arrays),
            ctypes.c_int64(len(arrays)),
            min(threads, MAX_THREADS),
            ctypes.byref(error),
        )
        if not self._engine:
            raise ValueError(_text(error.value))
        self.threads: int = _function(self.build, "engine_threads", ctypes.c_int)(ctypes.c_void_p(self._engine))
        # Nothing is freed when the interpreter exits, because another thread may still be running a batch.
        weakref.finalize(self, _free, self.build, self._engine, self._workspaces).atexit = False

    def run(self, pixels: NDArray[np.uint8] | Floats, outputs: Sequence[Floats | None]) -> None:
        """Forward a batch into `outputs`.

        Args:
            pixels: [B, 3, H, W], uint8, or float32 if already normalised.
            outputs: ten contiguous arrays of exactly the right sizes: logits [B, classes], features [B, D], four stage
                maps [B, h, w, C], four kernel sums [B, h, w, G]. None for a map that is not requested.

        Raises:
            ValueError: a shape or dtype is wrong, or the process is a forked child, which has no engine threads.
            MemoryError: there is not enough memory for images of this size.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(f"pixels must be uint8 or float32 [B, 3, H, W], got {pixels.dtype} {pixels.shape}")
        if len(outputs) != self.OUTPUTS or not all(array is None or _is_writable_float32(array) for array in outputs):
            raise ValueError(f"there must be {self.OUTPUTS} outputs, contiguous float32")
        if os.getpid() != self._process:  # before the lock, which a thread of the parent may have held
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
            while len(self._workspaces) >= MAX_WORKSPACES:
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
    """Involution, batch norm and their gradients in C, with their own thread pool.

    Args:
        threads: number of threads.
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
            sizes: as in native/engine.h.
            pointers: address and number of elements of each array.
            element_size: 2 for bfloat16, 4 for float32, 8 for float64.

        Raises:
            ValueError: the lengths of the arrays do not match the sizes.
            MemoryError: there is not enough memory for a plane of this size.
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
            sizes: pass, rows, channels, blocks and relu.
            pointers: address (or None) and number of elements of each of the ten arrays.

        Raises:
            ValueError: the lengths of the arrays do not match the sizes.
        """
        arrays = (_Array * 10)(*(_Array(*pointer) for pointer in pointers))
        batch_norm_pass, rows, *others = sizes
        with self._lock:
            error = _function(self.build, "batch_norm", ctypes.c_char_p)(
                ctypes.c_void_p(self._operators), batch_norm_pass, ctypes.c_int64(rows), *others, arrays
            )
        if error:
            raise ValueError(_text(error))


def unavailable() -> str | None:
    """The reason why there is no native library; None if there is one."""
    return _library()[1]


def builds() -> list[str]:
    """The builds that this machine can run, best first; none if there is no library."""
    return _names("rednet_builds")


def int8_builds() -> list[str]:
    """The int8 builds that this machine can run, best first; none if REDNET_NATIVE names another build."""
    return [] if os.environ.get(ENVIRONMENT_VARIABLE) else _names("rednet_int8_builds")


def int8_unavailable() -> str | None:
    """The reason why no int8 build can run here; None if one can."""
    if reason := unavailable():
        return reason
    if asked := os.environ.get(ENVIRONMENT_VARIABLE):
        return f"{ENVIRONMENT_VARIABLE} asks for the build {asked}"
    return None if int8_builds() else "this machine has no AVX2, which int8 needs"


def _names(name: str) -> list[str]:
    library, _ = _library()
    if library is None:
        return []
    function = library[name]
    function.restype = ctypes.c_char_p
    return _text(function()).split()


def _runnable(build: str | None) -> str:
    """The build to run: `build`, else the one that REDNET_NATIVE names, else the best."""
    if reason := unavailable():
        raise RuntimeError(reason)
    build, runnable = build or os.environ.get(ENVIRONMENT_VARIABLE) or builds()[0], [*builds(), *int8_builds()]
    if build not in runnable:
        raise RuntimeError(f"this machine cannot run a build {build!r}; it can run {', '.join(runnable)}")
    return build


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "off":
        return None, f"{ENVIRONMENT_VARIABLE} is off"
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
    structs = [_Array() if array is None else _Array(array.ctypes.data, array.size) for array in arrays]
    return (_Array * len(structs))(*structs)


def _is_writable_float32(array: Floats) -> bool:
    return array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable


def _free(build: str, engine: int, workspaces: Mapping[tuple[int, int], int]) -> None:
    for workspace in workspaces.values():
        _function(build, "workspace_free", None)(ctypes.c_void_p(workspace))
    _function(build, "engine_free", None)(ctypes.c_void_p(engine))


def _text(message: bytes | None) -> str:
    return (message or b"").decode()


if (_value := os.environ.get(ENVIRONMENT_VARIABLE, "")) not in ("", "off", *builds()) and not unavailable():
    raise ValueError(f"{ENVIRONMENT_VARIABLE} is {_value!r}; it can be off, {', '.join(builds())} here")
