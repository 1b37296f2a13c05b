"""One training of a language model's job: who learns what, from which weights on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from transformers import AutoTokenizer

from attar.data.types import Conversation
from attar.recipe import ChatRecipe
from attar.tokens.training import encode, run_conversations, run_file
from attar.workspace import Run

__all__ = ["Course"]


@dataclass(frozen=True)
class Course:
    """One training: who learns what, from which weights on. Folders and files are those of the run."""

    arm: str
    """whose objectives are learned"""
    seed: int
    folder: tuple[str, ...]
    """where the trained model goes"""
    start: tuple[str, ...] = ("models", "base", "seed-0")
    more: tuple[tuple[str, ...], ...] = ()
    """files of conversations that are learned beside the split ``train``"""
    epochs: float | None = None
    """None: the recipe's"""

    @property
    def work(self) -> tuple[str, ...]:
        """Folder of checkpoints."""
        return ("work", *self.folder)

    def conversations(self, recipe: ChatRecipe, run: Run) -> list[Conversation]:
        """What is learned."""
        found = run_conversations(recipe, run, "train")
        for file in self.more:
            found += run_file(recipe, run, run.path(*file))
        return found

    def tokens(self, recipe: ChatRecipe, run: Run) -> float:
        """Tokens that are computed in this course, padding aside."""
        tokenizer = AutoTokenizer.from_pretrained(run.path(*self.start))
        examples, _ = encode(recipe, tokenizer, self.conversations(recipe, run))
        return sum(map(len, examples)) * (self.epochs or recipe.train.epochs)

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Course:
        """What :meth:`to_json` wrote; lists of JSON are tuples here."""
        stated = json.loads(text)
        return cls(
            arm=stated["arm"],
            seed=stated["seed"],
            folder=tuple(stated["folder"]),
            start=tuple(stated["start"]),
            more=tuple(map(tuple, stated["more"])),
            epochs=stated["epochs"],
        )
