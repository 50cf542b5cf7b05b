"""Material that lies beside the project, where it does: reference outputs of the official code, and photos."""

from pathlib import Path

import pytest

from model.native import unavailable

SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE = SHARED / "reference"
PHOTOS = SHARED / "data" / "photos"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: no reference outputs, no photos")
needs_native = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
