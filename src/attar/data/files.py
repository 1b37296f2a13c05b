"""Read the user's files, JSONL, CSV or Parquet, and write our own JSONL."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from attar.data.types import Example
from attar.errors import DataError, require
from attar.workspace import write_atomic

__all__ = ["read_examples", "read_jsonl", "read_rows", "write_examples"]


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
        problem = _problem(row, text_key, label_key, labels, labelled)
        if problem is None:
            label = row.get(label_key)
            examples.append(Example(row[text_key].strip(), None if label in (None, "") else label))
        elif on_bad_line == "stop":
            reason, detail = problem
            raise DataError(
                f"{key}: {path.name} line {number}: {detail}; mend it, or set data.on_bad_line: skip ({reason})"
            )
        else:
            skipped[problem[0]] += 1
    if not examples:
        counted = f" ({dict(skipped)} skipped)" if skipped else ""
        raise DataError(f"{key}: {path} holds no usable row{counted}")
    return examples, skipped


def _problem(
    row: Any, text_key: str, label_key: str, labels: tuple[str, ...], labelled: bool
) -> tuple[str, str] | None:
    if isinstance(row, DataError):
        return "malformed", str(row)
    if not isinstance(row, dict):
        return "malformed", f"an object with the key {text_key!r} is wanted, this is {type(row).__name__}"
    text = row.get(text_key)
    if not isinstance(text, str):
        return "no text", f"{text_key!r} is {text!r}, a string is wanted; keys here: {', '.join(map(str, row))}"
    if not text.strip():
        return "empty text", f"{text_key!r} is empty"
    label = row.get(label_key)
    if label in (None, ""):
        return ("no label", f"{label_key!r} is missing, every row here needs one") if labelled else None
    if label not in labels:
        return "unknown label", f"label {label!r} is not in data.labels ({', '.join(labels)})"
    return None


def read_rows(path: Path, key: str) -> Iterator[tuple[int, Any]]:
    """Line number and row of a JSONL, CSV or Parquet file; a line that is no JSON comes as a DataError.

    Raises:
        DataError: the file has another suffix or encoding, or is no Parquet.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        parquet = require("pyarrow.parquet", "parquet")
        try:
            table = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{key}: {path} is no Parquet file ({error})") from error
        with table:
            rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    elif suffix in (".jsonl", ".json", ".csv"):
        # A cell may hold a whole conversation; the module's own limit is 131,072 characters.
        csv.field_size_limit(2**31 - 1)
        try:
            with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as handle:
                yield from enumerate(csv.DictReader(handle), start=2) if suffix == ".csv" else _json_lines(handle)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{key}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} does not fit); "
                "convert it: iconv -f latin1 -t utf-8 FILE > NEW"
            ) from error
    else:
        raise DataError(f"{key}: {path.name}: {suffix or 'no suffix'} is not read; write .jsonl, .csv or .parquet")


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, DataError(f"no JSON ({error})")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that attar wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as JSONL, atomically."""
    rows = [{"id": e.id, "text": e.text} | ({} if e.label is None else {"label": e.label}) for e in examples]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
