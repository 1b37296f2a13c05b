"""What a teacher's terms say about training other models on its answers.

The list is ``terms.yaml``, dated; each entry names its source and the day on which it was read. This is a reminder, and
no legal advice: it is not complete, it paraphrases, and terms change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml

__all__ = ["NO_ADVICE", "Entry", "Terms", "known_terms", "terms_of"]

NO_ADVICE = "A reminder, no legal advice: terms change, and the list is not complete."

Use = Literal["free", "conditional", "restricted", "unknown"]
_STRICTNESS: tuple[Use, ...] = ("free", "conditional", "restricted")
# The engines that serve a provider's own models unless they are told another address.
_WEIGHTS = ("hf", "gguf", "vllm")


@dataclass(frozen=True)
class Entry:
    """One provider's terms, or one licence."""

    name: str
    use: Use
    says: str
    source: str
    about: str
    read: str
    engines: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Terms:
    """What is known of a teacher."""

    use: Use
    """the strictest of ``entries``; `unknown` where there are none"""
    entries: tuple[Entry, ...]
    date: str
    """of the list"""

    @property
    def words(self) -> str:
        """One sentence, with the source."""
        if not self.entries:
            return f"unknown terms: neither the model nor its licence is in the list of {self.date}"
        strict = [entry for entry in self.entries if entry.use == self.use]
        return "; ".join(f"{entry.name}: {entry.says} ({entry.source}, read {entry.read})" for entry in strict)


@lru_cache(maxsize=1)
def known_terms() -> tuple[str, tuple[Entry, ...]]:
    """The list's date and its entries."""
    content: dict[str, Any] = yaml.safe_load(files("attar").joinpath("terms.yaml").read_text("utf-8"))
    lists = ("engines", "models", "licences")
    entries = []
    for entry in content["entries"]:
        # YAML makes dates of days, and lists.
        values: dict[str, Any] = {key: tuple(v) if key in lists else str(v) for key, v in entry.items()}
        entries.append(Entry(**values))
    return str(content["date"]), tuple(entries)


def terms_of(model: str, licence: str | None = None, *, elsewhere: bool = False) -> Terms:
    """Look a teacher up, by its engine and name and by the licence that the recipe states.

    Args:
        model: as in the recipe, ``engine:NAME``.
        licence: `teacher.licence`.
        elsewhere: the engine talks to another server than its provider's (`base_url`), so that only the name counts.

    Returns:
        All entries that apply; the strictest decides. A folder is looked up by its last two parts.
    """
    date, entries = known_terms()
    engine, _, name = model.partition(":")
    if engine in _WEIGHTS:
        name = "/".join(name.rstrip("/").split("/")[-2:])
    stated = (licence or "").strip().casefold()
    found = []
    for entry in entries:
        by_engine = engine in entry.engines and not elsewhere
        by_name = any(re.search(pattern, part, re.IGNORECASE) for pattern in entry.models for part in name.split("/"))
        if by_engine or by_name or (stated and stated in entry.licences):
            found.append(entry)
    use: Use = max((entry.use for entry in found), key=_STRICTNESS.index, default="unknown")
    return Terms(use, tuple(found), date)
