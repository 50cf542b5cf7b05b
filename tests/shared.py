"""Material that lies beside the project, where it does: reference outputs of the official code, and photos."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rednet.model.native import unavailable

SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE = SHARED / "reference"
PHOTOS = SHARED / "data" / "photos"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: no reference outputs, no photos")
needs_native = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")


def deterministic() -> ModuleType:
    """The module that rebuilds weights and inputs from names and seeds."""
    spec = importlib.util.spec_from_file_location("deterministic", REFERENCE / "deterministic.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
