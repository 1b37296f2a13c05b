"""The user's conversations -> data/{train,val,test}.jsonl; every drop has a reason."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

from attar.data.conversations import read_conversations, write_conversations
from attar.data.types import Conversation
from attar.errors import DataError, PreflightRefused
from attar.recipe import ChatRecipe
from attar.workspace import Run

__all__ = ["curate", "split"]

_HELD_OUT = ("val", "test")


def _asked(conversation: Conversation) -> str:
    """What two spellings of one prompt have in common: the letters and digits before the first answer."""
    said = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        said.append(message.content or "")
    return re.sub(r"\W+", " ", " ".join(said).casefold()).strip()


def split(recipe: ChatRecipe) -> tuple[dict[str, list[Conversation]], Counter[str]]:
    """Read the files, drop duplicates, and hold out what the recipe asks for.

    Conversations of one group, or with the same prompt, stay on one side.

    Returns:
        Conversations by split, and how many were dropped, by reason.

    Raises:
        DataError: a file cannot be used, or there are too few conversations to hold any out.
        PreflightRefused: a prompt of the user's test file stands in what is trained on.
    """
    dropped: Counter[str] = Counter()
    splits: dict[str, list[Conversation]] = {}
    for name in ("train", *_HELD_OUT):
        path = getattr(recipe.data, name)
        if path is None:
            continue
        read, skipped = read_conversations(path, key=f"data.{name}", on_bad_line=recipe.data.on_bad_line)
        dropped.update({f"{reason} ({name})": n for reason, n in skipped.items()})
        splits[name] = list({conversation.id: conversation for conversation in read}.values())
        if len(splits[name]) < len(read):
            dropped[f"duplicate ({name})"] += len(read) - len(splits[name])
    for name in ("train", "val"):
        tested = {_asked(conversation) for conversation in splits.get("test", [])}
        leaks = [asked for conversation in splits.get(name, []) if (asked := _asked(conversation)) in tested]
        if leaks:
            raise PreflightRefused(
                f"leak: {len(leaks)} prompt(s) of data.test also stand in data.{name}, such as {leaks[0][:80]!r}; "
                "remove them from one side"
            )
    groups: dict[str, list[Conversation]] = {}
    for conversation in splits["train"]:
        groups.setdefault(conversation.group or _asked(conversation), []).append(conversation)
    order = list(groups)
    random.Random(recipe.run.seed).shuffle(order)
    for name in _HELD_OUT:
        if name in splits:
            continue
        size = getattr(recipe.curate, f"{name}_size")
        splits[name] = []
        while order and len(splits[name]) < size:
            splits[name] += groups.pop(order.pop())
    splits["train"] = [conversation for key in order for conversation in groups[key]]
    held = sum(len(splits[name]) for name in _HELD_OUT if getattr(recipe.data, name) is None)
    if len(splits["train"]) < held or not splits["train"]:
        raise DataError(
            f"data.train: holding {held} conversations out leaves {len(splits['train'])} to learn from; add some, or "
            "lower curate.val_size and curate.test_size"
        )
    return splits, dropped


def curate(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Read, check, deduplicate and split."""
    splits, dropped = split(recipe)
    for name, conversations in splits.items():
        write_conversations(run.path("data", f"{name}.jsonl"), conversations)
    return {**{name: len(splits[name]) for name in ("train", *_HELD_OUT)}, "dropped": dict(dropped)}
