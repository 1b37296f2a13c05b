"""What a verifier is, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from attar.data.types import Conversation

__all__ = ["Verdict", "Verifier", "wanted"]


class Verdict(NamedTuple):
    """What a verifier says of an answer."""

    ok: bool
    reason: str = ""
    """in a few words, for counting, where it is not"""


class Verifier(Protocol):
    """Anything that checks an answer; the user's own is a function, named ``package.module:function``."""

    def __call__(self, conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        """Check the last message of a conversation.

        Args:
            conversation: what was asked, and the answer.
            row: what the prompt came with: a reference answer, tests.
        """


def wanted(row: Mapping[str, Any], key: str) -> Any:
    """What a prompt's row holds for a verifier; None where it holds nothing."""
    value = row.get(key)
    return None if value in ("", [], {}) else value
