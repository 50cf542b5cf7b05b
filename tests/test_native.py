"""The native library: the engine and the operators in C, in all builds that this machine can run."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rednet import RedNet, create_rednet, prepare
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.native_backend import NativeBackend
from rednet.model.native import Engine, builds, unavailable
from rednet.model.nn.rednet import BLOCKS
from tests import official
from tests.conftest import lively
from tests.servers import REDNET
from tests.shared import needs_native

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "model" / "native"
CHECK = ROOT / "tests" / "native" / "check.c"
TOLERANCE = 1e-5  # relative, against float64


def network(name: str = "rednet26", **fields: Any) -> RedNet:
    """A network with random weights whose outputs differ from photo to photo."""
    return lively(create_rednet(name, **{"base_channels": 16, "stem_channels": 32, "num_classes": 7} | fields))


def photos(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * height + width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def exact(net: RedNet, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of the reference implementation in float64."""
    double = (
        create_rednet(net.config.name, **{k: v for k, v in vars(net.config).items() if k != "depth"}).eval().double()
    )
    double.load_state_dict(net.state_dict())
    preprocess = Preprocess()
    mean, std = (torch.tensor(each).double().reshape(3, 1, 1) for each in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        features = double.features((pixels.double() / 255 - mean) / std)
        return double.head(features), features


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(ours - expected) / torch.linalg.norm(expected))


def engines(net: RedNet, threads: tuple[int, ...]) -> Iterator[NativeBackend]:
    """The network in every build and with every number of threads."""
    for build, count in itertools.product(builds(), threads):
        yield NativeBackend(net, Preprocess(), threads=count, build=build)


@needs_native
@pytest.mark.parametrize("name", [f"rednet{depth}" for depth in BLOCKS])
def test_native_engine_matches_definition_for_every_depth_and_build(name: str) -> None:
    """Three non-square photos on two threads: one for each thread and one that both share."""
    net = network(name)
    pixels = photos(3, 96, 160)
    logits, features = exact(net, pixels)
    for engine in engines(net, (2,)):
        output = engine(pixels)
        assert relative_error(output.logits, logits) < TOLERANCE, engine.name
        assert relative_error(output.features, features) < TOLERANCE, engine.name


@needs_native
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (1, 1), (7, 300), (224, 224), (512, 320)])
def test_native_engine_matches_definition_for_every_image_size(size: tuple[int, int]) -> None:
    """Square, non-square, odd, tiny and large images, on fewer and on more threads than images."""
    net = network()
    pixels = photos(3, *size)
    logits, features = exact(net, pixels)
    for engine in engines(net, (1, 2, 5)):
        output = engine(pixels)
        assert relative_error(output.logits, logits) < TOLERANCE, engine.name
        assert relative_error(output.features, features) < TOLERANCE, engine.name


@needs_native
@pytest.mark.parametrize(
    "fields",
    [
        {"strides": (2, 1, 3, 2), "kernel_size": 5, "reduction_ratio": 2},
        {
            "stem_channels": 64,
            "base_channels": 16,
            "stem_kernel_size": 7,
            "reduction_ratio": 1,
        },  # stage 1 has an identity shortcut
        {"base_channels": 48, "stem_channels": 96, "num_classes": 1, "kernel_size": 1},
        {"base_channels": 32, "num_classes": 1003, "strides": (1, 1, 1, 1), "kernel_size": 3},
    ],
)
def test_native_engine_matches_definition_for_other_configurations(fields: dict[str, Any]) -> None:
    """Strides, kernel sizes, reductions and widths that the paper does not use."""
    net = network(**fields)
    pixels = photos(3, 50, 70)
    logits, _ = exact(net, pixels)
    for engine in engines(net, (1, 2)):
        assert relative_error(engine(pixels).logits, logits) < TOLERANCE, engine.name


@needs_native
def test_native_engine_is_bit_identical_for_any_batch_and_threads() -> None:
    """The outputs and maps of a photo are the same alone, in any batch up to nine and with any number of threads."""
    net = network()
    pixels = photos(9, 144, 160)  # late stages take three images at a time
    for build in builds():
        alone = NativeBackend(net, Preprocess(), threads=1, build=build)
        expected = [alone(photo.unsqueeze(0), range(4), range(4)) for photo in pixels]
        for threads in (1, 2, 3, 5, 64):
            engine = NativeBackend(net, Preprocess(), threads=threads, build=build)
            for batch in range(1, 10):
                output = engine(pixels[:batch], range(4), range(4))
                for name, ours in output._asdict().items():
                    known = [getattr(each, name) for each in expected[:batch]]
                    if name in ("stages", "kernel_sums"):
                        for stage, maps in enumerate(ours):
                            assert torch.equal(maps, torch.cat([each[stage] for each in known]))
                    else:
                        assert torch.equal(ours, torch.cat(known))


@needs_native
@pytest.mark.parametrize("depth", official.DEPTHS)
def test_native_engine_matches_official_outputs(depth: int) -> None:
    """Logits, features and stage maps of the official code at full width, for the same inputs."""
    run = prepare(official.network(depth), Preprocess(resize=64, crop=64), device="cpu")
    assert run.backend.startswith("native engine")
    for expected in official.outputs(depth):
        output = run(expected.images, stages=True)
        assert relative_error(output.logits, expected.logits) < TOLERANCE
        assert relative_error(output.features, expected.features) < TOLERANCE
        assert output.stages is not None
        for stage, sample in zip(output.stages, expected.stages, strict=True):
            assert relative_error(official.sampled(stage), sample) < TOLERANCE


@needs_native
def test_engine_rejects_wrong_arrays_dtypes_and_lengths() -> None:
    """Each raises an error before C reads or writes an array."""
    net = network()
    backend = NativeBackend(net, Preprocess(), threads=2)
    engine = backend._engine
    numbers = [1, 2, 4, 1, 1, 2, 2, 2, 32, 16, 7, 7, 3, 4]
    one = [np.zeros(768, np.float32)]
    for config, arrays, message in (
        (numbers, one, "not those of this network"),
        (numbers[:-1], one, "another version"),
        ([*numbers[:8], 33, *numbers[9:]], one, "stem_channels must be a multiple of 32"),
        ([*numbers[:-4], 2**30, *numbers[-3:]], one, "number of classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(config, arrays, 2)
    with pytest.raises(ValueError, match="number of threads"):
        Engine(numbers, one, 0)
    logits, features = np.zeros((1, 7), np.float32), np.zeros((1, 512), np.float32)
    read_only = np.zeros((1, 512), np.float32)
    read_only.flags.writeable = False
    pixels = np.zeros((1, 3, 32, 32), np.uint8)
    for given, outputs, message in (
        (pixels[0], [logits, features], "uint8 or float32"),
        (pixels.astype(np.float64), [logits, features], "uint8 or float32"),
        (pixels, [logits[:, :6].copy(), features], "wrong length"),
        (pixels, [logits, None], "wrong length"),
        (pixels, [logits, read_only], "contiguous float32"),
        (pixels, [logits.astype(np.float64), features], "contiguous float32"),
        (pixels, [np.zeros((1, 14), np.float32)[:, ::2], features], "contiguous float32"),
        (np.zeros((1, 3, 20000, 1), np.uint8), [logits, features], "out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run(given, [*outputs, *[None] * 8])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 outputs"):
        engine.run(pixels, [logits, features])
    with pytest.raises(RuntimeError, match="cannot run a build 'mmx'"):
        Engine(numbers, one, 2, build="mmx")


@needs_native
def test_engine_shared_by_python_threads() -> None:
    """Concurrent calls run one after another, and every result is right."""
    from concurrent.futures import ThreadPoolExecutor

    backend = NativeBackend(network(), Preprocess(), threads=2)
    batches = [
        photos(batch, side, 48) for batch in (1, 2, 3) for side in (32, 48, 64)
    ]  # three sizes share two workspaces
    expected = [backend(pixels).logits for pixels in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda pixels: backend(pixels).logits, batches)
            assert all(torch.equal(ours, known) for ours, known in zip(results, expected, strict=True))


FORK = """
import os, torch
from rednet import create_rednet
from rednet import involution
from rednet.model.inference.native_backend import NativeBackend
from rednet.model.images.preprocess import Preprocess
backend = NativeBackend(create_rednet("rednet26", base_channels=16, stem_channels=32).eval(), Preprocess(), threads=2)
pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
x, kernel = torch.randn(2, 16, 8, 8), torch.randn(2, 1, 9, 8, 8)
backend(pixels)
expected = involution(x, kernel)
if os.fork() == 0:
    try:
        backend(pixels)
    except ValueError as error:
        same = torch.equal(involution(x, kernel), expected)
        os._exit(0 if "do not outlive a fork" in str(error) and same else 1)
    os._exit(2)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@needs_native
def test_native_engine_and_operator_after_fork() -> None:
    """The child has none of the threads: the engine raises an error, and the operator starts new threads."""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, check=False).returncode == 0


def info(native: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"REDNET_NATIVE": native}
    return subprocess.run([REDNET, "info"], env=environment, capture_output=True, check=False, text=True)


def test_rednet_native_off_selects_torch() -> None:
    """`rednet info` reports what runs instead, and why."""
    lines = info("off").stdout.splitlines()
    assert "backend       torch, involution: torch" in lines
    rejected = [line.removeprefix("rejected      ") for line in lines if line.startswith("rejected")]
    assert rejected == ["int8: REDNET_NATIVE is off", "native engine: REDNET_NATIVE is off"]


@needs_native
def test_rednet_native_selects_a_build_and_rejects_unknown_names() -> None:
    """A build that does not exist is an error, not a slow server."""
    assert "backend       native engine, generic, " in info("generic").stdout
    result = info("mmx")
    assert result.returncode == 2
    assert "REDNET_NATIVE is 'mmx'; it can be off, " in result.stderr


def test_native_library_is_available_where_a_compiler_is() -> None:
    """The library is optional, so no other test would notice that its source no longer compiles."""
    if os.environ.get("REDNET_NATIVE") == "off" or not shutil.which("cc"):
        pytest.skip("switched off, or no C compiler here")
    assert unavailable() is None


# The thread uses nothing of torch: a thread that waits for the GIL inside torch makes the C++ runtime abort the exit.
EXIT = """
import threading
import numpy as np
from rednet import create_rednet
from rednet.model.inference.native_backend import NativeBackend
from rednet.model.images.preprocess import Preprocess
net = create_rednet("rednet26", base_channels=16, stem_channels=32).eval()
backend = NativeBackend(net, Preprocess(), threads=2)
pixels = np.zeros((16, 3, 224, 224), np.uint8)
widths = net.config.num_classes, net.config.feature_channels
outputs = [*(np.empty((16, width), np.float32) for width in widths), *[None] * 8]
second_batch = threading.Event()
def work():
    backend._engine.run(pixels, outputs)
    second_batch.set()
    while True:
        backend._engine.run(pixels, outputs)
threading.Thread(target=work, daemon=True).start()
assert second_batch.wait(30)
"""


@needs_native
def test_process_exit_while_a_batch_runs() -> None:
    """The memory of the engine is not freed before the process ends."""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", EXIT], timeout=60, check=False).returncode == 0


def test_native_check_passes_on_emulated_arm64(tmp_path: Path) -> None:
    """check.c is cross-compiled for 64-bit ARM (NEON) and runs under emulation."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
    if not compiler:
        pytest.skip("no aarch64-linux-gnu-gcc here")
    flags = ["-std=gnu11", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-DVL=4", "-DBUILD=generic", f"-I{NATIVE}"]
    program = tmp_path / "check"
    subprocess.run([compiler, *flags, CHECK, "-o", program, "-lm", "-pthread"], check=True)
    if not emulator:
        pytest.skip("compiled, but there is no qemu-aarch64-static here to run it")
    result = subprocess.run([emulator, program, "quick"], capture_output=True, text=True, check=False)
    assert result.stdout == "no complaint\n"
