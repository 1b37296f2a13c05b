"""Losses of the student's training."""

from attar.losses.divergences import IGNORED, cross_entropy, divergence, forward_kl, masked_mean
from attar.losses.kinds import KINDS, Divergence

__all__ = ["IGNORED", "KINDS", "Divergence", "cross_entropy", "divergence", "forward_kl", "masked_mean"]
