"""The user's documents, and passages of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attar.errors import DataError

__all__ = ["passages", "read_documents"]

_SUFFIXES = (".txt", ".md")
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
_GAP = re.compile(r"\s")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of a file, or of each ``.txt`` and ``.md`` file in a folder, in the order of names.

    Raises:
        DataError: there is no such file, or one of another kind or encoding, or no text at all.
    """
    key = "collect.generate.source.path"
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        base = path
    elif path.is_file() and path.suffix.lower() in _SUFFIXES:
        files, base = [path], path.parent
    else:
        raise DataError(f"{key}: {path} is no folder and no file that ends in {' or '.join(_SUFFIXES)}")
    empty = True
    for file in files:
        try:
            text = file.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{key}: {file} is not UTF-8 (byte 0x{error.object[error.start]:02x} does not fit); convert it: "
                "iconv -f latin1 -t utf-8 FILE > NEW"
            ) from error
        if text.strip():
            empty = False
            yield file.relative_to(base).as_posix(), text
    if empty:
        raise DataError(f"{key}: {path} holds no text in files that end in {' or '.join(_SUFFIXES)}")


def passages(text: str, most: int) -> Iterator[str]:
    """Passages of at most so many characters: as many whole paragraphs as fit, a longer one cut between sentences, or
    else between words, or else anywhere.
    """
    held = ""
    for paragraph in _BLANK_LINES.split(text):
        for piece in _pieces(paragraph.strip(), most):
            joined = f"{held}\n\n{piece}" if held else piece
            if len(joined) <= most:
                held = joined
                continue
            yield held
            held = piece
    if held:
        yield held


def _pieces(paragraph: str, most: int) -> Iterator[str]:
    while len(paragraph) > most:
        ends = [match.end() for match in _SENTENCE_END.finditer(paragraph, 0, most + 1)]
        gaps = ends or [match.start() for match in _GAP.finditer(paragraph, 1, most + 1)]
        cut = gaps[-1] if gaps else most
        yield paragraph[:cut].strip()
        paragraph = paragraph[cut:].strip()
    if paragraph:
        yield paragraph
