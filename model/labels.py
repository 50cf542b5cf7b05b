"""Names of classes: a short id (in a folder of photos, the folder's name) and a name for people."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple


class Label(NamedTuple):
    id: str
    name: str


def imagenet_labels() -> list[Label]:
    """The 1,000 classes of ImageNet in the order of the official checkpoints; ids are WordNet's."""
    text = (resources.files("model") / "imagenet_labels.json").read_text(encoding="utf-8")
    return [Label(*entry) for entry in json.loads(text)]


def numbered_labels(count: int) -> list[Label]:
    """Labels for classes nobody named."""
    return [Label(str(index), f"class {index}") for index in range(count)]


def named(ids: Sequence[str], names: dict[str, str] | None = None) -> list[Label]:
    """Labels for ids: with the names given, else ImageNet's where the id is WordNet's, else the id itself."""
    known = dict(imagenet_labels()) | (names or {})
    return [Label(id_, known.get(id_, id_)) for id_ in ids]


def read_labels(path: Path) -> list[Label]:
    """Labels from a file: JSON (`{id: name}`, `[[id, name], ...]` or `[name, ...]`) or plain text with a name a line.

    Raises:
        ValueError: the file holds none of these.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.split("\n")
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} is neither JSON nor text: {error}") from error
    if isinstance(entries, dict):
        entries = list(entries.items())
    labels = []
    for entry in entries:
        match entry:
            case str() if entry.strip():
                labels.append(Label(entry.strip(), entry.strip()))
            case str():
                continue
            case [str(id_), str(name)] | (str(id_), str(name)):
                labels.append(Label(id_, name))
            case _:
                raise ValueError(f"{path} must hold names or pairs of id and name, not {entry!r}")
    return labels
