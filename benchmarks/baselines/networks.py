"""Other ways to run RedNet: plain torch, torch.compile, ONNX Runtime and OpenVINO."""

import copy
import tempfile
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rednet import Preprocess, RedNet, prepare
from rednet.model.inference.fold_batchnorm import fold_batchnorm
from rednet.model.nn.involution import Involution
from rednet.model.ops import reference, use

Pixels = NDArray[np.uint8]  # [B, 3, H, W]
Run = Callable[[Pixels], object]


class Shifted(nn.Module):
    """An involution layer in operators that every exporter supports: 49 shifted products."""

    def __init__(self, layer: Involution) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, k = self.layer, self.layer.kernel_size
        kernel = layer.conv2(layer.conv1(layer.avgpool(x)))
        batch, _, h, w = kernel.shape
        grouped = x.reshape(batch, layer.groups, -1, *x.shape[2:])
        kernel = kernel.reshape(batch, layer.groups, 1, k * k, h, w)
        padded = F.pad(grouped, (k // 2,) * 4)
        s = layer.stride
        total = torch.zeros(())
        for tap in range(k * k):
            top, left = divmod(tap, k)
            window = padded[..., top : top + (h - 1) * s + 1 : s, left : left + (w - 1) * s + 1 : s]
            total = total + kernel[:, :, :, tap] * window
        return total.reshape(batch, -1, h, w)


class Unfolded(nn.Module):
    """An involution layer by its definition, with `unfold` instead of our operator."""

    def __init__(self, layer: Involution) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        kernel = layer.conv2(layer.conv1(layer.avgpool(x)))
        kernel = kernel.reshape(kernel.shape[0], layer.groups, layer.kernel_size**2, *kernel.shape[2:])
        return reference.forward(x, kernel, layer.stride)


def with_involution(net: RedNet, kind: Callable[[Involution], nn.Module]) -> RedNet:
    """The network with its involution layers replaced."""
    for name, module in list(net.named_modules()):
        if isinstance(module, Involution):
            net.set_submodule(name, kind(module))
    return net


def exportable(net: RedNet) -> RedNet:
    """A copy of the network, batch norms folded, without our operator."""
    return with_involution(fold_batchnorm(net), Shifted)


def definition(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """The paper's algorithm 1, eager."""
    return _eager(copy.deepcopy(net).eval(), preprocess, "reference")


def portable(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """Our network without the native library, eager."""
    return _eager(fold_batchnorm(net), preprocess, "torch")


def _eager(net: RedNet, preprocess: Preprocess, implementation: str) -> Run:
    @torch.inference_mode()
    def run(pixels: Pixels) -> object:
        with use(implementation):
            return net(preprocess.normalise(torch.from_numpy(pixels)))

    return run


def compiled(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """torch.compile of the network with our native operator and frozen weights.

    Without the operator it would compile 49 products per involution: minutes for every batch size, for the same speed.
    """
    from torch._inductor import config

    config.freezing = True
    plain = torch.compile(fold_batchnorm(net).to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def run(pixels: Pixels) -> object:
        with torch.no_grad():
            return plain(preprocess.normalise(torch.from_numpy(pixels)))

    return run


def onnx_runtime(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """ONNX Runtime on its CPU provider, all optimisations."""
    import onnxruntime

    example = torch.zeros(batch, 3, preprocess.crop, preprocess.crop)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        torch.onnx.export(exportable(net), (example,), file.name, dynamo=False, input_names=["x"], opset_version=17)
        session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"x": preprocess.normalise(torch.from_numpy(pixels)).numpy()})


def openvino(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """OpenVINO in float32, tuned for latency at batch 1 and for throughput above."""
    import openvino as ov

    example = torch.zeros(batch, 3, preprocess.crop, preprocess.crop)
    model = ov.convert_model(exportable(net), example_input=example, input=[list(example.shape)])
    hint = "LATENCY" if batch == 1 else "THROUGHPUT"
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    run = core.compile_model(model, "CPU", settings)
    return lambda pixels: run(preprocess.normalise(torch.from_numpy(pixels)).numpy())


def ours(net: RedNet, preprocess: Preprocess, batch: int) -> Run:
    """`prepare`, as the server uses it."""
    prepared = prepare(net, preprocess, device="cpu")
    return lambda pixels: prepared(torch.from_numpy(pixels))


BASELINES: dict[str, Callable[[RedNet, Preprocess, int], Run]] = {
    "definition": definition,
    "portable": portable,
    "torch.compile+operator": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "ours": ours,
}
ANY_BATCH = ("definition", "portable", "ours")  # built once; others are built for each batch size
