"""Losses of the student's training."""

from attar.losses.divergences import IGNORED, cross_entropy, divergence, forward_kl, masked_mean
from attar.losses.features import (
    FEATURE_LOSSES,
    FeatureLoss,
    attention_transfer,
    cosine,
    mse,
    normalised_mse,
)
from attar.losses.kinds import KINDS, Divergence
from attar.losses.projected import ProjectedLoss, projected_cross_entropy, projected_divergence, projected_loss
from attar.losses.projectors import build_projectors, projector_key
from attar.losses.relations import cka, contrastive, minilm_relations, rkd, similarity_preserving
from attar.losses.sparse import ABSENT, SampledTerm, TopKTerm
from attar.losses.terms import CrossEntropyTerm, DivergenceTerm, Head, Term

__all__ = [
    "ABSENT",
    "FEATURE_LOSSES",
    "IGNORED",
    "KINDS",
    "CrossEntropyTerm",
    "Divergence",
    "DivergenceTerm",
    "FeatureLoss",
    "Head",
    "ProjectedLoss",
    "SampledTerm",
    "Term",
    "TopKTerm",
    "attention_transfer",
    "build_projectors",
    "cka",
    "contrastive",
    "cosine",
    "cross_entropy",
    "divergence",
    "forward_kl",
    "masked_mean",
    "minilm_relations",
    "mse",
    "normalised_mse",
    "projected_cross_entropy",
    "projected_divergence",
    "projected_loss",
    "projector_key",
    "rkd",
    "similarity_preserving",
]
