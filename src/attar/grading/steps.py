"""One step of an agent against the step that the teacher took in the same state.

A step is acceptable where both call nothing, or where the same tools are called with the same arguments. What a text
says is not compared. Another call may be as good: this is a gate that costs little, not the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attar.data.tools import CallChecker
from attar.data.types import Message, ToolCall

__all__ = ["StepGrade", "grade_step", "same_value"]


@dataclass(frozen=True)
class StepGrade:
    """How a step compares; each is 1 or 0."""

    acceptable: bool
    kind: bool
    """calls where the reference calls, and answers where it answers"""
    tools: bool
    """calls the same tools, as often, in any order; without calls: as ``kind``"""
    valid: bool
    """every call is of a tool on offer and fits its schema"""
    hallucinated: bool
    """a call of a tool that is not on offer"""


def same_value(one: Any, other: Any) -> bool:
    """Whether two JSON values say the same: numbers by value, true is no number, texts but for white space around."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, str) and isinstance(other, str):
        return one.strip() == other.strip()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return one is None and other is None


def grade_step(
    answer: Message | None, reference: Message, tools: Sequence[dict[str, Any]], check: CallChecker
) -> StepGrade:
    """Grade a step.

    Args:
        answer: what the agent said; None where it said nothing that can be read.
        reference: what the teacher said.
        tools: on offer, as OpenAI schemas.
        check: of calls against schemas.
    """
    if answer is None:
        return StepGrade(acceptable=False, kind=False, tools=False, valid=False, hallucinated=False)
    misfits = [check(call, tools) for call in answer.tool_calls]
    kind = bool(answer.tool_calls) == bool(reference.tool_calls)
    names = sorted(call.name for call in answer.tool_calls) == sorted(call.name for call in reference.tool_calls)
    return StepGrade(
        acceptable=_same_calls(answer.tool_calls, reference.tool_calls),
        kind=kind,
        tools=kind and names,
        valid=not any(misfits),
        hallucinated=any(misfit is not None and misfit.reason == "unknown tool" for misfit in misfits),
    )


def _same_calls(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> bool:
    """Whether the same calls are made, in any order."""
    left = list(wanted)
    for call in calls:
        found = next((w for w in left if w.name == call.name and same_value(call.arguments, w.arguments)), None)
        if found is None:
            return False
        left.remove(found)
    return not left
