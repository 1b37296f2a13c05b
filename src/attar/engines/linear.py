"""The classical baseline: TF-IDF and logistic regression, stored as arrays and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from attar.errors import TrainingError

__all__ = ["LinearClassifier"]

_VECTORIZER: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "lowercase": True}


class LinearClassifier:
    """Word and word-pair TF-IDF, then multinomial logistic regression (scikit-learn's defaults, C = 10)."""

    def __init__(
        self,
        labels: tuple[str, ...],
        vocabulary: dict[str, int],
        idf: npt.NDArray[np.float64],
        weights: npt.NDArray[np.float64],
        bias: npt.NDArray[np.float64],
        present: list[int],
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.labels = labels
        self._vocabulary, self._idf, self._weights, self._bias, self._present = vocabulary, idf, weights, bias, present
        self._vectorizer = TfidfVectorizer(vocabulary=vocabulary, **_VECTORIZER)
        self._vectorizer.idf_ = idf

    @property
    def parameters(self) -> int:
        """Weights and biases, and one inverse document frequency a feature."""
        return int(self._weights.size + self._bias.size + self._idf.size)

    @classmethod
    def fit(cls, texts: Sequence[str], targets: Sequence[int], labels: tuple[str, ...]) -> LinearClassifier:
        """Fit on label numbers.

        Raises:
            TrainingError: all targets are one label.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        if len(set(targets)) < 2:
            raise TrainingError(f"the teacher gave every request the label {labels[targets[0]]!r}; nothing to learn")
        vectorizer = TfidfVectorizer(**_VECTORIZER)
        features = vectorizer.fit_transform(texts)
        model = LogisticRegression(C=10.0, max_iter=2000).fit(features, targets)
        weights, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:
            # scikit-learn keeps one row for two classes; the other one is its negative half.
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        vocabulary = {word: int(i) for word, i in vectorizer.vocabulary_.items()}
        return cls(labels, vocabulary, vectorizer.idf_, weights, bias, [int(c) for c in model.classes_])

    def log_probs(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Log-probabilities [texts, labels]; a label that the teacher never gave has probability 1e-12."""
        scores = self._vectorizer.transform(texts) @ self._weights.T + self._bias
        full = np.full((len(texts), len(self.labels)), np.log(1e-12))
        full[:, self._present] = log_softmax(scores, axis=-1)
        return full.astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        about = {"kind": "linear", "labels": list(self.labels), "present": self._present}
        (folder / "attar.json").write_text(json.dumps(about, indent=2), "utf-8")
        words = sorted(self._vocabulary, key=self._vocabulary.__getitem__)
        (folder / "vocabulary.json").write_text(json.dumps(words, ensure_ascii=False), "utf-8")
        for name in ("idf", "weights", "bias"):
            np.save(folder / f"{name}.npy", getattr(self, f"_{name}"), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> LinearClassifier:
        """Load what :meth:`save` wrote."""
        about = json.loads((folder / "attar.json").read_text("utf-8"))
        words = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        idf, weights, bias = (np.load(folder / f"{n}.npy", allow_pickle=False) for n in ("idf", "weights", "bias"))
        return cls(tuple(about["labels"]), {w: i for i, w in enumerate(words)}, idf, weights, bias, about["present"])
