"""What can be known of a classifier's job."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attar.collect.curate import preview
from attar.data.files import read_jsonl
from attar.data.types import Example
from attar.engines.api import load_api
from attar.engines.labels import LabelEngine
from attar.engines.load import teacher_files
from attar.errors import AttarError
from attar.preflight.findings import Finding
from attar.recipe import ClassifyRecipe
from attar.signals.labels import LabelQuestion
from attar.tokens import encode_plain, encode_prompt

__all__ = ["check"]

_LABELLED = ("dev", "calibration", "test")
# A verdict on fewer cases has an interval too wide for the default thresholds.
_FEW_CASES = 100
# Forward passes of a 135M-parameter model on two cores reach about 450 tokens a second, and time goes with size.
_TOKENS_TIMES_PARAMETERS_PER_S = 450 * 135e6


def check(recipe: ClassifyRecipe) -> list[Finding]:
    """Look at files, labels, prompts, the teacher's limits, and what the run will take; loads no weights."""
    findings: list[Finding] = []
    try:
        with preview(recipe) as (folder, counts):
            sources = {name: _examples(folder / f"{name}.jsonl") for name in ("train", "val", *_LABELLED)}
        sources = {"pool": sources.pop("train") + sources.pop("val"), **sources}
        findings += _data(recipe, sources, counts["dropped"])
    except AttarError as error:
        return [*findings, Finding("refuse", str(error))]
    try:
        if recipe.teacher.model.partition(":")[0] in ("openai", "anthropic"):
            findings += _api(recipe, sources)
        else:
            findings += _teacher(recipe, teacher_files(recipe), sources)
    except AttarError as error:
        findings.append(Finding("refuse", str(error)))
    return findings


def _examples(path: Path) -> list[Example]:
    return [Example(row["text"], row.get("label")) for row in read_jsonl(path)]


def _data(recipe: ClassifyRecipe, sources: dict[str, list[Example]], dropped: dict[str, int]) -> Iterator[Finding]:
    counts = {split: len(examples) for split, examples in sources.items() if examples}
    yield Finding("ok", "rows: " + ", ".join(f"{split} {n}" for split, n in counts.items()))
    for reason, n in dropped.items():
        yield Finding("warn", f"{n} row(s) dropped: {reason}")
    if counts["test"] < _FEW_CASES:
        yield Finding("warn", f"data.test has {counts['test']} cases; under {_FEW_CASES} the intervals are wide")
    for split in _LABELLED:
        labels = Counter(example.label for example in sources[split])
        if not labels:
            yield Finding("warn", f"data.{split} is not set")
            continue
        missing = [label for label in recipe.data.labels if label not in labels]
        if missing:
            yield Finding("warn", f"data.{split} has no example of {', '.join(missing)}")
        most, least = max(labels.values()), min(labels.values())
        if most > 5 * least:
            yield Finding("warn", f"data.{split} is unbalanced: {dict(labels.most_common())}")
    gold = sum(example.label is not None for example in sources["pool"])
    wants_gold = any(o.kind == "response" and o.labels == "gold" for o in recipe.distill.objectives)
    if wants_gold and not gold:
        yield Finding("refuse", "an objective learns gold labels, and no row of data.pool has one")
    if gold and not wants_gold:
        yield Finding("warn", f"{gold} rows of data.pool have gold labels that no objective uses")


def _api(recipe: ClassifyRecipe, sources: dict[str, list[Example]]) -> Iterator[Finding]:
    """What a teacher behind an API would bill; nothing is sent."""
    engine = load_api(recipe, dry=True)
    labels = LabelEngine(
        engine,
        samples=recipe.teacher.samples,
        constrained=recipe.teacher.constrained,
        max_tokens=recipe.teacher.max_tokens,
    )
    question = LabelQuestion(recipe)
    texts = [e.text for split in ("pool", "calibration", "test") for e in sources[split]]
    texts += recipe.teacher.content_free
    estimate = engine.estimate(
        request for text in texts for request in labels.requests(question.prompts(text), question.scored)
    )
    low, high = estimate.prompt_tokens
    yield Finding("ok", f"teacher: {estimate.calls} calls, {low} to {high} prompt tokens; {estimate.stored} are stored")
    speed = recipe.evaluate.latency_requests + recipe.evaluate.throughput_rounds * recipe.evaluate.throughput_requests
    calls = speed * len(recipe.teacher.prompts) * (recipe.teacher.samples or 1)
    yield Finding("ok", f"teacher: about {calls} calls more to measure its speed, each billed as the others are")
    if engine.price is None or estimate.usd is None:
        yield Finding("refuse", f"no price of {recipe.teacher.model} is known; state teacher.price")
        return
    a_call = (estimate.usd[0] / max(estimate.calls, 1), estimate.usd[1] / max(estimate.calls, 1))
    least, most = (usd + calls * one for usd, one in zip(estimate.usd, a_call, strict=True))
    yield Finding("ok", f"teacher: {least:.2f} to {most:.2f} USD in all, by {engine.price.source}")
    limit = recipe.budget.usd
    if limit is not None and least > limit:
        yield Finding("refuse", f"budget.usd is {limit}, and the run needs {least:.2f} at least")
    elif limit is not None and most > limit:
        yield Finding("warn", f"budget.usd is {limit}; the run may stop there (exit 5), and goes on when it is raised")


def _teacher(recipe: ClassifyRecipe, place: Path, sources: dict[str, list[Example]]) -> Iterator[Finding]:
    config_file = place / "config.json"
    if not config_file.is_file():
        yield Finding("ok", f"teacher.model: {place} (its prompts' lengths are known only once it is loaded)")
        return
    from transformers import AutoTokenizer

    config: dict[str, Any] = json.loads(config_file.read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(str(place))
    question = LabelQuestion(recipe)
    longest = max((e.text for examples in sources.values() for e in examples), key=len)
    limit = config.get("max_position_embeddings")
    for number, prompt in enumerate(question.prompts(longest)):
        length = len(encode_prompt(tokenizer, prompt))
        over = limit is not None and length > limit
        yield Finding(
            "refuse" if over else "ok",
            f"prompt {number}: {length} tokens with the longest request, the teacher reads {limit or 'unknown'}",
        )
    first: dict[int, list[str]] = {}
    for label, words in question.words.items():
        for word in words:
            first.setdefault(encode_plain(tokenizer, " " + word)[0], []).append(label)
    for labels in first.values():
        if len(set(labels)) > 1:
            yield Finding("warn", f"labels that share a first token, told apart by later ones: {', '.join(labels)}")
    yield from _cost(recipe, place, config, tokenizer, sources)


def _cost(
    recipe: ClassifyRecipe, place: Path, config: dict[str, Any], tokenizer: Any, sources: dict[str, list[Example]]
) -> Iterator[Finding]:
    weights = sum(path.stat().st_size for path in place.glob("*.safetensors")) or 4 * 10**8
    width = {"float16": 2, "bfloat16": 2}.get(config.get("dtype") or config.get("torch_dtype") or "", 4)
    parameters = weights / width
    sample = [example.text for example in sources["pool"][:200]]
    # What a prompt holds after its request is computed with each request as well.
    tail = 6
    tokens = float(np.mean([len(encode_plain(tokenizer, text)) for text in sample])) + tail
    asked = sum(map(len, sources.values())) - len(sources["dev"])
    seconds = asked * tokens * len(recipe.teacher.prompts) * parameters / _TOKENS_TIMES_PARAMETERS_PER_S
    yield Finding("ok", f"about {seconds / 60:.0f} min of the teacher's time on two CPU cores ({asked} requests)")
    yield Finding("ok", f"about {weights * 1.6 / 1e9 + 0.6:.1f} GB of memory")
    free = shutil.disk_usage(_existing(recipe.folder)).free
    needed = 200e6 * len(recipe.train.seeds)
    yield Finding("refuse" if free < needed else "ok", f"about {needed / 1e6:.0f} MB of disk, {free / 1e9:.0f} GB free")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
