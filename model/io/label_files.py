"""Reads files of class names in the formats that other tools write."""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rednet.model.io.labels import Label
from rednet.model.io.text import clean_text

MAX_BYTES = 16_000_000  # of a file; ImageNet-21k's names are 1 MB
SYNSET = re.compile(r"(n\d{8})[\s,]+(\S.*)")  # a line of ImageNet's synset files
INDEX_KEYS, ID_KEYS, NAME_KEYS = ("index", "idx", "class_index"), ("id", "wnid", "synset"), ("name", "label", "class")


@dataclass(frozen=True)
class Entry:
    """The entry of one class in a file."""

    index: int | None
    id: str | None
    name: str


def read_labels(path: Path, current: Sequence[Label] | None = None, *, keep_ids: bool = True) -> list[Label]:
    """Read labels from a file of class names, in the order of the logits.

    Supported are text with one name per line, CSV and TSV (`name`, `index,name` or `id,name`, with or without a
    header), and JSON: a list of names, of `[id, name]` or of objects; `{id: name}`; `{index: name}`; Keras's
    `{index: [id, name]}`; torchvision's `class_to_idx`, `{name: index}`; and a Hugging Face `config.json` with
    `id2label`.

    An entry with an index names the class with that index, an entry with the id of a class the class with that id. Any
    other entry is matched by its position in the file.

    Args:
        path: the file.
        current: the network's labels, whose ids remain where the file has none; None: accept any number of classes.
        keep_ids: false where the current ids are only a guess; then names become ids.

    Raises:
        ValueError: the format is not supported, or the file does not name each class of the network once.
        OSError: the file cannot be read.
    """
    ids = [label.id for label in current] if current is not None else []
    try:
        entries = _entries(path, set(ids))
        if not entries:
            raise ValueError("it is empty")
        if any(not entry.name or entry.id == "" for entry in entries):
            raise ValueError("it has an empty name")
        ordered = _ordered(entries, ids)
    except (ValueError, RecursionError, csv.Error) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} cannot be used as class names: {error}") from error
    if current is not None and len(ordered) != len(current):
        raise ValueError(f"{path} names {len(ordered)} classes; the network has {len(current)}")
    kept = ids if keep_ids and ids else [entry.name for entry in ordered]
    if len(set(kept)) < len(kept):  # names need not be unique: ImageNet has two classes called crane
        kept = [str(index) for index in range(len(ordered))]
    labels = [Label(entry.id or kept[index], entry.name) for index, entry in enumerate(ordered)]
    _check_unique([label.id for label in labels], f"{path} has two classes with the id")
    return labels


def _ordered(entries: list[Entry], ids: list[str]) -> list[Entry]:
    """Return the entries in the order of the classes."""
    if any(entry.index is not None for entry in entries):
        by_index = {entry.index: entry for entry in entries}
        if None in by_index:
            raise ValueError("some classes have an index and others do not")
        _check_unique([entry.index for entry in entries], "it has two classes with the index")
        missing = next((index for index in range(len(entries)) if index not in by_index), None)
        if missing is not None:
            raise ValueError(f"it names {len(entries)} classes, but none with index {missing}; indices begin at 0")
        return [by_index[index] for index in range(len(entries))]
    by_id = {entry.id: entry for entry in entries if entry.id is not None}
    if by_id.keys() & set(ids):
        _check_unique([entry.id for entry in entries], "it has two classes with the id")
        missing_id = next((id_ for id_ in ids if id_ not in by_id), None)
        if missing_id is not None:
            raise ValueError(f"it has no name for the class {missing_id!r}")
        return [by_id[id_] for id_ in ids]
    return entries


def _entries(path: Path, ids: set[str]) -> list[Entry]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # written by PowerShell and Excel
    text = content.decode("utf-16" if wide else "utf-8-sig")
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(json.loads(text, object_pairs_hook=_unique_keys), ids)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _from_rows(csv.reader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    synsets = [SYNSET.fullmatch(line) for line in lines]
    if all(synsets):
        return [_entry(None, found[1], found[2]) for found in synsets if found]
    return [_entry(None, None, line) for line in lines]


def _from_json(value: Any, ids: set[str]) -> list[Entry]:
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, list):
        return [_from_item(item) for item in value]
    if all(_is_index(index) for index in value.values()):
        return [_entry(index, None, name) for name, index in value.items()]
    # A number is an index, unless the ids are numbers themselves, as with folders called 1 to 102.
    numbers = all(key.isdecimal() for key in value) and not value.keys() & ids >= ids
    return [_from_pair(int(key) if numbers else key, name) for key, name in value.items()]


def _from_pair(key: int | str, name: Any) -> Entry:
    match key, name:
        case int(), str():
            return _entry(key, None, name)
        case str(), str():
            return _entry(None, key, name)
        case int(), [str(id_), str(label)]:
            return _entry(key, id_, label)
    raise ValueError(f"it must contain names, or pairs of id and name, not {str(name)[:80]!r}")


def _from_item(item: Any) -> Entry:
    match item:
        case str():
            return _entry(None, None, item)
        case [int() | str() as key, str(name)] if not isinstance(key, bool):
            return _from_pair(key, name)
        case dict():
            index = next((item[key] for key in (*INDEX_KEYS, *ID_KEYS) if _is_index(item.get(key))), None)
            id_ = next((item[key] for key in ID_KEYS if isinstance(item.get(key), str)), None)
            names = [item[key] for key in NAME_KEYS if isinstance(item.get(key), str)]
            if names:
                return _entry(index, id_, names[0])
    raise ValueError(f"it must contain names, or pairs of id and name, not {str(item)[:80]!r}")


def _from_rows(rows: Iterable[list[str]]) -> list[Entry]:
    table = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    header = [cell.lower() for cell in table[0]] if table else []
    if set(header) & set(NAME_KEYS) and set(header) <= {*INDEX_KEYS, *ID_KEYS, *NAME_KEYS}:
        objects = [dict(zip(header, row, strict=True)) for row in table[1:]]
        return [
            _from_item({key: _number(cell) if key in INDEX_KEYS else cell for key, cell in row.items()})
            for row in objects
        ]
    if all(len(row) == 1 for row in table):
        return [_entry(None, None, row[0]) for row in table]
    if any(len(row) != 2 for row in table):
        raise ValueError("its rows must be name, index and name, or id and name, or have a header")
    numbered = all(row[0].isdecimal() for row in table)
    return [_from_pair(int(key) if numbered else key, name) for key, name in table]


def _number(cell: str) -> int | str:
    return int(cell) if cell.isdecimal() else cell


def _entry(index: int | None, id_: str | None, name: str) -> Entry:
    return Entry(index, None if id_ is None else clean_text(id_.strip()), clean_text(name.strip()))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([key for key, _ in pairs], "it has two entries")
    return dict(pairs)


def _check_unique(values: Sequence[object], problem: str) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{problem} {value!r}")
        seen.add(value)
