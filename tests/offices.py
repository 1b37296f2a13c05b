"""Episodes of the office, played without a runner."""

from collections.abc import Callable
from dataclasses import replace

from attar.agents.environments import Task, ToolError
from attar.agents.office import Office, OfficeExpert
from attar.data.episodes import Outcome
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, ChatRequest

Policy = Callable[[list[Message]], Message]

EXPERT = OfficeExpert()


def expert(messages: list[Message]) -> Message:
    [(_, answer)] = EXPERT.chat([ChatRequest(tuple(messages), 256)])
    assert isinstance(answer, Answer), answer
    return answer.message


def answer_calls(office: Office, message: Message) -> list[Message]:
    """The message and the results of its calls."""
    results = [message]
    for call in message.tool_calls:
        try:
            result = office.call(call.name, call.arguments)
        except ToolError as error:
            result = str(error)
        results.append(Message("tool", result, tool_call_id=call.id))
    return results


def begin(office: Office, task: Task) -> list[Message]:
    return list(office.start(task).messages)


def go_on(office: Office, messages: list[Message], policy: Policy, steps: int = 40) -> tuple[list[Message], Outcome]:
    """Play an episode that has begun."""
    for _ in range(steps):
        message = policy(messages)
        messages += answer_calls(office, message)
        if not message.tool_calls:
            break
    return messages, office.finish(messages)


def play(office: Office, task: Task, policy: Policy = expert) -> tuple[list[Message], Outcome]:
    return go_on(office, begin(office, task), policy)


def called(messages: list[Message]) -> list[ToolCall]:
    return [call for message in messages for call in message.tool_calls]


def saying(*messages: str | tuple[str, dict]) -> Policy:
    """An agent that says these texts and makes these calls, one after the other, and then ``Done.``"""
    rest = list(messages)

    def policy(_: list[Message]) -> Message:
        said = rest.pop(0) if rest else "Done."
        if isinstance(said, str):
            return Message("assistant", said)
        return Message("assistant", "", (ToolCall(f"own_{len(rest)}", *said),))

    return policy


def without_ids(messages: list[Message]) -> list[Message]:
    return [
        replace(m, tool_call_id=None, tool_calls=tuple(replace(call, id=None) for call in m.tool_calls))
        for m in messages
    ]
