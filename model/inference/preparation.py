"""`prepare`: chooses the fastest inference backend of a network that agrees with the network itself."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.activation_ranges import collect_activation_ranges, validate_ranges
from rednet.model.inference.backend import InferenceBackend, Output
from rednet.model.inference.cuda.candidates import CudaCandidates
from rednet.model.inference.int8_backend import Int8Backend
from rednet.model.inference.native_backend import NativeBackend
from rednet.model.inference.self_check import SelfCheck, first_valid_backend, reference_output
from rednet.model.inference.torch_backend import TorchBackend
from rednet.model.nn.rednet import RedNet

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest accepted relative error. On the CPU, rounding errors are ten times smaller; int8 has less margin, because the
# self-check's input is noise, unlike the photos that the ranges come from. On a GPU, kernels and algorithms are chosen
# for each machine, and the limits are stricter: in half precision, rounding reaches 4e-4 (fp16) and 4e-3 (bf16) in the
# embedded network, and 2e-3 and 1e-2 in a RedNet-50 of random weights.
TOLERANCE = {
    "cpu": {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1.5e-1},
    "cuda": {"fp32": 1e-4, "fp16": 3e-3, "bf16": 3e-2},
}
AUTO = {"cpu": ("fp32",), "cuda": ("fp16", "bf16", "fp32")}  # candidates of "auto"; half precision is slower on a CPU
TIMED_IMAGES = {"cpu": 2, "cuda": 16}  # batch size of the timing that decides between precisions; on the CPU per thread
MIN_TIMED_RUNS, MAX_TIMED_RUNS = 2, 6
MAX_SLOWDOWN = 1.1  # of the preferred precision against the fastest one, before another one is used
STAGES = range(4)


class SelfCheckError(ValueError):
    """No inference backend agrees with the network on the device. The message lists each one's reason."""


@dataclass(frozen=True)
class Prepared:
    """A network that is ready for inference; made by `prepare`.

    Attributes:
        implementation: the backend that runs the network.
        preprocess: the normalisation of pixels.
        head: weights of the linear head, float32 [num_classes, feature_channels], on the device.
        device: where the network runs.
        precision: fp32, bf16, fp16 or int8.
        max_relative_error: largest relative error against the network itself on the self-check's input.
        rejected_backends: why faster backends were not used, one line each.
        check_s: time to make the backend and to run the self-check, on this machine.

    Example:
        >>> from rednet import create_rednet
        >>> run = prepare(create_rednet("rednet26", num_classes=10), device="cpu", precision="fp32")
        >>> run.precision, run.max_relative_error < 1e-4
        ('fp32', True)
    """

    implementation: InferenceBackend
    preprocess: Preprocess
    head: Tensor
    device: torch.device
    precision: str
    max_relative_error: float
    rejected_backends: tuple[str, ...] = ()
    check_s: float = 0.0

    @property
    def backend(self) -> str:
        """The name of the backend, for people."""
        return self.implementation.name

    @property
    def deviation(self) -> float:
        """Deprecated name of `max_relative_error`."""
        warnings.warn("Prepared.deviation is now max_relative_error", DeprecationWarning, stacklevel=2)
        return self.max_relative_error

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Deprecated name of `rejected_backends`."""
        warnings.warn("Prepared.passed_over is now rejected_backends", DeprecationWarning, stacklevel=2)
        return self.rejected_backends

    def __call__(
        self, pixels: Tensor, *, stages: bool | Collection[int] = False, kernel_sums: bool | Collection[int] = False
    ) -> Output:
        """Run a forward pass.

        Args:
            pixels: [B, 3, H, W], any B, sides up to 16384; uint8 as `Preprocess.pixels` returns them, or normalised
                float32.
            stages: also return the maps of all four stages, or of these, counted from 0.
            kernel_sums: also return the summed kernels of every stage's last involution, or of these stages.

        Returns:
            Logits, features, and the maps that were requested.

        Raises:
            ValueError: `pixels` has another shape or dtype.

        Example:
            >>> from rednet import create_rednet
            >>> run = prepare(create_rednet("rednet26"), device="cpu", precision="fp32")
            >>> output = run(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), stages=[3])
            >>> output.stages[0].shape
            torch.Size([1, 2048, 7, 7])
        """
        supported = pixels.dtype in (torch.uint8, torch.float32) and pixels.dim() == 4 and pixels.shape[1] == 3
        if not supported or 0 in pixels.shape[2:]:
            raise ValueError(f"pixels must be uint8 or float32 [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
        return self.implementation(pixels, _selected(stages), _selected(kernel_sums))


def _selected(stages: bool | Collection[int]) -> Collection[int]:
    return (STAGES if stages else ()) if isinstance(stages, bool) else stages


def prepare(
    net: RedNet,
    preprocess: Preprocess | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    calibration: Mapping[str, float] | Tensor | None = None,
) -> Prepared:
    """Make a network ready for fast inference. The network itself is not changed.

    The backends that support the network are tried, best first, on one fixed input. A backend whose output differs from
    the network's own is rejected. If several precisions or ways to compute remain, the fastest on this machine is used.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels; None: ImageNet's mean and standard deviation.
        device: auto (the GPU if there is one, and the CPU if no backend works on it), cpu, cuda or cuda:N.
        precision: auto, fp32, bf16, fp16, or int8 (CPU only). auto considers int8 only if `calibration` is given.
        calibration: for int8, activation ranges (`Checkpoint.calibration`), or photos to take them from, uint8
            [N, 3, H, W].

    Returns:
        A callable from pixels to logits and features.

    Raises:
        SelfCheckError: no backend agrees with the network; its weights are probably broken.
        ValueError: the device or precision is not available, the network is not for RGB or has no classifier, or
            `calibration` belongs to another network.

    Example:
        >>> from rednet import create_rednet
        >>> run = prepare(create_rednet("rednet26", num_classes=10), device="cpu", precision="fp32")
        >>> run(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).logits.shape
        torch.Size([2, 10])
    """
    if net.config.in_channels != 3:
        raise ValueError(f"only networks for RGB can be prepared, this one has {net.config.in_channels} input channels")
    if not net.num_classes:
        raise ValueError("a network without a classifier cannot be prepared; reset_classifier adds one")
    if precision not in ("auto", *TOLERANCE["cpu"]):
        raise ValueError(f"precision must be auto, {', '.join(TOLERANCE['cpu'])}, got {precision!r}")
    resolved = resolve_device(device)
    preprocess = preprocess or Preprocess()
    if precision == "int8" and resolved.type != "cpu":
        raise ValueError(f"int8 runs on the CPU, not on {resolved}")
    if precision == "int8" and calibration is None:
        raise ValueError("int8 needs activation ranges, which `rednet quantize` stores in a checkpoint")
    ranges = collect_activation_ranges(net, preprocess, calibration) if isinstance(calibration, Tensor) else calibration
    if ranges is not None:
        validate_ranges(net, ranges)
    try:
        return _prepare_on(resolved, net, preprocess, precision, ranges)
    except SelfCheckError as error:
        if device != "auto" or resolved.type == "cpu":
            raise
        log.warning("the GPU cannot be used, the network runs on the CPU: %s", error)
        prepared = _prepare_on(torch.device("cpu"), net, preprocess, precision, ranges)
        return replace(prepared, rejected_backends=(f"{resolved}: {error}", *prepared.rejected_backends))


def _prepare_on(
    device: torch.device, net: RedNet, preprocess: Preprocess, precision: str, ranges: Mapping[str, float] | None
) -> Prepared:
    """Make a network ready on this device.

    Raises:
        SelfCheckError: no backend agrees with the network.
    """
    cuda = device.type == "cuda"
    # A GPU's program runs all rows of a batch at once, so that rows could be exchanged: check two different photos. A
    # CPU backend may give whole images to threads and split the remaining one among all of them: check both ways.
    reference = reference_output(net, preprocess, _noise(2 if cuda else 1, preprocess.crop))
    copies = 2 if cuda else torch.get_num_threads() + 1
    checks = {name: SelfCheck(reference, tolerance) for name, tolerance in TOLERANCE[device.type].items()}
    cuda_candidates = CudaCandidates(net, preprocess, device, checks["fp32"], copies)
    rejected: list[str] = []
    valid: list[Prepared] = []
    automatic = ("int8", *AUTO[device.type]) if ranges is not None and not cuda else AUTO[device.type]
    for each in automatic if precision == "auto" else (precision,):
        compared = (
            cuda_candidates(DTYPES[each], checks[each]) if cuda else [_cpu_candidates(net, preprocess, each, ranges)]
        )
        for candidates in compared:
            started = time.perf_counter()
            backend, error = first_valid_backend(candidates, checks[each], copies, rejected)
            if backend:
                head = net.head.fc.weight.detach().to(device, torch.float32, copy=True)
                check_s = time.perf_counter() - started
                valid.append(Prepared(backend, preprocess, head, device, each, error, (), check_s))
    rejected = list(dict.fromkeys(rejected))  # several precisions may have the same reason
    if not valid:
        raise SelfCheckError("the self-check failed; " + "; ".join(rejected))
    chosen = valid[0] if len(valid) == 1 else _fastest(valid)
    return replace(chosen, rejected_backends=tuple(rejected))


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; auto: the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device on this machine.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no {device} here; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def _cpu_candidates(
    net: RedNet, preprocess: Preprocess, precision: str, ranges: Mapping[str, float] | None
) -> Iterator[tuple[str, Callable[[], InferenceBackend]]]:
    """Yield the names of the backends for the CPU and a precision, best first, and functions that make them."""
    if precision == "int8":
        yield "int8", lambda: Int8Backend(net, preprocess, ranges or {})
        return
    if precision == "fp32":
        yield "native engine", lambda: NativeBackend(net, preprocess)
    yield "torch", lambda: TorchBackend(net, preprocess, torch.device("cpu"), DTYPES[precision])


def _fastest(candidates: Sequence[Prepared]) -> Prepared:
    """Return the first candidate, unless another one is clearly faster here.

    Other processes make any single run slow, and none fast. So candidates run in turns and the shortest time of each
    counts; a candidate of less precision is rejected only after more rounds than suffice to accept it.
    """
    device = candidates[0].device.type
    images = TIMED_IMAGES[device] * (torch.get_num_threads() if device == "cpu" else 1)
    pixels = _noise(images, candidates[0].preprocess.crop)
    best_s = [math.inf] * len(candidates)
    for run in range(1 + MAX_TIMED_RUNS):
        for index, candidate in enumerate(candidates):
            started = time.perf_counter()
            candidate(pixels).logits.cpu()  # waits for the device
            if run > 0:  # the first run is slower
                best_s[index] = min(best_s[index], time.perf_counter() - started)
        if run >= MIN_TIMED_RUNS and best_s[0] == min(best_s):
            break
    return next(each for each, seconds in zip(candidates, best_s, strict=True) if seconds <= MAX_SLOWDOWN * min(best_s))


def _noise(images: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
