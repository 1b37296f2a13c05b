"""Files that only grow, a JSON row a line; what was written is there after a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attar.errors import WorkspaceError
from attar.workspace import append_synced

__all__ = ["Journal"]


class Journal:
    """One such file.

    Args:
        path: made at the first row.
        mend: take off a last line that a kill cut short; without it, the line is passed over.
    """

    def __init__(self, path: Path, *, mend: bool = True) -> None:
        self.path = path
        if mend and path.exists():
            with path.open("r+b") as handle:
                handle.truncate(_whole_lines(handle))

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was written, from the beginning.

        Raises:
            WorkspaceError: a line is no JSON object.
        """
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.endswith("\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise WorkspaceError(
                        f"{self.path} line {number} is damaged ({error}); mend or delete it"
                    ) from error
                if not isinstance(row, dict):
                    raise WorkspaceError(f"{self.path} line {number} is no object; mend or delete it")
                yield row

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows; they are on the disk when this returns.

        Raises:
            NoSpaceError: the disk is full.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if content:
            append_synced(self.path, content)


def _whole_lines(handle: Any) -> int:
    """Length of the file up to its last line end."""
    end = int(handle.seek(0, os.SEEK_END))
    while end:
        start = max(0, end - 65536)
        handle.seek(start)
        found = handle.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + int(found) + 1
        end = start
    return 0
