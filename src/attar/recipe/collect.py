"""Where training data comes from: a part for each way."""

from __future__ import annotations

from pathlib import Path

from attar.recipe.generate import Generate
from attar.recipe.part import Part, absolute
from attar.recipe.record import Record

__all__ = ["Collect"]


class Collect(Part):
    """Where training data comes from."""

    record: Record | None = None
    """`attar record`"""
    generate: Generate | None = None
    """`attar generate`"""

    def located(self, base: Path) -> Collect:
        """The part with every relative path made absolute, counted from ``base``."""
        moved: dict[str, Part] = {}
        if self.record is not None and self.record.folder is not None:
            moved["record"] = self.record.model_copy(update={"folder": absolute(base, self.record.folder)})
        if self.generate is not None:
            moved["generate"] = self.generate.located(base)
        return self.model_copy(update=moved)
