"""Output files are not overwritten by accident, not left half-written, and not written by two processes at once."""

import os
import resource
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rednet import load_checkpoint
from rednet.model.io.output_files import OutputError, check_output, locked, write_atomically
from rednet.model.training.recipe import Recipe
from rednet.service.cli.parser import main
from tests.conftest import encoded, photo
from tests.servers import REDNET, wait_until

FLAGS = ["--base-channels", "16", "--epochs", "1", "--size", "32", "--batch-size", "4"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of three training photos and one for validation."""
    for split, count in (("train", 3), ("val", 1)):
        for name in ("church", "tench"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(encoded(photo(index, 40, 36)))
    return tmp_path / "data"


def commands(data: Path, checkpoint: Path, output: Path) -> list[list[str]]:
    """Every command that writes a file."""
    return [
        ["convert", str(checkpoint), str(output)],
        ["quantize", str(checkpoint), str(data / "val"), "--output", str(output)],
        ["train", str(data), "--output", str(output), *FLAGS],
        ["evaluate", str(data), "--checkpoint", str(checkpoint), "--confusion", str(output)],
    ]


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Path:
    assert main(["train", str(data), "--output", str(tmp_path / "trained.safetensors"), *FLAGS]) == 0
    return tmp_path / "trained.safetensors"


def test_existing_file_is_replaced_only_with_force(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that writes a file. The message names --force."""
    for command in commands(data, trained, tmp_path / "there"):
        (tmp_path / "there").write_text("precious")
        assert main(command) == 2
        assert f"{tmp_path / 'there'} exists; --force replaces it" in capsys.readouterr().err
        assert (tmp_path / "there").read_text() == "precious"
        assert main([*command, "--force"]) == 0
        assert (tmp_path / "there").read_bytes() != b"precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "there", "trained.safetensors"]


def test_output_that_is_an_input_is_rejected_even_with_force(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own name, by a symbolic link, and by a hard link."""
    (tmp_path / "link").symlink_to(trained)
    (tmp_path / "second").hardlink_to(trained)
    before = trained.read_bytes()
    for output in (trained, tmp_path / "link", tmp_path / "second"):
        for command in commands(data, trained, output):
            if command[0] == "train":
                command[4:] = ["--from", str(trained), "--epochs", "2"]
            assert main([*command, "--force"]) == 2
            assert "is an input of this command" in capsys.readouterr().err
    assert trained.read_bytes() == before


def test_directory_device_and_pipe_are_never_replaced(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rename would replace /dev/null by a file, for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    device = Path("/dev/null").stat()
    for output in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        for command in commands(data, trained, output):
            assert main([*command, "--force"]) == 2
            assert "cannot be written" in (said := capsys.readouterr().err) or "not a regular file" in said
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert Path("/dev/null").stat() == device


def test_output_name_that_is_too_long_is_rejected_before_the_work(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of the maximum length leaves no room for the suffix of temporary files."""
    for command in commands(data, trained, tmp_path / ("x" * 250)):
        assert main(command) == 2
        assert "File name too long" in (said := capsys.readouterr().err)
        assert "epoch" not in said


def test_output_link_writes_to_its_target(trained: Path, tmp_path: Path) -> None:
    """The link stays, and its target is replaced only with --force. A dangling link creates a new file."""
    (tmp_path / "real").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "new").symlink_to(tmp_path / "made")
    assert main(["convert", str(trained), str(tmp_path / "link")]) == 2
    assert (tmp_path / "real").read_text() == "precious"
    assert main(["convert", str(trained), str(tmp_path / "link"), "--force"]) == 0
    assert main(["convert", str(trained), str(tmp_path / "new")]) == 0
    assert (tmp_path / "link").is_symlink()
    for written in ("real", "made"):
        assert load_checkpoint(tmp_path / written).net.config.base_channels == 16


def test_finished_training_is_not_repeated(data: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the same recipe and photos the file stays. With others it is an error, or with --force a new run."""
    before, command = trained.stat().st_mtime_ns, ["train", str(data), "--output", str(trained), *FLAGS]
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "already finished, with this recipe and these photos" in said
    assert "epoch 1" not in said
    assert main([*command, "--seed", "1"]) == 2
    (data / "val" / "church" / "new.png").write_bytes(encoded(photo(9)))
    assert main(command) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert trained.stat().st_mtime_ns == before
    assert main([*command, "--force"]) == 0
    assert trained.stat().st_mtime_ns > before


def test_second_training_into_the_same_file_is_rejected(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is rejected while the first one runs. If the first one was killed, the second one resumes it."""
    output = tmp_path / "x.safetensors"
    command = [
        "train",
        str(data),
        "--output",
        str(output),
        "--base-channels",
        "16",
        "--size",
        "32",
        "--batch-size",
        "4",
    ]
    process = subprocess.Popen([str(REDNET), *command, "--epochs", "1000"], stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "x.safetensors.training").exists, "the first epoch")
        assert main([*command, "--epochs", "1000"]) == 2
        assert "in use by another process" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path / "x.safetensors.lock"):
        pass
    assert main([*command, "--epochs", "1"]) == 2
    assert "unfinished run of another recipe" in capsys.readouterr().err


def test_file_created_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    """Existence is checked before the work and again at its end."""
    path = tmp_path / "x"
    check_output(path, replace=False)
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        write_atomically(path, b"new", replace=False)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["x"]
    (tmp_path / "y.unfinished").write_text("of a killed process, longer than what is written now")
    write_atomically(tmp_path / "y", b"new", replace=False)
    assert (tmp_path / "y").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def limited(command: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run a command that can write files up to a size only, as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)


@pytest.mark.slow
def test_full_disk_keeps_the_old_file(data: Path, trained: Path, tmp_path: Path) -> None:
    """No part of the new file is left, and the message names the file."""
    before = trained.read_bytes()
    output = tmp_path / "there"
    for arguments in commands(data, trained, output):
        output.write_bytes(before)
        result = limited([str(REDNET), *arguments, "--force"], 1000)
        assert (result.returncode, output.read_bytes()) == (2, before), arguments
        assert "File too large" in result.stderr
        assert "there" in result.stderr
        assert not list(tmp_path.glob("*.unfinished"))


ABSURD: list[tuple[str, Any]] = [
    ("--epochs", 0),
    ("--epochs", 10**9),
    ("--size", 100_000),
    ("--size", 0),
    ("--batch-size", 10**9),
    ("--batch-size", 1),
    ("--learning-rate", "nan"),
    ("--learning-rate", "inf"),
    ("--learning-rate", "1e308"),
    ("--warmup-epochs", "nan"),
    ("--warmup-epochs", -1),
    ("--weight-decay", "nan"),
    ("--weight-decay", "-0.1"),
    ("--label-smoothing", 2),
    ("--label-smoothing", "nan"),
    ("--mixup", "1e308"),
    ("--mixup", "nan"),
    ("--base-channels", 10**6),
    ("--base-channels", 24),
    ("--depth", 27),
    ("--seed", -1),
    ("--seed", 10**30),
    ("--precision", "fp8"),
    ("--device", "tpu"),
]


@pytest.mark.parametrize(("flag", "value"), ABSURD)
def test_training_option_out_of_range_is_rejected_before_the_work(
    flag: str, value: object, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, with one line that names the option or its field, before photos are searched."""
    assert main(["train", str(data), "--output", str(tmp_path / "x"), f"{flag}={value}"]) == 2
    said = capsys.readouterr().err
    assert flag.strip("-").replace("-", "_") in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_every_number_of_the_recipe_is_bounded() -> None:
    """A new field cannot be forgotten."""
    for name, value in vars(Recipe()).items():
        if isinstance(value, int | float) and name != "depth":
            fields: dict[str, Any] = {name: float("nan")}
            with pytest.raises(ValueError, match=name):
                Recipe(**fields)


def test_top_k_out_of_range_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the photo is read. A value up to the maximum number of classes prints all classes."""
    with pytest.raises(SystemExit) as caught:
        main(["predict", "x.jpg", "--top-k", str(10**9)])
    assert caught.value.code == 2
    assert "must be at most 65536" in capsys.readouterr().err


def test_reported_accuracy_names_its_photos(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    """With too few photos to hold some out, accuracy is on the validation photos, and no temperature is fitted."""
    provenance = load_checkpoint(trained).provenance
    assert provenance["held out"] == 0
    assert provenance["temperature"] == 1.0
    assert provenance["accuracy of"] == "validation photos, not used to choose anything; no temperature is fitted"
    said = capsys.readouterr().err
    assert "with fewer than 2000 photos none are held out" in said
    assert "2 photos: top-1 " in said
    assert f"these are {provenance['accuracy of']}" in said


def test_predict_with_file_names_of_any_bytes(
    tiny_path: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Names that are not UTF-8 or contain terminal control sequences are printed as text and as JSON."""
    paths = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/a\xff.png", b"/b\x1b[2J\n.png", b"/c.png")]
    for path in paths:
        Path(path).write_bytes(encoded(photo()))
    missing = os.fsdecode(os.fsencode(tmp_path) + b"/d\xfe.png")
    command = ["predict", *paths, missing, "--checkpoint", str(tiny_path)]
    assert main(command) == 1
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        rf"{tmp_path}/a\xff.png",
        rf"{tmp_path}/b\x1b[2J\x0a.png",
        rf"{tmp_path}/c.png",
        rf"{tmp_path}/d\xfe.png",
    ]
    assert main([*command, "--json"]) == 1
    assert capsysbinary.readouterr().out.count(b'"classes"') == 3
    assert main(["info", "--checkpoint", paths[1]]) == 2
    said = capsysbinary.readouterr().err
    assert rb"b\x1b[2J\x0a.png is neither" in said
    assert b"\x1b" not in said


def test_label_that_the_terminal_cannot_encode_is_escaped(tiny_path: Path, tmp_path: Path) -> None:
    """On an ASCII terminal."""
    (tmp_path / "names.txt").write_text("caf\u00e9\nb\nc\nd\ne\n")
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    output = str(tmp_path / "x.safetensors")
    assert main(["convert", str(tiny_path), output, "--labels", str(tmp_path / "names.txt")]) == 0
    command = [str(REDNET), "predict", str(tmp_path / "a.png"), "--checkpoint", output]
    result = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert rb"caf\xe9" in result.stdout
