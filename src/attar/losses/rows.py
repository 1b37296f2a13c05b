"""What feature losses share: which shapes fit, which rows count, directions of vectors.

A row is what has a value of its own: an example of [n, width] or [n, channels, height, width], a token of [batch,
length, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Inputs", "at_least_float32", "check_mask", "check_shapes", "over_rows", "positions", "unit", "width_dim"]

_WANTED = {
    "everything": "the same shape; a projector matches widths, tapping another layer or pooling matches sizes",
    "positions": "the same but for the width; tap a layer of the same size, or pool",
    "rows": "as many rows; tap a layer of the same size, or pool",
}


@dataclass(frozen=True)
class Inputs:
    """What a loss takes."""

    name: str
    ranks: tuple[int, ...]
    """how many dimensions: 2 is [n, width], 3 is [batch, length, width], 4 is [n, channels, height, width]"""
    same: Literal["everything", "positions", "rows"]
    """what student and teacher have to agree in: the whole shape, all but the width, or the number of rows"""


def width_dim(rank: int) -> int:
    """Which dimension is the width: the channels of a map, else the last."""
    return 1 if rank == 4 else rank - 1


def positions(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without its width."""
    width = width_dim(len(shape))
    return (*shape[:width], *shape[width + 1 :])


def check_shapes(inputs: Inputs, student: Sequence[int], teacher: Sequence[int]) -> None:
    """Raise ValueError unless the shapes fit each other and the loss."""
    ranks = " or ".join(map(str, inputs.ranks))
    if len(student) != len(teacher) or len(student) not in inputs.ranks:
        wanted = f"{ranks} dimensions for both"
    else:
        if _compared(inputs, student) == _compared(inputs, teacher):
            return
        wanted = _WANTED[inputs.same]
    raise ValueError(f"{inputs.name}: student has shape {tuple(student)} and teacher {tuple(teacher)}; wanted {wanted}")


def check_mask(inputs: Inputs, student: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless the mask is one bool a row."""
    rows = tuple(student.shape[: _leading(student.dim())])
    if mask is not None and (tuple(mask.shape) != rows or mask.dtype != torch.bool):
        raise ValueError(
            f"{inputs.name}: mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted one bool a row, {rows}. Weights "
            "belong to masked_mean"
        )


def over_rows(
    inputs: Inputs,
    function: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The values of the rows that count, 0 elsewhere.

    What is masked never enters the function, so that it is inert whatever it holds. The teacher gets no gradient.

    Args:
        inputs: what the loss takes.
        function: from the rows that count [m, ...] of student and teacher, at least float32, to their values [m].
            Autocast is off in it.
        student: of one of the ranks.
        teacher: the same.
        mask: bool, one a row.

    Returns:
        One value a row: [n], or [batch, length].

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shapes(inputs, student.shape, teacher.shape)
    check_mask(inputs, student, mask)
    student, teacher = at_least_float32(student, teacher)
    rows = student.shape[: _leading(student.dim())]
    if mask is None:
        student, teacher = student.flatten(0, len(rows) - 1), teacher.flatten(0, len(rows) - 1)
    else:
        student, teacher = student[mask], teacher[mask]
    with torch.autocast(student.device.type, enabled=False):
        values = function(student, teacher)
    if mask is None:
        return values.reshape(rows)
    return values.new_zeros(rows).index_put((mask,), values)


def at_least_float32(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes and float32; the teacher without its graph."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., width] divided by their 2-norm. A zero vector stays, and its gradient is that of x / 1."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    directions: Tensor = vectors / norms.masked_fill(norms == 0, 1.0)
    return directions


def _compared(inputs: Inputs, shape: Sequence[int]) -> tuple[int, ...]:
    if inputs.same == "everything":
        return tuple(shape)
    return positions(shape) if inputs.same == "positions" else tuple(shape[: _leading(len(shape))])


def _leading(rank: int) -> int:
    """How many leading dimensions count the rows."""
    return 2 if rank == 3 else 1
