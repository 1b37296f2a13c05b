"""Episodes in a prompt: what an untrained model can do when it is shown how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from attar.data.episodes import Episode
from attar.data.types import Message
from attar.engines.base import Answer, Capability, ChatEngine, ChatRequest, Failure

__all__ = ["Demonstrated", "choose_demonstrations"]


class Demonstrated:
    """An engine whose every request begins with the messages of other episodes; see
    :class:`attar.engines.base.ChatEngine`.

    Args:
        engine: who answers.
        episodes: shown in this order, each without its system prompt, after the request's own.
    """

    def __init__(self, engine: ChatEngine, episodes: Sequence[Episode]) -> None:
        self._engine = engine
        self._shown = tuple(m for e in episodes for m in e.messages if m.role not in ("system", "developer"))

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Those of the engine."""
        return self._engine.capabilities

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests with the demonstrations before them."""
        yield from self._engine.chat(request and self._with(request) for request in requests)

    def _with(self, request: ChatRequest) -> ChatRequest:
        first = next((n for n, m in enumerate(request.messages) if m.role not in ("system", "developer")), 0)
        messages: tuple[Message, ...] = (*request.messages[:first], *self._shown, *request.messages[first:])
        return replace(request, messages=messages)


def choose_demonstrations(episodes: Sequence[Episode], number: int) -> list[Episode]:
    """Successful episodes, of as many families as there are, the shortest of each family first.

    A prompt is paid at every step, so that short ones are shown; which ones follows from the episodes alone.
    """
    by_family: dict[str, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda e: (len(e.steps), e.task, e.trial)):
        if episode.outcome.success:
            by_family.setdefault(episode.family, []).append(episode)
    chosen: list[Episode] = []
    queues = [by_family[family] for family in sorted(by_family)]
    while len(chosen) < number and any(queues):
        for queue in queues:
            if queue and len(chosen) < number:
                chosen.append(queue.pop(0))
    return chosen
