"""A run's conversations as its student reads them: the recipe's template, weights and pruned prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attar.data.conversations import read_conversations
from attar.data.types import Conversation
from attar.recipe import AgentRecipe, ChatRecipe
from attar.tokens.conversations import encode_conversations
from attar.tokens.examples import LossWeights, TokenizedExample
from attar.tokens.pruning import PrunedPrompt, find_static
from attar.tokens.tooling import with_tools
from attar.workspace import Run

__all__ = ["encode", "pruned_prompt", "run_conversations", "run_file", "tokenizer_for"]


def tokenizer_for(recipe: ChatRecipe, tokenizer: Any) -> Any:
    """The tokenizer as the recipe's task needs it: an agent's writes tools, whatever its model's own does.

    Raises:
        ModelError: no template with tools can be made of the model's.
    """
    return with_tools(tokenizer).tokenizer if isinstance(recipe, AgentRecipe) and tokenizer is not None else tokenizer


def run_conversations(recipe: ChatRecipe, run: Run, split: str) -> list[Conversation]:
    """The conversations of a split of the run's data, cut as the student's prompts are.

    Raises:
        DataError: nothing is the same in all of them, and the recipe wants that cut.
    """
    return run_file(recipe, run, run.path("data", f"{split}.jsonl"))


def run_file(recipe: ChatRecipe, run: Run, path: Path) -> list[Conversation]:
    """The conversations of any file of the run, likewise."""
    conversations, _ = read_conversations(path, key=path.stem, on_bad_line="stop")
    cut = pruned_prompt(recipe, run)
    return conversations if cut is None else [cut.apply(conversation) for conversation in conversations]


def pruned_prompt(recipe: ChatRecipe, run: Run) -> PrunedPrompt | None:
    """What is cut from the student's prompts: what was cut from the teacher's, where that is a student itself, else
    what never changes in the run's training data, where the recipe wants it.
    """
    if not isinstance(recipe, AgentRecipe):
        return None
    scheme, _, folder = recipe.teacher.model.partition(":")
    if scheme == "hf":
        before = PrunedPrompt.load(Path(folder).expanduser())
        if before is not None:
            return before
    if not recipe.distill.prune:
        return None
    return find_static(read_conversations(run.path("data", "train.jsonl"), key="train", on_bad_line="stop")[0])


def encode(
    recipe: ChatRecipe, tokenizer: Any, conversations: Sequence[Conversation]
) -> tuple[list[TokenizedExample], Counter[str]]:
    """Tokenised examples of conversations, and the counts; see :func:`attar.tokens.encode_conversations`."""
    weights = None
    if isinstance(recipe, AgentRecipe):
        stated = recipe.distill.weights
        weights = LossWeights(
            {"reason": stated.reason, "call": stated.call, "text": stated.text, "end": stated.end}, stated.steps
        )
    return encode_conversations(
        tokenizer,
        conversations,
        max_tokens=recipe.curate.max_tokens,
        max_truncated=recipe.curate.max_truncated,
        weights=weights,
    )
