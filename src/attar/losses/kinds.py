"""The kinds of divergence: for each its terms and its slopes, by hand, so that no formula is recorded for autograd.

``divergences`` sums them over dense logits, ``projected`` over chunks of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["KINDS", "Distribution", "Divergence", "Kind"]


class Distribution(NamedTuple):
    """Distributions over a vocabulary, one a row."""

    logs: Tensor
    """log-probabilities [n, vocabulary], nats; -inf for what is impossible"""
    probabilities: Tensor
    """their exponentials [n, vocabulary]"""


class Kind(Protocol):
    """A divergence of the form sum over the vocabulary of f(p, q), with p the teacher's and q the student's."""

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        """Its terms f(p, q) and its slopes q df/dq, both [n, vocabulary] and new tensors, 0 where p = q = 0.

        Slopes may be off by c q, with c the same for the whole row: such a part has no effect on logits.
        """


@dataclass(frozen=True)
class _ForwardKL:
    """KL(p || q)."""

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        return _kl_terms(teacher, student.logs), -teacher.probabilities


@dataclass(frozen=True)
class _ReverseKL:
    """KL(q || p)."""

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        terms = _kl_terms(student, teacher.logs)
        return terms, terms.clone()


@dataclass(frozen=True)
class _JSD:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q: Agarwal et al. 2024, arXiv:2306.13649, equation 1."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; wanted a number from 0 (forward KL) to 1 (reverse KL)")

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        # The formula itself is 0 at both ends; divided by b and 1 - b it tends to these.
        if self.beta == 0:
            return _ForwardKL().parts(teacher, student)
        if self.beta == 1:
            return _ReverseKL().parts(teacher, student)
        logs = _mixture(teacher, student, self.beta).log_()
        slopes = _kl_terms(student, logs).mul_(1 - self.beta)
        return _kl_terms(teacher, logs).mul_(self.beta).add_(slopes), slopes


@dataclass(frozen=True)
class _SkewedKL:
    """KL(p || a p + (1 - a) q): Ko et al. 2024, arXiv:2402.03898, section 3.1."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:  # without the teacher's share the mixture may underflow where p does not
            return _ForwardKL().parts(teacher, student)
        mixture = _mixture(teacher, student, self.alpha)
        slopes = (student.probabilities / mixture).mul_(teacher.probabilities).mul_(self.alpha - 1)
        return _kl_terms(teacher, mixture.log_()), slopes


@dataclass(frozen=True)
class _SkewedReverseKL:
    """KL(q || (1 - a) p + a q): Ko et al. 2024, arXiv:2402.03898, section 3.1."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return _ReverseKL().parts(teacher, student)
        mixture = _mixture(teacher, student, 1 - self.alpha)
        slopes = (student.probabilities / mixture).mul_(student.probabilities).mul_(-self.alpha)
        terms = _kl_terms(student, mixture.log_())
        return terms, slopes.add_(terms)


@dataclass(frozen=True)
class _TotalVariation:
    """Half the sum of |p - q|, from 0 to 1; where p = q its slope is 0."""

    def parts(self, teacher: Distribution, student: Distribution) -> tuple[Tensor, Tensor]:
        difference = student.probabilities - teacher.probabilities
        return difference.abs().mul_(0.5), difference.sign_().mul_(student.probabilities).mul_(0.5)


KINDS: dict[str, Callable[..., Kind]] = {
    "forward_kl": _ForwardKL,
    "reverse_kl": _ReverseKL,
    "jsd": _JSD,
    "skewed_kl": _SkewedKL,
    "skewed_reverse_kl": _SkewedReverseKL,
    "total_variation": _TotalVariation,
}
"""The kinds by name. What a kind is called with (``alpha``, ``beta``) is what ``Divergence`` hands on to it."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence from the teacher, p, to the student, q, both softened by a temperature.

    - ``forward_kl``: KL(p || q), Hinton et al. 2015.
    - ``reverse_kl``: KL(q || p), Gu et al. 2024, arXiv:2306.08543.
    - ``jsd``: the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv:2306.13649, equation 1):
      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. It shrinks to nothing at both ends of beta;
      at exactly 0 and 1 it is what it tends to there divided by beta and 1 - beta: KL(p || q) and KL(q || p), as in
      TRL's ``generalized_jsd_loss``. The loss therefore jumps there: at beta 0.01 it is about 0.01 KL(p || q).
    - ``skewed_kl``: KL(p || alpha p + (1 - alpha) q), of DistiLLM (Ko et al. 2024, arXiv:2402.03898).
    - ``skewed_reverse_kl``: KL(q || (1 - alpha) p + alpha q), of the same.
    - ``total_variation``: half the sum of |p - q|.

    Args:
        kind: a key of ``KINDS``.
        temperature: T, above 0: logits are divided by it, and the divergence is multiplied by T^2, so that the
            gradient's size hardly depends on T (Hinton et al. 2015, section 2.1). TRL has no such factor. Total
            variation's gradient shrinks with 1 / T only, so with the factor it grows with T.
        alpha: of the skewed kinds, at least 0 and below 1; None for 0.1, the value of the paper.
        beta: of ``jsd``, from 0 to 1; None for 0.5.

    Raises:
        ValueError: an unknown kind, a number out of its range, or one that the kind does not use.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    alpha: float | None = None
    beta: float | None = None
    function: Kind = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; wanted one of {', '.join(KINDS)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; wanted a finite number above 0")
        given = {name: value for name in ("alpha", "beta") if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if name not in inspect.signature(KINDS[self.kind]).parameters:
                raise ValueError(f"{name} is {value}, and {self.kind} has no {name}; wanted None")
        object.__setattr__(self, "function", KINDS[self.kind](**given))


def _kl_terms(a: Distribution, log_b: Tensor) -> Tensor:
    """A new tensor of a log(a / b), 0 where a = 0: there the product is 0 * inf."""
    return (a.logs - log_b).mul_(a.probabilities).masked_fill_(a.probabilities == 0, 0.0)


def _mixture(teacher: Distribution, student: Distribution, share: float) -> Tensor:
    """The mixture share * teacher + (1 - share) * student, never 0: what underflows has terms below 1e-36 anyway."""
    mixture = torch.lerp(student.probabilities, teacher.probabilities, share)
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; wanted a number of at least 0 and below 1")
