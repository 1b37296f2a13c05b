"""Static prompt pruning: what is the same in all training conversations is learned, and cut from the prompt.

The cut is recorded with the student, and made when it is served, where a request carries exactly what was cut.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from attar.data.episodes import Episode
from attar.data.types import Conversation, Message
from attar.errors import DataError, ModelError
from attar.workspace import digest, write_json

__all__ = ["PrunedPrompt", "PrunedRequest", "find_static"]

Talk = TypeVar("Talk", Conversation, Episode)

FILE = "pruned_prompt.json"
"""in a student's folder"""


class PrunedRequest(NamedTuple):
    """What a model is asked with."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """that the template writes; of a pruned request none where they are cut. Calls are still to fit the ones that the
    request carries, which are ``PrunedPrompt.tools``"""
    pruned: bool


@dataclass(frozen=True)
class PrunedPrompt:
    """What is cut from a student's prompts.

    Raises:
        ValueError: nothing is cut, or the hash is not that of the tools.
    """

    system_sha256: str | None
    """of the first message's text, the system's; None where it is not cut"""
    tools_sha256: str | None
    """of the list of tools as a JSON value; None where it is not cut"""
    tools: tuple[dict[str, Any], ...] = ()
    """the tools that are cut: whoever constrains calls to their schemas needs them"""
    marker: str = ""
    """what stands in place of the system's text"""

    def __post_init__(self) -> None:
        if self.system_sha256 is None and self.tools_sha256 is None:
            raise ValueError("neither the system's text nor the tools are cut; leave pruning out")
        if self.tools_sha256 != (digest(list(self.tools)) if self.tools else None):
            raise ValueError(f"tools_sha256 is {self.tools_sha256}, and not that of the {len(self.tools)} tools")

    def request(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), counts: Counter[str] | None = None
    ) -> PrunedRequest:
        """A request without what is cut; as it is where it does not carry exactly that, all of it.

        Args:
            messages: the conversation so far.
            tools: on offer, as OpenAI schemas.
            counts: added to: ``pruned`` and ``left whole``.
        """
        counts = Counter() if counts is None else counts
        fits = self.system_sha256 in (None, _system_hash(messages)) and self.tools_sha256 in (None, _hash(tools))
        counts["pruned" if fits else "left whole"] += 1
        if not fits:
            return PrunedRequest(tuple(messages), tuple(tools), pruned=False)
        if self.system_sha256 is not None:
            messages = [replace(messages[0], content=self.marker), *messages[1:]]
        return PrunedRequest(tuple(messages), () if self.tools_sha256 is not None else tuple(tools), pruned=True)

    def apply(self, talk: Talk, counts: Counter[str] | None = None) -> Talk:
        """A conversation or episode to train on, cut as a request with its beginning is."""
        messages, tools, _ = self.request(talk.messages, talk.tools, counts)
        return replace(talk, messages=messages, tools=tools)

    def save(self, folder: Path) -> None:
        """Write it beside a student's weights."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> PrunedPrompt | None:
        """What was cut from the prompts of the student in a folder; None where nothing was.

        Raises:
            ModelError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text("utf-8"))
            return cls(**fields | {"tools": tuple(fields["tools"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{path} does not say what was cut from the student's prompts ({error}); without it the student is "
                "asked otherwise than it was trained; export it again"
            ) from error


def find_static(talks: Iterable[Conversation | Episode], *, marker: str = "") -> PrunedPrompt:
    """What never changes in the prompts of training conversations: the system's text, and the tools.

    Args:
        talks: those that the student is trained on, all of them.
        marker: what is to stand in place of the system's text, in a token or two.

    Returns:
        The cut: of what is the same in all conversations, and there at all.

    Raises:
        DataError: neither is; says how many there are of each.
    """
    systems: Counter[str | None] = Counter()
    offers: Counter[str | None] = Counter()
    tools: tuple[dict[str, Any], ...] = ()
    for talk in talks:
        systems[_system_hash(talk.messages)] += 1
        offers[_hash(talk.tools)] += 1
        tools = talk.tools
    system, offered = (next(iter(c)) if len(c) == 1 else None for c in (systems, offers))
    if system is None and offered is None:
        raise DataError(
            f"nothing is the same in all {systems.total()} conversations: {len(systems)} system texts (with none: "
            f"{systems[None]} conversations), {len(offers)} lists of tools (with none: {offers[None]}); split the data "
            "by node, or leave pruning out"
        )
    return PrunedPrompt(system, offered, tools if offered is not None else (), marker)


def _hash(tools: Sequence[dict[str, Any]]) -> str | None:
    return digest(list(tools)) if tools else None


def _system_hash(messages: Sequence[Message]) -> str | None:
    """Of the role and text of the first message, if it is the system's."""
    first = messages[0] if messages else None
    return digest([first.role, first.content]) if first and first.role in ("system", "developer") else None
