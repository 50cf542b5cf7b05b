"""Triton's interpreter, as these tests need it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inside the block, the interpreter's `tl.dot` multiplies bfloat16 values, and not their bits as integers."""
    dot = InterpreterBuilder.create_dot

    def float32(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched(builder: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(builder, float32(a), float32(b), *more)

    with patch.object(InterpreterBuilder, "create_dot", patched):
        yield
