"""Rows of JSON to CSV and Parquet, a few megabytes at a time."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

SCORE = ("index", "id", "label", "probability")
GROUP_BYTES = 8_000_000  # of JSON that become a row group of Parquet: 400 rows with features, 27,000 without


class Columns(NamedTuple):
    """What rows without an error hold.

    Attributes:
        top_k: number of classes.
        familiarity: whether they say how familiar the photo looks.
        features: length of the feature vector; 0: there is none.
    """

    top_k: int
    familiarity: bool
    features: int


def write_csv(rows: BinaryIO, path: Path, columns: Columns) -> None:
    """Write a column for each value; cells of an error are empty in other rows, and the other way round.

    Args:
        rows: JSON lines.
        path: the file to write.
        columns: of the rows.
    """
    header = ["file", "error_code", "error_message"]
    header += [f"{name}_{rank}" for rank in range(1, columns.top_k + 1) for name in SCORE]
    header += ["familiarity"] * columns.familiarity
    header += [f"feature_{index}" for index in range(columns.features)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for line in rows:
            row = orjson.loads(line)
            if "error" in row:
                cells = [row["file"], row["error"]["code"], row["error"]["message"]]
            else:
                scores = [score[name] for score in row["classes"] for name in SCORE]
                familiarity = [row["familiarity"]] if columns.familiarity else []
                cells = [row["file"], "", "", *scores, *familiarity, *row.get("features", ())]
            writer.writerow(cells + [""] * (len(header) - len(cells)))


def write_parquet(rows: BinaryIO, path: Path, columns: Columns) -> None:
    """Write the columns `file`, `error`, `classes`, `familiarity` and `features`; what a row does not have is null.

    Args:
        rows: JSON lines.
        path: the file to write.
        columns: of the rows.
    """
    import pyarrow as pa  # noqa: PLC0415  (an extra)
    from pyarrow import parquet  # noqa: PLC0415

    types = (pa.int32(), pa.string(), pa.string(), pa.float64())
    score = pa.struct(list(zip(SCORE, types, strict=True)))
    fields = [
        pa.field("file", pa.string(), nullable=False),
        pa.field("error", pa.struct([("code", pa.string()), ("message", pa.string())])),
        pa.field("classes", pa.list_(score)),
    ]
    if columns.familiarity:
        fields.append(pa.field("familiarity", pa.float64()))
    if columns.features:
        fields.append(pa.field("features", pa.list_(pa.float32(), columns.features)))
    schema = pa.schema(fields)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _groups(rows):
            for row in group:
                if "features" in row:
                    row["features"] = np.array(row["features"], np.float32)
            writer.write_table(pa.Table.from_pylist(group, schema))


def _groups(rows: BinaryIO) -> Iterator[list[dict[str, Any]]]:
    while lines := rows.readlines(GROUP_BYTES):
        yield [orjson.loads(line) for line in lines]
