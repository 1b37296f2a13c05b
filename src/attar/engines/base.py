"""What answers: one protocol for an HTTP API, a model in this process, a trained classifier, a scripted fake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from attar.data.types import Message, Prompt
from attar.errors import CapabilityError

__all__ = [
    "Answer",
    "Capability",
    "ChatEngine",
    "ChatRequest",
    "Completion",
    "Engine",
    "Failure",
    "Scores",
    "TokenLogprobs",
    "Written",
    "all_known",
    "blocks",
    "need",
]

Capability = Literal["text", "top_logprobs", "scores", "prompt_top_logprobs", "logits", "hidden", "embed"]


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of continuations after prompts."""

    log_probs: npt.NDArray[np.float32]
    """[prompts, continuations], natural logarithm, summed over the tokens of each continuation"""
    tokens: npt.NDArray[np.int64]
    """[continuations], number of tokens of each"""
    prompt_tokens: npt.NDArray[np.int64]
    """[prompts], number of tokens of each, shared prefix included"""


@dataclass(frozen=True)
class Written:
    """What an engine wrote after token ids."""

    ids: list[int]
    """the token that ended it included"""
    stopped: bool
    """whether such a token ended it, and not the limit"""
    first_token_ms: float
    """from the request to the first of them"""


@runtime_checkable
class Engine(Protocol):
    """Anything that answers. A user's own class, named ``package.module:Class`` in the recipe, does the same."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine can give."""

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model behind it, where it is known."""

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Write the most likely continuation of each prompt, at most ``max_tokens`` tokens."""

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Log-probabilities of the same continuations after each prompt."""


@dataclass(frozen=True)
class ChatRequest:
    """One request to write the next message of a conversation. A field that is None is left to the server."""

    messages: tuple[Message, ...]
    max_tokens: int
    """of the answer, its reasoning included; the most that the request can cost follows from it"""
    tools: tuple[dict[str, Any], ...] = ()
    """on offer, as OpenAI schemas"""
    tool_choice: str | None = None
    """``auto``, ``none``, ``required``, or the name of the tool that must be called"""
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    """texts that end the answer and do not stand in it"""
    seed: int | None = None
    schema: dict[str, Any] | None = None
    """JSON schema that the answer's text must fit"""
    top_logprobs: int | None = None
    """how many of the likeliest tokens are wanted at each position of the answer"""
    sample: int = 0
    """which of several answers to the same request this is: each number is asked, and paid, once"""


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of an answer and what else could have stood there; natural logarithms."""

    token: str
    log_prob: float
    top: tuple[tuple[str, float], ...]
    """(token, log-probability), the likeliest first"""


@dataclass(frozen=True)
class Answer:
    """What an engine answered to a :class:`ChatRequest`."""

    message: Message
    """of the assistant: text, tool calls and reasoning, each apart"""
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    """``length``: cut by ``max_tokens``; ``content_filter``: cut by the provider, or the model refused"""
    prompt_tokens: int
    """cached ones included"""
    completion_tokens: int
    """reasoning included"""
    cached_tokens: int
    """of the prompt, those that the server had and bills at less"""
    model: str
    """as the server names it"""
    usd: float | None
    """what it cost; None where no price is known"""
    top_logprobs: tuple[TokenLogprobs, ...] | None = None
    """a record a token of the text, where the request asked for it"""


@dataclass(frozen=True)
class Failure:
    """A request that ended without an answer that can be used."""

    reason: str
    """in a word or two, for counting: ``content_filter``, ``bad request``, ``not json``, ``bad tool call``,
    ``no tool call``, ``timeout``, ``server error``, ``connection``"""
    detail: str
    """what the server said"""
    final: bool
    """whether the same request would end in the same way: such a failure is kept as an answer is, and a later run does
    not ask again"""
    usd: float | None = None
    """what it cost; for an unknown outcome the most that it can have cost; None where no price is known"""


@runtime_checkable
class ChatEngine(Protocol):
    """Anything that continues conversations."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine can give: ``text``, and ``top_logprobs`` where it has them."""

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests, many at a time where the engine can.

        Requests are drawn one by one as there is room for them, so that any number of them takes little memory. None
        among them, which has no number, says that the next one depends on answers that are still out: the engine hands
        on at least one of those before it draws again.
        Closing the iterator cancels what is not answered yet; nothing that was answered and paid is lost where the
        engine keeps a ledger.

        Args:
            requests: what to ask; drawn in the caller's thread, while it waits for the next answer.

        Yields:
            (number of the request, counted from 0, and what became of it), in the order of completion, each once.

        Raises:
            ModelError: what is wrong is wrong for every request: the key, the model's name, the address.
            CapabilityError: a request asks for what the engine cannot give.
            Stopped: budget or quota is used up, or the server is gone; what was answered is kept, and the same call
                goes on from there.
        """


def blocks(requests: Iterable[ChatRequest | None], size: int) -> Iterator[list[tuple[int, ChatRequest]]]:
    """Numbered requests in blocks of at most so many, each of which is to be answered before the next is drawn."""
    block: list[tuple[int, ChatRequest]] = []
    number = 0
    for request in requests:
        if request is not None:
            block.append((number, request))
            number += 1
        if block and (request is None or len(block) == size):
            yield block
            block = []
    if block:
        yield block


def all_known(requests: Iterable[ChatRequest | None], who: str) -> Iterator[ChatRequest]:
    """The requests, for an engine that cannot hand on answers between them.

    Raises:
        CapabilityError: one depends on answers that are still out; names ``who`` cannot do that.
    """
    for request in requests:
        if request is None:
            raise CapabilityError(
                f"{who} answers requests that are all known before, and here one depends on answers to others, as in "
                "an agent's episode"
            )
        yield request


def need(engine: Engine | ChatEngine, capability: Capability, purpose: str) -> None:
    """Refuse an engine that cannot do what is asked of it.

    Raises:
        CapabilityError: names the capability, the purpose and what the engine has.
    """
    if capability not in engine.capabilities:
        have = ", ".join(sorted(engine.capabilities)) or "nothing"
        raise CapabilityError(
            f"{purpose} needs {capability!r}, which {type(engine).__name__} cannot give (it gives: {have}); "
            "use another teacher, such as hf:FOLDER"
        )
