"""Turn a teacher's raw word scores into a distribution over labels.

A language model prefers some words whatever the request is, and its scores of different words move together. A
calibration is fitted once on unlabelled requests and then frozen. Whatever the method, what comes out is one linear
map of the scores followed by a softmax, so applying it costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp

from attar.errors import RunError
from attar.recipe import ClassifyRecipe

__all__ = ["Calibration", "fit_calibration", "prior_shares"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A frozen linear map from word scores to labels' logits."""

    weights: Floats
    """[prompts * words, labels]"""
    offsets: Floats
    """[labels], natural logarithm"""

    def apply(self, raw: npt.NDArray[np.float32]) -> Floats:
        """Turn raw scores [texts, prompts, words] into log-probabilities [texts, labels] that add up to 1."""
        result: Floats = log_softmax(_flat(raw) @ self.weights + self.offsets, axis=-1)
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain data that gives the same numbers back, to the last bit."""
        return {"weights": self.weights.tolist(), "offsets": self.offsets.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """The inverse of :meth:`to_json`."""
        return cls(np.array(value["weights"]), np.array(value["offsets"]))


def _flat(raw: npt.NDArray[np.float32]) -> Floats:
    return raw.reshape(len(raw), -1).astype(np.float64)


def prior_shares(recipe: ClassifyRecipe, dev_labels: Iterable[str | None]) -> Floats:
    """The share of each label that a calibration to the prior aims at, [labels]."""
    labels = recipe.data.labels
    prior = recipe.teacher.prior
    if isinstance(prior, dict):
        return np.array([prior[label] for label in labels])
    if prior == "uniform":
        return np.full(len(labels), 1 / len(labels))
    counts = Counter(dev_labels)
    shares = np.array([counts[label] + 1.0 for label in labels])
    return np.asarray(shares / shares.sum())


def _averaging(owners: Sequence[int], prompts: int, labels: int) -> Floats:
    """Weights [prompts * words, labels] that average a label's words, and then the prompts, in log space.

    Args:
        owners: [words], the number of the label that each word stands for.
        prompts: number of prompts.
        labels: number of labels.
    """
    one = np.zeros((len(owners), labels))
    one[np.arange(len(owners)), list(owners)] = 1
    return np.tile(one / one.sum(0), (prompts, 1)) / prompts


def _bias_to_prior(logits: Floats, prior: Floats, *, tolerance: float = 1e-9, rounds: int = 10_000) -> Floats:
    """The bias per label under which the mean probability over a batch equals the prior.

    One round with a uniform prior is batch calibration (Zhou et al. 2023, arXiv:2309.17249, eq. 5, up to the mean of
    probabilities or of logarithms); iterating reaches the prior that is stated.

    Args:
        logits: [texts, labels].
        prior: [labels], adds up to 1.
        tolerance: largest difference from the prior at which to stop.
        rounds: most rounds.
    """
    bias = np.zeros(len(prior))
    for _ in range(rounds):
        shares = np.exp(logsumexp(log_softmax(logits + bias, axis=-1), axis=0)) / len(logits)
        bias += np.log(prior) - np.log(shares)
        if np.abs(shares - prior).max() < tolerance:
            break
    centred: Floats = bias - bias.mean()
    return centred


def _prototypes(scores: Floats, start: Floats, prior: Floats, *, ridge: float = 0.5, rounds: int = 100) -> Calibration:
    """One prototype per label in the space of all word scores, found without labels.

    Prototypical calibration (Han et al. 2022, arXiv:2205.10183) fits a Gaussian mixture to the scores of unlabelled
    requests and reads labels off its clusters. Here each cluster starts as what the teacher already calls a label, so
    no matching of clusters to labels is needed; the covariance is shared, which makes the answer linear in the
    scores; and the mean posterior is held at the prior in every round, not only at the end.

    Args:
        scores: [texts, features].
        start: log-probabilities of labels to start from, [texts, labels].
        prior: [labels], adds up to 1.
        ridge: added to the covariance's diagonal, in units of its mean; without it, features that move together make
            the posterior far too sure of itself.
        rounds: most rounds of expectation and maximisation.
    """
    centre = scores.mean(0)
    x = scores - centre
    # Squared: the teacher's own answers are right more often than they are sure.
    posterior = np.exp(log_softmax(2 * start, axis=-1))
    weights, offsets = np.zeros((x.shape[1], len(prior))), np.zeros(len(prior))
    for _ in range(rounds):
        mass = posterior.sum(0)
        if mass.min() < 1:
            raise RunError(
                f"prototypical calibration: label number {int(mass.argmin())} has fewer than one of the "
                f"{len(x)} requests; give more of them, or use calibration: batch"
            )
        means = posterior.T @ x / mass[:, None]
        covariance = (x.T @ x - (mass[:, None] * means).T @ means) / len(x)
        covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        weights = np.linalg.solve(covariance, means.T)
        offsets = -0.5 * (means.T * weights).sum(0)
        offsets = offsets + _bias_to_prior(x @ weights + offsets, prior, tolerance=1e-4)
        before, posterior = posterior, np.exp(log_softmax(x @ weights + offsets, axis=-1))
        if np.abs(posterior - before).mean() < 1e-5:
            break
    offsets = offsets + _bias_to_prior(x @ weights + offsets, prior)
    return Calibration(weights, offsets - centre @ weights)


def fit_calibration(
    recipe: ClassifyRecipe,
    owners: Sequence[int],
    raw: npt.NDArray[np.float32],
    content_free: npt.NDArray[np.float32],
    prior: Floats,
) -> Calibration:
    """Fit the recipe's calibration.

    Args:
        recipe: says which.
        owners: [words], the number of the label that each word stands for.
        raw: scores of the unlabelled pool, [texts, prompts, words].
        content_free: scores of inputs without content, [inputs, prompts, words]; for ``contextual`` only.
        prior: [labels]; for ``batch`` and ``prototypical`` only.

    Raises:
        RunError: prototypical calibration is left without requests for a label.
    """
    prompts, labels = raw.shape[1], len(prior)
    method = recipe.teacher.calibration
    weights = _averaging(owners, prompts, labels)
    if method == "none":
        return Calibration(weights, np.zeros(labels))
    if method == "contextual":
        # Zhao et al. 2021, arXiv:2102.09690, eq. 2 with W = diag(p_cf)^-1, on the mean over the inputs.
        one = _averaging(owners, 1, labels)
        free = np.exp(log_softmax(content_free.astype(np.float64) @ one, axis=-1)).mean(axis=0)
        return Calibration(weights, -np.log(free).mean(axis=0))
    scores = _flat(raw)
    batch = Calibration(weights, _bias_to_prior(scores @ weights, prior))
    return batch if method == "batch" else _prototypes(scores, batch.apply(raw), prior)
