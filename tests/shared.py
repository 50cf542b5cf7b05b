"""Photos that lie beside the project, where they do, and marks of tests that need something."""

from pathlib import Path

import pytest

from rednet.model.native import unavailable

SHARED = Path(__file__).resolve().parents[2] / "shared"
PHOTOS = SHARED / "data" / "photos"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent: no photos")
needs_native = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
