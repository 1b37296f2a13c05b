"""Where training data comes from: a part for each way."""

from __future__ import annotations

from pathlib import Path

from attar.recipe.part import Part, absolute
from attar.recipe.record import Record

__all__ = ["Collect"]


class Collect(Part):
    """Where training data comes from."""

    record: Record | None = None
    """`attar record`"""

    def located(self, base: Path) -> Collect:
        """The part with every relative path made absolute, counted from ``base``."""
        if self.record is None or self.record.folder is None:
            return self
        moved = self.record.model_copy(update={"folder": absolute(base, self.record.folder)})
        return self.model_copy(update={"record": moved})
