"""Names of classes."""

from pathlib import Path

import pytest

from model.labels import Label, named, read_labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n1": "cat", "n2": "dog"}', [Label("n1", "cat"), Label("n2", "dog")]),
        ('[["n1", "cat"], ["n2", "dog"]]', [Label("n1", "cat"), Label("n2", "dog")]),
        ('["cat", "dog"]', [Label("cat", "cat"), Label("dog", "dog")]),
        ("\ufeffcat\ndog\n\n", [Label("cat", "cat"), Label("dog", "dog")]),
    ],
)
def test_labels_are_read_from_the_usual_files(tmp_path: Path, text: str, expected: list[Label]) -> None:
    """A mapping, pairs, names, or plain text."""
    (tmp_path / "labels").write_text(text)
    assert read_labels(tmp_path / "labels") == expected


@pytest.mark.parametrize("content", [b"[1, 2]", b"[[1, 2]]", b"{", b"\xff\xfe", b'{"a": 1}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """With a message that names the file."""
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ValueError, match="labels"):
        read_labels(tmp_path / "labels")


def test_folders_named_by_wordnet_get_imagenets_names() -> None:
    """Others keep their own."""
    assert named(["n01440764", "cats"]) == [Label("n01440764", "tench"), Label("cats", "cats")]
