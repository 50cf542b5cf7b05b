"""A trained network in its fast inference form, checked against the network itself."""

import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.exact import exact_float32
from model.form import Form, Output
from model.int8_form import Int8Form
from model.kernels import IMPLEMENTATIONS, use
from model.native_form import NativeForm
from model.preprocess import Preprocess
from model.rednet import RedNet
from model.scales import check, observe
from model.torch_form import TorchForm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of `deviation`; rounding alone stays a decade below, in int8 less: noise is not what its scales were taken from.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1.5e-1}
AUTO = {"cpu": ("fp32",), "cuda": ("fp16", "bf16", "fp32")}  # precisions that may win; half ones do not on a CPU
TIMED_IMAGES = {"cpu": 2, "cuda": 16}  # in the batch that decides between precisions; on the CPU for each thread
TIMED_RUNS = 3
STAGES = range(4)


class SelfCheckError(ValueError):
    """No form of the network answers like the network itself."""


@dataclass(frozen=True)
class Prepared:
    """A network in its inference form; made by `prepare`.

    Attributes:
        backend: what runs it, for people.
        head: weights of the linear head, float32 [num_classes, feature_channels], on the device.
        deviation: distance of its answers from those of the plain network on the self-check's input, relative.
        passed_over: why faster forms were not taken, if so.
    """

    form: Form
    preprocess: Preprocess
    head: Tensor
    device: torch.device
    precision: str
    deviation: float
    passed_over: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        return self.form.backend

    def __call__(
        self, pixels: Tensor, *, stages: bool | Collection[int] = False, kernel_sums: bool | Collection[int] = False
    ) -> Output:
        """Forward pixels [B, 3, H, W], any B, sides up to 16384.

        Args:
            pixels: uint8, as `Preprocess.pixels` makes them; or float32, normalised already.
            stages: make the maps of the four stages, too; or of which, counted from 0.
            kernel_sums: make the summed kernels of each stage's last involution, too; likewise.

        Raises:
            ValueError: these are no such pixels.
        """
        wanted = pixels.dtype in (torch.uint8, torch.float32) and pixels.dim() == 4 and pixels.shape[1] == 3
        if not wanted or 0 in pixels.shape[2:]:
            raise ValueError(f"pixels must be uint8 or float32 [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
        return self.form(pixels, _stages(stages), _stages(kernel_sums))


def _stages(wanted: bool | Collection[int]) -> Collection[int]:
    return (STAGES if wanted else ()) if isinstance(wanted, bool) else wanted


def prepare(
    net: RedNet,
    preprocess: Preprocess | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    calibration: Mapping[str, float] | Tensor | None = None,
) -> Prepared:
    """Make the inference form of a network; the network itself stays as it is.

    The forms that may run it are tried, best first, on one fixed input. One that deviates from the plain network is
    passed over. Where several precisions remain, the fastest here is taken.

    Args:
        net: any RedNet for RGB.
        preprocess: how pixels are normalised; None: ImageNet's mean and standard deviation.
        device: auto (the GPU if there is one), cpu, cuda or cuda:N.
        precision: auto, fp32, bf16, fp16, or on the CPU int8; auto considers int8 only with a calibration.
        calibration: for int8, scales as `model.scales` makes them, or photos to take them from, uint8 [N, 3, H, W].

    Raises:
        SelfCheckError: no form answers like the network; its weights are probably broken.
        ValueError: there is no such device or precision here, the network is not for RGB, or the
            calibration not its own.
    """
    if net.config.in_channels != 3:
        raise ValueError(f"only networks for RGB can be prepared, this one has {net.config.in_channels} input channels")
    if precision not in ("auto", *TOLERANCE):
        raise ValueError(f"precision must be auto, {', '.join(TOLERANCE)}, got {precision!r}")
    device = resolve_device(device)
    preprocess = preprocess or Preprocess()
    if precision == "int8" and device.type != "cpu":
        raise ValueError(f"int8 runs on the CPU, not on {device}")
    if precision == "int8" and calibration is None:
        raise ValueError("int8 needs a calibration: scales, or photos to take them from")
    scales = observe(net, preprocess, calibration) if isinstance(calibration, Tensor) else calibration
    if scales is not None:
        check(net, scales)
    yardstick = plain_answer(net, preprocess, _noise(1, preprocess.crop))
    # On the CPU a form may share out whole images among threads, and share what remains among all: one of each.
    copies = torch.get_num_threads() + 1 if device.type == "cpu" else 2
    passed_over: list[str] = []
    passed: list[Prepared] = []
    automatic = (*AUTO[device.type], "int8") if scales is not None and device.type == "cpu" else AUTO[device.type]
    for each in automatic if precision == "auto" else (precision,):
        forms = _forms(net, preprocess, device, each, scales)
        form, deviation = first_sound(forms, yardstick, copies, TOLERANCE[each], passed_over)
        if form:
            head = net.head.fc.weight.detach().to(device, torch.float32, copy=True)
            passed.append(Prepared(form, preprocess, head, device, each, deviation, tuple(passed_over)))
    if not passed:
        raise SelfCheckError("the self-check failed; " + "; ".join(passed_over))
    fastest = passed[0] if len(passed) == 1 else min(passed, key=_seconds)
    return replace(fastest, passed_over=tuple(passed_over))


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name; auto: the GPU if there is one.

    Raises:
        ValueError: it is not here.
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


def _forms(
    net: RedNet, preprocess: Preprocess, device: torch.device, precision: str, scales: Mapping[str, float] | None
) -> Iterator[tuple[str, Callable[[], Form]]]:
    """The forms that may run a network, best first."""
    if precision == "int8":
        yield "int8", lambda: Int8Form(net, preprocess, scales or {})
        return
    dtype = DTYPES[precision]
    if device.type == "cpu" and precision == "fp32":
        yield "native engine", lambda: NativeForm(net, preprocess)
    if "cuda" in IMPLEMENTATIONS and device.type == "cuda":
        from model.cuda_form import CudaForm  # noqa: PLC0415  (Triton is where CUDA is, and takes a second to import)

        yield "CUDA graphs", lambda: CudaForm(net, preprocess, device, dtype)
    yield "torch", lambda: TorchForm(net, preprocess, device, dtype)


class Yardstick(NamedTuple):
    """What the plain network answers for one photo."""

    pixels: Tensor  # [1, 3, H, W]
    logits: Tensor  # [1, num_classes]
    features: Tensor  # [1, feature_channels]
    logit_scale: float  # what logits are compared with: those of one or two classes may happen to be near zero


def first_sound(
    forms: Iterable[tuple[str, Callable[[], Form]]],
    yardstick: Yardstick,
    copies: int,
    tolerance: float,
    passed_over: list[str],
) -> tuple[Form | None, float]:
    """The first form that answers like the plain network, and its relative deviation.

    Args:
        forms: by name, how to make them.
        copies: of the photo, in the batch that they run.
        passed_over: gets the reason for each one before it.
    """
    batch = yardstick.pixels.expand(copies, -1, -1, -1)
    for name, make in forms:
        try:
            form = make()
            output = form(batch)
        except Exception as error:  # noqa: BLE001  (compilers and drivers raise anything; a slower form still serves)
            passed_over.append(f"{name}: {error or type(error).__name__}")
            continue
        deviation = max(
            _distance(output.logits, yardstick.logits, yardstick.logit_scale),
            _distance(output.features, yardstick.features, float(torch.linalg.norm(yardstick.features))),
        )
        if deviation <= tolerance:  # not so for NaN
            return form, deviation
        passed_over.append(f"{name}: deviates by {deviation:.1e} from the plain network")
    return None, math.nan


def plain_answer(net: RedNet, preprocess: Preprocess, pixels: Tensor) -> Yardstick:
    """The network's own answer for a photo, neither folded nor prepared nor from native code.

    It runs wherever its weights are, in at least float32.
    """
    if net.head.fc.weight.dtype.itemsize < 4:
        net = copy.deepcopy(net).float()
    weight, bias = net.head.fc.weight, net.head.fc.bias
    no_autocast = torch.autocast(weight.device.type, enabled=False)
    with _evaluating(net), use("portable"), torch.inference_mode(), no_autocast, exact_float32():
        features = net.features(preprocess.normalise(pixels.to(weight.device)).to(weight.dtype))
        logits = net.head(features)
        # of random directions, a weight and a feature vector of D numbers have a product of about this size
        usual = torch.linalg.norm(weight) * torch.linalg.norm(features) / features.shape[1] ** 0.5
        scale = torch.maximum(usual + torch.linalg.norm(bias), torch.linalg.norm(logits))
        return Yardstick(pixels, logits.float().cpu(), features.float().cpu(), float(scale))


@contextmanager
def _evaluating(net: RedNet) -> Iterator[None]:
    """Evaluation mode for a while; then each module is again in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _distance(ours: Tensor, exact: Tensor, scale: float) -> float:
    """Of the worst of our rows from the exact one, relative to scale; NaN if one is not a number."""
    return float((torch.linalg.norm(ours.cpu() - exact, dim=1) / max(scale, 1e-12)).max())


def _seconds(prepared: Prepared) -> float:
    """The time of a batch: the best of a few runs after a first one."""
    device = prepared.device.type
    images = TIMED_IMAGES[device] * (torch.get_num_threads() if device == "cpu" else 1)
    pixels = _noise(images, prepared.preprocess.crop)
    times = []
    for _ in range(1 + TIMED_RUNS):
        started = time.perf_counter()
        prepared(pixels).logits.cpu()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _noise(images: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
