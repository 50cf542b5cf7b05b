"""`rednet predict --output` over folders and lists of photos: rows, formats, kills, and what is refused."""

import csv
import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rednet import Familiarity, load_checkpoint, save_checkpoint
from rednet.model.native import unavailable
from rednet.service.cli.parser import main
from rednet.service.cli.result_formats import Columns, write_csv
from tests.conftest import encoded, photo
from tests.servers import REDNET, wait_until

MANY = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in subfolders, two that cannot be read, and files that are not photos."""
    folder = tmp_path_factory.mktemp("photos")
    originals = [folder / f"{seed}.jpg" for seed in range(10)]
    for seed, original in enumerate(originals):
        original.write_bytes(encoded(photo(seed, 300, 200), "JPEG"))
    for index in range(MANY):
        copy = folder / f"sub{index % 3}" / f"{index:04}.jpg"
        copy.parent.mkdir(exist_ok=True)
        copy.hardlink_to(originals[index % 10])
    (folder / "sub1" / "0100 broken.jpg").write_bytes(originals[0].read_bytes()[:200])
    (folder / "sub2" / "gone.jpg").symlink_to("nowhere")
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("unbroken") / "rows.jsonl"
    assert main(command(folder, output, tiny_path)) == 1
    return output


def command(folder: Path, output: Path, checkpoint: Path, *options: str) -> list[str]:
    return [
        *("predict", str(folder), "--output", str(output), "--checkpoint", str(checkpoint)),
        *("--features", "--top-k", "3", *options),
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_file(output: Path) -> Path:
    return output.with_name(output.name + ".rows.unfinished")


def kill_after(rows: int, arguments: list[str], output: Path) -> None:
    """Run a command, and kill it once that many rows are there."""
    process = subprocess.Popen([REDNET, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = rows_file(output)

    def are_there() -> bool:
        return process.poll() is not None or (unfinished.exists() and unfinished.read_bytes().count(b"\n") >= rows)

    wait_until(are_there, f"{rows} rows")
    assert process.poll() is None, "the run ended before it was killed"
    process.kill()
    process.wait()


def test_rows_follow_the_order_of_the_files(folder: Path, unbroken: Path) -> None:
    """Sorted by path, `file` first; photos that cannot be read have their error, and stop nothing."""
    rows = read_rows(unbroken)
    expected = sorted(str(path) for path in folder.rglob("*.jpg"))
    assert [row["file"] for row in rows] == expected
    assert len(rows) == MANY + 12
    errors = {Path(row["file"]).name: row["error"]["code"] for row in rows if "error" in row}
    assert errors == {"0100 broken.jpg": "unreadable_image", "gone.jpg": "malformed_request"}
    for row in rows:
        assert next(iter(row)) == "file"
        if "error" not in row:
            assert [len(row["classes"]), len(row["features"])] == [3, 512]
    features = [
        [row["features"] for row in rows if row["file"].endswith(f"{seed}.jpg") and "features" in row]
        for seed in range(10)  # ten photos, each under many names
    ]
    # Without the native library, the last digits depend on the size of the batch.
    np.testing.assert_allclose(features, [[own[0]] * (MANY // 10 + 1) for own in features], rtol=1e-4, atol=1e-5)
    assert len({json.dumps(own[0]) for own in features}) == 10


def test_rows_are_what_predict_prints(
    folder: Path, tiny_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same classes with the same probabilities; without --output a folder is searched, too."""
    arguments = ["predict", str(folder / "sub1"), "--checkpoint", str(tiny_path), "--top-k", "3", "--json"]
    assert main(arguments) == 1
    printed = json.loads(capsys.readouterr().out)["predictions"]
    written = [row for row in read_rows(unbroken) if f"{folder.name}/sub1/" in row["file"]]
    assert_equal(printed, [{key: row[key] for key in row if key in ("classes", "error")} for row in written])


def test_skipped_files_are_counted_by_extension(
    folder: Path, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error; a folder without photos is an error."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "a" / "y.pdf").write_text("y")
    assert main(["predict", str(tmp_path / "a"), "--checkpoint", str(tiny_path)]) == 2
    said = capsys.readouterr().err
    assert "skipped: 1 .txt files" in said
    assert "skipped: 1 .pdf files" in said
    assert f"there are no photos in {tmp_path / 'a'}" in said


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_paths_are_read_from_standard_input(folder: Path, tiny_path: Path, tmp_path: Path, separator: str) -> None:
    """One a line, or separated by NUL; names that are not UTF-8 are escaped, folders in the list are searched."""
    odd = os.fsencode(tmp_path) + b"/\xff.jpg"
    Path(os.fsdecode(odd)).write_bytes((folder / "3.jpg").read_bytes())
    listing = separator.encode().join([os.fsencode(folder / "5.jpg"), odd, os.fsencode(folder / "sub0"), b""])
    output = tmp_path / "rows.jsonl"
    arguments = ["predict", "-", "--output", str(output), "--checkpoint", str(tiny_path)]
    assert subprocess.run([str(REDNET), *arguments], input=listing, check=False).returncode == 0
    rows = read_rows(output)
    assert [row["file"] for row in rows[:2]] == [str(folder / "5.jpg"), f"{tmp_path}/\\xff.jpg"]
    assert len(rows) == 2 + MANY // 3


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kills"), [("jsonl", 3), ("csv", 1), ("parquet", 1)])
def test_killed_run_continues_to_the_same_file(
    folder: Path, tiny_path: Path, unbroken: Path, tmp_path: Path, suffix: str, kills: int
) -> None:
    """Byte for byte; in Parquet the same values."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    output = tmp_path / f"rows.{suffix}"
    arguments = command(folder, output, tiny_path)
    for rows in sorted(random.Random(suffix).sample(range(1, MANY - 150), kills)):
        kill_after(rows, arguments, output)
        assert not output.exists()
    with rows_file(output).open("r+b") as file:  # as after a kill in the middle of a write
        file.truncate(max(0, file.seek(0, os.SEEK_END) - 10))
    (tmp_path / f"rows.{suffix}.unfinished").write_text("of a kill at the very end")
    assert main(arguments) == 1
    assert {path.name for path in tmp_path.iterdir()} - {f"{output.name}.unfinished"} == {output.name}
    read = {"jsonl": compare_jsonl, "csv": compare_csv, "parquet": compare_parquet}
    read[suffix](output, unbroken)


def assert_equal(ours: object, theirs: object) -> None:
    """Exactly; within rounding where PyTorch runs the network, because its results depend on the size of a batch."""
    if unavailable() is None:
        assert ours == theirs
    elif isinstance(ours, list) and isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    else:
        assert ours == (pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else theirs)


def compare_jsonl(output: Path, unbroken: Path) -> None:
    if unavailable() is None:
        assert output.read_bytes() == unbroken.read_bytes()
    assert_equal(read_rows(output), read_rows(unbroken))


def compare_csv(output: Path, unbroken: Path) -> None:
    converted = output.with_name("converted.csv")
    with unbroken.open("rb") as rows:
        write_csv(rows, converted, Columns(3, False, 512))
    if unavailable() is None:
        assert output.read_bytes() == converted.read_bytes()
    with output.open(newline="") as file:
        cells = list(csv.DictReader(file))
    for cell, row in zip(cells, read_rows(unbroken), strict=True):
        assert cell["file"] == row["file"]
        if "error" in row:
            assert (cell["error_code"], cell["error_message"]) == (row["error"]["code"], row["error"]["message"])
            assert cell["label_1"] == cell["feature_0"] == ""
        else:
            assert cell["error_code"] == ""
            assert cell["id_1"] == row["classes"][0]["id"]
            assert cell["label_3"] == row["classes"][2]["label"]
            assert_equal(float(cell["probability_1"]), row["classes"][0]["probability"])
            assert_equal(float(cell["feature_511"]), row["features"][511])


def compare_parquet(output: Path, unbroken: Path) -> None:
    from pyarrow import parquet

    table = parquet.read_table(output)
    assert table.column_names == ["file", "error", "classes", "features"]
    for found, row in zip(table.to_pylist(), read_rows(unbroken), strict=True):
        assert [found["file"], found["error"], found["classes"]] == [row["file"], row.get("error"), row.get("classes")]
        if "features" in row:
            np.testing.assert_array_equal(np.float32(found["features"]), np.float32(row["features"]))
        else:
            assert found["features"] is None


def test_other_command_into_unfinished_output_is_refused(
    folder: Path, tiny_path: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another option or set of photos, damaged rows, a second process; the run itself still ends as it should."""
    output = tmp_path / "rows.jsonl"
    arguments = command(folder, output, tiny_path)
    kill_after(20, arguments, output)
    others = [([*arguments, "--top-k", "2"], "--top-k"), (command(folder / "sub0", output, tiny_path), "set of photos")]
    for other, what in others:
        assert main(other) == 2
        assert f"is an unfinished run with another {what}" in capsys.readouterr().err
    before = rows_file(output).read_bytes()
    lines = before.splitlines(keepends=True)
    rows_file(output).write_bytes(b"".join(lines[1:]))
    assert main(arguments) == 2
    assert "is damaged; remove it to start again" in capsys.readouterr().err
    rows_file(output).write_bytes(before)
    process = subprocess.Popen([REDNET, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: rows_file(output).stat().st_size > len(before), "the run to continue")
    process.send_signal(19)  # SIGSTOP
    try:
        assert main(arguments) == 2
        assert "is in use by another process" in capsys.readouterr().err
    finally:
        process.send_signal(18)  # SIGCONT
        assert process.wait() == 1
    compare_jsonl(output, unbroken)


def test_finished_output_is_replaced_only_with_force(
    folder: Path, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the network is loaded."""
    output = tmp_path / "rows.jsonl"
    output.write_text("finished")
    arguments = ["predict", str(folder / "1.jpg"), "--output", str(output), "--checkpoint", str(tiny_path)]
    assert main(arguments) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert output.read_text() == "finished"
    assert main([*arguments, "--force"]) == 0
    assert [row["file"] for row in read_rows(output)] == [str(folder / "1.jpg")]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "x.txt"], "the name must end in .jsonl, .csv or .parquet"),
        (["--output", "nowhere/x.csv"], "it must be a file in a folder that exists"),
        (["--output", "x.jsonl", "--json"], "--json is for printing"),
        (["--features"], "--features needs --output"),
        (["--force"], "--force needs --output"),
        (["--device", "tpu"], "--device cannot be 'tpu'"),
        (["--precision", "fp8"], "--precision cannot be 'fp8'"),
        (["--threads", "0"], "--threads cannot be '0'"),
    ],
)
def test_impossible_options_are_refused(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line, before the network is loaded."""
    assert main(["predict", str(folder / "1.jpg"), *options]) == 2
    assert said in capsys.readouterr().err


def test_parquet_without_pyarrow_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before any photo is read."""
    monkeypatch.setattr("rednet.service.cli.results.find_spec", lambda _: None)
    assert main(["predict", str(folder / "1.jpg"), "--output", str(tmp_path / "x.parquet")]) == 2
    assert "pip install 'rednet-serve[parquet]'" in capsys.readouterr().err


def test_familiarity_is_written_in_every_format(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the classes, if the checkpoint has it; rows of errors are without. It is printed, too."""
    pq = pytest.importorskip("pyarrow.parquet")
    checkpoint = tmp_path / "measured.safetensors"
    save_checkpoint(checkpoint, replace(load_checkpoint(tiny_path), familiarity=Familiarity((0.0, 0.5, 9.0))))
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        photo(seed).save(photos / f"{seed}.png")
    (photos / "3.png").write_bytes(b"not a photo")
    for output in ("a.jsonl", "a.csv", "a.parquet"):
        assert main(["predict", str(photos), "--checkpoint", str(checkpoint), "--output", str(tmp_path / output)]) == 1
    *rows, error = read_rows(tmp_path / "a.jsonl")
    assert error.keys() == {"file", "error"}
    assert list(rows[0]) == ["file", "classes", "familiarity"]
    values = [row["familiarity"] for row in rows]
    assert len({*values}) == 3
    with (tmp_path / "a.csv").open(newline="") as file:
        *cells, broken = csv.DictReader(file)
    assert [float(cell["familiarity"]) for cell in cells] == pytest.approx(values, abs=1e-5)
    assert broken["familiarity"] == ""
    stored = pq.read_table(tmp_path / "a.parquet")["familiarity"].to_pylist()
    assert stored[:3] == pytest.approx(values, abs=1e-5)
    assert stored[3] is None
    capsys.readouterr()
    assert main(["predict", str(photos / "0.png"), "--checkpoint", str(checkpoint)]) == 0
    assert f"familiarity {values[0]:.2f}" in capsys.readouterr().out
