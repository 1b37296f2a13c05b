"""The demo's data: enough of it, labels in balance, and nothing near on both sides."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from attar.recipe import load_recipe

ROUTER = Path(__file__).parents[1] / "examples" / "router"


def rows(split):
    return [json.loads(line) for line in (ROUTER / f"{split}.jsonl").read_text("utf-8").splitlines()]


def grams(text):
    """Character 5-grams of the words, case and punctuation apart."""
    words = f" {re.sub(r'[^a-z0-9]+', ' ', text.casefold()).strip()} "
    return {words[i : i + 5] for i in range(max(1, len(words) - 4))}


def near(left, right, limit=0.6):
    """Pairs with a Jaccard similarity over the limit; only texts that share a 5-gram are compared."""
    index = {}
    for number, text in enumerate(right):
        for gram in grams(text):
            index.setdefault(gram, set()).add(number)
    right_grams = [grams(text) for text in right]
    found = []
    for text in left:
        mine = grams(text)
        candidates = Counter(number for gram in mine for number in index.get(gram, ()))
        for number, common in candidates.items():
            if common / len(mine | right_grams[number]) > limit:
                found.append((text, right[number]))
    return found


def test_near_finds_a_changed_word_and_leaves_other_requests_alone():
    assert near(["turn off the kitchen light please"], ["Turn off the kitchen lights, please"])
    assert not near(["turn off the kitchen light please"], ["is the kitchen light still on"])


@pytest.mark.parametrize(("split", "least"), [("pool", 1500), ("dev", 60), ("calibration", 200), ("test", 300)])
def test_there_are_enough_cases(split, least):
    assert len(rows(split)) >= least


def test_nothing_near_stands_on_both_sides():
    seen = [row["text"] for split in ("pool", "dev", "calibration") for row in rows(split)]
    recipe = load_recipe(ROUTER / "attar.yaml")
    seen += [shot.text for prompt in recipe.teacher.prompts for shot in prompt.examples]
    assert near([row["text"] for row in rows("test")], seen) == []
    pool = [row["text"] for row in rows("pool")]
    assert near([row["text"] for split in ("dev", "calibration") for row in rows(split)], pool) == []


def test_held_out_labels_are_balanced_and_the_pool_has_none():
    labels = set(load_recipe(ROUTER / "attar.yaml").data.labels)
    assert 10 <= len(labels) <= 12
    for split in ("dev", "calibration", "test"):
        counts = Counter(row["label"] for row in rows(split))
        assert set(counts) == labels
        assert max(counts.values()) <= 2 * min(counts.values())
    assert not any("label" in row for row in rows("pool"))
