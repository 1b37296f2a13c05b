"""Signals of a served teacher: what its server says of given token ids, as the sparse signals that training reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from attar.engines.served import PromptTop, ServedTeacher
from attar.engines.vllm import VllmTeacher
from attar.errors import CapabilityError, RecipeError
from attar.recipe import ChatRecipe
from attar.signals.language import SignalKind
from attar.signals.packing import Packed, pack_top_k
from attar.signals.sparse import TopK
from attar.tokens import TokenizedExample

__all__ = [
    "ask_served",
    "ask_vllm",
    "check_lengths",
    "refuse_recipe",
    "refuse_unfit",
    "supervised_places",
    "top_k_of",
    "vocabulary_size",
]

# What is left of 1 below this is the rounding of float32 logarithms, and no mass that was measured.
_RESOLUTION = 1e-6


def refuse_recipe(recipe: ChatRecipe) -> None:
    """Refuse what no served teacher can be part of; asks nobody.

    Raises:
        RecipeError: names the key and the cure.
    """
    model = recipe.teacher.model
    if recipe.student.model is None:
        raise RecipeError(
            f"student.model: {model} shows no weights that a student could be cut from; name a small model with the "
            "same tokenizer, hf:FOLDER"
        )
    if recipe.student.shrink.vocabulary == "trim":
        raise RecipeError(
            f"student.shrink.vocabulary: trim needs the teacher's whole distribution, and {model} shows its likeliest "
            "tokens alone; set it to keep"
        )
    price = recipe.teacher.price
    if recipe.budget.usd is not None and price is not None and price.input_usd_per_million_tokens > 0:
        raise RecipeError(
            f"budget.usd: {recipe.budget.usd:g} is not kept where a teacher is billed for the tokens that it is given; "
            "leave it out, or use a server of your own (teacher.price 0)"
        )


def refuse_unfit(recipe: ChatRecipe, engine: ServedTeacher | VllmTeacher, kind: SignalKind) -> None:
    """Refuse signals that the teacher's server does not give.

    Raises:
        CapabilityError: names the key, what the server gives, and the cure.
    """
    limits, name = engine.limits, engine.name
    if recipe.distill.signals.source == "live":
        raise CapabilityError(
            f"distill.signals.source: live asks the teacher in every step, and {name} is asked once; set source: cached"
        )
    if kind.layers and not limits.layers:
        raise CapabilityError(
            f"distill.objectives: kind feature needs 'hidden', the teacher's layer {kind.layers[0]}, and {name} shows "
            "no inner states; use hf:FOLDER, or objectives of kind logit and response"
        )
    if kind.kind not in limits.kinds:
        raise CapabilityError(
            f"distill.signals.kind: {kind.kind} needs the teacher's whole distribution, and {name} gives the likeliest "
            f"tokens alone; set kind: {' or '.join(limits.kinds)}, and entries to what it gives ({limits.entries} "
            "unless it was started with another --max-logprobs)"
        )
    if kind.temperature != limits.temperature:
        raise CapabilityError(
            f"distill.objectives: temperature {kind.temperature:g} is wanted, and {name} gives the probabilities of a "
            f"prompt at {limits.temperature:g}, whatever temperature is asked for; set it to {limits.temperature:g}, "
            "or use hf:FOLDER"
        )
    # It tells its limit only where it is asked for more.
    engine.prompt_top([0, 0], [1], kind.entries)


def check_lengths(engine: ServedTeacher | VllmTeacher, examples: Sequence[TokenizedExample]) -> None:
    """Refuse examples that the server has no room for.

    Raises:
        CapabilityError: the longest is longer than it takes.
    """
    longest = max(map(len, examples))
    if engine.max_tokens is not None and longest >= engine.max_tokens:
        raise CapabilityError(
            f"{engine.name} takes at most {engine.max_tokens} tokens, one of them its answer, and the longest example "
            f"has {longest}; lower curate.max_tokens to {engine.max_tokens - 1}, or start it with a larger "
            "--max-model-len"
        )


def vocabulary_size(tokenizer: Any) -> int:
    """Of the ids that the tokenizer knows: a head's rows without its padding, as ``head_of`` counts them."""
    return int(max(tokenizer.get_vocab().values())) + 1


def supervised_places(example: TokenizedExample) -> list[int]:
    """Positions of the supervised tokens."""
    places: list[int] = np.flatnonzero(example.supervised).tolist()
    return places


def ask_served(engine: ServedTeacher, examples: Iterable[TokenizedExample], kind: SignalKind) -> Iterator[Packed]:
    """The signals of examples, one record each, as ``attar.signals.language.ask`` makes them of a model; in order."""

    def one(example: TokenizedExample) -> Packed:
        found = engine.prompt_top(example.ids.tolist(), supervised_places(example), kind.entries)
        return pack_top_k(top_k_of(found, engine.vocabulary, kind.at_least), engine.vocabulary)

    return engine.each(one, examples)


def ask_vllm(engine: VllmTeacher, examples: Sequence[TokenizedExample], kind: SignalKind) -> list[Packed]:
    """The same of a model in vLLM in this process."""
    asked = [(example.ids.tolist(), supervised_places(example)) for example in examples]
    return [
        pack_top_k(top_k_of(found, engine.vocabulary, kind.at_least), engine.vocabulary)
        for found in engine.prompt_tops(asked, kind.entries)
    ]


def top_k_of(found: PromptTop, vocabulary: int, at_least: float = 0.0) -> TopK:
    """What a server says of some positions, with the mass that it does not tell.

    That mass is 1 less the sum of the entries. What is left by rounding is none: it is kept from 0, where a divergence
    that asks the student to stay within the teacher would be infinite, by 1e-6, or by the most that it can be if that
    is less (every other token is less likely than the last entry).

    Args:
        found: of ``ServedTeacher.prompt_top``.
        vocabulary: how many tokens there are.
        at_least: entries of a smaller probability than this go to the tail.
    """
    probabilities = np.exp(found.log_probs)
    smallest = np.where(probabilities > 0, probabilities, 1.0).min(axis=1, initial=1.0)
    floor = np.minimum(_RESOLUTION, (vocabulary - found.ids.shape[1]) * smallest)
    left = np.maximum(1.0 - probabilities.sum(axis=1), floor)
    listed = (found.ids >= 0) & (probabilities >= at_least)
    tail = left + np.where(listed, 0.0, probabilities).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail)
    return TopK(
        torch.from_numpy(np.where(listed, found.ids, -1)),
        torch.from_numpy(np.where(listed, found.log_probs, -np.inf)).float(),
        torch.from_numpy(log_tail).float(),
    )
