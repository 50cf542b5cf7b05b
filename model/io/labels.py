"""Class labels: a short id and a name for people."""

import json
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple


class Label(NamedTuple):
    """The label of a class.

    Attributes:
        id: short and unique: the folder of its photos, or a WordNet id.
        name: for people.

    Example:
        >>> Label("n02102040", "English springer").name
        'English springer'
    """

    id: str
    name: str


def imagenet_labels() -> list[Label]:
    """Return ImageNet's 1,000 labels in the order of the official checkpoints, with WordNet ids."""
    text = (resources.files("rednet.model") / "imagenet_labels.json").read_text(encoding="utf-8")
    return [Label(*entry) for entry in json.loads(text)]


def numbered_labels(count: int) -> list[Label]:
    """Return labels for classes without names."""
    return [Label(str(index), f"class {index}") for index in range(count)]


def unique_labels(names: Sequence[str]) -> list[Label]:
    """Return labels for names. Ids are the names if these are unique, else numbers: ImageNet has two kinds of crane."""
    unique = len(set(names)) == len(names)
    return [Label(name if unique else str(index), name) for index, name in enumerate(names)]


def labels_of(ids: Sequence[str], names: dict[str, str] | None = None) -> list[Label]:
    """Return labels for ids. A name is the given one, else ImageNet's for a WordNet id, else the id."""
    known = dict(imagenet_labels()) | (names or {})
    return [Label(id_, known.get(id_, id_)) for id_ in ids]
