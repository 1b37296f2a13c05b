"""Ask a teacher for a distribution over labels, and calibrate what it says.

A language model scores the words that stand for the labels, and it prefers some words whatever the request is. The
calibration is a bias per label, fitted once on unlabelled data and then frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp

from attar.data.types import Prompt
from attar.engines.base import Engine, need
from attar.errors import RunError
from attar.recipe import Recipe
from attar.tokens import render_prompt

__all__ = ["Calibration", "LabelQuestion", "fit_calibration", "prior_shares"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LabelQuestion:
    """How a teacher is asked which label a request has."""

    recipe: Recipe

    @property
    def words(self) -> dict[str, str]:
        """Label -> the word that is scored for it."""
        return {label: self.recipe.teacher.label_words.get(label, label) for label in self.recipe.data.labels}

    def prompts(self, text: str) -> list[Prompt]:
        """Every prompt of the ensemble for one request."""
        return [
            render_prompt(prompt.template, text, [(shot.text, shot.label) for shot in prompt.examples], self.words)
            for prompt in self.recipe.teacher.prompts
        ]

    def ask(self, engine: Engine, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int]:
        """Score every label for every request under every prompt.

        Returns:
            Log-probabilities [texts, prompts, labels] as the engine gave them (under ``length: mean`` divided by the
            label's number of tokens), and the number of prompt tokens that the requests took.

        Raises:
            CapabilityError: the engine scores nothing.
        """
        need(engine, "scores", "a classify teacher")
        rendered = [self.prompts(text) for text in texts]
        tables = []
        tokens = 0
        for number in range(len(self.recipe.teacher.prompts)):
            scores = engine.score([prompts[number] for prompts in rendered], list(self.words.values()))
            table = scores.log_probs
            if self.recipe.teacher.length == "mean":
                table = (table / scores.tokens).astype(np.float32)
            if not np.isfinite(table).all():
                raise RunError(f"the teacher's score of a label is not a number under prompt {number}")
            tables.append(table)
            tokens += int(scores.prompt_tokens.sum())
        return np.stack(tables, axis=1), tokens


@dataclass(frozen=True)
class Calibration:
    """Frozen biases: one per prompt and label, and one per label on the ensemble."""

    per_prompt: Floats
    """[prompts, labels], natural logarithm"""
    ensemble: Floats
    """[labels], natural logarithm"""

    def apply(self, raw: npt.NDArray[np.float32]) -> Floats:
        """Turn raw scores [texts, prompts, labels] into log-probabilities [texts, labels] that add up to 1.

        The prompts are averaged in log space, each after its own bias.
        """
        each = log_softmax(raw.astype(np.float64) + self.per_prompt, axis=-1)
        result: Floats = log_softmax(each.mean(axis=1) + self.ensemble, axis=-1)
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain data that gives the same numbers back, to the last bit."""
        return {"per_prompt": self.per_prompt.tolist(), "ensemble": self.ensemble.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """The inverse of :meth:`to_json`."""
        return cls(np.array(value["per_prompt"]), np.array(value["ensemble"]))


def prior_shares(recipe: Recipe, dev_labels: Iterable[str | None]) -> Floats:
    """The share of each label that batch calibration aims at, [labels]."""
    labels = recipe.data.labels
    prior = recipe.teacher.prior
    if isinstance(prior, dict):
        return np.array([prior[label] for label in labels])
    if prior == "uniform":
        return np.full(len(labels), 1 / len(labels))
    counts = Counter(dev_labels)
    shares = np.array([counts[label] + 1.0 for label in labels])
    return np.asarray(shares / shares.sum())


def _bias_to_prior(log_probs: Floats, prior: Floats, *, tolerance: float = 1e-9, rounds: int = 10_000) -> Floats:
    """The bias per label under which the mean probability over a batch equals the prior.

    One round with a uniform prior is batch calibration (Zhou et al. 2023, arXiv:2309.17249, eq. 5, up to the mean of
    probabilities or of logarithms); iterating reaches the prior that is stated.

    Args:
        log_probs: [texts, labels], rows add up to 1.
        prior: [labels], adds up to 1.
        tolerance: largest difference from the prior at which to stop.
        rounds: most rounds.
    """
    bias = np.zeros(len(prior))
    for _ in range(rounds):
        shares = np.exp(logsumexp(log_softmax(log_probs + bias, axis=-1), axis=0)) / len(log_probs)
        bias += np.log(prior) - np.log(shares)
        if np.abs(shares - prior).max() < tolerance:
            break
    centred: Floats = bias - bias.mean()
    return centred


def fit_calibration(
    recipe: Recipe,
    raw: npt.NDArray[np.float32],
    content_free: npt.NDArray[np.float32] | None,
    prior: Floats,
) -> Calibration:
    """Fit the recipe's calibration.

    Args:
        recipe: says which.
        raw: scores of the unlabelled pool, [texts, prompts, labels].
        content_free: scores of inputs without content, [inputs, prompts, labels]; for ``contextual`` only.
        prior: [labels]; for ``batch`` only.
    """
    prompts, labels = raw.shape[1:]
    each = log_softmax(raw.astype(np.float64), axis=-1)
    nothing = np.zeros(labels)
    if recipe.teacher.calibration == "none":
        return Calibration(np.zeros((prompts, labels)), nothing)
    if recipe.teacher.calibration == "contextual":
        if content_free is None:
            raise RunError("contextual calibration needs the scores of inputs without content")
        # Zhao et al. 2021, arXiv:2102.09690, eq. 2 with W = diag(p_cf)^-1, on the mean over the inputs.
        free = np.exp(log_softmax(content_free.astype(np.float64), axis=-1)).mean(axis=0)
        return Calibration(-np.log(free), nothing)
    per_prompt = np.stack([_bias_to_prior(each[:, number], prior) for number in range(prompts)])
    mean = log_softmax(each + per_prompt, axis=-1).mean(axis=1)
    return Calibration(per_prompt, _bias_to_prior(log_softmax(mean, axis=-1), prior))
