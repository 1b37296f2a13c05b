"""Make the small language model that a recipe describes, untrained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attar.data.types import Conversation
from attar.engines.load import served, teacher_tokenizer
from attar.engines.local import load_local, resolve_device
from attar.errors import CapabilityError
from attar.recipe import ChatRecipe
from attar.students.adapt import existing_model, fresh_model
from attar.students.shrink import choose_layers, copy_model, keep_layers
from attar.students.vocabulary import trim_vocabulary
from attar.students.width import Widths, measure_importance, narrow
from attar.tokens.training import encode, tokenizer_for

__all__ = [
    "Student",
    "build_student",
    "different_tokens",
    "load_teacher_model",
    "require_one_vocabulary",
    "teacher_and_tokenizer",
]

# Conversations on which layers and widths are chosen.
_CALIBRATED_ON = 64


class Student(NamedTuple):
    """An untrained student."""

    model: Any
    tokenizer: Any
    kept: Tensor | None
    """[vocabulary], the teacher's id of each token; None where the vocabulary is the teacher's"""


def load_teacher_model(recipe: ChatRecipe) -> tuple[Any, Any]:
    """The teacher and its tokenizer, in eval mode.

    Raises:
        CapabilityError: the teacher is no model in this process, so nothing but its text can be had.
        ModelError: there is no such model.
    """
    if not recipe.teacher.model.startswith(("hf:", "vllm:")):
        raise CapabilityError(
            f"teacher.model: {recipe.teacher.model} shows neither probabilities nor inner states; logit and feature "
            "objectives, and students cut from it, need hf:FOLDER"
        )
    engine = load_local(recipe.teacher.model, dtype=recipe.teacher.dtype, device=resolve_device(recipe.run.device))
    return engine.model, tokenizer_for(recipe, engine.tokenizer)


def teacher_and_tokenizer(recipe: ChatRecipe) -> tuple[Any | None, Any]:
    """The teacher as ``load_teacher_model`` loads it; None for the model of a served one, whose tokenizer is here, and
    for both where only what it said counts.
    """
    if recipe.only_words:
        return None, None
    return (None, tokenizer_for(recipe, teacher_tokenizer(recipe))) if served(recipe) else load_teacher_model(recipe)


def different_tokens(student: Student, teachers_tokenizer: Any) -> list[str]:
    """Tokens that do not mean the same id for student and teacher: maps are compared, not sizes."""
    ours, theirs = student.tokenizer.get_vocab(), teachers_tokenizer.get_vocab()
    if student.kept is None:
        return sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    original = {place: token for token, place in theirs.items()}
    return sorted(token for token, place in ours.items() if original.get(int(student.kept[place])) != token)


def require_one_vocabulary(recipe: ChatRecipe, student: Student, teachers_tokenizer: Any) -> None:
    """Refuse probabilities of a teacher whose tokens are others.

    Raises:
        CapabilityError: an objective compares probabilities, and the vocabularies differ.
    """
    if all(spec.kind != "logit" for spec in recipe.distill.objectives):
        return
    different = different_tokens(student, teachers_tokenizer)
    if different:
        ours, theirs = student.tokenizer.get_vocab(), teachers_tokenizer.get_vocab()
        first = different[0]
        raise CapabilityError(
            f"the vocabularies of teacher and student differ in {len(different)} tokens, such as {first!r} "
            f"({theirs.get(first)} and {ours.get(first)}): between different vocabularies only objectives of kind "
            "response work, for now; use a student with the teacher's tokenizer"
        )


def build_student(
    recipe: ChatRecipe, teacher: Any | None, tokenizer: Any, conversations: Sequence[Conversation], seed: int
) -> Student:
    """The student before training: cut from the teacher or from ``student.model``, as ``student.shrink`` says.

    Args:
        recipe: the job.
        teacher: the teacher's model, which stays as it is; None of a served one.
        tokenizer: the teacher's.
        conversations: of the training split, on which layers, widths and tokens are chosen.
        seed: of random weights.

    Raises:
        RecipeError, CapabilityError, ModelError: what is asked for cannot be made.
    """
    shrink = recipe.student.shrink
    dtype = getattr(torch, recipe.student.dtype)
    source, kept = teacher, None
    if recipe.student.model is not None:
        source, tokenizer = existing_model(
            recipe.student.model, dtype=recipe.student.dtype, device=resolve_device(recipe.run.device)
        )
        tokenizer = tokenizer_for(recipe, tokenizer)
    sizes = {
        "num_hidden_layers": shrink.layers,
        "hidden_size": shrink.hidden,
        "intermediate_size": shrink.intermediate,
        "num_attention_heads": shrink.heads,
        "num_key_value_heads": shrink.kv_heads,
    }
    if shrink.fresh:
        model = fresh_model(source, seed=seed, **{key: value for key, value in sizes.items() if value is not None})
    else:
        model = _cut(recipe, source, tokenizer, conversations)
    if shrink.vocabulary == "trim":
        model, tokenizer, kept = trim_vocabulary(
            model, tokenizer, lambda other: [e.ids.tolist() for e in encode(recipe, other, conversations)[0]]
        )
    if model is teacher:
        model = copy_model(teacher)
    return Student(model.to(dtype).requires_grad_(True), tokenizer, kept)


def _cut(recipe: ChatRecipe, model: Any, tokenizer: Any, conversations: Sequence[Conversation]) -> Any:
    shrink = recipe.student.shrink

    def batches() -> Iterator[dict[str, Tensor]]:
        for example in _few(encode(recipe, tokenizer, conversations[:_CALIBRATED_ON])[0]):
            yield {"input_ids": torch.from_numpy(example.ids)[None].long().to(model.device)}

    if shrink.layers is not None:
        measured = batches() if shrink.choose == "block_influence" else ()
        model = keep_layers(model, choose_layers(model, shrink.layers, shrink.choose, measured))
    widths = Widths(
        hidden=shrink.hidden, intermediate=shrink.intermediate, heads=shrink.heads, kv_heads=shrink.kv_heads
    )
    if widths != Widths():
        model = narrow(model, measure_importance(model, batches()), widths)
    return model


def _few(examples: Iterable[Any]) -> Iterable[Any]:
    return list(examples)[:_CALIBRATED_ON]
