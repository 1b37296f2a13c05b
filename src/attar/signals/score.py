"""teacher x examples -> signals."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from attar.cluster.shards import stage_shards
from attar.data.files import read_jsonl
from attar.engines.load import load_teacher, teacher_fingerprint
from attar.progress import track
from attar.recipe import ClassifyRecipe
from attar.signals.calibration import Calibration, fit_calibration, prior_shares
from attar.signals.labels import LabelQuestion
from attar.signals.store import SignalStore
from attar.signals.workers import Made, ask_about_words
from attar.workspace import Run, digest, write_atomic, write_json

__all__ = ["calibrate", "open_store", "read_calibration", "score", "teacher_log_probs"]

# Examples a shard: what a killed run has to ask again, at most.
SHARD = 128
CONTENT_FREE = "content-free:"


def open_store(recipe: ClassifyRecipe, run: Run) -> SignalStore:
    """The store of the teacher's raw scores of words: ``scores`` [1, prompts, words] by example id."""
    question = LabelQuestion(recipe)
    teacher = recipe.teacher
    return SignalStore(
        run.path("signals", "raw"),
        {
            "kind": "word_scores",
            "teacher and tokenizer": teacher_fingerprint(recipe, run),
            "dtype": teacher.dtype,
            "prompts": digest([prompt.model_dump(mode="json") for prompt in teacher.prompts]),
            "words": question.scored,
            "length": teacher.length,
            "samples": teacher.samples,
            "constrained": teacher.constrained,
            "max_tokens": teacher.max_tokens,
        },
    )


def score(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Ask the teacher about every request of train and val that has no score yet."""
    store = open_store(recipe, run)
    rows = [row for split in ("train", "val") for row in read_jsonl(run.path("data", f"{split}.jsonl"))]
    wanted = {row["id"]: row["text"] for row in rows}
    wanted |= {CONTENT_FREE + text: text for text in recipe.teacher.content_free}
    left = [(name, text) for name, text in wanted.items() if name not in store]
    done = len(wanted) - len(left)
    started = time.perf_counter()
    if left:
        # A damaged shard is better found before the teacher works than after.
        store.verify()
        size = recipe.run.shard_rows or SHARD
        parts = [left[start : start + size] for start in range(0, len(left), size)]
        shards = stage_shards(recipe, "score", store.folder, store.fingerprint) if recipe.run.on == "ray" else None
        made = _asked(recipe, parts) if shards is None else ask_about_words(recipe, parts, shards)
        with track(run.progress, "teacher scores the pool", len(wanted)) as step, closing(made):
            step.advance(done)
            for ids, records, tokens in made:
                store.append(ids, records, tokens)
                step.advance(len(ids))
        if shards is not None:
            shards.remove()
    return {"examples": len(wanted), "tokens": store.tokens, "seconds_now": round(time.perf_counter() - started, 1)}


def _asked(recipe: ClassifyRecipe, parts: Sequence[Sequence[tuple[str, str]]]) -> Generator[Made]:
    engine = load_teacher(recipe)
    question = LabelQuestion(recipe)
    for part in parts:
        values, tokens = question.ask(engine, [text for _, text in part])
        yield [name for name, _ in part], [{"scores": rows[None]} for rows in values], tokens


def calibrate(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Fit the calibration on train and val, freeze it, and write the calibrated log-probabilities."""
    store = open_store(recipe, run)
    ids = {split: [row["id"] for row in read_jsonl(run.path("data", f"{split}.jsonl"))] for split in ("train", "val")}
    dev = [row["label"] for row in read_jsonl(run.path("data", "dev.jsonl"))]
    prior = prior_shares(recipe, dev)
    free = _scores(store, [CONTENT_FREE + text for text in recipe.teacher.content_free])
    owners = LabelQuestion(recipe).owners
    fitted = fit_calibration(recipe, owners, _scores(store, ids["train"] + ids["val"]), free, prior)
    write_json(run.path("signals", "labels", "calibration.json"), fitted.to_json())
    for split, names in ids.items():
        values = fitted.apply(_scores(store, names)).astype(np.float32)
        write_atomic(run.path("signals", "labels", f"{split}.npy"), _npy(values))
    return {"prior": dict(zip(recipe.data.labels, prior.round(4).tolist(), strict=True))}


def _scores(store: SignalStore, ids: Sequence[str]) -> np.ndarray[Any, Any]:
    """[examples, prompts, words]"""
    return np.concatenate([record["scores"] for record in store.read(ids)])


def _npy(values: np.ndarray[Any, Any]) -> bytes:

    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def read_calibration(run: Run) -> Calibration:
    """The frozen calibration of a run."""
    return Calibration.from_json(json.loads(run.path("signals", "labels", "calibration.json").read_text("utf-8")))


def teacher_log_probs(run: Run, split: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The teacher's calibrated log-probabilities of ``train`` or ``val``, [examples, labels], in the split's order."""
    values: np.ndarray[Any, np.dtype[np.float32]] = np.load(
        run.path("signals", "labels", f"{split}.npy"), mmap_mode="r", allow_pickle=False
    )
    return values
