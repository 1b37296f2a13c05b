"""Read the user's files, JSONL, CSV or Parquet, and write our own JSONL."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attar.data.types import Example
from attar.errors import DataError, require
from attar.workspace import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "BadRow",
    "parse_example",
    "parse_json_line",
    "read_examples",
    "read_jsonl",
    "read_rows",
    "read_tables",
    "table_rows",
    "write_examples",
]


class BadRow(ValueError):
    """A row that is no example: the reason it is counted under, and in words the field, the value, the cure."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_examples(
    path: Path,
    *,
    key: str,
    text_key: str,
    label_key: str,
    labels: tuple[str, ...],
    labelled: bool,
    on_bad_line: Literal["stop", "skip"],
) -> tuple[list[Example], Counter[str]]:
    """Read requests from a file.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file.
        key: the recipe's key that named the file, for messages.
        text_key: the column of the request.
        label_key: the column of the gold label.
        labels: the labels allowed.
        labelled: whether every row must have a label.
        on_bad_line: stop at a row that cannot be used, or skip and count it.

    Returns:
        The examples in the file's order, and how many rows were skipped, by reason.

    Raises:
        DataError: the file is missing, empty, of another encoding, or a row cannot be used and the policy is to stop.
    """
    if not path.is_file():
        raise DataError(f"{key}: {path} is no file")
    skipped: Counter[str] = Counter()
    examples = []
    for number, row in read_rows(path, key):
        try:
            if isinstance(row, DataError):
                raise BadRow("malformed", str(row))
            examples.append(
                parse_example(row, text_key=text_key, label_key=label_key, labels=labels, labelled=labelled)
            )
        except BadRow as bad:
            if on_bad_line == "stop":
                raise DataError(
                    f"{key}: {path.name} line {number}: {bad}; mend it, or set data.on_bad_line: skip ({bad.reason})"
                ) from bad
            skipped[bad.reason] += 1
    if not examples:
        counted = f" ({dict(skipped)} skipped)" if skipped else ""
        raise DataError(f"{key}: {path} holds no usable row{counted}")
    return examples, skipped


def parse_example(row: Any, *, text_key: str, label_key: str, labels: tuple[str, ...], labelled: bool) -> Example:
    """One request.

    Args:
        row: an object with the keys that follow.
        text_key: the key of the request.
        label_key: the key of the gold label.
        labels: the labels allowed.
        labelled: whether there must be a label.

    Raises:
        BadRow: names the field, the value seen and the value wanted.
    """
    if not isinstance(row, dict):
        raise BadRow("malformed", f"an object with the key {text_key!r} is wanted, this is {type(row).__name__}")
    text = row.get(text_key)
    if not isinstance(text, str):
        raise BadRow("no text", f"{text_key!r} is {text!r}, a string is wanted; keys here: {', '.join(map(str, row))}")
    if not text.strip():
        raise BadRow("empty text", f"{text_key!r} is empty")
    label = row.get(label_key)
    if label in (None, ""):
        if labelled:
            raise BadRow("no label", f"{label_key!r} is missing, every row here needs one")
        label = None
    elif label not in labels:
        raise BadRow("unknown label", f"label {label!r} is not in data.labels ({', '.join(labels)})")
    return Example(text.strip(), label)


def read_rows(path: Path, key: str) -> Iterator[tuple[int, Any]]:
    """Line number and row of a JSONL, CSV or Parquet file; a line that is no JSON comes as a DataError.

    Raises:
        DataError: the file has another suffix or encoding, or is no Parquet.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        number = 1
        for table in read_tables(path, key, 65_536):
            yield from table_rows(table, number, key, path)
            number += table.num_rows
    elif suffix in (".jsonl", ".json", ".csv"):
        # A cell may hold a whole conversation; the module's own limit is 131,072 characters.
        csv.field_size_limit(2**31 - 1)
        try:
            with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as handle:
                yield from enumerate(csv.DictReader(handle), start=2) if suffix == ".csv" else _json_lines(handle)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, key, path) from error
    else:
        raise DataError(f"{key}: {path.name}: {suffix or 'no suffix'} is not read; write .jsonl, .csv or .parquet")


def read_tables(path: Path, key: str, rows: int) -> Iterator[pa.Table]:
    """A Parquet file in tables of at most so many rows.

    Raises:
        DataError: it is no Parquet.
    """
    pa, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch])
    except (OSError, ValueError) as error:
        raise _no_parquet(error, key, path) from error


def table_rows(table: pa.Table, first: int, key: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Number and row of a part of a Parquet file.

    Args:
        table: the part.
        first: number of its first row.
        key: the recipe's key that named the file, for messages.
        path: the file, likewise.

    Raises:
        DataError: Python has no value for what is in it.
    """
    try:
        rows = table.to_pylist()
    except ValueError as error:
        raise _no_parquet(error, key, path) from error
    yield from enumerate(rows, start=first)


def _no_parquet(error: Exception, key: str, path: Path) -> DataError:
    return DataError(f"{key}: {path} is no Parquet file ({error})")


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, DataError(f"no JSON ({error})")


def parse_json_line(line: bytes, key: str, path: Path) -> Any:
    """One line of a JSONL file: its value, or a DataError where it is no JSON.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error, key, path) from error
    except ValueError as error:
        return DataError(f"no JSON ({error})")


def _not_utf8(error: UnicodeDecodeError, key: str, path: Path) -> DataError:
    return DataError(
        f"{key}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} does not fit); "
        "convert it: iconv -f latin1 -t utf-8 FILE > NEW"
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that attar wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as JSONL, atomically."""
    rows = [{"id": e.id, "text": e.text} | ({} if e.label is None else {"label": e.label}) for e in examples]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
