"""Signals on disk: what a teacher said, in append-only shards that are checked and memory-mapped.

A store belongs to one fingerprint (teacher, tokenizer, prompts); another one is refused by name, never mixed. A shard
counts once its description is written, so a killed run loses at most the shard in work.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attar.errors import WorkspaceError
from attar.workspace import file_digest, write_atomic, write_json

__all__ = ["SignalStore"]


class SignalStore:
    """Arrays by example id.

    Args:
        folder: where the shards are.
        fingerprint: what made them, plain data; compared key by key with what the folder holds.

    Raises:
        WorkspaceError: the folder holds signals of another fingerprint, or a shard is damaged.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self._folder = folder
        meta = folder / "meta.json"
        if meta.exists():
            found = json.loads(meta.read_text("utf-8"))
            different = [key for key in sorted({*found, *fingerprint}) if found.get(key) != fingerprint.get(key)]
            if different:
                raise WorkspaceError(
                    f"the signals in {folder} were made with another {', '.join(different)}; "
                    "they are not mixed: run `attar score` in another run.folder"
                )
        else:
            write_json(meta, dict(fingerprint))
        self._shards = [self._checked(path) for path in sorted(folder.glob("shard-*.json"))]

    def _checked(self, description: Path) -> tuple[list[str], Path, int]:
        about = json.loads(description.read_text("utf-8"))
        data = description.with_suffix(".npy")
        if not data.is_file() or file_digest(data) != about["sha256"]:
            raise WorkspaceError(f"{data} is damaged: its content is not what was written; delete {self._folder}")
        return about["ids"], data, about["tokens"]

    @property
    def ids(self) -> list[str]:
        """Ids of all stored examples, in order."""
        return [name for names, _, _ in self._shards for name in names]

    @property
    def tokens(self) -> int:
        """Prompt tokens that the teacher read for these signals."""
        return sum(tokens for _, _, tokens in self._shards)

    def append(self, ids: Sequence[str], rows: npt.NDArray[np.float32], tokens: int) -> None:
        """Add one shard: ``rows`` [examples, ...] in the order of ``ids``."""
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids, {len(rows)} rows")
        stem = self._folder / f"shard-{len(self._shards):05d}"
        content = io.BytesIO()
        np.save(content, rows, allow_pickle=False)
        data = stem.with_suffix(".npy")
        write_atomic(data, content.getvalue())
        write_json(stem.with_suffix(".json"), {"ids": list(ids), "tokens": tokens, "sha256": file_digest(data)})
        self._shards.append((list(ids), data, tokens))

    def read(self, ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """Rows of some examples, [examples, ...], in the order asked.

        Raises:
            WorkspaceError: an example has no signal.
        """
        places = {
            name: (number, row) for number, (names, _, _) in enumerate(self._shards) for row, name in enumerate(names)
        }
        missing = [name for name in ids if name not in places]
        if missing:
            raise WorkspaceError(
                f"{len(missing)} of {len(ids)} examples have no signal (first: {missing[0]}); run `attar score`"
            )
        maps = [np.load(data, mmap_mode="r", allow_pickle=False) for _, data, _ in self._shards]
        return np.stack([maps[number][row] for number, row in (places[name] for name in ids)])
