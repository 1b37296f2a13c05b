"""What can be known of a language model's job."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from attar.collect.curate import preview
from attar.data.conversations import read_conversations
from attar.data.types import Conversation
from attar.engines.heads import check_head, head_of
from attar.engines.load import served, teacher_files
from attar.engines.served import load_served
from attar.errors import AttarError
from attar.preflight.findings import Finding
from attar.recipe import ChatRecipe
from attar.signals.chat import signal_kind
from attar.signals.parity import check_parity, describe
from attar.signals.served import check_lengths, refuse_recipe, refuse_unfit, vocabulary_size
from attar.students.language import (
    Student,
    build_student,
    different_tokens,
    require_one_vocabulary,
    teacher_and_tokenizer,
)
from attar.tokens import TokenizedExample, highlight
from attar.tokens.training import encode
from attar.train.batches import Collator, TokenizedRows
from attar.train.chat import objectives_of
from attar.train.language_model import LanguageModel
from attar.train.memory import Decoder, estimate
from attar.train.objectives import Logit, Response
from attar.train.writing import context_of, learned_starts

__all__ = ["check"]

_PREVIEWED = 2
_PREVIEW_CHARACTERS = 700
# Two objectives whose gradients differ by more than this are not mixed by weights near 1.
_GRADIENTS_APART = 100.0
# Largest divergence, in nats a token, of a teacher from itself: rounding.
_SELF = 1e-4


def check(recipe: ChatRecipe) -> list[Finding]:
    """Look at files, tokens and models: loads the teacher, builds the student, and computes one batch with both.

    Of a served teacher: asks its server for what it can give, and compares a few answers with its weights or itself.
    """
    findings: list[Finding] = []
    try:
        splits = {}
        with preview(recipe) as (folder, counts):
            for name in ("train", "val", "test"):
                splits[name], _ = read_conversations(folder / f"{name}.jsonl", key=f"data.{name}", on_bad_line="stop")
        findings.append(Finding("ok", "conversations: " + ", ".join(f"{n} {len(c)}" for n, c in splits.items())))
        findings += [Finding("warn", f"{n} dropped: {reason}") for reason, n in counts["dropped"].items()]
        if served(recipe):
            refuse_recipe(recipe)
        else:
            teacher_files(recipe)
            findings += _disk(recipe)
        teacher, tokenizer = teacher_and_tokenizer(recipe)
        if teacher is not None:
            check_head(teacher, tokenizer)
        student = build_student(recipe, teacher, tokenizer, splits["train"], recipe.run.seed)
        check_head(student.model, student.tokenizer)
        findings += _vocabularies(recipe, teacher, tokenizer, student)
        if any(finding.level == "refuse" for finding in findings):
            return findings
        findings += _tokens(recipe, student.tokenizer, splits)
        findings += _memory(recipe, teacher, student, splits["train"])
        findings += _on_policy(recipe, student, splits["train"])
        if teacher is not None:
            findings += _one_batch(recipe, teacher, tokenizer, student, splits["train"])
        else:
            findings += _server(recipe, tokenizer, splits["train"])
    except AttarError as error:
        findings.append(Finding("refuse", str(error)))
    return findings


def _disk(recipe: ChatRecipe) -> Iterator[Finding]:
    """Checkpoints, weights and exports, against what is free."""
    place = teacher_files(recipe)
    stored = (
        sum(path.stat().st_size for path in place.glob("*.safetensors")) if place.is_dir() else place.stat().st_size
    )
    disk = shutil.disk_usage(recipe.folder.parent if recipe.folder.parent.exists() else ".").free
    wanted = 10 * stored
    yield Finding("refuse" if wanted > disk else "ok", f"about {wanted / 1e9:.1f} GB of disk, {disk / 1e9:.1f} GB free")


def _memory(
    recipe: ChatRecipe, teacher: Any | None, student: Student, conversations: list[Conversation]
) -> Iterator[Finding]:
    """A training step by the formula, against what is free beside the models that this check has loaded."""
    live = teacher is not None and recipe.distill.signals.source == "live"
    loaded = [model for model in (teacher, student.model) if model is not None]
    try:
        sizes = Decoder.from_config(student.model.config)
        asked = Decoder.from_config(loaded[0].config) if live else None
    except ValueError as error:
        yield Finding("warn", f"memory of a training step: not known, as {error}")
        return
    examples = encode(recipe, student.tokenizer, conversations)[0]
    lengths = [len(example) for example in examples]
    tokens = max(recipe.train.tokens_per_batch, *lengths, _longest_written(recipe, examples))
    learned = sum(int(example.supervised.sum()) for example in examples)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    weight_bytes = next(student.model.parameters()).element_size()
    step = estimate(
        sizes,
        tokens=tokens,
        supervised=round(tokens * learned / sum(lengths)),
        teacher=asked,
        weight_bytes=weight_bytes,
        compute_bytes=weight_bytes if recipe.train.precision == "float32" else 2,
        teacher_bytes=next(loaded[0].parameters()).element_size(),
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        accumulation=recipe.train.gradient_accumulation_steps,
        trained=trained if recipe.student.lora else None,
    )
    free = _free(loaded[0]) + sum(p.nbytes for model in loaded for p in model.parameters())
    fits = step.total <= free
    cure = "lower train.tokens_per_batch, set train.gradient_checkpointing: true"
    cure += ", cache the signals" if asked else ""
    yield Finding(
        # Sharded, each process has less; how much stands in docs/scale.md.
        "ok" if fits else "warn" if recipe.train.accelerate else "refuse",
        f"a training step takes about {step.total / 1e9:.1f} GB on one device (most at the {step.moment}), "
        f"{free / 1e9:.1f} GB are free" + ("" if fits else f"; {cure}, or shard it (train.accelerate)"),
    )


def _longest_written(recipe: ChatRecipe, examples: list[TokenizedExample]) -> int:
    """Tokens of the longest example that the student may write; 0 where it writes none."""
    wanted = recipe.distill.on_policy
    return max(max(learned_starts(e)) for e in examples) + wanted.max_new_tokens if wanted.share else 0


def _on_policy(recipe: ChatRecipe, student: Student, conversations: list[Conversation]) -> Iterator[Finding]:
    """What the student will write, at most, and whether its model reads that far."""
    wanted = recipe.distill.on_policy
    if not wanted.share:
        return
    examples = encode(recipe, student.tokenizer, conversations)[0]
    answers = round(wanted.share * recipe.train.epochs * len(examples))
    yield Finding(
        "ok",
        f"on-policy: the student writes {wanted.share:.0%} of its batches, about {answers:,} answers of at most "
        f"{wanted.max_new_tokens} tokens; they are at most {wanted.refresh - 1} steps old",
    )
    longest, context = _longest_written(recipe, examples), context_of(student.model)
    if context is not None and longest > context:
        none_left = longest - wanted.max_new_tokens >= context
        yield Finding(
            "refuse" if none_left else "warn",
            f"on-policy: the longest prompt has {longest - wanted.max_new_tokens} tokens and the student reads "
            f"{context}; " + ("lower curate.max_tokens" if none_left else "its answer is cut there"),
        )


def _free(model: Any) -> int:
    """Bytes that are free where the model is."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return int(psutil.virtual_memory().available)


def _server(recipe: ChatRecipe, tokenizer: Any, conversations: list[Conversation]) -> Iterator[Finding]:
    """What a served teacher gives, and whether it says what its weights say, or twice the same."""
    kind = signal_kind(recipe)
    engine = load_served(recipe.teacher, vocabulary_size(tokenizer))
    try:
        room = f"{engine.max_tokens:,} tokens" if engine.max_tokens else "an unknown number of tokens"
        yield Finding("ok", f"{engine.name} is there, with room for {room}")
        examples = encode(recipe, tokenizer, conversations)[0]
        check_lengths(engine, examples)
        if any(o.kind != "response" for o in recipe.distill.objectives):
            refuse_unfit(recipe, engine, kind)
            yield Finding("ok", "parity: " + describe(check_parity(recipe, engine, tokenizer, examples, kind.entries)))
            yield Finding("ok", "the objectives' gradients are not compared: that takes a teacher in this process")
    finally:
        engine.close()


def _vocabularies(recipe: ChatRecipe, teacher: Any | None, tokenizer: Any, student: Student) -> Iterator[Finding]:
    """Maps are compared, not sizes; then padding, special tokens and templates."""
    require_one_vocabulary(recipe, student, tokenizer)
    different = different_tokens(student, tokenizer)
    yield Finding(
        "warn" if different else "ok",
        f"{len(different)} tokens differ between teacher and student"
        if different
        else f"one vocabulary of {len(student.tokenizer):,} tokens",
    )
    for name, model, its in (("teacher", teacher, tokenizer), ("student", student.model, student.tokenizer)):
        if model is None:
            continue
        head = head_of(model, its)
        padded = len(head.weight) - head.size
        if padded:
            yield Finding("ok", f"the {name}'s head has {padded} padding rows; they carry no probability")
    for key in ("bos_token", "eos_token"):
        mine, other = getattr(student.tokenizer, key), getattr(tokenizer, key)
        if mine != other:
            yield Finding("warn", f"{key} is {other!r} for the teacher and {mine!r} for the student")
    if student.tokenizer.chat_template != tokenizer.chat_template:
        cached = recipe.distill.signals.source == "cached"
        yield Finding(
            "refuse" if cached else "warn",
            "the chat templates of teacher and student differ: "
            + (
                "cached signals would be of other tokens; give both one template, or set distill.signals.source: live"
                if cached
                else "the teacher reads conversations in the student's"
            ),
        )


def _tokens(recipe: ChatRecipe, tokenizer: Any, splits: dict[str, list[Conversation]]) -> Iterator[Finding]:
    for name in ("train", "val", "test"):
        examples, counts = encode(recipe, tokenizer, splits[name])
        lost = counts["truncated"] or counts["dropped"]
        yield Finding(
            "warn" if lost else "ok", f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
        )
        longest = max(map(len, examples))
        if name == "train" and longest > recipe.train.tokens_per_batch:
            yield Finding(
                "warn",
                f"the longest example has {longest} tokens, more than train.tokens_per_batch "
                f"{recipe.train.tokens_per_batch}; it is a batch of its own",
            )
        if name == "train":
            for example in examples[:_PREVIEWED]:
                yield Finding("ok", "what is learned stands in [[ ]]:\n" + _preview(tokenizer, example))


def _preview(tokenizer: Any, example: TokenizedExample) -> str:
    text = "".join(f"[[{part}]]" if learned else part for part, learned in highlight(tokenizer, example))
    cut = text if len(text) <= _PREVIEW_CHARACTERS else text[:_PREVIEW_CHARACTERS] + " ..."
    return "\n".join("    " + line for line in cut.splitlines())


def _one_batch(
    recipe: ChatRecipe, teacher: Any, tokenizer: Any, student: Student, conversations: list[Conversation]
) -> Iterator[Finding]:
    """The teacher as its own student must lose nothing, and objectives must be of comparable size."""
    examples = encode(recipe, student.tokenizer, conversations[:8])[0]
    rows = TokenizedRows(examples, recipe.train.tokens_per_batch)
    batch = Collator(0)([rows[i] for i in range(min(4, len(examples)))])
    batch = {key: value.to(teacher.device) for key, value in batch.items()}
    objectives = objectives_of(recipe, "student")
    divergences = [o for o in objectives if isinstance(o, Logit)]
    if divergences and student.kept is None:
        with torch.no_grad():
            own = LanguageModel(teacher, divergences, teacher, tokenizer=tokenizer)(batch).each
        worst = float(own.max())
        yield Finding(
            "ok" if worst <= _SELF else "refuse",
            f"the teacher as its own student: loss {worst:.2g}"
            + ("" if worst <= _SELF else f", at most {_SELF} wanted"),
        )
    counts: Counter[str] = Counter()
    model = LanguageModel(student.model, objectives, teacher, tokenizer=tokenizer, kept=student.kept)
    model.probe(batch, recipe.run.seed)
    norms = {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    for number, objective in enumerate(objectives):
        counts[objective.name] += 1
        name = objective.name if counts[objective.name] == 1 else f"{objective.name}_{counts[objective.name]}"
        values = model(batch, None, number)
        gradients = torch.autograd.grad(values.total, parameters, allow_unused=True)
        norm = float(torch.stack([g.double().norm() for g in gradients if g is not None]).norm())
        norms[name] = objective.weight * norm
        yield Finding(
            "ok", f"{name}: {float(values.each[number]):.3g} at the start, weighted gradient {norms[name]:.3g}"
        )
    if max(norms.values()) > _GRADIENTS_APART * min(norms.values()):
        low, high = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
        yield Finding(
            "warn",
            f"the weighted gradient of {high} is {norms[high] / max(norms[low], 1e-30):,.0f} times that of {low}, "
            "which hardly counts; change their weights in distill.objectives",
        )
    if any(not isinstance(o, Response) for o in objectives):
        signals = recipe.distill.signals
        source = "asked in every step" if signals.source == "live" else f"cached as {signals.kind}"
        yield Finding("ok", f"the teacher's signals: {source}")
