"""teacher x conversations -> signals/tokens: asked once, for what the objectives need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from attar.cluster.shards import stage_shards
from attar.engines.load import served, teacher_files, teacher_tokenizer
from attar.engines.local import load_local, resolve_device
from attar.engines.served import load_served
from attar.errors import RecipeError
from attar.progress import track
from attar.recipe import ChatRecipe
from attar.signals.language import SignalKind, SignalReader, keep_head
from attar.signals.packing import Packed
from attar.signals.parity import check_parity, describe
from attar.signals.served import ask_served, check_lengths, refuse_recipe, refuse_unfit, vocabulary_size
from attar.signals.store import SignalStore
from attar.signals.workers import ask_about_tokens, load_asker
from attar.tokens import TokenizedExample, template_fingerprint
from attar.tokens.training import encode, run_conversations, tokenizer_for
from attar.workspace import Run

__all__ = ["open_reader", "score", "signal_kind"]

# Examples a shard: what a killed run has to ask again, at most.
SHARD = 64


def signal_kind(recipe: ChatRecipe) -> SignalKind:
    """What the recipe's objectives need of the teacher."""
    signals = recipe.distill.signals
    temperatures = [o.temperature for o in recipe.distill.objectives if o.kind == "logit"]
    layers = [path for o in recipe.distill.objectives if o.kind == "feature" for path in o.match.values()]
    return SignalKind(
        kind=signals.kind,
        entries=signals.entries,
        at_least=signals.at_least,
        threshold=signals.threshold,
        # Hidden states give any temperature.
        temperature=1.0 if signals.kind == "hidden" or not temperatures else temperatures[0],
        layers=tuple(dict.fromkeys(layers)),
        seed=recipe.run.seed,
    )


def _teacher_of(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Of a served teacher nobody sees the weights, or the number format."""
    teacher = recipe.teacher
    if served(recipe):
        return {"teacher": {"model": teacher.model, "base_url": teacher.base_url}}
    return {
        "teacher": run.fingerprint_path(teacher_files(recipe)),
        "dtype": teacher.dtype,
        **({"engine": "vllm"} if teacher.model.startswith("vllm:") else {}),
    }


def _open_store(recipe: ChatRecipe, run: Run, tokenizer: Any, kind: SignalKind) -> SignalStore:
    return SignalStore(
        run.path("signals", "tokens"),
        {
            "kind": kind.kind,
            **({"entries": kind.entries, "at_least": kind.at_least} if kind.kind == "top_k" else {}),
            **({"threshold": kind.threshold, "seed": kind.seed} if kind.kind == "sampled" else {}),
            "temperature": kind.temperature,
            "layers": list(kind.layers),
            "states": str(kind.dtype),
            **_teacher_of(recipe, run),
            "tokenizer and template": template_fingerprint(tokenizer),
        },
    )


def open_reader(
    recipe: ChatRecipe, run: Run, tokenizer: Any, vocabulary: int, beside: Mapping[str, Packed] | None = None
) -> SignalReader:
    """Read the signals of a run.

    Args:
        recipe: the job.
        run: its folder.
        tokenizer: the teacher's.
        vocabulary: its size, padding rows not counted.
        beside: see ``SignalReader``.

    Raises:
        WorkspaceError: they were made by another teacher, with another tokenizer or template, or for other objectives.
    """
    kind = signal_kind(recipe)
    return SignalReader(_open_store(recipe, run, tokenizer, kind), kind, vocabulary, beside)


def _examples(recipe: ChatRecipe, run: Run, tokenizer: Any) -> list[TokenizedExample]:
    examples = []
    for split in ("train", "val"):
        examples += encode(recipe, tokenizer, run_conversations(recipe, run, split))[0]
    return examples


def score(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Ask the teacher about every example of train and val, once; goes on after the last whole shard.

    Raises:
        CapabilityError: the teacher is served and does not give what the recipe wants of it.
        RunError, ModelError: a served teacher does not say what its weights say, or what it says itself.
        Stopped: its server is gone; what it said is kept.
    """
    if recipe.only_words:
        return {"examples": 0, "tokens": 0, "bytes": 0}
    kind = signal_kind(recipe)
    if served(recipe):
        refuse_recipe(recipe)
        if recipe.run.on == "ray":
            raise RecipeError(
                f"run.on: ray puts a teacher into each worker, and {recipe.teacher.model} is served already; set "
                "run.on: here, or teacher.model to the folder of its weights, hf:FOLDER"
            )
    if not any(o.kind != "response" for o in recipe.distill.objectives):
        return {"examples": 0, "tokens": 0, "bytes": 0}
    if served(recipe):
        return _score_served(recipe, run, kind)
    if recipe.distill.signals.source == "live":
        return {"examples": 0, "tokens": 0, "bytes": 0}
    in_vllm = recipe.teacher.model.startswith("vllm:")
    engine = None
    # Of hidden states the head is kept as well, and it is kept here.
    if not in_vllm and (recipe.run.on == "here" or kind.kind == "hidden"):
        engine = load_local(recipe.teacher.model, dtype=recipe.teacher.dtype, device=resolve_device(recipe.run.device))
    tokenizer = tokenizer_for(recipe, engine.tokenizer if engine is not None else teacher_tokenizer(recipe))
    store = _open_store(recipe, run, tokenizer, kind)
    started = time.perf_counter()
    if kind.kind == "hidden" and engine is not None:
        keep_head(store, engine.model, tokenizer)
    examples = _examples(recipe, run, tokenizer)
    rows = recipe.run.shard_rows or SHARD
    shards = stage_shards(recipe, "score", store.folder, store.fingerprint) if recipe.run.on == "ray" else None

    def asked(todo: Sequence[TokenizedExample]) -> Iterator[Packed]:
        parts = [todo[start : start + rows] for start in range(0, len(todo), rows)]
        if shards is not None:
            yield from ask_about_tokens(recipe, kind, parts, shards)
            return
        ask = load_asker(recipe, kind, engine)
        for part in parts:
            yield from ask(part)

    with torch.no_grad():
        _store_all(run, store, examples, rows, asked)
    if shards is not None:
        shards.remove()
    return _counts(store, examples, started)


def _score_served(recipe: ChatRecipe, run: Run, kind: SignalKind) -> dict[str, Any]:
    tokenizer = teacher_tokenizer(recipe)
    store = _open_store(recipe, run, tokenizer, kind)
    examples = _examples(recipe, run, tokenizer)
    started = time.perf_counter()
    with closing(load_served(recipe.teacher, vocabulary_size(tokenizer))) as engine:
        refuse_unfit(recipe, engine, kind)
        check_lengths(engine, examples)
        parity = None
        if any(example.id not in store for example in examples):
            parity = check_parity(recipe, engine, tokenizer, examples, kind.entries)
            run.progress.note("  parity: " + describe(parity))
        rows = recipe.run.shard_rows or SHARD
        _store_all(run, store, examples, rows, lambda todo: ask_served(engine, todo, kind))
    # What a run that was cut off had compared is in its log.
    return _counts(store, examples, started) | ({"parity": parity} if parity else {})


def _store_all(
    run: Run,
    store: SignalStore,
    examples: Sequence[TokenizedExample],
    rows: int,
    asked: Callable[[Sequence[TokenizedExample]], Iterator[Packed]],
) -> None:
    """Keep a record of every example that has none, in whole shards, so that they end the same after any stop."""
    todo = [example for example in examples if example.id not in store]
    shard: list[tuple[TokenizedExample, Packed]] = []

    def keep() -> None:
        if shard:
            store.append([e.id for e, _ in shard], [record for _, record in shard], sum(len(e) for e, _ in shard))
            step.advance(len(shard))
            shard.clear()

    with track(run.progress, "teacher scores conversations", len(examples)) as step:
        step.advance(len(examples) - len(todo))
        for pair in zip(todo, asked(todo), strict=True):
            shard.append(pair)
            if len(shard) == rows:
                keep()
        keep()


def _counts(store: SignalStore, examples: Sequence[TokenizedExample], started: float) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in store.folder.glob("shard-*"))
    supervised = sum(int(example.supervised.sum()) for example in examples)
    return {
        "examples": len(examples),
        "tokens": store.tokens,
        "supervised": supervised,
        "bytes_per_token": round(size / max(supervised, 1), 1),
        "seconds_now": round(time.perf_counter() - started, 1),
    }
