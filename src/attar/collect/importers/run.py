"""Files of other tools -> ``raw/NAME.jsonl``: conversations, and for each row that makes none the reason."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from attar.collect.importers.found import Found, Importer
from attar.collect.importers.merge import Merger, learn_last
from attar.collect.importers.records import read_records
from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation
from attar.errors import DataError, UsageError, require
from attar.recipe.base import nearest
from attar.workspace import open_atomic

__all__ = ["Format", "Imported", "Skipped", "import_files"]

# Rows that are looked at to tell a file's format.
_LOOK = 20
_TOOLS = ("tools", "functions", "tool_definitions")


class Format(NamedTuple):
    """A format that is read."""

    read: Importer
    recognise: Callable[[dict[str, Any]], bool]
    """whether a row is of it"""


class Skipped(NamedTuple):
    """A row, or a part of one, that made no conversation."""

    file: str
    number: int
    """of the line, or of the row where a file is not made of lines"""
    reason: str
    detail: str


@dataclass
class Imported:
    """What came of an import."""

    formats: dict[str, str] = field(default_factory=dict)
    """by file"""
    rows: int = 0
    conversations: int = 0
    joined: Counter[str] = field(default_factory=Counter)
    """see :class:`attar.collect.importers.merge.Merger`"""
    skipped: Counter[str] = field(default_factory=Counter)
    """rows and parts of rows that made no conversation, by reason"""
    left_out: Counter[str] = field(default_factory=Counter)
    """parts that conversations have no place for, by name"""


def import_files(
    paths: Sequence[Path],
    out: Path,
    formats: dict[str, Format],
    *,
    format: str = "auto",
    merge: bool = True,
    on_skipped: Callable[[Skipped], None] = lambda skipped: None,
) -> Imported:
    """Import files into one, which is written whole or not at all.

    Args:
        paths: files of JSON (a line each, an array, documents), Parquet or CSV.
        out: a file that does not exist yet.
        formats: by name.
        format: a name; ``auto`` tells it from each file's first rows; or the user's own importer as
            ``package.module:function``, see :data:`attar.collect.importers.Importer`.
        merge: make one conversation of calls that go on from one another; otherwise each call is a conversation.
        on_skipped: is told each row that made none.

    Raises:
        UsageError: ``out`` exists, or there is no such format or function.
        DataError: a file cannot be read, its format is not known or not one, or no conversation was found.
    """
    if out.exists():
        raise UsageError(f"--out: {out} exists; name another file, or delete it first")
    chosen = {path: _chosen(path, formats, format) for path in paths}
    result = Imported({str(path): name for path, (name, _) in chosen.items()})
    merger = Merger()
    with open_atomic(out) as handle:

        def write(done: Iterable[tuple[Conversation, dict[str, Any]]]) -> None:
            for conversation, meta in done:
                row = {"id": conversation.id} | conversation.wire | {"meta": meta}
                handle.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                result.conversations += 1

        for path, (name, importer) in chosen.items():
            source = _Source(path, result, on_skipped)
            for found in source.found(importer, name):
                try:
                    conversation, meta = _checked(found, path, name)
                except BadRow as bad:
                    source.skip(bad)
                    continue
                result.left_out.update(found.left_out)
                if found.exchange and merge:
                    write(merger.add(conversation, meta))
                else:
                    write([(learn_last(conversation) if found.exchange else conversation, meta)])
        write(merger.rest())
        result.joined = +merger.counts
        if not result.conversations:
            counted = ", ".join(f"{n} {reason}" for reason, n in result.skipped.most_common()) or "they are empty"
            raise DataError(f"import: {', '.join(p.name for p in paths)}: no conversation was found ({counted})")
    return result


def _checked(found: Found, path: Path, name: str) -> tuple[Conversation, dict[str, Any]]:
    row = {"messages": found.messages, "tools": found.tools or None, "group": found.group}
    conversation = parse_conversation(row)
    if found.exchange and conversation.messages[-1].role != "assistant":
        raise BadRow("no answer", f"the last message is of role {conversation.messages[-1].role!r}")
    meta = {"source": path.name, "format": name} | found.meta
    return conversation, {key: value for key, value in meta.items() if value is not None}


class _Source:
    """The rows of one file on their way into an importer; remembers where it stands."""

    def __init__(self, path: Path, result: Imported, on_skipped: Callable[[Skipped], None]) -> None:
        self._columnar = path.suffix.lower() == ".parquet" and _has_structs(path)
        self._path, self._result, self._on_skipped = path, result, on_skipped
        self._number = 0

    def skip(self, bad: BadRow) -> None:
        self._result.skipped[bad.reason] += 1
        self._on_skipped(Skipped(self._path.name, self._number, bad.reason, str(bad)))

    def rows(self) -> Iterator[dict[str, Any]]:
        for number, row in read_records(self._path):
            self._number = number
            self._result.rows += 1
            if not isinstance(row, dict):
                kind = str(row) if isinstance(row, DataError) else f"an object is wanted, this is {type(row).__name__}"
                self.skip(BadRow("malformed", kind))
                continue
            key = _mixed_up(row) if self._columnar else None
            if key is None:
                yield row
            else:
                detail = (
                    f"{key} is an object; in Parquet an object gets the keys of all rows, so write it as a JSON string"
                )
                self.skip(BadRow("bad tools" if key in _TOOLS else "bad tool call", detail))

    def found(self, importer: Importer, name: str) -> Iterator[Found]:
        try:
            for found in importer(self.rows()):
                if isinstance(found, BadRow):
                    self.skip(found)
                else:
                    yield found
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"import: {self._path.name} line {self._number}: the importer {name} failed "
                f"({type(error).__name__}: {error}); name the file's format with --format, or take the row out"
            ) from error


def _chosen(path: Path, formats: dict[str, Format], format: str) -> tuple[str, Importer]:
    if format in formats:
        return format, formats[format].read
    if ":" in format:
        module, _, name = format.partition(":")
        try:
            importer: Importer = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"--format: {format!r} is no function package.module:function ({error})") from error
        return format, importer
    if format != "auto":
        known = ", ".join(formats)
        raise UsageError(f"--format: {format!r} is not known{nearest(format, list(formats))}; wanted auto, {known}")
    name = _recognised(path, formats)
    return name, formats[name].read


def _recognised(path: Path, formats: dict[str, Format]) -> str:
    """The format of a file, told from its first rows."""
    seen: Counter[str] = Counter()
    keys: tuple[str, ...] = ()
    for _, row in islice(read_records(path), _LOOK):
        if isinstance(row, dict):
            keys = keys or tuple(map(str, row))
            seen.update(name for name, known in formats.items() if known.recognise(row))
    if len(seen) == 1:
        return next(iter(seen))
    if not seen:
        raise DataError(
            f"import: {path.name}: its format is not known (keys: {', '.join(keys) or 'none'}); name one with "
            f"--format: {', '.join(formats)}"
        )
    rows = ", ".join(f"{name} ({count} of the first {_LOOK} rows)" for name, count in seen.most_common())
    raise DataError(f"import: {path.name}: it could be {rows}; name the one with --format")


def _mixed_up(value: Any, key: str = "") -> str | None:
    """The key of a tool's schema or of a call's arguments that a table has made one object with those of other rows."""
    if isinstance(value, dict):
        if key in (*_TOOLS, "arguments"):
            return key
        if value.get("type") == "tool_use" and isinstance(value.get("input"), dict):
            return "input"
        return next((found for name, inner in value.items() if (found := _mixed_up(inner, name))), None)
    if isinstance(value, list):
        return next((found for inner in value if (found := _mixed_up(inner, key))), None)
    return None


def _has_structs(path: Path) -> bool:
    """Whether a table has columns of objects, each of which got the keys of all rows."""
    parquet = require("pyarrow.parquet", "parquet")
    types = require("pyarrow.types", "parquet")
    pending = [column.type for column in parquet.read_schema(path)]
    while pending:
        kind = pending.pop()
        if types.is_struct(kind):
            return True
        if types.is_list(kind) or types.is_large_list(kind):
            pending.append(kind.value_type)
    return False
