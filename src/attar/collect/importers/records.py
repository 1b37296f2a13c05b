"""Rows of a file, one at a time: JSON a line, one JSON array or several documents, Parquet, CSV, a recorded folder."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from attar.collect.store import Reading, read_exchanges
from attar.data.files import read_rows
from attar.errors import DataError

__all__ = ["read_records"]

_CHUNK = 1 << 20
# Lines that are looked at to tell JSON a line from a document over many.
_LOOK = 50
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each row; a line that is no JSON comes as a DataError.

    The number is that of the line, or counts rows from 1 where a row may take many lines or none.

    Args:
        path: a file, or a folder that `attar record` wrote.

    Raises:
        DataError: the file is missing, of another kind or encoding, or a document in it breaks off.
    """
    if path.is_dir():
        yield from _recorded(path)
        return
    if not path.is_file():
        raise DataError(f"import: {path} is no file")
    if re.fullmatch(r"exchanges-\d{4}-\d\d-\d\d-\d{4}\.jsonl", path.name):
        raise DataError(
            f"import: {path} is a part of a recorded folder, and what was deleted since and said of its calls stands "
            f"beside it; import the folder, {path.parent}"
        )
    if path.suffix.lower() not in (".json", ".jsonl") or _is_lines(path):
        yield from read_rows(path, "import")
    else:
        yield from enumerate(_documents(path), start=1)


def _recorded(folder: Path) -> Iterator[tuple[int, Any]]:
    """The calls of a folder that `attar record` wrote, and then a DataError for each line that is damaged."""
    reading = Reading()
    number = 0
    for number, row in enumerate(read_exchanges(folder, reading), start=1):
        yield number, row
    for damaged in range(reading.damaged):
        yield number + damaged + 1, DataError("a line that is no row: the recorder was killed while it wrote it")


def _is_lines(path: Path) -> bool:
    """Whether some line near the beginning is a whole object, as none is in a document that is spread over lines."""
    with path.open("rb") as handle:
        for line in islice(handle, _LOOK):
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if text[:1] == b"[":
                return False
            if line[:1] == b"{" and text[-1:] == b"}" and len(text) > 2:
                try:
                    json.loads(text)
                except ValueError:
                    continue
                return True
    return False


def _documents(path: Path) -> Iterator[Any]:
    """The elements of one array, or whole documents that follow one another, read piece by piece."""
    try:
        with path.open(encoding="utf-8-sig") as handle:
            yield from _values(handle, path.name)
    except UnicodeDecodeError as error:
        raise DataError(
            f"import: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} does not fit); "
            "convert it: iconv -f latin1 -t utf-8 FILE > NEW"
        ) from error


def _values(handle: TextIO, name: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text, at, wanted, number = "", 0, _CHUNK, 0
    in_array: bool | None = None
    while True:
        at = _BETWEEN.match(text, at).end() if in_array else _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if in_array is None and at < len(text):
            in_array = text[at] == "["
            at += in_array
            continue
        if in_array and text[at : at + 1] == "]":
            return
        if at < len(text):
            try:
                value, end = decoder.raw_decode(text, at)
            except ValueError as error:
                broken: ValueError | None = error
            else:
                number += 1
                yield value
                at, wanted, broken = end, _CHUNK, None
                continue
        else:
            broken = None
        # A value larger than what was read is tried again with twice as much, so that the cost stays linear.
        piece = handle.read(wanted)
        if not piece:
            if broken is not None:
                raise DataError(f"import: {name}: row {number + 1} is no JSON or breaks off ({broken})") from broken
            if in_array:
                raise DataError(f"import: {name}: the array breaks off after row {number}; the file is not whole")
            return
        text, at, wanted = text[at:] + piece, 0, 2 * wanted
