"""The inference form that torch runs: anywhere, in any precision."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from model.exact import exact_float32
from model.folded import folded
from model.form import Output, Stages
from model.kernels import implementation_name
from model.preprocess import Preprocess
from model.rednet import BLOCKS, RedNet


class TorchForm:
    """A copy of a network with batch norms folded, on one device, in one dtype."""

    def __init__(self, net: RedNet, preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> None:
        self.net = folded(net).to(device, dtype)
        self._preprocess, self._device, self._dtype = preprocess, device, dtype
        self.backend = f"torch, {implementation_name(device, dtype)} involution"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        x = pixels.to(self._device, non_blocking=True)
        x = (self._preprocess.normalise(x) if x.dtype == torch.uint8 else x).to(self._dtype)
        exact = exact_float32() if self._dtype == torch.float32 else nullcontext()
        with exact, torch.autocast(self._device.type, enabled=False), self._summed_kernels(kernel_sums) as sums:
            maps = self.net.stages(x)
            features = maps[-1].mean(dim=(2, 3))
            logits = self.net.head(features)
        return Output(
            logits.float(),
            features.float(),
            tuple(maps[stage].float() for stage in sorted(stages)) if stages else None,
            tuple(each.float() for each in sums) if kernel_sums else None,
        )

    @contextmanager
    def _summed_kernels(self, wanted: Stages) -> Iterator[list[Tensor]]:
        """While it lasts, the kernels that each stage's last involution makes are summed over their taps."""
        sums: list[Tensor] = []
        handles = []
        for stage in sorted(wanted):
            last = BLOCKS[self.net.config.depth][stage] - 1
            generator = self.net.backbone.get_submodule(f"layer{stage + 1}.{last}.conv2.conv2")

            def add_taps(_: nn.Module, __: object, kernel: Tensor) -> None:  # [B, G*K*K, h, w]
                taps = self.net.config.kernel_size**2
                sums.append(kernel.reshape(kernel.shape[0], -1, taps, *kernel.shape[2:]).sum(dim=2))

            handles.append(generator.register_forward_hook(add_taps))
        try:
            yield sums
        finally:
            for handle in handles:
                handle.remove()
