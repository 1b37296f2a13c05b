"""The user's files -> data/{train,val,dev,calibration,test}.jsonl; every drop has a reason."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

from attar.data.files import read_examples, write_examples
from attar.data.types import Example
from attar.errors import DataError, PreflightRefused
from attar.recipe import ClassifyRecipe
from attar.workspace import Run

__all__ = ["curate", "read_sources"]


def _key(text: str) -> str:
    """What two spellings of one request have in common: letters and digits, case apart."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def read_sources(recipe: ClassifyRecipe) -> tuple[dict[str, list[Example]], Counter[str]]:
    """Read every file that the recipe names.

    Returns:
        Examples by split (``pool``, ``dev``, ``calibration``, ``test``; empty where the recipe names no file), and
        how many rows were skipped, by reason.

    Raises:
        DataError: a file is missing, empty, malformed, or has labels that the recipe does not know.
    """
    sources: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for split in ("pool", "dev", "calibration", "test"):
        path = getattr(recipe.data, split)
        if path is None:
            sources[split] = []
            continue
        sources[split], skipped = read_examples(
            path,
            key=f"data.{split}",
            text_key=recipe.data.text_key,
            label_key=recipe.data.label_key,
            labels=recipe.data.labels,
            labelled=split != "pool",
            on_bad_line=recipe.data.on_bad_line,
        )
        dropped.update({f"{reason} ({split})": n for reason, n in skipped.items()})
    if len({example.label for example in sources["test"]}) < 2:
        raise DataError(
            f"data.test: every case has the label {sources['test'][0].label!r}; an accuracy on one class shows nothing"
        )
    return sources, dropped


def refuse_leaks(sources: dict[str, list[Example]]) -> None:
    """Refuse test cases that stand in what the student or the prompts are fitted on.

    Raises:
        PreflightRefused: lists them.
    """
    test = {_key(example.text) for example in sources["test"]}
    for split in ("pool", "dev", "calibration"):
        leaks = [example.text for example in sources[split] if _key(example.text) in test]
        if leaks:
            shown = "; ".join(repr(text) for text in leaks[:5])
            more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
            raise PreflightRefused(
                f"leak: {len(leaks)} test case(s) also stand in data.{split}: {shown}{more}; remove them from one side"
            )


def curate(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Read, check, deduplicate and split.

    Raises:
        DataError: a file cannot be used, or the pool is too small for the validation split.
        PreflightRefused: a test case stands in the pool.
    """
    sources, dropped = read_sources(recipe)
    refuse_leaks(sources)
    seen: set[str] = set()
    pool = []
    for example in sources["pool"]:
        key = _key(example.text)
        if key in seen:
            dropped["duplicate (pool)"] += 1
        else:
            seen.add(key)
            pool.append(example)
    size = recipe.curate.val_size
    if len(pool) < 2 * size:
        raise DataError(
            f"data.pool: {len(pool)} different requests are too few for curate.val_size {size}; "
            f"add requests or set curate.val_size to at most {len(pool) // 2}"
        )
    order = list(range(len(pool)))
    random.Random(recipe.run.seed).shuffle(order)
    held_out = set(order[:size])
    splits = {
        "train": [example for i, example in enumerate(pool) if i not in held_out],
        "val": [example for i, example in enumerate(pool) if i in held_out],
        **{split: sources[split] for split in ("dev", "calibration", "test")},
    }
    for split, examples in splits.items():
        write_examples(run.path("data", f"{split}.jsonl"), examples)
    return {**{split: len(examples) for split, examples in splits.items()}, "dropped": dict(dropped)}
