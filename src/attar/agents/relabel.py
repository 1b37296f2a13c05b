"""What the teacher would have done in the states that the student reached: DAgger (Ross et al. 2011, arXiv:1011.0686).

The teacher only has to answer, so that one behind an API does as well. Of an episode of the student's come one
conversation in which the steps are learned that the teacher would have taken too, and one for each of the first steps
at which it would have done something else: what came before is read, the teacher's step is learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from attar.data.episodes import Episode
from attar.data.tools import CallChecker
from attar.data.types import Conversation, Message
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure
from attar.grading.steps import grade_step

__all__ = ["Label", "Relabelled", "ask_labels", "relabelled", "states_of"]


class Label(NamedTuple):
    """What the teacher would have done at a step."""

    step: int
    """number of the step in its episode"""
    message: Message | None
    """None where the teacher's answer cannot be used"""
    reason: str | None
    """why it cannot"""


@dataclass(frozen=True)
class Relabelled:
    """What is learned from one episode."""

    conversations: tuple[Conversation, ...]
    agreed: int
    """steps at which the teacher would have done the same"""
    corrected: int
    """steps at which it would not, and which are learned"""
    beyond: int
    """further ones, beyond the number of corrections"""
    unusable: int
    """steps without a usable answer of the teacher"""


def ask_labels(
    engine: ChatEngine, episodes: Sequence[Episode], *, max_tokens: int, temperature: float | None
) -> Iterator[tuple[int, Label]]:
    """Ask the teacher about every step of every episode.

    Args:
        engine: the teacher.
        episodes: of the student.
        max_tokens: of an answer.
        temperature: None leaves it to the engine.

    Yields:
        (number of the episode, label), in the order of completion. A request that failed and may do better is left
        out, so that the next call asks it again.

    Raises:
        ModelError, CapabilityError, Stopped: as ``engine.chat`` does.
    """
    places = [(number, step) for number, episode in enumerate(episodes) for step in range(len(episode.steps))]

    def requests() -> Iterator[ChatRequest]:
        for number, step in places:
            episode = episodes[number]
            yield ChatRequest(
                episode.messages[: episode.steps[step].message],
                max_tokens,
                tools=episode.tools,
                temperature=temperature,
                seed=(episode.seed + step) % 2**31,
            )

    for place, outcome in engine.chat(requests()):
        number, step = places[place]
        if isinstance(outcome, Failure):
            if outcome.final:
                yield number, Label(step, None, outcome.reason)
        else:
            yield number, _label(step, outcome)


def _label(step: int, answer: Answer) -> Label:
    if answer.finish_reason in ("length", "content_filter"):
        return Label(step, None, answer.finish_reason)
    return Label(step, answer.message, None)


def relabelled(episode: Episode, labels: Sequence[Label], corrections: int) -> Relabelled:
    """What is learned from an episode of the student's.

    Args:
        episode: what the student did.
        labels: of each of its steps, in order.
        corrections: how many steps at which the teacher would have done something else are learned: the first ones.

    Raises:
        ValueError: there is not a label for each step.
    """
    if [label.step for label in labels] != list(range(len(episode.steps))):
        raise ValueError(
            f"episode {episode.task} has {len(episode.steps)} steps and labels of {[x.step for x in labels]}"
        )
    check = CallChecker()
    messages = [replace(m, train=False) if m.role == "assistant" else m for m in episode.messages]
    branches: list[Conversation] = []
    agreed = beyond = unusable = 0
    for step, label in zip(episode.steps, labels, strict=True):
        place = step.message
        mine, wanted = episode.messages[place], label.message
        if wanted is None or _misfit(wanted, episode.tools, check):
            unusable += 1
        elif grade_step(mine, wanted, episode.tools, check).acceptable:
            # The teacher's own words, with the ids that results name.
            messages[place] = replace(_with_ids(wanted, mine), train=True)
            agreed += 1
        elif len(branches) < corrections:
            branches.append(Conversation((*messages[:place], replace(wanted, train=True)), episode.tools, episode.task))
        else:
            beyond += 1
    own = Conversation(tuple(messages), episode.tools, episode.task)
    # A branch has learned nothing of what came before it, so that no step is learned twice.
    branches = [_only_last(branch) for branch in branches]
    return Relabelled((*([own] if agreed else []), *branches), agreed, len(branches), beyond, unusable)


def _misfit(message: Message, tools: Sequence[dict[str, Any]], check: CallChecker) -> bool:
    return any(check(call, tools) is not None for call in message.tool_calls)


def _with_ids(message: Message, other: Message) -> Message:
    """The message, its calls in the order and with the ids of another one that makes the same."""
    return replace(message, tool_calls=other.tool_calls)


def _only_last(conversation: Conversation) -> Conversation:
    *before, last = conversation.messages
    read = (replace(m, train=False) if m.role == "assistant" else m for m in before)
    return replace(conversation, messages=(*read, last))


def states_of(conversation: Conversation) -> Iterator[str]:
    """A hash of each state in which the assistant acts: what was asked, called and returned before; what it thought and
    said does not count.
    """
    state = hashlib.sha256()
    for message in conversation.messages:
        if message.role == "assistant":
            yield state.hexdigest()
            said: Any = [[call.name, call.arguments] for call in message.tool_calls]
        else:
            said = message.content
        state.update(json.dumps([message.role, said], sort_keys=True, ensure_ascii=False).encode())


def new_states(episodes: Iterable[Episode], known: set[str]) -> tuple[int, int]:
    """How many of the states of episodes are not known, of how many; those are known afterwards."""
    new = total = 0
    for episode in episodes:
        for state in states_of(episode.conversation):
            total += 1
            new += state not in known
            known.add(state)
    return new, total
