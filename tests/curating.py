"""Recipes and rows for the tests of curation."""

import json
import random

from attar.recipe import parse_recipe
from attar.workspace import open_run

WORDS = (
    "lamp kettle window garden river copper ticket violin harbour pepper lantern meadow saddle timber anchor".split()
)


def sentence(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def talk(asked, answered, **more):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], **more}


def talks(n, seed=0, words=12):
    rng = random.Random(seed)
    return [talk(sentence(rng, words), sentence(rng, 2 * words)) for _ in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def chat(folder, rows, test=None, data=None, **curate):
    """A recipe on files of these rows."""
    write(folder / "train.jsonl", rows)
    named = {"train": "train.jsonl", **(data or {})}
    if test is not None:
        write(folder / "test.jsonl", test)
        named["test"] = "test.jsonl"
    content = {
        "name": "talks",
        "task": "chat",
        "data": named,
        "teacher": {"model": "hf:somewhere/apache", "licence": "Apache-2.0"},
        "curate": {"val_size": 2, "test_size": 2, **curate},
    }
    return parse_recipe(content, "recipe", folder)


def classify(folder, pool, test=None, data=None, **curate):
    write(folder / "pool.jsonl", pool)
    cases = [{"text": f"case number {n}", "label": label} for n, label in enumerate(("yes", "no"))]
    write(folder / "test.jsonl", cases if test is None else test)
    content = {
        "name": "requests",
        "task": "classify",
        "data": {"labels": ["yes", "no"], "pool": "pool.jsonl", "test": "test.jsonl", **(data or {})},
        "teacher": {"model": "hf:x", "prior": "uniform", "prompts": [{"template": "{{ text }}"}]},
        "curate": {"val_size": 2, **curate},
    }
    return parse_recipe(content, "recipe", folder)


def curated(recipe):
    """Counts, and the data folder."""
    from attar.collect.curate import curate

    with open_run(recipe.folder, recipe.name) as run:
        return curate(recipe, run), run.path("data")


def reasons(folder):
    """Reason -> lines, of what was dropped."""
    found = {}
    for drop in rows_of(folder / "dropped.jsonl"):
        found.setdefault(drop["reason"], []).append(drop["line"])
    return found
