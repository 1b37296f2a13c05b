"""Projectors: linear maps from the student's features to the teacher's width, for losses that need equal widths.

They are trained with the student, and are no part of it when it is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attar.losses.features import FeatureLoss
from attar.losses.rows import positions, width_dim

__all__ = ["build_projectors", "projector_key"]


def projector_key(student: str, teacher: str) -> str:
    """The key of a pair's projector: a name of a module holds no dots. Different pairs have different keys."""
    return "->".join(path.replace("~", "~0").replace("/", "~1").replace(".", "/") for path in (student, teacher))


def build_projectors(
    pairs: Sequence[tuple[str, str]],
    student_shapes: Mapping[str, Sequence[int]],
    teacher_shapes: Mapping[str, Sequence[int]],
    losses: Sequence[FeatureLoss],
    seed: int,
) -> nn.ModuleDict:
    """A projector for each pair whose loss needs equal widths: from student to teacher, never back.

    It is an Identity where the widths agree, else nn.Linear on the last dimension, or for maps a convolution of size
    1 on the channels. Weights are orthogonal (a wider teacher sees the student's features at their lengths and
    angles), biases 0, both float32. A pair that is given twice, with two losses, has one projector.

    Args:
        pairs: paths of student and teacher, as given to taps.
        student_shapes: of each student path, the shape of what was tapped in a forward of any size.
        teacher_shapes: of each teacher path, from a forward of the same inputs.
        losses: one a pair.
        seed: of the weights; the global generator is left alone.

    Returns:
        By ``projector_key``; a pair whose loss works across widths has no entry.

    Raises:
        ValueError: pairs and losses are not as many, a path has no shape, or shapes do not fit.
    """
    if len(pairs) != len(losses):
        raise ValueError(f"there are {len(pairs)} pairs and {len(losses)} losses; wanted one loss a pair")
    generator = torch.Generator().manual_seed(seed)
    projectors = nn.ModuleDict()
    for (student, teacher), loss in zip(pairs, losses, strict=True):
        for path, side, shapes in (student, "student", student_shapes), (teacher, "teacher", teacher_shapes):
            if path not in shapes:
                raise ValueError(f"{path!r} has no shape among the {side}'s: {', '.join(shapes) or 'none'}")
        ours, theirs = tuple(student_shapes[student]), tuple(teacher_shapes[teacher])
        if len(ours) != len(theirs) or len(ours) not in loss.ranks:
            raise ValueError(
                f"{student!r} has shape {ours} and {teacher!r} {theirs}; wanted "
                f"{' or '.join(map(str, loss.ranks))} dimensions for both"
            )
        key = projector_key(student, teacher)
        if not loss.equal_widths or key in projectors:
            continue
        width = width_dim(len(ours))
        if positions(ours) != positions(theirs):
            raise ValueError(
                f"{student!r} has shape {ours} and {teacher!r} {theirs}; wanted the same but for the width "
                f"(dimension {width}); tap layers of the same size"
            )
        projectors[key] = _projector(ours[width], theirs[width], len(ours), generator)
    return projectors


def _projector(student: int, teacher: int, rank: int, generator: torch.Generator) -> Any:
    if student == teacher:
        return nn.Identity()
    # Without the default initialisation, which would draw from the global generator.
    if rank == 4:
        projector: Any = nn.utils.skip_init(nn.Conv2d, student, teacher, 1)  # type: ignore[no-untyped-call]
    else:
        projector = nn.utils.skip_init(nn.Linear, student, teacher)  # type: ignore[no-untyped-call]
    nn.init.orthogonal_(projector.weight, generator=generator)
    nn.init.zeros_(projector.bias)
    return projector
