"""Class names: label files and the names of class folders."""

import json
from pathlib import Path

import pytest

from rednet.model.io.label_files import read_labels
from rednet.model.io.labels import Label, labels_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n1": "cat", "n2": "dog"}', [Label("n1", "cat"), Label("n2", "dog")]),
        ('[["n1", "cat"], ["n2", "dog"]]', [Label("n1", "cat"), Label("n2", "dog")]),
        ('["cat", "dog"]', [Label("cat", "cat"), Label("dog", "dog")]),
        ("\ufeffcat\ndog\n\n", [Label("cat", "cat"), Label("dog", "dog")]),
    ],
)
def test_labels_are_read_from_common_file_formats(tmp_path: Path, text: str, expected: list[Label]) -> None:
    """A mapping, pairs, names, or plain text."""
    (tmp_path / "labels").write_text(text)
    assert read_labels(tmp_path / "labels") == expected


@pytest.mark.parametrize("content", [b"[1, 2]", b"[[1, 2]]", b"{", b"\xff\xfe", b'{"a": 1}'])
def test_invalid_label_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    """The message names the file."""
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ValueError, match="labels"):
        read_labels(tmp_path / "labels")


def test_wordnet_folder_names_get_imagenet_names() -> None:
    """Other folders keep their own names."""
    assert labels_of(["n01440764", "cats"]) == [Label("n01440764", "tench"), Label("cats", "cats")]


TRAINED = [Label(f"n{index}", f"thing {index}") for index in range(12)]
SHUFFLED = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # in text order


def renamed(tmp_path: Path, content: object, suffix: str = "json", current: list[Label] = TRAINED) -> list[Label]:
    path = tmp_path / f"labels.{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_labels(path, current)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ({str(index): f"name {index}" for index in SHUFFLED}, "json"),
        ({f"name {index}": index for index in SHUFFLED}, "json"),  # torchvision's class_to_idx
        ({"model_type": "resnet", "id2label": {str(index): f"name {index}" for index in SHUFFLED}}, "json"),
        ([{"index": index, "label": f"name {index}"} for index in SHUFFLED], "json"),
        ([{"id": index, "name": f"name {index}"} for index in SHUFFLED], "json"),
        ([[index, f"name {index}"] for index in SHUFFLED], "json"),
        ("\ufeff" + "\r\n".join(f"{index},name {index}" for index in SHUFFLED), "csv"),
        ("\n".join(["index,name", *(f'{index},"name {index}"' for index in SHUFFLED)]), "csv"),
        ("\n".join(["name\tindex", *(f"name {index}\t{index}" for index in SHUFFLED)]), "tsv"),
    ],
)
def test_labels_with_indices_are_assigned_by_index(tmp_path: Path, content: object, suffix: str) -> None:
    """The order in the file has no effect, and the ids of a trained network stay."""
    assert renamed(tmp_path, content, suffix) == [Label(f"n{index}", f"name {index}") for index in range(12)]


def test_keras_class_index_gives_ids_and_names(tmp_path: Path) -> None:
    """`imagenet_class_index.json` replaces both."""
    content = {str(index): [f"w{index}", f"name {index}"] for index in SHUFFLED}
    assert renamed(tmp_path, content) == [Label(f"w{index}", f"name {index}") for index in range(12)]


def test_labels_with_ids_are_assigned_by_id(tmp_path: Path) -> None:
    """The file may have any order and more ids. Folders that are named by numbers are ids, not indices."""
    content = {f"n{index}": f"name {index}" for index in reversed(range(20))}
    assert renamed(tmp_path, content) == [Label(f"n{index}", f"name {index}") for index in range(12)]
    folders = [Label(id_, id_) for id_ in sorted(map(str, range(1, 13)))]
    content = {str(number): f"flower {number}" for number in range(1, 13)}
    assert renamed(tmp_path, content, current=folders) == [Label(each.id, f"flower {each.id}") for each in folders]
    csv_rows = "\n".join(f"n{index},name {index}" for index in reversed(range(12)))
    assert renamed(tmp_path, csv_rows, "csv")[3] == Label("n3", "name 3")


def test_labels_without_ids_are_assigned_by_position(tmp_path: Path) -> None:
    """The ids stay. Names replace ids only if those are guesses and the names are unique."""
    names = [f"name {index}" for index in range(12)]
    assert renamed(tmp_path, names) == [Label(f"n{index}", f"name {index}") for index in range(12)]
    path = tmp_path / "labels.json"
    assert read_labels(path, TRAINED, keep_ids=False)[2] == Label("name 2", "name 2")
    path.write_text(json.dumps(["crane"] * 12))
    assert read_labels(path, TRAINED, keep_ids=False)[11] == Label("11", "crane")


def test_synset_lines_are_ids_and_names(tmp_path: Path) -> None:
    """As in ImageNet's own lists. A comma in a plain line belongs to the name."""
    (tmp_path / "synsets.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert read_labels(tmp_path / "synsets.txt")[0] == Label("n01440764", "tench, Tinca tinca")
    (tmp_path / "plain.txt").write_text("tench, Tinca tinca\n7 up\n")
    assert read_labels(tmp_path / "plain.txt")[0] == Label("tench, Tinca tinca", "tench, Tinca tinca")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({str(index): "x" for index in range(1, 13)}, "none with index 0; indices begin at 0"),
        ({str(index): "x" for index in (*range(11), 12)}, "none with index 11"),
        ({"a": 0, "b": 0, **{f"c{index}": index for index in range(2, 12)}}, "two classes with the index 0"),
        ('{"0": "a", "0": "b"}', "two entries '0'"),
        ([{"index": 0, "name": "a"}, {"name": "b"}], "some classes have an index and others do not"),
        ({f"n{index}": "x" for index in range(11)} | {"m": "y"}, "no name for the class 'n11'"),
        ([["a", "x"], ["a", "y"], *([f"b{index}", "z"] for index in range(10))], "two classes with the id 'a'"),
        (["x"] * 11, "names 11 classes; the network has 12"),
        (["x"] * 11 + [" "], "an empty name"),
        ([{"index": 0}], "must contain names"),
        ({"0": ["n1", "tench", "extra"]}, "must contain names"),
        ([True, "x"], "must contain names"),
        ("[" * 100_000, "cannot be used"),
    ],
)
def test_labels_that_do_not_match_the_classes_are_rejected(tmp_path: Path, content: object, message: str) -> None:
    """Labels are not guessed if some are missing, duplicate or empty."""
    with pytest.raises(ValueError, match=message):
        renamed(tmp_path, content)


def test_labels_in_utf16_are_read(tmp_path: Path) -> None:
    """PowerShell writes UTF-16 by default."""
    (tmp_path / "labels").write_bytes("Katze\r\nHündin\r\n".encode("utf-16"))
    assert [label.name for label in read_labels(tmp_path / "labels")] == ["Katze", "Hündin"]


def test_control_characters_in_labels_are_escaped(tmp_path: Path) -> None:
    """Terminal control sequences are not printed, and names are normalised to one spelling."""
    assert [label.name for label in renamed(tmp_path, ["a\x1b[2J", "cafe\u0301"], current=TRAINED[:2])] == [
        "a\\x1b[2J",
        "caf\u00e9",
    ]
