"""Names of classes: a short id (in a folder of photos, the folder's name) and a name for people."""

import json
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple


class Label(NamedTuple):
    """A class.

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
    """The 1,000 classes of ImageNet in the order of the official checkpoints; ids are WordNet's."""
    text = (resources.files("rednet.model") / "imagenet_labels.json").read_text(encoding="utf-8")
    return [Label(*entry) for entry in json.loads(text)]


def numbered_labels(count: int) -> list[Label]:
    """Labels for classes without names."""
    return [Label(str(index), f"class {index}") for index in range(count)]


def unique_labels(names: Sequence[str]) -> list[Label]:
    """Labels with names only, which are the ids, too, unless two are the same: ImageNet has two kinds of crane."""
    unique = len(set(names)) == len(names)
    return [Label(name if unique else str(index), name) for index, name in enumerate(names)]


def labels_of(ids: Sequence[str], names: dict[str, str] | None = None) -> list[Label]:
    """Labels for ids: with the names given, else ImageNet's where the id is WordNet's, else the id itself."""
    known = dict(imagenet_labels()) | (names or {})
    return [Label(id_, known.get(id_, id_)) for id_ in ids]
