"""The first run on a GPU: whether everything is right, what libraries fuse, and where the time goes.

    python -m benchmarks.gpu_first [--only kernels bf16 ...]

It ends within ten minutes. Each section is a process of its own; `build/benchmarks/gpu-first.tar.gz` has all logs and
tables.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks import sections
from benchmarks.gpu_kernels import check_kernels, device_ms
from benchmarks.measure import report
from benchmarks.network import network
from benchmarks.sections import Section
from rednet import Preprocess, RedNet, load_checkpoint, prepare
from rednet.model.inference.cuda.backend import CudaBackend
from rednet.model.inference.cuda.batch_buckets import bucket_size
from rednet.model.inference.cuda.network import TritonRedNet, _fused_relu_keeps_nan, _Involution
from rednet.model.inference.preparation import DTYPES, TOLERANCE, SelfCheckError, _noise
from rednet.model.inference.self_check import SelfCheck, reference_output
from rednet.model.ops import reference

NAME = "gpu-first"
KERNEL_CASES = 18  # one for each kind of kernel and dtype
TESTS = (
    *("test_triton_ops", "test_triton_fused", "test_triton_generated"),
    *("test_cuda_network", "test_cuda_backend", "test_cuda_self_check"),
)
SIZES = tuple(sorted({bucket_size(images) for images in range(1, 65)} | {128, 256}))


class Subject(NamedTuple):
    """The network that is examined, and the batch sizes that a server would run."""

    net: RedNet
    side: int = 224
    sizes: tuple[int, ...] = SIZES

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(resize=self.side, crop=self.side)

    def backend(self, precision: str, check: SelfCheck, fuse_generation: bool = False) -> CudaBackend:
        device, dtype = torch.device("cuda"), DTYPES[precision]
        return CudaBackend(self.net, self.preprocess, device, dtype, check, fuse_generation=fuse_generation)

    def check(self) -> SelfCheck:
        """That accepts every error, except NaN, and returns it."""
        return SelfCheck(reference_output(self.net, self.preprocess, _noise(2, self.side)), math.inf)

    def pixels(self, images: int) -> Tensor:
        return torch.randint(0, 256, (images, 3, self.side, self.side), dtype=torch.uint8, device="cuda")


def show_machine() -> None:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"{torch.cuda.get_device_name()}, compute capability {capability}")
    print(f"torch {torch.__version__}, Triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}")


def check_programs(subject: Subject, precision: str, fuse_generation: bool = False) -> None:
    """Make the program of every batch size, and compare all rows with the plain network.

    Raises:
        RuntimeError: a size has no program, or a result is wrong.
    """
    check, limit = subject.check(), TOLERANCE["cuda"][precision]
    backend = subject.backend(precision, check, fuse_generation)
    rows: list[dict[str, object]] = []
    for size in subject.sizes:
        started = time.perf_counter()
        try:
            backend._buckets._programs[size] = backend._capture(size)
        except (MemoryError, RuntimeError) as error:
            rows.append({"batch": size, "result": str(error)})
            continue
        made_s = time.perf_counter() - started
        error_ratio = check.run(backend, size)
        ms = device_ms(partial(backend, subject.pixels(size)), 0.3)
        row = {"batch": size, "relative error": error_ratio, "made in s": made_s, "ms": ms}
        rows.append(row | {"images/s": 1000 * size / ms, "result": "right" if error_ratio <= limit else "WRONG"})
    name = f"{precision}-generated" if fuse_generation else precision
    report(f"{NAME}/programs-{name}", f"every CUDA graph, {name}, limit {limit}", rows)
    failed = [row["batch"] for row in rows if row["result"] != "right"]
    if failed:
        raise RuntimeError(f"batch sizes without a right program: {failed}")
    check_memory(backend, subject)


@torch.inference_mode()
def check_memory(backend: CudaBackend, subject: Subject) -> None:
    """Compare results before and after a batch that fills the graph's memory with NaN.

    Raises:
        RuntimeError: results depend on what memory held before.
    """
    clean = subject.pixels(min(8, max(subject.sizes)))
    before = backend(clean).logits
    scale = backend._network._scale  # of the pixels; graphs read it in every replay
    right = scale.clone()
    scale.fill_(torch.nan)
    broken = [backend(clean).logits, backend(clean, stages=[3]).logits]
    scale.copy_(right)
    if not all(logits.isnan().all() for logits in broken):
        raise RuntimeError("NaN gets lost on the way to the logits")
    replayed, eager = backend(clean).logits, backend(clean, stages=[3]).logits
    if not torch.equal(before, replayed):
        raise RuntimeError("a graph gives another result after a batch of NaN")
    if not eager.isfinite().all():
        raise RuntimeError("without a graph, results contain NaN after a batch of NaN")
    print("results do not depend on what memory held before")


@torch.inference_mode()
def compare_generation(subject: Subject) -> None:
    """The involution of the stem and of each stage's first and last block, with kernels from memory and generated.

    Raises:
        RuntimeError: generated kernels give another result than the definition.
    """
    rows: list[dict[str, object]] = []
    for precision, dtype in DTYPES.items():
        ways = [
            list(
                _involutions(
                    TritonRedNet(subject.net, subject.preprocess, torch.device("cuda"), dtype, fuse), subject.side
                )
            )
            for fuse in (False, True)
        ]
        for (name, side, memory), (_, _, generated) in zip(*ways, strict=True):
            x = torch.randn(2, len(memory.scale), side, side).to("cuda", dtype, memory_format=torch.channels_last)
            exact = _definition(memory, x)
            error_ratio = float((generated(x) - exact).norm() / exact.norm())
            right = error_ratio <= TOLERANCE["cuda"][precision]
            x = x[:1].repeat(min(64, max(subject.sizes)), 1, 1, 1).contiguous(memory_format=torch.channels_last)
            times = {
                "memory ms": device_ms(partial(memory, x), 0.1),
                "generated ms": device_ms(partial(generated, x), 0.1),
            }
            row = {"precision": precision, "involution": name, "relative error": error_ratio, **times}
            rows.append(row | {"result": "right" if right else "WRONG"})
    report(f"{NAME}/generation", "kernels from memory, and generated in the involution", rows)
    wrong = [(row["precision"], row["involution"]) for row in rows if row["result"] != "right"]
    if wrong:
        raise RuntimeError(f"generated kernels are wrong: {wrong}")


def _involutions(network: TritonRedNet, side: int) -> Iterator[tuple[str, int, _Involution]]:
    """The name, the side of the input, and the layer."""
    yield "stem", side // 2, network._stem[1]
    for stage, blocks in enumerate(network._stages, 1):
        yield f"stage {stage}, first", side // 2 ** max(2, stage), blocks[0].involution
        yield f"stage {stage}, last", side // 2 ** (stage + 1), blocks[-1].involution


def _definition(layer: _Involution, x: Tensor) -> Tensor:
    """The layer's result in float64, from its convolutions' weights."""
    kernel = torch.einsum("gtc,bcyx->bgtyx", layer.span.double(), layer._reduced(x).double())
    kernel += layer.bias.double().reshape(1, *kernel.shape[1:3], 1, 1)
    out = reference.forward(x.double(), kernel, layer.stride)
    return (out * layer.scale[:, None, None] + layer.shift[:, None, None]).relu()


@torch.inference_mode()
def show_fusion(subject: Subject) -> None:
    """Which convolutions cuDNN computes in one pass, and whether cuBLAS' ReLU keeps NaN."""
    rows = []
    for precision, dtype in DTYPES.items():
        device_network = TritonRedNet(subject.net, subject.preprocess, torch.device("cuda"), dtype)
        for size in (1, max(subject.sizes)):
            device_network(subject.pixels(size))
        fallback = device_network._stages[0][0].conv3.fallback
        separate = [str(key) for key in fallback._unsupported]
        keeps_nan = _fused_relu_keeps_nan(torch.device("cuda"), dtype)
        rows.append({"precision": precision, "ReLU keeps NaN": keeps_nan, "not fused": len(separate)})
        print(*separate, sep="\n")
    report(f"{NAME}/fusion", "what cuBLAS and cuDNN fuse", rows)


@torch.inference_mode()
def show_profile(subject: Subject, precision: str = "bf16") -> None:
    """The time of every kernel, for the largest batch of a server's usual load and for one image."""
    from torch.profiler import profile, supported_activities

    backend = subject.backend(precision, subject.check())
    for size in (min(64, max(subject.sizes)), 1):
        pixels = subject.pixels(size)
        backend(pixels)
        with profile(activities=supported_activities()) as profiled:
            for _ in range(5):
                backend(pixels)
            torch.cuda.synchronize()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        rows = [
            {"kernel": e.key[:90], "calls": e.count / 5, "us": e.self_device_time_total / 5}
            for e in events
            if e.self_device_time_total
        ]
        report(f"{NAME}/profile-{size}", f"kernels of a batch of {size}, {precision}", rows)


def check_prepare(net: RedNet, preprocess: Preprocess) -> None:
    """What `prepare` chooses in each precision.

    Raises:
        RuntimeError: a precision is not served from CUDA graphs.
    """
    rows: list[dict[str, object]] = []
    for precision in (*DTYPES, "auto"):
        try:
            run = prepare(net, preprocess, "cuda", precision)
        except SelfCheckError as error:
            rows.append({"precision": precision, "backend": str(error)})
            continue
        row = {"precision": precision, "chosen": run.precision, "backend": run.backend, "s": run.check_s}
        rows.append(row | {"relative error": run.max_relative_error, "rejected": "; ".join(run.rejected_backends)})
    report(f"{NAME}/prepare", "what `prepare` chooses", rows)
    slow = [row["precision"] for row in rows if not str(row["backend"]).startswith("CUDA graphs")]
    if slow:
        raise RuntimeError(f"not from CUDA graphs: {slow}")


def check_embedded() -> None:
    """The same for the embedded checkpoint."""
    checkpoint = load_checkpoint()
    check_prepare(checkpoint.net, checkpoint.preprocess)


def run_tests() -> None:
    """The tests of the CUDA path, which here run on the GPU."""
    files = [f"tests/{name}.py" for name in TESTS]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], check=True)


def section(run: Callable[..., None], limit_s: float, *arguments: object) -> Section:
    return Section(lambda _: run(*arguments), limit_s)


def examine(run: Callable[..., None], limit_s: float, *arguments: object) -> Section:
    """A section about RedNet-50, which is made in the section's own process."""
    return Section(lambda _: run(Subject(network("rednet50")), *arguments), limit_s)


SECTIONS = {
    "machine": section(show_machine, 30),
    "kernels": section(check_kernels, 120, KERNEL_CASES),
    "fp16": examine(check_programs, 120, "fp16"),
    "bf16": examine(check_programs, 120, "bf16"),
    "fp32": examine(check_programs, 150, "fp32"),
    "generation": examine(compare_generation, 90),
    "fp16-generated": examine(check_programs, 120, "fp16", True),
    "fusion": examine(show_fusion, 60),
    "profile": examine(show_profile, 60),
    "embedded": section(check_embedded, 120),
    "tests": section(run_tests, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.exit(sections.main(NAME, "benchmarks.gpu_first", SECTIONS, parser))


if __name__ == "__main__":
    main()
