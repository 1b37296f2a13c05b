"""A trained classifier as an engine: the label is the continuation that is scored, the request is the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attar.data.types import Prompt
from attar.engines.base import Capability, Completion, Scores
from attar.errors import RunError
from attar.tokens import prompt_text

__all__ = ["ClassifierEngine", "load_classifier"]


class _Predictor(Protocol):
    labels: tuple[str, ...]

    @property
    def parameters(self) -> int: ...

    def log_probs(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


class ClassifierEngine:
    """Answers with a label."""

    def __init__(self, predictor: _Predictor) -> None:
        self._predictor = predictor

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text (the label) and scores (of labels)."""
        return frozenset({"text", "scores"})

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self._predictor.parameters

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """The most likely label of each request."""
        del max_tokens
        best = self._predictor.log_probs([prompt_text(prompt) for prompt in prompts]).argmax(-1)
        return [Completion(self._predictor.labels[i], "stop", len(p), 1) for i, p in zip(best, prompts, strict=True)]

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Log-probabilities of labels.

        Raises:
            RunError: a continuation is no label of this classifier.
        """
        unknown = [name for name in continuations if name not in self._predictor.labels]
        if unknown:
            raise RunError(f"the classifier knows no label {unknown[0]!r}; it has {', '.join(self._predictor.labels)}")
        columns = [self._predictor.labels.index(name) for name in continuations]
        texts = [prompt_text(prompt) for prompt in prompts]
        ones = np.ones(len(continuations), dtype=np.int64)
        words = np.array([len(text.split()) for text in texts], dtype=np.int64)
        return Scores(self._predictor.log_probs(texts)[:, columns], ones, words)


class _Torch:
    def __init__(self, folder: Path) -> None:
        from attar.engines.textclassifier import load_text_classifier, log_probs

        self._classifier = load_text_classifier(folder)
        self._log_probs = log_probs
        self.labels = self._classifier.labels

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._classifier.module.parameters())

    def log_probs(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self._log_probs(self._classifier, texts)


def load_classifier(folder: Path) -> ClassifierEngine:
    """Load a trained classifier or the classical baseline from its folder.

    Raises:
        ModelError: the folder holds none.
    """
    from attar.engines.linear import LinearClassifier

    return ClassifierEngine(LinearClassifier.load(folder) if (folder / "idf.npy").is_file() else _Torch(folder))
