"""What a student writes after prompts while it is trained: token ids from its own distribution, and nothing but ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attar.engines.heads import eval_mode, plain_model
from attar.losses import Head
from attar.tokens import TokenizedExample
from attar.train.batches import WrittenExample

__all__ = ["Continuation", "Sampling", "as_examples", "context_of", "ends_of", "learned_starts", "write"]


class Continuation(NamedTuple):
    """What was written after a prompt."""

    prompt: tuple[int, ...]
    written: tuple[int, ...]
    """the end-of-turn token is the last of them where it was written"""
    ended: bool
    """False where the answer was cut at a limit, so that it has no end"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the whole distribution, so that what is learned on is the student's own.

    Args:
        ends: ids that end an answer.
        max_new_tokens: at least 1; an answer is cut there.
        temperature: above 0.
        longest: most tokens of prompt and answer together, where a model has such a limit.
    """

    ends: frozenset[int]
    max_new_tokens: int
    temperature: float = 1.0
    longest: int | None = None

    def __post_init__(self) -> None:
        if not self.ends or self.max_new_tokens < 1 or not self.temperature > 0:
            raise ValueError(
                f"ends holds {len(self.ends)} ids, max_new_tokens is {self.max_new_tokens} and temperature "
                f"{self.temperature}; wanted at least 1, at least 1, and above 0"
            )

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens may be written after a prompt.

        Raises:
            ValueError: none.
        """
        room = self.max_new_tokens if self.longest is None else min(self.max_new_tokens, self.longest - len(prompt))
        if not prompt or room < 1:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, and prompt and answer may have {self.longest} together; wanted a "
                "prompt of at least 1 that leaves room for an answer"
            )
        return room


def learned_starts(example: TokenizedExample) -> list[int]:
    """Where the answers of an example begin: what stands before such a place is a prompt."""
    learned = example.supervised
    starts: list[int] = (np.flatnonzero(learned[1:] & ~learned[:-1]) + 1).tolist()
    return starts


def ends_of(tokenizer: Any, model: nn.Module, examples: Collection[TokenizedExample]) -> frozenset[int]:
    """The ids that end an answer: those at which the model stops when it is served, and what ends recorded answers.

    Args:
        tokenizer: the student's.
        model: the student; its ``generation_config`` names ids.
        examples: recorded conversations. The token that ends most answers counts where it is a control token: an answer
            that was cut ends with a word.
    """
    last: Counter[int] = Counter()
    for example in examples:
        learned = example.supervised
        closing = np.flatnonzero(learned & ~np.append(learned[1:], False))
        last.update(example.ids[closing].tolist())
    controls = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    config = getattr(plain_model(model), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return frozenset(ends | {token for token, _ in last.most_common(1) if token in controls})


def as_examples(name: str, turns: Sequence[Continuation]) -> list[WrittenExample]:
    """What was written in an episode as examples, every written token supervised, and nothing else.

    A turn whose prompt goes on where the turn before ended shares its example. One whose history was rendered anew
    (without earlier reasoning) begins another.

    Args:
        name: their ids begin with it.
        turns: in order, none of them empty.
    """
    found: list[tuple[list[int], list[bool]]] = []
    for turn in turns:
        if not turn.prompt or not turn.written:
            raise ValueError(
                f"a turn of {name} has {len(turn.prompt)} tokens of prompt and {len(turn.written)} written; wanted both"
            )
        known = found[-1][0] if found else []
        if not found or list(turn.prompt[: len(known)]) != known:
            found.append(([], []))
        ids, learned = found[-1]
        given = turn.prompt[len(ids) :]
        ids += [*given, *turn.written]
        learned += [False] * len(given) + [True] * len(turn.written)
    return [
        WrittenExample(
            name if len(found) == 1 else f"{name}/{number}", np.array(ids, dtype=np.int32), np.array(learned)
        )
        for number, (ids, learned) in enumerate(found)
    ]


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a causal language model reads, where its config says so."""
    limit: int | None = getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None)
    return limit


def write(
    student: nn.Module, head: Head, prompts: Sequence[Sequence[int]], how: Sampling, generator: torch.Generator
) -> list[Continuation]:
    """Continue prompts together until each has ended; one that has ends its part in the batch.

    The student is in eval mode and without gradients meanwhile, with a cache of keys and values. No random number is
    taken but from ``generator``.

    Args:
        student: a ``transformers`` causal language model, or a PEFT model around one.
        head: its head, padding rows told apart: they are never drawn.
        prompts: token ids, at least one each.
        how: see :class:`Sampling`.
        generator: on the student's device.

    Returns:
        One for each prompt, in order.

    Raises:
        ValueError: a prompt is empty, or leaves no room.
    """
    rooms = [how.room(prompt) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    decoder = plain_model(student).get_decoder()
    device = head.weight.device
    filler = min(how.ends)
    longest = max(map(len, prompts))
    # Padded on the left, so that all go on at one place.
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows, cache = list(range(len(prompts))), None
    with eval_mode(student):
        while rows:
            output = decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            drawn = _draw(head.logits(output.last_hidden_state[:, -1]), how.temperature, generator)
            for row, token in zip(rows, drawn.tolist(), strict=True):
                written[row].append(token)
            left = [
                place
                for place, row in enumerate(rows)
                if written[row][-1] not in how.ends and len(written[row]) < rooms[row]
            ]
            if len(left) < len(rows):
                chosen = torch.tensor(left, dtype=torch.long, device=device)
                rows = [rows[place] for place in left]
                mask, positions, drawn = mask[chosen], positions[chosen], drawn[chosen]
                if rows:
                    cache.batch_select_indices(chosen)
            ids = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return [
        Continuation(tuple(prompt), tuple(answer), answer[-1] in how.ends)
        for prompt, answer in zip(prompts, written, strict=True)
    ]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token [rows] of each row of logits [rows, vocabulary]."""
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
