"""The authors' CUDA kernel, from their own file, as a baseline.

The file is `cls/mmcls/models/utils/involution_cuda.py` of https://github.com/d-li14/involution. It needs CuPy, and
calls a function that CuPy has removed. It imports a layer of MMCV that is not needed here.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from torch import Tensor, nn

from rednet.model.nn.involution import Involution


def official_layer(path: Path) -> Callable[[Involution], nn.Module]:
    """Returns a function that makes a layer with the authors' kernel from ours.

    It supports float32, and sides that are multiples of the stride.

    Args:
        path: their file; it is run.
    """
    import cupy

    cupy.cuda.compile_with_cache = lambda code: cupy.RawModule(code=code)
    mmcv = ModuleType("mmcv.cnn")
    mmcv.ConvModule = None  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"mmcv": ModuleType("mmcv"), "mmcv.cnn": mmcv}):
        involve = runpy.run_path(str(path))["_involution_cuda"]

    class Official(nn.Module):
        def __init__(self, layer: Involution) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            layer, k = self.layer, self.layer.kernel_size
            kernel = layer.conv2(layer.conv1(layer.avgpool(x))).contiguous()  # the kernel requires NCHW
            kernel = kernel.unflatten(1, (layer.groups, k, k))
            out: Tensor = involve(x.contiguous(), kernel, stride=layer.stride, padding=k // 2)
            return out

    return Official
