"""Conversations -> token ids and loss masks.

The ids are those of ``tokenizer.apply_chat_template``. The loss stands on what the assistant produced, the end-of-turn
token included, and on nothing that the template, the user or a tool wrote. Control strings in content are plain text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from attar.data.episodes import Episode
from attar.data.types import Conversation, Message
from attar.errors import DataError
from attar.tokens.controls import Encoded
from attar.tokens.examples import KINDS, LossWeights, TokenizedExample
from attar.tokens.turns import Turn, Turns
from attar.workspace import digest

__all__ = ["encode_conversation", "encode_conversations", "encode_request", "template_fingerprint"]


def encode_conversation(
    tokenizer: Any,
    conversation: Conversation | Episode,
    *,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
    weights: LossWeights | None = None,
    counts: Counter[str] | None = None,
) -> list[TokenizedExample]:
    """Token ids and loss mask of a conversation, up to the last message that is learned.

    It gives one example where each answer is rendered in the whole conversation as it is at its own moment. A template
    that later drops an answer's reasoning, or moves the system's text, gives several, each with the history that the
    model has at that moment; every answer is learned in exactly one.

    Args:
        tokenizer: a fast tokenizer with a chat template. No BOS is added to what the template writes.
        conversation: all assistants' messages are learned, except where ``train`` is False. Of an episode weights
            take the outcome into account.
        max_tokens: the longest example; what goes beyond is cut off on the right.
        template_kwargs: further variables of the template (``enable_thinking``), as the server of the student will set
            them.
        weights: how much tokens count, by what they are for; with them the examples know their ``kinds``. None for
            all alike.
        counts: added to: ``examples``, ``tokens`` and ``supervised`` (what is returned); ``truncated`` (examples) and
            ``supervised lost`` (tokens that this cut off); ``dropped`` (examples with nothing left to learn, not
            returned); ``straddling`` (tokens that lie across the edge of an answer, not supervised); ``reasoning left
            out`` and ``text left out`` (messages whose reasoning, or whose text beside calls, the template does not
            write); with weights ``weightless`` (tokens not learned as they weigh nothing), and ``supervised reason``,
            ``supervised text``, ``supervised call`` and ``supervised end``.

    Returns:
        The examples in the order of their last messages; none where nothing is to be learned.

    Raises:
        DataError: the template refuses the conversation, or what the assistant produced cannot be told from the rest;
            the message says what differs.
        ModelError: the tokenizer has no chat template, or one that leaves out the conversation's tools, or is not a
            fast one.
    """
    success = conversation.outcome.success if isinstance(conversation, Episode) else None
    if isinstance(conversation, Episode):
        conversation = conversation.conversation
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; wanted at least 2, one to predict from and one to predict")
    counts = Counter() if counts is None else counts
    turns = Turns(tokenizer, conversation, template_kwargs or {})
    open_turns = [
        turns.turn(i) for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.train is not False
    ]
    for turn in open_turns:
        message, produced = conversation.messages[turn.index], turn.text[turn.start : turn.end]
        counts["reasoning left out"] += (message.reasoning or "").strip() not in produced
        counts["text left out"] += bool(message.tool_calls) and message.content.strip() not in produced
    covers: list[list[Turn]] = []
    while open_turns:
        text = open_turns[-1].text
        covers.insert(0, [turn for turn in open_turns if text.startswith(turn.text[: turn.end])])
        open_turns = [turn for turn in open_turns if turn not in covers[0]]
    examples = []
    for covered in covers:
        name = conversation.id if len(covers) == 1 else f"{conversation.id}/{covered[-1].index}"
        example, encoded = _example(turns, name, covered, counts)
        if weights is not None:
            steps = [_step(conversation, turn) for turn in covered]
            factors = [weights.of_step(step) * weights.of_outcome(success) for step in steps]
            whole, example = example, _weighted(turns, example, encoded, covered, weights, factors)
            counts["weightless"] += int(whole.supervised.sum() - example.supervised.sum())
        cut = _cut(example, max_tokens, counts)
        if cut is not None:
            examples.append(cut)
    return examples


def encode_request(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that a model is given when it is asked for the next message.

    They are those with which an example of ``encode_conversation`` begins, up to the answer. Control strings in
    content are plain text.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the conversation so far.
        tools: on offer, as OpenAI schemas.
        template_kwargs: further variables of the template, those of training.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: the tokenizer has no chat template, or one that leaves out the tools, or is not a fast one.
    """
    turns = Turns(tokenizer, Conversation(tuple(messages), tuple(tools)), template_kwargs or {})
    return turns.coder.encode(*turns.asked()).ids


def _step(conversation: Conversation, turn: Turn) -> int:
    """Which of the assistant's messages a turn is, from 0."""
    return sum(message.role == "assistant" for message in conversation.messages[: turn.index])


def _example(turns: Turns, name: str, covered: list[Turn], counts: Counter[str]) -> tuple[TokenizedExample, Encoded]:
    text, quoted = covered[-1].text, covered[-1].quoted
    encoded = turns.coder.encode(text, quoted)
    spans = [(turn.start, turn.end) for turn in covered]
    supervised = turns.coder.inside(encoded, text, spans)
    straddling = [
        not inside and any(start < edge < end for edge in (edge for span in spans for edge in span))
        for inside, (start, end) in zip(supervised, encoded.offsets, strict=True)
    ]
    counts["straddling"] += sum(straddling)
    ids, mask = np.array(encoded.ids, dtype=np.int32), np.array(supervised, dtype=np.bool_)
    return TokenizedExample(name, ids, mask), encoded


def _weighted(
    turns: Turns,
    example: TokenizedExample,
    encoded: Encoded,
    covered: list[Turn],
    weights: LossWeights,
    factors: list[float],
) -> TokenizedExample:
    """The example with kinds and weights. A token across the edge of two kinds counts to the one that it ends in."""
    edges = [edge for turn in covered for edge in (turn.start, *turns.parts(turn))]
    last = np.array([end - 1 for _, end in encoded.offsets])
    place = np.searchsorted(edges, last, side="right") - 1
    kinds = np.where(example.supervised, place % len(KINDS), -1).astype(np.int8)
    values = weights.of_kinds()[kinds] * np.array(factors, dtype=np.float32)[place // len(KINDS)]
    return replace(example, kinds=kinds).weighted(values)


def _cut(example: TokenizedExample, max_tokens: int, counts: Counter[str]) -> TokenizedExample | None:
    """The example with at most so many tokens; None if nothing is left to learn."""
    if len(example) > max_tokens:
        counts["truncated"] += 1
        counts["supervised lost"] += int(example.supervised[max_tokens:].sum())
        example = example.first(max_tokens)
    if not example.supervised.any():
        counts["dropped"] += 1
        return None
    counts["examples"] += 1
    counts["tokens"] += len(example)
    counts["supervised"] += int(example.supervised.sum())
    if example.kinds is not None:
        for number, kind in enumerate(KINDS):
            counts[f"supervised {kind}"] += int((example.kinds == number).sum())
    return example


def encode_conversations(
    tokenizer: Any,
    conversations: Iterable[Conversation | Episode],
    *,
    max_tokens: int,
    max_truncated: float,
    on_unusable: Literal["stop", "skip"] = "stop",
    template_kwargs: Mapping[str, Any] | None = None,
    weights: LossWeights | None = None,
) -> tuple[list[TokenizedExample], Counter[str]]:
    """Token ids and loss masks of a data set.

    Args:
        tokenizer: as for :func:`encode_conversation`, like ``max_tokens`` and ``template_kwargs``.
        conversations: the data set; episodes are conversations with an outcome.
        max_tokens: the longest example.
        max_truncated: the largest share of examples, 0 to 1, that may be cut off.
        on_unusable: stop at a conversation that the template cannot render or that cannot be masked, or skip it and
            count it as ``unusable``.
        template_kwargs: further variables of the template.
        weights: as for :func:`encode_conversation`.

    Returns:
        The examples, and the counts of :func:`encode_conversation` over all of them.

    Raises:
        DataError: no example is left, more are cut off than allowed, or a conversation is unusable.
        ModelError: the tokenizer has no chat template, or is not a fast one.
    """
    counts: Counter[str] = Counter()
    examples: list[TokenizedExample] = []
    for conversation in conversations:
        try:
            examples += encode_conversation(
                tokenizer,
                conversation,
                max_tokens=max_tokens,
                template_kwargs=template_kwargs,
                weights=weights,
                counts=counts,
            )
        except DataError:
            if on_unusable == "stop":
                raise
            counts["unusable"] += 1
    share = counts["truncated"] / max(1, counts["examples"] + counts["dropped"])
    if share > max_truncated:
        raise DataError(
            f"{counts['truncated']} of {counts['examples'] + counts['dropped']} examples ({share:.1%}) are longer than "
            f"{max_tokens} tokens, at most {max_truncated:.1%} may be; {counts['supervised lost']} tokens to learn "
            "would be cut off. Raise max_tokens, raise max_truncated, or shorten the conversations"
        )
    if not examples:
        raise DataError(
            f"no example is left to learn from ({ {k: n for k, n in counts.items() if n} }); check the roles and train "
            "flags of the messages and the weights of their kinds, and raise max_tokens if examples were cut off"
        )
    return examples, counts


def template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides what a conversation's tokens are: chat template, vocabulary, special tokens.

    Signals that were computed under another fingerprint belong to other tokens.
    """
    added = [(i, t.content, t.special) for i, t in sorted(tokenizer.added_tokens_decoder.items())]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return digest([tokenizer.chat_template, json.dumps(vocabulary), added, tokenizer.special_tokens_map])
