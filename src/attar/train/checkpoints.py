"""What a checkpoint holds, and which of them is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attar.errors import TrainingError

__all__ = ["COMPLETE", "another_model", "last_checkpoint", "untied"]

COMPLETE = "complete"
"""file that is written last: a checkpoint without it was cut off and is not resumed from"""


def untied(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's weights by name, those that are one parameter under several names once."""
    once = {name for name, _ in module.named_parameters()}
    again = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in again}


def another_model(folder: Any, why: str) -> TrainingError:
    """What is raised where a checkpoint's weights are not this model's."""
    return TrainingError(f"the checkpoint in {folder} is of another model: {why}; delete it or train in another folder")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
