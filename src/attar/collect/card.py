"""The data card: a README.md in the hub's form, beside the splits.

Its head follows the hub's dataset card (``license``, ``pretty_name``, ``size_categories``, ``task_categories``,
``configs``). It depends on the recipe and the files alone, so that the same run writes the same card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from attar.collect.origin import Model
from attar.collect.reading import NO_SOURCE
from attar.recipe import ChatRecipe, ClassifyRecipe
from attar.terms import NO_ADVICE, terms_of
from attar.workspace import write_atomic

__all__ = ["Card", "write_card"]

# The hub's name of a split where ours is another.
_HUB = {"val": "validation"}
# Licences that the hub knows by these names; others are stated as `other` with their name.
_LICENCES = (
    "apache-2.0",
    "mit",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "odc-by",
    "llama3.1",
    "llama3.2",
)
_SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
)
# Models and sources that are listed.
_SHOWN = 50


@dataclass
class Card:
    """What the card tells of the data."""

    models: list[Model]
    """that answered, as the rows that are trained on name them"""
    sources: list[tuple[str, int]]
    """where those rows come from, and how many"""
    redacted: dict[str, int]
    read: dict[str, int] = field(default_factory=dict)
    """rows of each of the user's files"""
    sizes: dict[str, int] = field(default_factory=dict)
    """examples of each split"""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split's file"""
    dropped: dict[str, int] = field(default_factory=dict)
    """by reason and file"""
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    """oldest and newest row of each split, seconds since 1970, where the split is by time"""


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _head(recipe: ChatRecipe | ClassifyRecipe, card: Card) -> dict[str, Any]:
    stated = (recipe.data.licence or "").strip()
    if not stated:
        licence: dict[str, Any] = {"license": "unknown"}
    elif stated.casefold() in _LICENCES:
        licence = {"license": stated.casefold()}
    else:
        licence = {"license": "other", "license_name": stated}
    total = sum(card.sizes.values())
    return {
        **licence,
        "pretty_name": recipe.name,
        **({"language": list(recipe.curate.languages)} if recipe.curate.languages else {}),
        "task_categories": ["text-generation" if isinstance(recipe, ChatRecipe) else "text-classification"],
        "size_categories": [next((name for most, name in _SIZES if total < most), "n>100M")],
        "tags": ["distillation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": _HUB.get(name, name), "path": f"{name}.jsonl"} for name, n in card.sizes.items() if n
                ],
            }
        ],
    }


def _filters(recipe: ChatRecipe | ClassifyRecipe) -> list[tuple[str, str]]:
    """What was asked for, in words; what is off is not listed."""
    settings, near = recipe.curate, recipe.curate.near_duplicates
    leaks, private = settings.decontaminate, settings.private
    rows = [("duplicates", "the same messages and tools" if isinstance(recipe, ChatRecipe) else "the same words")]
    if near is not None:
        rows.append(("near duplicates", f"Jaccard similarity of {near.shingle}-word shingles from {near.threshold:g}"))
    runs = "" if leaks.ngram is None else f", or {leaks.ngram} words in a row that at most {leaks.common} rows have"
    rows.append(("leaks", f"the same prompt as a test case{', near duplicates of one' if near else ''}{runs}"))
    for name in ("min_characters", "max_characters"):
        if (limit := getattr(settings.length, name)) is not None:
            rows.append((name.replace("_", " "), f"{limit:,}"))
    if settings.languages:
        rows.append(("languages", ", ".join(settings.languages)))
    for name in ("tool_calls", "truncated", "filtered", "unfinished", "refusals"):
        if getattr(settings, name, "keep") == "drop":
            rows.append((name.replace("_", " "), "dropped"))
    if isinstance(recipe, ChatRecipe) and (outcome := recipe.curate.outcome).failed == "drop":
        least = "" if outcome.at_least is None else f", or is below {outcome.at_least:g}"
        rows.append(("outcomes", f"dropped where `{outcome.key}` says that it failed{least}"))
    for name in ("keys", "cards", "emails", "phones"):
        rows.append((name, {"drop": "rows dropped", "redact": "redacted", "keep": "kept"}[getattr(private, name)]))
    if private.patterns:
        rows.append((", ".join(private.patterns), private.patterns_policy))
    for name in ("per_source", "per_class"):
        if (most := getattr(settings.balance, name, None)) is not None:
            rows.append((name.replace("_", " "), f"at most {most:,}"))
    return rows


def _origins(card: Card) -> list[str]:
    """Who answered, and where the rows stood."""
    lines: list[str] = []
    if card.models:
        head = ("model", "examples", "training on its answers", "terms")
        rows = [(f"`{model.name}`", model.rows, model.terms.use, model.terms.words) for model in card.models[:_SHOWN]]
        lines += ["What is trained on names the models that answered:", ""]
        lines += [*_table(head, rows + _rest(card.models, len(head))), ""]
    if any(name != NO_SOURCE for name, _ in card.sources):
        lines += ["Where it comes from:", ""]
        lines += [*_table(("source", "examples"), [*card.sources[:_SHOWN], *_rest(card.sources, 2)]), ""]
    return lines


def _rest(rows: list[Any], columns: int) -> list[tuple[Any, ...]]:
    """A row for those that are not listed."""
    more = len(rows) - _SHOWN
    return [(f"and {more:,} more", *[""] * (columns - 1))] if more > 0 else []


def _split(recipe: ChatRecipe | ClassifyRecipe) -> str:
    split = recipe.curate.split
    how = {
        "random": "by chance",
        "group": "by chance, whole groups",
        "time": f"by time (`{split.time_key}`), the newest for test",
    }[split.by]
    group = f"; rows with one `{split.group_key}` stay on one side" if split.group_key else ""
    return f"What has no file of its own was held out {how}{group}. Seed {recipe.run.seed}."


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_card(path: Path, recipe: ChatRecipe | ClassifyRecipe, card: Card) -> None:
    """Write the card of a run's data."""
    teacher = recipe.teacher
    terms = terms_of(teacher.model, teacher.licence, elsewhere=getattr(teacher, "base_url", None) is not None)
    splits = [
        (
            name,
            n,
            *((" to ".join(map(_day, card.times[name])),) if name in card.times else ("",)),
            f"`{card.hashes[name]}`",
        )
        for name, n in card.sizes.items()
    ]
    lines = [
        "---",
        yaml.safe_dump(_head(recipe, card), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"Data that a student learns from and is tested on, curated by attar for the task `{recipe.task}`.",
        "",
        "## Teacher, licences and terms",
        "",
        *_table(
            ("", ""),
            [
                ("teacher", f"`{teacher.model}`"),
                ("its licence", teacher.licence or "not stated"),
                ("licence of the data", recipe.data.licence or "not stated"),
                ("training on its answers", terms.use),
                ("terms", terms.words),
                ("acknowledged by the user", teacher.terms or "not stated"),
                ("list of terms", terms.date),
            ],
        ),
        "",
        *_origins(card),
        NO_ADVICE,
        "",
        "## Splits",
        "",
        _split(recipe),
        "",
        *_table(("split", "examples", "time", "SHA-256"), splits),
        "",
        "## Filters",
        "",
        *_table(("filter", "setting"), _filters(recipe)),
        "",
        "## What was dropped",
        "",
        *_table(("file", "rows read"), [(f"data.{key}", n) for key, n in card.read.items()]),
        "",
        *(_table(("reason", "rows"), list(card.dropped.items())) if card.dropped else ["Nothing was dropped."]),
        "",
        "Every dropped row is in `dropped.jsonl`, with its line and the detail.",
        "",
    ]
    if card.redacted:
        lines += ["Redacted: " + ", ".join(f"{n:,} {kind}" for kind, n in card.redacted.items()) + ".", ""]
    write_atomic(path, "\n".join(lines).encode("utf-8", "surrogatepass"))
