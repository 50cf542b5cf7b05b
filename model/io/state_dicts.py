"""Finds the state dict in the files that training scripts save, and infers the architecture from its tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor

from rednet.model.nn.rednet import BLOCKS, RedNetConfig

STEM = "backbone.stem.0.conv.weight"  # a tensor of every RedNet
MAX_NESTING = 3  # levels of dicts around a state dict, such as checkpoint, model, module
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")  # most common first
AVERAGED = re.compile(r"(^|_)(ema|swa|averaged|average|shadow)(_|\d|$)")  # in a key or prefix
AVERAGING_COUNTERS = {"n_averaged", "steps", "num_updates"}  # entries that averaging adds to the weights


class StateDict(NamedTuple):
    """A network's tensors under their official names."""

    tensors: dict[str, Tensor]
    source: str  # keys and prefix that led to them in the file; empty: the tensors were the whole file


def find_state_dict(content: object) -> StateDict:
    """Find the state dict of a RedNet anywhere in a file's content, under any prefix.

    Prefixes are removed: `module.` of data-parallel training, `_orig_mod.` of torch.compile, `model.` of Lightning, and
    combinations. Averaged weights (EMA) are preferred to plain ones in the same file, as in timm.

    Raises:
        ValueError: there is no state dict, it contains other things than plain tensors, or several are equally good.
    """
    found = list(_candidates(content, (), set()))
    if not found:
        raise ValueError(_reason_for_none(content))
    keys, held = min(found, key=lambda each: _rank(content, each[0]))
    tensors, prefix, prefixes = _without_prefix(_tensors(held))
    source = ".".join((*keys, prefix.rstrip("."))).strip(".")
    unused = [".".join(other) or "the top level" for other, _ in found if other != keys] + prefixes
    return StateDict(tensors, f"{source} (preferred to {', '.join(unused)})" if unused else source)


def class_names(content: object) -> list[str] | None:
    """Return class names from the `meta` entry of a checkpoint of mmcls (`CLASSES`) or mmpretrain (`dataset_meta`)."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return None
    inner = meta.get("dataset_meta")
    for entry in (meta, inner) if isinstance(inner, dict) else (meta,):
        for key in ("CLASSES", "classes"):
            names = entry.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _candidates(
    content: object, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    if any(isinstance(key, str) and key.replace("_orig_mod.", "").endswith(STEM) for key in content):
        yield keys, content
    elif len(keys) < MAX_NESTING:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _candidates(value, (*keys, key), seen)


def _rank(content: object, keys: tuple[str, ...]) -> tuple[bool, int]:
    """Return a sort key, lowest for the best candidate: averaged weights first, then the usual keys."""
    averaged = any(AVERAGED.search(key) for key in keys)
    if keys == ("ema_state_dict",) and isinstance(content, dict):
        meta = content.get("meta")
        # mmengine swaps the two when it saves: its `state_dict` has the averaged weights, `ema_state_dict` the others.
        averaged = not (isinstance(meta, dict) and "mmengine_version" in meta)
    usual = USUAL_KEYS.index(keys[-1]) if keys and keys[-1] in USUAL_KEYS else len(USUAL_KEYS)
    return not averaged, usual


def _tensors(held: Mapping[Any, Any]) -> dict[str, Tensor]:
    if not all(isinstance(key, str) and _is_plain(value) for key, value in held.items()):
        raise ValueError("has no state dict of plain tensors")
    return {key.replace("_orig_mod.", ""): value for key, value in held.items()}


def _is_plain(value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    return str(value.layout) == "torch.strided" and not (value.is_nested or value.is_meta or value.is_quantized)


def _without_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the tensors without the prefix of `backbone.`, that prefix, and those of other networks in the dict."""
    prefixes = [key.removesuffix(STEM) for key in tensors if key.endswith(STEM)]
    averaged = [prefix for prefix in prefixes if any(AVERAGED.search(part) for part in prefix.split("."))]
    chosen = averaged if len(prefixes) > 1 and averaged else prefixes
    if len(chosen) > 1:
        raise ValueError(f"contains several networks: {', '.join(f'{prefix}backbone' for prefix in sorted(chosen))}")
    prefix = chosen[0]
    copies = {f"ema_{key.replace('.', '_')}" for key in tensors}  # mmcv's EMAHook stores these as buffers
    kept = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key not in copies and key not in AVERAGING_COUNTERS and (len(prefixes) == 1 or key.startswith(prefix))
    }
    return kept, prefix, [f"{other}backbone" for other in prefixes if other != prefix]


def _reason_for_none(content: object) -> str:
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and _is_plain(each) for key, each in tensors.items()
    ):
        return "has no state dict of plain tensors"
    first = next(iter(tensors), None)
    return f"is not a RedNet: it has no tensor {STEM}" + (f", but {first[:100]}" if first else "")


def infer_config(shapes: Mapping[str, Sequence[int]]) -> RedNetConfig:
    """Infer the architecture from the names and shapes of tensors.

    Shapes depend only on the quotient of K*K and the channels per group, so the paper's 16 channels are assumed. They
    do not depend on strides at all; the official ones are assumed.

    Raises:
        ValueError: the tensors are not those of a RedNet.
    """
    blocks = tuple(
        len({key.split(".")[2] for key in shapes if key.startswith(f"backbone.layer{stage}.")}) for stage in range(1, 5)
    )
    depth = next((depth for depth, layout in BLOCKS.items() if layout == blocks), None)
    if depth is None:
        raise ValueError(f"its stages have {blocks} blocks, unlike any RedNet")
    try:
        num_classes = shapes["head.fc.weight"][0]
        half_stem, in_channels = shapes["backbone.stem.0.conv.weight"][:2]
        base_channels = shapes["backbone.layer1.0.conv1.weight"][0]
        bottleneck = shapes["backbone.layer1.0.conv2.conv1.conv.weight"][0]
        kernel = shapes["backbone.layer1.0.conv2.conv2.conv.weight"][0]
        stem_kernel = shapes["backbone.stem.1.conv2.conv.weight"][0]
    except KeyError as error:
        raise ValueError(f"its tensor {error} is missing") from error
    except (IndexError, ValueError) as error:
        raise ValueError("the tensors that determine its width have too few dimensions") from error
    return RedNetConfig(
        depth=depth,
        num_classes=num_classes,
        in_channels=in_channels,
        stem_channels=2 * half_stem,
        base_channels=base_channels,
        kernel_size=isqrt(kernel * 16 // max(1, base_channels)),
        stem_kernel_size=isqrt(stem_kernel * 16 // max(1, half_stem)),
        reduction_ratio=base_channels // max(1, bottleneck),
    )
