"""Losses of the student's training."""

from attar.losses.divergences import IGNORED, cross_entropy, forward_kl, masked_mean

__all__ = ["IGNORED", "cross_entropy", "forward_kl", "masked_mean"]
