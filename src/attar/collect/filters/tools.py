"""Tool calls that the tools on offer would not take."""

from __future__ import annotations

from attar.collect.rows import Row
from attar.data.tools import CallChecker
from attar.data.types import Conversation

__all__ = ["Calls"]


class Calls:
    """Drops a row with a call of a tool that is not on offer, or with arguments that do not fit its JSON schema."""

    def __init__(self) -> None:
        self._check = CallChecker()

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Look at every call of the assistant."""
        example = row.example
        if not isinstance(example, Conversation):
            return None
        for i, message in enumerate(example.messages):
            for j, call in enumerate(message.tool_calls):
                misfit = self._check(call, example.tools)
                if misfit is not None:
                    where = "" if misfit.reason == "bad tools" else f"messages[{i}].tool_calls[{j}] "
                    return misfit.reason, where + misfit.detail
        return None
