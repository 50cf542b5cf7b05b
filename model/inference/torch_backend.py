"""The inference backend in plain PyTorch: any device, any precision."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import Output, Stages
from rednet.model.inference.fold_batchnorm import fold_batchnorm
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.nn.rednet import BLOCKS, RedNet
from rednet.model.ops import implementation_name, use


class TorchBackend:
    """A copy of a network with folded batch norms, on one device and in one dtype.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        device: where it runs.
        dtype: dtype of weights and activations.
        implementation: of involution; empty: the preferred one for the device.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
        implementation: str = "",
    ) -> None:
        self.net = fold_batchnorm(net).to(device, dtype)
        self._preprocess, self._device, self._dtype = preprocess, device, dtype
        self._implementation = implementation or implementation_name(device, dtype)
        self.name = f"torch, involution: {self._implementation}"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        x = pixels.to(self._device, non_blocking=True)
        x = (self._preprocess.normalise(x) if x.dtype == torch.uint8 else x).to(self._dtype)
        precision = ieee_float32() if self._dtype == torch.float32 else nullcontext()
        no_autocast = torch.autocast(self._device.type, enabled=False)
        with precision, no_autocast, use(self._implementation), self._summed_kernels(kernel_sums) as sums:
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
    def _summed_kernels(self, stages: Stages) -> Iterator[list[Tensor]]:
        """Collect the kernels of each stage's last involution, summed over their taps, in forward passes inside."""
        sums: list[Tensor] = []
        handles = []
        for stage in sorted(stages):
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
