"""`rednet serve` with a GPU on which something does not work. The GPU is made up, Triton's failures are real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rednet import load_checkpoint, prepare
from tests.conftest import encoded, photo
from tests.servers import ServerProcess
from tests.shared import needs_native

pytest.importorskip("triton", reason="no Triton here")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")]

ON_FAKE_GPU = "from tests.fake_cuda import main; main()"
NOEXEC = 'mount -t tmpfs -o noexec tmpfs "$0" && exec "$@"'


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a library that Triton takes for the driver, and can link with."""
    folder = tmp_path / "driver"
    folder.mkdir()
    command = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, folder / "libcuda.so.1"], check=True)
    return folder


def serves_right(running: ServerProcess, checkpoint: Path) -> None:
    """Its class probabilities are those of the network on the CPU."""
    image = photo(3)
    answer = running.client.post("/v1/predict?top_k=5", content=encoded(image), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    loaded = load_checkpoint(checkpoint)
    pixels = torch.from_numpy(loaded.preprocess.pixels(image))[None]
    expected = prepare(loaded.net, loaded.preprocess, "cpu", "fp32")(pixels).logits.softmax(dim=1)[0]
    classes = answer.json()["predictions"][0]["classes"]
    assert {each["index"]: each["probability"] for each in classes} == pytest.approx(
        dict(enumerate(expected.tolist())), abs=1e-4
    )


def test_healthy_gpu_serves_from_cuda_graphs(tiny_path: Path) -> None:
    """The made-up GPU by itself breaks nothing."""
    with ServerProcess("--checkpoint", tiny_path, "--precision", "fp32", script=ON_FAKE_GPU) as running:
        model = running.client.get("/v1/model").json()
        assert (model["device"], model["backend"]) == ("cuda", "CUDA graphs, Triton involution")
        assert model["passed_over"] == []
        serves_right(running, tiny_path)


@pytest.mark.parametrize("how", ["no driver", "no compiler", "noexec", "import"])
def test_triton_that_fails_leaves_torch_on_the_gpu(tiny_path: Path, tmp_path: Path, driver: Path, how: str) -> None:
    """The server starts, answers right, and says why it runs a slower backend."""
    cache = tmp_path / "cache"
    cache.mkdir()
    before: list[object] = []
    variables = {"FAKE_CUDA": "real", "TRITON_CACHE_DIR": str(cache)}
    match how:
        case "no driver":
            expected = "libcuda.so"
        case "no compiler":
            expected = "Failed to find C compiler"
            variables |= {"TRITON_LIBCUDA_PATH": str(driver), "PATH": str(tmp_path)}
        case "noexec":
            expected = "failed to map segment"
            variables |= {"TRITON_LIBCUDA_PATH": str(driver)}
            before = ["unshare", "--map-root-user", "--mount", "sh", "-c", NOEXEC, cache]
            if not shutil.which("unshare") or subprocess.run([*map(str, before), "true"], check=False).returncode:
                pytest.skip("no mounts are allowed here")
        case _:
            expected = "Triton cannot be imported: RuntimeError: a library is missing"
            (tmp_path / "triton").mkdir()
            (tmp_path / "triton" / "__init__.py").write_text('raise RuntimeError("a library is missing")')
            variables |= {"PYTHONPATH": str(tmp_path)}
    options = ("--checkpoint", tiny_path, "--precision", "fp32")
    with ServerProcess(*options, before=before, script=ON_FAKE_GPU, **variables) as running:  # type: ignore[arg-type]
        model = running.client.get("/v1/model").json()
        assert (model["device"], model["backend"]) == ("cuda", "torch, involution: torch")
        assert [reason.partition(":")[0] for reason in model["passed_over"]] == [
            "CUDA graphs",
            "Triton without CUDA graphs",
        ]
        assert all(expected in reason for reason in model["passed_over"]), model["passed_over"]
        assert expected in running.log
        assert "torch, involution: torch" in running.log
        serves_right(running, tiny_path)


@needs_native  # the made-up device also makes PyTorch fail on the CPU
def test_auto_device_uses_the_cpu_where_torch_cannot_use_the_gpu(tiny_path: Path) -> None:
    """With a warning, where an explicit --device cuda is an error."""
    options = ("--checkpoint", tiny_path, "--precision", "fp32")
    with ServerProcess(*options, script=ON_FAKE_GPU, FAKE_CUDA="torch-fails") as running:
        model = running.client.get("/v1/model").json()
        assert model["device"] == "cpu"
        assert "no kernel image" in model["passed_over"][0]
        assert "the GPU cannot be used, the network runs on the CPU" in running.log
        serves_right(running, tiny_path)
    environment = os.environ | {"FAKE_CUDA": "torch-fails"}
    command = [sys.executable, "-c", ON_FAKE_GPU, "serve", "--device", "cuda", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no kernel image" in done.stderr
