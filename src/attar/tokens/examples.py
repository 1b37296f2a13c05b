"""What a tokenised example is: ids, which of them are targets, of what kind they are and how much they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from attar.workspace import digest

__all__ = ["KINDS", "Kind", "LossWeights", "TokenizedExample", "highlight", "spans"]

Kind = Literal["reason", "text", "call", "end"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""what an assistant's token is for; ``TokenizedExample.kinds`` holds places in it"""


@dataclass(frozen=True)
class LossWeights:
    """How much a supervised token counts: the product of what its kind, its step and its episode say.

    A token that weighs nothing is read and not learned.

    Raises:
        ValueError: a kind is unknown, or a weight is not a finite number of at least 0.
    """

    kinds: Mapping[Kind, float] = field(default_factory=dict)
    """of ``reason``, ``text``, ``call`` and ``end``; 1 where none is given. Markup belongs to what it encloses, and
    after reasoning to the reasoning; the end-of-turn token is a kind of its own, so that a student learns to stop
    whatever else it is to learn"""
    steps: tuple[float, ...] = ()
    """of the assistant's first message, second and so on; the last holds for all that follow; 1 if none is given"""
    success: float = 1.0
    """of all tokens of an episode that its environment calls a success"""
    failure: float = 1.0
    """of all tokens of one that it does not"""

    def __post_init__(self) -> None:
        named = {f"kinds[{kind!r}]": weight for kind, weight in self.kinds.items()}
        named |= {f"steps[{number}]": weight for number, weight in enumerate(self.steps)}
        for name, weight in (named | {"success": self.success, "failure": self.failure}).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}; wanted a finite number of at least 0")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds names {kind!r}; wanted some of {', '.join(KINDS)}")

    def of_kinds(self) -> npt.NDArray[np.float32]:
        """[kinds], in the order of ``KINDS``."""
        return np.array([self.kinds.get(kind, 1.0) for kind in KINDS], dtype=np.float32)

    def of_step(self, number: int) -> float:
        """Of the assistant's message with this number, from 0."""
        return self.steps[min(number, len(self.steps) - 1)] if self.steps else 1.0

    def of_outcome(self, success: bool | None) -> float:
        """Of an episode; None where nobody judged it, which weighs 1."""
        return 1.0 if success is None else self.success if success else self.failure


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """Token ids, and which of them are targets: where ``supervised[i]``, the state at i - 1 learns to predict i."""

    id: str
    """the conversation's; with ``/`` and the number of its last message where one conversation gives several, and with
    ``@`` and a hash where weights of 0 took away targets"""
    ids: npt.NDArray[np.int32]
    """[tokens]"""
    supervised: npt.NDArray[np.bool_]
    """[tokens]; False at 0, which nothing predicts"""
    weights: npt.NDArray[np.float32] | None = None
    """[tokens], above 0 where supervised and 0 elsewhere; None for 1 where supervised"""
    kinds: npt.NDArray[np.int8] | None = None
    """[tokens], the place in ``KINDS`` of what a supervised token is for, -1 elsewhere; None where nobody asked"""

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.shape != self.supervised.shape:
            raise ValueError(f"ids has shape {self.ids.shape} and supervised {self.supervised.shape}; wanted [tokens]")
        if self.supervised[:1].any():
            raise ValueError("supervised[0] is True, but no state comes before the first token to predict it")
        for name in ("weights", "kinds"):
            values = getattr(self, name)
            if values is not None and values.shape != self.ids.shape:
                raise ValueError(f"{name} has shape {values.shape} and ids {self.ids.shape}; wanted [tokens]")
        if self.weights is not None and (
            not np.isfinite(self.weights).all() or ((self.weights > 0) != self.supervised).any()
        ):
            raise ValueError("weights is not finite, above 0 where supervised, and 0 elsewhere")
        if self.kinds is not None and ((self.kinds >= 0) != self.supervised).any():
            raise ValueError("kinds says nothing of a supervised token, or something of another")

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, tokens: int) -> TokenizedExample:
        """The first so many tokens."""
        rows = ("ids", "supervised", "weights", "kinds")
        return replace(self, **{name: v[:tokens] for name in rows if (v := getattr(self, name)) is not None})

    def weighted(self, weights: npt.NDArray[np.float32]) -> TokenizedExample:
        """The same with weights [tokens], read where a token is supervised; those of 0 are supervised no more."""
        weights = np.where(self.supervised, weights, 0).astype(np.float32)
        supervised = weights > 0
        name = self.id
        if (supervised != self.supervised).any():
            # Signals are kept by id, a row a target: with other targets it is another example.
            name += "@" + digest(np.flatnonzero(supervised).tolist())[:8]
        kinds = None if self.kinds is None else np.where(supervised, self.kinds, -1).astype(np.int8)
        uneven = bool((weights[supervised] != 1).any())
        return replace(self, id=name, supervised=supervised, weights=weights if uneven else None, kinds=kinds)


def highlight(tokenizer: Any, example: TokenizedExample) -> list[tuple[str, bool]]:
    """The example as text, in stretches: what they say, and whether they are learned."""
    return [(text, bool(learned)) for text, learned in _stretches(tokenizer, example.ids, example.supervised)]


def _stretches(tokenizer: Any, ids: npt.NDArray[np.int32], values: npt.NDArray[Any]) -> list[tuple[str, Any]]:
    """The text of ids in stretches of one value each."""

    def decoded(end: int) -> str:
        return str(tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decoded(len(ids))
    segments, position, end = [], 0, 0
    for value, group in groupby(values.tolist()):
        end += len(list(group))
        upto = len(decoded(end))
        segments.append((text[position:upto], value))
        position = upto
    return segments


def spans(tokenizer: Any, example: TokenizedExample) -> list[tuple[str, Kind]]:
    """The stretches of an example that are learned, each with what it is for.

    Raises:
        ValueError: the example does not know its kinds; encode it with weights.
    """
    if example.kinds is None:
        raise ValueError(f"example {example.id} has no kinds; give weights to encode_conversation, LossWeights() even")
    return [(text, KINDS[kind]) for text, kind in _stretches(tokenizer, example.ids, example.kinds) if kind >= 0]
