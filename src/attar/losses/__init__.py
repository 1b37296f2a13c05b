"""Losses of the student's training."""

from attar.losses.divergences import IGNORED, cross_entropy, divergence, forward_kl, masked_mean
from attar.losses.kinds import KINDS, Divergence
from attar.losses.projected import ProjectedLoss, projected_cross_entropy, projected_divergence, projected_loss
from attar.losses.terms import CrossEntropyTerm, DivergenceTerm, Head, Term

__all__ = [
    "IGNORED",
    "KINDS",
    "CrossEntropyTerm",
    "Divergence",
    "DivergenceTerm",
    "Head",
    "ProjectedLoss",
    "Term",
    "cross_entropy",
    "divergence",
    "forward_kl",
    "masked_mean",
    "projected_cross_entropy",
    "projected_divergence",
    "projected_loss",
]
