"""What was generated so far: kept, rejected, and the prompts that the teacher wrote.

``raw/generated.jsonl`` and ``raw/rejected.jsonl`` hold a row an answer, each answer in one of them;
``raw/prompts.jsonl`` what requests to write prompts were answered with. A row is written once, and what is stored is
not asked again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attar.data.journal import Journal
from attar.errors import WorkspaceError
from attar.workspace import write_json

__all__ = ["BEYOND", "Spend", "Store"]

BEYOND = "beyond target"
"""reason of answers that passed when enough were kept; a higher target takes them in"""


@dataclass
class Spend:
    """What a model was asked for, over all starts, as far as it is stored."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = 0.0
    """None where the price of one call or more is not known"""

    def add(self, usage: Mapping[str, Any]) -> None:
        """Count one call."""
        self.calls += 1
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        self.usd = None if self.usd is None or usage["usd"] is None else self.usd + usage["usd"]


@dataclass
class Store:
    """The three files of a run folder.

    Args:
        folder: ``raw`` in the run folder.
        fingerprint: what decides whether stored answers are what would be asked for now.
        read_only: look, and write nothing.

    Raises:
        WorkspaceError: what is stored was made with another fingerprint, or is damaged.
    """

    folder: Path
    fingerprint: Mapping[str, Any]
    read_only: bool = False
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """prompts that the teacher wrote and that are none"""
    teacher: Spend = field(default_factory=Spend)
    judge: Spend = field(default_factory=Spend)

    def __post_init__(self) -> None:
        self._check_fingerprint()
        self._generated, self._rejected, self._prompts = (
            Journal(self.folder / f"{name}.jsonl", mend=not self.read_only)
            for name in ("generated", "rejected", "prompts")
        )
        self._asked: set[str] = set()
        self._examples: set[str] = set()
        self._spare: list[dict[str, Any]] = []
        self._written: dict[str, str | None] = {}
        self._drops: set[str] = set()
        for row in self._generated.rows():
            self._note_kept(row)
        # Kept meanwhile: what a higher target has taken in stands in both files.
        kept = set(self._asked)
        for row in self._rejected.rows():
            if _key(row) not in kept:
                self._note_rejected(row)
        for row in self._prompts.rows():
            self._note_prompt(row)

    def _check_fingerprint(self) -> None:
        path = self.folder / "generate.json"
        if not path.exists():
            if not self.read_only:
                write_json(path, {"fingerprint": self.fingerprint})
            return
        stored = json.loads(path.read_text("utf-8"))["fingerprint"]
        changed = [key for key in sorted({*stored, *self.fingerprint}) if stored.get(key) != self.fingerprint.get(key)]
        if changed:
            key = changed[0]
            raise WorkspaceError(
                f"{self.folder} holds answers that were made with another {', '.join(changed)} ({key}: "
                f"{stored.get(key)!r}, now {self.fingerprint.get(key)!r}), and the two are not mixed; set run.folder "
                f"to another folder, or move {self.folder} away (what an API was paid for stays in the ledger)"
            )

    @property
    def spare(self) -> int:
        """Answers that passed beyond the target."""
        return len(self._spare)

    def asked(self, prompt: str, sample: int) -> bool:
        """Whether what became of this is stored."""
        return f"{prompt}/{sample}" in self._asked

    def known(self, example: str) -> bool:
        """Whether an example of this id is kept already."""
        return example in self._examples

    def keep(self, rows: Iterable[dict[str, Any]], target: int | None) -> None:
        """Store answers that passed, as many as are wanted in ``generated``."""
        rows = list(rows)
        room = len(rows) if target is None else max(0, target - self.accepted)
        self._generated.append(rows[:room])
        for row in rows[:room]:
            self._note_kept(row)
        beyond = [row | {"meta": row["meta"] | {"reason": BEYOND, "detail": ""}} for row in rows[room:]]
        self.reject(beyond)

    def reject(self, rows: Iterable[dict[str, Any]]) -> None:
        """Store answers that did not pass; ``meta.reason`` says why."""
        rows = list(rows)
        self._rejected.append(rows)
        for row in rows:
            self._note_rejected(row)

    def take_in(self, target: int | None) -> None:
        """Keep what passed beyond an earlier, lower target."""
        room = len(self._spare) if target is None else max(0, target - self.accepted)
        taken, self._spare = self._spare[:room], self._spare[room:]
        if not taken:
            return
        rows = []
        for row in taken:
            meta = {key: value for key, value in row["meta"].items() if key not in ("reason", "detail")}
            rows.append(row | {"meta": meta})
        self._generated.append(rows)
        self.rejected[BEYOND] -= len(rows)
        self.rejected += Counter()
        for row in rows:
            self._examples.add(row["id"])
        self.accepted += len(rows)

    def prompt(self, key: str) -> tuple[bool, str | None]:
        """Whether this request to write a prompt was answered, and the text; None where it is no prompt."""
        return key in self._written, self._written.get(key)

    def note_prompt(self, row: dict[str, Any]) -> None:
        """Store what a request to write a prompt (``key``) was answered with: ``text``, or ``reason``; ``usage``."""
        self._prompts.append([row])
        self._note_prompt(row)

    def drop_prompt(self, key: str, reason: str) -> None:
        """Store that a text is no new prompt."""
        if key not in self._drops:
            self.note_prompt({"key": key, "dropped": reason})

    @property
    def prompts_written(self) -> int:
        """Texts that the teacher wrote and that were not dropped."""
        return sum(text is not None and key not in self._drops for key, text in self._written.items())

    def _note_kept(self, row: dict[str, Any]) -> None:
        self._note(row)
        self._examples.add(row["id"])
        self.accepted += 1

    def _note_rejected(self, row: dict[str, Any]) -> None:
        self._note(row)
        reason = row["meta"]["reason"]
        self.rejected[reason] += 1
        if reason == BEYOND:
            self._spare.append(row)
            # So that an equal answer is no second spare one.
            self._examples.add(row["id"])

    def _note(self, row: dict[str, Any]) -> None:
        meta = row["meta"]
        self._asked.add(_key(row))
        self.teacher.add(meta["usage"])
        if meta.get("judge") is not None:
            self.judge.add(meta["judge"]["usage"])

    def _note_prompt(self, row: dict[str, Any]) -> None:
        if "dropped" in row:
            self._drops.add(row["key"])
            self.dropped[row["dropped"]] += 1
            return
        self._written[row["key"]] = row.get("text")
        self.teacher.add(row["usage"])
        if "reason" in row:
            self.dropped[row["reason"]] += 1


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['meta']['prompt_id']}/{row['meta']['sample']}"
