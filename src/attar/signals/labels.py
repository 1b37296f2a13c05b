"""Ask a teacher about labels: the words that stand for them are scored after every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attar.data.types import Prompt
from attar.engines.base import Engine, need
from attar.errors import RunError
from attar.recipe import ClassifyRecipe
from attar.tokens import render_prompt

__all__ = ["LabelQuestion"]


@dataclass(frozen=True)
class LabelQuestion:
    """How a teacher is asked which label a request has."""

    recipe: ClassifyRecipe

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """Label -> the words that are scored for it; the first one stands for it in the prompt."""
        stated = self.recipe.teacher.label_words
        return {label: stated.get(label, (label,)) for label in self.recipe.data.labels}

    @property
    def scored(self) -> list[str]:
        """All words, label by label: the last axis of what :meth:`ask` returns."""
        return [word for words in self.words.values() for word in words]

    @property
    def owners(self) -> list[int]:
        """[words], the number of the label that each scored word stands for."""
        return [number for number, words in enumerate(self.words.values()) for _ in words]

    def prompts(self, text: str) -> list[Prompt]:
        """Every prompt of the ensemble for one request."""
        first = {label: words[0] for label, words in self.words.items()}
        return [
            render_prompt(prompt.template, text, [(shot.text, shot.label) for shot in prompt.examples], first)
            for prompt in self.recipe.teacher.prompts
        ]

    def ask(self, engine: Engine, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int]:
        """Score every label's words for every request under every prompt.

        Returns:
            Log-probabilities [texts, prompts, words] as the engine gave them (under ``length: mean`` divided by the
            word's number of tokens), and the number of prompt tokens that the requests took.

        Raises:
            CapabilityError: the engine scores nothing.
        """
        need(engine, "scores", "a classify teacher")
        rendered = [self.prompts(text) for text in texts]
        tables = []
        tokens = 0
        for number in range(len(self.recipe.teacher.prompts)):
            scores = engine.score([prompts[number] for prompts in rendered], self.scored)
            table = scores.log_probs
            if self.recipe.teacher.length == "mean":
                table = (table / scores.tokens).astype(np.float32)
            if not np.isfinite(table).all():
                raise RunError(f"the teacher's score of a word is not a number under prompt {number}")
            tables.append(table)
            tokens += int(scores.prompt_tokens.sum())
        return np.stack(tables, axis=1), tokens
