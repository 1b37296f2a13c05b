"""Needs the extra `verifiers`, which cannot stand beside `api`: run in a venv of its own (docs/environments.md)."""

from pathlib import Path

import pytest

from attar.agents.environments import Environment, Task, ToolError
from attar.data.episodes import Outcome
from attar.data.types import Message, ToolCall
from attar.errors import EnvironmentLost, UsageError

pytest.importorskip("verifiers.v1")

from attar.agents.verifiers_env import VerifiersEnvironment


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """The taskset is found here and by the tool servers, which are processes of their own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def play(environment, task, answer, use=True):
    messages, tools = environment.start(task)
    assert [tool["function"]["name"] for tool in tools] == ["adder_add", "adder_sums"]
    conversation = list(messages)
    if use:
        for number, (name, arguments) in enumerate([("adder_add", {"a": 1, "b": 2}), ("adder_sums", {})]):
            call = ToolCall(f"c{number}", name, arguments)
            conversation.append(Message("assistant", "", tool_calls=(call,)))
            conversation.append(Message("tool", environment.call(name, arguments), tool_call_id=f"c{number}"))
        assert conversation[-1].content == "[3]"
    return environment.finish([*conversation, Message("assistant", answer)])


def test_a_taskset_is_played_and_judged_by_its_own_rewards():
    environment = VerifiersEnvironment("sums_taskset", splits={"train": (0, 3), "test": (3, 6)}, timeout_s=300)
    try:
        assert isinstance(environment, Environment)
        assert environment.name.startswith("verifiers:sums_taskset with verifiers 0.")
        train, test = environment.tasks("train"), environment.tasks("test")
        assert (len(train), len(test), len({task.id for task in (*train, *test)})) == (3, 3, 6)
        assert environment.tasks("val") == ()
        # An instance plays what another has listed.
        environment.close()
        environment = VerifiersEnvironment("sums_taskset", splits={}, timeout_s=300)
        with pytest.raises(UsageError, match="task 1 is not 0"):
            environment.start(Task("0", "sums", 1))
        beginning = environment.start(train[1])
        assert beginning.messages == (Message("system", "Be brief."), Message("user", "What is 1 + 2?"))
        with pytest.raises(ToolError, match="there is no tool 'sub'; there are: adder_add, adder_sums"):
            environment.call("sub", {})
        with pytest.raises(ToolError):
            environment.call("adder_add", {"a": "x"})
        # Begun again, whatever became of the one before; and nothing of its state is left.
        assert play(environment, train[1], "3") == Outcome(True, 1.0, "")
        assert play(environment, train[1], "4") == Outcome(False, 0.25, "right")
        assert play(environment, train[1], "3", use=False) == Outcome(False, 0.75, "used")
        with pytest.raises(EnvironmentLost, match=r"the task could not be judged: .*no paper"):
            play(environment, train[1], "crash", use=False)
        with pytest.raises(EnvironmentLost, match=r"start of task .* failed: .*no chalk"):
            environment.start(test[0])
        with pytest.raises(UsageError, match="finish without start"):
            environment.finish(())
    finally:
        environment.close()


def test_options_reach_the_taskset():
    environment = VerifiersEnvironment("sums_taskset", splits={"test": (0, 2)}, options={"system": "Think."})
    assert len(environment.tasks("test")) == 2
    environment.close()
    environment = VerifiersEnvironment(
        "sums_taskset", splits={"test": (0, 2)}, options={"stops": True}, ignore_stops=True
    )
    assert len(environment.tasks("test")) == 2
    environment.close()
    with pytest.raises(UsageError, match=r"cannot be loaded: .*colour"):
        VerifiersEnvironment("sums_taskset", splits={"test": (0, 2)}, options={"colour": "red"})


@pytest.mark.parametrize(
    ("taskset", "options", "splits", "why"),
    [
        ("no_such_taskset", {}, {"test": (0, 1)}, "'no_such_taskset' cannot be loaded"),
        ("textarena", {}, {"test": (0, 1)}, "its own TextArenaEnv|cannot be loaded"),
        ("sums_taskset", {}, {"test": (2, 2)}, "'test' is tasks 2 to 2"),
        ("sums_taskset", {}, {"train": (0, 3), "test": (2, 4)}, "'test' and 'train' share tasks"),
        ("sums_taskset", {}, {"test": (4, 9)}, "tasks 4 to 9, but the taskset ends after 6"),
        ("sums_taskset", {"stops": True}, {"test": (0, 1)}, "has the hook @stop 'enough'"),
    ],
)
def test_what_cannot_be_played_is_refused(taskset, options, splits, why):
    with pytest.raises(UsageError, match=why):
        VerifiersEnvironment(taskset, splits=splits, options=options).tasks("test")
