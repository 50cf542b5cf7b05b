"""Files of formats that are not served, with names of photos, in folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import encoded, photo

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n20 20 scale showpage\n%%EOF\n"
GHOSTSCRIPT = "#!/bin/sh\necho started >>{log}\necho 10.0\n"
TRAIN = ["--base-channels", "16", "--epochs", "1", "--size", "32", "--batch-size", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos of two classes for training and validation, among them an EPS file that is named .jpg."""
    for part in ("train", "val"):
        for index, name in enumerate(("n0", "n1")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                (tmp_path / part / name / f"{number}.png").write_bytes(encoded(photo(index + 2 * number)))
        (tmp_path / part / "n1" / "photo.jpg").write_bytes(EPS)
    return tmp_path


@pytest.mark.parametrize("command", ["train", "evaluate", "quantize"])
def test_eps_file_named_jpg_never_starts_ghostscript(command: str, folder: Path, tiny_path: Path) -> None:
    """Pillow would run `gs` on it, with the file's PostScript program as input."""
    log, programs = folder / "started", folder / "bin"
    programs.mkdir()
    (programs / "gs").write_text(GHOSTSCRIPT.format(log=log))
    (programs / "gs").chmod(0o755)
    arguments = {
        "train": ["train", str(folder), "--output", str(folder / "out.safetensors"), *TRAIN],
        "evaluate": ["evaluate", str(folder), "--checkpoint", str(tiny_path)],
        "quantize": ["quantize", str(tiny_path), str(folder / "train"), "--output", str(folder / "out.safetensors")],
    }[command]
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "rednet", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert not log.exists(), done.stderr
    assert "photo.jpg" in done.stderr, done.stderr
