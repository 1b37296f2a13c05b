"""The first pass: a part of a file in, its rows filtered, told apart by numbers, and their lines on disk."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attar.collect.filters import Filter, duplicates, row_filters
from attar.collect.filters.private import Private
from attar.collect.rows import Row, asked, encoded, lookup, moment, spoken, words
from attar.collect.shingles import U32, Vocabulary, shingles
from attar.data.conversations import BadCall, parse_conversation
from attar.data.files import BadRow, parse_example, parse_json_line, read_rows, read_tables, table_rows
from attar.data.types import Conversation, Example
from attar.errors import DataError
from attar.recipe import ChatRecipe, ClassifyRecipe

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "NO_SOURCE",
    "ROWS",
    "TRAINED",
    "Batch",
    "Context",
    "Dropped",
    "Unit",
    "content_of",
    "files_of",
    "hash64",
    "read",
    "units",
    "words_at",
]

TRAINED = ("train", "pool")
"""Keys of the files that are trained on, and split"""
NO_SOURCE = "no source"
"""the source of rows that name none"""

# Bytes of a JSONL file that are one task: some thousand rows, so that numpy works on many at once.
UNIT = 8 << 20
_BLANK = object()
# Rows of a table that are one task.
_TABLE_ROWS = 2000

ROWS = np.dtype(
    [
        ("line", "u8"),
        ("file", "u2"),  # of the user's files under a key
        ("worker", "u2"),  # whose files hold what follows
        ("start", "u8"),
        ("size", "u4"),  # of its line, in bytes
        ("words", "u8"),
        ("count", "u4"),
        ("prompt", "u4"),  # words, those of the prompt among them
        ("id", "u8"),
        ("asked", "u8"),  # 0: nothing is
        ("group", "u8"),  # 0: stands alone
        ("source", "u8"),
        ("model", "u8"),  # that answered; 0: not stated
        ("label", "u8"),
        ("time", "f8"),
    ]
)
"""What is kept in memory of a row. Texts are the first 64 bits of their hash."""


@dataclass(frozen=True)
class Unit:
    """A part of one of the user's files."""

    key: str
    """the recipe's, without `data.`"""
    file: int
    path: Path
    start: int = 0
    end: int = 0
    """bytes of a JSONL file"""
    content: bytes | None = None
    """these bytes, for who does not see the file"""
    rows: tuple[tuple[int, Any], ...] = ()
    """or rows of a CSV file, with their numbers"""
    table: pa.Table | None = None
    """or rows of a Parquet file"""
    first: int = 0
    """number of the first of those"""


class Dropped(NamedTuple):
    """A row that does not go on."""

    line: int
    id: str | None
    reason: str
    detail: str


@dataclass
class Batch:
    """What is left of a unit."""

    lines: int = 0
    """in the unit; the rows' numbers count from its beginning, unless it came from a table"""
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, ROWS))
    signatures: NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, 0), np.uint16))
    """[rows, minima], or [rows, 0] where nothing is compared"""
    dropped: list[Dropped] = field(default_factory=list)
    stop: tuple[int, str] | None = None
    """line and message of a row that ends the run"""
    redacted: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    """of the sources, models and labels that are numbers in ``rows``"""


def hash64(text: str) -> int:
    """The first 64 bits of a text's BLAKE2b, never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1


class Context:
    """What a process keeps between tasks: the filters, the files that it writes, those that it reads."""

    def __init__(self, recipe: ChatRecipe | ClassifyRecipe, folder: Path, worker: int) -> None:
        self.recipe = recipe
        self.folder = folder
        self.worker = worker
        self.vocabulary = Vocabulary()
        self.memory: dict[str, Any] = {}
        """what tasks of the second pass keep"""
        self._open: dict[str, int] = {}

    @cached_property
    def filters(self) -> tuple[list[Filter], Private]:
        """Built once, where they are needed."""
        return row_filters(self.recipe)

    @cached_property
    def lines(self) -> BinaryIO:
        """Where this process puts lines."""
        return (self.folder / f"{self.worker}.jsonl").open("ab")

    @cached_property
    def words(self) -> BinaryIO:
        """Where this process puts words, 4 bytes each."""
        return (self.folder / f"{self.worker}.words").open("ab")

    def pread(self, name: str, start: int, size: int) -> bytes:
        """Bytes of a file that some process wrote."""
        if name not in self._open:
            self._open[name] = os.open(self.folder / name, os.O_RDONLY)
        return os.pread(self._open[name], size, start)

    def close(self) -> None:
        """Close what is open."""
        for handle in self._open.values():
            os.close(handle)
        for name in ("lines", "words"):
            if name in self.__dict__:
                getattr(self, name).close()


def words_at(context: Context, worker: int, start: int, count: int) -> U32:
    """Words of a row, or of several rows that stand together."""
    return np.frombuffer(context.pread(f"{worker}.words", 4 * start, 4 * count), np.uint32)


def units(key: str, path: Path) -> Iterator[Unit]:
    """Cut a file, or the files of a folder in the order of their names, into tasks.

    Raises:
        DataError: there is no such file, or it is of a kind that is not read.
    """
    for number, file in enumerate(files_of(key, path)):
        if file.suffix.lower() in (".jsonl", ".json"):
            with file.open("rb") as handle:
                start, size = 0, file.stat().st_size
                while start < size:
                    handle.seek(start + UNIT)
                    handle.readline()
                    end = min(handle.tell(), size)
                    yield Unit(key, number, file, start, end)
                    start = end
            continue
        if file.suffix.lower() == ".parquet":
            first = 1
            for table in read_tables(file, f"data.{key}", _TABLE_ROWS):
                yield Unit(key, number, file, table=table, first=first)
                first += table.num_rows
            continue
        waiting: list[tuple[int, Any]] = []
        for row in read_rows(file, f"data.{key}"):
            waiting.append(row)
            if len(waiting) == _TABLE_ROWS:
                yield Unit(key, number, file, rows=tuple(waiting))
                waiting = []
        if waiting:
            yield Unit(key, number, file, rows=tuple(waiting))


def files_of(key: str, path: Path) -> list[Path]:
    """The file, or the data files of a folder.

    Raises:
        DataError: there is none.
    """
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet"))
        if not found:
            raise DataError(f"data.{key}: {path} holds no .jsonl, .csv or .parquet file")
        return found
    if not path.is_file():
        raise DataError(f"data.{key}: {path} is no file")
    return [path]


def content_of(unit: Unit) -> bytes:
    """The bytes of a part of a JSONL file."""
    if unit.content is not None:
        return unit.content
    with unit.path.open("rb") as handle:
        handle.seek(unit.start)
        return handle.read(unit.end - unit.start)


def _rows_of(unit: Unit) -> Iterator[tuple[int, Any]]:
    if unit.table is not None:
        yield from table_rows(unit.table, unit.first, f"data.{unit.key}", unit.path)
        return
    if unit.end == 0:
        yield from unit.rows
        return
    content = content_of(unit)
    if unit.start == 0:
        content = content.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.splitlines(), start=1):
        yield number, parse_json_line(line, f"data.{unit.key}", unit.path) if line.strip() else _BLANK


def _parse(recipe: ChatRecipe | ClassifyRecipe, unit: Unit, raw: Any) -> Conversation | Example:
    if isinstance(raw, DataError):
        raise BadRow("malformed", str(raw))
    if isinstance(recipe, ChatRecipe):
        conversation = parse_conversation(raw, columnar=unit.path.suffix.lower() == ".parquet")
        key = recipe.curate.split.group_key
        if key == "group":
            return conversation
        group = None if key is None else lookup(raw, key)
        return replace(conversation, group=None if group is None else str(group))
    data = recipe.data
    return parse_example(
        raw, text_key=data.text_key, label_key=data.label_key, labels=data.labels, labelled=unit.key != "pool"
    )


def _numbers(recipe: ChatRecipe | ClassifyRecipe, unit: Unit, row: Row, names: dict[int, str]) -> tuple[Any, ...]:
    """What a split and the card need of a row: asked, group, source, model, label, time."""
    settings, trained = recipe.curate, unit.key in TRAINED
    question = asked(row.example)
    split = settings.split
    if isinstance(row.example, Conversation):
        stated = row.example.group
    else:
        value = None if split.group_key is None else lookup(row.raw, split.group_key)
        stated = None if value is None else str(value)
    if trained and split.by == "group" and not stated:
        raise BadRow("no group", f"{split.group_key} is {stated!r}, curate.split.by: group needs one in every row")
    # Conversations with one prompt stay on one side; so do requests, of which duplicates are dropped.
    together = stated or (question if isinstance(row.example, Conversation) else None)
    name = lookup(row.raw, settings.balance.source_key)
    source = _named(NO_SOURCE if name is None else str(name), names)
    if isinstance(row.example, Conversation):
        name = lookup(row.raw, "model") or lookup(row.raw, "episode.policy")
    else:
        # A column of requests may be called model as well.
        name = lookup(row.raw, "meta.model")
    model = _named(name, names) if isinstance(name, str) and name else 0
    label = 0
    if isinstance(row.example, Example) and row.example.label is not None:
        label = _named(row.example.label, names)
    time = moment(row.raw, split.time_key) if trained and split.by == "time" else 0.0
    return hash64(question) if question else 0, 0 if together is None else hash64(together), source, model, label, time


def _named(name: str, names: dict[int, str]) -> int:
    value = hash64(name)
    names[value] = name
    return value


class _Store:
    """Rows that go on: their lines and words go to this process's files, their numbers are collected."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._start = context.lines.tell()
        self._words = context.words.tell() // 4
        self._hashes: list[int] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(self, number: int, file: int, example: Conversation | Example, numbers: tuple[Any, ...]) -> None:
        """Write a row's line, and remember the rest."""
        key, line = encoded(example)
        prompt, answers = map(words, spoken(example))
        place = self._words + len(self._hashes)
        self._hashes += map(self._context.vocabulary.__getitem__, prompt)
        self._hashes += map(self._context.vocabulary.__getitem__, answers)
        size = self._context.lines.write(line)
        count = len(prompt) + len(answers)
        where = (number, file, self._context.worker, self._start, size, place, count, len(prompt))
        self._rows.append((*where, int(key, 16), *numbers))
        self._start += size

    def finish(self, shingle: int | None) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """Rows and, where a length of shingles is given, their signatures."""
        rows, flat = np.array(self._rows, ROWS), np.array(self._hashes, np.uint32)
        self._context.words.write(flat.tobytes())
        self._context.words.flush()
        self._context.lines.flush()
        if shingle is None:
            return rows, np.zeros((len(rows), 0), np.uint16)
        found = shingles(flat, rows["words"] - np.uint64(self._words), rows["count"], shingle)
        return rows, duplicates.signatures(*found)


def read(context: Context, unit: Unit) -> Batch:
    """Parse, filter, number and store the rows of a unit.

    Raises:
        DataError: the file is not UTF-8.
    """
    recipe, batch, store = context.recipe, Batch(), _Store(context)
    filters, hidden = context.filters
    hidden.redacted.clear()
    mend = isinstance(recipe, ChatRecipe) and recipe.curate.tool_calls == "drop"
    for number, raw in _rows_of(unit):
        batch.lines = number
        if raw is _BLANK:
            continue
        try:
            row = Row(raw, _parse(recipe, unit, raw))
            original = row.example
            drop = next((drop for step in filters if (drop := step(row)) is not None), None)
            if drop is None:
                store.add(number, unit.file, row.example, _numbers(recipe, unit, row, batch.names))
            else:
                batch.dropped.append(Dropped(number, original.id, drop[0], hidden.hide(drop[1])))
        except BadRow as bad:
            if recipe.data.on_bad_line == "stop" and not (mend and isinstance(bad, BadCall)):
                batch.stop = (number, f"{bad}; mend it, or set data.on_bad_line: skip ({bad.reason})")
                break
            batch.dropped.append(Dropped(number, None, bad.reason, hidden.hide(str(bad))))
    near = recipe.curate.near_duplicates
    compared = near is not None and unit.key in (*TRAINED, "test")
    batch.rows, batch.signatures = store.finish(near.shingle if near is not None and compared else None)
    batch.redacted = Counter(hidden.redacted)
    return batch
