"""A short, honest recipe: a folder of class folders in, a checkpoint that can be served out.

SGD with Nesterov momentum, a cosine schedule after a warm-up, weight decay on weight matrices only, label smoothing,
random resized crops and flips. The order of photos and every crop follow from (seed, epoch, photo) alone, so that a run
that was killed and resumed, or read by another number of threads, sees exactly what an unbroken one sees.
"""

import ctypes
import hashlib
import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model.checkpoint import Checkpoint, save_checkpoint, write_atomically
from model.evaluate import evaluate
from model.labels import named
from model.photos import Batch, Photo, PhotoError, batches, find_photos, read_photo
from model.preprocess import Pixels, Preprocess, scaled_box, upright_rgb
from model.progress import progress
from model.rednet import RedNet, RedNetConfig

SMALLEST_CROP = 0.35  # of the photo's area
SAVE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run follows from. Two runs of one recipe on one machine end with the same weights.

    Raises:
        ValueError: it cannot be followed.
    """

    depth: int = 26
    base_channels: int = 64
    epochs: int = 30
    size: int = 128  # pixels of a training crop; served at 8/7 of it or a little more: random crops enlarge
    batch_size: int = 64
    learning_rate: float = 0.15
    warmup_epochs: float = 2.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.size) < 1 or self.batch_size < 2:  # batch norm needs two
            raise ValueError(f"epochs and size must be at least 1 and batch_size 2, got {self}")
        if not 0 < self.learning_rate < math.inf or self.seed < 0:
            raise ValueError(f"learning_rate must be above 0 and seed not below, got {self}")

    @property
    def preprocess(self) -> Preprocess:
        crop = math.ceil(self.size * 8 / 7 / 32) * 32
        return Preprocess(resize=round(crop * 8 / 7), crop=crop)


@dataclass
class State:
    """All that changes while a run goes on."""

    net: RedNet
    optimizer: torch.optim.SGD
    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    loss_sum: float = 0.0  # over this epoch's batches
    history: list[dict[str, float]] = field(default_factory=list)


def train(data: Path, output: Path, recipe: Recipe, *, device: torch.device, workers: int = 2) -> Checkpoint:
    """Train on `data/train/<class>/*`, watch `data/val/<class>/*`, write `output`.

    While it runs, `output` + ".training" holds all that is needed to go on after a kill; run the same command again.

    Raises:
        PhotoError: a folder or photo cannot be used.
        ValueError: the recipe is no network, or an unfinished run beside `output` follows another recipe or other data.
        OSError: `output` cannot be written.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise NotADirectoryError(f"{output} must be a file in a folder that exists")
    classes, photos = find_photos(data / "train")
    if len(photos) < 2:
        raise PhotoError(f"{data / 'train'} holds a single photo, from which nothing can be learned")
    _, watched = find_photos(data / "val", classes)
    torch.manual_seed(recipe.seed)
    stem_channels = max(32, recipe.base_channels)  # the involution of the stem has half of them, in groups of 16
    config = RedNetConfig(
        depth=recipe.depth, num_classes=len(classes), base_channels=recipe.base_channels, stem_channels=stem_channels
    )
    # Channels-last is how convolutions and the native involution want it; what flows through the network follows suit.
    net = RedNet(config).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    keep_freed_memory()

    def logits_of(pixels: Tensor) -> Tensor:
        logits: Tensor = net(recipe.preprocess.normalise(pixels.to(device)))
        return logits

    state = State(net, _optimizer(net, recipe))
    resume = ResumeFile(output.with_name(output.name + ".training"), recipe, photos)
    resume.load(state)
    while state.epoch < recipe.epochs:
        _train_epoch(state, photos, recipe, device, workers, resume)
        net.eval()
        result = evaluate(logits_of, recipe.preprocess, watched, workers=workers, describe="  validation")
        _finish_epoch(state, result["top1"])
        resume.save(state)
    checkpoint = Checkpoint(
        net=net.cpu().eval(),
        labels=named(classes),
        preprocess=recipe.preprocess,
        name=output.name.removesuffix(".safetensors"),
        provenance=_provenance(data, recipe, state),
    )
    save_checkpoint(output, checkpoint, half=True)
    resume.path.unlink(missing_ok=True)
    return checkpoint


def keep_freed_memory() -> None:
    """Ask the C library to keep the memory of freed tensors for the next step (a fifth to a third of a step's time on a
    CPU): it would give it back to the system, and get it again page by page. Only glibc has, and needs, the request.
    """
    mmap_threshold, trim_threshold, most = -3, -1, 2**31 - 1
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        if not libc.mallopt(mmap_threshold, most):  # older versions take no more than this
            libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, most)


def _train_epoch(
    state: State, photos: list[Photo], recipe: Recipe, device: torch.device, workers: int, resume: "ResumeFile"
) -> None:
    state.net.train()
    steps = _steps(photos, recipe)
    saved_at = time.monotonic()
    label = f"epoch {state.epoch + 1}/{recipe.epochs}"
    for batch in progress(_epoch(photos, state, recipe, workers), total=steps, done=state.step, describe=label):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, state.epoch + state.step / steps)
        state.loss_sum += _step(state, recipe, batch, device)
        state.step += 1
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            resume.save(state)
            saved_at = time.monotonic()


def _step(state: State, recipe: Recipe, batch: Batch, device: torch.device) -> float:
    x = recipe.preprocess.normalise(batch.pixels.to(device))
    logits = state.net(x)
    loss = F.cross_entropy(logits, batch.targets.to(device), label_smoothing=recipe.label_smoothing)
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError("the loss is no longer finite; a lower learning rate may help")
    return value


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up, then half a cosine down to zero, at a (fractional) epoch."""
    warmup = min(recipe.warmup_epochs, recipe.epochs / 5)
    if epoch < warmup:
        return recipe.learning_rate * (epoch + 0.01) / (warmup + 0.01)
    done = (epoch - warmup) / (recipe.epochs - warmup)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def _epoch(photos: list[Photo], state: State, recipe: Recipe, workers: int) -> Iterator[Batch]:
    """The batches of this epoch that are not done yet."""
    epoch = state.epoch
    order = np.random.default_rng((recipe.seed, epoch)).permutation(len(photos))

    def read(index: int) -> tuple[Pixels, int]:
        rng = np.random.default_rng((recipe.seed, epoch, index))
        pixels = read_photo(photos[index].path, lambda image: augmented(upright_rgb(image), recipe.size, rng))
        return pixels, photos[index].target

    end = _steps(photos, recipe) * recipe.batch_size
    rest = [int(index) for index in order[state.step * recipe.batch_size : end]]
    return batches(rest, read, recipe.batch_size, workers)


def _steps(photos: Sequence[Photo], recipe: Recipe) -> int:
    """Batches in an epoch. A last one of a single photo is left out: batch norm could learn nothing from it."""
    full, rest = divmod(len(photos), recipe.batch_size)
    return full + (rest > 1)


def augmented(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """A random part of an upright RGB photo, of random area and aspect ratio, half of the time mirrored."""
    width, height = image.size
    area = width * height * rng.uniform(SMALLEST_CROP, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    pixels = scaled_box(image, (left, top, left + w, top + h), size)
    return pixels[:, :, ::-1].copy() if rng.random() < 0.5 else pixels


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    matrices = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in net.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)


def _finish_epoch(state: State, top1: float) -> None:
    state.history.append({"loss": state.loss_sum / state.step, "top1": top1})
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
    print(f"epoch {state.epoch}: loss {state.history[-1]['loss']:.4f}, validation top-1 {top1:.4f}", file=sys.stderr)


class ResumeFile:
    """All that a killed run needs to go on, beside the file it was going to write.

    Args:
        path: the file.
        recipe, photos: what the run follows; a run that followed others is not taken up.
    """

    def __init__(self, path: Path, recipe: Recipe, photos: Sequence[Photo]) -> None:
        self.path = path
        data = "\n".join(f"{photo.target} {photo.path.parent.name}/{photo.path.name}" for photo in photos)
        self._follows = {"recipe": asdict(recipe), "photos": hashlib.sha256(data.encode()).hexdigest()}

    def save(self, state: State) -> None:
        content = io.BytesIO()
        torch.save(
            {
                **self._follows,
                "net": state.net.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "epoch": state.epoch,
                "step": state.step,
                "loss_sum": state.loss_sum,
                "history": state.history,
            },
            content,
        )
        write_atomically(self.path, content.getvalue())

    def load(self, state: State) -> None:
        """Take up an unfinished run, if there is one."""
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            follows = {key: saved[key] for key in self._follows}
            if follows == self._follows:
                state.net.load_state_dict(saved["net"])
                state.optimizer.load_state_dict(saved["optimizer"])
                state.epoch, state.step = saved["epoch"], saved["step"]
                state.loss_sum, state.history = saved["loss_sum"], saved["history"]
        except Exception as error:  # a damaged zip archive or pickle raises nearly anything
            raise ValueError(f"{self.path} is damaged; remove it to start anew") from error
        if follows != self._follows:
            what = "options" if follows["recipe"] != self._follows["recipe"] else "photos"
            raise ValueError(f"{self.path} is an unfinished run with other {what}; finish that one or remove it")
        print(f"resuming in epoch {state.epoch + 1}, after {state.step} batches", file=sys.stderr)


def _provenance(data: Path, recipe: Recipe, state: State) -> dict[str, Any]:
    return {
        "data": data.resolve().name,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "history": state.history,
    }
