"""The steps of a training run.

The order of photos, every crop and every blend depend only on (seed, epoch, photo). So a run that was interrupted and
resumed, or that reads with another number of threads, uses exactly the same inputs as an uninterrupted one.
"""

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rednet.model.images.preprocess import Pixels, Preprocess
from rednet.model.images.rgb import upright_rgb
from rednet.model.nn.rednet import RedNet
from rednet.model.training.augmentation import random_resized_crop, trivial_augment
from rednet.model.training.loader import Batch, Photo, load_batches, read_photo
from rednet.model.training.mixing import mix
from rednet.model.training.progress import progress
from rednet.model.training.recipe import Recipe
from rednet.model.training.resume import ResumeFile, State

SAVE_EVERY_S = 60.0


class Run:
    """Runs the steps of a training run.

    Args:
        state: the state; it is updated.
        recipe: the hyperparameters.
        preprocess: the preprocessing that the network will be served with.
        photos: the training photos.
        device: where the network is.
        workers: number of threads that read photos.
    """

    def __init__(
        self,
        state: State,
        recipe: Recipe,
        preprocess: Preprocess,
        photos: Sequence[Photo],
        device: torch.device,
        workers: int,
    ) -> None:
        self.state, self.recipe, self.preprocess = state, recipe, preprocess
        self.photos, self.device, self.workers = photos, device, workers
        # A last batch of one photo is dropped: batch norm needs two.
        full, rest = divmod(len(photos), recipe.batch_size)
        self.steps = full + (rest > 1)  # batches in an epoch
        bf16 = has_fast_bf16(device) if recipe.precision == "auto" else recipe.precision == "bf16"
        self.precision = "bf16" if bf16 else "fp32"

    def epoch(self, resume: ResumeFile) -> None:
        """Run the rest of this epoch, and save the state every `SAVE_EVERY_S`."""
        state = self.state
        state.net.train()
        saved_at = time.monotonic()
        label = f"epoch {state.epoch + 1}/{self.recipe.epochs}"
        for batch in progress(self._batches(), total=self.steps, done=state.step, describe=label):
            for group in state.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(state.epoch + state.step / self.steps)
            state.loss_sum += self._step(batch)
            state.step += 1
            update_average(state.averaged, state.net, state.epoch * self.steps + state.step)
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                resume.save(state)
                saved_at = time.monotonic()

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the averaged network's logits [B, classes] for uint8 pixels [B, 3, H, W]."""
        with self._autocast():
            logits: Tensor = self.state.averaged(self.preprocess.normalise(pixels.to(self.device)))
        return logits.float()

    def _step(self, batch: Batch) -> float:
        state, recipe = self.state, self.recipe
        x = self.preprocess.normalise(batch.pixels.to(self.device))
        targets = batch.targets.to(self.device)
        rng = np.random.default_rng((recipe.seed, state.epoch, state.step, 1))
        x, weight = mix(x, recipe.mixup, recipe.cutmix, rng)
        with self._autocast():
            logits = state.net(x).float()
        loss, other = (
            F.cross_entropy(logits, each, label_smoothing=recipe.label_smoothing) for each in (targets, targets.flip(0))
        )
        loss = weight * loss + (1 - weight) * other
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError("the loss is no longer finite; a lower learning rate may help")
        return value

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _batches(self) -> Iterator[Batch]:
        """Yield the remaining batches of this epoch."""
        epoch, recipe = self.state.epoch, self.recipe
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(self.photos))
        size = recipe.size_at(epoch)

        def read(index: int) -> tuple[Pixels, int]:
            rng = np.random.default_rng((recipe.seed, epoch, index))
            photo = self.photos[index]
            pixels = read_photo(photo.path, lambda image: random_resized_crop(upright_rgb(image), size, rng))
            if recipe.trivial_augment and rng.random() < recipe.trivial_augment:
                pixels = trivial_augment(pixels, rng)
            return pixels, photo.target

        end = self.steps * recipe.batch_size
        remaining = [int(index) for index in order[self.state.step * recipe.batch_size : end]]
        return load_batches(remaining, read, recipe.batch_size, self.workers)


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on weight matrices, and none on biases and batch norms."""
    matrices = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in net.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), eps=1e-6, fused=True)


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse the memory of freed tensors instead of returning it to the system.

    That saves a fifth to a third of a training step on a CPU: returned memory is mapped again page by page. Other C
    libraries do not need this.
    """
    mmap_threshold, trim_threshold, maximum = -3, -1, 2**31 - 1
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        if not libc.mallopt(mmap_threshold, maximum):  # older versions accept at most 32 MiB
            libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, maximum)


@torch.no_grad()
def update_average(averaged: RedNet, net: RedNet, step: int) -> None:
    """Update the averaged weights after step `step`, from 1: in effect, the mean over the last tenth of all steps.

    Polynomial-decay averaging, Shamir and Zhang, 2013, https://arxiv.org/abs/1212.1824, with eta = 9.
    """
    for mean, new in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 10 / (step + 9))
        else:  # a counter
            mean.copy_(new)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
