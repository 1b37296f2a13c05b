"""What a student learns: each objective gives one value per example and says which examples it supervises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from attar.losses import IGNORED, cross_entropy, forward_kl
from attar.recipe.classify import Objective as ObjectiveSpec

__all__ = ["GOLD", "TEACHER", "Logit", "Objective", "Response", "from_recipe"]

TEACHER = "teacher_logprobs"
"""batch key: the teacher's log-probabilities [examples, labels]"""
GOLD = "gold_labels"
"""batch key: gold labels [examples], ``IGNORED`` where there is none"""


class Objective(Protocol):
    """One term of the loss. A user's own class does the same."""

    @property
    def name(self) -> str:
        """How it is logged."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which examples it supervises, bool [examples]."""

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Its value for each example, [examples], from the student's logits [examples, labels]."""


@dataclass(frozen=True)
class Response:
    """Cross-entropy on hard labels: the teacher's most likely one, or the gold label where there is one."""

    weight: float = 1.0
    labels: Literal["teacher", "gold"] = "teacher"

    @property
    def name(self) -> str:
        """``response`` or ``response_gold``."""
        return "response" if self.labels == "teacher" else "response_gold"

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All examples, or those with a gold label."""
        return self._targets(batch) != IGNORED

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy per example, in nats."""
        return cross_entropy(logits, self._targets(batch))

    def _targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch[GOLD] if self.labels == "gold" else batch[TEACHER].argmax(-1)


@dataclass(frozen=True)
class Logit:
    """KL(teacher || student) at a temperature, times its square (Hinton et al. 2015, section 2.1)."""

    temperature: float = 1.0
    weight: float = 1.0

    @property
    def name(self) -> str:
        """``logit``."""
        return "logit"

    def supervised(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All examples."""
        return torch.ones(len(batch[TEACHER]), dtype=torch.bool, device=batch[TEACHER].device)

    def values(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Divergence per example, in nats times T^2."""
        return forward_kl(logits, batch[TEACHER], self.temperature)


def from_recipe(spec: ObjectiveSpec) -> Objective:
    """The objective that a recipe describes."""
    if spec.kind == "logit":
        return Logit(temperature=spec.temperature, weight=spec.weight)
    return Response(weight=spec.weight, labels=spec.labels)
