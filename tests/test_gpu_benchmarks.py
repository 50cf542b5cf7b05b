"""The benchmarks for a GPU, on a made-up one: a visit to a real one is too short to find mistakes in them."""

import argparse
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rednet import Preprocess, RedNet, load_checkpoint
from rednet.model.inference import preparation
from rednet.model.inference.cuda.network import TritonRedNet
from tests.fake_cuda import CUDAGraph, fake_cuda
from tests.servers import wait_until

pytest.importorskip("triton", reason="no Triton here")

from benchmarks import gpu, gpu_first, gpu_kernels, sections
from benchmarks.measure import RESULTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here: run the benchmarks themselves"),
]

ROOT = Path(__file__).parent.parent
SERVER_PACKAGES = [
    *("fastapi", "httptools", "httpx", "hypothesis", "multipart", "orjson", "prometheus_client", "pydantic", "pynvml"),
    *("pytest_timeout", "starlette", "structlog", "tifffile", "uvicorn", "uvloop"),
]


@pytest.fixture
def subject(tiny_path: Path) -> gpu_first.Subject:
    return gpu_first.Subject(load_checkpoint(tiny_path).net, side=64, sizes=(1, 2, 3))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return RESULTS / gpu_first.NAME


@pytest.fixture
def made_up_gpu() -> Iterator[None]:
    with fake_cuda():
        yield


def rows(results: Path, name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((results / f"{name}.json").read_text())["rows"]
    return found


def test_check_kernels_passes_and_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which is slow."""
    from rednet.model.ops import triton_ops

    with fake_cuda(interpret=True):
        gpu_kernels.check_kernels(3, largest_side=3)
        forward = triton_ops.forward
        monkeypatch.setattr(triton_ops, "forward", lambda *operands: forward(*operands) * 1.01)
        with pytest.raises(AssertionError):
            gpu_kernels.check_kernels(1, largest_side=3)


@pytest.mark.usefixtures("made_up_gpu")
def test_first_visit_checks_every_program(subject: gpu_first.Subject, results: Path) -> None:
    """And writes what it has measured of each."""
    gpu_first.show_machine()
    gpu_first.check_programs(subject, "fp32")
    table = rows(results, "programs-fp32")
    assert [row["batch"] for row in table] == [1, 2, 3]
    assert all(row["result"] == "right" for row in table)


@pytest.mark.usefixtures("made_up_gpu")
def test_first_visit_reports_programs_that_cannot_be_made(
    subject: gpu_first.Subject, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other sizes are measured nevertheless."""
    forward = TritonRedNet.__call__

    def limited(network: TritonRedNet, pixels: torch.Tensor) -> object:
        if len(pixels) == 2:
            raise RuntimeError("not supported")
        return forward(network, pixels)

    monkeypatch.setattr(TritonRedNet, "__call__", limited)
    with pytest.raises(RuntimeError, match=r"\[2\]"):
        gpu_first.check_programs(subject, "fp32")
    assert [row["result"] for row in rows(results, "programs-fp32")] == ["right", "not supported", "right"]


@pytest.mark.usefixtures("made_up_gpu")
def test_first_visit_reports_wrong_programs(
    subject: gpu_first.Subject, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the size of the error."""
    from rednet.model.ops import triton_ops

    fused = triton_ops.fused
    monkeypatch.setattr(triton_ops, "fused", lambda *operands: fused(*operands) * 1.1)
    with pytest.raises(RuntimeError, match=r"\[1, 2, 3\]"):
        gpu_first.check_programs(subject, "fp32")
    for row in rows(results, "programs-fp32"):
        assert row["result"] == "WRONG"
        assert isinstance(row["relative error"], float)
        assert row["relative error"] > 1e-3


@pytest.mark.usefixtures("made_up_gpu", "results")
def test_first_visit_notices_results_that_depend_on_old_memory(
    subject: gpu_first.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose result changes from replay to replay."""
    replay = CUDAGraph.replay

    def drifting(graph: CUDAGraph) -> None:
        bias.add_(1)
        replay(graph)

    subject_backend = subject.backend("fp32", subject.check())
    subject_backend._buckets._programs[3] = subject_backend._capture(3)
    bias = subject_backend._network._head.get_parameter("fc.bias").data
    monkeypatch.setattr(CUDAGraph, "replay", drifting)
    with pytest.raises(RuntimeError, match="another result after a batch of NaN"):
        gpu_first.check_memory(subject_backend, subject)


@pytest.mark.usefixtures("made_up_gpu")
def test_first_visit_shows_fusion_profile_and_choice(
    subject: gpu_first.Subject, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile is empty here: no kernel runs."""
    monkeypatch.setitem(preparation.TIMED_IMAGES, "cuda", 2)  # fewer graphs to capture
    gpu_first.show_fusion(subject)
    assert all(row["ReLU keeps NaN"] for row in rows(results, "fusion"))
    gpu_first.show_profile(subject, "fp32")
    assert (results / "profile-1.json").exists()
    net: RedNet = load_checkpoint().net
    gpu_first.check_prepare(net, Preprocess(resize=72, crop=64))
    assert [row["precision"] for row in rows(results, "prepare")] == ["fp32", "bf16", "fp16", "auto"]


@pytest.mark.usefixtures("made_up_gpu")
def test_first_visit_compares_kernels_from_memory_with_generated_ones(
    subject: gpu_first.Subject, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every precision and every kind of layer, and each CUDA graph of the network; wrong results are errors."""
    from rednet.model.ops import triton_generated

    monkeypatch.setattr(gpu_first, "device_ms", lambda run, _: gpu_kernels.device_ms(run, 0.01))
    gpu_first.compare_generation(subject)
    table = rows(results, "generation")
    assert len(table) == 3 * 9
    assert all(row["result"] == "right" and row["generated ms"] for row in table)
    gpu_first.check_programs(subject, "fp32", fuse_generation=True)
    assert all(row["result"] == "right" for row in rows(results, "programs-fp32-generated"))
    fused = triton_generated.fused
    monkeypatch.setattr(triton_generated, "fused", lambda *operands: fused(*operands) * 1.1)
    with pytest.raises(RuntimeError, match=r"generated kernels are wrong: .*stem"):
        gpu_first.compare_generation(subject)
    with pytest.raises(RuntimeError, match=r"\[1, 2, 3\]"):
        gpu_first.check_programs(subject, "fp32", fuse_generation=True)


@pytest.mark.usefixtures("made_up_gpu")
def test_speed_is_measured_beside_the_definition(
    subject: gpu_first.Subject, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for every batch size of both."""
    monkeypatch.setattr(gpu, "network", lambda _: subject.net)
    monkeypatch.setattr(gpu, "SIDE", subject.side)
    monkeypatch.setattr(gpu, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu, "device_ms", lambda run: gpu_kernels.device_ms(run, 0.1))
    gpu.measure_network("fp32", argparse.Namespace(official=None))
    table = rows(results.with_name(gpu.NAME), "network-fp32")
    assert [(row["network"], row["batch"]) for row in table][:4] == [
        *(("ours", batch) for batch in (1, 2)),
        *(("definition", batch) for batch in (1, 2)),
    ]


def test_failed_sections_do_not_end_the_others(tmp_path: Path) -> None:
    """On a machine without a GPU all fail. One archive has the log of each."""
    command = [sys.executable, "-m", "benchmarks.gpu_first", "--only", "machine", "kernels"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    folder = tmp_path / RESULTS / gpu_first.NAME
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert [outcome["result"] for outcome in outcomes.values()] == ["failed with status 1"] * 2
    with tarfile.open(sections.archive(folder)) as archive:
        assert {Path(name).name for name in archive.getnames()} >= {"machine.log", "kernels.log", "outcomes.json"}


def is_running(pid: int) -> bool:
    """Nothing may reap it here, so that it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_section_is_killed_with_its_children_at_its_limit(tmp_path: Path) -> None:
    """What it printed so far is kept."""
    log = tmp_path / "log"
    outcome = sections.run_section(["sh", "-c", "sleep 60 & echo $!; wait"], log, 4)  # Python may start too slowly
    assert outcome["result"] == "killed after 4 s"
    wait_until(lambda: not is_running(int(log.read_text())), "the end of the child, which has been killed")
    assert sections.run_section(["true"], log, 0)["result"] == "not run: no time left"


def test_gpu_tests_and_benchmarks_need_none_of_the_servers_packages() -> None:
    """A machine that is lent for some minutes has PyTorch and Triton, but no FastAPI."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({SERVER_PACKAGES}))
import benchmarks.gpu, benchmarks.gpu_compile, benchmarks.gpu_first, rednet.model.training.trainer
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_triton_fused.py", "-k", "empty"])
    or pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", *sys.argv[1:]]))
"""
    files = [f"tests/{name}.py" for name in gpu_first.TESTS]
    command = [sys.executable, "-c", script, *files]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
