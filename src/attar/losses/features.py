"""Losses on inner features of student and teacher: tensors that taps have read.

Each is a function of the two tensors and a mask, and gives one value a row (an example, or a token of [batch, length,
width]), 0 where masked, in the shape of the mask: ``masked_mean(values.flatten(), mask.flatten(), denominator)`` is
the mean over rows, with the whole batch's denominator where micro-batches' gradients shall sum to the whole batch's. A
masked row is inert whatever it holds; a NaN in one that counts is passed on. The teacher gets no gradient. Sizes are
never interpolated. ``relations`` has the losses that compare rows with one another.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from attar.losses import relations
from attar.losses.rows import Inputs, over_rows, unit

__all__ = ["FEATURE_LOSSES", "BuiltIn", "FeatureLoss", "attention_transfer", "cosine", "mse", "normalised_mse"]

_MSE = Inputs("mse", ranks=(2, 3, 4), same="everything")
_COSINE = Inputs("cosine", ranks=(2, 3), same="everything")
_NORMALISED_MSE = Inputs("normalised_mse", ranks=(2, 3), same="everything")
_ATTENTION_TRANSFER = Inputs("attention_transfer", ranks=(4,), same="positions")


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of a row's features.

    Romero et al. 2015, arXiv:1412.6550 (FitNets), equation 3, for maps; Jiao et al. 2020, arXiv:1909.10351
    (TinyBERT), for hidden states.

    Args:
        student: [n, width], [batch, length, width] or [n, channels, height, width].
        teacher: the same shape.
        mask: bool, one a row.

    Returns:
        One value a row, the mean over its features: 0 where they agree, never negative; at least float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    return over_rows(_MSE, lambda s, t: (s - t).square().flatten(1).mean(dim=1), student, teacher, mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos of the angle between a row's features: neither side's length matters.

    Sanh et al. 2019, arXiv:1910.01108 (DistilBERT), section 3. It is computed as half the squared distance of unit
    vectors, which rounding does not make negative. A zero vector has no angle: its value is 1/2, or 0 where both
    are zero.

    Args:
        student: [n, width] or [batch, length, width].
        teacher: the same shape.
        mask: bool, one a row.

    Returns:
        One value a row, from 0 (same direction) to 2; at least float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    return over_rows(_COSINE, lambda s, t: (unit(s) - unit(t)).square().sum(dim=1) / 2, student, teacher, mask)


def normalised_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference after layer normalisation of both sides: neither's scale nor mean matters.

    Wei et al. 2022, arXiv:2205.14141, normalise the teacher's features so, without weight and bias; here the student's
    are too. Where a row's variance is far above the usual 1e-5 that is added to it, this is 2 (1 - Pearson's
    correlation).

    Args:
        student: [n, width] or [batch, length, width].
        teacher: the same shape.
        mask: bool, one a row.

    Returns:
        One value a row: 0 where they agree, at most 4; at least float32.

    Raises:
        ValueError: the shapes do not fit.
    """

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        width = student.shape[1:]
        return (F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean(dim=1)

    return over_rows(_NORMALISED_MSE, values, student, teacher, mask)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, power: float = 2.0) -> Tensor:
    """Mean squared difference of spatial attention maps: where a convolution is active, whatever its channels are.

    Zagoruyko and Komodakis 2017, arXiv:1612.03928, section 3.1 and equation 2: the map is the sum over channels of
    |activation|^power, divided by its 2-norm. As in their code, to which the usual weight of 1000 belongs, the squared
    difference is averaged over positions, where the equation takes its norm.

    Args:
        student: [n, channels, height, width].
        teacher: the same but for channels.
        mask: [n], bool.
        power: at least 1.

    Returns:
        [n]: 0 where the maps agree, never negative; at least float32.

    Raises:
        ValueError: the shapes do not fit, or the power is below 1.
    """
    if not 1 <= power < math.inf:
        raise ValueError(f"attention_transfer: power is {power}; wanted a finite number of at least 1")

    def attention(maps: Tensor) -> Tensor:
        return unit(maps.abs().pow(power).sum(dim=1).flatten(1))

    return over_rows(
        _ATTENTION_TRANSFER,
        lambda student, teacher: (attention(student) - attention(teacher)).square().mean(dim=1),
        student,
        teacher,
        mask,
    )


class FeatureLoss(Protocol):
    """A loss on features: one of ``FEATURE_LOSSES``, or a user's own."""

    @property
    def equal_widths(self) -> bool:
        """Whether the widths have to agree, so that a projector is built where they do not."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many dimensions it takes: 2 [n, width], 3 [batch, length, width], 4 [n, channels, height, width]."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value a row, in the mask's shape, 0 where masked; ValueError where the shapes do not fit."""


@dataclass(frozen=True)
class BuiltIn:
    """One of attar's own."""

    function: Callable[..., Tensor]
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equal_widths(self) -> bool:
        """Whether the widths have to agree."""
        return self.inputs.same == "everything"

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many dimensions it takes."""
        return self.inputs.ranks

    def with_options(self, **options: Any) -> BuiltIn:
        """The same loss with these keyword arguments of its function.

        Raises:
            ValueError: an option that it does not have, or one that it needs is missing.
        """
        taken = {
            name: one.default
            for name, one in inspect.signature(self.function).parameters.items()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name, value in options.items():
            if name not in taken:
                known = ", ".join(taken) or "no options"
                raise ValueError(f"{name} is {value!r}, and {self.inputs.name} has no {name}; it has {known}")
        for name, default in taken.items():
            if default is inspect.Parameter.empty and name not in options:
                raise ValueError(f"{self.inputs.name} needs {name}, and it is not given")
        return replace(self, options=options)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value a row."""
        return self.function(student, teacher, mask, **self.options)


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    one.inputs.name: one
    for one in (
        BuiltIn(mse, _MSE),
        BuiltIn(cosine, _COSINE),
        BuiltIn(normalised_mse, _NORMALISED_MSE),
        BuiltIn(attention_transfer, _ATTENTION_TRANSFER),
        BuiltIn(relations.minilm_relations, relations.MINILM_RELATIONS),
        BuiltIn(relations.cka, relations.CKA),
        BuiltIn(relations.similarity_preserving, relations.SIMILARITY_PRESERVING),
        BuiltIn(relations.rkd, relations.RKD),
        BuiltIn(relations.contrastive, relations.CONTRASTIVE),
    )
}
"""Every feature loss by name, with its default options. Add one's own to have it under a name as well."""
