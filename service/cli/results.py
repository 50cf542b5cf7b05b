"""The file of results that `rednet predict --output` writes. An interrupted run is continued.

Rows are collected as JSON lines in FILE.rows.unfinished. FILE itself appears when all rows are there, at once and
complete. FILE.run.unfinished says which run the rows belong to.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from rednet.model.io.output_files import locked, publish
from rednet.service.cli.result_formats import Columns, write_csv, write_parquet

SUFFIXES = (".jsonl", ".csv", ".parquet")


def check_format(output: Path) -> None:
    """Check that a file's name ends like a format that can be written here.

    Raises:
        ValueError: it does not, or a package is missing.
    """
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"--output {output} needs pyarrow: pip install 'rednet-serve[parquet]'")


class Results:
    """The rows of a run. Made by `open_results`.

    Attributes:
        done: rows that are there.
        failed: those of them that hold an error.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.done = self.failed = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row. As soon as this returns, a kill does not lose it."""
        self._file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        self.done += 1
        self.failed += "error" in row

    def resume(self, files: Sequence[str]) -> None:
        """Count the rows of the interrupted run, and remove the half row at the end.

        Raises:
            ValueError: the last row is not that of its file.
        """
        end, last = 0, b""
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end, last = end + len(line), line
            self.done += 1
            self.failed += line.endswith(b"}}\n")  # the end of an error; other rows end with a list or a number
        self._file.seek(end)
        self._file.truncate()
        if last and not (self.done <= len(files) and _file_of(last) == files[self.done - 1]):
            raise ValueError(f"{self._file.name} is damaged; remove it to start again")


@contextmanager
def open_results(output: Path, run: Mapping[str, Any], files: Sequence[str]) -> Iterator[Results]:
    """Begin or continue a run; use the result within the context, and `finish` after it.

    Args:
        output: the file to write in the end.
        run: what rows depend on, by name. Another run is not continued.
        files: `file` of each row.

    Raises:
        OutputError: another process is writing the file.
        ValueError: there are rows of another run, or damaged ones.
    """
    rows, run_file = _beside(output, "rows"), _beside(output, "run")
    with locked(rows) as descriptor, open(rows, "r+b") as file:
        results = Results(file)
        if os.fstat(descriptor).st_size:
            _check_run(rows, run_file, run)
            results.resume(files)
        else:
            run_file.write_text(json.dumps(run))
        yield results


def finish(output: Path, columns: Columns, *, replace: bool) -> None:
    """Turn the rows into the output. After a kill, do it again.

    Args:
        output: the file to write.
        columns: of formats with columns.
        replace: whether an existing file may be replaced.

    Raises:
        OutputError: the file exists and must not be replaced.
    """
    rows = finished = _beside(output, "rows")
    if output.suffix != ".jsonl":
        finished = output.resolve().with_name(output.resolve().name + ".unfinished")
        write = write_csv if output.suffix == ".csv" else write_parquet
        with open(rows, "rb") as file:
            write(file, finished, columns)
    with open(finished, "rb") as file:
        os.fsync(file.fileno())
    publish(finished, output, replace=replace)
    _beside(output, "run").unlink(missing_ok=True)
    rows.unlink(missing_ok=True)


def _beside(output: Path, what: str) -> Path:
    target = output.resolve()
    return target.with_name(f"{target.name}.{what}.unfinished")


def _check_run(rows: Path, run_file: Path, run: Mapping[str, Any]) -> None:
    try:
        before = json.loads(run_file.read_text())
        other = [name for name in run if before[name] != run[name]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{run_file} is damaged; remove it and {rows} to start again") from error
    if other:
        raise ValueError(
            f"{rows} is an unfinished run with another {other[0]}; finish it with its own command, or remove it"
        )


def _file_of(line: bytes) -> str | None:
    try:
        return str(orjson.loads(line)["file"])
    except (ValueError, LookupError, TypeError):
        return None
