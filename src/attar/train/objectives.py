"""What a student learns: the objectives of a loss, each with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from attar.losses import FEATURE_LOSSES, IGNORED, Divergence, FeatureLoss, cross_entropy, divergence
from attar.losses.features import BuiltIn

__all__ = ["LABELS", "TEACHER", "AnyObjective", "Feature", "Logit", "Objective", "Response"]

TEACHER = "teacher_logprobs"
"""batch key: the teacher's logits or log-probabilities [examples, classes]; a live teacher's come in its place"""
LABELS = "labels"
"""batch key: gold labels [examples], ``IGNORED`` where there is none"""


@runtime_checkable
class Objective(Protocol):
    """One term of the loss on a module's outputs. A user's own class does the same."""

    @property
    def name(self) -> str:
        """How it is logged."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which examples it supervises, bool [examples]."""

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Its value for each example, [examples], from the student's logits [examples, classes]."""


def _everything(batch: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(batch.values()))
    return torch.ones(len(first), dtype=torch.bool, device=first.device)


@dataclass(frozen=True)
class Response:
    """Cross-entropy on hard targets.

    Of a causal language model the targets are the supervised tokens themselves (the teacher's text, where the teacher
    wrote the data). Of any other module they are the teacher's most likely class, or the gold label where there is one.
    """

    weight: float = 1.0
    labels: Literal["teacher", "gold"] = "teacher"

    @property
    def name(self) -> str:
        """``response`` or ``response_gold``."""
        return "response" if self.labels == "teacher" else "response_gold"

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All examples, or those with a gold label."""
        return batch[LABELS] != IGNORED if self.labels == "gold" else _everything(batch)

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy per example, in nats."""
        return cross_entropy(logits, batch[LABELS] if self.labels == "gold" else batch[TEACHER].argmax(-1))


@dataclass(frozen=True)
class Logit:
    """A divergence from the teacher's distribution at a temperature, times its square (Hinton et al. 2015, 2.1).

    Args:
        temperature: above 0.
        weight: its factor in the sum.
        divergence: a kind of ``attar.losses.KINDS``.
        alpha: of the skewed kinds; None for 0.1.
        beta: of ``jsd``; None for 0.5.
    """

    temperature: float = 1.0
    weight: float = 1.0
    divergence: str = "forward_kl"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        # What cannot be is said here, not in the first step.
        _ = self.measure

    @property
    def name(self) -> str:
        """``logit``, and the kind where it is not the forward KL."""
        return "logit" if self.divergence == "forward_kl" else f"logit_{self.divergence}"

    @property
    def measure(self) -> Divergence:
        """The divergence itself."""
        return Divergence(self.divergence, self.temperature, self.alpha, self.beta)

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All examples."""
        return _everything(batch)

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Divergence per example, in nats times T^2."""
        return divergence(logits, batch[TEACHER], self.measure)


@dataclass(frozen=True)
class Feature:
    """A loss between inner layers.

    Args:
        match: path of a layer of the student -> path of a layer of the teacher (see ``attar.taps``).
        loss: a name of ``attar.losses.FEATURE_LOSSES``, or a loss of one's own.
        weight: its factor in the sum; the pairs are averaged.
        options: keyword arguments of a built-in loss.
    """

    match: Mapping[str, str]
    loss: str | FeatureLoss = "cosine"
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.match:
            raise ValueError("match is empty; wanted at least one pair, such as {'layers.3': 'layers.7'}")
        if isinstance(self.loss, str) and self.loss not in FEATURE_LOSSES:
            raise ValueError(f"loss is {self.loss!r}; wanted one of {', '.join(FEATURE_LOSSES)}, or a loss of your own")

    @property
    def name(self) -> str:
        """``feature_`` and the loss."""
        return f"feature_{self.loss if isinstance(self.loss, str) else type(self.loss).__name__}"

    @property
    def function(self) -> FeatureLoss:
        """The loss itself."""
        loss = FEATURE_LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        if isinstance(loss, BuiltIn):
            return loss.with_options(**self.options)
        if self.options:
            raise ValueError(f"options holds {', '.join(self.options)}; a loss of your own takes none")
        return loss


AnyObjective = Objective | Feature
