"""What is left of a conversation before it is encoded: how much of the reasoning, and which failed calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from attar.data.episodes import Episode
from attar.data.types import Conversation, Message, ToolCall
from attar.errors import DataError
from attar.tokens.prompts import encode_plain

__all__ = ["Reasoning", "with_reasoning", "without_failures"]

Talk = TypeVar("Talk", Conversation, Episode)

# An end mark, closing quotes and brackets, and then white space; the full stops of "e.g." and "1." end nothing. In
# Chinese and Japanese no space follows.
_SENTENCE_END = re.compile(r"(?<!\.\w)(?<!^\d)(?<!^\d\d)[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’]*|\n", re.MULTILINE)


@dataclass(frozen=True)
class Reasoning:
    """How much of an assistant's reasoning a student learns; small ones learn worse from long chains.

    Args:
        policy: all of it, none, or its beginning.
        tokens: of ``shorten``: the most tokens that stay, cut behind a whole sentence if one fits, else behind a whole
            word. None for the first sentence.

    Raises:
        ValueError: ``tokens`` is below 1, or given with another policy.
    """

    policy: Literal["keep", "strip", "shorten"] = "keep"
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in ("keep", "strip", "shorten"):
            raise ValueError(f"policy is {self.policy!r}; wanted keep, strip or shorten")
        if self.tokens is not None and (self.policy != "shorten" or self.tokens < 1):
            raise ValueError(
                f"tokens is {self.tokens} with policy {self.policy!r}; wanted at least 1, with policy 'shorten' alone"
            )


def with_reasoning(talk: Talk, reasoning: Reasoning, tokenizer: Any = None, counts: Counter[str] | None = None) -> Talk:
    """The conversation or episode with as much reasoning as the policy leaves.

    Reasoning is what stands in the field of that name; what an assistant thought aloud in its text is text.

    Args:
        talk: it is not changed.
        reasoning: the policy.
        tokenizer: counts tokens; needed where ``reasoning.tokens`` is given.
        counts: added to: ``reasoning kept``, ``reasoning shortened`` and ``reasoning stripped`` (messages that had
            some), ``reasoning characters`` (what they had) and ``reasoning characters left``.

    Raises:
        ValueError: there is a budget of tokens and no tokenizer.
    """
    if reasoning.tokens is not None and tokenizer is None:
        raise ValueError("a budget of tokens is given and no tokenizer to count them with; give the student's")
    counts = Counter() if counts is None else counts
    messages = []
    for message in talk.messages:
        before = (message.reasoning or "").strip()
        if not before:
            messages.append(message)
            continue
        after = _left(before, reasoning, tokenizer)
        counts["reasoning characters"] += len(before)
        counts["reasoning characters left"] += len(after)
        done = "kept" if after == before else "shortened" if after else "stripped"
        counts[f"reasoning {done}"] += 1
        messages.append(message if after == before else replace(message, reasoning=after or None))
    return replace(talk, messages=tuple(messages))


def _left(text: str, reasoning: Reasoning, tokenizer: Any) -> str:
    if reasoning.policy == "keep":
        return text
    if reasoning.policy == "strip":
        return ""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]
    if reasoning.tokens is None:
        return text[: ends[0]].rstrip()
    words = [match.end() for match in re.finditer(r"\S+", text)]
    for places in (ends, words):
        fitting = _last_that_fits(text, places, reasoning.tokens, tokenizer)
        if fitting:
            return text[:fitting].rstrip()
    return ""


def _last_that_fits(text: str, places: Sequence[int], tokens: int, tokenizer: Any) -> int:
    """The last of the ascending places up to which the text is no longer than so many tokens; 0 for none."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        if len(encode_plain(tokenizer, text[: places[middle]].rstrip())) <= tokens:
            low = middle + 1
        else:
            high = middle
    return places[low - 1] if low else 0


def without_failures(
    talk: Talk,
    policy: Literal["keep", "unlearn", "drop"],
    failed: Callable[[Message], bool],
    counts: Counter[str] | None = None,
) -> Talk:
    """The conversation or episode with what the policy leaves of failed calls that were repaired.

    A failed call is repaired where a later call of the same tool did not fail. One that nothing repairs stays as it
    is: that a thing cannot be done is what the agent had to find out.

    Args:
        talk: it is not changed.
        policy: ``keep``; ``unlearn``: the message that made such a call is read and not learned, with all its calls;
            ``drop``: the call and its result are taken out, and a message that is left without calls with them. What
            later reasoning says of the failure stays.
        failed: whether a tool's result, a message, says that its call failed. Environments differ in how they say so.
        counts: added to: ``failed calls``, ``repaired calls``; ``messages not learned`` or ``calls dropped`` and
            ``messages dropped`` (the assistant's).

    Raises:
        DataError: a tool's result belongs to no call.
        ValueError: the policy is unknown.
    """
    if policy not in ("keep", "unlearn", "drop"):
        raise ValueError(f"policy is {policy!r}; wanted keep, unlearn or drop")
    counts = Counter() if counts is None else counts
    results = _results(talk.messages)
    calls = {(i, n): call for i, m in enumerate(talk.messages) for n, call in enumerate(m.tool_calls)}
    failures = {place: failed(talk.messages[result]) for place, result in results.items()}
    succeeded: dict[str, int] = {}
    for place, failure in failures.items():
        if not failure:
            succeeded[calls[place].name] = max(place[0], succeeded.get(calls[place].name, -1))
    repaired = {p for p, failure in failures.items() if failure and succeeded.get(calls[p].name, -1) > p[0]}
    counts["failed calls"] += sum(failures.values())
    counts["repaired calls"] += len(repaired)
    if policy == "keep" or not repaired:
        return talk
    if policy == "unlearn":
        makers = {i for i, _ in repaired}
        counts["messages not learned"] += sum(talk.messages[i].train is not False for i in makers)
        unlearned = [replace(m, train=False) if i in makers else m for i, m in enumerate(talk.messages)]
        return replace(talk, messages=tuple(unlearned))
    return _dropped(talk, repaired, {results[place] for place in repaired}, counts)


def _results(messages: Sequence[Message]) -> dict[tuple[int, int], int]:
    """Where the result of each call stands: (message, call within it) -> message; calls without one are left out."""
    results: dict[tuple[int, int], int] = {}
    for number, message in enumerate(messages):
        if message.role != "tool":
            continue
        maker = next((i for i in range(number - 1, -1, -1) if messages[i].role == "assistant"), None)
        open_calls = [
            (maker, n)
            for n, call in enumerate(messages[maker].tool_calls if maker is not None else ())
            if maker is not None
            and (maker, n) not in results
            and (None in (call.id, message.tool_call_id) or call.id == message.tool_call_id)
        ]
        if not open_calls:
            raise DataError(
                f"messages[{number}] is the result of the call {message.tool_call_id!r}, which the assistant's message "
                "before it does not make; leave the conversation out, or give call and result one id"
            )
        results[open_calls[0]] = number
    return results


def _dropped(talk: Talk, calls: set[tuple[int, int]], results: set[int], counts: Counter[str]) -> Talk:
    """The same without some calls, their results, and messages that are left without calls."""
    messages: list[Message] = []
    numbers: dict[int, int] = {}
    for i, message in enumerate(talk.messages):
        kept: list[ToolCall] = [call for n, call in enumerate(message.tool_calls) if (i, n) not in calls]
        counts["calls dropped"] += len(message.tool_calls) - len(kept)
        emptied = bool(message.tool_calls) and not kept
        counts["messages dropped"] += emptied
        if i in results or emptied:
            continue
        numbers[i] = len(messages)
        messages.append(replace(message, tool_calls=tuple(kept)))
    changes: dict[str, Any] = {"messages": tuple(messages)}
    if isinstance(talk, Episode):
        changes["steps"] = tuple(replace(s, message=numbers[s.message]) for s in talk.steps if s.message in numbers)
    return replace(talk, **changes)
