"""What every part of a recipe is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Part", "Positive", "Share", "absolute", "unique"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A frozen part of a recipe; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def absolute(base: Path, path: Path) -> Path:
    """A path of the user's, counted from ``base`` where it is relative."""
    return (base / path.expanduser()).resolve()


def unique(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values; ValueError where one is empty or stands twice."""
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
        raise ValueError(f"repeated: {', '.join(repeated)}")
    if any(not v.strip() for v in values):
        raise ValueError("one is empty")
    return values
