"""The inference backends for a CUDA device."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import InferenceBackend
from rednet.model.inference.self_check import SelfCheck
from rednet.model.inference.torch_backend import TorchBackend
from rednet.model.nn.rednet import RedNet
from rednet.model.ops import TRITON_UNAVAILABLE

Maker = Callable[[torch.dtype, SelfCheck], InferenceBackend]
Candidates = list[tuple[str, Callable[[], InferenceBackend]]]  # names of backends and functions that make them
TENSOR_CORES = (8, 0)  # the compute capability from which Triton uses them; without them, generation can only be slower


class CudaCandidates:
    """Makes backends, each of which must agree with the network in float32 before it may compute in half precision.

    In half precision, rounding hides faults such as a group of channels that is missing. The code is the same.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        device: a CUDA device.
        float32_check: compares backends in float32 with the network.
        batch_size: of that comparison.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        device: torch.device,
        float32_check: SelfCheck,
        batch_size: int,
    ) -> None:
        self._network = net, preprocess, device
        self._float32_check, self._batch_size = float32_check, batch_size
        self._float32: dict[str, InferenceBackend | Exception] = {}  # by name: the backend, or why it is not valid

    def __call__(self, dtype: torch.dtype, check: SelfCheck) -> Iterator[Candidates]:
        """Yield backends to be compared in speed, each as a list of candidates of which the first valid one is meant.

        Args:
            dtype: dtype of weights and activations.
            check: compares backends in this dtype with the network.
        """

        def candidates(makers: dict[str, Maker]) -> Candidates:
            return [(name, partial(self._make, name, make, dtype, check)) for name, make in makers.items()]

        yield candidates(
            {
                "CUDA graphs": partial(self._triton, graphs=True),
                "Triton without CUDA graphs": partial(self._triton, graphs=False),
                "torch": self._torch,
            }
        )
        device = self._network[2]
        if dtype != torch.float32 and torch.cuda.get_device_capability(device) >= TENSOR_CORES:
            yield candidates({"kernel generation in the involution": partial(self._triton, fuse_generation=True)})

    def _make(
        self,
        name: str,
        make: Maker,
        dtype: torch.dtype,
        check: SelfCheck,
    ) -> InferenceBackend:
        if name not in self._float32:
            try:
                backend = make(torch.float32, self._float32_check)
                self._float32_check.run(backend, self._batch_size)
                self._float32[name] = backend
            except Exception as error:  # noqa: BLE001  (raised again below, for every dtype)
                self._float32[name] = error
        float32 = self._float32[name]
        if isinstance(float32, Exception):
            raise float32
        return float32 if dtype == torch.float32 else make(dtype, check)

    def _triton(
        self, dtype: torch.dtype, check: SelfCheck, graphs: bool = True, fuse_generation: bool = False
    ) -> InferenceBackend:
        if TRITON_UNAVAILABLE:
            raise RuntimeError(TRITON_UNAVAILABLE)
        from rednet.model.inference.cuda.backend import CudaBackend  # noqa: PLC0415  (imports Triton, which may fail)

        return CudaBackend(*self._network, dtype, check, graphs, fuse_generation)

    def _torch(self, dtype: torch.dtype, _: SelfCheck) -> InferenceBackend:
        """Without Triton, which needs a C compiler, a place to run what it compiles, and a GPU that it knows."""
        return TorchBackend(*self._network, dtype, implementation="torch")
