"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found; ``refuse`` stops a run, ``warn`` asks for a look."""

    level: Literal["ok", "warn", "refuse"]
    message: str
