"""Image folders: which files are photos, which folders are classes, and what is reported about the rest."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from rednet import load_checkpoint
from rednet.model.training.dataset import find_photos, read_folder
from rednet.model.training.loader import Photo, PhotoError, check_photos
from rednet.service.cli.parser import main
from tests.conftest import encoded, photo

FLAGS = ["--base-channels", "16", "--epochs", "1", "--size", "32", "--batch-size", "4"]
CAFE = "caf\u00e9"


def add(path: Path, seed: int = 0, file_format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(seed, 40, 36), file_format))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes with three photos each for training and one for validation."""
    for name in ("church", "tench"):
        for index in range(3):
            add(tmp_path / "train" / name / f"{index}.png", index)
        add(tmp_path / "val" / name / "0.png")
    return tmp_path


def names(folder: Path, classes: list[str] | None = None) -> list[str]:
    return [str(each.path.relative_to(folder)) for each in read_folder(folder, classes).photos]


def test_folders_without_photos_are_not_classes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """macOS, Synology and people leave such folders. Training lists them, and the number of photos, before it
    begins."""
    (data / "train" / "__MACOSX").mkdir()
    (data / "train" / "__MACOSX" / "._0.png").write_bytes(b"\0\x05\x16\x07")
    (data / "train" / "@eaDir").mkdir()
    (data / "train" / "@eaDir" / "0.png@SynoEAStream").write_bytes(b"x")
    (data / "val" / "empty").mkdir()
    assert main(["train", str(data), "--output", str(data / "x.safetensors"), *FLAGS]) == 0
    assert [label.id for label in load_checkpoint(data / "x.safetensors").labels] == ["church", "tench"]
    said = capsys.readouterr().err
    assert "2 classes, 6 photos for training, 2 for validation" in said
    assert "skipped: folders without photos: @eaDir, __MACOSX" in said
    assert "skipped: folders without photos: empty" in said
    assert said.index("2 classes") < said.index("epoch 1")


def test_photos_are_recognised_by_content(data: Path) -> None:
    """A file of a served format with any extension is a photo. Text and HEIC files are counted and named."""
    folder = data / "train"
    for name, file_format in (("a.jfif", "JPEG"), ("b", "PNG"), ("c.JPE", "JPEG"), ("d.img", "WEBP"), ("e.x", "BMP")):
        add(folder / "tench" / name, 1, file_format)
    (folder / "tench" / "f.JXL").write_bytes(b"\xff\x0a")
    (folder / "tench" / "g.jxl").write_bytes(b"\xff\x0a")
    (folder / "tench" / "notes").write_text("BM")
    found = read_folder(folder)
    assert [each.path.name for each in found.photos if each.target == 1] == [
        "0.png",
        "1.png",
        "2.png",
        "a.jfif",
        "b",
        "c.JPE",
        "d.img",
        "e.x",
    ]
    assert found.skipped.lines() == [
        f"skipped: 2 .jxl files, the first is {folder / 'tench' / 'f.JXL'}",
        f"skipped: 1 files without an extension that are not images, the first is {folder / 'tench' / 'notes'}",
    ]


def test_photos_outside_class_folders_are_counted(data: Path) -> None:
    """They are directly in the folder, or one level too deep."""
    add(data / "train" / "stray.png")
    add(data / "train" / "tench" / "more" / "deep" / "1.png")
    found = read_folder(data / "train")
    assert len(found.photos) == 6
    assert found.skipped.lines() == [
        f"skipped: 1 files outside class folders, the first is {data / 'train' / 'stray.png'}",
        "skipped: 1 photos in subfolders of class folders, the first is "
        f"{data / 'train' / 'tench' / 'more' / 'deep' / '1.png'}",
    ]


def test_photos_one_level_too_deep_are_an_error(tmp_path: Path) -> None:
    """As in an archive that was unpacked into a folder of its own name; the message says so."""
    add(tmp_path / "train" / "train" / "tench" / "0.png")
    with pytest.raises(PhotoError, match=r"has no photos.*1 photos in subfolders of class folders"):
        read_folder(tmp_path / "train")


def test_system_and_hidden_files_are_not_reported(data: Path) -> None:
    """File managers create them in any folder."""
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "Icon\r"):
        (data / "train" / "tench" / name).write_bytes(b"x")
    (data / "train" / ".cache").mkdir()
    add(data / "train" / ".cache" / "0.png")
    assert read_folder(data / "train").skipped.lines() == []
    assert len(read_folder(data / "train").photos) == 6


def test_class_name_in_nfc_and_nfd_is_one_class(tmp_path: Path) -> None:
    """macOS decomposes names, Linux does not. It holds within one folder and for a trained network, too."""
    decomposed = unicodedata.normalize("NFD", CAFE)
    assert decomposed != CAFE
    for name in (CAFE, decomposed, "tea"):
        add(tmp_path / "train" / name / f"{len(name)}.png")
    add(tmp_path / "val" / decomposed / "0.png")
    found = read_folder(tmp_path / "train")
    assert found.classes == [CAFE, "tea"]
    assert [each.target for each in found.photos] == [0, 0, 1]
    assert [each.target for each in read_folder(tmp_path / "val", found.classes).photos] == [0]
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "x.safetensors"), *FLAGS]) == 0
    assert [label.id for label in load_checkpoint(tmp_path / "x.safetensors").labels] == [CAFE, "tea"]
    assert main(["evaluate", str(tmp_path), "--checkpoint", str(tmp_path / "x.safetensors")]) == 0


def test_class_names_that_differ_only_in_case_are_rejected(data: Path) -> None:
    """They are one folder on macOS and Windows, and two on Linux, within a split or between train and val."""
    (data / "val" / "tench").rename(data / "val" / "Tench")
    with pytest.raises(PhotoError, match="'tench' and 'Tench', which differ only in case"):
        read_folder(data / "val", ["church", "tench"])
    add(data / "train" / "Church" / "0.png")
    with pytest.raises(PhotoError, match="'Church' and 'church', which differ only in case"):
        read_folder(data / "train")


def test_names_that_are_not_utf8_are_supported(tmp_path: Path) -> None:
    """Linux allows them. The class has an escaped name; training, resuming and evaluation work."""
    for split in ("train", "val"):
        for name in (b"caf\xe9", b"tea\x1b[2J"):
            for index in range(2):
                folder = os.fsencode(tmp_path) + b"/" + split.encode() + b"/" + name
                add(Path(os.fsdecode(folder + b"/\xff%d.png" % index)), index)
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "x.safetensors"), *FLAGS]) == 0
    assert [label.id for label in load_checkpoint(tmp_path / "x.safetensors").labels] == [r"caf\xe9", r"tea\x1b[2J"]
    assert main(["evaluate", str(tmp_path), "--checkpoint", str(tmp_path / "x.safetensors")]) == 0


def test_links_are_followed_once(data: Path) -> None:
    """Links to class folders and photos work. A loop ends, and a broken link is an unreadable photo."""
    (data / "elsewhere").mkdir()
    add(data / "elsewhere" / "9.png")
    (data / "train" / "linked").symlink_to(data / "elsewhere")
    (data / "elsewhere" / "loop").symlink_to(data / "elsewhere")
    (data / "elsewhere" / "self").symlink_to("self")
    assert read_folder(data / "train").classes == ["church", "linked", "tench"]
    assert len(find_photos(data / "train")[0]) == 7
    (data / "elsewhere" / "gone.png").symlink_to(data / "nowhere")
    with pytest.raises(PhotoError, match=r"gone\.png cannot be read: No such file"):
        check_photos(read_folder(data / "train").photos)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_named_like_a_photo_is_not_opened(data: Path) -> None:
    """Opening it would block until a writer opens it."""
    os.mkfifo(data / "train" / "tench" / "pipe.jpg")
    os.mkfifo(data / "train" / "tench" / "pipe")
    assert len(read_folder(data / "train").photos) == 6


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
def test_folder_without_read_permission_is_an_error(data: Path) -> None:
    """It is not silently left out. The test runs a process of another user, because root may read any folder."""
    forbidden = data / "train" / "tench"
    forbidden.chmod(0)
    for folder in (data, *data.parents):
        if folder != Path("/") and folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    script = (
        "import os, sys; from pathlib import Path; from rednet.model.training.dataset import read_folder\n"
        "os.setuid(65534)\n"
        "try: read_folder(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(data / "train")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{forbidden} cannot be read: Permission denied" in said


def test_unreadable_photos_are_listed_before_the_first_epoch(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In train and val, damaged at the start or truncated at the end. Nothing is written."""
    whole = encoded(photo(3, 200, 160), "JPEG")
    (data / "val" / "church" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "train" / "tench" / "none.jpg").write_bytes(b"")
    assert main(["train", str(data), "--output", str(data / "x.safetensors"), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert "cut.jpg is not a readable photo: the image is damaged or incomplete" in said
    assert "none.jpg is not a readable photo: the data is in no known image format" in said
    assert "epoch 1" not in said
    assert not (data / "x.safetensors").exists()


def test_only_headers_are_checked_in_large_datasets(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not a photo is found, a truncated one is not, and a long list of problems is shortened."""
    whole = encoded(photo(3, 200, 160), "JPEG")
    cut = data / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr("rednet.model.training.loader.MAX_DECODED", 0)
    check_photos([Photo(cut, 0)])
    cut.write_bytes(b"no photo")
    with pytest.raises(PhotoError, match="and 292 more"):
        check_photos([Photo(cut, 0)] * 300)


def test_classes_without_validation_photos_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their accuracy stays unknown."""
    (data / "val" / "tench" / "0.png").unlink()
    assert main(["train", str(data), "--output", str(data / "x.safetensors"), *FLAGS]) == 0
    assert "classes without validation photos: tench" in capsys.readouterr().err


def test_folder_that_matches_two_classes_is_rejected(data: Path) -> None:
    """A network whose ids are not unique cannot be evaluated by folder names."""
    with pytest.raises(PhotoError, match="several classes with this id"):
        read_folder(data / "val", ["church", "tench", "church"])


def test_evaluate_and_quantize_read_the_same_photos_as_train(
    data: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They recognise photos by content and report what is left out."""
    assert main(["train", str(data), "--output", str(data / "x.safetensors"), *FLAGS]) == 0
    add(data / "val" / "church" / "1.jfif", 1, "JPEG")
    (data / "val" / "church" / "2.jxl").write_bytes(b"x")
    (data / "val" / "@eaDir").mkdir()
    capsys.readouterr()
    assert main(["evaluate", str(data), "--checkpoint", str(data / "x.safetensors")]) == 0
    said = capsys.readouterr()
    assert "3 photos, fp32: top-1" in said.out
    assert "1 .jxl files" in said.err
    assert "folders without photos: @eaDir" in said.err
    assert main(["quantize", str(tiny_path), str(data / "val"), "--output", str(data / "q.safetensors")]) == 0
    said = capsys.readouterr()
    assert "activation ranges from 3 photos" in said.out
    assert "1 .jxl files" in said.err
